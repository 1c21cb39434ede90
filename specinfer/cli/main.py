"""The commands, and what every one of them does with errors, Ctrl-C and a closed pipe.

A `SpecInferError` is one sentence on standard error and exit code 2, as are wrong flags; a
full disk is 1; Ctrl-C is 130, and a reader that goes away (`| head -1`) is no error worth a word.
"""

import errno
import os
import sys
import warnings
from collections.abc import Callable
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from specinfer import __version__
from specinfer.cli.bench import bench_latency
from specinfer.cli.bench_serve import bench_serve
from specinfer.cli.chat import chat
from specinfer.cli.generate import generate
from specinfer.cli.models import models
from specinfer.cli.options import takes_options, takes_settings
from specinfer.cli.quantize import quantize
from specinfer.cli.serve import serve
from specinfer.cli.tree import tree
from specinfer.errors import SpecInferError
from specinfer.loadtest.plan import LoadTest
from specinfer.serve.settings import ServerSettings

if TYPE_CHECKING:
    from rich.text import Text


class _Group(TyperGroup):
    """Commands whose errors are sentences."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        _hide_switch_types(self, ctx)
        super().format_help(ctx, formatter)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except SpecInferError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(2) from None
        except OSError as error:
            if error.errno == errno.EPIPE:
                raise  # typer ends without a word
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from None
        except KeyboardInterrupt:
            raise typer.Exit(130) from None


class _Command(TyperCommand):
    """Commands whose help has flags' whole names, however narrow the terminal."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        from typer import rich_utils

        _hide_switch_types(self, ctx)
        names = ("highlighter", "negative_highlighter")
        whole = {name: getattr(rich_utils, name) for name in names}
        for name, highlight in whole.items():
            setattr(rich_utils, name, _folding(highlight))
        try:
            super().format_help(ctx, formatter)
        finally:
            for name, highlight in whole.items():
                setattr(rich_utils, name, highlight)


def _hide_switch_types(command: Any, ctx: Any) -> None:
    """Switches take no value: typer's table would ask for a <bool>."""
    for parameter in command.get_params(ctx):
        if getattr(parameter, "is_bool_flag", False) and parameter.metavar is None:
            parameter.metavar = ""


def _folding(highlight: "Callable[[str], Text]") -> "Callable[[str], Text]":
    """Broken over lines: typer's table ends long words with an ellipsis."""

    def fold(text: str) -> "Text":
        marked = highlight(text)
        marked.overflow = "fold"
        return marked

    return fold


app = typer.Typer(
    cls=_Group,
    help="Exact token-tree speculative decoding: language models answer faster and say the same.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
bench = typer.Typer(
    cls=_Group, no_args_is_help=True, help="Measure on this machine, or any server."
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"specinfer {__version__}")
        raise typer.Exit()


@app.callback()
def prepare(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_print_version,
            is_eager=True,  # before "Missing command."
            help="Print the version and end.",
        ),
    ] = False,
) -> None:
    """Set up what all commands share: readable warnings, any terminal's encoding."""
    warnings.showwarning = _show_warning
    for name, errors in (
        ("stdin", "surrogateescape"),
        ("stdout", "replace"),
        ("stderr", "replace"),
    ):
        stream = getattr(sys, name)
        if stream is None:  # closed by whoever started us
            stream = Path(os.devnull).open("r" if name == "stdin" else "w")  # noqa: SIM115
            setattr(sys, name, stream)
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors=errors)  # a terminal without UTF-8 is no reason to fail


def _show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    typer.echo(f"warning: {message}", err=True)


app.command(cls=_Command)(takes_options(generate))
app.command(cls=_Command)(takes_options(chat))
app.command(cls=_Command)(takes_options(tree))
app.command(cls=_Command)(takes_options(serve, settings=ServerSettings, samples=False))
bench.command("latency", cls=_Command)(takes_options(bench_latency))
bench.command("serve", cls=_Command)(takes_settings(bench_serve, LoadTest))
app.add_typer(bench, name="bench")
app.command(cls=_Command)(models)
app.command(cls=_Command)(quantize)
