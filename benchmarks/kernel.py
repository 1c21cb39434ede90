"""Attention's kernel on a device: its error, its time, and the bandwidth to hold that against."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from specinfer.ops.attention import Segment, attention_reference
from specinfer.ops.triton_attention import TritonPlan, lay_out
from specinfer.run.graph import CudaCapture


@dataclass(frozen=True, slots=True)
class KernelSize:
    """What the kernel is measured on.

    copy_bytes  of the copy that bandwidth is told by
    keys        of all requests together, too many for a GPU's cache
    heads, kv_heads, head_dim  of the layer
    repeats     timed runs of a kernel or a copy
    """

    copy_bytes: int = 4 * 2**30
    keys: int = 2**16
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    repeats: int = 30

    @property
    def num_groups(self) -> int:
        """Query heads per KV head."""
        return self.heads // self.kv_heads


def timed(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Seconds that one run takes on the device, the median; the first two do not count."""
    seconds: list[float] = []
    for turn in range(repeats + 2):
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            end.synchronize()
            passed = begin.elapsed_time(end) / 1e3
        else:
            start = time.perf_counter()
            run()
            passed = time.perf_counter() - start
        if turn >= 2:
            seconds.append(passed)
    return statistics.median(seconds)


def copy_bandwidth(size: KernelSize, device: torch.device) -> float:
    """Bytes per second, read and written, of a large copy on the device."""
    source = torch.empty(size.copy_bytes, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    seconds = timed(lambda: target.copy_(source), device, size.repeats)
    return 2 * size.copy_bytes / seconds


class Case(NamedTuple):
    """A batch for the attention kernel: equal requests, each a prefix and a binary tree."""

    name: str
    requests: int
    nodes: int
    keys: int


def segments_of(case: Case, slots: np.ndarray) -> list[Segment]:
    """Every other request's slots are one run, the others' are those of `slots` in their place."""
    mask = np.eye(case.nodes, dtype=np.bool_)
    for node in range(1, case.nodes):
        mask[node] |= mask[(node - 1) // 2]
    positions = (case.keys - 1 + mask.sum(1)).tolist()
    segments, size = [], case.keys + case.nodes
    for request in range(case.requests):
        own: slice | np.ndarray = slice(request * size, (request + 1) * size)
        if request % 2:
            own = slots[own]
        segments.append(Segment(case.nodes, own, case.keys, mask, positions, positions))
    return segments


def measure_kernel(
    size: KernelSize, device: torch.device, bandwidth: float
) -> list[dict[str, Any]]:
    """Error and time of tree attention in bfloat16.

    bandwidth  bytes per second, for the share of it that streaming K and V once comes to
    """
    cases = (
        Case("one node", 1, 1, size.keys),
        Case("32 nodes", 1, 33, size.keys),
        Case("128 nodes", 1, 129, size.keys),
        Case("8 requests, 16 nodes", 8, 17, size.keys // 8),
        Case("64 requests, one node", 64, 1, size.keys // 64),
    )
    return [_measure_case(case, size, device, bandwidth) for case in cases]


def _measure_case(
    case: Case, size: KernelSize, device: torch.device, bandwidth: float
) -> dict[str, Any]:
    generator = torch.Generator(device).manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, generator=generator).bfloat16()

    each = case.keys + case.nodes
    q = random(case.requests * case.nodes, size.heads, size.head_dim)
    k, v = random(2, size.kv_heads, case.requests * each, size.head_dim)
    slots = np.arange(case.requests * each)
    for request in range(1, case.requests, 2):
        np.random.default_rng(request).shuffle(slots[request * each : (request + 1) * each])
    segments, scale, num_groups = segments_of(case, slots), size.head_dim**-0.5, size.num_groups
    layout = lay_out(segments, num_groups, len(q))
    meta = torch.from_numpy(layout.meta).to(device)
    run = partial(TritonPlan(layout, meta, scale=scale, num_groups=num_groups), q, k, v)
    expected = attention_reference(q.float(), k, v, segments, scale)
    error = float((run().float() - expected).norm() / expected.norm())
    # A replay has no gaps in which the GPU waits for the host.
    timed_run = CudaCapture(device)(run) if device.type == "cuda" else run
    seconds = timed(timed_run, device, size.repeats)
    return {
        "case": case.name,
        "keys": case.keys,
        "error": error,
        "us": seconds * 1e6,
        "share_of_bandwidth": (k.nbytes + v.nbytes) / seconds / bandwidth,
    }
