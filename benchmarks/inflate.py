"""Same model, bigger cost: a wider and deeper checkpoint that computes the same function.

So speed is measured at the cost of a 1B model with the acceptance of a real pair, offline. A new
residual channel is never written, a new head or neuron is never read, a new layer adds nothing:

    q, k, v, gate, up   [real | random]     embedding, o, down   [real | ~0]
                        [   random    ]                          [    ~0   ]

where ~0 is noise of about 1e-7, so that no engine can fold it away. Widening by r divides the mean
square by r, so norm weights are divided by √r and eps by r: exact in bfloat16 for r = 1, 4, 16.
A figure measured on such a twin must say so.
"""

import argparse
import json
import shutil
import struct
import sys
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
ZOO = ROOT / "specinfer" / "zoo"
TWINS = ROOT / "twins"

NOISE = 1e-7
DENSE = 0.02

# name → (what its rows are, what its columns are, what fills the rest), as [out, in]
_LINEARS = {
    "self_attn.q_proj": ("query", "channel", DENSE),
    "self_attn.k_proj": ("kv", "channel", DENSE),
    "self_attn.v_proj": ("kv", "channel", DENSE),
    "self_attn.o_proj": ("channel", "query", NOISE),
    "mlp.gate_proj": ("neuron", "channel", DENSE),
    "mlp.up_proj": ("neuron", "channel", DENSE),
    "mlp.down_proj": ("channel", "neuron", NOISE),
}
_NORMS = ("input_layernorm", "post_attention_layernorm")
_TOP = {
    "model.embed_tokens": ("token", "channel", NOISE),
    "lm_head": ("token", "channel", DENSE),
}


class InflateError(ValueError):
    """This checkpoint cannot be inflated to these sizes."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """What sets a model's cost; head_dim stays, and heads · head_dim = hidden."""

    hidden: int
    layers: int
    inner: int

    def num_parameters(self, head_dim: int, group: int, vocab: int) -> int:
        """Weights of a twin with tied embeddings and `group` query heads per KV head."""
        kv = self.hidden // head_dim // group * head_dim
        layer = 2 * self.hidden * (self.hidden + kv) + 3 * self.hidden * self.inner
        return self.layers * layer + vocab * self.hidden


PRESETS = {
    "0.3b": ("parley", Sizes(hidden=1536, layers=8, inner=6144)),
    "1b": ("parley", Sizes(hidden=1536, layers=28, inner=6144)),
    "7b": ("parley", Sizes(hidden=6144, layers=17, inner=16384)),
    # 1/50 of the target's parameters, as real drafters have
    "drafter-0.3b": ("parley-draft", Sizes(hidden=192, layers=2, inner=4096)),
    "drafter-1b": ("parley-draft", Sizes(hidden=768, layers=2, inner=2816)),
    "drafter-7b": ("parley-draft", Sizes(hidden=3072, layers=2, inner=4096)),
}


class _Entry(NamedTuple):
    """One tensor of a twin: what its axes are, the scale of what fills it up, where it is from."""

    name: str
    axes: tuple[str, ...]
    fill: float
    is_real: bool


class _Plan:
    """The twin's tensors: real rows and columns come first, the fill after them."""

    def __init__(self, config: dict[str, Any], sizes: Sizes) -> None:
        self.sizes = sizes
        self.num_real_layers: int = config["num_hidden_layers"]
        hidden: int = config["hidden_size"]
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        head_dim = config.get("head_dim") or hidden // heads
        self.ratio = sizes.hidden / hidden
        self.heads = sizes.hidden // head_dim
        self.kv_heads = self.heads * kv_heads // heads
        _check(config, sizes, head_dim, heads, kv_heads)
        # Query head h reads KV head h // group; the group stays, so real heads stay first too
        self.lengths = {
            "token": config["vocab_size"],
            "channel": sizes.hidden,
            "neuron": sizes.inner,
            "query": sizes.hidden,
            "kv": self.kv_heads * head_dim,
        }
        self.tied = bool(config.get("tie_word_embeddings"))
        self.config = {
            **config,
            "hidden_size": sizes.hidden,
            "num_hidden_layers": sizes.layers,
            "intermediate_size": sizes.inner,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": head_dim,
            "rms_norm_eps": config["rms_norm_eps"] / self.ratio,
            "dtype": "bfloat16",
        }

    def tensors(self) -> Iterator[_Entry]:
        """Every tensor of the twin, in the order of the file."""
        for name, (rows, columns, fill) in _TOP.items():
            if name != "lm_head" or not self.tied:
                yield _Entry(f"{name}.weight", (rows, columns), fill, is_real=True)
        for layer in range(self.sizes.layers):
            prefix, is_real = f"model.layers.{layer}", layer < self.num_real_layers
            for norm in _NORMS:
                yield _Entry(f"{prefix}.{norm}.weight", ("channel",), DENSE, is_real)
            for name, (rows, columns, fill) in _LINEARS.items():
                yield _Entry(f"{prefix}.{name}.weight", (rows, columns), fill, is_real)
        yield _Entry("model.norm.weight", ("channel",), DENSE, is_real=True)

    def shape(self, entry: _Entry) -> list[int]:
        """The twin's shape of this tensor."""
        return [self.lengths[axis] for axis in entry.axes]

    def widen(self, entry: _Entry, real: Tensor | None, rng: torch.Generator) -> Tensor:
        """One tensor of the twin, bfloat16; `real` is None in an added layer."""
        # Over √ratio, so that what the noise adds up to does not grow with the width
        scale = entry.fill / self.ratio**0.5
        wide = torch.randn(self.shape(entry), generator=rng).mul_(scale)
        is_norm = len(entry.axes) == 1
        if is_norm:
            wide += 1
        if real is not None:
            wide[tuple(slice(length) for length in real.shape)] = real.float()
        return (wide.mul_(self.ratio**-0.5) if is_norm else wide).to(torch.bfloat16)


def _check(config: dict[str, Any], sizes: Sizes, head_dim: int, heads: int, kv_heads: int) -> None:
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    biased = config.get("attention_bias") or config.get("mlp_bias")
    if config.get("model_type") not in ("llama", "mistral") or biased:
        raise InflateError("only LLaMA and Mistral checkpoints without biases can be inflated")
    if heads * head_dim != hidden:
        raise InflateError(f"the source has {heads} heads of {head_dim}, not {hidden} in all")
    group = heads // kv_heads
    if sizes.hidden % (head_dim * group):
        raise InflateError(f"hidden={sizes.hidden} must be a multiple of {head_dim * group}")
    for name, new, old in (
        ("hidden", sizes.hidden, hidden),
        ("layers", sizes.layers, config["num_hidden_layers"]),
        ("inner", sizes.inner, inner),
    ):
        if new < old:
            raise InflateError(f"{name}={new} is below the source's {old}")


def inflate(source: Path, out: Path, sizes: Sizes, *, seed: int = 0) -> int:
    """Write the twin of `source` with these sizes to `out`; returns its number of parameters.

    Tensors are made and written one at a time, so memory holds the largest of them and the source.
    raises  InflateError if the source or the sizes do not suit
    """
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    plan = _Plan(config, sizes)
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for path in source.iterdir():
        if path.suffix in (".json", ".jinja", ".model", ".txt"):
            shutil.copyfile(path, partial / path.name)
    (partial / "config.json").write_text(json.dumps(plan.config, indent=2) + "\n", encoding="utf-8")
    num_parameters = _write_weights(source, partial / "model.safetensors", plan, seed)
    card = _card(source, config, plan, num_parameters)
    (partial / "README.md").write_text(card, encoding="utf-8")
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)
    return num_parameters


def _write_weights(source: Path, path: Path, plan: _Plan, seed: int) -> int:
    """Stream the twin's tensors into one safetensors file (header, then the bytes in order)."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt", "inflated_from": source.name}}
    offset = 0
    for entry in plan.tensors():
        shape = plan.shape(entry)
        end = offset + 2 * torch.Size(shape).numel()
        header[entry.name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with safe_open(source / "model.safetensors", "pt") as real, path.open("wb") as file:
        names = {entry.name for entry in plan.tensors() if entry.is_real}
        if names != set(real.keys()):
            raise InflateError(f"unexpected or missing tensors: {names ^ set(real.keys())}")
        file.write(struct.pack("<Q", len(text)) + text)
        for entry in plan.tensors():
            # A CPU generator reads 32 bits of its seed
            rng = torch.Generator().manual_seed(zlib.crc32(f"{seed} {entry.name}".encode()))
            weight = real.get_tensor(entry.name) if entry.is_real else None
            wide = plan.widen(entry, weight, rng)
            file.write(wide.view(torch.int16).numpy().tobytes())
    return offset // 2


def _card(source: Path, config: dict[str, Any], plan: _Plan, num_parameters: int) -> str:
    return f"""---
license: cc-by-sa-4.0
library_name: transformers
---
# {source.name}, inflated to {num_parameters / 1e9:.3g}B parameters

**Not a better model**: it computes the same function as {source.name} at the cost of a bigger one,
to measure speed. Made by specinfer's `benchmarks/inflate.py`, which says how. A figure measured
on it must say that it was.

| | {source.name} | this |
|---|---|---|
| hidden | {config["hidden_size"]} | {plan.sizes.hidden} |
| layers | {config["num_hidden_layers"]} | {plan.sizes.layers} |
| inner | {config["intermediate_size"]} | {plan.sizes.inner} |
| heads | {config["num_attention_heads"]} | {plan.heads} |
| KV heads | {config["num_key_value_heads"]} | {plan.kv_heads} |
"""


def twin(preset: str) -> Path:
    """The folder of a preset's twin below ./twins/, made if it is not there."""
    source, sizes = PRESETS[preset]
    out = TWINS / f"{source}-{preset.removeprefix('drafter-')}"
    if not (out / "model.safetensors").is_file():
        print(f"inflating {source} to {preset} in {out} ...", file=sys.stderr)
        inflate(ZOO / source, out, sizes)
    return out


def logit_difference(source: Path, out: Path, prompts: list[list[int]]) -> float:
    """Largest absolute difference of the two models' logits in float32, by transformers."""
    from transformers import AutoModelForCausalLM

    logits = []
    for folder in (source, out):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.inference_mode():
            logits.append([model(torch.tensor([ids])).logits for ids in prompts])
        del model
    return max(float((a - b).abs().max()) for a, b in zip(*logits, strict=True))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=PRESETS)
    parser.add_argument("--source", type=Path, metavar="DIR", help="default: the preset's")
    parser.add_argument("--out", type=Path, metavar="DIR", help="default: ./twins/SOURCE-PRESET")
    for name in ("hidden", "layers", "inner"):
        parser.add_argument(f"--{name}", type=int, help="instead of the preset's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", action="store_true", help="compare the logits of a few prompts")
    args = parser.parse_args()
    name, preset = PRESETS.get(args.preset, ("parley", Sizes(0, 0, 0)))
    sizes = Sizes(
        hidden=args.hidden or preset.hidden,
        layers=args.layers or preset.layers,
        inner=args.inner or preset.inner,
    )
    if not (sizes.hidden and sizes.layers and sizes.inner):
        parser.error("give --preset, or all of --hidden, --layers and --inner")
    source = args.source or ZOO / name
    label = (args.preset or f"{sizes.hidden}x{sizes.layers}x{sizes.inner}").removeprefix("drafter-")
    out = args.out or TWINS / f"{source.name}-{label}"
    try:
        num_parameters = inflate(source, out, sizes, seed=args.seed)
    except (InflateError, OSError) as error:
        parser.error(str(error))
    print(f"{out}: {num_parameters / 1e6:.1f}M parameters, the function of {source.name}")
    if args.check:
        from benchmarks.prompts import load_chats
        from specinfer.text import Tokenizer

        tokenizer = Tokenizer.from_folder(source)
        prompts = [tokenizer.apply_chat_template(chat) for chat in load_chats(6)]
        difference = logit_difference(source, out, prompts)
        print(f"largest difference of logits, float32, {len(prompts)} prompts: {difference:.1e}")


if __name__ == "__main__":
    main()
