"""Grammars of outputs, by xgrammar: which tokens may follow a path, whichever path is asked next.

One matcher per text stands somewhere in the token tree; asked about another node, it goes back to
where the paths part and down again, so that a tree costs about one token per node.
"""

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from specinfer.errors import ConfigError, DependencyError, RequestError
from specinfer.structured import StructuredOutputsParams

if TYPE_CHECKING:
    import xgrammar

Bits = npt.NDArray[np.uint8]
"""[vocab / 8, rounded up]: a bit per token, the lowest token in the lowest bit."""

Tokens = tuple[int, ...]

_MAX_WHITESPACE = 10
"""Characters between two parts of a JSON text: a newline and four levels of indentation. Without a
bound small models write nothing else: with 20, 3 of 200 texts of the bundled pair did not end."""

_CACHE_BYTES = 256 * 2**20

_MOST_BYTES = _CACHE_BYTES // 4
"""Of one compiled grammar: what `compile` made must still be in the cache when `matcher` asks."""

_MOST_CHARACTERS = 1 << 18
"""Of a schema, expression or grammar, or all choices together. How long compiling takes is told by
nothing so simple: 700 choices of 245,000 characters take 15 s and 0.3 GB, most texts far less."""


_TOKEN_BUDGET = re.compile(r"^\w+\[[^\]]*max_tokens=", re.MULTILINE)
"""At the head of a rule. Once such a budget was overrun, as it is on half a character, xgrammar's
masks depend on the paths asked before; characters are counted and given back as they should be."""


class GrammarCompiler:
    """Makes grammars for one tokenizer; what was compiled once is kept."""

    def __init__(
        self,
        pieces: Sequence[bytes],
        end_tokens: Sequence[int],
        encode: Callable[[str], Sequence[int]],
    ) -> None:
        """Know a vocabulary.

        pieces      per token the bytes it stands for; b"" where it stands for no text
        end_tokens  that end a text, at least one
        encode      text -> tokens, for texts that must come
        raises      DependencyError if xgrammar is not installed
        """
        self._xgrammar = _import_xgrammar()
        self._encode = encode
        self._end_tokens = frozenset(end_tokens)
        self._vocab_size = len(pieces)
        info = self._xgrammar.TokenizerInfo(
            list(pieces),
            self._xgrammar.VocabType.RAW,
            vocab_size=len(pieces),
            stop_token_ids=sorted(end_tokens),
        )
        self._compiler = self._xgrammar.GrammarCompiler(
            info,
            max_threads=max(1, (os.cpu_count() or 2) // 2),  # the models want the others
            cache_limit_bytes=_CACHE_BYTES,
        )

    def compile(self, asked: StructuredOutputsParams, field: str = "structured_outputs") -> Any:
        """The grammar of what was asked for: xgrammar's CompiledGrammar.

        field   that asked for it
        raises  RequestError where it is none, or too large
        """
        name = f"{field}.{asked.kind}"
        try:
            grammar = self._compile(asked, name)
        except (RuntimeError, ValueError) as error:
            if isinstance(error, ConfigError):
                raise
            reason = str(error).strip().splitlines()[0].rpartition("] ")[2]
            reason = reason.partition(": ")[2] if ".cc:" in reason.partition(": ")[0] else reason
            reason = reason.rpartition(" is false: ")[2]
            raise RequestError(f"{name} cannot be compiled: {reason.rstrip('. ')}") from None
        if _TOKEN_BUDGET.search(str(grammar.grammar)):
            raise RequestError(
                f"{name} has max_tokens, which cannot be kept along every "
                "path of a tree: leave it out, or give max_chars"
            )
        if (size := grammar.memory_size_bytes) > _MOST_BYTES:
            raise RequestError(
                f"{name} is a grammar of {size} bytes and {_MOST_BYTES} "
                "are allowed: make it smaller"
            )
        return grammar

    def matcher(
        self, asked: StructuredOutputsParams, field: str = "structured_outputs"
    ) -> "PathMatcher":
        """A matcher of its own for one text; as `compile`."""
        matcher = self._xgrammar.GrammarMatcher(self.compile(asked, field))
        return PathMatcher(matcher, self._vocab_size, self._end_tokens, self._encode)

    def _compile(self, asked: StructuredOutputsParams, name: str) -> Any:
        compiler, text = self._compiler, _text_of(asked)
        if len(text) > _MOST_CHARACTERS:
            raise RequestError(
                f"{name} has {len(text)} characters and "
                f"{_MOST_CHARACTERS} are allowed: make it smaller"
            )
        if asked.regex is not None:
            return compiler.compile_regex(text)
        if asked.choice is not None:
            return compiler.compile_grammar(text)
        if asked.grammar is not None:
            return (compiler.compile_grammar if "::=" in text else compiler.compile_lark)(text)
        if asked.structural_tag is not None:
            return compiler.compile_structural_tag(text)
        return compiler.compile_json_schema(
            text,
            any_whitespace=not asked.disable_any_whitespace,
            max_whitespace_cnt=None if asked.disable_any_whitespace else _MAX_WHITESPACE,
            strict_mode=asked.json is not None,
        )


def _text_of(asked: StructuredOutputsParams) -> str:
    """What is compiled: an expression, a grammar, a JSON schema or a structural tag."""
    if asked.choice is not None:
        return "root ::= " + " | ".join(json.dumps(each) for each in asked.choice)
    if asked.json is not None:
        return json.dumps(asked.schema)
    if asked.structural_tag is not None:
        return json.dumps(_bounded(asked.tag))
    return asked.regex or asked.grammar or '{"type": "object"}'


def _bounded(tag: Any) -> Any:
    """A structural tag whose JSON may have as much whitespace as any other."""
    if isinstance(tag, list | tuple):
        return [_bounded(each) for each in tag]
    if not isinstance(tag, Mapping):
        return tag
    bounded = {
        name: inner if name == "json_schema" else _bounded(inner) for name, inner in tag.items()
    }
    if tag.get("type") == "json_schema" and tag.get("style", "json") == "json":
        bounded.setdefault("max_whitespace_cnt", _MAX_WHITESPACE)
    return bounded


class PathMatcher:
    """One text in its grammar: what may follow the committed output and any path below it."""

    def __init__(
        self,
        matcher: "xgrammar.GrammarMatcher",
        vocab_size: int,
        end_tokens: frozenset[int],
        encode: Callable[[str], Sequence[int]],
    ) -> None:
        self._matcher = matcher
        self._end_tokens = end_tokens
        self._encode = encode
        self._path: list[int] = []  # taken in beyond the committed output
        self._masks: dict[Tokens, Bits | None] = {}  # of paths below it
        self._is_open = True  # no token has come that the grammar does not know
        self._row = np.zeros((1, -(-vocab_size // 32)), np.int32)
        self._known = np.packbits(np.ones(vocab_size, np.bool_), bitorder="little")

    def advance(self, tokens: Sequence[int]) -> None:
        """Take in committed output tokens."""
        if not tokens:
            return
        self._is_open = self._is_open and self._go(tuple(tokens))
        self._path.clear()
        self._masks.clear()

    def allowed(self, path: Tokens) -> Bits | None:
        """The tokens that may follow a path; None, any, where the text has ended or gone astray."""
        if path not in self._masks:
            self._masks[path] = self._mask() if self._stands_at(path) else None
        return self._masks[path]

    def forced(self, path: Tokens) -> Tokens:
        """How the text that must follow a path is likely to be written; () for none.

        Its last token is left out: it may be written together with what follows it.
        """
        if not self._stands_at(path):
            return ()
        try:
            text = self._matcher.find_jump_forward_string()
        except UnicodeDecodeError:  # it begins or ends inside a character
            return ()
        return tuple(self._encode(text)[:-1]) if text else ()

    def _stands_at(self, path: Tokens) -> bool:
        """Go to a path; False where nothing may follow it."""
        return self._is_open and self._go(path) and not self._matcher.is_terminated()

    def _mask(self) -> Bits:
        self._matcher.fill_next_token_bitmask(self._row)
        # xgrammar also sets bits behind the vocabulary: no token is left only where none is set
        return self._row.view(np.uint8)[0, : len(self._known)] & self._known

    def _go(self, path: Tokens) -> bool:
        """Whether the grammar knows a path; if so, the matcher stands at its end."""
        shared = 0
        for old, new in zip(self._path, path, strict=False):
            if old != new:
                break
            shared += 1
        if shared < len(self._path):
            self._matcher.rollback(len(self._path) - shared)
            del self._path[shared:]
        for token in path[shared:]:
            if self._matcher.is_terminated() or not self._matcher.accept_token(token):
                return False
            self._path.append(token)
        return True


def _import_xgrammar() -> Any:
    try:
        import xgrammar
    except ImportError:
        raise DependencyError(
            "structured output needs xgrammar: pip install 'specinfer[grammar]'"
        ) from None
    return xgrammar


def single_token(bits: Bits) -> int | None:
    """The only token of a mask; None where there are more or none."""
    bytes_ = np.flatnonzero(bits)
    if len(bytes_) != 1:
        return None
    value = int(bits[bytes_[0]])
    return None if value & (value - 1) else int(bytes_[0]) * 8 + value.bit_length() - 1
