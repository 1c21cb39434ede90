"""llama.cpp on the same weights (`benchmarks/gguf.py`), as `scripts/build-llama-cpp` builds it.

`llama-server` stays loaded and is asked over HTTP; `llama-speculative`, the only one with trees, is
started for every prompt and tells its own decoding time; so does `llama-bench`, the check of what
the server adds.
"""

import json
import re
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from benchmarks.continuation import Asked, Continuation, Continue, chain_length, unknown
from benchmarks.gguf import GGUFType, exported
from specinfer.errors import ConfigError, DependencyError

BUILT = Path(__file__).resolve().parent.parent / "build" / "llama.cpp" / "bin"
TYPES: dict[str, GGUFType] = {"bf16": "bf16", "q8_0": "q8_0", "q4_0": "q4_0", "f32": "f32"}
CONTEXT = 1024
"""Tokens of each sequence."""

_START_S = 120.0
_TREE = re.compile(r"tree-([1-9]\d*)x([1-9]\d*)")
_ENCODED = re.compile(r"encoded\s+(\d+) tokens in\s+([\d.]+) seconds")
_DECODED = re.compile(r"decoded\s+(\d+) tokens in\s+([\d.]+) seconds")


class Server:
    """A `llama-server` as a child process."""

    def __init__(self, binary: Path, flags: Sequence[str]) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        with tempfile.NamedTemporaryFile(prefix="llama-server-", suffix=".log") as log:
            self._log = open(log.name, encoding="utf-8", errors="replace")  # noqa: SIM115
            self._process = subprocess.Popen(
                [binary, *flags, "--host", "127.0.0.1", "--port", str(port)],
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        until_s = time.perf_counter() + _START_S
        while not self._is_ready():
            if self._process.poll() is not None or time.perf_counter() > until_s:
                self.close()
                raise ConfigError(f"llama-server did not start: {self._log.read()[-2000:]}")
            time.sleep(0.1)

    def close(self) -> None:
        """End it."""
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def complete(self, body: dict[str, Any]) -> Continuation:
        """Stream one completion."""
        bursts, tokens, start_s = [], [], time.perf_counter()
        with httpx.stream("POST", f"{self.url}/completion", json=body, timeout=None) as response:
            response.raise_for_status()
            for line in response.iter_lines():
                now_s = time.perf_counter() - start_s
                new = read_event(line)
                if new:
                    bursts.append((now_s, len(new)))
                    tokens += new
        return Continuation(bursts, tokens)

    def _is_ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health").status_code == 200
        except httpx.HTTPError:
            return False


def read_event(line: str) -> list[int]:
    """The new token ids in a line of `/completion`'s stream; most bring one, the last none.

    raises  ConfigError where the server says it failed
    """
    name, _, data = line.partition(":")
    if name == "error":
        raise ConfigError(f"llama-server: {data.strip()}")
    if name != "data":
        return []
    return list(json.loads(data).get("tokens", ()))


def read_speculative(log: str, num_prompt_tokens: int) -> list[tuple[float, int]]:
    """What `llama-speculative` says of its time, as bursts: the first token and all others.

    raises  ConfigError where it says nothing, or read another prompt
    """
    encoded, decoded = _ENCODED.search(log), _DECODED.search(log)
    if encoded is None or decoded is None:
        raise ConfigError(f"llama-speculative told no times: {log[-2000:]}")
    if int(encoded[1]) != num_prompt_tokens:
        raise ConfigError(
            f"llama-speculative made {encoded[1]} tokens of a prompt of {num_prompt_tokens}"
        )
    prompt_s, decode_s = float(encoded[2]), float(decoded[2])
    # The first token is drawn from the prompt's logits, before any step
    return [(prompt_s, 1), (prompt_s + decode_s, int(decoded[1]) - 1)]


def read_bench(text: str) -> list[tuple[float, int]]:
    """`llama-bench -o json` of one prompt and one generation, as bursts."""
    by_prompt = {bool(row["n_prompt"]): row for row in json.loads(text)}
    prompt_s = by_prompt[True]["avg_ns"] / 1e9
    bursts = [(prompt_s, 1)]
    if False in by_prompt:
        own = by_prompt[False]
        bursts.append((prompt_s + own["avg_ns"] / 1e9, own["n_gen"]))
    return bursts


class LlamaCpp:
    """Its three programs.

    plain, chain-N  `llama-server`, with N drafted tokens
    tree-BxN        `llama-speculative` with B branches of N nodes in all
    bench           `llama-bench`: plain decoding of random tokens
    """

    name = "llama.cpp"

    def __init__(
        self, asked: Asked, decode: Callable[[Sequence[int]], str], folder: Path = BUILT
    ) -> None:
        """Use the programs of this folder; decode gives a prompt's text, special tokens too."""
        self._asked = asked
        self._decode = decode
        self._folder = folder
        self._servers: list[Server] = []

    def ways(self) -> list[str]:
        """See `Peer`."""
        ways = ["plain", "chain-3", "chain-5"]
        if self._asked.batch == 1:
            ways += ["tree-4x8", "bench"]
        return [f"{kind}/{way}" for kind in ("bf16", "q8_0", "q4_0") for way in ways]

    def open(self, precision: str, way: str) -> Continue:
        """See `Peer`."""
        if precision not in TYPES:
            raise unknown(self.name, precision, way)
        target = exported(self._asked.target, TYPES[precision])
        # Drafters are not quantised: theirs is the same at every precision of the target
        drafter = exported(self._asked.drafter, "f32" if precision == "f32" else "bf16")
        tree = _TREE.fullmatch(way)
        if (tree or way == "bench") and self._asked.batch > 1:
            raise ConfigError(f"llama.cpp does {way} for one prompt at a time")
        if tree:
            return self._by_speculative(target, drafter, int(tree[1]), int(tree[2]))
        if way == "bench":
            return self._by_bench(target)
        length = chain_length(way)
        if length is None and way != "plain":
            raise unknown(self.name, precision, way)
        return self._by_server(target, drafter, length)

    def close(self) -> None:
        """See `Peer`."""
        for server in self._servers:
            server.close()
        self._servers.clear()

    def version(self) -> str:
        """See `Peer`."""
        run = subprocess.run(
            [self._binary("llama-server"), "--version"], capture_output=True, text=True, check=True
        )
        found = re.search(r"version: (\S+)", run.stdout + run.stderr)
        return f"llama.cpp {found[1] if found else 'unknown'} (scripts/build-llama-cpp)"

    def _by_server(self, target: Path, drafter: Path, length: int | None) -> Continue:
        batch = self._asked.batch
        flags = [*self._common(target), "--parallel", str(batch), "--no-webui"]
        flags += ["--ctx-size", str(CONTEXT * batch)]
        if length is not None:
            flags += ["--model-draft", str(drafter), "--spec-type", "draft-simple"]
            flags += ["--spec-draft-n-max", str(length)]
            flags += ["--spec-draft-threads", str(self._asked.threads)]
        server = Server(self._binary("llama-server"), flags)
        self._servers.append(server)
        pool = ThreadPoolExecutor(batch)

        def run(
            prompts: Sequence[Sequence[int]], num_tokens: int, temperature: float
        ) -> list[Continuation]:
            asked = {
                "n_predict": num_tokens,
                "temperature": temperature,
                "samplers": ["temperature"],  # no filter: the model's own law, as everywhere here
                "ignore_eos": True,
                "cache_prompt": False,
                "return_tokens": True,
                "stream": True,
            }
            return list(pool.map(server.complete, [{"prompt": list(p)} | asked for p in prompts]))

        return run

    def _by_speculative(self, target: Path, drafter: Path, branches: int, nodes: int) -> Continue:
        flags = [str(self._binary("llama-speculative")), *self._common(target)]
        flags += ["--model-draft", str(drafter), "--parallel", str(branches)]
        flags += ["--spec-draft-n-max", str(nodes), "--ctx-size", str(CONTEXT * branches)]
        flags += ["--spec-draft-threads", str(self._asked.threads)]
        flags += ["--ignore-eos", "--samplers", "temperature"]

        def run(
            prompts: Sequence[Sequence[int]], num_tokens: int, temperature: float
        ) -> list[Continuation]:
            text = self._decode(prompts[0])
            own = ["--predict", str(num_tokens), "--temp", str(temperature), "--prompt", text]
            done = _run([*flags, *own])
            bursts = read_speculative(done.stderr, len(prompts[0]))
            return [Continuation(bursts, done.stdout.partition(text)[2].rstrip("\n"))]

        return run

    def _by_bench(self, target: Path) -> Continue:
        flags = [str(self._binary("llama-bench")), "--model", str(target), "--output", "json"]
        flags += ["--threads", str(self._asked.threads), "--repetitions", "1"]

        def run(
            prompts: Sequence[Sequence[int]], num_tokens: int, temperature: float
        ) -> list[Continuation]:
            own = ["--n-prompt", str(len(prompts[0])), "--n-gen", str(num_tokens - 1)]
            return [Continuation(read_bench(_run([*flags, *own]).stdout), [])]

        return run

    def _common(self, target: Path) -> list[str]:
        threads = str(self._asked.threads)
        return ["--model", str(target), "--threads", threads, "--threads-batch", threads]

    def _binary(self, name: str) -> Path:
        path = self._folder / name
        if not path.is_file():
            raise DependencyError(f"{path} is missing: run scripts/build-llama-cpp")
        return path


def _run(command: Sequence[str]) -> "subprocess.CompletedProcess[str]":
    done = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise ConfigError(f"{command[0]} failed: {done.stderr[-2000:]}")
    return done
