"""Traced steps: what they say is true, the text is the same, and nobody else pays for it."""

from typing import Any

import pytest
import torch

from specinfer.config import EngineConfig, Speculation
from specinfer.engine import tracing
from specinfer.engine.controller import Controller
from specinfer.engine.engine import Engine
from specinfer.engine.sequence import Sequence
from specinfer.engine.times import StepTimes
from specinfer.llm import Pending
from specinfer.logits import RowFilters, target_laws
from specinfer.models.decoder import Decoder
from specinfer.request import SamplingParams
from specinfer.tree import TokenTree
from tests.engines import (
    ScriptedDrafter,
    Told,
    far_away,
    finish,
    fresh_logits,
    model_drafter,
    outputs_of,
    toy_decoder,
    toy_engine,
)

VOCAB = 24
PROMPT = [3, 1, 4, 1, 5]
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 0.8, "top_p": 0.9},
    "seeded": {"temperature": 0.8, "seed": 5},
}
TREES = ("calibrated", "2,2,1,1")


@pytest.fixture(scope="module")
def target() -> Decoder:
    return toy_decoder(7, vocab_size=VOCAB, num_hidden_layers=2)


@pytest.fixture(scope="module")
def other() -> Decoder:
    return toy_decoder(8, vocab_size=VOCAB, num_hidden_layers=1, hidden_size=16)


def engine_of(target: Decoder, other: Decoder, tree: str = "calibrated", **options: Any) -> Engine:
    drafters = [model_drafter(other, 256)]
    return toy_engine(target, drafters, speculation=Speculation(tree=tree), **options)


def traced(engine: Engine, **fields: Any) -> Sequence:
    params = SamplingParams(**({"max_tokens": 20, "include_tree": True} | fields))
    (sequence,) = engine.add("0", PROMPT, params)
    finish(engine)
    return sequence


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("way", WAYS)
def test_p_is_what_the_target_says_of_each_token(
    target: Decoder, other: Decoder, way: str, tree: str
) -> None:
    sequence = traced(engine_of(target, other, tree), **WAYS[way])
    params = SamplingParams(**WAYS[way])

    def law(tokens: list[int]) -> torch.Tensor:
        logits = fresh_logits(target, tokens)[-1:]
        if params.is_greedy:
            return torch.softmax(logits, -1)[0]
        return target_laws(logits, RowFilters.of([(params, 1)]))[0]

    known = list(PROMPT)
    assert sum(len(step.nodes) > 1 for step in sequence.trees) > 2
    for number, step in enumerate(sequence.trees, start=1):
        assert step.step == number
        assert step.nodes[0].token_id == known[-1]
        paths = [known]
        for node in step.nodes[1:]:
            before = paths[node.parent]
            assert node.p == pytest.approx(float(law(before)[node.token_id]), abs=1e-5)
            paths.append([*before, node.token_id])
        for token in step.emitted:
            assert token.p == pytest.approx(float(law(known)[token.token_id]), abs=1e-5)
            assert token.p > 0
            known.append(token.token_id)
    assert known == sequence.tokens


@pytest.mark.parametrize("is_far", [False, True])
def test_who_proposed_what_and_with_which_chance(
    target: Decoder, other: Decoder, monkeypatch: pytest.MonkeyPatch, is_far: bool
) -> None:
    """q is that of the slot's own law, what was drawn before it taken out."""
    if is_far:
        far_away(monkeypatch, support=5)
    trees: list[TokenTree] = []
    original = tracing._nodes

    def noting(work: Any, *rest: Any) -> Any:
        trees.append(work.tree)
        return original(work, *rest)

    monkeypatch.setattr(tracing, "_nodes", noting)
    sequence = traced(engine_of(target, other), temperature=1.2, max_tokens=30)
    num_seen = 0
    for step, tree in zip(sequence.trees, trees, strict=True):
        for node, shown in enumerate(step.nodes):
            slots = [slot for slot in tree.slots if slot.node == node]
            assert [each.source for each in shown.slots] == ["toy"] * len(slots)
            for each, slot in zip(shown.slots, slots, strict=True):
                assert slot.law is not None
                (column,) = slot.law.columns((shown.token_id,))
                assert each.q == pytest.approx(slot.law.dense()[column], rel=1e-4)
                num_seen += bool(slot.law.seen)
        accepted = [node.token_id for node in step.nodes if node.accepted]
        drafted = [token for token in step.emitted if token.source == "toy"]
        assert accepted == [token.token_id for token in drafted]
        assert step.emitted[: len(drafted)] == tuple(drafted)
        assert len(step.emitted) - len(drafted) in (0, 1)
        ratios = [slot.ratio for node in step.nodes if node.accepted for slot in node.slots]
        assert None not in ratios
    assert num_seen > 0


def test_picks_have_chance_one_and_what_their_drafter_thought(
    target: Decoder, other: Decoder
) -> None:
    step = traced(engine_of(target, other), temperature=0.0).trees[1]
    thought = torch.softmax(fresh_logits(other, [*PROMPT, step.nodes[0].token_id])[-1], -1)
    first = [node for node in step.nodes if node.parent == 0]
    assert first
    left = 1.0
    for node in sorted(first, key=lambda node: -float(thought[node.token_id])):
        (slot,) = node.slots
        assert slot.q == 1.0
        assert slot.score == pytest.approx(float(thought[node.token_id]) / left, abs=1e-5)
        left -= float(thought[node.token_id])


@pytest.mark.parametrize("fields", [{}, {"stop": "gh"}, {"max_tokens": 7}])
def test_the_texts_put_together_are_the_text(
    target: Decoder, other: Decoder, fields: dict[str, Any]
) -> None:
    """Also where a stop string holds text back and cuts it."""
    whole = traced(engine_of(target, other), temperature=0.0, max_tokens=40)
    stops = {"stop": whole.output.text[5:8]} if "stop" in fields else {}
    sequence = traced(engine_of(target, other), temperature=0.0, **(fields | stops))
    assert bool(stops) == (sequence.output.finish_reason == "stop")
    tokens = [token for step in sequence.trees for token in step.emitted]
    assert "".join(token.text for token in tokens) == sequence.output.text
    assert [token.token_id for token in tokens] == sequence.output.token_ids


@pytest.mark.parametrize("way", WAYS)
def test_looking_changes_nothing(target: Decoder, other: Decoder, way: str) -> None:
    """Same tokens beside others, traced or not; each sample of a request has its own steps."""
    params = [
        SamplingParams(max_tokens=16, n=2, **WAYS[way]),
        SamplingParams(max_tokens=9, temperature=0.0),
    ]
    texts = []
    for is_traced in (False, True):
        engine = engine_of(target, other, config=EngineConfig(block_size=4, max_num_seqs=3))
        sequences = []
        for number, each in enumerate(params):
            fields = {name: getattr(each, name) for name in each.__slots__}
            fields["include_tree"] = is_traced and number == 0
            sequences += engine.add(str(number), PROMPT, SamplingParams(**fields))
        finish(engine)
        texts.append(outputs_of(sequences))
        assert [bool(sequence.trees) for sequence in sequences] == [is_traced, is_traced, False]
        assert [step.index for step in sequences[1].trees] == [1] * len(sequences[1].trees)
        assert all(step.num_sequences <= 3 for step in sequences[0].trees)
    assert texts[0] == texts[1]


def test_who_does_not_ask_does_not_pay(
    target: Decoder, other: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("nobody asked")

    monkeypatch.setattr(tracing, "laws_of", refuse)
    monkeypatch.setattr(tracing, "_nodes", refuse)
    sequence = traced(engine_of(target, other), temperature=0.0, include_tree=False)
    assert sequence.output.finish_reason == "length"
    assert sequence.trees == []
    assert sequence.text_ends == []
    with pytest.raises(AssertionError, match="nobody asked"):
        traced(engine_of(target, other), temperature=0.0)


def test_an_output_takes_the_steps_since_the_last_one(target: Decoder, other: Decoder) -> None:
    engine = engine_of(target, other)
    params = SamplingParams(temperature=0.0, max_tokens=20, include_tree=True)
    request = Pending("0", None, PROMPT, engine.add("0", PROMPT, params))
    steps = []
    while engine.has_work:
        engine.step()
        output = request.output()
        assert len(output.trees) == 1
        steps += output.trees
    assert request.output().trees == []
    assert [step.step for step in steps] == list(range(1, len(steps) + 1))


def test_times_of_a_step_and_of_a_plain_one(target: Decoder) -> None:
    drafter = ScriptedDrafter(lambda known, path: [1, 2], VOCAB)
    engines = []

    def measure(_: object) -> Controller:
        times = StepTimes([1, 64], [0.010, 0.020])
        return Told(times, [StepTimes([1, 64], [0.001, 0.002]), None])

    for each in (None, measure):
        engines.append(toy_engine(target, [drafter], measure=each))
    unmeasured, measured = (traced(engine, temperature=0.0) for engine in engines)
    assert {step.plain_s for step in unmeasured.trees} == {None}
    host_s = 0.003
    for step in measured.trees[1:]:
        assert step.plain_s is not None
        assert 0.010 < step.plain_s < 0.010 + host_s
        assert step.seconds["target"] > 0
        assert set(step.seconds) == {*("schedule", "draft", "grow", "target", "verify", "commit")}
