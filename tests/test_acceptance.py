"""The comparison counts what it says: ratios of sums, whole steps, lawful settings, true laws."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import acceptance
from benchmarks.acceptance import BARS, GRIDS, bar_rows, case_rows, main
from benchmarks.counts import Counts
from benchmarks.exactness import plain_logits
from benchmarks.paper_tables import count_ranks, count_sampled, tree_laws
from benchmarks.runs import Job, Results, read_line, run
from benchmarks.settings import (
    DEPTH,
    DRAFTER,
    IN_DOMAIN,
    SETTINGS,
    TARGET,
    WIDTHS,
    Case,
    Counted,
    Inputs,
    count,
    load_prompts,
    walk,
)
from specinfer.errors import ConfigError
from specinfer.request import SamplingParams
from specinfer.tree import TokenTree
from tests.engines import toy_decoder


def tiny(num_new: int = 24, **changes: str) -> Inputs:
    """Two short prompts of the bundled pair."""
    prompts = tuple(tuple(each) for each in load_prompts(Inputs(), IN_DOMAIN, 2))
    return Inputs(**changes, max_len=max(map(len, prompts)) + num_new, prompts=prompts)


# --- counts ---------------------------------------------------------------------------------------


def test_a_rate_is_a_ratio_of_sums_and_lies_in_its_interval() -> None:
    counts = Counts(np.array([10.0, 2.0, 0.0]), np.array([2.0, 2.0, 0.0]))
    counts.add(1, 3.0)
    rate = counts.rate()
    assert rate.value == pytest.approx(15 / 5)
    assert rate.low <= rate.value <= rate.high
    assert rate.low == pytest.approx(5 / 3)
    assert rate.high == pytest.approx(5.0)


def test_ratios_are_paired_by_prompt() -> None:
    rng = np.random.default_rng(0)
    steps = np.full(40, 10.0)
    base = Counts(rng.uniform(10, 90, 40), steps)
    better = Counts(base.parts * 1.5, steps)
    ratio = better.ratio(base)
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((1.5, 1.5, 1.5))
    assert base.rate().high - base.rate().low > 0.5


def test_nothing_counted_has_no_rate() -> None:
    rate = Counts.zeros(3).rate()
    assert np.isnan(rate.value)


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("budget", GRIDS["full"].budgets)
def test_every_setting_fits_its_budget(name: str, budget: int) -> None:
    for temperature in (0.0, 1.0):
        speculation = SETTINGS[name].speculation(budget, temperature)
        assert 0 < speculation.num_nodes(1) <= budget
        assert speculation.depth <= DEPTH


def test_specinfers_shape_takes_as_many_children_as_fit() -> None:
    shapes = {budget: Case("SpecInfer", 1.0, budget, 1).speculation for budget in (8, 20, 32)}
    assert [shapes[n].tree for n in (8, 20, 32)] == [f"1,1,{k},1,1,1,1,1" for k in (1, 3, 5)]
    assert shapes[32].num_nodes(1) == 32
    assert list(WIDTHS.values()) == [8, 14, 20, 26, 32]


def test_cases_of_one_law_are_counted_once() -> None:
    def same(one: str, other: str, temperature: float) -> bool:
        return Case(one, temperature, 8, 1).law == Case(other, temperature, 8, 1).law

    assert same("DySpec", "SpecExec", 0.0)
    assert not same("DySpec", "SpecExec", 0.3)
    assert same("ours", "calibrated picks", 0.0)
    assert same("ours", "calibrated drawn", 0.3)
    assert same("ours", "calibrated drawn", 0.6)
    assert not same("ours", "calibrated topdown", 0.6)
    assert Case("ours", 0.0, 8, 1).law != Case("ours", 0.0, 16, 1).law


# --- counting -------------------------------------------------------------------------------------


def test_steps_that_max_tokens_could_cut_are_left_out() -> None:
    case = Case("chain", 0.0, 4, 2)
    inputs = tiny(num_new=DEPTH + 8)
    counted = count(case, inputs)
    prompts = load_prompts(inputs, IN_DOMAIN, 2)
    parts, wholes = np.zeros(2), np.zeros(2)
    known = [len(prompt) for prompt in prompts]
    for place, trace in walk(inputs, prompts, case.speculation, 0.0):
        if trace.tree.num_drafted and inputs.max_len - known[place] > DEPTH:
            parts[place] += len(trace.verdict.path) + 1
            wholes[place] += 1
        known[place] += trace.num_new
    assert counted.steps.parts.tolist() == parts.tolist()
    assert counted.steps.wholes.tolist() == wholes.tolist()
    assert counted.drafted == 4 * wholes.sum() > 0
    short = Inputs(max_len=len(prompts[0]) + DEPTH, prompts=(tuple(prompts[0]),))
    assert count(Case("chain", 0.0, 4, 1), short).steps.wholes.sum() == 0


def test_counts_repeat() -> None:
    case = Case("ours", 1.0, 8, 2)
    first, second = count(case, tiny()), count(case, tiny())
    assert first.steps.parts.tolist() == second.steps.parts.tolist()


@torch.no_grad()
def test_tree_laws_are_those_of_a_plain_pass() -> None:
    target, known = toy_decoder(3), [5, 1, 7, 2]
    tree = TokenTree(known[-1])
    left, right = tree.add(0, 4), tree.add(0, 6)
    deep = tree.add(right, 9)
    laws = tree_laws(target, known, tree, SamplingParams(temperature=0.7))
    for node, text in {0: [], left: [4], right: [6], deep: [6, 9]}.items():
        p = torch.softmax(plain_logits(target, [*known, *text])[-1] / 0.7, -1)
        assert np.abs(laws[node] - p.numpy()).max() < 1e-5


def test_a_target_finds_its_own_tokens_first() -> None:
    own = count_ranks(tiny(drafter=TARGET), IN_DOMAIN, 2, 0.0)
    assert [each.rate().value for each in own] == [1.0] * 5
    other = [each.rate().value for each in count_ranks(tiny(drafter=DRAFTER), IN_DOMAIN, 2, 1.0)]
    assert other == sorted(other)
    assert 0.0 < other[0] < other[-1] <= 1.0


def test_a_target_accepts_all_of_its_own_draws_by_multi_step_sampling() -> None:
    counts = count_sampled(tiny(96, drafter=TARGET), IN_DOMAIN, 2, SETTINGS["SpecInfer"], 8)
    assert counts["multi-step"].rate().value > 8.9  # all 8 and one more, but for rounding
    assert counts["traversal"].rate().value > 8.9
    assert counts["naive"].rate().value < 8.0


# --- telling --------------------------------------------------------------------------------------


def test_rows_compare_with_the_baseline_and_with_ours() -> None:
    def counted(tokens: float) -> Counted:
        return Counted(Counts(np.array([tokens, tokens + 1]), np.array([1.0, 1.0])), 64)

    tokens = {"ours": 5.0, "SpecInfer": 4.0, "DySpec": 6.0}
    results = Results({Case(name, 0.0, 32, 120): counted(n) for name, n in tokens.items()})
    rows = {row["setting"]: row for row in case_rows(results)}
    assert rows["ours"]["to_base"].value == pytest.approx(11 / 9)
    assert [name for name, row in rows.items() if row["beats_ours"]] == ["DySpec"]
    assert rows["DySpec"]["nodes"] == 32
    (bar,) = bar_rows(results, 120)
    assert bar["least"] == BARS[0].least
    assert not bar["met"]


def test_the_program_writes_what_it_shows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(acceptance, "Inputs", lambda *given: tiny())
    file = tmp_path / "a.json"
    grid = ["--grid", "none", "--temperatures", "0", "--budgets", "8", "--prompts", "2"]
    rest = ["--bar-prompts", "0", "--processes", "1", "--json", str(file)]
    main([*grid, "--settings", "ours", "SpecInfer", *rest])
    content = json.loads(file.read_text(encoding="utf-8"))
    assert [row["setting"] for row in content["rows"]] == ["ours", "SpecInfer"]
    value = content["rows"][0]["tokens_per_step"]["value"]
    captured = capsys.readouterr()
    assert f"{value:.2f}" in captured.out
    assert "2 of 2" in captured.err


@pytest.mark.slow
def test_processes_count_the_same() -> None:
    cases = [Case(name, 0.0, 8, 2) for name in ("ours", "calibrated picks")]
    here, there = run(cases, tiny()), run(cases, tiny(), processes=2)
    for case in cases:
        assert here.cases[case].steps.parts.tolist() == there.cases[case].steps.parts.tolist()
    assert here.cases[cases[0]] is here.cases[cases[1]]


def test_a_plot_without_matplotlib_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"pip install 'specinfer\[bench\]'"):
        main(["--plot", "never.png"])


def test_what_was_counted_is_kept_and_not_counted_again(tmp_path: Path) -> None:
    kept, case = tmp_path / "counted.jsonl", Case("ours", 0.0, 8, 2)
    first = run([case], tiny(), kept=kept)
    said: list[str] = []
    assert run([Case("chain", 0.0, 8, 2)], tiny(), kept=kept, stop=True).cases == {}
    again = run([case, Case("SpecExec", 0.0, 8, 2)], tiny(), kept=kept, say=said.append)
    assert again.cases[case].steps.parts.tolist() == first.cases[case].steps.parts.tolist()
    assert len(said) == 1
    assert len(kept.read_text(encoding="utf-8").splitlines()) == 2


@pytest.mark.parametrize("part", ["ranks", "sampled"])
def test_counts_survive_being_written(part: str) -> None:
    counts = Counts(np.array([3.0, 0.0]), np.array([7.0, 0.0]))
    found = [counts] if part == "ranks" else {"naive": counts}
    job, again = read_line(Job(part, 1, 2).line(found))
    assert job == Job(part, 1, 2)
    assert str(again[0] if part == "ranks" else again["naive"]) == "3/7 0/0"
