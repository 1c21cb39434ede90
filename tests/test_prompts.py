"""The bundled prompts: there, distinct, balanced, and small enough to be cloned."""

from collections import Counter
from pathlib import Path

import pytest

from benchmarks.prompts import DATA, OUTSIDE, SOURCES, load_chats, load_conversations, load_outside


def test_every_prefix_of_the_conversations_is_balanced() -> None:
    conversations = load_conversations()
    assert len(conversations) > 300
    assert Counter(c.source for c in conversations[:60]) == dict.fromkeys(SOURCES, 10)
    assert {c.source for c in load_conversations(["tldr"])} == {"tldr"}
    assert all(c.messages[0]["role"] == "user" for c in conversations)


def test_chats_are_distinct_first_turns() -> None:
    chats = load_chats(200)
    assert len({chat[0]["content"] for chat in chats}) == 200
    assert load_chats(7) == chats[:7]


def test_chats_can_be_limited_in_tokens() -> None:
    def encode(chat: list[dict[str, str]]) -> list[int]:
        return list(chat[0]["content"].encode())

    chats = load_chats(encode=encode, max_prompt_tokens=50)
    assert chats
    assert all(len(encode(chat)) <= 50 for chat in chats)
    with pytest.raises(ValueError, match="only"):
        load_chats(10_000, encode=encode, max_prompt_tokens=50)


@pytest.mark.parametrize("name", OUTSIDE)
def test_outside_prompts(name: str) -> None:
    prompts = load_outside(name)
    assert len(prompts) == 40
    assert all(prompts)
    assert load_outside(name, 3) == prompts[:3]


def test_outside_refuses_an_unknown_name() -> None:
    with pytest.raises(ValueError, match="piqa"):
        load_outside("nope")


def test_the_data_stays_below_a_megabyte_and_names_its_licences() -> None:
    assert sum(path.stat().st_size for path in Path(DATA).rglob("*")) <= 1_000_000
    sources = (DATA / "SOURCES.md").read_text(encoding="utf-8")
    assert all(f"| {name} |" in sources for name in (*SOURCES, *OUTSIDE))
