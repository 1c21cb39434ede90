"""Chat templates, rendered as transformers renders them: sandbox, filters, globals, whitespace."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes
from jinja2.parser import Parser

from specinfer.errors import CheckpointError, RequestError

Message = Mapping[str, Any]

_REFUSALS = (jinja2.TemplateError, TypeError, ValueError, AttributeError, RecursionError)
"""What a template raises on messages it was not made for, nested too deep among them."""


class ChatTemplate:
    """One compiled template.

    raises  CheckpointError if the source is not jinja
    """

    def __init__(self, source: str) -> None:
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_GenerationTag, jinja2.ext.loopcontrols],
        )
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
        environment.globals["dict"] = lambda *args, **kwargs: dict(*args, **kwargs)
        environment.globals["namespace"] = _make_namespace
        try:
            self._compiled = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise CheckpointError(f"the model's chat template cannot be read: {error}") from error

    def render(self, messages: Sequence[Message], /, **variables: Any) -> str:
        """The prompt that these messages stand for.

        raises  RequestError if there are none, or if the template refuses them
        """
        if not messages:
            raise RequestError("messages is empty: give at least one message")
        if not all(isinstance(message, Mapping) for message in messages):
            raise RequestError('messages must be objects such as {"role": "user", "content": "Hi"}')
        chat = [_without_nones(message) for message in messages]
        try:
            # Through JSON: templates come from strangers, and see only plain data
            return self._compiled.render(json.loads(json.dumps({**variables, "messages": chat})))
        except _REFUSALS as error:
            message = f"the model's chat template refuses these messages: {error}"
            raise RequestError(message) from error


def _without_nones(message: Message) -> dict[str, Any]:
    """Without keys whose value is None: APIs send them, templates print them."""
    return {key: value for key, value in message.items() if value is not None}


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks what an assistant wrote, for training; here it is just its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        """Read up to `{% endgeneration %}`."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Namespace(jinja2.utils.Namespace):
    """jinja2's namespace, without the underscored names that lead out of the sandbox."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise jinja2.exceptions.SecurityError(f"a template cannot set {name!r}")
        super().__setitem__(name, value)


def _make_namespace(*args: Any, **kwargs: Any) -> _Namespace:
    namespace = _Namespace()
    for name, value in dict(*args, **kwargs).items():
        namespace[name] = value
    return namespace


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Jinja's own filter escapes HTML, which no model was trained on."""
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )
