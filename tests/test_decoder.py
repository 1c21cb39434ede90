"""Hf: the decoder's logits are transformers' to 1e-5 in float32, for every family and feature."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from specinfer.models.architecture import read_architecture
from specinfer.models.decoder import Decoder
from specinfer.models.layers import Linear, inverse_frequencies
from specinfer.models.weights import load_decoder
from specinfer.ops.linear import can_pack
from tests.helpers import FAMILIES, flat_positions, reference_attend, toy_config

TOLERANCE = 1e-5
LENGTHS = (11, 1, 7, 24)

ROPES = {
    "linear": {"rope_type": "linear", "factor": 3.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    "yarn, scales given": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "beta_fast": 8.0,
        "beta_slow": 2.0,
        "mscale": 1.0,
        "mscale_all_dim": 0.5,
        "truncate": False,
    },
    "yarn, attention factor given": {
        "rope_type": "yarn",
        "factor": 2.0,
        "original_max_position_embeddings": 32,
        "attention_factor": 0.7,
    },
}


def rope(kind: str, theta: float = 10000.0) -> dict:
    return {"rope_parameters": {"rope_theta": theta, **ROPES[kind]}, "max_position_embeddings": 128}


CASES = {
    **{family: toy_config(family) for family in FAMILIES},
    **{f"{family}, tied": toy_config(family, tie_word_embeddings=True) for family in FAMILIES},
    "one key head per head": toy_config(num_key_value_heads=4),
    "biases": toy_config(attention_bias=True, mlp_bias=True),
    "qwen3 biases": toy_config("Qwen3ForCausalLM", attention_bias=True),
    "wide heads": toy_config(head_dim=20),
    "wide normed heads": toy_config("Qwen3ForCausalLM", head_dim=20),
    "gelu": toy_config(hidden_act="gelu"),
    "gelu_pytorch_tanh": toy_config(hidden_act="gelu_pytorch_tanh"),
    "theta": toy_config(rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
    **{kind: toy_config(**rope(kind)) for kind in ROPES},
    "qwen2 yarn": toy_config("Qwen2ForCausalLM", **rope("yarn", 1e6)),
    "qwen3 yarn": toy_config("Qwen3ForCausalLM", **rope("yarn", 1e6)),
    "mistral window": toy_config("MistralForCausalLM", sliding_window=5),
    "mistral window of one": toy_config("MistralForCausalLM", sliding_window=1),
    "qwen2 windows": toy_config(
        "Qwen2ForCausalLM", use_sliding_window=True, sliding_window=5, max_window_layers=1
    ),
    "qwen3 layer types": toy_config(
        "Qwen3ForCausalLM",
        use_sliding_window=True,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
}


def save_random(config: dict, path: Path, seed: int = 0) -> PreTrainedModel:
    """A transformers model whose every parameter is random, saved in `path`."""
    fields = {key: value for key, value in config.items() if key != "model_type"}
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(config["model_type"], **fields), attn_implementation="eager"
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Norms near 1, biases far from 0: transformers starts them where an error is invisible.
            parameter.normal_(0.0, 0.5 if name.endswith("bias") else 0.15, generator=generator)
            if name.endswith("norm.weight"):
                parameter.add_(1.0)
    model.eval()
    model.save_pretrained(path)
    # The file as its owner wrote it, not as transformers filled it in.
    (path / "config.json").write_text(json.dumps(config))
    return model


def padded_logits(model: PreTrainedModel, sequences: list[torch.Tensor]) -> torch.Tensor:
    """Transformers' logits of sequences padded on the left, flattened: [n, vocab]."""
    longest = max(len(tokens) for tokens in sequences)
    batch = torch.zeros(len(sequences), longest, dtype=torch.int64)
    mask = torch.zeros_like(batch)
    for row, tokens in enumerate(sequences):
        batch[row, longest - len(tokens) :] = tokens
        mask[row, longest - len(tokens) :] = 1
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    logits = model(batch, attention_mask=mask, position_ids=positions, use_cache=False).logits
    return logits[mask.bool()]


def flat_logits(decoder: Decoder, sequences: list[torch.Tensor]) -> torch.Tensor:
    lengths = [len(tokens) for tokens in sequences]
    attend = reference_attend(decoder.architecture, lengths)
    return decoder.logits(decoder(torch.cat(sequences), flat_positions(lengths), attend))


def random_sequences(lengths: tuple[int, ...] = LENGTHS) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 61, (length,), generator=generator) for length in lengths]


@pytest.mark.parametrize("name", CASES)
@torch.inference_mode()
def test_logits_are_those_of_transformers(name, tmp_path):
    model = save_random(CASES[name], tmp_path)
    sequences = random_sequences()
    expected = padded_logits(model, sequences)
    assert expected.std() > 0.1, "weights too small to see an error"
    for packed in (False, True):
        logits = flat_logits(load_decoder(tmp_path, packed=packed), sequences)
        assert logits.dtype == torch.float32
        assert (logits - expected).abs().max() <= TOLERANCE
    alone = model(sequences[3][None], use_cache=False).logits[0]
    assert (logits[-24:] - alone).abs().max() <= TOLERANCE


@pytest.mark.parametrize("theta", [1e4, 5e5, 1e6])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
@pytest.mark.parametrize(
    "fields",
    [
        {"rope_type": "linear", "factor": 2.5},
        {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "truncate": False},
        {"rope_type": "yarn", "factor": 16.0, "beta_fast": 16.0, "beta_slow": 2.0},
        {"rope_type": "yarn", "factor": 0.5},
        {"rope_type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.7},
    ],
    ids=str,
)
def test_frequencies_at_real_sizes_are_those_of_transformers(fields, head_dim, theta):
    """Toy heads have too few frequencies to see where a ramp begins."""
    fields = {"original_max_position_embeddings": 8192, "rope_theta": theta, **fields}
    if fields["rope_type"] == "linear":
        del fields["original_max_position_embeddings"]
    config = toy_config(head_dim=head_dim, rope_parameters=fields, max_position_embeddings=32768)
    theirs = AutoConfig.for_model(
        "llama", **{key: value for key, value in config.items() if key != "model_type"}
    )
    expected, factor = ROPE_INIT_FUNCTIONS[fields["rope_type"]](theirs)
    rope = read_architecture(config).rope
    assert torch.allclose(inverse_frequencies(rope, head_dim), expected, rtol=3e-7, atol=0)
    assert rope.attention_factor == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize("name", ["yarn", "llama3", "linear"])
@torch.inference_mode()
def test_positions_past_the_first_training(name, tmp_path):
    model = save_random(CASES[name], tmp_path)
    sequences = random_sequences((100,))
    difference = flat_logits(load_decoder(tmp_path), sequences) - padded_logits(model, sequences)
    assert difference.abs().max() <= TOLERANCE


@torch.inference_mode()
def test_dynamic_scaling_past_its_length_is_decoding_token_by_token(tmp_path):
    """There transformers depends on how a text is cut into calls; we are its finest cut."""
    config = toy_config(**rope("dynamic")) | {"max_position_embeddings": 16}
    model = save_random(config, tmp_path)
    (tokens,) = random_sequences((40,))
    cache, steps = None, []
    for token in tokens:
        out = model(token[None, None], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        steps.append(out.logits[0, -1])
    logits = flat_logits(load_decoder(tmp_path), [tokens])
    assert (logits - torch.stack(steps)).abs().max() <= TOLERANCE


@torch.inference_mode()
def test_bfloat16_stays_near_float32(tmp_path):
    save_random(toy_config(), tmp_path)
    sequences = random_sequences()
    decoder = load_decoder(tmp_path, dtype="bfloat16")
    assert decoder.dtype == torch.bfloat16
    exact = flat_logits(load_decoder(tmp_path, dtype="float32"), sequences)
    assert (flat_logits(decoder, sequences) - exact).abs().max() <= 0.05 * exact.abs().max()


def test_a_new_decoder_has_random_weights_and_gradients():
    architecture = read_architecture(toy_config("Qwen3ForCausalLM", attention_bias=True))
    decoder, twin = Decoder(architecture, seed=3), Decoder(architecture, seed=3)
    flat_logits(decoder, random_sequences()).logsumexp(-1).sum().backward()
    for (name, parameter), other in zip(decoder.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(parameter, other), name
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.std() > 0, name


def test_training_starts_from_plain_weights(tmp_path):
    model = save_random(toy_config(tie_word_embeddings=True), tmp_path)
    decoder = load_decoder(tmp_path, packed=False).requires_grad_(True)
    (tokens,) = random_sequences((9,))
    flat_logits(decoder, [tokens]).logsumexp(-1).sum().backward()
    model(tokens[None]).logits.logsumexp(-1).sum().backward()
    ours, theirs = decoder.embedding.weight.grad, model.model.embed_tokens.weight.grad
    assert (ours - theirs).abs().max() <= TOLERANCE * theirs.abs().max()


@torch.inference_mode()
def test_no_tokens_are_no_logits():
    decoder = Decoder(read_architecture(toy_config()))
    none = torch.empty(0, dtype=torch.int64)
    hidden = decoder(none, none, lambda layer, q, k, v: q)
    assert hidden.shape == (0, 32)
    assert decoder.logits(hidden).shape == (0, 61)


def test_packed_weights_replace_the_plain_ones(tmp_path):
    if not can_pack(torch.float32, torch.device("cpu")):
        pytest.skip("no packed weights here")
    save_random(toy_config(), tmp_path)
    decoder = load_decoder(tmp_path)
    linears = [module for module in decoder.modules() if isinstance(module, Linear)]
    assert len(linears) == 3 * 4 + 1
    assert all(module.packed is not None for module in linears)
    assert not any("qkv" in name or "down" in name for name, _ in decoder.named_parameters())
