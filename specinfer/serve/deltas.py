"""What of a continuation has been sent, and what is new."""

from dataclasses import dataclass
from typing import Any

from specinfer.outputs import CompletionOutput


@dataclass(slots=True)
class Delta:
    """What a step added to one continuation.

    logprobs  one entry per new token, where they were asked for
    """

    text: str
    token_ids: list[int]
    logprobs: list[Any] | None
    is_last: bool


@dataclass(slots=True)
class Sent:
    """How much of one continuation has been sent.

    is_over  whether that was all of it
    """

    num_chars: int = 0
    num_tokens: int = 0
    has_begun: bool = False
    is_over: bool = False

    def advance(self, output: CompletionOutput) -> Delta:
        """What is new since the last call."""
        logprobs: Any = output.logprobs
        delta = Delta(
            output.text[self.num_chars :],
            output.token_ids[self.num_tokens :],
            None if logprobs is None else logprobs[self.num_tokens :],
            output.finish_reason is not None,
        )
        self.num_chars = len(output.text)
        self.num_tokens = len(output.token_ids)
        self.has_begun = True
        self.is_over = delta.is_last
        return delta
