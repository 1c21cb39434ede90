"""What was asked for: shapes and limits."""

from typing import Any

import pytest

from specinfer.config import (
    PAPER_TREE,
    EngineConfig,
    Speculation,
    count_nodes,
    parse_tree,
    read_speculation,
)
from specinfer.errors import ConfigError
from specinfer.request import SamplingParams


def test_a_shape_counts_its_nodes() -> None:
    assert parse_tree("1, 1,3") == (1, 1, 3)
    assert count_nodes((1, 1, 3, 1, 1, 1, 1, 1)) == 20
    assert count_nodes(()) == 0
    assert Speculation(tree=PAPER_TREE, max_depth=3).num_nodes(1) == 5
    assert Speculation(tree="2,2,2", max_nodes=6).num_nodes(1) == 6
    assert Speculation(tree="2,2,2", max_nodes=11).num_nodes(2) == 4
    assert Speculation(tree="4x8", max_nodes=11).num_nodes(1) == 8
    assert Speculation(tree="calibrated", max_nodes=11).num_nodes(2) == 11
    assert Speculation(tree="off").num_nodes(1) == 0


@pytest.mark.parametrize("tree", ["", "1,0,x", "1,,1", "-1", "1.5", "٣", "wide", "4x", "0x4", "x"])
def test_a_malformed_shape(tree: str) -> None:
    with pytest.raises(ConfigError, match="is not a tree shape"):
        Speculation(tree=tree)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"verifier": "wrong"}, "use one of auto, match, topdown, traversal"),
        ({"draw": "wrong"}, "use one of auto, iid, without-replacement, pick"),
        ({"max_nodes": 0}, "max_nodes=0 must be at least 1"),
        ({"max_nodes": 4096}, "at most 2048"),
        ({"tree": "calibrated", "draw": "iid"}, "draws without replacement"),
        ({"tree": "auto", "verifier": "gbv"}, "needs independent draws"),
        ({"tree": "4x2", "verifier": "kseq", "draw": "pick"}, 'needs draw="iid"'),
        ({"control": "wrong"}, "use one of auto, gammatune, smartspec"),
        ({"control": "gammatune", "tree": "2,1"}, "sets the length of a chain"),
        ({"draft_temperature": 0.0}, r"draft_temperature=0.0 must be in \[1e-5"),
        ({"draft_temperature": 1e-40}, "draft_temperature=1e-40 must be in"),
        ({"draft_temperature": 1e40}, "must be in"),
    ],
)
def test_speculation_that_cannot_be(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        Speculation(**changes)


@pytest.mark.parametrize("name", ["max_num_seqs", "max_model_len", "kv_cache_memory", "block_size"])
def test_limits_that_cannot_be(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}=0 must be at least 1"):
        EngineConfig(**{name: 0})


@pytest.mark.parametrize("tree", ["9" * 5000, ",".join(["1"] * 1200), "", "1,,2", "-1", "٣", None])
def test_trees_that_are_none(tree: str) -> None:
    with pytest.raises(ConfigError):
        Speculation(tree=tree)


def test_only_some_speculation_needs_times() -> None:
    assert Speculation().needs_times
    assert Speculation(tree="1,1", control="smartspec").needs_times
    assert Speculation(tree="sequoia").needs_times
    assert not Speculation(tree="sequoia", max_nodes=8).needs_times
    for other in ({"tree": "off"}, {"tree": "calibrated"}, {"tree": "1", "control": "gammatune"}):
        assert not Speculation(**other).needs_times  # type: ignore[arg-type]


def test_a_requests_speculation_is_a_value_or_its_fields() -> None:
    assert SamplingParams().own_speculation is None
    value = Speculation(tree="off")
    assert SamplingParams(speculation=value).own_speculation is value
    assert SamplingParams(speculation={"tree": "off"}).own_speculation == value
    assert read_speculation({}) == Speculation()
    with pytest.raises(ConfigError, match="speculation has no 'trees': known are tree, verifier"):
        SamplingParams(speculation={"trees": "off"})
    with pytest.raises(ConfigError, match="must be a Speculation or its fields"):
        SamplingParams(speculation="off")  # type: ignore[arg-type]
