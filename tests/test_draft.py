"""Identity: a drafter that keeps what it computed scores as one that is fed everything afresh."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from specinfer.cache.blocks import BlockAllocator, Pages
from specinfer.draft.base import Draft
from specinfer.draft.model import ModelDrafter
from specinfer.models.decoder import Decoder
from specinfer.run.batch import Span
from specinfer.run.runner import Runner
from specinfer.tree import TokenTree
from tests.engines import fresh_logits, run_pages, scattered_pages, toy_decoder

TOLERANCE = 1e-5
VOCAB = 61
NUM_SLOTS = 96

DECODERS = {
    "llama": {},
    "window": {"family": "MistralForCausalLM", "sliding_window": 5},
}


@pytest.fixture(params=DECODERS.values(), ids=DECODERS)
def decoder(request: pytest.FixtureRequest) -> Decoder:
    return toy_decoder(5, num_hidden_layers=2, **request.param)


class Recorder(Runner):
    """A runner that notes how many tokens each of its passes computed."""

    def __init__(self, decoder: Decoder, num_slots: int) -> None:
        super().__init__(decoder, num_slots)
        self.passes: list[int] = []

    def run(self, spans: list[Span]) -> torch.Tensor:
        self.passes.append(sum(len(span.tokens) for span in spans))
        return super().run(spans)


class Session:
    """Requests that one drafter serves, step by step; every logit is compared with a fresh pass."""

    def __init__(
        self, decoder: Decoder, lengths: list[int], *, max_tokens: int = 100, seed: int = 0
    ) -> None:
        self.decoder = decoder
        self.rng = np.random.default_rng(seed)
        self.runner = Recorder(decoder, NUM_SLOTS * len(lengths))
        self.drafter = ModelDrafter("toy", self.runner, vocab_size=VOCAB, max_tokens=max_tokens)
        self.texts = [self.random_tokens(length) for length in lengths]
        everything = scattered_pages(NUM_SLOTS * len(lengths), 4, NUM_SLOTS * len(lengths))
        share = NUM_SLOTS // 4
        self.pages = [
            type(everything)(everything.blocks[n * share : (n + 1) * share], 4)
            for n in range(len(lengths))
        ]

    def random_tokens(self, count: int) -> list[int]:
        return self.rng.integers(0, VOCAB, count).tolist()

    def expand(self, frontier: list[tuple[Draft, list[int]]]) -> None:
        logits = self.drafter.expand(frontier)
        rows = [(draft, node) for draft, nodes in frontier for node in nodes]
        assert logits.shape == (len(rows), VOCAB)
        for row, (draft, node) in zip(logits, rows, strict=True):
            path = [draft.tree.tokens[each] for each in draft.tree.path(node)]
            fresh = fresh_logits(self.decoder, [*draft.tokens, *path])[-1]
            torch.testing.assert_close(row, fresh, atol=TOLERANCE, rtol=TOLERANCE)

    def step(
        self,
        accept: Callable[[TokenTree, set[int]], int],
        *,
        rounds: int = 3,
        members: list[int] | None = None,
    ) -> None:
        """Grow a random tree per request in `rounds` passes, then accept down to one node.

        accept  (tree, expanded nodes) -> the last accepted node
        """
        members = list(range(len(self.texts))) if members is None else members
        drafts = [
            Draft(n, self.texts[n], self.pages[n], TokenTree(self.texts[n][-1])) for n in members
        ]
        expanded: list[set[int]] = [set() for _ in drafts]
        for depth in range(rounds):
            frontier = []
            for draft, done in zip(drafts, expanded, strict=True):
                nodes = [0]
                if depth:
                    ready = [n for n in range(len(draft.tree)) if n not in done]
                    count = int(self.rng.integers(1, len(ready) + 1))
                    nodes = sorted(self.rng.choice(ready, count, replace=False).tolist())
                frontier.append((draft, nodes))
            self.expand(frontier)
            for (draft, nodes), done in zip(frontier, expanded, strict=True):
                done.update(nodes)
                for node in nodes:
                    for token in self.random_tokens(int(self.rng.integers(1, 4))):
                        draft.tree.add(node, token)
        paths = [d.tree.path(accept(d.tree, e)) for d, e in zip(drafts, expanded, strict=True)]
        self.drafter.admit(list(zip(drafts, paths, strict=True)))
        for draft, path in zip(drafts, paths, strict=True):
            draft.tokens += [draft.tree.tokens[node] for node in path] + self.random_tokens(1)


def leaf(tree: TokenTree, expanded: set[int]) -> int:
    """The deepest leaf: proposed, never computed."""
    leaves = [node for node in range(len(tree)) if node not in expanded]
    return max(leaves, key=lambda node: (tree.depths[node], node))


def nothing(tree: TokenTree, expanded: set[int]) -> int:
    return 0


def inner(tree: TokenTree, expanded: set[int]) -> int:
    """The deepest computed node, the last of its level."""
    return max(expanded, key=lambda node: (tree.depths[node], node))


ACCEPTS = {"leaf": leaf, "nothing": nothing, "inner": inner}


@pytest.mark.parametrize("accept", ACCEPTS.values(), ids=ACCEPTS)
def test_several_steps_equal_fresh_passes(
    decoder: Decoder, accept: Callable[[TokenTree, set[int]], int]
) -> None:
    session = Session(decoder, [7, 1, 12])
    for _ in range(4):
        session.step(accept)


@pytest.mark.parametrize("seed", range(4))
def test_mixed_steps_equal_fresh_passes(decoder: Decoder, seed: int) -> None:
    """Requests skip steps in which they are not drafted for, and then catch up."""
    session = Session(decoder, [7, 1, 12, 3], seed=seed)
    rng = np.random.default_rng(seed)

    def anything(tree: TokenTree, expanded: set[int]) -> int:
        return int(rng.integers(len(tree)))

    for _ in range(5):
        members = sorted(rng.choice(4, int(rng.integers(1, 5)), replace=False).tolist())
        session.step(anything, rounds=int(rng.integers(1, 4)), members=members)
        for n in set(range(4)) - set(members):
            session.texts[n] += session.random_tokens(int(rng.integers(1, 4)))


@pytest.mark.parametrize("lengths", [[23], [23, 9], [4, 4, 4], [1, 1, 1, 1, 1, 1, 1], [30, 1]])
def test_catching_up_in_passes_of_limited_size(decoder: Decoder, lengths: list[int]) -> None:
    max_tokens = 5
    session = Session(decoder, lengths, max_tokens=max_tokens)
    session.step(leaf, rounds=1)
    assert sum(session.runner.passes) == sum(lengths)
    assert max(session.runner.passes) <= max(max_tokens, len(lengths))  # a root each at least
    for n, _ in enumerate(lengths):
        session.texts[n] += session.random_tokens(8)
    session.step(inner)


def test_only_what_is_missing_is_computed() -> None:
    session = Session(toy_decoder(5), [9])
    session.step(nothing, rounds=1)
    assert session.runner.passes == [9]
    session.runner.passes.clear()
    session.step(leaf, rounds=1)  # nothing was accepted before: the new root alone
    assert session.runner.passes == [1]
    session.runner.passes.clear()
    session.step(inner, rounds=1)  # a leaf was: itself and the new root
    assert session.runner.passes == [2]
    session.step(inner, rounds=3)
    session.runner.passes.clear()
    session.step(nothing, rounds=1)  # the accepted nodes had all been computed
    assert session.runner.passes == [1]


def test_dropped_requests_are_forgotten() -> None:
    session = Session(toy_decoder(5), [9, 4])
    session.step(inner)
    session.drafter.drop(0)
    session.drafter.drop(0)  # and dropping what is not there is nothing
    session.drafter.drop(77)
    session.texts[0] = session.random_tokens(6)  # another request under the same key
    session.step(leaf)


@pytest.mark.parametrize("vocab_size", [50, 61, 70])
def test_logits_are_cut_or_padded_to_the_targets_vocabulary(vocab_size: int) -> None:
    decoder = toy_decoder(5)
    drafter = ModelDrafter("toy", Runner(decoder, 8), vocab_size=vocab_size, max_tokens=99)
    draft = Draft(0, [1, 2, 3], run_pages(8), TokenTree(3))
    logits = drafter.expand([(draft, [0])])
    expected = fresh_logits(decoder, [1, 2, 3])[-1:]
    assert logits.shape == (1, vocab_size)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits[:, :61], expected[:, :vocab_size], atol=1e-5, rtol=0)
    assert (logits[:, 61:] == -1e30).all(), "no chance beside others, and a law without them"


# --- shared beginnings ----------------------------------------------------------------------------


class Sharing:
    """Requests of one drafter whose pages share published blocks of 4 tokens."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.runner = Recorder(decoder, 160)
        self.drafter = ModelDrafter("toy", self.runner, vocab_size=VOCAB, max_tokens=100)
        self.allocator = BlockAllocator(40, 4)

    def pages(self, tokens: list[int]) -> Pages:
        """As the scheduler gives and publishes them."""
        hashes: list[bytes] = []
        self.allocator.hash_blocks(hashes, tokens, len(tokens) - 1)
        pages = self.allocator.allocate(len(tokens) + 8, self.allocator.find(hashes))
        assert pages is not None
        self.allocator.publish(pages, hashes)
        return pages

    def expand(self, key: int, tokens: list[int], pages: Pages) -> int:
        """Compare with a fresh pass; returns how many tokens were computed."""
        self.runner.passes.clear()
        logits = self.drafter.expand([(Draft(key, tokens, pages, TokenTree(tokens[-1])), [0])])
        fresh = fresh_logits(self.decoder, tokens)[-1:]
        torch.testing.assert_close(logits, fresh, atol=TOLERANCE, rtol=TOLERANCE)
        return sum(self.runner.passes)


def test_what_one_request_computed_another_does_not(decoder: Decoder) -> None:
    shared = Sharing(decoder)
    one = list(range(1, 15))
    two = [*one[:9], 50, 51]
    first, second = shared.pages(one), shared.pages(two)
    assert second.blocks[:2] == first.blocks[:2]
    assert shared.expand(1, one, first) == 14
    shared.drafter.admit([])
    assert shared.expand(2, two, second) == 11, "before anything was noted, it computes its own"
    shared.drafter.drop(1)
    third = shared.pages(two)
    assert shared.expand(3, two, third) == 3, "9 and 10 are in no full block"
    assert shared.expand(4, one, shared.pages(one)) == 2


def test_who_falls_behind_takes_what_others_computed_meanwhile(decoder: Decoder) -> None:
    shared = Sharing(decoder)
    text = list(range(1, 20))
    first, second = shared.pages(text), shared.pages(text)
    assert shared.expand(1, text[:3], first) == 3
    assert shared.expand(2, text, second) == 19
    shared.drafter.drop(2)
    assert shared.expand(1, text, first) == 3, "its own 3 are in the first of 4 whole blocks"


def test_blocks_that_hold_another_text_by_now_are_computed_again(decoder: Decoder) -> None:
    shared = Sharing(decoder)
    text, other = list(range(1, 14)), list(range(20, 33))
    pages = shared.pages(text)
    shared.expand(1, text, pages)
    shared.drafter.drop(1)
    shared.allocator.free(pages)
    held = [shared.pages(other)]
    while len(held) < 7:
        held.append(shared.allocator.allocate(20))  # type: ignore[arg-type]
    for each in held:  # all blocks were somebody's, and the drafter wrote to some
        shared.allocator.free(each)
    shared.allocator.reset()
    pages = shared.pages(text)
    assert shared.expand(2, text, pages) == 13


def test_other_pages_are_begun_anew(decoder: Decoder) -> None:
    """Who was sent back to wait has other blocks when it runs again."""
    shared = Sharing(decoder)
    text = list(range(1, 15))
    shared.expand(1, text, shared.pages(text[:1] * 14))
    pages = shared.pages(text)
    assert shared.expand(1, text, pages) == 14
    again = shared.pages(text)
    assert shared.expand(1, text, again) == 2, "what was computed counts, by whatever request"


def test_feeding_is_catching_up_without_guessing(decoder: Decoder) -> None:
    shared = Sharing(decoder)
    text = list(range(1, 15))
    pages = shared.pages(text)
    draft = Draft(1, text, pages, TokenTree(text[-1]))
    assert shared.drafter.missing(draft) == 14
    shared.drafter.feed(draft, 5)
    shared.drafter.feed(draft, 4)
    assert shared.drafter.missing(draft) == 5
    assert shared.expand(1, text, pages) == 5
