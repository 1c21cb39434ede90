"""Cases counted in several processes, and kept as they come.

A long comparison may be stopped and taken up again: what was counted is a line of JSON each, with
every prompt's own sums, so that later cases can be paired with earlier ones.
"""

import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from benchmarks.counts import Counts, Interval
from benchmarks.paper_tables import count_ranks, count_sampled
from benchmarks.settings import BASE, IN_DOMAIN, SETTINGS, WIDTHS, Case, Counted, Inputs, count

SAMPLED = (5, 3)
"""SpecInfer's shapes whose trees are verified by several rules, by k."""


@dataclass(slots=True)
class Results:
    """Everything that was counted: by case, and for the paper's tables.

    ranks    by temperature, for k = 1 … 5
    sampled  by k, for each verifier
    """

    cases: dict[Case, Counted] = field(default_factory=dict)
    ranks: dict[float, list[Counts]] = field(default_factory=dict)
    sampled: dict[int, dict[str, Counts]] = field(default_factory=dict)

    def ratio(self, case: Case, base: Case) -> Interval | None:
        """Tokens per step of one over another's, where both were counted."""
        if case not in self.cases or base not in self.cases:
            return None
        return self.cases[case].steps.ratio(self.cases[base].steps)


@dataclass(frozen=True, slots=True)
class Job:
    """One thing to be counted, on its own in a process.

    key  of the part of `Results` it goes to
    """

    part: str
    key: Any
    num_prompts: int

    def run(self, inputs: Inputs) -> Any:
        """Count it."""
        if self.part == "cases":
            return count(self.key, inputs)
        if self.part == "ranks":
            return count_ranks(inputs, IN_DOMAIN, self.num_prompts, self.key)
        setting = SETTINGS[BASE]
        return count_sampled(inputs, IN_DOMAIN, self.num_prompts, setting, WIDTHS[self.key])

    def line(self, found: Any) -> str:
        """What was counted, as JSON."""
        key = asdict(self.key) if self.part == "cases" else self.key
        content = {"part": self.part, "key": key, "num_prompts": self.num_prompts}
        if self.part == "cases":
            return json.dumps(content | {"steps": str(found.steps), "drafted": found.drafted})
        if self.part == "ranks":
            return json.dumps(content | {"counts": [str(each) for each in found]})
        return json.dumps(content | {"counts": {name: str(each) for name, each in found.items()}})


def read_line(line: str) -> tuple[Job, Any]:
    """What `Job.line` wrote."""
    row = json.loads(line)
    part, key = row["part"], row["key"]
    found: Any
    if part == "cases":
        key, found = Case(**key), Counted(Counts.parse(row["steps"]), row["drafted"])
    elif part == "ranks":
        found = [Counts.parse(each) for each in row["counts"]]
    else:
        found = {name: Counts.parse(each) for name, each in row["counts"].items()}
    return Job(part, key, row["num_prompts"]), found


def run(
    cases: Sequence[Case],
    inputs: Inputs,
    *,
    paper_prompts: int = 0,
    processes: int = 1,
    kept: Path | None = None,
    stop: bool = False,
    say: Callable[[str], None] = lambda message: None,
) -> Results:
    """Count every case and, on `paper_prompts` prompts, the paper's tables 1 and 3.

    processes  each computes with one thread; 1: everything here
    kept       a file of earlier counts of the same code, to be taken over and added to
    stop       count nothing more: results are those of `kept` alone
    """
    laws: dict[tuple[object, ...], Case] = {}
    for case in cases:
        laws.setdefault(case.law, case)
    jobs = []
    if paper_prompts:  # they take longest, so they go first
        jobs += [Job("sampled", k, paper_prompts) for k in SAMPLED]
        jobs += [Job("ranks", temperature, paper_prompts) for temperature in (0.0, 1.0)]
    jobs += [Job("cases", case, case.num_prompts) for case in laws.values()]
    found: dict[Job, Any] = {}
    if kept is not None and kept.exists():
        lines = kept.read_text(encoding="utf-8").splitlines()
        found = {job: each for job, each in map(read_line, lines) if job in jobs}
    left = [] if stop else [job for job in jobs if job not in found]
    start = time.perf_counter()
    for number, (job, each) in enumerate(_run_all(left, inputs, processes), start=1):
        found[job] = each
        if kept is not None:
            with kept.open("a", encoding="utf-8") as file:
                file.write(job.line(each) + "\n")
        seconds = time.perf_counter() - start
        say(f"{number} of {len(left)}, {seconds:.0f} s: {job.part} {job.key}")
    results = Results()
    for job in jobs:
        if job.part != "cases" and job in found:
            getattr(results, job.part)[job.key] = found[job]
    for case in cases:
        job = Job("cases", laws[case.law], case.num_prompts)
        if job in found:
            results.cases[case] = found[job]
    return results


def _run_all(jobs: Sequence[Job], inputs: Inputs, processes: int) -> Iterable[tuple[Job, Any]]:
    """What every job counted, as they end."""
    if processes == 1 or not jobs:
        yield from ((job, job.run(inputs)) for job in jobs)
        return
    os.environ["OMP_NUM_THREADS"] = "1"  # the processes' threads; torch here has its own by now
    with ProcessPoolExecutor(
        processes, mp_context=get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        futures: dict[Future[Any], Job] = {pool.submit(job.run, inputs): job for job in jobs}
        for future in as_completed(futures):
            yield futures[future], future.result()
