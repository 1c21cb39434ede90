"""A model's steps on a GPU: one small copy in, then a captured graph of all kernels.

What changes from step to step stands in one array of int32, so that a graph reads it from where it
was captured:

    ┌────────┬───────────┬───────┬─────────────┬───────────────────────────────┐
    │ tokens │ positions │ slots │ logits rows │ attention's layout (ops/)     │
    └────────┴───────────┴───────┴─────────────┴───────────────────────────────┘

Steps of up to `LADDER[-1]` tokens are padded to the next size of the ladder, and captured when a
size is first met. Padding attends to nothing, writes to a slot of its own and is cut off. Larger
steps run kernel by kernel: the GPU is busy long enough for the host to keep ahead.

Trees of a form that is known beforehand take one graph for all their levels. What has a fixed size
stands in front, where a graph finds it; of a level's layout only the header:

    ┌─────────────────────────┬─────────────────────────┬───┬──────────────────┬───┐
    │ level 0: the same, and  │ level 1: picks' places  │ … │ the layouts'     │ … │
    │ temperatures, a header  │ instead of tokens       │   │ rests, 0, 1, …   │   │
    └─────────────────────────┴─────────────────────────┴───┴──────────────────┴───┘
"""

from collections.abc import Callable
from collections.abc import Sequence as ListLike
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from specinfer.cache.pool import KVPool
from specinfer.logits import RowFilters, target_laws
from specinfer.models.decoder import Decoder
from specinfer.ops.transfer import to_host
from specinfer.ops.triton_attention import HEADER, Layout, TritonPlan, partial_sums
from specinfer.ops.triton_attention import lay_out as lay_out_attention
from specinfer.ops.triton_layers import Places
from specinfer.run.batch import Flat, Level, Span, lay_out, slots_of
from specinfer.run.fused import FusedOps

LADDER = (0, 1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256)
"""Numbers of tokens, and of logits' rows, that steps are padded to."""

_PROGRAMS_PER_CORE = 4
"""Attention programs in a graph, per multiprocessor; each takes one work item after the other."""

_PARTIAL_ROWS = 8192
"""Room for the sums of split prefixes in a graph: 64 requests of 4 heads a group and 8,192 keys."""

_MOST_LEVEL_GRAPHS = 128
"""Graphs of whole trees: each mix of padded levels is one, and batches of ragged trees have many
thousands. The ladder bounds those of single steps."""

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


class LevelPlace(NamedTuple):
    """A level in an array of several: its form, and where it stands.

    start   of its tokens
    header  of its attention's layout
    """

    shape: Shape
    width: int
    start: int
    header: int
    layout: Layout


def padded(count: int) -> int | None:
    """The size of the ladder that holds so many; None: there is none."""
    return next((size for size in LADDER if size >= count), None)


def pack(
    flat: Flat, layout: Layout, shape: Shape, scratch: int
) -> tuple[npt.NDArray[np.int32], int]:
    """A step's numbers in one array, and where attention's begin: at a multiple of 16 bytes.

    scratch  the slot that padding writes to
    """
    start = _aligned(3 * shape.num_tokens + shape.num_rows)
    numbers = np.zeros(start + len(layout.meta), np.int32)
    _write(numbers, flat, shape.num_tokens, scratch)
    numbers[start:] = layout.meta
    return numbers, start


def _aligned(count: int) -> int:
    return -(-count // 4) * 4


def _write(numbers: npt.NDArray[np.int32], flat: Flat, num_tokens: int, scratch: int) -> None:
    """Tokens, positions, slots and rows, padded, into zeros."""
    front = numbers[: 3 * num_tokens].reshape(3, num_tokens)
    count = len(flat.tokens)
    front[0, :count] = flat.tokens
    front[1, :count] = flat.positions
    front[2, :count] = slots_of(flat.writes)
    front[2, count:] = scratch
    numbers[3 * num_tokens :][: len(flat.rows)] = flat.rows


def pack_levels(
    levels: ListLike[Level], num_groups: int, scratch: int
) -> tuple[npt.NDArray[np.int32], list[LevelPlace]] | None:
    """The numbers of several levels in one array; None: one is more than the ladder holds.

    Where each level and its header stand depends on the levels' padded sizes alone.
    """
    flats = [lay_out(level.spans) for level in levels]
    sizes, starts, headers, stop = list[tuple[int, int]](), list[int](), list[int](), 0
    for flat in flats:
        num_tokens, num_rows = padded(len(flat.tokens)), padded(len(flat.rows))
        if num_tokens is None or num_rows is None:
            return None
        sizes.append((num_tokens, num_rows))
        starts.append(stop)
        headers.append(stop + _aligned(3 * num_tokens + 2 * num_rows))
        stop = headers[-1] + HEADER
    places, rests = [], []
    for level, flat, size, start, header in zip(levels, flats, sizes, starts, headers, strict=True):
        layout = lay_out_attention(flat.segments, num_groups, size[0], stop - header)
        places.append(LevelPlace(Shape(*size, layout.tile), level.width, start, header, layout))
        rests.append(layout.meta[HEADER:])
        stop += len(rests[-1])
    numbers = np.zeros(stop, np.int32)
    numbers[headers[-1] + HEADER :] = np.concatenate(rests)
    for level, flat, place in zip(levels, flats, places, strict=True):
        front = numbers[place.start : place.header]
        _write(front, flat, place.shape.num_tokens, scratch)
        counts = [span.num_logits for span in level.spans]
        temperatures = np.ones(place.shape.num_rows, np.float32)
        temperatures[: len(flat.rows)] = np.repeat(level.temperatures, counts)
        at = 3 * place.shape.num_tokens + place.shape.num_rows
        front[at : at + len(temperatures)] = temperatures.view(np.int32)
        numbers[place.header : place.header + HEADER] = place.layout.meta[:HEADER]
    return numbers, places


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
        # The one that was used last stands last
        self._level_graphs: dict[object, tuple[Replay, Tensor]] = {}

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

    def run_levels(self, levels: ListLike[Level], vocab_size: int) -> list[list[list[int]]] | None:
        """Compute trees' levels one after the other, each level's tokens picked by the one above.

        vocab_size  tokens that may be picked: those below
        returns     per level [rows, width]: the likeliest tokens after each row, in order, -1 where
                    their probability is 0; None: no graph holds so much, and nothing was done
        cost        one copy in, one replay and one copy out; a capture where the levels' sizes are
                    none of the last `_MOST_LEVEL_GRAPHS` mixes
        """
        last = max(max(span.positions) for level in levels for span in level.spans)
        assert last < len(self._cos)
        packed = pack_levels(levels, self._num_groups, self._scratch)
        if packed is None or len(packed[0]) > len(self._numbers):
            return None
        numbers, places = packed
        if max(place.layout.num_partials for place in places) > _PARTIAL_ROWS:
            return None
        self._numbers[: len(numbers)].copy_(torch.from_numpy(numbers), non_blocking=True)
        key = vocab_size, *[(place.shape, place.width) for place in places]
        captured = self._level_graphs.pop(key, None)
        if captured is None:
            if len(self._level_graphs) == _MOST_LEVEL_GRAPHS:
                del self._level_graphs[next(iter(self._level_graphs))]
            captured = self._capture_levels(places, vocab_size)
        self._level_graphs[key] = replay, found = captured
        replay()
        (picks,) = to_host(found)
        answers, start = [], 0
        for level, place in zip(levels, places, strict=True):
            stop = start + place.shape.num_rows * place.width
            num_rows = sum([span.num_logits for span in level.spans])
            answers.append(picks[start:stop].reshape(-1, place.width)[:num_rows].tolist())
            start = stop
        return answers

    def _capture_levels(
        self, places: ListLike[LevelPlace], vocab_size: int
    ) -> tuple[Replay, Tensor]:
        """A graph of levels, and where it leaves all their picks, one level behind the other."""
        sizes = [place.shape.num_rows * place.width for place in places]
        found = torch.empty(sum(sizes), dtype=torch.int32, device=self._decoder.device)
        plans = [
            self._plan(
                place.layout, self._numbers[place.header :], self._num_programs, self._partials
            )
            for place in places
        ]

        def step() -> None:
            above: Tensor | None = None
            for place, plan, own in zip(places, plans, found.split(sizes), strict=True):
                own.copy_(self._pick(place, plan, above, vocab_size).flatten())
                above = own

        return self._capture(step), found

    def _pick(
        self, place: LevelPlace, plan: TritonPlan, above: Tensor | None, vocab_size: int
    ) -> Tensor:
        """[rows, width] int64: a level's picks, by those of the level above."""
        numbers, shape = self._numbers[place.start : place.header], place.shape
        tokens = None
        if above is not None:  # what stands under a token that cannot come is dropped afterwards
            tokens = above.index_select(0, numbers[: shape.num_tokens]).clamp(min=0)
        scores = self._compute(shape, numbers, plan, tokens)[:, :vocab_size]
        at = 3 * shape.num_tokens + shape.num_rows
        filters = RowFilters(
            num_rows=shape.num_rows,
            temperature=numbers[at : at + shape.num_rows].view(torch.float32)[:, None],
            temperatures=(0.0,),  # any may come: the cold are treated as such where they are
        )
        top = target_laws(scores, filters).topk(place.width, -1)
        return torch.where(top.values > 0, top.indices, -1)

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

    def _compute(
        self, shape: Shape, numbers: Tensor, plan: TritonPlan, picked: Tensor | None = None
    ) -> Tensor:
        """[shape.num_rows, vocab], from nothing but what stands in `numbers`.

        picked  the tokens, where they stand elsewhere
        """
        sizes = (*(shape.num_tokens,) * 3, shape.num_rows)
        tokens, positions, slots, rows = numbers[: sum(sizes)].split(sizes)
        ops = FusedOps(
            pool=self._pool,
            plan=plan,
            windows=self._decoder.architecture.windows,
            places=Places(positions, slots, self._cos, self._sin),
            rows=rows,
        )
        tokens = tokens if picked is None else picked
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
