"""How far a step is above what the machine allows: memory, matrix products, and each part of it.

    python -m benchmarks.roofline --model 1b --json docs/results/roofline-1b.json

The matrix floor is the target's own linears alone, in the order of a step, at the speed of the
kernels we use: no attention, no norm, no cache, no Python in between. What the floor itself is
above is memory, read by torch and, where there is a C compiler, by STREAM's loops in C.
"""

import argparse
import ctypes
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks import write_result
from benchmarks.latency import MODELS, _native_dtype, resolve
from benchmarks.peer_ours import PRECISIONS, follow
from benchmarks.prompts import load_chats
from specinfer.bench import Spread
from specinfer.cache.blocks import Pages
from specinfer.config import Speculation
from specinfer.engine.stats import HOST_PARTS
from specinfer.llm import LLM
from specinfer.models.decoder import Decoder, DecoderLayer
from specinfer.ops.native import PARTS as NATIVE_PARTS
from specinfer.request import SamplingParams
from specinfer.run.batch import Span
from specinfer.run.native import NativeSteps
from specinfer.run.runner import Runner

NODES = (1, 2, 4, 8, 16, 32, 64, 128)
PREFIX = 128
"""Committed tokens before the tree."""

PARTS = ("linears", "lm_head", "attention", "norms", "rest", "preparation")
"""Of a step of the model. rest: rotation, activation, storing K and V (without our kernels also
residuals and the embedding); preparation: flattening spans and making masks."""

_ARRAY_BYTES = 256 << 20
_STREAM = """
#include <stddef.h>
void copy(double *a, const double *b, const double *c, size_t n) {
    #pragma omp parallel for
    for (size_t i = 0; i < n; i++) a[i] = b[i];
}
void triad(double *a, const double *b, const double *c, size_t n) {
    #pragma omp parallel for
    for (size_t i = 0; i < n; i++) a[i] = b[i] + 3.0 * c[i];
}
double sum(double *a, const double *b, const double *c, size_t n) {
    double s = 0;
    #pragma omp parallel for simd reduction(+ : s)
    for (size_t i = 0; i < n; i++) s += b[i];
    return s;
}
"""


@dataclass(slots=True)
class Row:
    """A step of n nodes of one request; seconds as ms.

    floor    the linears alone
    step     the model's step: everything from spans to logits
    ratio    step to floor, paired
    parts    of one step, timed one by one (which costs it some)
    engine   the engine's step without its drafters, per part
    """

    nodes: int
    floor_ms: Spread
    step_ms: Spread
    ratio: Spread
    parts_ms: dict[str, float]
    engine_ms: dict[str, float]


# --- the machine ----------------------------------------------------------------------------------


def best_s(run: Callable[[], Any], seconds: float = 1.0) -> float:
    """The shortest of the runs that fit into so many seconds, after two that do not count."""
    run()
    run()
    best, until_s = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < until_s:
        start_s = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start_s)
    return best


def torch_bandwidth() -> dict[str, float]:
    """GB/s by torch: bytes read and written as the program asks, as STREAM counts them."""
    a, b, c = (torch.rand(_ARRAY_BYTES // 4) for _ in range(3))
    gigabytes = _ARRAY_BYTES / 1e9
    return {
        "read": gigabytes / best_s(b.sum),
        "copy": 2 * gigabytes / best_s(lambda: a.copy_(b)),
        "triad": 3 * gigabytes / best_s(lambda: torch.add(b, c, alpha=3.0, out=a)),
    }


def stream_bandwidth() -> dict[str, float] | None:
    """GB/s by STREAM's loops in C; None where there is no C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory(prefix="stream-") as folder:
        library = Path(folder) / "stream.so"
        flags = ["-O3", "-march=native", "-ffast-math", "-fopenmp", "-shared", "-fPIC"]
        subprocess.run(
            [compiler, *flags, "-x", "c", "-", "-o", library], input=_STREAM, text=True, check=True
        )
        loaded = ctypes.CDLL(str(library))
    arrays = [np.ones(_ARRAY_BYTES // 8) for _ in range(3)]
    arguments = [ctypes.c_void_p(each.ctypes.data) for each in arrays]
    size = ctypes.c_size_t(_ARRAY_BYTES // 8)
    loaded.sum.restype = ctypes.c_double
    gigabytes = _ARRAY_BYTES / 1e9
    return {
        name: num_arrays * gigabytes / best_s(lambda run=run: run(*arguments, size))  # type: ignore[misc]
        for name, run, num_arrays in (
            ("read", loaded.sum, 1),
            ("copy", loaded.copy, 2),
            ("triad", loaded.triad, 3),
        )
    }


def matmul_rate(dtype: torch.dtype) -> float:
    """GFLOP/s of a square product of 2048."""
    a, b = (torch.rand(2048, 2048).to(dtype) for _ in range(2))
    return 2 * 2048**3 / best_s(lambda: a @ b) / 1e9


# --- the model ------------------------------------------------------------------------------------


def _layers(decoder: Decoder) -> list[DecoderLayer]:
    return cast("list[DecoderLayer]", list(decoder.layers))


def floor(decoder: Decoder, num_rows: int) -> Callable[[], None]:
    """Every linear of the model once, in the order of a step, lm_head for all rows too."""
    a = decoder.architecture
    widths = (a.hidden_size, a.num_heads * a.head_dim, a.intermediate_size)
    generator = torch.Generator().manual_seed(0)
    rows = {
        width: torch.randn(num_rows, width, generator=generator).to(decoder.dtype)
        for width in widths
    }
    hidden, mixed, inner = (rows[width] for width in widths)

    @torch.inference_mode()
    def run() -> None:
        for layer in _layers(decoder):
            layer.qkv.forward(hidden)
            layer.output.forward(mixed)
            layer.gate_up.forward(hidden)
            layer.down.forward(inner)
        decoder.logits(hidden)

    return run


def tree_span(num_nodes: int, vocab_size: int) -> Span:
    """A binary tree behind a prefix, every node with its logits."""
    mask = np.eye(num_nodes, dtype=np.bool_)
    for node in range(1, num_nodes):
        mask[node] |= mask[(node - 1) // 2]
    return Span(
        tokens=[4 + node % (vocab_size - 4) for node in range(num_nodes)],
        positions=(PREFIX + mask.sum(1) - 1).tolist(),
        pages=Pages(range(PREFIX + num_nodes), 1),
        prefix=PREFIX,
        start=PREFIX,
        mask=mask if num_nodes > 1 else None,
        num_logits=num_nodes,
    )


@contextmanager
def parts_timed(runner: Runner) -> Iterator[dict[str, float]]:
    """Time the parts of `runner.run` while the block lasts: seconds, summed up."""
    decoder, spent = runner.decoder, dict.fromkeys(PARTS, 0.0)
    restore: list[tuple[Any, str]] = []

    def timed(part: str, run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def inner(*args: Any) -> Tensor:
            start_s = time.perf_counter()
            out = run(*args)
            spent[part] += time.perf_counter() - start_s
            return out

        return inner

    def replace(owner: Any, name: str, run: Callable[..., Tensor]) -> None:
        setattr(owner, name, run)
        restore.append((owner, name))

    for layer in _layers(decoder):
        for module in (layer.qkv, layer.output, layer.gate_up, layer.down):
            replace(module, "forward", timed("linears", module.forward))
        for norm in (layer.attention_norm, layer.mlp_norm):
            replace(norm, "forward", timed("norms", norm.forward))
    forward = decoder.forward

    def run_layers(tokens: Tensor, positions: Tensor, attend: Callable[..., Tensor]) -> Tensor:
        before = sum(spent[part] for part in ("linears", "norms", "attention"))
        start_s = time.perf_counter()
        hidden = forward(tokens, positions, timed("attention", attend))
        whole_s = time.perf_counter() - start_s
        inside = sum(spent[part] for part in ("linears", "norms", "attention")) - before
        spent["rest"] += whole_s - inside
        return hidden

    replace(decoder, "forward", run_layers)
    replace(decoder, "logits", timed("lm_head", decoder.logits))
    try:
        yield spent
    finally:
        for owner, name in restore:
            delattr(owner, name)


@contextmanager
def native_parts_timed(steps: NativeSteps) -> Iterator[dict[str, float]]:
    """The same where our kernels run whole steps and time themselves."""
    spent: dict[str, float] = {}
    steps.seconds = np.zeros(len(NATIVE_PARTS))
    try:
        yield spent
    finally:
        spent |= dict(zip(NATIVE_PARTS, steps.seconds.tolist(), strict=True))
        steps.seconds = None


def part_times(runner: Runner, spans: list[Span], rounds: int) -> dict[str, float]:
    """Milliseconds of each part of a step, the mean of so many steps."""
    steps = runner.native
    with parts_timed(runner) if steps is None else native_parts_timed(steps) as spent:
        start_s = time.perf_counter()
        for _ in range(rounds):
            runner.run(spans)
        whole_s = time.perf_counter() - start_s
    spent["preparation"] = whole_s - sum(spent.values())
    return {part: seconds / rounds * 1e3 for part, seconds in spent.items()}


def engine_times(llm: LLM, num_nodes: int, temperature: float, num_tokens: int) -> dict[str, float]:
    """Milliseconds of each part of the engine's step with trees of so many tokens, the root too."""
    tree = "off" if num_nodes == 1 else "calibrated"
    # An ordinary step has one node fewer where the drafter has no more to say
    llm.engine.set_speculation(Speculation(tree=tree, max_nodes=max(1, num_nodes - 1)))
    prompt = llm.tokenizer.apply_chat_template(load_chats(1)[0])
    params = SamplingParams(temperature=temperature, max_tokens=num_tokens, ignore_eos=True)
    follow(llm, [prompt], params)
    stats = llm.engine.stats
    stats.reset()
    follow(llm, [prompt], params)
    return {part: own / stats.num_steps * 1e3 for part, own in stats.seconds.items()}


def measure_row(llm: LLM, num_nodes: int, rounds: int, temperature: float) -> Row:
    """Floor and step in turns, then the parts."""
    runner = llm.engine.target
    spans = [tree_span(num_nodes, runner.vocab_size)]
    run_floor = floor(runner.decoder, num_nodes)
    floors: list[float] = []
    steps: list[float] = []
    pairs = [(floors, run_floor), (steps, lambda: runner.run(spans))]
    for turn in range(rounds + 1):
        for times, run in pairs[:: 1 if turn % 2 else -1]:
            start_s = time.perf_counter()
            run()
            times.append((time.perf_counter() - start_s) * 1e3)
    floors, steps = floors[1:], steps[1:]
    return Row(
        nodes=num_nodes,
        floor_ms=Spread.of(floors),
        step_ms=Spread.of(steps),
        ratio=Spread.of([step / own for step, own in zip(steps, floors, strict=True)]),
        parts_ms=part_times(runner, spans, rounds),
        engine_ms=engine_times(llm, num_nodes, temperature, num_tokens=24),
    )


def weight_bytes(decoder: Decoder) -> int:
    """What a step of one token must read: all matrices; of a tied embedding one copy."""
    a = decoder.architecture
    q, kv = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
    layer = a.hidden_size * (2 * q + 2 * kv + 3 * a.intermediate_size)
    rounded = {"int8": 8, "int4": 4}.get((decoder.quantization or "").partition("-")[0])
    return (
        (a.num_layers * layer + a.vocab_size * a.hidden_size)
        * (rounded or 8 * decoder.dtype.itemsize)
        // 8
    )


def table(title: str, rows: Sequence[Row], memory_ms: float) -> Table:
    """Milliseconds by number of nodes."""
    grid = Table(
        *("nodes", "memory", "floor", "step", "step ÷ floor", *PARTS, "host"),
        title=title,
        box=MARKDOWN,
    )
    for row in rows:
        parts = (f"{row.parts_ms[part]:.1f}" for part in PARTS)
        host = sum(row.engine_ms[part] for part in HOST_PARTS)
        times = (f"{ms:.1f}" for ms in (memory_ms, row.floor_ms.median, row.step_ms.median))
        grid.add_row(str(row.nodes), *times, str(row.ratio), *parts, f"{host:.2f}")
    return grid


def main() -> None:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", choices=MODELS, default="pair")
    parser.add_argument("--nodes", nargs="*", type=int, default=NODES)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--temperature", type=float, default=0.0)
    known = "bf16" if _native_dtype() == "bfloat16" else "f32"
    parser.add_argument("--precision", choices=PRECISIONS, default=known)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    # As `load_decoder` has it, and torch reads it once, before the arrays below
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    target, drafter, note = resolve(args.model, "bare")
    bandwidth = {"torch": torch_bandwidth(), "C": stream_bandwidth()}
    llm = LLM(
        target,
        drafters=[drafter],
        speculation=Speculation(tree="off"),
        max_num_seqs=1,
        **PRECISIONS[args.precision],  # type: ignore[arg-type]
    )
    decoder = llm.engine.target.decoder
    rate = matmul_rate(decoder.dtype)
    read = max(each["read"] for each in bandwidth.values() if each)
    memory_ms = weight_bytes(decoder) / read / 1e6
    console = Console(width=170)
    for name, found in bandwidth.items():
        says = ", ".join(f"{kind} {rate:.1f}" for kind, rate in (found or {}).items())
        console.print(f"GB/s by {name}: {says or 'not measured, there is no C compiler'}")
    console.print(f"GFLOP/s of a product: {rate:.0f}")
    rows = [measure_row(llm, n, args.rounds, args.temperature) for n in args.nodes]
    title = f"{note}; {args.precision}, {args.threads} threads, {PREFIX} tokens before the tree; ms"
    console.print(table(title, rows, memory_ms))
    if args.json:
        write_result(
            args.json,
            title,
            gigabytes_per_s=bandwidth,
            gigaflops=rate,
            memory_ms=memory_ms,
            rows=[asdict(row) for row in rows],
        )


if __name__ == "__main__":
    main()
