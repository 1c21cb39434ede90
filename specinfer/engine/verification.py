"""Logits of a step to verdicts: one kind of sequences at a time, in batched operations."""

import itertools
from collections.abc import Callable
from collections.abc import Sequence as ListLike
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from specinfer.baselines import verify_gbv, verify_kseq
from specinfer.config import VerifierName
from specinfer.engine.sequence import Sequence
from specinfer.engine.work import Work
from specinfer.history import Edits
from specinfer.logits import NO_PICK, RowFilters, greedy_picks, target_laws
from specinfer.lumping import Lumped, lump
from specinfer.ops.transfer import is_far, to_host
from specinfer.sampling import draw_rows, seeded_pick
from specinfer.tree import Floats, TokenTree
from specinfer.verify import Verdict, follow, verify_match, verify_topdown, verify_traversal

Verifier = Callable[[TokenTree, Floats, np.random.Generator], Verdict]

_VERIFIERS: dict[VerifierName, Verifier] = {
    "gbv": verify_gbv,
    "kseq": verify_kseq,
    "match": verify_match,
    "topdown": verify_topdown,
    "traversal": verify_traversal,
}


def verify_works(works: ListLike[Work], logits: Tensor) -> list[Verdict | None]:
    """One verdict per sequence; sequences of one kind share their batched operations.

    logits   [rows, vocab], the works' nodes one after the other
    returns  None for a sequence whose rows give no law, for they are NaN or infinite. Rows of
             others are not touched by them
    """
    kinds: dict[str, list[int]] = {}
    for index, work in enumerate(works):
        kinds.setdefault(_kind(work.job.sequence), []).append(index)
    if len(kinds) == 1:
        return _verify_kind(next(iter(kinds)), works, logits)
    verdicts: dict[int, Verdict | None] = {}
    rows = list(itertools.accumulate((work.num_logits for work in works), initial=0))
    for kind, members in kinds.items():
        group = [works[index] for index in members]
        part = torch.cat([logits[rows[index] : rows[index + 1]] for index in members])
        verdicts.update(zip(members, _verify_kind(kind, group, part), strict=True))
    return [verdicts[index] for index in range(len(works))]


def rows_kept(works: ListLike[Work], kept: ListLike[bool], logits: Tensor) -> Tensor:
    """The rows of some sequences.

    logits  [rows, vocab], the works' nodes one after the other
    """
    rows = np.repeat(np.array(kept, np.bool_), [work.num_logits for work in works])
    return logits[torch.from_numpy(rows).to(logits.device)]


def laws_of(work: Work, logits: Tensor) -> Tensor:
    """What the target says after each node of one sequence's tree, for those who look on.

    logits   [nodes, vocab]
    returns  [nodes, vocab] float32: the law that drafts are verified against; of a greedy request,
             whose law is 1 or 0, the model's own at temperature 1
    """
    if work.job.sequence.params.is_greedy:
        return torch.softmax(logits.float(), -1)
    return target_laws(logits, _filters([work], logits.device))


def _verify_kind(kind: str, works: ListLike[Work], logits: Tensor) -> list[Verdict | None]:
    filters = _filters(works, logits.device)
    if kind == "greedy":
        return _follow_all(works, greedy_picks(logits, filters))
    if kind == "law" and is_far(logits):
        lumped = lump([work.tree for work in works], logits.shape[-1])  # while the target computes
        cases = [Case.of(work) for work in works]
        return verify_far(cases, lumped, target_laws(logits, filters))
    p = target_laws(logits, filters)
    if kind == "seeded":
        return _follow_all(works, seeded_pick(p, _noise(works, p.device)))
    (laws,) = to_host(p)
    has_law = np.isfinite(laws[:, 0])  # a softmax is NaN in all of a row or nowhere
    verdicts, start = list[Verdict | None](), 0
    for work in works:
        sequence = work.job.sequence
        stop = start + len(work.tree)
        verdict = None
        if has_law[start:stop].all():
            verifier = _VERIFIERS[sequence.verifier]
            verdict = verifier(work.tree, laws[start:stop], sequence.rng)
        verdicts.append(verdict)
        start = stop
    return verdicts


class Case(NamedTuple):
    """What one sequence asks of verification."""

    tree: TokenTree
    verifier: Verifier
    rng: np.random.Generator

    @classmethod
    def of(cls, work: Work) -> "Case":
        """A work as it is."""
        sequence = work.job.sequence
        return cls(work.tree, _VERIFIERS[sequence.verifier], sequence.rng)


def verify_far(cases: ListLike[Case], lumped: Lumped, p: Tensor) -> list[Verdict | None]:
    """Verify trees whose laws stay where they are.

    lumped   the cases' trees
    p        [nodes, vocab] float32, the cases' nodes one after the other: the target's laws
    returns  None for a case whose rows are no law, as `verify_works`
    raises   LawError as the verifiers
    law      that of the verifiers: see `lump`
    cost     one wait: for p where drafters could have drawn something, for the sum of the others
             and a token of them per node. A few passes over p where it lies
    """
    at = torch.from_numpy(np.stack((lumped.rows, lumped.tokens)))
    row, token = at.to(p.device, non_blocking=True)
    others = p.index_put((row, token), p.new_zeros(())) if len(row) else p
    drawn, sums = draw_rows(others, [(case.rng, len(case.tree)) for case in cases])
    inside, others_drawn, others_sums = to_host(p[row, token], drawn, sums)
    laws = lumped.laws(inside, others_sums)
    has_law = np.isfinite(laws)
    verdicts = list[Verdict | None]()
    for index, (case, tree) in enumerate(zip(cases, lumped.trees, strict=True)):
        start, stop = lumped.starts[index : index + 2]
        verdict = None
        if has_law[start:stop].all():
            local = case.verifier(tree, laws[start:stop], case.rng)
            verdict = lumped.verdict(index, local, others_drawn)
        verdicts.append(verdict)
    return verdicts


def _kind(sequence: Sequence) -> str:
    if sequence.params.is_greedy:
        return "greedy"
    return "law" if sequence.noise is None else "seeded"


def _filters(works: ListLike[Work], device: torch.device) -> RowFilters:
    runs = [(work.job.sequence.params, len(work.tree)) for work in works]
    return RowFilters.of(runs, edits=[_edits(work) for work in works], device=device)


def _edits(work: Work) -> Edits | None:
    """What each node's own history does to its row."""
    sequence, tree = work.job.sequence, work.tree
    if sequence.history is None:
        return None
    return sequence.history.edits(sequence.tokens, tree, range(len(tree)))


def _noise(works: ListLike[Work], device: torch.device) -> Tensor:
    """[nodes, vocab]: what decides the token after each node, by its position alone.

    Nodes of one depth share a row, which goes to the device once.
    """
    rows, row_of = list[Floats](), list[int]()
    for work in works:
        sequence, depths = work.job.sequence, work.tree.depths
        assert sequence.noise is not None
        row_of += [len(rows) + depth for depth in depths]
        first = len(sequence.tokens)
        rows += [sequence.noise.row(first + depth) for depth in range(max(depths) + 1)]
    noise = torch.from_numpy(np.stack(rows)).to(device, non_blocking=True)
    return noise[torch.tensor(row_of).to(device, non_blocking=True)]


def _follow_all(works: ListLike[Work], picks: Tensor) -> list[Verdict | None]:
    tokens, verdicts, start = picks.tolist(), list[Verdict | None](), 0
    for work in works:
        stop = start + len(work.tree)
        verdict = follow(work.tree, tokens[start:stop])
        verdicts.append(None if verdict.next_token == NO_PICK else verdict)
        start = stop
    return verdicts
