"""Log-probabilities in OpenAI's two shapes: the chat's and the older completions'."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

LEAST = -9999.0
"""JSON has no -inf: what a filter made impossible."""


class Logprob(Protocol):
    """One token's entry, as vLLM has it."""

    logprob: float
    rank: int | None
    decoded_token: str | None


Logprobs = Mapping[int, Logprob]
"""At one place: the token that came, and the likeliest ones."""


@dataclass(frozen=True, slots=True)
class TokenNames:
    """How tokens are written.

    decode    token ids to text
    bytes_of  a token id's own bytes, which may be half a character; None: those of its text
    as_ids    "token_id:17" instead of text, which is not always unique
    """

    decode: Callable[[Sequence[int]], str]
    bytes_of: Callable[[int], bytes] | None = None
    as_ids: bool = False

    def text(self, token_id: int) -> str:
        """A token as text."""
        return f"token_id:{token_id}" if self.as_ids else self.decode([token_id])

    def describe(self, token_id: int, entry: Logprob) -> dict[str, Any]:
        """A token in the chat's shape."""
        text = self.text(token_id)
        raw = text.encode() if self.bytes_of is None or self.as_ids else self.bytes_of(token_id)
        return {"token": text, "logprob": max(entry.logprob, LEAST), "bytes": list(raw)}


def chat_logprobs(
    token_ids: Sequence[int], places: Sequence[Logprobs], top: int, names: TokenNames
) -> dict[str, Any]:
    """The chat's shape.

    top  so many of the likeliest at each place
    """
    content = []
    for token_id, place in zip(token_ids, places, strict=True):
        likeliest = [names.describe(each, place[each]) for each in _likeliest(place, top)]
        described = names.describe(token_id, place[token_id])
        content.append(described | {"top_logprobs": likeliest})
    return {"content": content, "refusal": None}


def completion_logprobs(
    token_ids: Sequence[int],
    places: Sequence[Logprobs | None],
    top: int,
    names: TokenNames,
    offset: int = 0,
) -> dict[str, Any]:
    """The completions' shape.

    places  None where nothing is known: the first token of a prompt
    offset  where in the text the first of these tokens stands
    """
    shape: dict[str, list[Any]] = {
        "text_offset": [],
        "token_logprobs": [],
        "tokens": [],
        "top_logprobs": [],
    }
    for token_id, place in zip(token_ids, places, strict=True):
        entry = None if place is None else place[token_id]
        text = names.text(token_id)
        shape["text_offset"].append(offset)
        shape["tokens"].append(text)
        shape["token_logprobs"].append(None if entry is None else max(entry.logprob, LEAST))
        shape["top_logprobs"].append(
            None
            if place is None
            else {
                names.text(each): max(place[each].logprob, LEAST)
                for each in dict.fromkeys([*_likeliest(place, top), token_id])
            }
        )
        offset += len(text)
    return shape


def prompt_logprobs(places: Sequence[Logprobs | None], top: int) -> list[dict[str, Any] | None]:
    """vLLM's shape, per token of the prompt; None for the first.

    top  so many of the likeliest at each place, beside the token that stands there
    """
    return [
        None
        if place is None
        else {
            str(token_id): {
                "logprob": max(place[token_id].logprob, LEAST),
                "rank": place[token_id].rank,
                "decoded_token": place[token_id].decoded_token,
            }
            for token_id in dict.fromkeys([next(iter(place)), *_likeliest(place, top)])
        }
        for place in places
    ]


def _likeliest(place: Logprobs, top: int) -> list[int]:
    return sorted(place, key=lambda token_id: -place[token_id].logprob)[:top]
