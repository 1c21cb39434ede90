"""From the name of a tree to what grows it."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from specinfer.config import parse_paths, parse_tree
from specinfer.draft.base import Drafter
from specinfer.draft.calibration import Calibration, Regime
from specinfer.draft.growth import Builder, Grown, Growth
from specinfer.draft.heap import HeapBuilder
from specinfer.draft.shapes import PathsShape, ShapeBuilder, TreeShape, best_shapes

_SHAPE_LIFE = 64
"""Steps for which Sequoia keeps a shape before it asks the tables again."""


def builder_for(tree: str, calibration: Calibration) -> Builder:
    """The builder of a tree by its name in `Speculation`; "off" has none."""
    if tree in ("auto", "calibrated"):
        return HeapBuilder(calibration)
    if tree == "best-first":
        return HeapBuilder()
    if tree == "sequoia":
        return SequoiaBuilder(calibration)
    paths = parse_paths(tree)
    return ShapeBuilder(PathsShape(*paths) if paths else TreeShape.of_widths(parse_tree(tree)))


class SequoiaBuilder:
    """Sequoia's trees: per regime, the best shape for the acceptance by place seen so far."""

    def __init__(self, calibration: Calibration) -> None:
        self._calibration = calibration
        self._draft_s = 0.0
        self._target_s: npt.NDArray[np.float64] | None = None
        self._num_spans = 0
        self._builders: dict[tuple[Regime, int, int], ShapeBuilder] = {}
        self._age = 0

    def set_times(self, draft_s: float, target_s: npt.NDArray[np.float64], num_spans: int) -> None:
        """Take the size too from here: that with the least time per token.

        draft_s    seconds per level
        target_s   [nodes + 2] seconds of a step by tokens per request, the root's included
        num_spans  requests in the step: another number asks for other shapes
        """
        self._draft_s, self._target_s = draft_s, target_s
        if num_spans != self._num_spans:
            self._builders.clear()
            self._num_spans = num_spans

    def grow(self, growths: Sequence[Growth], drafters: Sequence[Drafter]) -> list[Grown]:
        """See `Builder.grow`."""
        self._age += 1
        if self._age >= _SHAPE_LIFE:
            self._builders.clear()
            self._age = 0
        grown: dict[int, Grown] = {}
        groups: dict[tuple[Regime, int, int], list[int]] = {}
        for index, growth in enumerate(growths):
            nodes = growth.max_nodes // len(growth.sources)
            groups.setdefault((growth.regime, nodes, growth.max_depth), []).append(index)
        for key, members in groups.items():
            if key not in self._builders:
                self._builders[key] = ShapeBuilder(self._shape(*key))
            own = self._builders[key].grow([growths[i] for i in members], drafters)
            grown.update(zip(members, own, strict=True))
        return [grown[index] for index in range(len(growths))]

    def _shape(self, regime: Regime, num_nodes: int, depth: int) -> TreeShape:
        if num_nodes == 0:  # there is room for fewer nodes than drafters
            return TreeShape.of_widths(())
        table = best_shapes(self._calibration.places(regime), num_nodes, depth)
        if self._target_s is not None:
            num_nodes, depth = table.fastest(self._draft_s, self._target_s)
        return table.shape(num_nodes, depth)
