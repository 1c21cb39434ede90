"""What stands between a step's matrix products on a GPU: our kernels, over the model's pages."""

from dataclasses import dataclass

from torch import Tensor

from specinfer.cache.pool import KVPool
from specinfer.models.decoder import DecoderLayer
from specinfer.models.layers import RMSNorm
from specinfer.ops.triton_attention import TritonPlan
from specinfer.ops.triton_layers import Places, add_norm, gate, norm_rows, rotate_and_store


@dataclass(frozen=True, slots=True)
class FusedOps:
    """One step's `LayerOps`; it has no gradients.

    places   where the step's tokens stand; their K and V are written there
    rows     [rows] int32, the tokens whose logits are wanted
    windows  `Architecture.windows`
    """

    pool: KVPool
    plan: TritonPlan
    windows: tuple[int | None, ...]
    places: Places
    rows: Tensor

    def add_norm(
        self, hidden: Tensor, update: Tensor | None, norm: RMSNorm
    ) -> tuple[Tensor, Tensor]:
        """See `LayerOps`."""
        return add_norm(hidden, update, norm.weight, norm.eps)

    def attend(self, layer: int, module: DecoderLayer, qkv: Tensor) -> Tensor:
        """See `LayerOps`; K and V go to their pages on the way."""
        pages = self.pool.layer(layer)
        q_norm, k_norm = module.q_norm, module.k_norm
        norms, eps = None, 0.0
        if q_norm is not None and k_norm is not None:
            norms, eps = (q_norm.weight, k_norm.weight), q_norm.eps
        q = rotate_and_store(qkv, self.places, pages, norms, eps)
        return self.plan(q, *pages, self.windows[layer]).flatten(1)

    def gate(self, gate_up: Tensor, activation: str) -> Tensor:
        """See `LayerOps`."""
        return gate(gate_up, activation)

    def finish(self, hidden: Tensor, update: Tensor | None, norm: RMSNorm) -> Tensor:
        """The rows whose logits are wanted, and no other."""
        return norm_rows(hidden, update, norm.weight, norm.eps, self.rows)
