"""What serving costs beside computing, and how long clients wait.

    python -m benchmarks.serving --model 0.3b --drafter 1/50 --json docs/results/serving-0.3b.json
    python -m benchmarks.serving --model 0.3b --llama-server http://127.0.0.1:8080

First the share of the server's CPU time that goes to HTTP, JSON and detokenising while 16 streams
run; then latencies at 1, 8 and 32 clients, one after another, beside llama.cpp's server where one
with the same weights is given. The server is a process of its own: clients' time is not in it.
"""

import argparse
import asyncio
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
from rich.box import MARKDOWN
from rich.console import Console
from rich.table import Table

from benchmarks import write_result
from benchmarks.latency import MODELS, _native_dtype, resolve
from benchmarks.prompts import load_chats
from specinfer.loadtest.client import ask, first_model, open_client
from specinfer.loadtest.plan import LoadTest
from specinfer.loadtest.prompts import Prompt
from specinfer.loadtest.run import arrivals, run
from specinfer.loadtest.summary import Summary, summarise

MOST_SHARE = 0.10
"""Of the server's CPU time, waiting workers' left out, for all that is not computing."""

# --- the server, with its threads' clocks in reach ------------------------------------------------


def serve(target: str, drafter: str, dtype: str, max_num_seqs: int) -> None:
    """Serve as `specinfer serve` does, and tell at /cpu where CPU time goes."""
    import uvicorn

    from specinfer import async_llm
    from specinfer.serve.app import make_app
    from specinfer.serve.settings import ServerSettings
    from specinfer.serve.state import Service
    from specinfer.text.stream import IncrementalDetokenizer, StopStrings

    counted = {"detokenise": 0.0, "hand over": 0.0}
    _count(counted, "detokenise", IncrementalDetokenizer, "push")
    _count(counted, "detokenise", StopStrings, "push")
    _count(counted, "hand over", async_llm, "_update")
    llm = async_llm.AsyncLLM(target, drafters=[drafter], dtype=dtype, max_num_seqs=max_num_seqs)
    app = make_app(Service(llm, ServerSettings(), target))

    @app.get("/cpu")
    async def cpu() -> dict[str, float]:
        return _clocks() | counted

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(1024)
        print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
        config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off")
        uvicorn.Server(config).run(sockets=[listener])
    llm.close()


def _count(into: dict[str, float], name: str, owner: Any, function: str) -> None:
    """Add a function's CPU time to an entry. Its callers' clocks go on: it is a part of theirs."""
    inner = getattr(owner, function)

    def timed(*args: Any, **options: Any) -> Any:
        start_s = time.thread_time()
        try:
            return inner(*args, **options)
        finally:
            into[name] += time.thread_time() - start_s

    setattr(owner, function, timed)


def _clocks() -> dict[str, float]:
    """CPU seconds of the process, of the engine's thread, and of all that serve HTTP."""
    engine_s = http_s = 0.0
    for thread in threading.enumerate():
        assert thread.ident is not None
        spent_s = time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
        if thread.name == "specinfer-engine":
            engine_s += spent_s
        else:  # the event loop's, and those that encode long prompts for it
            http_s += spent_s
    return {"process": time.process_time(), "engine": engine_s, "http": http_s}


@contextmanager
def server(target: Path | str, drafter: Path | str, dtype: str, max_num_seqs: int) -> Iterator[str]:
    """Start it as a child process; gives its URL."""
    what = ["--serve", str(target), str(drafter), dtype, str(max_num_seqs)]
    command = [sys.executable, "-m", "benchmarks.serving", *what]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        if not url:
            raise SystemExit("the server did not start")
        try:
            yield url
        finally:
            process.terminate()
            process.stdout.read()


# --- the clients ----------------------------------------------------------------------------------


async def load(url: str, num_clients: int, num_prompts: int, max_tokens: int) -> Summary:
    """So many clients, each asking as soon as it has its answer."""
    plan = LoadTest(base_url=url, max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    chats = load_chats()
    prompts = [Prompt(tuple(chats[i % len(chats)])) for i in range(num_prompts)]
    async with open_client(url, None, 300.0) as client:
        one = partial(ask, client, "chat", plan.body(await first_model(client)))
        times = arrivals(num_prompts, plan.request_rate, 0)
        records, duration_s = await run(one, prompts, times, num_clients)
    summary = summarise(records, duration_s, {})
    if summary.failed:
        raise SystemExit(f"{url}: {summary.failed} requests failed: {summary.errors}")
    return summary


def host_share(url: str, num_clients: int, num_tokens: int) -> dict[str, float]:
    """Where the server's CPU time goes while so many streams run.

    returns  seconds by part and the shares of the process's time, compute workers' in it or not
    """
    asyncio.run(load(url, num_clients, num_clients, 8))
    before = httpx.get(f"{url}/cpu").json()
    start_s = time.perf_counter()
    summary = asyncio.run(load(url, num_clients, 2 * num_clients, num_tokens))
    wall_s = time.perf_counter() - start_s
    after = httpx.get(f"{url}/cpu").json()
    spent = {name: after[name] - before[name] for name in after}
    serving_s = spent["http"] + spent["detokenise"] + spent["hand over"]
    return spent | {
        "wall": wall_s,
        "tokens": summary.total_output_tokens,
        "share": serving_s / spent["process"],
        "share_without_workers": serving_s / (spent["http"] + spent["engine"]),
        "us_per_token": 1e6 * serving_s / summary.total_output_tokens,
    }


def share_table(title: str, found: dict[str, float]) -> Table:
    """CPU time by part."""
    grid = Table("part", "CPU s", "of the process", title=title, box=MARKDOWN)
    for name, meaning in (
        ("http", "HTTP and JSON (event loop and its threads)"),
        ("detokenise", "detokenising and stop strings"),
        ("hand over", "handing outputs to the event loop"),
    ):
        grid.add_row(meaning, f"{found[name]:.2f}", f"{found[name] / found['process']:.1%}")
    grid.add_row("all of these", "", f"{found['share']:.1%}")
    without = f"{found['share_without_workers']:.1%}"
    grid.add_row("the same, compute workers' time left out", "", without)
    grid.add_row("process", f"{found['process']:.2f}", f"{found['tokens']:.0f} tokens")
    return grid


def latency_table(title: str, rows: Sequence[dict[str, Any]]) -> Table:
    """Percentiles in milliseconds by server and number of clients."""
    grid = Table(
        *("server", "clients", "tok/s", "tokens/chunk", "TTFT p50", "p90", "p99"),
        *("ITL p50", "p90", "p99", "TPOT p50"),
        title=title,
        box=MARKDOWN,
    )
    for row in rows:
        cells = [
            f"{row[f'{statistic}_{name}_ms']:.1f}"
            for name, statistics in (("ttft", 3), ("itl", 3), ("tpot", 1))
            for statistic in ("p50", "p90", "p99")[:statistics]
        ]
        per_chunk = row["total_output_tokens"] / row["num_chunks"]
        rate = f"{row['output_throughput']:.1f}"
        grid.add_row(row["server"], str(row["clients"]), rate, f"{per_chunk:.2f}", *cells)
    return grid


def main() -> int:
    """Measure, print, and write JSON; 1 if serving takes more than it may."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", choices=MODELS, default="0.3b")
    parser.add_argument("--drafter", choices=("bare", "1/50"), default="1/50")
    parser.add_argument("--clients", nargs="*", type=int, default=[1, 8, 32])
    parser.add_argument("--streams", type=int, default=16, help="for the share of CPU time")
    parser.add_argument("--tokens", type=int, default=64, help="per answer")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default=_native_dtype())
    parser.add_argument("--llama-server", metavar="URL", help="llama.cpp's, of the same weights")
    parser.add_argument("--json", type=Path, metavar="FILE")
    parser.add_argument("--serve", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        target, drafter, dtype, max_num_seqs = args.serve
        serve(target, drafter, dtype, int(max_num_seqs))
        return 0
    target, drafter, note = resolve(args.model, args.drafter)
    title = f"{note}; {args.dtype}, {os.cpu_count()} cores, {args.tokens} tokens each, greedy"
    console, rows = Console(width=140), []
    with server(target, drafter, args.dtype, max(args.streams, *args.clients)) as url:
        share = host_share(url, args.streams, args.tokens)
        console.print(share_table(f"{args.streams} streams, {title}", share))
        for num_clients in args.clients:
            servers = {"specinfer": url} | (
                {"llama.cpp": args.llama_server} if args.llama_server else {}
            )
            for name, where in servers.items():
                num_prompts = max(4, 2 * num_clients)
                summary = asyncio.run(load(where, num_clients, num_prompts, args.tokens))
                rows.append({"server": name, "clients": num_clients, **summary.to_object()})
    console.print(latency_table(title, rows))
    if args.json:
        write_result(args.json, title, cpu=share, rows=rows)
    return 0 if share["share_without_workers"] <= MOST_SHARE else 1


if __name__ == "__main__":
    sys.exit(main())
