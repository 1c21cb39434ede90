"""The one decoder: target, drafter, training and every test run this file.

Tokens are ragged and flat: no batch dimension, no cache, no mask. Attention is an argument and
closes over pages and mask (or over nothing, in a test), so a chain and a tree look alike here.
"""

from collections.abc import Callable

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
        self.activation = ACTIVATIONS[a.activation]

    def forward(
        self, layer: int, hidden: Tensor, cos: Tensor, sin: Tensor, attend: Attend
    ) -> Tensor:
        """Map hidden [n, hidden] to the next; cos, sin as `Rotary` gives them."""
        n, heads, kv_heads = hidden.shape[0], self.num_heads, self.num_kv_heads
        qkv = self.qkv.forward(self.attention_norm.forward(hidden)).view(
            n, heads + 2 * kv_heads, self.head_dim
        )
        qk, v = qkv[:, : heads + kv_heads], qkv[:, heads + kv_heads :]
        if self.q_norm is not None and self.k_norm is not None:
            qk = torch.cat((self.q_norm(qk[:, :heads]), self.k_norm(qk[:, heads:])), 1)
        qk = rotate(qk, cos, sin)
        mixed = attend(layer, qk[:, :heads], qk[:, heads:], v)
        hidden = hidden + self.output.forward(mixed.reshape(n, heads * self.head_dim))
        gate, up = self.gate_up.forward(self.mlp_norm.forward(hidden)).chunk(2, -1)
        return torch.add(hidden, self.down.forward(self.activation(gate) * up))


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
        """Run the layers over flat tokens of any sequences.

        tokens, positions  [n] int64
        returns            [n, hidden], after the final norm
        """
        if self._rows is not None:
            hidden = self._rows.rows(tokens)
        else:
            hidden = F.embedding(tokens, self.embedding.weight)
        cos, sin = self.rotary(positions, hidden.dtype)
        for layer, module in enumerate(self.layers):
            hidden = module.forward(layer, hidden, cos, sin, attend)
        return self.norm(hidden)  # type: ignore[no-any-return]

    def logits(self, hidden: Tensor) -> Tensor:
        """Score the next token: hidden [m, hidden] -> [m, vocab] float32."""
        if self.lm_head is not None:
            return self.lm_head.forward(hidden, torch.float32)
        if self.tied_head is not None:
            return self.tied_head.multiply(hidden, dtype=torch.float32)
        return F.linear(hidden, self.embedding.weight).float()

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
