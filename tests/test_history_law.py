"""The law of trees whose nodes have histories, by enumeration, against plain decoding read plainly.

Targets and drafters go through the production histories and builders; what they must amount to is
computed here from whole texts, by a function that knows no tree. Mutations show the oracle sees.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from specinfer import history
from specinfer.draft import growth as growth_module
from specinfer.draft.forced import ForcedDrafter
from specinfer.draft.growth import Growth
from specinfer.draft.heap import HeapBuilder
from specinfer.draft.shapes import ShapeBuilder, TreeShape
from specinfer.grammar import GrammarCompiler
from specinfer.history import History
from specinfer.logits import RowFilters
from specinfer.request import SamplingParams
from specinfer.structured import StructuredOutputsParams
from specinfer.tree import TokenTree
from specinfer.verify import verify_match, verify_topdown, verify_traversal
from tests.engines import run_pages
from tests.oracle import (
    ROOT,
    Toy,
    ToyDrafter,
    ToyPicker,
    continued,
    distance,
    edited_laws,
    emission,
    enumerate_chance,
    exact_laws,
    outcomes,
    toys,
    verify_greedy,
)

EXACT = 1e-9
SHIFTED = 1e-3
VOCAB = 3
LENGTH = 3
PROMPT = [1, 2]
OUTPUT = [2, 0, ROOT]
TEXT = [*PROMPT, *OUTPUT]
PAGES = run_pages(64)
VERIFIERS = (verify_match, verify_topdown, verify_traversal)
LETTERS = "abc"


@pytest.fixture(autouse=True)
def _chance_is_enumerated(monkeypatch: pytest.MonkeyPatch) -> None:
    enumerate_chance(monkeypatch)
    exact_laws(monkeypatch)


@dataclass(frozen=True)
class Case:
    """A request: its parameters, what the tokenizer would make of them, and the same plainly.

    language  whether a text of letters may be the beginning of a valid one; "" beside it: the end
    """

    params: SamplingParams
    bad_words: Sequence[tuple[int, ...]] = ()
    regex: str | None = None
    begins: Callable[[str], bool] = field(default=lambda text: True)

    def history(self) -> History:
        """The production's."""
        grammar = None
        if self.regex is not None:
            pieces = [letter.encode() for letter in LETTERS]
            compiler = GrammarCompiler([*pieces, b""], [VOCAB], lambda text: [])
            grammar = compiler.matcher(StructuredOutputsParams(regex=self.regex))
        return History(
            self.params,
            num_prompt=len(PROMPT),
            vocab_size=VOCAB,
            end_tokens=[2],
            bad_words=self.bad_words,
            grammar=grammar,
        )


PAIRS = "caa(ab|ac|b[bc]|c[abc])*"


def is_pairs(text: str) -> bool:
    """The same by hand: letters two by two."""
    follow = {"a": "bc", "b": "bc", "c": "abc"}
    pairs = [text[i : i + 2] for i in range(3, len(text), 2)]
    return all(len(pair) == 1 or pair[1] in follow[pair[0]] for pair in pairs)


# Numbers that float32 holds exactly, as the reference computes in float64
CASES = {
    "penalties": Case(
        SamplingParams(presence_penalty=0.75, frequency_penalty=0.5, repetition_penalty=1.5)
    ),
    "a bad word of two tokens": Case(SamplingParams(bad_words=["x"]), [(0, 1), (1, 1, 2)]),
    "min_tokens and a bias": Case(SamplingParams(min_tokens=5, logit_bias={0: 0.75, 1: -0.5})),
    "allowed tokens, frequency": Case(
        SamplingParams(allowed_token_ids=[0, 2], frequency_penalty=-0.75)
    ),
    "a grammar": Case(SamplingParams(), regex=PAIRS, begins=is_pairs),
    "a grammar with penalties": Case(
        SamplingParams(frequency_penalty=1.25, bad_words=["x"]),
        [(2, 0)],
        regex=PAIRS,
        begins=is_pairs,
    ),
}


class Plain:
    """Plain decoding's law after each text, with no tree and no history kept."""

    def __init__(self, toy: Toy, case: Case) -> None:
        self.toy, self.case = toy, case
        self.laws: dict[tuple[int, ...], Any] = {}

    def law(self, path: tuple[int, ...]) -> Any:
        if path not in self.laws:
            self.laws[path] = self._law(path)
        return self.laws[path]

    def _law(self, path: tuple[int, ...]) -> Any:
        case, params = self.case, self.case.params
        output = [*OUTPUT, *path]
        scores = np.log(self.toy.law(path))
        banned = [False] * VOCAB
        for token in range(VOCAB):
            text = "".join(LETTERS[each] for each in (*output, token))
            if case.regex is not None and not case.begins(text):
                banned[token] = True
            if params.allowed_token_ids is not None and token not in params.allowed_token_ids:
                banned[token] = True
            for word in case.bad_words:
                if (*output, token)[-len(word) :] == word:
                    banned[token] = True
            if token == 2 and len(output) < params.min_tokens:
                banned[token] = True
        counts = Counter(output)
        for token in range(VOCAB):
            scores[token] += (params.logit_bias or {}).get(token, 0.0)
            if token in {*PROMPT, *output}:
                factor = params.repetition_penalty
                scores[token] *= 1 / factor if scores[token] > 0 else factor
            scores[token] -= params.frequency_penalty * counts[token]
            scores[token] -= params.presence_penalty * (counts[token] > 0)
        law = np.exp(scores)
        law[banned] = 0.0
        if law.sum() == 0:  # after a text that cannot come
            return np.full(VOCAB, 1 / VOCAB)
        return law / law.sum()


def engine_rows(toy: Toy, case: Case, tree: TokenTree) -> Any:
    """p [nodes, vocab] as the engine makes it: production edits of production histories."""
    contexts = [tuple(tree.tokens[n] for n in tree.path(node)) for node in range(len(tree))]
    laws = torch.from_numpy(np.array([toy.law(context) for context in contexts]))
    edits = case.history().edits(TEXT, tree, range(len(tree)))
    filters = RowFilters.of([(case.params, len(tree))], edits=[edits])
    return edited_laws(laws, filters).numpy()


def growth(case: Case, rng: Any, draw: Any, num_drafters: int) -> Growth:
    return Growth(
        key=0,
        tokens=TEXT,
        pages=PAGES,
        params=SamplingParams(),
        draw=draw,
        regime="hot",
        rng=rng,
        noise=None,
        sources=range(num_drafters),
        max_nodes=4,
        max_depth=2,
        num_prompt=len(PROMPT),
        history=case.history(),
    )


@dataclass
class Deviation:
    """From plain decoding's law; how far drafts were accepted; tokens that could not come."""

    distance: float
    accepted: float
    impossible: int


def deviation(
    case: Case, toy: Toy, drafters: Sequence[Any], builder: Any, draw: Any, verifier: Any
) -> Deviation:
    """The exact law of the next three tokens against plain decoding's."""
    plain, emitted, accepted, impossible = Plain(toy, case), defaultdict(float), 0.0, 0

    def grow(rng: Any) -> TokenTree:
        (grown,) = builder().grow([growth(case, rng, draw, len(drafters))], drafters)
        return grown.tree

    for chance, tree in outcomes(grow):
        p = engine_rows(toy, case, tree)
        for slot in tree.slots:
            path = tuple(tree.tokens[n] for n in tree.path(slot.parent))
            impossible += plain.law(path)[tree.tokens[slot.node]] == 0
        for verified, verdict in outcomes(lambda rng, p=p, tree=tree: verifier(tree, p, rng)):
            emitted[emission(tree, verdict)] += chance * verified
            accepted += chance * verified * len(verdict.path)
    law, truth = continued(emitted, plain, LENGTH), continued({(): 1.0}, plain, LENGTH)
    assert abs(sum(law.values()) - 1) < EXACT
    return Deviation(distance(law, truth), accepted, impossible)


BUILDERS: dict[str, tuple[Callable[[], Any], Any]] = {
    "shape": (lambda: ShapeBuilder(TreeShape.of_widths((2, 1))), "without-replacement"),
    "shape, independent": (lambda: ShapeBuilder(TreeShape.of_widths((1, 2))), "iid"),
    "shape, picked": (lambda: ShapeBuilder(TreeShape.of_widths((2, 1))), "pick"),
    "best-first": (HeapBuilder, "without-replacement"),
    "best-first, picked": (HeapBuilder, "pick"),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("builder", BUILDERS)
def test_trees_follow_plain_decodings_law(case: str, builder: str) -> None:
    toy, one, _ = toys("dense", 3, VOCAB)
    make, draw = BUILDERS[builder]
    for verifier in VERIFIERS:
        got = deviation(CASES[case], toy, [ToyDrafter(one)], make, draw, verifier)
        assert got.distance < EXACT
        assert got.impossible == 0, "drafters see the same masks"
        assert got.accepted > 0.05


@pytest.mark.parametrize("case", CASES)
def test_picks_beside_models_follow_it_too(case: str) -> None:
    toy, one, _ = toys("ties", 5, VOCAB)
    for drafters in ([ToyPicker(1, VOCAB), ToyDrafter(one)], [ToyDrafter(one), ForcedDrafter()]):
        got = deviation(
            CASES[case], toy, drafters, HeapBuilder, "without-replacement", verify_traversal
        )
        assert got.distance < EXACT
        assert got.impossible == 0


@pytest.mark.parametrize("case", CASES)
def test_greedy_trees_say_what_plain_decoding_says(case: str) -> None:
    for seed in range(4):
        toy, one, _ = toys("dense", seed, VOCAB)
        plain, (make, draw) = Plain(toy, CASES[case]), BUILDERS["best-first, picked"]
        (grown,) = make().grow([growth(CASES[case], None, draw, 1)], [ToyDrafter(one)])
        verdict = verify_greedy(grown.tree, engine_rows(toy, CASES[case], grown.tree))
        said: tuple[int, ...] = ()
        for token in emission(grown.tree, verdict):
            assert token == plain.law(said).argmax()
            said = (*said, token)


# --- the oracle is not blind ----------------------------------------------------------------------

path_tokens = history.path_tokens
MUTATIONS: dict[str, Callable[[TokenTree, int], tuple[int, ...]]] = {
    "every node has the root's history": lambda tree, node: (),
    "every node has its parent's history": lambda tree, node: path_tokens(tree, node)[:-1],
    "the path is read backwards": lambda tree, node: path_tokens(tree, node)[::-1],
}
SEEN_BY = {
    "every node has the root's history": CASES.keys() - {"allowed tokens, frequency"},
    "every node has its parent's history": CASES.keys() - {"allowed tokens, frequency"},
    "the path is read backwards": {"a bad word of two tokens"},
}


@pytest.mark.parametrize("verifier", VERIFIERS)
@pytest.mark.parametrize(
    ("mutation", "case"), [(m, case) for m in MUTATIONS for case in sorted(SEEN_BY[m])]
)
def test_other_histories_are_seen(
    monkeypatch: pytest.MonkeyPatch, mutation: str, case: str, verifier: Any
) -> None:
    monkeypatch.setattr(history, "path_tokens", MUTATIONS[mutation])
    toy, one, _ = toys("dense", 3, VOCAB)
    make, draw = BUILDERS["shape"]
    got = deviation(CASES[case], toy, [ToyDrafter(one)], make, draw, verifier)
    assert got.distance > SHIFTED


@pytest.mark.parametrize("verifier", [verify_topdown, verify_traversal])
@pytest.mark.parametrize("case", ["penalties", "a grammar"])
def test_a_law_recorded_without_its_filters_is_seen(
    monkeypatch: pytest.MonkeyPatch, case: str, verifier: Any
) -> None:
    """Drawn from the filtered law, recorded as if from the drafter's own."""
    add = growth_module.TokenTree.add
    toy, one, _ = toys("dense", 3, VOCAB)

    def record(tree: TokenTree, parent: int, token: int, *, source: int = 0, law: Any) -> int:
        path = tuple(tree.tokens[n] for n in tree.path(parent))
        return add(
            tree, parent, token, source=source, law=type(law)(one.law(path)[None], 0, law.seen)
        )

    monkeypatch.setattr(TokenTree, "add", record)
    make, draw = BUILDERS["shape"]
    got = deviation(CASES[case], toy, [ToyDrafter(one)], make, draw, verifier)
    assert got.distance > SHIFTED
