"""Tokens per target step of every builder and verifier, and the tables of the SpecInfer paper.

    python -m benchmarks.acceptance --json a.json --plot a.png
    python -m benchmarks.acceptance --grid full --processes 16 --json a.json
    python -m benchmarks.acceptance --settings ours SpecInfer --temperatures 0 --budgets 8 32

Counts tokens, not time, in float32 with fixed seeds, one engine per case; what counts as a step is
said in benchmarks/settings.py. The bars always have 120 in-domain prompts. The short grid has 24,
temperatures 0 and 1, budgets of 8 and 32 nodes (10 minutes on two cores); the full one has 120
prompts, four temperatures, five budgets and the outside sets at 32 nodes (hours).
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from benchmarks.paper_tables import NUM_RANKS, VERIFIERS
from benchmarks.prompts import DATA, OUTSIDE
from benchmarks.runs import Results, run
from benchmarks.settings import (
    BASE,
    IN_DOMAIN,
    OURS,
    SETTINGS,
    WIDTHS,
    Case,
    Inputs,
    fixed_tree,
)
from specinfer.errors import ConfigError

PROMPTS = 120
"""What the bars and the paper's tables are measured on."""


@dataclass(frozen=True, slots=True)
class Grid:
    """Which cases are compared."""

    num_prompts: int
    temperatures: Sequence[float]
    budgets: Sequence[int]
    settings: Sequence[str] = tuple(SETTINGS)
    outside: Sequence[str] = ()

    def cases(self) -> list[Case]:
        """Every setting at every temperature and budget; outside sets at 32 nodes."""
        cases = [
            Case(name, temperature, budget, self.num_prompts)
            for temperature in self.temperatures
            for budget in self.budgets
            for name in self.settings
        ]
        return cases + [
            Case(name, temperature, 32, self.num_prompts, source)
            for source in self.outside
            for temperature in self.temperatures
            for name in self.settings
        ]


GRIDS = {
    "none": Grid(0, (), ()),
    "short": Grid(24, (0.0, 1.0), (8, 32)),
    "full": Grid(PROMPTS, (0.0, 0.3, 0.6, 1.0), (8, 16, 32, 64, 128), outside=OUTSIDE),
}


@dataclass(frozen=True, slots=True)
class Bar:
    """What one setting must reach of another's tokens per step."""

    setting: str
    base: str
    temperature: float
    budget: int
    least: float

    def cases(self, num_prompts: int) -> tuple[Case, Case]:
        """The two cases that are compared."""
        first = Case(self.setting, self.temperature, self.budget, num_prompts)
        return first, Case(self.base, self.temperature, self.budget, num_prompts)


BARS = (
    Bar(OURS, BASE, 0.0, 32, 1.38),
    Bar(OURS, BASE, 0.3, 32, 1.3),
    Bar(OURS, BASE, 1.0, 32, 1.15),
    Bar(OURS, "chain", 0.0, 8, 1.1),
)
LEAST_MULTI_STEP = 1.2


# --- telling --------------------------------------------------------------------------------------


def bar_rows(results: Results, num_prompts: int) -> list[dict[str, Any]]:
    """Each bar with what was measured; `met` says whether the figure itself reaches it."""
    rows = []
    for bar in BARS:
        case, base = bar.cases(num_prompts)
        if (ratio := results.ratio(case, base)) is not None:
            rows.append(asdict(bar) | {"ratio": ratio, "met": ratio.value >= bar.least})
    for k, counts in results.sampled.items():
        ratio = counts["multi-step"].ratio(counts["naive"])
        bar = Bar("multi-step", "naive", 1.0, WIDTHS[k], LEAST_MULTI_STEP)
        rows.append(asdict(bar) | {"ratio": ratio, "met": ratio.value >= bar.least})
    return rows


def case_rows(results: Results) -> list[dict[str, Any]]:
    """Every case: tokens per step, drafted nodes per step, and against the baseline and ours.

    beats_ours  whether all of the interval of its ratio to ours lies above 1
    """
    rows = []
    for case, counted in results.cases.items():
        rest = (case.temperature, case.budget, case.num_prompts, case.source)
        to_ours = results.ratio(case, Case(OURS, *rest))
        steps = counted.steps.wholes.sum()
        rows.append(
            asdict(case)
            | {
                "num_prompts": len(counted.steps.parts),
                "num_steps": int(steps),
                "nodes": counted.drafted / steps if steps else 0.0,
                "tokens_per_step": counted.steps.rate(),
                "to_base": results.ratio(case, Case(BASE, *rest)),
                "to_ours": to_ours,
                "beats_ours": to_ours is not None and to_ours.low > 1.0,
            }
        )
    return rows


def paper_rows(results: Results) -> dict[str, list[dict[str, Any]]]:
    """The paper's tables 1 and 3 in kind."""
    return {
        "ranks": [
            {"temperature": temperature, "success": [each.rate() for each in counts]}
            for temperature, counts in results.ranks.items()
        ],
        "sampled": [
            {"tree": fixed_tree(k), **{name: counts[name].rate() for name in VERIFIERS}}
            | {"ratio": counts["multi-step"].ratio(counts["naive"])}
            for k, counts in results.sampled.items()
        ],
    }


def width_rows(results: Results, num_prompts: int) -> list[dict[str, Any]]:
    """The paper's table 2 in kind: tokens per step by k."""
    rows = []
    for temperature in (0.0, 1.0):
        cases = [Case(BASE, temperature, nodes, num_prompts) for nodes in WIDTHS.values()]
        if all(case in results.cases for case in cases):
            found = [results.cases[case].steps.rate() for case in cases]
            rows.append({"temperature": temperature, "by_k": found})
    return rows


def tables(content: dict[str, Any]) -> list[Table]:
    """What `main` writes to JSON, for a terminal or a document."""
    ks = [f"k={k}" for k in range(1, NUM_RANKS + 1)]
    shown = []
    if content["ranks"]:
        grid = Table("T", *ks, title="The target's token among the drafter's first k", box=MARKDOWN)
        for row in content["ranks"]:
            cells = [f"{each.value:.1%}" for each in row["success"]]
            grid.add_row(f"{row['temperature']:g}", *cells)
        shown.append(grid)
    if content["widths"]:
        grid = Table("T", *ks, title="Tokens per step of <1,1,k,1,1,1,1,1>", box=MARKDOWN)
        for row in content["widths"]:
            grid.add_row(f"{row['temperature']:g}", *map(str, row["by_k"]))
        shown.append(grid)
    if content["sampled"]:
        columns = ("tree", *VERIFIERS, "multi-step / naive")
        grid = Table(*columns, title="On the same drawn trees, temperature 1.0", box=MARKDOWN)
        for row in content["sampled"]:
            grid.add_row(row["tree"], *(str(row[name]) for name in VERIFIERS), str(row["ratio"]))
        shown.append(grid)
    if content["bars"]:
        grid = Table("what", "T", "nodes", "at least", "measured", "", title="Bars", box=MARKDOWN)
        for row in content["bars"]:
            what = f"{row['setting']} / {row['base']}"
            met = "met" if row["met"] else "missed"
            figures = (f"{row['temperature']:g}", str(row["budget"]), f"{row['least']:g}")
            grid.add_row(what, *figures, str(row["ratio"]), met)
        shown.append(grid)
    return shown + _comparison(content["rows"])


def _comparison(rows: Sequence[dict[str, Any]]) -> list[Table]:
    """Tokens per step by setting and budget: one table per set and temperature."""
    shown = []
    panels = dict.fromkeys((r["source"], r["temperature"], r["num_prompts"]) for r in rows)
    for panel in panels:
        source, temperature, num_prompts = panel
        own = [r for r in rows if (r["source"], r["temperature"], r["num_prompts"]) == panel]
        budgets = sorted({row["budget"] for row in own})
        title = f"{source}, temperature {temperature:g}, {num_prompts} prompts: tokens per step"
        grid = Table("setting", *(f"{n} nodes" for n in budgets), title=title, box=MARKDOWN)
        for name in dict.fromkeys(row["setting"] for row in own):
            found = {row["budget"]: row for row in own if row["setting"] == name}
            cells = [
                f"{found[n]['tokens_per_step']}{' *' if found[n]['beats_ours'] else ''}"
                if n in found
                else ""
                for n in budgets
            ]
            grid.add_row(name, *cells)
        shown.append(grid)
    return shown


def plot(rows: Sequence[dict[str, Any]], file: Path) -> None:
    """Tokens per step against budget, a line per setting and a panel per temperature.

    raises  ConfigError without matplotlib
    """
    pyplot = import_pyplot()
    sizes = [row["num_prompts"] for row in rows if row["source"] == IN_DOMAIN]
    rows = [row for row in rows if row["source"] == IN_DOMAIN and row["num_prompts"] == min(sizes)]
    temperatures = sorted({row["temperature"] for row in rows})
    figure, axes = pyplot.subplots(
        1, len(temperatures), figsize=(4 * len(temperatures), 4), sharey=True, squeeze=False
    )
    for axis, temperature in zip(axes[0], temperatures, strict=True):
        for number, name in enumerate(SETTINGS):
            own = [r for r in rows if r["setting"] == name and r["temperature"] == temperature]
            own.sort(key=lambda row: row["budget"])
            axis.plot(
                [row["budget"] for row in own],
                [row["tokens_per_step"].value for row in own],
                marker="o",
                markersize=3,
                linewidth=2.5 if name == OURS else 1.0,
                color=f"C{number % 10}",
                linestyle="-" if number < 10 else "--",
                label=name,
            )
        axis.set_xscale("log", base=2)
        axis.set_title(f"temperature {temperature:g}")
        axis.set_xlabel("drafted nodes")
    axes[0][0].set_ylabel("tokens per target step")
    axes[0][-1].legend(fontsize=7)
    figure.tight_layout()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=90)


def import_pyplot() -> Any:
    """matplotlib, which is optional.

    raises  ConfigError
    """
    try:
        import matplotlib
    except ImportError:
        raise ConfigError(
            "--plot needs matplotlib: pip install 'specinfer[bench]', or leave --plot out"
        ) from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def main(arguments: Sequence[str] | None = None) -> None:
    """Count, print, and write JSON and a plot."""
    args = _parser().parse_args(arguments)
    if args.plot:
        import_pyplot()  # before anything takes minutes
    whole = GRIDS[args.grid]
    grid = Grid(
        args.prompts or whole.num_prompts or PROMPTS,
        args.temperatures or whole.temperatures,
        args.budgets or whole.budgets,
        args.settings or whole.settings,
        whole.outside if args.sets is None else args.sets,
    )
    cases = grid.cases()
    num_prompts = args.bar_prompts
    if num_prompts:
        cases = [case for bar in BARS for case in bar.cases(num_prompts)] + cases
        cases += [Case(BASE, t, n, grid.num_prompts) for t in (0.0, 1.0) for n in WIDTHS.values()]
    cases = list(dict.fromkeys(cases))
    results = run(
        cases,
        Inputs(args.model, args.drafter, args.data),
        paper_prompts=num_prompts,
        processes=args.processes,
        kept=args.counted,
        stop=args.stop,
        say=lambda message: print(message, file=sys.stderr),
    )
    content: dict[str, Any] = {
        "what": f"{args.model} and {args.drafter}, float32, batches of 16, up to 256 tokens",
        "when": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python -m benchmarks.acceptance", *(arguments or sys.argv[1:])]),
        "torch": torch.__version__,
        **paper_rows(results),
        "widths": width_rows(results, grid.num_prompts),
        "bars": bar_rows(results, num_prompts),
        "rows": case_rows(results),
    }
    console = Console(width=160)
    for each in tables(content):
        console.print(each)
    console.print("Intervals are 95 %, over prompts. * above ours by more than the interval.")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(content, indent=1, default=asdict)
        args.json.write_text(text + "\n", encoding="utf-8")
    if args.plot:
        plot(content["rows"], args.plot)


def _parser() -> argparse.ArgumentParser:
    defaults = Inputs()
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", default=defaults.target)
    parser.add_argument("--drafter", default=defaults.drafter)
    parser.add_argument("--grid", choices=tuple(GRIDS), default="short")
    parser.add_argument("--settings", nargs="+", choices=tuple(SETTINGS))
    parser.add_argument("--temperatures", nargs="+", type=float)
    parser.add_argument("--budgets", nargs="+", type=int, help="drafted nodes")
    parser.add_argument("--prompts", type=int, help="of the grid")
    parser.add_argument("--sets", nargs="*", choices=OUTSIDE, help="outside sets, at 32 nodes")
    parser.add_argument(
        "--bar-prompts", type=int, default=PROMPTS, help="of bars and the paper's tables; 0: none"
    )
    parser.add_argument("--data", type=Path, default=DATA, help="a folder like tests/data")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--counted",
        type=Path,
        metavar="FILE",
        help="keep counts here as they come, and count nothing again that it has: same code only",
    )
    parser.add_argument("--stop", action="store_true", help="tell what --counted has, and no more")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    return parser


if __name__ == "__main__":
    main()
