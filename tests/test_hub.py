"""A real public pair from the hub, end to end: `scripts/test -m network`."""

import pytest

from specinfer.config import Speculation
from specinfer.llm import LLM
from specinfer.request import SamplingParams

TARGET = "HuggingFaceTB/SmolLM2-360M-Instruct"
DRAFTER = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.mark.network
def test_a_public_pair_says_with_a_tree_what_it_says_without() -> None:
    llm = LLM(TARGET, drafters=[DRAFTER], dtype="float32", max_num_seqs=2, max_model_len=256)
    chats = [
        [{"role": "user", "content": "Name the planets of the solar system in order."}],
        [{"role": "user", "content": "Write a haiku about the sea."}],
    ]
    params = SamplingParams(temperature=0, max_tokens=64)
    tree = llm.chat(chats, params)
    llm.engine.set_speculation(Speculation(tree="off"))
    plain = llm.chat(chats, params)
    assert [o.outputs[0].token_ids for o in tree] == [o.outputs[0].token_ids for o in plain]
    assert all(output.stats.tokens_per_step > 1.5 for output in tree)
