"""Flags made from the fields of the configuration: one name, one default, one line of help each.

A command takes `asked: Asked`; `takes_options` puts the flags of the dataclasses in its place. Only
what was given on the command line is passed on, so that a model's own defaults stay in force.
"""

import inspect
import json
import re
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import Field, dataclass, fields, replace
from functools import wraps
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    Literal,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import typer

from specinfer.cli.report import check_writable
from specinfer.cli.speculative_config import read_speculative_config
from specinfer.config import EngineConfig, Speculation
from specinfer.errors import ConfigError
from specinfer.request import SamplingParams

if TYPE_CHECKING:
    from specinfer.llm import LLM

DEFAULT_MODEL = "zoo:parley"
DEFAULT_DRAFTER = "zoo:parley-draft"


@dataclass(frozen=True, slots=True)
class Loading:
    """Which models, and where.

    model               a Hugging Face id, a folder, or zoo:NAME
    drafter             the same, sharing the model's tokenizer; may be repeated; "none" for plain
                        decoding (the default for any model but zoo:parley);
                        "ngram" needs no model
    speculative_config  vLLM's JSON: model, num_speculative_tokens, speculative_token_tree
    calibration         a file for what is learnt of acceptance: read if it exists, and written at
                        the end
    dtype               auto (the checkpoint's), bfloat16, float16 or float32
    device              auto, cpu or cuda
    quantization        round the model's weights while they are read: int8 (on the CPU activations
                        too, token by token), int4 (groups of 32), int4-64, int4-128, or on a GPU
                        fp8; None: as the checkpoint is
    drafter_quantization  the same for the drafters; None: as their checkpoints are
    """

    model: str = DEFAULT_MODEL
    drafter: Sequence[str] = (DEFAULT_DRAFTER,)
    speculative_config: str | None = None
    calibration: str | None = None
    dtype: str = "auto"
    device: str = "auto"
    quantization: str | None = None
    drafter_quantization: str | None = None


_GROUPS: tuple[tuple[str, type], ...] = (
    ("Models", Loading),
    ("Sampling (the model's generation_config.json may have other defaults)", SamplingParams),
    ("Speculation", Speculation),
    ("Engine", EngineConfig),
)
_AS_JSON = {
    "logit_bias": '{"17": -2.5}',
    "structured_outputs": '{"regex": "[0-9]+"}',
    "response_format": '{"type": "json_object"}',
}
_FLAG_TYPES: dict[str, Any] = {
    "prediction": str,
    "kv_cache_memory": str,
    **dict.fromkeys(_AS_JSON, str),
}
_NO_FLAGS = ("speculation", "cache_salt", "include_tree", "logprobs", "prompt_logprobs")
"""Not on the command line, where there is one caller: a request's own speculation has flags of its
parts, there is nobody to keep a secret from, trees are drawn by a command of their own, and the
commands show text."""

_RENAMED: dict[tuple[type, str], str] = {(EngineConfig, "seed"): "engine_seed"}


@dataclass(frozen=True, slots=True)
class Asked:
    """What the command line asked for, checked as far as it can be without a model.

    loading      the models' names and places
    drafters     resolved from --drafter, --speculative-config and the default
    sampling     the fields of SamplingParams that were given
    """

    loading: Loading
    drafters: tuple[str, ...]
    sampling: Mapping[str, Any]
    speculation: Speculation
    engine: EngineConfig

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> "Asked":
        """Sort flags into their dataclasses.

        given   by parameter name; None where a flag was not given
        raises  ConfigError in one sentence
        """
        values = {group: _given_fields(group, given) for _, group in _GROUPS}
        for name in _AS_JSON:
            if name in values[SamplingParams]:
                values[SamplingParams][name] = _read_json(name, values[SamplingParams][name])
        loading = Loading(**values[Loading])
        if loading.calibration is not None:
            check_writable(Path(loading.calibration))
        speculation = Speculation(**values[Speculation])
        # Refuses before a model is loaded; here max_tokens defaults to the rest of the context.
        SamplingParams(**({"max_tokens": None} | values[SamplingParams]))
        if "drafter" in values[Loading] and loading.speculative_config is not None:
            raise ConfigError("--drafter and --speculative-config both name drafters: give one")
        if loading.speculative_config is not None:
            if "tree" in values[Speculation]:
                raise ConfigError("--tree and --speculative-config both give a tree: give one")
            names, translated = read_speculative_config(loading.speculative_config)
            speculation, drafters = replace(speculation, tree=translated.tree), tuple(names)
        else:
            drafters = _resolve_drafters(loading, "drafter" in values[Loading])
        speculation.num_nodes(len(drafters))  # refuses what no drafter would grow
        return cls(
            loading,
            drafters,
            values[SamplingParams],
            speculation,
            EngineConfig(**values[EngineConfig]),
        )

    def load(self) -> "LLM":
        """Load the models; shows what it does where standard error is a terminal."""
        from rich.console import Console

        with Console(stderr=True).status("starting PyTorch"):
            from specinfer.llm import LLM
        return LLM(
            self.loading.model,
            drafters=self.drafters,
            speculation=self.speculation,
            dtype=self.loading.dtype,
            device=self.loading.device,
            quantization=self.loading.quantization,
            drafter_quantization=self.loading.drafter_quantization,
            calibration=self.loading.calibration,
            **{each.name: getattr(self.engine, each.name) for each in fields(EngineConfig)},
        )

    def keep(self, llm: "LLM") -> None:
        """Write what was learnt where --calibration says; nothing without it."""
        if self.loading.calibration is not None:
            llm.save_calibration()

    def params(self, llm: "LLM") -> SamplingParams:
        """The model's own defaults under what was given; max_tokens: the rest of the context."""
        return llm.default_chat_params(**self.sampling)


def takes_options(
    command: Callable[..., None], *, settings: type | None = None, samples: bool = True
) -> Callable[..., None]:
    """Replace the parameter `asked` of a command by the flags of all dataclasses.

    settings  a further dataclass: its flags become the parameter `settings`
    samples   whether there are flags for SamplingParams
    A parameter of the command's own that is called like a flag takes its place.
    """
    own = [p for p in _signature(command) if p.name not in ("asked", "settings")]
    names = {p.name for p in own}
    groups = [group for group in _GROUPS if samples or group[1] is not SamplingParams]
    if settings is not None:
        groups.append(("Server", settings))
    flags = [
        _parameter(group, panel, field)
        for panel, group in groups
        for field in shown(group)
        if field.name not in names
    ]
    replaced = names & {each.name for _, group in groups for each in shown(group)}

    @wraps(command)
    def with_flags(**given: Any) -> None:
        kept = {name: given[name] if name in replaced else given.pop(name) for name in names}
        if settings is not None:
            kept["settings"] = settings(**_given_fields(settings, given))
        command(**kept, asked=Asked.read(given))

    parameters = own + flags
    with_flags.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    with_flags.__annotations__ = {each.name: each.annotation for each in parameters}
    return with_flags


def takes_settings(command: Callable[..., None], settings: type) -> Callable[..., None]:
    """Replace the parameter `settings` of a command by the flags of that dataclass alone.

    A parameter of the command's own that is called like a flag takes its place, and goes into the
    dataclass as well.
    """
    own = [p for p in _signature(command) if p.name != "settings"]
    names = {p.name for p in own}
    fields_of = {each.name for each in shown(settings)}
    flags = [
        _parameter(settings, "Settings", each) for each in shown(settings) if each.name not in names
    ]

    @wraps(command)
    def with_flags(**given: Any) -> None:
        made = settings(**_given_fields(settings, given))
        command(**{name: given[name] for name in names - fields_of}, settings=made)

    parameters = own + flags
    with_flags.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    with_flags.__annotations__ = {each.name: each.annotation for each in parameters}
    return with_flags


def shown(group: type) -> list[Field[Any]]:
    """The fields that become flags: those that are built."""
    return [each for each in fields(group) if each.name not in _NO_FLAGS]


def read_help(group: type) -> dict[str, str]:
    """The docstring's table `name   meaning`, its continuation lines joined."""
    names = {each.name for each in fields(group)}
    texts: dict[str, list[str]] = {}
    current: list[str] | None = None
    for line in inspect.cleandoc(group.__doc__ or "").splitlines():
        name, _, rest = line.partition(" ")
        if name in names and rest.startswith(" "):
            current = texts.setdefault(name, [])
            current.append(rest.strip())
        elif current is not None and line.startswith("  "):
            current.append(line.strip())
        else:
            current = None
    return {name: " ".join(parts) for name, parts in texts.items()}


def _signature(command: Callable[..., None]) -> list[inspect.Parameter]:
    hints = get_type_hints(command, include_extras=True)
    parameters = inspect.signature(command).parameters.values()
    return [
        parameter.replace(annotation=hints[parameter.name], kind=inspect.Parameter.KEYWORD_ONLY)
        for parameter in parameters
    ]


def _given_fields(group: type, given: Mapping[str, Any]) -> dict[str, Any]:
    names = _flag_names(group).items()
    return {name: given[flag] for name, flag in names if given.get(flag) is not None}


def _flag_names(group: type) -> dict[str, str]:
    return {each.name: _RENAMED.get((group, each.name), each.name) for each in shown(group)}


def _parameter(group: type, panel: str, field: Field[Any]) -> inspect.Parameter:
    name = _flag_names(group)[field.name]
    flag = "--" + name.replace("_", "-")
    kind = _FLAG_TYPES.get(field.name) or _flag_type(get_type_hints(group)[field.name])
    option = typer.Option(
        f"{flag}/--no-{flag[2:]}" if field.default is True else flag,
        help=_escape(_help(group, field)),
        show_default=False,
        rich_help_panel=panel,
    )
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[kind | None, option],
    )


def _flag_type(hint: Any) -> Any:
    """int, float, bool or str, or a list of one of them for a flag that may be repeated."""
    kinds = [hint]
    if get_origin(hint) in (Union, types.UnionType):
        kinds = [each for each in get_args(hint) if each is not type(None)]
    for kind in kinds:
        if get_origin(kind) is Sequence:
            return list[get_args(kind)[0]]  # type: ignore[misc]
    return str if get_origin(kinds[0]) is Literal else kinds[0]


def _help(group: type, field: Field[Any]) -> str:
    """The field's words for someone who types flags: there is no None to give."""
    text = read_help(group).get(field.name, "").replace("; None: ", "; by default ")
    text = re.sub(r"\w+_\w+", lambda found: _spelt(group, found[0]), text)
    default = field.default
    if default is None or isinstance(default, bool) or "by default" in text:
        return text
    return f"{text} [default: {', '.join(default) if isinstance(default, tuple) else default}]"


def _spelt(group: type, name: str) -> str:
    """A field's name as its flag; any other word as it is."""
    groups = (group, *(each for _, each in _GROUPS))
    flag = next((flags[name] for flags in map(_flag_names, groups) if name in flags), None)
    return name if flag is None else "--" + flag.replace("_", "-")


def _resolve_drafters(loading: Loading, were_given: bool) -> tuple[str, ...]:
    if not were_given:
        return (DEFAULT_DRAFTER,) if loading.model == DEFAULT_MODEL else ()
    if "none" not in loading.drafter:
        return tuple(loading.drafter)
    if len(loading.drafter) > 1:
        raise ConfigError("--drafter none cannot be combined with other drafters: give one or none")
    return ()


def _read_json(name: str, text: str) -> Any:
    """A flag's JSON; logit_bias has token ids for names, which JSON writes as text."""
    try:
        value = json.loads(text)
        if name == "logit_bias":
            return {int(token): bias for token, bias in value.items()}
    except (ValueError, AttributeError) as error:
        what = "no JSON" if isinstance(error, json.JSONDecodeError) else "no biases by token id"
        raise ConfigError(f"{name}={text!r} is {what}: give such as {_AS_JSON[name]}") from None
    return value


def _escape(text: str) -> str:
    """Brackets as they are: rich would read them as markup."""
    return text.replace("[", "\\[")
