"""What is measured of peers: their own words for it read, windows, choices and tables."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks import peer_llama_cpp, peer_openvino
from benchmarks.continuation import (
    Asked,
    Continuation,
    Continue,
    Peer,
    chain_length,
    decode_rate,
    prompt_rate,
)
from benchmarks.inflate import ZOO
from benchmarks.peer_llama_cpp import LlamaCpp, read_bench, read_event, read_speculative
from benchmarks.peer_openvino import OpenVINO
from benchmarks.peer_ours import Ours, follow
from benchmarks.peer_transformers import TransformersPeer
from benchmarks.peers import choose, decoding, open_systems, table
from specinfer.errors import ConfigError, DependencyError
from specinfer.llm import LLM
from specinfer.request import SamplingParams
from specinfer.text.tokenizer import Tokenizer

ASKED = Asked(ZOO / "parley", ZOO / "parley-draft", threads=1, batch=1)

# Of llama.cpp 0.5.0-dev
SPECULATIVE = """\
0.00.196.742 I cmn          init: llama threadpool init, n_threads = 1
0.00.447.746 I encoded   13 tokens in    0.014 seconds, speed:  917.172 t/s
0.00.447.747 I decoded   66 tokens in    0.234 seconds, speed:  281.510 t/s
0.00.447.748 I n_draft   = 8
0.00.447.748 I n_predict = 66
0.00.447.748 I n_accept  = 50
"""
STREAM = """\
data: {"index":0,"content":"Once","tokens":[1068],"stop":false,"id_slot":-1,"tokens_predicted":1}

data: {"index":0,"content":" upon","tokens":[1003],"stop":false,"id_slot":-1,"tokens_predicted":2}

data: {"index":0,"content":"","tokens":[],"id_slot":1,"stop":true,"tokens_predicted":2}
"""
BENCH = [
    {"n_prompt": 13, "n_gen": 0, "avg_ns": 4_000_000, "avg_ts": 3250.0},
    {"n_prompt": 0, "n_gen": 7, "avg_ns": 14_000_000, "avg_ts": 500.0},
]


def test_llama_speculative_tells_its_decoding_time() -> None:
    bursts = read_speculative(SPECULATIVE, 13)
    assert bursts == [(0.014, 1), (pytest.approx(0.248), 65)]
    assert decode_rate([Continuation(bursts, "")]) == pytest.approx(65 / 0.234)
    with pytest.raises(ConfigError, match="made 13 tokens of a prompt of 14"):
        read_speculative(SPECULATIVE, 14)
    with pytest.raises(ConfigError, match="told no times"):
        read_speculative("failed to load the model", 13)


def test_llama_server_streams_token_ids() -> None:
    assert [read_event(line) for line in STREAM.splitlines() if line] == [[1068], [1003], []]
    with pytest.raises(ConfigError, match="context"):
        read_event('error: {"message":"the prompt exceeds the context"}')


def test_llama_bench_gives_prompt_and_decoding() -> None:
    bursts = read_bench(json.dumps(BENCH))
    assert decode_rate([Continuation(bursts, [])]) == pytest.approx(500)
    assert prompt_rate(Continuation(bursts, []), [0] * 13) == pytest.approx(3250)
    assert read_bench(json.dumps(BENCH[:1])) == [(0.004, 1)]


def test_a_rate_counts_only_what_was_written_while_all_decode() -> None:
    one = Continuation([(1.0, 1), (2.0, 3), (3.0, 2), (5.0, 9)], [])
    assert decode_rate([one]) == pytest.approx(14 / 4)
    late = Continuation([(2.0, 1), (4.0, 4)], [])
    # From 2.0, when the late one got its first token, to 4.0, when it was done
    assert decode_rate([one, late]) == pytest.approx((2 + 4) / 2)
    with pytest.raises(ValueError, match="more tokens"):
        decode_rate([one, Continuation([(6.0, 1), (7.0, 1)], [])])


def test_a_chain_has_a_length() -> None:
    assert chain_length("chain-12") == 12
    assert chain_length("plain") is None
    for way in ("chain-0", "chain-x", "chain-"):
        with pytest.raises(ConfigError, match="chain-5"):
            chain_length(way)


class Fake:
    """A peer whose systems write the same text at different speeds."""

    name = "fake"

    def ways(self) -> list[str]:
        return ["bf16/plain", "int8/plain"]

    def open(self, precision: str, way: str) -> Continue:
        if way != "plain":
            raise ConfigError(f"no {way}")
        seconds = {"bf16": 2.0, "int8": 1.0}[precision]

        def run(
            prompts: Sequence[Sequence[int]], num_tokens: int, temperature: float
        ) -> list[Continuation]:
            tokens = [10 + i for i in range(num_tokens)]
            return [Continuation([(1.0, 1), (1.0 + seconds, num_tokens - 1)], tokens)] * len(
                prompts
            )

        return run

    def close(self) -> None:
        pass

    def version(self) -> str:
        return "1"


def test_systems_are_chosen_by_pattern_or_by_full_name(capsys: pytest.CaptureFixture[str]) -> None:
    peers: list[Peer] = [Fake()]
    assert choose(peers, ["*/bf16/*"]) == ["fake/bf16/plain"]
    names = choose(peers, ["*/plain", "fake/bf16/tree-2x9", "nobody/x/y", "fake"])
    assert names == [
        *("fake/bf16/plain", "fake/int8/plain", "fake/bf16/tree-2x9", "nobody/x/y", "fake"),
    ]
    assert list(open_systems(peers, names)) == ["fake/bf16/plain", "fake/int8/plain"]
    said = capsys.readouterr().err.splitlines()
    assert said[0] == "fake/bf16/tree-2x9 is left out: no tree-2x9"
    assert len(said) == 3


def test_rows_hold_rates_and_ratios_and_become_a_table() -> None:
    systems = open_systems([Fake()], ["fake/bf16/plain", "fake/int8/plain"])
    systems = dict(zip(("ours/bf16/plain", "fake/int8/plain"), systems.values(), strict=True))
    tokenizer = Tokenizer.from_folder(ZOO / "parley")
    ours, fake = decoding(systems, [[[1, 2]], [[3]]], 9, 0.0, tokenizer)
    assert ours.tokens_per_s.median == pytest.approx(4.0)
    assert fake.plain is not None
    assert fake.plain.median == pytest.approx(0.5)
    assert fake.auto is None
    assert (fake.same_text, len(fake.runs)) == ("2/2", 2)
    console = Console(width=160)
    with console.capture() as capture:
        console.print(table("title", [ours, fake]))
    lines = [line for line in capture.get().splitlines() if "plain" in line]
    assert "fake/int8/plain" in lines[1]
    assert "0.50 (0.50–0.50)" in lines[1]
    assert "ours/bf16/plain" in lines[2]


def test_what_is_missing_is_named_with_its_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_llama_cpp, "exported", lambda folder, kind: tmp_path / "a.gguf")
    monkeypatch.setattr(peer_openvino, "TWINS", tmp_path)
    llama = LlamaCpp(ASKED, str, tmp_path)
    for way in ("plain", "chain-5", "tree-4x8", "bench"):
        with pytest.raises(DependencyError, match="scripts/build-llama-cpp"):
            llama.open("bf16", way)
    for name in (["q8_0", "hop"], ["int8", "plain"]):
        with pytest.raises((ConfigError, DependencyError)):
            llama.open(*name)
    with pytest.raises(DependencyError, match=r"pip install|optimum-cli"):
        OpenVINO(ASKED).open("bf16", "plain")
    with pytest.raises(ConfigError, match="no bf16/hop"):
        OpenVINO(ASKED).open("bf16", "hop")


def test_our_engine_and_transformers_write_one_text_and_tell_when(tmp_path: Path) -> None:
    asked = Asked(ZOO / "parley-draft", ZOO / "parley-draft", threads=1, batch=1)
    ours, theirs = Ours(asked, ()), TransformersPeer(asked)
    prompt = [1, 361, 261, 2]
    expected = ours.open("f32", "plain")([prompt], 8, 0.0)[0]
    assert expected.bursts == sorted(expected.bursts)
    assert [num for _, num in expected.bursts] == [1] * 8
    systems = [
        ours.open("f32", "chain-3"),
        *(theirs.open("f32", way) for way in ("plain", "assisted", "chain-3", "lookup")),
    ]
    for system in systems:
        done = system([prompt], 8, 0.0)[0]
        assert done.tokens == expected.tokens
        assert sum(num for _, num in done.bursts) == 8
        assert decode_rate([done]) > 0


def test_a_batch_is_followed_prompt_by_prompt() -> None:
    llm = LLM("zoo:parley-draft", dtype="float32")
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    prompts = [[1, 361, 2], [1, 261, 644, 2]]
    together = follow(llm, prompts, params)
    assert [each.tokens for each in together] == [
        follow(llm, [prompt], params)[0].tokens for prompt in prompts
    ]
    assert all(sum(num for _, num in each.bursts) == 4 for each in together)
