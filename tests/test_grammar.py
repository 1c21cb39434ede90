"""Grammars: the mask after a path is that of the path alone, in whatever order paths are asked."""

import builtins
import json
import re
from typing import Any

import numpy as np
import pytest

from specinfer import grammar
from specinfer.errors import DependencyError, RequestError
from specinfer.grammar import GrammarCompiler, PathMatcher, single_token
from specinfer.history import History, pack
from specinfer.request import SamplingParams
from specinfer.structured import StructuredOutputsParams
from specinfer.tree import TokenTree

pytest.importorskip("xgrammar")

END, SPECIAL = 95, 96
PIECES = [bytes([32 + token]) for token in range(95)] + [b"", b"", b"ab", b'": ']
"""Printable ASCII, an end token, another special one, and two that are longer."""
AB, COLON = 97, 98


SCHEMA = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
TAG = {
    "type": "structural_tag",
    "format": {
        "type": "triggered_tags",
        "triggers": ["<f"],
        "tags": [
            {
                "type": "tag",
                "begin": "<f>",
                "content": {"type": "json_schema", "json_schema": SCHEMA},
                "end": "</f>",
            }
        ],
    },
}
OLDER = {
    "type": "structural_tag",
    "structures": [{"begin": "<f>", "schema": SCHEMA, "end": "</f>"}],
    "triggers": ["<f"],
}


def encode(text: str) -> list[int]:
    """The longest tokens first."""
    tokens = []
    while text:
        piece = next(p for p in sorted(PIECES, key=len)[::-1] if p and text.encode().startswith(p))
        tokens.append(PIECES.index(piece))
        text = text[len(piece) :]
    return tokens


def decode(tokens: Any) -> str:
    return b"".join(PIECES[token] for token in tokens).decode()


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(PIECES, [END], encode)


def tokens_of(bits: Any) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(bits, bitorder="little")[: len(PIECES)]).tolist())


def matcher(compiler: GrammarCompiler, **asked: Any) -> PathMatcher:
    return compiler.matcher(StructuredOutputsParams(**asked))


def allowed(matcher: PathMatcher, text: str) -> set[int]:
    bits = matcher.allowed(tuple(encode(text)))
    assert bits is not None
    return tokens_of(bits)


def test_masks_are_those_of_the_language(compiler: GrammarCompiler) -> None:
    """Against Python's own regular expressions, over every text of a small language."""
    own = matcher(compiler, regex="(ab|ac|b)*d?")
    language = re.compile("(ab|ac|b)*d?")
    letters = "abcd"
    texts = [""]
    for text in texts:  # grows while it is swept
        if len(text) == 4:
            continue
        follow = {
            letter
            for letter in letters
            if any(
                language.fullmatch(text + letter + rest) for rest in ("", "b", "c", "d", "bd", "cd")
            )
        }
        expected = {PIECES.index(letter.encode()) for letter in follow}
        if any(language.fullmatch(text + "ab" + rest) for rest in ("", "d")):
            expected.add(AB)
        if language.fullmatch(text):
            expected.add(END)
        assert tokens_of(own.allowed(tuple(PIECES.index(c.encode()) for c in text))) == expected
        texts += [text + letter for letter in follow]
    assert len(texts) > 20


SHORT = {"type": "any_text", "max_tokens": 9}
BUDGET = {
    "type": "sequence",
    "elements": [
        {"type": "any_text", "max_chars": 4},
        {"type": "token", "token": AB},
        {"type": "any_tokens", "exclude_tokens": [COLON]},
        {"type": "const_string", "value": "."},
    ],
}
"""Counts characters, which have to be given back as well."""


@pytest.mark.parametrize(
    ("asked", "written", "num_astray"),
    [
        (
            {
                "json": {
                    "type": "object",
                    "properties": {"a": {"enum": ["x", "yz"]}},
                    "required": ["a"],
                },
                "disable_any_whitespace": True,
            },
            '{"a": "yz"}',
            10,
        ),
        ({"structural_tag": TAG}, 'so <f>{"x": 1}</f>, and <f>{"x"', 10),
        ({"structural_tag": {"format": BUDGET}}, "xyzabqqqq.", 0),
    ],
    ids=["json", "tag", "budget"],
)
def test_paths_may_be_asked_in_any_order(
    compiler: GrammarCompiler, asked: Any, written: str, num_astray: int
) -> None:
    text = encode(written)
    paths = [tuple(text[:n]) for n in range(len(text) + 1)]
    paths += [(*path, 33) for path in paths]  # astray, every one
    paths += [(*paths[8], END), (*paths[3], AB, AB)]
    fresh = [matcher(compiler, **asked).allowed(path) for path in paths]
    assert sum(bits is None for bits in fresh) > num_astray
    rng = np.random.default_rng(0)
    for _ in range(5):
        own, committed = matcher(compiler, **asked), int(rng.integers(4))
        if committed:
            own.advance(text[:committed])
        for index in rng.permutation(len(paths)):
            path = paths[index]
            if path[:committed] != tuple(text[:committed]):
                continue
            bits = own.allowed(path[committed:])
            assert (bits is None) == (fresh[index] is None)
            assert bits is None or (bits == fresh[index]).all()


def test_committed_tokens_move_the_root(compiler: GrammarCompiler) -> None:
    own = matcher(compiler, regex="[ab]{3}")
    own.allowed(tuple(encode("ba")))  # somewhere else in the tree
    own.advance(encode("a"))
    own.advance([])
    assert allowed(own, "b") == {65, 66}
    own.advance(encode("bb"))
    assert allowed(own, "") == {END}
    own.advance([END])
    assert own.allowed(()) is None
    assert own.allowed((65,)) is None


def test_what_no_grammar_knows_leaves_everything_open(compiler: GrammarCompiler) -> None:
    """Such a path has no probability: its law must only be one."""
    own = matcher(compiler, regex="a+")
    own.advance(encode("b"))
    assert own.allowed(()) is None
    own.advance(encode("a"))
    assert own.allowed(()) is None


def test_no_bit_is_set_behind_the_vocabulary() -> None:
    """Else a mask without a lawful token would seem to have some."""
    compiler = GrammarCompiler([b"a", b"b", b""], [2], encode)
    bits = matcher(compiler, choice=["a"]).allowed(())
    np.testing.assert_array_equal(bits, pack([0], 3))
    assert bits is not None
    assert single_token(bits) == 0


def test_a_ban_that_would_leave_nothing_is_left_out() -> None:
    compiler = GrammarCompiler([b"a", b"b", b""], [2], encode)
    params = SamplingParams(structured_outputs={"choice": ["a"]}, bad_words=["a"])
    own = matcher(compiler, choice=["a"])
    history = History(params, num_prompt=1, vocab_size=3, bad_words=[(0,)], grammar=own)
    edits = history.edits([1], TokenTree(1), [0])
    assert edits is not None
    assert [edits.admits(0, token) for token in range(3)] == [True, False, False]


def test_special_tokens_are_no_text(compiler: GrammarCompiler) -> None:
    tokens = allowed(matcher(compiler, regex=".*"), "")
    assert SPECIAL not in tokens
    assert END in tokens
    assert {AB, COLON, 65} <= tokens


@pytest.mark.parametrize(
    ("asked", "good", "bad"),
    [
        ({"regex": "[a-c]+[0-9]"}, "abc1", "abc"),
        ({"choice": ['say "a\\b"', "no"]}, 'say "a\\b"', "say"),
        ({"grammar": 'root ::= "a" root | "b"'}, "aab", "aa"),
        ({"grammar": 'start: "a" start | "b"'}, "aab", "aa"),
        ({"json": {"type": "integer", "minimum": 3, "maximum": 12}}, "12", "1"),
        ({"json": '{"type": "array", "items": {"type": "boolean"}}'}, "[true, false]", "[true"),
        ({"json_object": True}, '{"x": [1, {"y": null}]}', '{"x"'),
        ({"json_object": True}, "{}", "{"),
        ({"structural_tag": TAG}, 'a <f>{"x": 1}</f> b<', 'a <f>{"x": 1}'),
        ({"structural_tag": json.dumps(TAG)}, "", "<f>{"),
        ({"structural_tag": OLDER}, '<f>{"x": 1}</f> or <f>{"x":2}</f>', "<f"),
    ],
)
def test_every_way_to_ask(compiler: GrammarCompiler, asked: Any, good: str, bad: str) -> None:
    own = matcher(compiler, **asked)
    assert END in allowed(own, good)
    assert END not in allowed(own, bad)


def test_json_objects_are_objects(compiler: GrammarCompiler) -> None:
    for text in ("[1]", "5", '"a"'):
        assert not matcher(compiler, json_object=True)._go(tuple(encode(text)))


def test_whitespace_is_bounded(compiler: GrammarCompiler) -> None:
    asked = {"json": {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]}}
    own = matcher(compiler, **asked)
    assert own._go(tuple(encode('{ "a" :  1 }')))
    assert own._go(tuple(encode("{" + 10 * " " + '"a":1}')))
    assert not own._go(tuple(encode("{" + 11 * " ")))
    own = matcher(compiler, **asked, disable_any_whitespace=True)
    assert own._go(tuple(encode('{"a": 1}')))
    assert not own._go(tuple(encode("{ ")))
    own = matcher(compiler, structural_tag=TAG)
    assert own._go(tuple(encode("<f>{" + 10 * " " + '"x":1')))
    assert not own._go(tuple(encode("<f>{" + 11 * " ")))


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"regex": "("}, ["structured_outputs.regex", "parenthesis is not closed"]),
        ({"grammar": 'root ::= "a" | b'}, ["structured_outputs.grammar", "b", "not defined"]),
        ({"grammar": "what"}, ["structured_outputs.grammar", "expected"]),
        ({"json": {"type": "foo"}}, ["structured_outputs.json", "foo"]),
        ({"json": {"$ref": "#/$defs/x"}}, ["structured_outputs.json", "$defs"]),
        (
            {"grammar": "start: x\nx[max_tokens=3]: /.*/"},
            ["structured_outputs.grammar has max_tok"],
        ),
        ({"structural_tag": {"format": SHORT}}, ["structural_tag has max_tokens, which cannot"]),
        (
            {"structural_tag": {"format": {"type": "foo"}}},
            ["structural_tag cannot be compiled: Invalid structural tag", "not recognized: foo"],
        ),
    ],
)
def test_what_cannot_be_compiled_is_one_sentence(
    compiler: GrammarCompiler, asked: Any, words: list[str]
) -> None:
    with pytest.raises(RequestError) as caught:
        compiler.compile(StructuredOutputsParams(**asked))
    message = str(caught.value)
    assert all(word in message for word in words), message
    assert "\n" not in message
    assert ".cc" not in message


def test_without_xgrammar_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = builtins.__import__

    def missing(name: str, *args: Any, **options: Any) -> Any:
        if name == "xgrammar":
            raise ImportError(name)
        return inner(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(DependencyError, match=r"pip install 'specinfer\[grammar\]'"):
        GrammarCompiler(PIECES, [END], encode)


def test_what_is_forced(compiler: GrammarCompiler) -> None:
    asked = {
        "json": {"type": "object", "properties": {"abc": {"const": "e"}}, "required": ["abc"]},
        "disable_any_whitespace": True,
    }
    own = matcher(compiler, **asked)
    assert decode(own.forced(())).startswith('{"abc')
    assert decode(own.forced(tuple(encode('{"a')))).startswith("bc")
    assert own.forced(tuple(encode('{"b'))) == (), "astray"
    free = matcher(compiler, regex="[ab]c")
    assert free.forced(()) == ()
    bits = free.allowed(tuple(encode("a")))
    assert bits is not None
    assert single_token(bits) == PIECES.index(b"c")
    assert single_token(pack([], 99)) is None
    assert single_token(pack([4, 9], 99)) is None
    assert [single_token(pack([token], 99)) for token in range(99)] == list(range(99))


def test_half_a_character_forces_no_text() -> None:
    def refuse(text: str) -> list[int]:
        raise AssertionError(text)

    of_bytes = GrammarCompiler([bytes([byte]) for byte in range(256)] + [b""], [256], refuse)
    own = of_bytes.matcher(StructuredOutputsParams(choice=["aé", "bé"]))
    first, second = "é".encode()
    assert own.forced((97, first)) == ()
    bits = own.allowed((97, first))
    assert bits is not None
    assert single_token(bits) == second


def test_a_whole_text_by_masks_alone_is_valid(compiler: GrammarCompiler) -> None:
    schema = {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 5},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "mood": {"enum": ["happy", "sad"]},
        },
        "required": ["name", "age", "mood"],
    }
    for seed in range(20):
        own, rng, output = matcher(compiler, json=schema), np.random.default_rng(seed), []
        while not output or output[-1] != END:
            token = int(rng.choice(sorted(tokens_of(own.allowed(())))))
            output.append(token)
            own.advance([token])
        value = json.loads(decode(output))
        assert len(value["name"]) <= 5
        assert 0 <= value["age"] <= 120
        assert value["mood"] in ("happy", "sad")
        assert list(value) == ["name", "age", "mood"]


def test_what_is_too_large_is_refused(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    for asked in ({"choice": ["a" * 999] * 300}, {"regex": "a" * 300_000}):
        with pytest.raises(RequestError, match="characters and 262144 are allowed"):
            compiler.compile(StructuredOutputsParams(**asked))
    monkeypatch.setattr(grammar, "_MOST_BYTES", 10)
    with pytest.raises(RequestError, match="bytes and 10 are allowed"):
        compiler.compile(StructuredOutputsParams(regex="[0-9]+"))
