"""What a node's history does to its logits: masks, bans, biases and penalties, node by node.

A node's history is prompt, output and the path down to it. The nodes of a tree share the root's
and differ by their paths alone, so `History` reads each committed token once; `edits` says what is
to be done to some nodes' rows, and `RowEdits` does it to the rows of a whole batch. What may be
done before a token is known depends on its ancestors only: drafters use the same edits.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from specinfer.request import SamplingParams
from specinfer.tree import TokenTree

Bits = npt.NDArray[np.uint8]
"""[vocab / 8, rounded up]: a bit per token, the lowest token in the lowest bit."""

Tokens = tuple[int, ...]


class Grammar(Protocol):
    """Which tokens may follow the output and a path, as a history asks it."""

    def advance(self, tokens: Sequence[int]) -> None:
        """Take in committed output tokens."""
        ...

    def allowed(self, path: Tokens) -> Bits | None:
        """The tokens that may follow a path below the output; None: any."""
        ...

    def forced(self, path: Tokens) -> Tokens:
        """How a text that must follow a path is likely written; () for none."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class Penalties:
    """What some nodes' histories hold of each token that is penalised.

    tokens   [n] int64, distinct
    counts   [nodes, n] float32: how often the output has it
    known    [nodes, n] bool: whether prompt or output have it
    """

    params: SamplingParams
    tokens: npt.NDArray[np.int64]
    counts: npt.NDArray[np.float32]
    known: npt.NDArray[np.bool_]


@dataclass(slots=True, eq=False)
class Edits:
    """What is to be done to the rows of some nodes of one request, in this order.

    allowed    row -> the tokens that stay
    banned     row -> tokens that go
    bias       (tokens, what is added in every row)
    penalties  None for none
    """

    allowed: dict[int, Bits] = field(default_factory=dict)
    banned: dict[int, frozenset[int]] = field(default_factory=dict)
    bias: tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]] | None = None
    penalties: Penalties | None = None

    @property
    def is_any(self) -> bool:
        """Whether there is anything to be done."""
        return bool(self.allowed or self.banned or self.bias or self.penalties)

    def admits(self, row: int, token: int) -> bool:
        """Whether a token may come at all."""
        bits, place = self.allowed.get(row), token >> 3  # a tokenizer may know more than the model
        if bits is not None and (place >= len(bits) or not bits[place] >> (token & 7) & 1):
            return False
        return token not in self.banned.get(row, ())


class History:
    """One sequence's prompt and output, as far as its laws depend on them."""

    def __init__(
        self,
        params: SamplingParams,
        *,
        num_prompt: int,
        vocab_size: int,
        end_tokens: Iterable[int] = (),
        bad_words: Sequence[Tokens] = (),
        grammar: Grammar | None = None,
    ) -> None:
        """Begin before the first token.

        end_tokens  min_tokens keeps them from coming
        bad_words   as token ids, none of them empty
        """
        self.params = params
        self.grammar = grammar
        self._num_prompt = num_prompt
        self._vocab_size = vocab_size
        self._end_tokens = frozenset(end_tokens)
        self._allowed = None
        if params.allowed_token_ids is not None:
            self._allowed = pack(params.allowed_token_ids, vocab_size)
        self._bad_tokens = frozenset(word[0] for word in bad_words if len(word) == 1)
        self._bad_words: dict[int, list[Tokens]] = {}  # by the last token but one
        for word in bad_words:
            if len(word) > 1:
                self._bad_words.setdefault(word[-2], []).append(word)
        self._longest = max(map(len, bad_words), default=0)
        self._bias = None
        if params.logit_bias:
            tokens, biases = zip(*params.logit_bias.items(), strict=True)
            self._bias = np.array(tokens, np.int64), np.array(biases, np.float32)
        self._is_penalised = (
            params.presence_penalty != 0
            or params.frequency_penalty != 0
            or params.repetition_penalty != 1
        )
        self._num_read = 0
        self._tail: Tokens = ()  # of the output, as far as bad words look back
        self._columns: dict[int, int] = {}  # penalised token -> its place in _counts
        self._counts: list[int] = []  # in the output; 0 for the prompt's

    @staticmethod
    def is_needed(params: SamplingParams) -> bool:
        """Whether these parameters look at history, or at anything but logits."""
        return (
            params.min_tokens > 0
            or params.presence_penalty != 0
            or params.frequency_penalty != 0
            or params.repetition_penalty != 1
            or bool(params.logit_bias)
            or bool(params.bad_words)
            or params.allowed_token_ids is not None
            or params.structure is not None
        )

    def edits(self, tokens: Sequence[int], tree: TokenTree, nodes: Sequence[int]) -> Edits | None:
        """What is to be done to the rows of these nodes; None: nothing.

        tokens  prompt and output; the tree's root is the last of them
        cost    O(tokens new since the last call + the nodes' paths)
        """
        self.read(tokens)
        edits = Edits(bias=self._bias)
        is_early = len(tokens) - self._num_prompt < self.params.min_tokens
        if is_early or self.grammar or self._allowed is not None or self._longest:
            for row, node in enumerate(nodes):
                self._restrict(edits, row, path_tokens(tree, node))
        if self._is_penalised:
            edits.penalties = self._penalties(tree, nodes)
        return edits if edits.is_any else None

    def read(self, tokens: Sequence[int]) -> None:
        """Take in what was committed since the last call."""
        if self._num_read == len(tokens):
            return
        new = tokens[self._num_read :]
        num_prompt = max(0, self._num_prompt - self._num_read)
        output = new[num_prompt:]
        if self.params.repetition_penalty != 1:
            for token in new[:num_prompt]:
                self._column(token)
        if self._is_penalised:
            for token in output:
                self._counts[self._column(token)] += 1
        if self._longest:
            self._tail = (*self._tail, *output)[-self._longest :]
        if self.grammar is not None:
            self.grammar.advance(output)
        self._num_read = len(tokens)

    def _column(self, token: int) -> int:
        column = self._columns.setdefault(token, len(self._counts))
        if column == len(self._counts):
            self._counts.append(0)
        return column

    def _restrict(self, edits: Edits, row: int, path: Tokens) -> None:
        """Masks and bans of one row; what would leave no token is left out."""
        bits = None if self.grammar is None else self.grammar.allowed(path)
        if self._allowed is not None:
            both = self._allowed if bits is None else self._allowed & bits
            bits = both if both.any() else bits
        banned = frozenset[int]()
        num_output = self._num_read - self._num_prompt + len(path)
        for more in (
            self._completing(path) if self._longest else (),
            self._end_tokens if num_output < self.params.min_tokens else (),
        ):
            if more and self._leaves_any(bits, banned | more):
                banned |= more
        if bits is not None:
            edits.allowed[row] = bits
        if banned:
            edits.banned[row] = banned

    def _completing(self, path: Tokens) -> frozenset[int]:
        """The tokens that would complete a bad word after a path."""
        text = (*self._tail, *path)
        if not text or text[-1] not in self._bad_words:
            return self._bad_tokens
        words = self._bad_words[text[-1]]
        return self._bad_tokens.union(
            word[-1] for word in words if text[-len(word) + 1 :] == word[:-1]
        )

    def _leaves_any(self, bits: Bits | None, banned: frozenset[int]) -> bool:
        if bits is None:
            return len(banned) < self._vocab_size
        kept = np.unpackbits(bits, bitorder="little")
        kept[list(banned)] = 0
        return bool(kept.any())

    def _penalties(self, tree: TokenTree, nodes: Sequence[int]) -> Penalties:
        paths = [path_tokens(tree, node) for node in nodes]
        columns = dict(self._columns)
        for path in paths:
            for token in path:
                columns.setdefault(token, len(columns))
        counts = np.zeros((len(nodes), len(columns)), np.float32)
        counts[:, : len(self._counts)] = self._counts
        known = np.zeros(counts.shape, np.bool_)
        known[:, : len(self._counts)] = True
        for row, path in enumerate(paths):
            for token in path:
                counts[row, columns[token]] += 1
                known[row, columns[token]] = True
        tokens = np.fromiter(columns, np.int64, len(columns))
        return Penalties(self.params, tokens, counts, known)


def path_tokens(tree: TokenTree, node: int) -> Tokens:
    """The tokens from the root's child down to a node."""
    return tuple(tree.tokens[each] for each in tree.path(node))


def pack(tokens: Iterable[int], vocab_size: int) -> Bits:
    """Token ids as bits."""
    flags = np.zeros(vocab_size, np.bool_)
    flags[list(tokens)] = True
    return np.packbits(flags, bitorder="little")


@dataclass(frozen=True, slots=True, eq=False)
class RowEdits:
    """The edits of a batch's rows, ready to be made; None where no row asks.

    masked     ([n] int64 rows, [n, vocab or some more] bool: what goes)
    banned     ([n] int64 rows, [n] int64 tokens)
    biased     ([n] int64 rows, [n] int64 tokens, [n] float32)
    penalised  per request ([n, 1] int64 rows, [m] int64 tokens, counts and known [n, m], params)
    """

    masked: tuple[Tensor, Tensor] | None
    banned: tuple[Tensor, Tensor] | None
    biased: tuple[Tensor, Tensor, Tensor] | None
    penalised: tuple[tuple[Tensor, Tensor, Tensor, Tensor, SamplingParams], ...]

    @classmethod
    def of(
        cls,
        edits: Sequence[tuple[int, int, Edits]],
        *,
        device: torch.device | str = "cpu",
    ) -> "RowEdits":
        """Collect the edits of several requests.

        edits  (first row, number of rows, what is to be done to them)
        """

        def put(values: npt.ArrayLike, dtype: npt.DTypeLike = np.int64) -> Tensor:
            return torch.from_numpy(np.asarray(values, dtype)).to(device, non_blocking=True)

        allowed = [(start + r, bits) for start, _, e in edits for r, bits in e.allowed.items()]
        bans = [(start + r, t) for start, _, e in edits for r, ts in e.banned.items() for t in ts]
        biases = [
            (np.repeat(np.arange(start, start + count), len(e.bias[0])), e.bias, count)
            for start, count, e in edits
            if e.bias is not None
        ]
        masked = banned = biased = None
        if allowed:
            kept = np.unpackbits(np.stack([bits for _, bits in allowed]), 1, bitorder="little")
            masked = put([row for row, _ in allowed]), put(kept == 0, np.bool_)
        if bans:
            banned = put([row for row, _ in bans]), put([token for _, token in bans])
        if biases:
            biased = (
                put(np.concatenate([rows for rows, _, _ in biases])),
                put(np.concatenate([np.tile(bias[0], count) for _, bias, count in biases])),
                put(np.concatenate([np.tile(bias[1], count) for _, bias, count in biases]), "f4"),
            )
        penalised = tuple(
            (
                put(np.arange(start, start + count)[:, None]),
                put(each.tokens),
                put(each.counts, np.float32),
                put(each.known, np.bool_),
                each.params,
            )
            for start, count, e in edits
            if (each := e.penalties) is not None
        )
        return cls(masked, banned, biased, penalised)

    def apply(self, scores: Tensor) -> Tensor:
        """Make the edits.

        scores   [rows, vocab] float32; left as they are
        law      masks, bans; biases; repetition, frequency, presence penalties: vLLM's formulas
        """
        if self.masked is None:
            scores = scores.clone()
        else:
            rows, gone = self.masked
            gone = gone[:, : scores.shape[-1]]
            if len(rows) < len(scores):
                scores = scores.index_put((rows,), scores[rows].masked_fill_(gone, -torch.inf))
            else:
                scores = scores.masked_fill(gone, -torch.inf)
        if self.banned is not None:
            scores[self.banned] = -torch.inf
        if self.biased is not None:
            rows, tokens, biases = self.biased
            scores[rows, tokens] += biases
        for rows, tokens, counts, known, params in self.penalised:
            block = scores[rows, tokens]
            if params.repetition_penalty != 1:
                factor = params.repetition_penalty
                block = torch.where(known, _repeated(block, factor), block)
            block = block - params.frequency_penalty * counts
            block = block - params.presence_penalty * (counts > 0)
            scores[rows, tokens] = block
        return scores


def _repeated(block: Tensor, factor: float) -> Tensor:
    return torch.where(block > 0, block / factor, block * factor)
