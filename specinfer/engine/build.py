"""From names and limits to an engine: models loaded, vocabularies compared, pages sized."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import torch

from specinfer.cache.blocks import BlockAllocator
from specinfer.config import EngineConfig, Speculation
from specinfer.draft.calibration import Calibration
from specinfer.draft.model import ModelDrafter
from specinfer.draft.ngram import NgramDrafter
from specinfer.engine.controller import Controller
from specinfer.engine.engine import Engine
from specinfer.engine.measure import Report, measure_models
from specinfer.engine.memory import CacheNeeds, token_bytes
from specinfer.errors import ConfigError, ModelError
from specinfer.models.architecture import Architecture, read_architecture
from specinfer.models.decoder import Decoder
from specinfer.models.folder import read_config, resolve_model
from specinfer.models.quantization import (
    Quantization,
    read_quantization,
    resolve_quantization,
)
from specinfer.models.weights import load_decoder, resolve_dtype
from specinfer.run.runner import Runner
from specinfer.text.tokenizer import Tokenizer

T = TypeVar("T")
R = TypeVar("R")

NGRAM = "ngram"
"""The drafter that needs no model: the request's own text."""

Progress = Callable[[str, int, int], None]
"""progress(model, bytes read so far, bytes in all)"""


def build_engine(
    model: str,
    drafters: Sequence[str],
    *,
    config: EngineConfig,
    speculation: Speculation,
    dtype: str,
    device: str,
    quantization: str | None = None,
    drafter_quantization: str | None = None,
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
    names = [model, *_drafting_models(drafters, drafter_quantization)]
    folders = _each(names, resolve_model, names)
    tokenizers = _each(names, Tokenizer.from_folder, folders)
    _check_vocabularies(names, tokenizers)
    asked = [
        None if given is None else read_quantization(given, option)
        for option, given in (
            ("quantization", quantization),
            *[("drafter_quantization", drafter_quantization)] * (len(names) - 1),
        )
    ]
    configs = _each(names, read_config, folders)
    architectures = _each(names, read_architecture, configs)
    _each(names, lambda each: resolve_quantization(*each, place), zip(asked, configs, strict=True))
    max_model_len = _resolve_length(config.max_model_len, architectures[0])
    dtypes = _each(names, lambda folder: resolve_dtype(folder, dtype, place), folders)
    needs = CacheNeeds(
        config,
        block_bytes=config.block_size * token_bytes(list(zip(architectures, dtypes, strict=True))),
        most_tokens=max_model_len + max_nodes,
        least_tokens=max_model_len + least_nodes,
    )
    num_blocks = needs.num_given()
    decoders = _each(
        names,
        lambda each: _load(*each, device=place, progress=progress),
        zip(names, folders, dtypes, asked, strict=True),
    )
    if num_blocks is None:  # a part of what is free, and weights are in it
        num_blocks = needs.num_free(place)
    allocator = BlockAllocator(num_blocks, config.block_size)
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


def _drafting_models(drafters: Sequence[str], drafter_quantization: str | None) -> list[str]:
    """The drafters that are models."""
    names = [name for name in drafters if name != NGRAM]
    if len(drafters) > len(names) + 1:
        raise ConfigError(f'drafters name "{NGRAM}" more than once: once is enough')
    if drafter_quantization is not None and not names:
        raise ConfigError(
            f"drafter_quantization={drafter_quantization!r} but no drafter is a model: leave it out"
        )
    return names


def _check_vocabularies(names: Sequence[str], tokenizers: Sequence[Tokenizer]) -> None:
    for name, tokenizer in zip(names[1:], tokenizers[1:], strict=True):
        if not tokenizers[0].has_same_vocabulary(tokenizer):
            raise ModelError(
                f"drafter {name!r} has another vocabulary than {names[0]!r}: a drafter must share "
                "the target's tokenizer"
            )


def _each(names: Sequence[str], read: Callable[[T], R], what: Iterable[T]) -> list[R]:
    """What is read of the target and each drafter; a drafter's errors say that they are one's.

    names  the target's, then the drafters'
    """
    found = []
    for index, (name, each) in enumerate(zip(names, what, strict=True)):
        try:
            found.append(read(each))
        except (ModelError, ConfigError) as error:
            if index == 0:
                raise
            whose = "drafter" if name in str(error) else f"drafter {name!r}"
            raise type(error)(f"{whose}: {error}") from error
    return found


def _load(
    name: str,
    folder: Path,
    dtype: torch.dtype,
    quantization: Quantization | None,
    *,
    device: torch.device,
    progress: Progress | None,
) -> Decoder:
    report = None if progress is None else lambda done, total: progress(name, done, total)
    return load_decoder(
        folder, dtype=dtype, device=device, quantization=quantization, progress=report
    )


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
