"""The one decoder: target, drafter, training and every test run this file.

Tokens are ragged and flat: no batch dimension, no cache, no mask. Attention is an argument and
closes over pages and mask (or over nothing, in a test), so a chain and a tree look alike here.
"""

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specinfer.models.architecture import Architecture
from specinfer.models.layers import ACTIVATIONS, Linear, RMSNorm, Rotary, rotate
from specinfer.ops.packed import PackedRows, PackedWeight

Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""attend(layer, q, k, v) -> [n, heads, head_dim]

q [n, heads, head_dim], k and v [n, kv_heads, head_dim] are views (strided), q and k are rotated.
Its owner applies `architecture.scale` and `architecture.windows[layer]`.
"""


class LayerOps(Protocol):
    """What stands between the matrix products of one step; n are its tokens.

    `PlainOps` is PyTorch's, on any device and with gradients; `run/fused.py` is ours for a GPU.
    """

    def add_norm(
        self, hidden: Tensor, update: Tensor | None, norm: RMSNorm
    ) -> tuple[Tensor, Tensor]:
        """hidden + update, where there is one, and that normed: [n, hidden] each."""

    def attend(self, layer: int, module: "DecoderLayer", qkv: Tensor) -> Tensor:
        """Norm q and k where the layer does, rotate them, attend.

        qkv      [n, (heads + 2 kv_heads) * head_dim]
        returns  [n, heads * head_dim]
        """

    def gate(self, gate_up: Tensor, activation: str) -> Tensor:
        """activation(gate) * up: [n, 2 inner] -> [n, inner]; names are those of `ACTIVATIONS`."""

    def finish(self, hidden: Tensor, update: Tensor | None, norm: RMSNorm) -> Tensor:
        """`add_norm`'s normed rows, as many of them as are wanted."""


class PlainOps:
    """PyTorch's operators, around an attention that is given q, k and v."""

    def __init__(self, cos: Tensor, sin: Tensor, attend: Attend) -> None:
        """cos, sin as `Rotary` gives them."""
        self._cos, self._sin, self._attend = cos, sin, attend

    def add_norm(
        self, hidden: Tensor, update: Tensor | None, norm: RMSNorm
    ) -> tuple[Tensor, Tensor]:
        """See `LayerOps`."""
        if update is not None:
            hidden = hidden + update
        return hidden, norm.forward(hidden)

    def attend(self, layer: int, module: "DecoderLayer", qkv: Tensor) -> Tensor:
        """See `LayerOps`."""
        n, heads, kv_heads = qkv.shape[0], module.num_heads, module.num_kv_heads
        qkv = qkv.view(n, heads + 2 * kv_heads, module.head_dim)
        qk, v = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
        if module.q_norm is not None and module.k_norm is not None:
            qk = torch.cat((module.q_norm(qk[:, :heads]), module.k_norm(qk[:, heads:])), 1)
        qk = rotate(qk, self._cos, self._sin)
        mixed = self._attend(layer, qk[:, :heads], qk[:, heads:], v)
        return mixed.reshape(n, heads * module.head_dim)

    def gate(self, gate_up: Tensor, activation: str) -> Tensor:
        """See `LayerOps`."""
        gate, up = gate_up.chunk(2, -1)
        return ACTIVATIONS[activation](gate) * up

    def finish(self, hidden: Tensor, update: Tensor | None, norm: RMSNorm) -> Tensor:
        """All rows."""
        return self.add_norm(hidden, update, norm)[1]


class DecoderLayer(nn.Module):
    """Attention and MLP, each normed before and added after.

    The parts run by `.forward`, past their hooks: a module call costs over a microsecond, and a
    small drafter makes dozens in a step of half a millisecond.
    """

    def __init__(self, architecture: Architecture) -> None:
        super().__init__()
        a = architecture
        q, kv = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
        self.num_heads, self.num_kv_heads, self.head_dim = a.num_heads, a.num_kv_heads, a.head_dim
        self.attention_norm = RMSNorm(a.hidden_size, a.norm_eps)
        self.qkv = Linear(a.hidden_size, (q, kv, kv), bias=a.attention_bias)
        self.q_norm = RMSNorm(a.head_dim, a.norm_eps) if a.qk_norm else None
        self.k_norm = RMSNorm(a.head_dim, a.norm_eps) if a.qk_norm else None
        self.output = Linear(q, (a.hidden_size,), bias=a.output_bias)
        self.mlp_norm = RMSNorm(a.hidden_size, a.norm_eps)
        inner = a.intermediate_size
        self.gate_up = Linear(a.hidden_size, (inner, inner), bias=a.mlp_bias)
        self.down = Linear(inner, (a.hidden_size,), bias=a.mlp_bias)
        self.activation = a.activation

    def forward(
        self, layer: int, hidden: Tensor, update: Tensor | None, ops: LayerOps
    ) -> tuple[Tensor, Tensor]:
        """Map hidden [n, hidden], and what the layer before adds to it, to the same of this one.

        The sum is left to whoever norms it, so that both are one pass over memory.
        """
        hidden, rows = ops.add_norm(hidden, update, self.attention_norm)
        mixed = ops.attend(layer, self, self.qkv.forward(rows))
        hidden, rows = ops.add_norm(hidden, self.output.forward(mixed), self.mlp_norm)
        inner = ops.gate(self.gate_up.forward(rows), self.activation)
        return hidden, self.down.forward(inner)


class Decoder(nn.Module):
    """A causal language model: token ids in, hidden states and logits out.

    A new decoder has plain random weights: norms near 1, the rest near 0, biases too, so that a
    test sees every one of them. It can be trained. `load_decoder` makes one that serves.
    """

    def __init__(
        self,
        architecture: Architecture,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.architecture = architecture
        self.quantization: str | None = None
        """How the linears are rounded, by its name in `models.quantization`."""
        self.rotary = Rotary(architecture.rope, architecture.head_dim)
        with torch.device("meta"):
            # Its constructor would fill it at random, and for that import torch's compiler: 1.5 s.
            rows = torch.empty(architecture.vocab_size, architecture.hidden_size)
            self.embedding: nn.Embedding = nn.Embedding.from_pretrained(rows, freeze=False)
            self.layers = nn.ModuleList(
                DecoderLayer(architecture) for _ in range(architecture.num_layers)
            )
            self.norm = RMSNorm(architecture.hidden_size, architecture.norm_eps)
            self.lm_head = (
                None
                if architecture.tied_embeddings
                else Linear(architecture.hidden_size, (architecture.vocab_size,), bias=False)
            )
        self.to(dtype)
        self.tied_head: PackedWeight | None = None
        """The tied embedding, packed for `logits`."""
        self._rows: PackedRows | None = None
        if torch.device(device).type != "meta":
            self.to_empty(device=device)
            self._fill(seed)

    def forward(self, tokens: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Run the layers over flat tokens of any sequences, by PyTorch's operators.

        tokens, positions  [n] int64
        returns            [n, hidden], after the final norm
        """
        cos, sin = self.rotary(positions, self.dtype)
        return self.run_layers(tokens, PlainOps(cos, sin, attend))

    def run_layers(self, tokens: Tensor, ops: LayerOps) -> Tensor:
        """The same by any operators between the products.

        tokens   [n] int64 or int32
        returns  [rows, hidden]: those that `ops.finish` gives
        """
        if self._rows is not None:
            hidden = self._rows.rows(tokens)
        else:
            hidden = F.embedding(tokens, self.embedding.weight)
        update: Tensor | None = None
        for layer, module in enumerate(self.layers):
            hidden, update = module.forward(layer, hidden, update, ops)
        return ops.finish(hidden, update, self.norm)

    def logits(self, hidden: Tensor) -> Tensor:
        """Score the next token: hidden [m, hidden] -> [m, vocab] float32."""
        return self.scores(hidden).float()

    def scores(self, hidden: Tensor) -> Tensor:
        """The logits in the type that the product gives them: float32, or hidden's."""
        head = self.lm_head
        packed = self.tied_head if head is None else head.packed
        if packed is not None:
            return packed.multiply(hidden, dtype=torch.float32)
        return F.linear(hidden, self.embedding.weight if head is None else head.weight)

    def tie(self, weight: PackedRows) -> None:
        """Replace the tied embedding by a packed one, for look-ups and logits alike."""
        del self.embedding.weight
        self.tied_head = self._rows = weight

    @property
    def is_tied(self) -> bool:
        """Whether `tie` was called, so that there is no plain embedding."""
        return self._rows is not None

    @property
    def dtype(self) -> torch.dtype:
        """What hidden states and the attention's q, k, v are."""
        return self.norm.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.norm.weight.device

    @torch.no_grad()
    def _fill(self, seed: int) -> None:
        generator = torch.Generator(self.device).manual_seed(seed)
        for name, parameter in self.named_parameters():
            parameter.normal_(0.0, 0.02, generator=generator)
            if name.endswith("norm.weight"):
                parameter.add_(1.0)
