"""Our own engine in the form of a peer: plain, `auto`, and fixed trees."""

import time
from collections.abc import Sequence

from benchmarks.continuation import Asked, Continuation, Continue, chain_length, unknown
from specinfer.config import Speculation
from specinfer.llm import LLM
from specinfer.request import SamplingParams

# Precision → what `LLM` is asked for
PRECISIONS = {
    "bf16": {"dtype": "bfloat16"},
    "f32": {"dtype": "float32"},
    "int8": {"dtype": "bfloat16", "quantization": "int8"},
    "int4": {"dtype": "bfloat16", "quantization": "int4"},
}


class Ours:
    """Ways: plain, auto, chain-N, and any tree's name or shape."""

    name = "ours"

    def __init__(self, asked: Asked, trees: Sequence[str]) -> None:
        self._asked = asked
        self._trees = trees
        self._engines: dict[str, LLM] = {}

    def ways(self) -> list[str]:
        """See `Peer`."""
        ways = ("plain", "auto", *self._trees)
        return [f"{precision}/{way}" for precision in ("bf16", "int8", "int4") for way in ways]

    def open(self, precision: str, way: str) -> Continue:
        """See `Peer`."""
        if precision not in PRECISIONS:
            raise unknown(self.name, precision, way)
        length = chain_length(way)
        tree = ",".join(["1"] * length) if length else {"plain": "off"}.get(way, way)
        speculation = Speculation(tree=tree)
        llm = self._engine(precision)

        def run(
            prompts: Sequence[Sequence[int]], num_tokens: int, temperature: float
        ) -> list[Continuation]:
            llm.engine.set_speculation(speculation)
            params = SamplingParams(temperature=temperature, max_tokens=num_tokens, ignore_eos=True)
            return follow(llm, prompts, params)

        return run

    def close(self) -> None:
        """See `Peer`."""
        self._engines.clear()

    def version(self) -> str:
        """See `Peer`."""
        import torch

        import specinfer

        return f"specinfer {specinfer.__version__}, torch {torch.__version__}"

    def _engine(self, precision: str) -> LLM:
        if precision not in self._engines:
            self._engines[precision] = LLM(
                str(self._asked.target),
                drafters=[str(self._asked.drafter)],
                max_num_seqs=self._asked.batch,
                enable_prefix_caching=False,  # nobody's prompt is known from an earlier run
                **PRECISIONS[precision],  # type: ignore[arg-type]
            )
        return self._engines[precision]


def follow(
    llm: LLM, prompts: Sequence[Sequence[int]], params: SamplingParams
) -> list[Continuation]:
    """Continue prompts together, and note when tokens came."""
    start_s = time.perf_counter()
    requests = [llm.submit(list(prompt), params) for prompt in prompts]
    done = {request.sequences[0].number: Continuation([], []) for request in requests}
    try:
        while not all(request.is_finished for request in requests):
            for trace in llm.engine.step():
                burst = (time.perf_counter() - start_s, trace.num_new)
                done[trace.sequence.number].bursts.append(burst)
    finally:
        llm.abort(requests)  # only where something above raised
    for request in requests:
        done[request.sequences[0].number].tokens = request.output().outputs[0].token_ids
    return list(done.values())
