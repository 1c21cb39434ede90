"""A checkpoint folder, quantised and written in compressed-tensors' format.

Tensors stream: memory holds one weight and the shard being filled. What is read from the folder is,
bit by bit, what quantising the source while it is read gives.
"""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from specinfer.errors import ConfigError, ModelError
from specinfer.models.architecture import FAMILIES, Architecture, read_architecture
from specinfer.models.checkpoint import INDEX, Checkpoint
from specinfer.models.folder import read_config
from specinfer.models.quantization import HEAD_KEY, Quantization, describe, encode, read_stored
from specinfer.models.weights import DTYPES, Progress

SHARD_BYTES = 1 << 30
_COPIED = ("*.json", "*.jinja", "*.txt", "*.model", "LICENSE*", "NOTICE*", "README.md")


def quantize_folder(
    source: Path,
    out: Path,
    scheme: Quantization,
    *,
    progress: Progress | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Write the quantised twin of a model folder; `out` appears when it is whole.

    returns  bytes of its weights
    raises   ConfigError if `out` is there already or groups do not divide a weight, ModelError
             where the source cannot be read or is quantised
    """
    if out.exists():
        raise ConfigError(f"{out} is there already: give a folder that is not")
    config = read_config(source)
    architecture = read_architecture(config)
    if read_stored(config) is not None:
        raise ModelError(f"{source} is quantised already: give the unquantised checkpoint")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        checkpoint = Checkpoint(source)
        num_bytes = _write_weights(checkpoint, partial, architecture, scheme, progress, shard_bytes)
        for file in {file for pattern in _COPIED for file in source.glob(pattern)}:
            if file.name != INDEX:
                shutil.copyfile(file, partial / file.name)
        written = {**config, "quantization_config": describe(scheme), HEAD_KEY: scheme.head}
        _write_json(partial / "config.json", written)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return num_bytes


def _write_weights(
    checkpoint: Checkpoint,
    folder: Path,
    architecture: Architecture,
    scheme: Quantization,
    progress: Progress | None,
    shard_bytes: int,
) -> int:
    """One file, or shards with an index."""
    shards: list[list[str]] = []
    kept: dict[str, Tensor] = {}
    filled = total = 0

    def flush() -> None:
        save_file(kept, folder / f"{len(shards)}.safetensors", metadata={"format": "pt"})
        shards.append(list(kept))
        kept.clear()

    for tensors in _tensors(checkpoint, architecture, scheme, progress):
        size = sum(tensor.nbytes for tensor in tensors.values())
        if kept and filled + size > shard_bytes:
            flush()
            filled = 0
        kept.update(tensors)
        filled, total = filled + size, total + size
    flush()
    if len(shards) == 1:
        (folder / "0.safetensors").rename(folder / "model.safetensors")
        return total
    shard_of = {}
    for index, names in enumerate(shards):
        name = f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
        (folder / f"{index}.safetensors").rename(folder / name)
        shard_of.update(dict.fromkeys(names, name))
    _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": shard_of})
    return total


def _tensors(
    checkpoint: Checkpoint,
    architecture: Architecture,
    scheme: Quantization,
    progress: Progress | None,
) -> Iterator[dict[str, Tensor]]:
    """What takes the place of each of the source's tensors."""
    for done, (name, shape) in enumerate(checkpoint.shapes.items()):
        tensor = checkpoint.read(name)
        module, _, kind = name.rpartition(".")
        if kind == "weight" and _is_rounded(module, architecture):
            scheme.check(name, shape[1])
            dtype = DTYPES.get(checkpoint.dtypes[name])
            if dtype is None:
                raise ModelError(
                    f"{name} has dtype {checkpoint.dtypes[name]}: it cannot be rounded"
                )
            # float16 would lose small scales that bfloat16 holds.
            scales = torch.float32 if dtype == torch.float32 else torch.bfloat16
            yield encode(scheme, module, tensor, scales)
        else:
            yield {name: tensor.clone()}
        if progress is not None:
            progress(done + 1, len(checkpoint.shapes))


def _is_rounded(module: str, architecture: Architecture) -> bool:
    """Whether this is one of a layer's linears, by the family's names."""
    names = FAMILIES[architecture.family].names
    linears = {
        theirs
        for ours, group in names.items()
        if ours.rpartition(".")[2] in ("qkv", "output", "gate_up", "down")
        for theirs in group
    }
    return re.sub(r"\d+", "{}", module) in linears


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
