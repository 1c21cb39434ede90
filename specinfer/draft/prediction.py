"""A drafter that needs no model: a text that the request's user predicted.

What it proposes are picks, as those of draft/ngram.py. Where the output stands in the prediction is
a belief, and each token moves it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import NamedTuple

from specinfer.draft.automaton import MAX_PICKS, NOTHING, Match, SuffixAutomaton
from specinfer.draft.base import Draft, Pick

COPY, SUBSTITUTE, INSERT, DELETE = 0.95, 0.03, 0.008, 0.012
"""What becomes of a predicted token in an output that follows its prediction: 1 edit in 20."""

MAX_DELETED = 4
"""Tokens left out at once that are looked for; over more of them, suffix matches lead."""

_FATES = (COPY, *(DELETE * 0.5**num_deleted for num_deleted in range(1, MAX_DELETED + 1)))
"""Chance that the token so many places on comes next: all before it are left out."""

COINCIDENCE = 0.02
"""Chance that a token which the prediction did not give equals a certain one of its tokens."""

MAX_PLACES = 6
"""Places in the prediction where the output may stand that are kept in mind."""

HIT_RATIO, MISS_RATIO = 25.0, 0.15
"""How much likelier a hit, a miss of the first pick is if the output follows its prediction."""

TRUST_AT_START, TRUST_LOST, TRUST_FOUND = 0.8, 0.005, 0.02
"""That an output follows its prediction; per token, that it ceases to and that it begins to."""

LEARNING_RATE, MAX_COPIED = 1 / 64, 0.99
"""How fast the share of copied tokens is learnt, and the highest it becomes."""


class Belief(NamedTuple):
    """What is known of a request's output against its prediction.

    trust   chance that the output follows the prediction at all
    copied  share of its tokens that were the predicted ones where it followed, lately
    places  (index of the predicted token that comes next, its chance if it follows), best first;
            chances sum to 1
    match   the longest suffix of the output that occurs in the prediction
    """

    trust: float
    copied: float
    places: tuple[tuple[int, float], ...]
    match: Match


class Prediction:
    """A predicted text, and how belief about an output that may repeat it moves with each token.

    A filter over places in the prediction: a token that is the predicted one moves its place on,
    any other is a substitution (the place moves on), an insertion (it stays) or, where it stands
    a little later in the prediction, a deletion before it. Where the output went elsewhere, the
    suffix of it that occurs in the prediction gives a new place.
    """

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = tuple(tokens)
        self._automaton = SuffixAutomaton(tokens)

    @property
    def start(self) -> Belief:
        """Before the first token of output."""
        return Belief(TRUST_AT_START, COPY, ((0, 1.0),), NOTHING)

    def picks(self, belief: Belief) -> list[Pick]:
        """What the prediction says comes next, the likeliest first."""
        weights: dict[int, float] = {}
        tokens = self._tokens
        scale = belief.trust * belief.copied / COPY
        for place, chance in belief.places:
            chance *= scale
            following = tokens[place : place + 1 + MAX_DELETED]
            for token, fate in zip(following, _FATES, strict=False):
                weights[token] = weights.get(token, 0.0) + chance * fate
        return sorted(weights.items(), key=itemgetter(1), reverse=True)[:MAX_PICKS]

    def advance(self, belief: Belief, token: int) -> Belief:
        """What is known one token of output later."""
        trust, copied, places, match = belief
        match = self._automaton.walk(match, token)
        best = places[0][0]
        is_hit = self._tokens[best : best + 1] == (token,)
        odds = trust / (1 - trust) * (HIT_RATIO if is_hit else MISS_RATIO)
        trust = odds / (1 + odds)
        trust = trust * (1 - TRUST_LOST) + (1 - trust) * TRUST_FOUND
        copied += trust * LEARNING_RATE * (min(is_hit, MAX_COPIED) - copied)
        if is_hit and len(places) == 1:
            return Belief(trust, copied, ((best + 1, 1.0),), match)
        moved = self._move(places, token)
        if not is_hit and match.length > 1:
            place = self._automaton.ends[match.state] + 1
            num_places = self._automaton.counts[match.state]
            weight = sum(moved.values()) * (1 - trust) * 2.0 ** min(match.length - 1, 16)
            moved[place] = max(moved.get(place, 0.0), weight / num_places)
        kept = sorted(moved.items(), key=itemgetter(1), reverse=True)[:MAX_PLACES]
        total = sum(weight for _, weight in kept)
        likely = [(place, weight / total) for place, weight in kept if weight > 1e-3 * total]
        return Belief(trust, copied, tuple(likely), match)

    def _move(self, places: tuple[tuple[int, float], ...], token: int) -> dict[int, float]:
        """Where the output stands after a token: place -> weight, which sum to anything."""
        moved: dict[int, float] = {}
        for place, chance in places:
            following = self._tokens[place : place + 1 + MAX_DELETED]
            if following and following[0] != token:
                weight = chance * SUBSTITUTE * COINCIDENCE
                moved[place + 1] = moved.get(place + 1, 0.0) + weight
            moved[place] = moved.get(place, 0.0) + chance * INSERT * COINCIDENCE
            for num_deleted, each in enumerate(following):
                if each == token:
                    target = place + num_deleted + 1
                    moved[target] = moved.get(target, 0.0) + chance * _FATES[num_deleted]
        return moved


@dataclass(slots=True)
class _Alignment:
    """One request's prediction, the tokens read so far, and this step's beliefs per node."""

    prediction: Prediction
    num_read: int
    beliefs: dict[int, Belief]


class PredictionDrafter:
    """Expects a request's output to repeat its `Draft.prediction`, with edits here and there.

    Output that was there before the first expand of a request is read then. Without num_prompt it
    is taken to begin late, and finds its place by suffix matches after a few tokens.
    """

    name = "prediction"
    max_positions = 1 << 30

    def __init__(self) -> None:
        self._states: dict[int, _Alignment] = {}

    def expand(self, frontier: list[tuple[Draft, list[int]]]) -> list[list[Pick]]:
        """See `Drafter.expand`: picks per node, the likeliest first, [] without a prediction.

        cost  4 µs per node, 13 µs where the output goes elsewhere; once 2 µs per predicted token
        """
        return [picks for draft, nodes in frontier for picks in self._expand(draft, nodes)]

    def admit(self, accepted: list[tuple[Draft, list[int]]]) -> None:
        """See `Drafter.admit`: nothing to learn, the next expand reads draft.tokens."""

    def drop(self, key: int) -> None:
        """See `Drafter.drop`."""
        self._states.pop(key, None)

    def _expand(self, draft: Draft, nodes: list[int]) -> list[list[Pick]]:
        if not draft.prediction:
            return [[] for _ in nodes]
        alignment = self._states.get(draft.key) or self._begin(draft)
        prediction, beliefs, tree = alignment.prediction, alignment.beliefs, draft.tree
        if nodes == [0]:
            belief = beliefs[0]
            for token in draft.tokens[alignment.num_read :]:
                belief = prediction.advance(belief, token)
            alignment.num_read = len(draft.tokens)
            beliefs.clear()
            beliefs[0] = belief
        for node in nodes:
            if node:
                parent = beliefs[tree.parents[node]]
                beliefs[node] = prediction.advance(parent, tree.tokens[node])
        return [prediction.picks(beliefs[node]) for node in nodes]

    def _begin(self, draft: Draft) -> _Alignment:
        prediction = Prediction(draft.prediction)
        beliefs = {0: prediction.start}
        num_prompt = len(draft.tokens) if draft.num_prompt is None else draft.num_prompt
        alignment = _Alignment(prediction, num_prompt, beliefs)
        self._states[draft.key] = alignment
        return alignment
