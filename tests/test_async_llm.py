"""AsyncLLM: the same text as LLM, aborts that free pages, errors that reach their caller."""

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from specinfer.async_llm import AsyncLLM
from specinfer.errors import ModelError, RequestError, SpecInferError
from specinfer.outputs import RequestOutput
from specinfer.request import SamplingParams
from tests.serving import Held

GREEDY = SamplingParams(temperature=0, max_tokens=24)


@pytest.fixture(scope="module")
def engine() -> Iterator[AsyncLLM]:
    llm = AsyncLLM("zoo:parley", drafters=["zoo:parley-draft"], dtype="float32", max_model_len=256)
    yield llm
    llm.close()
    llm.close()


async def last(engine: AsyncLLM, prompt: str, params: SamplingParams) -> RequestOutput:
    outputs = [output async for output in engine.generate(prompt, params)]
    lengths = [len(output.outputs[0].token_ids) for output in outputs]
    assert lengths == sorted(lengths)
    assert [output.finished for output in outputs] == [False] * (len(outputs) - 1) + [True]
    return outputs[-1]


def test_concurrent_requests_get_the_text_they_get_alone(engine: AsyncLLM) -> None:
    prompts = ["Once upon a time", "I want to book a table", "What is 3 plus 4?"]

    async def together() -> list[RequestOutput]:
        return await asyncio.gather(*(last(engine, prompt, GREEDY) for prompt in prompts))

    async def alone() -> list[RequestOutput]:
        return [await last(engine, prompt, GREEDY) for prompt in prompts]

    for one, other in zip(asyncio.run(together()), asyncio.run(alone()), strict=True):
        assert one.outputs[0].text == other.outputs[0].text


def test_abort_ends_the_stream_and_frees_its_pages(
    engine: AsyncLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = Held(engine, monkeypatch, lambda steps: len(steps) == 3)

    async def run() -> RequestOutput:
        params = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
        outputs = engine.generate("Once upon a time", params, request_id="mine")
        await anext(outputs)
        await engine.abort("mine")
        held.go_on.set()
        return [output async for output in outputs][-1]

    output = asyncio.run(run())
    assert output.outputs[0].finish_reason == "abort"
    assert len(output.outputs[0].token_ids) < 200
    assert not engine.llm.engine.has_work


def test_leaving_the_loop_aborts(engine: AsyncLLM) -> None:
    async def run() -> None:
        params = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
        stream = engine.generate("Once upon a time", params)
        async for _ in stream:
            break
        await stream.aclose()
        await last(engine, "Hello", GREEDY)

    asyncio.run(run())
    assert not engine.llm.engine.has_work


def test_errors_reach_their_caller_and_no_one_else(engine: AsyncLLM) -> None:
    async def run() -> list[RequestOutput | BaseException]:
        return await asyncio.gather(
            last(engine, "", GREEDY),
            last(engine, "Hello", GREEDY),
            last(engine, "word " * 400, GREEDY),
            return_exceptions=True,
        )

    empty, fine, long = asyncio.run(run())
    assert isinstance(empty, RequestError)
    assert isinstance(long, RequestError)
    assert isinstance(fine, RequestOutput)
    assert fine.finished


def test_a_failed_step_fails_its_requests_and_the_engine_goes_on(
    engine: AsyncLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(engine.llm.engine, "step", lambda: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            asyncio.run(last(engine, "Hello", GREEDY))
    assert asyncio.run(last(engine, "Hello", GREEDY)).finished


def test_only_what_the_step_ended_is_failed(
    engine: AsyncLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One was aborted before, and its stream is still open: that is nobody's failure."""
    steps = engine.llm.engine._step
    params = SamplingParams(temperature=0, max_tokens=200, ignore_eos=True)
    held = Held(engine, monkeypatch, lambda steps: True)

    async def run() -> list[str | None]:
        old = engine.submit([("Hello", params)], "old")
        await old.accepted()
        await engine.abort("old")
        held.go_on.set()
        with monkeypatch.context() as patch:
            failing = iter([False, True])
            patch.setattr(
                engine.llm.engine, "_step", lambda: 1 / 0 if next(failing, False) else steps()
            )
            with pytest.raises(ZeroDivisionError):
                await asyncio.wait_for(last(engine, "Hello", params), 60)
        reasons = [update.output.outputs[0].finish_reason async for update in old]
        old.close()
        return reasons

    assert asyncio.run(run())[-1] == "abort"
    assert not engine.llm.engine.has_work


def test_logits_that_are_not_finite_fail_their_request_alone(
    engine: AsyncLLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_target, long = engine.llm.engine.target.run, engine.llm.tokenizer.encode("word " * 30)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)

    def run_broken(spans: Any) -> Any:
        logits, start = run_target(spans).clone(), 0
        for span in spans:
            if span.positions[0] + len(span.tokens) >= len(long):
                logits[start : start + span.num_logits] = float("nan")
            start += span.num_logits
        return logits

    async def run() -> list[Any]:
        asked = [last(engine, text, params) for text in ("Hello", "word " * 30, "Well")]
        return await asyncio.gather(*asked, return_exceptions=True)

    whole = asyncio.run(run())
    monkeypatch.setattr(engine.llm.engine.target, "run", run_broken)
    first, broken, third = asyncio.run(run())
    assert isinstance(broken, ModelError)
    for told, plain in ((first, whole[0]), (third, whole[2])):
        assert told.outputs[0].token_ids == plain.outputs[0].token_ids
    assert not engine.llm.engine.has_work


def test_where_the_thread_dies_all_are_told_and_nobody_may_join(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    llm = AsyncLLM("zoo:parley-draft", max_model_len=64)

    def die() -> None:
        raise SystemExit

    async def run() -> None:
        monkeypatch.setattr(llm.llm.engine, "step", die)
        for _ in range(2):  # one that ran, one that comes too late
            with pytest.raises(SpecInferError, match=r"ended by a failure|closed"):
                await asyncio.wait_for(last(llm, "Hello", GREEDY), 60)

    asyncio.run(run())
    assert not llm.is_alive
    llm.close()


def test_a_closed_engine_says_so() -> None:
    llm = AsyncLLM("zoo:parley-draft", max_model_len=64)
    llm.close()
    with pytest.raises(SpecInferError, match="closed"):
        asyncio.run(last(llm, "Hello", GREEDY))
