"""Fixed shapes <k1, k2, …>: every node at depth d gets the same number of slots.

Each drafter draws its full shape level by level, one batched pass per level for all requests; the
trees of several drafters are merged after the fact (SpecInfer §3).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from specinfer.cache.blocks import Pages
from specinfer.config import Draw
from specinfer.draft.base import Draft, Drafter
from specinfer.request import SamplingParams
from specinfer.sampling import (
    RowFilters,
    SeededNoise,
    add_iid,
    add_picks,
    add_without_replacement,
    target_laws,
)
from specinfer.tree import Floats, TokenTree, union


@dataclass(slots=True, eq=False)
class Growth:
    """One request's tree to be grown in this step.

    key, tokens, pages  as `Draft` has them
    widths              slots per node at depth 1, 2, …
    params              the drafter's law: the request's filters at the drafter's temperature
    draw                how slots are drawn, resolved: never "auto"
    rng                 the request's own randomness, for draws and for the order of a union
    noise               a seeded request's noise: picks are made with it
    """

    key: int
    tokens: list[int]
    pages: Pages
    widths: tuple[int, ...]
    params: SamplingParams
    draw: Draw
    rng: np.random.Generator
    noise: SeededNoise | None


@dataclass(slots=True, eq=False)
class Grown:
    """A finished tree, and each drafter's part of it.

    drafts  per drafter, its own tree
    maps    per drafter: own node -> node of `tree`
    """

    tree: TokenTree
    drafts: list[Draft]
    maps: list[list[int]]

    def own_path(self, drafter: int, path: Sequence[int]) -> list[int]:
        """The leading part of an accepted path that one drafter proposed, in its own nodes."""
        if len(self.drafts) == 1:
            return list(path)
        own = {node: index for index, node in enumerate(self.maps[drafter])}
        nodes = []
        for node in path:
            if node not in own:
                break
            nodes.append(own[node])
        return nodes


def grow(growths: Sequence[Growth], drafters: Sequence[Drafter]) -> list[Grown]:
    """Grow one tree per request with every drafter, and merge."""
    parts = [_grow_alone(growths, drafter, source) for source, drafter in enumerate(drafters)]
    grown = []
    for index, growth in enumerate(growths):
        drafts = [part[index] for part in parts]
        if len(drafts) == 1:
            grown.append(Grown(drafts[0].tree, drafts, []))
        else:
            tree, maps = union([draft.tree for draft in drafts], growth.rng)
            grown.append(Grown(tree, drafts, maps))
    return grown


def _grow_alone(growths: Sequence[Growth], drafter: Drafter, source: int) -> list[Draft]:
    drafts = [Draft(g.key, g.tokens, g.pages, TokenTree(g.tokens[-1])) for g in growths]
    level = [[0] for _ in growths]
    for depth in range(max(len(growth.widths) for growth in growths)):
        open_ids = [i for i, g in enumerate(growths) if depth < len(g.widths) and level[i]]
        if not open_ids:
            break
        logits = drafter.expand([(drafts[i], level[i]) for i in open_ids])
        proposals = _Proposals(
            [(growths[i], len(level[i]), growths[i].widths[depth]) for i in open_ids],
            logits,
            depth,
        )
        for order, i in enumerate(open_ids):
            level[i] = proposals.add(order, drafts[i].tree, level[i], source)
    return drafts


class _Proposals:
    """One level's slots for all requests: picks and laws are computed in batches."""

    def __init__(
        self, parts: Sequence[tuple[Growth, int, int]], logits: Tensor, depth: int
    ) -> None:
        """Take the level apart.

        parts   per request: its growth, its rows of `logits`, the width here
        logits  [rows, vocab] after nodes at this depth
        """
        self._parts = parts
        starts = np.cumsum([0, *(count for _, count, _ in parts)])
        self._picks: dict[int, list[list[int]]] = {}
        self._laws: dict[int, Floats] = {}
        plain = [i for i, (g, _, _) in enumerate(parts) if g.draw == "pick" and g.noise is None]
        seeded = [i for i, (g, _, _) in enumerate(parts) if g.draw == "pick" and g.noise]
        drawn = [i for i, (g, _, _) in enumerate(parts) if g.draw != "pick"]
        rows = {i: slice(int(starts[i]), int(starts[i + 1])) for i in range(len(parts))}
        if plain:
            self._pick(plain, _take(logits, rows, plain))
        if seeded:
            scores = self._law(seeded, _take(logits, rows, seeded)).log()
            noise = np.concatenate([self._noise(i, depth) for i in seeded])
            self._pick(seeded, scores + torch.from_numpy(noise).to(scores.device))
        if drawn:
            laws = self._law(drawn, _take(logits, rows, drawn)).cpu().numpy()
            ends = np.cumsum([parts[i][1] for i in drawn])
            self._laws = dict(zip(drawn, np.split(laws, ends[:-1]), strict=True))

    def add(self, order: int, tree: TokenTree, nodes: list[int], source: int) -> list[int]:
        """Put one request's slots under its nodes; returns the new nodes."""
        growth, _, width = self._parts[order]
        new: list[int] = []
        for row, node in enumerate(nodes):
            if growth.draw == "pick":
                new += add_picks(tree, node, self._picks[order][row][:width], source=source)
            else:
                add = add_iid if growth.draw == "iid" else add_without_replacement
                new += add(tree, node, self._laws[order], row, width, growth.rng, source=source)
        return new

    def _law(self, ids: Sequence[int], logits: Tensor) -> Tensor:
        runs = [(self._parts[i][0].params, self._parts[i][1]) for i in ids]
        return target_laws(logits, RowFilters.of(runs, device=logits.device))

    def _noise(self, order: int, depth: int) -> Floats:
        """[rows, vocab]: what will decide the target's token after nodes of this depth."""
        growth, count, _ = self._parts[order]
        assert growth.noise is not None
        row = growth.noise.row(len(growth.tokens) + depth)
        return np.broadcast_to(row, (count, len(row)))

    def _pick(self, ids: Sequence[int], scores: Tensor) -> None:
        """The best tokens by score, without those that cannot come (score -inf)."""
        width = min(max(self._parts[i][2] for i in ids), scores.shape[-1])
        if width == 1 and scores.device.type == "cpu":
            best = scores.numpy().argmax(-1)[:, None]  # numpy's is far faster than torch's here
            tokens, possible = best.tolist(), np.take_along_axis(scores.numpy(), best, -1) > -np.inf
        else:
            top = scores.topk(width, -1)
            tokens, possible = top.indices.tolist(), (top.values > -torch.inf).cpu().numpy()
        if not possible.all():
            tokens = [
                [t for t, keep in zip(row, keeps, strict=True) if keep]
                for row, keeps in zip(tokens, possible, strict=True)
            ]
        start = 0
        for i in ids:
            self._picks[i] = tokens[start : start + self._parts[i][1]]
            start += self._parts[i][1]


def _take(logits: Tensor, rows: dict[int, slice], ids: Sequence[int]) -> Tensor:
    """The rows of some requests; no copy where they are all."""
    if len(ids) == len(rows):
        return logits
    return torch.cat([logits[rows[i]] for i in ids])
