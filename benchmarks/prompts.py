"""Prompts for measurements and tests, from tests/data: always the same ones in the same order."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

Message = dict[str, str]

DATA = Path(__file__).resolve().parent.parent / "tests" / "data"
SOURCES = ("fable", "gsm8k", "sgd", "taskmaster", "tinystories", "tldr")
OUTSIDE = (
    "chatgpt_prompts",
    "humaneval",
    "piqa",
    "self_instruct",
    "spec_bench",
    "webquestions",
)


@dataclass(frozen=True, slots=True)
class Conversation:
    """One conversation and the set it comes from; `messages` starts with the user."""

    source: str
    messages: tuple[Message, ...]

    @property
    def first_turn(self) -> list[Message]:
        """What the user said first: a chat prompt."""
        return [self.messages[0]]


def load_conversations(
    sources: Sequence[str] = SOURCES, *, folder: Path = DATA
) -> list[Conversation]:
    """The held-out conversations of these sources, dealt out so that every prefix is balanced."""
    lines = (folder / "conversations.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [Conversation(r["source"], tuple(r["messages"])) for r in rows if r["source"] in sources]


def load_chats(
    num: int | None = None,
    *,
    sources: Sequence[str] = SOURCES,
    encode: Callable[[list[Message]], Sequence[int]] | None = None,
    max_prompt_tokens: int = 64,
    folder: Path = DATA,
) -> list[list[Message]]:
    """First user turns of in-domain conversations, all distinct.

    num                how many; None: all there are
    encode             chat → token ids (`Tokenizer.apply_chat_template`); if given, chats longer
                       than max_prompt_tokens are left out: the bundled pair has seen no context
                       above 256 tokens, so 64 leave room for 192 new ones
    folder             with the same files as tests/data
    raises             ValueError if there are fewer than num
    """
    chats = [conversation.first_turn for conversation in load_conversations(sources, folder=folder)]
    if encode is not None:
        chats = [chat for chat in chats if len(encode(chat)) <= max_prompt_tokens]
    if num is not None and len(chats) < num:
        raise ValueError(f"num={num}, but only {len(chats)} prompts fit")
    return chats[:num]


def load_outside(name: str, num: int | None = None, *, folder: Path = DATA) -> list[str]:
    """First turns of a set that the bundled pair was not trained for: one of OUTSIDE."""
    if name not in OUTSIDE:
        raise ValueError(f"name={name!r}: use one of {OUTSIDE}")
    lines = (folder / "prompts" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines][:num]
    return [row["turns"][0] if "turns" in row else row["prompt"] for row in rows]
