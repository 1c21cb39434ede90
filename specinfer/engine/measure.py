"""Measures how long models' steps take, by the production path on free pages, and keeps it on disk.

A shared machine is noisy: shapes are timed in rounds over all of them, and a low quantile counts.
A slow model is measured at few sizes, so that starting up never takes minutes.
"""

import hashlib
import json
import logging
import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from specinfer.cache.blocks import Pages
from specinfer.engine.times import StepTimes
from specinfer.paths import cache_folder
from specinfer.run.batch import Span
from specinfer.run.runner import Runner

Report = Callable[[str, int, int], None]
"""report(model, steps measured so far, steps in all)"""

TARGET_BUDGET_S = 8.0
DRAFTER_BUDGET_S = 1.0
"""What measuring one model may take; only its two smallest shapes may take longer."""

_log = logging.getLogger("specinfer")


class Shape(NamedTuple):
    """A step's size: its tokens, dealt out evenly to its spans."""

    num_tokens: int
    num_spans: int


# The most telling first, since a slow model's budget ends early. Both sides of ops.linear's
# STREAMING_ROWS are among them. Spans of one token are plain decoding of a batch.
SHAPES = tuple(
    Shape(*shape)
    for shape in (
        *((1, 1), (6, 1), (7, 1), (16, 1), (64, 1), (16, 16), (32, 1), (12, 1), (24, 1), (4, 1)),
        *((8, 1), (48, 1), (2, 1), (3, 1), (64, 64), (64, 8), (128, 1), (96, 1), (4, 4)),
        *((192, 1), (256, 1), (384, 1), (512, 1)),
    )
)

_MIN_ROUNDS = 2
_MAX_ROUNDS = 7
_SETTLED_S = 0.02
"""Steps below this run twice: the first after another shape finds caches and allocator set for that
one (1 token behind 512, on the bundled pair: some 40 and 60 % slower than its neighbours). Weights
of slower models are in no cache anyway."""

_QUANTILE = 0.25
"""Of a shape's times: what others do on the machine only ever adds."""

_TRUSTED_SPREAD = 0.25
"""Times of a larger spread are used and not kept. With other programs on both cores the bundled
pair's smallest step took 20 to 500 ms instead of 3 in every round, and this thread had its core for
a third to 0.6 of the time; kept, that would last for ever."""

_PREFIX = 64
"""Committed tokens that every measured span stands behind."""


def measure_step(
    run: Callable[[int, int], None],
    shapes: Sequence[Shape],
    *,
    budget_s: float,
    rounds: int = _MAX_ROUNDS,
    report: Callable[[int, int], None] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> StepTimes:
    """Time a step at several shapes, in rounds over all of them.

    run       run(num_tokens, num_spans) computes one step, to its end
    shapes    the most telling first: those that the budget does not hold are left out, but the
              first two, which have one span each, are always measured
    budget_s  seconds for a warm-up and at least two rounds
    report    report(steps measured so far, steps in all)
    """

    def timed(shape: Shape) -> float:
        start = clock()
        run(*shape)
        return clock() - start

    began = clock()
    if report:
        report(0, len(shapes) * rounds)
    timed(shapes[0])  # what a first call sets up is no part of a step
    first = _affordable(timed, shapes, budget_s / (1 + _MIN_ROUNDS))
    round_s = sum(seconds * _runs(seconds) for seconds in first.values())
    rounds = max(_MIN_ROUNDS, min(rounds, int(budget_s / max(1e-9, round_s)) - 1))
    samples: dict[Shape, list[float]] = {shape: [] for shape in sorted(first)}
    for done in range(rounds):
        if done >= _MIN_ROUNDS and (clock() - began) * (1 + 1 / (1 + done)) > budget_s:
            break
        for index, (shape, seconds) in enumerate(samples.items()):
            seconds += [timed(shape) for _ in range(_runs(min([first[shape], *seconds])))][-1:]
            if report:
                report(done * len(samples) + index + 1, rounds * len(samples))
    spread = float(np.median([np.median(each) / min(each) for each in samples.values()])) - 1
    low = {shape: float(np.quantile(each, _QUANTILE)) for shape, each in samples.items()}
    return _fit(low, spread)


def _runs(seconds: float) -> int:
    """How often a shape runs each time it is measured: the last run counts."""
    return 2 if seconds < _SETTLED_S else 1


def _affordable(
    timed: Callable[[Shape], float], shapes: Sequence[Shape], round_s: float
) -> dict[Shape, float]:
    """The shapes of which a round fits into so many seconds, with the time of their first step."""
    first: dict[Shape, float] = {}
    spent = 0.0
    for shape in shapes:
        if len(first) >= 2 and spent + _fit(first).seconds(*shape) > round_s:
            continue
        # What is affordable is told from the first two: one busy moment must not decide it.
        runs = [timed(shape) for _ in range(2 if len(first) < 2 else 1)]
        first[shape] = min(runs)
        spent += first[shape]
    return first


def _fit(seconds: Mapping[Shape, float], spread: float = 0.0) -> StepTimes:
    """Times of single spans as they are; what spans add by least squares of relative errors."""
    singles = {n: max(1e-9, s) for (n, spans), s in sorted(seconds.items()) if spans == 1}
    alone = StepTimes([*singles], [*singles.values()])
    above = below = 0.0
    for (num_tokens, num_spans), measured in seconds.items():
        weight = (num_spans - 1) / max(1e-18, measured * measured)
        above += weight * (measured - alone.seconds(num_tokens))
        below += weight * (num_spans - 1)
    span_s = max(0.0, above / below) if below else 0.0
    return StepTimes([*singles], [*singles.values()], span_s, spread)


def measure_runner(
    runner: Runner,
    *,
    max_tokens: int,
    budget_s: float = TARGET_BUDGET_S,
    report: Callable[[int, int], None] | None = None,
) -> StepTimes:
    """Time a model by its own runner: trees of one request, and one token each of many.

    Call it before the first request: it writes into the runner's pages, whoever owns them.

    max_tokens  the largest step there will be; beyond 512 tokens times are extrapolated
    """
    scratch = _Scratch(runner)
    synchronize = runner.device.type == "cuda"

    def run(num_tokens: int, num_spans: int) -> None:
        runner.run(scratch.spans(num_tokens, num_spans))
        if synchronize:
            torch.cuda.synchronize(runner.device)

    shapes = scratch.shapes(max_tokens)
    if synchronize:
        for shape in shapes:  # capturing a step's graph is no part of it
            run(*shape)
    start, worked = time.perf_counter(), time.thread_time()
    times = measure_step(run, shapes, budget_s=budget_s, report=report)
    if runner.device.type == "cpu":
        # This thread computes or spins, so where it slept, another program had its core.
        passed, worked = time.perf_counter() - start, time.thread_time() - worked
        times.spread = max(times.spread, passed / max(1e-9, worked) - 1)
    return times


class _Scratch:
    """Spans over a runner's first slots, as if many requests stood there."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._num_slots = runner.pool.layer(0)[0].shape[1]
        self._max_positions = runner.decoder.architecture.max_position_embeddings
        self._prefix = min(_PREFIX, self._num_slots // 2, self._max_positions // 2)
        self._num_clean = 0
        self.spans = cache(self._spans)

    def shapes(self, max_tokens: int) -> list[Shape]:
        """Those that fit."""
        return [
            shape
            for shape in SHAPES
            if shape.num_tokens <= max(1, max_tokens)
            and self._prefix * shape.num_spans + shape.num_tokens <= self._num_slots
        ]

    def _spans(self, num_tokens: int, num_spans: int) -> list[Span]:
        each = num_tokens // num_spans
        room = self._prefix + each
        self._clean(num_spans * room)
        return [self._tree(each, range(i * room, (i + 1) * room)) for i in range(num_spans)]

    def _clean(self, stop: int) -> None:
        """Zero slots before `stop`: fresh pages hold anything, and some of it is slow to add up."""
        if stop > self._num_clean:
            for layer in range(self._runner.decoder.architecture.num_layers):
                for pages in self._runner.pool.layer(layer):
                    pages[:, self._num_clean : stop].zero_()
            self._num_clean = stop

    def _tree(self, num_nodes: int, slots: range) -> Span:
        """A binary tree behind the prefix, every node with its logits."""
        mask = np.eye(num_nodes, dtype=np.bool_)
        for node in range(1, num_nodes):
            mask[node] |= mask[(node - 1) // 2]
        depths = mask.sum(1) - 1
        positions = np.minimum(self._prefix + depths, self._max_positions - 1)
        return Span(
            tokens=[0] * num_nodes,
            positions=positions.tolist(),
            pages=Pages(slots, 1),
            prefix=self._prefix,
            start=self._prefix,
            mask=mask if num_nodes > 1 else None,
            num_logits=num_nodes,
        )


# --- keep -----------------------------------------------------------------------------------------

_FORMAT = 2
"""Raised whenever what is measured, or how, changes."""


def measure_models(
    names: Sequence[str],
    folders: Sequence[Path],
    runners: Sequence[Runner],
    *,
    max_tokens: int,
    progress: Report | None = None,
) -> list[StepTimes]:
    """Times of the target (first) and its drafters, from the cache on disk or measured now.

    A cache that cannot be read or written costs a measurement and a line in the log. Times taken
    while the machine is busy are not kept.
    """
    times = []
    for index, (name, folder, runner) in enumerate(zip(names, folders, runners, strict=True)):
        key = _key(folder, runner, max_tokens)
        known = _load(key)
        if known is None:
            known = measure_runner(
                runner,
                max_tokens=max_tokens,
                budget_s=DRAFTER_BUDGET_S if index else TARGET_BUDGET_S,
                report=_named(name, progress),
            )
            if known.spread <= _TRUSTED_SPREAD:
                _store(key, known)
            else:
                _log.info("%s: the machine is busy, so step times are not kept", name)
        times.append(known)
    return times


def model_identity(folder: Path) -> str:
    """Which weights a folder holds, by path, config, and sizes and dates of its files."""
    folder = folder.resolve()
    parts = [str(folder), hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()]
    for file in sorted(folder.glob("*.safetensors")):
        stat = file.stat()
        parts.append(f"{file.name} {stat.st_size} {stat.st_mtime_ns}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _named(name: str, progress: Report | None) -> Callable[[int, int], None] | None:
    return None if progress is None else lambda done, total: progress(name, done, total)


def _key(folder: Path, runner: Runner, max_tokens: int) -> list[str]:
    """All that times depend on, as words."""
    shapes = _Scratch(runner).shapes(max_tokens)
    return [
        f"format {_FORMAT}",
        f"model {model_identity(folder)}",
        f"device {_device_name(runner.device)}",
        f"dtype {runner.decoder.dtype} quantization {runner.decoder.quantization}",
        f"threads {torch.get_num_threads()}",
        f"torch {torch.__version__} native kernels {runner.native and runner.native.identity}",
        f"shapes {' '.join(f'{n}/{spans}' for n, spans in shapes)}",
    ]


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return next(_cpu_models(), platform.processor() or platform.machine())


def _cpu_models() -> Iterator[str]:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("model name"):
                    yield line.split(":", 1)[1].strip()
    except OSError:  # not Linux: its own word for the processor serves
        return


def _file(key: Sequence[str]) -> Path:
    digest = hashlib.sha256("\n".join(key).encode()).hexdigest()
    return cache_folder() / "times" / f"{digest[:32]}.json"


def _load(key: list[str]) -> StepTimes | None:
    try:
        data = json.loads(_file(key).read_text(encoding="utf-8"))
        if data["key"] != key:
            raise ValueError("it is of something else")
        return StepTimes.from_json(data["times"])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        _log.warning("step times are measured again, for those kept cannot be used: %r", error)
        return None


def _store(key: list[str], times: StepTimes) -> None:
    """Write whole or not at all: another process may be reading."""
    text = json.dumps({"key": key, "times": times.to_json()})
    try:
        file = _file(key)
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}.part")
        try:
            part.write_text(text, encoding="utf-8")
            os.replace(part, file)
        finally:
            part.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:
        # A file's own name would make a message of its own for every model.
        why = error.strerror if isinstance(error, OSError) else None
        _tell_unkept(f"{cache_folder()}: {why}" if why else str(error))


@cache
def _tell_unkept(why: str) -> None:
    """Once for all models of a start."""
    _log.warning(
        "step times cannot be kept and are measured at every start: %s (SPECINFER_CACHE names "
        "a folder to keep them in)",
        why,
    )
