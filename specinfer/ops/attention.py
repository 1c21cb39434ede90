"""Tree attention: a ragged batch of requests, each a committed prefix plus a chain or a tree.

The contract. Keys and values of one layer stand in *pages*, `[kv_heads, slots, head_dim]`; a
segment says which slots are one request's keys. Its keys are a *prefix*, which every query of the
request sees, and a *region*, which is seen through a mask: a node sees its ancestors and itself, a
prompt chunk sees what came before.

               prefix keys            region keys
             ┌────────────────────┬──────────────────┐
    query 0  │ 1  1  1  1  1  1  1│ 1  .  .  .       │   root
    query 1  │ 1  1  1  1  1  1  1│ 1  1  .  .       │   └─ a
    query 2  │ 1  1  1  1  1  1  1│ 1  .  1  .       │   └─ b
    query 3  │ 1  1  1  1  1  1  1│ 1  .  1  1       │      └─ c
             └────────────────────┴──────────────────┘

A sliding window hides keys whose position is `window` or more behind the query's. Nothing is
padded and nothing is gathered where a request's slots are one run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

Slots = slice | npt.NDArray[np.int64]

_MOST_QUERIES = 256
"""Of a long chain behind a prefix, in one piece: pieces share a mask. For 2,048 queries behind
16,384 keys it has 38 MB in bfloat16 with four heads to a group; one for all of them had 302 MB."""


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """One request's queries and keys.

    num_queries       its rows of the flat batch
    slots             [keys] where its keys stand, prefix first; a slice where they are one run
    prefix            keys that every query sees, the window aside
    mask              [queries, region] bool; None: the queries are the region, as a causal chain
    query_positions   [queries]
    region_positions  [region]; a prefix key's position is its index, and so is a chain's
    """

    num_queries: int
    slots: Slots
    prefix: int
    mask: npt.NDArray[np.bool_] | None
    query_positions: Sequence[int]
    region_positions: Sequence[int]

    @property
    def num_keys(self) -> int:
        """Prefix and region together."""
        return self.prefix + len(self.region_positions)

    def is_cut(self, window: int) -> bool:
        """Whether some key is far enough behind a query to be hidden by a window."""
        return max(self.query_positions) >= window

    def visible(self, window: int | None) -> npt.NDArray[np.bool_] | None:
        """[queries, keys] bool: which keys each query sees; None where it sees them all."""
        if window is not None and not self.is_cut(window):
            window = None
        if self.mask is None and self.num_queries == 1 and window is None:
            return None
        region = np.tri(self.num_queries, dtype=np.bool_) if self.mask is None else self.mask
        seen = np.ones((self.num_queries, self.num_keys), np.bool_)
        seen[:, self.prefix :] = region
        if window is not None:
            seen &= self.distances() < window
        return seen

    def piece(self, start: int, stop: int) -> "Segment":
        """Some of a chain's queries, as a chain behind those before it."""
        assert self.mask is None
        num_keys, positions = self.prefix + stop, self.query_positions[start:stop]
        if isinstance(self.slots, slice):
            slots: Slots = slice(self.slots.start, self.slots.start + num_keys)
        else:
            slots = self.slots[:num_keys]
        return Segment(stop - start, slots, self.prefix + start, None, positions, positions)

    def distances(self) -> npt.NDArray[np.int64]:
        """[queries, keys]: how many positions each key is behind each query."""
        region = np.asarray(self.region_positions, np.int64)
        keys = np.concatenate([np.arange(self.prefix), region])
        queries = np.asarray(self.query_positions, np.int64)
        return np.subtract.outer(queries, keys)  # type: ignore[no-any-return]


def attention_reference(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    segments: Sequence[Segment],
    scale: float,
    window: int | None = None,
    *,
    softcap: float | None = None,
    alibi: Tensor | None = None,
) -> Tensor:
    """Attend in float32, one request and one head group at a time: the contract, word by word.

    q                 [tokens, heads, head_dim], the segments' queries one after the other
    k_pages, v_pages  [kv_heads, slots, head_dim]
    softcap           scores become softcap * tanh(score / softcap)
    alibi             [heads] float32: taken from a score per position that the key is behind
    returns           [tokens, heads, head_dim] in q's dtype
    """
    out = torch.empty_like(q)
    start, group = 0, q.shape[1] // k_pages.shape[0]
    for segment in segments:
        rows = slice(start, start + segment.num_queries)
        start = rows.stop
        k = k_pages[:, segment.slots].float().repeat_interleave(group, 0)
        v = v_pages[:, segment.slots].float().repeat_interleave(group, 0)
        scores = torch.einsum("nhd,hkd->hnk", q[rows].float(), k) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if alibi is not None:
            behind = torch.from_numpy(segment.distances()).to(q.device)
            scores = scores - alibi[:, None, None] * behind
        seen = segment.visible(window)
        if seen is not None:
            scores = scores.masked_fill(~torch.from_numpy(seen).to(q.device), -torch.inf)
        out[rows] = torch.einsum("hnk,hkd->nhd", scores.softmax(-1), v).to(q.dtype)
    return out


class _Part(NamedTuple):
    """A segment made ready: its rows, its keys, and the mask as an additive bias."""

    rows: slice
    slots: slice | Tensor
    bias: Tensor | None
    causal: bool


def _keys(pages: Tensor, slots: slice | Tensor) -> Tensor:
    """[kv_heads, keys, head_dim]: a view where they are one run; else gathered.

    By index_select, which takes a fifth of indexing's time on a processor: 4 against 24 us for 256
    keys of two heads.
    """
    return pages[:, slots] if isinstance(slots, slice) else pages.index_select(1, slots)


class AttentionPlan:
    """A step's segments made ready once, for every layer of the step.

    `plan(q, k_pages, v_pages, window)` equals `attention_reference` on the same segments: up to
    2e-6 in float32, 1e-2 relative in bfloat16 (its own rounding), see tests/test_attention.py.
    Queries that share a KV head are folded into one matrix, so the keys are read once for all of
    a request's nodes and heads.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        *,
        scale: float,
        num_groups: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._segments = segments
        self._scale = scale
        self._num_groups = num_groups
        self._dtype = dtype
        self._device = device
        self._parts: dict[int | None, list[_Part]] = {}  # per window: layers share it

    def __call__(
        self, q: Tensor, k_pages: Tensor, v_pages: Tensor, window: int | None = None
    ) -> Tensor:
        """Attend: shapes as in `attention_reference`."""
        parts = self._parts.get(window)
        if parts is None:
            parts = self._parts[window] = self._prepare(window)
        if len(parts) == 1:
            return self._attend(parts[0], q, k_pages, v_pages)
        if not parts:
            return torch.empty_like(q)
        return torch.cat([self._attend(p, q[p.rows], k_pages, v_pages) for p in parts])

    def _attend(self, part: _Part, q: Tensor, k_pages: Tensor, v_pages: Tensor) -> Tensor:
        num_queries, num_heads, head_dim = q.shape
        k, v = (_keys(pages, part.slots).unsqueeze(0) for pages in (k_pages, v_pages))
        if part.causal:
            # A long chunk without a prefix: the kernel skips the half that is masked.
            out = functional.scaled_dot_product_attention(
                q.transpose(0, 1).unsqueeze(0),
                k,
                v,
                is_causal=True,
                scale=self._scale,
                enable_gqa=self._num_groups > 1,
            )
            return out[0].transpose(0, 1)
        kv_heads = k.shape[1]
        folded = (kv_heads, num_queries * self._num_groups, head_dim)
        grouped = (num_queries, kv_heads, self._num_groups, head_dim)
        out = functional.scaled_dot_product_attention(
            q.view(grouped).transpose(0, 1).reshape(folded).unsqueeze(0),
            k,
            v,
            attn_mask=part.bias,
            scale=self._scale,
        )
        out = out.view(kv_heads, num_queries, self._num_groups, head_dim).transpose(0, 1)
        return out.reshape(num_queries, num_heads, head_dim)

    def _prepare(self, window: int | None) -> list[_Part]:
        parts, start = [], 0
        for segment in self._segments:
            rows = slice(start, start + segment.num_queries)
            start = rows.stop
            hides = window is not None and segment.is_cut(window)
            causal = (
                segment.mask is None
                and segment.prefix == 0
                and segment.num_queries > 1
                and not hides
            )
            if segment.mask is None and segment.num_queries > _MOST_QUERIES and not causal:
                parts += self._pieces(segment, rows.start, window)
                continue
            bias = None if causal else self._bias(segment.visible(window))
            parts.append(_Part(rows, self._slots(segment), bias, causal))
        return parts

    def _pieces(self, segment: Segment, start: int, window: int | None) -> list[_Part]:
        """A long chain in pieces, whose masks are the lower right corners of one.

        start  its first row
        """
        last = segment.piece(segment.num_queries - _MOST_QUERIES, segment.num_queries)
        whole = self._bias(last.visible(window))
        assert whole is not None
        parts = []
        for first in range(0, segment.num_queries, _MOST_QUERIES):
            piece = segment.piece(first, min(first + _MOST_QUERIES, segment.num_queries))
            bias = whole[:, :, -piece.num_queries * self._num_groups :, -piece.num_keys :]
            if self._device.type != "cpu":
                bias = bias.contiguous()  # kernels there ask for aligned rows
            rows = slice(start + first, start + first + piece.num_queries)
            parts.append(_Part(rows, self._slots(piece), bias, causal=False))
        return parts

    def _slots(self, segment: Segment) -> slice | Tensor:
        if isinstance(segment.slots, slice):
            return segment.slots
        return torch.from_numpy(segment.slots).to(self._device)

    def _bias(self, seen: npt.NDArray[np.bool_] | None) -> Tensor | None:
        """0 where seen, -inf where not; a row per query and head of a group, [1, 1, rows, keys]."""
        if seen is None:
            return None
        hidden = torch.from_numpy(~seen).to(self._device)
        bias = torch.zeros(seen.shape, dtype=self._dtype, device=self._device)
        bias.masked_fill_(hidden, -torch.inf)
        return bias.repeat_interleave(self._num_groups, 0)[None, None]
