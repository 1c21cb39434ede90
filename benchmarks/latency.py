"""One request at a time: plain and tree decoding, and transformers, side by side in one run.

    python -m benchmarks.latency --model 1b
    python -m benchmarks.latency --model pair --shapes 1,1,1,1 2,2,1 --temperatures 0 --json a.json

Models: `pair` (the bundled 11M pair) and its twins `0.3b`, `1b`, `7b`, which compute the same
function at a bigger model's cost (benchmarks/inflate.py); their drafter is shown bare and inflated
to 1/50 of the target. Every table says what was inflated. Ratios are medians over prompts of
neighbouring runs.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import write_result
from benchmarks.inflate import twin
from benchmarks.peer_transformers import Transformers
from benchmarks.prompts import load_chats
from specinfer.bench import Spread, System, measure, ratio
from specinfer.config import PAPER_TREE, Speculation
from specinfer.llm import LLM
from specinfer.ops.linear import has_onednn
from specinfer.request import SamplingParams

SHAPES = (PAPER_TREE, "1,1,1,1,1,1", "2,1,1,1,1", "3,1,1,1", "2,2,1,1", "1,1,1,1")
MODELS = ("pair", "0.3b", "1b", "7b")
PROMPT_LENGTHS = (64, 1024)


@dataclass(slots=True)
class Row:
    """One system at one temperature; ratios are to transformers' and to our plain decoding."""

    system: str
    temperature: float
    tokens_per_s: float
    to_transformers: Spread | None
    to_plain: Spread | None
    tokens_per_step: float | None = None
    ms_per_step: dict[str, float] = field(default_factory=dict)
    host_share: float | None = None


class Ours:
    """One engine; the tree is set before each run. Statistics are kept per tree."""

    def __init__(self, target: str, drafter: str, dtype: str) -> None:
        self.llm = LLM(
            target, drafters=[drafter], dtype=dtype, max_num_seqs=1, speculation=_speculation("1")
        )
        self.sums: dict[tuple[str, float], list[dict[str, float]]] = {}

    def system(
        self,
        tree: str,
        num_tokens: int,
        temperature: float,
        keep: list[list[int]] | None = None,
    ) -> System:
        """Decoding of exactly so many tokens with this tree; "off" is one-node trees.

        keep  where the token ids of every run go
        """
        params = SamplingParams(temperature=temperature, max_tokens=num_tokens, ignore_eos=True)
        speculation = _speculation(tree)

        def run(prompt: Sequence[int]) -> int:
            engine = self.llm.engine
            if engine.speculation != speculation:
                engine.set_speculation(speculation)
            engine.stats.reset()
            output = self.llm.generate(list(prompt), params)[0]
            if keep is not None:
                keep.append(output.outputs[0].token_ids)
            self.sums.setdefault((tree, temperature), []).append(
                {
                    **engine.stats.seconds,
                    "steps": output.stats.num_target_steps,
                    "tokens": output.stats.num_output_tokens,
                    "host": engine.stats.host_share,
                }
            )
            return output.stats.num_output_tokens

        return run

    def describe(self, row: Row, tree: str) -> None:
        """Fill in what the engine knows about its runs, the warm-up left out."""
        runs = self.sums[tree, row.temperature][1:]
        steps = sum(run["steps"] for run in runs)
        row.tokens_per_step = sum(run["tokens"] for run in runs) / steps
        parts = [part for part in runs[0] if part not in ("steps", "tokens", "host")]
        row.ms_per_step = {part: sum(run[part] for run in runs) / steps * 1e3 for part in parts}
        row.host_share = Spread.of([run["host"] for run in runs]).median


def _speculation(tree: str) -> Speculation:
    return Speculation(tree=tree)


def decoding(
    ours: Ours,
    theirs: Transformers | None,
    prompts: Sequence[Sequence[int]],
    shapes: Sequence[str],
    num_tokens: int,
    temperature: float,
) -> list[Row]:
    """Every system on every prompt at one temperature."""
    trees = ["off", *shapes]
    systems = {tree: ours.system(tree, num_tokens, temperature) for tree in trees}
    if theirs is not None:
        systems["transformers"] = theirs.system(num_tokens, temperature)
    ours.sums.clear()
    rates = measure(systems, prompts)
    rows = []
    for name in systems:
        row = Row(
            system=name,
            temperature=temperature,
            tokens_per_s=Spread.of(rates[name]).median,
            to_transformers=None if theirs is None else ratio(rates, name, "transformers"),
            to_plain=ratio(rates, name, "off"),
        )
        if name != "transformers":
            ours.describe(row, name)
        rows.append(row)
    return rows


def prompt_processing(ours: Ours, theirs: Transformers, rounds: int) -> dict[int, Spread]:
    """Time to the first token, transformers' over ours, by prompt length."""
    spreads = {}
    for length in PROMPT_LENGTHS:
        generator = torch.Generator().manual_seed(length)
        prompts = [
            torch.randint(4, 4000, (length,), generator=generator).tolist() for _ in range(rounds)
        ]
        systems = {"ours": ours.system("off", 1, 0.0), "transformers": theirs.system(1, 0.0)}
        spreads[length] = ratio(measure(systems, prompts), "ours", "transformers")
    return spreads


def table(title: str, rows: Sequence[Row]) -> Table:
    """The rows for a terminal or, with a plain box, for a document."""
    from rich.box import MARKDOWN

    columns = (
        "T",
        "system",
        "tok/s",
        "× transformers",
        "× plain",
        "tokens/step",
        "ms/step",
        "host",
    )
    grid = Table(*columns, title=title, box=MARKDOWN)
    for row in rows:
        parts = " ".join(f"{part} {ms:.2f}" for part, ms in row.ms_per_step.items() if ms >= 0.01)
        grid.add_row(
            f"{row.temperature:g}",
            {"off": "plain (one node)"}.get(row.system, row.system),
            f"{row.tokens_per_s:.1f}",
            str(row.to_transformers or ""),
            str(row.to_plain or ""),
            f"{row.tokens_per_step:.2f}" if row.tokens_per_step else "",
            parts,
            f"{row.host_share:.1%}" if row.host_share is not None else "",
        )
    return grid


def resolve(model: str, drafter: str) -> tuple[str, str, str]:
    """Target, drafter, and what of them was inflated."""
    target = "zoo:parley" if model == "pair" else str(twin(model))
    if model == "pair" or drafter == "bare":
        note = "the bundled pair" if model == "pair" else f"target inflated to {model}"
        return target, "zoo:parley-draft", f"{note}, drafter bare (1.6M)"
    return target, str(twin(f"drafter-{model}")), f"target inflated to {model}, drafter to 1/50"


def main() -> None:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", choices=MODELS, default="pair")
    parser.add_argument("--drafter", choices=("bare", "1/50"), default="bare")
    parser.add_argument("--shapes", nargs="*", default=SHAPES, metavar="WIDTHS")
    parser.add_argument("--temperatures", nargs="*", type=float, default=(0.0, 0.8))
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=64, help="per prompt")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default=_native_dtype())
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--no-transformers", action="store_true")
    parser.add_argument("--no-prompt-processing", action="store_true")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    target, drafter, note = resolve(args.model, args.drafter)
    console = Console(width=200)
    title = f"{note}; {args.dtype}, {args.threads} threads, {args.tokens} tokens, batch 1"
    theirs = None
    ours = Ours(target, drafter, args.dtype)
    if not args.no_transformers:
        from specinfer.models.folder import resolve_model

        theirs = Transformers(resolve_model(target), getattr(torch, args.dtype))
    encode = ours.llm.tokenizer.apply_chat_template
    prompts = [encode(chat) for chat in load_chats(args.prompts, encode=encode)]
    rows: list[Row] = []
    for temperature in args.temperatures:
        rows += decoding(ours, theirs, prompts, args.shapes, args.tokens, temperature)
    console.print(table(title, rows))
    processing: dict[int, Spread] = {}
    if theirs is not None and not args.no_prompt_processing:
        processing = prompt_processing(ours, theirs, rounds=max(5, args.prompts // 2))
        for length, spread in processing.items():
            console.print(f"first token after a prompt of {length}: {spread} × transformers")
    if args.json:
        write_result(
            args.json,
            title,
            rows=[asdict(row) for row in rows],
            prompt_processing={length: asdict(s) for length, s in processing.items()},
        )


def _native_dtype() -> str:
    """bfloat16 where the processor computes in it."""
    return "bfloat16" if has_onednn(torch.bfloat16) else "float32"


if __name__ == "__main__":
    main()
