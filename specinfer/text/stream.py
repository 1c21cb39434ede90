"""Token ids → text while they come, and the strings that end it.

Each token stands for fixed bytes, so text is streamed in O(1) per token through an incremental
UTF-8 decoder, and is, put together, exactly what decoding everything at once gives.
"""

import codecs
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING

import tokenizers

if TYPE_CHECKING:
    from specinfer.text.tokenizer import Tokenizer


class IncrementalDetokenizer:
    """Token ids in, text out as soon as it is certain.

    A character whose bytes are spread over tokens is held back until it is whole. Whatever the
    sizes of the pushes, all they return plus `flush()` is `Tokenizer.decode` of all ids.
    cost  O(1) per token, about a microsecond
    """

    def __init__(self, tokenizer: "Tokenizer", *, skip_special_tokens: bool = True) -> None:
        self._skip = tokenizer.special_token_ids if skip_special_tokens else frozenset()
        pieces = tokenizer.pieces
        self._stream: _ByteStream | _WindowStream = (
            _WindowStream(tokenizer.backend) if pieces is None else _ByteStream(pieces)
        )

    def push(self, token_ids: Iterable[int]) -> str:
        """The text that these ids complete; may be empty."""
        skip, push = self._skip, self._stream.push
        return "".join([push(token_id) for token_id in token_ids if token_id not in skip])

    def flush(self) -> str:
        """What was held back, once no more ids come: a cut character becomes U+FFFD."""
        return self._stream.flush()


class StopStrings:
    """Watches a growing text for strings that end it.

    The stop that is complete first wins, and of those complete at one character the longest: the
    result does not depend on how the text was cut into pushes. Text that may be the start of a stop
    is held back, so that what was returned is never taken back.

    matched  the stop found, or None
    """

    def __init__(self, stops: Sequence[str], *, include_stop: bool = False) -> None:
        self.matched: str | None = None
        self._stops = tuple(stops)
        self._include = include_stop
        self._held = ""
        self._prefixes = {stop[:n] for stop in self._stops for n in range(1, len(stop))}
        by_last: defaultdict[str, set[int]] = defaultdict(set)
        for prefix in self._prefixes:
            by_last[prefix[-1]].add(len(prefix))
        # Which lengths a held-back prefix may have, by its last character, longest first
        self._lengths = {char: sorted(ns, reverse=True) for char, ns in by_last.items()}

    def push(self, text: str) -> str:
        """The text that may be shown now. Once `matched` is set, nothing more ever is."""
        if not self._stops or not text:
            return text
        if self.matched is not None:
            return ""
        text = self._held + text
        ends = [
            (start + len(stop), start, stop)
            for stop in self._stops
            if (start := text.find(stop)) >= 0
        ]
        if ends:
            end, start, self.matched = min(ends)
            self._held = ""
            return text[: end if self._include else start]
        num_held = self._num_held(text)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]

    def flush(self) -> str:
        """What was held back, once the text has ended without a stop."""
        held, self._held = self._held, ""
        return held

    def _num_held(self, text: str) -> int:
        for length in self._lengths.get(text[-1], ()):
            if length <= len(text) and text[-length:] in self._prefixes:
                return length
        return 0


class Pieces:
    """What each token of a tokenizer stands for, in bytes; computed when first asked for.

    strip  how many leading spaces of a whole text are dropped
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, to_bytes: Callable[[str], bytes], strip: int
    ) -> None:
        self.strip = strip
        self._backend = backend
        self._to_bytes = to_bytes
        self._known: dict[int, bytes] = {}

    @classmethod
    def of(cls, backend: tokenizers.Tokenizer) -> "Pieces | None":
        """Read a tokenizer's decoder; None if what it does is no sum of bytes.

        Understood are GPT-2's byte-level decoder and sentencepiece's, with or without bytes:
        Replace ("▁" by a space) ..., ByteFallback, Fuse, Strip.
        """
        if backend.decoder is None:
            return None
        steps = json.loads(backend.decoder.__getstate__())
        steps = steps["decoders"] if steps["type"] == "Sequence" else [steps]
        if [step["type"] for step in steps] == ["ByteLevel"]:
            return cls(backend, _byte_level_bytes, strip=0)
        strip = 0
        if steps and steps[-1]["type"] == "Strip":
            if steps[-1]["content"] != " " or steps[-1]["stop"] != 0:
                return None
            strip = steps.pop()["start"]
        replaces = []
        while steps and steps[0]["type"] == "Replace" and "String" in steps[0]["pattern"]:
            replaces.append((steps[0]["pattern"]["String"], steps[0]["content"]))
            steps = steps[1:]
        kinds = [step["type"] for step in steps]
        if kinds not in (["ByteFallback", "Fuse"], ["Fuse"]):
            return None
        has_bytes = kinds[0] == "ByteFallback"
        return cls(backend, lambda token: _sentencepiece_bytes(token, replaces, has_bytes), strip)

    def __getitem__(self, token_id: int) -> bytes:
        """The bytes of one token; an id that the tokenizer does not know stands for nothing."""
        piece = self._known.get(token_id)
        if piece is None:
            token = self._backend.id_to_token(token_id) if token_id >= 0 else None
            piece = self._known[token_id] = b"" if token is None else self._to_bytes(token)
        return piece


class _ByteStream:
    """Streams by putting the tokens' bytes through an incremental UTF-8 decoder."""

    def __init__(self, pieces: Pieces) -> None:
        self._pieces = pieces
        self._strip = pieces.strip
        self._decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def push(self, token_id: int) -> str:
        piece = self._pieces[token_id]
        if self._strip and piece:
            rest = piece.lstrip(b" ")
            dropped = min(len(piece) - len(rest), self._strip)
            self._strip = 0 if dropped < len(piece) else self._strip - dropped
            piece = piece[dropped:]
        return self._decode(piece)

    def flush(self) -> str:
        return self._decode(b"", True)


class _WindowStream:
    """Streams from any decoder by decoding the newest tokens again with a few before them.

    For decoders that are no sum of bytes (WordPiece and other rare ones): a token's text may depend
    on its neighbours, here on the five before it.
    """

    CONTEXT = 5

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        self._backend = backend
        self._context: list[int] = []
        self._new: list[int] = []

    def push(self, token_id: int) -> str:
        self._new.append(token_id)
        text = self._text()
        # A character cannot spread over more tokens than it has bytes
        if text.endswith("�") and len(self._new) < 4:
            return ""
        self._advance()
        return text

    def flush(self) -> str:
        text = self._text() if self._new else ""
        self._advance()
        return text

    def _text(self) -> str:
        before = self._backend.decode(self._context, skip_special_tokens=False)
        after = self._backend.decode(self._context + self._new, skip_special_tokens=False)
        return after[len(before) :]

    def _advance(self) -> None:
        self._context = (self._context + self._new)[-self.CONTEXT :]
        self._new = []


def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins: character → byte."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    return alphabet | {chr(256 + index): byte for index, byte in enumerate(others)}


_BYTE_OF_CHAR = _byte_level_alphabet()


def _byte_level_bytes(token: str) -> bytes:
    try:
        return bytes([_BYTE_OF_CHAR[char] for char in token])
    except KeyError:  # an added token outside the alphabet stands for itself
        return token.encode()


def _sentencepiece_bytes(token: str, replaces: list[tuple[str, str]], has_bytes: bool) -> bytes:
    for pattern, content in replaces:
        token = token.replace(pattern, content)
    if has_bytes and re.fullmatch("<0x[0-9A-Fa-f]{2}>", token):
        return bytes.fromhex(token[3:5])
    return token.encode()
