"""What a drafter is: it guesses at frontier nodes of every request's tree, in one batched pass."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from specinfer.cache.blocks import Pages
from specinfer.history import History
from specinfer.tree import TokenTree

Pick = tuple[int, float]
"""A token chosen by looking at it, and how likely its drafter holds it to be, in (0, 1)."""


@dataclass(slots=True, eq=False)
class Draft:
    """One request as its drafters see it during one step.

    key         identifies the request from step to step
    tokens      everything known: prompt and committed output; the last one is the root
    pages       where keys stand, in this drafter's own pool under the same slot numbers
    tree        the tree this drafter is growing: node ids below are this tree's own
    prediction  what the caller expects the output to be; () for nothing
    num_prompt  tokens before the output; None: it begins where the first expand finds the end
    history     what the request's laws depend on beside the logits; None: nothing
    """

    key: int
    tokens: list[int]
    pages: Pages
    tree: TokenTree
    prediction: Sequence[int] = ()
    num_prompt: int | None = None
    history: History | None = None


class DrafterFailedError(Exception):
    """A drafter can say nothing more: a tree keeps what was grown, and grows on without it.

    Taking back what was drawn would look at it: whether a drafter fails may depend on the tokens it
    is asked about. Where growth ends may: the drafts to come are fresh whatever has come.
    """


class Drafter(Protocol):
    """Proposes continuations. A model, or anything else that knows what may come next."""

    name: str
    max_positions: int
    """Positions it was built for: beyond them its guesses are worth nothing, so it is not asked."""

    def expand(self, frontier: list[tuple[Draft, list[int]]]) -> Tensor | list[list[Pick]]:
        """Guess the token after each frontier node, for all requests in one batched pass.

        frontier  per request, nodes of its tree: the root alone first (node 0), afterwards nodes
                  whose parents were expanded before, in the same step
        returns   for requests and nodes in the given order, either [nodes, vocab] float32 logits,
                  or a list of picks per node, likeliest first, [] where it knows nothing
        raises    DrafterFailedError, and nothing else, where it is served by the engine
        """
        ...

    def admit(self, accepted: list[tuple[Draft, list[int]]]) -> None:
        """Learn, for drafts expanded in this step, which of their own nodes were accepted."""
        ...

    def drop(self, key: int) -> None:
        """Forget a request that has ended."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Plan:
    """A tree whose form is known before its tokens are.

    tree    a node's token is its rank under its parent: 0 is the likeliest
    levels  per depth, the nodes that others stand under
    """

    tree: TokenTree
    levels: list[list[int]]

    @classmethod
    def of(cls, tree: TokenTree) -> "Plan":
        """A plan of such a tree."""
        levels: list[list[int]] = [[] for _ in range(max(tree.depths))]
        for node, slots in enumerate(tree.slots_of):
            if slots:
                levels[tree.depths[node]].append(node)
        return cls(tree, levels)


class Planned(NamedTuple):
    """One request's tree to be filled with the likeliest tokens.

    draft        its tree is the root alone, and left so
    temperature  all that makes laws of the drafter's logits
    """

    draft: Draft
    plan: Plan
    temperature: float


@runtime_checkable
class LevelDrafter(Drafter, Protocol):
    """One that may fill whole trees at once, without telling the host of each level.

    has_levels  whether it may; where it may not, nobody needs to plan
    """

    has_levels: bool

    def draft_levels(self, asked: list[Planned]) -> list[list[int]] | None:
        """Do what `expand` would do for one level of nodes after the other.

        returns  per request the tokens of its plan's nodes behind the root, -1 where the token has
                 probability 0 or stands under one that has; None: this time they are too many, and
                 none was guessed. Afterwards nodes are known by their numbers without those
        raises   as `expand`
        """
        ...
