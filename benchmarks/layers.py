"""A GPU's step with our kernels between its products, and the same by PyTorch's operators."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.kernel import timed
from benchmarks.roofline import tree_span
from specinfer.bench import Spread
from specinfer.ops.triton_attention import TritonPlan
from specinfer.run.graph import Capture, CudaCapture, DeviceSteps, Replay, Shape
from specinfer.run.runner import Runner

_TURNS = 5


class PlainSteps(DeviceSteps):
    """Steps by PyTorch's operators around the same attention."""

    def _compute(
        self, shape: Shape, numbers: Tensor, plan: TritonPlan, picked: Tensor | None = None
    ) -> Tensor:
        sizes = (*(shape.num_tokens,) * 3, shape.num_rows)
        tokens, positions, slots, rows = numbers[: sum(sizes)].long().split(sizes)
        windows = self._decoder.architecture.windows

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self._pool.write(layer, slots, k, v)
            return plan(q, *self._pool.layer(layer), windows[layer])

        tokens = tokens if picked is None else picked
        hidden = self._decoder.forward(tokens, positions, attend)
        return self._decoder.logits(hidden.index_select(0, rows))


def steps_of(kind: type[DeviceSteps], runner: Runner) -> DeviceSteps:
    """Steps of a model over its runner's pages, the last slot for padding.

    On a processor it is a trial: kernels are interpreted, and nothing is captured.
    """
    is_gpu = runner.device.type == "cuda"
    capture: Capture = CudaCapture(runner.device) if is_gpu else _repeat
    return kind(
        runner.decoder,
        runner.pool,
        scratch=runner.pool.num_slots - 1,
        num_programs=64 if is_gpu else 1,
        capture=capture,
    )


def _repeat(step: Callable[[], object]) -> Replay:
    def replay() -> None:
        step()

    return replay


@torch.inference_mode()
def measure_layers(runner: Runner, nodes: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """Milliseconds of one request's steps in turns, their ratio, and what each launches.

    repeats  timed steps of either kind in a turn
    """
    ours, plain = (steps_of(kind, runner) for kind in (DeviceSteps, PlainSteps))
    rows = []
    for count in nodes:
        span = tree_span(count, runner.vocab_size)
        runs = [partial(steps.run, [span]) for steps in (ours, plain)]
        turns = [[timed(run, runner.device, repeats) for run in runs] for _ in range(_TURNS)]
        rows.append(
            {
                "nodes": count,
                "ours_ms": 1e3 * Spread.of([own for own, _ in turns]).median,
                "torch_ms": 1e3 * Spread.of([theirs for _, theirs in turns]).median,
                "torch_over_ours": Spread.of([theirs / own for own, theirs in turns]).median,
                "our_launches": launches(runs[0], runner.device),
                "torch_launches": launches(runs[1], runner.device),
            }
        )
    return rows


def launches(run: Callable[[], object], device: torch.device) -> int:
    """Kernels and copies that a run puts on the device; 0 on a processor."""
    if device.type != "cuda":
        return 0
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        run()
        torch.cuda.synchronize(device)
    return sum(event.device_type.name == "CUDA" for event in seen.events() or ())
