"""Filters by history in the whole engine, on the bundled pair in float32: trees change no text.

Greedy and seeded, alone and in batches whose requests ask for different things, every parameter;
the law of unseeded requests is proven in test_history_law.py.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from benchmarks.exactness import plain_logits
from benchmarks.structured import check
from specinfer.config import PAPER_TREE
from specinfer.draft.growth import Growth
from specinfer.errors import RequestError
from specinfer.llm import LLM
from specinfer.outputs import Logprob, RequestOutput
from specinfer.request import SamplingParams
from tests.engines import toy_decoder, toy_engine
from tests.test_identity import Pair, is_empty

GREEDY = SamplingParams(temperature=0.0, max_tokens=24)
SEEDED = SamplingParams(temperature=0.9, max_tokens=24, seed=1)
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 120},
        "mood": {"enum": ["happy", "sad", "so-so"]},
    },
    "required": ["name", "age", "mood"],
}
CALL = {
    "type": "tag",
    "begin": "<call>",
    "content": {"type": "json_schema", "json_schema": SCHEMA},
    "end": "</call>",
}
TAG = {
    "format": {
        "type": "sequence",
        "elements": [
            {"type": "regex", "pattern": "[A-Za-z ,]{20,30}"},
            {"type": "triggered_tags", "triggers": ["<"], "tags": [CALL], "at_least_one": True},
        ],
    }
}
"""A few words, a call that is forced, then text that is free until another begins."""

ASKED: dict[str, dict[str, Any]] = {
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": 2.0, "max_tokens": 40, "ignore_eos": True},
    "repetition": {"repetition_penalty": 1.4},
    "bias": {"logit_bias": {17: -100.0, 16: 4.0}},
    "bad words": {"bad_words": ["the", "and", "a", " to", "I", "is", "you"]},
    "allowed": {"allowed_token_ids": list(range(600))},
    "regex": {"structured_outputs": {"regex": "[A-Z][a-z]{2,9}( [a-z]{1,8}){3,9}[.]"}},
    "json": {"structured_outputs": {"json": SCHEMA}, "max_tokens": 120},
    "compact json, penalties": {
        "structured_outputs": {"json": SCHEMA, "disable_any_whitespace": True},
        "max_tokens": 60,
        "frequency_penalty": 0.8,
        "min_tokens": 40,
    },
    "choice": {"structured_outputs": {"choice": ["yes, of course", "no, never", "perhaps"]}},
    "structural tag": {"structured_outputs": {"structural_tag": TAG}, "max_tokens": 60},
    "json object": {"response_format": {"type": "json_object"}},
    "everything": {
        "presence_penalty": 0.4,
        "frequency_penalty": -0.2,
        "repetition_penalty": 1.1,
        "logit_bias": {30: 2.0},
        "bad_words": ["she", "very"],
        "min_tokens": 12,
        "top_k": 50,
        "top_p": 0.95,
        "stop": ["zz"],
    },
}


@pytest.fixture(scope="module")
def pair() -> Pair:
    return Pair()


def batch(pair: Pair, base: SamplingParams) -> tuple[list[list[int]], list[SamplingParams]]:
    """One request per kind, on prompts in turn."""
    params = [replace(base, **fields) for fields in ASKED.values()]
    return [pair.prompts[n % 8] for n in range(len(params))], params


@pytest.mark.parametrize("base", [GREEDY, SEEDED], ids=["greedy", "seeded"])
@pytest.mark.parametrize(
    ("tree", "num_drafters"), [(PAPER_TREE, 1), ("2,2", 2), ("calibrated", 1), ("best-first", 2)]
)
def test_trees_change_no_text(
    pair: Pair, tree: str, num_drafters: int, base: SamplingParams
) -> None:
    prompts, params = batch(pair, base)
    pair.same(pair.llm(tree, num_drafters), params, prompts)


@pytest.mark.parametrize("base", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_nor_do_they_alone(pair: Pair, base: SamplingParams) -> None:
    llm = pair.llm("3,2,1")
    for prompt, params in list(zip(*batch(pair, base), strict=True))[::3]:
        pair.check([prompt], [params], llm.generate([prompt], params))


def test_each_parameter_does_something(pair: Pair) -> None:
    prompts, params = batch(pair, GREEDY)
    changed = [
        pair.plain(prompt, each).outputs[0].token_ids
        != pair.plain(
            prompt, replace(GREEDY, max_tokens=each.max_tokens, ignore_eos=each.ignore_eos)
        )
        .outputs[0]
        .token_ids
        for prompt, each in zip(prompts, params, strict=True)
    ]
    assert all(changed), [kind for kind, has in zip(ASKED, changed, strict=True) if not has]


def test_bad_words_and_allowed_tokens_hold(pair: Pair) -> None:
    llm = pair.llm(PAPER_TREE)
    params = replace(SEEDED, seed=None, n=3, temperature=1.2, max_tokens=40)
    allowed = ASKED["allowed"]["allowed_token_ids"]
    words = ASKED["bad words"]["bad_words"]
    for prompt in pair.prompts[:2]:
        (output,) = llm.generate([prompt], replace(params, allowed_token_ids=allowed))
        assert all(set(each.token_ids) <= set(allowed) for each in output.outputs)
        (output,) = llm.generate([prompt], replace(params, bad_words=words))
        tokenizer = llm.tokenizer
        for each in output.outputs:
            for word in words:
                for spelling in (word.strip(), f" {word.strip()}"):
                    ids = tokenizer.encode(spelling, add_special_tokens=False)
                    assert ids not in [
                        each.token_ids[i : i + len(ids)] for i in range(len(each.token_ids))
                    ]


# --- structured output ----------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 0.8, 1.3])
def test_json_is_valid_however_it_is_drafted(pair: Pair, temperature: float) -> None:
    params = SamplingParams(
        temperature=temperature,
        max_tokens=400,
        n=2 if temperature else 1,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "person", "schema": SCHEMA},
        },
    )
    for llm in (pair.llm("2,2"), pair.llm("calibrated")):
        for output in llm.generate(pair.prompts[:3], params):
            for each in output.outputs:
                value = json.loads(each.text)
                assert list(value) == ["name", "age", "mood"]
                assert len(value["name"]) <= 12
                assert 0 <= value["age"] <= 120
                assert value["mood"] in ("happy", "sad", "so-so")
                assert each.finish_reason == "stop"
                assert each.stop_reason is None


def test_text_is_free_until_a_trigger_comes(pair: Pair) -> None:
    """The model writes no trigger by itself: what it says is what it says without a tag."""
    free = {"type": "triggered_tags", "triggers": ["<call>"], "tags": [CALL]}
    asked = replace(GREEDY, structured_outputs={"structural_tag": {"format": free}})
    for llm in (pair.llm("off"), pair.llm("calibrated")):
        held, alone = (llm.generate(pair.prompts[:3], each) for each in (asked, GREEDY))
        assert [each.outputs[0].token_ids for each in held] == [
            each.outputs[0].token_ids for each in alone
        ]
    params = replace(SEEDED, structured_outputs={"structural_tag": TAG}, max_tokens=150)
    for output in pair.llm("2,2").generate(pair.prompts[:3], params):
        begun, _, call = output.outputs[0].text.partition("<call>")
        assert 20 <= len(begun) <= 30
        value, _, rest = call.partition("</call>")
        assert json.loads(value)["mood"] in ("happy", "sad", "so-so")
        assert rest


def test_structural_tags_may_have_special_tokens(pair: Pair) -> None:
    """As text or by name; elsewhere they are no text."""
    parts = [{"type": "token", "token": "<|assistant|>"}, {"type": "regex", "pattern": "[a-z]{3}"}]
    tag = {"format": {"type": "sequence", "elements": parts}}
    params = replace(GREEDY, structured_outputs={"structural_tag": tag}, skip_special_tokens=False)
    (output,) = pair.llm("2,2").generate("Well?", params)
    assert output.outputs[0].token_ids[0] == 2
    assert output.outputs[0].text.startswith("<|assistant|>")
    assert len(output.outputs[0].text.removesuffix("<|endoftext|>")) == len("<|assistant|>abc")


def test_an_end_that_is_forced_ends_the_text_whatever_else_is_asked(pair: Pair) -> None:
    choice = {"structured_outputs": {"choice": ["yes"]}}
    llm = pair.llm("2,2")
    for fields in (
        {},
        {"ignore_eos": True},
        {"min_tokens": 20},
        {"ignore_eos": True, "min_tokens": 20},
        {"allowed_token_ids": [7]},
        {"bad_words": ["yes"]},
        {"stop_token_ids": [5]},
        {"logit_bias": {0: -100.0, 1: -100.0}},
    ):
        (output,) = llm.generate("Well?", replace(GREEDY, **choice, **fields))
        assert (output.outputs[0].text, output.outputs[0].finish_reason) == ("yes", "stop")
    (output,) = llm.generate("Well?", replace(GREEDY, **choice, stop=["e"]))
    assert (output.outputs[0].text, output.outputs[0].stop_reason) == ("y", "e")
    (output,) = llm.generate("Well?", replace(GREEDY, **choice, max_tokens=1))
    assert output.outputs[0].finish_reason == "length"


def test_min_tokens_holds_where_the_grammar_leaves_a_choice(pair: Pair) -> None:
    params = replace(GREEDY, structured_outputs={"regex": "[a-z ]+"}, min_tokens=10, max_tokens=12)
    (output,) = pair.llm("2,2").generate("Well?", params)
    assert len(output.outputs[0].token_ids) >= 10


def test_what_is_forced_needs_no_drafter(pair: Pair) -> None:
    """A grammar drafts for itself where nothing else does."""
    schema = {"type": "object", "properties": {"a_long_name_of_a_property": {"const": 1}}}
    schema["required"] = ["a_long_name_of_a_property"]
    asked = {"json": schema, "disable_any_whitespace": True}
    params = replace(
        GREEDY, structured_outputs=asked, speculation={"tree": "calibrated"}, max_tokens=60
    )
    plain = replace(params, speculation={"tree": "off"})
    llm = pair.llm("off")
    (drafted,), (alone,) = llm.generate("Well?", params), llm.generate("Well?", plain)
    assert drafted.outputs[0].token_ids == alone.outputs[0].token_ids
    assert drafted.outputs[0].text == '{"a_long_name_of_a_property": 1}'
    assert drafted.stats.accepted_by_source.keys() == {"forced"}
    assert drafted.stats.tokens_per_step > 1.5
    assert alone.stats.tokens_per_step == 1.0
    assert is_empty(llm)


def test_drafters_see_the_mask(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without it much of what they say is refused."""
    llm = pair.llm("calibrated")
    params = replace(GREEDY, max_tokens=40, structured_outputs={"regex": "[a-z ]{150,}"})
    seeing = rate(llm.generate(pair.prompts[:4], params))
    monkeypatch.setattr(Growth, "edits", lambda growth, draft, nodes: None)
    assert seeing > 1.2 * rate(llm.generate(pair.prompts[:4], params))


def rate(outputs: Sequence[RequestOutput]) -> float:
    """Tokens per step."""
    return sum(o.stats.num_output_tokens for o in outputs) / sum(
        o.stats.num_target_steps for o in outputs
    )


def test_requests_that_cannot_be_kept_are_refused_in_a_sentence(pair: Pair) -> None:
    llm = pair.llm("2,2")
    for fields, words in (
        ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex cannot be compiled"),
        ({"allowed_token_ids": [4096]}, "allowed_token_ids has token id 4096"),
        ({"logit_bias": {9999: 1.0}}, "logit_bias has token id 9999"),
    ):
        with pytest.raises(RequestError, match=words):
            llm.generate("Well?", replace(GREEDY, **fields))
        assert is_empty(llm)
    toy = toy_engine(toy_decoder())
    with pytest.raises(RequestError, match="needs an end token"):
        toy.add("x", [1], SamplingParams(structured_outputs={"regex": "a"}))
    assert not toy.has_work


# --- log-probabilities ----------------------------------------------------------------------------


def expected_logprobs(llm: LLM, tokens: Sequence[int], num_top: int) -> list[dict[int, Any]]:
    """Of every token but the first, from one plain pass: (logprob, rank) by token id."""
    laws = torch.log_softmax(plain_logits(llm.engine.target.decoder, tokens), -1)
    rows = []
    for law, token in zip(laws, tokens[1:], strict=False):
        order = law.argsort(descending=True).tolist()
        row = {token: (float(law[token]), 1 + int((law > law[token]).sum()))}
        row |= {each: (float(law[each]), r + 1) for r, each in enumerate(order[:num_top])}
        rows.append(row)
    return rows


def assert_logprobs(actual: dict[int, Logprob], expected: dict[int, Any], llm: LLM) -> None:
    assert actual.keys() == expected.keys()
    for token, (logprob, rank) in expected.items():
        assert actual[token].logprob == pytest.approx(logprob, abs=2e-4)
        assert actual[token].rank == rank
        assert actual[token].decoded_token == llm.tokenizer.token_text(token)


@pytest.mark.parametrize("tree", ["off", "2,2", PAPER_TREE])
def test_logprobs_are_the_raw_models(pair: Pair, tree: str) -> None:
    """Whatever filters the tokens went through."""
    llm = pair.llm(tree)
    params = replace(
        SEEDED, max_tokens=12, n=2, logprobs=3, repetition_penalty=1.5, top_k=5, bad_words=["the"]
    )
    for prompt in pair.prompts[:3]:
        (output,) = llm.generate([prompt], params)
        assert output.prompt_logprobs is None
        for each in output.outputs:
            assert each.logprobs is not None
            expected = expected_logprobs(llm, [*prompt, *each.token_ids], 3)[len(prompt) - 1 :]
            total = 0.0
            for token, row, wanted in zip(each.token_ids, each.logprobs, expected, strict=True):
                assert_logprobs(row, wanted, llm)
                assert next(iter(row)) == token, "the one that came stands first"
                total += row[token].logprob
            assert each.cumulative_logprob == pytest.approx(total)


@pytest.mark.parametrize("limits", [{}, {"max_num_batched_tokens": 12}])
@pytest.mark.parametrize("tree", ["off", "2,2"])
def test_prompt_logprobs_come_however_the_prompt_is_cut(
    pair: Pair, tree: str, limits: dict[str, int]
) -> None:
    llm = pair.llm(tree, max_num_seqs=8, **limits)
    params = [
        replace(GREEDY, max_tokens=5, prompt_logprobs=2 if n % 2 else None, logprobs=n % 3, n=1)
        for n in range(8)
    ]
    for number, output in enumerate(llm.generate(pair.prompts, params)):
        prompt = pair.prompts[number]
        assert output.outputs[0].logprobs is not None
        if not number % 2:
            assert output.prompt_logprobs is None
            continue
        assert output.prompt_logprobs is not None
        first, *rest = output.prompt_logprobs
        assert first is None
        for row, wanted in zip(rest, expected_logprobs(llm, prompt, 2), strict=True):
            assert row is not None
            assert_logprobs(row, wanted, llm)


def test_how_many_logprobs(pair: Pair) -> None:
    llm = pair.llm("2,2")
    for num, count in ((0, {1}), (2, {2, 3}), (-1, {4096})):
        params = replace(SEEDED, max_tokens=4, logprobs=num, prompt_logprobs=num, n=2)
        (output,) = llm.generate([pair.prompts[0]], params)
        assert output.prompt_logprobs is not None
        assert len(output.prompt_logprobs) == len(pair.prompts[0])
        for each in output.outputs:
            assert each.logprobs is not None
            assert len(each.logprobs) == len(each.token_ids)
            assert {len(row) for row in each.logprobs} <= count
    (output,) = llm.generate([pair.prompts[0]], replace(SEEDED, max_tokens=4))
    assert output.outputs[0].logprobs is None
    assert output.outputs[0].cumulative_logprob is None


def test_logprobs_end_where_the_text_ends(pair: Pair) -> None:
    """Inside an accepted path, too."""
    tokens = pair.plain(pair.prompts[3], GREEDY).outputs[0].token_ids
    params = replace(GREEDY, stop_token_ids=[tokens[5]], logprobs=0)
    (output,) = pair.llm(PAPER_TREE).generate([pair.prompts[3]], params)
    assert output.outputs[0].logprobs is not None
    assert len(output.outputs[0].logprobs) == len(output.outputs[0].token_ids) <= 6
    stream = list(pair.llm("2,2").stream(pair.prompts[3], replace(GREEDY, logprobs=0)))
    for step in stream:
        assert len(step.outputs[0].logprobs or ()) == len(step.outputs[0].token_ids)


def test_generation_defaults_apply(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    llm = pair.llm()
    monkeypatch.setattr(llm.tokenizer, "generation_defaults", {"repetition_penalty": 2.0})
    params = llm.default_sampling_params(temperature=0.0, max_tokens=30)
    assert params.repetition_penalty == 2.0
    (output,) = llm.generate([pair.prompts[0]], params)
    (plain,) = llm.generate([pair.prompts[0]], replace(params, repetition_penalty=1.0))
    assert output.outputs[0].token_ids != plain.outputs[0].token_ids


def test_json_by_random_schemas_is_valid_and_as_plain(pair: Pair) -> None:
    """A dozen of what `benchmarks.structured --check` does 200 times."""
    llm = pair.llm("auto", max_model_len=1024)
    for compact, prompts in ((True, pair.prompts), (False, pair.prompts[:4])):
        checked = check(llm, prompts, compact=compact)
        assert checked.is_good, checked
        assert checked.tokens > 1.3 * checked.steps
