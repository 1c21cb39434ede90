"""Quantisation by name, and as checkpoints spell it.

That is compressed-tensors, which vLLM and transformers read as well:

    int8  `int-quantized`    X.weight I8 [out, in], X.weight_scale [out, 1]; activations by token
    int4  `pack-quantized`   X.weight_packed I32 [out, in / 8], X.weight_scale [out, groups]
    fp8   `float-quantized`  X.weight F8_E4M3 [out, in], X.weight_scale [out, 1]

The output head is int8 in all where we quantise (as `quantized_lm_head` in config.json says); in
the file it keeps its dtype and is rounded when it is read, since a tied one is the embedding too.
On a GPU activations are never rounded, whatever a file says: that is for speed alone.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from specinfer.errors import CheckpointError, ConfigError, UnsupportedModelError
from specinfer.ops.quantized import quantize_fp8, quantize_int4, quantize_int8

GROUP_SIZES = (32, 64, 128)
HEAD_KEY = "quantized_lm_head"
"""In config.json: whether a float output head is to be rounded to int8."""

_FP8_NAN = 0x7F
"""e4m3fn's only value that is no number, but for the sign."""

_PER_WORD = 8
"""int4 values in a word of 32 bits, the first in the lowest bits, 8 added to each."""


@dataclass(frozen=True, slots=True)
class Quantization:
    """How the linears of a model are rounded.

    group_size  inputs that share a scale; None: all of an output's
    head        whether the output head is rounded too, to int8
    is_float    to float8_e4m3fn, not to integers
    """

    bits: int
    group_size: int | None = None
    head: bool = True
    is_float: bool = False

    @property
    def name(self) -> str:
        """As users ask for it; plain "int4" has groups of 32."""
        if self.is_float:
            return f"fp{self.bits}"
        plain = self.group_size == _DEFAULT_GROUP[self.bits]
        return f"int{self.bits}" if plain else f"int{self.bits}-{self.group_size}"

    @property
    def format(self) -> str:
        """As compressed-tensors calls it."""
        if self.is_float:
            return "float-quantized"
        return "int-quantized" if self.bits == 8 else "pack-quantized"

    @property
    def suffixes(self) -> tuple[str, str]:
        """What follows a module's name in a checkpoint: of the values, of the scales."""
        return ("weight" if self.bits == 8 else "weight_packed"), "weight_scale"

    @property
    def dtype(self) -> torch.dtype:
        """Of the values."""
        return torch.float8_e4m3fn if self.is_float else torch.int8

    def quantize(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Round a weight [outputs, inputs] to values and scales [outputs, groups], where it is."""
        if self.is_float:
            return quantize_fp8(weight)
        if self.group_size is None:
            return quantize_int8(weight)
        return quantize_int4(weight, self.group_size)

    def check(self, name: str, inputs: int) -> None:
        """Refuse a weight that groups do not divide.

        raises  ConfigError
        """
        if self.group_size is not None and inputs % self.group_size:
            fitting = [size for size in GROUP_SIZES if inputs % size == 0]
            others = [Quantization(4, size).name for size in fitting] + ["int8"]
            raise ConfigError(
                f"quantization={self.name!r} needs inputs in groups of {self.group_size}, and "
                f"{name} has {inputs}: use {' or '.join(others)}"
            )


_DEFAULT_GROUP = {8: None, 4: GROUP_SIZES[0]}
QUANTIZATIONS: Mapping[str, Quantization] = {
    each.name: each
    for each in (
        Quantization(8),
        *(Quantization(4, size) for size in GROUP_SIZES),
        Quantization(8, is_float=True),
    )
}
"""What can be asked for."""


def read_quantization(asked: str, option: str = "quantization") -> Quantization:
    """Find what was asked for.

    raises  ConfigError
    """
    if asked not in QUANTIZATIONS:
        raise ConfigError(f"{option}={asked!r}: use one of {', '.join(QUANTIZATIONS)}")
    return QUANTIZATIONS[asked]


def resolve_quantization(
    asked: Quantization | None, config: Mapping[str, Any], device: torch.device
) -> Quantization | None:
    """What will hold for a checkpoint: what it is rounded to already, or else what was asked for.

    raises  UnsupportedModelError for a file's scheme that is not computed here, ConfigError where
            the two differ or the device has no kernel
    """
    stored = read_stored(config)
    if stored is not None and asked is not None and asked.name != stored.name:
        raise ConfigError(
            f"quantization={asked.name!r} for a checkpoint that is {stored.name} already: leave "
            "quantization out, or give the unquantised checkpoint"
        )
    scheme = stored or asked
    if scheme is not None and scheme.is_float and device.type == "cpu":
        raise ConfigError(
            f"quantization={scheme.name!r} on device={str(device)!r}: processors have no kernel "
            'for it, use quantization="int8" with an unquantised checkpoint, or device="cuda"'
        )
    return scheme


def read_stored(config: Mapping[str, Any]) -> Quantization | None:
    """How a checkpoint is rounded, from its config.json; None where it is not.

    raises  UnsupportedModelError if not in a way that is computed here
    """
    stored = config.get("quantization_config")
    if not stored:
        return None
    head = config.get(HEAD_KEY) is True
    for known in QUANTIZATIONS.values():
        if _says(stored, known):
            return replace(known, head=head)
    method = stored.get("quant_method", "unknown") if isinstance(stored, Mapping) else "unknown"
    raise UnsupportedModelError(
        f"quantization_config with quant_method={method!r} is not supported as it is: use a "
        "checkpoint in compressed-tensors' int-quantized (int8 by channel, dynamic by token), "
        f"pack-quantized (symmetric int4 in groups of {', '.join(map(str, GROUP_SIZES))}) or "
        "float-quantized (fp8 by channel), or the unquantised weights"
    )


def describe(scheme: Quantization) -> dict[str, Any]:
    """The `quantization_config` of a checkpoint whose linears, but for the head, are so rounded."""
    inputs = _by_token(scheme) if scheme.format == "int-quantized" else None
    strategy = "channel" if scheme.group_size is None else "group"
    weights = _arguments(scheme, strategy, dynamic=False)
    return {
        "config_groups": {
            "group_0": {
                "input_activations": inputs,
                "output_activations": None,
                "targets": ["Linear"],
                "weights": weights,
            }
        },
        "format": scheme.format,
        "global_compression_ratio": None,
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


def encode(
    scheme: Quantization, module: str, weight: Tensor, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The tensors that a checkpoint has instead of `module.weight`.

    dtype  of the scales; bfloat16 holds ours exactly
    """
    values, scales = scheme.quantize(weight)
    first, second = (f"{module}.{suffix}" for suffix in scheme.suffixes)
    if scheme.bits == 8:
        return {first: values, second: scales.to(dtype)}
    shape = torch.tensor(weight.shape, dtype=torch.int64)
    return {first: _pack(values), second: scales.to(dtype), f"{module}.weight_shape": shape}


def stored_shapes(
    scheme: Quantization, shape: tuple[int, ...]
) -> dict[str, tuple[tuple[int, ...], tuple[str, ...]]]:
    """Suffix → (shape, dtypes) of the tensors that stand for a weight [outputs, inputs]."""
    outputs, inputs = shape
    values, scales = scheme.suffixes
    floats = ("bfloat16", "float16", "float32")
    if scheme.group_size is None:
        stored = "F8_E4M3" if scheme.is_float else "I8"
        return {values: (shape, (stored,)), scales: ((outputs, 1), floats)}
    return {
        values: ((outputs, inputs // _PER_WORD), ("I32",)),
        scales: ((outputs, inputs // scheme.group_size), floats),
    }


def decode(
    scheme: Quantization, module: str, read: Callable[[str], Tensor]
) -> tuple[Tensor, Tensor]:
    """A checkpoint's tensors → values [outputs, inputs], scales [outputs, groups] float32.

    raises  CheckpointError for values that are no numbers
    """
    values, scales = (read(f"{module}.{suffix}") for suffix in scheme.suffixes)
    if scheme.is_float and (values.view(torch.uint8) & _FP8_NAN == _FP8_NAN).any():
        raise CheckpointError(f"{module}.{scheme.suffixes[0]} has NaN in it: download it again")
    return (values if scheme.bits == 8 else _unpack(values)), scales.float()


def _by_token(scheme: Quantization) -> dict[str, Any]:
    """Activations rounded as the weights are."""
    return _arguments(scheme, "token", dynamic=True)


def _arguments(scheme: Quantization, strategy: str, *, dynamic: bool) -> dict[str, Any]:
    return {
        "actorder": None,
        "block_structure": None,
        "dynamic": dynamic,
        "group_size": scheme.group_size,
        "num_bits": scheme.bits,
        "observer": None if dynamic else "minmax",
        "observer_kwargs": {},
        "strategy": strategy,
        "symmetric": True,
        "type": "float" if scheme.is_float else "int",
    }


def _says(stored: Any, scheme: Quantization) -> bool:
    """Whether a file's words mean this scheme; those without a meaning for the values are free."""
    if not isinstance(stored, Mapping) or not isinstance(stored.get("config_groups"), Mapping):
        return False
    ours = describe(scheme)
    (group,) = ours["config_groups"].values()
    if stored.get("quant_method") != "compressed-tensors" or stored.get("format") != ours["format"]:
        return False
    if stored.get("kv_cache_scheme") or stored.get("sparsity_config"):
        return False
    activations = [group["input_activations"]]
    if scheme.is_float:
        activations.append(_by_token(scheme))  # as most are made; not rounded here
    return all(
        isinstance(theirs, Mapping)
        and not theirs.get("output_activations")
        and _same(theirs.get("weights"), group["weights"])
        and any(_same(theirs.get("input_activations"), each) for each in activations)
        for theirs in stored["config_groups"].values()
    )


_MEANINGFUL = ("dynamic", "group_size", "num_bits", "strategy", "symmetric", "type")


def _same(theirs: Any, ours: dict[str, Any] | None) -> bool:
    if not theirs or ours is None:
        return not theirs and ours is None
    defaults = {"dynamic": False, "group_size": None, "symmetric": True, "type": "int"}
    return isinstance(theirs, Mapping) and all(
        theirs.get(key, defaults.get(key)) == ours[key] for key in _MEANINGFUL
    )


def _pack(values: Tensor) -> Tensor:
    """[outputs, inputs] int8 in -8…7 → [outputs, inputs / 8] int32.

    Two values are a byte and four bytes a word, the lowest first: for little-endian processors.
    """
    nibbles = values.add(8).view(torch.uint8).unflatten(-1, (-1, 2))
    pairs: Tensor = nibbles[..., 0] | nibbles[..., 1] << 4
    return pairs.view(torch.int32)


def _unpack(words: Tensor) -> Tensor:
    """The reverse of `_pack`."""
    pairs = words.view(torch.uint8)
    values = torch.stack((pairs & 15, pairs >> 4), -1).flatten(-2)
    return values.view(torch.int8).sub_(8)
