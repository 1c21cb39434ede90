"""What one caller asked for, and what comes back: names and defaults are vLLM's."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from specinfer.config import Speculation, check_integer, is_number, read_speculation
from specinfer.errors import ConfigError

FinishReason = Literal["stop", "length", "abort"]

UNBUILT_FIELDS = (
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logit_bias",
    "logprobs",
    "prompt_logprobs",
    "response_format",
    "structured_outputs",
    "bad_words",
    "allowed_token_ids",
)

_MAX_PRIORITY = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to sample one request.

    n                sampled continuations of the prompt
    temperature      0 is greedy
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
    target_tpot_s    a goal for the time per output token after the first, in seconds: a sequence
                     that is late is given more of the step's drafting
    priority         lower is served earlier, with scheduling_policy="priority" alone
    cache_salt       requests share K and V of equal beginnings only where their salts are equal: a
                     secret keeps others from telling by the time what was asked before
    skip_special_tokens         leave special tokens out of the text
    include_stop_str_in_output  keep the stop string in the text

    Filters apply in the order min_tokens, temperature, min_p, top_k, top_p.
    raises  ConfigError for a value out of range, or for a field that is not built yet
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
    response_format: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None
    bad_words: Sequence[str] | None = None
    allowed_token_ids: Sequence[int] | None = None
    priority: int = 0
    cache_salt: str | None = None
    prediction: str | Sequence[int] | None = None
    speculation: Speculation | Mapping[str, Any] | None = None
    target_tpot_s: float | None = None

    def __post_init__(self) -> None:
        for name in UNBUILT_FIELDS:
            if getattr(self, name) != _DEFAULTS[name]:
                raise ConfigError(f"{name} is not built yet: leave it out")
        self._check_types()
        _ = self.own_speculation
        requirements = (
            ("temperature", 0 <= self.temperature < math.inf, "finite and at least 0"),
            ("top_p", 0 < self.top_p <= 1, "in (0, 1]"),
            ("min_p", 0 <= self.min_p <= 1, "in [0, 1]"),
            (
                "target_tpot_s",
                self.target_tpot_s is None or 0 < self.target_tpot_s < math.inf,
                "above 0 and finite",
            ),
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
        for name in ("temperature", "top_p", "min_p", "target_tpot_s"):
            value = getattr(self, name)
            if not is_number(value) and (value is not None or name != "target_tpot_s"):
                raise ConfigError(f"{name}={getattr(self, name)!r} must be a number")
        if self.priority > _MAX_PRIORITY:
            raise ConfigError(f"priority={self.priority} must be at most {_MAX_PRIORITY}")
        if not isinstance(self.cache_salt, str | None) or self.cache_salt == "":
            raise ConfigError(f"cache_salt={self.cache_salt!r} must be a string that is not empty")
        stops = (self.stop,) if isinstance(self.stop, str) else self.stop or ()
        if not isinstance(stops, Iterable) or not all(isinstance(stop, str) for stop in stops):
            raise ConfigError(f"stop={self.stop!r} must be a string or a list of strings")
        if not isinstance(self.prediction, str | Sequence | None):
            raise ConfigError(
                f"prediction={self.prediction!r} must be a text or a list of token ids"
            )
        if not isinstance(self.prediction, str):
            for token in self.prediction or ():
                check_integer("prediction: token id", token, least=0)
        for token in self.stop_token_ids or ():
            check_integer("stop_token_ids: token id", token, least=0)

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
    def stop_strings(self) -> tuple[str, ...]:
        """`stop` as a tuple, whatever form it was given in."""
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def is_greedy(self) -> bool:
        """Whether the law is a point mass at the likeliest token; as in vLLM, also when cold."""
        return self.temperature < 1e-5 or self.top_k == 1


_DEFAULTS = {f.name: f.default for f in fields(SamplingParams)}


@dataclass(slots=True)
class RequestStats:
    """What speculation did for one request.

    num_target_steps    every target step that emitted for it: plain decoding is exactly 1.0 each
    num_drafted         distinct drafted nodes that the target scored
    num_accepted        drafted tokens that were emitted
    accepted_by_depth   entry d - 1: how many were accepted at depth d
    accepted_by_source  per drafter's name, how many of the accepted it was the first to propose
    num_cached_tokens   prompt tokens whose K and V were there already; of several samples the most
    num_preemptions     times it gave its pages up and was computed again
    tpot_s              seconds per output token after the first; of several samples the slowest
    """

    num_output_tokens: int = 0
    num_target_steps: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    accepted_by_depth: list[int] = field(default_factory=list)
    accepted_by_source: dict[str, int] = field(default_factory=dict)
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    tpot_s: float = 0.0

    @property
    def tokens_per_step(self) -> float:
        """Output tokens per target step; 0 before the first."""
        return self.num_output_tokens / self.num_target_steps if self.num_target_steps else 0.0

    def add(self, other: "RequestStats") -> None:
        """Add another's counts to this one's."""
        self.num_output_tokens += other.num_output_tokens
        self.num_target_steps += other.num_target_steps
        self.num_drafted += other.num_drafted
        self.num_accepted += other.num_accepted
        self.num_cached_tokens = max(self.num_cached_tokens, other.num_cached_tokens)
        self.num_preemptions += other.num_preemptions
        self.tpot_s = max(self.tpot_s, other.tpot_s)
        missing = len(other.accepted_by_depth) - len(self.accepted_by_depth)
        self.accepted_by_depth.extend([0] * missing)
        for depth, count in enumerate(other.accepted_by_depth):
            self.accepted_by_depth[depth] += count
        for source, count in other.accepted_by_source.items():
            self.accepted_by_source[source] = self.accepted_by_source.get(source, 0) + count


@dataclass(slots=True)
class CompletionOutput:
    """One sampled continuation; finish_reason is None while it runs.

    stop_reason  the stop string or stop token that ended it; None for the model's own end token
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    logprobs: None = None
    cumulative_logprob: None = None


@dataclass(slots=True)
class RequestOutput:
    """A request's continuations so far, and what speculation did for it."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = False
    stats: RequestStats = field(default_factory=RequestStats)
    prompt_logprobs: None = None
