"""Trees over a vocabulary of their own: what drafters could have drawn, and all others as one.

Verification takes from the target's law only at tokens that some slot's law can draw; all others
are multiplied alike and lose nothing. So they may be one token: the verifiers run on the smaller
trees as they are, and where they emit that token, one is drawn from the target's law on the others.
Then of p, which lies far away on a GPU, the host needs a few hundred numbers
(docs/algorithm.md, "Far away").
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from specinfer.errors import LawError
from specinfer.tree import Floats, Integers, Law, TokenTree
from specinfer.verify import Verdict

OTHERS = 0
"""The local token that stands for all that nobody could have drawn under a node."""

_NONE = np.zeros(0, np.int64)


@dataclass(frozen=True, slots=True, eq=False)
class Lumped:
    """Trees whose tokens are numbers of columns, under each node its own.

    trees    nodes and slots are those of the originals, by the same ids
    starts   [trees + 1]: where each tree's nodes start among the rows of p
    rows     [columns]: whose column it is, ascending; `OTHERS` of each row is not among them
    columns  [columns]: which, from 1 in each row
    tokens   [columns]: the token it stands for
    width    columns of all rows, `OTHERS` included; a row may have fewer
    """

    trees: Sequence[TokenTree]
    starts: Sequence[int]
    rows: Integers
    columns: Integers
    tokens: Integers
    width: int

    def laws(self, inside: Floats, others: npt.NDArray[np.float64]) -> Floats:
        """The target's laws over the local tokens: [rows, width].

        inside  [columns]: p of each column's token
        others  [rows]: p of all others together
        """
        p = np.zeros((len(others), self.width), inside.dtype)
        p[:, OTHERS] = others
        p[self.rows, self.columns] = inside
        return p

    def verdict(self, index: int, local: Verdict, others: Sequence[int] | Integers) -> Verdict:
        """A verdict on one of the trees, in tokens of the target's.

        others  [rows]: a token drawn from p on the others; one is read at most
        """
        row = self.starts[index] + (local.path[-1] if local.path else 0)
        if local.next_token == OTHERS:
            return Verdict(local.path, int(others[row]), local.examined)
        place = int(np.searchsorted(self.rows, row)) + local.next_token - 1
        return Verdict(local.path, int(self.tokens[place]), local.examined)


def lump(trees: Sequence[TokenTree], vocab: int) -> Lumped:
    """Number what could have been drawn under each node, by any of its slots.

    vocab   of the target's law
    raises  LawError for a token that is not in it
    law     whatever verifies a local tree decides as on the original
    cost    O(slots + tokens that laws can draw), meant for laws cut to a few: 0.07 to 0.2 ms for 8
            to 30 slots
    """
    starts = np.cumsum([0, *map(len, trees)]).tolist()
    rows = [_Columns() for _ in range(starts[-1])]
    law_ids: dict[tuple[int, int, int], int] = {}  # row and law -> its number
    supports: list[tuple[slice | list[int], Floats]] = []  # per law: columns, probabilities
    placed: list[list[tuple[int, int]]] = []  # per tree and slot: column, law (-1: a pick or none)
    for tree, start in zip(trees, starts[:-1], strict=True):
        placed.append([])
        for parent, node, _, law in tree.slots:
            own, law_id = rows[start + parent], -1
            if law is not None and law.row >= 0:
                law_id = law_ids.setdefault((start + parent, id(law.rows), law.row), len(supports))
                if law_id == len(supports):
                    tokens, probabilities = law.support()
                    supports.append((own.place(tokens), probabilities))
            placed[-1].append((own.find(tree.tokens[node]), law_id))
    counts = [len(own) for own in rows]
    tokens = np.concatenate([part for own in rows for part in own.parts()])
    if len(tokens) and not 0 <= tokens.min() <= tokens.max() < vocab:
        raise LawError(
            f"slots carry tokens from {tokens.min()} to {tokens.max()}, and the target's "
            f"vocabulary has {vocab}: drop such tokens while drafting"
        )
    laws = np.zeros((len(supports), 1 + max(counts)), supports[0][1].dtype if supports else None)
    for law_row, (columns, probabilities) in zip(laws, supports, strict=True):
        law_row[columns] = probabilities
    ends = np.cumsum(counts)
    return Lumped(
        [_local(tree, each, laws) for tree, each in zip(trees, placed, strict=True)],
        starts,
        rows=np.repeat(np.arange(len(rows)), counts),
        columns=np.arange(1, len(tokens) + 1) - np.repeat(ends - counts, counts),
        tokens=tokens,
        width=laws.shape[-1],
    )


def _local(tree: TokenTree, placed: Sequence[tuple[int, int]], laws: Floats) -> TokenTree:
    """A tree over columns: the same nodes and slots, in the same order."""
    local = TokenTree(OTHERS)
    known: list[dict[int, int]] = [{} for _ in tree.tokens]  # per node: token -> column
    for (parent, node, source, law), (column, law_id) in zip(tree.slots, placed, strict=True):
        own = known[parent]
        if law is not None and law_id >= 0:  # what no earlier sibling has is refused as such
            law = Law(laws, law_id, tuple(own.get(token, OTHERS) for token in law.seen))
        own[tree.tokens[node]] = column
        local.add(parent, column, source=source, law=law)
    return local


class _Columns:
    """One row's columns: first those of its first law in their order, then what comes after."""

    __slots__ = ("first", "later")

    def __init__(self) -> None:
        self.first = _NONE
        self.later: dict[int, int] = {}  # token -> column

    def __len__(self) -> int:
        return len(self.first) + len(self.later)

    def place(self, tokens: Integers) -> slice | list[int]:
        """Where a law's tokens stand; those that stand nowhere yet get the next columns."""
        if not len(self):  # the usual case: one drafter, and nothing was picked before
            self.first = tokens
            return slice(1, len(tokens) + 1)
        first = {token: column for column, token in enumerate(self.first.tolist(), start=1)}
        return [first.get(token) or self._append(token) for token in tokens.tolist()]

    def find(self, token: int) -> int:
        """The same for one token."""
        if len(self.first):
            place = int((self.first == token).argmax())
            if self.first[place] == token:
                return place + 1
        return self._append(token)

    def parts(self) -> tuple[Integers, Integers]:
        """The tokens, in the order of their columns."""
        return self.first, np.array(list(self.later), np.int64) if self.later else _NONE

    def _append(self, token: int) -> int:
        return self.later.setdefault(token, len(self) + 1)
