"""A model's steps on a GPU: one small copy in, then a captured graph of all kernels.

What changes from step to step stands in one array of int32, so that a graph reads it from where it
was captured:

    ┌────────┬───────────┬───────┬─────────────┬───────────────────────────────┐
    │ tokens │ positions │ slots │ logits rows │ attention's layout (ops/)     │
    └────────┴───────────┴───────┴─────────────┴───────────────────────────────┘

Steps of up to `LADDER[-1]` tokens are padded to the next size of the ladder, and captured when a
size is first met. Padding attends to nothing, writes to a slot of its own and is cut off. Larger
steps run kernel by kernel: the GPU is busy long enough for the host to keep ahead.
"""

from collections.abc import Callable
from collections.abc import Sequence as ListLike
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from specinfer.cache.pool import KVPool
from specinfer.models.decoder import Decoder
from specinfer.ops.triton_attention import Layout, TritonPlan, partial_sums
from specinfer.ops.triton_attention import lay_out as lay_out_attention
from specinfer.ops.triton_layers import Places
from specinfer.run.batch import Flat, Span, lay_out, slots_of
from specinfer.run.fused import FusedOps

LADDER = (0, 1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Numbers of tokens, and of logits' rows, that steps are padded to."""

_PROGRAMS_PER_CORE = 4
"""Attention programs in a graph, per multiprocessor; each takes one work item after the other."""

_PARTIAL_ROWS = 8192
"""Room for the sums of split prefixes in a graph: 64 requests of 4 heads a group and 8,192 keys."""

_SPARE_NUMBERS = 2**16
"""Room in a graph's array beside a slot table of the whole cache."""

Replay = Callable[[], None]
Capture = Callable[[Callable[[], object]], Replay]
"""capture(step) -> replay, which does anew what the step did, with the same tensors."""


class Shape(NamedTuple):
    """What a captured step is fixed to: tokens, rows of logits, rows of an attention tile."""

    num_tokens: int
    num_rows: int
    tile: int


def padded(count: int) -> int | None:
    """The size of the ladder that holds so many; None: there is none."""
    return next((size for size in LADDER if size >= count), None)


def pack(
    flat: Flat, layout: Layout, shape: Shape, scratch: int
) -> tuple[npt.NDArray[np.int32], int]:
    """A step's numbers in one array, and where attention's begin: at a multiple of 16 bytes.

    scratch  the slot that padding writes to
    """
    start = -(-(3 * shape.num_tokens + shape.num_rows) // 4) * 4
    numbers = np.zeros(start + len(layout.meta), np.int32)
    front = numbers[: 3 * shape.num_tokens].reshape(3, shape.num_tokens)
    count = len(flat.tokens)
    front[0, :count] = flat.tokens
    front[1, :count] = flat.positions
    front[2, :count] = slots_of(flat.writes)
    front[2, count:] = scratch
    numbers[3 * shape.num_tokens :][: len(flat.rows)] = flat.rows
    numbers[start:] = layout.meta
    return numbers, start


class DeviceSteps:
    """Runs one decoder over its pages on a GPU."""

    def __init__(
        self,
        decoder: Decoder,
        pool: KVPool,
        *,
        scratch: int,
        num_programs: int,
        capture: Capture,
    ) -> None:
        """Prepare, without capturing anything yet.

        scratch       a slot that nobody else writes to
        num_programs  attention programs per KV head in a captured step
        """
        a = decoder.architecture
        self._decoder = decoder
        self._pool = pool
        self._scratch = scratch
        self._num_programs = num_programs
        self._capture = capture
        self._num_groups = a.num_heads // a.num_kv_heads
        self._numbers = torch.zeros(
            scratch + _SPARE_NUMBERS, dtype=torch.int32, device=decoder.device
        )
        self._partials = partial_sums(_PARTIAL_ROWS, a.num_kv_heads, a.head_dim, decoder.device)
        # Of all graphs: each would keep a result of its own otherwise.
        self._logits = torch.empty(
            (LADDER[-1], a.vocab_size), dtype=torch.float32, device=decoder.device
        )
        # A text has a slot for each position, and none behind those the model was built for.
        tables = decoder.rotary.table(min(scratch, a.max_position_embeddings))
        self._cos, self._sin = (table.to(decoder.device) for table in tables)
        self._graphs: dict[Shape, Replay] = {}

    def run(self, spans: ListLike[Span]) -> Tensor:
        """Compute spans as `Runner.run` does; the result is the caller's own."""
        flat = lay_out(spans)
        assert max(flat.positions, default=0) < len(self._cos)
        num_tokens, num_rows = padded(len(flat.tokens)), padded(len(flat.rows))
        if num_tokens is None or num_rows is None:
            return self._run_eagerly(flat)
        layout = lay_out_attention(flat.segments, self._num_groups, num_tokens)
        shape = Shape(num_tokens, num_rows, layout.tile)
        numbers, start = pack(flat, layout, shape, self._scratch)
        if len(numbers) > len(self._numbers) or layout.num_partials > _PARTIAL_ROWS:
            return self._run_eagerly(flat)
        self._numbers[: len(numbers)].copy_(torch.from_numpy(numbers), non_blocking=True)
        replay = self._graphs.get(shape)
        if replay is None:
            plan = self._plan(layout, self._numbers[start:], self._num_programs, self._partials)
            logits = self._logits[:num_rows]
            replay = self._capture(lambda: logits.copy_(self._compute(shape, self._numbers, plan)))
            self._graphs[shape] = replay
        replay()
        return self._logits[: len(flat.rows)].clone()  # the next replay writes there

    def _run_eagerly(self, flat: Flat) -> Tensor:
        layout = lay_out_attention(flat.segments, self._num_groups, len(flat.tokens))
        shape = Shape(len(flat.tokens), len(flat.rows), layout.tile)
        numbers, start = pack(flat, layout, shape, self._scratch)
        on_device = torch.from_numpy(numbers).to(self._decoder.device, non_blocking=True)
        return self._compute(shape, on_device, self._plan(layout, on_device[start:])).float()

    def _plan(
        self,
        layout: Layout,
        meta: Tensor,
        num_programs: int | None = None,
        partials: tuple[Tensor, Tensor] | None = None,
    ) -> TritonPlan:
        return TritonPlan(
            layout,
            meta,
            scale=self._decoder.architecture.scale,
            num_groups=self._num_groups,
            num_programs=num_programs,
            partials=partials,
        )

    def _compute(self, shape: Shape, numbers: Tensor, plan: TritonPlan) -> Tensor:
        """[shape.num_rows, vocab], from nothing but what stands in `numbers`."""
        sizes = (*(shape.num_tokens,) * 3, shape.num_rows)
        tokens, positions, slots, rows = numbers[: sum(sizes)].split(sizes)
        ops = FusedOps(
            pool=self._pool,
            plan=plan,
            windows=self._decoder.architecture.windows,
            places=Places(positions, slots, self._cos, self._sin),
            rows=rows,
        )
        return self._decoder.scores(self._decoder.run_layers(tokens, ops))


def device_steps(decoder: Decoder, pool: KVPool, *, scratch: int) -> DeviceSteps | None:
    """How a decoder's steps run where it is; None: on a processor, by `AttentionPlan`."""
    if decoder.device.type != "cuda":
        return None
    num_cores = torch.cuda.get_device_properties(decoder.device).multi_processor_count
    kv_heads = decoder.architecture.num_kv_heads
    return DeviceSteps(
        decoder,
        pool,
        scratch=scratch,
        num_programs=-(-_PROGRAMS_PER_CORE * num_cores // kv_heads),
        capture=CudaCapture(decoder.device),
    )


class CudaCapture:
    """Captures steps as CUDA graphs that share one pool of memory."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._memory = torch.cuda.graph_pool_handle()

    def __call__(self, step: Callable[[], object]) -> Replay:
        """Capture a step, which computes nothing yet.

        Warmed up beside the current stream: a capture may neither compile nor try algorithms out.
        """
        with torch.cuda.device(self._device):
            current, side = torch.cuda.current_stream(), torch.cuda.Stream()
            side.wait_stream(current)
            with torch.cuda.stream(side):
                for _ in range(2):
                    step()
            current.wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            # Thread-local: what other threads do with CUDA does not break the capture.
            with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
                step()
        return graph.replay
