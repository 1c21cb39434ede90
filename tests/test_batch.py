"""Model-free: a step is cut into parts that compute the same tokens in the same order."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from specinfer.cache.blocks import Pages
from specinfer.run.batch import Span, cut

SIZES = st.lists(
    st.tuples(st.integers(0, 9), st.integers(1, 40), st.booleans(), st.integers(0, 40)), max_size=6
)


@given(SIZES, st.integers(1, 50))
def test_parts_are_the_whole(sizes: list[tuple[int, int, bool, int]], most_tokens: int) -> None:
    spans = [
        Span(
            tokens=list(range(size)),
            positions=range(start, start + size),
            pages=Pages(range(number, number + 50), 1),
            prefix=start,
            start=start,
            mask=np.eye(size, dtype=np.bool_) if is_tree else None,
            num_logits=min(size, num_logits),
        )
        for number, (start, size, is_tree, num_logits) in enumerate(sizes)
    ]
    parts = list(cut(spans, most_tokens))
    assert all(parts)
    for part in parts:
        assert sum(len(span.tokens) for span in part) <= most_tokens or len(part) == 1
    assert tokens_of([span for part in parts for span in part]) == tokens_of(spans)
    assert [s for part in parts for s in part if s.mask is not None] == [
        span for span in spans if span.mask is not None
    ]


def tokens_of(spans: list[Span]) -> list[tuple[int, int, int, bool, bool]]:
    """Of each token: its request's first block, its number, its key, whether its logits are due."""
    found = []
    for span in spans:
        owed = len(span.tokens) - span.num_logits
        assert len(span.tokens) == len(span.positions)
        assert span.prefix == span.start
        assert span.num_logits >= 0
        found += [
            (span.pages.blocks[0], token, span.start + at, at >= owed, span.mask is not None)
            for at, token in enumerate(span.tokens)
        ]
    return found
