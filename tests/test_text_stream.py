"""Streaming gives what decoding gives, and stop strings end a text wherever tokens cut it."""

import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from specinfer.text import IncrementalDetokenizer, StopStrings, Tokenizer
from tests.test_text import TEXTS, ZOO, byte_level, sentencepiece, word_piece

TOKENIZERS = {
    "parley": Tokenizer.from_folder(ZOO / "parley"),
    "byte-level": Tokenizer(byte_level()),
    "sentencepiece": Tokenizer(sentencepiece()),
    "gemma": Tokenizer(sentencepiece(strip=False)),
}
any_tokenizer = pytest.mark.parametrize("name", TOKENIZERS)


def stream(tokenizer: Tokenizer, ids: list[int], sizes: list[int], skip: bool) -> list[str]:
    """What pushes of these sizes (then of one token) return, and the flush."""
    detokenizer = IncrementalDetokenizer(tokenizer, skip_special_tokens=skip)
    parts, start = [], 0
    for size in [*sizes, *[1] * len(ids)]:
        parts.append(detokenizer.push(ids[start : start + size]))
        start += size
    return [*parts, detokenizer.flush()]


@any_tokenizer
@given(data=st.data(), sizes=st.lists(st.integers(0, 5), max_size=10), skip=st.booleans())
@settings(max_examples=200)
def test_streams_any_ids_as_it_decodes_them(
    name: str, data: st.DataObject, sizes: list[int], skip: bool
) -> None:
    tokenizer = TOKENIZERS[name]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=40))
    parts = stream(tokenizer, ids, sizes, skip)
    text = "".join(parts)
    assert text == tokenizer.decode(ids, skip_special_tokens=skip)
    theirs = tokenizer.backend.decode(ids, skip_special_tokens=skip)
    if name in ("parley", "byte-level") or "�" not in text + theirs:
        assert text == theirs


@any_tokenizer
@given(text=st.text(max_size=40), skip=st.booleans())
@settings(max_examples=200)
def test_streams_any_text(name: str, text: str, skip: bool) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text)
    parts = stream(tokenizer, ids, [], skip)
    assert "".join(parts) == tokenizer.backend.decode(ids, skip_special_tokens=skip)
    if "�" not in text:
        assert not any("�" in part for part in parts)


@any_tokenizer
def test_holds_back_no_more_than_the_character_that_is_cut(name: str) -> None:
    tokenizer = TOKENIZERS[name]
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        detokenizer = IncrementalDetokenizer(tokenizer)
        shown = ""
        for num in range(1, len(ids) + 1):
            shown += detokenizer.push([ids[num - 1]])
            whole = tokenizer.decode(ids[:num])
            assert whole.startswith(shown)
            assert set(whole[len(shown) :]) <= {"�"}
    assert shown == tokenizer.decode(ids)


def test_a_newline_of_bytes_comes_at_once() -> None:
    tokenizer = TOKENIZERS["sentencepiece"]
    detokenizer = IncrementalDetokenizer(tokenizer)
    ids = [tokenizer.backend.token_to_id(token) for token in ("<0x41>", "<0x0A>", "<0xE2>")]
    assert [detokenizer.push([token]) for token in ids] == ["A", "\n", ""]
    assert detokenizer.flush() == "�"


def test_a_decoder_that_is_no_sum_of_bytes_streams_too() -> None:
    tokenizer = Tokenizer(word_piece())
    assert tokenizer.pieces is None
    for text in ("how are you doing, tonight?", "a unfathomable xylophone ... ok"):
        ids = tokenizer.encode(text)
        assert "".join(stream(tokenizer, ids, [], False)) == tokenizer.backend.decode(ids)


def test_is_cheap_per_token() -> None:
    tokenizer = TOKENIZERS["parley"]
    ids = tokenizer.encode(Path(__file__).read_text()) * 4
    times = {}
    for num in (len(ids) // 8, len(ids)):
        rounds = []
        for _ in range(3):  # the fastest: one may be interrupted, or collect all others' garbage
            detokenizer = IncrementalDetokenizer(tokenizer)
            stops = StopStrings(["</s>", "\n\nUser:", "zzz"])
            start = time.process_time()
            for token_id in ids[:num]:
                stops.push(detokenizer.push([token_id]))
            rounds.append((time.process_time() - start) / num)
        times[num] = min(rounds)
    assert min(times.values()) < 20e-6, "about 1.5 µs on an idle processor"
    assert times[len(ids)] < 5 * times[len(ids) // 8] + 5e-6, "time per token grows with the text"


def cut_by_definition(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    """The first stop to be complete, reading character by character; the longest if several are."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            stop = max(found, key=len)
            return text[: end if include else end - len(stop)], stop
    return text, None


few_letters = st.text("ab", max_size=30)


@given(
    text=few_letters,
    stops=st.lists(st.text("ab", min_size=1, max_size=5), max_size=4),
    cuts=st.lists(st.integers(1, 4), min_size=30, max_size=30),
    include=st.booleans(),
)
@settings(max_examples=500)
def test_stops_do_not_depend_on_how_the_text_is_cut(
    text: str, stops: list[str], cuts: list[int], include: bool
) -> None:
    expected, matched = cut_by_definition(text, stops, include)
    watcher = StopStrings(stops, include_stop=include)
    shown, start = "", 0
    for size in cuts:
        shown += watcher.push(text[start : start + size])
        start += size
        assert expected.startswith(shown)
    assert shown + watcher.flush() == expected
    assert watcher.matched == matched


def test_a_stop_that_spans_tokens() -> None:
    watcher = StopStrings(["User:"])
    assert [watcher.push(text) for text in ("Hi", "\nUs", "e", "r")] == ["Hi", "\n", "", ""]
    assert watcher.push("s are") == "Users are"
    assert watcher.push(" U") == " "
    assert watcher.push("ser: and more") == ""
    assert watcher.matched == "User:"
    assert watcher.push("nothing more") == ""
    assert watcher.flush() == ""


def test_the_stop_that_is_complete_first_wins_and_can_be_included() -> None:
    watcher = StopStrings(["late end", "end", "lat"], include_stop=True)
    assert watcher.push("a late end") == "a lat"
    assert watcher.matched == "lat"
    watcher = StopStrings(["end", "an end"], include_stop=False)
    assert watcher.push("at an end") == "at "
    assert watcher.matched == "an end"


def test_without_stops_everything_passes() -> None:
    watcher = StopStrings([])
    assert watcher.push("abc") == "abc"
    assert watcher.matched is None
    assert watcher.flush() == ""
