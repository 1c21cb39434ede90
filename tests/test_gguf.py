"""A GGUF file holds the checkpoint's weights in llama.cpp's order, and its tokenizer."""

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.gguf import entries, export, permute_rotary
from benchmarks.inflate import ZOO
from specinfer.errors import UnsupportedModelError
from specinfer.models.architecture import Rope, read_architecture
from specinfer.models.folder import read_config
from specinfer.models.layers import Rotary, rotate

SOURCE = ZOO / "parley-draft"
ARCHITECTURE = read_architecture(read_config(SOURCE))

# Largest error of a weight as a share of its block's largest: half of 127 steps, a whole one of 8
# (the least code has no counterpart), and a float16 scale's rounding
TOLERANCE = {"f32": 0.0, "bf16": 0.0, "q8_0": 0.5 / 127 + 2**-11, "q4_0": 1 / 8 + 2**-11}


def rotate_neighbours(x: Tensor, positions: Tensor, theta: float) -> Tensor:
    """Rotary positions as llama.cpp's "llama" has them: x [n, heads, d], pairs (2i, 2i + 1)."""
    d = x.shape[-1]
    angles = positions[:, None] * theta ** (-torch.arange(0, d, 2) / d)
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones(()), angles)[:, None]).flatten(-2)


def test_permuted_projections_give_the_same_scores_by_the_other_rotation() -> None:
    rng = torch.Generator().manual_seed(0)
    heads, d, n = 3, 8, 5
    x, positions = torch.randn(n, 16, generator=rng), torch.arange(n).double()
    q, k = (torch.randn(heads * d, 16, generator=rng) for _ in range(2))
    cos, sin = Rotary(Rope(), d)(torch.arange(n), torch.float32)
    ours = [rotate((x @ w.T).view(n, heads, d), cos, sin) for w in (q, k)]
    theirs = [
        rotate_neighbours(
            (x @ permute_rotary(w, heads).T).view(n, heads, d), positions.float(), 10000.0
        )
        for w in (q, k)
    ]
    scores = [torch.einsum("nhd,mhd->hnm", *pair) for pair in (ours, theirs)]
    torch.testing.assert_close(*scores, rtol=1e-5, atol=1e-5)
    unpermuted = rotate_neighbours((x @ q.T).view(n, heads, d), positions.float(), 10000.0)
    assert not torch.allclose(torch.einsum("nhd,mhd->hnm", unpermuted, theirs[1]), scores[0])


@pytest.mark.parametrize("kind", ["f32", "bf16", "q8_0", "q4_0"])
def test_weights_survive_the_file(tmp_path: Path, kind: Any) -> None:
    export(SOURCE, tmp_path / "a.gguf", kind)
    found = {each.name: each for each in gguf.GGUFReader(tmp_path / "a.gguf").tensors}
    weights = load_file(SOURCE / "model.safetensors")
    expected = list(entries(ARCHITECTURE))
    assert {entry.name for entry in expected} == set(found)
    assert {entry.source for entry in expected} == set(weights)
    for entry in expected:
        tensor, weight = found[entry.name], weights[entry.source].float()
        if entry.num_heads:
            weight = permute_rotary(weight, entry.num_heads)
        read = gguf.quants.dequantize(tensor.data, tensor.tensor_type).reshape(weight.shape)
        is_matrix = weight.dim() == 2
        stored = tensor.tensor_type.name.lower()
        assert stored == (kind if is_matrix and "embd" not in entry.name else stored)
        largest = weight.abs().max().item()
        tolerance = TOLERANCE[stored] if is_matrix else 0.0
        assert np.abs(read - weight.numpy()).max() <= tolerance * largest * 1.01
    embedding = found["token_embd.weight"].tensor_type.name.lower()
    assert embedding == ("q8_0" if kind == "q4_0" else kind)


def test_the_tokenizer_and_the_sizes_are_in_the_file(tmp_path: Path) -> None:
    export(SOURCE, tmp_path / "a.gguf", "bf16")
    fields = gguf.GGUFReader(tmp_path / "a.gguf").fields
    spec = json.loads((SOURCE / "tokenizer.json").read_text(encoding="utf-8"))
    tokens = fields["tokenizer.ggml.tokens"].contents()
    assert tokens[:4] == ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|pad|>"]
    assert {token: i for i, token in enumerate(tokens)} == spec["model"]["vocab"]
    assert fields["tokenizer.ggml.merges"].contents()[0] == " ".join(spec["model"]["merges"][0])
    # Digits one by one, then GPT-2's expression, is what llama.cpp calls smollm
    assert fields["tokenizer.ggml.pre"].contents() == "smollm"
    assert fields["tokenizer.ggml.eos_token_id"].contents() == 0
    assert fields["tokenizer.ggml.eot_token_id"].contents() == 1
    assert fields["tokenizer.ggml.add_bos_token"].contents() is False
    assert fields["llama.attention.head_count_kv"].contents() == ARCHITECTURE.num_kv_heads
    assert fields["llama.block_count"].contents() == ARCHITECTURE.num_layers


@pytest.mark.parametrize(
    ("file", "changes", "what"),
    [
        ("config.json", {"attention_bias": True}, "biases"),
        ("config.json", {"hidden_act": "gelu"}, "activation"),
        (
            "config.json",
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
            "stretched",
        ),
        ("generation_config.json", {"eos_token_id": [0, 1, 2]}, "3 end tokens"),
        ("tokenizer.json", {"normalizer": {"type": "NFC"}}, "byte-level"),
        ("tokenizer.json", {"pre_tokenizer": {"type": "Whitespace"}}, "splits"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    tmp_path: Path, file: str, changes: dict[str, Any], what: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(SOURCE, folder)
    content = json.loads((folder / file).read_text(encoding="utf-8"))
    (folder / file).write_text(json.dumps(content | changes), encoding="utf-8")
    with pytest.raises(UnsupportedModelError, match=what):
        export(folder, tmp_path / "a.gguf", "f32")
    assert not (tmp_path / "a.gguf").exists()
