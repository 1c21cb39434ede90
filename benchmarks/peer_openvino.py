"""OpenVINO GenAI on the same checkpoint, exported by optimum-intel.

    optimum-cli export openvino --task text-generation-with-past --weight-format fp16
        --model twins/parley-1b twins/openvino/parley-1b-fp16

optimum-intel wants an older transformers than we do, hence an environment of its own. Weights are
stored in fp16 and, as "bf16", computed with in bfloat16; its KV cache has its own default (u8).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.continuation import Asked, Continuation, Continue, chain_length, unknown
from benchmarks.inflate import TWINS
from specinfer.errors import DependencyError

FORMATS = {"bf16": "fp16", "int8": "int8", "int4": "int4"}
"""Precision → optimum's weight format."""

LOOKUP_NGRAM, LOOKUP_TOKENS = 3, 5
_CACHE_GB = 1


class OpenVINO:
    """Ways: plain; chain-N, N drafted tokens; lookup."""

    name = "openvino"

    def __init__(self, asked: Asked) -> None:
        self._asked = asked
        self._pipelines: dict[tuple[str, str], Any] = {}

    def ways(self) -> list[str]:
        """See `Peer`."""
        ways = ("plain", "chain-3", "chain-5", "lookup")
        return [f"{precision}/{way}" for precision in ("bf16", "int8") for way in ways]

    def open(self, precision: str, way: str) -> Continue:
        """See `Peer`."""
        length = chain_length(way)
        if precision not in FORMATS or not (length or way in ("plain", "lookup")):
            raise unknown(self.name, precision, way)
        pipeline = self._pipeline(precision, "chain" if length else way)

        def run(
            prompts: Sequence[Sequence[int]], num_tokens: int, temperature: float
        ) -> list[Continuation]:
            asked: dict[str, Any] = {"max_new_tokens": num_tokens, "ignore_eos": True}
            if temperature:
                asked |= {"do_sample": True, "temperature": temperature, "top_p": 1.0}
            if length:
                asked["num_assistant_tokens"] = length
            elif way == "lookup":
                asked |= {"num_assistant_tokens": LOOKUP_TOKENS, "max_ngram_size": LOOKUP_NGRAM}
            result = pipeline.generate(_inputs(prompts), **asked)
            first_s = result.perf_metrics.get_ttft().mean / 1e3
            end_s = result.perf_metrics.get_generate_duration().mean / 1e3
            return [
                Continuation([(first_s, 1), (end_s, len(tokens) - 1)], list(tokens))
                for tokens in result.tokens
            ]

        return run

    def close(self) -> None:
        """See `Peer`."""
        self._pipelines.clear()

    def version(self) -> str:
        """See `Peer`."""
        return f"OpenVINO GenAI {import_genai().__version__}"

    def _pipeline(self, precision: str, kind: str) -> Any:
        if (precision, kind) in self._pipelines:
            return self._pipelines[precision, kind]
        genai = import_genai()
        scheduler = genai.SchedulerConfig()
        scheduler.cache_size = _CACHE_GB
        scheduler.enable_prefix_caching = False
        scheduler.max_num_batched_tokens = 2048
        settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": self._asked.threads}
        if precision == "bf16":
            settings["INFERENCE_PRECISION_HINT"] = "bf16"
        options: dict[str, Any] = {}
        if kind == "chain":
            folder = _folder(self._asked.drafter, "fp16")
            options["draft_model"] = genai.draft_model(folder, "CPU", **settings)
        elif kind == "lookup":
            options["prompt_lookup"] = True
        self._pipelines[precision, kind] = genai.LLMPipeline(
            _folder(self._asked.target, FORMATS[precision]),
            "CPU",
            scheduler_config=scheduler,
            **settings,
            **options,
        )
        return self._pipelines[precision, kind]


def import_genai() -> Any:
    """The `openvino_genai` package.

    raises  DependencyError
    """
    try:
        import openvino_genai
    except ImportError:
        raise DependencyError("OpenVINO GenAI is missing: pip install openvino-genai") from None
    return openvino_genai


def _folder(checkpoint: Path, weight_format: str) -> Path:
    folder = TWINS / "openvino" / f"{checkpoint.name}-{weight_format}"
    if not (folder / "openvino_model.xml").is_file():
        raise DependencyError(
            f"{folder} is missing: in an environment with optimum-intel[openvino], run "
            f"optimum-cli export openvino --model {checkpoint} --task text-generation-with-past "
            f"--weight-format {weight_format} {folder}"
        )
    return folder


def _inputs(prompts: Sequence[Sequence[int]]) -> Any:
    """Prompts padded on the left, with their mask."""
    import openvino

    longest = max(map(len, prompts))
    ids = np.zeros((len(prompts), longest), dtype=np.int64)
    mask = np.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = prompt
        mask[row, longest - len(prompt) :] = 1
    return import_genai().TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(mask))
