"""What a decoder is made of, read from `config.json`: model families are data.

A family is a row of `FAMILIES`, found by `architectures[0]`: the values its files may leave out,
where its biases and norms are, and what its weights are called. Nothing ever tests a model's name.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from specinfer.errors import CheckpointError, UnsupportedModelError
from specinfer.models.quantization import read_stored

Config = Mapping[str, Any]
"""The parsed `config.json`."""

RopeKind = Literal["default", "linear", "dynamic", "llama3", "yarn"]

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
"""`hidden_act` as files spell it -> as `layers.py` knows it."""


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary positions: the base frequencies and how they are stretched.

    kind              which stretching; the fields below it does not use keep their defaults
    theta             base of the frequencies
    factor            how many times longer the context becomes (all kinds but "default")
    original_length   context of the first training, in tokens (dynamic, llama3, yarn)
    low_freq_factor, high_freq_factor    (llama3) which wavelengths are kept, mixed, divided
    beta_fast, beta_slow, truncate       (yarn) bounds of the ramp, in turns; whole dimensions only
    attention_factor  (yarn) multiplies cos and sin, so it enters the scores squared
    """

    kind: RopeKind = "default"
    theta: float = 10000.0
    factor: float = 1.0
    original_length: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0


@dataclass(frozen=True, slots=True)
class Architecture:
    """Everything the decoder must know before it sees a weight.

    family          the key of `FAMILIES`
    scale           attention scores are q.k * scale
    windows         per layer: how many latest positions a token sees, itself included; None: all
    dtype           what the checkpoint says its weights are, such as "bfloat16"; None: it does not
    attention_bias  q, k and v have biases; `output_bias`: so has the projection after attention
    qk_norm         q and k are RMS-normed per head before they are rotated
    """

    family: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    norm_eps: float
    tied_embeddings: bool
    attention_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    activation: str
    rope: Rope
    max_position_embeddings: int
    windows: tuple[int | None, ...]
    scale: float
    dtype: str | None = None


@dataclass(frozen=True, slots=True)
class Family:
    """How one family differs from the others.

    names           our module -> the checkpoint's modules, fused in this order; "{}" is the layer
    defaults        what its `config.json` may leave out (transformers' own defaults)
    attention_bias  (config) -> biases on (q, k and v; the output projection)
    mlp_bias        (config) -> biases in the MLP
    qk_norm         see `Architecture`
    windows         (config, number of layers) -> sliding window per layer
    """

    names: Mapping[str, tuple[str, ...]]
    defaults: Config
    attention_bias: Callable[[Config], tuple[bool, bool]]
    mlp_bias: Callable[[Config], bool]
    qk_norm: bool
    windows: Callable[[Config, int], tuple[int | None, ...]]


def _same_bias(config: Config) -> tuple[bool, bool]:
    bias = bool(config.get("attention_bias", False))
    return bias, bias


def _no_windows(config: Config, num_layers: int) -> tuple[int | None, ...]:
    return (None,) * num_layers


def _read_window(config: Config) -> int | None:
    return None if config["sliding_window"] is None else _read_int(config, "sliding_window")


def _one_window(config: Config, num_layers: int) -> tuple[int | None, ...]:
    """Mistral: every layer has the same window, and `layer_types` is not read."""
    return (_read_window(config),) * num_layers


def _layer_windows(config: Config, num_layers: int) -> tuple[int | None, ...]:
    """Qwen: `layer_types` where given, else the layers from `max_window_layers` on slide."""
    window = _read_window(config) if config.get("use_sliding_window") else None
    kinds = config.get("layer_types")
    if kinds is None:
        first = config["max_window_layers"]
        return tuple(window if layer >= first else None for layer in range(num_layers))
    known = {"full_attention": None, "sliding_attention": window}
    unknown = sorted(set(kinds) - set(known))
    if unknown or len(kinds) != num_layers:
        raise UnsupportedModelError(
            f"layer_types={list(kinds)} cannot be computed: give {num_layers} of {sorted(known)}"
        )
    return tuple(known[kind] for kind in kinds)


_NAMES: Mapping[str, tuple[str, ...]] = {
    "embedding": ("model.embed_tokens",),
    "layers.{}.attention_norm": ("model.layers.{}.input_layernorm",),
    "layers.{}.qkv": (
        "model.layers.{}.self_attn.q_proj",
        "model.layers.{}.self_attn.k_proj",
        "model.layers.{}.self_attn.v_proj",
    ),
    "layers.{}.q_norm": ("model.layers.{}.self_attn.q_norm",),
    "layers.{}.k_norm": ("model.layers.{}.self_attn.k_norm",),
    "layers.{}.output": ("model.layers.{}.self_attn.o_proj",),
    "layers.{}.mlp_norm": ("model.layers.{}.post_attention_layernorm",),
    "layers.{}.gate_up": ("model.layers.{}.mlp.gate_proj", "model.layers.{}.mlp.up_proj"),
    "layers.{}.down": ("model.layers.{}.mlp.down_proj",),
    "norm": ("model.norm",),
    "lm_head": ("lm_head",),
}
"""What Llama called its weights; the families after it kept the names."""

_QWEN_DEFAULTS: Config = {
    "num_key_value_heads": 32,
    "max_position_embeddings": 32768,
    "sliding_window": 4096,
    "max_window_layers": 28,
}

FAMILIES: Mapping[str, Family] = {
    "LlamaForCausalLM": Family(
        names=_NAMES,
        defaults={"max_position_embeddings": 2048},
        attention_bias=_same_bias,
        mlp_bias=lambda config: bool(config.get("mlp_bias", False)),
        qk_norm=False,
        windows=_no_windows,
    ),
    "MistralForCausalLM": Family(
        names=_NAMES,
        defaults={
            "num_key_value_heads": 8,
            "max_position_embeddings": 131072,
            "sliding_window": 4096,
        },
        attention_bias=lambda config: (False, False),
        mlp_bias=lambda config: False,
        qk_norm=False,
        windows=_one_window,
    ),
    "Qwen2ForCausalLM": Family(
        names=_NAMES,
        defaults=_QWEN_DEFAULTS,
        attention_bias=lambda config: (True, False),
        mlp_bias=lambda config: False,
        qk_norm=False,
        windows=_layer_windows,
    ),
    "Qwen3ForCausalLM": Family(
        names=_NAMES,
        defaults={**_QWEN_DEFAULTS, "head_dim": 128},
        attention_bias=_same_bias,
        mlp_bias=lambda config: False,
        qk_norm=True,
        windows=_layer_windows,
    ),
}


def read_architecture(config: Config) -> Architecture:
    """Resolve a parsed `config.json`, in the spelling of transformers 4 or 5.

    raises  UnsupportedModelError if the family or one of its features is not computed here
            CheckpointError if a value that has no default is missing
    """
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    family = FAMILIES.get(name) if isinstance(name, str) else None
    if family is None:
        raise UnsupportedModelError(
            f"architecture {name!r} is not supported: use one of {', '.join(FAMILIES)}"
        )
    config = {**family.defaults, **config}
    _refuse_unsupported(config)
    num_layers = _read_int(config, "num_hidden_layers")
    num_heads = _read_int(config, "num_attention_heads")
    hidden_size = _read_int(config, "hidden_size")
    head_dim = _read_int(config, "head_dim", hidden_size // num_heads)
    num_kv_heads = _read_int(config, "num_key_value_heads", num_heads)
    if num_heads % num_kv_heads or head_dim % 2:
        raise UnsupportedModelError(
            f"num_attention_heads={num_heads}, num_key_value_heads={num_kv_heads}, "
            f"head_dim={head_dim}: heads must be a multiple of key heads, and head_dim even"
        )
    attention_bias, output_bias = family.attention_bias(config)
    dtype = config.get("dtype") or config.get("torch_dtype")
    return Architecture(
        family=str(name),
        vocab_size=_read_int(config, "vocab_size"),
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        intermediate_size=_read_int(config, "intermediate_size"),
        norm_eps=_read_float(config, "rms_norm_eps", 1e-6),
        tied_embeddings=bool(config.get("tie_word_embeddings", False)),
        attention_bias=attention_bias,
        output_bias=output_bias,
        mlp_bias=family.mlp_bias(config),
        qk_norm=family.qk_norm,
        activation=ACTIVATIONS[config.get("hidden_act", "silu")],
        rope=_read_rope(config),
        max_position_embeddings=_read_int(config, "max_position_embeddings"),
        windows=family.windows(config, num_layers),
        scale=head_dim**-0.5,
        dtype=None if dtype is None else str(dtype).removeprefix("torch."),
    )


def _read_int(config: Config, key: str, default: int | None = None) -> int:
    value = default if config.get(key) is None else config[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CheckpointError(f"config.json has {key}={value!r}: it must be a whole number above 0")
    return value


def _read_float(config: Config, key: str, default: float) -> float:
    value = default if config.get(key) is None else config[key]
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise CheckpointError(f"config.json has {key}={value!r}: it must be a number")
    return float(value)


def _refuse_unsupported(config: Config) -> None:
    read_stored(config)
    activation = config.get("hidden_act", "silu")
    if activation not in ACTIVATIONS:
        raise UnsupportedModelError(
            f"hidden_act={activation!r} is not supported: use one of {', '.join(ACTIVATIONS)}"
        )


def _read_rope(config: Config) -> Rope:
    """Both spellings, with the precedence of transformers 5.23."""
    fields = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(fields, Mapping):
        raise CheckpointError(f"config.json has rope_scaling={fields!r}: it must be an object")
    if any(isinstance(value, Mapping) for value in fields.values()):
        raise UnsupportedModelError(
            "rope_parameters per layer type are not supported: give one set for all layers"
        )
    kind = fields.get("rope_type", fields.get("type", "default"))
    if kind not in get_args(RopeKind):
        raise UnsupportedModelError(
            f"rope_type={kind!r} is not supported: use one of {', '.join(get_args(RopeKind))}"
        )
    partial = fields.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1.0):
        raise UnsupportedModelError(
            f"partial_rotary_factor={partial} is not supported: only whole heads are rotated"
        )
    theta = _read_float(fields, "rope_theta", _read_float(config, "rope_theta", 10000.0))
    return Rope(theta=theta) if kind == "default" else _read_stretched(kind, theta, fields, config)


def _read_stretched(kind: RopeKind, theta: float, fields: Config, config: Config) -> Rope:
    length = longest = _read_int(config, "max_position_embeddings")
    if kind in ("llama3", "yarn"):
        # Where both say it, the outer one counts. Dynamic scaling never reads it.
        length = _read_int(fields, "original_max_position_embeddings", longest)
        length = _read_int(config, "original_max_position_embeddings", length)
    if kind == "yarn" and fields.get("factor") is None:
        fields = {**fields, "factor": longest / length}
    needed = ["factor", *(["low_freq_factor", "high_freq_factor"] if kind == "llama3" else [])]
    missing = [key for key in needed if fields.get(key) is None]
    if missing:
        raise CheckpointError(f"config.json has rope_type={kind!r} without {', '.join(missing)}")
    factor = _read_float(fields, "factor", 1.0)
    return Rope(
        kind=kind,
        theta=theta,
        factor=factor,
        original_length=length,
        low_freq_factor=_read_float(fields, "low_freq_factor", 1.0),
        high_freq_factor=_read_float(fields, "high_freq_factor", 4.0),
        beta_fast=_read_float(fields, "beta_fast", 32.0),
        beta_slow=_read_float(fields, "beta_slow", 1.0),
        truncate=bool(fields.get("truncate", True)),
        attention_factor=_attention_factor(fields, factor) if kind == "yarn" else 1.0,
    )


def _attention_factor(fields: Config, factor: float) -> float:
    """YaRN's temperature, as cos and sin carry it (arXiv 2309.00071, section 3.4)."""

    def strength(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    if fields.get("attention_factor") is not None:
        return _read_float(fields, "attention_factor", 1.0)
    scale = _read_float(fields, "mscale", 0.0)
    scale_all = _read_float(fields, "mscale_all_dim", 0.0)
    if scale and scale_all:
        return strength(scale) / strength(scale_all)
    return strength(1.0)
