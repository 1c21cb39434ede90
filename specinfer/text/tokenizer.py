"""A model folder's tokenizer, chat templates, end tokens and sampling defaults.

Built on the `tokenizers` library and jinja2 alone, because importing transformers takes seconds: it
is asked only to convert a folder without tokenizer.json, which else is taken as it stands.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from specinfer.errors import CheckpointError, RequestError, UnsupportedModelError
from specinfer.text.stream import IncrementalDetokenizer, Pieces
from specinfer.text.template import ChatTemplate, Message

NAMED_SPECIAL_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)

# vLLM's list, and its name for each: what a model may say about how to sample from it
_GENERATION_DEFAULTS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


class Tokenizer:
    """A model folder's tokenizer, chat template, end tokens and sampling defaults.

    eos_token_ids        tokens that end a text: generation_config.json's, else config.json's, else
                         the tokenizer's own
    generation_defaults  SamplingParams fields that generation_config.json sets
    chat_templates       name → jinja source; the usual one is "default"
    special_tokens       such as {"bos_token": "<s>"}: what the templates see
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        eos_token_ids: Iterable[int] = (),
        generation_defaults: Mapping[str, float] | None = None,
        chat_templates: Mapping[str, str] | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.eos_token_ids = frozenset(eos_token_ids)
        self.generation_defaults = dict(generation_defaults or {})
        self.chat_templates = dict(chat_templates or {})
        self.special_tokens = dict(special_tokens or {})
        self._compiled: dict[str, ChatTemplate] = {}

    @classmethod
    def from_folder(cls, folder: str | Path) -> "Tokenizer":
        """Read a Hugging Face folder, as transformers 4 or 5 wrote it.

        raises  CheckpointError if a file is missing or is not what it should be,
                UnsupportedModelError for a tokenizer that exists only as Python code
        """
        folder = Path(folder)
        config = _read_json(folder / "special_tokens_map.json")
        config |= _read_json(folder / "tokenizer_config.json")
        special_tokens = {
            name: text
            for name in NAMED_SPECIAL_TOKENS
            if (text := _token_text(config.get(name))) is not None
        }
        backend = _load_backend(folder)
        _add_special_tokens(backend, config, special_tokens)
        generation = _read_json(folder / "generation_config.json")
        return cls(
            backend,
            eos_token_ids=_eos_token_ids(
                generation, _read_json(folder / "config.json"), special_tokens, backend
            ),
            generation_defaults={
                ours: generation[theirs]
                for theirs, ours in _GENERATION_DEFAULTS.items()
                if generation.get(theirs) is not None
            },
            chat_templates=_read_chat_templates(folder, config),
            special_tokens=special_tokens,
        )

    @property
    def vocab_size(self) -> int:
        """Tokens it knows, added ones included; a model's embedding may have more rows."""
        return self.backend.get_vocab_size()

    def has_same_vocabulary(self, other: "Tokenizer") -> bool:
        """Whether each id means the same token in both, as a target and its drafter need."""
        return self.backend.get_vocab() == other.backend.get_vocab()

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids; `add_special_tokens` puts those around it that the model expects (BOS).

        raises  RequestError if the text could not be written as UTF-8
        """
        try:
            return self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError:
            if not isinstance(text, str):
                raise
            raise RequestError("the text has a lone surrogate: give valid Unicode") from None

    def decode(self, token_ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of these ids, equal to what IncrementalDetokenizer streams.

        Equal to transformers' wherever the ids' bytes are valid UTF-8; invalid bytes become U+FFFD
        one by one, where byte-fallback tokenizers replace the whole run of byte tokens. Spaces are
        never "cleaned up".
        """
        detokenizer = IncrementalDetokenizer(self, skip_special_tokens=skip_special_tokens)
        return detokenizer.push(token_ids) + detokenizer.flush()

    def token_text(self, token_id: int) -> str:
        """One token's own text, its spaces kept; bytes that are no whole character are U+FFFD."""
        if self.pieces is None:
            return str(self.backend.decode([token_id], skip_special_tokens=False))
        return self.pieces[token_id].decode("utf-8", "replace")

    def render_chat(
        self,
        messages: Sequence[Message],
        /,
        *,
        add_generation_prompt: bool = True,
        template: str | None = None,
        tools: Sequence[Mapping[str, Any]] | None = None,
        **variables: Any,
    ) -> str:
        """The prompt that a chat stands for, as transformers renders it.

        template   a name among `chat_templates`; None: "tool_use" if there are tools and the model
                   has one for them, else "default"
        variables  further names for the template, such as enable_thinking
        raises     RequestError if the model has no template or the template refuses the chat
        """
        if template is None:
            template = "tool_use" if tools and "tool_use" in self.chat_templates else "default"
        if template not in self._compiled:
            if template not in self.chat_templates:
                raise RequestError(_missing_template(template, self.chat_templates))
            self._compiled[template] = ChatTemplate(self.chat_templates[template])
        return self._compiled[template].render(
            messages,
            **{
                "tools": tools,
                "documents": None,
                "add_generation_prompt": add_generation_prompt,
                **self.special_tokens,
                **variables,
            },
        )

    def apply_chat_template(
        self, messages: Sequence[Message], *, add_generation_prompt: bool = True, **options: Any
    ) -> list[int]:
        """Token ids of `render_chat`, which brings its own special tokens."""
        text = self.render_chat(messages, add_generation_prompt=add_generation_prompt, **options)
        return self.encode(text, add_special_tokens=False)

    @cached_property
    def special_token_ids(self) -> frozenset[int]:
        """Ids that `skip_special_tokens` leaves out."""
        added = self.backend.get_added_tokens_decoder()
        return frozenset(token_id for token_id, token in added.items() if token.special)

    @cached_property
    def pieces(self) -> Pieces | None:
        """What each token stands for in bytes; None if decoding is no sum of bytes."""
        return Pieces.of(self.backend)


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object, {} if there is no such file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a JSON {type(value).__name__}, not an object")
    return value


def _token_text(value: Any) -> str | None:
    """A special token's text, written as a string or as an AddedToken object."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _load_backend(folder: Path) -> tokenizers.Tokenizer:
    path = folder / "tokenizer.json"
    if path.is_file():
        try:
            return tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exceptions
            raise CheckpointError(f"{path} cannot be read as a tokenizer: {error}") from error
    if not any(folder.glob("*.model")) and not (folder / "vocab.json").is_file():
        raise CheckpointError(
            f"{folder} has no tokenizer.json (nor a *.model or vocab.json to make one from)"
        )
    from transformers import AutoTokenizer  # slow to import, and rarely needed

    try:
        converted = AutoTokenizer.from_pretrained(str(folder))
    except Exception as error:
        raise CheckpointError(
            f"{folder} has no tokenizer.json, and transformers cannot convert what it has: {error}"
        ) from error
    backend = getattr(converted, "backend_tokenizer", None)
    if not isinstance(backend, tokenizers.Tokenizer):
        raise UnsupportedModelError(
            f"{folder}: {type(converted).__name__} exists only as Python code; "
            "give a folder with a tokenizer.json"
        )
    return backend


def _add_special_tokens(
    backend: tokenizers.Tokenizer, config: Mapping[str, Any], named: Mapping[str, str]
) -> None:
    """Make special what tokenizer_config.json calls special, as transformers does on loading."""
    declared = config.get("added_tokens_decoder") or {}
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    for _, token in sorted(declared.items(), key=lambda item: int(item[0])):
        if token["content"] not in known:
            flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
            options = {flag: token[flag] for flag in flags if flag in token}
            backend.add_tokens([tokenizers.AddedToken(token["content"], **options)])
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    extra = extra.values() if isinstance(extra, dict) else extra
    texts = [*named.values(), *(text for token in extra if (text := _token_text(token)))]
    if texts:
        backend.add_special_tokens(
            [tokenizers.AddedToken(text, special=True, normalized=False) for text in texts]
        )


def _eos_token_ids(
    generation: Mapping[str, Any],
    config: Mapping[str, Any],
    named: Mapping[str, str],
    backend: tokenizers.Tokenizer,
) -> list[int]:
    text_config = config.get("text_config") or {}
    for source in (generation, config, text_config):
        ids = source.get("eos_token_id")
        if ids is not None:
            return [ids] if isinstance(ids, int) else list(ids)
    token_id = backend.token_to_id(named["eos_token"]) if "eos_token" in named else None
    return [] if token_id is None else [token_id]


def _read_chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Templates by name; the files of transformers 5 win over tokenizer_config.json's entry."""
    entry = config.get("chat_template")
    if isinstance(entry, list):
        templates = {item["name"]: item["template"] for item in entry}
    else:
        templates = {"default": entry} if isinstance(entry, str) else {}
    for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        templates[path.stem] = path.read_text(encoding="utf-8")
    path = folder / "chat_template.jinja"
    if path.is_file():
        templates["default"] = path.read_text(encoding="utf-8")
    return templates


def _missing_template(name: str, templates: Mapping[str, str]) -> str:
    if not templates:
        return "this model has no chat template: use generate with a prompt instead of chat"
    return f"template={name!r} is not one of the model's chat templates {sorted(templates)}"
