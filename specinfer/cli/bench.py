"""`specinfer bench latency`: plain against tree decoding on this machine."""

import json as jsonlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from specinfer.cli.generate import as_conversation, read_prompt
from specinfer.cli.options import Asked
from specinfer.cli.report import check_writable
from specinfer.config import Speculation
from specinfer.errors import ConfigError

if TYPE_CHECKING:
    from specinfer.bench import Latency
    from specinfer.llm import LLM


def bench_latency(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(help="What to ask; nothing: a few bundled questions.", show_default=False),
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="Prompts from a file, one per line.")
    ] = None,
    pairs: Annotated[
        int, typer.Option("--pairs", min=1, help="Runs of each prompt by each system.")
    ] = 3,
    json: Annotated[
        Path | None, typer.Option("--json", help='Write all runs to a file; "-": to stdout.')
    ] = None,
    *,
    asked: Asked,
) -> None:
    """Time plain against tree decoding, in turns, on the same prompts.

    Greedy and 64 tokens long unless --temperature and --max-tokens say otherwise. Prompts go
    through the chat template if the model has one.
    """
    if not asked.drafters or asked.speculation.tree == "off":
        raise ConfigError("there is nothing to compare: give --drafter and a tree")
    texts = _read_prompts(prompts or [], file)
    if json is not None and str(json) != "-":
        check_writable(json)
    asked = replace(asked, sampling={"temperature": 0.0, "max_tokens": 64} | dict(asked.sampling))
    from specinfer.bench import measure_latency

    plain = replace(asked, drafters=(), speculation=Speculation(tree="off"))
    llms = {"plain": plain.load(), "tree": asked.load()}
    ids = [_encode(llms["plain"], text) for text in texts]
    with _progress(len(llms) * (pairs * len(ids) + 1)) as report:
        found = measure_latency(llms, ids, asked.params(llms["plain"]), pairs, report=report)
    if json is not None and str(json) == "-":
        typer.echo(_to_json(found, asked))
        return
    _print_table(found)
    if json is not None:
        json.write_text(_to_json(found, asked) + "\n", encoding="utf-8")
        typer.echo(f"wrote {json}", err=True)


def _read_prompts(prompts: list[str], file: Path | None) -> list[str]:
    if file is not None:
        prompts = prompts + [line for line in read_prompt(None, file).splitlines() if line.strip()]
    if not prompts:
        from specinfer.bench import SUBJECTS

        return list(SUBJECTS)
    return [read_prompt(prompt, None) for prompt in prompts]


def _encode(llm: "LLM", text: str) -> list[int]:
    if llm.tokenizer.chat_templates:
        return llm.tokenizer.apply_chat_template(as_conversation(text))
    return llm.tokenizer.encode(text)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[], None]]:
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task("measuring", total=total)
        yield lambda: bars.advance(task)


def _to_json(found: "Latency", asked: Asked) -> str:
    what = {
        "model": asked.loading.model,
        "drafters": list(asked.drafters),
        "speculation": asdict(asked.speculation),
        "sampling": dict(asked.sampling),
    }
    return jsonlib.dumps(what | asdict(found))


def _print_table(found: "Latency") -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in (
        "",
        "tokens/s",
        "quartiles",
        "tokens/step",
        "speed-up",
        "quartiles",
        "same text",
    ):
        table.add_column(column, justify="right" if column else "left")
    for name, each in found.systems.items():
        speed, ratio = each.tokens_per_s, each.ratio
        table.add_row(
            name,
            f"{speed.median:.1f}",
            f"{speed.low:.1f}–{speed.high:.1f}",
            f"{each.tokens_per_step:.2f}",
            f"{ratio.median:.2f}×",
            f"{ratio.low:.2f}–{ratio.high:.2f}",
            f"{each.same_text} of {found.num_prompts}",
        )
    Console().print(table)
    typer.echo(f"medians of {found.num_prompts} prompts × {found.pairs} pairs, run in turns")
