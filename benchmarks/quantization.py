"""What rounding weights costs and gains: perplexity, tokens per step, and a step's time by nodes.

    python -m benchmarks.quantization --json docs/results/quantization.json

Perplexity is the bundled target's on the test conversations, in the checkpoint's dtype; tokens per
step are counted as in `benchmarks/acceptance.py`, greedy; times are of the 1B twin
(`benchmarks/inflate.py`), schemes in turns, as ratios of neighbouring steps. `--parts` runs some of
them; what the file already has of the others stays.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from benchmarks import write_result
from benchmarks.inflate import twin
from benchmarks.prompts import load_conversations
from benchmarks.settings import MAX_LEN, TARGET, Case, Inputs, count
from specinfer.bench import Spread
from specinfer.cache.blocks import BlockAllocator
from specinfer.models.folder import resolve_model
from specinfer.models.quantization import QUANTIZATIONS
from specinfer.models.weights import load_decoder
from specinfer.run.batch import Span
from specinfer.run.runner import Runner
from specinfer.text.tokenizer import Tokenizer

PLAIN = "unquantised"
BOUNDS = {"int8": 0.005, "int4": 0.05}
"""How much perplexity may rise."""
EFFICIENCY_BOUND = 0.03
"""How much tokens per step may fall with an int8 target."""
NODES = (1, 8, 16, 32, 64)
CONTEXT = 64
BUDGET = 32
"""Drafted nodes per step where tokens per step are counted."""
PARTS = ("perplexity", "efficiency", "times")


def load(folder: Path, num_slots: int, *, dtype: str = "auto", quantization: str = PLAIN) -> Runner:
    """A model, rounded while it is read, with pages for what is measured."""
    scheme = None if quantization == PLAIN else QUANTIZATIONS[quantization]
    return Runner(load_decoder(folder, dtype=dtype, quantization=scheme), num_slots)


def perplexity(name: str, num_conversations: int | None) -> dict[str, Any]:
    """Of all tokens but the first of each conversation, cut to what the target was made for."""
    folder = resolve_model(TARGET)
    tokenizer, runner = Tokenizer.from_folder(folder), load(folder, MAX_LEN, quantization=name)
    pages = BlockAllocator(MAX_LEN, 1).allocate(MAX_LEN)
    assert pages is not None
    total, num_tokens = 0.0, 0
    for conversation in load_conversations()[:num_conversations]:
        tokens = tokenizer.apply_chat_template(list(conversation.messages))[:MAX_LEN]
        n = len(tokens)
        span = Span(tokens, list(range(n)), pages, 0, 0, None, n)
        law = runner.run([span])[:-1].double().log_softmax(-1)
        total -= float(law.gather(1, torch.tensor(tokens[1:])[:, None]).sum())
        num_tokens += n - 1
    return {"scheme": name, "tokens": num_tokens, "perplexity": math.exp(total / num_tokens)}


def efficiency(names: Sequence[str], num_prompts: int) -> list[dict[str, Any]]:
    """Tokens per step with each target, and the ratio to the first, paired by prompt."""
    case = Case("ours", 0.0, BUDGET, num_prompts)
    counted = {
        name: count(case, Inputs(quantization=None if name == PLAIN else name)).steps
        for name in names
    }
    base = counted[names[0]]
    return [
        {"scheme": name, "rate": asdict(each.rate()), "ratio": asdict(each.ratio(base))}
        for name, each in counted.items()
    ]


def step(runner: Runner, num_nodes: int) -> Callable[[], None]:
    """A binary tree of so many nodes behind a context, every node with its logits."""
    mask = np.eye(num_nodes, dtype=np.bool_)
    for node in range(1, num_nodes):
        mask[node] |= mask[(node - 1) // 2]
    pages = BlockAllocator(CONTEXT + num_nodes, 1).allocate(CONTEXT + num_nodes)
    assert pages is not None
    positions = (CONTEXT + mask.sum(1) - 1).tolist()
    tokens = np.random.default_rng(0).integers(4, 4000, num_nodes).tolist()
    span = Span(tokens, positions, pages, CONTEXT, CONTEXT, mask, num_nodes)
    return lambda: runner.run([span]).sum().item()  # type: ignore[return-value]


def times(names: Sequence[str], model: Path, rounds: int) -> list[dict[str, Any]]:
    """Milliseconds of a step, and the ratio to the first scheme's right beside it."""
    num_slots = CONTEXT + max(NODES)
    runners = {name: load(model, num_slots, quantization=name) for name in names}
    for runner in runners.values():
        for layer in range(runner.decoder.architecture.num_layers):
            for pages in runner.pool.layer(layer):
                pages.zero_()  # fresh pages hold anything
    steps = {(name, n): step(runner, n) for name, runner in runners.items() for n in NODES}
    seconds: dict[tuple[str, int], list[float]] = {case: [] for case in steps}
    for turn in range(rounds + 1):
        for n in NODES:
            for name in (*names[turn % len(names) :], *names[: turn % len(names)]):
                start = time.perf_counter()
                steps[name, n]()
                seconds[name, n].append(time.perf_counter() - start)
    return [
        {
            "scheme": name,
            "nodes": n,
            "ms": asdict(Spread.of([1e3 * each for each in seconds[name, n][1:]])),
            "ratio": asdict(
                Spread.of(
                    [
                        a / b
                        for a, b in zip(seconds[name, n][1:], seconds[names[0], n][1:], strict=True)
                    ]
                )
            ),
        }
        for name in names
        for n in NODES
    ]


def tables(found: dict[str, Any]) -> list[Table]:
    """What was measured, for a terminal or a document."""
    made = []
    if rows := found.get("perplexity"):
        table = Table("scheme", "perplexity", "rises by", "asked", box=MARKDOWN)
        base = rows[0]["perplexity"]
        for row in rows:
            bound = BOUNDS.get(row["scheme"])
            table.add_row(
                row["scheme"],
                f"{row['perplexity']:.3f}",
                f"{row['perplexity'] / base - 1:.2%}",
                "" if bound is None else f"{bound:.1%}",
            )
        made.append(table)
    if rows := found.get("efficiency"):
        table = Table("scheme", "tokens per step", "× unquantised", box=MARKDOWN)
        for row in rows:
            table.add_row(row["scheme"], *(_interval(row[key]) for key in ("rate", "ratio")))
        made.append(table)
    if rows := found.get("times"):
        table = Table("nodes", box=MARKDOWN)
        names = list(dict.fromkeys(row["scheme"] for row in rows))
        for name in names:
            table.add_column(f"{name}, ms")
            table.add_column("× unquantised")
        for n in NODES:
            cells = [_spread(r[k]) for r in rows if r["nodes"] == n for k in ("ms", "ratio")]
            table.add_row(str(n), *cells)
        made.append(table)
    return made


def _interval(value: dict[str, float]) -> str:
    return f"{value['value']:.2f} ({value['low']:.2f}–{value['high']:.2f})"


def _spread(value: dict[str, float]) -> str:
    digits = 0 if value["median"] > 10 else 2
    low, median, high = (f"{value[key]:.{digits}f}" for key in ("low", "median", "high"))
    return f"{median} ({low}–{high})"


def main() -> None:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--schemes", nargs="+", choices=QUANTIZATIONS, default=list(QUANTIZATIONS))
    parser.add_argument("--conversations", type=int, help="default: all")
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--model", type=Path, help="folder that is timed; default: the 1B twin")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    names = [PLAIN, *args.schemes]
    found: dict[str, Any] = {}
    if args.json and args.json.exists():
        kept = json.loads(args.json.read_text(encoding="utf-8"))
        found = {part: kept[part] for part in PARTS if part in kept}
    if "perplexity" in args.parts:
        found["perplexity"] = [perplexity(name, args.conversations) for name in names]
    if "efficiency" in args.parts:
        found["efficiency"] = efficiency([n for n in names if n in (PLAIN, *BOUNDS)], args.prompts)
    if "times" in args.parts:
        measured = [name for name in names if name in (PLAIN, *BOUNDS)]
        found["times"] = times(measured, args.model or twin("1b"), args.rounds)
        found["threads"] = torch.get_num_threads()
    for table in tables(found):
        Console(width=120).print(table)
    if args.json:
        write_result(args.json, (__doc__ or "").split("\n\n")[0], **found)


if __name__ == "__main__":
    main()
