"""One continuation being written: what is known, what is computed, and when it ends."""

from collections.abc import Sequence as ListLike
from dataclasses import replace

import numpy as np

from specinfer.cache.blocks import Pages
from specinfer.config import IID_VERIFIERS, Draw, Speculation, VerifierName
from specinfer.draft.calibration import COLDEST_DRAW, Fortune, Regime, regime_of
from specinfer.engine.choice import DrafterChoice
from specinfer.engine.constraints import Constraints
from specinfer.outputs import CompletionOutput, Logprobs, RequestStats, StepTree
from specinfer.request import SamplingParams
from specinfer.sampling import SeededNoise, request_generator
from specinfer.text.stream import IncrementalDetokenizer, StopStrings
from specinfer.text.tokenizer import Tokenizer


class Sequence:
    """Prompt and output of one sample of one request.

    tokens        prompt and output; the last one is the root once all others are computed
    num_computed  tokens 0 … num_computed - 1 have K and V in the target's pages
    max_total     tokens at most, prompt included
    max_nodes     drafted nodes a step may add
    pages         its blocks; None while it waits
    hashes, salt  of its text's leading full blocks, and of all texts it may share with
    arrival, due  when it came and when its turn is, in the scheduler's steps
    has_grammar   whether its output has a structure
    history       what its laws depend on beside the logits; None: nothing
    prompt_logprobs  per token of the prompt so far, where the first sample is asked for them
    scheduled_s   when it was first computed, by the clock of `time.perf_counter`
    first_s       when its first output token came
    trees         where the request asks for them, its steps that nobody has taken yet
    text_ends     there, too: how long the output's text was after each output token
    """

    def __init__(
        self,
        *,
        number: int,
        request_id: str,
        index: int,
        prompt: ListLike[int],
        params: SamplingParams,
        max_total: int,
        tokenizer: Tokenizer,
        speculation: Speculation,
        max_nodes: int,
        prediction: ListLike[int],
        vocab_size: int,
        seed: int,
        constraints: Constraints,
    ) -> None:
        self.number = number
        self.request_id = request_id
        self.params = params
        self.max_total = max_total
        self.speculation = speculation
        self.max_nodes = max_nodes
        self.prediction = prediction
        self.tokens = list(prompt)
        self.num_prompt = len(self.tokens)
        self.num_computed = 0
        self.scheduled_s: float | None = None
        self.first_s: float | None = None
        self.fortunes: dict[int, Fortune] = {}
        self.choice: DrafterChoice | None = None
        self.pages: Pages | None = None
        self.hashes: list[bytes] = []
        self.salt = (params.cache_salt or "").encode()
        self.arrival = 0
        self.due = 0.0
        self.output = CompletionOutput(index)
        if params.logprobs is not None:
            self.output.logprobs, self.output.cumulative_logprob = [], 0.0
        self.prompt_logprobs: list[Logprobs | None] | None = None
        if params.prompt_logprobs is not None and index == 0:
            self.prompt_logprobs = [None]
        self.stats = RequestStats(num_predicted=len(prediction))
        self.trees: list[StepTree] = []
        self.text_ends: list[int] = []
        self.rng: np.random.Generator = request_generator(seed, number)
        self.noise = (
            None
            if params.seed is None or params.is_greedy
            else SeededNoise(params.seed, index, vocab_size)
        )
        self.verifier = self._resolve_verifier(speculation)
        self.draw = self._resolve_draw(speculation)
        self.draft_params = self._resolve_draft_params(speculation)
        self.regime: Regime = regime_of(
            params.temperature, greedy=params.is_greedy, seeded=self.noise is not None
        )
        self._own_ends = frozenset(params.stop_token_ids or ())
        # A tokenizer may name end tokens that the model has no row for: they cannot come.
        # Under a grammar an end token comes where nothing else may: it ends the text in any case.
        self.has_grammar = params.structure is not None
        is_endless = params.ignore_eos and not self.has_grammar
        ends = () if is_endless else tokenizer.eos_token_ids
        self._ends = frozenset(token for token in ends if token < vocab_size)
        self.history = constraints.history(params, self.num_prompt, self.end_tokens)
        self._detokenizer = IncrementalDetokenizer(
            tokenizer, skip_special_tokens=params.skip_special_tokens
        )
        self._stops = (
            StopStrings(params.stop_strings, include_stop=params.include_stop_str_in_output)
            if params.stop_strings
            else None
        )

    @property
    def num_pending(self) -> int:
        """Known tokens the target has not computed; 1 means the root alone."""
        return len(self.tokens) - self.num_computed

    @property
    def num_output(self) -> int:
        """Output tokens so far."""
        return len(self.tokens) - self.num_prompt

    @property
    def num_left(self) -> int:
        """Output tokens that may still come."""
        return self.max_total - len(self.tokens)

    @property
    def is_finished(self) -> bool:
        """Whether nothing more will come."""
        return self.output.finish_reason is not None

    @property
    def is_served(self) -> bool:
        """Whether it came to an end of its own."""
        return self.output.finish_reason in ("stop", "length")

    @property
    def priority(self) -> int:
        """Lower is earlier."""
        return self.params.priority

    @property
    def reads_cache(self) -> bool:
        """Whether K and V that are there will do: not where all the prompt's logits are due."""
        return self.prompt_logprobs is None or self.num_output > 0

    @property
    def end_tokens(self) -> frozenset[int]:
        """Tokens that end the text: what min_tokens keeps from being sampled."""
        return self._ends | self._own_ends

    def append(self, tokens: ListLike[int], logprobs: ListLike[Logprobs] = ()) -> int:
        """Take emitted tokens in until one of them ends the text; returns how many were taken.

        logprobs  one per token, where they were asked for
        """
        start = len(self.tokens)
        for token in tokens:
            self.tokens.append(token)
            self.output.token_ids.append(token)
            is_end = self._takes_end(token)
            if is_end:
                self._flush()
            if self.params.include_tree:
                self.text_ends.append(len(self.output.text))
            if is_end:
                break
        taken = len(self.tokens) - start
        if self.output.logprobs is not None:
            assert self.output.cumulative_logprob is not None
            for token, each in zip(self.tokens[start:], logprobs, strict=False):
                self.output.logprobs.append(each)
                self.output.cumulative_logprob += each[token].logprob
        self.stats.num_output_tokens += taken
        return taken

    def abort(self) -> None:
        """End here, on the caller's wish."""
        if not self.is_finished:
            self.output.finish_reason = "abort"
            self._flush()

    def _takes_end(self, token: int) -> bool:
        output = self.output
        is_due = self.num_output >= self.params.min_tokens
        is_end = token in self._ends and (is_due or self.has_grammar)
        if not is_end and not (token in self._own_ends and is_due):
            self._push(self._detokenizer.push([token]))
            if self._stops is not None and self._stops.matched is not None:
                output.finish_reason, output.stop_reason = "stop", self._stops.matched
        else:
            output.finish_reason = "stop"
            output.stop_reason = token if token in self._own_ends else None
            if self.params.include_stop_str_in_output:
                self._push(self._detokenizer.push([token]))
        if output.finish_reason is None and len(self.tokens) >= self.max_total:
            output.finish_reason = "length"
        return output.finish_reason is not None

    def _push(self, text: str) -> None:
        # Stop strings are looked for in what follows the first min_tokens tokens, as in vLLM.
        if self._stops is not None and self.num_output > self.params.min_tokens:
            text = self._stops.push(text)
        self.output.text += text

    def _flush(self) -> None:
        self._push(self._detokenizer.flush())
        if self._stops is not None:
            self.output.text += self._stops.flush()

    def _resolve_verifier(self, speculation: Speculation) -> VerifierName:
        """Greedy and seeded sequences have one lawful token per node: matching it is optimal."""
        if self.params.is_greedy or self.noise is not None:
            return "match"
        return "traversal" if speculation.verifier == "auto" else speculation.verifier

    def _resolve_draw(self, speculation: Speculation) -> Draw:
        if speculation.draw != "auto":
            return speculation.draw
        if self.verifier in IID_VERIFIERS:
            return "iid"
        cold = self.params.temperature <= COLDEST_DRAW
        return "pick" if self.verifier == "match" or cold else "without-replacement"

    def _resolve_draft_params(self, speculation: Speculation) -> SamplingParams:
        """The drafters' law: the request's own filters.

        A greedy request's law is no law to draw from, and a cold one's no law to rank picks by:
        their drafters speak at temperature 1, without filters.
        """
        temperature = speculation.draft_temperature
        is_cold = self.draw == "pick" and self.params.temperature <= COLDEST_DRAW
        if self.params.is_greedy or (is_cold and self.noise is None):
            return SamplingParams(temperature=temperature or 1.0)
        if temperature is None:
            return self.params
        return replace(self.params, temperature=temperature)
