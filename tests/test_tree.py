"""The tree keeps nodes distinct and slots whole, alone and merged."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from specinfer.errors import LawError
from specinfer.tree import PICK, Law, TokenTree, union
from tests.helpers import children
from tests.oracle import Chance, outcomes

ROWS = np.array([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]], np.float32)


@st.composite
def trees(draw: st.DrawFn, source: int = 0) -> TokenTree:
    """A random tree under token 7 whose slots are told apart by source and law."""
    tree = TokenTree(7)
    for number in range(draw(st.integers(0, 12))):
        parent = draw(st.integers(0, len(tree) - 1))
        tree.add(parent, draw(st.integers(0, 2)), source=source, law=Law(ROWS, 0, (number,)))
    return tree


def slots_by_text(tree: TokenTree) -> dict[tuple[int, ...], list[tuple[int, Law | None]]]:
    """Per node, named by its tokens: the (source, law) of each slot that proposes it, in order."""
    named: dict[tuple[int, ...], list[tuple[int, Law | None]]] = {}
    for siblings in tree.slots_of:
        for slot_id in siblings:
            slot = tree.slots[slot_id]
            text = tuple(tree.tokens[node] for node in tree.path(slot.node))
            named.setdefault(text, []).append((slot.source, slot.law))
    return named


def test_a_repeated_token_is_one_node_and_two_slots() -> None:
    tree = TokenTree(7)
    cat, dog, again = (tree.add(0, token) for token in (4, 5, 4))
    assert (cat, dog, again) == (1, 2, 1)
    assert tree.num_drafted == 2
    assert tree.slots_of[0] == [0, 1, 2]
    assert children(tree, 0) == [1, 2]
    assert tree.child(0, 5) == 2
    assert tree.child(1, 5) is None


def test_a_root_alone_is_a_tree() -> None:
    tree = TokenTree(7)
    assert (len(tree), tree.num_drafted, tree.path(0), children(tree, 0)) == (1, 0, [], [])
    assert tree.ancestor_mask().tolist() == [[True]]


@given(trees())
def test_nodes_come_parents_first_and_once_per_token(tree: TokenTree) -> None:
    for node in range(1, len(tree)):
        parent = tree.parents[node]
        assert parent < node
        assert tree.depths[node] == tree.depths[parent] + 1 == len(tree.path(node))
        assert tree.child(parent, tree.tokens[node]) == node
        assert node in children(tree, parent)
    assert len(set(zip(tree.parents, tree.tokens, strict=True))) == len(tree)
    assert sorted(slot for siblings in tree.slots_of for slot in siblings) == list(
        range(len(tree.slots))
    )
    assert all(tree.slots[s].parent == n for n, slots in enumerate(tree.slots_of) for s in slots)


@given(trees())
def test_the_mask_holds_each_node_and_its_ancestors(tree: TokenTree) -> None:
    mask = tree.ancestor_mask()
    for node in range(len(tree)):
        assert np.flatnonzero(mask[node]).tolist() == sorted({0, *tree.path(node)})


def test_a_law_is_what_is_left_renormalised() -> None:
    assert PICK.is_pick
    assert np.shares_memory(Law(ROWS, 0).dense(), ROWS)
    np.testing.assert_allclose(Law(ROWS, 0, (0,)).dense(), [0, 0.5, 0.5])
    assert Law(ROWS, 0, (0,)).dense().dtype == np.float32
    assert ROWS[0, 0] == 0.5, "the shared rows are left as they are"
    with pytest.raises(LawError, match="nothing left"):
        Law(ROWS, 1, (0,)).dense()


def test_a_cut_law_knows_its_tokens() -> None:
    tokens = np.array([[0, 1, 2], [7, 3, 5]])
    law = Law(np.array([[1.0, 0, 0], [0.5, 0.3, 0.2]]), 1, (3, 9), tokens)
    assert law.columns((5, 9, 7)) == [2, 0]
    assert [law.token(column) for column in range(3)] == [7, 3, 5]
    assert law.probability((7, 5, 9)) == pytest.approx(0.7)
    np.testing.assert_allclose(law.dense(), [5 / 7, 0, 2 / 7])
    for each, expected in ((law, [7, 3, 5]), (Law(ROWS, 1), [0])):
        support, probabilities = each.support()
        assert support.tolist() == expected
        np.testing.assert_allclose(probabilities, [each.probability((t,)) for t in expected])


@given(trees(source=0), trees(source=1), trees(source=2), st.integers(0, 99))
def test_union_keeps_every_slot_and_each_trees_order(
    one: TokenTree, two: TokenTree, three: TokenTree, seed: int
) -> None:
    parts = [one, two, three]
    merged, maps = union(parts, np.random.default_rng(seed))
    assert len(merged.slots) == sum(len(tree.slots) for tree in parts)
    together = slots_by_text(merged)
    assert merged.num_drafted == len(together)
    for index, tree in enumerate(parts):
        for node in range(len(tree)):
            own = [tree.tokens[each] for each in tree.path(node)]
            assert [merged.tokens[each] for each in merged.path(maps[index][node])] == own
            order = [tree.slots[slot].law for slot in tree.slots_of[node]]
            slots = [merged.slots[slot] for slot in merged.slots_of[maps[index][node]]]
            assert [slot.law for slot in slots if slot.source == index] == order
        for text, slots in slots_by_text(tree).items():
            assert [slot for slot in together[text] if slot[0] == index] == slots


def test_union_interleaves_uniformly_without_looking_at_tokens() -> None:
    parts = [TokenTree(7), TokenTree(7)]
    for token in (2, 1):
        parts[0].add(0, token, source=0)
    parts[1].add(0, 2, source=1)

    def orders(chance: Chance) -> tuple[int, ...]:
        merged, _ = union(parts, chance)  # type: ignore[arg-type]
        return tuple(slot.source for slot in merged.slots)

    assert {order: round(p, 12) for p, order in outcomes(orders)} == {
        order: round(1 / 3, 12) for order in [(0, 0, 1), (0, 1, 0), (1, 0, 0)]
    }


def test_trees_of_different_roots_cannot_be_merged() -> None:
    with pytest.raises(LawError, match=r"\[7, 8\]"):
        union([TokenTree(7), TokenTree(8)], np.random.default_rng(0))
