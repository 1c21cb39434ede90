"""A tree over a vocabulary of its own: what drafters could have drawn, and all others as one.

Verification takes from the target's law only at tokens that some slot's law can draw; all others
are multiplied alike and lose nothing. So they may be one token: the verifiers run on the smaller
tree as they are, and where they emit that token, one is drawn from the target's law on the others.
Then of p, which lies far away on a GPU, the host needs a few hundred numbers
(docs/algorithm.md, "On a GPU").
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from specinfer.tree import Floats, Integers, Law, TokenTree
from specinfer.verify import Verdict

OTHERS = 0
"""The local token that stands for all that nobody could have drawn under a node."""


@dataclass(frozen=True, slots=True, eq=False)
class Lumped:
    """A tree whose tokens are numbers of columns, under each node its own.

    tree     nodes and slots are those of the original, by the same ids
    nodes    [columns]: whose column it is, ascending; `OTHERS` of each node is not among them
    columns  [columns]: which, from 1 under each node
    tokens   [columns]: the token it stands for
    width    columns of all nodes' laws, `OTHERS` included; a node may have fewer
    """

    tree: TokenTree
    nodes: Integers
    columns: Integers
    tokens: Integers
    width: int

    def laws(self, inside: Floats, others: npt.NDArray[np.float64]) -> Floats:
        """The target's laws over the local tokens: [nodes, width].

        inside  [columns]: p of each column's token
        others  [nodes]: p of all others together
        """
        p = np.zeros((len(self.tree), self.width), inside.dtype)
        p[:, OTHERS] = others
        p[self.nodes, self.columns] = inside
        return p

    def verdict(self, local: Verdict, others: Sequence[int] | Integers) -> Verdict:
        """A verdict on the local tree, in tokens of the target's.

        others  [nodes]: a token drawn from p on the others; one is read at most
        """
        last = local.path[-1] if local.path else 0
        if local.next_token == OTHERS:
            return Verdict(local.path, int(others[last]), local.examined)
        place = int(np.searchsorted(self.nodes, last)) + local.next_token - 1
        return Verdict(local.path, int(self.tokens[place]), local.examined)


def lump(tree: TokenTree) -> Lumped:
    """Number what could have been drawn under each node, by any of its slots.

    law   whatever verifies the local tree decides as on the original
    cost  O(slots + tokens that laws can draw): meant for laws cut to a few
    """
    columns: list[dict[int, int]] = [{} for _ in tree.tokens]  # per node: token -> column
    rows: dict[tuple[int, int, int], int] = {}  # node and law -> local row
    supports: list[tuple[list[int], Floats]] = []  # per local row: columns, probabilities
    for slot in tree.slots:
        own, law = columns[slot.parent], slot.law
        if law is not None and not law.is_pick:
            key = slot.parent, id(law.rows), law.row
            if key not in rows:
                rows[key] = len(supports)
                tokens, probabilities = law.support()
                placed = [own.setdefault(token, len(own) + 1) for token in tokens.tolist()]
                supports.append((placed, probabilities))
            for token in law.seen:
                own.setdefault(token, len(own) + 1)
        own.setdefault(tree.tokens[slot.node], len(own) + 1)
    width = 1 + max(map(len, columns))
    laws = np.zeros((len(supports), width), supports[0][1].dtype if supports else np.float32)
    for row, (placed, probabilities) in zip(laws, supports, strict=True):
        row[placed] = probabilities
    local = TokenTree(tree.tokens[0])
    for slot in tree.slots:
        own, law = columns[slot.parent], slot.law
        if law is not None and not law.is_pick:
            row_id = rows[slot.parent, id(law.rows), law.row]
            law = Law(laws, row_id, tuple(own[token] for token in law.seen))
        local.add(slot.parent, own[tree.tokens[slot.node]], source=slot.source, law=law)
    counts = [len(own) for own in columns]
    return Lumped(
        local,
        nodes=np.repeat(np.arange(len(tree)), counts),
        columns=np.array([column for own in columns for column in own.values()], np.int64),
        tokens=np.array([token for own in columns for token in own], np.int64),
        width=width,
    )
