"""A small model as drafter, with K and V pages of its own."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from torch import Tensor
from torch.nn import functional

from specinfer.cache.blocks import Pages
from specinfer.draft.base import Draft, Planned
from specinfer.ops.native import Growing
from specinfer.run.batch import Level, Span, piece
from specinfer.run.runner import Runner

_NEWEST = 2
"""What a text lacks here after a step at most: an accepted leaf, and the root."""

_UNKNOWN = -1e30
"""The logit of a token of the target's that has no row here: its probability is 0 beside others."""


@dataclass(slots=True)
class _State:
    """What one request has in this drafter's pages.

    pages         where it has them: who was sent back to wait comes back with others
    num_computed  keys 0 … num_computed - 1 hold committed tokens
    num_noted     leading blocks whose contents were noted as computed
    keys          this step's expanded nodes: node -> its key index
    ancestors     this step's expanded nodes: node -> region columns it sees, itself included
    """

    pages: Pages
    num_computed: int = 0
    num_noted: int = 0
    keys: dict[int, int] = field(default_factory=dict)
    ancestors: dict[int, list[int]] = field(default_factory=dict)


class ModelDrafter:
    """Drafts with a model: one pass per tree level for all requests together.

    Its own K and V are kept for the part of an accepted path that it computed while drafting; the
    rest of what was committed is fed at the next step, in front of the root.

    A block that the target shares may hold nothing of this drafter yet, since a drafter computes
    only when it is asked: so it notes which contents it has computed, and takes those as they are.
    The others it computes where they belong; two that do so at once write the same.
    """

    def __init__(self, name: str, runner: Runner, *, vocab_size: int, max_tokens: int) -> None:
        """Draft for a target.

        vocab_size  the target's: logits are cut or padded to it (checkpoints pad vocabularies)
        max_tokens  tokens computed in one pass, for catching up with long prompts
        """
        self.name = name
        self.max_positions = runner.decoder.architecture.max_position_embeddings
        self.num_fed = 0  # tokens computed when last asked
        self.has_levels = runner.runs_levels
        self._runner = runner
        self._vocab_size = vocab_size
        self._max_tokens = max_tokens
        self._states: dict[int, _State] = {}
        self._held: dict[int, int] = {}  # block -> the content of it that is computed

    def expand(self, frontier: list[tuple[Draft, list[int]]]) -> Tensor:
        """See `Drafter.expand`."""
        spans = []
        for draft, nodes in frontier:
            if nodes == [0]:
                spans.append(self._catch_up(draft, self._state(draft)))
            else:
                spans.append(self._tree_span(draft, self._states[draft.key], nodes))
        self.num_fed = sum(len(span.tokens) for span in spans)
        logits = self._run(spans)
        for draft, nodes in frontier:  # only now: a pass that fails leaves nothing half-known
            if nodes == [0]:
                self._states[draft.key].num_computed = len(draft.tokens)
        missing = self._vocab_size - logits.shape[-1]
        if missing:  # negative padding cuts
            # No -inf: where all that may follow are tokens unknown here, there is still a law.
            logits = functional.pad(logits, (0, missing), value=_UNKNOWN)
        return logits

    def draft_levels(self, asked: list[Planned]) -> list[list[int]] | None:
        """See `LevelDrafter.draft_levels`."""
        self.num_fed = self._feed_older([draft for draft, _, _ in asked])
        planned = [_State(each.draft.pages, len(each.draft.tokens)) for each in asked]
        levels, rows = self._levels(asked, planned)
        num_tokens = [sum(len(span.tokens) for span in level.spans) for level in levels]
        vocab_size = min(self._vocab_size, self._runner.vocab_size)
        widest = max(level.width for level in levels)
        if max(num_tokens) > self._max_tokens or widest > vocab_size:
            return None
        picks = self._runner.run_levels(levels, vocab_size)
        if picks is None:
            return None
        self.num_fed += sum(num_tokens)
        answers = []
        for (draft, plan, _), own, places in zip(asked, planned, rows, strict=True):
            tokens, nodes, tree = list[int](), {0: 0}, plan.tree
            for node in range(1, len(tree)):
                parent, token = tree.parents[node], -1
                if parent in nodes:
                    token = picks[tree.depths[parent]][places[parent]][tree.tokens[node]]
                if token >= 0:
                    nodes[node] = len(nodes)
                tokens.append(token)
            answers.append(tokens)
            state = self._states[draft.key]
            state.num_computed = len(draft.tokens)
            state.keys = {nodes[n]: key for n, key in own.keys.items() if n in nodes}
            state.ancestors = {nodes[n]: seen for n, seen in own.ancestors.items() if n in nodes}
        return answers

    def _feed_older(self, drafts: list[Draft]) -> int:
        """Compute what each text lacks but its newest tokens; returns how many those were.

        So trees begin with chains of the same few sizes, whatever the prompts: each size is a graph
        of all levels.
        """
        older = []
        for draft in drafts:
            state = self._state(draft)
            count = len(draft.tokens) - state.num_computed - _NEWEST
            if count > 0:
                older.append((state, piece(self._catch_up(draft, state), 0, count)))
        if older:
            self._run([span for _, span in older])
        num_tokens = 0
        for state, span in older:
            state.num_computed += len(span.tokens)
            num_tokens += len(span.tokens)
        return num_tokens

    def _levels(
        self, asked: list[Planned], planned: list[_State]
    ) -> tuple[list[Level], list[dict[int, int]]]:
        """Every level's spans, the roots' with what is to be caught up; and nodes' rows in them.

        planned  what there will be once the roots are computed; takes the nodes in
        """
        levels = list[Level]()
        rows: list[dict[int, int]] = [{} for _ in asked]
        drafts = [replace(draft, tree=plan.tree) for draft, plan, _ in asked]
        for depth in range(max(len(plan.levels) for _, plan, _ in asked)):
            level, count = Level([], 0, []), 0
            for (draft, plan, temperature), of_plan, own, places in zip(
                asked, drafts, planned, rows, strict=True
            ):
                if depth >= len(plan.levels):
                    continue
                nodes, tree = plan.levels[depth], plan.tree
                if depth == 0:
                    own.ancestors = {0: []}
                    span = self._catch_up(draft, self._state(draft))
                else:
                    span, width = self._tree_span(of_plan, own, nodes), levels[-1].width
                    above = [places[tree.parents[node]] * width for node in nodes]
                    span.tokens = [
                        first + tree.tokens[node] for first, node in zip(above, nodes, strict=True)
                    ]
                level.spans.append(span)
                level.temperatures.append(temperature)
                level.width = max(level.width, *(len(tree.slots_of[node]) for node in nodes))
                places.update(zip(nodes, range(count, count + len(nodes)), strict=True))
                count += len(nodes)
            levels.append(level)
        return levels, rows

    def missing(self, draft: Draft) -> int:
        """Count the committed tokens that are not computed here."""
        return len(draft.tokens) - self._state(draft).num_computed

    def feed(self, draft: Draft, count: int) -> None:
        """Compute the first so many of them, fewer than are missing, and guess nothing."""
        state = self._state(draft)
        assert count < len(draft.tokens) - state.num_computed
        self._run([piece(self._catch_up(draft, state), 0, count)])
        state.num_computed += count

    def grow_on(
        self, drafts: Sequence[tuple[Draft, int]], growing: Growing, num_rounds: int, most: int
    ) -> list[tuple[int, int, float]] | None:
        """Grow picked trees whose roots alone were expanded, in as many rounds as are worth it.

        drafts      with how many nodes each may have, in the order of the pool's requests
        num_rounds  there were already, and `most` there may be
        returns     per pass its nodes, requests and seconds; None where no kernel does it, with
                    nothing computed. The nodes are in the pool: `drafts` are left as they are
        """
        native = self._runner.native
        if native is None or self._vocab_size != self._runner.vocab_size:
            return None
        states = [self._states[draft.key] for draft, _ in drafts]
        if any(state.keys for state in states):
            return None
        places = [
            (state.num_computed, draft.pages.slots(0, state.num_computed + count))
            for state, (draft, count) in zip(states, drafts, strict=True)
        ]
        most_nodes = sum([count for _, count in drafts])
        grown = native.grow(
            growing, places, num_rounds=num_rounds, most_rounds=most, most_nodes=most_nodes
        )
        if grown is None:
            return None
        expanded, passes = grown
        for request, node in expanded:
            state = states[request]
            state.keys[node] = state.num_computed + len(state.keys)
        return passes

    def admit(self, accepted: list[tuple[Draft, list[int]]]) -> None:
        """See `Drafter.admit`: keep the K and V of the accepted nodes that were expanded."""
        sources, targets = [], []
        for draft, path in accepted:
            state = self._states[draft.key]
            for node in path:
                key = state.keys.get(node)
                if key is None:
                    break  # a leaf: it was proposed and never computed here
                if key != state.num_computed:
                    sources.append(draft.pages.slot(key))
                    targets.append(draft.pages.slot(state.num_computed))
                state.num_computed += 1
        self._runner.pool.move(sources, targets)

    def drop(self, key: int) -> None:
        """See `Drafter.drop`."""
        state = self._states.pop(key, None)
        if state is not None:
            self._note(state)

    def _state(self, draft: Draft) -> _State:
        """What is computed of a request, by whomever."""
        state = self._states.get(draft.key)
        if state is not None:
            self._note(state)
        if state is None or state.pages is not draft.pages:
            state = self._states[draft.key] = _State(draft.pages)
        size = draft.pages.block_size
        for index in range(state.num_computed // size, len(draft.pages.contents)):
            content = draft.pages.contents[index]
            if not content or self._held.get(draft.pages.blocks[index]) != content:
                break
            state.num_computed = (index + 1) * size
        return state

    def _note(self, state: _State) -> None:
        """Note the contents that are computed by now. A number that is no more never comes back."""
        pages = state.pages
        stop = min(len(pages.contents), state.num_computed // pages.block_size)
        for index in range(state.num_noted, stop):
            if pages.contents[index]:
                self._held[pages.blocks[index]] = pages.contents[index]
        state.num_noted = max(state.num_noted, stop)

    def _catch_up(self, draft: Draft, state: _State) -> Span:
        """Committed tokens this drafter has not computed, the root last and in any case."""
        state.keys.clear()
        state.ancestors = {0: []}
        stop = len(draft.tokens)
        start = min(state.num_computed, stop - 1)  # a step that failed leaves the root computed
        return Span(
            tokens=self._known(draft.tokens[start:]),
            positions=range(start, stop),
            pages=draft.pages,
            prefix=start,
            start=start,
            mask=None,
            num_logits=1,
        )

    def _tree_span(self, draft: Draft, state: _State, nodes: list[int]) -> Span:
        """Nodes of one level: each sees the prefix, its expanded ancestors and itself."""
        tree, prefix = draft.tree, state.num_computed
        old = len(state.keys)
        mask = np.zeros((len(nodes), old + len(nodes)), np.bool_)
        for row, node in enumerate(nodes):
            state.keys[node] = prefix + old + row
            columns = state.ancestors[node] = [*state.ancestors[tree.parents[node]], old + row]
            mask[row, columns] = True
        region = [prefix - 1 + tree.depths[node] for node in state.keys]
        is_chain = len(nodes) == 1 and len(state.ancestors[nodes[0]]) == old + 1
        return Span(
            tokens=self._known([tree.tokens[node] for node in nodes]),
            positions=region[old:],
            pages=draft.pages,
            prefix=prefix + old if is_chain else prefix,
            start=prefix + old,
            mask=None if is_chain else mask,
            num_logits=len(nodes),
            region_positions=None if is_chain else region,
        )

    def _known(self, tokens: list[int]) -> list[int]:
        """Make tokens of the target's padded vocabulary that have no row here token 0.

        The guesses after them get worse, and stay lawful.
        """
        size = self._runner.vocab_size
        return [token if token < size else 0 for token in tokens]

    def _run(self, spans: list[Span]) -> Tensor:
        """One pass, unless prompts to catch up with are longer than a pass may be."""
        while sum(len(span.tokens) for span in spans) > self._max_tokens:
            longest = max(spans, key=lambda span: len(span.tokens))
            if longest.mask is not None or len(longest.tokens) == 1:
                break
            count = min(len(longest.tokens) - 1, self._max_tokens)
            self._runner.run([piece(longest, 0, count)])
            spans[spans.index(longest)] = piece(longest, count, len(longest.tokens))
        return self._runner.run(spans)
