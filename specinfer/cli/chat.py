"""`specinfer chat`: a conversation in the terminal, or read from a pipe line by line."""

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from specinfer.cli.generate import as_conversation, write_now
from specinfer.cli.options import Asked
from specinfer.cli.stream import stream_text
from specinfer.errors import CapacityError, RequestError

if TYPE_CHECKING:
    from specinfer.llm import LLM
    from specinfer.outputs import RequestOutput
    from specinfer.request import SamplingParams

_HELP = "/reset forgets the conversation, /exit ends (as does Ctrl-D); Ctrl-C stops an answer"


def chat(
    stats: Annotated[
        bool, typer.Option("--stats", help="After each answer, print its speed.")
    ] = False,
    system: Annotated[
        str | None,
        typer.Option("--system", help="What the model is told before the first turn."),
    ] = None,
    *,
    asked: Asked,
) -> None:
    """Talk with a model, turn by turn.

    /reset forgets the conversation, /exit or Ctrl-D ends, Ctrl-C stops the answer being written.
    """
    is_terminal = sys.stdin.isatty()
    llm = asked.load()
    params = asked.params(llm)
    if params.n != 1:
        raise RequestError(f"n={params.n}: a chat has one answer at a time")
    before = [{"role": "system", "content": system}] if system else []
    # Refuses now a model without a template, or one whose template has no place for a system.
    llm.tokenizer.render_chat([*before, *as_conversation("Hi")])
    if is_terminal:
        import readline  # noqa: F401 - lets input() edit lines and remember them

        typer.echo(f"{asked.loading.model}: {_HELP}", err=True)
    _Chat(llm, params, is_terminal=is_terminal, has_stats=stats, before=before).run()
    asked.keep(llm)


class _Chat:
    """The conversation so far.

    before       messages that stand before the first turn, and survive /reset
    was_stopped  whether the last thing that happened was a Ctrl-C: the next one ends the chat
    """

    def __init__(
        self,
        llm: "LLM",
        params: "SamplingParams",
        *,
        is_terminal: bool,
        has_stats: bool,
        before: Sequence[dict[str, str]] = (),
    ) -> None:
        self.llm, self.params = llm, params
        self.is_terminal, self.has_stats = is_terminal, has_stats
        self.before = list(before)
        self.messages = list(before)
        self.was_stopped = False

    def run(self) -> None:
        """Until /exit, the end of the input, or two Ctrl-C."""
        while True:
            try:
                line = self._read_line()
            except KeyboardInterrupt:
                if self.was_stopped or not self.is_terminal:
                    typer.echo(err=True)
                    return
                self.was_stopped = True
                typer.echo("\n(Ctrl-C once more, or Ctrl-D, ends the chat)", err=True)
                continue
            self.was_stopped = False
            if line is None or line.strip() == "/exit":
                return
            if line.startswith("/"):
                self._obey(line.strip())
            elif line.strip():
                self._answer(line.strip())

    def _read_line(self) -> str | None:
        """What was typed; None at the end of the input."""
        if not self.is_terminal:
            return sys.stdin.readline() or None
        try:
            return input("> ")
        except EOFError:
            typer.echo(err=True)
            return None

    def _obey(self, command: str) -> None:
        if command == "/reset":
            self.messages = list(self.before)
            self._note("the conversation starts anew")
        elif command == "/help":
            self._note(_HELP)
        else:
            typer.echo(f"error: {command} is no command: {_HELP}", err=True)

    def _answer(self, text: str) -> None:
        messages = [*self.messages, {"role": "user", "content": text}]
        try:
            prompt = self.llm.tokenizer.apply_chat_template(messages)
            self._check_room(len(prompt))
            start_s = time.perf_counter()
            output = stream_text(self.llm, prompt, self.params, write_now)
        except (RequestError, CapacityError) as error:
            typer.echo(f"error: {error}", err=True)
            return
        took_s = time.perf_counter() - start_s
        typer.echo()
        self.messages = [*messages, {"role": "assistant", "content": output.outputs[0].text}]
        self._tell_end(output)
        if self.has_stats:
            stats = output.stats
            self._note(
                f"{stats.num_output_tokens} tokens, {stats.tokens_per_step:.2f} per step, "
                f"{stats.num_output_tokens / took_s:.0f} per second"
            )
        if self.is_terminal:
            typer.echo(err=True)  # between turns

    def _check_room(self, num_tokens: int) -> None:
        limit = self.llm.engine.max_model_len
        if num_tokens >= limit:
            raise RequestError(
                f"the conversation would have {num_tokens} tokens and the context holds {limit}: "
                "say /reset to start anew, or say less"
            )

    def _tell_end(self, output: "RequestOutput") -> None:
        choice = output.outputs[0]
        num_tokens = len(output.prompt_token_ids) + len(choice.token_ids)
        if choice.finish_reason == "abort":
            self.was_stopped = True
            self._note("stopped")
        elif num_tokens >= self.llm.engine.max_model_len:
            self._note("the context is full: say /reset to start anew")
        elif choice.finish_reason == "length":
            self._note(f"cut at max_tokens={self.params.max_tokens}")

    def _note(self, text: str) -> None:
        typer.echo(f"({text})", err=True)
