"""Text written while it comes, and Ctrl-C between steps, never inside one.

An engine stopped half-way through a step would not do for the next question.
"""

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from types import FrameType
from typing import TYPE_CHECKING

from specinfer.outputs import RequestOutput
from specinfer.request import SamplingParams

if TYPE_CHECKING:
    from specinfer.llm import LLM


class Interrupt:
    """Whether Ctrl-C was pressed."""

    def __init__(self) -> None:
        self.was_pressed = False

    def take(self, signum: int, frame: FrameType | None) -> None:
        """Note the first Ctrl-C; a second one does not wait for the step to end."""
        if self.was_pressed:
            raise KeyboardInterrupt
        self.was_pressed = True


@contextmanager
def noted_interrupts() -> Iterator[Interrupt]:
    """Within the block, Ctrl-C sets a flag instead of raising."""
    interrupt = Interrupt()
    before = signal.signal(signal.SIGINT, interrupt.take)
    try:
        yield interrupt
    finally:
        signal.signal(signal.SIGINT, before)


def stream_text(
    llm: "LLM",
    prompt: str | Sequence[int],
    params: SamplingParams,
    write: Callable[[str], None],
) -> RequestOutput:
    """Pass on the first continuation's text as it grows.

    returns  all of it; after Ctrl-C what there is, with finish_reason "abort"
    """
    num_written = 0
    with noted_interrupts() as interrupt, closing(llm.steps(prompt, params)) as steps:
        for request in steps:
            if interrupt.was_pressed:
                llm.abort([request])
            text = request.sequences[0].output.text
            if len(text) > num_written:
                write(text[num_written:])
            num_written = len(text)
    return request.output()
