"""`specinfer generate`: continue a prompt, or many, as text or as JSON."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from specinfer.cli.options import Asked
from specinfer.cli.report import add_up, print_json, print_stats, tell_full, timing, to_object
from specinfer.cli.stream import stream_text
from specinfer.errors import ConfigError, RequestError

if TYPE_CHECKING:
    from specinfer.llm import LLM
    from specinfer.outputs import RequestOutput
    from specinfer.request import SamplingParams

PromptArgument = Annotated[
    str | None,
    typer.Argument(help='The text; "-" or nothing: standard input.', show_default=False),
]
FileOption = Annotated[
    Path | None, typer.Option("--file", "-f", help="Read the prompt from a file.")
]
ChatOption = Annotated[
    bool,
    typer.Option(
        "--chat/--raw",
        help="Ask through the model's chat template, or continue the text as it stands.",
    ),
]


def generate(
    prompt: PromptArgument = None,
    file: FileOption = None,
    lines: Annotated[
        bool, typer.Option("--lines", help="Each line is a prompt; all are served together.")
    ] = False,
    chat: ChatOption = False,
    stats: Annotated[
        bool, typer.Option("--stats", help="Print tokens per step, acceptance and time by part.")
    ] = False,
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object per prompt and line.")
    ] = False,
    *,
    asked: Asked,
) -> None:
    """Continue a prompt; the text streams to standard output.

    A chat model such as the bundled one answers better with --chat.
    """
    text = read_prompt(prompt, file)
    prompts = [line for line in text.splitlines() if line.strip()] if lines else [text]
    if not prompts:
        raise RequestError("--lines found no prompt: give one per line")
    llm = asked.load()
    params = asked.params(llm)
    llm.engine.stats.reset()
    start = time.perf_counter()
    if lines or params.n > 1:
        outputs = _generate_all(llm, prompts, params, chat)
        if not json:
            _print_all(outputs, prompts)
    else:
        write = (lambda text: None) if json else write_now
        outputs = [stream_text(llm, encode_prompt(llm, text, chat=chat), params, write)]
        if not json:
            typer.echo()
    took = timing(llm, time.perf_counter() - start)
    asked.keep(llm)
    if json:
        for each, output in zip(prompts, outputs, strict=True):
            print_json(to_object(output) | {"prompt": each} | ({} if lines else {"time": took}))
    tell_full(outputs, llm.engine.max_model_len, params.max_tokens)
    if stats:
        print_stats(add_up(outputs), took, params.target_tpot_s)
    if any(choice.finish_reason == "abort" for output in outputs for choice in output.outputs):
        raise typer.Exit(130)


def read_prompt(prompt: str | None, file: Path | None) -> str:
    """The prompt from the argument, the file or standard input, less one newline at its end.

    raises  ConfigError if there is none or it cannot be read, RequestError if it is empty
    """
    if file is not None:
        if prompt is not None:
            raise ConfigError("a prompt and --file are both given: give one")
        try:
            text = file.read_text(encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--file {file} cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise ConfigError(f"--file {file} is no UTF-8 text") from None
        text = text.removesuffix("\n")
    elif prompt is None or prompt == "-":
        text = _read_stdin(is_asked=prompt == "-")
    else:
        text = prompt
    if not text:
        raise RequestError("the prompt is empty: give at least one token")
    return text


def _read_stdin(is_asked: bool) -> str:
    if sys.stdin.isatty() and not is_asked:
        raise ConfigError("there is no prompt: give it as an argument, with --file or on stdin")
    text = sys.stdin.read()
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes that are no text came as surrogates
        raise ConfigError("standard input is no UTF-8 text") from None
    return text.removesuffix("\n")


def as_conversation(prompt: str) -> list[dict[str, str]]:
    """The prompt as what a user says first."""
    return [{"role": "user", "content": prompt}]


def encode_prompt(llm: "LLM", prompt: str, *, chat: bool) -> str | list[int]:
    """The prompt as it is submitted: through the chat template or as it stands."""
    return llm.tokenizer.apply_chat_template(as_conversation(prompt)) if chat else prompt


def write_now(text: str) -> None:
    """Write to standard output without waiting for a line to be full."""
    sys.stdout.write(text)
    sys.stdout.flush()


def _generate_all(
    llm: "LLM", prompts: Sequence[str], params: "SamplingParams", chat: bool
) -> "list[RequestOutput]":
    if chat:
        return llm.chat([as_conversation(prompt) for prompt in prompts], params)
    return llm.generate(list(prompts), params)


def _print_all(outputs: "Sequence[RequestOutput]", prompts: Sequence[str]) -> None:
    """Under a head line each, as `head` prints several files."""
    for prompt, output in zip(prompts, outputs, strict=True):
        for choice in output.outputs:
            num = len(output.outputs)
            which = f" ({choice.index + 1} of {num})" if num > 1 else ""
            typer.echo(f"==> {prompt}{which} <==\n{choice.text}\n")
