"""The server over the bundled pair, asked by the official client and with raw HTTP."""

import json
from collections.abc import Iterator

import httpx
import pytest
from openai import OpenAI

from tests.serving import MODEL, served_pair

STORY = [{"role": "user", "content": "Tell me a story."}]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served_pair(max_model_len=256) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_a_streamed_answer_is_the_answer(client: OpenAI) -> None:
    asked = {"model": MODEL, "messages": STORY, "temperature": 0, "max_tokens": 24}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == whole.choices[0].message.content
    assert len(text) > 20


def test_a_stream_carries_trees_where_asked(url: str) -> None:
    body = {"messages": STORY, "temperature": 0, "max_tokens": 16, "stream": True}
    options = {"include_tree": True}
    answer = httpx.post(f"{url}/v1/chat/completions", json=body | {"stream_options": options})
    events = [
        json.loads(line[6:]) for line in answer.text.split("\n\n") if line.startswith("data: {")
    ]
    assert sum("tree" in event for event in events) > 1
    plain = httpx.post(f"{url}/v1/chat/completions", json=body)
    assert '"tree"' not in plain.text
