"""What a builder is asked for and gives back, and how drafters' guesses become slots.

A builder grows one token tree per request, for all requests of a step together. Predictability
(docs/algorithm.md) is its whole duty: a slot that was drawn may depend on its ancestors, on earlier
siblings, on what drafters said before the draw and on past steps, never on its own token.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from specinfer.cache.blocks import Pages
from specinfer.config import Draw
from specinfer.draft.base import Draft, Drafter, Pick
from specinfer.draft.calibration import Features, Fortune, Regime
from specinfer.history import Edits, History
from specinfer.logits import RowFilters, target_laws
from specinfer.ops.native import Kernels, address, kernels
from specinfer.ops.transfer import is_far, to_host
from specinfer.request import SamplingParams
from specinfer.sampling import SeededNoise
from specinfer.tree import Floats, Integers, Law, TokenTree


@dataclass(slots=True, eq=False)
class Growth:
    """One request's tree to be grown in this step.

    key, tokens, pages, prediction, num_prompt, history  as `Draft` has them
    params      the drafters' law: the request's filters at the drafters' temperature
    draw        how slots are drawn, resolved: never "auto"
    regime      whose tables to read
    rng         the request's own randomness, for draws and for the order of a union
    noise       a seeded request's noise: picks are made with it
    sources     the drafters that take part, by index
    max_nodes   distinct drafted nodes at most, without the root
    max_depth   deepest node at most
    urgency     what a token is worth to this request, against 1 for the others
    fortunes    per drafter, how its drafts for this request fared against its table
    """

    key: int
    tokens: list[int]
    pages: Pages
    params: SamplingParams
    draw: Draw
    regime: Regime
    rng: np.random.Generator
    noise: SeededNoise | None
    sources: Sequence[int]
    max_nodes: int
    max_depth: int
    prediction: Sequence[int] = ()
    num_prompt: int | None = None
    history: History | None = None
    urgency: float = 1.0
    fortunes: Mapping[int, Fortune] = field(default_factory=dict)

    def odds(self, source: int) -> float:
        """By what a drafter's odds of acceptance are multiplied for this request."""
        fortune = self.fortunes.get(source)
        return 1.0 if fortune is None else fortune.odds

    def edits(self, draft: Draft, nodes: Sequence[int]) -> Edits | None:
        """What is done to a drafter's words after some nodes, as to the target's own."""
        if self.history is None:
            return None
        return self.history.edits(self.tokens, draft.tree, nodes)

    def draft(self, tree: TokenTree) -> Draft:
        """This request for drafters that grow this tree."""
        return Draft(
            self.key,
            self.tokens,
            self.pages,
            tree,
            self.prediction,
            self.num_prompt,
            self.history,
        )


@dataclass(slots=True, eq=False)
class Grown:
    """A finished tree, and each drafter's part of it.

    parts     per drafter that was asked: its draft, and own node -> node of `tree` (-1: left out)
    features  per slot of `tree` what its acceptance may be learnt by; {} where it is not
    """

    tree: TokenTree
    parts: Mapping[int, tuple[Draft, Sequence[int]]]
    features: dict[int, Features] = field(default_factory=dict)

    def own_path(self, source: int, path: Sequence[int]) -> list[int]:
        """The leading part of an accepted path that one drafter knows, in its own nodes."""
        own = {node: index for index, node in enumerate(self.parts[source][1])}
        nodes = []
        for node in path:
            if node not in own:
                break
            nodes.append(own[node])
        return nodes


class Builder(Protocol):
    """Grows the trees of a step."""

    def grow(self, growths: Sequence[Growth], drafters: Sequence[Drafter]) -> list[Grown]:
        """One tree per request, in their order."""
        ...


class Guesses:
    """What one drafter says after the nodes of a frontier: laws or picks, row by row.

    picks  per row, (token, probability), likeliest first; None: there are laws
    """

    def __init__(
        self,
        laws: Tensor | None = None,
        picks: list[list[Pick]] | None = None,
        logits: tuple[Tensor, RowFilters] | None = None,
    ) -> None:
        """Either laws [rows, vocab] float32, rows sum to 1, or picks, or what makes laws."""
        self.picks = picks
        self._laws = laws
        self._logits = logits

    @property
    def laws(self) -> Tensor:
        """[rows, vocab] float32; for picks of a seeded request tilted by its noise."""
        if self._laws is None:
            assert self._logits is not None, "picks have no laws"
            self._laws = target_laws(*self._logits)
        return self._laws

    @property
    def temperature(self) -> float | None:
        """What alone makes laws of logits that are at hand; None elsewhere."""
        if self._logits is None or is_far(self._logits[0]):
            return None
        return self._logits[1].one_temperature

    def likeliest(self, count: int) -> tuple[Integers, Floats]:
        """The likeliest tokens of each row and their probabilities, both [rows, count].

        cost  without writing laws out where only a temperature makes them of logits
        """
        temperature = self.temperature
        if temperature is not None and self._laws is None and (found := kernels()) is not None:
            assert self._logits is not None
            return _likeliest(found, self._logits[0], count, 1.0 / temperature)
        return likeliest(self.laws, count)


def guess(drafter: Drafter, asked: Sequence[tuple[Growth, Draft, list[int]]]) -> Guesses:
    """Ask one drafter about frontier nodes of some requests.

    asked    per request: its growth, its draft, and nodes of the draft's tree, not none
    returns  requests and nodes in the given order
    law      what the target may not say is not guessed: the same masks, bans, biases and penalties
             after each node, which depend on its ancestors alone
    """
    answer = drafter.expand([(draft, nodes) for _, draft, nodes in asked])
    edits = [growth.edits(draft, nodes) for growth, draft, nodes in asked]
    if not isinstance(answer, Tensor):
        return Guesses(picks=_admitted(answer, [len(nodes) for _, _, nodes in asked], edits))
    runs = [(growth.params, len(nodes)) for growth, _, nodes in asked]
    filters = RowFilters.of(runs, edits=edits, device=answer.device)
    if not any(growth.noise is not None and growth.draw == "pick" for growth, _, _ in asked):
        return Guesses(logits=(answer, filters))
    laws = target_laws(answer, filters)
    start = 0
    for growth, draft, nodes in asked:
        stop = start + len(nodes)
        if growth.noise is not None and growth.draw == "pick":
            laws[start:stop] = _tilted(laws[start:stop], growth, draft, nodes)
        start = stop
    return Guesses(laws=laws)


def _admitted(
    picks: list[list[Pick]], counts: Sequence[int], edits: Sequence[Edits | None]
) -> list[list[Pick]]:
    """Picks without those that the target may not say."""
    kept, start = [], 0
    for count, each in zip(counts, edits, strict=True):
        for row, own in enumerate(picks[start : start + count]):
            kept.append(own if each is None else [p for p in own if each.admits(row, p[0])])
        start += count
    return kept


def _tilted(laws: Tensor, growth: Growth, draft: Draft, nodes: list[int]) -> Tensor:
    """The law over tokens as if their noise were part of the logits: the pick comes out on top."""
    assert growth.noise is not None
    known = len(growth.tokens)
    noise = np.stack([growth.noise.row(known + draft.tree.depths[node]) for node in nodes])
    return torch.softmax(
        laws.log() + torch.from_numpy(noise).to(laws.device, non_blocking=True), -1
    )


SUPPORT = 256
"""To so many likeliest tokens a law is cut that is drawn from but would be dear to copy: at
temperature 1 the bundled pair's overlap falls from 0.689 to 0.673, at 0.6 by less than 0.001."""


@dataclass(frozen=True, slots=True, eq=False)
class Drawable:
    """Laws on the host, as slots are drawn from them.

    rows    [rows, columns], rows sum to 1
    tokens  what their columns stand for, as `Law` has them; likeliest first, where they were cut
    """

    rows: Floats
    tokens: Integers | None
    _laws: Tensor

    @classmethod
    def of(cls, laws: Tensor) -> "Drawable":
        """A drafter's answer: whole, or cut where it is far away.

        laws  [rows, vocab], rows sum to 1
        law   cut before anything is drawn, so that the cut law is the one a token is drawn from
        cost  one copy, of at most `SUPPORT` tokens per row from far away
        """
        if not is_far(laws):
            return cls(to_host(laws)[0], None, laws)
        top = laws.topk(min(SUPPORT, laws.shape[-1]), -1)
        shares = top.values / top.values.sum(-1, keepdim=True)
        rows, tokens = to_host(shares, top.indices)
        return cls(rows, tokens, laws)

    def law(self, row: int) -> Law:
        """One row, with nothing seen."""
        return Law(self.rows, row, (), self.tokens)

    def likeliest(self, count: int) -> list[list[Pick]]:
        """The likeliest tokens of each row and their probabilities."""
        if self.tokens is None:
            return as_picks(*likeliest(self._laws, count))
        return as_picks(self.tokens[:, :count], self.rows[:, :count])


def as_picks(tokens: np.ndarray, probabilities: np.ndarray) -> list[list[Pick]]:
    """[rows, count] of either, likeliest first, as picks per row."""
    return [
        list(zip(*row, strict=True))
        for row in zip(tokens.tolist(), probabilities.tolist(), strict=True)
    ]


def likeliest(laws: Tensor, count: int) -> tuple[Integers, Floats]:
    """The likeliest tokens of each row and their probabilities, both [rows, count]."""
    if not is_far(laws) and (found := kernels()) is not None:
        return _likeliest(found, laws, count, 0.0)
    top = laws.topk(min(count, laws.shape[-1]), -1)
    tokens, probabilities = to_host(top.indices, top.values)
    return tokens, probabilities


def _likeliest(found: Kernels, rows: Tensor, count: int, scale: float) -> tuple[Integers, Floats]:
    """The same by our kernel, of laws, or of logits and 1 / temperature."""
    num_rows, size = rows.shape
    count = min(count, size)
    rows = rows.to(torch.float32).contiguous()
    tokens = np.empty((num_rows, count), np.int64)
    probabilities = np.empty((num_rows, count), np.float32)
    where = address(probabilities), address(tokens)
    found.likeliest(rows.data_ptr(), num_rows, size, count, scale, *where)
    return tokens, probabilities
