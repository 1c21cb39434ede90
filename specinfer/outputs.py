"""What comes back: a request's continuations, and what speculation did for it; names are vLLM's."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

FinishReason = Literal["stop", "length", "abort"]


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
