"""Tool calls, read out of a model's text while it comes.

    hermes       <tool_call>{"name": "f", "arguments": {…}}</tool_call>, any number of them
    llama3_json  the whole text is {"name": "f", "parameters": {…}}, several separated by ";"
    mistral      [TOOL_CALLS][{"name": "f", "arguments": {…}}, …], or [TOOL_CALLS]f{…}
    array        [{"name": "f", "parameters": {…}}, …]: what a required call is held to

Whatever is no call stays text. How the text was cut into pushes changes nothing.
"""

import json
from collections.abc import Callable, Collection, Generator, Iterable
from dataclasses import dataclass
from typing import Literal, TypeVar

CallFormat = Literal["hermes", "llama3_json", "mistral", "array"]

_WHITE = " \t\r\n"

T = TypeVar("T")
Reading = Generator[None, None, T]
"""A reader that yields where it needs more text."""


@dataclass(slots=True)
class ToolDelta:
    """What text turned out to be: text, or more of a call.

    call  the call's number; None for text
    name  where the call begins
    """

    text: str = ""
    call: int | None = None
    name: str | None = None
    arguments: str = ""


class _NoCallError(Exception):
    """What looked like a call is none."""


class ToolCallReader:
    """Reads one continuation.

    num_calls  calls found so far
    """

    def __init__(
        self, kind: CallFormat, names: Iterable[str] = (), *, is_parallel: bool = True
    ) -> None:
        """Read calls of one format.

        names        the tools there are: what tells a call from JSON that is an answer, where
                     nothing else does
        is_parallel  False: calls after the first are left out
        """
        self.num_calls = 0
        self._names = frozenset(names)
        self._is_parallel = is_parallel
        self._buffer = ""
        self._place = 0  # the next character
        self._mark: int | None = None  # where what may be a call begins
        self._white = ""  # at the end of the text so far: dropped before a call
        self._has_ended = False
        self._deltas: list[ToolDelta] = []
        readers: dict[CallFormat, Callable[[], Reading[None]]] = {
            "hermes": self._read_hermes,
            "llama3_json": self._read_llama,
            "mistral": self._read_mistral,
            "array": self._read_all_calls,
        }
        self._reading = readers[kind]()

    def push(self, text: str) -> list[ToolDelta]:
        """What can be told now."""
        if self._mark is None:  # else places in the buffer are remembered
            self._buffer, self._place = self._buffer[self._place :], 0
        self._buffer += text
        return self._read_on()

    def flush(self) -> list[ToolDelta]:
        """What was held back, once no more text comes."""
        self._has_ended = True
        return self._read_on()

    def _read_on(self) -> list[ToolDelta]:
        self._deltas = []
        next(self._reading, None)
        return self._deltas

    # --- formats ----------------------------------------------------------------------------------

    def _read_hermes(self) -> Reading[None]:
        while (yield from self._find("<tool_call>")):
            if (yield from self._attempt(self._call())):
                yield from self._skip_white()
                yield from self._take("</tool_call>")
        self._end()

    def _read_llama(self) -> Reading[None]:
        self._mark = 0
        yield from self._skip_white()
        yield from self._take("<|python_tag|>")
        is_call = yield from self._attempt(self._call(must_be_known=True))
        while is_call:
            yield from self._skip_white()
            self._mark = self._place
            if (yield from self._peek()) not in (";", ","):
                break
            self._place += 1
            is_call = yield from self._attempt(self._call(must_be_known=True))
        yield from self._rest()

    def _read_mistral(self) -> Reading[None]:
        while (yield from self._find("[TOOL_CALLS]")):
            yield from self._skip_white()
            is_array = (yield from self._peek()) == "["
            yield from self._attempt(self._calls() if is_array else self._named_call())
        self._end()

    def _read_all_calls(self) -> Reading[None]:
        self._mark = 0
        yield from self._attempt(self._calls())
        yield from self._rest()

    # --- calls ------------------------------------------------------------------------------------

    def _attempt(self, reading: Reading[None]) -> Reading[bool]:
        """Read what may be a call from the mark on; what is none becomes text again."""
        before = self.num_calls
        try:
            yield from reading
        except _NoCallError:
            if self.num_calls == before and self._mark is not None:
                self._tell_text(self._buffer[self._mark : self._place])
            self._mark = None
            return False
        self._mark = None
        return True

    def _calls(self) -> Reading[None]:
        yield from self._expect("[")
        while True:
            yield from self._call()
            yield from self._skip_white()
            if not (yield from self._take(",")):
                break
        yield from self._expect("]")

    def _call(self, *, must_be_known: bool = False) -> Reading[None]:
        """One call as a JSON object, its members in any order."""
        name: str | None = None
        arguments: object = None
        has_begun = False
        yield from self._expect("{")
        while True:
            key = yield from self._json()
            yield from self._expect(":")
            if key == "name":
                name = _known_name(
                    (yield from self._json()), self._names if must_be_known else None
                )
            elif key in ("arguments", "parameters"):
                yield from self._skip_white()
                if name is not None and (yield from self._peek()) == "{":
                    has_begun = self._begin(name)
                    yield from self._value(self._tell_arguments)
                else:
                    arguments = yield from self._json()
            else:
                yield from self._json()
            yield from self._skip_white()
            if not (yield from self._take(",")):
                break
        yield from self._expect("}")
        if name is None:
            raise _NoCallError
        if not has_begun:
            self._begin(name)
            self._tell_arguments(_as_text(arguments))

    def _named_call(self) -> Reading[None]:
        """Mistral's newer form: a name, perhaps [CALL_ID] and [ARGS], and the arguments."""
        start = self._place
        while (yield from self._peek()) not in ("", "{", "[", *_WHITE):
            self._place += 1
        name = self._buffer[start : self._place]
        if not name:
            raise _NoCallError
        if (yield from self._take("[CALL_ID]")):
            while (yield from self._peek()) not in ("", "["):
                self._place += 1
        yield from self._take("[ARGS]")
        yield from self._skip_white()
        if (yield from self._peek()) != "{":
            raise _NoCallError
        self._begin(name)
        yield from self._value(self._tell_arguments)

    def _begin(self, name: str) -> bool:
        self._white = ""
        self.num_calls += 1
        self._tell_call(name=name)
        return True

    # --- what is told -----------------------------------------------------------------------------

    def _tell_call(self, **what: str) -> None:
        if self._is_parallel or self.num_calls == 1:
            self._deltas.append(ToolDelta(call=self.num_calls - 1, **what))

    def _tell_arguments(self, text: str) -> None:
        self._tell_call(arguments=text)

    def _tell_text(self, text: str) -> None:
        text = self._white + text
        kept = text.rstrip(_WHITE)
        self._white = text[len(kept) :]
        if kept:
            self._deltas.append(ToolDelta(text=kept))

    def _end(self) -> None:
        if self._white and not self.num_calls:
            self._deltas.append(ToolDelta(text=self._white))
        self._white = ""

    # --- reading ----------------------------------------------------------------------------------

    def _peek(self) -> Reading[str]:
        """The next character; "" at the end."""
        while self._place >= len(self._buffer) and not self._has_ended:
            yield
        return self._buffer[self._place : self._place + 1]

    def _skip_white(self) -> Reading[None]:
        while (yield from self._peek()) in (*_WHITE,):
            self._place += 1

    def _take(self, word: str) -> Reading[bool]:
        """Pass over a word if it comes next."""
        for length in range(1, len(word) + 1):
            while len(self._buffer) < self._place + length and not self._has_ended:
                yield
            if self._buffer[self._place : self._place + length] != word[:length]:
                return False
        self._place += len(word)
        return True

    def _expect(self, word: str) -> Reading[None]:
        """Pass over a word and the white space around it.

        raises  _NoCallError where another comes
        """
        yield from self._skip_white()
        if not (yield from self._take(word)):
            raise _NoCallError
        yield from self._skip_white()

    def _find(self, marker: str) -> Reading[bool]:
        """Tell the text before a marker, and mark where it begins; False: all that was left."""
        while True:
            at = self._buffer.find(marker, self._place)
            stop = at if at >= 0 else len(self._buffer)
            if at < 0 and not self._has_ended:
                stop -= _num_held(self._buffer[self._place :], marker)
            self._tell_text(self._buffer[self._place : stop])
            self._place = stop
            if at >= 0:
                self._mark, self._place = at, at + len(marker)
                return True
            if self._has_ended:
                return False
            yield

    def _rest(self) -> Reading[None]:
        """Everything that is left is text."""
        self._mark = None
        while True:
            self._tell_text(self._buffer[self._place :])
            self._place = len(self._buffer)
            if self._has_ended:
                break
            yield
        self._end()

    def _json(self) -> Reading[object]:
        """A whole JSON value.

        raises  _NoCallError where it is none
        """
        parts: list[str] = []
        yield from self._skip_white()
        yield from self._value(parts.append)
        try:
            return json.loads("".join(parts))
        except (ValueError, RecursionError):
            raise _NoCallError from None

    def _value(self, tell: Callable[[str], None]) -> Reading[None]:
        """Tell a JSON value as it comes, up to where its brackets and quotes are closed.

        raises  _NoCallError where the text ends before
        """
        depth, in_string, is_escaped, start = 0, False, False, self._place
        while True:
            if self._place == len(self._buffer) and self._place > start:
                tell(self._buffer[start:])
                start = self._place
            char = yield from self._peek()
            if not char:
                raise _NoCallError
            is_over = False
            if in_string:
                in_string = is_escaped or char != '"'
                is_escaped = char == "\\" and not is_escaped
                is_over = not in_string and not depth
            elif char == '"':
                in_string = True
            elif char in "{[":
                depth += 1
            elif char in "}]":
                if not depth:
                    break
                depth -= 1
                is_over = not depth
            elif not depth and char in (",", *_WHITE):
                break
            self._place += 1
            if is_over:
                break
        if self._place > start:
            tell(self._buffer[start : self._place])


def _known_name(value: object, names: Collection[str] | None) -> str:
    """A tool's name; None for `names` takes any."""
    if not isinstance(value, str) or (names is not None and value not in names):
        raise _NoCallError
    return value


def _as_text(arguments: object) -> str:
    """Arguments as OpenAI has them: an object, as text. Some models write the text themselves."""
    if isinstance(arguments, str):
        return arguments
    return json.dumps({} if arguments is None else arguments, ensure_ascii=False)


def _num_held(text: str, marker: str) -> int:
    """How much of the text's end may be the beginning of the marker."""
    longest = min(len(text), len(marker) - 1)
    return next((n for n in range(longest, 0, -1) if marker.startswith(text[-n:])), 0)
