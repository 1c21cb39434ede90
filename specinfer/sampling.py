"""From laws to tokens.

Unseeded requests draw with a generator of their own; seeded ones take the argmax of log p + Gumbel
noise that depends on (seed, sample, position) alone. `add_*` put tokens into a tree together with
the law they were really drawn from. All unseeded chance passes through `draw`, `draw_rows` and
`coin`, so that tests/oracle.py can replace it by enumeration.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from specinfer.errors import LawError
from specinfer.logits import sound_argmax
from specinfer.tree import PICK, Floats, Integers, Law, TokenTree

_BLOCK = 256
"""`draw` sums blocks of this many tokens first: a cumulative sum is ten times slower than a sum."""

# --- seeded requests ------------------------------------------------------------------------------


def gumbel_noise(seed: int, sample: int, position: int, vocab: int) -> Floats:
    """The noise that decides a seeded request's token at one position.

    sample    which of the request's n continuations
    position  of the token in prompt + output
    returns   [vocab] float32, independent standard Gumbel values, the same in every run
    source    counter-based: Philox keyed by (seed, sample), counter from the position (numpy's
              stream; seeds that agree modulo 2^64 share it)
    cost      about 12 ns per token of the vocabulary
    """
    bits = np.random.Philox(key=_key(seed, sample), counter=[0, position, 0, 0])
    waiting = np.random.Generator(bits).standard_exponential(vocab).astype(np.float32)
    np.maximum(waiting, np.finfo(np.float32).tiny, out=waiting)
    noise: Floats = np.negative(np.log(waiting, out=waiting), out=waiting)
    return noise


def seeded_pick(p: Tensor, noise: Tensor) -> Tensor:
    """The token that the noise draws from p: argmax of log p + noise.

    p        [..., vocab] float32; need not be normalised
    noise    [..., vocab] float32 of `gumbel_noise`
    returns  [...] int64; never a token whose probability is 0; `NO_PICK` where p is NaN
    law      exactly p over the noise; the same token for the same p and noise
    """
    scores = p.log() + noise
    return sound_argmax(scores.reshape(-1, scores.shape[-1])).reshape(scores.shape[:-1])


class SeededNoise:
    """One seeded continuation's noise, kept while positions come back from step to step."""

    def __init__(self, seed: int, sample: int, vocab: int) -> None:
        self._of = (seed, sample, vocab)
        self._rows: dict[int, Floats] = {}

    def row(self, position: int) -> Floats:
        """The noise of one position: [vocab] float32, not to be written to."""
        row = self._rows.get(position)
        if row is None:
            seed, sample, vocab = self._of
            row = self._rows[position] = gumbel_noise(seed, sample, position, vocab)
        return row

    def forget(self, before: int) -> None:
        """Drop the positions before this one: they are committed."""
        self._rows = {position: row for position, row in self._rows.items() if position >= before}


# --- unseeded requests ----------------------------------------------------------------------------


def request_generator(seed: int, request_number: int) -> np.random.Generator:
    """An unseeded request's own randomness: independent of how requests share a batch.

    seed            of the engine
    request_number  in the order of arrival
    """
    bits = np.random.Philox(key=_key(seed, request_number), counter=[0, 0, 0, 1])
    return np.random.Generator(bits)


def _key(seed: int, number: int) -> npt.NDArray[np.uint64]:
    return np.array([seed % 2**64, number % 2**64], np.uint64)


def coin(probability: float, rng: np.random.Generator) -> bool:
    """True with the given probability; always at 1, never at 0."""
    return bool(rng.random() < probability)


def draw(law: Floats, rng: np.random.Generator) -> int:
    """Draw a token.

    law     [vocab], not negative, not all 0; need not be normalised
    raises  LawError if the law has no mass
    result  follows law / sum(law): a block by its sum, then a token of it; never one of
            probability 0
    cost    one pass over the law (10 µs at a vocabulary of 4096, 35 µs at 128k)
    """
    if len(law) <= _BLOCK:
        return _search(law, rng.random())
    start = _BLOCK * _search(_block_sums(law), rng.random())
    return start + _search(law[start : start + _BLOCK], rng.random())


def _block_sums(law: Floats) -> Floats:
    """[vocab] -> [blocks]; einsum takes half of reduceat's time."""
    whole = len(law) // _BLOCK
    sums = np.empty(-(-len(law) // _BLOCK), law.dtype)
    np.einsum("ij->i", law[: whole * _BLOCK].reshape(whole, _BLOCK), out=sums[:whole])
    if whole < len(sums):
        sums[whole] = law[whole * _BLOCK :].sum()
    return sums


def _search(weights: Floats, u: float) -> int:
    """The index at which the cumulative weights pass the share u of their sum."""
    below = weights.cumsum(dtype=np.float64)
    index = int(below.searchsorted(u * below[-1], side="right"))
    if index == len(weights):  # the product rounded up to the whole mass, or there is none
        support = np.flatnonzero(weights)
        if not len(support):
            raise LawError("a token cannot be drawn from a law without mass")
        index = int(support[-1])
    return index


def draw_rows(
    weights: Tensor, rngs: Sequence[tuple[np.random.Generator, int]]
) -> tuple[Tensor, Tensor]:
    """Draw a token for each row, where the rows are: nothing is copied to the host.

    weights  [rows, vocab], not negative; need not be normalised
    rngs     generators, each for so many rows: two numbers of it are used for every row
    returns  the tokens, [rows] int64, and the sums of the rows, [rows] float64. A row that is NaN
             has the sum NaN, one of zeros the sum 0, and both have some token
    result   as `draw`
    cost     one pass over the weights, one copy to the device of 16 bytes per row
    """
    uniforms = np.concatenate([rng.random((count, 2)) for rng, count in rngs])
    shares = torch.from_numpy(uniforms).to(weights.device, non_blocking=True)
    if missing := -weights.shape[-1] % _BLOCK:
        weights = functional.pad(weights, (0, missing))
    blocks = weights.unflatten(-1, (-1, _BLOCK))
    block, sums = _search_rows(blocks.sum(-1), shares[:, :1])
    inside = blocks.gather(1, block[:, None, None].expand(-1, 1, _BLOCK))[:, 0]
    return block * _BLOCK + _search_rows(inside, shares[:, 1:])[0], sums


def _search_rows(weights: Tensor, shares: Tensor) -> tuple[Tensor, Tensor]:
    """`_search` for every row, with the row's sum; where rounding strikes, the heaviest index."""
    below = weights.cumsum(-1, dtype=torch.float64)
    sums = below[:, -1]
    found = torch.searchsorted(below, shares * sums[:, None], right=True)
    found = found.clamp(max=weights.shape[-1] - 1)
    has_mass = weights.gather(-1, found)[:, 0] > 0
    return torch.where(has_mass, found[:, 0], weights.argmax(-1)), sums


def draw_without_replacement(
    q: Floats, k: int, rng: np.random.Generator, seen: Iterable[int] = ()
) -> list[int]:
    """Draw up to k distinct tokens one after the other, each from what is left of q.

    seen     tokens that cannot be drawn
    returns  fewer than k tokens where nothing is left
    law      token j follows q on the tokens not yet seen, renormalised
    """
    tokens: list[int] = []
    rest = q.copy()
    rest[list(seen)] = 0.0
    while len(tokens) < k and rest.any():
        tokens.append(draw(rest, rng))
        rest[tokens[-1]] = 0.0
    return tokens


# --- growing a tree -------------------------------------------------------------------------------


def add_iid(
    tree: TokenTree,
    parent: int,
    rows: Floats,
    row: int,
    k: int,
    rng: np.random.Generator,
    *,
    source: int = 0,
    tokens: Integers | None = None,
) -> list[int]:
    """Add k slots under a node, drawn independently from one law; equal tokens share a node.

    rows     [*, columns], rows sum to 1: the drafter's laws, recorded by reference
    row      which of them
    tokens   what their columns stand for, as in `Law`
    returns  the distinct nodes, in the order drawn
    """
    law = Law(rows, row, (), tokens)
    drawn = (law.token(draw(rows[row], rng)) for _ in range(k))
    nodes = (tree.add(parent, token, source=source, law=law) for token in drawn)
    return list(dict.fromkeys(nodes))


def add_without_replacement(
    tree: TokenTree,
    parent: int,
    rows: Floats,
    row: int,
    k: int,
    rng: np.random.Generator,
    *,
    source: int = 0,
    seen: tuple[int, ...] = (),
    tokens: Integers | None = None,
) -> list[int]:
    """Add up to k slots of distinct tokens under a node, each drawn from what is left of one law.

    rows, row, tokens  as in `add_iid`
    seen               tokens of slots already under this node that must not be drawn again
    returns            the nodes, in the order drawn; fewer than k where nothing is left
    """
    nodes, law = [], Law(rows, row, seen, tokens)
    for column in draw_without_replacement(rows[row], k, rng, law.columns(seen)):
        token = law.token(column)
        nodes.append(tree.add(parent, token, source=source, law=law))
        law = Law(rows, row, (*law.seen, token), tokens)
    return nodes


def add_picks(tree: TokenTree, parent: int, tokens: Iterable[int], *, source: int = 0) -> list[int]:
    """Add a slot per token that was chosen by looking at it: its law is a point mass.

    tokens   chosen without looking at tokens drawn *after* them under the same node
    returns  the nodes, in the order given
    """
    return [tree.add(parent, int(token), source=source, law=PICK) for token in tokens]
