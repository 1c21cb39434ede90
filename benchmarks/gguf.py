"""A checkpoint folder as GGUF, llama.cpp's format: the same weights and the same tokenizer.

    python -m benchmarks.gguf twins/parley-1b --type bf16 --out twins/gguf/parley-1b-bf16.gguf

LLaMA and Mistral decoders with a byte-level BPE tokenizer and nothing unusual about them; the rest
is refused, not guessed. llama.cpp's own converter knows tokenizers by a hash of what they make of a
text and therefore refuses the bundled pair.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy.typing as npt
from safetensors import safe_open
from torch import Tensor

from benchmarks.inflate import TWINS
from specinfer.errors import DependencyError, SpecInferError, UnsupportedModelError
from specinfer.models.architecture import Architecture, Rope, read_architecture
from specinfer.models.folder import read_config

GGUFType = Literal["f32", "bf16", "q8_0", "q4_0"]

_LAYER = {
    "self_attn.q_proj": "ATTN_Q",
    "self_attn.k_proj": "ATTN_K",
    "self_attn.v_proj": "ATTN_V",
    "self_attn.o_proj": "ATTN_OUT",
    "mlp.gate_proj": "FFN_GATE",
    "mlp.up_proj": "FFN_UP",
    "mlp.down_proj": "FFN_DOWN",
    "input_layernorm": "ATTN_NORM",
    "post_attention_layernorm": "FFN_NORM",
}
_TOP = {
    "model.embed_tokens": "TOKEN_EMBD",
    "model.norm": "OUTPUT_NORM",
    "lm_head": "OUTPUT",
}

# How a tokenizer.json splits text → llama.cpp's name for it
_DIGITS = {"type": "Digits", "individual_digits": True}
_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_SPLITS: tuple[tuple[list[dict[str, Any]], str], ...] = (
    ([_BYTES], "gpt-2"),
    ([_DIGITS, _BYTES], "smollm"),
)

_NORMAL, _CONTROL = 1, 3


class Entry(NamedTuple):
    """One tensor: GGUF's name, the checkpoint's, and how many heads' rows are to be permuted."""

    name: str
    source: str
    num_heads: int


def permute_rotary(weight: Tensor, num_heads: int) -> Tensor:
    """Reorder the rows of a q or k projection from rotary halves to rotary neighbours.

    A checkpoint turns dimensions (i, i + d/2) of a head together, llama.cpp's "llama" (2i, 2i + 1).
    weight  [num_heads * d, inputs]
    """
    rows, inputs = weight.shape
    halves = weight.view(num_heads, 2, rows // num_heads // 2, inputs)
    return halves.transpose(1, 2).reshape(rows, inputs)


def entries(architecture: Architecture) -> Iterator[Entry]:
    """Every tensor of the file."""
    gguf = import_gguf()
    names, kinds = gguf.TENSOR_NAMES, gguf.MODEL_TENSOR
    for source, kind in _TOP.items():
        if source != "lm_head" or not architecture.tied_embeddings:
            yield Entry(f"{names[kinds[kind]]}.weight", f"{source}.weight", 0)
    heads = {"ATTN_Q": architecture.num_heads, "ATTN_K": architecture.num_kv_heads}
    for layer in range(architecture.num_layers):
        for source, kind in _LAYER.items():
            name = names[kinds[kind]].format(bid=layer)
            module = f"model.layers.{layer}.{source}.weight"
            yield Entry(f"{name}.weight", module, heads.get(kind, 0))


def export(folder: Path, out: Path, kind: GGUFType) -> None:
    """Write a checkpoint folder as one GGUF file.

    kind    of matrices; norms are float32, and a q4_0 file's embedding is q8_0, because tied ones
            are the last matrix too (llama.cpp's own tool takes its 6-bit type there)
    raises  UnsupportedModelError for what would not mean the same to llama.cpp
    cost    memory for the file, and for a 1B model in q8_0 or q4_0 about a minute
    """
    gguf = import_gguf()
    architecture = read_architecture(read_config(folder))
    _check(folder, architecture)
    partial = out.with_name(out.name + ".partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(partial, "llama")
    _add_architecture(writer, folder.name, architecture, kind)
    _add_tokenizer(writer, folder)
    with safe_open(folder / "model.safetensors", "pt") as checkpoint:
        left = set(checkpoint.keys())
        for entry in entries(architecture):
            left.remove(entry.source)
            weight = checkpoint.get_tensor(entry.source)
            if entry.num_heads:
                weight = permute_rotary(weight, entry.num_heads)
            own = _type_of(entry.name, weight, kind)
            data: npt.NDArray[Any] = gguf.quants.quantize(weight.float().numpy(), own)
            writer.add_tensor(entry.name, data, raw_dtype=own)
    if left:
        raise UnsupportedModelError(f"{folder} has tensors that GGUF has no name for: {left}")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(out)


def exported(folder: Path, kind: GGUFType) -> Path:
    """A checkpoint's file below ./twins/gguf/, made if missing or older than the weights."""
    out = TWINS / "gguf" / f"{folder.name}-{kind}.gguf"
    source = folder / "model.safetensors"
    if not out.is_file() or out.stat().st_mtime < source.stat().st_mtime:
        print(f"writing {out} ...")
        export(folder, out, kind)
    return out


def import_gguf() -> Any:
    """The `gguf` package.

    raises  DependencyError
    """
    try:
        import gguf
    except ImportError:
        raise DependencyError("GGUF files need the gguf package: pip install gguf") from None
    return gguf


def _type_of(name: str, weight: Tensor, kind: GGUFType) -> Any:
    types = import_gguf().GGMLQuantizationType
    if weight.dim() == 1:
        return types.F32
    if kind == "q4_0" and name in ("token_embd.weight", "output.weight"):
        return types.Q8_0
    return types[kind.upper()]


def _check(folder: Path, architecture: Architecture) -> None:
    a = architecture
    if a.family not in ("LlamaForCausalLM", "MistralForCausalLM"):
        raise UnsupportedModelError(f"{folder} is a {a.family}: only LLaMA and Mistral are written")
    unusual = {
        "biases": a.attention_bias or a.output_bias or a.mlp_bias,
        "a norm of q and k": a.qk_norm,
        "stretched rotary positions": a.rope != Rope(theta=a.rope.theta),
        "a sliding window": any(a.windows),
        f"activation {a.activation}": a.activation != "silu",
        "a scale of its own": abs(a.scale * a.head_dim**0.5 - 1) > 1e-6,
        "several files": not (folder / "model.safetensors").is_file(),
    }
    for what, is_so in unusual.items():
        if is_so:
            raise UnsupportedModelError(f"{folder} has {what}, which is not written to GGUF")


def _add_architecture(writer: Any, name: str, a: Architecture, kind: GGUFType) -> None:
    types = import_gguf().LlamaFileType
    file_types = {
        "f32": types.ALL_F32,
        "bf16": types.MOSTLY_BF16,
        "q8_0": types.MOSTLY_Q8_0,
        "q4_0": types.MOSTLY_Q4_0,
    }
    writer.add_name(name)
    writer.add_file_type(file_types[kind])
    writer.add_quantization_version(import_gguf().GGML_QUANT_VERSION)
    writer.add_context_length(a.max_position_embeddings)
    writer.add_embedding_length(a.hidden_size)
    writer.add_block_count(a.num_layers)
    writer.add_feed_forward_length(a.intermediate_size)
    writer.add_head_count(a.num_heads)
    writer.add_head_count_kv(a.num_kv_heads)
    writer.add_key_length(a.head_dim)
    writer.add_value_length(a.head_dim)
    writer.add_rope_dimension_count(a.head_dim)
    writer.add_rope_freq_base(a.rope.theta)
    writer.add_layer_norm_rms_eps(a.norm_eps)
    writer.add_vocab_size(a.vocab_size)


def _add_tokenizer(writer: Any, folder: Path) -> None:
    """The vocabulary, merges, special tokens and chat template.

    raises  UnsupportedModelError for a tokenizer that llama.cpp would apply differently
    """
    spec = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    model = spec["model"]
    if model["type"] != "BPE" or model.get("byte_fallback") or spec["normalizer"]:
        raise UnsupportedModelError(f"{folder} has no byte-level BPE tokenizer")
    tokens = model["vocab"] | {each["content"]: each["id"] for each in spec["added_tokens"]}
    by_id = sorted(tokens, key=tokens.__getitem__)
    if sorted(tokens.values()) != list(range(len(tokens))):
        raise UnsupportedModelError(f"{folder} has a vocabulary with gaps")
    special = {each["content"] for each in spec["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_split_name(folder, spec["pre_tokenizer"]))
    writer.add_token_list(by_id)
    writer.add_token_types([_CONTROL if token in special else _NORMAL for token in by_id])
    merges = [each if isinstance(each, str) else " ".join(each) for each in model["merges"]]
    writer.add_token_merges(merges)
    # Chat templates write what begins and ends a text; nothing is added to it
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    _add_ends(writer, folder)
    template = folder / "chat_template.jinja"
    if template.is_file():
        writer.add_chat_template(template.read_text(encoding="utf-8"))


def _split_name(folder: Path, pre_tokenizer: dict[str, Any]) -> str:
    parts = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    for known, name in _SPLITS:
        if parts == known:
            return name
    raise UnsupportedModelError(f"{folder} splits text in a way that llama.cpp has no name for")


def _add_ends(writer: Any, folder: Path) -> None:
    """End tokens: GGUF knows one that ends a text and one that ends a turn."""
    config = read_config(folder)
    file = folder / "generation_config.json"
    if file.is_file():
        config = config | json.loads(file.read_text(encoding="utf-8"))
    ends = config.get("eos_token_id")
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    if len(ends) > 2:
        raise UnsupportedModelError(f"{folder} has {len(ends)} end tokens, and GGUF has room for 2")
    for end, add in zip(ends, (writer.add_eos_token_id, writer.add_eot_token_id), strict=False):
        add(end)
    if config.get("bos_token_id") is not None:
        writer.add_bos_token_id(config["bos_token_id"])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--type", choices=get_args(GGUFType), default="bf16")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    args = parser.parse_args()
    try:
        export(args.folder, args.out, args.type)
    except (SpecInferError, OSError) as error:
        parser.error(str(error))
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
