"""`transformers.generate` on the same checkpoint: plain, with an assistant, with prompt lookup."""

import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.continuation import Asked, Continuation, Continue, chain_length, unknown
from specinfer.bench import System
from specinfer.errors import ConfigError

DTYPES = {"bf16": torch.bfloat16, "f32": torch.float32}
LOOKUP_TOKENS = 10
"""What transformers' own documentation and blog give `prompt_lookup_num_tokens`."""


class Transformers:
    """One checkpoint in `transformers`."""

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        from transformers import AutoModelForCausalLM

        warnings.filterwarnings("ignore")
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()

    def system(self, num_tokens: int, temperature: float) -> System:
        """Plain `generate` of exactly so many tokens."""

        def run(prompt: Sequence[int]) -> int:
            out = self.generate([prompt], num_tokens, temperature)
            return int(out.shape[1]) - len(prompt)

        return run

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        num_tokens: int,
        temperature: float,
        **options: Any,
    ) -> Tensor:
        """Continue prompts, padded on the left, by exactly so many tokens.

        returns  [prompts, padded length + num_tokens]
        """
        sampling: dict[str, Any] = {"do_sample": False}
        if temperature:
            sampling = {"do_sample": True, "temperature": temperature, "top_k": 0}
        longest = max(map(len, prompts))
        pads = [longest - len(prompt) for prompt in prompts]
        ids = [[0] * pad + list(prompt) for pad, prompt in zip(pads, prompts, strict=True)]
        mask = [[0] * pad + [1] * len(prompt) for pad, prompt in zip(pads, prompts, strict=True)]
        out: Tensor = self.model.generate(
            torch.tensor(ids),
            attention_mask=torch.tensor(mask),
            min_new_tokens=num_tokens,
            max_new_tokens=num_tokens,
            pad_token_id=0,
            **sampling,
            **options,
        )
        return out


class _Clock:
    """A streamer that notes when tokens came; the first call brings the prompt back."""

    def __init__(self) -> None:
        self.start_s = time.perf_counter()
        self.bursts: list[tuple[float, int]] = []
        self._has_prompt = False

    def put(self, tokens: Tensor) -> None:
        """Tokens of one sequence [n] or [1, n], or one for each of a batch [batch]."""
        if self._has_prompt:
            num_tokens = tokens.shape[-1] if tokens.dim() == 2 else tokens.numel()
            self.bursts.append((time.perf_counter() - self.start_s, num_tokens))
        self._has_prompt = True

    def end(self) -> None:
        """Nothing is left to do."""


class TransformersPeer:
    """Plain `generate` and what it has of speculation.

    assisted  its defaults: 20 tokens, cut where the assistant is less than 0.4 sure
    chain-N   N tokens whatever the assistant thinks
    lookup    prompt lookup
    """

    name = "transformers"

    def __init__(self, asked: Asked) -> None:
        self._asked = asked
        self._models: dict[tuple[Path, str], Transformers] = {}

    def ways(self) -> list[str]:
        """See `Peer`."""
        if self._asked.batch > 1:  # it assists one sequence at a time
            return ["bf16/plain"]
        return ["bf16/plain", "bf16/assisted", "bf16/chain-5", "bf16/lookup"]

    def open(self, precision: str, way: str) -> Continue:
        """See `Peer`."""
        length = chain_length(way)
        if precision not in DTYPES or not (length or way in ("plain", "assisted", "lookup")):
            raise unknown(self.name, precision, way)
        if self._asked.batch > 1 and way != "plain":
            raise ConfigError(f"transformers does {way} for one prompt at a time")
        model = self._load(self._asked.target, precision)
        options: dict[str, Any] = {}
        if way == "lookup":
            options["prompt_lookup_num_tokens"] = LOOKUP_TOKENS
        elif way != "plain":
            options["assistant_model"] = self._load(self._asked.drafter, precision).model

        def run(
            prompts: Sequence[Sequence[int]], num_tokens: int, temperature: float
        ) -> list[Continuation]:
            if "assistant_model" in options:
                self._set_schedule(options["assistant_model"], length)
            clock = _Clock()
            out = model.generate(prompts, num_tokens, temperature, streamer=clock, **options)
            written = out[:, -num_tokens:].tolist()
            if len(prompts) == 1:
                return [Continuation(clock.bursts, written[0])]
            bursts = [(when_s, 1) for when_s, _ in clock.bursts]
            return [Continuation(bursts, tokens) for tokens in written]

        return run

    def close(self) -> None:
        """See `Peer`."""
        self._models.clear()

    def version(self) -> str:
        """See `Peer`."""
        import transformers

        return f"transformers {transformers.__version__}, torch {torch.__version__}"

    def _load(self, folder: Path, precision: str) -> Transformers:
        key = (folder, precision)
        if key not in self._models:
            self._models[key] = Transformers(folder, DTYPES[precision])
        return self._models[key]

    @staticmethod
    def _set_schedule(assistant: Any, length: int | None) -> None:
        """The schedule stands in the assistant's own configuration, and is learnt there."""
        config = assistant.generation_config
        config.num_assistant_tokens_schedule = "constant"
        config.num_assistant_tokens = length or 20
        if length:
            config.assistant_confidence_threshold = 0.0
        elif not config.assistant_confidence_threshold:
            config.assistant_confidence_threshold = 0.4
