"""Ours beside transformers, llama.cpp and OpenVINO GenAI: same weights, prompts and threads.

    python -m benchmarks.peers --model 1b
    python -m benchmarks.peers --model 1b --systems 'ours/bf16/*' 'llama.cpp/*/plain' --prompts 5
    python -m benchmarks.peers --list

Every prompt goes through every system before the next one does. Tokens per second are those of
decoding alone, without loading and prompt; prompt processing is measured by itself. Ratios are
medians of paired runs. A system that cannot be had is named with what is missing.
"""

import argparse
import fnmatch
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from benchmarks import write_result
from benchmarks.continuation import Asked, Continuation, Continue, Peer, decode_rate, prompt_rate
from benchmarks.latency import MODELS, resolve
from benchmarks.peer_llama_cpp import BUILT, LlamaCpp
from benchmarks.peer_openvino import OpenVINO
from benchmarks.peer_ours import Ours
from benchmarks.peer_transformers import TransformersPeer
from benchmarks.prompts import load_chats
from benchmarks.throughput import SETTLE_S
from specinfer.bench import Spread, alternate, ratio
from specinfer.errors import SpecInferError
from specinfer.llm import LLM
from specinfer.models.folder import resolve_model
from specinfer.request import SamplingParams
from specinfer.text.tokenizer import Tokenizer

PLAIN, AUTO = "ours/bf16/plain", "ours/bf16/auto"
TREES = ("1,1,1,1,1", "1,1,1,1,1,1,1,1")
PROMPT_TOKENS = 512


@dataclass(slots=True)
class Row:
    """One system.

    tokens_per_s  decoded, per batch of prompts
    plain, auto   ours over it, prompt by prompt; None where ours was not run
    same_text     greedy: on how many batches it wrote what our plain decoding did
    """

    system: str
    tokens_per_s: Spread
    plain: Spread | None
    auto: Spread | None
    same_text: str = ""
    runs: list[float] = field(default_factory=list)


def choose(peers: Sequence[Peer], patterns: Sequence[str]) -> list[str]:
    """The systems' names that a pattern fits, and those that are written out in full."""
    known = [f"{peer.name}/{way}" for peer in peers for way in peer.ways()]
    chosen = [name for name in known if any(fnmatch.fnmatchcase(name, p) for p in patterns)]
    exact = [p for p in patterns if p not in known and not set(p) & set("*?[")]
    return chosen + exact


def open_systems(peers: Sequence[Peer], names: Sequence[str]) -> dict[str, Continue]:
    """Load what can be had, and say of the rest why not."""
    by_name = {peer.name: peer for peer in peers}
    systems: dict[str, Continue] = {}
    for name in names:
        peer, precision, way = (*name.split("/"), "", "")[:3]
        try:
            if peer not in by_name:
                raise SpecInferError(f"known are {', '.join(by_name)}")
            systems[name] = by_name[peer].open(precision, way)
        except SpecInferError as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
    return systems


def load_prompts(target: str, num: int, num_tokens: int) -> list[list[int]]:
    """Chat prompts whose greedy answer is longer than what is measured.

    So it does not matter what a system does about end tokens. Whether an answer is long enough is
    asked of the bundled pair's target, of which all models here are twins.
    """
    llm = LLM("zoo:parley", dtype="float32", max_num_seqs=8)
    encode = Tokenizer.from_folder(resolve_model(target)).apply_chat_template
    found: list[list[int]] = []
    chats = load_chats(encode=encode)
    for start in range(0, len(chats), 8):
        prompts = [encode(chat) for chat in chats[start : start + 8]]
        params = SamplingParams(temperature=0.0, max_tokens=num_tokens + 8)
        for prompt, output in zip(prompts, llm.generate(prompts, params), strict=True):
            if output.outputs[0].finish_reason == "length":
                found.append(prompt)
        if len(found) >= num:
            return found[:num]
    raise SystemExit(f"only {len(found)} prompts have answers of {num_tokens} tokens")


def settle(systems: dict[str, Continue], prompts: Sequence[list[int]], num_tokens: int) -> None:
    """Let `auto` serve for a while: it learns while it does."""
    for name, system in systems.items():
        if name.startswith("ours/") and name.endswith("/auto"):
            until_s = time.perf_counter() + SETTLE_S
            while time.perf_counter() < until_s:
                system(prompts, num_tokens, 0.0)


def decoding(
    systems: dict[str, Continue],
    batches: Sequence[list[list[int]]],
    num_tokens: int,
    temperature: float,
    tokenizer: Tokenizer,
) -> list[Row]:
    """Every system on every batch of prompts."""
    texts: dict[str, list[list[str]]] = {name: [] for name in systems}

    def rated(name: str) -> Any:
        def run(batch: list[list[int]]) -> float:
            done = systems[name](batch, num_tokens, temperature)
            texts[name].append([_text(each, tokenizer) for each in done])
            return decode_rate(done)

        return run

    rates = alternate({name: rated(name) for name in systems}, batches)
    rows = []
    for name in systems:
        same = ""
        if temperature == 0 and PLAIN in systems:
            pairs = zip(texts[name][1:], texts[PLAIN][1:], strict=True)
            same = f"{sum(_agree(*pair) for pair in pairs)}/{len(batches)}"
        rows.append(
            Row(
                system=name,
                tokens_per_s=Spread.of(rates[name]),
                plain=ratio(rates, PLAIN, name) if PLAIN in systems else None,
                auto=ratio(rates, AUTO, name) if AUTO in systems else None,
                same_text="" if name.endswith("/bench") else same,
                runs=rates[name],
            )
        )
    return rows


def prompt_processing(systems: dict[str, Continue], rounds: int) -> list[Row]:
    """Prompt tokens per second of random prompts, by the systems that decode plainly."""
    plain = {name: each for name, each in systems.items() if name.endswith(("/plain", "/bench"))}
    generator = torch.Generator().manual_seed(0)
    shape = (rounds + 1, PROMPT_TOKENS)
    prompts = torch.randint(4, 4000, shape, generator=generator).tolist()

    def rated(system: Continue) -> Any:
        return lambda prompt: prompt_rate(system([prompt], 2, 0.0)[0], prompt)

    rates = alternate({name: rated(each) for name, each in plain.items()}, prompts)
    return [
        Row(name, Spread.of(own), ratio(rates, PLAIN, name) if PLAIN in rates else None, None)
        for name, own in rates.items()
    ]


def _text(each: Continuation, tokenizer: Tokenizer) -> str:
    if isinstance(each.tokens, str):
        return each.tokens
    return tokenizer.decode(each.tokens, skip_special_tokens=False)


def _agree(ours: Sequence[str], theirs: Sequence[str]) -> bool:
    """Whether texts are the same as far as both go: some write a few tokens more."""
    return all(a.startswith(b) or b.startswith(a) for a, b in zip(ours, theirs, strict=True))


def table(title: str, rows: Sequence[Row]) -> Table:
    """The rows, fastest first."""
    grid = Table(
        *("system", "tok/s", "our plain ÷ it", "our auto ÷ it", "our greedy text"),
        title=title,
        box=MARKDOWN,
    )
    for row in sorted(rows, key=lambda row: -row.tokens_per_s.median):
        cells = (str(each or "") for each in (row.tokens_per_s, row.plain, row.auto))
        grid.add_row(row.system, *cells, row.same_text)
    return grid


def plot(measured: dict[str, list[Row]], file: Path) -> None:
    """Tokens per second of every system, a panel per measurement."""
    try:
        import matplotlib.pyplot as plt
    except ImportError:
        raise SystemExit("plots need matplotlib: pip install 'specinfer[bench]'") from None
    height = 0.3 * max(map(len, measured.values())) + 1
    figure, panels = plt.subplots(
        1, len(measured), figsize=(5 * len(measured), height), squeeze=False
    )
    for panel, (title, rows) in zip(panels[0], measured.items(), strict=True):
        rows = sorted(rows, key=lambda row: row.tokens_per_s.median)
        medians = [row.tokens_per_s.median for row in rows]
        below = [row.tokens_per_s.median - row.tokens_per_s.low for row in rows]
        above = [row.tokens_per_s.high - row.tokens_per_s.median for row in rows]
        colours = ["C1" if row.system.startswith("ours") else "C0" for row in rows]
        names = [row.system for row in rows]
        panel.barh(names, medians, xerr=(below, above), color=colours)
        panel.set(title=title, xlabel="tokens per second")
        panel.tick_params(labelsize=7)
    figure.tight_layout()
    figure.savefig(file)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", choices=MODELS, default="pair")
    parser.add_argument("--drafter", choices=("bare", "1/50"), default="bare")
    parser.add_argument("--systems", nargs="*", default=("*/bf16/*",), metavar="PATTERN")
    parser.add_argument("--list", action="store_true", help="name the systems there are, and end")
    parser.add_argument("--trees", nargs="*", default=TREES, metavar="WIDTHS")
    parser.add_argument("--temperatures", nargs="*", type=float, default=(0.0,))
    parser.add_argument("--batch", type=int, default=1, help="distinct prompts at a time")
    parser.add_argument("--prompts", type=int, default=5, help="times the batch")
    parser.add_argument("--tokens", type=int, default=48, help="per prompt")
    parser.add_argument(
        "--prompt-rounds", type=int, default=0, help=f"prompts of {PROMPT_TOKENS} tokens to time"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--llama-cpp", type=Path, default=BUILT, metavar="DIR")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--plot", type=Path, metavar="FILE")
    return parser.parse_args()


def main() -> None:
    """Measure, print, and write JSON."""
    args = parse()
    torch.set_num_threads(args.threads)
    target, drafter, note = resolve(args.model, args.drafter)
    folders = resolve_model(target), resolve_model(drafter)
    asked = Asked(*folders, threads=args.threads, batch=args.batch)
    tokenizer = Tokenizer.from_folder(folders[0])

    def decode(prompt: Sequence[int]) -> str:
        return tokenizer.decode(prompt, skip_special_tokens=False)

    peers: list[Peer] = [
        Ours(asked, args.trees),
        TransformersPeer(asked),
        LlamaCpp(asked, decode, args.llama_cpp),
        OpenVINO(asked),
    ]
    names = choose(peers, args.systems)
    if args.list:
        print("\n".join(names))
        return
    prompts = load_prompts(target, args.prompts * args.batch, args.tokens)
    batches = [prompts[i : i + args.batch] for i in range(0, len(prompts), args.batch)]
    title = f"{note}; {args.threads} threads, {args.tokens} tokens, batch {args.batch}"
    console = Console(width=160)
    measured: dict[str, list[Row]] = {}

    def keep(label: str, rows: list[Row]) -> None:
        measured[label] = rows
        console.print(table(f"{title}, {label}", rows))
        if args.json:  # what comes after it may be cut off
            found = {label: [asdict(row) for row in own] for label, own in measured.items()}
            write_result(args.json, title, versions=versions, measured=found)

    try:
        systems = open_systems(peers, names)
        versions = {peer.name: peer.version() for peer in peers if _is_used(peer, systems)}
        if args.prompt_rounds:
            label = f"prompt of {PROMPT_TOKENS} tokens"
            keep(label, prompt_processing(systems, args.prompt_rounds))
        settle(systems, batches[0], args.tokens)
        for temperature in args.temperatures:
            rows = decoding(systems, batches, args.tokens, temperature, tokenizer)
            keep(f"temperature {temperature:g}", rows)
    finally:
        for peer in peers:
            peer.close()
    if args.plot:
        plot(measured, args.plot)


def _is_used(peer: Peer, systems: dict[str, Continue]) -> bool:
    return any(name.startswith(f"{peer.name}/") for name in systems)


if __name__ == "__main__":
    main()
