"""One GPU in one command: how near steps are to its memory's speed, and what trees bring there.

    python -m benchmarks.gpu --model 7b --json docs/results/gpu.json
    python -m benchmarks.gpu --device cpu --model pair --quick     # tries the program itself

Parts, in this order: kernel (attention against a float32 reference), floor (bandwidth; plain
decoding against the time the weights take to stream; a step by its nodes), layers (our kernels
between the products beside PyTorch's operators), decoding (trees, plain, transformers plain and
assisted, by turns), batches (1 to 64, `auto` against plain), quantised (a step with rounded weights
over the floor part's). The file is written after each part; parts that would begin after
`--minutes` are left out, and it says so.
"""

import argparse
import os
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import write_result
from benchmarks.kernel import KernelSize, copy_bandwidth, measure_kernel
from benchmarks.latency import MODELS, Ours, Row, resolve, table
from benchmarks.layers import measure_layers
from benchmarks.prompts import load_chats
from benchmarks.throughput import Row as BatchRow
from benchmarks.throughput import compare
from benchmarks.throughput import table as batch_table
from specinfer.bench import Spread, System, measure, ratio
from specinfer.config import Speculation
from specinfer.engine.measure import measure_runner
from specinfer.llm import LLM
from specinfer.models.decoder import Decoder
from specinfer.models.folder import resolve_model
from specinfer.models.quantization import QUANTIZATIONS
from specinfer.models.weights import load_decoder
from specinfer.run.runner import Runner

PARTS = ("kernel", "floor", "layers", "decoding", "batches", "quantised")
TREES = ("calibrated", "auto", "1,1,3,1,1,1,1,1", "1,1,1,1,1,1,1,1")
STEP_NODES = (1, 2, 4, 8, 16, 32, 64)
TEMPERATURES = (0.0, 0.8)
SHARES = {"int4": 0.5, "fp8": 0.7}
"""The part of a plain step's time that one of one node may take."""


@dataclass(frozen=True, slots=True)
class Size:
    """How much is measured."""

    kernel: KernelSize = field(default_factory=KernelSize)
    layer_nodes: tuple[int, ...] = (1, 32)
    prompts: int = 6
    tokens: int = 64
    batches: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64)
    pairs: int = 5


QUICK = Size(
    kernel=KernelSize(2**24, keys=300, heads=4, kv_heads=2, head_dim=16, repeats=2),
    layer_nodes=(1,),
    prompts=2,
    tokens=16,
    batches=(1, 2),
    pairs=3,
)


@dataclass(slots=True)
class Bar:
    """What was asked, and what came."""

    asked: str
    measured: str
    is_met: bool


@dataclass(slots=True)
class Result:
    """All that was measured so far."""

    bars: list[Bar] = field(default_factory=list)
    parts: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def judge(self, asked: str, value: float, limit: float, *, is_most: bool = False) -> None:
        """Note a bar: at least the limit, or at most."""
        is_met = value <= limit if is_most else value >= limit
        self.bars.append(Bar(asked, f"{value:.3g}", is_met))


def streamed_bytes(decoder: Decoder) -> int:
    """Plain weights that one step reads: all but an embedding table that is no output layer."""
    tensors = {id(each): each for each in decoder.parameters()}
    if decoder.lm_head is not None:
        del tensors[id(decoder.embedding.weight)]
    return sum(each.nbytes for each in tensors.values())


def step_times(runner: Runner) -> dict[int, float]:
    """Seconds of a step by its nodes."""
    times = measure_runner(runner, max_tokens=max(STEP_NODES))
    return {nodes: times.seconds(nodes) for nodes in STEP_NODES}


# --- decoding -------------------------------------------------------------------------------------


class OnDevice(Ours):
    """One engine on the device, for one request and for many."""

    def __init__(self, target: str, drafter: str, dtype: str, device: str, size: Size) -> None:
        self.llm = LLM(
            target,
            drafters=[drafter],
            dtype=dtype,
            device=device,
            max_num_seqs=max(size.batches),
            max_model_len=1024,
            speculation=Speculation(tree="off"),
        )
        self.sums = {}


class Transformers:
    """The same checkpoints by `transformers.generate`, with and without its assistant."""

    def __init__(self, target: str, drafter: str, dtype: str, device: torch.device) -> None:
        from transformers import AutoModelForCausalLM

        warnings.filterwarnings("ignore")
        self._device = device
        self._target, self._drafter = (
            AutoModelForCausalLM.from_pretrained(resolve_model(name), dtype=getattr(torch, dtype))
            .to(device)
            .eval()
            for name in (target, drafter)
        )

    def system(self, num_tokens: int, temperature: float, *, is_assisted: bool) -> System:
        """`generate` of exactly so many tokens."""
        options: dict[str, Any] = {"do_sample": False}
        if temperature:
            options = {"do_sample": True, "temperature": temperature, "top_k": 0}
        if is_assisted:
            options["assistant_model"] = self._drafter

        def run(prompt: Sequence[int]) -> int:
            ids = torch.tensor([list(prompt)], device=self._device)
            with torch.inference_mode():
                out = self._target.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    min_new_tokens=num_tokens,
                    max_new_tokens=num_tokens,
                    pad_token_id=0,
                    **options,
                )
            return int(out.shape[1]) - len(prompt)

        return run


def measure_decoding(
    ours: OnDevice, theirs: Transformers, prompts: Sequence[list[int]], size: Size
) -> list[Row]:
    """Every system on every prompt, at both temperatures."""
    rows = []
    for temperature in TEMPERATURES:
        trees = ("off", *TREES)
        systems = {tree: ours.system(tree, size.tokens, temperature) for tree in trees}
        systems["transformers"] = theirs.system(size.tokens, temperature, is_assisted=False)
        systems["assisted"] = theirs.system(size.tokens, temperature, is_assisted=True)
        ours.sums.clear()
        rates = measure(systems, prompts)
        for name in systems:
            row = Row(
                system=name,
                temperature=temperature,
                tokens_per_s=Spread.of(rates[name]).median,
                to_transformers=ratio(rates, name, "assisted"),
                to_plain=ratio(rates, name, "off"),
            )
            if name in trees:
                ours.describe(row, name)
            rows.append(row)
    return rows


# --- all ------------------------------------------------------------------------------------------


def show(result: Result, console: Console, title: str) -> None:
    """The bars and the parts as tables."""
    from rich.box import MARKDOWN

    parts = result.parts
    titles = {"kernel": "attention, bfloat16", "layers": "between the products"}
    for part in (part for part in titles if part in parts):
        grid = Table(*parts[part][0], title=titles[part], box=MARKDOWN)
        for row in parts[part]:
            grid.add_row(*(f"{x:.4g}" if isinstance(x, float) else str(x) for x in row.values()))
        console.print(grid)
    if "floor" in parts:
        floor = parts["floor"]
        steps = " ".join(f"{nodes}: {each * 1e3:.3f}" for nodes, each in floor["step_s"].items())
        console.print(
            f"bandwidth {parts['bandwidth'] / 1e9:.0f} GB/s; weights "
            f"{floor['weights_bytes'] / 1e9:.2f} GB stream in {floor['floor_s'] * 1e3:.3f} ms; "
            f"ms a step by nodes: {steps}"
        )
    if "decoding" in parts:
        grid = table(f"{title} (× transformers: its assisted generation)", parts["decoding"])
        console.print(grid)
    if "batches" in parts:
        console.print(batch_table(title, parts["batches"]))
    if "quantised" in parts:
        grid = Table("weights", *map(str, STEP_NODES), title="ms a step by nodes", box=MARKDOWN)
        for row in parts["quantised"]:
            steps = row["step_s"].values()
            grid.add_row(row["weights"], *(f"{each * 1e3:.3f}" for each in steps))
        console.print(grid)
    grid = Table("asked", "measured", "", title=title, box=MARKDOWN)
    for bar in result.bars:
        grid.add_row(bar.asked, bar.measured, "met" if bar.is_met else "missed")
    console.print(grid)
    if result.left_out:
        console.print(f"left out, for want of time: {', '.join(result.left_out)}")


def as_json(result: Result) -> dict[str, Any]:
    """Parts with their rows as plain values."""
    plain = {
        name: [
            asdict(each) if isinstance(each, Row) or name == "batches" else each for each in part
        ]
        if isinstance(part, list)
        else part
        for name, part in result.parts.items()
    }
    return {
        "bars": [asdict(bar) for bar in result.bars],
        "parts": plain,
        "seconds": result.seconds,
        "left_out": result.left_out,
    }


def resolve_device(name: str) -> torch.device:
    """The device, or the reason why nothing is measured."""
    if name == "cuda" and not torch.cuda.is_available():
        raise SystemExit(
            "benchmarks.gpu measures a GPU and torch sees none here; to try the program itself: "
            "python -m benchmarks.gpu --device cpu --model pair --quick"
        )
    if name == "cpu":  # read when the kernel is first imported
        os.environ["TRITON_INTERPRET"] = "1"
    return torch.device(name)


class Measurement:
    """The parts, each measured once, and what they said so far."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.began = time.perf_counter()
        self.args = args
        self.device = resolve_device(args.device)
        self.size = QUICK if args.quick else Size()
        self.result = Result()
        is_gpu = self.device.type == "cuda"
        name = torch.cuda.get_device_name(self.device) if is_gpu else "no GPU: a trial"
        self.target, self.drafter, note = resolve(args.model, args.drafter)
        self.title = f"{name}; {note}; {args.dtype}"
        self.result.seconds["twins"] = time.perf_counter() - self.began
        self.bandwidth = copy_bandwidth(self.size.kernel, self.device)
        self.result.parts["bandwidth"] = self.bandwidth

    @property
    def is_late(self) -> bool:
        """Whether nothing more may begin."""
        return time.perf_counter() - self.began > 60 * float(self.args.minutes)

    @cached_property
    def ours(self) -> OnDevice:
        """The engine that all parts but the kernel's share."""
        args = self.args
        return OnDevice(self.target, self.drafter, args.dtype, args.device, self.size)

    @cached_property
    def prompts(self) -> list[list[int]]:
        """Always the same, in the same order."""
        encode = self.ours.llm.tokenizer.apply_chat_template
        return [list(encode(chat)) for chat in load_chats(encode=encode)]

    def run(self) -> None:
        """Measure every part that was asked for and that there is time for."""
        for part in self.args.parts:
            if self.is_late:
                self.result.left_out.append(part)
                continue
            start = time.perf_counter()
            self.result.parts[part] = getattr(self, part)()
            self.result.seconds[part] = time.perf_counter() - start
            if self.args.json:
                write_result(self.args.json, self.title, **as_json(self.result))

    def kernel(self) -> list[dict[str, Any]]:
        """Error and time of tree attention."""
        rows = measure_kernel(self.size.kernel, self.device, self.bandwidth)
        worst = max(row["error"] for row in rows)
        self.result.judge("kernel's error of the norm, at most 4e-3", worst, 4e-3, is_most=True)
        return rows

    def floor(self) -> dict[str, Any]:
        """The target's step by its nodes, beside the time its weights take to stream."""
        runner = self.ours.llm.engine.target
        num_bytes = streamed_bytes(runner.decoder)
        floor_s = num_bytes / self.bandwidth
        steps = step_times(runner)
        asked = "a step of 32 nodes over one of one, at most 1.15"
        self.result.judge(asked, steps[32] / steps[1], 1.15, is_most=True)
        return {
            "weights_bytes": num_bytes,
            "floor_s": floor_s,
            "step_s": steps,
            "floor_over_step": floor_s / steps[1],
        }

    def layers(self) -> list[dict[str, Any]]:
        """Steps with our kernels between their products, and with PyTorch's operators."""
        runner = self.ours.llm.engine.target
        return measure_layers(runner, self.size.layer_nodes, self.size.kernel.repeats)

    def decoding(self) -> list[Row]:
        """One request at a time, beside transformers."""
        theirs = Transformers(self.target, self.drafter, self.args.dtype, self.device)
        rows = measure_decoding(self.ours, theirs, self.prompts[: self.size.prompts], self.size)
        for temperature, least in zip(TEMPERATURES, (3.0, 2.2), strict=True):
            own = {row.system: row for row in rows if row.temperature == temperature}
            best = max((own[tree] for tree in TREES), key=lambda row: row.tokens_per_s)
            assert best.to_plain
            assert best.to_transformers
            what = f"T {temperature:g}, best tree ({best.system}) over"
            judge = self.result.judge
            judge(f"{what} plain, at least {least}", best.to_plain.median, least)
            judge(f"{what} transformers assisted, at least 4", best.to_transformers.median, 4.0)
            if temperature == 0 and "floor" in self.result.parts:
                share = self.result.parts["floor"]["floor_s"] * own["off"].tokens_per_s
                judge("plain decoding over its weights' floor, at least 0.8", share, 0.8)
        return rows

    def batches(self) -> list[BatchRow]:
        """Many requests at a time: `auto` against plain."""
        rows = []
        for batch in self.size.batches:
            if self.is_late:
                self.result.left_out.append(f"batch {batch}")
                continue
            row = compare(
                self.ours.llm,
                self.prompts,
                batch,
                ("1,1,1,1",),
                pairs=self.size.pairs,
                temperature=0.0,
                say=lambda line: None,
            )
            asked = f"auto over plain at batch {batch}, at least 1"
            self.result.judge(asked, row.auto_to_plain.median, 1.0)
            rows.append(row)
        return rows

    def quantised(self) -> list[dict[str, Any]]:
        """A step of the target by its nodes, its weights rounded while they are read."""
        rows, folder = [], resolve_model(self.target)
        schemes = SHARES if self.device.type == "cuda" else ("int4", "int8")  # for a trial
        for name in schemes:
            if self.is_late:
                self.result.left_out.append(name)
                continue
            decoder = load_decoder(
                folder,
                dtype=self.args.dtype,
                device=self.device,
                quantization=QUANTIZATIONS[name],
            )
            steps = step_times(Runner(decoder, 1024))
            rows.append({"weights": name, "step_s": steps})
            if "floor" in self.result.parts and name in SHARES:
                share = steps[1] / self.result.parts["floor"]["step_s"][1]
                asked = f"a step with {name} over a plain one, at most {SHARES[name]}"
                self.result.judge(asked, share, SHARES[name], is_most=True)
        return rows


def main() -> None:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--model", choices=MODELS, default="7b")
    parser.add_argument("--drafter", choices=("bare", "1/50"), default="bare")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--parts", nargs="*", choices=PARTS, default=PARTS)
    parser.add_argument("--minutes", type=float, default=6.5, help="no part begins after these")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: figures mean nothing")
    parser.add_argument("--json", type=Path, metavar="FILE")
    measurement = Measurement(parser.parse_args())
    measurement.run()
    show(measurement.result, Console(width=200), measurement.title)


if __name__ == "__main__":
    main()
