"""Padded and replayed steps compute what a processor's runner does, with a graph that is none.

Where there is a GPU they run on it; the last tests are of real graphs.
"""

from collections.abc import Callable
from copy import deepcopy

import numpy as np
import pytest
import torch
from torch import Tensor

from specinfer.cache.blocks import Pages
from specinfer.cache.pool import KVPool
from specinfer.config import Speculation
from specinfer.llm import LLM
from specinfer.models.decoder import Decoder
from specinfer.request import SamplingParams
from specinfer.run import graph, runner
from specinfer.run.batch import Span
from specinfer.run.graph import LADDER, CudaCapture, DeviceSteps, padded
from specinfer.run.runner import Runner
from specinfer.tree import TokenTree
from tests.engines import (
    chain,
    finish,
    model_drafter,
    outputs_of,
    run_pages,
    scattered_pages,
    toy_decoder,
    toy_engine,
)
from tests.test_runner import random_tokens, random_tree, tree_span

pytest.importorskip("triton")

# Padding attends to nothing, so its rows are whatever stood in memory: numpy would warn of them.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
NUM_SLOTS = 64
TOLERANCE = 1e-5
SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
"""For whole texts: the interpreter takes 10 ms a program."""
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}


class Captures:
    """What a CUDA graph does, without one: a capture computes nothing, a replay always the same."""

    def __init__(self) -> None:
        self.count = self.replays = 0

    def __call__(self, step: Callable[[], object]) -> Callable[[], None]:
        self.count += 1

        def replay() -> None:
            self.replays += 1
            step()

        return replay


def steps_of(decoder: Decoder, captures: Captures, num_slots: int = NUM_SLOTS) -> DeviceSteps:
    a, decoder = decoder.architecture, deepcopy(decoder).to(DEVICE)
    pool = KVPool(
        num_layers=a.num_layers,
        kv_heads=a.num_kv_heads,
        num_slots=num_slots + 1,
        head_dim=a.head_dim,
        dtype=decoder.dtype,
        device=decoder.device,
    )
    for layer in range(a.num_layers):
        for pages in pool.layer(layer):
            pages.fill_(torch.nan)  # whoever reads what nobody wrote is found out
    return DeviceSteps(decoder, pool, scratch=num_slots, num_programs=2, capture=captures)


def run(steps: DeviceSteps, spans: list[Span]) -> Tensor:
    with torch.inference_mode():
        return steps.run(spans).cpu()


def test_a_size_is_padded_to_the_next_of_the_ladder() -> None:
    assert [padded(count) for count in (0, 1, 3, 33, 256)] == [0, 1, 4, 48, 256]
    assert padded(LADDER[-1] + 1) is None
    assert list(LADDER) == sorted(set(LADDER))


@pytest.mark.parametrize(
    ("pages", "changes"),
    [
        (run_pages(NUM_SLOTS), {}),
        (
            scattered_pages(48, 4, NUM_SLOTS),
            {"family": "MistralForCausalLM", "sliding_window": 5},
        ),
    ],
    ids=["run", "scattered, window"],
)
def test_steps_equal_the_runners(pages: Pages, changes: dict[str, object]) -> None:
    """A prompt, then trees and chains of many sizes behind it, path by path."""
    rng = np.random.default_rng(0)
    decoder = toy_decoder(3, num_hidden_layers=2, **changes)
    captures = Captures()
    plain, steps = Runner(decoder, NUM_SLOTS), steps_of(decoder, captures)
    tokens = random_tokens(rng, 9)
    spans = [chain(tokens[:8], pages, num_logits=0)]
    for size in (1, 5, 7, 2):
        assert_close(run(steps, spans), plain.run(spans))
        tree = random_tree(rng, size, tokens[-1])
        spans = [tree_span(tokens, tree, pages)]
        root, path = len(tokens) - 1, tree.path(size - 1)
        tokens += [tree.tokens[node] for node in path] + random_tokens(rng, 1)
        assert_close(run(steps, spans), plain.run(spans))
        for pool in (plain.pool, steps._pool):
            pool.move(
                [pages.slot(root + node) for node in path],
                [pages.slot(root + depth) for depth in range(1, len(path) + 1)],
            )
        spans = [chain(tokens[root + 1 + len(path) : -1], pages, root + 1 + len(path))]
        spans = [span for span in spans if span.tokens]
        if not spans:
            spans = [tree_span(tokens, TokenTree(tokens[-1]), pages)]
    assert captures.count < captures.replays


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize(
    "changes",
    [
        {"family": "Qwen2ForCausalLM", "tie_word_embeddings": True},
        {"family": "Qwen3ForCausalLM", "head_dim": 20, "attention_bias": True},
        {"family": "Qwen3ForCausalLM", "num_attention_heads": 3, "num_key_value_heads": 1},
        {"hidden_act": "gelu", "mlp_bias": True, "hidden_size": 40},
        {"hidden_act": "gelu_pytorch_tanh", "rope_parameters": YARN},
        {"hidden_act": "relu", "rope_parameters": {"rope_type": "dynamic", "factor": 4.0}},
    ],
    ids=str,
)
def test_every_kind_of_layer(changes: dict[str, object]) -> None:
    rng = np.random.default_rng(0)
    decoder, pages = toy_decoder(3, num_hidden_layers=2, **changes), run_pages(NUM_SLOTS)
    plain, steps = Runner(decoder, NUM_SLOTS), steps_of(decoder, Captures())
    tokens = random_tokens(rng, 5)
    tree = random_tree(rng, 4, tokens[-1])
    for span in (chain(tokens[:-1], pages, num_logits=2), tree_span(tokens, tree, pages)):
        assert_close(run(steps, [span]), plain.run([span]))


def test_padding_writes_to_its_own_slot_and_no_other() -> None:
    pages = scattered_pages(8, 4, NUM_SLOTS)
    steps = steps_of(toy_decoder(3, num_hidden_layers=2), Captures())
    run(steps, [chain(random_tokens(np.random.default_rng(0), 5), pages)])
    for layer in range(2):
        for each in steps._pool.layer(layer):
            written = (~each.isnan()).any(2).any(0).nonzero().flatten().tolist()
            assert set(written) - {NUM_SLOTS} == {pages.slot(key) for key in range(5)}


def test_requests_of_one_step_and_only_their_last_logits() -> None:
    rng = np.random.default_rng(1)
    decoder = toy_decoder(3, num_hidden_layers=2)
    plain, steps = Runner(decoder, NUM_SLOTS), steps_of(decoder, Captures())
    pages = [Pages((n,), 16) for n in range(3)]
    for sizes in ((3, 1, 7), (5, 5, 5)):
        texts = [random_tokens(rng, size) for size in sizes]
        spans = [chain(text, own, num_logits=1) for text, own in zip(texts, pages, strict=True)]
        assert_close(run(steps, spans), plain.run(spans))


def test_a_graph_serves_every_step_of_its_shape() -> None:
    decoder, captures = toy_decoder(3, num_hidden_layers=2), Captures()
    plain, steps = Runner(decoder, NUM_SLOTS), steps_of(decoder, captures)
    rng = np.random.default_rng(0)
    kept = []
    for size in (5, 8, 6):
        spans = [chain(random_tokens(rng, size), run_pages(8), num_logits=size)]
        kept.append((run(steps, spans), plain.run(spans)))
    for actual, expected in kept:  # what came first is the caller's: no replay wrote over it
        assert_close(actual, expected)
    assert (captures.count, captures.replays) == (1, 3)


@pytest.mark.parametrize("limit", ["LADDER", "_PARTIAL_ROWS", "_SPARE_NUMBERS"])
def test_what_fits_no_graph_runs_without_one(monkeypatch: pytest.MonkeyPatch, limit: str) -> None:
    small = {"LADDER": (0, 1, 2, 4), "_PARTIAL_ROWS": 2, "_SPARE_NUMBERS": 0}[limit]
    monkeypatch.setattr(graph, limit, small)
    monkeypatch.setattr("specinfer.ops.triton_attention.SPLIT_KEYS", 4)
    decoder, captures = toy_decoder(3, num_hidden_layers=2), Captures()
    plain, steps = Runner(decoder, NUM_SLOTS), steps_of(decoder, captures)
    spans = [chain(random_tokens(np.random.default_rng(0), 6), run_pages(8), num_logits=2)]
    assert_close(run(steps, spans), plain.run(spans))
    assert captures.count == 0


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_texts_are_a_processors(monkeypatch: pytest.MonkeyPatch, temperature: float) -> None:
    """The whole engine, target and drafter: greedy and seeded texts, drafted in trees."""
    texts = []
    captures = Captures()
    for is_device in (False, True):
        if is_device:
            pool = lambda num_slots, **rest: KVPool(num_slots=num_slots + 1, **rest)  # noqa: E731
            monkeypatch.setattr(runner, "KVPool", pool)
            monkeypatch.setattr(
                runner,
                "device_steps",
                lambda decoder, pool, scratch: DeviceSteps(
                    decoder, pool, scratch=scratch, num_programs=2, capture=captures
                ),
            )
        place = DEVICE if is_device else torch.device("cpu")
        near_target = toy_decoder(0, **SMALL, head=0.15).to(place)
        drafter = model_drafter(near_target, 64 * 4)
        engine = toy_engine(
            toy_decoder(0, **SMALL).to(place), [drafter], speculation=Speculation(tree="2,1")
        )
        params = SamplingParams(temperature=temperature, seed=1, max_tokens=6)
        sequences = engine.add("one", [1, 2, 3], params) + engine.add("two", [4, 5], params)
        finish(engine)
        texts.append(outputs_of(sequences))
        assert engine.stats.num_steps < 6
    assert texts[0] == texts[1]
    assert captures.replays >= captures.count > 2


@pytest.mark.gpu
def test_the_bundled_pair_writes_the_same_on_both() -> None:
    prompts = ["Tell me a story.", "Please book a table for two."]
    params = SamplingParams(temperature=0, max_tokens=32)
    texts = []
    for device in ("cpu", "cuda"):
        llm = LLM("zoo:parley", drafters=["zoo:parley-draft"], dtype="float32", device=device)
        texts.append([output.outputs[0].token_ids for output in llm.generate(prompts, params)])
    assert texts[0] == texts[1]


@pytest.mark.gpu
def test_graphs_equal_a_processor() -> None:
    rng = np.random.default_rng(0)
    plain = Runner(toy_decoder(3), NUM_SLOTS)
    device = Runner(deepcopy(plain.decoder).to("cuda"), NUM_SLOTS)
    assert isinstance(device._device_steps, DeviceSteps)
    assert isinstance(device._device_steps._capture, CudaCapture)
    tokens = random_tokens(rng, 9)
    for each in (plain, device):
        each.run([chain(tokens[:8], run_pages(NUM_SLOTS))])
    for size in (1, 5, 7, 5, 30):
        spans = [tree_span(tokens, random_tree(rng, size, tokens[-1]), run_pages(NUM_SLOTS))]
        actual, expected = device.run(spans).cpu(), plain.run(spans)
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
