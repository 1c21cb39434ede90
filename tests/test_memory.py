"""How large the cache becomes: what was asked for, what is free, and what one request needs."""

from pathlib import Path
from typing import Any

import pytest
import torch

from specinfer.config import EngineConfig, parse_bytes
from specinfer.engine import memory
from specinfer.engine.memory import CacheNeeds, container_memory, free_memory, token_bytes
from specinfer.errors import CapacityError, ConfigError
from specinfer.llm import LLM
from specinfer.models.architecture import read_architecture
from specinfer.models.decoder import Decoder
from specinfer.request import SamplingParams
from specinfer.run.runner import Runner
from tests.helpers import toy_config

CPU = torch.device("cpu")


def needs(**options: Any) -> CacheNeeds:
    """Blocks of 1600 bytes; a request has up to 100 tokens, and must have 80."""
    return CacheNeeds(EngineConfig(max_num_seqs=3, **options), 1600, 100, 80)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4096", 4096),
        ("4GiB", 4 << 30),
        ("512M", 512 << 20),
        ("1.5k", 1536),
        ("2 kb", 2000),
        ("2.5GB", 2_500_000_000),
        ("1TiB", 1 << 40),
    ],
)
def test_sizes(text: str, expected: int) -> None:
    assert parse_bytes("kv_cache_memory", text) == expected
    assert EngineConfig(kv_cache_memory=text).kv_cache_bytes == expected


@pytest.mark.parametrize("text", ["", "GiB", "4 gigabytes", "-1G", "4iB", "1e9", "50%", "0x10"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ConfigError, match=r"kv_cache_memory=.* is no size"):
        EngineConfig(kv_cache_memory=text)


@pytest.mark.parametrize(
    "options",
    [
        {"kv_cache_memory": 0},
        {"kv_cache_memory": "0"},
        {"kv_cache_memory": 1.5},
        {"kv_cache_memory_fraction": 0},
        {"kv_cache_memory_fraction": 1.0},
        {"kv_cache_memory_fraction": "half"},
        {"kv_cache_memory_fraction": True},
        {"kv_cache_memory": "1G", "kv_cache_memory_fraction": 0.5},
        {"enable_prefix_caching": "yes"},
        {"scheduling_policy": "lifo"},
        {"chunked_prefill_size": 0},
    ],
)
def test_limits_that_cannot_be(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(options))):
        EngineConfig(**options)


def test_a_number_is_taken_as_it_is() -> None:
    assert needs().num_given() is None
    assert needs(kv_cache_memory=16_000).num_given() == 10
    assert needs(kv_cache_memory="16kB").num_given() == 10
    # What three requests cannot use may hold past texts, if any are kept
    assert needs(kv_cache_memory="160kB").num_given() == 100
    assert needs(kv_cache_memory="160kB", enable_prefix_caching=False).num_given() == 21
    with pytest.raises(CapacityError, match=r"kv_cache_memory=7999 .* give at least 8000 bytes"):
        needs(kv_cache_memory=7999).num_given()


def test_a_part_of_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda device: 160_000)
    assert needs(kv_cache_memory_fraction=0.5).num_free(CPU) == 50
    assert needs().num_free(CPU) == 21, "enough for all, and no more than a quarter"
    with pytest.raises(CapacityError, match=r"fraction=0.01 is 1600 bytes, which holds 16 tokens"):
        needs(kv_cache_memory_fraction=0.01).num_free(CPU)
    monkeypatch.setattr(memory, "free_memory", lambda device: 32_000)
    assert needs().num_free(CPU) == 5
    monkeypatch.setattr(memory, "free_memory", lambda device: 10)
    assert needs().num_free(CPU) == 1, "then requests are refused one by one"


def test_pools_have_the_bytes_that_were_counted() -> None:
    architectures = [read_architecture(toy_config(num_hidden_layers=n)) for n in (3, 1)]
    dtypes = [torch.float32, torch.bfloat16]
    counted = token_bytes(list(zip(architectures, dtypes, strict=True)))
    runners = [
        Runner(Decoder(each, dtype=dtype), 10)
        for each, dtype in zip(architectures, dtypes, strict=True)
    ]
    assert sum(runner.pool._pages.nbytes for runner in runners) == 10 * counted


def test_the_memory_of_a_container(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert container_memory(tmp_path) is None
    for name, text in (
        ("memory.max", "max"),
        ("memory.current", "700"),
        ("memory.stat", "anon 600\ninactive_file 50\n"),
    ):
        (tmp_path / name).write_text(text + "\n")
    assert container_memory(tmp_path) is None, "no limit"
    (tmp_path / "memory.max").write_text("1000\n")
    assert container_memory(tmp_path) == 350
    monkeypatch.setattr(memory, "_CGROUP", tmp_path)
    assert free_memory(CPU) == 350
    (tmp_path / "memory.max").write_text("100\n")
    assert free_memory(CPU) == 0


def test_too_little_is_refused_before_weights_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("specinfer.engine.build.load_decoder", lambda *args, **options: 1 / 0)
    with pytest.raises(CapacityError, match="lower max_model_len"):
        LLM("zoo:parley", drafters="zoo:parley-draft", kv_cache_memory="64k")


def test_the_pair_takes_what_it_was_given() -> None:
    llm = LLM(
        "zoo:parley",
        drafters="zoo:parley-draft",
        dtype="float32",
        max_model_len=128,
        kv_cache_memory="3MiB",
    )
    drafter: Any = llm.engine.speculator.drafters[0]
    pools = (llm.engine.target.pool, drafter._drafter._runner.pool)
    taken = sum(pool._pages.nbytes for pool in pools)
    assert (3 << 20) - 16 * 7168 < taken <= 3 << 20
    assert llm.engine.stats.num_blocks == (3 << 20) // (16 * 7168)
    llm.generate("One day", SamplingParams(max_tokens=2))
    assert llm.engine.stats.num_blocks_used == 0
