"""From logits to laws: p, what the user asked for.

Plain and verified decoding both go through `target_laws`, and a row's law is the same to the last
bit whatever other rows stand in the batch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from specinfer.history import Edits, RowEdits
from specinfer.request import SamplingParams

_UNITS = 2**40
"""Top-p sums probabilities as whole multiples of 2^-40: integer sums do not depend on their order,
so the set kept depends neither on the kernel nor on how many candidates were looked at."""

_FIRST_CANDIDATES = 64
_COLD = 1e-2
"""Below this temperature logits are shifted by their maximum first, lest the quotient overflow."""

NO_PICK = -1
"""Instead of a token where a row's best score is none: NaN, infinite, or no token is left."""

_PLAIN = SamplingParams()
_ALL = 2**62
"""A top_k or top-p mass that keeps every token."""


@dataclass(frozen=True, slots=True)
class RowFilters:
    """What rows of logits have to go through; None where no row asks for it.

    greedy       [n] int64, the rows whose law is a point mass at the likeliest token
    edits        what the rows' histories do to them before anything else
    temperature  [rows, 1] float32
    min_p        [rows, 1] float32, the logarithm of min_p
    top_k        [rows, 1] int64; the vocabulary or more keeps all
    top_p        [rows, 1] int64, the mass to reach in units of 2^-40; above 1 keeps all
    temperatures, top_ks  once per run, on the host
    """

    num_rows: int
    greedy: Tensor | None = None
    edits: RowEdits | None = None
    temperature: Tensor | None = None
    min_p: Tensor | None = None
    top_k: Tensor | None = None
    top_p: Tensor | None = None
    temperatures: tuple[float, ...] = ()
    top_ks: tuple[int, ...] = ()

    @property
    def one_temperature(self) -> float | None:
        """What alone makes laws of logits, the same for all rows; None where more does."""
        others = (self.greedy, self.edits, self.min_p, self.top_k, self.top_p)
        if len(set(self.temperatures)) != 1 or any(each is not None for each in others):
            return None
        return self.temperatures[0]

    @classmethod
    def of(
        cls,
        runs: Sequence[tuple[SamplingParams, int]],
        *,
        edits: Sequence[Edits | None] = (),
        device: torch.device | str = "cpu",
    ) -> "RowFilters":
        """Collect the filters of consecutive rows.

        runs    per request its parameters and its number of rows, in the order of the rows; not
                empty
        edits   per request what its history does to its rows; () where none has any
        cost    O(rows) on the host, and one small copy to the device per filter asked for, without
                waiting for the device
        """
        if len(runs) == 1 and not any(edits):
            one, count = runs[0]
            law = one.temperature, one.min_p, one.top_k, one.top_p
            return _filters_of_one(law, count, device)
        return cls._of(runs, edits=edits, device=device)

    @classmethod
    def _of(
        cls,
        runs: Sequence[tuple[SamplingParams, int]],
        *,
        edits: Sequence[Edits | None] = (),
        device: torch.device | str = "cpu",
    ) -> "RowFilters":
        counts = [count for _, count in runs]
        params = [_PLAIN if each.is_greedy else each for each, _ in runs]

        def column(asked: bool, values: Sequence[float], dtype: npt.DTypeLike) -> Tensor | None:
            if not asked:
                return None
            rows = np.repeat(np.array(values, dtype), counts)[:, None]
            return torch.from_numpy(rows).to(device, non_blocking=True)

        temperatures = [each.temperature for each in params]
        log_min_ps = [math.log(each.min_p) if each.min_p else -math.inf for each in params]
        top_ks = [each.top_k if each.top_k > 0 else _ALL for each in params]
        top_ps = [math.ceil(each.top_p * _UNITS) if each.top_p < 1 else _ALL for each in params]
        greedy = [each.is_greedy for each, _ in runs]
        edited: list[tuple[int, int, Edits]] = []
        if any(edits):
            starts = np.cumsum([0, *counts]).tolist()
            rows = zip(starts[:-1], counts, edits, strict=True)
            edited = [(start, count, each) for start, count, each in rows if each is not None]
        greedy_rows = None
        if any(greedy):
            greedy_rows = torch.from_numpy(np.flatnonzero(np.repeat(greedy, counts)))
            greedy_rows = greedy_rows.to(device, non_blocking=True)
        return cls(
            num_rows=sum(counts),
            greedy=greedy_rows,
            edits=RowEdits.of(edited, device=device) if edited else None,
            temperature=column(any(x != 1 for x in temperatures), temperatures, np.float32),
            min_p=column(max(log_min_ps) > -math.inf, log_min_ps, np.float32),
            top_k=column(min(top_ks) < _ALL, top_ks, np.int64),
            top_p=column(min(top_ps) < _ALL, top_ps, np.int64),
            temperatures=tuple(temperatures),
            top_ks=tuple(top_ks),
        )


@lru_cache(maxsize=256)
def _filters_of_one(
    law: tuple[float, float, int, float], count: int, device: torch.device | str
) -> RowFilters:
    """The same at every pass for a request that is alone: 40 us that a small model's drafter has.

    law  temperature, min_p, top_k, top_p
    """
    temperature, min_p, top_k, top_p = law
    params = SamplingParams(temperature=temperature, min_p=min_p, top_k=top_k, top_p=top_p)
    return RowFilters._of([(params, count)], device=device)


def target_laws(logits: Tensor, filters: RowFilters) -> Tensor:
    """Make p, the law the user asked for, from the target's logits.

    logits   [rows, vocab] of any float dtype, on any device; left as they are
    returns  [rows, vocab] float32, rows sum to 1; a row depends on nothing but its own logits and
             filters, to the last bit
    law      softmax, after: the history's edits; temperature; min_p; top_k; top_p. As vLLM's,
             except that tokens tied with the last one kept are kept too (vLLM: in top_k only).
             Greedy rows: all mass on the likeliest token, the lowest id among equals
    cost     one softmax, and one O(vocab) pass or two for each filter that some row asks for
    """
    scores = _edited(logits, filters)
    greedy = filters.greedy
    if greedy is None:
        return torch.softmax(_filtered(scores, filters), -1)
    likeliest = _argmax(scores)[greedy]
    if len(greedy) == len(scores):
        return torch.zeros_like(scores).scatter_(1, likeliest[:, None], 1.0)
    p = torch.softmax(_filtered(scores, filters), -1)
    p[greedy] = 0.0
    p[greedy, likeliest] = 1.0
    return p


def greedy_picks(logits: Tensor, filters: RowFilters) -> Tensor:
    """The likeliest token of each row once it is edited, the lowest id among equals.

    logits   [rows, vocab]; rows that are not greedy are treated as if they were
    returns  [rows] int64: `target_laws` of greedy rows without writing out their laws; `NO_PICK`
             for a row that is not finite
    """
    return sound_argmax(_edited(logits, filters))


def _edited(logits: Tensor, filters: RowFilters) -> Tensor:
    assert logits.shape[0] == filters.num_rows
    scores = logits.float()
    return scores if filters.edits is None else filters.edits.apply(scores)


def _argmax(scores: Tensor) -> Tensor:
    """[rows, vocab] -> [rows] int64, the first among equals."""
    if scores.device.type == "cpu":  # ten times faster than torch's
        return torch.from_numpy(scores.detach().numpy().argmax(-1))
    return scores.argmax(-1)


def sound_argmax(scores: Tensor) -> Tensor:
    """The likeliest token of each row, the lowest id among equals.

    scores   [rows, vocab]
    returns  [rows] int64; `NO_PICK` for a row that is not finite
    cost     one more score per row: to argmax, NaN and infinity are more than any number
    """
    if scores.device.type == "cpu":  # a third of the time of as many operations of torch
        rows = scores.detach().numpy()
        tokens = rows.argmax(-1)
        tokens[~np.isfinite(rows[np.arange(len(rows)), tokens])] = NO_PICK
        return torch.from_numpy(tokens)
    picks = scores.argmax(-1)
    best = scores.gather(-1, picks[:, None])[:, 0]
    return picks.masked_fill(~best.isfinite(), NO_PICK)


def _filtered(scores: Tensor, filters: RowFilters) -> Tensor:
    """Logits over temperature, -inf where a filter drops the token.

    Filters are thresholds, so that nothing depends on the order in which a sort leaves equals.
    """
    if filters.temperature is not None:
        if min(filters.temperatures) < _COLD:
            cold = filters.temperature < _COLD
            scores = scores - torch.where(cold, scores.amax(-1, keepdim=True), 0.0)
        scores = scores / filters.temperature
    if filters.min_p is not None:
        least = scores.amax(-1, keepdim=True) + filters.min_p
        scores = scores.masked_fill(scores < least, -math.inf)
    if filters.top_k is not None:
        widest = max((k for k in filters.top_ks if k < scores.shape[-1]), default=0)
        if widest > 0:
            top = scores.topk(widest, -1).values
            least = top.gather(-1, (filters.top_k - 1).clamp(max=widest - 1))
            least = least.masked_fill(filters.top_k > widest, -math.inf)
            scores = scores.masked_fill(scores < least, -math.inf)
    if filters.top_p is not None:
        p = torch.softmax(scores, -1)
        scores = scores.masked_fill(p < _nucleus_floor(p, filters.top_p), -math.inf)
    return scores


def _nucleus_floor(p: Tensor, mass: Tensor) -> Tensor:
    """The probability of the last token of the smallest set that reaches the mass.

    p        [rows, vocab] float32
    mass     [rows, 1] int64 in units of 2^-40; above 2^40: the row keeps all its tokens
    returns  [rows, 1] float32, 0 where all tokens are kept
    cost     a top-64 of the rows that ask, widened eightfold for those that need more
    """
    floor = torch.zeros_like(p[:, :1])
    rows = (mass[:, 0] <= _UNITS).nonzero()[:, 0]
    num_candidates, vocab = _FIRST_CANDIDATES, p.shape[-1]
    while len(rows):
        top = p[rows].topk(min(num_candidates, vocab), -1).values
        reached = (top * float(_UNITS)).long().cumsum(-1) >= mass[rows]
        last = reached.int().argmax(-1, keepdim=True)
        done = reached[:, -1]
        floor[rows[done]] = top.gather(-1, last)[done]
        if num_candidates >= vocab:
            break  # rounding left the mass short of what was asked: all tokens are needed
        rows, num_candidates = rows[~done], num_candidates * 8
    return floor
