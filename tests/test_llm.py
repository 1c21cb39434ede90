"""The offline face: streams beside each other, input of every wrong kind, failures in a step."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from specinfer.config import Speculation
from specinfer.draft.calibration import Calibration
from specinfer.errors import ConfigError, ModelError, RequestError, SpecInferError
from specinfer.llm import LLM
from specinfer.request import SamplingParams

GREEDY = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
OTHER = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("zoo:parley-draft", drafters="zoo:parley-draft", dtype="float32", max_model_len=128)


def test_streams_beside_each_other_and_beside_generate_each_come_to_their_end(llm: LLM) -> None:
    expected = llm.generate(["One day", "I want"], GREEDY)
    streams = [llm.stream("One day", GREEDY), llm.stream("I want", GREEDY)]
    last = [next(stream) for stream in streams]
    short = llm.generate("Hello", OTHER)
    assert short[0].finished
    for turn, stream in enumerate(streams):
        for output in stream:
            last[turn] = output
    for output, want in zip(last, expected, strict=True):
        assert output.finished
        assert output.outputs[0].token_ids == want.outputs[0].token_ids
    assert not llm.engine.has_work


@pytest.mark.parametrize(
    "changes",
    [
        {"max_tokens": 2.5},
        {"temperature": "0.5"},
        {"top_p": None},
        {"n": True},
        {"seed": 1.0},
        {"stop": 5},
        {"stop": [b"x"]},
        {"stop_token_ids": ["a"]},
        {"stop_token_ids": [-1]},
        {"prediction": 5},
        {"prediction": [1.5]},
        {"prediction": np.array([1, 2])},
        {"speculation": "off"},
        {"speculation": {"trees": "off"}},
        {"speculation": {"tree": 3}},
        {"target_tpot_s": 0},
        {"target_tpot_s": "fast"},
    ],
)
def test_parameters_of_the_wrong_kind(changes: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        SamplingParams(**changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("prompt", [[5, 2.5], [5, 10**6], [-1], [None]])
def test_prompts_that_are_no_tokens(llm: LLM, prompt: list[int]) -> None:
    with pytest.raises(RequestError):
        llm.generate(prompt, GREEDY)
    assert not llm.engine.has_work


def test_stop_tokens_that_the_model_does_not_have(llm: LLM) -> None:
    params = SamplingParams(temperature=0, min_tokens=2, max_tokens=4, stop_token_ids=[10**6])
    with pytest.raises(RequestError, match="stop_token_ids"):
        llm.generate("Hello", params)


def test_token_ids_of_any_integer_kind(llm: LLM) -> None:
    ids = llm.tokenizer.encode("Once upon a time")
    plain = llm.generate(ids, OTHER)[0].outputs[0].token_ids
    assert llm.generate([np.array(ids)], OTHER)[0].outputs[0].token_ids == plain


def test_an_empty_conversation(llm: LLM) -> None:
    with pytest.raises(RequestError, match="empty"):
        llm.chat([])


@pytest.mark.parametrize("part", ["target", "drafter", "commit"])
def test_a_failed_step_ends_what_ran_and_nothing_else(
    llm: LLM, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = llm.generate("One day", GREEDY)[0].outputs[0].token_ids
    free = llm.engine.scheduler._allocator.num_free
    stream = llm.stream("I want", GREEDY)
    next(stream)
    owner = {
        "target": (llm.engine.target, "run"),
        "drafter": (llm.engine.speculator.drafters[0], "expand"),
        "commit": (llm.engine.target.pool, "move"),
    }[part]
    with monkeypatch.context() as patch:
        patch.setattr(*owner, lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            llm.generate("One day", GREEDY)
    assert [output.outputs[0].finish_reason for output in stream] == ["abort"]
    assert llm.engine.scheduler._allocator.num_free == free
    assert llm.generate("One day", GREEDY)[0].outputs[0].token_ids == expected


def test_logits_that_are_not_finite_are_told(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    run = llm.engine.target.run
    with monkeypatch.context() as patch:
        patch.setattr(llm.engine.target, "run", lambda spans: run(spans) * float("nan"))
        with pytest.raises(ModelError, match=r"logits for request .* are not finite"):
            llm.generate(["One day", "I want"], GREEDY)
        with pytest.raises(ModelError, match="not finite"):
            list(llm.stream("One day", GREEDY))
    assert not llm.engine.has_work
    assert llm.generate("One day", GREEDY)[0].finished


@pytest.mark.parametrize(
    ("speculation", "drafters"),
    [
        (Speculation(tree="2,2"), 0),
        (Speculation(verifier="topdown"), 0),
        (Speculation(tree="4,1", max_nodes=3), 1),
        (Speculation(tree="2,2", max_nodes=3), 2),
        (Speculation(tree="3000"), 1),
    ],
)
def test_speculation_that_would_come_to_nothing(speculation: Speculation, drafters: int) -> None:
    with pytest.raises(ConfigError):
        LLM("zoo:parley-draft", drafters=["zoo:parley-draft"] * drafters, speculation=speculation)


def test_max_nodes_counts_all_drafters() -> None:
    speculation = Speculation(tree="2,2", max_nodes=6)
    assert speculation.num_nodes(1) == 6
    assert speculation.num_nodes(2) == 4


@pytest.mark.parametrize("name", ["x" * 300, "~nosuchuser/model", "", "a b"])
def test_names_that_are_no_model(name: str) -> None:
    with pytest.raises(SpecInferError):
        LLM(name)


# --- what may help to guess -----------------------------------------------------------------------


def test_a_prediction_may_be_text_or_tokens(llm: LLM) -> None:
    params: dict[str, Any] = {"temperature": 0.0, "max_tokens": 40, "ignore_eos": True}
    [plain] = llm.generate("One day", SamplingParams(**params, speculation={"tree": "off"}))
    choice = plain.outputs[0]
    assert plain.stats.tokens_per_step == 1.0
    for prediction in (choice.text, choice.token_ids, tuple(choice.token_ids)):
        [output] = llm.generate("One day", SamplingParams(**params, prediction=prediction))
        assert output.outputs[0].token_ids == choice.token_ids
        assert output.stats.accepted_by_source["prediction"] > 10
        assert output.stats.tokens_per_step > 3
    with pytest.raises(RequestError, match="the prediction has token id 1000000"):
        llm.generate("One day", SamplingParams(prediction=[1, 10**6]))
    assert not llm.engine.has_work


def test_a_prediction_needs_no_drafter() -> None:
    """Nor more memory than there is: the whole context, and pages for one request."""
    llm = LLM("zoo:parley-draft", dtype="float32", max_model_len=64, max_num_seqs=1)
    assert llm.engine.speculator.controller is None, "nothing to speculate with, nothing measured"
    params = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True)
    [plain] = llm.generate("One day", params)
    prediction = plain.outputs[0].text
    again = SamplingParams(temperature=0, max_tokens=None, ignore_eos=True, prediction=prediction)
    [output] = llm.generate("One day", again)
    assert output.outputs[0].token_ids == plain.outputs[0].token_ids
    assert output.stats.tokens_per_step > 3
    assert llm.engine.speculator.controller is not None


def test_calibration_is_kept_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "learnt.json"
    options: dict[str, Any] = {"drafters": "ngram", "dtype": "float32", "max_model_len": 64}
    options["speculation"] = Speculation(tree="calibrated")
    llm = LLM("zoo:parley-draft", calibration=file, **options)
    assert not file.exists()
    llm.generate("One day One day One day", GREEDY)
    llm.save_calibration()
    table = llm.engine.speculator.calibration.table("ngram", "greedy")
    prior = Calibration().table("ngram", "greedy")
    assert table.after.trials.sum() > prior.after.trials.sum()
    known = LLM("zoo:parley-draft", calibration=str(file), **options).engine.speculator.calibration
    assert known.table("ngram", "greedy").after.hits == pytest.approx(table.after.hits, abs=1e-3)
    llm.save_calibration(tmp_path / "other.json")
    assert (tmp_path / "other.json").read_text() == file.read_text()
    file.write_text("[]")
    with pytest.raises(ConfigError, match="cannot be read") as caught:
        LLM("zoo:parley-draft", calibration=file, **options)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="has no file"):
        LLM("zoo:parley-draft", **options).save_calibration()


def test_a_latency_goal_is_reported(llm: LLM) -> None:
    llm.engine.stats.reset()
    params = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, target_tpot_s=1e3)
    [output] = llm.generate("One day", params)
    assert 0 < output.stats.tpot_s < 1e3
    assert (llm.engine.stats.num_goals, llm.engine.stats.num_goals_met) == (1, 1)
