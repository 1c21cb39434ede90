"""Twin: our kernels for processors are the plain functions, and a node's bits never change."""

from pathlib import Path

import numpy as np
import pytest
import torch

from specinfer.cache.blocks import Pages
from specinfer.models.weights import load_decoder
from specinfer.ops.attention import Segment, attention_reference
from specinfer.ops.native import NativeRows, build, can_attend, kernels
from specinfer.ops.native.segments import attend
from specinfer.run import native
from specinfer.run.batch import Span
from specinfer.run.runner import Runner
from tests.test_decoder import CASES, flat_logits, random_sequences, save_random, toy_config

DTYPES = (torch.float32, torch.bfloat16)
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 1e-2}

pytestmark = pytest.mark.skipif(kernels() is None, reason="no kernels of ours here")


def require(dtype: torch.dtype) -> None:
    if not can_attend(dtype, 64, 1):
        pytest.skip(f"no {dtype} here")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tree_mask(parents: list[int]) -> np.ndarray:
    mask = np.eye(len(parents), dtype=np.bool_)
    for node, parent in enumerate(parents):
        if parent >= 0:
            mask[node] |= mask[parent]
    return mask


def segments(generator: np.random.Generator) -> list[Segment]:
    """A tree behind a run, a chunk over scattered slots, one token, a long chunk from 0."""
    parents = [-1, 0, 0, 1, 3, 2, 5, 5, 0]
    depths = [0, 1, 1, 2, 3, 2, 3, 3, 1]
    at = [50 + depth for depth in depths]
    rest = list(range(40, 73))
    return [
        Segment(9, slice(5, 64), 50, tree_mask(parents), at, at),
        Segment(33, generator.permutation(400)[:73], 40, None, rest, rest),
        Segment(1, slice(100, 221), 120, None, [120], [120]),
        Segment(70, slice(300, 370), 0, None, list(range(70)), list(range(70))),
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 1, 20])
@pytest.mark.parametrize(("head_dim", "heads", "kv_heads"), [(64, 6, 2), (16, 4, 4), (72, 34, 2)])
def test_attention_is_the_reference(head_dim, heads, kv_heads, window, dtype):
    require(dtype)
    parts = segments(np.random.default_rng(0))
    k, v = (random(kv_heads, 400, head_dim, seed=seed).to(dtype) for seed in (1, 2))
    q = random(sum(part.num_queries for part in parts), heads, head_dim).to(dtype)
    expected = attention_reference(q, k, v, parts, 0.2, window)
    found = attend(q, k, v, parts, 0.2, window)
    assert (found - expected).abs().max() <= TOLERANCE[dtype] * expected.abs().max()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_node_of_a_tree_is_the_token_of_a_chain_to_the_bit(dtype):
    """Behind any prefix, among any siblings, in any chunk."""
    require(dtype)
    k, v, q = (random(2, 200, 64, seed=seed).to(dtype) for seed in (1, 2, 3))
    queries = q.transpose(0, 1).repeat_interleave(2, 1)  # [200, 4 heads, 64]
    position = [150]
    alone = attend(
        queries[150:151], k, v, [Segment(1, slice(0, 151), 150, None, position, position)], 0.1
    )
    # The same keys as the path 140 … 150 of a tree with a sibling behind every node of it.
    order = [slot for at in range(140, 151) for slot in (at, 160 + at - 140)]
    parents = [-1, -1] + [2 * ((node - 2) // 2) for node in range(2, 22)]
    positions = [140 + node // 2 for node in range(22)]
    slots = np.array([*range(140), *order])
    segment = Segment(22, slots, 140, tree_mask(parents), positions, positions)
    in_tree = attend(queries[order], k, v, [segment], 0.1)
    assert torch.equal(in_tree[20], alone[0])
    chunk = list(range(100, 160))
    in_chunk = attend(
        queries[100:160], k, v, [Segment(60, slice(0, 160), 100, None, chunk, chunk)], 0.1
    )
    assert torch.equal(in_chunk[50], alone[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("outputs", "inputs"), [(7, 5), (70, 64)])
def test_packed_rows_can_be_read(outputs, inputs, dtype):
    require(dtype)
    weight = random(outputs, inputs).to(dtype)
    chosen = torch.tensor([outputs - 1, 0, 3, 3])
    assert torch.equal(NativeRows(weight).rows(chosen), weight[chosen])


@pytest.mark.parametrize("name", CASES)
def test_a_step_is_the_decoder(name, tmp_path):
    """All families: embedding to logits in one call, as the decoder computes it part by part."""
    save_random(CASES[name], tmp_path)
    decoder = load_decoder(tmp_path)
    runner = Runner(decoder, 400)
    assert runner.native is not None
    sequences = random_sequences()
    with torch.inference_mode():
        expected = flat_logits(decoder, sequences)
    spans, start = [], 0
    for tokens in sequences:
        length = len(tokens)
        pages = Pages(range(start, start + length), 1)
        spans.append(Span(tokens.tolist(), list(range(length)), pages, 0, 0, None, length))
        start += length
    found = runner.run(spans)
    assert (found - expected).abs().max() <= 2e-5
    assert runner.run([]).shape == (0, decoder.architecture.vocab_size)


def run_chain(runner: Runner, tokens: list[int]) -> torch.Tensor:
    length = len(tokens)
    pages = Pages(range(length), 1)
    return runner.run([Span(tokens, range(length), pages, 0, 0, None, length)])


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "MistralForCausalLM"])
def test_a_step_computed_in_parts_is_the_whole_step_to_the_bit(name, tmp_path, monkeypatch):
    """Chains, one behind a prefix, and a tree; all, some and none of their logits."""
    save_random(CASES[name], tmp_path)
    decoder = load_decoder(tmp_path)
    tokens = np.random.default_rng(0).integers(0, 61, 200).tolist()
    parents = [-1, 0, 0, 1, 3, 2, 5, 5, 0, 4, 9]
    mask = tree_mask(parents)
    depths = mask.sum(1) - 1

    def spans() -> list[Span]:
        pages = [Pages(range(start, start + 50), 1) for start in range(0, 200, 50)]
        return [
            Span(tokens[:40], range(40), pages[0], 0, 0, None, 40),
            Span(tokens[40:51], (10 + depths).tolist(), pages[1], 10, 10, mask, 11),
            Span(tokens[60:67], range(10, 17), pages[2], 10, 10, None, 2),
            Span(tokens[70:100], range(30), pages[3], 0, 0, None, 0),
        ]

    def run(most_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        monkeypatch.setattr(native, "_MOST_TOKENS", most_tokens)
        runner = Runner(decoder, 200)
        for slots in (range(50, 60), range(100, 110)):
            runner.run([Span(tokens[:10], range(10), Pages(slots, 1), 0, 0, None, 0)])
        step = runner.native._run_step
        monkeypatch.setattr(
            runner.native, "_run_step", lambda *each: calls.append(0) or step(*each)
        )
        calls.clear()
        return runner.run(spans()), runner.pool._pages

    calls: list[int] = []
    whole = run(1000)
    assert len(calls) == 1
    for most_tokens in (1, 7, 30, 87):
        parts = run(most_tokens)
        assert len(calls) > 1
        assert all(map(torch.equal, parts, whole))


def test_a_step_of_odd_sizes_reads_nothing_beside_them(tmp_path):
    """In bfloat16 a word is two inputs: where one is left, what stands behind it is not read."""
    require(torch.bfloat16)
    tokens = random_sequences()[0].tolist()
    runners = []
    for name, sizes in (("odd", (63, 53)), ("even", (96, 96))):
        sizes = dict(zip(("hidden_size", "intermediate_size"), sizes, strict=True))
        save_random(
            toy_config(num_attention_heads=3, num_key_value_heads=1, head_dim=16, **sizes),
            tmp_path / name,
        )
        runners.append(Runner(load_decoder(tmp_path / name, dtype="bfloat16"), 400))
    odd, even = runners
    expected = run_chain(odd, tokens)
    even.decoder.layers[0].attention_norm.weight.data.fill_(torch.nan)
    assert run_chain(even, tokens).isnan().all()  # leaves nothing else in memory that is kept
    assert torch.equal(run_chain(odd, tokens), expected)
    assert expected.isfinite().all()


def test_a_token_beyond_the_vocabulary_is_refused(tmp_path):
    save_random(CASES["LlamaForCausalLM"], tmp_path)
    runner = Runner(load_decoder(tmp_path), 400)
    pages = runner.pool._pages.clone()
    for wrong in (61, -1):
        for num_before in (1, 300):  # in one part and in two
            with pytest.raises(IndexError, match="0 to 60"):
                run_chain(runner, [1] * num_before + [wrong])
    assert torch.equal(runner.pool._pages, pages)


def test_a_step_heeds_no_default_type(tmp_path, monkeypatch):
    """Logits are float32, where a default of two bytes would leave room for half of them."""
    save_random(CASES["LlamaForCausalLM"], tmp_path)
    runner = Runner(load_decoder(tmp_path), 400)
    expected = run_chain(runner, [1, 2, 3])
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = run_chain(runner, [1, 2, 3])
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(found, expected)


def test_a_step_reads_the_memory_it_was_given(tmp_path):
    """Also where parameters have moved since: what they left must not be another's by then."""
    save_random(CASES["LlamaForCausalLM"], tmp_path)
    runner = Runner(load_decoder(tmp_path), 400)
    expected = run_chain(runner, [1, 2, 3])
    runner.decoder.double()
    others = [torch.full_like(each, torch.nan).float() for each in runner.decoder.parameters()]
    assert torch.equal(run_chain(runner, [1, 2, 3]), expected)
    del others


@pytest.fixture
def copied(monkeypatch, tmp_path) -> Path:
    """An empty cache, and a compiler that copies what is compiled already."""
    ready = Path(build.library()._name)
    copy = ready.read_bytes()
    monkeypatch.setattr(build, "_compile", lambda _, target: target.write_bytes(copy))
    monkeypatch.setenv("SPECINFER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache/kernels" / ready.name


def load() -> None:
    assert build.library.__wrapped__().specinfer_lanes() == kernels().lanes


def test_kernels_that_cannot_be_loaded_are_compiled_anew(copied, caplog):
    copied.parent.mkdir(parents=True)
    copied.write_bytes(b"cut short")
    load()
    assert "compiled anew" in caplog.text
    assert copied.stat().st_size > 1000


def test_kernels_that_cannot_be_kept_serve_one_process(copied, monkeypatch, caplog):
    file = copied.parent.parent
    file.write_text("no folder")
    load()
    assert "cannot be kept" in caplog.text


def test_nothing_is_loaded_from_where_others_can_write(copied, caplog):
    copied.parent.mkdir(parents=True)
    copied.parent.chmod(0o777)
    copied.write_bytes(b"another's")
    load()
    assert "can be written by others" in caplog.text
    assert copied.read_bytes() == b"another's"


def test_a_compiler_may_stand_behind_a_launcher(monkeypatch):
    monkeypatch.setenv("CXX", "env NOTHING=1 g++")
    monkeypatch.setattr(build, "_load", lambda compiler, flags: build._version(compiler))
    assert b"g++" in build.library.__wrapped__()
