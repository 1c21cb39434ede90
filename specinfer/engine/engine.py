"""One step: schedule, draft, verify, commit. Nothing else writes state."""

import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as ListLike
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from specinfer.baselines import verify_gbv, verify_kseq
from specinfer.cache.blocks import BlockAllocator
from specinfer.config import IID_VERIFIERS, EngineConfig, Speculation
from specinfer.draft.base import Drafter
from specinfer.draft.builders import builder_for
from specinfer.draft.calibration import Calibration
from specinfer.draft.growth import Builder, Grown, Growth
from specinfer.draft.heap import HeapBuilder
from specinfer.draft.model import ModelDrafter
from specinfer.draft.ngram import PredictionDrafter
from specinfer.engine.chains import ChainController, GammaTune, SmartSpec
from specinfer.engine.controller import (
    Arm,
    Controller,
    DrafterChoice,
    StepLoad,
    choices_of,
    urgency,
)
from specinfer.engine.measure import Report
from specinfer.engine.scheduler import Job, Scheduler
from specinfer.engine.sequence import Sequence
from specinfer.engine.stats import HOST_PARTS, EngineStats, TimedDrafter
from specinfer.errors import ConfigError, RequestError
from specinfer.request import SamplingParams
from specinfer.run.batch import Span
from specinfer.run.runner import Runner
from specinfer.sampling import RowFilters, early_rows, greedy_picks, seeded_pick, target_laws
from specinfer.text.tokenizer import Tokenizer
from specinfer.tree import TokenTree
from specinfer.verify import Verdict, follow, verify_match, verify_topdown, verify_traversal

_log = logging.getLogger("specinfer")

_VERIFIERS = {
    "gbv": verify_gbv,
    "kseq": verify_kseq,
    "match": verify_match,
    "topdown": verify_topdown,
    "traversal": verify_traversal,
}


@dataclass(frozen=True, slots=True)
class StepTrace:
    """What one step did for one sequence: for drawing trees.

    num_new  emitted tokens: the accepted path and the target's own, up to where the text ended
    """

    sequence: Sequence
    tree: TokenTree
    verdict: Verdict
    num_new: int


@dataclass(slots=True)
class _Work:
    """A job on its way through the step."""

    job: Job
    tree: TokenTree
    grown: Grown | None = None
    sources: ListLike[int] = ()

    @property
    def num_logits(self) -> int:
        """Rows of logits the target owes: one per node of the tree, the root's included."""
        return len(self.tree) if self.job.emits else 0


class Engine:
    """Serves many sequences at once with one target and any number of drafters."""

    def __init__(
        self,
        target: Runner,
        drafters: ListLike[Drafter],
        tokenizer: Tokenizer,
        *,
        allocator: BlockAllocator,
        config: EngineConfig,
        speculation: Speculation,
        max_model_len: int,
        calibration: Calibration | None = None,
        measure: Callable[[Report | None], Controller] | None = None,
    ) -> None:
        """Serve these models.

        calibration  what is known of acceptance; None: the priors
        measure      times the models and makes a controller; without one, trees that the controller
                     would size ("auto") have the size they may have
        """
        self.target = target
        self.controller: Controller | None = None
        self._measure = measure
        self._chains: dict[Speculation, ChainController] = {}
        self._choices: dict[tuple[int, ...], Arm] = {}
        self.calibration = calibration or Calibration()
        self._builders: dict[str, Builder] = {}
        self.stats = EngineStats()
        self._num_drafters = len(drafters)
        # What requests predict themselves is one more source, of those that do.
        self.drafters: list[Drafter] = [
            TimedDrafter(each, source, self.stats)
            for source, each in enumerate((*drafters, PredictionDrafter()))
        ]
        self._is_model = [isinstance(each, ModelDrafter) for each in drafters]
        self.tokenizer = tokenizer
        self.max_model_len = max_model_len
        self._seed = config.seed
        self._max_num_batched_tokens = config.max_num_batched_tokens
        self.scheduler = Scheduler(
            allocator,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
        )
        self._num_added = 0
        self.set_speculation(speculation)

    def set_speculation(self, speculation: Speculation) -> None:
        """Guess and verify differently from now on, for requests added from now on.

        raises  ConfigError for a tree that no drafter grows or no step has room for
        """
        self._max_nodes(speculation)
        self.speculation = speculation

    def _max_nodes(self, speculation: Speculation, *, predicted: bool = False) -> int:
        """Drafted nodes that a request with this speculation may add to a step.

        raises  ConfigError for a tree that no drafter grows or no step has room for
        """
        num_drafters = self._num_drafters + predicted
        max_nodes = speculation.num_nodes(num_drafters)
        if speculation.tree == "auto":
            max_nodes = min(max_nodes, self._max_num_batched_tokens - 1)
        if max_nodes >= self._max_num_batched_tokens:
            raise ConfigError(
                f"tree={speculation.tree!r} has up to {max_nodes} nodes for {num_drafters} "
                f"drafters and a step computes {self._max_num_batched_tokens} tokens "
                "(max_num_batched_tokens): take a smaller tree, or set max_nodes"
            )
        if speculation.control == "smartspec" and not any(self._is_model[:1]):
            raise ConfigError('control="smartspec" needs a model as the first drafter')
        if speculation.verifier in IID_VERIFIERS and num_drafters > 1:
            raise ConfigError(
                f"verifier={speculation.verifier!r} is exact for one drafter alone: give one"
            )
        return max_nodes

    def measure(self, report: Report | None = None) -> None:
        """Time the models' steps, as speculation="auto" needs it; once, while nothing runs.

        report  told of each model: steps measured so far, and in all
        """
        assert not self.scheduler.running, "it writes into pages, whoever owns them"
        if self._measure is not None and self.controller is None:
            self.controller = self._measure(report)

    def _is_unmeasured(self, speculation: Speculation) -> bool:
        """Whether a sequence has to do without a tree until the engine has nothing to run."""
        return speculation.needs_times and self._measure is not None and self.controller is None

    def add(self, request_id: str, prompt: ListLike[int], params: SamplingParams) -> list[Sequence]:
        """Queue a request: one sequence per sample.

        raises  RequestError if the prompt is empty, leaves no room for a token or has tokens the
                model does not know; CapacityError if its pages could never be had
        """
        max_total = self._check(prompt, params)
        speculation = params.own_speculation or self.speculation
        prediction = self._encode_prediction(params)
        max_nodes = self._max_nodes(speculation, predicted=bool(prediction))
        self.scheduler.check_fits(max_total, max_nodes)
        sequences = []
        for index in range(params.n):
            sequence = Sequence(
                number=self._num_added,
                request_id=request_id,
                index=index,
                prompt=prompt,
                params=params,
                max_total=max_total,
                tokenizer=self.tokenizer,
                speculation=speculation,
                max_nodes=max_nodes,
                prediction=prediction,
                vocab_size=self.target.vocab_size,
                seed=self._seed,
            )
            self._num_added += 1
            self.scheduler.add(sequence)
            sequences.append(sequence)
        return sequences

    def abort(self, sequences: ListLike[Sequence]) -> None:
        """End sequences and free what they hold; those that have ended stay as they are."""
        for sequence in sequences:
            if not sequence.is_finished:
                sequence.abort()
                self._remove(sequence)

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return self.scheduler.has_work

    def step(self) -> list[StepTrace]:
        """Advance every scheduled sequence; returns those that got tokens.

        An exception (a failing model, Ctrl-C) ends every running sequence with "abort" and frees
        its pages; waiting ones stay.
        """
        try:
            return self._step()
        except BaseException:
            # What was half-done cannot be told any more: what ran ends here, what waits goes on.
            for sequence in list(self.scheduler.running):
                sequence.abort()
                self._remove(sequence)
            raise

    def _step(self) -> list[StepTrace]:
        timed, before = self.stats.timed, dict(self.stats.seconds)
        self.stats.passes.clear()
        if not self.scheduler.running and any(
            self._is_unmeasured(each.speculation) and each.max_nodes
            for each in self.scheduler.waiting
        ):
            self.measure()
        with timed("schedule"):
            jobs = self.scheduler.schedule()
        if not jobs:
            return []
        with timed("grow"):
            works = self._draft(jobs)
        with timed("target"):
            spans = [_span(work) for work in works]
            logits = self.target.run(spans)
        with timed("verify"):
            verdicts = self._verify([work for work in works if work.num_logits], logits)
        with timed("commit"):
            traces = self._commit(works, verdicts)
        self.stats.num_steps += 1
        self.stats.num_target_tokens += sum(len(span.tokens) for span in spans)
        self.stats.num_output_tokens += sum(trace.num_new for trace in traces)
        if self.controller is not None:
            self._tell_controller(works, verdicts, before)
        return traces

    def _tell_controller(
        self, works: ListLike[_Work], verdicts: ListLike[Verdict], before: dict[str, float]
    ) -> None:
        """What the step cost and brought, of what was computed and not of where a text ended."""
        assert self.controller is not None
        spent = {part: seconds - before[part] for part, seconds in self.stats.seconds.items()}
        load = StepLoad(
            num_tokens=sum(work.job.num_tokens + work.tree.num_drafted for work in works),
            num_spans=len(works),
            num_emitted=sum(len(verdict.path) + 1 for verdict in verdicts),
            num_nodes=sum(work.tree.num_drafted for work in works),
            passes=self.stats.passes,
            target_s=spent["target"],
            host_s=sum(spent[part] for part in HOST_PARTS),
        )
        is_decoding = all(work.job.num_tokens == 1 for work in works)
        rate = self.controller.goodput(load.num_tokens - load.num_nodes, load.num_spans)
        self.controller.observe(load, decoding_only=is_decoding)
        emitting = [work for work in works if work.num_logits]
        for work, verdict in zip(emitting, verdicts, strict=True):
            choice = work.job.sequence.choice
            if choice is not None and work.grown is not None:
                cost = sum(
                    self.controller.pass_s(one) / one.num_spans
                    for one in self.stats.passes
                    if one.source in work.sources
                )
                choice.learn(work.sources, len(verdict.path) - rate * cost)

    def _check(self, prompt: ListLike[int], params: SamplingParams) -> int:
        if not prompt:
            raise RequestError("the prompt is empty: give at least one token")
        if len(prompt) >= self.max_model_len:
            raise RequestError(
                f"the prompt has {len(prompt)} tokens and prompt and output together may have "
                f"{self.max_model_len} (max_model_len): shorten the prompt"
            )
        self._check_tokens("the prompt", prompt)
        self._check_tokens("stop_token_ids", params.stop_token_ids or ())
        room = self.max_model_len - len(prompt)
        return len(prompt) + min(room, params.max_tokens or room)

    def _check_tokens(self, what: str, tokens: ListLike[int]) -> None:
        vocab_size = self.target.vocab_size
        for token in tokens:
            if not isinstance(token, int) or not 0 <= token < vocab_size:
                raise RequestError(
                    f"{what} has token id {token!r} and the model's ids are 0 to {vocab_size - 1}"
                )

    def _encode_prediction(self, params: SamplingParams) -> ListLike[int]:
        """The predicted output in tokens the model knows."""
        prediction = params.prediction or ()
        if isinstance(prediction, str):
            return self.tokenizer.encode(prediction, add_special_tokens=False)
        self._check_tokens("the prediction", prediction)
        return prediction

    # --- draft ------------------------------------------------------------------------------------

    def _draft(self, jobs: ListLike[Job]) -> list[_Work]:
        works = [_Work(job, TokenTree(job.sequence.tokens[-1])) for job in jobs]
        groups: dict[str, list[tuple[_Work, Growth]]] = {}
        for work in works:
            growth = self._growth(work.job, len(jobs))
            if growth is not None:
                work.sources = growth.sources
                tree = work.job.sequence.speculation.tree
                groups.setdefault(tree, []).append((work, growth))
        for tree, members in groups.items():
            builder = self._builder(tree)
            if tree == "auto" and self.controller is not None:
                assert isinstance(builder, HeapBuilder)
                stop = 1 + sum(growth.max_nodes for _, growth in members)
                num_tokens = sum(job.num_tokens for job in jobs)
                builder.prices = self.controller.prices(num_tokens, len(jobs), stop)
            grown = builder.grow([growth for _, growth in members], self.drafters)
            for (work, _), each in zip(members, grown, strict=True):
                work.tree, work.grown = each.tree, each
        return works

    def _builder(self, tree: str) -> Builder:
        if tree not in self._builders:
            self._builders[tree] = builder_for(tree, self.calibration)
        return self._builders[tree]

    def _growth(self, job: Job, num_spans: int) -> Growth | None:
        """What a sequence's tree may be; None where there can be none."""
        sequence = job.sequence
        if self._is_unmeasured(sequence.speculation):
            return None
        sources = self._sources(sequence)
        depth = min(sequence.speculation.depth, sequence.num_left - 1)
        chain = self._chain(sequence.speculation)
        if chain is not None:
            depth = min(depth, chain.length(sequence.number, num_spans))
        if sequence.num_pending > 1 or not sources or not job.max_nodes or depth < 1:
            return None
        # A node at depth d is fed to a drafter only where something may follow it.
        room = min(self.drafters[source].max_positions for source in sources)
        assert sequence.pages is not None
        return Growth(
            key=sequence.number,
            tokens=sequence.tokens,
            pages=sequence.pages,
            params=sequence.draft_params,
            draw=sequence.draw,
            regime=sequence.regime,
            rng=sequence.rng,
            noise=sequence.noise,
            sources=sources,
            max_nodes=job.max_nodes,
            max_depth=min(depth, room - len(sequence.tokens) + 1),
            prediction=sequence.prediction,
            urgency=self._urgency(sequence, num_spans),
        )

    def _urgency(self, sequence: Sequence, num_spans: int) -> float:
        goal_s = sequence.params.target_tpot_s
        if goal_s is None or sequence.first_s is None or self.controller is None:
            return 1.0
        step_s = self.controller.target.seconds(num_spans, num_spans)
        elapsed_s = time.perf_counter() - sequence.first_s
        return urgency(goal_s, elapsed_s, sequence.num_output - 1, step_s)

    def _chain(self, speculation: Speculation) -> ChainController | None:
        """Who sets the length of a chain: nobody, unless a baseline is asked for."""
        if speculation.control == "auto":
            return None
        if speculation not in self._chains:
            if speculation.control == "gammatune":
                self._chains[speculation] = GammaTune(speculation.depth)
            else:
                assert self.controller is not None
                times = self.controller.drafters[0]
                assert times is not None, "checked when it was asked for"
                chain = SmartSpec(self.controller.target, times, speculation.depth)
                self._chains[speculation] = chain
        return self._chains[speculation]

    def _sources(self, sequence: Sequence) -> list[int]:
        """The drafters that know this sequence's positions."""
        if sequence.speculation.is_off:
            return []
        sources = [
            source
            for source, drafter in enumerate(self.drafters)
            if len(sequence.tokens) <= drafter.max_positions
            and (source < self._num_drafters or sequence.prediction)
        ]
        models = [each for each in sources if each < self._num_drafters and self._is_model[each]]
        if len(models) < 2 or sequence.speculation.tree != "auto" or self.controller is None:
            return sources
        arms = choices_of(models, [each for each in sources if each not in models])
        if sequence.choice is None or list(sequence.choice.arms) != arms:
            sequence.choice = DrafterChoice.among(arms, self._choices)
        return list(sequence.choice.choose())

    # --- verify -----------------------------------------------------------------------------------

    def _verify(self, works: ListLike[_Work], logits: Tensor) -> list[Verdict]:
        """One verdict per sequence; sequences of one kind share their batched operations.

        logits  [rows, vocab], the works' nodes one after the other
        """
        verdicts: dict[int, Verdict] = {}
        rows = np.cumsum([0, *(work.num_logits for work in works)])
        kinds: dict[str, list[int]] = {}
        for index, work in enumerate(works):
            kinds.setdefault(_kind(work.job.sequence), []).append(index)
        for kind, members in kinds.items():
            group = [works[index] for index in members]
            part = logits
            if len(kinds) > 1:
                part = torch.cat([logits[rows[index] : rows[index + 1]] for index in members])
            verdicts.update(zip(members, self._verify_kind(kind, group, part), strict=True))
        return [verdicts[index] for index in range(len(works))]

    def _verify_kind(self, kind: str, works: ListLike[_Work], logits: Tensor) -> list[Verdict]:
        filters = _filters(works, logits.device)
        if kind == "greedy":
            return _follow_all(works, greedy_picks(logits, filters))
        p = target_laws(logits, filters)
        if kind == "seeded":
            noise = np.concatenate([_noise(work) for work in works])
            return _follow_all(works, seeded_pick(p, torch.from_numpy(noise).to(p.device)))
        laws, verdicts, start = p.cpu().numpy(), [], 0
        for work in works:
            sequence = work.job.sequence
            verifier = _VERIFIERS[sequence.verifier]
            stop = start + len(work.tree)
            verdicts.append(verifier(work.tree, laws[start:stop], sequence.rng))
            start = stop
        return verdicts

    # --- commit -----------------------------------------------------------------------------------

    def _commit(self, works: ListLike[_Work], verdicts: ListLike[Verdict]) -> list[StepTrace]:
        for work in works:
            work.job.sequence.num_computed += work.job.num_tokens
        emitting = [work for work in works if work.num_logits]
        self._keep_paths(emitting, verdicts)
        traces = []
        for work, verdict in zip(emitting, verdicts, strict=True):
            sequence, tree = work.job.sequence, work.tree
            new = [*(tree.tokens[node] for node in verdict.path), verdict.next_token]
            num_new = sequence.append(new)
            if sequence.first_s is None:
                sequence.first_s = time.perf_counter()
            self._count(work, verdict.path[:num_new])
            self._learn(work, verdict)
            if sequence.noise is not None:
                sequence.noise.forget(len(sequence.tokens))
            traces.append(StepTrace(sequence, tree, verdict, num_new))
            if sequence.is_finished:
                self._remove(sequence)
        return traces

    def _keep_paths(self, works: ListLike[_Work], verdicts: ListLike[Verdict]) -> None:
        """Move the accepted nodes' K and V to where committed tokens stand, in every pool."""
        sources, targets = [], []
        for work, verdict in zip(works, verdicts, strict=True):
            sequence = work.job.sequence
            assert sequence.pages is not None
            root = sequence.num_computed - 1  # node i stands i keys behind the root
            for depth, node in enumerate(verdict.path, start=1):
                if node != depth:
                    sources.append(sequence.pages.slot(root + node))
                    targets.append(sequence.pages.slot(root + depth))
            sequence.num_computed += len(verdict.path)
        self.target.pool.move(sources, targets)
        for source, drafter in enumerate(self.drafters):
            drafter.admit(
                [
                    (work.grown.parts[source][0], work.grown.own_path(source, verdict.path))
                    for work, verdict in zip(works, verdicts, strict=True)
                    if work.grown is not None and source in work.grown.parts
                ]
            )

    def _learn(self, work: _Work, verdict: Verdict) -> None:
        """Teach the tables what became of the slots that verification reached.

        Slots off the accepted path were looked at by traversal alone: they count for nothing.
        """
        sequence = work.job.sequence
        grown, regime = work.grown, sequence.regime
        if grown is None:
            return
        chain = self._chain(sequence.speculation)
        if chain is not None:
            drafted, batch = work.tree.num_drafted, len(self.scheduler.running)
            chain.observe(sequence.number, drafted, len(verdict.path), batch)
        tree, reached = work.tree, {0, *verdict.path}
        for slot_id, accepted in verdict.examined:
            slot = tree.slots[slot_id]
            if slot.parent not in reached:
                continue
            place = tree.slots_of[slot.parent].index(slot_id)
            self.calibration.record_place(regime, place, accepted)
            if slot_id in grown.features:
                name = self.drafters[slot.source].name
                self.calibration.record(name, regime, grown.features[slot_id], accepted)

    def _count(self, work: _Work, emitted_path: ListLike[int]) -> None:
        stats, tree = work.job.sequence.stats, work.tree
        stats.num_target_steps += 1
        stats.num_drafted += tree.num_drafted
        stats.num_accepted += len(emitted_path)
        missing = len(emitted_path) - len(stats.accepted_by_depth)
        stats.accepted_by_depth.extend([0] * missing)
        for depth, node in enumerate(emitted_path):
            stats.accepted_by_depth[depth] += 1
            parent = tree.parents[node]
            source = next(
                tree.slots[s].source for s in tree.slots_of[parent] if tree.slots[s].node == node
            )
            name = self.drafters[source].name
            stats.accepted_by_source[name] = stats.accepted_by_source.get(name, 0) + 1

    def _remove(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)
        for drafter in self.drafters:
            drafter.drop(sequence.number)
        for chain in self._chains.values():
            chain.drop(sequence.number)
        self._note_pace(sequence)

    def _note_pace(self, sequence: Sequence) -> None:
        """How fast an ended sequence was, and whether that was its goal."""
        if sequence.first_s is None or sequence.num_output < 2:
            return
        stats, goal_s = sequence.stats, sequence.params.target_tpot_s
        stats.tpot_s = (time.perf_counter() - sequence.first_s) / (sequence.num_output - 1)
        if goal_s is None:
            return
        is_met = stats.tpot_s <= goal_s
        self.stats.num_goals += 1
        self.stats.num_goals_met += is_met
        _log.info(
            "request %s: %.1f ms per output token, goal %.1f ms %s (%d of %d so far)",
            *(sequence.request_id, stats.tpot_s * 1e3, goal_s * 1e3),
            *("met" if is_met else "missed", self.stats.num_goals_met, self.stats.num_goals),
        )


def _kind(sequence: Sequence) -> str:
    if sequence.params.is_greedy:
        return "greedy"
    return "law" if sequence.noise is None else "seeded"


def _span(work: _Work) -> Span:
    """Pending tokens of the job, then the tree's nodes behind its root."""
    job, tree = work.job, work.tree
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
        num_logits=work.num_logits,
    )


def _filters(works: ListLike[_Work], device: torch.device) -> RowFilters:
    runs, banned, start = [], [], 0
    for work in works:
        sequence = work.job.sequence
        runs.append((sequence.params, len(work.tree)))
        if sequence.num_output < sequence.params.min_tokens:
            early = early_rows(work.tree.depths, sequence.num_output, sequence.params.min_tokens)
            banned += [(start + node, sequence.end_tokens) for node in early]
        start += len(work.tree)
    return RowFilters.of(runs, banned=banned, device=device)


def _noise(work: _Work) -> np.ndarray:
    """[nodes, vocab]: what decides the token after each node, by its position alone."""
    sequence = work.job.sequence
    assert sequence.noise is not None
    return np.stack(
        [sequence.noise.row(len(sequence.tokens) + depth) for depth in work.tree.depths]
    )


def _follow_all(works: ListLike[_Work], picks: Tensor) -> list[Verdict]:
    tokens, verdicts, start = picks.tolist(), [], 0
    for work in works:
        stop = start + len(work.tree)
        verdicts.append(follow(work.tree, tokens[start:stop]))
        start = stop
    return verdicts
