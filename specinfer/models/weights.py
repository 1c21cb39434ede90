"""From a folder to a decoder that serves: stream its weights, check every one.

Tensors are fused (q, k and v; gate and up) and re-ordered while they stream. A shard is mapped
anew for each weight, because pages of a mapped file count as resident memory until it is unmapped:
the peak stays near the size of the weights, mapped pages included.
"""

import ctypes
import math
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from specinfer.errors import (
    CheckpointError,
    ConfigError,
    ModelNotFoundError,
    UnsupportedModelError,
)
from specinfer.models.architecture import FAMILIES, read_architecture
from specinfer.models.checkpoint import Checkpoint
from specinfer.models.decoder import Decoder
from specinfer.models.folder import read_config
from specinfer.models.layers import Linear
from specinfer.models.quantization import (
    QUANTIZATIONS,
    Quantization,
    decode,
    read_stored,
    resolve_quantization,
    stored_shapes,
)
from specinfer.ops.linear import can_pack, can_pack_rows, computes_in, pack, pack_rows
from specinfer.ops.packed import PackedWeight
from specinfer.ops.quantized import pack_int4, pack_int8
from specinfer.ops.triton_linear import TritonWeight

Progress = Callable[[int, int], None]
"""progress(bytes read so far, bytes in all)"""

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}

TIED_COPY_SHARE = 0.10
TIED_COPY_BYTES = 16 << 20
"""A tied embedding is copied into a packed layout when the copy is at most this share of all
weights, or this small whatever the share."""

STREAMED_BYTES = 64 << 20
"""Weights above this are taken to come from memory at each step, below it from a cache."""

_HARMLESS = re.compile(r"\.rotary_emb\.inv_freq$")


def load_decoder(
    path: Path,
    *,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
    packed: bool = True,
    quantization: Quantization | None = None,
) -> Decoder:
    """Read a Hugging Face folder into a decoder that serves (no gradients).

    dtype    "auto": the checkpoint's, but float32 (it loses nothing) where the processor has no
             instructions for it; or a name in `DTYPES`; or a torch dtype
    packed   re-order weights for speed where that pays (`ops.linear.can_pack`); False keeps plain
             weights, which training needs
    quantization  round the linears while they are read; None: as the checkpoint is
    raises   ModelNotFoundError, UnsupportedModelError, CheckpointError, ConfigError
    cost     peak resident memory is at most 1.1 times the weights, mapped files included
    """
    # Torch then backs large tensors with huge pages, where the system lets programs ask for them:
    # weights stream 10 to 20 % faster. Read at the process's first large allocation; the user's own
    # setting stands.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    path, device = Path(path), torch.device(device)
    if not path.is_dir():
        raise ModelNotFoundError(f"{path} is no folder: give the folder of a Hugging Face model")
    config = read_config(path)
    architecture = read_architecture(config)
    rounding = _Rounding(resolve_quantization(quantization, config, device), read_stored(config))
    checkpoint = Checkpoint(path)
    kind = resolve_dtype(path, dtype, device)
    decoder = Decoder(architecture, dtype=kind, device="meta")
    _Loader(checkpoint, decoder, kind, device, packed, rounding, progress).run()
    if device.type == "cuda":  # what weights were rounded in is free for pages
        torch.cuda.empty_cache()
    _return_holes()
    return decoder.eval()


def _return_holes() -> None:
    """Give back what malloc keeps between weights, which stand at multiples of 2 MiB.

    Of the 1B cost in int8 that was 12 to 46 MiB, by chance. Where malloc is not glibc's, it stays.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def resolve_dtype(path: Path, dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """What `load_decoder` will make of this dtype for this folder, without reading weights.

    raises  as `load_decoder` does
    """
    stored = read_architecture(read_config(path)).dtype
    if stored is None:
        found = list(Checkpoint(path).dtypes.values())
        stored = next((each for each in found if each in DTYPES), (found or ["float32"])[0])
    return _resolve_dtype(dtype, stored, device)


@dataclass(frozen=True, slots=True)
class _Part:
    """One tensor of the checkpoint: where it is and what it must be."""

    name: str
    shape: tuple[int, ...]
    dtypes: tuple[str, ...] = tuple(DTYPES)

    @property
    def module(self) -> str:
        """Its module in the checkpoint."""
        return self.name.rpartition(".")[0]


class _Rounding(NamedTuple):
    """How linears are to be held (None: as floats), and how the checkpoint has them."""

    asked: Quantization | None
    stored: Quantization | None


class _Loader:
    """Fills a decoder made on the meta device, weight by weight, the largest first.

    While a weight is re-ordered there are two or three of it, so the largest go first, when little
    else is there.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        decoder: Decoder,
        dtype: torch.dtype,
        device: torch.device,
        packed: bool,
        rounding: _Rounding,
        progress: Progress | None,
    ) -> None:
        self.checkpoint, self.decoder = checkpoint, decoder
        self.dtype, self.device = dtype, device
        self.packed = packed and can_pack(dtype, device)
        self.fast = packed
        self.rounding = rounding
        self.progress = progress
        self.staging = torch.empty(0)
        self.streamed = False

    def run(self) -> None:
        """Read everything, then see that nothing is missing or left over."""
        wanted = {name: self._parts(name) for name, _ in self.decoder.named_parameters()}
        self._check(wanted)
        for name, parts in wanted.items():
            scheme = self._scheme(name, parts)
            if scheme is not None:
                scheme.check(parts[0].name, parts[0].shape[1])
        asked = self.rounding.asked
        self.decoder.quantization = None if asked is None else asked.name
        sizes = {name: self._num_bytes(name, parts) for name, parts in wanted.items()}
        total, done = sum(sizes.values()), 0
        self.streamed = total > STREAMED_BYTES
        for name in sorted(wanted, key=lambda name: -sizes[name]):
            self._fill(name, wanted[name])
            done += sizes[name]
            if self.progress is not None:
                self.progress(done, total)
        if not self.decoder.architecture.tied_embeddings:
            return
        if self.rounding.asked is not None and self.rounding.asked.head:
            scheme = QUANTIZATIONS["int8"]
            head = scheme.quantize(self.decoder.embedding.weight.detach())
            self.decoder.tied_head = self._pack_rounded(scheme, *head)
        elif self.packed and self.decoder.tied_head is None:
            copy = sizes["embedding.weight"]
            if copy <= max(TIED_COPY_SHARE * total, TIED_COPY_BYTES):
                self.decoder.tied_head = pack(self.decoder.embedding.weight)

    def _parts(self, name: str) -> tuple[_Part, ...]:
        """The checkpoint's tensors that make up one of our parameters, in order."""
        module_name, _, kind = name.rpartition(".")
        module = self.decoder.get_submodule(module_name)
        shape = tuple(self.decoder.get_parameter(name).shape)
        layer = re.search(r"\d+", module_name)
        names = FAMILIES[self.decoder.architecture.family].names
        theirs = names[re.sub(r"\d+", "{}", module_name)]
        widths = module.widths if isinstance(module, Linear) else (shape[0],)
        return tuple(
            _Part(f"{part.format(layer and layer[0])}.{kind}", (width, *shape[1:]))
            for part, width in zip(theirs, widths, strict=True)
        )

    def _check(self, wanted: Mapping[str, tuple[_Part, ...]]) -> None:
        shapes, path = self.checkpoint.shapes, self.checkpoint.path
        parts = [each for group in wanted.values() for part in group for each in self._files(part)]
        missing = [part.name for part in parts if part.name not in shapes]
        if missing:
            raise CheckpointError(f"{path} lacks {_some(missing)}, which config.json asks for")
        for part in parts:
            if shapes[part.name] != part.shape:
                raise CheckpointError(
                    f"{path}: {part.name} has shape {list(shapes[part.name])} where config.json "
                    f"asks for {list(part.shape)}"
                )
            if self.checkpoint.dtypes[part.name] not in part.dtypes:
                raise UnsupportedModelError(
                    f"{path}: {part.name} has dtype {self.checkpoint.dtypes[part.name]}: "
                    f"use a checkpoint in one of {', '.join(part.dtypes)}"
                )
        left = [name for name in shapes.keys() - {p.name for p in parts} if not self._known(name)]
        if left:
            raise CheckpointError(
                f"{path} has {_some(sorted(left))}, which config.json does not ask for"
            )

    def _known(self, name: str) -> bool:
        """Tensors that some tools save although nothing reads them."""
        tied = self.decoder.architecture.tied_embeddings and name == "lm_head.weight"
        packed = self.rounding.stored is not None and name.endswith(".weight_shape")
        return tied or packed or bool(_HARMLESS.search(name))

    def _is_rounded(self, part: _Part) -> bool:
        """Whether the checkpoint has this weight in its quantised form."""
        stored = self.rounding.stored
        return (
            stored is not None
            and part.name.endswith(".weight")
            and f"{part.module}.{stored.suffixes[1]}" in self.checkpoint.shapes
        )

    def _files(self, part: _Part) -> list[_Part]:
        """The tensors that stand for one of the parts."""
        if self.rounding.stored is None or not self._is_rounded(part):
            return [part]
        shapes = stored_shapes(self.rounding.stored, part.shape)
        return [_Part(f"{part.module}.{suffix}", *rest) for suffix, rest in shapes.items()]

    def _scheme(self, name: str, parts: tuple[_Part, ...]) -> Quantization | None:
        """How one of our parameters is held.

        raises  UnsupportedModelError where the checkpoint rounds only some of what we fuse, or what
                is no linear
        """
        asked, stored = self.rounding
        module_name, _, kind = name.rpartition(".")
        if asked is None or kind != "weight":
            return None
        rounded = [self._is_rounded(part) for part in parts]
        if not isinstance(self.decoder.get_submodule(module_name), Linear):
            if any(rounded):
                raise UnsupportedModelError(
                    f"{self.checkpoint.path}: {parts[0].module} is quantised: use a checkpoint in "
                    "which only linears are"
                )
            return None
        if any(rounded):
            if not all(rounded):
                raise UnsupportedModelError(
                    f"{self.checkpoint.path}: of {', '.join(part.module for part in parts)} only "
                    "some are quantised: use a checkpoint in which all are, or none"
                )
            return stored
        if module_name == "lm_head":
            return QUANTIZATIONS["int8"] if asked.head else None
        return asked if stored is None else None

    def _num_bytes(self, name: str, parts: tuple[_Part, ...]) -> int:
        scheme = self._scheme(name, parts)
        bits = 8 * self.dtype.itemsize if scheme is None else scheme.bits
        return sum(math.prod(part.shape) for part in parts) * bits // 8

    def _fill(self, name: str, parts: tuple[_Part, ...]) -> None:
        module_name, _, kind = name.rpartition(".")
        module = self.decoder.get_submodule(module_name)
        scheme = self._scheme(name, parts)
        if isinstance(module, Linear) and scheme is not None:
            module.pack(self._round(scheme, parts))
        elif self.packed and isinstance(module, Linear) and kind == "weight":
            module.pack(pack(self._stage(parts), streamed=self.streamed))
        elif name == "embedding.weight" and self._is_shared():
            self.decoder.tie(pack_rows(self._stage(parts)))
        else:
            weight = torch.empty(_stacked(parts), dtype=self.dtype, device=self.device)
            setattr(module, kind, nn.Parameter(self._stack(parts, weight), requires_grad=False))

    def _is_shared(self) -> bool:
        """Whether one packed copy of the embedding serves look-ups and logits alike."""
        asked, is_tied = self.rounding.asked, self.decoder.architecture.tied_embeddings
        has_own_head = asked is not None and asked.head
        return is_tied and self.packed and not has_own_head and can_pack_rows(self.dtype)

    def _round(self, scheme: Quantization, parts: tuple[_Part, ...]) -> PackedWeight:
        """The parts as one quantised weight, decoded or rounded one at a time, on the device."""
        values = self._buffer(_stacked(parts), scheme.dtype)
        scales, start = [], 0
        for part in parts:
            rows = slice(start, start + part.shape[0])
            start = rows.stop
            if self._is_rounded(part):
                values[rows], scale = decode(scheme, part.module, self._read)
            else:
                values[rows], scale = scheme.quantize(self._read(part.name))
            scales.append(scale)
        return self._pack_rounded(scheme, values, torch.cat(scales))

    def _pack_rounded(self, scheme: Quantization, values: Tensor, scales: Tensor) -> PackedWeight:
        if self.device.type == "cuda":
            return TritonWeight(values, scales, bits=scheme.bits, dtype=self.dtype)
        if scheme.bits == 8:
            return pack_int8(values, scales, fast=self.fast, streamed=self.streamed)
        return pack_int4(values, scales, dtype=self.dtype, fast=self.fast)

    def _read(self, name: str) -> Tensor:
        return self.checkpoint.read(name).to(self.device)

    def _stage(self, parts: tuple[_Part, ...]) -> Tensor:
        """The parts as one weight that lives until the next call.

        One tensor comes straight from its mapped file, others are stacked.
        """
        if len(parts) == 1:
            tensor = self.checkpoint.read(parts[0].name)
            if tensor.dtype == self.dtype:
                return tensor
        return self._stack(parts, self._buffer(_stacked(parts), self.dtype))

    def _buffer(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Room that lives until the next call.

        Kept from weight to weight: a new one each time would leave holes between the packed
        weights, up to a tenth of the model.
        """
        size = math.prod(shape)
        if self.staging.dtype != dtype or not size <= self.staging.numel() < 2 * size:
            self.staging = torch.empty(0)  # dropped before the next is made
            self.staging = torch.empty(size, dtype=dtype, device=self.device)
        return self.staging[:size].view(shape)

    def _stack(self, parts: tuple[_Part, ...], into: Tensor) -> Tensor:
        """Copy the parts one below the other, one mapped at a time."""
        start = 0
        for part in parts:
            into[start : start + part.shape[0]].copy_(self.checkpoint.read(part.name))
            start += part.shape[0]
        return into


def _stacked(parts: tuple[_Part, ...]) -> tuple[int, ...]:
    return sum(part.shape[0] for part in parts), *parts[0].shape[1:]


def _resolve_dtype(dtype: str | torch.dtype, stored: str, device: torch.device) -> torch.dtype:
    if dtype == "auto":
        kind = DTYPES.get(stored)
        if kind is None:
            raise UnsupportedModelError(
                f"the checkpoint has dtype={stored!r}: set dtype to one of {', '.join(DTYPES)}"
            )
        if kind.itemsize == 2 and not computes_in(kind, device):
            return torch.float32
        return kind
    kind = DTYPES.get(str(dtype).removeprefix("torch."))
    if kind is None:
        raise ConfigError(f"dtype={dtype!r}: use auto or one of {', '.join(DTYPES)}")
    return kind


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more tensors"
