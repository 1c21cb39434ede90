"""A drafter of texts with a grammar: what must come next needs no model to be guessed.

The tokens that write a text may still vary, so all but the only one possible are guesses, too.
"""

from specinfer.draft.base import Draft, Pick
from specinfer.grammar import single_token
from specinfer.history import path_tokens

_SURE, _LIKELY = 0.9999, 0.9


class ForcedDrafter:
    """Proposes the only token there is, or the beginning of the only text there is."""

    name = "forced"
    max_positions = 1 << 30

    def expand(self, frontier: list[tuple[Draft, list[int]]]) -> list[list[Pick]]:
        """See `Drafter.expand`: at most one pick per node.

        cost  5 µs per node where nothing is forced, 30 µs where a text is
        """
        return [self._picks(draft, node) for draft, nodes in frontier for node in nodes]

    def admit(self, accepted: list[tuple[Draft, list[int]]]) -> None:
        """See `Drafter.admit`: nothing to learn."""

    def drop(self, key: int) -> None:
        """See `Drafter.drop`: nothing is kept."""

    def _picks(self, draft: Draft, node: int) -> list[Pick]:
        history = draft.history
        if history is None or history.grammar is None:
            return []
        history.read(draft.tokens)
        path = path_tokens(draft.tree, node)
        bits = history.grammar.allowed(path)
        if bits is None:
            return []
        token = single_token(bits)
        if token is not None:
            return [(token, _SURE)]
        forced = history.grammar.forced(path)
        return [(forced[0], _LIKELY)] if forced else []
