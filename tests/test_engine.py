"""The engine on toy models: every branch can be accepted, and nothing is left behind."""

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from specinfer.config import PAPER_TREE, EngineConfig, Speculation, VerifierName
from specinfer.draft.ngram import NgramDrafter
from specinfer.engine.controller import Controller
from specinfer.engine.engine import Engine
from specinfer.engine.measure import Report
from specinfer.engine.sequence import Sequence
from specinfer.engine.times import StepTimes
from specinfer.errors import CapacityError, ConfigError, RequestError
from specinfer.models.decoder import Decoder
from specinfer.request import SamplingParams
from specinfer.tree import TokenTree
from tests.engines import (
    LETTERS,
    ScriptedDrafter,
    Told,
    finish,
    free_blocks,
    fresh_keys_and_values,
    keys_and_values,
    model_drafter,
    outputs_of,
    toy_decoder,
    toy_engine,
    toy_tokenizer,
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


# --- how much is speculated -----------------------------------------------------------------------

GREEDY = SamplingParams(max_tokens=24, temperature=0.0)
SHORT = EngineConfig(block_size=4, max_num_seqs=8)


def times(token_s: float, first_s: float = 1e-2) -> StepTimes:
    """A step of one token takes `first_s`, every further one adds `token_s`."""
    sizes = [1, 8, 64, 512]
    return StepTimes(sizes, [first_s + token_s * (size - 1) for size in sizes])


def measured(token_s: float, *drafter_s: float | None) -> Callable[[Report | None], Controller]:
    """Measures nothing: a target as in `times`, and drafters with so long a pass."""

    def measure(report: Report | None) -> Controller:
        drafters = [None if each is None else times(0.0, each) for each in drafter_s]
        return Told(times(token_s), [*drafters, None])

    return measure


@pytest.fixture(scope="module")
def plain(target: Decoder) -> list[Sequence]:
    """Eight greedy texts."""
    return run(toy_engine(target, num_blocks=400), random_prompts(8), [GREEDY] * 8)


def num_drafted(sequences: list[Sequence]) -> int:
    return sum(sequence.stats.num_drafted for sequence in sequences)


def test_auto_drafts_nothing_where_nodes_are_dear_and_much_where_they_are_not(
    target: Decoder, plain: list[Sequence]
) -> None:
    drafted = {}
    for token_s in (0.0, 2e-3, 1.0):
        engine = engine_with(
            target, target, config=SHORT, measure=measured(token_s, 1e-4), num_blocks=800
        )
        # The first step computes prompts, so that a token is cheaper than it will be.
        prompts = [[1, *sequence.tokens[:-24]] for sequence in plain]
        sequences = run(engine, prompts, [GREEDY] * 8)
        assert outputs_of(sequences) == outputs_of(
            run(toy_engine(target, num_blocks=400), prompts, [GREEDY] * 8)
        )
        drafted[token_s] = num_drafted(sequences)
    assert drafted[0.0] > drafted[2e-3] > 0
    assert drafted[1.0] == 0
    assert all(s.stats.tokens_per_step == 1.0 for s in sequences)


def test_every_request_may_speculate_in_its_own_way(
    target: Decoder, other: Decoder, plain: list[Sequence]
) -> None:
    ways: list[Any] = [
        None,
        {"tree": "off"},
        {"tree": "2,2"},
        {"tree": "4x3"},
        {"tree": "calibrated", "max_nodes": 7},
        {"tree": "best-first", "max_depth": 2},
        Speculation(tree="sequoia"),
        {"tree": "1,1,1,1", "control": "gammatune"},
    ]
    params = [SamplingParams(max_tokens=24, temperature=0.0, speculation=way) for way in ways]
    engine = engine_with(target, other, config=SHORT, num_blocks=1000, measure=measured(1e-5, 1e-4))
    sequences = [
        s for n, p in enumerate(random_prompts(8)) for s in engine.add(str(n), p, params[n])
    ]
    trees: dict[int, list[TokenTree]] = {}
    while engine.has_work:
        for trace in engine.step():
            trees.setdefault(trace.sequence.number, []).append(trace.tree)
    assert outputs_of(sequences) == outputs_of(plain)
    assert free_blocks(engine) == 1000
    for number, most, deepest in ((1, 0, 0), (2, 6, 2), (3, 12, 3), (4, 7, 16), (5, 32, 2)):
        assert max(tree.num_drafted for tree in trees[number]) <= most
        assert max(max(tree.depths) for tree in trees[number]) <= deepest
    assert all(num_drafted([s]) > 0 for s in (sequences[0], *sequences[2:]))
    own = SamplingParams(max_tokens=4, speculation={"tree": "40,40"})
    with pytest.raises(CapacityError, match="a tree of 1640 nodes"):
        engine_with(target, other, num_blocks=100).add("big", [1], own)
    with pytest.raises(ConfigError, match="needs a drafter"):
        toy_engine(target).add("none", [1], own)


# --- predictions ----------------------------------------------------------------------------------


def predicted(prediction: list[int] | str, **changes: Any) -> SamplingParams:
    return SamplingParams(max_tokens=24, temperature=0.0, prediction=prediction, **changes)


@pytest.mark.parametrize("with_drafter", [False, True])
def test_a_true_prediction_gives_many_tokens_and_a_false_one_none(
    target: Decoder, other: Decoder, plain: list[Sequence], with_drafter: bool
) -> None:
    drafters = [other] if with_drafter else []
    measure = measured(1e-5, *[1e-4] * with_drafter)
    engine = engine_with(target, *drafters, config=SHORT, measure=measure, num_blocks=800)
    answers = [sequence.output.token_ids for sequence in plain]
    right = run(engine, random_prompts(8), [predicted(answer) for answer in answers])
    assert outputs_of(right) == outputs_of(plain)
    assert max(sequence.stats.num_target_steps for sequence in right) <= 7
    assert sum(s.stats.accepted_by_source.get("prediction", 0) for s in right) > 40
    wrong = run(engine, random_prompts(8), [predicted([23] * 24)] * 8)
    assert outputs_of(wrong) == outputs_of(plain)
    if not with_drafter:
        assert min(sequence.stats.tokens_per_step for sequence in right) > 3


def test_a_prediction_begins_with_the_first_token_of_the_output(
    target: Decoder, plain: list[Sequence]
) -> None:
    """A chain of 5 follows a true prediction without ever losing its place."""
    engine = toy_engine(target, num_blocks=400)
    answer = plain[0].output.token_ids
    (sequence,) = run(
        engine, [plain[0].tokens[:-24]], [predicted(answer, speculation={"tree": "1,1,1,1,1"})]
    )
    assert sequence.tokens == plain[0].tokens
    assert sequence.stats.num_target_steps == 1 + -(-23 // 6)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_seed_gives_one_text_with_any_prediction(target: Decoder, temperature: float) -> None:
    fields: dict[str, Any] = {"max_tokens": 16, "temperature": temperature, "seed": 3}
    (alone,) = run(toy_engine(target), [[1, 2]], [SamplingParams(**fields)])
    for prediction in (alone.output.token_ids, [5, 6, 7]):
        (sequence,) = run(
            toy_engine(target, num_blocks=100),
            [[1, 2]],
            [SamplingParams(**fields, prediction=prediction)],
        )
        assert outputs_of([sequence]) == outputs_of([alone])


def test_a_prediction_needs_tokens_that_the_model_has(target: Decoder) -> None:
    engine = toy_engine(target)
    engine.tokenizer = toy_tokenizer(VOCAB + 1)  # that knows more than the model
    for bad in ([1, VOCAB], LETTERS[VOCAB]):
        with pytest.raises(RequestError, match=f"the prediction has token id {VOCAB} "):
            engine.add("bad", [1], predicted(bad))
    for nothing in ([], ""):
        (sequence,) = run(engine, [[1]], [SamplingParams(max_tokens=3, prediction=nothing)])
        assert num_drafted([sequence]) == 0


def test_times_are_measured_when_they_are_first_needed_and_nothing_runs(target: Decoder) -> None:
    calls = []

    def measure(report: Report | None) -> Controller:
        calls.append(engine.scheduler.running[:])
        return measured(1e-5)(report)

    engine = toy_engine(target, num_blocks=400, measure=measure)
    (plain,) = run(engine, [[1, 2, 3]], [GREEDY])
    assert calls == [], "nothing that was asked for needs times"
    answer = plain.output.token_ids
    engine.add("runs", [4, 5], GREEDY)
    engine.step()
    (late,) = engine.add("waits", [1, 2, 3], predicted(answer))
    finish(engine)
    assert calls == [], "the pages are in use"
    assert late.tokens == plain.tokens
    assert num_drafted([late]) == 0
    (sequence,) = run(engine, [[1, 2, 3]], [predicted(answer)])
    assert calls == [[]]
    assert sequence.tokens == plain.tokens
    assert sequence.stats.tokens_per_step > 3
    run(engine, [[1, 2, 3]], [predicted(answer)])
    engine.measure()
    assert len(calls) == 1


def test_auto_takes_the_room_that_is_left(target: Decoder) -> None:
    """A tree of no given size is no reason to refuse a request that fits without one."""
    for num_blocks, most in ((12, 0), (13, 4)):
        engine = toy_engine(target, num_blocks=num_blocks)
        (sequence,) = engine.add("full", [1] * 40, SamplingParams(max_tokens=8, prediction=[1]))
        assert sequence.max_nodes == most
        finish(engine)
        assert sequence.num_output == 8


# --- several drafters -----------------------------------------------------------------------------


def test_ngrams_alone_are_a_drafter(target: Decoder, plain: list[Sequence]) -> None:
    engine = toy_engine(
        target, [NgramDrafter()], config=SHORT, num_blocks=800, measure=measured(1e-5, None)
    )
    prompts = [sequence.tokens for sequence in plain]  # that say already what comes
    params = SamplingParams(max_tokens=20, temperature=0.0)
    engine.max_model_len = 100
    expected = toy_engine(target, num_blocks=400, max_model_len=100)
    again = run(engine, prompts, [params] * 8)
    assert outputs_of(again) == outputs_of(run(expected, prompts, [params] * 8))
    assert {name for s in again for name in s.stats.accepted_by_source} == {"ngram"}
    assert not engine.speculator.drafters[0]._drafter._states, "what ended is forgotten"  # type: ignore[attr-defined]


def test_two_models_are_both_tried_and_the_better_is_kept(target: Decoder, other: Decoder) -> None:
    engine = engine_with(
        target,
        other,
        target,
        config=SHORT,
        measure=measured(1e-5, 1e-3, 1e-3),
        num_blocks=800,
        max_model_len=100,
    )
    params = SamplingParams(max_tokens=60, temperature=0.0, ignore_eos=True)
    expected = run(
        toy_engine(target, num_blocks=400, max_model_len=100), [[1, 2]] * 3, [params] * 3
    )
    chosen: list[tuple[int, ...]] = []
    for _ in range(3):
        (sequence,) = engine.add("one", [1, 2], params)
        while engine.has_work:
            engine.step()
            chosen.append(tuple(sorted({one.source for one in engine.stats.passes})))
        assert sequence.tokens == expected[0].tokens
    assert {(0,), (1,), (0, 1)} <= set(chosen)
    assert chosen.count((1,)) > chosen.count((0,)) + chosen.count((0, 1))
    for drafter in engine.speculator.drafters[:2]:
        assert not drafter._drafter._states  # type: ignore[attr-defined]


def test_a_text_may_outgrow_all_models_that_were_chosen_among(
    target: Decoder, other: Decoder
) -> None:
    """Then n-grams alone are asked, which is none of the choices."""
    models = [model_drafter(each, 3200) for each in (target, other)]
    for model in models:
        model.max_positions = 24
    engine = toy_engine(
        target, [*models, NgramDrafter()], num_blocks=800, measure=measured(1e-5, 1e-3, 1e-3, None)
    )
    params = SamplingParams(max_tokens=44, temperature=0.0)
    (sequence,) = run(engine, [[1, 2]], [params])
    assert sequence.choice is not None
    assert "ngram" in sequence.stats.accepted_by_source
    assert outputs_of([sequence]) == outputs_of(
        run(toy_engine(target, num_blocks=400), [[1, 2]], [params])
    )


@pytest.mark.parametrize("verifier", ["kseq", "gbv"])
def test_verifiers_for_one_drafter_refuse_two(
    target: Decoder, other: Decoder, verifier: VerifierName
) -> None:
    speculation = Speculation(tree="4x2", verifier=verifier)
    with pytest.raises(ConfigError, match="exact for one drafter alone"):
        engine_with(target, other, target, speculation=speculation)
    engine = engine_with(target, other, speculation=speculation)
    with pytest.raises(ConfigError, match="exact for one drafter alone"):
        engine.add("predicted", [1], SamplingParams(prediction=[1, 2]))
    assert not engine.has_work


# --- chains whose length is set by others ---------------------------------------------------------


@pytest.mark.parametrize("control", ["gammatune", "smartspec"])
def test_a_controlled_chain_has_many_lengths_and_the_same_text(
    target: Decoder, other: Decoder, plain: list[Sequence], control: Any
) -> None:
    speculation = Speculation(tree="1,1,1,1,1,1", control=control)
    engine = engine_with(
        target,
        other,
        speculation=speculation,
        config=SHORT,
        measure=measured(1e-4, 1e-3),
        num_blocks=800,
    )
    engine.measure()
    sequences = [s for n, p in enumerate(random_prompts(8)) for s in engine.add(str(n), p, GREEDY)]
    lengths = set()
    while engine.has_work:
        for trace in engine.step():
            assert max(trace.tree.depths) == trace.tree.num_drafted <= 6
            if trace.sequence.num_left > 6:
                lengths.add(trace.tree.num_drafted)
    assert outputs_of(sequences) == outputs_of(plain)
    assert len(lengths - {0}) > 1
    if control == "gammatune":
        assert not engine.speculator._chains[speculation]._states  # type: ignore[attr-defined]


def test_smartspec_needs_a_model_to_draft(target: Decoder) -> None:
    speculation = Speculation(tree="1,1", control="smartspec")
    with pytest.raises(ConfigError, match="needs a model as the first drafter"):
        toy_engine(target, [NgramDrafter()], speculation=speculation)


def test_smartspec_looks_again_after_it_drafted_nothing_for_long() -> None:
    long = toy_decoder(7, vocab_size=VOCAB, max_position_embeddings=256)
    engine = engine_with(
        long,
        long,
        speculation=Speculation(tree="1,1,1", control="smartspec"),
        measure=measured(1.0, 1e-3),
        max_model_len=200,
    )
    (sequence,) = run(
        engine, [[1, 2]], [SamplingParams(max_tokens=150, temperature=0.0, ignore_eos=True)]
    )
    assert 1 <= num_drafted([sequence]) <= 3


# --- latency goals --------------------------------------------------------------------------------


class Clock:
    """Time that passes as it is told."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in ("engine", "speculator"):
        monkeypatch.setattr(f"specinfer.engine.{module}.time", clock)
    return clock


def test_goals_are_met_or_missed(
    target: Decoder, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    engine = toy_engine(target)
    goals = (0.6, 0.5, 0.4, None)
    params = [
        SamplingParams(max_tokens=5, temperature=0.0, ignore_eos=True, target_tpot_s=goal)
        for goal in goals
    ]
    sequences = [s for n in range(4) for s in engine.add(f"r{n}", [1, 2], params[n])]
    (single,) = engine.add("one token", [3], SamplingParams(max_tokens=1, target_tpot_s=1e-4))
    with caplog.at_level("INFO", logger="specinfer"):
        while engine.has_work:
            clock.now += 0.5
            engine.step()
    assert [s.stats.tpot_s for s in sequences] == pytest.approx([0.5] * 4)
    assert single.stats.tpot_s == 0.0, "one token has no pace"
    assert (engine.stats.num_goals, engine.stats.num_goals_met) == (3, 2)
    assert caplog.messages == [
        "request r0: 500.0 ms per output token, goal 600.0 ms met (1 of 1 so far)",
        "request r1: 500.0 ms per output token, goal 500.0 ms met (2 of 2 so far)",
        "request r2: 500.0 ms per output token, goal 400.0 ms missed (2 of 3 so far)",
    ]
    engine.stats.reset()
    assert (engine.stats.num_goals, engine.stats.num_goals_met) == (0, 0)


def test_a_late_sequence_gets_more_of_a_step_than_an_early_one(
    target: Decoder, other: Decoder, clock: Clock
) -> None:
    engine = engine_with(target, other, measure=measured(2e-3, 1e-4), config=SHORT)
    engine.measure()
    drafted: dict[str, int] = {"late": 0, "early": 0, "whenever": 0}
    for name, goal in (("late", 1e-2), ("early", 1.0), ("whenever", None)):
        goals = {"target_tpot_s": goal} if goal else {}
        engine.add(name, [1, 2], SamplingParams(max_tokens=24, temperature=0.0, **goals))
    texts = set()
    while engine.has_work:
        clock.now += 0.1
        for trace in engine.step():
            drafted[trace.sequence.request_id] += trace.tree.num_drafted
            if trace.sequence.is_finished:
                texts.add(trace.sequence.output.text)
    assert drafted["late"] > drafted["whenever"] > drafted["early"]
    assert len(texts) == 1


# --- logits that are not finite -------------------------------------------------------------------

KINDS = [
    SamplingParams(temperature=0, max_tokens=12),
    SamplingParams(temperature=0.8, seed=5, max_tokens=12),
    SamplingParams(temperature=0.8, top_k=9, max_tokens=12),
    SamplingParams(temperature=0.8, top_p=0.9, max_tokens=12),
    SamplingParams(temperature=0.8, min_p=0.05, max_tokens=12),
    SamplingParams(temperature=0, presence_penalty=0.5, max_tokens=12),
]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("tree", ["off", "2,2,1"])
def test_a_request_without_a_law_ends_alone(
    value: float, tree: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All rows of one request, of each kind, at its second token; -inf as a whole row."""
    target = toy_decoder(7)

    def outputs(broken: int | None) -> tuple[list[list[int]], list[str]]:
        drafters = [] if tree == "off" else [model_drafter(toy_decoder(8), 1600)]
        engine = toy_engine(target, drafters, num_blocks=400, speculation=Speculation(tree=tree))
        full = free_blocks(engine)
        sequences = [
            engine.add(str(number), [1 + number, 2, 3, 4, 5], params)[0]
            for number, params in enumerate(KINDS)
        ]
        run = engine.target.run

        def run_broken(spans: Any) -> Tensor:
            logits = run(spans).clone()
            if broken is not None and sequences[broken].num_output == 1:
                pages, start = sequences[broken].pages, 0
                for span in spans:
                    if span.pages is pages:
                        columns = slice(None) if value < 0 else 3
                        logits[start : start + span.num_logits, columns] = value
                    start += span.num_logits
            return logits

        monkeypatch.setattr(engine.target, "run", run_broken)
        ended = []
        while engine.has_work:
            engine.step()
            ended += [sequence.request_id for sequence in engine.broken]
        assert free_blocks(engine) == full
        return [sequence.output.token_ids for sequence in sequences], ended

    plain, none = outputs(None)
    assert none == []
    for broken in range(len(KINDS)):
        told, ended = outputs(broken)
        assert ended == [str(broken)]
        assert told[:broken] + told[broken + 1 :] == plain[:broken] + plain[broken + 1 :]
        assert told[broken] == plain[broken][:1]


def test_what_a_request_without_a_law_computed_is_not_read_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = toy_engine(toy_decoder(7))
    prompt = list(range(1, 12))
    run = engine.target.run
    monkeypatch.setattr(engine.target, "run", lambda spans: run(spans) * math.nan)
    engine.add("a", prompt, SamplingParams(temperature=0, max_tokens=4))
    engine.step()
    assert [sequence.request_id for sequence in engine.broken] == ["a"]
    assert not engine.has_work
    monkeypatch.setattr(engine.target, "run", run)
    [again] = engine.add("b", prompt, SamplingParams(temperature=0, max_tokens=4))
    engine.step()
    assert engine.broken == ()
    assert again.stats.num_cached_tokens == 0
    finish(engine)
    assert len(again.output.token_ids) == 4
