r"""A step by our own kernels beside the same step by PyTorch's, in turns, in one process.

    python -m benchmarks.native --model 1b --precision int8 --json docs/results/native-1b-int8.json

What a processor without AVX-512 would do, and without what takes PyTorch's kernels minutes there:

    SPECINFER_NATIVE=avx2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 python -m \
        benchmarks.native --nodes 1 8 32 --no-prompt
"""

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from unittest.mock import patch

import torch
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from benchmarks import write_result
from benchmarks.latency import MODELS, resolve
from benchmarks.peer_ours import PRECISIONS
from benchmarks.quantization import load
from benchmarks.roofline import PREFIX, tree_span
from specinfer.bench import Spread
from specinfer.cache.blocks import Pages
from specinfer.models.folder import resolve_model
from specinfer.run.batch import Span
from specinfer.run.runner import Runner

NODES = (1, 2, 4, 8, 16, 32, 64)
PROMPT = 512


@dataclass(slots=True)
class Row:
    """Milliseconds of a step; the ratio is PyTorch's to ours, of neighbouring steps.

    tokens  a tree's nodes behind a prefix; of the last row a prompt's
    """

    tokens: int
    ours_ms: Spread
    torch_ms: Spread
    ratio: Spread


@contextmanager
def without_ours() -> Iterator[None]:
    """What is loaded meanwhile multiplies by PyTorch's kernels."""
    with (
        patch("specinfer.ops.linear.kernels", lambda: None),
        patch("specinfer.ops.quantized.kernels", lambda: None),
        patch("specinfer.run.native.kernels", lambda: None),
    ):
        yield


def measure(ours: Runner, theirs: Runner, span: Span, seconds: float) -> Row:
    """Steps in turns for so many seconds, the first pair not counted."""
    times: dict[Runner, list[float]] = {ours: [], theirs: []}
    stop_s = time.perf_counter() + seconds
    while time.perf_counter() < stop_s or len(times[ours]) < 4:
        order = (ours, theirs) if len(times[ours]) % 2 else (theirs, ours)
        for runner in order:
            start_s = time.perf_counter()
            runner.run([span])
            times[runner].append((time.perf_counter() - start_s) * 1e3)
    own, others = times[ours][1:], times[theirs][1:]
    ratio = [b / a for a, b in zip(own, others, strict=True)]
    return Row(len(span.tokens), Spread.of(own), Spread.of(others), Spread.of(ratio))


def main() -> None:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", choices=MODELS, default="pair")
    parser.add_argument("--precision", choices=PRECISIONS, default="bf16")
    parser.add_argument("--nodes", type=int, nargs="+", default=NODES)
    parser.add_argument("--no-prompt", action="store_true", help=f"none of {PROMPT} tokens")
    parser.add_argument("--seconds", type=float, default=3.0, help="per number of nodes")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    folder = resolve_model(resolve(args.model, "bare")[0])
    options, num_slots = PRECISIONS[args.precision], PROMPT + PREFIX
    ours = load(folder, num_slots, **options)
    if ours.native is None:
        raise SystemExit("there are no kernels of ours here")
    with without_ours():
        theirs = load(folder, num_slots, **options)
    spans = [tree_span(nodes, ours.vocab_size) for nodes in args.nodes]
    if not args.no_prompt:
        prompt = list(range(4, 4 + PROMPT))
        spans.append(Span(prompt, range(PROMPT), Pages(range(PROMPT), 1), 0, 0, None, 1))
    rows = [measure(ours, theirs, span, args.seconds) for span in spans]
    title = f"{args.model}, {args.precision}, {args.threads} threads; ms"
    grid = Table("tokens", "ours", "PyTorch's", "PyTorch's ÷ ours", title=title, box=MARKDOWN)
    for row in rows:
        grid.add_row(str(row.tokens), str(row.ours_ms), str(row.torch_ms), str(row.ratio))
    Console(width=120).print(grid)
    if args.json:
        write_result(args.json, title, rows=[asdict(row) for row in rows])


if __name__ == "__main__":
    main()
