"""A server under hostile load for some minutes: does it stay exact, and does it give all back?

    scripts/soak --seconds 600

Many clients, KV memory for a quarter of them; some leave in the middle of an answer, some send
bodies that are broken. Every answer that was read to its end must be that of an offline run without
trees; at the end no page may be in use, memory may not have grown, the log may tell of no error.
"""

import argparse
import asyncio
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from benchmarks import write_result
from benchmarks.hostile import BROKEN, Answer, Job, ask, leave, send_broken, tear
from benchmarks.prompts import load_chats
from benchmarks.server_process import ServerProcess

TARGET, DRAFTER = "zoo:parley", "zoo:parley-draft"
MAX_MODEL_LEN = 192
DISCONNECTING, BREAKING = 0.20, 0.05
MAX_GROWTH = 0.02
JUDGED_S = 600.0
"""In shorter runs memory is still warming up, and its growth says nothing: with every new size of
step the kernels' caches grow, for about 200 s."""
_PATIENCE_S = 120.0
"""An answer that takes longer is taken for one that never comes."""
_SETTLING_S = 10.0
"""For the server to notice that the last clients have gone."""


@dataclass(slots=True)
class Findings:
    """What a soak saw.

    counts      how often what happened
    violations  what must not have happened, in words
    rss_bytes   (seconds since the start, resident memory)
    used, waiting  the most pages in use at once, as a share, and requests that waited
    preempted   sequences that were computed again
    """

    counts: Counter[str] = field(default_factory=Counter)
    violations: list[str] = field(default_factory=list)
    rss_bytes: list[tuple[float, int]] = field(default_factory=list)
    used: float = 0.0
    waiting: float = 0.0
    preempted: float = 0.0

    def violate(self, kind: str, detail: str) -> None:
        """Count a violation; the first few of a kind are told in full."""
        self.counts[kind] += 1
        if self.counts[kind] <= 3:
            self.violations.append(f"{kind}: {detail}")

    def judge_answer(self, job: Job, answer: Answer) -> None:
        """Compare a surviving answer with the offline one."""
        if answer.error is not None:
            self.violate("failed", f"{job.describe()}: {answer.error}")
            return
        self.counts["survived"] += 1
        if (answer.text, answer.finish_reason) != (job.text, job.finish_reason):
            self.violate(
                "differs",
                f"{job.describe()}: {answer.text!r} ({answer.finish_reason}) instead of "
                f"{job.text!r} ({job.finish_reason})",
            )

    def judge_refusal(self, name: str, status: int, body: Any) -> None:
        """A broken body is refused with 4xx and words."""
        self.counts["broken"] += 1
        message = body.get("error", {}).get("message") if isinstance(body, dict) else None
        if not (400 <= status < 500 and message):
            self.violate("not refused", f"{name}: status {status}, {body!r:.200}")

    def judge_memory(self, seconds: float) -> float | None:
        """Growth of resident memory after warm-up, as a share; None where a run was too short."""
        if seconds < JUDGED_S:
            return None
        start_s = warm_up_s(seconds)
        kept = [rss for at_s, rss in self.rss_bytes if at_s >= start_s]
        fifth = max(1, len(kept) // 5)
        if len(kept) < 2:
            self.violate("memory", "was not seen often enough")
            return 0.0
        before, after = statistics.median(kept[:fifth]), statistics.median(kept[-fifth:])
        growth = after / before - 1
        if growth > MAX_GROWTH:
            mib = [value / (1 << 20) for value in (before, after)]
            self.violate("memory", f"grew by {growth:.1%}, from {mib[0]:.0f} to {mib[1]:.0f} MiB")
        return growth

    def judge_pressure(self) -> None:
        """A soak in which there was room for all has shown nothing."""
        if not self.waiting and not self.preempted:
            self.violate("no pressure", "the memory was never short")
        for kind in ("survived", "disconnected", "broken"):
            if not self.counts[kind]:
                self.violate("no traffic", f"not one request {kind}")


def vars_of(findings: Findings) -> dict[str, Any]:
    """Its fields by name; `asdict` cannot copy a Counter."""
    return {each.name: getattr(findings, each.name) for each in fields(findings)}


def warm_up_s(seconds: float) -> float:
    """Until every size of step has come up; half of a short run."""
    return min(seconds / 2, 240.0)


def make_jobs(num: int, seed: int) -> list[Job]:
    """Requests whose answers are known: greedy or seeded, long or short, as a stream or at once.

    The offline run decodes without trees.
    """
    from specinfer.llm import LLM
    from specinfer.request import SamplingParams

    rng = random.Random(seed)
    llm = LLM(TARGET, dtype="float32", max_model_len=MAX_MODEL_LEN, show_progress=False)
    encode = llm.tokenizer.apply_chat_template
    chats = load_chats(encode=encode)
    asked: list[dict[str, Any]] = []
    for number in range(num):
        sampling: dict[str, Any] = {"temperature": 0.0}
        if number % 2:
            sampling = {"temperature": rng.choice((0.7, 1.0)), "seed": rng.randrange(1 << 32)}
        if number % 5 == 4:
            sampling["stop"] = [rng.choice((".", " the", "and"))]
        asked.append({"max_tokens": rng.choice((8, 32, 64, 128)), **sampling})
    prompts = [encode(chats[number % len(chats)]) for number in range(num)]
    outputs = llm.generate(prompts, [SamplingParams(**each) for each in asked])
    return [
        Job(
            messages=chats[number % len(chats)],
            prompt=prompts[number] if number % 3 == 0 else None,
            fields=asked[number],
            is_stream=number % 4 != 3,
            text=output.outputs[0].text,
            finish_reason=str(output.outputs[0].finish_reason),
        )
        for number, output in enumerate(outputs)
    ]


async def be_client(
    http: httpx.AsyncClient, jobs: Sequence[Job], findings: Findings, seed: int, end_s: float
) -> None:
    """One client: ask, leave or send rubbish, again and again."""
    rng = random.Random(seed)
    while time.perf_counter() < end_s:
        chance, job = rng.random(), rng.choice(jobs)
        if chance < BREAKING:
            name, body = rng.choice(BROKEN)
            if body is None:
                with suppress(OSError):  # of a server that is gone, others tell
                    await tear(http.base_url)
                    findings.counts["torn"] += 1
            else:
                findings.judge_refusal(name, *await send_broken(http, body))
        elif chance < BREAKING + DISCONNECTING:
            # Some leave before the first word, while they still wait for memory
            await leave(http, job, rng.randrange(12), rng.random() * 2)
            findings.counts["disconnected"] += 1
        else:
            answer = await ask(http, job)
            findings.judge_answer(job, answer)
            if answer.error is not None:
                await asyncio.sleep(0.5)  # a server that is gone answers at once


async def watch(server: ServerProcess, findings: Findings, start_s: float) -> None:
    """Look at the server twice a second, until cancelled."""
    async with httpx.AsyncClient(timeout=30) as http:
        while True:
            findings.rss_bytes.append((time.perf_counter() - start_s, server.rss_bytes()))
            found = await server.metrics(http)
            findings.used = max(findings.used, found["kv_cache_usage_perc"])
            findings.waiting = max(findings.waiting, found["num_requests_waiting"])
            findings.preempted = found.get("num_preemptions_total", 0.0)
            await asyncio.sleep(0.5)


async def settle(server: ServerProcess, findings: Findings) -> float:
    """Wait until nothing runs; what is then in use has leaked. Returns the seconds it took."""
    names = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
    start_s = time.perf_counter()
    async with httpx.AsyncClient(timeout=30) as http:
        while True:
            try:
                found = await server.metrics(http)
            except httpx.HTTPError as error:
                findings.violate("gone", repr(error))
                return time.perf_counter() - start_s
            took_s = time.perf_counter() - start_s
            if not any(found[name] for name in names):
                return took_s
            if took_s > _SETTLING_S:
                left = ", ".join(f"{name} {found[name]:g}" for name in names)
                findings.violate("leak", f"{took_s:.0f} s after the last client: {left}")
                return took_s
            await asyncio.sleep(0.1)


async def soak(
    server: ServerProcess, jobs: Sequence[Job], *, seconds: float, num_clients: int, seed: int
) -> tuple[Findings, float]:
    """Let the clients loose for so long; what was found, and the seconds until all was quiet."""
    findings, start_s = Findings(), time.perf_counter()
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.url, timeout=_PATIENCE_S, limits=limits) as http:
        watching = asyncio.create_task(watch(server, findings, start_s))
        clients = [
            be_client(http, jobs, findings, seed * 1000 + number, start_s + seconds)
            for number in range(num_clients)
        ]
        try:
            await asyncio.gather(*clients)
        finally:
            watching.cancel()
        for outcome in await asyncio.gather(watching, return_exceptions=True):
            if not isinstance(outcome, asyncio.CancelledError):
                findings.violate("metrics", f"could not be read: {outcome!r}")
    return findings, await settle(server, findings)


def table(findings: Findings, seconds: float, growth: float | None, quiet_s: float) -> Table:
    """What was found."""
    counts = findings.counts
    last_mib = findings.rss_bytes[-1][1] / (1 << 20) if findings.rss_bytes else 0.0
    grid = Table("found", "", title=f"soak of {seconds:g} s")
    for name, value in (
        ("answers read to their end, the same as offline", str(counts["survived"])),
        ("differing", str(counts["differs"])),
        ("failed", str(counts["failed"])),
        ("left in the middle", str(counts["disconnected"])),
        ("broken bodies refused", str(counts["broken"] - counts["not refused"])),
        ("bodies torn off", str(counts["torn"])),
        ("most pages in use", f"{findings.used:.0%}"),
        ("most requests waiting", f"{findings.waiting:.0f}"),
        ("preempted", f"{findings.preempted:.0f}"),
        ("pages in use at the end", "leaked" if counts["leak"] else "0"),
        ("quiet after", f"{quiet_s:.1f} s"),
        ("resident memory at the end", f"{last_mib:.0f} MiB"),
        ("growth after warm-up", "too short to say" if growth is None else f"{growth:+.2%}"),
        ("violations", str(len(findings.violations))),
    ):
        grid.add_row(name, value)
    return grid


def kv_cache_memory(num_clients: int) -> int:
    """Bytes for a quarter of the clients' longest requests, drafter included."""
    import torch

    from specinfer.cache.pool import KVPool
    from specinfer.models.architecture import read_architecture
    from specinfer.models.folder import read_config, resolve_model

    num_bytes = 0
    for name in (TARGET, DRAFTER):
        made = read_architecture(read_config(resolve_model(name)))
        num_bytes += KVPool.bytes_per_slot(
            num_layers=made.num_layers,
            kv_heads=made.num_kv_heads,
            head_dim=made.head_dim,
            dtype=torch.float32,
        )
    return max(2, num_clients // 4) * MAX_MODEL_LEN * num_bytes


def main() -> int:
    """Start a server, let clients loose on it, judge; 1 if anything was violated."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--jobs", type=int, help="different requests; default: by the seconds")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="counts and memory over time")
    args = parser.parse_args()
    num_jobs = args.jobs or min(256, 40 + int(args.seconds / 3))
    jobs = make_jobs(num_jobs, args.seed)
    flags = {
        "drafter": DRAFTER,
        "dtype": "float32",
        "max_num_seqs": args.clients,
        "max_model_len": MAX_MODEL_LEN,
        "kv_cache_memory": kv_cache_memory(args.clients),
    }
    with ServerProcess(TARGET, flags) as server:
        findings, quiet_s = asyncio.run(
            soak(server, jobs, seconds=args.seconds, num_clients=args.clients, seed=args.seed)
        )
    if server.returncode != 0:
        findings.violate("exit", f"the server ended with {server.returncode} after SIGTERM")
    for line in server.errors():
        findings.violate("log", line)
    findings.judge_pressure()
    growth = findings.judge_memory(args.seconds)
    Console(width=100).print(table(findings, args.seconds, growth, quiet_s))
    if args.json:
        write_result(args.json, f"soak of {args.seconds:g} s", **vars_of(findings))
    for each in findings.violations:
        print(f"violation: {each}", file=sys.stderr)
    return 1 if findings.violations else 0


if __name__ == "__main__":
    sys.exit(main())
