"""A job on its way through the step: schedule, draft, verify, commit."""

from collections.abc import Sequence as ListLike
from dataclasses import dataclass

from specinfer.draft.growth import Grown
from specinfer.engine.scheduler import Job
from specinfer.run.batch import Span
from specinfer.tree import TokenTree


@dataclass(slots=True)
class Work:
    """One sequence's job with its tree.

    tree     the root alone where nothing was drafted
    grown    the same tree as its builder left it, where one was asked
    sources  the drafters that were asked
    """

    job: Job
    tree: TokenTree
    grown: Grown | None = None
    sources: ListLike[int] = ()

    @property
    def num_prompt_logits(self) -> int:
        """Rows before those, where the log-probabilities of the prompt's tokens are still due."""
        job = self.job
        sequence = job.sequence
        if sequence.prompt_logprobs is None or sequence.num_output:
            return 0
        return job.num_tokens - job.emits

    @property
    def num_logits(self) -> int:
        """Rows of logits the target owes: one per node of the tree, the root's included."""
        return len(self.tree) if self.job.emits else 0

    def span(self) -> Span:
        """Pending tokens of the job, then the tree's nodes behind its root."""
        job, tree = self.job, self.tree
        sequence = job.sequence
        assert sequence.pages is not None
        start = sequence.num_computed
        tokens = sequence.tokens[start : start + job.num_tokens] + tree.tokens[1:]
        root = start + job.num_tokens - 1
        is_chain = tree.depths[-1] == len(tree) - 1
        return Span(
            tokens=tokens,
            positions=[*range(start, root), *(root + depth for depth in tree.depths)],
            pages=sequence.pages,
            prefix=start,
            start=start,
            mask=None if is_chain else tree.ancestor_mask(),
            num_logits=self.num_prompt_logits + self.num_logits,
        )
