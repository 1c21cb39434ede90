"""The offline face: load a model with its drafters, and ask it.

    llm = LLM("zoo:parley", drafters=["zoo:parley-draft"])
    llm.generate("Tell me a story.", SamplingParams(max_tokens=64))[0].outputs[0].text

Prompts given together share every step.
"""

import operator
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

from specinfer.config import EngineConfig, SchedulingPolicy, Speculation
from specinfer.draft.calibration import Calibration
from specinfer.engine.build import build_engine
from specinfer.engine.engine import Engine
from specinfer.engine.sequence import Sequence as EngineSequence
from specinfer.errors import ConfigError, ModelError, RequestError
from specinfer.outputs import Logprobs, RequestOutput, RequestStats
from specinfer.progress import count_tokens, show_loading, show_measuring
from specinfer.request import SamplingParams

Prompt = str | Sequence[int]
Message = Mapping[str, Any]
Conversation = Sequence[Message]

_UNBUILT: dict[str, Any] = {
    "tensor_parallel_size": 1,
    "pipeline_parallel_size": 1,
    "executor": "local",
    "offload": None,
    "lora": None,
    "compile": False,
}
"""Options that later work will build, and the one value each may have until then."""


@dataclass(slots=True, eq=False)
class Pending:
    """A request in the engine: its sequences, and what the caller will get of them."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    sequences: list[EngineSequence]

    @property
    def is_finished(self) -> bool:
        """Whether all its sequences have ended."""
        return all(sequence.is_finished for sequence in self.sequences)

    def output(self) -> RequestOutput:
        """All of it so far, as a value that later steps do not touch; of trees, the new ones."""
        stats, trees = RequestStats(), []
        for sequence in self.sequences:
            stats.add(sequence.stats)
            trees += sequence.trees
            sequence.trees = []
        return RequestOutput(
            request_id=self.request_id,
            prompt=self.prompt,
            prompt_token_ids=self.prompt_token_ids,
            outputs=[
                replace(
                    sequence.output,
                    token_ids=list(sequence.output.token_ids),
                    logprobs=_copied(sequence.output.logprobs),
                )
                for sequence in self.sequences
            ],
            finished=self.is_finished,
            stats=stats,
            prompt_logprobs=self._prompt_logprobs(),
            trees=trees,
        )

    def _prompt_logprobs(self) -> list[Logprobs | None] | None:
        """Those of all the prompt are the same list for all outputs: no later step touches it."""
        known = self.sequences[0].prompt_logprobs
        is_whole = known is not None and len(known) == len(self.prompt_token_ids)
        return known if is_whole else _copied(known)


class LLM:
    """A target model with any number of drafters, served in this process."""

    def __init__(
        self,
        model: str,
        *,
        drafters: str | Sequence[str] = (),
        speculation: Speculation | None = None,
        dtype: str = "auto",
        device: str = "auto",
        quantization: str | None = None,
        drafter_quantization: str | None = None,
        max_num_seqs: int = 16,
        max_num_batched_tokens: int = 2048,
        chunked_prefill_size: int = 512,
        max_model_len: int | None = None,
        kv_cache_memory: int | str | None = None,
        kv_cache_memory_fraction: float | None = None,
        enable_prefix_caching: bool = True,
        scheduling_policy: SchedulingPolicy = "fcfs",
        block_size: int = 16,
        seed: int = 0,
        calibration: str | Path | None = None,
        show_progress: bool | None = None,
        **unbuilt: Any,
    ) -> None:
        """Load everything; takes as long as reading the weights.

        model            a Hugging Face id, a folder, or "zoo:NAME"
        drafters         the same, none for plain decoding; each shares the model's tokenizer
        speculation      how to guess and verify; None: `Speculation()`
        dtype            "auto" (the checkpoint's) | "bfloat16" | "float16" | "float32"
        device           "auto" | "cpu" | "cuda"
        quantization     round the model's linears while they are read: "int8" | "int4" (groups of
                         32) | "int4-64" | "int4-128" | "fp8" (on a GPU); None: as the checkpoint
                         is
        drafter_quantization  the same for the drafters
        max_num_seqs …   as in `EngineConfig`
        calibration      a file for what was learnt of acceptance: read now where it exists, written
                         by `save_calibration`
        show_progress    None: where standard error is a terminal
        raises           ConfigError, ModelError or CapacityError, each in one sentence
        """
        _refuse_unbuilt(unbuilt)
        config = EngineConfig(
            max_num_seqs=max_num_seqs,
            max_num_batched_tokens=max_num_batched_tokens,
            chunked_prefill_size=chunked_prefill_size,
            max_model_len=max_model_len,
            kv_cache_memory=kv_cache_memory,
            kv_cache_memory_fraction=kv_cache_memory_fraction,
            enable_prefix_caching=enable_prefix_caching,
            scheduling_policy=scheduling_policy,
            block_size=block_size,
            seed=seed,
        )
        self._show_progress = show_progress
        self._num_requests = 0
        with show_loading(show_progress) as progress:
            self.engine: Engine = build_engine(
                model,
                [drafters] if isinstance(drafters, str) else list(drafters),
                config=config,
                speculation=speculation or Speculation(),
                dtype=dtype,
                device=device,
                quantization=quantization,
                drafter_quantization=drafter_quantization,
                progress=progress,
                calibration=_read_calibration(calibration),
            )
        self._calibration_file = None if calibration is None else Path(calibration)
        self.tokenizer = self.engine.tokenizer
        if drafters and self.engine.speculation.needs_times:
            with show_measuring(show_progress) as report:
                self.engine.measure(report)

    def save_calibration(self, file: str | Path | None = None) -> None:
        """Write what was learnt of acceptance.

        file    None: the one given as `calibration`
        raises  ConfigError where neither was given or it cannot be written
        """
        target = self._calibration_file if file is None else Path(file)
        if target is None:
            raise ConfigError("calibration has no file: give one here, or as LLM(calibration=…)")
        self.engine.speculator.calibration.save(target)

    def default_sampling_params(self, **changes: Any) -> SamplingParams:
        """What the model's generation_config.json asks for, with changes."""
        defaults = dict(self.tokenizer.generation_defaults)
        return SamplingParams(**(defaults | changes))

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Continue prompts, together.

        prompts          a text, a list of token ids, or a list of either
        sampling_params  for all, or one per prompt; None: `default_sampling_params()`
        returns          in the order of the prompts
        raises           RequestError for a prompt that cannot be served, before any is started
        """
        if not isinstance(prompts, str | Sequence):
            raise RequestError("prompts must be a text, a list of token ids, or a list of either")
        if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
            prompts = [cast(Prompt, prompts)]
        params = self._params_per_prompt(len(prompts), sampling_params)
        pending: list[Pending] = []
        try:
            for prompt, each in zip(prompts, params, strict=True):
                pending.append(self.submit(prompt, each))  # type: ignore[arg-type]
            num_sequences = sum(len(request.sequences) for request in pending)
            with count_tokens(self._show_progress, num_sequences) as count:
                while not all(request.is_finished for request in pending):
                    count(self.engine.step())
                    self._check_ended(pending)
        finally:
            self.abort(pending)  # only where something above raised
        return [request.output() for request in pending]

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation or a list of them, through the model's chat template.

        messages         {"role", "content"} each
        sampling_params  None: the model's defaults, max_tokens the rest of the context
        """
        if not messages:
            raise RequestError("the conversation is empty: give at least one message")
        conversations = [messages] if isinstance(messages[0], Mapping) else messages
        if sampling_params is None:
            sampling_params = self.default_chat_params()
        return self.generate(
            [self.tokenizer.apply_chat_template(each) for each in conversations],  # type: ignore[arg-type]
            sampling_params,
        )

    def stream(
        self, prompt: Prompt | Conversation, sampling_params: SamplingParams | None = None
    ) -> Iterator[RequestOutput]:
        """Continue one prompt, or answer one conversation, step by step.

        yields  all of the output so far after every step that added to it, the last one finished
        """
        if not isinstance(prompt, str) and prompt and isinstance(prompt[0], Mapping):
            sampling_params = sampling_params or self.default_chat_params()
            prompt = self.tokenizer.apply_chat_template(prompt)  # type: ignore[arg-type]
        params, num_seen = sampling_params or self.default_sampling_params(), 0
        with closing(self.steps(prompt, params)) as steps:  # type: ignore[arg-type]
            for request in steps:
                output = request.output()
                if output.finished or output.stats.num_output_tokens > num_seen:
                    num_seen = output.stats.num_output_tokens
                    yield output
        if not output.finished:  # others' steps brought it to its end
            yield request.output()

    def steps(self, prompt: Prompt, params: SamplingParams) -> Generator[Pending]:
        """Submit a request and step until it has ended; leaving early aborts it.

        yields  the request after every step, whatever the step brought it
        """
        request = self.submit(prompt, params)
        try:
            while not request.is_finished:
                self.engine.step()
                self._check_ended([request])
                yield request
        finally:
            self.abort([request])

    def default_chat_params(self, **changes: Any) -> SamplingParams:
        """The model's defaults for an answer: as long as the context allows."""
        return self.default_sampling_params(**({"max_tokens": None} | changes))

    def submit(
        self, prompt: Prompt, params: SamplingParams, request_id: str | None = None
    ) -> Pending:
        """Queue a request without computing anything; `engine.step()` then advances it."""
        text = prompt if isinstance(prompt, str) else None
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else _token_ids(prompt)
        request_id = request_id or str(self._num_requests)
        self._num_requests += 1
        return Pending(request_id, text, ids, self.engine.add(request_id, ids, params))

    def abort(self, requests: Sequence[Pending]) -> None:
        """End requests and free what they hold; those that have ended stay as they are."""
        for request in requests:
            self.engine.abort(request.sequences)

    def _check_ended(self, requests: Sequence[Pending]) -> None:
        """Look whether the last step ended one of them because its logits are not finite.

        raises  ModelError
        """
        broken = set(map(id, self.engine.broken))
        for request in requests if broken else ():
            if any(id(sequence) in broken for sequence in request.sequences):
                raise not_finite(request.request_id)

    def _params_per_prompt(
        self, count: int, params: SamplingParams | Sequence[SamplingParams] | None
    ) -> list[SamplingParams]:
        if params is None:
            params = self.default_sampling_params()
        if isinstance(params, SamplingParams):
            return [params] * count
        if len(params) != count:
            raise ConfigError(
                f"{len(params)} sampling_params for {count} prompts: give one, or one per prompt"
            )
        return list(params)


def not_finite(request_id: str) -> ModelError:
    """What a request is told that has no law."""
    return ModelError(
        f"the target's logits for request {request_id} are not finite (NaN or infinity): try "
        'dtype="float32", and check the weights'
    )


def _copied(values: list[Any] | None) -> list[Any] | None:
    return None if values is None else list(values)


def _read_calibration(file: str | Path | None) -> Calibration:
    if file is None or not Path(file).exists():
        return Calibration()
    return Calibration.load(Path(file))


def _token_ids(prompt: Sequence[int]) -> list[int]:
    """Plain integers, whatever kind they come in (numpy's, a tensor's)."""
    try:
        return [operator.index(token) for token in prompt]
    except TypeError:
        raise RequestError("a prompt is a text or a list of token ids") from None


def _refuse_unbuilt(options: Mapping[str, Any]) -> None:
    for name, value in options.items():
        if name not in _UNBUILT:
            raise TypeError(f"LLM has no option {name!r}")
        if value != _UNBUILT[name]:
            raise ConfigError(f"{name}={value!r} is not built yet: leave {name} out")
