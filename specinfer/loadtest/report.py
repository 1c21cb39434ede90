"""A load test's result as a table and as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from specinfer.errors import ConfigError, DependencyError
from specinfer.loadtest.client import Record
from specinfer.loadtest.summary import LATENCIES, PERCENTILES, Summary, samples_s

if TYPE_CHECKING:
    from rich.table import Table


def facts(summary: Summary, goals: Mapping[str, float]) -> list[tuple[str, str]]:
    """What is counted, name by name."""
    rows = [
        ("requests", f"{summary.completed} completed, {summary.failed} failed"),
        ("duration", f"{summary.duration_s:.2f} s"),
        ("tokens", f"{summary.total_input_tokens} in, {summary.total_output_tokens} out"),
        ("request throughput", f"{summary.request_throughput:.2f} requests/s"),
        ("output throughput", f"{summary.output_throughput:.1f} tokens/s"),
        ("total throughput", f"{summary.total_token_throughput:.1f} tokens/s"),
    ]
    if summary.num_chunks:
        per_chunk = summary.total_output_tokens / summary.num_chunks
        rows.insert(3, ("tokens per chunk", f"{per_chunk:.2f}"))
    if summary.goodput is not None:
        asked = " ".join(f"{name}:{limit_ms:g}" for name, limit_ms in goals.items())
        rows.append(("goodput", f"{summary.goodput:.2f} requests/s ({asked} ms)"))
    rows += [("error", f"{count} × {error}") for error, count in summary.errors.items()]
    if summary.completed and not summary.is_counted:
        rows.append(("note", "the server sends no usage: chunks were counted as tokens"))
    return rows


def table(summary: Summary) -> "Table":
    """Latencies in milliseconds."""
    from rich import box
    from rich.table import Table

    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    grid.add_column("milliseconds")
    for name in ("mean", *(f"p{each}" for each in PERCENTILES)):
        grid.add_column(name, justify="right")
    for name, values in summary.latencies.items():
        cells = (f"{value:.1f}" for value in values.values())
        grid.add_row(f"{LATENCIES[name]} ({name})", *cells)
    return grid


def check_plots(file: Path) -> None:
    """Refuse early what could not be drawn.

    raises  DependencyError without matplotlib, ConfigError for a format it does not write
    """
    try:
        from matplotlib.backend_bases import FigureCanvasBase
    except ImportError:
        raise DependencyError("plots need matplotlib: pip install 'specinfer[bench]'") from None
    known = FigureCanvasBase.get_supported_filetypes()
    if file.suffix.removeprefix(".") not in known:
        raise ConfigError(f"plot={str(file)!r}: end it in .png, .svg or .pdf")


def plot(records: Sequence[Record], title: str, file: Path) -> None:
    """Draw the share of requests (of gaps, for itl) that took at most so long."""
    from matplotlib.figure import Figure

    samples = samples_s(records)
    figure = Figure(figsize=(8, 6), layout="constrained")
    for axes, (name, meaning) in zip(figure.subplots(2, 2).flat, LATENCIES.items(), strict=True):
        if samples[name]:
            axes.ecdf([1e3 * value for value in samples[name]])
        axes.set(xlabel=f"{meaning}, ms", ylabel="share", ylim=(0, 1.02))
        axes.grid(alpha=0.3)
    figure.suptitle(title, fontsize=9)
    figure.savefig(file)
