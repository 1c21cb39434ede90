"""What one caller asked for, and what comes back: names and defaults are vLLM's."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from specinfer.config import LARGEST, Speculation, check_integer, is_number, read_speculation
from specinfer.errors import ConfigError
from specinfer.structured import (
    StructuredOutputsParams,
    read_response_format,
    read_structured_outputs,
)

FinishReason = Literal["stop", "length", "abort"]

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


@dataclass(frozen=True, slots=True)
class Logprob:
    """How likely a token was in the model's own law, before any filter.

    rank           1 for the likeliest; as in vLLM a token tied with others counts them all
    decoded_token  its text alone; bytes that are no whole character become U+FFFD
    """

    logprob: float
    rank: int
    decoded_token: str


Logprobs = dict[int, Logprob]
"""At one place, by token id: the token that stands there first, then the likeliest."""


@dataclass(slots=True)
class RequestStats:
    """What speculation did for one request.

    num_target_steps    every target step that emitted for it: plain decoding is exactly 1.0 each
    num_drafts          those of them that had a tree
    num_drafted         distinct drafted nodes that the target scored
    num_accepted        drafted tokens that were emitted
    accepted_by_depth   entry d - 1: how many were accepted at depth d
    accepted_by_source  per drafter's name, how many of the accepted it was the first to propose
    num_predicted       tokens of the request's `prediction`, and num_predicted_accepted of the
                        accepted tokens that it proposed, the first to do so or not: of a sample no
                        more than it has
    num_cached_tokens   prompt tokens whose K and V were there already; of several samples the most
    num_preemptions     times it gave its pages up and was computed again
    tpot_s              seconds per output token after the first; of several samples the slowest
    """

    num_output_tokens: int = 0
    num_target_steps: int = 0
    num_drafts: int = 0
    num_drafted: int = 0
    num_accepted: int = 0
    accepted_by_depth: list[int] = field(default_factory=list)
    accepted_by_source: dict[str, int] = field(default_factory=dict)
    num_predicted: int = 0
    num_predicted_accepted: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    tpot_s: float = 0.0

    @property
    def tokens_per_step(self) -> float:
        """Output tokens per target step; 0 before the first."""
        return self.num_output_tokens / self.num_target_steps if self.num_target_steps else 0.0

    def count_step(self, num_drafted: int, accepted: Sequence[str], num_predicted: int) -> None:
        """Count a step that emitted.

        accepted       who was the first to propose each token of the emitted path
        num_predicted  how many of them the request's prediction proposed
        """
        self.num_target_steps += 1
        self.num_drafts += num_drafted > 0
        self.num_drafted += num_drafted
        self.num_accepted += len(accepted)
        self.num_predicted_accepted += num_predicted
        missing = len(accepted) - len(self.accepted_by_depth)
        self.accepted_by_depth.extend([0] * missing)
        for depth, name in enumerate(accepted):
            self.accepted_by_depth[depth] += 1
            self.accepted_by_source[name] = self.accepted_by_source.get(name, 0) + 1

    def add(self, other: "RequestStats") -> None:
        """Add another's counts to this one's."""
        self.num_output_tokens += other.num_output_tokens
        self.num_target_steps += other.num_target_steps
        self.num_drafts += other.num_drafts
        self.num_drafted += other.num_drafted
        self.num_accepted += other.num_accepted
        self.num_predicted += other.num_predicted
        # A repeated prediction is accepted more often than it has tokens: each sample's ends there
        self.num_predicted_accepted += min(other.num_predicted_accepted, other.num_predicted)
        self.num_cached_tokens = max(self.num_cached_tokens, other.num_cached_tokens)
        self.num_preemptions += other.num_preemptions
        self.tpot_s = max(self.tpot_s, other.tpot_s)
        missing = len(other.accepted_by_depth) - len(self.accepted_by_depth)
        self.accepted_by_depth.extend([0] * missing)
        for depth, count in enumerate(other.accepted_by_depth):
            self.accepted_by_depth[depth] += count
        for source, count in other.accepted_by_source.items():
            self.accepted_by_source[source] = self.accepted_by_source.get(source, 0) + count


class TreeSlot(NamedTuple):
    """One proposal of a node.

    source  the drafter's name
    q       the probability its token was drawn with: 1.0 where it was picked, None where no law was
            recorded
    score   how likely the drafter held its token to be, of those not proposed before it; None where
            nobody noted it
    ratio   the verifier's min(1, M[x] / π[x]) where it looked at the slot, else None
    """

    source: str
    q: float | None
    score: float | None
    ratio: float | None


class TreeNode(NamedTuple):
    """One token of a step's tree.

    parent    index into the step's nodes; -1 for the root, the last committed token
    p         how likely the target held it to be after its parent; 1.0 for the root
    accepted  whether the step emitted it
    slots     who proposed it, in the order the verifier examines them
    """

    token_id: int
    parent: int
    depth: int
    p: float
    accepted: bool
    slots: tuple[TreeSlot, ...]


class TreeToken(NamedTuple):
    """One token that a step emitted.

    source  "target", or the drafter that was the first to propose it
    p       how likely the target held it to be
    text    what it added to the output's text, "" where text is held back: all of them put together
            are the output's text
    """

    token_id: int
    source: str
    p: float
    text: str


@dataclass(frozen=True, slots=True)
class StepTree:
    """What one step did for one continuation.

    p follows the request's filters; a greedy request's law is 1 or 0, so there it is the model's
    own, at temperature 1.

    index          which continuation
    step           1 for its first step that emitted
    nodes          parents before children, the root first
    emitted        the accepted path, then the target's own token unless the text ended before it
    seconds        by part of the step, for all its sequences together
    num_sequences  how many they are
    plain_s        what measured times say the same step takes without trees; None: not measured
    """

    index: int
    step: int
    nodes: tuple[TreeNode, ...]
    emitted: tuple[TreeToken, ...]
    seconds: Mapping[str, float]
    num_sequences: int
    plain_s: float | None


@dataclass(slots=True)
class CompletionOutput:
    """One sampled continuation; finish_reason is None while it runs.

    stop_reason         the stop string or stop token that ended it; None for the model's own end
                        token
    logprobs            per token, where they were asked for
    cumulative_logprob  their sum over the tokens that came
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    logprobs: list[Logprobs] | None = None
    cumulative_logprob: float | None = None


@dataclass(slots=True)
class RequestOutput:
    """A request's continuations so far, and what speculation did for it.

    prompt_logprobs  per token of the prompt as far as it is computed, where they were asked for;
                     None for the first: nothing stands before it
    trees  with `include_tree`, the steps since the last output
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = False
    stats: RequestStats = field(default_factory=RequestStats)
    prompt_logprobs: list[Logprobs | None] | None = None
    trees: list[StepTree] = field(default_factory=list)
