"""The verifier's share of a step: trees of 64 slots for 8 requests, beside the target's own time.

    python -m benchmarks.verifier --json docs/results/verifier.json

Laws are synthetic, over 32k tokens: a peaked p at each node, and a q that lies close to it, in the
middle or far off. The target is the 1B twin (benchmarks/inflate.py), whose vocabulary is smaller;
its step of 8 × 65 rows and every verifier take turns in one run. Medians over rounds.
"""

import argparse
import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from benchmarks.inflate import twin
from specinfer.baselines import verify_gbv, verify_kseq
from specinfer.bench import Spread
from specinfer.cache.blocks import BlockAllocator
from specinfer.models.weights import load_decoder
from specinfer.run.batch import Span
from specinfer.run.runner import Runner
from specinfer.sampling import add_iid, add_picks, add_without_replacement
from specinfer.tree import Floats, TokenTree
from specinfer.verify import Verdict, verify_match, verify_topdown, verify_traversal

Verifier = Callable[[TokenTree, Floats, np.random.Generator], Verdict]

VERIFIERS: dict[str, Verifier] = {
    "traversal": verify_traversal,
    "topdown": verify_topdown,
    "match": verify_match,
    "kseq": verify_kseq,
    "gbv": verify_gbv,
}
SLOTS = ("without-replacement", "iid", "pick")
NOISE = {"close": 0.1, "middling": 1.0, "far": 4.0}
"""Standard deviation of what is added to p's logits to make q's."""
SHARPNESS = 3.0
"""Standard deviation of p's logits."""
WIDTHS = (4, 3, 1, 1, 1, 1)
CONTEXT = 256
BOUND = 0.05


@dataclass(slots=True)
class Row:
    """One verifier on one kind of slots: milliseconds for all requests, share of the step."""

    verifier: str
    slots: str
    laws: str
    overlap: float
    ms: Spread
    share: Spread
    accepted: float


@dataclass(frozen=True, slots=True)
class Laws:
    """Synthetic laws: p and q [requests, nodes, vocab] float32, the same node's at the same row."""

    p: Floats
    q: dict[str, Floats]

    @classmethod
    def make(cls, num_requests: int, num_nodes: int, vocab: int) -> "Laws":
        """Peaked laws; all q's differ from p by independent noise."""
        generator = torch.Generator().manual_seed(0)
        shape = (num_requests, num_nodes, vocab)

        def noise(scale: float) -> torch.Tensor:
            return torch.randn(shape, generator=generator).mul_(scale)

        scores = noise(SHARPNESS)
        q = {name: (scores + noise(each)).softmax(-1).numpy() for name, each in NOISE.items()}
        return cls(scores.softmax(-1).numpy(), q)

    def overlap(self, name: str) -> float:
        """Mean of Σ min(p, q)."""
        return float(np.minimum(self.p, self.q[name]).sum(-1).mean())


def grow(rows: Floats, slots: str, widths: Sequence[int], rng: np.random.Generator) -> TokenTree:
    """A tree of a fixed shape whose laws are the rows of its nodes."""
    tree = TokenTree(0)
    node = 0
    while node < len(tree):
        if (depth := tree.depths[node]) < len(widths):
            k = widths[depth]
            if slots == "iid":
                add_iid(tree, node, rows, node, k, rng)
            elif slots == "pick":
                best = np.argpartition(-rows[node], k)[:k]
                add_picks(tree, node, best[np.argsort(-rows[node][best])].tolist())
            else:
                add_without_replacement(tree, node, rows, node, k, rng)
        node += 1
    return tree


def target_step(model: str, num_requests: int, num_rows: int) -> Callable[[], None]:
    """One step of the target: so many rows of a tree behind a context, for each request."""
    runner = Runner(load_decoder(twin(model)), num_requests * (CONTEXT + num_rows))
    allocator = BlockAllocator(num_requests * (CONTEXT + num_rows), 1)
    rng = np.random.default_rng(0)
    tree = grow(rng.dirichlet(np.ones(num_rows), num_rows), "without-replacement", WIDTHS, rng)
    spans = []
    for _ in range(num_requests):
        pages = allocator.allocate(CONTEXT + num_rows)
        assert pages is not None
        spans.append(
            Span(
                tokens=rng.integers(4, 4000, num_rows).tolist(),
                positions=[CONTEXT + depth for depth in tree.depths],
                pages=pages,
                prefix=CONTEXT,
                start=CONTEXT,
                mask=tree.ancestor_mask(),
                num_logits=num_rows,
            )
        )

    def step() -> None:
        runner.run(spans).sum().item()  # a number: the step has ended

    return step


def measure(
    laws: Laws, step: Callable[[], None], verifiers: Sequence[str], rounds: int
) -> tuple[Spread, list[Row]]:
    """The step and every case in turn, round by round; the first round is not counted."""
    cases = [
        (verifier, slots, name)
        for slots in SLOTS
        for name in NOISE
        for verifier in verifiers
        if slots == "iid" or verifier not in ("kseq", "gbv")
    ]
    seconds: dict[tuple[str, str, str], list[float]] = {case: [] for case in cases}
    accepted = dict.fromkeys(cases, 0)
    steps = []
    rng = np.random.default_rng(1)
    for turn in range(rounds + 1):
        start = time.perf_counter()
        step()
        steps.append(time.perf_counter() - start)
        for case in cases[turn % len(cases) :] + cases[: turn % len(cases)]:
            verifier, slots, name = case
            trees = [grow(rows, slots, WIDTHS, rng) for rows in laws.q[name]]
            _cool(laws, name)
            start = time.perf_counter()
            verdicts = [VERIFIERS[verifier](t, p, rng) for t, p in zip(trees, laws.p, strict=True)]
            seconds[case].append(time.perf_counter() - start)
            accepted[case] += sum(len(verdict.path) for verdict in verdicts)
    rows = [
        Row(
            verifier=verifier,
            slots=slots,
            laws=name,
            overlap=laws.overlap(name),
            ms=Spread.of([1e3 * each for each in seconds[verifier, slots, name][1:]]),
            share=Spread.of(
                [a / b for a, b in zip(seconds[verifier, slots, name][1:], steps[1:], strict=True)]
            ),
            accepted=accepted[verifier, slots, name] / (rounds + 1) / len(laws.p),
        )
        for verifier, slots, name in cases
    ]
    return Spread.of([1e3 * each for each in steps[1:]]), rows


def _cool(laws: Laws, name: str) -> None:
    """Read other laws until growing has left none of these in a cache."""
    next(rows for other, rows in laws.q.items() if other != name).sum()


def table(title: str, rows: Sequence[Row]) -> Table:
    """The rows for a terminal or a document."""
    columns = ("slots", "p and q", "verifier", "ms", "share of the step", "accepted")
    grid = Table(*columns, title=title, box=MARKDOWN)
    for row in rows:
        grid.add_row(
            row.slots,
            f"{row.laws} ({row.overlap:.2f})",
            row.verifier,
            str(row.ms),
            f"{row.share.median:.2%}",
            f"{row.accepted:.2f}",
        )
    return grid


def main() -> None:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", default="1b", help="the twin whose step is timed")
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--verifiers", nargs="*", choices=VERIFIERS, default=list(VERIFIERS))
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    num_nodes = 1 + sum(np.cumprod(WIDTHS).tolist())
    laws = Laws.make(args.requests, num_nodes, args.vocab)
    step = target_step(args.model, args.requests, num_nodes)
    step_ms, rows = measure(laws, step, args.verifiers, args.rounds)
    title = (
        f"{args.requests} requests × {num_nodes - 1} slots × {args.vocab} tokens; the {args.model} "
        f"twin's step takes {step_ms.median:.0f} ms, {torch.get_num_threads()} threads"
    )
    Console(width=160).print(table(title, rows))
    worst = max(
        row.share.median for row in rows if row.verifier in ("traversal", "topdown", "match")
    )
    print(f"largest share of traversal, topdown and match: {worst:.2%} (asked: {BOUND:.0%})")
    if args.json:
        result = {
            "what": title,
            "when": time.strftime("%Y-%m-%d"),
            "processor": platform.processor() or platform.machine(),
            "step_ms": asdict(step_ms),
            "rows": [asdict(row) for row in rows],
        }
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
