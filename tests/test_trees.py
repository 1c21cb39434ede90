"""A step's tree as JSON: every field of it, and that it is JSON."""

import json

from specinfer.outputs import StepTree, TreeNode, TreeSlot, TreeToken
from specinfer.serve.trees import tree_event

WORDS = {0: "the", 1: " cat", 2: " dog", 3: "<|end|>"}


def test_an_event_says_everything_of_a_step() -> None:
    both = (TreeSlot("small", 0.25, 0.25, 0.123456), TreeSlot("ngram", 1.0, None, None))
    step = StepTree(
        index=1,
        step=7,
        nodes=(
            TreeNode(0, -1, 0, 1.0, False, ()),
            TreeNode(1, 0, 1, 0.3333333, True, both),
            TreeNode(2, 0, 1, 1e-9, False, (TreeSlot("small", None, None, 0.0),)),
        ),
        emitted=(
            TreeToken(1, "small", 0.3333333, " cat"),
            TreeToken(3, "target", 1.0, ""),
        ),
        seconds={"target": 0.0123456},
        num_sequences=2,
        plain_s=0.011,
    )
    event = tree_event(step, WORDS.__getitem__)
    assert json.loads(json.dumps(event)) == {
        "step": 7,
        "index": 1,
        "nodes": [
            {
                "id": 0,
                "parent": -1,
                "depth": 0,
                "token": "the",
                "token_id": 0,
                "source": None,
                "q": None,
                "p": 1.0,
                "accepted": False,
                "slots": [],
            },
            {
                "id": 1,
                "parent": 0,
                "depth": 1,
                "token": " cat",
                "token_id": 1,
                "source": "small",
                "q": 0.25,
                "p": 0.3333,
                "accepted": True,
                "slots": [
                    {"source": "small", "q": 0.25, "score": 0.25, "ratio": 0.1235},
                    {"source": "ngram", "q": 1.0, "score": None, "ratio": None},
                ],
            },
            {
                "id": 2,
                "parent": 0,
                "depth": 1,
                "token": " dog",
                "token_id": 2,
                "source": "small",
                "q": None,
                "p": 1e-9,
                "accepted": False,
                "slots": [{"source": "small", "q": None, "score": None, "ratio": 0.0}],
            },
        ],
        "emitted": [
            {"token": " cat", "token_id": 1, "source": "small", "p": 0.3333, "text": " cat"},
            {"token": "<|end|>", "token_id": 3, "source": "target", "p": 1.0, "text": ""},
        ],
        "time_ms": {"target": 12.346},
        "num_sequences": 2,
        "plain_ms": 11.0,
    }


def test_a_step_without_times() -> None:
    step = StepTree(0, 1, (TreeNode(0, -1, 0, 1.0, False, ()),), (), {}, 1, None)
    assert tree_event(step, WORDS.__getitem__)["plain_ms"] is None
