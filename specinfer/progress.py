"""Progress bars for a terminal: silent, and free, anywhere else."""

import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from specinfer.engine.build import Progress
from specinfer.engine.engine import StepTrace
from specinfer.engine.measure import Report

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import ProgressColumn


def is_shown(asked: bool | None) -> bool:
    """Whether to draw: as asked for, else where standard error is a terminal."""
    return sys.stderr.isatty() if asked is None else asked


@contextmanager
def show_loading(asked: bool | None) -> Iterator[Progress | None]:
    """A bar per model while its weights are read."""
    if not is_shown(asked):
        yield None
        return
    from rich.progress import BarColumn, DownloadColumn, TextColumn

    with _bars(
        "loading", TextColumn("{task.description}"), BarColumn(), DownloadColumn()
    ) as report:
        yield report


@contextmanager
def show_measuring(asked: bool | None) -> Iterator[Report | None]:
    """A bar per model while the times of its steps are measured."""
    if not is_shown(asked):
        yield None
        return
    from rich.progress import BarColumn, TextColumn

    counted = TextColumn("{task.completed} of {task.total} steps")
    with _bars("measuring", TextColumn("{task.description}:"), counted, BarColumn()) as report:
        yield report


@contextmanager
def _bars(verb: str, *columns: "ProgressColumn") -> Iterator[Callable[[str, int, int], None]]:
    """A bar per model, told as report(model, done, total), and above them what is logged."""
    from rich.console import Console
    from rich.progress import Progress, TaskID

    tasks: dict[str, TaskID] = {}
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True) as bars, _shown_log(console):

        def report(model: str, done: int, total: int) -> None:
            if model not in tasks:
                tasks[model] = bars.add_task(f"{verb} {model}", total=total)
            bars.update(tasks[model], completed=done, total=total)

        yield report


@contextmanager
def _shown_log(console: "Console") -> Iterator[None]:
    """Print what is logged, such as that kernels are compiled, unless somebody else listens."""
    logger = logging.getLogger("specinfer")
    if logger.isEnabledFor(logging.INFO):
        yield
        return
    handler, level = _ConsoleHandler(console), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.setLevel(level)
        logger.removeHandler(handler)


class _ConsoleHandler(logging.Handler):
    def __init__(self, console: "Console") -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        """Above the bars, as it stands."""
        self._console.print(record.getMessage(), markup=False, highlight=False, soft_wrap=True)


@contextmanager
def count_tokens(
    asked: bool | None, num_sequences: int
) -> Iterator[Callable[[Sequence[StepTrace]], None]]:
    """A bar over finished sequences with tokens per second; for batches only."""
    if num_sequences < 2 or not is_shown(asked):
        yield lambda traces: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (
        TextColumn("generating"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task("generating", total=num_sequences, rate="")
        num_tokens = 0

        def report(traces: Sequence[StepTrace]) -> None:
            nonlocal num_tokens
            num_tokens += sum(trace.num_new for trace in traces)
            elapsed = bars.tasks[0].elapsed or 0.0
            rate = f"{num_tokens / elapsed:.0f} tok/s" if elapsed else ""
            ended = sum(trace.sequence.is_finished for trace in traces)
            bars.update(task, advance=ended, rate=rate)

        yield report
