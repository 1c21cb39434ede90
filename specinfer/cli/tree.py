"""`specinfer tree`: watch the token trees of a text being written."""

from collections.abc import Generator
from contextlib import closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specinfer.cli.generate import (
    ChatOption,
    FileOption,
    PromptArgument,
    encode_prompt,
    read_prompt,
)
from specinfer.cli.options import Asked
from specinfer.cli.report import check_writable, print_json
from specinfer.cli.stream import noted_interrupts
from specinfer.errors import ConfigError

if TYPE_CHECKING:
    from specinfer.draw import DrawnStep
    from specinfer.llm import LLM
    from specinfer.request import SamplingParams


def tree(
    prompt: PromptArgument = None,
    file: FileOption = None,
    chat: ChatOption = False,
    steps: Annotated[int, typer.Option("--steps", min=1, help="How many steps to draw.")] = 8,
    svg: Annotated[
        Path | None, typer.Option("--svg", help="Write the same picture to a file.")
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of drawing.")
    ] = False,
    *,
    asked: Asked,
) -> None:
    """Draw each step's token tree: what was drafted, and which path the target accepted."""
    text = read_prompt(prompt, file)
    if svg is not None:
        check_writable(svg)
    llm = asked.load()
    params = asked.params(llm)
    if params.n != 1:
        raise ConfigError(f"n={params.n}: a drawing shows one continuation")
    drawn = []
    if not json:
        _print_legend()
    with (
        noted_interrupts() as interrupt,
        closing(_steps(llm, encode_prompt(llm, text, chat=chat), params)) as running,
    ):
        for step in running:
            drawn.append(step)
            if not json:
                _print_step(len(drawn), step)
            if len(drawn) == steps or interrupt.was_pressed:
                break
    asked.keep(llm)
    if json:
        print_json({"prompt": text, "steps": [_to_object(step) for step in drawn]})
    if svg is not None:
        from specinfer.draw import to_svg

        svg.write_text(to_svg(drawn, text), encoding="utf-8")
        typer.echo(f"wrote {svg}", err=True)
    if interrupt.was_pressed:
        raise typer.Exit(130)


def _steps(
    llm: "LLM", prompt: str | list[int], params: "SamplingParams"
) -> "Generator[DrawnStep, None, None]":
    from specinfer.draw import read_step

    with closing(llm.steps(prompt, replace(params, include_tree=True))) as running:
        for request in running:
            for step in request.output().trees:
                yield read_step(step, lambda token: _token_text(llm, token))


def _token_text(llm: "LLM", token: int) -> str:
    return llm.tokenizer.decode([token], skip_special_tokens=False)


def _print_legend() -> None:
    from rich.console import Console

    from specinfer.draw import LEGEND

    Console(highlight=False).print(LEGEND, style="dim", markup=False)


def _print_step(number: int, step: "DrawnStep") -> None:
    from rich.console import Console
    from rich.text import Text

    from specinfer.draw import to_text

    console = Console(highlight=False)
    console.print(Text(f"\nstep {number}: {step.title}", style="bold"))
    if console.is_terminal:
        for line in to_text(step, console.width):
            console.print(line, no_wrap=True, overflow="ellipsis")
    else:  # a file is as wide as it has to be
        for line in to_text(step):
            console.print(line, soft_wrap=True)


def _to_object(step: "DrawnStep") -> dict[str, Any]:
    return {
        "nodes": [asdict(node) for node in step.nodes],
        "num_drafted": step.num_drafted,
        "num_accepted": step.num_accepted,
        "text": step.text,
    }
