"""Pictures of trees: what is drawn where, in text and in SVG, without a model."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest

from specinfer.draw import DrawnStep, label, place, read_step, to_svg, to_text, visible
from specinfer.engine.engine import StepTrace
from specinfer.engine.tracing import StepTime, keep_trees
from specinfer.tree import TokenTree
from specinfer.verify import Verdict, follow

WORDS = {0: "the", 1: " big", 2: " red", 3: " old", 4: " dog", 5: " <cat>\n", 6: "", 7: "\x00"}
SVG = "{http://www.w3.org/2000/svg}"


def example(picks: list[int], num_new: int | None = None) -> DrawnStep:
    """the → big → (red → dog | old → cat), "red" proposed by both drafters, verified greedily."""
    tree = TokenTree(0)
    big = tree.add(0, 1, source=0)
    red = tree.add(big, 2, source=0)
    tree.add(big, 2, source=1)
    old = tree.add(big, 3, source=1)
    tree.add(red, 4, source=0)
    tree.add(old, 5, source=1)
    verdict = follow(tree, picks)
    return drawn(tree, verdict, WORDS.__getitem__, num_new)


def drawn(
    tree: TokenTree, verdict: Verdict, text_of: Callable[[int], str], num_new: int | None = None
) -> DrawnStep:
    """As the engine leaves it for a request that asks for its trees."""
    num_new = len(verdict.path) + 1 if num_new is None else num_new
    sequence: Any = SimpleNamespace(
        number=0,
        output=SimpleNamespace(index=0, text=""),
        stats=SimpleNamespace(num_target_steps=1),
        text_ends=[0] * num_new,
        trees=[],
    )
    trace = StepTrace(sequence, tree, verdict, num_new)
    work: Any = SimpleNamespace(tree=tree, grown=None)
    chances = {0: [1.0] * (len(tree) + 1)}
    keep_trees([work], [trace], chances, ["one", "two"], StepTime({}, 1, None))
    (step,) = sequence.trees
    return read_step(step, text_of)


def test_a_step_says_what_became_of_every_node() -> None:
    step = example([1, 3, 0, 4, 0, 0])  # big, then old, then "dog", which nobody drafted there
    assert [node.state for node in step.nodes] == [
        *("root", "accepted", "drafted", "accepted", "drafted", "drafted", "target"),
    ]
    assert (step.num_drafted, step.num_accepted) == (5, 2)
    assert step.text == " big old dog"
    assert step.nodes[2].sources == ("one", "two")
    assert (step.nodes[2].chance, step.nodes[3].chance, step.nodes[4].chance) == (0.0, 1.0, None)
    assert step.title == "2 of 5 drafted tokens accepted, 3 tokens"


def test_a_text_that_ended_on_the_path() -> None:
    step = example([1, 3, 0, 4, 0, 0], num_new=1)
    assert step.text == " big"
    assert [node.state for node in step.nodes].count("target") == 0
    assert step.num_accepted == 1
    assert step.title == "1 of 5 drafted tokens accepted, 1 token"


def test_what_was_emitted_runs_along_the_top() -> None:
    assert [line.plain for line in to_text(example([1, 3, 0, 4, 0, 0]))] == [
        "the━━━·big━┯━·old━┯━[·dog]",
        "           │      └─·<cat>⏎",
        "           └─·red───·dog",
    ]
    assert [line.plain for line in to_text(example([0, 0, 0, 0, 0, 0]))] == [
        "the━┯━[the]",
        "    └─·big─┬─·red───·dog",
        "           └─·old───·<cat>⏎",
    ]


def test_a_root_alone() -> None:
    tree = TokenTree(0)
    step = drawn(tree, follow(tree, [4]), WORDS.__getitem__)
    assert [line.plain for line in to_text(step)] == ["the━━━[·dog]"]
    assert step.title == "nothing drafted, 1 token"
    ended = drawn(tree, follow(tree, [4]), WORDS.__getitem__, num_new=0)
    assert [line.plain for line in to_text(ended)] == ["the"]


@pytest.mark.parametrize("picks", [[1, 3, 0, 4, 0, 0], [1, 2, 4, 0, 0, 0], [0] * 6])
def test_no_two_nodes_share_a_place(picks: list[int]) -> None:
    step = example(picks)
    spots = place(step, 2, lambda text: float(len(text)))
    taken = [
        (row, column)
        for node, (x, row) in zip(step.nodes, spots, strict=True)
        for column in range(int(x), int(x) + len(label(node)))
    ]
    assert len(taken) == len(set(taken))


def test_wide_characters_keep_columns() -> None:
    tree = TokenTree(0)
    tree.add(0, 1)
    tree.add(0, 2)
    words = ["木木", "木", "x"]
    lines = to_text(drawn(tree, follow(tree, [1, 2, 0]), words.__getitem__))
    assert [line.plain for line in lines] == ["木木━┯━木━━━[x]", "     └─x"]


def test_a_path_that_is_too_long_goes_on_below() -> None:
    step = example([1, 3, 0, 4, 0, 0])
    whole = [line.plain for line in to_text(step)]
    assert [line.plain for line in to_text(step, 80)] == whole
    assert [line.plain for line in to_text(step, 20)] == [
        "the━━━·big …",
        "… ·big━┯━·old …",
        "       └─·red───·dog",
        "… ·old━┯━[·dog]",
        "       └─·<cat>⏎",
    ]
    assert [line.plain for line in to_text(step, 8)] == whole  # no two nodes fit


def test_what_cannot_be_seen_is_shown() -> None:
    assert visible(" a\n\t\x00") == "·a⏎⇥\\x00"
    tree = TokenTree(6)
    step = drawn(tree, follow(tree, [7]), WORDS.__getitem__)
    assert [label(node) for node in step.nodes] == ["#6", "[\\x00]"]


def test_svg_is_xml_and_shows_every_node() -> None:
    steps = [example([1, 3, 0, 5, 0, 0]), example([1, 2, 4, 0, 0, 0])]
    root = ElementTree.fromstring(to_svg(steps, 'a <b> & "c"\n\x00' + "x" * 200))
    texts = [text.text or "" for text in root.iter(f"{SVG}text")]
    boxes = [box for box in root.iter(f"{SVG}rect") if box.get("rx") == "6"]
    assert len(boxes) == sum(len(step.nodes) for step in steps)
    assert "·<cat>⏎" in texts
    assert texts[0].startswith('a <b> & "c" ')
    assert texts[0].endswith("…")
    width, height = float(root.get("width", 0)), float(root.get("height", 0))
    for box in boxes:
        assert float(box.get("x", 0)) + float(box.get("width", 0)) <= width
        assert float(box.get("y", 0)) + float(box.get("height", 0)) <= height
    titles = {title.text for title in root.iter(f"{SVG}title")}
    assert "token 2, depth 2, from one, two, accepted with chance 0.00" in titles
    style = root.findtext(f"{SVG}style") or ""
    assert "prefers-color-scheme: dark" in style
    assert "http" not in style
