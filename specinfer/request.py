"""What one caller asked for: names and defaults are vLLM's."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from specinfer.config import LARGEST, Speculation, check_integer, is_number, read_speculation
from specinfer.errors import ConfigError
from specinfer.structured import (
    StructuredOutputsParams,
    read_response_format,
    read_structured_outputs,
)

_NUMBERS = (
    *("temperature", "top_p", "min_p", "target_tpot_s"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty"),
)

_MAX_PRIORITY = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to sample one request.

    n                sampled continuations of the prompt
    temperature      0 is greedy; at most 1e30
    top_k            keep the k likeliest tokens; 0 or -1: all
    top_p            keep the likeliest tokens whose mass reaches this, in (0, 1]
    min_p            drop tokens below this share of the likeliest one's probability, in [0, 1]
    seed             the same text for the same seed, whatever the tree, the batch or the load,
                     up to near-ties within the dtype's rounding (none seen in float32)
    stop             strings that end the text; cut off unless include_stop_str_in_output
    stop_token_ids   tokens that end the text, beside the model's own end tokens
    max_tokens       output tokens at most; None: the rest of the context
    min_tokens       end tokens are not sampled before this many output tokens
    ignore_eos       go on past the model's end tokens
    prediction       what the output is expected to repeat for the most part, as text or token ids:
                     a source of guesses, never a constraint (OpenAI's predicted outputs)
    speculation      this request's own, such as {"tree": "off"}; None: the engine's
    target_tpot_s    a goal for the time per output token after the first, in seconds, at least
                     1e-4: a sequence that is late is given more of the step's drafting
    priority         lower is served earlier, with scheduling_policy="priority" alone
    cache_salt       requests share K and V of equal beginnings only where their salts are equal: a
                     secret keeps others from telling by the time what was asked before
    include_tree     each step's token tree comes back, too (`RequestOutput.trees`)
    skip_special_tokens         leave special tokens out of the text
    include_stop_str_in_output  keep the stop string in the text
    presence_penalty    taken from the logits of tokens that the output has, in [-2, 2]
    frequency_penalty   the same as often as the output has them, in [-2, 2]
    repetition_penalty  divides the logits of tokens that prompt or output have, or multiplies them
                        where they are negative; in [0.01, 100], 1 for none
    logit_bias          {token id: what is added to its logit}, in [-1e30, 1e30]
    bad_words           texts that the output will not have: the token that would complete one, as
                        the tokenizer writes it at the start of a text or after a space, is banned
    allowed_token_ids   the only tokens that may come, end tokens included
    structured_outputs  what the output must be: `StructuredOutputsParams` or its fields, such as
                        {"regex": "[0-9]+"}
    response_format     the same as OpenAI has it, such as {"type": "json_object"}
    logprobs            so many of the likeliest tokens at each place, beside the one that came,
                        with their log-probabilities in the unfiltered model; 0: that one; -1: all
    prompt_logprobs     the same for the prompt

    Filters apply in one order: structured output, allowed_token_ids, bad_words; logit_bias and
    min_tokens; penalties; temperature; min_p; top_k; top_p. Of the first three and min_tokens, one
    that would leave no token to come is left out there: structured output goes before all others.
    Each is a function of prompt, output and nothing else, so trees change nothing.
    raises  ConfigError for a value out of range
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    max_tokens: int | None = 16
    min_tokens: int = 0
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    seed: int | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    response_format: Mapping[str, Any] | None = None
    structured_outputs: StructuredOutputsParams | Mapping[str, Any] | None = None
    bad_words: Sequence[str] | None = None
    allowed_token_ids: Sequence[int] | None = None
    priority: int = 0
    cache_salt: str | None = None
    prediction: str | Sequence[int] | None = None
    speculation: Speculation | Mapping[str, Any] | None = None
    target_tpot_s: float | None = None
    include_tree: bool = False

    def __post_init__(self) -> None:
        self._check_types()
        _ = self.own_speculation, self.structure
        requirements = (
            ("temperature", 0 <= self.temperature <= LARGEST, "at least 0 and at most 1e30"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
            (
                "target_tpot_s",
                self.target_tpot_s is None or 1e-4 <= self.target_tpot_s < math.inf,
                "at least 0.0001 and finite",
            ),
            ("presence_penalty", -2 <= self.presence_penalty <= 2, "in [-2, 2]"),
            ("frequency_penalty", -2 <= self.frequency_penalty <= 2, "in [-2, 2]"),
            ("repetition_penalty", 0.01 <= self.repetition_penalty <= 100, "in [0.01, 100]"),
            (
                "allowed_token_ids",
                self.allowed_token_ids is None or len(self.allowed_token_ids) > 0,
                "not empty",
            ),
            ("bad_words", "" not in (self.bad_words or ()), "free of empty strings"),
            ("stop", "" not in self.stop_strings, "free of empty strings"),
        )
        for name, holds, rule in requirements:
            if not holds:
                raise ConfigError(f"{name}={getattr(self, name)!r} must be {rule}")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ConfigError(
                f"min_tokens={self.min_tokens} must be at most max_tokens={self.max_tokens}"
            )

    def _check_types(self) -> None:
        for name, least in (
            *(("n", 1), ("top_k", -1), ("min_tokens", 0)),
            ("priority", -_MAX_PRIORITY),
        ):
            check_integer(name, getattr(self, name), least=least)
        for name, least in (("max_tokens", 1), ("seed", 0)):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), least=least)
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), least=-1)
        for name in _NUMBERS:
            value = getattr(self, name)
            if not is_number(value) and (value is not None or name != "target_tpot_s"):
                raise ConfigError(f"{name}={getattr(self, name)!r} must be a number")
        if self.priority > _MAX_PRIORITY:
            raise ConfigError(f"priority={self.priority} must be at most {_MAX_PRIORITY}")
        if not isinstance(self.cache_salt, str | None) or self.cache_salt == "":
            raise ConfigError(f"cache_salt={self.cache_salt!r} must be a string that is not empty")
        stops = (self.stop,) if isinstance(self.stop, str) else self.stop or ()
        if not _is_list_of(str, stops):
            raise ConfigError(f"stop={self.stop!r} must be a string or a list of strings")
        if isinstance(self.bad_words, str) or not _is_list_of(str, self.bad_words or ()):
            raise ConfigError(f"bad_words={self.bad_words!r} must be a list of strings")
        biases = {} if self.logit_bias is None else self.logit_bias
        if not isinstance(biases, Mapping) or not all(
            is_number(bias) and abs(bias) <= LARGEST for bias in biases.values()
        ):
            raise ConfigError(
                f"logit_bias={biases!r} must give a number in [-1e30, 1e30] per token id"
            )
        if not isinstance(self.prediction, str | Sequence | None):
            raise ConfigError(
                f"prediction={self.prediction!r} must be a text or a list of token ids"
            )
        if not isinstance(self.prediction, str):
            for token in self.prediction or ():
                check_integer("prediction: token id", token, least=0)
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            if not _is_list_of(object, tokens := getattr(self, name) or ()):
                raise ConfigError(f"{name}={tokens!r} must be a list of token ids")
            for token in tokens:
                check_integer(f"{name}: token id", token, least=0)

    @property
    def own_speculation(self) -> Speculation | None:
        """`speculation` as a value; None: the engine's."""
        if self.speculation is None or isinstance(self.speculation, Speculation):
            return self.speculation
        if not isinstance(self.speculation, Mapping):
            raise ConfigError(
                f"speculation={self.speculation!r} must be a Speculation or its fields, such as "
                '{"tree": "off"}'
            )
        return read_speculation(self.speculation)

    @property
    def structure(self) -> StructuredOutputsParams | None:
        """What the output must be, whichever of the two fields says it; None: anything.

        raises  ConfigError if both do
        """
        asked = None
        if self.response_format is not None:
            asked = read_response_format(self.response_format)
        if self.structured_outputs is None:
            return asked
        if asked is not None:
            raise ConfigError("response_format and structured_outputs both ask: give one")
        return read_structured_outputs(self.structured_outputs)

    @property
    def structure_field(self) -> str:
        """The field that says `structure`."""
        return "response_format" if self.structured_outputs is None else "structured_outputs"

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple, whatever form it was given in."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def is_greedy(self) -> bool:
        """Whether the law is a point mass at the likeliest token; as in vLLM, also when cold."""
        return self.temperature < 1e-5 or self.top_k == 1


def _is_list_of(kind: type, values: Any) -> bool:
    return isinstance(values, Iterable) and all(isinstance(each, kind) for each in values)
