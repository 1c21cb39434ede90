"""How long programs take to begin: help, first token and server, beside `import torch` alone.

Each is a fresh process, in turns. What a first start on a machine adds is measured before: kernels
are compiled, once, and steps timed, once for each model.

    python -m benchmarks.startup --rounds 5 --out startup.json
"""

import argparse
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from benchmarks import write_result

TORCH = "import torch"
_PROMPT = ("Once upon a time", "--max-tokens", "4", "--temperature", "0")
_PATIENCE_S = 120.0
_MOST_TRIES = 3

Measure = Callable[[Sequence[str], Mapping[str, str]], float]


def until_output(command: Sequence[str], environment: Mapping[str, str]) -> float:
    """Seconds until a program writes something to standard output; then lets it end."""
    start = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        seconds = time.perf_counter() - start
        _, errors = process.communicate()
    if not first or process.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{errors.decode(errors='replace')}")
    return seconds


def until_listening(command: Sequence[str], environment: Mapping[str, str]) -> float:
    """Seconds until a server takes connections at the port it is given here; then ends it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = time.perf_counter()
    process = subprocess.Popen(
        [*command, f"--port={port}"], stderr=subprocess.PIPE, env=environment
    )
    try:
        while not _answers(port):
            if process.poll() is not None or time.perf_counter() - start > _PATIENCE_S:
                raise SystemExit(f"{' '.join(command)} does not listen at port {port}")
            time.sleep(0.005)
        return time.perf_counter() - start
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=_PATIENCE_S)


def _answers(port: int) -> bool:
    """Whether /health is 200."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1) as asking:
            asking.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            return asking.recv(64).startswith(b"HTTP/1.1 200")
    except OSError:
        return False


def programs(model: str, drafter: str) -> dict[str, tuple[Measure, list[str]]]:
    """What is measured, by name."""
    specinfer = [sys.executable, "-m", "specinfer"]
    models = [model, "--drafter", drafter]
    return {
        TORCH: (until_output, [sys.executable, "-c", f"{TORCH}; print()"]),
        "specinfer --help": (until_output, [*specinfer, "--help"]),
        "specinfer generate, first token": (
            until_output,
            [*specinfer, "generate", *_PROMPT, "--model", *models],
        ),
        "specinfer serve, /health": (until_listening, [*specinfer, "serve", *models]),
    }


def measure(model: str, drafter: str, rounds: int) -> dict[str, list[float]]:
    """Seconds of every round, by program; then with an empty cache, and with no step times."""
    asked = programs(model, drafter)
    seconds: dict[str, list[float]] = {name: [] for name in asked}
    with tempfile.TemporaryDirectory(prefix="specinfer-") as cache:
        environment = os.environ | {"SPECINFER_CACHE": cache}
        generate = "specinfer generate, first token"
        run, command = asked[generate]
        first, times = run(command, environment), Path(cache) / "times"
        untimed: list[float] = []
        for _ in range(_MOST_TRIES):
            shutil.rmtree(times, ignore_errors=True)
            untimed.append(run(command, environment))
            if len(list(times.glob("*.json"))) == 2:
                break
        else:  # a busy machine's times are not kept
            raise SystemExit("the machine is too busy: step times were not kept")
        for _ in range(rounds):
            for name, (run, command) in asked.items():
                seconds[name].append(run(command, environment))
    return seconds | {f"{generate}, no cache": [first], f"{generate}, no times": untimed}


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="zoo:parley")
    parser.add_argument("--drafter", default="zoo:parley-draft")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    seconds = measure(asked.model, asked.drafter, asked.rounds)
    torch_s = statistics.median(seconds[TORCH])
    for name, each in seconds.items():
        median_s = statistics.median(each)
        print(f"{name:42} {median_s:6.2f} s   {median_s - torch_s:+6.2f} s beside {TORCH}")
    if asked.out is not None:
        write_result(asked.out, "start-up", model=asked.model, seconds=seconds)


if __name__ == "__main__":
    main()
