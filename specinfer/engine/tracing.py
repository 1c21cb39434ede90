"""Each step's tree as plain values, for requests that ask to see it; nothing for all others."""

from collections.abc import Mapping
from collections.abc import Sequence as ListLike
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from specinfer.draft.growth import Grown
from specinfer.engine.verification import laws_of
from specinfer.engine.work import Work
from specinfer.outputs import StepTree, TreeNode, TreeSlot, TreeToken
from specinfer.tree import Law
from specinfer.verify import Verdict

if TYPE_CHECKING:
    from specinfer.engine.engine import StepTrace


@dataclass(frozen=True, slots=True)
class StepTime:
    """How long a step took, for all its sequences together: see `StepTree`."""

    seconds: Mapping[str, float]
    num_sequences: int
    plain_s: float | None


def chances_of(
    works: ListLike[Work], verdicts: ListLike[Verdict], logits: Tensor
) -> dict[int, list[float]]:
    """What the target thinks of the tokens of a step, for requests that ask for their trees.

    To be called before the step is committed: filters look at what is known.

    logits   [rows, vocab], the works' nodes one after the other
    returns  by the sequence's number, the probability of each node after its parent (1.0 for the
             root), then that of the verdict's next token; {} where nobody asks
    cost     one softmax per sequence that asks
    """
    chances, start = {}, 0
    for work, verdict in zip(works, verdicts, strict=True):
        stop = start + work.num_logits
        if work.job.sequence.params.include_tree:
            tree, laws = work.tree, laws_of(work, logits[start:stop])
            last = verdict.path[-1] if verdict.path else 0
            places = ([*tree.parents[1:], last], [*tree.tokens[1:], verdict.next_token])
            after, tokens = torch.tensor(places).to(laws.device, non_blocking=True)
            chances[work.job.sequence.number] = [1.0, *laws[after, tokens].tolist()]
        start = stop
    return chances


def keep_trees(
    works: ListLike[Work],
    traces: ListLike["StepTrace"],
    chances: Mapping[int, ListLike[float]],
    names: ListLike[str],
    time: StepTime,
) -> None:
    """Leave each sequence that asks its step's tree.

    works, traces  of the sequences that emitted
    chances        of `chances_of`
    names          of the drafters
    """
    for work, trace in zip(works, traces, strict=True):
        sequence = trace.sequence
        p = chances.get(sequence.number)
        if p is None:
            continue
        path = trace.verdict.path[: trace.num_new]
        step = StepTree(
            index=sequence.output.index,
            step=sequence.stats.num_target_steps,
            nodes=_nodes(work, trace.verdict, path, p, names),
            emitted=_emitted(trace, path, p, names),
            seconds=time.seconds,
            num_sequences=time.num_sequences,
            plain_s=time.plain_s,
        )
        sequence.trees.append(step)


def _nodes(
    work: Work, verdict: Verdict, path: ListLike[int], p: ListLike[float], names: ListLike[str]
) -> tuple[TreeNode, ...]:
    tree, ratios = work.tree, dict(verdict.examined)
    slots: list[list[TreeSlot]] = [[] for _ in tree.tokens]
    for siblings in tree.slots_of:
        for slot_id in siblings:
            slot = tree.slots[slot_id]
            q = _q(slot.law, tree.tokens[slot.node])
            score = _score(work.grown, slot_id)
            shown = TreeSlot(names[slot.source], q, score, ratios.get(slot_id))
            slots[slot.node].append(shown)
    accepted = set(path)
    return tuple(
        TreeNode(
            token_id=token,
            parent=tree.parents[node],
            depth=tree.depths[node],
            p=p[node],
            accepted=node in accepted,
            slots=tuple(slots[node]),
        )
        for node, token in enumerate(tree.tokens)
    )


def _emitted(
    trace: "StepTrace", path: ListLike[int], p: ListLike[float], names: ListLike[str]
) -> tuple[TreeToken, ...]:
    sequence, tree, num_new = trace.sequence, trace.tree, trace.num_new
    emitted = [(tree.tokens[node], names[tree.sources_of(node)[0]], p[node]) for node in path]
    if num_new > len(path):  # else the text ended on the path
        emitted.append((trace.verdict.next_token, "target", p[len(tree)]))
    ends = [0, *sequence.text_ends][-num_new - 1 :]
    text = sequence.output.text
    return tuple(
        TreeToken(token, source, chance, text[start:stop])
        for (token, source, chance), start, stop in zip(emitted, ends[:-1], ends[1:], strict=True)
    )


def _q(law: Law | None, token: int) -> float | None:
    """The chance its slot's token had when it was drawn."""
    if law is None:
        return None
    if law.is_pick:
        return 1.0
    left = max(1.0 - law.probability(law.seen), 1e-12)
    return min(1.0, law.probability((token,)) / left)


def _score(grown: Grown | None, slot_id: int) -> float | None:
    """What the drafter said of the token, where calibration notes it."""
    if grown is None or slot_id not in grown.features:
        return None
    return grown.features[slot_id].after
