"""Bad input is one sentence on standard error and exit code 2, whatever is bad."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.command_line import refuses, run

DRAFT = Path(__file__).parent.parent / "specinfer" / "zoo" / "parley-draft"

Breakage = Callable[[Path], None]


def rewrite_config(**changes: Any) -> Breakage:
    def change(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


def rewrite_weights(change: Callable[[dict[str, torch.Tensor]], None]) -> Breakage:
    def rewrite(folder: Path) -> None:
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors")

    return rewrite


def truncate(folder: Path) -> None:
    weights = folder / "model.safetensors"
    os.truncate(weights, weights.stat().st_size // 2)


def lose_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def wrong_shape(weights: dict[str, torch.Tensor]) -> None:
    weights["model.norm.weight"] = torch.ones(7)


def lose_tensor(weights: dict[str, torch.Tensor]) -> None:
    del weights["model.norm.weight"]


def other_vocabulary(folder: Path) -> None:
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    vocab = tokenizer["model"]["vocab"]
    first, second = list(vocab)[2000:2002]
    vocab[first], vocab[second] = vocab[second], vocab[first]
    file.write_text(json.dumps(tokenizer))


@pytest.mark.parametrize(
    ("breakage", "words"),
    [
        pytest.param(lambda f: (f / "model.safetensors").unlink(), ["no weights"], id="no weights"),
        pytest.param(lambda f: (f / "config.json").unlink(), ["no config.json"], id="no config"),
        pytest.param(
            lambda f: (f / "config.json").write_text("{"), ["config.json"], id="half json"
        ),
        pytest.param(lambda f: (f / "tokenizer.json").unlink(), ["tokenizer.json"], id="tokenizer"),
        pytest.param(lose_shard, ["lacks model-00002-of-00002.safetensors"], id="missing shard"),
        pytest.param(truncate, ["model.safetensors", "truncated"], id="truncated"),
        pytest.param(
            rewrite_weights(wrong_shape), ["model.norm.weight", "[7]", "[192]"], id="wrong shape"
        ),
        pytest.param(
            rewrite_weights(lose_tensor),
            ["lacks model.norm.weight"],
            id="missing tensor",
        ),
        pytest.param(
            rewrite_config(architectures=["MambaForCausalLM"], model_type="mamba"),
            ["MambaForCausalLM"],
            id="unknown architecture",
        ),
    ],
)
def test_a_broken_model_folder(breakage: Breakage, words: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(DRAFT, folder)
    breakage(folder)
    refuses(run("generate", "Hi", "--model", str(folder)), words)
    as_drafter = run("generate", "Hi", "--model", str(DRAFT), "--drafter", str(folder))
    refuses(as_drafter, [*words, "error: drafter", "model"])


def test_a_drafter_with_another_vocabulary(tmp_path: Path) -> None:
    shutil.copytree(DRAFT, tmp_path / "other")
    other_vocabulary(tmp_path / "other")
    result = run("generate", "Hi", "--drafter", str(tmp_path / "other"))
    refuses(result, ["another vocabulary", "share"])


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["Hi", "--model", "/no/such/folder"], ["/no/such/folder", "zoo:NAME"]),
        (["Hi", "--model", "./folder"], ["'./folder' is no folder: give"]),
        (["Hi", "--model", "zoo:nobody"], ["error: zoo:nobody", "zoo:parley"]),
        (["Hi", "--drafter", "zoo:nobody"], ["error: drafter: zoo:nobody", "zoo:parley"]),
        (["Hi", "--model", "nobody/no-such-model"], ["nobody/no-such-model", "hub"]),
        (["Hi", "--drafter", "ngram", "--drafter", "ngram"], ["ngram", "once"]),
        (["Hi", "--drafter", "none", "--drafter", "zoo:parley-draft"], ["--drafter none"]),
        (["Hi", "--drafter", "none", "--tree", "1,1"], ["tree='1,1'", "--drafter"]),
        ([""], ["prompt is empty"]),
        (["Hi", "--file", "also"], ["--file"]),
        (["--file", "/no/such/file"], ["/no/such/file", "No such file"]),
        (["Hi " * 3000], ["6000 tokens", "2048", "max_model_len"]),
        (["Hi", "--temperature", "-0.1"], ["temperature=-0.1", "at least 0"]),
        (["Hi", "--temperature", "nan"], ["temperature=nan", "at least 0"]),
        (["Hi", "--top-p", "0"], ["top_p=0.0", "(0, 1]"]),
        (["Hi", "--top-p", "1.5"], ["top_p=1.5", "(0, 1]"]),
        (["Hi", "--max-tokens", "0"], ["max_tokens=0", "at least 1"]),
        (["Hi", "--n", "0"], ["n=0", "at least 1"]),
        (["Hi", "--tree", "1,0,x"], ["tree='1,0,x'", "widths"]),
        (["Hi", "--tree", "bonsai"], ["bonsai", "sequoia", "calibrated"]),
        (["Hi", "--control", "gammatune"], ["control='gammatune'", 'tree="1,1,1,1"']),
        (["Hi", "--target-tpot-s", "0"], ["target_tpot_s=0.0", "at least 0.0001"]),
        (["Hi", "--calibration", "/no/such/file"], ["/no/such/file", "folder that exists"]),
        (
            ["Hi", "--drafter", "ngram", "--tree", "1,1", "--control", "smartspec"],
            ["smartspec", "model as the first drafter"],
        ),
        (["Hi", "--verifier", "wrong"], ["verifier='wrong'", "topdown"]),
        (["Hi", "--kv-cache-memory", "1000"], ["kv_cache_memory=1000", "at least", "bytes"]),
        (["Hi", "--max-model-len", "5000"], ["max_model_len=5000", "2048"]),
        (["Hi", "--max-num-seqs", "0"], ["max_num_seqs=0"]),
        (["Hi", "--dtype", "int3"], ["dtype='int3'", "bfloat16"]),
        (["Hi", "--device", "abacus"], ["device='abacus'", "cpu"]),
        (["Hi", "--speculative-config", "{"], ["speculative_config", "no JSON"]),
        (["Hi", "--speculative-config", '{"method": "eagle"}'], ["method='eagle'"]),
        (["Hi", "--speculative-config", '{"modle": "x"}'], ["'modle'", "num_speculative_tokens"]),
        (["Hi", "--speculative-config", "{}", "--drafter", "x"], ["give one"]),
        (["Hi", "--speculative-config", "{}", "--tree", "1"], ["give one"]),
    ],
)
def test_bad_input_is_one_sentence(args: list[str], words: list[str]) -> None:
    refuses(run("generate", *args), words)


@pytest.mark.parametrize(
    "args",
    [
        ["generate", "Hi", "--no-such-flag"],
        ["generate", "Hi", "--priority", "1"],
        ["generate", "Hi", "--max-tokens", "many"],
        ["tree", "Hi", "--steps", "0"],
        ["no-such-command"],
    ],
)
def test_wrong_usage_is_exit_code_2(args: list[str]) -> None:
    result = run(*args)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Traceback" not in result.stderr


def test_text_that_is_no_unicode() -> None:
    refuses(run("generate", "\udcff"), ["lone surrogate"])
    refuses(run("generate", stdin=b"\xff\xfe"), ["standard input is no UTF-8 text"])
