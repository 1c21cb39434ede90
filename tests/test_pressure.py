"""Identity where memory is short, on the bundled pair and on long toy contexts, in float32.

Requests are sent back and recomputed, beginnings are shared, trees shrink: no text changes.
"""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from specinfer.config import PAPER_TREE, EngineConfig, Speculation
from specinfer.engine.engine import Engine
from specinfer.llm import LLM
from specinfer.models.decoder import Decoder
from specinfer.request import SamplingParams
from tests.engines import (
    finish,
    free_blocks,
    keys_and_values,
    model_drafter,
    outputs_of,
    toy_decoder,
    toy_engine,
)
from tests.test_identity import GREEDY, SEEDED, Pair, is_empty

TOKEN_BYTES = {0: 6144, 1: 6144 + 1024, 2: 6144 + 2048}
"""Of the pair in float32, by the number of drafters."""


@pytest.fixture(scope="module")
def pair() -> Pair:
    return Pair()


def short_of_memory(
    pair: Pair, tree: str = "off", num_drafters: int = 1, num_tokens: int = 288, **options: Any
) -> LLM:
    """Pages for one request of the whole context, and the tree of it."""
    num_models = 0 if tree == "off" else num_drafters
    return pair.llm(
        tree,
        num_drafters,
        kv_cache_memory=num_tokens * TOKEN_BYTES[num_models],
        max_num_seqs=8,
        **options,
    )


def crowd(count: int = 8) -> list[SamplingParams]:
    """Long answers, greedy and seeded in turns."""
    ways = (replace(GREEDY, max_tokens=40), replace(SEEDED, max_tokens=40, top_p=0.95))
    return [replace(ways[n % 2], ignore_eos=True, n=1 + (n == 3)) for n in range(count)]


@pytest.mark.parametrize(
    ("tree", "num_drafters", "limits"),
    [
        ("off", 1, {}),
        (PAPER_TREE, 1, {}),
        ("auto", 1, {}),
        ("3,2,1", 2, {"enable_prefix_caching": False}),
        ("2,2", 2, {"max_num_batched_tokens": 24, "chunked_prefill_size": 9}),
        ("calibrated", 2, {"block_size": 3}),
    ],
)
def test_whoever_is_sent_back_says_the_same(
    pair: Pair, tree: str, num_drafters: int, limits: dict[str, Any]
) -> None:
    llm = short_of_memory(pair, tree, num_drafters, num_tokens=330, **limits)
    stats = llm.engine.stats
    stats.reset()
    outputs = llm.generate(pair.prompts, crowd())
    assert stats.num_preemptions > 0
    assert sum(output.stats.num_preemptions for output in outputs) == stats.num_preemptions
    pair.check(pair.prompts, crowd(), outputs)
    assert is_empty(llm)
    if tree != "off":
        assert sum(output.stats.num_accepted for output in outputs) > 50


def test_an_unseeded_request_that_is_sent_back_goes_on_drawing(pair: Pair) -> None:
    """Its randomness goes on where it was, so without trees its text is that of plenty."""
    params = replace(SEEDED, seed=None, max_tokens=40, ignore_eos=True)
    options: dict[str, Any] = {"seed": 5}  # engines of this test alone: draws count from the start
    plenty = pair.llm(**options, max_num_seqs=8)
    scarce = short_of_memory(pair, **options)
    texts = [
        [o.outputs[0].text for o in llm.generate(pair.prompts, params)] for llm in (plenty, scarce)
    ]
    assert scarce.engine.stats.num_preemptions > 0
    assert texts[0] == texts[1]


@pytest.mark.parametrize("tree", ["off", "3,2,1"])
def test_a_second_time_is_a_hit_and_says_the_same(pair: Pair, tree: str) -> None:
    llm = pair.llm(tree, 2, max_num_seqs=8, block_size=4, max_model_len=200)
    prompts = [pair.prompts[n] for n in (2, 7)]
    prompts += [[*prompt, *pair.prompts[1]] for prompt in prompts]  # and longer ones
    for params in (replace(GREEDY, max_tokens=20), replace(SEEDED, max_tokens=20, n=2)):
        for turn in range(2):
            llm.engine.stats.reset()
            outputs = llm.generate(prompts, params)
            pair.check(prompts, [params] * 4, outputs)
            hits = llm.engine.stats.num_prefix_hits
            for prompt, output in zip(prompts, outputs, strict=True):
                cached = output.stats.num_cached_tokens
                assert cached % 4 == 0
                assert cached < len(prompt)
                assert not turn or cached == 4 * ((len(prompt) - 1) // 4)
            assert hits >= sum(output.stats.num_cached_tokens for output in outputs)
    assert is_empty(llm)


def test_a_chat_finds_its_last_turn(pair: Pair) -> None:
    llm = pair.llm("3,2,1", 1, max_num_seqs=8, block_size=4, max_model_len=200)
    prompt = list(pair.prompts[4])
    first = llm.generate([prompt], replace(GREEDY, max_tokens=25, ignore_eos=True))[0]
    turn = [*prompt, *first.outputs[0].token_ids, *pair.prompts[1][:7]]
    (second,) = llm.generate([turn], GREEDY)
    computed = len(prompt) + 25 - 1  # the last token was never computed
    assert second.stats.num_cached_tokens == 4 * (computed // 4)
    pair.check([turn], [GREEDY], [second])


def test_salts_keep_requests_apart(pair: Pair) -> None:
    llm = pair.llm("off", max_num_seqs=8, block_size=4, max_model_len=200)
    hits = []
    for salt in ("mine", "yours", "mine", "yours"):
        (output,) = llm.generate([pair.prompts[6]], replace(GREEDY, cache_salt=salt))
        hits.append(output.stats.num_cached_tokens)
    most = 4 * ((len(pair.prompts[6]) - 1) // 4)
    assert hits == [0, 0, most, most]


def test_rounding_is_all_that_other_chunks_change(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels round by the shape of a pass, so K and V that are shared differ in their last bits
    from those a request would have computed: by 5e-7 of the largest here."""
    engine = pair.llm("off", block_size=4, max_model_len=200).engine
    prompt, held = pair.prompts[7], []
    for chunk in (512, 5, 1):
        engine.scheduler.clear()
        config = replace(engine.scheduler._config, max_num_batched_tokens=chunk)
        monkeypatch.setattr(engine.scheduler, "_config", config)
        (sequence,) = engine.add("one", prompt, replace(GREEDY, ignore_eos=True))
        while sequence.num_output < 2:
            engine.step()
        assert sequence.pages is not None
        held.append(keys_and_values(engine.target, sequence.pages, len(prompt)))
        engine.abort([sequence])
    for other in held[1:]:
        assert (other - held[0]).abs().max() < 3e-6 * held[0].abs().max()


# --- steps that fail ------------------------------------------------------------------------------


def test_nothing_of_a_failed_step_is_shared(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its blocks were published before it began, and hold anything."""
    llm = pair.llm("2,2", block_size=4, max_model_len=200)
    runner: Any = llm.engine.target
    prompt = pair.prompts[7]
    for num_good in (0, 1, 3):
        calls = 0

        def fails(spans: Any, run: Any = runner.run, num_good: int = num_good) -> Any:
            nonlocal calls
            calls += 1
            if calls > num_good:
                for layer in range(runner.decoder.architecture.num_layers):
                    for pages in runner.pool.layer(layer):
                        pages.fill_(7.0)
                raise RuntimeError("no")
            return run(spans)

        with monkeypatch.context() as patch:
            patch.setattr(runner, "run", fails)
            with pytest.raises(RuntimeError, match="no"):
                llm.generate([prompt], GREEDY)
        (output,) = llm.generate([prompt], GREEDY)
        assert output.stats.num_cached_tokens == 0
        pair.check([prompt], [GREEDY], [output])


# --- long contexts --------------------------------------------------------------------------------

VOCAB = 24


@pytest.fixture(scope="module")
def long_target() -> Decoder:
    return toy_decoder(7, vocab_size=VOCAB, num_hidden_layers=2, max_position_embeddings=1 << 15)


@pytest.fixture(scope="module")
def long_drafter() -> Decoder:
    return toy_decoder(
        7, vocab_size=VOCAB, num_hidden_layers=1, hidden_size=16, max_position_embeddings=1 << 15
    )


def long_texts(length: int) -> list[list[int]]:
    """Three prompts, two of which begin alike."""
    rng = np.random.default_rng(length)
    whole = rng.integers(0, VOCAB, length).tolist()
    return [whole, [*whole[: length * 3 // 4], *whole[: length // 8]], whole[::-1]]


def stays_exact(target: Decoder, drafter: Decoder, length: int) -> None:
    """Chunks, hits, trees and preemption, against each prompt alone in one piece."""
    prompts, num_slots = long_texts(length), 2 * length + 256
    ways: list[dict[str, Any]] = [{"temperature": 0.0}, {"temperature": 0.9, "seed": 4}]
    params = [SamplingParams(max_tokens=40, ignore_eos=True, **ways[n % 2]) for n in range(3)]
    size = 16

    def engine(*drafters: Decoder, **options: Any) -> Engine:
        limits = {"max_num_seqs": 4, "block_size": size} | options
        return toy_engine(
            target,
            [model_drafter(each, num_slots // size * size) for each in drafters],
            speculation=Speculation(tree="3,2,1" if drafters else "off"),
            num_blocks=num_slots // size,
            config=EngineConfig(**limits),
            max_model_len=length + 64,
        )

    expected = []
    for prompt, each in zip(prompts, params, strict=True):
        alone = engine(max_num_batched_tokens=length, enable_prefix_caching=False)
        sequences = alone.add("alone", prompt, each)
        finish(alone)
        expected += outputs_of(sequences)
    # The target drafts for itself, so that long paths are accepted; and one that is often wrong.
    served = engine(target, drafter, max_num_batched_tokens=1024, chunked_prefill_size=256)
    (first,) = served.add("0", prompts[0], params[0])
    steps = 0
    while first.num_output < 3:
        served.step()
        steps += 1
        used = served.stats.num_blocks_used
        assert -(-(len(first.tokens) - 1) // size) <= used <= -(-(len(first.tokens) + 15) // size)
    assert steps >= length // 1024
    others = [s for n in (1, 2) for s in served.add(str(n), prompts[n], params[n])]
    finish(served)
    assert outputs_of([first, *others]) == expected
    assert others[0].stats.num_cached_tokens == length * 3 // 4 // size * size
    assert served.stats.num_preemptions == 0
    assert first.stats.num_accepted > 10
    again = [s for n in range(3) for s in served.add(str(n), prompts[n], params[n])]
    waits = 0
    while served.has_work:
        served.step()
        waits += served.stats.num_waiting
    assert outputs_of(again) == expected
    assert waits > 0, "two of three fit"
    assert free_blocks(served) == num_slots // size


def test_a_context_of_4k(long_target: Decoder, long_drafter: Decoder) -> None:
    stays_exact(long_target, long_drafter, 4096)


@pytest.mark.slow
def test_a_context_of_16k(long_target: Decoder, long_drafter: Decoder) -> None:
    stays_exact(long_target, long_drafter, 16384)


@pytest.mark.parametrize("length", [1500, pytest.param(16000, marks=pytest.mark.slow)])
def test_long_requests_are_sent_back_and_come_back(
    long_target: Decoder, long_drafter: Decoder, length: int
) -> None:
    """Two fit until both have written for a while."""
    prompts = [text[: length - 9 * n] for n, text in enumerate(long_texts(length)[::2])]
    params = SamplingParams(max_tokens=150, ignore_eos=True, temperature=0.7, seed=1)
    num_blocks = -(-2 * length // 16) + 12

    def serve(
        num_blocks: int, texts: list[list[int]], *drafters: Decoder
    ) -> tuple[Engine, list[Any]]:
        engine = toy_engine(
            long_target,
            [model_drafter(each, num_blocks * 16) for each in drafters],
            speculation=Speculation(tree="2,2" if drafters else "off"),
            num_blocks=num_blocks,
            config=EngineConfig(block_size=16),
            max_model_len=length + 200,
        )
        sequences = [s for n, text in enumerate(texts) for s in engine.add(str(n), text, params)]
        finish(engine)
        return engine, outputs_of(sequences)

    expected = [serve(num_blocks, [text])[1][0] for text in prompts]
    engine, outputs = serve(num_blocks, prompts, long_target, long_drafter)
    assert outputs == expected
    assert engine.stats.num_preemptions > 0
    assert engine.stats.num_target_tokens < 2 * length * 1.5, "most was there still"


def test_a_long_prompt_holds_nobody_up(
    long_target: Decoder, long_drafter: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the target nor a drafter computes more than a chunk of it while others write."""
    engine = toy_engine(
        long_target,
        [model_drafter(each, 4096) for each in (long_target, long_drafter)],
        speculation=Speculation(tree="2,2"),
        num_blocks=256,
        config=EngineConfig(block_size=16, chunked_prefill_size=64),
        max_model_len=2000,
    )
    params = SamplingParams(max_tokens=120, ignore_eos=True, temperature=0.0)
    (short,) = engine.add("short", [1, 2, 3], params)
    engine.step()
    timed: Any = engine.speculator.drafters
    sizes: list[int] = []
    for runner in (engine.target, *(timed[n]._drafter._runner for n in range(2))):

        def run(spans: Any, run: Any = runner.run) -> Any:
            sizes.append(sum(len(span.tokens) for span in spans))
            return run(spans)

        monkeypatch.setattr(runner, "run", run)
    (long,) = engine.add("long", long_texts(700)[0], params)
    while not long.stats.num_accepted:
        num_known = len(short.tokens)
        sizes.clear()
        engine.step()
        assert len(short.tokens) > num_known, "it writes in every step"
        assert max(sizes) <= 64 + 2 * (1 + 12), "a chunk, and what two may draft"
        assert sum(sizes) <= 3 * 64 + 100
    finish(engine)
    for sequence, prompt in ((short, [1, 2, 3]), (long, long_texts(700)[0])):
        alone = toy_engine(
            long_target, num_blocks=256, config=EngineConfig(block_size=16), max_model_len=2000
        )
        expected = alone.add("alone", prompt, params)
        finish(alone)
        assert outputs_of([sequence]) == outputs_of(expected)
