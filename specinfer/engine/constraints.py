"""From a request's parameters to its history: bad words as tokens, grammars compiled."""

import threading
from functools import cached_property

from specinfer.errors import RequestError
from specinfer.grammar import GrammarCompiler, PathMatcher
from specinfer.history import History, Tokens
from specinfer.request import SamplingParams
from specinfer.structured import StructuredOutputsParams
from specinfer.text.tokenizer import Tokenizer


class Constraints:
    """Makes the histories of one model's requests."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._making = threading.Lock()

    def history(
        self, params: SamplingParams, num_prompt: int, end_tokens: frozenset[int]
    ) -> History | None:
        """A new sequence's history; None where its laws depend on logits alone.

        raises  RequestError for what cannot be kept with this model
        """
        if not History.is_needed(params):
            return None
        return History(
            params,
            num_prompt=num_prompt,
            vocab_size=self._vocab_size,
            end_tokens=end_tokens,
            bad_words=[word for text in params.bad_words or () for word in self._bad_words(text)],
            grammar=self._matcher(params),
        )

    def prepare(self, params: SamplingParams) -> None:
        """Compile what a request needs, so that `history` does not have to; from any thread.

        raises  RequestError as `history`
        """
        if (asked := params.structure) is not None:
            self._compiler_for(asked).compile(asked, params.structure_field)

    def _matcher(self, params: SamplingParams) -> PathMatcher | None:
        asked = params.structure
        if asked is None:
            return None
        return self._compiler_for(asked).matcher(asked, params.structure_field)

    def _compiler_for(self, asked: StructuredOutputsParams) -> GrammarCompiler:
        with self._making:
            return self._compiler if asked.structural_tag is None else self._tag_compiler

    @cached_property
    def _compiler(self) -> GrammarCompiler:
        return self._make_compiler(self._tokenizer.special_token_ids)

    @cached_property
    def _tag_compiler(self) -> GrammarCompiler:
        """Structural tags speak of special tokens, and their free text may have any."""
        return self._make_compiler(frozenset())

    def _make_compiler(self, textless: frozenset[int]) -> GrammarCompiler:
        """A compiler to which some tokens are no text."""
        pieces, tokenizer = self._tokenizer.pieces, self._tokenizer
        if pieces is None:
            raise RequestError(
                "structured output needs a tokenizer whose tokens are bytes, and this model's "
                "decoder is another: leave structured_outputs out"
            )
        ends = [token for token in tokenizer.eos_token_ids if token < self._vocab_size]
        if not ends:
            raise RequestError(
                "structured output needs an end token and this model names none: give its "
                "generation_config.json an eos_token_id"
            )
        textless |= frozenset(ends)
        return GrammarCompiler(
            [b"" if token in textless else pieces[token] for token in range(self._vocab_size)],
            ends,
            lambda text: tokenizer.encode(text, add_special_tokens=False),
        )

    def _bad_words(self, text: str) -> list[Tokens]:
        """How a bad word may be written: at the start of a text, and after a space."""
        words = []
        for spelling in (text.lstrip(), f" {text.lstrip()}"):
            word = tuple(self._tokenizer.encode(spelling, add_special_tokens=False))
            if word and word not in words and max(word) < self._vocab_size:
                words.append(word)
        if not words:
            raise RequestError(f"bad_words has {text!r}, which this model's tokens cannot write")
        return words
