"""Drafters that need no model: the request's own text, and a text that its user predicted.

Both look a continuation up, so what they propose are *picks*: a token with the estimated chance
that it comes next, a point mass for every verifier (docs/algorithm.md, "Predictability"). What a
node's picks weigh depends on committed tokens and on the node's own path alone.
"""

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import NamedTuple

from specinfer.draft.base import Draft, Pick

MAX_PICKS = 8
"""Picks per node, at most."""

MAX_LINKS = 32
"""Suffix links one token may follow where nothing amortises them; only long runs have so many."""

MAX_CONTEXTS = 6
"""Contexts of one match that are blended, the longest first."""

MAX_CONTINUATIONS = 64
"""Continuations that are looked at per context, first seen first: a short one may have thousands"""


class Match(NamedTuple):
    """A string that occurs in an automaton's text: its state there and its length in tokens."""

    state: int
    length: int


NOTHING = Match(0, 0)


class SuffixAutomaton:
    """Every substring of a growing text, in fewer than two states per token.

    A state is a set of substrings that end at the same places; its longest one gives its length,
    its suffix link leads to the longest suffix that also ends elsewhere. Along the links of the
    whole text lie the suffixes that occurred before, and their transitions are what followed.

    counts  how often a state's strings occurred. A new token counts along MAX_LINKS links, which
            makes appending O(1) amortised: short strings inside longer runs are undercounted
    ends    where a state's strings first ended: the index of their last token
    source  Blumer et al. 1985, "The smallest automaton recognizing the subwords of a text"
    cost    about 2 µs and 400 bytes per token; 4 µs inside long runs
    """

    __slots__ = ("_last", "counts", "ends", "lengths", "links", "num_tokens", "transitions")

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self.num_tokens = 0
        self.lengths = array("i", [0])
        self.links = array("i", [-1])
        self.counts = array("i", [0])
        self.ends = array("i", [-1])
        self.transitions: list[dict[int, int]] = [{}]
        self._last = 0
        for token in tokens:
            self.append(token)

    @property
    def match(self) -> Match:
        """The longest suffix of the text that ended earlier as well."""
        state = max(self.links[self._last], 0)
        return Match(state, self.lengths[state])

    def append(self, token: int) -> None:
        """Add one token to the text; O(1) amortised."""
        lengths, links, transitions = self.lengths, self.links, self.transitions
        state, new = self._last, len(lengths)
        self._add(lengths[state] + 1, {}, count=1, end=self.num_tokens)
        while state >= 0 and token not in transitions[state]:
            transitions[state][token] = new
            state = links[state]
        link = self._split(state, token) if state >= 0 else 0
        links[new] = link
        self._last = new
        self.num_tokens += 1
        counts = self.counts
        for _ in range(MAX_LINKS):
            if link <= 0:
                break
            counts[link] += 1
            link = links[link]

    def walk(self, match: Match, token: int) -> Match:
        """The longest suffix of a match and a token behind it that occurs in the text.

        cost  O(1) amortised along a path: falls back over suffix links, and after MAX_LINKS of
              them on the token alone
        """
        (state, length), transitions = match, self.transitions
        for _ in range(MAX_LINKS):
            target = transitions[state].get(token)
            if target is not None:
                return Match(target, length + 1)
            if state == 0:
                return NOTHING
            state = self.links[state]
            length = self.lengths[state]
        target = transitions[0].get(token)
        return NOTHING if target is None else Match(target, 1)

    def picks(self, match: Match) -> list[Pick]:
        """What followed a match and its suffixes in the text, the likeliest first.

        Longer contexts first: each takes its share of the chance that is left, and a shorter one
        speaks for the tokens that no longer one has seen (as in PPM, with exclusion). The chance
        that a context of `length` tokens, followed `total` times by its `num` new tokens, holds
        the next one is fitted by logistic regression on 51,876 contexts of tests/data:

            odds = 0.39 min(length, 6)^0.6 (total / num)^1.5, and 0.19 of it below a longer context
        """
        state, scale, left = match.state, 0.39, 1.0
        length = match.length
        seen: set[int] = set()
        picks: list[Pick] = []
        for _ in range(MAX_CONTEXTS):
            if state <= 0 or len(picks) >= MAX_PICKS:
                break
            state = self._most_frequent(state)
            fresh = self._continuations(state, seen)
            if fresh:
                total = sum(fresh.values())
                odds = scale * min(length, 6) ** 0.6 * (total / len(fresh)) ** 1.5
                chance = left * odds / (1 + odds)
                picks += [(token, chance * count / total) for token, count in fresh.items()]
                seen.update(fresh)
                left -= chance
                scale = 0.39 * 0.19
            state = self.links[state]
            length = self.lengths[state]
        picks.sort(key=_weight, reverse=True)
        return picks[:MAX_PICKS]

    def _most_frequent(self, state: int) -> int:
        """The shortest suffix found near that is followed by the same tokens: it counted more."""
        links, transitions = self.links, self.transitions
        num_continuations = len(transitions[state])
        for _ in range(MAX_CONTEXTS):
            link = links[state]
            if link <= 0 or len(transitions[link]) != num_continuations:
                break
            state = link
        return state

    def _continuations(self, state: int, seen: set[int]) -> dict[int, int]:
        """Tokens that followed a state's strings, without those seen: token -> how often."""
        counts = self.counts
        return {
            token: counts[target]
            for token, target in islice(self.transitions[state].items(), MAX_CONTINUATIONS)
            if token not in seen
        }

    def _add(self, length: int, transitions: dict[int, int], *, count: int, end: int) -> None:
        self.lengths.append(length)
        self.links.append(0)
        self.counts.append(count)
        self.ends.append(end)
        self.transitions.append(transitions)

    def _split(self, state: int, token: int) -> int:
        """The state of the longest string of `state` with the token, made if it had no own one."""
        lengths, links, transitions = self.lengths, self.links, self.transitions
        target = transitions[state][token]
        length = lengths[state] + 1
        if lengths[target] == length:
            return target
        clone = len(lengths)
        self._add(
            length,
            transitions[target].copy(),
            count=self.counts[target],
            end=self.ends[target],
        )
        links[clone] = links[target]
        links[target] = clone
        while state >= 0 and transitions[state].get(token) == target:
            transitions[state][token] = clone
            state = links[state]
        return clone


@dataclass(slots=True)
class _Text:
    """One request's text, and this step's expanded nodes: node -> its match."""

    automaton: SuffixAutomaton = field(default_factory=SuffixAutomaton)
    matches: dict[int, Match] = field(default_factory=dict)


class NgramDrafter:
    """Expects a request to repeat itself: prompt and output, in one suffix automaton."""

    name = "ngram"
    max_positions = 1 << 30

    def __init__(self) -> None:
        self._states: dict[int, _Text] = {}

    def expand(self, frontier: list[tuple[Draft, list[int]]]) -> list[list[Pick]]:
        """See `Drafter.expand`: picks per node, the likeliest first, [] if nothing is known.

        cost  5 µs per node and 2 µs per new token; 12 µs per node of a text of 32,000 tokens
        """
        return [picks for draft, nodes in frontier for picks in self._expand(draft, nodes)]

    def admit(self, accepted: list[tuple[Draft, list[int]]]) -> None:
        """See `Drafter.admit`: nothing to learn, the next expand reads draft.tokens."""

    def drop(self, key: int) -> None:
        """See `Drafter.drop`."""
        self._states.pop(key, None)

    def _expand(self, draft: Draft, nodes: list[int]) -> list[list[Pick]]:
        text = self._states.setdefault(draft.key, _Text())
        automaton, matches, tree = text.automaton, text.matches, draft.tree
        if nodes == [0]:
            for token in draft.tokens[automaton.num_tokens :]:
                automaton.append(token)
            matches.clear()
            matches[0] = automaton.match
        for node in nodes:
            if node:
                matches[node] = automaton.walk(matches[tree.parents[node]], tree.tokens[node])
        return [automaton.picks(matches[node]) for node in nodes]


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
        return sorted(weights.items(), key=_weight, reverse=True)[:MAX_PICKS]

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
        kept = sorted(moved.items(), key=_weight, reverse=True)[:MAX_PLACES]
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


def _weight(item: tuple[int, float]) -> float:
    return item[1]
