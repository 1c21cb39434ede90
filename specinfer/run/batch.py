"""Requests' parts of a step, flattened into one ragged list of tokens."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from specinfer.cache.blocks import Pages
from specinfer.ops.attention import Segment


@dataclass(slots=True)
class Span:
    """One request's new tokens in one step of one model.

    tokens      [new] token ids
    positions   [new]
    pages       where its K and V stand
    prefix      keys 0 … prefix - 1 are seen by every new token
    start       the key index of the first new token; keys prefix … start - 1 are older nodes
    mask        [new, start - prefix + new] bool over the keys from `prefix` on; None: a causal
                chain, start == prefix
    num_logits  how many of the last tokens need logits
    region_positions  positions of the keys from `prefix` on; None: they are the new tokens'
    """

    tokens: Sequence[int]
    positions: Sequence[int]
    pages: Pages
    prefix: int
    start: int
    mask: npt.NDArray[np.bool_] | None
    num_logits: int
    region_positions: Sequence[int] | None = None


@dataclass(slots=True)
class Level:
    """Nodes of many requests' trees at one depth, and how many tokens to pick after each.

    spans         as many logits as nodes; below the first level a token is the place of a pick of
                  the level above: its row there times that level's width, plus its rank
    width         picks per row
    temperatures  one per span, the logits' divisor
    """

    spans: list[Span]
    width: int
    temperatures: list[float]


@dataclass(slots=True)
class Flat:
    """Spans one after the other, on the host.

    tokens, positions  [tokens]
    writes             per span, where its K and V are written
    segments           one per span, for attention
    rows               the tokens that need logits
    """

    tokens: list[int]
    positions: list[int]
    writes: list[slice | npt.NDArray[np.int64]]
    segments: list[Segment]
    rows: list[int]


@dataclass(slots=True)
class Batch:
    """Spans as flat tensors.

    tokens, positions  [tokens] int64
    slots              [tokens] where K and V are written; a slice where they are one run
    segments           one per span, for attention
    logits_rows        [rows] int64, the tokens that need logits; None: all of them
    """

    tokens: Tensor
    positions: Tensor
    slots: slice | Tensor
    segments: list[Segment]
    logits_rows: Tensor | None


def cut(spans: Sequence[Span], most_tokens: int) -> Iterator[list[Span]]:
    """Parts of about equal size and at most so many tokens, to be computed one after the other.

    A chain is cut anywhere: what stands before it is then its prefix. A tree stays whole, whatever
    its size.
    """
    num_tokens = sum(len(span.tokens) for span in spans)
    most_tokens = -(-num_tokens // max(1, -(-num_tokens // most_tokens)))
    part, room = list[Span](), most_tokens
    for span in spans:
        done, size = 0, len(span.tokens)
        while done < size:
            count = size - done if span.mask is not None else min(size - done, room)
            if part and not 0 < count <= room:
                yield part
                part, room = [], most_tokens
                continue
            part.append(piece(span, done, done + count))
            done, room = done + count, room - count
    if part:
        yield part


def piece(span: Span, start: int, stop: int) -> Span:
    """Tokens start … stop - 1 of a chain, or all of any span, with the logits that they owe."""
    size = len(span.tokens)
    if stop - start == size:
        return span
    assert span.mask is None
    return replace(
        span,
        tokens=span.tokens[start:stop],
        positions=span.positions[start:stop],
        prefix=span.start + start,
        start=span.start + start,
        num_logits=max(0, stop - max(start, size - span.num_logits)),
        region_positions=None,
    )


def lay_out(spans: Sequence[Span]) -> Flat:
    """Lay spans out one after the other."""
    flat = Flat([], [], [], [], [])
    for span in spans:
        flat.tokens.extend(span.tokens)
        flat.positions.extend(span.positions)
        stop = len(flat.tokens)
        flat.rows.extend(range(stop - span.num_logits, stop))
        stop = span.start + len(span.tokens)
        flat.writes.append(span.pages.slots(span.start, stop))
        flat.segments.append(
            Segment(
                num_queries=len(span.tokens),
                slots=span.pages.slots(0, stop),
                prefix=span.prefix,
                mask=span.mask,
                query_positions=span.positions,
                region_positions=span.region_positions or span.positions,
            )
        )
    return flat


def flatten(spans: Sequence[Span], device: torch.device) -> Batch:
    """Lay spans out as tensors."""
    flat = lay_out(spans)
    return Batch(
        tokens=torch.tensor(flat.tokens, device=device),
        positions=torch.tensor(flat.positions, device=device),
        slots=_join(flat.writes, device),
        segments=flat.segments,
        logits_rows=None
        if len(flat.rows) == len(flat.tokens)
        else torch.tensor(flat.rows, dtype=torch.int64, device=device),
    )


def _join(writes: Sequence[slice | npt.NDArray[np.int64]], device: torch.device) -> slice | Tensor:
    if len(writes) == 1 and isinstance(writes[0], slice):
        return writes[0]
    return torch.from_numpy(slots_of(writes)).to(device)


def slots_of(writes: Sequence[slice | npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
    """Every slot that is written, in order."""
    parts = [np.arange(w.start, w.stop) if isinstance(w, slice) else w for w in writes]
    return np.concatenate(parts)
