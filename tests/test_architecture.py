"""Config.json in both spellings becomes one Architecture, or one clear sentence."""

import dataclasses
import json

import pytest
from transformers import AutoConfig

from specinfer.errors import CheckpointError, UnsupportedModelError
from specinfer.models.architecture import ACTIVATIONS as SPELLINGS
from specinfer.models.architecture import FAMILIES, Rope, read_architecture
from specinfer.models.layers import ACTIVATIONS
from tests.helpers import FAMILIES as FAMILY_NAMES
from tests.helpers import toy_config

LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_the_bundled_spelling():
    config = {
        "architectures": ["LlamaForCausalLM"],
        "dtype": "bfloat16",
        "head_dim": 64,
        "hidden_act": "silu",
        "hidden_size": 384,
        "intermediate_size": 1024,
        "max_position_embeddings": 2048,
        "num_attention_heads": 6,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
        "tie_word_embeddings": True,
        "vocab_size": 4096,
    }
    architecture = read_architecture(config)
    assert architecture.family == "LlamaForCausalLM"
    assert architecture.scale == 1 / 8
    assert architecture.windows == (None, None)
    assert architecture.rope == Rope()
    assert architecture.tied_embeddings
    assert architecture.dtype == "bfloat16"
    assert not architecture.attention_bias
    assert not architecture.qk_norm


def test_old_and_new_spelling_are_one():
    new = toy_config(
        dtype="float16",
        rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3},
    )
    for kind in ("type", "rope_type"):
        old = toy_config(
            torch_dtype="torch.float16", rope_theta=5e5, rope_scaling={kind: "llama3", **LLAMA3}
        )
        assert read_architecture(old) == read_architecture(new)


@pytest.mark.parametrize("family", FAMILY_NAMES)
def test_left_out_values_are_those_of_transformers(family):
    stated = ("architectures", "model_type", "vocab_size", "hidden_size", "intermediate_size")
    counts = {"num_hidden_layers": 2, "num_attention_heads": 32}
    config = {key: toy_config(family)[key] for key in stated} | counts | {"hidden_size": 256}
    fields = {key: value for key, value in config.items() if key != "model_type"}
    theirs = AutoConfig.for_model(config["model_type"], **fields)
    ours = read_architecture(config)
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.max_position_embeddings == theirs.max_position_embeddings
    assert ours.head_dim == getattr(theirs, "head_dim", 256 // 32)
    assert ours.norm_eps == theirs.rms_norm_eps
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]
    assert ours.tied_embeddings == theirs.tie_word_embeddings
    # Mistral slides even where its file is silent
    assert ours.windows == ((4096, 4096) if family.startswith("Mistral") else (None, None))


@pytest.mark.parametrize(
    ("family", "changes", "windows"),
    [
        ("LlamaForCausalLM", {"sliding_window": 4}, (None, None, None)),
        ("MistralForCausalLM", {"sliding_window": 4}, (4, 4, 4)),
        ("MistralForCausalLM", {"sliding_window": None}, (None, None, None)),
        ("Qwen2ForCausalLM", {"sliding_window": 4}, (None, None, None)),
        (
            "Qwen2ForCausalLM",
            {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 2},
            (None, None, 4),
        ),
        (
            "Qwen3ForCausalLM",
            {
                "sliding_window": 4,
                "use_sliding_window": True,
                "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            },
            (4, None, None),
        ),
    ],
)
def test_windows(family, changes, windows):
    assert read_architecture(toy_config(family, **changes)).windows == windows


@pytest.mark.parametrize(
    ("family", "changes", "biases"),
    [
        ("LlamaForCausalLM", {}, (False, False, False)),
        ("LlamaForCausalLM", {"attention_bias": True}, (True, True, False)),
        ("LlamaForCausalLM", {"mlp_bias": True}, (False, False, True)),
        ("MistralForCausalLM", {"attention_bias": True}, (False, False, False)),
        ("Qwen2ForCausalLM", {}, (True, False, False)),
        ("Qwen3ForCausalLM", {}, (False, False, False)),
        ("Qwen3ForCausalLM", {"attention_bias": True}, (True, True, False)),
    ],
)
def test_biases(family, changes, biases):
    a = read_architecture(toy_config(family, **changes))
    assert (a.attention_bias, a.output_bias, a.mlp_bias) == biases


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["MambaForCausalLM"]}, ["'MambaForCausalLM'", *FAMILIES]),
        ({"architectures": None}, ["None", *FAMILIES]),
        ({"hidden_act": "xielu"}, ["hidden_act='xielu'", "silu"]),
        ({"quantization_config": {"quant_method": "gptq"}}, ["'gptq'", "unquantised"]),
        ({"rope_scaling": {"type": "longrope", "factor": 2}}, ["'longrope'", "yarn"]),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, ["per layer type"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor=0.5"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads=3"]),
        ({"head_dim": 7}, ["head_dim=7"]),
    ],
)
def test_what_is_not_computed_is_refused_in_one_sentence(changes, words):
    with pytest.raises(UnsupportedModelError) as error:
        read_architecture(toy_config(**changes))
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_layer_types_are_refused():
    config = toy_config("Qwen3ForCausalLM", layer_types=["chunked_attention"] * 3)
    with pytest.raises(UnsupportedModelError, match="chunked_attention"):
        read_architecture(config)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": None}, "hidden_size=None"),
        ({"vocab_size": 0}, "vocab_size=0"),
        ({"num_hidden_layers": "3"}, "num_hidden_layers='3'"),
        ({"rope_scaling": {"type": "linear"}}, "'linear' without factor"),
        ({"rope_scaling": {"type": "llama3", "factor": 2}}, "low_freq_factor, high_freq_factor"),
        ({"rope_scaling": "yarn"}, "rope_scaling"),
        ({"num_key_value_heads": "2"}, "num_key_value_heads='2'"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
    ],
)
def test_impossible_values_are_named(changes, words):
    with pytest.raises(CheckpointError, match=words):
        read_architecture(toy_config(**changes))


def test_an_architecture_is_a_value():
    architecture = read_architecture(toy_config())
    assert hash(architecture) == hash(read_architecture(json.loads(json.dumps(toy_config()))))
    with pytest.raises(dataclasses.FrozenInstanceError):
        architecture.num_layers = 1  # type: ignore[misc]


def test_every_activation_is_built():
    assert set(SPELLINGS.values()) == set(ACTIVATIONS)
