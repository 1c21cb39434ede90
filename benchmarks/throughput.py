"""Many requests at a time: plain decoding, the best fixed tree and `auto`, side by side in one run.

    python -m benchmarks.throughput --model pair
    python -m benchmarks.throughput --model 1b --drafter 1/50 --batches 1 4 16 --json a.json

For each batch size the best fixed shape is searched first; then plain, that shape and `auto` run in
turns on the same prompts. A run counts the tokens of steps in which all requests decode: prompts
come before it, and no request ends in it. Ratios are medians of paired runs with their quartiles
and a 95 % interval of the median.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import write_result
from benchmarks.latency import MODELS, _native_dtype, resolve
from benchmarks.prompts import load_chats
from specinfer.bench import Spread
from specinfer.config import Speculation
from specinfer.llm import LLM
from specinfer.request import SamplingParams

BATCHES = (1, 2, 4, 8, 16, 32, 64)
SHAPES = ("1", "1,1", "1,1,1", "2,1", "1,1,1,1,1", "2,1,1,1", "1,1,1,1,1,1,1,1")

SETTLE_S = 6.0
"""Seconds that `auto` serves each batch size before it is measured: it learns while serving."""


@dataclass(slots=True)
class Row:
    """One batch size.

    best_fixed    the shape that was fastest in the search, measured anew in the pairs
    tokens_per_s  per system, the median
    auto_to_plain, fixed_to_plain, auto_to_fixed  median of paired runs and quartiles
    interval      of the median of auto to plain, 95 %
    tokens_per_step, nodes_per_step  of `auto`, per request
    """

    batch: int
    best_fixed: str
    tokens_per_s: dict[str, float]
    auto_to_plain: Spread
    fixed_to_plain: Spread
    auto_to_fixed: Spread
    interval: tuple[float, float]
    tokens_per_step: float
    nodes_per_step: float
    runs: dict[str, list[float]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Counts:
    """What one run's window brought."""

    tokens: int
    seconds: float
    steps: int
    nodes: int

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


def decode(
    llm: LLM, prompts: Sequence[list[int]], params: Sequence[SamplingParams], num_tokens: int
) -> Counts:
    """Decode prompts together until each has had `num_tokens` on average; time that alone.

    params  per prompt; they must not end within the window
    """
    engine = llm.engine
    requests = [llm.submit(p, each) for p, each in zip(prompts, params, strict=True)]
    try:
        sequences = [sequence for request in requests for sequence in request.sequences]
        while any(sequence.num_output == 0 for sequence in sequences):
            engine.step()
        engine.step()  # drafters have read the prompts after this one
        tokens = steps = nodes = 0
        start = time.perf_counter()
        while tokens < num_tokens * len(prompts):
            for trace in engine.step():
                tokens += trace.num_new
                nodes += trace.tree.num_drafted
                steps += 1
        seconds = time.perf_counter() - start
        assert not any(sequence.is_finished for sequence in sequences), "the window was too long"
    finally:
        llm.abort(requests)
    return Counts(tokens, seconds, steps, nodes)


def window_of(batch: int) -> int:
    """Tokens per request in one run: enough steps to mean something, few enough to repeat."""
    return max(12, 48 // max(1, batch // 4))


def interval_of_median(values: Sequence[float]) -> tuple[float, float]:
    """About 95 %, by order statistics: for 7 values the least and the greatest (98 %)."""
    ordered, n = sorted(values), len(values)
    outside = max(0, int((n - 1.96 * n**0.5) / 2) - 1)
    return ordered[outside], ordered[n - 1 - outside]


def compare(
    llm: LLM,
    prompts: Sequence[list[int]],
    batch: int,
    shapes: Sequence[str],
    *,
    pairs: int,
    temperature: float,
    say: Callable[[str], None],
) -> Row:
    """Search the best shape at one batch size, then measure it, plain and auto in turns."""
    params = SamplingParams(temperature=temperature, max_tokens=None, ignore_eos=True)
    num_tokens = window_of(batch)

    def run(tree: str, turn: int) -> Counts:
        llm.engine.set_speculation(Speculation(tree=tree))
        chosen = [prompts[(turn * batch + i) % len(prompts)] for i in range(batch)]
        return decode(llm, chosen, [params] * batch, num_tokens)

    run("off", 0)
    found = {}
    for shape in shapes:
        found[shape] = sum(run(shape, turn).rate for turn in range(2))
        say(f"batch {batch}: {shape} {found[shape] / 2:.1f} tokens/s")
    best = max(found, key=lambda shape: found[shape])
    systems = {"plain": "off", "fixed": best, "auto": "auto"}
    served_s, turn = 0.0, 0
    while served_s < SETTLE_S or turn < 2:
        served_s += run("auto", turn).seconds
        turn += 1
    runs: dict[str, list[Counts]] = {name: [] for name in systems}
    names = list(systems)
    for turn in range(pairs):
        for name in names[turn % 3 :] + names[: turn % 3]:
            runs[name].append(run(systems[name], turn))
    rates = {name: [counts.rate for counts in own] for name, own in runs.items()}

    def ratios(name: str, base: str) -> list[float]:
        return [a / b for a, b in zip(rates[name], rates[base], strict=True)]

    steps = sum(counts.steps for counts in runs["auto"])
    row = Row(
        batch=batch,
        best_fixed=best,
        tokens_per_s={name: Spread.of(own).median for name, own in rates.items()},
        auto_to_plain=Spread.of(ratios("auto", "plain")),
        fixed_to_plain=Spread.of(ratios("fixed", "plain")),
        auto_to_fixed=Spread.of(ratios("auto", "fixed")),
        interval=interval_of_median(ratios("auto", "plain")),
        tokens_per_step=sum(counts.tokens for counts in runs["auto"]) / steps,
        nodes_per_step=sum(counts.nodes for counts in runs["auto"]) / steps,
        runs=rates,
    )
    say(f"batch {batch}: auto {row.auto_to_plain} x plain, {row.auto_to_fixed} x {best}")
    return row


def table(title: str, rows: Sequence[Row]) -> Table:
    """The rows for a terminal or, with a plain box, for a document."""
    from rich.box import MARKDOWN

    grid = Table(
        *("batch", "plain tok/s", "auto tok/s", "auto × plain", "95 %", "best fixed"),
        *("fixed × plain", "auto × fixed", "tokens/step", "nodes"),
        title=title,
        box=MARKDOWN,
    )
    for row in rows:
        grid.add_row(
            str(row.batch),
            f"{row.tokens_per_s['plain']:.1f}",
            f"{row.tokens_per_s['auto']:.1f}",
            str(row.auto_to_plain),
            f"{row.interval[0]:.2f}–{row.interval[1]:.2f}",
            row.best_fixed,
            str(row.fixed_to_plain),
            str(row.auto_to_fixed),
            f"{row.tokens_per_step:.2f}",
            f"{row.nodes_per_step:.1f}",
        )
    return grid


def plot(title: str, rows: Sequence[Row], file: Path) -> None:
    """Tokens per second against batch size."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise SystemExit("plots need matplotlib: pip install 'specinfer[bench]'") from None
    figure, axes = plt.subplots(figsize=(6, 4))
    batches = [row.batch for row in rows]
    for name, label in (("plain", "plain"), ("fixed", "best fixed tree"), ("auto", "auto")):
        axes.plot(batches, [row.tokens_per_s[name] for row in rows], marker="o", label=label)
    axes.set(xscale="log", yscale="log", xlabel="requests at a time", ylabel="tokens per second")
    axes.set_xticks(batches, [str(batch) for batch in batches])
    axes.set_title(title, fontsize=8)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(file)


def main() -> None:
    """Measure, print, and write JSON and a plot."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", choices=MODELS, default="pair")
    parser.add_argument("--drafter", choices=("bare", "1/50", "ngram"), default="bare")
    parser.add_argument("--batches", nargs="*", type=int, default=BATCHES)
    parser.add_argument("--shapes", nargs="*", default=SHAPES, metavar="WIDTHS")
    parser.add_argument("--pairs", type=int, default=7, help="paired runs per batch size")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default=_native_dtype())
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.drafter == "ngram":
        target, _, note = resolve(args.model, "bare")
        drafter, note = "ngram", note.split(",")[0] + ", n-grams"
    else:
        target, drafter, note = resolve(args.model, args.drafter)
    llm = LLM(target, drafters=[drafter], dtype=args.dtype, max_num_seqs=max(args.batches))
    encode = llm.tokenizer.apply_chat_template
    prompts = [encode(chat) for chat in load_chats(encode=encode)]
    title = f"{note}; {args.dtype}, {args.threads} threads, temperature {args.temperature:g}"
    console, rows = Console(width=160), []
    say = Console(stderr=True).print
    for batch in args.batches:
        row = compare(
            llm,
            prompts,
            batch,
            args.shapes,
            pairs=args.pairs,
            temperature=args.temperature,
            say=say,
        )
        rows.append(row)
    console.print(table(title, rows))
    if args.json:
        write_result(args.json, title, rows=[asdict(row) for row in rows])
    if args.plot:
        plot(title, rows, args.plot)


if __name__ == "__main__":
    main()
