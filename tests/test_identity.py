"""Identity on the bundled pair: trees, batches and drafters change no text.

With our own kernels not one token, in any precision. Others round differently for different
batches, so there a text in float32 may part from plain decoding where the target's two best tokens
are nearly tied: then, and only then, a difference is excused, and counted.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.exactness import Exactness, Settings, find_divergence
from benchmarks.prompts import load_chats
from specinfer.config import PAPER_TREE, Speculation
from specinfer.errors import RequestError
from specinfer.llm import LLM
from specinfer.outputs import CompletionOutput, RequestOutput
from specinfer.request import SamplingParams
from tests.engines import free_blocks

DRAFTER = "zoo:parley-draft"
TREES = (PAPER_TREE, "2,2", "4", "3,2,1", "3x4", "sequoia", "best-first", "calibrated", "auto")
GREEDY = SamplingParams(temperature=0.0, max_tokens=32)
SEEDED = SamplingParams(temperature=0.8, max_tokens=30, seed=1)
MAX_EXCUSED = 2
"""Near-ties in one comparison: more than a few in a few hundred tokens are no accident."""


class Pair:
    """The pair, loaded once per way of running it; and what plain decoding says, computed once."""

    def __init__(self) -> None:
        self._llms: dict[Any, LLM] = {}
        self._plain: dict[Any, RequestOutput] = {}
        template = self.llm().tokenizer.apply_chat_template
        # Of mixed lengths: what the user says, cut or whole, and twice in a row
        self.prompts = [
            (template(chat) * (1 + n % 3))[: 9 * n + 5]
            for n, chat in enumerate(load_chats(8, encode=template))
        ]

    def llm(
        self, tree: str = "off", num_drafters: int = 1, *, draw: Any = "auto", **options: Any
    ) -> LLM:
        key = (tree, num_drafters, draw, *sorted(options.items()))
        if key not in self._llms:
            self._llms[key] = LLM(
                "zoo:parley",
                drafters=[] if tree == "off" else [DRAFTER] * num_drafters,
                speculation=Speculation(tree=tree, draw=draw),
                show_progress=False,
                **{"max_model_len": 256, "dtype": "float32", **options},
            )
        return self._llms[key]

    def plain(self, prompt: Sequence[int], params: SamplingParams, **options: Any) -> RequestOutput:
        """One request alone, without drafters."""
        key = (*prompt, repr(params), *sorted(options.items()))
        if key not in self._plain:
            (self._plain[key],) = self.llm(**options).generate([list(prompt)], params)
        return self._plain[key]

    def check(
        self,
        prompts: Sequence[Sequence[int]],
        params: Sequence[SamplingParams],
        actual: Sequence[RequestOutput],
        **options: Any,
    ) -> int:
        """Compare whole outputs with plain decoding alone; returns how many near-ties differ."""
        num_excused = 0
        engine = self.llm(**options).engine
        for prompt, each, request in zip(prompts, params, actual, strict=True):
            expected = self.plain(prompt, each, **options)
            assert request.finished
            assert len(request.outputs) == each.n
            for sample, (a, b) in enumerate(zip(expected.outputs, request.outputs, strict=True)):
                if fields_of(a) == fields_of(b):
                    continue
                divergence = find_divergence(
                    engine, prompt, each, a.token_ids, b.token_ids, sample=sample
                )
                assert divergence is not None, f"{fields_of(a)} != {fields_of(b)}"
                assert divergence.is_excused, divergence
                num_excused += 1
        assert num_excused <= (0 if engine.target.native else MAX_EXCUSED)
        return num_excused

    def same(
        self,
        llm: LLM,
        params: Sequence[SamplingParams],
        prompts: Sequence[list[int]] | None = None,
        **options: Any,
    ) -> None:
        """All prompts together in one engine, against plain decoding alone."""
        prompts = prompts or self.prompts
        outputs = llm.generate(prompts, params)
        self.check(prompts, params, outputs, **options)
        assert is_empty(llm)


def fields_of(output: CompletionOutput) -> tuple[Any, ...]:
    return output.token_ids, output.text, output.finish_reason, output.stop_reason


def is_empty(llm: LLM) -> bool:
    """Whether the engine holds nothing any more."""
    allocator = llm.engine.scheduler._allocator
    timed: Any = llm.engine.speculator.drafters
    return (
        not llm.engine.has_work
        and free_blocks(llm.engine) == allocator.num_blocks
        and not any(getattr(each._drafter, "_states", None) for each in timed)
    )


@pytest.fixture(scope="module")
def pair() -> Pair:
    return Pair()


# --- greedy ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_drafters", [1, 2])
@pytest.mark.parametrize("tree", TREES)
def test_greedy_in_a_batch(pair: Pair, tree: str, num_drafters: int) -> None:
    pair.same(pair.llm(tree, num_drafters), [GREEDY] * 8)


@pytest.mark.parametrize("tree", TREES)
def test_greedy_alone(pair: Pair, tree: str) -> None:
    for prompt in pair.prompts[3:5]:
        outputs = pair.llm(tree).generate([prompt], GREEDY)
        pair.check([prompt], [GREEDY], outputs)


@pytest.mark.parametrize("draw", ["iid", "without-replacement", "pick"])
def test_greedy_with_every_draw(pair: Pair, draw: str) -> None:
    pair.same(pair.llm("2,2", draw=draw), [GREEDY] * 8)


def test_trees_are_of_use(pair: Pair) -> None:
    """Else identity shows nothing."""
    outputs = pair.llm(PAPER_TREE).generate(pair.prompts, replace(GREEDY, ignore_eos=True))
    for output in outputs:
        assert output.stats.num_output_tokens == 32
    mean = sum(o.stats.num_output_tokens for o in outputs) / sum(
        o.stats.num_target_steps for o in outputs
    )
    assert mean > 2.0
    plain = pair.plain(pair.prompts[0], GREEDY)
    assert plain.stats.tokens_per_step == 1.0


@pytest.mark.parametrize("params", [GREEDY, replace(SEEDED, temperature=1.0)], ids=["0", "1"])
@pytest.mark.parametrize(
    "options",
    [{}, {"quantization": "int8"}, {"quantization": "int4"}],
    ids=["bf16", "int8", "int4"],
)
def test_every_precision_with_our_kernels(
    pair: Pair, options: dict[str, Any], params: SamplingParams
) -> None:
    options = {"dtype": "bfloat16", **options}
    plain = pair.llm(**options)
    if plain.engine.target.native is None:
        pytest.skip("kernels that round alike in every batch are ours alone")
    expected = [pair.plain(prompt, params, **options).outputs[0] for prompt in pair.prompts]
    for tree in ("off", "3,2,1", "auto"):
        together = pair.llm(tree, **options).generate(pair.prompts, params)
        for ours, alone in zip(together, expected, strict=True):
            assert fields_of(ours.outputs[0]) == fields_of(alone)


# --- seeded ---------------------------------------------------------------------------------------

SEEDED_BATCH = [
    replace(SEEDED, seed=seed, top_p=0.95, n=3 if seed == 2 else 1) for seed in range(8)
]


@pytest.mark.parametrize(
    ("tree", "num_drafters"),
    [("off", 1), (PAPER_TREE, 1), ("3,2,1", 1), ("2,2", 2), ("1,1,1,1", 2)],
)
def test_seeded_in_a_batch(pair: Pair, tree: str, num_drafters: int) -> None:
    pair.same(pair.llm(tree, num_drafters), SEEDED_BATCH)


@pytest.mark.parametrize("draw", ["iid", "without-replacement"])
def test_seeded_with_every_draw(pair: Pair, draw: str) -> None:
    pair.same(pair.llm("2,2", draw=draw), SEEDED_BATCH)


@pytest.mark.parametrize("num_drafters", [1, 2])
def test_seeded_alone(pair: Pair, num_drafters: int) -> None:
    outputs = pair.llm("3,2,1", num_drafters).generate([pair.prompts[4]], SEEDED)
    pair.check([pair.prompts[4]], [SEEDED], outputs)


def test_samples_differ_and_the_first_is_that_of_one(pair: Pair) -> None:
    prompt, three = pair.prompts[3], replace(SEEDED, n=3)
    (request,) = pair.llm("2,2").generate([prompt], three)
    pair.check([prompt], [three], [request])
    assert len({output.text for output in request.outputs}) == 3
    assert fields_of(request.outputs[0]) == fields_of(pair.plain(prompt, SEEDED).outputs[0])


# --- requests that come and go --------------------------------------------------------------------


def mixed(pair: Pair) -> list[SamplingParams]:
    """One of each kind: lengths, filters, ends; two of them unseeded."""
    return [
        replace(GREEDY, max_tokens=3),
        SamplingParams(temperature=1.0, max_tokens=25),
        replace(SEEDED, top_k=20, n=2),
        replace(GREEDY, max_tokens=60, ignore_eos=True),
        replace(SEEDED, seed=9, min_p=0.02, min_tokens=10),
        replace(GREEDY, max_tokens=1),
        SamplingParams(temperature=0.6, top_p=0.9, max_tokens=12, n=2),
        replace(SEEDED, temperature=1.2, max_tokens=33, ignore_eos=True),
    ]


@pytest.mark.parametrize(
    ("tree", "num_drafters", "limits"),
    [
        ("off", 1, {"max_num_seqs": 3}),
        (PAPER_TREE, 1, {"max_num_seqs": 3}),
        ("3,2,1", 2, {"max_num_seqs": 4, "max_num_batched_tokens": 40}),
        ("2,2", 1, {"max_num_seqs": 8, "max_num_batched_tokens": 12}),
    ],
)
def test_requests_enter_and_leave_between_steps(
    pair: Pair, tree: str, num_drafters: int, limits: dict[str, int]
) -> None:
    """Greedy and seeded ones say what they say alone, whoever else is there."""
    llm, params = pair.llm(tree, num_drafters, **limits), mixed(pair)
    pending = []
    for prompt, each in zip(pair.prompts, params, strict=True):
        pending.append(llm.submit(prompt, each))
        llm.engine.step()
    while llm.engine.has_work:
        llm.engine.step()
    compared = [n for n, each in enumerate(params) if each.is_greedy or each.seed is not None]
    assert len(compared) == 6
    pair.check(
        [pair.prompts[n] for n in compared],
        [params[n] for n in compared],
        [pending[n].output() for n in compared],
    )
    for n in (1, 6):
        for output in pending[n].output().outputs:
            assert output.finish_reason in ("stop", "length")
            assert 0 < len(output.token_ids) <= (params[n].max_tokens or 0)
    assert is_empty(llm)


# --- every way to end, in the middle of a path ----------------------------------------------------


def text_of(pair: Pair, number: int, params: SamplingParams = GREEDY) -> RequestOutput:
    return pair.plain(pair.prompts[number], replace(params, ignore_eos=True))


def middle_words(pair: Pair, number: int) -> tuple[str, ...]:
    """A few letters from the inside of what plain decoding says: they cross token borders."""
    text = text_of(pair, number).outputs[0].text
    return tuple(text[at : at + 3] for at in (len(text) // 2, len(text) // 3) if text[at : at + 3])


def ending(way: str, pair: Pair, number: int) -> SamplingParams:
    tokens = text_of(pair, number).outputs[0].token_ids
    ways: dict[str, Callable[[], dict[str, Any]]] = {
        "end tokens": lambda: {"max_tokens": 50},
        "end tokens shown": lambda: {"max_tokens": 50, "skip_special_tokens": False},
        "ignored end tokens": lambda: {"max_tokens": 40, "ignore_eos": True},
        "min_tokens": lambda: {"max_tokens": 40, "min_tokens": 20},
        "all tokens": lambda: {"max_tokens": 30, "min_tokens": 30},
        "max_tokens": lambda: {"max_tokens": 5 + number},
        "one token": lambda: {"max_tokens": 1},
        "stop string": lambda: {"stop": middle_words(pair, number), "ignore_eos": True},
        "stop string kept": lambda: {
            "stop": middle_words(pair, number),
            "include_stop_str_in_output": True,
            "ignore_eos": True,
        },
        "stop string later": lambda: {"stop": ["e", "a"], "min_tokens": 7, "ignore_eos": True},
        "stop token": lambda: {"stop_token_ids": tokens[4 + number : 6 + number]},
        "stop token later": lambda: {
            "stop_token_ids": tokens[4:6],
            "min_tokens": 12,
            "ignore_eos": True,
        },
    }
    return replace(GREEDY, **ways[way]())


ENDS = {
    "end tokens": {("stop", None), ("length", None)},
    "end tokens shown": {("stop", None), ("length", None)},
    "ignored end tokens": {("length", None)},
    "min_tokens": {("stop", None), ("length", None)},
    "all tokens": {("length", None)},
    "max_tokens": {("length", None), ("stop", None)},
    "one token": {("length", None), ("stop", None)},
}


STOPS = (
    "stop string",
    "stop string kept",
    "stop string later",
    "stop token",
    "stop token later",
)


@pytest.mark.parametrize("way", [*ENDS, *STOPS])
def test_texts_end_where_plain_ones_end(pair: Pair, way: str) -> None:
    numbers = range(len(way) % 2, 8, 2)
    params = [ending(way, pair, number) for number in numbers]
    prompts = [pair.prompts[number] for number in numbers]
    for tree, num_drafters in ((PAPER_TREE, 1), ("3,2,1", 2)):
        pair.same(pair.llm(tree, num_drafters), params, prompts)
    for number, each in zip(numbers, params, strict=True):
        output = pair.plain(pair.prompts[number], each).outputs[0]
        end = (output.finish_reason, output.stop_reason)
        if way in ENDS:
            assert end in ENDS[way]
        elif way.startswith("stop string") and way != "stop string later":
            assert output.stop_reason in each.stop_strings
            shown = way == "stop string kept"
            assert output.text.endswith(str(output.stop_reason)) == shown or not shown
        elif way.startswith("stop token") and output.finish_reason == "stop":
            assert output.stop_reason in [*(each.stop_token_ids or ()), None]
        assert each.min_tokens <= len(output.token_ids) <= (each.max_tokens or 0)


@pytest.mark.parametrize("params", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_the_end_of_the_context(pair: Pair, params: SamplingParams) -> None:
    params = replace(params, max_tokens=None, ignore_eos=True)
    prompts = pair.prompts[4:]
    pair.same(pair.llm("3,2,1", 1, max_model_len=80), [params] * 4, prompts, max_model_len=80)
    for prompt in prompts:
        output = pair.plain(prompt, params, max_model_len=80)
        assert len(prompt) + len(output.outputs[0].token_ids) == 80
        assert output.outputs[0].finish_reason == "length"


# --- what is left behind --------------------------------------------------------------------------


def test_aborting_mid_way_frees_everything(pair: Pair) -> None:
    llm = pair.llm("3,2,1", 2, max_num_seqs=3)
    params = replace(GREEDY, ignore_eos=True, n=1)
    pending = [llm.submit(prompt, params) for prompt in pair.prompts[:5]]
    for _ in range(4):
        llm.engine.step()
    llm.abort(pending[1:2])
    llm.abort(pending[4:])  # still waits
    while llm.engine.has_work:
        llm.engine.step()
    assert is_empty(llm)
    assert [p.output().outputs[0].finish_reason for p in pending] == [
        "length",
        "abort",
        "length",
        "length",
        "abort",
    ]
    kept = [0, 2, 3]
    prompts = [pair.prompts[n] for n in kept]
    pair.check(prompts, [params] * 3, [pending[n].output() for n in kept])
    whole = pair.plain(pair.prompts[1], params).outputs[0]
    cut = pending[1].output().outputs[0]
    assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]
    assert whole.text.startswith(cut.text.rstrip("�"))


def test_leaving_a_stream_frees_everything(pair: Pair) -> None:
    llm = pair.llm("2,2")
    stream = llm.stream(pair.prompts[3], replace(GREEDY, ignore_eos=True))
    next(stream)
    assert not is_empty(llm)
    stream.close()  # type: ignore[attr-defined]
    assert is_empty(llm)


def test_a_stream_grows_to_the_whole_output(pair: Pair) -> None:
    params = replace(GREEDY, ignore_eos=True)
    texts = [o.outputs[0].text for o in pair.llm("2,2").stream(pair.prompts[3], params)]
    for shorter, longer in zip(texts, texts[1:], strict=False):  # noqa: RUF007
        assert longer.startswith(shorter)
    assert texts[-1] == pair.plain(pair.prompts[3], params).outputs[0].text


def test_a_bad_prompt_in_a_batch_leaves_nothing_behind(pair: Pair) -> None:
    llm = pair.llm("2,2")
    for bad in ([], [99999], [5] * 256):
        with pytest.raises(RequestError):
            llm.generate([pair.prompts[0], bad, pair.prompts[1]], GREEDY)
        assert is_empty(llm)
    pair.same(llm, [GREEDY] * 8)


@pytest.mark.parametrize("part", ["target", "drafter"])
@pytest.mark.parametrize("error", [RuntimeError("no"), KeyboardInterrupt()], ids=type)
def test_an_error_in_a_step_leaves_nothing_behind(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, part: str, error: BaseException
) -> None:
    llm = pair.llm("2,2")
    owner: Any = llm.engine.target if part == "target" else llm.engine.speculator.drafters[0]
    name = "run" if part == "target" else "admit"
    inner, calls = getattr(owner, name), 0

    def fails(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise error
        return inner(*args)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, fails)
        with pytest.raises(type(error)):
            llm.generate(pair.prompts, GREEDY)
    assert is_empty(llm)
    pair.same(llm, [GREEDY] * 8)


# --- the full measurement -------------------------------------------------------------------------


@pytest.mark.slow
def test_200_prompts_of_192_tokens() -> None:
    """algorithms.md §8.5: alone, in batches, and against transformers."""
    exactness = Exactness(Settings(prompts=200, tokens=192, transformers=True))
    error = exactness.run()
    assert error < 2e-5
    for each in exactness.comparisons:
        assert each.tokens == 200 * 192
        assert each.num_unexcused == 0, each
        assert len(each.divergences) <= 5, each
