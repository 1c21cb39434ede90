"""From names and limits to an engine: models loaded, vocabularies compared, pages sized."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from specinfer.cache.blocks import BlockAllocator
from specinfer.cache.pool import KVPool
from specinfer.config import EngineConfig, Speculation
from specinfer.draft.calibration import Calibration
from specinfer.draft.model import ModelDrafter
from specinfer.draft.ngram import NgramDrafter
from specinfer.engine.controller import Controller
from specinfer.engine.engine import Engine
from specinfer.engine.measure import Report, measure_models
from specinfer.errors import CapacityError, ConfigError, ModelError
from specinfer.models.architecture import Architecture, read_architecture
from specinfer.models.decoder import Decoder
from specinfer.models.weights import load_decoder, read_config, resolve_model
from specinfer.run.runner import Runner
from specinfer.text.tokenizer import Tokenizer

NGRAM = "ngram"
"""The drafter that needs no model: the request's own text."""

Progress = Callable[[str, int, int], None]
"""progress(model, bytes read so far, bytes in all)"""

_FREE_SHARE = 4
"""Without kv_cache_memory, pages take at most one part in this many of the free memory."""


def build_engine(
    model: str,
    drafters: Sequence[str],
    *,
    config: EngineConfig,
    speculation: Speculation,
    dtype: str,
    device: str,
    progress: Progress | None = None,
    calibration: Calibration | None = None,
) -> Engine:
    """Load a target and its drafters and give them pages.

    raises  ModelError, ConfigError or CapacityError, with nothing half-done
    """
    place = _resolve_device(device)
    max_nodes = least_nodes = speculation.num_nodes(len(drafters))
    if speculation.tree == "auto":  # a prediction drafts where no drafter is
        max_nodes = speculation.num_nodes(len(drafters) + 1)
    # Everything that can be refused cheaply is refused before weights are read.
    names = [model, *(name for name in drafters if name != NGRAM)]
    if len(drafters) > len(names):
        raise ConfigError(f'drafters name "{NGRAM}" more than once: once is enough')
    folders = [resolve_model(name) for name in names]
    tokenizers = [Tokenizer.from_folder(folder) for folder in folders]
    for name, tokenizer in zip(names[1:], tokenizers[1:], strict=True):
        if not tokenizers[0].has_same_vocabulary(tokenizer):
            raise ModelError(
                f"drafter {name!r} has another vocabulary than {model!r}: a drafter must share "
                "the target's tokenizer"
            )
    architectures = [read_architecture(read_config(folder)) for folder in folders]
    max_model_len = _resolve_length(config.max_model_len, architectures[0])
    decoders = [
        _load(name, folder, dtype, place, progress)
        for name, folder in zip(names, folders, strict=True)
    ]
    allocator = BlockAllocator(
        _num_blocks(config, decoders, max_model_len, max_nodes, least_nodes), config.block_size
    )
    num_slots = allocator.num_blocks * config.block_size
    runners = [Runner(decoder, num_slots) for decoder in decoders]
    vocab_size = runners[0].vocab_size
    models = iter(
        ModelDrafter(name, runner, vocab_size=vocab_size, max_tokens=config.max_num_batched_tokens)
        for name, runner in zip(names[1:], runners[1:], strict=True)
    )

    def measure(report: Report | None) -> Controller:
        tokens = config.max_num_batched_tokens
        times = measure_models(names, folders, runners, max_tokens=tokens, progress=report)
        measured = iter(times[1:])
        of_drafters = [None if name == NGRAM else next(measured) for name in drafters]
        return Controller(times[0], [*of_drafters, None, None])

    return Engine(
        runners[0],
        [NgramDrafter() if name == NGRAM else next(models) for name in drafters],
        tokenizers[0],
        allocator=allocator,
        config=config,
        speculation=speculation,
        max_model_len=max_model_len,
        calibration=calibration,
        measure=measure,
    )


def _load(
    name: str, folder: Path, dtype: str, device: torch.device, progress: Progress | None
) -> Decoder:
    report = None if progress is None else lambda done, total: progress(name, done, total)
    return load_decoder(folder, dtype=dtype, device=device, progress=report)


def _resolve_device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        place = torch.device(device)
    except RuntimeError:
        raise ConfigError(f'device={device!r}: use "auto", "cpu" or "cuda"') from None
    if place.type not in ("cpu", "cuda"):
        raise ConfigError(f'device={device!r}: use "auto", "cpu" or "cuda"')
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f'device={device!r} but torch sees no GPU here: use "cpu"')
    return place


def _resolve_length(asked: int | None, target: Architecture) -> int:
    built_for = target.max_position_embeddings
    if asked is not None and asked > built_for:
        raise ConfigError(
            f"max_model_len={asked} is more than the {built_for} positions the model was built for"
        )
    return asked or built_for


def _num_blocks(
    config: EngineConfig,
    decoders: Sequence[Decoder],
    max_model_len: int,
    max_nodes: int,
    least_nodes: int,
) -> int:
    """As many blocks as the memory allows and max_num_seqs full requests can use.

    max_nodes    a request may draft where there is room; least_nodes there must be room for
    """
    block_bytes = config.block_size * sum(
        KVPool.bytes_per_slot(
            num_layers=decoder.architecture.num_layers,
            kv_heads=decoder.architecture.num_kv_heads,
            head_dim=decoder.architecture.head_dim,
            dtype=decoder.dtype,
        )
        for decoder in decoders
    )
    wanted = -(-(max_model_len + max_nodes) // config.block_size) * config.max_num_seqs
    if config.kv_cache_memory is None:
        return max(1, min(wanted, _free_memory(decoders[0].device) // _FREE_SHARE // block_bytes))
    given = config.kv_cache_memory // block_bytes
    per_request = -(-(max_model_len + least_nodes) // config.block_size)
    if given < per_request:
        raise CapacityError(
            f"kv_cache_memory={config.kv_cache_memory} holds {given * config.block_size} tokens "
            f"and one request may have {max_model_len} and a tree of {least_nodes} nodes: give at "
            f"least {per_request * block_bytes} bytes, or lower max_model_len"
        )
    return min(wanted, given)


def _free_memory(device: torch.device) -> int:
    """Bytes that could be had now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):  # not Linux: all there is, instead of what is free
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
