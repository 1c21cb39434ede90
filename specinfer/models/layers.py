"""The parts of a decoder layer: linears, RMS norm, rotary positions, activations."""

import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specinfer.models.architecture import Rope
from specinfer.ops.packed import PackedWeight

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


class Linear(nn.Module):
    """Several products of one input as one: `widths` are the outputs fused, in order.

    weight  [sum(widths), inputs]; bias [sum(widths)] or None
    packed  instead of the weight, where it is re-ordered or rounded
    """

    def __init__(self, inputs: int, widths: tuple[int, ...], *, bias: bool) -> None:
        super().__init__()
        self.widths = widths
        self.weight: Tensor = nn.Parameter(torch.empty(sum(widths), inputs))
        self.bias: Tensor | None = nn.Parameter(torch.empty(sum(widths))) if bias else None
        self.packed: PackedWeight | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Map x [n, inputs] to [n, sum(widths)], in x's type."""
        if self.packed is not None:
            return self.packed.multiply(x, self.bias)
        return F.linear(x, self.weight, self.bias)

    def pack(self, weight: PackedWeight) -> None:
        """Replace the weight by a packed one, which cannot be trained or saved from here."""
        del self.weight
        self.packed = weight


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, accumulated in float32.

    Equal to transformers' bit by bit in float32. In bfloat16 it rounds once, after the weight,
    where transformers rounds before and after it.
    """

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.size = (size,)
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Norm x [..., size] over its last dimension."""
        return F.rms_norm(x, self.size, self.weight, self.eps)


class Rotary:
    """cos and sin of every token's angles, computed once per step and shared by all layers.

    A pure function of the position, so a token is rotated alike in any batch, tree or chunk.
    Dynamic NTK is no such function in transformers: there the longest sequence of the *call*
    sets the base. Up to `original_length` both agree; beyond it a token at position p is rotated
    as if its sequence had p + 1 tokens, which is what transformers computes when it decodes token
    by token with a cache.
    """

    def __init__(self, rope: Rope, head_dim: int) -> None:
        self.rope = rope
        self.head_dim = head_dim
        self._frequencies = inverse_frequencies(rope, head_dim)

    def __call__(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Map positions [n] to cos, sin [n, 1, head_dim]; the first half of sin is negated."""
        cos, sin = (part.to(dtype) for part in self._angles(positions))
        return torch.cat((cos, cos), -1)[:, None], torch.cat((-sin, sin), -1)[:, None]

    def table(self, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin of positions 0 … length - 1: [length, head_dim / 2] float32 on the CPU."""
        return self._angles(torch.arange(length))

    def _angles(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        if self._frequencies.device != positions.device:
            self._frequencies = self._frequencies.to(positions.device)
        frequencies = self._frequencies
        if self.rope.kind == "dynamic":
            frequencies = self._dynamic_frequencies(positions)
        angles = positions.to(torch.float32)[:, None] * frequencies
        cos, sin = angles.cos(), angles.sin()
        if self.rope.attention_factor != 1.0:
            cos, sin = cos * self.rope.attention_factor, sin * self.rope.attention_factor
        return cos, sin

    def _dynamic_frequencies(self, positions: Tensor) -> Tensor:
        """Map positions [n] to [n, head_dim / 2]: the base grows with a token's own position."""
        rope, dim = self.rope, self.head_dim
        lengths = (positions + 1).clamp(min=rope.original_length)
        growth = rope.factor * lengths / rope.original_length - (rope.factor - 1)
        theta = rope.theta * growth ** (dim / (dim - 2))
        exponents = torch.arange(0, dim, 2, device=positions.device, dtype=torch.float32) / dim
        return 1.0 / theta[:, None] ** exponents


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each pair (i, i + head_dim / 2) of x [n, heads, head_dim] by its token's angle."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def inverse_frequencies(rope: Rope, head_dim: int) -> Tensor:
    """Radians per position of each pair: [head_dim / 2] float32, on the CPU."""
    powers = rope.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    plain = 1.0 / powers
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "llama3":
        return _llama3(plain, rope)
    if rope.kind == "yarn":
        return _yarn(powers, rope, head_dim)
    return plain


def _llama3(plain: Tensor, rope: Rope) -> Tensor:
    """Keep short waves, divide long ones, mix between (Llama 3.1)."""
    waves = 2 * math.pi / plain
    smooth = (rope.original_length / waves - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    mixed = (1 - smooth) * plain / rope.factor + smooth * plain
    long = waves > rope.original_length / rope.low_freq_factor
    short = waves < rope.original_length / rope.high_freq_factor
    return torch.where(long, plain / rope.factor, torch.where(short, plain, mixed))


def _yarn(powers: Tensor, rope: Rope, head_dim: int) -> Tensor:
    """Interpolate what turns slowly, keep what turns fast, ramp between (arXiv 2309.00071)."""

    def dimension(turns: float) -> float:
        length = rope.original_length / (turns * 2 * math.pi)
        return head_dim * math.log(length) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001  # as transformers does, against a division by zero
    ramp = (torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)
    kept = 1 - ramp.clamp(0, 1)
    return (1 / (rope.factor * powers)) * (1 - kept) + (1 / powers) * kept
