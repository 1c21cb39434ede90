"""`--speculative-config`: what vLLM's users write, as drafters and a `Speculation`."""

import ast
import itertools
import json
from typing import Any

from specinfer.config import Speculation, count_nodes
from specinfer.errors import ConfigError

_KEYS = ("method", "model", "num_speculative_tokens", "speculative_token_tree")


def read_speculative_config(text: str) -> tuple[list[str], Speculation]:
    """Translate vLLM's `--speculative-config`: which drafters, and how to speculate.

    text     a JSON object with `model`, `num_speculative_tokens` (k drafts a chain of k) and
             `speculative_token_tree` (drafts that tree), and `method`, which can be "draft_model",
             or "ngram" without a model
    raises   ConfigError for anything that would not mean what it means to vLLM
    """
    try:
        asked = json.loads(text)
    except ValueError as error:
        raise _bad(f"is no JSON ({error})") from None
    if not isinstance(asked, dict):
        raise _bad("must be a JSON object")
    unknown = sorted(asked.keys() - set(_KEYS))
    if unknown:
        raise _bad(f"has {unknown[0]!r}: known are {', '.join(_KEYS)}")
    method = asked.get("method", "draft_model")
    if method not in ("draft_model", "ngram"):
        raise _bad(f'has method={method!r}: use "draft_model" or "ngram"')
    model, num, tree = asked.get("model"), *(asked.get(key) for key in _KEYS[2:])
    if method == "ngram":
        if model not in (None, "ngram"):
            raise _bad(f"has model={model!r}, and n-grams need none")
        model = "ngram"
    if not isinstance(model, str) or not model:
        raise _bad('needs "model", the drafter')
    if num is not None and (not isinstance(num, int) or isinstance(num, bool) or num < 1):
        raise _bad(f"has num_speculative_tokens={num!r}: give a number of at least 1")
    if tree is None:
        if num is None:
            raise _bad("needs num_speculative_tokens or speculative_token_tree")
        widths = (1,) * num
    else:
        widths = _read_token_tree(tree)
        if num is not None and num != count_nodes(widths):
            raise _bad(
                f"has num_speculative_tokens={num} and a tree of {count_nodes(widths)} nodes: "
                "give the tree alone, or the number of its nodes"
            )
    return [model], Speculation(tree=",".join(map(str, widths)))


def _read_token_tree(tree: Any) -> tuple[int, ...]:
    """vLLM's tree, `"[(0,), (1,), (0, 0), (1, 0)]"`, each node as the child indices on its path.

    raises  ConfigError unless all nodes of a level have equally many children
    """
    try:
        paths = ast.literal_eval(tree) if isinstance(tree, str) else [tuple(p) for p in tree]
        nodes = {tuple(int(index) for index in path) for path in paths}
    except (ValueError, TypeError, SyntaxError):
        nodes = set()
    depth = max(map(len, nodes), default=0)
    levels = [[path for path in nodes if len(path) == level] for level in range(1, depth + 1)]
    widths = tuple(max((path[-1] for path in level), default=-1) + 1 for level in levels)
    is_regular = (
        bool(widths)
        and min(widths) > 0
        and len(nodes) == count_nodes(widths)
        and all(path in nodes for path in itertools.product(*map(range, widths)))
        and all(path[:-1] in nodes for path in nodes if len(path) > 1)
    )
    if not is_regular:
        raise _bad(
            f"has speculative_token_tree={tree!r}: give a list of child-index tuples in which all "
            "nodes of a level have equally many children, such as "
            '"[(0,), (1,), (0, 0), (1, 0)]"'
        )
    return widths


def _bad(problem: str) -> ConfigError:
    return ConfigError(f"speculative_config {problem}")
