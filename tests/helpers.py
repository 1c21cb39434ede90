"""What the tests of several modules share: toy configurations, an attention to compare with, and
small questions about trees and laws that production does not ask."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from specinfer.models.architecture import Architecture
from specinfer.tree import Floats, TokenTree

FAMILIES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


def toy_config(family: str = "LlamaForCausalLM", **changes: Any) -> dict[str, Any]:
    """A config.json of a few thousand parameters, with grouped key heads."""
    model_type = {"Llama": "llama", "Mistr": "mistral", "Qwen2": "qwen2", "Qwen3": "qwen3"}
    config = {
        "architectures": [family],
        "model_type": model_type[family[:5]],
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "sliding_window": None,
    }
    return config | changes


def reference_attend(
    architecture: Architecture, lengths: Sequence[int]
) -> Callable[[int, Tensor, Tensor, Tensor], Tensor]:
    """Causal attention over whole sequences that lie one behind the other in the flat tokens.

    lengths  tokens of each sequence; their sum is n
    """
    n = sum(lengths)
    owner = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    index = torch.arange(n)
    causal = (owner[:, None] == owner[None, :]) & (index[None, :] <= index[:, None])

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        assert q.shape == (n, architecture.num_heads, architecture.head_dim)
        assert k.shape == v.shape == (n, architecture.num_kv_heads, architecture.head_dim)
        window = architecture.windows[layer]
        mask = causal if window is None else causal & (index[None, :] > index[:, None] - window)
        groups = architecture.num_heads // architecture.num_kv_heads
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k).float() * architecture.scale
        weights = scores.masked_fill(~mask, -torch.inf).softmax(-1).to(v.dtype)
        return torch.einsum("hqk,khd->qhd", weights, v)

    return attend


def flat_positions(lengths: Sequence[int]) -> Tensor:
    """Positions of sequences that lie one behind the other: 0.. for each."""
    return torch.cat([torch.arange(length) for length in lengths])


def children(tree: TokenTree, node: int) -> list[int]:
    """Distinct children, in the order of their first slot."""
    return list(dict.fromkeys(tree.slots[slot].node for slot in tree.slots_of[node]))


def top_k_tokens(q: Floats, k: int) -> list[int]:
    """The k likeliest tokens, likeliest first, the lowest id first among equals.

    Never one of probability 0, so there may be fewer.
    """
    if k == 1:
        best = int(q.argmax())
        return [best] if q[best] > 0 else []
    least = np.partition(q, -k)[-k] if k < len(q) else 0.0
    tokens = np.flatnonzero((q >= least) & (q > 0))
    order = np.argsort(-q[tokens], kind="stable")[:k]
    return [int(token) for token in tokens[order]]
