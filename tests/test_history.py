"""Histories do to logits what vLLM's formulas say, read plainly from whole texts, node by node."""

import itertools
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from specinfer.history import Edits, History, RowEdits, pack
from specinfer.logits import RowFilters, target_laws
from specinfer.request import SamplingParams
from specinfer.tree import TokenTree

VOCAB = 11
PROMPT = [3, 5, 3, 7]
BAD_WORDS = [(1,), (2, 4), (2, 4, 6), (5, 2)]
ENDS = frozenset({0})


def reference(
    scores: Any,
    params: SamplingParams,
    output: Sequence[int],
    bad_words: Sequence[tuple[int, ...]] = (),
) -> Any:
    """One row in plain loops: what vLLM does to it, from the whole text."""
    scores = scores.astype(np.float32).copy()
    if params.allowed_token_ids is not None:
        for token in range(len(scores)):
            if token not in params.allowed_token_ids:
                scores[token] = -np.inf
    for word in bad_words:
        before = list(word[:-1])
        if list(output)[len(output) - len(before) :] == before and len(output) >= len(before):
            scores[word[-1]] = -np.inf
    if len(output) < params.min_tokens:
        scores[list(ENDS)] = -np.inf
    for token, bias in (params.logit_bias or {}).items():
        scores[token] += np.float32(bias)
    for token in {*PROMPT, *output}:
        factor = np.float32(params.repetition_penalty)
        scores[token] = scores[token] / factor if scores[token] > 0 else scores[token] * factor
    for token, count in Counter(output).items():
        scores[token] -= np.float32(params.frequency_penalty) * np.float32(count)
        scores[token] -= np.float32(params.presence_penalty)
    return scores


def history_of(
    params: SamplingParams, bad_words: Sequence[tuple[int, ...]] = (), **options: Any
) -> History:
    return History(
        params,
        num_prompt=len(PROMPT),
        vocab_size=VOCAB,
        end_tokens=ENDS,
        bad_words=bad_words,
        **options,
    )


def random_tree(rng: np.random.Generator, root: int, num_nodes: int) -> TokenTree:
    tree = TokenTree(root)
    while tree.num_drafted < num_nodes:
        tree.add(int(rng.integers(len(tree))), int(rng.integers(VOCAB)))
    return tree


def applied(edits: Edits | None, scores: Any) -> Any:
    if edits is None:
        return scores
    return RowEdits.of([(0, len(scores), edits)]).apply(torch.from_numpy(scores)).numpy()


KINDS: dict[str, tuple[dict[str, Any], Sequence[tuple[int, ...]]]] = {
    "presence": ({"presence_penalty": 0.7}, ()),
    "frequency": ({"frequency_penalty": -0.4}, ()),
    "repetition": ({"repetition_penalty": 1.3}, ()),
    "bias": ({"logit_bias": {2: 1.5, 9: -100}}, ()),
    "allowed": ({"allowed_token_ids": [0, 2, 4, 6, 8]}, ()),
    "bad words": ({"bad_words": ["x"]}, BAD_WORDS),
    "min_tokens": ({"min_tokens": 6}, ()),
    "all": (
        {
            "presence_penalty": -0.3,
            "frequency_penalty": 0.2,
            "repetition_penalty": 0.8,
            "logit_bias": {4: 2.0, 3: -1.0},
            "allowed_token_ids": [0, 1, 2, 3, 4, 5, 6],
            "bad_words": ["x"],
            "min_tokens": 5,
        },
        BAD_WORDS,
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_node_has_its_own_history(kind: str) -> None:
    """Output and trees grow together, as in an engine; each row as if its text were read anew."""
    fields, bad_words = KINDS[kind]
    params = SamplingParams(max_tokens=99, **fields)
    history = history_of(params, bad_words)
    rng = np.random.default_rng(0)
    text, changed = list(PROMPT), 0
    for _ in range(12):
        tree = random_tree(rng, text[-1], 14)
        nodes = sorted(rng.choice(len(tree), 9, replace=False).tolist())
        scores = rng.normal(0, 3, (len(nodes), VOCAB)).astype(np.float32)
        edited = applied(history.edits(text, tree, nodes), scores)
        for row, node in enumerate(nodes):
            output = [*text[len(PROMPT) :], *(tree.tokens[each] for each in tree.path(node))]
            expected = reference(scores[row], params, output, bad_words)
            np.testing.assert_array_equal(edited[row], expected)
        changed += int((edited != scores).sum())
        text += rng.integers(VOCAB, size=int(rng.integers(0, 4))).tolist()
    assert changed > 0


def test_penalties_match_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    text, scores = [*PROMPT, 1, 1, 9], torch.randn(1, VOCAB)
    processor = transformers.RepetitionPenaltyLogitsProcessor(1.7)
    edits = history_of(SamplingParams(repetition_penalty=1.7)).edits(text, TokenTree(9), [0])
    expected = processor(torch.tensor([text]), scores.clone()).numpy()
    np.testing.assert_allclose(applied(edits, scores.numpy()), expected, rtol=1e-6)
    banned = transformers.NoBadWordsLogitsProcessor([[2, 4], [5]], eos_token_id=[0])
    history = history_of(SamplingParams(bad_words=["x"]), [(2, 4), (5,)])
    for output in ([1, 2], [2, 1], [2]):
        edits = history.edits([*PROMPT, *output], TokenTree(output[-1]), [0])
        expected = banned(torch.tensor([[*PROMPT, *output]]), scores.clone()).numpy()
        np.testing.assert_array_equal(applied(edits, scores.numpy()), expected)
        history = history_of(SamplingParams(bad_words=["x"]), [(2, 4), (5,)])


@settings(max_examples=40)
@given(st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=5), st.integers(0, 99))
def test_a_row_is_the_same_to_the_bit_in_any_batch(kinds: list[str], seed: int) -> None:
    rng = np.random.default_rng(seed)
    runs, edits, alone = [], [], []
    scores = torch.from_numpy(rng.normal(0, 3, (4 * len(kinds), VOCAB)).astype(np.float32))
    for number, kind in enumerate(kinds):
        fields, bad_words = KINDS[kind]
        params = SamplingParams(max_tokens=99, top_p=0.9, **fields)
        text = [*PROMPT, *rng.integers(VOCAB, size=3).tolist()]
        tree = random_tree(rng, text[-1], 3)
        history = history_of(params, bad_words)
        runs.append((params, 4))
        edits.append(history.edits(text, tree, range(4)))
        for node in range(4):
            filters = RowFilters.of([(params, 1)], edits=[history.edits(text, tree, [node])])
            alone.append(target_laws(scores[4 * number + node][None], filters))
    together = target_laws(scores, RowFilters.of(runs, edits=edits))
    assert torch.equal(together, torch.cat(alone))
    assert not together.isnan().any()


def test_nothing_asked_is_nothing_done() -> None:
    assert not History.is_needed(SamplingParams(temperature=0.3, top_p=0.5, seed=1))
    for fields, _ in KINDS.values():
        assert History.is_needed(SamplingParams(max_tokens=9, **fields))
    history = history_of(SamplingParams(min_tokens=2))
    assert history.edits([*PROMPT, 1], TokenTree(1), [0]) is not None
    assert history.edits([*PROMPT, 1, 2], TokenTree(2), [0]) is None
    logits = torch.randn(3, VOCAB)
    assert RowFilters.of([(SamplingParams(), 3)], edits=[None]).edits is None
    edits = Edits(banned={1: frozenset({4})})
    before = logits.clone()
    target_laws(logits, RowFilters.of([(SamplingParams(), 3)], edits=[edits]))
    assert torch.equal(logits, before), "logits are left as they are"


# --- filters that leave nothing -------------------------------------------------------------------


class Masks:
    """A grammar that says the same of every path."""

    def __init__(self, *tokens: int) -> None:
        self.bits = pack(tokens, VOCAB)

    def advance(self, tokens: Sequence[int]) -> None: ...

    def allowed(self, path: tuple[int, ...]) -> Any:
        return self.bits

    def forced(self, path: tuple[int, ...]) -> tuple[int, ...]:
        return ()


def admitted(history: History, output: Sequence[int] = ()) -> list[int]:
    """The tokens that may come at the root."""
    text = [*PROMPT, *output]
    edits = history.edits(text, TokenTree(text[-1]), [0])
    scores = applied(edits, np.zeros((1, VOCAB), np.float32))
    tokens = np.flatnonzero(scores[0] == 0).tolist()
    assert edits is None or tokens == [t for t in range(VOCAB) if edits.admits(0, t)]
    return tokens


def test_a_filter_that_would_leave_nothing_is_left_out() -> None:
    everything = list(range(VOCAB))
    for params, bad, grammar, expected in (
        (SamplingParams(allowed_token_ids=[2, 3]), (), Masks(3, 4), [3]),
        (SamplingParams(allowed_token_ids=[2, 3]), (), Masks(4, 5), [4, 5]),
        (SamplingParams(allowed_token_ids=[2, 3]), [(2,)], None, [3]),
        (SamplingParams(allowed_token_ids=[2]), [(2,)], None, [2]),
        (SamplingParams(min_tokens=2), (), Masks(0), [0]),
        (SamplingParams(min_tokens=2), (), Masks(0, 1), [1]),
        (SamplingParams(min_tokens=2), [(1,)], Masks(0, 1), [0]),
        (SamplingParams(), [(token,) for token in everything], None, everything),
    ):
        history = history_of(params, bad, grammar=grammar)
        assert admitted(history) == expected, params


def test_bad_words_look_back_over_the_output_alone() -> None:
    history = history_of(SamplingParams(bad_words=["x"]), [(7, 2), (4, 7, 2)])
    assert 2 in admitted(history), "the prompt ends with 7, and what it says is no output"
    assert 2 not in admitted(history, [4, 7])
    tree = TokenTree(7)
    deep = tree.add(tree.add(0, 1), 7)
    edits = history.edits([*PROMPT, 4, 7], tree, [0, 1, deep])
    assert edits is not None
    assert [edits.admits(row, 2) for row in range(3)] == [False, True, False]


def test_bits_are_tokens() -> None:
    for tokens in ([], [0], [7, 8], list(range(VOCAB))):
        edits = Edits(allowed={0: pack(tokens, VOCAB)})
        assert [t for t in range(VOCAB + 20) if edits.admits(0, t)] == tokens


def test_chunks_of_a_prompt_are_read_in_any_pieces() -> None:
    """Preemption, chunks, long silences: what counts is the text."""
    params = SamplingParams(max_tokens=9, **KINDS["all"][0])
    output = [1, 2, 4, 6, 2]
    whole = history_of(params, BAD_WORDS).edits([*PROMPT, *output], TokenTree(2), [0])
    scores = np.random.default_rng(1).normal(size=(1, VOCAB)).astype(np.float32)
    for cuts in itertools.product(range(6), repeat=2):
        history = history_of(params, BAD_WORDS)
        for cut in sorted(cuts):
            text = [*PROMPT, *output[:cut]]
            history.edits(text, TokenTree(text[-1]), [0])
        edits = history.edits([*PROMPT, *output], TokenTree(2), [0])
        np.testing.assert_array_equal(applied(edits, scores), applied(whole, scores))
