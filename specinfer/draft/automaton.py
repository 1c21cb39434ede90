"""A suffix automaton over a growing text: what followed the longest suffix that occurred before."""

from array import array
from collections.abc import Iterable
from itertools import islice
from operator import itemgetter
from typing import NamedTuple

from specinfer.draft.base import Pick

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
        picks.sort(key=itemgetter(1), reverse=True)
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
