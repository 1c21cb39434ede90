"""The GPU's benchmark says why it does not run, and counts what it divides by."""

import numpy as np
import pytest
import torch

from benchmarks import gpu, layers
from benchmarks.kernel import Case, segments_of
from benchmarks.layers import PlainSteps, steps_of
from benchmarks.roofline import tree_span
from specinfer.ops.attention import attention_reference
from specinfer.run.graph import DeviceSteps
from specinfer.run.runner import Runner
from tests.engines import toy_decoder


def test_without_a_gpu_it_refuses_and_says_how_to_try_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="torch sees none here"):
        gpu.resolve_device("cuda")


@pytest.mark.parametrize("tied", [True, False])
def test_a_step_streams_each_weight_once_and_no_embedding_that_is_looked_up(tied: bool) -> None:
    decoder = toy_decoder(tie_word_embeddings=tied)
    count = sum(each.numel() for each in decoder.parameters())
    if not tied:
        count -= decoder.embedding.weight.numel()
    assert gpu.streamed_bytes(decoder) == 4 * count


def test_bars_are_at_least_or_at_most() -> None:
    result = gpu.Result()
    result.judge("at least 2", 2.5, 2.0)
    result.judge("at most 2", 2.5, 2.0, is_most=True)
    assert [bar.is_met for bar in result.bars] == [True, False]


def test_the_kernels_cases_are_what_they_say() -> None:
    """Each request has slots of its own, in a run or not, and a tree behind its prefix."""
    case = Case("three", requests=3, nodes=5, keys=7)
    slots = np.arange(36)
    slots[12:24] = slots[12:24][::-1]
    segments = segments_of(case, slots)
    held = [np.arange(36)[segment.slots] for segment in segments]
    assert np.array_equal(np.sort(np.concatenate(held)), np.arange(36))
    assert [isinstance(segment.slots, slice) for segment in segments] == [True, False, True]
    q, pages = torch.randn(15, 2, 4), torch.randn(2, 36, 4)
    assert torch.isfinite(attention_reference(q, pages, pages, segments, 0.5)).all()


@torch.inference_mode()
def test_both_kinds_of_steps_compute_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(layers, "_TURNS", 1)
    decoder = toy_decoder(max_position_embeddings=256)
    runner = Runner(decoder.cuda() if torch.cuda.is_available() else decoder, 160)
    for layer in range(decoder.architecture.num_layers):
        for pages in runner.pool.layer(layer):
            pages.zero_()
    ours, plain = (
        steps_of(kind, runner).run([tree_span(4, runner.vocab_size)])
        for kind in (DeviceSteps, PlainSteps)
    )
    torch.testing.assert_close(ours, plain, atol=1e-5, rtol=1e-5)
    (row,) = layers.measure_layers(runner, (1,), repeats=1)
    assert row["torch_over_ours"] > 0
