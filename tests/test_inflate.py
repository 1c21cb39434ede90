"""An inflated checkpoint computes the function of its source, at the cost it promises."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.inflate import (
    PRESETS,
    ZOO,
    InflateError,
    Sizes,
    inflate,
    logit_difference,
)


def make_source(folder: Path, **options: object) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        **options,
    )
    model = LlamaForCausalLM(config).bfloat16()
    for name, weight in model.named_parameters():
        if "norm" in name:
            weight.data.normal_(1, 0.3)
        elif "proj" in name:
            weight.data.mul_(8)
    model.save_pretrained(folder)
    return folder


PROMPTS = [[1, 5, 96, 4, 4, 30], [7], list(range(60))]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("hidden", [48, 192, 768])
def test_logits_are_the_sources(tmp_path: Path, tied: bool, hidden: int) -> None:
    source = make_source(tmp_path / "source", tie_word_embeddings=tied)
    num = inflate(source, tmp_path / "twin", Sizes(hidden=hidden, layers=5, inner=130))
    assert logit_difference(source, tmp_path / "twin", PROMPTS) < 5e-5
    weights = load_file(tmp_path / "twin" / "model.safetensors")
    assert sum(weight.numel() for weight in weights.values()) == num
    assert all(weight.dtype == torch.bfloat16 for weight in weights.values())
    assert all(bool((weight != 0).float().mean() > 0.99) for weight in weights.values())


def test_the_same_seed_gives_the_same_file(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    sizes = Sizes(hidden=192, layers=3, inner=96)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        inflate(source, tmp_path / name, sizes, seed=seed)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


def test_the_twin_is_an_ordinary_folder_that_says_what_it_is(tmp_path: Path) -> None:
    out = tmp_path / "twin"
    num = inflate(ZOO / "parley-draft", out, Sizes(hidden=768, layers=2, inner=512))
    assert num == Sizes(hidden=768, layers=2, inner=512).num_parameters(64, 3, 4096) + 5 * 768
    config = json.loads((out / "config.json").read_text())
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (12, 4)
    assert config["rms_norm_eps"] == 1e-6 / 4
    assert (out / "tokenizer.json").is_file()
    assert (out / "chat_template.jinja").is_file()
    assert "inflated" in (out / "README.md").read_text()
    assert logit_difference(ZOO / "parley-draft", out, [[1, 1045, 361, 261, 2]]) < 5e-5


def test_sizes_that_do_not_suit_are_refused(tmp_path: Path) -> None:
    source = make_source(tmp_path / "source")
    for sizes, word in (
        (Sizes(hidden=24, layers=2, inner=80), "hidden=24 is below"),
        (Sizes(hidden=100, layers=2, inner=80), "multiple of 24"),
        (Sizes(hidden=48, layers=1, inner=80), "layers=1"),
        (Sizes(hidden=48, layers=2, inner=8), "inner=8"),
    ):
        with pytest.raises(InflateError, match=word):
            inflate(source, tmp_path / "twin", sizes)
    biased = make_source(tmp_path / "biased", attention_bias=True)
    with pytest.raises(InflateError, match="without biases"):
        inflate(biased, tmp_path / "twin", Sizes(hidden=192, layers=2, inner=80))
    assert not (tmp_path / "twin").exists()


@pytest.mark.parametrize(("size", "billions"), [("0.3b", 0.28), ("1b", 0.98), ("7b", 6.9)])
def test_presets_cost_what_they_are_called(size: str, billions: float) -> None:
    target = PRESETS[size][1].num_parameters(head_dim=64, group=3, vocab=4096)
    drafter = PRESETS[f"drafter-{size}"][1].num_parameters(head_dim=64, group=3, vocab=4096)
    assert target / 1e9 == pytest.approx(billions, rel=0.02)
    assert target / drafter == pytest.approx(50, rel=0.03)
