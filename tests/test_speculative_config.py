"""vLLM's way of saying how to speculate."""

import json
from typing import Any

import pytest

from specinfer.cli.speculative_config import read_speculative_config
from specinfer.config import Speculation
from specinfer.errors import ConfigError


@pytest.mark.parametrize(
    ("config", "tree"),
    [
        ({"num_speculative_tokens": 4}, "1,1,1,1"),
        ({"num_speculative_tokens": 1, "method": "draft_model"}, "1"),
        ({"speculative_token_tree": "[(0,), (0, 0), (0, 0, 0)]"}, "1,1,1"),
        ({"speculative_token_tree": "[(0, 1), (0,), (0, 0), (0, 2)]"}, "1,3"),
        (
            {
                "speculative_token_tree": "[(0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1)]",
                "num_speculative_tokens": 6,
            },
            "2,2",
        ),
        ({"speculative_token_tree": [[0], [1]]}, "2"),
    ],
)
def test_vllms_speculative_config(config: dict[str, Any], tree: str) -> None:
    found = read_speculative_config(json.dumps({"model": "small"} | config))
    assert found == (["small"], Speculation(tree=tree))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "is no JSON"),
        ("[]", "must be a JSON object"),
        ("{}", 'needs "model"'),
        ('{"model": 3}', 'needs "model"'),
        ('{"model": "s"}', "needs num_speculative_tokens or speculative_token_tree"),
        ('{"model": "s", "num_speculative_tokens": 0}', "at least 1"),
        ('{"model": "s", "num_speculative_tokens": true}', "at least 1"),
        ('{"model": "s", "num_speculative_tokens": "4"}', "at least 1"),
        ('{"model": "s", "method": "eagle"}', "method='eagle'"),
        ('{"method": "ngram", "prompt_lookup_max": 3}', "prompt_lookup_max"),
        ('{"model": "s", "quantization": "fp8"}', "has 'quantization': known are method, model"),
        (
            '{"model": "s", "num_speculative_tokens": 3, "speculative_token_tree": "[(0,)]"}',
            "a tree of 1 nodes",
        ),
    ],
)
def test_a_speculative_config_that_is_refused(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as caught:
        read_speculative_config(text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "tree",
    [
        "",
        "[]",
        "[()]",
        "nonsense(",
        "[(0,), (2,)]",
        "[(0, 0)]",
        "[(0,), (5, 0)]",
        "[(0,), (1,), (0, 0)]",
        "[(-1,)]",
        "[0, 1]",
        7,
    ],
)
def test_a_token_tree_that_no_shape_describes(tree: Any) -> None:
    with pytest.raises(ConfigError, match="equally many children"):
        read_speculative_config(json.dumps({"model": "s", "speculative_token_tree": tree}))


def test_vllms_ngrams() -> None:
    text = '{"method": "ngram", "num_speculative_tokens": 3}'
    assert read_speculative_config(text) == (["ngram"], Speculation(tree="1,1,1"))
    with pytest.raises(ConfigError, match="n-grams need none"):
        read_speculative_config('{"method": "ngram", "model": "x", "num_speculative_tokens": 3}')
