"""What stands between a layer's matrix products, on a GPU: three Triton kernels, four launches.

PyTorch's operators for it are 11 launches to a layer, 14 where heads are normed, each of some
microseconds beside products that stream a layer's weights in 100. Each kernel equals them but for
the order of sums and for rounding only what it stores: 1e-6 in float32, see
tests/test_triton_layers.py. No row influences another, and all of it can be captured as a graph.
"""

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

_BLOCK_HEADS = 4
"""Heads of one token that a program of one warp rotates: 16 bytes a lane of 128 channels."""

_BLOCK_COLUMNS = 1024
"""Columns of one row that a program of four warps multiplies by their gate."""


@dataclass(frozen=True, slots=True)
class Places:
    """Where a step's tokens stand.

    positions, slots  [n] int32: in their text, in the pages
    cos, sin          [positions, head_dim / 2] float32 of all positions there may be
    """

    positions: Tensor
    slots: Tensor
    cos: Tensor
    sin: Tensor


def add_norm(
    hidden: Tensor, update: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """hidden + update, rounded to its type, and that RMS-normed: [n, size] each.

    hidden, update  [n, size], contiguous; without an update, hidden itself comes back
    weight          [size]
    """
    summed = hidden if update is None else torch.empty_like(hidden)
    return summed, _norm(hidden, update, weight, eps, summed, None)


def norm_rows(
    hidden: Tensor, update: Tensor | None, weight: Tensor, eps: float, rows: Tensor
) -> Tensor:
    """The same norm of some rows of the sum, [rows, size]; rows [rows] int32."""
    return _norm(hidden, update, weight, eps, hidden, rows)


def _norm(
    hidden: Tensor,
    update: Tensor | None,
    weight: Tensor,
    eps: float,
    summed: Tensor,
    rows: Tensor | None,
) -> Tensor:
    assert hidden.is_contiguous()
    assert update is None or (update.is_contiguous() and update.shape == hidden.shape)
    num_rows, size = hidden.shape
    if rows is not None:
        num_rows = len(rows)
    normed = torch.empty((num_rows, size), dtype=hidden.dtype, device=hidden.device)
    block = 1 << (size - 1).bit_length()
    _kernels().add_norm[(num_rows,)](
        hidden,
        hidden if update is None else update,
        weight,
        hidden if rows is None else rows,
        summed,
        normed,
        eps,
        SIZE=size,
        BLOCK=block,
        ADDED=update is not None,
        GATHERED=rows is not None,
        num_warps=min(16, max(1, block // 512)),
    )
    return normed


def rotate_and_store(
    qkv: Tensor,
    places: Places,
    pages: tuple[Tensor, Tensor],
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
) -> Tensor:
    """Norm q and k per head where there are norms, rotate them, and store k and v in their slots.

    qkv      [n, (heads + 2 kv_heads) * head_dim], contiguous
    pages    K and V, [kv_heads, slots, head_dim] each, alike in their strides
    norms    weights of q's and k's, [head_dim] each
    returns  q [n, heads, head_dim]
    """
    k_pages, v_pages = pages
    kv_heads, _, head_dim = k_pages.shape
    num_tokens, width = qkv.shape
    num_heads = width // head_dim - 2 * kv_heads
    assert qkv.is_contiguous()
    assert k_pages.stride() == v_pages.stride()
    assert k_pages.stride(2) == 1
    q = torch.empty((num_tokens, num_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    _kernels().rotate_and_store[num_tokens, -(-(num_heads + 2 * kv_heads) // _BLOCK_HEADS)](
        qkv,
        places.positions,
        places.slots,
        places.cos,
        places.sin,
        *(norms or (qkv, qkv)),  # never read without norms
        q,
        k_pages,
        v_pages,
        k_pages.stride(0),
        k_pages.stride(1),
        eps,
        HEADS=num_heads,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        BLOCK_HEADS=_BLOCK_HEADS,
        BLOCK_HALF=1 << (head_dim // 2 - 1).bit_length(),
        NORMED=norms is not None,
        num_warps=1,
    )
    return q


def gate(gate_up: Tensor, activation: str) -> Tensor:
    """activation(gate) * up.

    gate_up     [n, 2 inner], the gate first, contiguous
    activation  "silu", "relu", "gelu" or "gelu_tanh"
    returns     [n, inner]
    """
    assert gate_up.is_contiguous()
    num_rows, inner = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((num_rows, inner), dtype=gate_up.dtype, device=gate_up.device)
    _kernels().gate[num_rows, -(-inner // _BLOCK_COLUMNS)](
        gate_up, out, INNER=inner, BLOCK=_BLOCK_COLUMNS, ACTIVATION=activation, num_warps=4
    )
    return out


def _kernels() -> ModuleType:
    """Imported late; that triton is there at all, the attention's plan has seen to."""
    from specinfer.ops import triton_layer_kernels

    return triton_layer_kernels
