"""Resident memory of a process that serves, stage by stage, beside its weights and K and V.

    python -m benchmarks.memory --model 1b --precisions bf16 int8 --json docs/results/memory-1b.json

Every case is a fresh process: it imports, loads, serves one prompt, then as many tokens at once as
K and V have room for. Weights are what a checkpoint in that precision holds; whatever else is
resident counts against us, Python, PyTorch and mapped files included.
"""

import argparse
import json
import random
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import write_result

# What is being measured imports nothing before its time: all else is imported late here.

MIB = 1 << 20
NUM_TOGETHER = 8
"""Requests that fill K and V."""
SLACK = 32
"""Tokens of a request's share of K and V that are left to its tree."""


@dataclass(slots=True)
class Stage:
    """The process once a stage is done.

    anonymous  bytes of its own; mapped: resident pages of files, libraries and weights
    peak       the most bytes of both while the stage lasted
    """

    name: str
    anonymous: int
    mapped: int
    peak: int


@dataclass(slots=True)
class Case:
    """One process: what it is asked, what that takes at least, and its stages.

    weights  bytes of target and drafter in a checkpoint; kv: what the cache was given
    """

    precision: str
    tree: str
    weights: int
    kv: int
    stages: list[Stage]

    @property
    def peak(self) -> int:
        """Bytes resident at most."""
        return max(stage.peak for stage in self.stages)

    @property
    def imported(self) -> int:
        """Bytes resident before anything was loaded."""
        (stage,) = (stage for stage in self.stages if stage.name == "specinfer")
        return stage.anonymous + stage.mapped


class Recorder:
    """Notes stages of the process it is in; needs Linux."""

    def __init__(self) -> None:
        self.stages: list[Stage] = []

    def note(self, name: str) -> None:
        """A stage is done; the next one's peak counts from here."""
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        fields = dict(line.split(":", 1) for line in lines)
        kib = (int(fields[field].split()[0]) for field in ("RssAnon", "RssFile", "VmHWM"))
        self.stages.append(Stage(name, *(1024 * size for size in kib)))
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def serve(asked: dict[str, Any]) -> list[Stage]:
    """Be the process: import, load, serve."""
    recorder = Recorder()
    recorder.note("Python")
    import numpy  # noqa: F401

    recorder.note("numpy")
    import torch  # noqa: F401

    recorder.note("PyTorch")
    from specinfer import LLM, SamplingParams, Speculation

    recorder.note("specinfer")
    llm = LLM(
        asked["target"],
        drafters=asked["drafters"],
        speculation=Speculation(tree=asked["tree"]),
        max_num_seqs=NUM_TOGETHER,
        kv_cache_memory=asked["kv"],
        show_progress=False,
        **asked["options"],
    )
    recorder.note("loaded")
    prompt_tokens, new_tokens = asked["prompt_tokens"], asked["new_tokens"]
    vocab_size = llm.tokenizer.vocab_size
    rng = random.Random(0)

    def generate(num_prompts: int, num_tokens: int, max_tokens: int) -> None:
        prompts = [rng.choices(range(vocab_size), k=num_tokens) for _ in range(num_prompts)]
        llm.generate(prompts, SamplingParams(max_tokens=max_tokens, ignore_eos=True))

    generate(1, prompt_tokens, 1)
    recorder.note("first token")
    generate(1, prompt_tokens, new_tokens)
    recorder.note("one request")
    share = llm.engine.scheduler.num_slots // NUM_TOGETHER
    generate(NUM_TOGETHER, share - new_tokens - SLACK, new_tokens)
    recorder.note("K and V full")
    return recorder.stages


def weight_bytes(folder: Path, precision: str) -> int:
    """What a checkpoint in this precision holds: linears rounded, all else as floats."""
    from benchmarks.peer_ours import PRECISIONS
    from specinfer.models.checkpoint import Checkpoint
    from specinfer.models.quantization import QUANTIZATIONS

    asked = PRECISIONS[precision]
    float_bytes = 4 if asked["dtype"] == "float32" else 2
    scheme = QUANTIZATIONS.get(asked.get("quantization", ""))
    num_bytes = 0
    for name, shape in Checkpoint(folder).shapes.items():
        num_values = shape[0] * shape[-1] if len(shape) == 2 else shape[0]
        if scheme is None or len(shape) == 1 or "embed" in name:
            num_bytes += float_bytes * num_values
        else:
            num_scales = num_values // (scheme.group_size or shape[1])
            num_bytes += scheme.bits * num_values // 8 + float_bytes * num_scales
    return num_bytes


def measure(target: str, drafter: str, precision: str, tree: str, args: Any) -> Case:
    """Run one case."""
    from benchmarks.peer_ours import PRECISIONS
    from specinfer.config import parse_bytes
    from specinfer.models.folder import resolve_model

    drafters = [] if tree == "off" else [drafter]
    kv = parse_bytes("--kv", args.kv)
    asked = {
        "target": target,
        "drafters": drafters,
        "tree": tree,
        "kv": kv,
        "options": PRECISIONS[precision],
        "prompt_tokens": args.prompt,
        "new_tokens": args.tokens,
    }
    command = [sys.executable, "-m", "benchmarks.memory", "--case", json.dumps(asked)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE)
    stages = [Stage(**each) for each in json.loads(done.stdout)]
    weights = weight_bytes(resolve_model(target), precision)
    for each in drafters:
        floats = precision if precision == "f32" else "bf16"
        weights += weight_bytes(resolve_model(each), floats)
    return Case(precision, tree, weights, kv, stages)


def show(cases: list[Case], title: str) -> None:
    """Print every stage, then every case beside what it needs."""
    from rich.box import MARKDOWN
    from rich.console import Console
    from rich.table import Table

    console = Console(width=160)
    names = [stage.name for stage in cases[0].stages]
    stages = Table("precision", "tree", *names, box=MARKDOWN, title=f"{title}; MiB: own + mapped")
    for case in cases:
        sizes = [f"{each.anonymous / MIB:.0f} + {each.mapped / MIB:.0f}" for each in case.stages]
        stages.add_row(case.precision, case.tree, *sizes)
    console.print(stages)
    columns = ("weights", "K and V", "imported", "peak", "rest", "peak / (weights + K and V)")
    needs = Table("precision", "tree", *columns, box=MARKDOWN, title=f"{title}; MiB")
    for case in cases:
        rest = case.peak - case.weights - case.kv - case.imported
        sizes = [
            f"{size / MIB:.0f}" for size in (case.weights, case.kv, case.imported, case.peak, rest)
        ]
        ratio = case.peak / (case.weights + case.kv)
        needs.add_row(case.precision, case.tree, *sizes, f"{ratio:.2f}")
    console.print(needs)


def main() -> None:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--model", choices=("pair", "0.3b", "1b", "7b"), default="pair")
    parser.add_argument("--drafter", choices=("bare", "1/50"), default="1/50")
    parser.add_argument("--precisions", nargs="+", default=("bf16", "int8"))
    parser.add_argument("--trees", nargs="+", default=("off", "1,1,3,1,1,1,1,1"))
    parser.add_argument("--kv", default="256MiB", help="for K and V, the drafter's included")
    parser.add_argument("--prompt", type=int, default=512, help="tokens")
    parser.add_argument("--tokens", type=int, default=64, help="new ones")
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    if args.case is not None:
        print(json.dumps([asdict(stage) for stage in serve(json.loads(args.case))]))
        return
    from benchmarks.latency import resolve

    target, drafter, note = resolve(args.model, args.drafter)
    cases = [
        measure(target, drafter, precision, tree, args)
        for precision in args.precisions
        for tree in args.trees
    ]
    show(cases, note)
    if args.json is not None:
        write_result(args.json, "memory", inflated=note, cases=[asdict(each) for each in cases])


if __name__ == "__main__":
    main()
