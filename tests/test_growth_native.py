"""Growth in one call of our kernels: the trees of growing round by round, node for node."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from benchmarks.prompts import load_chats
from specinfer.config import Speculation
from specinfer.draft.rounds import Prices
from specinfer.engine.controller import Controller
from specinfer.engine.engine import StepTrace
from specinfer.engine.timed_drafter import TimedDrafter
from specinfer.llm import LLM
from specinfer.ops.native import kernels
from specinfer.request import SamplingParams

pytestmark = pytest.mark.skipif(kernels() is None, reason="no kernels of our own here")

GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)


def prices(node: float, one_pass: float, stop: int) -> Prices:
    """Later nodes are dearer; passes cost by their nodes."""
    nodes = np.linspace(node, 2 * node, stop)
    passes = [one_pass + 0.2 * node * np.arange(stop)] * 3
    return Prices(nodes, np.concatenate(([0.0], np.cumsum(nodes)[:-1])), passes, passes)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM(
        "zoo:parley",
        drafters=["zoo:parley-draft"],
        dtype="float32",
        max_model_len=256,
        enable_prefix_caching=False,
        show_progress=False,
    )


def trees_of(llm: LLM, prompts: Sequence[Sequence[int]], params: SamplingParams) -> list[Any]:
    """Every step's trees with their features, and the texts."""
    requests = [llm.submit(list(prompt), params) for prompt in prompts]
    found: list[Any] = []

    def note(trace: StepTrace) -> None:
        tree = trace.tree
        found.append((tree.tokens, tree.parents, [slot.node for slot in tree.slots]))
        found.append(trace.verdict.path)

    while not all(request.is_finished for request in requests):
        for trace in llm.engine.step():
            note(trace)
    return [*found, *(request.output().outputs[0].token_ids for request in requests)]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("tree", ["calibrated", "best-first", "auto"])
@pytest.mark.parametrize("max_nodes", [1, 7, 20])
def test_rounds_in_one_call_grow_the_same_trees(llm, batch, tree, max_nodes, monkeypatch):
    """With prices ("auto", here fixed ones) and without, alone and in a batch."""
    monkeypatch.setattr(Controller, "prices", lambda self, a, b, stop: prices(0.02, 0.05, stop))
    monkeypatch.setattr(Controller, "rests", lambda self, num_spans: False)
    texts = [llm.tokenizer.apply_chat_template(chat) for chat in load_chats(batch)]
    calls = []
    grow_on = TimedDrafter.grow_on

    def counted(self: TimedDrafter, *arguments: Any) -> bool:
        calls.append(grow_on(self, *arguments))
        return calls[-1]

    monkeypatch.setattr(TimedDrafter, "grow_on", counted)
    # Both runs start from the same tables
    monkeypatch.setattr(llm.engine.speculator.calibration, "record", lambda *_: None)
    llm.engine.set_speculation(Speculation(tree=tree, max_nodes=max_nodes))
    native = trees_of(llm, texts, GREEDY)
    assert calls
    assert all(calls)
    monkeypatch.setattr(TimedDrafter, "grow_on", lambda *_: False)
    assert trees_of(llm, texts, GREEDY) == native


def test_what_changes_laws_is_grown_round_by_round(llm, monkeypatch):
    """Histories and drawn slots, whose laws the kernels do not know."""
    calls: list[bool] = []
    monkeypatch.setattr(TimedDrafter, "grow_on", lambda *_: calls.append(True))
    llm.engine.set_speculation(Speculation(tree="calibrated", max_nodes=6))
    (text,) = (llm.tokenizer.apply_chat_template(chat) for chat in load_chats(1))
    for changed in (
        {"repetition_penalty": 1.2},
        {"temperature": 0.8},
        {"temperature": 0.8, "seed": 1},
    ):
        options = {"temperature": 0.0, "max_tokens": 4, **changed}
        trees_of(llm, [text], SamplingParams(**options))
    assert not calls


def test_a_drafter_that_fails_in_it_is_dropped(llm, monkeypatch):
    """The text stays that of plain decoding."""
    llm.engine.set_speculation(Speculation(tree="off"))
    text = llm.tokenizer.apply_chat_template(load_chats(1)[0])
    plain = llm.generate([text], GREEDY)[0].outputs[0].token_ids
    drafter = llm.engine.speculator.drafters[0]

    def fails(*_: Any) -> Any:
        raise RuntimeError("broken")

    monkeypatch.setattr(drafter._drafter, "grow_on", fails)
    monkeypatch.setattr(drafter, "is_failed", False)
    llm.engine.set_speculation(Speculation(tree="calibrated", max_nodes=8))
    assert llm.generate([text], GREEDY)[0].outputs[0].token_ids == plain
    assert drafter.is_failed
