"""One model with its pages: spans in, logits out. The only place that sees both."""

from collections.abc import Sequence

import torch
from torch import Tensor

from specinfer.cache.pool import KVPool
from specinfer.models.decoder import Decoder
from specinfer.ops.attention import AttentionPlan
from specinfer.run.batch import Level, Span, flatten
from specinfer.run.graph import device_steps
from specinfer.run.native import native_steps


class Runner:
    """Runs one decoder over pages of its own; slots are numbered by whoever allocates blocks."""

    def __init__(self, decoder: Decoder, num_slots: int) -> None:
        architecture = decoder.architecture
        self.decoder = decoder
        self.device = decoder.device
        self.vocab_size = architecture.vocab_size
        self.pool = KVPool(
            num_layers=architecture.num_layers,
            kv_heads=architecture.num_kv_heads,
            # On a GPU one more, which takes what padded steps write.
            num_slots=num_slots + (self.device.type == "cuda"),
            head_dim=architecture.head_dim,
            dtype=decoder.dtype,
            device=decoder.device,
        )
        self._device_steps = device_steps(decoder, self.pool, scratch=num_slots)
        self.native = native_steps(decoder, self.pool)
        """What runs whole steps by our own kernels, where they are."""

    def run(self, spans: Sequence[Span]) -> Tensor:
        """Compute the spans' tokens and store their K and V.

        returns  [rows, vocab] float32: the spans' last `num_logits` tokens, one span after the
                 other
        """
        if self.native is not None:
            return self.native.run(spans)
        return self._run(spans)

    @property
    def runs_levels(self) -> bool:
        """Whether levels of trees may be computed at once."""
        return self._device_steps is not None

    @torch.inference_mode()
    def run_levels(self, levels: Sequence[Level], vocab_size: int) -> list[list[list[int]]] | None:
        """See `DeviceSteps.run_levels`; None on a processor too."""
        if self._device_steps is None:
            return None
        return self._device_steps.run_levels(levels, vocab_size)

    @torch.inference_mode()  # entering it takes longer than all that `NativeSteps` does in Python
    def _run(self, spans: Sequence[Span]) -> Tensor:
        if self._device_steps is not None:
            return self._device_steps.run(spans)
        batch = flatten(spans, self.device)
        architecture = self.decoder.architecture
        plan = AttentionPlan(
            batch.segments,
            scale=architecture.scale,
            num_groups=architecture.num_heads // architecture.num_kv_heads,
            dtype=self.decoder.dtype,
            device=self.device,
        )

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self.pool.write(layer, batch.slots, k, v)
            return plan(q, *self.pool.layer(layer), architecture.windows[layer])

        hidden = self.decoder.forward(batch.tokens, batch.positions, attend)
        if batch.logits_rows is not None:
            hidden = hidden[batch.logits_rows]
        return self.decoder.logits(hidden)
