"""Loading: every weight in its place, one sentence for every fault, little memory besides."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from specinfer.errors import (
    CheckpointError,
    ConfigError,
    ModelError,
    ModelNotFoundError,
    UnsupportedModelError,
)
from specinfer.models import weights
from specinfer.models.architecture import FAMILIES, read_architecture
from specinfer.models.decoder import Decoder
from specinfer.models.folder import resolve_model
from specinfer.models.layers import Linear
from specinfer.models.weights import load_decoder
from tests.helpers import toy_config

INDEX = "model.safetensors.index.json"


def checkpoint_tensors(decoder: Decoder) -> dict[str, torch.Tensor]:
    """A decoder's parameters under their family's names, unfused."""
    names = FAMILIES[decoder.architecture.family].names
    tensors = {}
    for name, parameter in decoder.named_parameters():
        module_name, _, kind = name.rpartition(".")
        layer = "".join(filter(str.isdecimal, module_name))
        theirs = names[module_name.replace(layer, "{}") if layer else module_name]
        module = decoder.get_submodule(module_name)
        widths = module.widths if isinstance(module, Linear) else parameter.shape[:1]
        for part, rows in zip(theirs, parameter.detach().split(tuple(widths)), strict=True):
            tensors[f"{part.format(layer)}.{kind}"] = rows.clone()
    return tensors


def write_checkpoint(path: Path, *, dtype=torch.float32, **changes) -> Decoder:
    """A folder as transformers would write it, and the decoder it came from."""
    path.mkdir(exist_ok=True)
    config = toy_config(**changes)
    decoder = Decoder(read_architecture(config), dtype=dtype)
    (path / "config.json").write_text(json.dumps(config))
    save_file(checkpoint_tensors(decoder), path / "model.safetensors")
    return decoder


def shard(path: Path) -> list[Path]:
    """Cut model.safetensors in three, across layers and fused groups."""
    single = path / "model.safetensors"
    tensors = load_file(single)
    single.unlink()
    files = [f"model-{part + 1:05}-of-00003.safetensors" for part in range(3)]
    shard_of = {name: files[i % 3] for i, name in enumerate(sorted(tensors))}
    for file in files:
        save_file({n: tensors[n] for n, f in shard_of.items() if f == file}, path / file)
    (path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": shard_of}))
    return [path / file for file in files]


def assert_same(loaded: Decoder, decoder: Decoder) -> None:
    ours, theirs = dict(loaded.named_parameters()), dict(decoder.named_parameters())
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name].to(ours[name].dtype)), name
        assert not ours[name].requires_grad


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("sharded", [False, True])
def test_every_weight_finds_its_place(tmp_path, sharded, tied):
    decoder = write_checkpoint(
        tmp_path, attention_bias=True, mlp_bias=True, tie_word_embeddings=tied
    )
    if sharded:
        shard(tmp_path)
    assert_same(load_decoder(tmp_path, packed=False), decoder)


def test_blocked_weights_compute_the_same(tmp_path):
    decoder = write_checkpoint(tmp_path)
    x = torch.randn(5, 32)
    loaded = load_decoder(tmp_path)
    ours, theirs = loaded.layers[1].qkv(x), decoder.layers[1].qkv(x)
    assert (ours - theirs).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("stored", "said", "asked", "became"),
    [
        (torch.float32, None, "auto", torch.float32),
        (torch.float32, "float32", "auto", torch.float32),
        (torch.float32, "float32", "bfloat16", torch.bfloat16),
        (torch.bfloat16, "bfloat16", "float32", torch.float32),
        (torch.float16, "float16", torch.float16, torch.float16),
        (torch.bfloat16, None, "auto", torch.bfloat16),
    ],
)
def test_dtype(tmp_path, monkeypatch, stored, said, asked, became):
    monkeypatch.setattr(weights, "computes_in", lambda dtype, device: True)
    decoder = write_checkpoint(tmp_path, dtype=stored)
    config = toy_config() | ({} if said is None else {"dtype": said})
    (tmp_path / "config.json").write_text(json.dumps(config))
    loaded = load_decoder(tmp_path, dtype=asked, packed=False)
    assert loaded.dtype == became
    assert_same(loaded, decoder)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_auto_is_float32_where_the_processor_lacks_the_type(tmp_path, monkeypatch, stored):
    decoder = write_checkpoint(tmp_path, dtype=stored, torch_dtype=str(stored))
    monkeypatch.setattr(weights, "computes_in", lambda dtype, device: False)
    loaded = load_decoder(tmp_path, packed=False)
    assert loaded.dtype == torch.float32
    assert_same(loaded, decoder)


def test_unknown_dtypes_are_refused(tmp_path):
    write_checkpoint(tmp_path)
    with pytest.raises(ConfigError, match=r"dtype='int8'.*bfloat16"):
        load_decoder(tmp_path, dtype="int8")
    with pytest.raises(ConfigError, match="dtype"):
        load_decoder(tmp_path, dtype=torch.int8)


def test_progress_ends_at_all_bytes(tmp_path):
    decoder = write_checkpoint(tmp_path)
    calls = []
    load_decoder(tmp_path, progress=lambda done, total: calls.append((done, total)))
    total = sum(parameter.nbytes for parameter in decoder.parameters())
    assert calls[-1] == (total, total)
    assert [done for done, _ in calls] == sorted({done for done, _ in calls})


def edit(path: Path, change) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def test_known_leftovers_are_passed_over(tmp_path):
    write_checkpoint(tmp_path, tie_word_embeddings=True)

    def change(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    edit(tmp_path, change)
    load_decoder(tmp_path)


def no_weights(path):
    (path / "model.safetensors").unlink()


def only_bin(path):
    no_weights(path)
    (path / "pytorch_model.bin").write_bytes(b"x")


def missing_shard(path):
    shard(path)[1].unlink()


def truncated(path):
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def truncated_header(path):
    (path / "model.safetensors").write_bytes(b"\x10\0\0")


def truncated_shard(path):
    file = shard(path)[2]
    file.write_bytes(file.read_bytes()[:-4])


def missing_tensor(path):
    edit(path, lambda tensors: tensors.pop("model.layers.2.mlp.up_proj.weight"))


def missing_head(path):
    edit(path, lambda tensors: tensors.pop("lm_head.weight"))


def leftover_tensor(path):
    edit(path, lambda t: t.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(8)}))


def extra_layer(path):
    config = json.loads((path / "config.json").read_text()) | {"num_hidden_layers": 2}
    (path / "config.json").write_text(json.dumps(config))


def wrong_shape(path):
    name = "model.layers.1.self_attn.k_proj.weight"
    edit(path, lambda tensors: tensors.update({name: torch.ones(8, 32)}))


def no_config(path):
    (path / "config.json").unlink()


def broken_config(path):
    (path / "config.json").write_text("{")


def list_config(path):
    (path / "config.json").write_text("[]")


def broken_index(path):
    shard(path)
    (path / INDEX).write_text('{"metadata": {}}')


def odd_index(path):
    shard(path)
    (path / INDEX).write_text('{"weight_map": {"a": 3}}')


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (no_weights, ["has no weights", "model.safetensors"]),
        (only_bin, [".bin", "convert", "safetensors"]),
        (missing_shard, ["lacks model-00002-of-00003.safetensors", INDEX]),
        (truncated, ["model.safetensors cannot be read", "truncated"]),
        (truncated_header, ["model.safetensors cannot be read", "truncated"]),
        (truncated_shard, ["model-00003-of-00003.safetensors cannot be read"]),
        (missing_tensor, ["lacks model.layers.2.mlp.up_proj.weight"]),
        (missing_head, ["lacks lm_head.weight"]),
        (leftover_tensor, ["has model.layers.0.self_attn.q_norm.weight", "does not ask"]),
        (extra_layer, ["model.layers.2.input_layernorm.weight", "and 6 more", "does not ask"]),
        (wrong_shape, ["model.layers.1.self_attn.k_proj.weight", "[8, 32]", "[16, 32]"]),
        (no_config, ["has no config.json"]),
        (broken_config, ["config.json cannot be read"]),
        (list_config, ["config.json is no JSON object"]),
        (broken_index, ["no weight_map"]),
        (odd_index, ["no weight_map"]),
    ],
)
def test_a_broken_folder_is_one_clear_sentence(tmp_path, damage, words):
    write_checkpoint(tmp_path)
    damage(tmp_path)
    with pytest.raises(CheckpointError) as error:
        load_decoder(tmp_path)
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_quantised_tensors_are_refused(tmp_path):
    write_checkpoint(tmp_path)
    name = "model.layers.1.mlp.down_proj.weight"
    edit(tmp_path, lambda tensors: tensors.update({name: tensors[name].to(torch.int8)}))
    with pytest.raises(UnsupportedModelError, match=f"{name} has dtype I8"):
        load_decoder(tmp_path)


def test_a_folder_resolves_to_itself(tmp_path):
    assert resolve_model(str(tmp_path)) == tmp_path
    with pytest.raises(ModelNotFoundError, match="is no folder"):
        load_decoder(tmp_path / "nothing")


def test_zoo_names_are_folders_of_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr("specinfer.models.folder._ZOO", tmp_path)
    with pytest.raises(ModelNotFoundError, match="none in this installation"):
        resolve_model("zoo:parley")
    for name in ("parrot", "parley"):
        write_checkpoint(tmp_path / name)
    assert resolve_model("zoo:parley") == tmp_path / "parley"
    for name in ("zoo:polly", "zoo:", "zoo:../parley"):
        with pytest.raises(ModelNotFoundError, match="there are zoo:parley, zoo:parrot"):
            resolve_model(name)


@pytest.mark.parametrize("name", ["./nothing/here/at-all", "a b", "/no/such/folder", ""])
def test_what_is_neither_folder_nor_id(name):
    with pytest.raises(ModelNotFoundError, match="is no folder"):
        resolve_model(name)


def test_a_file_is_no_model(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"x")
    with pytest.raises(ModelNotFoundError, match="is no folder"):
        resolve_model(str(tmp_path / "model.gguf"))


def test_hub_ids_are_had_from_the_hub(tmp_path, monkeypatch):
    asked = {}

    def snapshot_download(name, **options):
        asked.update(options, name=name)
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert resolve_model("someone/model-1.5B") == tmp_path
    assert asked["name"] == "someone/model-1.5B"
    assert "*.safetensors" in asked["allow_patterns"]
    assert not any(pattern.endswith(".bin") for pattern in asked["allow_patterns"])


@pytest.fixture
def offline_hub(tmp_path, monkeypatch):
    """The hub's client without a network, its cache in an empty folder."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def test_an_id_that_cannot_be_had_is_one_sentence(offline_hub):
    with pytest.raises(ModelNotFoundError, match="'someone/toy' is no folder here") as error:
        resolve_model("someone/toy")
    assert "\n" not in str(error.value)
    with pytest.raises(ModelNotFoundError, match=r"or zoo:parley$"):
        resolve_model("parley")


def test_offline_ids_come_from_the_cache(offline_hub):
    folder = offline_hub / "models--someone--toy"
    snapshot = folder / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    write_checkpoint(snapshot)
    assert resolve_model("someone/toy") == snapshot
    load_decoder(resolve_model("someone/toy"))


MEASURE = """
import sys
from pathlib import Path
from specinfer.models.folder import read_config
from specinfer.models.weights import load_decoder
import torch

def status(key):
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024

load_decoder(Path(sys.argv[1] + "/warm-up"), dtype=sys.argv[2])
# Since Linux 4.0 writing 5 sets the peak back to what is resident now.
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
decoder = load_decoder(Path(sys.argv[1]), dtype=sys.argv[2])
print(status("VmHWM") - before, status("VmRSS") - before)
"""


def test_a_model_that_was_read_leaves_no_holes_in_the_heap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trimmed: list[int] = []
    libc = SimpleNamespace(malloc_trim=trimmed.append)
    write_checkpoint(tmp_path)
    load_decoder(tmp_path)  # compiles and loads what it needs
    monkeypatch.setattr(weights.ctypes, "CDLL", lambda name: libc)
    load_decoder(tmp_path)
    assert trimmed == [0] * (sys.platform == "linux")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    ("dtype", "sharded"),
    [("bfloat16", False), pytest.param("float32", True, marks=pytest.mark.slow)],
)
def test_peak_memory_is_the_weights_and_a_tenth(tmp_path, dtype, sharded):
    """Resident pages of mapped files included, with blocked weights: 150 and 300 MB, 24 layers."""
    write_checkpoint(tmp_path / "warm-up")
    config = toy_config(
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=24,
        num_attention_heads=8,
        head_dim=64,
        vocab_size=4096,
    )
    empty = checkpoint_tensors(Decoder(read_architecture(config), device="meta"))
    tensors = {n: torch.ones(t.shape, dtype=getattr(torch, dtype)) for n, t in empty.items()}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "model.safetensors")
    total = sum(tensor.nbytes for tensor in tensors.values())
    if sharded:
        shard(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path), dtype],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    peak, stays = (int(word) for word in done.stdout.split())
    print(f"{dtype}: {total / 1e6:.0f} MB, peak {peak / total:.3f}, stays {stays / total:.3f}")
    assert total <= peak <= 1.1 * total


def test_every_fault_is_a_model_error():
    assert issubclass(CheckpointError, ModelError)
