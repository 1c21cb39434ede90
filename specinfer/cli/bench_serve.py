"""`specinfer bench serve`: any OpenAI server under load."""

import asyncio
import json as jsonlib
import math
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specinfer.cli.bench import show_progress
from specinfer.cli.report import check_writable
from specinfer.errors import ConfigError
from specinfer.loadtest.plan import LoadTest

if TYPE_CHECKING:
    from specinfer.loadtest.client import Record
    from specinfer.loadtest.prompts import Prompt
    from specinfer.loadtest.summary import Summary


def bench_serve(
    more_goals: Annotated[list[str] | None, typer.Argument(hidden=True, metavar="")] = None,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="OPENAI_API_KEY", help="Sent as a bearer token.", show_default=False),
    ] = None,
    file: Annotated[
        Path | None,
        typer.Option(
            *("--file", "-f", "--dataset-path"),
            help="Prompts: one per line; .jsonl of objects with prompt or messages; ShareGPT's "
            ".json; nothing: bundled questions.",
            show_default=False,
        ),
    ] = None,
    json: Annotated[
        Path | None, typer.Option("--json", help='Write the result to a file; "-": to stdout.')
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw how the latencies are distributed (PNG, SVG, PDF).")
    ] = None,
    *,
    settings: LoadTest,
) -> None:
    """Put an OpenAI server under load, and say how long its clients wait.

    Names and meanings are those of vLLM's bench serve. Exit code 1 if every request failed.
    """
    from specinfer.loadtest.prompts import bundled_prompts, choose, read_prompts
    from specinfer.loadtest.summary import summarise

    settings = _with_goals(settings, more_goals or [])
    known = bundled_prompts() if file is None else read_prompts(file)
    to_stdout = json is not None and str(json) == "-"
    _check_outputs(None if to_stdout else json, plot)
    prompts = choose(known, settings.num_prompts, settings.seed)
    model, records, duration_s = asyncio.run(_run(settings, prompts))
    summary = summarise(records, duration_s, settings.goals_ms)
    if not to_stdout:
        _print(settings, summary)
    if json is not None:
        found = jsonlib.dumps(_describe(settings, model) | summary.to_object() | _detail(records))
        if to_stdout:
            typer.echo(found)
        else:
            json.write_text(found + "\n", encoding="utf-8")
            typer.echo(f"wrote {json}", err=True)
    if plot is not None:
        _draw(settings, model, records, plot)
    if not summary.completed:
        raise typer.Exit(1)


def _with_goals(settings: LoadTest, more: list[str]) -> LoadTest:
    """vLLM's command line has all goals behind one flag, where ours may be repeated."""
    if not more:
        return settings
    if not settings.goodput:
        raise ConfigError(f"{more[0]!r} is not understood: bench serve takes options alone")
    return replace(settings, goodput=[*settings.goodput, *more])


def _check_outputs(json: Path | None, plot: Path | None) -> None:
    if json is not None:
        check_writable(json)
    if plot is not None:
        from specinfer.loadtest.report import check_plots

        check_writable(plot)
        check_plots(plot)


async def _run(settings: LoadTest, prompts: list["Prompt"]) -> tuple[str, list["Record"], float]:
    from specinfer.loadtest.client import ask, first_model, open_client
    from specinfer.loadtest.run import arrivals, run

    url, key, timeout_s = settings.base_url, settings.api_key, settings.timeout_s
    async with open_client(url, key, timeout_s) as client:
        model = settings.model or await first_model(client)
        times = arrivals(len(prompts), settings.request_rate, settings.seed)
        one = partial(ask, client, settings.endpoint, settings.body(model))
        with show_progress(len(prompts)) as advance:
            records, duration_s = await run(one, prompts, times, settings.max_concurrency, advance)
    return model, records, duration_s


def _print(settings: LoadTest, summary: "Summary") -> None:
    from rich.console import Console

    from specinfer.loadtest.report import facts, table

    if summary.completed:
        Console().print(table(summary))
    for name, text in facts(summary, settings.goals_ms):
        typer.echo(f"{name:>18}  {text}")


def _describe(settings: LoadTest, model: str) -> dict[str, Any]:
    """What was asked, without the key; JSON has no infinity."""
    asked = asdict(settings) | {"model": model, "goodput": settings.goals_ms}
    del asked["api_key"]
    if math.isinf(settings.request_rate):
        asked["request_rate"] = "inf"
    return asked


def _detail(records: list["Record"]) -> dict[str, Any]:
    """Request by request, as vLLM's --save-detailed has it; seconds."""
    start_s = min(record.start_s for record in records)
    return {
        "start_times": [record.start_s - start_s for record in records],
        "input_lens": [record.prompt_tokens for record in records],
        "output_lens": [record.output_tokens for record in records],
        "ttfts": [None if record.error else record.ttft_s for record in records],
        "itls": [record.gaps_s for record in records],
        "request_errors": [record.error for record in records],
    }


def _draw(settings: LoadTest, model: str, records: list["Record"], file: Path) -> None:
    from specinfer.loadtest.report import plot

    title = f"{model}: {len(records)} requests, {settings.request_rate:g} per second"
    if settings.max_concurrency is not None:
        title += f", {settings.max_concurrency} at a time"
    plot(records, title, file)
    typer.echo(f"wrote {file}", err=True)
