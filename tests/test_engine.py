"""The engine on toy models: every branch can be accepted, and nothing is left behind."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch

from specinfer.config import PAPER_TREE, EngineConfig, Speculation, VerifierName
from specinfer.engine.engine import Engine
from specinfer.engine.sequence import Sequence
from specinfer.errors import CapacityError, RequestError
from specinfer.models.decoder import Decoder
from specinfer.request import SamplingParams
from tests.engines import (
    ScriptedDrafter,
    finish,
    free_blocks,
    fresh_keys_and_values,
    keys_and_values,
    model_drafter,
    outputs_of,
    toy_decoder,
    toy_engine,
)
from tests.helpers import children

VOCAB = 24
BRANCHES = {"first": 0, "middle": 1, "last": 2}
COLD = 1e-4
"""A temperature at which the law is the likeliest token's, and not called greedy."""


@pytest.fixture(scope="module")
def target() -> Decoder:
    return toy_decoder(7, vocab_size=VOCAB, num_hidden_layers=2)


@pytest.fixture(scope="module")
def other() -> Decoder:
    """A smaller model that the target often disagrees with."""
    return toy_decoder(8, vocab_size=VOCAB, num_hidden_layers=1, hidden_size=16)


def engine_with(
    target: Decoder, *drafters: Decoder, num_blocks: int = 400, **options: Any
) -> Engine:
    """An engine whose drafters are models."""
    models = [model_drafter(each, num_blocks * 4) for each in drafters]
    return toy_engine(target, models, num_blocks=num_blocks, **options)


def run(engine: Engine, prompts: list[list[int]], params: list[SamplingParams]) -> list[Sequence]:
    """All of it, and nothing left behind."""
    full = free_blocks(engine)
    sequences = [
        sequence
        for number, (prompt, each) in enumerate(zip(prompts, params, strict=True))
        for sequence in engine.add(str(number), prompt, each)
    ]
    finish(engine)
    assert all(sequence.is_finished for sequence in sequences)
    assert free_blocks(engine) == full
    return sequences


def random_prompts(count: int, seed: int = 0, longest: int = 9) -> list[list[int]]:
    rng = np.random.default_rng(seed)
    return [
        rng.integers(0, VOCAB, int(rng.integers(1, longest + 1))).tolist() for _ in range(count)
    ]


# --- every branch -------------------------------------------------------------------------------

WAYS: dict[str, tuple[dict[str, Any], VerifierName]] = {
    "greedy": ({"temperature": 0.0}, "auto"),
    "seeded": ({"temperature": 0.8, "seed": 5}, "auto"),
    "match": ({"temperature": COLD}, "match"),
    "topdown": ({"temperature": COLD}, "topdown"),
    "traversal": ({"temperature": COLD}, "traversal"),
}


@pytest.mark.parametrize("way", WAYS)
def test_every_branch_can_be_accepted(target: Decoder, way: str) -> None:
    """The right token is the first, a middle or the last branch, at every depth: 27 requests."""
    fields, verifier = WAYS[way]
    params = SamplingParams(max_tokens=11, **fields)  # 1, 4 and 4 tokens, then a tree cut to 1
    all_ranks = list(itertools.product(BRANCHES.values(), repeat=3))
    prompts = [[1 + n // 9, 5, n % 9] for n in range(len(all_ranks))]
    plain = run(toy_engine(target, num_blocks=400), prompts, [params] * len(prompts))
    right = {tuple(prompt): s.tokens for prompt, s in zip(prompts, plain, strict=True)}
    ranks = dict(zip(right, all_ranks, strict=True))

    def script(known: list[int], path: list[int]) -> list[int]:
        text, prompt = [*known, *path], tuple(known[:3])
        answer = right[prompt]
        if answer[: len(text)] != text or len(text) == len(answer):
            return [0, 1, 2]  # beside the right path
        wrong = [(answer[len(text)] + offset) % VOCAB for offset in (1, 2)]
        wrong.insert(ranks[prompt][len(path)], answer[len(text)])
        return wrong

    drafter = ScriptedDrafter(script, VOCAB)
    engine = toy_engine(
        target,
        [drafter],
        num_blocks=2000,
        speculation=Speculation(tree="3,3,3", verifier=verifier, draw="pick"),
        config=EngineConfig(max_num_seqs=27, block_size=4),
    )
    sequences = [s for p in prompts for s in engine.add(str(p), p, params)]
    num_full_paths = 0
    while engine.has_work:
        for trace in engine.step():
            tree, path = trace.tree, trace.verdict.path
            assert len(path) == max(tree.depths)
            expected = ranks[tuple(trace.sequence.tokens[:3])]
            parents = [0, *path][: len(path)]
            branches = [children(tree, v).index(c) for v, c in zip(parents, path, strict=True)]
            assert branches == list(expected[: len(path)])
            num_full_paths += len(path) == 3
            noise = trace.sequence.noise
            assert noise is None or len(noise._rows) <= 4  # committed positions are forgotten
    assert num_full_paths >= 2 * len(prompts)
    assert outputs_of(sequences) == outputs_of(plain)


@pytest.mark.parametrize("right_one", [0, 1])
def test_either_of_two_drafters_can_be_right(target: Decoder, right_one: int) -> None:
    params = SamplingParams(max_tokens=12, temperature=0.0)
    prompts = random_prompts(4)
    plain = run(toy_engine(target), prompts, [params] * 4)
    answers = [sequence.tokens for sequence in plain]

    def script(known: list[int], path: list[int]) -> list[int]:
        text = [*known, *path]
        answer = next((a for a in answers if a[: len(text)] == text and len(a) > len(text)), None)
        return [0, 1] if answer is None else [answer[len(text)], (answer[len(text)] + 1) % VOCAB]

    def wrong(known: list[int], path: list[int]) -> list[int]:
        return [(token + 2) % VOCAB for token in script(known, path)]

    scripts = [wrong, wrong]
    scripts[right_one] = script
    drafters = [ScriptedDrafter(each, VOCAB, name=str(n)) for n, each in enumerate(scripts)]
    engine = toy_engine(target, drafters, num_blocks=200, speculation=Speculation(tree="2,2,1"))
    sequences = run(engine, prompts, [params] * 4)
    assert outputs_of(sequences) == outputs_of(plain)
    for sequence in sequences:
        # The first step has no tree where the prompt is longer than a token; then 4 tokens each.
        assert sequence.stats.num_target_steps <= 4
        assert list(sequence.stats.accepted_by_source) == [str(right_one)]
    assert any(len(tokens) == 3 for tokens in drafters[right_one].admitted)
    assert not any(drafters[1 - right_one].admitted)
    assert sorted(drafters[0].dropped) == sorted(drafters[1].dropped) == [0, 1, 2, 3]


# --- identity over every setting ------------------------------------------------------------------


def random_params(rng: np.random.Generator) -> SamplingParams:
    """Greedy or seeded, with some of the ways to end."""
    max_tokens = int(rng.integers(1, 25))
    letters = "abcdefghijklmnopqrstuvwx"
    fields: dict[str, Any] = {
        "max_tokens": None if rng.random() < 0.1 else max_tokens,
        "n": int(rng.choice([1, 1, 3])),
        "ignore_eos": bool(rng.random() < 0.3),
    }
    if rng.random() < 0.5:
        fields["temperature"] = 0.0
    else:
        fields |= {
            "temperature": float(rng.choice([0.5, 1.0, 1.5])),
            "seed": int(rng.integers(100)),
            "top_k": int(rng.choice([0, 0, 5])),
            "top_p": float(rng.choice([1.0, 0.8])),
            "min_p": float(rng.choice([0.0, 0.05])),
        }
    if rng.random() < 0.4:
        fields["min_tokens"] = int(rng.integers(0, max_tokens + 1))
    if rng.random() < 0.4:
        count = int(rng.integers(1, 3))
        fields["stop"] = ["".join(rng.choice(list(letters), count)) for _ in range(4)]
        fields["include_stop_str_in_output"] = bool(rng.random() < 0.5)
    if rng.random() < 0.3:
        fields["stop_token_ids"] = rng.integers(0, VOCAB, 2).tolist()
    return SamplingParams(**fields)


@pytest.fixture(scope="module")
def traffic(target: Decoder) -> tuple[list[list[int]], list[SamplingParams], list[Any]]:
    """Forty requests, and what each gets alone and without trees."""
    rng = np.random.default_rng(4)
    prompts, params = random_prompts(40, seed=1), [random_params(rng) for _ in range(40)]
    engine = toy_engine(target, eos_token_ids=[3, 9])
    alone = [run(engine, [p], [each]) for p, each in zip(prompts, params, strict=True)]
    return prompts, params, [outputs_of(sequences) for sequences in alone]


def test_the_traffic_ends_in_every_way(
    traffic: tuple[list[list[int]], list[SamplingParams], list[Any]],
) -> None:
    _, params, expected = traffic
    ends = [(finish, reason) for outputs in expected for _, _, finish, reason in outputs]
    assert ("length", None) in ends
    assert ("stop", None) in ends
    assert any(isinstance(reason, str) for _, reason in ends)
    assert any(isinstance(reason, int) for _, reason in ends)
    assert any(each.min_tokens for each in params)


def test_plain_texts_end_as_they_should(
    target: Decoder, traffic: tuple[list[list[int]], list[SamplingParams], list[Any]]
) -> None:
    """What `SamplingParams` says, said again: the other tests only compare with plain decoding."""
    prompts, params, expected = traffic
    tokenizer = toy_engine(target).tokenizer
    for prompt, each, outputs in zip(prompts, params, expected, strict=True):
        own = set(each.stop_token_ids or ())
        ends = own | (set() if each.ignore_eos else {3, 9})
        limit = min(each.max_tokens or 99, 48 - len(prompt))
        assert len(outputs) == each.n
        for text, ids, finish_reason, stop_reason in outputs:
            assert not ends & set(ids[:-1])  # banned before min_tokens, the end after them
            assert len(ids) <= limit
            whole = tokenizer.decode(ids)
            if finish_reason == "length":
                assert len(ids) == limit
                assert text == whole
            elif isinstance(stop_reason, str):
                start = whole.index(stop_reason, each.min_tokens)
                assert start + len(stop_reason) == len(ids)  # one letter per token
                cut = len(ids) if each.include_stop_str_in_output else start
                assert text == whole[:cut]
            else:
                assert len(ids) > each.min_tokens
                assert ids[-1] in ends
                assert stop_reason == (ids[-1] if ids[-1] in own else None)
                assert text == whole[: len(ids) - (not each.include_stop_str_in_output)]
            if isinstance(stop_reason, str):
                whole = whole[: len(ids) - 1]
            assert not any(stop in whole[each.min_tokens :] for stop in each.stop_strings)


@pytest.mark.parametrize("tree", ["1,1,3,1,1,1,1,1", "2,2", "4", "1,1,1,1", "3,2,1"])
@pytest.mark.parametrize("names", [("same",), ("other",), ("other", "same")], ids="+".join)
def test_trees_change_nothing(
    target: Decoder,
    other: Decoder,
    traffic: tuple[list[list[int]], list[SamplingParams], list[Any]],
    tree: str,
    names: tuple[str, ...],
) -> None:
    """The target as its own drafter: texts end in the middle of long accepted paths."""
    prompts, params, expected = traffic
    drafters = [{"same": target, "other": other}[name] for name in names]
    engine = engine_with(
        target, *drafters, speculation=Speculation(tree=tree), eos_token_ids=[3, 9]
    )
    sequences = run(engine, prompts, params)
    assert outputs_of(sequences) == [output for outputs in expected for output in outputs]
    stats = [sequence.stats for sequence in sequences]
    assert sum(each.num_accepted for each in stats) > 0
    for each in stats:
        assert sum(each.accepted_by_depth) == each.num_accepted
        assert sum(each.accepted_by_source.values()) == each.num_accepted
        assert each.num_accepted <= each.num_output_tokens


@pytest.mark.parametrize("draw", ["iid", "without-replacement", "pick"])
@pytest.mark.parametrize("limits", [(5, 11), (16, 13), (3, 2048)])
def test_limits_and_draws_change_nothing(
    target: Decoder,
    other: Decoder,
    traffic: tuple[list[list[int]], list[SamplingParams], list[Any]],
    draw: Any,
    limits: tuple[int, int],
) -> None:
    """Few sequences at a time; budgets below a prompt and below the batch's trees."""
    prompts, params, expected = traffic
    engine = engine_with(
        target,
        other,
        speculation=Speculation(tree="2,2,1", draw=draw),
        config=EngineConfig(max_num_seqs=limits[0], max_num_batched_tokens=limits[1], block_size=4),
        num_blocks=60,
        eos_token_ids=[3, 9],
    )
    outputs = outputs_of(run(engine, prompts, params))
    assert outputs == [output for outputs in expected for output in outputs]


def test_samples_differ_and_the_first_is_that_of_one(target: Decoder, other: Decoder) -> None:
    for drafters in ((), (other,)):
        engine = engine_with(target, *drafters)
        one, three = (
            run(engine, [[1, 2]], [SamplingParams(max_tokens=20, seed=3, n=n)]) for n in (1, 3)
        )
        assert outputs_of(one) == outputs_of(three)[:1]
        assert len({s.output.text for s in three}) == 3
        assert [s.output.index for s in three] == [0, 1, 2]


def test_unseeded_requests_do_not_depend_on_their_neighbours(
    target: Decoder, other: Decoder
) -> None:
    """The same draws for the same place in the order of arrival, whatever shares the batch."""
    params = SamplingParams(max_tokens=15, temperature=0.9)
    texts = []
    for max_num_seqs in (1, 4):
        engine = engine_with(
            target,
            other,
            speculation=Speculation(tree=PAPER_TREE),  # grown trees learn from their neighbours
            config=EngineConfig(max_num_seqs=max_num_seqs, block_size=4),
        )
        texts.append(outputs_of(run(engine, random_prompts(6), [params] * 6)))
    assert texts[0] == texts[1]


# --- cache ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("draw", ["pick", "without-replacement"])
def test_the_cache_is_a_fresh_one_after_every_step(
    target: Decoder, other: Decoder, draw: Any
) -> None:
    engine = engine_with(target, other, target, speculation=Speculation(tree="2,2,1", draw=draw))
    params = [SamplingParams(max_tokens=12, temperature=t) for t in (0.0, 0.7, 0.0, 1.0)]
    for number, (prompt, each) in enumerate(zip(random_prompts(4), params, strict=True)):
        engine.add(str(number), prompt, each)
    while engine.has_work:
        engine.step()
        for sequence in engine.scheduler.running:
            assert sequence.pages is not None
            assert sequence.num_pending == 1
            known = sequence.tokens[: sequence.num_computed]
            torch.testing.assert_close(
                keys_and_values(engine.target, sequence.pages, len(known)),
                fresh_keys_and_values(target, known),
                atol=1e-5,
                rtol=1e-5,
            )


# --- what is left behind --------------------------------------------------------------------------


def test_aborted_sequences_free_their_pages(target: Decoder, other: Decoder) -> None:
    engine = engine_with(
        target, other, config=EngineConfig(max_num_seqs=2, block_size=4), num_blocks=100
    )
    params = SamplingParams(max_tokens=30, temperature=0.0)
    groups = [engine.add(str(n), [n, 2, 3], params) for n in range(4)]
    for _ in range(3):
        engine.step()
    assert free_blocks(engine) < 100
    running = groups[0][0]
    text = running.output.text
    engine.abort(groups[3])  # waits
    engine.abort(groups[0])  # runs
    engine.abort(groups[0])  # and again: nothing happens
    assert running.output.finish_reason == "abort"
    assert running.output.text == text
    assert groups[3][0].output.token_ids == []
    finish(engine)
    assert free_blocks(engine) == 100
    for n in (1, 2):
        alone = run(toy_engine(target), [[n, 2, 3]], [params])
        assert outputs_of(groups[n]) == outputs_of(alone)


def test_refused_requests_leave_nothing_behind(target: Decoder) -> None:
    engine = toy_engine(target, num_blocks=10, max_model_len=48)
    for prompt, error, words in (
        ([], RequestError, "the prompt is empty"),
        ([1] * 48, RequestError, "48 tokens and prompt and output together may have 48"),
        ([1, VOCAB], RequestError, f"token id {VOCAB}"),
        ([-1], RequestError, "token id -1"),
        ([1] * 40, CapacityError, "needs 44 tokens of KV cache and there are 40"),
    ):
        with pytest.raises(error, match=words):
            engine.add("bad", prompt, SamplingParams(max_tokens=4, n=3))
        assert not engine.has_work
        assert free_blocks(engine) == 10


def test_speculation_changes_for_requests_to_come(target: Decoder) -> None:
    engine = engine_with(target, target, speculation=Speculation(tree="1"))
    params = SamplingParams(max_tokens=12, temperature=0.0)
    expected = outputs_of(run(toy_engine(target), [[1, 2]], [params]))
    for tree, num_steps in (("1", 7), ("1,1,1", 4), ("off", 12)):  # the first step has no tree
        engine.set_speculation(Speculation(tree=tree))
        (sequence,) = run(engine, [[1, 2]], [params])
        assert outputs_of([sequence]) == expected
        assert sequence.stats.num_target_steps == num_steps
    (early,) = engine.add("0", [1, 2], params)
    engine.set_speculation(Speculation(tree="1,1,1"))
    own = SamplingParams(max_tokens=12, temperature=0.0, speculation={"tree": "1"})
    late = [*engine.add("1", [1, 2], params), *engine.add("2", [1, 2], own)]
    finish(engine)
    assert [s.stats.num_target_steps for s in (early, *late)] == [12, 4, 7]
    assert [s.tokens for s in (early, *late)] == [early.tokens] * 3


def test_a_sequence_may_fill_the_context(target: Decoder) -> None:
    plain, tree = (
        run(
            engine_with(target, *drafters, max_model_len=20),
            [[1] * 18, [2] * 19, [3]],
            [SamplingParams(max_tokens=None, temperature=0.0)] * 3,
        )
        for drafters in ((), (target,))
    )
    assert [len(sequence.tokens) for sequence in tree] == [20, 20, 20]
    assert outputs_of(plain) == outputs_of(tree)
    assert all(sequence.output.finish_reason == "length" for sequence in tree)
