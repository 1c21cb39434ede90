"""A step's token tree as JSON: what `stream_options.include_tree` sends along with a chunk.

{"step": 3, "index": 0,
 "nodes": [{"id": 0, "parent": -1, "depth": 0, "token": " the", "token_id": 17, "source": null,
            "q": null, "p": 1.0, "accepted": false,
            "slots": [{"source", "q", "score", "ratio"}, …]}, …],
 "emitted": [{"token", "token_id", "source", "p", "text"}, …],
 "time_ms": {"draft": 1.2, "target": 6.5, …}, "num_sequences": 1, "plain_ms": 6.3}
"""

from collections.abc import Callable
from typing import Any

from specinfer.outputs import StepTree, TreeNode, TreeSlot, TreeToken

_MICROSECOND = 3  # decimals of a millisecond


def tree_event(step: StepTree, text_of: Callable[[int], str]) -> dict[str, Any]:
    """One step of one continuation, for JSON.

    text_of  a token id's own text, special tokens as they are written

    Beside `StepTree`:
    source, q  of the first of a node's slots; null for the root
    emitted    "target" is the source of tokens that nobody drafted; the texts put together are the
               streamed text, while "token" may be half a character
    time_ms    of the whole step, which serves num_sequences
    plain_ms   what measured times say the same step takes without trees; null: not measured
    """
    return {
        "step": step.step,
        "index": step.index,
        "nodes": [_node(index, node, text_of) for index, node in enumerate(step.nodes)],
        "emitted": [_emitted(token, text_of) for token in step.emitted],
        "time_ms": {part: _ms(seconds) for part, seconds in step.seconds.items()},
        "num_sequences": step.num_sequences,
        "plain_ms": None if step.plain_s is None else _ms(step.plain_s),
    }


def _node(index: int, node: TreeNode, text_of: Callable[[int], str]) -> dict[str, Any]:
    first = node.slots[0] if node.slots else None
    return {
        "id": index,
        "parent": node.parent,
        "depth": node.depth,
        "token": text_of(node.token_id),
        "token_id": node.token_id,
        "source": None if first is None else first.source,
        "q": None if first is None else _short(first.q),
        "p": _short(node.p),
        "accepted": node.accepted,
        "slots": [_slot(slot) for slot in node.slots],
    }


def _slot(slot: TreeSlot) -> dict[str, Any]:
    return {
        "source": slot.source,
        "q": _short(slot.q),
        "score": _short(slot.score),
        "ratio": _short(slot.ratio),
    }


def _emitted(token: TreeToken, text_of: Callable[[int], str]) -> dict[str, Any]:
    return {
        "token": text_of(token.token_id),
        "token_id": token.token_id,
        "source": token.source,
        "p": _short(token.p),
        "text": token.text,
    }


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, _MICROSECOND)


def _short(value: float | None) -> float | None:
    """Four digits: more than anyone reads, and a third of the bytes."""
    return None if value is None else float(f"{value:.4g}")
