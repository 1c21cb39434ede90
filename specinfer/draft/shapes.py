"""Shapes known before anything is drafted: <k1, k2, …>, i.i.d. paths, and Sequoia's trees.

Each drafter draws its full shape level by level, one batched pass per level for all requests, or
picks it in one call where it can; the trees of several drafters are merged after the fact
(SpecInfer §3).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from specinfer.draft.base import (
    Draft,
    Drafter,
    DrafterFailedError,
    LevelDrafter,
    Pick,
    Plan,
    Planned,
)
from specinfer.draft.growth import (
    Drawable,
    Grown,
    Growth,
    Guesses,
    as_picks,
    guess,
)
from specinfer.logits import RowFilters
from specinfer.sampling import add_iid, add_picks, add_without_replacement
from specinfer.tree import TokenTree, union


class Shape(Protocol):
    """How many slots each node gets, by where it stands; places are numbers of the shape's own.

    depth  of its deepest nodes; the root's place is 0
    """

    depth: int

    def width(self, place: int, depth: int) -> int:
        """Slots under a node at this place."""
        ...

    def below(self, place: int, ranks: Sequence[int]) -> int:
        """The place of the child that the slots of these ranks lead to."""
        ...

    def count(self, depth: int) -> int:
        """Nodes down to this depth at most, without the root."""
        ...


class TreeShape:
    """A tree drawn beforehand: `children[place]` are the places below, likeliest first."""

    def __init__(self, children: Sequence[Sequence[int]]) -> None:
        """Take a shape whose places are numbered with parents before children, the root 0."""
        self._children = children
        depths = [0] * len(children)
        for place, below in enumerate(children):
            for child in below:
                depths[child] = depths[place] + 1
        self.depth = max(depths)
        self._counts = np.bincount(depths).cumsum() - 1

    @classmethod
    def of_widths(cls, widths: Sequence[int]) -> "TreeShape":
        """<k1, k2, …>: every node at depth d has the same number of slots."""
        children: list[list[int]] = [[]]
        level = [0]
        for width in widths:
            below = []
            for place in level:
                for _ in range(width):
                    children[place].append(len(children))
                    below.append(len(children))
                    children.append([])
            level = below
        return cls(children)

    def width(self, place: int, depth: int) -> int:
        """See `Shape.width`."""
        return len(self._children[place])

    def below(self, place: int, ranks: Sequence[int]) -> int:
        """See `Shape.below`."""
        return self._children[place][ranks[0]]

    def count(self, depth: int) -> int:
        """See `Shape.count`."""
        return int(self._counts[min(depth, self.depth)])


class PathsShape:
    """K independent paths (SpecTr, GBV): a node has as many slots as paths lead through it.

    A place is how many paths lead there; the root's, 0, stands for all K.
    """

    def __init__(self, num_paths: int, depth: int) -> None:
        self.depth = depth
        self._num_paths = num_paths

    def width(self, place: int, depth: int) -> int:
        """See `Shape.width`."""
        return (place or self._num_paths) if depth < self.depth else 0

    def below(self, place: int, ranks: Sequence[int]) -> int:
        """See `Shape.below`."""
        return len(ranks)

    def count(self, depth: int) -> int:
        """See `Shape.count`."""
        return self._num_paths * min(depth, self.depth)


@dataclass(slots=True, eq=False)
class _Part:
    """One request's tree by one drafter, while it grows."""

    growth: Growth
    draft: Draft
    depth: int
    places: dict[int, int]
    level: list[int]


class ShapeBuilder:
    """Grows every request's tree in one shape, each drafter its own."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self._plans: dict[int, Plan] = {}  # by depth

    def grow(self, growths: Sequence[Growth], drafters: Sequence[Drafter]) -> list[Grown]:
        """See `Builder.grow`: the shape's first levels that fit max_depth and max_nodes.

        law   slots of one drafter as it drew them; see `union` for several
        cost  one pass per drafter and level; on a GPU one graph per drafter where all is picked
        """
        depths = [self._depth(growth) for growth in growths]
        parts: list[dict[int, _Part]] = [{} for _ in growths]
        for source, drafter in enumerate(drafters):
            own = []
            for index, (growth, depth) in enumerate(zip(growths, depths, strict=True)):
                if source in growth.sources and depth:
                    draft = growth.draft(TokenTree(growth.tokens[-1]))
                    parts[index][source] = _Part(growth, draft, depth, {0: 0}, [0])
                    own.append(parts[index][source])
            try:
                if own and not self._fill(drafter, own, source):
                    self._draw(drafter, own, source)
            except DrafterFailedError:
                pass
        return [_finish(growth, each) for growth, each in zip(growths, parts, strict=True)]

    def _depth(self, growth: Growth) -> int:
        """How many levels the request has room for; all its drafters' nodes count."""
        depth = min(self.shape.depth, growth.max_depth)
        while depth and self.shape.count(depth) * len(growth.sources) > growth.max_nodes:
            depth -= 1
        return depth

    def _fill(self, drafter: Drafter, parts: Sequence[_Part], source: int) -> bool:
        """Pick whole trees in one call; whether that was possible, for all of them together.

        law  what level by level is picked too
        """
        if not isinstance(drafter, LevelDrafter) or not drafter.has_levels:
            return False
        asked = []
        for part in parts:
            temperature = _only_temperature(part.growth)
            if temperature is None:
                return False
            asked.append(Planned(part.draft, self._plan(part.depth), temperature))
        found = drafter.draft_levels(asked)
        if found is None:
            return False
        for (draft, plan, _), tokens in zip(asked, found, strict=True):
            nodes = [0]  # the plan's, as the tree numbers them
            for parent, token in zip(plan.tree.parents[1:], tokens, strict=True):
                new = -1
                if token >= 0:
                    (new,) = add_picks(draft.tree, nodes[parent], [token], source=source)
                nodes.append(new)
        return True

    def _plan(self, depth: int) -> Plan:
        """The shape's first levels, its nodes in the order in which `_draw` makes them."""
        if depth not in self._plans:
            tree, places, node = TokenTree(0), [0], 0
            while node < len(tree):
                at, place = tree.depths[node], places[node]
                for rank in range(self.shape.width(place, at) if at < depth else 0):
                    tree.add(node, rank)
                    places.append(self.shape.below(place, [rank]))
                node += 1
            self._plans[depth] = Plan.of(tree)
        return self._plans[depth]

    def _draw(self, drafter: Drafter, parts: Sequence[_Part], source: int) -> None:
        depth = 0
        while asked := [part for part in parts if part.level and depth < part.depth]:
            said = guess(drafter, [(part.growth, part.draft, part.level) for part in asked])
            slots = _Slots(said, max(self._widths(part, depth) for part in asked))
            for part in asked:
                part.level = self._add_level(part, depth, slots, source)
            depth += 1

    def _widths(self, part: _Part, depth: int) -> int:
        return max(self.shape.width(part.places[node], depth) for node in part.level)

    def _add_level(self, part: _Part, depth: int, slots: "_Slots", source: int) -> list[int]:
        """Slots under every node of the level; returns the new nodes that may have some too."""
        new = []
        tree = part.draft.tree
        for node in part.level:
            place = part.places[node]
            slots.add(part.growth, tree, node, self.shape.width(place, depth), source)
            ranks: dict[int, list[int]] = {}
            for rank, slot in enumerate(tree.slots_of[node]):
                ranks.setdefault(tree.slots[slot].node, []).append(rank)
            for child, led in ranks.items():
                part.places[child] = below = self.shape.below(place, led)
                if self.shape.width(below, depth + 1):
                    new.append(child)
        return new


class _Slots:
    """One level's guesses, handed out row by row in the order in which they were asked for."""

    def __init__(self, said: Guesses, width: int) -> None:
        self._said = said
        self._width = width
        self._row = 0
        self._picks: list[list[Pick]] | None = said.picks
        self._drawable: Drawable | None = None

    def add(self, growth: Growth, tree: TokenTree, node: int, width: int, source: int) -> None:
        """Put up to `width` slots under a node, from the next row."""
        row = self._row
        self._row += 1
        if growth.draw == "pick" or self._said.picks is not None:
            add_picks(tree, node, self._likeliest(row)[:width], source=source)
            return
        if self._drawable is None:
            self._drawable = Drawable.of(self._said.laws)
        add = add_iid if growth.draw == "iid" else add_without_replacement
        rows, tokens = self._drawable.rows, self._drawable.tokens
        if rows[row, 0] >= 0:  # NaN: what is no law says nothing
            add(tree, node, rows, row, width, growth.rng, source=source, tokens=tokens)

    def _likeliest(self, row: int) -> list[int]:
        if self._picks is None:
            self._picks = as_picks(*self._said.likeliest(self._width))
        return [token for token, probability in self._picks[row] if probability > 0]


def _only_temperature(growth: Growth) -> float | None:
    """By what logits are divided, where tokens are picked of them and nothing else is done."""
    if growth.draw != "pick" or growth.noise is not None or growth.history is not None:
        return None
    return RowFilters.of([(growth.params, 1)]).one_temperature


def _finish(growth: Growth, parts: dict[int, _Part]) -> Grown:
    if not parts:
        return Grown(TokenTree(growth.tokens[-1]), {})
    drafts = {source: part.draft for source, part in parts.items()}
    if len(drafts) == 1:
        ((source, draft),) = drafts.items()
        return Grown(draft.tree, {source: (draft, range(len(draft.tree)))})
    tree, maps = union([draft.tree for draft in drafts.values()], growth.rng)
    pairs = zip(drafts.items(), maps, strict=True)
    return Grown(tree, {source: (draft, own) for (source, draft), own in pairs})


# --- Sequoia --------------------------------------------------------------------------------------


def best_shapes(places: npt.NDArray[np.float64], num_nodes: int, depth: int) -> "ShapeTable":
    """Sequoia's dynamic programme: the shapes of greatest expected size.

    places     [branches] float64: the chance that the accepted child is the j-th slot examined
    num_nodes  drafted nodes at most, without the root
    depth      deepest node
    source     Sequoia (arXiv 2402.12374) §4.1: T(n, d, k), n nodes with the root, of which the
               root has at most k children; F(n, d) = max over k. The maximum over how many nodes
               the k-th child gets is one vector operation
    cost       O(depth · branches · nodes²) multiplications: about 0.1 s for 512 nodes, depth 16
               and 16 branches
    """
    size, branches = num_nodes + 1, len(places)
    best = np.full((depth + 1, size + 1), -np.inf)  # F(n, d)
    best[:, 1] = 1.0
    choice = np.zeros((depth + 1, branches + 1, size + 1), np.int32)  # nodes of the k-th child
    widest = np.zeros((depth + 1, size + 1), np.int32)  # the k that F takes
    for d in range(1, depth + 1):
        rows = np.full((branches + 1, size + 1), -np.inf)  # T(·, d, k)
        rows[0, 1] = 1.0
        for k in range(1, branches + 1):
            gains = places[k - 1] * best[d - 1, 1:size]
            rows[k], choice[d, k] = _best_split(rows[k - 1], gains)
        best[d] = rows.max(0)
        widest[d] = rows.argmax(0)
    return ShapeTable(np.maximum.accumulate(best[:, 1:], 1), best, choice, widest)


def _best_split(
    left: npt.NDArray[np.float64], gains: npt.NDArray[np.float64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int32]]:
    """max over m of left[n - m] + gains[m - 1], with the m; m = 0 leaves `left` as it is."""
    size = len(left)
    padded = np.concatenate((np.full(size, -np.inf), left))
    windows = np.lib.stride_tricks.sliding_window_view(padded, size - 1)[1 : size + 1, ::-1]
    # windows[n, m - 1] = left[n - m]
    sums = windows[:, : len(gains)] + gains
    m = sums.argmax(1)
    best = sums[np.arange(size), m]
    keep = left >= best
    return np.where(keep, left, best), np.where(keep, 0, m + 1).astype(np.int32)


@dataclass(frozen=True, slots=True, eq=False)
class ShapeTable:
    """Every best shape up to a number of nodes and a depth.

    sizes  [depth + 1, nodes + 1]: the expected number of tokens per step with at most so many
           drafted nodes and levels
    """

    sizes: npt.NDArray[np.float64]
    _best: npt.NDArray[np.float64]
    _choice: npt.NDArray[np.int32]
    _widest: npt.NDArray[np.int32]

    def fastest(self, draft_s: float, target_s: npt.NDArray[np.float64]) -> tuple[int, int]:
        """(nodes, depth) with the least time per token; (0, 0) where no tree is worth its time.

        draft_s   seconds per level
        target_s  [nodes + 2] seconds of a step by number of tokens, the root's included
        """
        depths, nodes = self.sizes.shape
        seconds = np.arange(depths)[:, None] * draft_s + target_s[None, 1 : nodes + 1]
        per_token = seconds / self.sizes
        depth, num = np.unravel_index(int(per_token.argmin()), per_token.shape)
        return int(num), int(depth)

    def shape(self, num_nodes: int, depth: int) -> TreeShape:
        """The shape of greatest expected size with at most so many drafted nodes and levels."""
        size = int(self._best[depth, 1 : num_nodes + 2].argmax()) + 1
        children: list[list[int]] = [[]]
        pending = [(0, size, depth)]
        for place, n, d in pending:  # grows while it is swept: parents before children
            k = int(self._widest[d, n]) if d else 0
            below = []
            while k:
                if m := int(self._choice[d, k, n]):
                    below.append((m, d - 1))
                    n -= m
                k -= 1
            for m, under in reversed(below):
                children[place].append(len(children))
                pending.append((len(children), m, under))
                children.append([])
        return TreeShape(children)
