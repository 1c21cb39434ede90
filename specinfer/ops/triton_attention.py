"""Tree attention on a GPU, behind the contract of attention.py: one Triton kernel and a reduction.

What a step's segments are is written into one array of int32, copied to the device once per step
and read by every layer:

    ┌────────┬────────────┬───────────┬────────┬──────────────────┬────────────────────┐
    │ header │ work items │ positions │ splits │ region positions │ slot tables, masks │
    └────────┴────────────┴───────────┴────────┴──────────────────┴────────────────────┘

A mask is a bit per region key, 32 to a word, so that a tree may have any number of nodes. Keys are
streamed once per KV head for all of a request's nodes and heads, as long as these are at most
`LARGEST_TILE` rows. A request with a longer prefix is split into runs of `SPLIT_KEYS` keys, at the
same places in every batch, and a second kernel adds up what they say.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from specinfer.errors import DependencyError
from specinfer.ops.attention import Segment

Ints = npt.NDArray[np.int32]

LARGEST_TILE = 128
"""Rows that share one pass over the keys: heads of a group times nodes. Beyond it a request has
several tiles, whose programs run side by side and find the keys in the GPU's cache."""

SPLIT_KEYS = 256
"""Keys of one work item. A constant, not so many that the GPU is full: so a request's keys are
split alike whoever shares its batch. Not measured."""

_TILES = (16, 32, 64, LARGEST_TILE)
HEADER = 4
"""Numbers in front of a layout's others, which say where those stand."""

_ITEM = 16


class _Item(NamedTuple):
    """A tile's rows and a range of its keys, as `triton_kernels.attend` reads them.

    token          its first row's token in the batch; num_queries of them
    query          the same, counted within the request
    start, stop    its keys
    prefix         the request's
    slot, table    the keys' slots: a run from `slot`, or, unless -1, a table's place
    words          place of the request's mask, `num_words` per query; -1: a causal chain
    region         place of the region's positions
    lowest         least position of its queries
    partial        first row of its sums; -1: it has all the keys and writes the result
    """

    token: int
    num_queries: int
    query: int
    start: int
    stop: int
    prefix: int
    slot: int
    table: int
    words: int
    num_words: int
    region: int
    lowest: int
    partial: int


_FIELD = {name: column for column, name in enumerate(_Item._fields)}


@dataclass(frozen=True, slots=True)
class Layout:
    """A step's segments as the kernels read them.

    meta          [numbers] int32, see above; the header: items, and where items, positions and
                  splits stand. Per token of a split tile: its first partial row, rows from part to
                  part, parts; else zeros
    tile          rows of a tile
    num_partials  rows of sums that split tiles need
    """

    meta: Ints
    tile: int
    num_items: int
    num_tokens: int
    num_partials: int


def lay_out(
    segments: Sequence[Segment], num_groups: int, num_tokens: int, rest: int = HEADER
) -> Layout:
    """Deal a step out into work items.

    num_groups  query heads per KV head
    num_tokens  of the batch: those behind the segments' are padding and get no result
    rest        how far behind the header's place what follows it will stand on the device: farther
                than in `meta` where several layouts' headers are to stay where they are
    cost        numpy per segment on the host; 4 bytes per key of requests that are not one run
    """
    rows = max((segment.num_queries for segment in segments), default=1) * num_groups
    # A whole group has to fit into a tile.
    tile = max(
        next((size for size in _TILES if size >= rows), LARGEST_TILE),
        1 << (num_groups - 1).bit_length(),
    )
    tables, regions, tiles = _Tables(), list[int](), list[_Item]()
    token = 0
    for segment in segments:
        tiles += _tiles(segment, token, tile // num_groups, num_groups, tables, regions)
        token += segment.num_queries
    items, splits, num_partials = _split(
        np.array(tiles, np.int32).reshape(-1, len(_Item._fields)), num_groups, num_tokens
    )
    positions = np.zeros(num_tokens, np.int32)
    positions[:token] = [p for segment in segments for p in segment.query_positions]
    at_positions = rest + len(items) * _ITEM
    at_splits = at_positions + num_tokens
    at_regions = at_splits + splits.size
    at_tables = at_regions + len(regions)
    dealt = np.zeros((len(items), _ITEM), np.int32)
    dealt[:, : items.shape[1]] = items
    dealt[:, _FIELD["region"]] += at_regions
    for name in ("table", "words"):
        column = dealt[:, _FIELD[name]]
        column[column >= 0] += at_tables
    header = np.array([len(items), rest, at_positions, at_splits], np.int32)
    own = [header, dealt.ravel(), positions, splits.ravel(), np.array(regions, np.int32)]
    meta = np.concatenate([*own, *tables.parts])
    return Layout(meta, tile, len(items), num_tokens, num_partials)


class _Tables:
    """Arrays of different lengths one after the other, and where each begins."""

    def __init__(self) -> None:
        self.parts: list[Ints] = []
        self._size = 0

    def add(self, values: npt.NDArray[np.integer]) -> int:
        part = values.astype(np.int32, copy=False).ravel()
        self.parts.append(part)
        self._size += len(part)
        return self._size - len(part)


def _tiles(
    segment: Segment,
    token: int,
    queries: int,
    num_groups: int,
    tables: _Tables,
    regions: list[int],
) -> list[_Item]:
    """A request's tiles of so many queries, each with all its keys.

    Several tiles, a prompt's chunk, fill a GPU as they are, and their sums would fill its memory:
    they are not split.
    """
    slot, table, words, num_words = 0, -1, -1, 0
    if isinstance(segment.slots, slice):
        slot = segment.slots.start
    else:
        table = tables.add(segment.slots)
    if segment.mask is not None:
        bits = pack_bits(segment.mask)
        words, num_words = tables.add(bits), bits.shape[1]
    region = len(regions)
    regions.extend(segment.region_positions)
    tiles = []
    for query in range(0, segment.num_queries, queries):
        count = min(queries, segment.num_queries - query)
        is_chain = segment.mask is None
        tiles.append(
            _Item(
                token=token + query,
                num_queries=count,
                query=query,
                start=0,
                # A chunk's query sees nothing behind itself.
                stop=segment.prefix + query + count if is_chain else segment.num_keys,
                prefix=segment.prefix,
                slot=slot,
                table=table,
                words=words,
                num_words=num_words,
                region=region,
                lowest=min(segment.query_positions[query : query + count]),
                partial=0 if segment.num_queries * num_groups <= LARGEST_TILE else -1,
            )
        )
    return tiles


def _split(tiles: Ints, num_groups: int, num_tokens: int) -> tuple[Ints, Ints, int]:
    """Deal each tile's keys out, SPLIT_KEYS to an item, where `partial` says that it may be split.

    returns  items [items, fields]; splits [tokens, 3] as `Layout` has them; rows of sums
    """
    stops, queries = tiles[:, _FIELD["stop"]], tiles[:, _FIELD["num_queries"]]
    counts = np.where(tiles[:, _FIELD["partial"]] < 0, 1, np.maximum(1, -(-stops // SPLIT_KEYS)))
    is_split, sizes = counts > 1, queries * num_groups
    sums = np.where(is_split, counts * sizes, 0)
    first = np.cumsum(sums) - sums

    items = np.repeat(tiles, counts, 0)
    part = np.arange(len(items)) - np.repeat(np.cumsum(counts) - counts, counts)
    start = np.where(np.repeat(is_split, counts), part * SPLIT_KEYS, 0)
    stop = np.where(np.repeat(is_split, counts), start + SPLIT_KEYS, items[:, _FIELD["stop"]])
    items[:, _FIELD["start"]] = start
    items[:, _FIELD["stop"]] = np.minimum(stop, items[:, _FIELD["stop"]])
    partial = np.repeat(first, counts) + part * np.repeat(sizes, counts)
    items[:, _FIELD["partial"]] = np.where(np.repeat(is_split, counts), partial, -1)

    splits = np.zeros((num_tokens, 3), np.int32)
    own = splits[: queries.sum()]  # tiles are in the order of their tokens
    query = np.arange(len(own)) - np.repeat(np.cumsum(queries) - queries, queries)
    own[:, 0] = np.repeat(first, queries) + query * num_groups
    own[:, 1] = np.repeat(sizes, queries)
    own[:, 2] = np.repeat(counts, queries)
    own[~np.repeat(is_split, queries)] = 0
    return items, splits, int(sums.sum())


def pack_bits(mask: npt.NDArray[np.bool_]) -> Ints:
    """[queries, keys] bool -> [queries, words] int32, the first key in the lowest bit."""
    packed = np.packbits(mask, 1, bitorder="little")
    words = np.zeros((len(mask), -(-packed.shape[1] // 4)), "<i4")
    words.view(np.uint8)[:, : packed.shape[1]] = packed
    return words.astype(np.int32, copy=False)


class TritonPlan:
    """A step's segments on the device, for every layer of the step.

    `plan(q, k_pages, v_pages, window)` equals `attention_reference` on the same segments: up to
    1e-5 in float32 (in the interpreter), 4e-3 of the norm in bfloat16, see
    tests/test_triton_attention.py. Scores and sums are float32; weights are rounded to the pages'
    dtype before they meet the values.
    """

    def __init__(
        self,
        layout: Layout,
        meta: Tensor,
        *,
        scale: float,
        num_groups: int,
        softcap: float | None = None,
        alibi: Tensor | None = None,
        num_programs: int | None = None,
        partials: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Read a layout that has been copied to the device.

        meta            [numbers] int32, `layout.meta` on the device; may be overwritten with
                        another layout's of as many tokens and the same tile
        softcap, alibi  as in `attention_reference`
        num_programs, partials  of every layout there will be, as `partial_sums` makes them;
                        None: of this one
        raises          DependencyError if triton is not installed
        """
        self._kernels = _import_kernels()
        self._layout = layout
        self._meta = meta
        self._scale = scale
        self._num_groups = num_groups
        self._softcap = softcap
        self._alibi = alibi
        self._num_programs = num_programs or layout.num_items
        self._partials = partials

    def __call__(
        self, q: Tensor, k_pages: Tensor, v_pages: Tensor, window: int | None = None
    ) -> Tensor:
        """Attend: shapes as in `attention_reference`; the pages' layout is `KVPool`'s."""
        num_tokens, num_heads, head_dim = q.shape
        kv_heads = k_pages.shape[0]
        assert num_tokens == self._layout.num_tokens
        assert q.stride(2) == k_pages.stride(2) == 1
        assert k_pages.stride() == v_pages.stride()
        out = torch.empty((num_tokens, num_heads, head_dim), dtype=q.dtype, device=q.device)
        if not self._num_programs:
            return out
        if self._partials is None:
            count = self._layout.num_partials
            self._partials = partial_sums(count, kv_heads, head_dim, q.device)
        block_d = max(16, 1 << (head_dim - 1).bit_length())
        tile = self._layout.tile
        block_n = 64 if block_d <= 128 else 32
        if q.dtype == torch.float32:  # twice the registers
            block_n = 32 if block_d <= 64 else 16
        sizes = {"GROUP": self._num_groups, "HEAD_DIM": head_dim, "BLOCK_D": block_d}
        self._kernels.attend[self._num_programs, kv_heads](
            q,
            k_pages,
            v_pages,
            out,
            *self._partials,
            self._meta if self._alibi is None else self._alibi,  # never read without ALiBi
            self._meta,
            q.stride(0),
            q.stride(1),
            k_pages.stride(0),
            k_pages.stride(1),
            self._scale,
            self._softcap or 1.0,
            window or 0,
            **sizes,
            BLOCK_M=tile,
            BLOCK_N=block_n,
            WINDOWED=window is not None,
            CAPPED=self._softcap is not None,
            TILTED=self._alibi is not None,
            WIDENED=self._kernels.IS_INTERPRETED,
            num_warps=8 if tile >= LARGEST_TILE else 4,
            num_stages=2,
        )
        if len(self._partials[0]):
            grid = (num_tokens, num_heads)
            self._kernels.combine[grid](out, *self._partials, self._meta, **sizes, num_warps=1)
        return out


def partial_sums(
    count: int, kv_heads: int, head_dim: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Room for the sums of split tiles, and for the peak and the mass of each row."""
    sums = torch.empty((count, kv_heads, head_dim), dtype=torch.float32, device=device)
    return sums, torch.empty((count, kv_heads, 2), dtype=torch.float32, device=device)


def _import_kernels() -> ModuleType:
    try:
        from specinfer.ops import triton_kernels
    except ImportError as error:
        raise DependencyError(
            "attention on a GPU needs triton, which is not installed: pip install 'specinfer[gpu]'"
        ) from error
    return triton_kernels
