"""Quantised models: as saved so loaded, every family, and what is refused."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from specinfer import LLM, ConfigError, SamplingParams, Speculation
from specinfer.errors import CheckpointError, ModelError, UnsupportedModelError
from specinfer.models import weights
from specinfer.models.decoder import Decoder
from specinfer.models.folder import resolve_model
from specinfer.models.layers import Linear
from specinfer.models.quantization import (
    HEAD_KEY,
    QUANTIZATIONS,
    Quantization,
    decode,
    describe,
    encode,
    read_stored,
    resolve_quantization,
)
from specinfer.models.quantized_folder import quantize_folder
from specinfer.models.weights import _Loader, load_decoder
from specinfer.ops.quantized import Int4Weight, dequantize
from specinfer.ops.triton_linear import TritonWeight
from specinfer.run.runner import Runner
from tests.command_line import run
from tests.engines import chain, run_pages
from tests.helpers import FAMILIES, toy_config
from tests.test_decoder import flat_logits, random_sequences, save_random

INT8, INT4, FP8 = (QUANTIZATIONS[name] for name in ("int8", "int4", "fp8"))
CASES = {
    **{family: toy_config(family, intermediate_size=64) for family in FAMILIES},
    "tied": toy_config(intermediate_size=64, tie_word_embeddings=True),
    "biases": toy_config(intermediate_size=64, attention_bias=True, mlp_bias=True),
}


def logits(folder: Path, **options) -> torch.Tensor:
    return flat_logits(load_decoder(folder, **options), random_sequences())


@pytest.mark.parametrize("scheme", [INT8, INT4], ids=lambda scheme: scheme.name)
@pytest.mark.parametrize("name", CASES)
@torch.inference_mode()
def test_every_family_is_rounded_and_kept(name, scheme, tmp_path):
    save_random(CASES[name], tmp_path / "plain")
    exact = logits(tmp_path / "plain")
    for dtype in ("float32", "bfloat16"):
        rounded = logits(tmp_path / "plain", quantization=scheme, dtype=dtype)
        bound = (0.1 if scheme is INT8 else 0.6) * exact.std()
        assert 0 < (rounded - exact).square().mean().sqrt() < bound
    saved = tmp_path / "saved"
    quantize_folder(tmp_path / "plain", saved, scheme, shard_bytes=5000)
    assert len(list(saved.glob("model-*.safetensors"))) > 1
    for dtype in ("float32", "bfloat16"):
        options = {"dtype": dtype}
        asked = logits(tmp_path / "plain", quantization=scheme, **options)
        assert torch.equal(logits(saved, **options), asked)
        assert torch.equal(logits(saved, quantization=scheme, **options), asked)


@torch.inference_mode()
def test_fast_and_plain_weights_compute_the_same(tmp_path):
    save_random(CASES["biases"], tmp_path)
    for scheme in (INT8, INT4):
        fast, plain = (logits(tmp_path, quantization=scheme, packed=b) for b in (True, False))
        assert (fast - plain).abs().max() < 1e-4 * plain.abs().max()


def dequantised(decoder: Decoder, scheme: Quantization) -> Decoder:
    """A plain decoder whose weights are what the rounded ones stand for, the head's of int8."""
    for name, module in decoder.named_modules():
        if isinstance(module, Linear):
            own = INT8 if name == "lm_head" else scheme
            module.weight.copy_(dequantize(*own.quantize(module.weight)))
    if decoder.lm_head is None:
        head = INT8.quantize(decoder.embedding.weight)
        decoder.tied_head = Int4Weight(*head, dtype=decoder.dtype, fast=False)
    return decoder


@pytest.mark.parametrize(
    ("name", "scheme"),
    [("biases", INT8), ("tied", INT4), ("biases", FP8)],
    ids=["int8", "int4", "fp8"],
)
@torch.inference_mode()
def test_what_a_gpu_holds_is_what_was_rounded(name, scheme, tmp_path, monkeypatch):
    """Read as for a GPU and run by the interpreter: rounded while it is read, and as written."""
    pytest.importorskip("triton")
    gpu = torch.device("cuda")

    def pack(loader: _Loader, scheme, values, scales) -> TritonWeight:
        return TritonWeight(values, scales, bits=scheme.bits, dtype=loader.dtype)

    monkeypatch.setattr(_Loader, "_pack_rounded", pack)
    monkeypatch.setattr(
        weights,
        "resolve_quantization",
        lambda asked, config, device: resolve_quantization(asked, config, gpu),
    )
    save_random(CASES[name], tmp_path / "plain")
    quantize_folder(tmp_path / "plain", tmp_path / "saved", scheme)
    plain = load_decoder(tmp_path / "plain", packed=False)
    expected = flat_logits(dequantised(plain, scheme), random_sequences())
    asked = logits(tmp_path / "plain", quantization=scheme)
    torch.testing.assert_close(asked, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(logits(tmp_path / "saved"), asked)


@pytest.mark.gpu
@pytest.mark.parametrize("scheme", QUANTIZATIONS.values(), ids=lambda scheme: scheme.name)
@torch.inference_mode()
def test_a_gpu_computes_what_was_rounded(scheme):
    """The bundled target in captured steps, beside a processor with the same weights."""
    folder = resolve_model("zoo:parley")
    plain = load_decoder(folder, dtype="float32", packed=False)
    options = {"dtype": "bfloat16", "device": "cuda", "quantization": scheme}
    device = Runner(load_decoder(folder, **options), 64)
    spans = [chain([5, 9, 300, 17, 2, 44, 1000], run_pages(64), num_logits=7)]
    expected = Runner(dequantised(plain, scheme), 64).run(spans)
    for _ in range(2):
        actual = device.run(spans).cpu()
        assert (actual - expected).norm() <= 0.01 * expected.norm()


def test_all_linears_are_rounded_and_the_embedding_is_not(tmp_path):
    save_random(CASES["tied"], tmp_path)
    decoder = load_decoder(tmp_path, quantization=INT8)
    linears = [module for module in decoder.modules() if isinstance(module, Linear)]
    assert all(module.packed is not None for module in linears)
    assert not any(hasattr(module, "weight") for module in linears)
    assert decoder.tied_head is not None
    assert decoder.embedding.weight.dtype == torch.float32
    assert decoder.quantization == "int8"
    assert load_decoder(tmp_path).quantization is None


@pytest.mark.parametrize("scheme", QUANTIZATIONS.values(), ids=lambda scheme: scheme.name)
def test_a_weight_survives_its_file_format(scheme):
    weight = torch.randn(48, 256)
    values, scales = scheme.quantize(weight)
    tensors = encode(scheme, "m", weight, torch.bfloat16)
    found = decode(scheme, "m", tensors.__getitem__)
    assert torch.equal(found[0], values)
    assert torch.equal(found[1], scales)
    assert read_stored({"quantization_config": describe(scheme), HEAD_KEY: True}) == scheme


def test_int4_words_are_those_of_compressed_tensors():
    """Eight values a word, the first in the lowest bits, as 0 to 15."""
    weight = torch.arange(-8.0, 8.0).repeat(2)[None]
    tensors = encode(INT4, "m", weight, torch.float32)
    assert tensors["m.weight_scale"].item() == 1
    words = [int(word) & 0xFFFFFFFF for word in tensors["m.weight_packed"][0]]
    assert words == [0x76543210, 0xFEDCBA98] * 2
    assert tensors["m.weight_shape"].tolist() == [1, 32]


@torch.inference_mode()
def test_a_folder_of_another_tool_is_read(tmp_path):
    """Its own scales, float32 ones, no word about the head, one projection left alone."""
    save_random(CASES["LlamaForCausalLM"], tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    kept = "model.layers.1.mlp.down_proj"
    meant = {}
    for name in [name for name in tensors if "_proj" in name and kept not in name]:
        weight = tensors.pop(name)
        scale = weight.abs().amax(1, keepdim=True) / 127.5
        values = (weight / scale).round().clamp(-128, 127).to(torch.int8)
        meant[name] = dequantize(values, scale)
        tensors |= {name: values, name + "_scale": scale}
    save_file(tensors, tmp_path / "model.safetensors")
    stored = describe(INT8) | {"ignore": ["lm_head", kept], "version": "0.14.0"}
    config = CASES["LlamaForCausalLM"] | {"quantization_config": stored}
    (tmp_path / "config.json").write_text(json.dumps(config))
    ours = load_decoder(tmp_path)
    one = torch.eye(32)
    found = ours.layers[0].output(one)
    assert torch.allclose(found.T, meant["model.layers.0.self_attn.o_proj.weight"], atol=1e-6)


def test_fp8_of_another_tool_is_read():
    """As most are made: activations by token, which we leave as they are."""
    by_token = describe(FP8)["config_groups"]["group_0"]["weights"] | {
        "strategy": "token",
        "dynamic": True,
    }
    stored = describe(FP8)
    assert stored["config_groups"]["group_0"]["input_activations"] is None
    stored["config_groups"]["group_0"]["input_activations"] = by_token
    assert read_stored({"quantization_config": stored}).name == "fp8"
    stored["config_groups"]["group_0"]["input_activations"] = by_token | {"dynamic": False}
    with pytest.raises(UnsupportedModelError):
        read_stored({"quantization_config": stored})


def test_fp8_that_is_no_number_is_refused():
    tensors = encode(FP8, "m", torch.ones(2, 3), torch.bfloat16)
    tensors["m.weight"].view(torch.uint8)[1, 2] = 0xFF
    with pytest.raises(CheckpointError, match=r"m.weight has NaN in it"):
        decode(FP8, "m", tensors.__getitem__)


def half_rounded(path):
    tensors = load_file(path / "model.safetensors")
    name = "model.layers.0.self_attn.k_proj"
    tensors[name + ".weight"] = torch.ones(16, 32)
    del tensors[name + ".weight_scale"]
    save_file(tensors, path / "model.safetensors")


def no_scales_of_one_output(path):
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight_scale"] = torch.ones(1, 1)
    save_file(tensors, path / "model.safetensors")


def order_of_groups(path):
    tensors = load_file(path / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight_g_idx"] = torch.zeros(64, dtype=torch.int32)
    save_file(tensors, path / "model.safetensors")


def rounded_embedding(path):
    tensors = load_file(path / "model.safetensors")
    name = "model.embed_tokens"
    tensors |= encode(INT8, name, tensors.pop(name + ".weight"), torch.float32)
    save_file(tensors, path / "model.safetensors")


@pytest.mark.parametrize(
    ("damage", "kind", "words"),
    [
        (rounded_embedding, UnsupportedModelError, "embed_tokens is quantised"),
        (half_rounded, UnsupportedModelError, "q_proj, .*k_proj.* only some are quantised"),
        (no_scales_of_one_output, CheckpointError, r"down_proj.weight_scale has shape \[1, 1\]"),
        (order_of_groups, CheckpointError, "down_proj.weight_g_idx, which config.json does not"),
    ],
)
def test_broken_folders(damage, kind, words, tmp_path):
    save_random(CASES["LlamaForCausalLM"], tmp_path / "plain")
    quantize_folder(tmp_path / "plain", tmp_path / "saved", INT8)
    damage(tmp_path / "saved")
    with pytest.raises(kind, match=words):
        load_decoder(tmp_path / "saved")


def group(**changes):
    stored = describe(INT8)
    stored["config_groups"]["group_0"] |= changes
    return stored


@pytest.mark.parametrize(
    "stored",
    [
        {"quant_method": "gptq", "bits": 4},
        describe(INT8) | {"format": "float-quantized"},
        describe(INT8) | {"kv_cache_scheme": {"num_bits": 8}},
        group(input_activations=None),
        group(weights=describe(INT8)["config_groups"]["group_0"]["weights"] | {"symmetric": False}),
        {"quant_method": "compressed-tensors", "format": "pack-quantized"},
        ["int8"],
    ],
)
def test_other_schemes_are_refused(stored):
    with pytest.raises(UnsupportedModelError, match=r"quant_method=.*int-quantized.*unquantised"):
        read_stored({"quantization_config": stored})


def test_what_cannot_be_asked_for(tmp_path):
    with pytest.raises(ConfigError, match="quantization='fp4': use one of int8, int4, int4-64"):
        LLM("zoo:parley", quantization="fp4")
    with pytest.raises(ConfigError, match=r"'fp8' on device='cpu': .*use quantization=\"int8\""):
        LLM("zoo:parley", quantization="fp8", device="cpu")
    with pytest.raises(ConfigError, match="drafter_quantization='int3': use one of int8"):
        LLM("zoo:parley", drafters="zoo:parley-draft", drafter_quantization="int3")
    for drafters in ([], ["ngram"]):
        with pytest.raises(ConfigError, match="drafter_quantization='int8' but no drafter is a"):
            LLM("zoo:parley", drafters=drafters, drafter_quantization="int8")
    save_random(toy_config(), tmp_path / "plain")
    with pytest.raises(ConfigError, match=r"groups of 32, and .*down_proj.weight has 48: use int8"):
        load_decoder(tmp_path / "plain", quantization=INT4)
    quantize_folder(tmp_path / "plain", tmp_path / "saved", INT8)
    with pytest.raises(ConfigError, match="quantization='int4' for a checkpoint that is int8"):
        load_decoder(tmp_path / "saved", quantization=INT4)
    with pytest.raises(ConfigError, match="is there already"):
        quantize_folder(tmp_path / "plain", tmp_path / "saved", INT8)
    with pytest.raises(ModelError, match="is quantised already"):
        quantize_folder(tmp_path / "saved", tmp_path / "again", INT8)
    with pytest.raises(ConfigError, match="groups of 32"):
        quantize_folder(tmp_path / "plain", tmp_path / "failed", INT4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain", "saved"]


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_trees_write_what_plain_decoding_writes(scheme):
    """The rounded pair in float32, several requests at once."""
    prompts = ["Tell me a story about a fox.", "What is 12 plus 30?", "Book me a table."]
    written = []
    for tree in ("off", "1,1,3,1"):
        llm = LLM(
            "zoo:parley",
            drafters="zoo:parley-draft",
            speculation=Speculation(tree=tree),
            dtype="float32",
            quantization=scheme,
            drafter_quantization="int8",
            max_model_len=96,
            show_progress=False,
        )
        outputs = llm.generate(prompts, SamplingParams(temperature=0, max_tokens=24))
        written.append([output.outputs[0].token_ids for output in outputs])
    assert written[0] == written[1]
    assert sum(output.stats.num_accepted for output in outputs) > 10


def test_the_command_writes_what_the_flag_computes(tmp_path):
    assert run("quantize", "zoo:parley", str(tmp_path / "fp8"), "--quantization", "fp8").output
    refused = run("generate", "Hello", "--model", str(tmp_path / "fp8"), "--device", "cpu")
    assert refused.exit_code == 2
    assert "processors have no kernel for it" in refused.stderr
    out = tmp_path / "parley-int4"
    assert run("quantize", "zoo:parley", str(out), "--quantization", "int4").exit_code == 0
    again = run("quantize", "zoo:parley", str(out))
    assert again.exit_code == 2
    assert "is there already" in again.stderr
    ask = ("Hello", "--drafter", "none", "--max-tokens", "12", "--temperature", "0")
    texts = [
        run("generate", *ask, "--model", *model)
        for model in ([str(out)], ["zoo:parley", "--quantization", "int4"])
    ]
    assert [text.exit_code for text in texts] == [0, 0]
    assert texts[0].stdout == texts[1].stdout != ""
    unknown = run("generate", *ask, "--quantization", "int5")
    assert unknown.exit_code == 2
    assert "quantization='int5': use one of int8, int4" in unknown.stderr
