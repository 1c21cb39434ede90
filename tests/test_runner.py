"""Identity: chunks, trees and kept paths compute what one pass over the plain sequence does."""

import numpy as np
import pytest
import torch

from specinfer.cache.blocks import Pages
from specinfer.models.decoder import Decoder
from specinfer.run.batch import Span
from specinfer.run.runner import Runner
from specinfer.tree import TokenTree
from tests.engines import (
    chain,
    fresh_keys_and_values,
    fresh_logits,
    keys_and_values,
    run_pages,
    scattered_pages,
    toy_decoder,
)

TOLERANCE = 1e-5
VOCAB = 61
NUM_SLOTS = 64

DECODERS = {
    "two groups": {},
    "one key head": {"num_key_value_heads": 1},
    "own key heads": {"num_key_value_heads": 4},
    "window": {"family": "MistralForCausalLM", "sliding_window": 5},
    "mixed windows": {
        "family": "Qwen3ForCausalLM",
        "use_sliding_window": True,
        "sliding_window": 4,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
}
PAGES = {"run": run_pages(NUM_SLOTS), "scattered": scattered_pages(48, 4, NUM_SLOTS)}


@pytest.fixture(params=DECODERS.values(), ids=DECODERS)
def decoder(request: pytest.FixtureRequest) -> Decoder:
    return toy_decoder(3, **request.param)


@pytest.fixture(params=PAGES.values(), ids=PAGES)
def pages(request: pytest.FixtureRequest) -> Pages:
    return request.param


def random_tokens(rng: np.random.Generator, count: int) -> list[int]:
    return rng.integers(0, VOCAB, count).tolist()


def random_tree(rng: np.random.Generator, size: int, root: int) -> TokenTree:
    tree = TokenTree(root)
    while len(tree) < size:
        tree.add(int(rng.integers(len(tree))), int(rng.integers(VOCAB)))
    return tree


def tree_span(tokens: list[int], tree: TokenTree, pages: Pages) -> Span:
    """A sequence's root, computed up to there, and the tree behind it."""
    root = len(tokens) - 1
    return Span(
        tokens=[tokens[-1], *tree.tokens[1:]],
        positions=[root + depth for depth in tree.depths],
        pages=pages,
        prefix=root,
        start=root,
        mask=tree.ancestor_mask(),
        num_logits=len(tree),
    )


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("sizes", [(20,), (1, 19), (7, 7, 6), (1,) * 20, (19, 1)])
def test_chunked_prompt_equals_whole(
    decoder: Decoder, pages: Pages, sizes: tuple[int, ...]
) -> None:
    tokens = random_tokens(np.random.default_rng(0), 20)
    runner = Runner(decoder, NUM_SLOTS)
    logits, start = [], 0
    for size in sizes:
        stop = start + size
        logits.append(runner.run([chain(tokens[start:stop], pages, start, size)]))
        start = stop
    assert_close(torch.cat(logits), fresh_logits(decoder, tokens))
    assert_close(keys_and_values(runner, pages, 20), fresh_keys_and_values(decoder, tokens))


def test_a_chunk_may_owe_no_logits(decoder: Decoder) -> None:
    runner, tokens = Runner(decoder, NUM_SLOTS), random_tokens(np.random.default_rng(0), 6)
    assert runner.run([chain(tokens, run_pages(8), num_logits=0)]).shape == (0, VOCAB)


@pytest.mark.parametrize("seed", range(4))
def test_every_node_equals_the_plain_sequence_to_it(
    decoder: Decoder, pages: Pages, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    tokens = random_tokens(rng, int(rng.integers(1, 20)))
    tree = random_tree(rng, int(rng.integers(2, 20)), tokens[-1])
    runner = Runner(decoder, NUM_SLOTS)
    if len(tokens) > 1:
        runner.run([chain(tokens[:-1], pages)])
    logits = runner.run([tree_span(tokens, tree, pages)])
    for node in range(len(tree)):
        path = [tree.tokens[each] for each in tree.path(node)]
        assert_close(logits[node], fresh_logits(decoder, [*tokens, *path])[-1])


@pytest.mark.parametrize("seed", range(4))
def test_after_a_commit_the_cache_is_a_fresh_one(decoder: Decoder, pages: Pages, seed: int) -> None:
    rng = np.random.default_rng(seed)
    tokens = random_tokens(rng, 6)
    runner = Runner(decoder, NUM_SLOTS)
    runner.run([chain(tokens[:-1], pages)])
    for _ in range(4):
        tree = random_tree(rng, 8, tokens[-1])
        logits = runner.run([tree_span(tokens, tree, pages)])
        root, path = len(tokens) - 1, tree.path(int(rng.integers(len(tree))))
        last = path[-1] if path else 0
        assert_close(
            logits[last],
            fresh_logits(decoder, [*tokens, *(tree.tokens[node] for node in path)])[-1],
        )
        runner.pool.move(
            [pages.slot(root + node) for node in path],
            [pages.slot(root + depth) for depth in range(1, len(path) + 1)],
        )
        tokens += [tree.tokens[node] for node in path]
        assert_close(
            keys_and_values(runner, pages, len(tokens)), fresh_keys_and_values(decoder, tokens)
        )
        tokens += random_tokens(rng, 1)


def test_requests_in_one_batch_do_not_touch_each_other(decoder: Decoder) -> None:
    """A prompt chunk, a second chunk, a tree and a lone root share a pass."""
    rng = np.random.default_rng(9)
    runner = Runner(decoder, 4 * 32)
    pages = [Pages((n,), 32) for n in range(4)]
    texts = [random_tokens(rng, count) for count in (5, 17, 9, 3)]
    tree = random_tree(rng, 10, texts[2][-1])
    runner.run([chain(texts[i][:n], pages[i]) for i, n in ((1, 11), (2, 8), (3, 2))])
    logits = runner.run(
        [
            chain(texts[0], pages[0], num_logits=1),
            chain(texts[1][11:], pages[1], 11, num_logits=6),
            tree_span(texts[2], tree, pages[2]),
            chain(texts[3][2:], pages[3], 2, num_logits=1),
        ]
    )
    paths = [[tree.tokens[n] for n in tree.path(node)] for node in range(len(tree))]
    expected = [
        fresh_logits(decoder, texts[0])[-1:],
        fresh_logits(decoder, texts[1])[-6:],
        *(fresh_logits(decoder, [*texts[2], *path])[-1:] for path in paths),
        fresh_logits(decoder, texts[3])[-1:],
    ]
    assert_close(logits, torch.cat(expected))
