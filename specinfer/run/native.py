"""A model's steps on a processor with kernels of our own: one call from tokens to logits."""

import ctypes
import struct
from array import array
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from specinfer.cache.pool import KVPool
from specinfer.models.decoder import Decoder, DecoderLayer
from specinfer.models.layers import Linear, RMSNorm
from specinfer.ops.native import (
    ACTIVATIONS,
    Growing,
    Kernels,
    Layer,
    Model,
    NativeWeight,
    Place,
    Step,
    Weight,
    address,
    can_attend,
    kernels,
)
from specinfer.ops.native.segments import SegmentTable
from specinfer.ops.packed import PackedWeight
from specinfer.run.batch import Flat, Span, cut, lay_out

# Structures of growth.h, field by field
_OFFER = struct.Struct("=6qd")
_PASS = struct.Struct("=2qd")

_MOST_TOKENS = 256
"""Tokens computed at once. What a step needs on the way, some 60 KB a token at the 1B cost, is kept
from step to step; so many tokens are bound by arithmetic, and more of them gain nothing."""

_FIRST_POSITIONS = 1024
"""Positions whose angles are computed at first; then twice as many whenever more are needed."""


class NativeSteps:
    """Runs one decoder over its pages by `ops/native`."""

    def __init__(self, decoder: Decoder, pool: KVPool, kernels: Kernels) -> None:
        a = decoder.architecture
        self._run_step, self._grow = kernels.step, kernels.grow
        self.identity = kernels.identity
        self._decoder, self._pool = decoder, pool
        # What the structures point into: parameters may be given other memory.
        self._kept = [each.detach() for each in decoder.parameters()]
        self._windows = sorted(set(a.windows), key=lambda window: (window is not None, window))
        layers = (Layer * a.num_layers)()
        for index, module in enumerate(decoder.layers):
            assert isinstance(module, DecoderLayer)
            layers[index] = self._layer(module, pool.layer(index))
            layers[index].plan = self._windows.index(a.windows[index])
        self._layers = layers
        head = decoder.tied_head if decoder.lm_head is None else decoder.lm_head.packed
        self._model = Model(
            is_bfloat16=decoder.dtype == torch.bfloat16,
            num_layers=a.num_layers,
            hidden=a.hidden_size,
            heads=a.num_heads,
            kv_heads=a.num_kv_heads,
            head_dim=a.head_dim,
            inner=a.intermediate_size,
            activation=ACTIVATIONS.index(a.activation),
            slots=pool.num_slots,
            eps=a.norm_eps,
            scale=a.scale,
            layers=layers,
            norm=_address(decoder.norm),
            embedding=None if decoder.is_tied else decoder.embedding.weight.data_ptr(),
            head=_weight(head),
        )
        self._vocab_size = a.vocab_size
        self.seconds: npt.NDArray[np.float64] | None = None
        """Where `ops.native.PARTS` of steps are added up, or None: not measured."""
        self._make_angles(_FIRST_POSITIONS)

    @staticmethod
    def _layer(module: DecoderLayer, pages: tuple[Tensor, Tensor]) -> Layer:
        return Layer(
            attention_norm=_address(module.attention_norm),
            mlp_norm=_address(module.mlp_norm),
            q_norm=_address(module.q_norm),
            k_norm=_address(module.k_norm),
            qkv=_weight(module.qkv.packed, module.qkv.bias),
            output=_weight(module.output.packed, module.output.bias),
            gate_up=_weight(module.gate_up.packed, module.gate_up.bias),
            down=_weight(module.down.packed, module.down.bias),
            keys=pages[0].data_ptr(),
            values=pages[1].data_ptr(),
        )

    def run(self, spans: Sequence[Span]) -> Tensor:
        """Compute spans as `Runner.run` does, many tokens part by part.

        raises  IndexError for a token that is none of the vocabulary's, with nothing written
        """
        flat = lay_out(spans)
        logits = np.empty((len(flat.rows), self._vocab_size), np.float32)
        if len(flat.tokens) <= _MOST_TOKENS:
            self._run(flat, logits)
            return torch.from_numpy(logits)
        if not 0 <= min(flat.tokens) <= max(flat.tokens) < self._vocab_size:
            raise self._unknown_token()
        start = 0
        for part in map(lay_out, cut(spans, _MOST_TOKENS)):
            stop = start + len(part.rows)
            self._run(part, logits[start:stop])
            start = stop
        return torch.from_numpy(logits)

    def _run(self, flat: Flat, logits: npt.NDArray[np.float32]) -> None:
        num_tokens, num_rows = len(flat.tokens), len(flat.rows)
        if num_tokens == 0:
            return
        highest = max(flat.positions)
        if highest >= self._num_positions:
            self._make_angles(2 * highest)
        # Arrays of Python's: numpy takes several times as long to make one of so few numbers.
        numbers = array("q", flat.tokens)
        numbers.extend(flat.positions)
        for each in flat.writes:
            run = range(each.start, each.stop) if isinstance(each, slice) else each.tolist()
            numbers.extend(run)
        numbers.extend(flat.rows)
        start, _ = numbers.buffer_info()
        tables = [SegmentTable(flat.segments, window) for window in self._windows]
        plans = array("q", [table.address for table in tables])
        size = 8 * num_tokens
        step = Step(
            num_tokens=num_tokens,
            num_rows=num_rows,
            num_segments=len(flat.segments),
            tokens=start,
            positions=start + size,
            writes=start + 2 * size,
            rows=start + 3 * size,
            cos=self._angles[0],
            sin=self._angles[1],
            plans=plans.buffer_info()[0],
            logits=address(logits),
            seconds=None if self.seconds is None else self.seconds.ctypes.data,
        )
        threads = torch.get_num_threads()
        if not self._run_step(ctypes.byref(self._model), ctypes.byref(step), threads):
            raise self._unknown_token()

    def grow(
        self,
        growing: Growing,
        places: Sequence[tuple[int, slice | npt.NDArray[np.int64]]],
        *,
        num_rounds: int,
        most_rounds: int,
        most_nodes: int,
    ) -> tuple[list[tuple[int, int]], list[tuple[int, int, float]]] | None:
        """Go on with the rounds of growing picked trees, all in one call.

        places       per request, the keys that all its nodes see, and where they and the nodes' own
                     are to stand
        num_rounds   there were already
        most_rounds, most_nodes  there may be, together
        returns      what was expanded, (request, node) in the order of their keys, and per pass its
                     nodes, requests and seconds; None where a model with windows is asked
        raises       IndexError for a token that is none of the vocabulary's
        """
        if self._windows != [None]:
            return None
        highest = max([prefix for prefix, _ in places]) + most_rounds
        if highest >= self._num_positions:
            self._make_angles(2 * highest)
        rows, kept = (Place * len(places))(), []
        for row, (prefix, slots) in zip(rows, places, strict=True):
            row.prefix = prefix
            if isinstance(slots, slice):
                row.start = slots.start
            else:
                kept.append(np.ascontiguousarray(slots, np.int64))
                row.slots = address(kept[-1])
        expanded = ctypes.create_string_buffer(_OFFER.size * most_nodes)
        passes = ctypes.create_string_buffer(_PASS.size * most_rounds)
        count = self._grow(
            *(ctypes.byref(self._model), ctypes.byref(growing), rows, num_rounds, *self._angles),
            *(torch.get_num_threads(), expanded, passes),
        )
        if count < 0:
            raise self._unknown_token()
        told = list(_PASS.iter_unpack(memoryview(passes)[: count * _PASS.size]))
        num_expanded = sum([num_nodes for num_nodes, _, _ in told])
        offers = _OFFER.iter_unpack(memoryview(expanded)[: num_expanded * _OFFER.size])
        return [(request, node) for _, request, node, *_ in offers], told

    def _unknown_token(self) -> IndexError:
        return IndexError(f"token ids must be 0 to {self._vocab_size - 1}")

    def _make_angles(self, num_positions: int) -> None:
        self._num_positions = num_positions
        self._cos, self._sin = self._decoder.rotary.table(num_positions)
        self._angles = self._cos.data_ptr(), self._sin.data_ptr()


def native_steps(decoder: Decoder, pool: KVPool) -> NativeSteps | None:
    """What runs a decoder whose weights are all in our panels; None where some are not."""
    found, a = kernels(), decoder.architecture
    if found is None or decoder.device.type != "cpu":
        return None
    heads = decoder.tied_head if decoder.lm_head is None else decoder.lm_head.packed
    linears = [module.packed for module in decoder.modules() if isinstance(module, Linear)]
    if not all(isinstance(weight, NativeWeight) for weight in (*linears, heads)):
        return None
    if not can_attend(decoder.dtype, a.head_dim, a.num_heads // a.num_kv_heads):
        return None
    return NativeSteps(decoder, pool, found)


def _weight(packed: PackedWeight | None, bias: Tensor | None = None) -> Weight:
    assert isinstance(packed, NativeWeight)
    return packed.with_bias(bias)


def _address(norm: RMSNorm | None) -> int | None:
    return None if norm is None else norm.weight.data_ptr()
