"""What a load test asks: prompts from a file, or made up so that no two are alike."""

import itertools
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from specinfer.errors import ConfigError

Message = Mapping[str, Any]

_OPTIONS = ("max_tokens", "temperature", "seed")
"""What a row of a file may ask for itself."""

_REQUESTS = (
    "Tell me a short story about {a} and {b}.",
    "Write a fable about {a} who meets {b}.",
    "Tom has {n} apples and gives {m} of them to {a}. How many are left?",
    "I would like to book a table for {m} at {n} minutes past seven, next to {a}.",
)
_SOMEONE = (
    *("a lost kite", "an old fox", "a kind baker", "a shy dragon", "a small boat", "a red ball"),
    *("a clever crow", "a sleepy bear", "a brave mouse", "a blue bird", "a tiny frog", "a cat"),
)


@dataclass(frozen=True, slots=True)
class Prompt:
    """One request's question.

    messages  a conversation that the server is to answer
    options   fields of the request's body that are this prompt's own
    """

    messages: tuple[Message, ...]
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The same for `/v1/completions`, which knows no roles."""
        return "\n\n".join(str(message["content"]) for message in self.messages)


def choose(prompts: Sequence[Prompt], num: int, seed: int) -> list[Prompt]:
    """So many of them in random order; all come once before one comes again."""
    shuffled = list(prompts)
    random.Random(seed).shuffle(shuffled)
    return list(itertools.islice(itertools.cycle(shuffled), num))


def bundled_prompts() -> list[Prompt]:
    """Some hundred questions of the kinds that the bundled pair was trained to answer."""
    pairs = itertools.permutations(range(len(_SOMEONE)), 2)
    return [
        _ask(_REQUESTS[i % len(_REQUESTS)].format(a=_SOMEONE[a], b=_SOMEONE[b], n=20 + i, m=2 + b))
        for i, (a, b) in enumerate(pairs)
    ]


def read_prompts(file: Path) -> list[Prompt]:
    """Read a file, by its name's ending.

    .json   ShareGPT's list of {"conversations": [{"from": "human", "value": …}, …]}: the first turn
    .jsonl  an object per line with "prompt", "messages", "turns" or "conversations", and perhaps
            its own max_tokens, temperature and seed
    else    a prompt per line
    raises  ConfigError for a file that is none of these or holds no prompt
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} cannot be read ({error}): give a text file") from None
    if file.suffix not in (".json", ".jsonl"):
        prompts = [_ask(line.strip()) for line in text.splitlines() if line.strip()]
    else:
        prompts = [
            prompt for where, row in _rows(file, text) for prompt in _read_row(file, where, row)
        ]
    if not prompts:
        raise ConfigError(f"{file} holds no prompt: give one per line")
    return prompts


def _ask(text: str) -> Prompt:
    return Prompt(({"role": "user", "content": text},))


def _rows(file: Path, text: str) -> Iterator[tuple[int, Any]]:
    """Objects with their number, from 1. Not `splitlines`: JSON may hold other line separators."""
    try:
        if file.suffix == ".json":
            rows = json.loads(text)
            yield from enumerate(rows if isinstance(rows, list) else [rows], start=1)
            return
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                yield number, json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{file} is no JSON ({error})") from None


def _read_row(file: Path, number: int, row: Any) -> Iterator[Prompt]:
    """The row's prompt; none of a conversation in which nobody asks."""
    try:
        messages = _question(row)
    except (AttributeError, KeyError, IndexError, TypeError):
        raise ConfigError(
            f"{file}, entry {number} is not understood: give an object with a text as prompt, or "
            "with messages, turns or conversations"
        ) from None
    if messages:
        yield Prompt(messages, {name: row[name] for name in _OPTIONS if row.get(name) is not None})


def _question(row: Mapping[str, Any]) -> tuple[Message, ...]:
    """What a row asks; nothing of a conversation in which the user says nothing."""
    if "prompt" in row:
        return _ask("" + row["prompt"]).messages
    if "turns" in row:
        return _ask("" + row["turns"][0]).messages
    if "messages" in row:
        asked = [i for i, each in enumerate(row["messages"]) if each["role"] == "user"]
        # Up to what the user said last: the rest would be the answer
        return tuple(row["messages"][: asked[-1] + 1]) if asked else ()
    first = next(iter(row["conversations"]), {"from": "nobody"})
    return _ask("" + first["value"]).messages if first["from"] in ("human", "user") else ()
