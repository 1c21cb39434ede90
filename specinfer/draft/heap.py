"""Best-first growth: nodes go where acceptance is likeliest (SpecExec, EAGLE-2, DySpec, ours).

Growth goes in rounds, one drafter pass each: expand the best nodes that are not expanded yet, and
value what was guessed after them (draft/rounds.py). Picked slots (draft/picking.py) and drawn ones
(draft/drawing.py) share the rounds.
"""

from collections.abc import Sequence

from specinfer.draft.base import Drafter
from specinfer.draft.calibration import Calibration
from specinfer.draft.drawing import Drawing, PastDraws
from specinfer.draft.growth import Grown, Growth
from specinfer.draft.picking import Picking
from specinfer.draft.rounds import Prices, Rounds, Values


class HeapBuilder:
    """Best-first trees.

    calibration  the tables to value slots by; None: by what drafters say themselves
    prices       what nodes and rounds must be worth; None: every tree has the size it may have,
                 from as many rounds as it may be deep, with equally many expansions each
    """

    def __init__(self, calibration: Calibration | None = None) -> None:
        self.calibration = calibration
        self.prices: Prices | None = None
        self._past = PastDraws()

    def grow(self, growths: Sequence[Growth], drafters: Sequence[Drafter]) -> list[Grown]:
        """See `Builder.grow`.

        law   picks, or draws without replacement whose existence looks at nothing below them
        cost  at most max_depth passes per drafter, whatever the size
        """
        prices = self.prices
        values = Values(self.calibration, drafters)
        picking = Picking(growths, values, prices)
        drawing = Drawing(growths, values, prices, self._past)
        rounds = Rounds(growths, drafters, picking.drafts | drawing.drafts, values, prices)
        while True:
            price = max(picking.price(drawing.num_nodes), drawing.price)
            frontier = picking.frontier(rounds.num_rounds, price)
            frontier += drawing.frontier(rounds.num_rounds)
            if not frontier or not rounds.ask(frontier, price):
                break
            picking.take(rounds)
            drawing.take(rounds)
            if picking.grow_on(rounds):
                break
        drawn = drawing.finish()
        grown = picking.finish(drawing.num_nodes) | drawn
        for index, each in grown.items():
            each.parts = {s: part for s, part in each.parts.items() if rounds.asked(s, index)}
        return [grown[index] for index in range(len(growths))]
