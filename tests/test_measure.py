"""How steps are measured and kept: on a clock that the tests move, and on toy models."""

import json
import logging
import random
import time
from collections.abc import Callable, Sequence
from copy import copy
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from torch import Tensor

from specinfer.engine import measure
from specinfer.engine.measure import (
    SHAPES,
    Shape,
    measure_models,
    measure_runner,
    measure_step,
    model_identity,
)
from specinfer.engine.times import StepTimes
from specinfer.paths import cache_folder
from specinfer.progress import show_measuring
from specinfer.run.batch import Span
from specinfer.run.runner import Runner
from tests.engines import chain, fresh_logits, run_pages, toy_decoder


class Machine:
    """Steps that take what a law says on a clock of its own."""

    def __init__(
        self, law: Callable[[int, int], float], noise: Callable[[int], float] | None = None
    ) -> None:
        self.now = 100.0
        self.runs: list[Shape] = []
        self._law = law
        self._noise = noise

    def run(self, num_tokens: int, num_spans: int) -> None:
        self.runs.append(Shape(num_tokens, num_spans))
        noise = self._noise(len(self.runs)) if self._noise else 1.0
        self.now += self._law(num_tokens, num_spans) * noise

    def measure(self, budget_s: float, **options: object) -> StepTimes:
        return measure_step(self.run, SHAPES, budget_s=budget_s, clock=lambda: self.now, **options)


def small(num_tokens: int, num_spans: int) -> float:
    """The bundled pair's target, about."""
    return 2.7e-3 + 8e-5 * num_tokens + 1.6e-4 * (num_spans - 1)


@pytest.mark.parametrize("span_s", [0.0, 1.6e-4, 1e-2])
def test_times_and_the_price_of_spans_are_found(span_s: float) -> None:
    machine = Machine(lambda n, spans: 3e-3 + 8e-5 * n + span_s * (spans - 1))
    times = machine.measure(10.0)
    assert list(times.sizes) == sorted(n for n, spans in SHAPES if spans == 1)
    assert times.span_s == pytest.approx(span_s, abs=1e-9)
    assert times.seconds(64, 20) == pytest.approx(3e-3 + 8e-5 * 64 + 19 * span_s)


def test_busy_moments_and_the_first_run_of_a_shape_do_not_count() -> None:
    rng = random.Random(1)

    def noise(_: int) -> float:
        is_first = machine.runs[-1] != (machine.runs[-2] if len(machine.runs) > 1 else None)
        return (1.4 if is_first else 1.0) * (8.0 if rng.random() < 0.1 else 1.0)

    machine = Machine(small, noise)
    times = machine.measure(30.0)
    assert times.spread < 0.25
    for size in (1, 6, 7, 64):
        assert times.seconds(size) == pytest.approx(small(size, 1), rel=0.01)


def test_a_machine_that_is_busy_is_noticed() -> None:
    assert Machine(small).measure(4.0).spread == pytest.approx(0.0, abs=1e-9)
    rng = random.Random(2)
    busy = Machine(small, lambda _: 1 + 9 * rng.random())
    assert busy.measure(30.0).spread > 0.25


def test_sizes_take_turns() -> None:
    machine = Machine(small)
    machine.measure(4.0, rounds=3)
    positions = [i for i, shape in enumerate(machine.runs) if shape == Shape(8, 1)]
    gaps = [b - a for a, b in pairwise(positions) if b - a > 1]
    assert len(gaps) == 3
    assert min(gaps) >= len(SHAPES) - 1


@pytest.mark.parametrize("step_s", [0.004, 0.075, 0.5, 3.0])
def test_a_slow_model_does_not_take_minutes(step_s: float) -> None:
    machine = Machine(lambda n, spans: step_s * (1 + n / 16 + spans / 50))
    times = machine.measure(4.0)
    assert machine.now - 100.0 <= max(1.3 * 4.0, 12 * step_s)
    assert times.sizes[:1] == (1,)
    assert len(times.sizes) >= 2
    assert times.seconds(64) == pytest.approx(step_s * (1 + 64 / 16 + 1 / 50), rel=0.1)
    counts = {shape: machine.runs.count(shape) for shape in set(machine.runs)}
    assert min(counts.values()) >= 3, "a warm-up and two rounds"


def test_progress_is_told_step_by_step() -> None:
    told: list[tuple[int, int]] = []
    Machine(small).measure(10.0, rounds=3, report=lambda *each: told.append(each))
    total = 3 * len(SHAPES)
    assert told == [(done, total) for done in range(total + 1)]


def test_one_busy_moment_does_not_leave_sizes_out() -> None:
    for busy in range(8):
        machine = Machine(small, lambda run, busy=busy: 30.0 if run == busy else 1.0)
        assert len(machine.measure(4.0).sizes) >= len(Machine(small).measure(4.0).sizes) - 1


@pytest.mark.parametrize("asked", [False, True])
def test_the_bar_counts_what_is_told(
    asked: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # a terminal, to rich
    monkeypatch.setenv("COLUMNS", "120")
    with show_measuring(asked) as report:
        assert (report is not None) == asked
        if report:
            report("zoo:parley", 0, 16)
            report("zoo:parley", 5, 16)
    shown = capsys.readouterr().err
    assert ("measuring zoo:parley" in shown) == ("5 of 16 steps" in shown) == asked


# --- runners --------------------------------------------------------------------------------------


def test_waiting_for_other_programs_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    runner = Runner(toy_decoder(), 100)
    run = runner.run

    def preempted(spans: Sequence[Span]) -> Tensor:
        start = time.perf_counter()
        logits = run(spans)
        time.sleep(time.perf_counter() - start)  # in every step alike: rounds do not differ
        return logits

    monkeypatch.setattr(runner, "run", preempted)
    assert measure_runner(runner, max_tokens=8, budget_s=0.1).spread > 0.25


@pytest.mark.parametrize("num_slots", [1, 2, 40, 300, 5000])
@pytest.mark.parametrize("max_tokens", [1, 24, 2048])
def test_any_pool_is_measured_within_its_bounds(num_slots: int, max_tokens: int) -> None:
    runner = Runner(toy_decoder(), num_slots)
    times = measure_runner(runner, max_tokens=max_tokens, budget_s=0.02)
    assert times.sizes[0] == 1
    assert times.sizes[-1] <= min(max_tokens, num_slots)


def test_a_window_and_few_positions_are_no_hindrance() -> None:
    decoder = toy_decoder(family="MistralForCausalLM", sliding_window=4, max_position_embeddings=16)
    assert measure_runner(Runner(decoder, 900), max_tokens=64, budget_s=0.05).seconds(9) > 0


def test_a_measured_runner_computes_what_it_computed() -> None:
    runner = Runner(toy_decoder(), 200)
    measure_runner(runner, max_tokens=64, budget_s=0.02)
    tokens = [3, 1, 4, 1, 5, 9]
    logits = runner.run([chain(tokens, run_pages(6), num_logits=6)])
    assert (logits == fresh_logits(toy_decoder(), tokens)).all()


# --- the cache on disk ----------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model's folder; its times are kept under tmp_path."""
    monkeypatch.setenv("SPECINFER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(measure, "TARGET_BUDGET_S", 0.02)
    monkeypatch.setattr(measure, "DRAFTER_BUDGET_S", 0.02)
    model = tmp_path / "model"
    model.mkdir()
    monkeypatch.setattr(measure, "_TRUSTED_SPREAD", 1e9)  # whatever else this machine does
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"weights")
    return model


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[Runner]:
    """Every runner that was measured, in order."""
    runners: list[Runner] = []

    def measuring(runner: Runner, **options: object) -> StepTimes:
        runners.append(runner)
        return real(runner, **options)

    real = measure.measure_runner
    monkeypatch.setattr(measure, "measure_runner", measuring)
    return runners


def get(folder: Path, runner: Runner, max_tokens: int = 8) -> StepTimes:
    (times,) = measure_models(["toy"], [folder], [runner], max_tokens=max_tokens)
    return times


def kept() -> list[Path]:
    return sorted((cache_folder() / "times").iterdir())


def test_a_model_is_measured_once(folder: Path, measured: list[Runner]) -> None:
    runner = Runner(toy_decoder(), 100)
    first, second = get(folder, runner), get(folder, runner)
    assert measured == [runner]
    assert (first.table(20) == second.table(20)).all()
    assert [file.suffix for file in kept()] == [".json"], "nothing half-written is left"


def test_other_weights_config_threads_limits_or_kernels_are_measured_anew(
    folder: Path, measured: list[Runner], monkeypatch: pytest.MonkeyPatch
) -> None:
    runner = Runner(toy_decoder(), 100)
    runner.native = None
    get(folder, runner)
    (folder / "model.safetensors").write_bytes(b"other weights")
    get(folder, runner)
    (folder / "config.json").write_text("{ }")
    get(folder, runner)
    get(folder, runner, max_tokens=16)
    monkeypatch.setattr(measure.torch, "get_num_threads", lambda: 77)
    get(folder, runner)
    plain = copy(runner)
    runner.native = cast(Any, SimpleNamespace(identity="compiled", run=plain.run))
    get(folder, runner)
    assert len(measured) == len(kept()) == 6


def test_an_identity_is_of_the_files_and_not_of_the_way_there(folder: Path) -> None:
    link = folder.parent / "link"
    link.symlink_to(folder)
    assert model_identity(link) == model_identity(folder)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", "null", '{"key": 1}', "\N{SNOWMAN}", "wrong times", "wrong key"]
)
def test_a_file_that_cannot_be_used_is_replaced_and_told_of(
    folder: Path, measured: list[Runner], caplog: pytest.LogCaptureFixture, text: str
) -> None:
    runner = Runner(toy_decoder(), 100)
    get(folder, runner)
    (file,) = kept()
    data = json.loads(file.read_text())
    if text == "wrong times":
        text = json.dumps(
            data | {"times": {"sizes": [2, 1], "seconds": [1, 1], "span_s": 0, "spread": 0}}
        )
    if text == "wrong key":
        text = json.dumps(data | {"key": ["another"]})
    file.write_bytes(text.encode("latin-1" if text.isascii() else "utf-16"))
    with caplog.at_level(logging.WARNING, "specinfer"):
        get(folder, runner)
    assert len(measured) == 2
    assert "measured again" in caplog.text
    caplog.clear()
    get(folder, runner)
    assert len(measured) == 2
    assert not caplog.text


def test_a_cache_that_cannot_be_written_is_told_of_and_serves(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder.parent / "file").write_text("no folder")
    monkeypatch.setenv("SPECINFER_CACHE", str(folder.parent / "file"))
    for _ in range(2):
        assert get(folder, Runner(toy_decoder(), 100)).seconds(1) > 0
    (said,) = [record.getMessage() for record in caplog.records]  # once, not for every model
    assert "cannot be kept" in said
    assert "SPECINFER_CACHE" in said


def test_a_write_that_fails_leaves_nothing(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(measure.os, "replace", fail)
    get(folder, Runner(toy_decoder(), 100))
    assert kept() == []
    assert "no space left" in caplog.text


def test_times_of_a_busy_machine_are_used_and_not_kept(
    folder: Path, measured: list[Runner], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "_TRUSTED_SPREAD", -1.0)
    runner = Runner(toy_decoder(), 100)
    assert get(folder, runner).seconds(1) > 0
    assert not (cache_folder() / "times").exists()
    get(folder, runner)
    assert len(measured) == 2


def test_models_are_measured_in_order_and_told_by_name(
    folder: Path, measured: list[Runner]
) -> None:
    other = folder.parent / "other"
    other.mkdir()
    (other / "config.json").write_text("{}")
    runners = [Runner(toy_decoder(seed), 100) for seed in range(2)]
    told: list[tuple[str, int, int]] = []
    times = measure_models(
        ["a", "b"],
        [folder, other],
        runners,
        max_tokens=8,
        progress=lambda *each: told.append(each),
    )
    assert measured == runners
    assert len(times) == 2
    names = [name for name, _, _ in told]
    assert names == sorted(names)
    assert set(names) == {"a", "b"}
