"""The enumeration oracle: every outcome of every draw and coin, weighed by its probability.

The production functions run as they are; only `draw` and `coin` are replaced. A run is replayed
once per leaf of its tree of choices:

    draw: token 0 ──── coin: True  ──── (0.7 · 0.4, result)
                └───── coin: False ──── (0.7 · 0.6, result)
    draw: token 2 ───────────────────── (0.3, result)

What comes out is the law itself, not a sample of it: a wrong rule shows as a number, not as a
doubtful p-value.
"""

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from specinfer import baselines, sampling, verify
from specinfer.draft import drawing, growth
from specinfer.draft.base import Draft, DrafterFailedError, Pick
from specinfer.engine import verification
from specinfer.logits import RowFilters
from specinfer.tree import TokenTree, union
from specinfer.verify import Verdict, follow
from tests.helpers import children, top_k_tokens

Tokens = tuple[int, ...]
Grow = Callable[[Any], TokenTree]
Verify = Callable[[TokenTree, Any, Any], Verdict]

IMPOSSIBLE = 1e-14
"""Choices rarer than this are rounding; what they lose shows in the total mass."""

ROOT = 0


# --- chance, enumerated ---------------------------------------------------------------------------


class Chance:
    """Stands in for a generator: replays the choices it is given, then takes the first of each."""

    def __init__(self, given: Sequence[int] = ()) -> None:
        self.given = given
        self.taken: list[int] = []
        self.others: list[list[int]] = []  # runs that branch off from this one
        self.probability = 1.0

    def choose(self, weights: Sequence[float]) -> int:
        """An index, each with its weight; the weights sum to 1."""
        step = len(self.taken)
        if step < len(self.given):
            choice = self.given[step]
        else:
            choice, *others = (i for i, weight in enumerate(weights) if weight > IMPOSSIBLE)
            self.others += [[*self.taken, other] for other in others]
        self.taken.append(choice)
        self.probability *= weights[choice]
        return choice

    def draw(self, law: Any) -> int:
        assert (law >= 0).all(), "a law has no negative entries"
        return self.choose((law / law.sum()).tolist())

    def coin(self, probability: float) -> bool:
        head = min(1.0, max(0.0, probability))
        return self.choose([head, 1 - head]) == 0

    def permutation(self, items: Sequence[int]) -> Any:
        orders = sorted(set(itertools.permutations(items)))
        return np.array(orders[self.choose([1 / len(orders)] * len(orders))])


class Uniform:
    """Stands in for a generator that always returns one number."""

    def __init__(self, value: float) -> None:
        self.value = value

    def random(self) -> float:
        return self.value


ALMOST_ONE = 1 - 2**-53
"""The largest number a generator returns: refuses every coin that is not certain."""


def outcomes(run: Callable[[Any], Any]) -> Iterator[tuple[float, Any]]:
    """Each way in which `run` can go: (probability, what it returned)."""
    pending: list[list[int]] = [[]]
    while pending:
        chance = Chance(pending.pop())
        result = run(chance)
        pending += chance.others
        yield chance.probability, result


class Untaken:
    """Tokens of rows, each drawn when it is read: those that nobody reads need no enumeration."""

    def __init__(self, rows: Any, rngs: Sequence[Any]) -> None:
        self.rows, self.rngs = rows, rngs

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return Untaken(self.rows[at], self.rngs[at])
        return self.rngs[at].draw(self.rows[at])


def enumerate_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the production code's draws and coins branch where their generator is a `Chance`."""
    draw_rows, to_host = sampling.draw_rows, verification.to_host

    def untaken(weights: Tensor, rngs: Any) -> Any:
        if not all(isinstance(rng, Chance) for rng, _ in rngs):
            return draw_rows(weights, rngs)
        each = [rng for rng, count in rngs for _ in range(count)]
        return Untaken(weights.numpy(), each), weights.sum(-1)

    def but_untaken(*tensors: Any) -> list[Any]:
        return [t if isinstance(t, Untaken) else to_host(t)[0] for t in tensors]

    monkeypatch.setattr(verification, "draw_rows", untaken)
    monkeypatch.setattr(verification, "to_host", but_untaken)
    draw, coin = sampling.draw, sampling.coin
    for module in (baselines, sampling, verify, drawing):
        monkeypatch.setattr(
            module,
            "draw",
            lambda law, rng: rng.draw(law) if isinstance(rng, Chance) else draw(law, rng),
        )
    for module in (baselines, sampling, verify):
        monkeypatch.setattr(
            module, "coin", lambda a, rng: rng.coin(a) if isinstance(rng, Chance) else coin(a, rng)
        )


def exact_laws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the builders take a `ToyDrafter`'s float64 laws as they are, edited by histories.

    Filters and the softmax, which round to float32, are all that is left out: a slot's recorded law
    is then the row that its token was drawn from, to the last bit, and verified in float64.
    """
    made = growth.target_laws

    def laws(answer: Tensor, filters: Any) -> Tensor:
        return (
            edited_laws(answer, filters) if answer.dtype == torch.float64 else made(answer, filters)
        )

    monkeypatch.setattr(growth, "target_laws", laws)
    # No short cut from logits to the likeliest either
    monkeypatch.setattr(RowFilters, "one_temperature", None)


def edited_laws(laws: Tensor, filters: Any) -> Tensor:
    """Laws behind the edits of their rows' histories, all in float64."""
    if filters.edits is None:
        return laws.clone()
    return torch.softmax(filters.edits.apply(laws.log()), -1)


def far(verifier: Verify, verify_far: Any = None) -> Verify:
    """A verifier as it is run on laws that are far away."""

    def verify(tree: TokenTree, p: Any, rng: Any) -> Verdict:
        (verdict,) = verify_all([verification.Case(tree, verifier, rng)], p, verify_far)
        assert verdict is not None
        return verdict

    return verify


def verify_all(cases: Sequence[verification.Case], p: Any, verify_far: Any = None) -> Any:
    """Cases whose laws are far away, together.

    p  [nodes, vocab], array or tensor
    """
    lumped = verification.lump([case.tree for case in cases], p.shape[-1])
    return (verify_far or verification.verify_far)(cases, lumped, torch.as_tensor(p))


def verify_greedy(tree: TokenTree, p: Any) -> Verdict:
    """Greedy as the engine does it: follow the likeliest tokens, the lowest ids among equals."""
    return follow(tree, p.argmax(-1))


def mutant(name: str, old: str, new: str, original: ModuleType) -> Any:
    """A function with one piece of its module's source replaced; what was patched there stays."""
    source = Path(str(original.__file__)).read_text()
    assert source.count(old) == 1, "the mutation no longer applies: adapt it to the source"
    module: dict[str, Any] = {"__name__": original.__name__}
    exec(compile(source.replace(old, new), "mutant", "exec"), module)
    for patched in {"draw_rows", "to_host"} & module.keys():
        module[patched] = vars(original)[patched]
    return module[name]


# --- toy models -----------------------------------------------------------------------------------

KINDS = ("dense", "zeros", "ties", "one-hot target", "one-hot drafter", "disjoint", "equal")


class Toy:
    """A language model: a float64 law for each context, fixed by a seed."""

    def __init__(self, seed: int, vocab: int, shape: Callable[[Any], Any]) -> None:
        self.seed, self.vocab, self.shape = seed, vocab, shape
        self.laws: dict[Tokens, Any] = {}

    def law(self, context: Tokens) -> Any:
        """[vocab] float64: what follows this context."""
        if context not in self.laws:
            law = self.shape(np.random.default_rng([self.seed, *context]))
            self.laws[context] = law / law.sum()
        return self.laws[context]


def toys(kind: str, seed: int, vocab: int) -> tuple[Toy, Toy, Toy]:
    """A target and two drafters whose laws meet in the way the kind says."""

    def dense(rng: Any) -> Any:
        return rng.dirichlet([0.8] * vocab) + 1e-3

    def zeros(rng: Any) -> Any:
        law = dense(rng) * (rng.random(vocab) < 0.6)
        law[rng.integers(vocab)] += 0.2
        return law

    def ties(rng: Any) -> Any:
        return rng.integers(1, 3, vocab).astype(float)

    def one_hot(rng: Any) -> Any:
        return np.eye(vocab)[rng.integers(vocab)]

    def low(rng: Any) -> Any:
        return dense(rng) * (np.arange(vocab) < vocab // 2)

    def high(rng: Any) -> Any:
        return dense(rng) * (np.arange(vocab) >= vocab // 2)

    target, first, second = {
        "dense": (dense, dense, dense),
        "zeros": (zeros, zeros, zeros),
        "ties": (ties, ties, ties),
        "one-hot target": (one_hot, dense, zeros),
        "one-hot drafter": (dense, one_hot, one_hot),
        "disjoint": (low, high, dense),
        "equal": (dense, dense, zeros),
    }[kind]
    drafter_seed = seed if kind == "equal" else seed + 1
    return (
        Toy(seed, vocab, target),
        Toy(drafter_seed, vocab, first),
        Toy(seed + 2, vocab, second),
    )


@dataclass(frozen=True)
class After:
    """A language model behind some tokens that it has seen already."""

    model: Any
    before: Tokens

    def law(self, context: Tokens) -> Any:
        """[vocab] float64: what follows this context."""
        return self.model.law((*self.before, *context))


def context(tree: TokenTree, node: int) -> Tokens:
    """The tokens from the root's child down to a node."""
    return tuple(tree.tokens[each] for each in tree.path(node))


def target_rows(target: Any, tree: TokenTree) -> Any:
    """p [nodes, vocab] float64."""
    return np.array([target.law(context(tree, node)) for node in range(len(tree))])


# --- drafters for the production builders ---------------------------------------------------------


class ToyDrafter:
    """Answers with a toy's laws (see `exact_laws`); requests other than 0 are texts of their own.

    asked  per pass: (key of the request, its nodes)
    """

    max_positions = 1 << 30

    def __init__(self, toy: Any, name: str = "model") -> None:
        self.toy, self.name = toy, name
        self.asked: list[list[tuple[int, list[int]]]] = []

    def expand(self, frontier: list[tuple[Draft, list[int]]]) -> Any:
        self.asked.append([(draft.key, list(nodes)) for draft, nodes in frontier])
        contexts = [own_context(draft, node) for draft, nodes in frontier for node in nodes]
        return torch.from_numpy(np.array([self.toy.law(each) for each in contexts]))

    def admit(self, accepted: list[tuple[Draft, list[int]]]) -> None: ...

    def drop(self, key: int) -> None: ...


class ToyPicker(ToyDrafter):
    """Answers with picks that depend on the path: some tokens or none, as sure as seeded."""

    def __init__(self, seed: int, vocab: int, name: str = "ngram") -> None:
        super().__init__(None, name)
        self.seed, self.vocab = seed, vocab

    def picks(self, context: Tokens) -> list[Pick]:
        """What follows a context, likeliest first."""
        rng = np.random.default_rng([self.seed, 9, *context])
        count = int(rng.integers(0, self.vocab))
        tokens = rng.permutation(self.vocab)[:count].tolist()
        chances = np.sort(rng.dirichlet(np.ones(count + 1))[:count])[::-1].tolist()
        return list(zip(tokens, chances, strict=True))

    def expand(self, frontier: list[tuple[Draft, list[int]]]) -> Any:
        self.asked.append([(draft.key, list(nodes)) for draft, nodes in frontier])
        contexts = [own_context(draft, node) for draft, nodes in frontier for node in nodes]
        return [self.picks(each) for each in contexts]


class FailingToy(ToyDrafter):
    """Another drafter that fails, until the next step, once certain paths are asked about."""

    def __init__(self, drafter: ToyDrafter, seed: int) -> None:
        super().__init__(drafter.toy, drafter.name)
        self.drafter, self.seed = drafter, seed
        self.is_failed = False

    def expand(self, frontier: list[tuple[Draft, list[int]]]) -> Any:
        if any(0 in nodes for _, nodes in frontier):  # a new step
            self.is_failed = False
        paths = [context(draft.tree, node) for draft, nodes in frontier for node in nodes]
        self.is_failed |= any(
            np.random.default_rng([self.seed, 7, *path]).random() < 0.4 for path in paths if path
        )
        if self.is_failed:
            raise DrafterFailedError(self.name)
        return self.drafter.expand(frontier)


def own_context(draft: Draft, node: int) -> Tokens:
    """The tokens down to a node, behind the key of any request but 0."""
    return (*((draft.key,) if draft.key else ()), *context(draft.tree, node))


# --- growing --------------------------------------------------------------------------------------

DRAWS = ("iid", "without-replacement", "pick", "pick, then draw", "draw, then pick")


def add_children(
    tree: TokenTree, node: int, q: Any, k: int, draw: str, rng: Any, source: int
) -> None:
    """Add k slots under a node, by the production functions."""
    rows = q[None]
    if draw == "iid":
        sampling.add_iid(tree, node, rows, 0, k, rng, source=source)
    elif draw == "without-replacement":
        sampling.add_without_replacement(tree, node, rows, 0, k, rng, source=source)
    elif draw == "pick":
        sampling.add_picks(tree, node, top_k_tokens(q, k), source=source)
    elif draw == "pick, then draw":
        picked = top_k_tokens(q, 1)
        sampling.add_picks(tree, node, picked, source=source)
        sampling.add_without_replacement(
            tree, node, rows, 0, k - 1, rng, source=source, seen=tuple(picked)
        )
    else:
        assert draw == "draw, then pick"
        sampling.add_iid(tree, node, rows, 0, k - 1, rng, source=source)
        drawn = {tree.tokens[child] for child in children(tree, node)}
        rest = [token for token in top_k_tokens(q, len(q)) if token not in drawn]
        sampling.add_picks(tree, node, rest[:1], source=source)


AddChildren = Callable[[TokenTree, int, Any, int, Any], None]


def fixed(drafter: Toy, widths: Sequence[int], draw: str | AddChildren, source: int = 0) -> Grow:
    """A drafter's tree of a fixed shape; `draw` names a way to draw or is one."""

    def grow(rng: Any) -> TokenTree:
        tree = TokenTree(ROOT)
        node = 0
        while node < len(tree):
            depth = tree.depths[node]
            if depth < len(widths):
                q = drafter.law(context(tree, node))
                if callable(draw):
                    draw(tree, node, q, widths[depth], rng)
                else:
                    add_children(tree, node, q, widths[depth], draw, rng, source)
            node += 1
        return tree

    return grow


def paths(drafter: Toy, count: int, depth: int) -> Grow:
    """So many independent paths of one length: a node has as many slots as paths lead to it."""

    def grow(rng: Any) -> TokenTree:
        tree = TokenTree(ROOT)
        arrived = [count]  # per node
        node = 0
        while node < len(tree):
            if tree.depths[node] < depth:
                q = drafter.law(context(tree, node))
                slots = len(tree.slots)
                sampling.add_iid(tree, node, q[None], 0, arrived[node], rng)
                arrived += [0] * (len(tree) - len(arrived))
                for slot in tree.slots[slots:]:
                    arrived[slot.node] += 1
            node += 1
        return tree

    return grow


def merged(*grows: Grow) -> Grow:
    """Several drafters' trees, each drawn on its own, as one."""
    return lambda rng: union([grow(rng) for grow in grows], rng)[0]


# --- the laws compared ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What verification does to the law of the next tokens.

    deviation  total variation between the law of the next tokens and the target's
    mass       of all outcomes; 1 if every run ends
    accepted   mean length of the accepted path
    forecast   mean of the sum of the accept probabilities in `examined`
    """

    deviation: float
    mass: float
    accepted: float
    forecast: float


def measure(target: Any, grow: Grow, verify: Verify, length: int) -> Outcome:
    """The exact law of the next `length` tokens: what verification emits, then the target's own."""
    return measure_drafted(target, outcomes(grow), verify, length)


def measure_drafted(
    target: Any, drafted: Iterable[tuple[float, TokenTree]], verify: Verify, length: int
) -> Outcome:
    """The same for trees that were enumerated before: (probability, tree)."""
    emitted: dict[Tokens, float] = defaultdict(float)
    accepted = forecast = 0.0
    for chance, tree in drafted:
        p = target_rows(target, tree)
        for verified, verdict in outcomes(lambda rng, p=p, tree=tree: verify(tree, p, rng)):
            probability = chance * verified
            emitted[emission(tree, verdict)] += probability
            accepted += probability * len(verdict.path)
            forecast += probability * sum(ratio for _, ratio in verdict.examined)
    law = continued(emitted, target, length)
    truth = continued({(): 1.0}, target, length)
    return Outcome(distance(law, truth), sum(emitted.values()), accepted, forecast)


def emission(tree: TokenTree, verdict: Verdict) -> Tokens:
    """The tokens that a verdict commits."""
    tokens = context(tree, verdict.path[-1] if verdict.path else 0)
    assert len(tokens) == len(verdict.path)
    return (*tokens, verdict.next_token)


def distance(law: dict[Any, float], truth: dict[Any, float]) -> float:
    """Total variation."""
    return sum(abs(law.get(key, 0.0) - truth.get(key, 0.0)) for key in law | truth) / 2


def continued(law: dict[Tokens, float], target: Any, length: int) -> dict[Tokens, float]:
    """Go on from each emitted text with the target alone, up to a length."""
    done: dict[Tokens, float] = defaultdict(float)
    pending = list(law.items())
    while pending:
        tokens, probability = pending.pop()
        if len(tokens) == length:
            done[tokens] += probability
            continue
        for token, share in enumerate(target.law(tokens).tolist()):
            if share > 0:
                pending.append(((*tokens, token), probability * share))
    return done
