"""What each sequence of a step may draft, who grows its tree, and what is learnt from it."""

import time
from collections.abc import Callable
from collections.abc import Sequence as ListLike

from specinfer.config import IID_VERIFIERS, Speculation
from specinfer.draft.base import Draft, Drafter
from specinfer.draft.builders import SequoiaBuilder, builder_for
from specinfer.draft.calibration import Calibration, Fortune
from specinfer.draft.forced import ForcedDrafter
from specinfer.draft.growth import Builder, Growth
from specinfer.draft.heap import HeapBuilder
from specinfer.draft.model import ModelDrafter
from specinfer.draft.prediction import PredictionDrafter
from specinfer.engine.chains import ChainController, GammaTune, SmartSpec
from specinfer.engine.choice import Arm, DrafterChoice, choices_of
from specinfer.engine.controller import Controller
from specinfer.engine.measure import Report
from specinfer.engine.scheduler import Job
from specinfer.engine.sequence import Sequence
from specinfer.engine.stats import EngineStats, StepLoad
from specinfer.engine.timed_drafter import TimedDrafter
from specinfer.engine.urgency import urgency
from specinfer.engine.work import Work
from specinfer.errors import ConfigError
from specinfer.tree import TokenTree
from specinfer.verify import Verdict


class Speculator:
    """Everything between scheduling and the target's pass, and what the verdicts teach it.

    drafters     what guesses; what requests predict themselves is one more source, and what their
                 grammars force is the last
    calibration  learnt acceptance
    controller   prices; None until the models were timed, or where nothing needs times
    """

    def __init__(
        self,
        drafters: ListLike[Drafter],
        stats: EngineStats,
        *,
        calibration: Calibration,
        measure: Callable[[Report | None], Controller] | None,
        max_num_batched_tokens: int,
        chunked_prefill_size: int,
    ) -> None:
        self.calibration = calibration
        self.controller: Controller | None = None
        self._measure = measure
        self._stats = stats
        self._max_num_batched_tokens = max_num_batched_tokens
        self._chunked_prefill_size = chunked_prefill_size
        self._left_to_feed = 0
        self._learning_s = 0.0  # in the last step
        self._num_drafters = len(drafters)
        self.prediction = len(drafters)  # what requests predict themselves, as a source
        self._models = {
            n: each for n, each in enumerate(drafters) if isinstance(each, ModelDrafter)
        }
        self.drafters: list[TimedDrafter] = [
            TimedDrafter(each, source, stats)
            for source, each in enumerate((*drafters, PredictionDrafter(), ForcedDrafter()))
        ]
        self._builders: dict[tuple[str, bool], Builder] = {}
        self._chains: dict[Speculation, ChainController] = {}
        self._choices: dict[tuple[int, ...], Arm] = {}

    def max_nodes(self, speculation: Speculation, *, predicted: bool = False) -> int:
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
        if speculation.control == "smartspec" and 0 not in self._models:
            raise ConfigError('control="smartspec" needs a model as the first drafter')
        if speculation.verifier in IID_VERIFIERS and num_drafters > 1:
            raise ConfigError(
                f"verifier={speculation.verifier!r} is exact for one drafter alone: give one"
            )
        return max_nodes

    def measure(self, report: Report | None = None) -> None:
        """Time the models' steps, as speculation="auto" needs it; once.

        report  told of each model: steps measured so far, and in all
        """
        if self._measure is not None and self.controller is None:
            self.controller = self._measure(report)

    def is_unmeasured(self, speculation: Speculation) -> bool:
        """Whether a sequence has to do without a tree until the engine has nothing to run."""
        return speculation.needs_times and self._measure is not None and self.controller is None

    def draft(self, jobs: ListLike[Job]) -> list[Work]:
        """One tree per job, the root alone where nothing is to be drafted."""
        works = [Work(job, TokenTree(job.sequence.tokens[-1])) for job in jobs]
        groups: dict[tuple[str, bool], list[tuple[Work, Growth]]] = {}
        self._left_to_feed = self._chunked_prefill_size
        rests = self.controller is not None and self.controller.rests(len(jobs))
        for work in works:
            if rests and self._may_rest(work.job.sequence):
                continue
            growth = self._growth(work.job, len(jobs))
            if growth is not None:
                work.sources = growth.sources
                asked = work.job.sequence.speculation
                kind = asked.tree, asked.needs_times and self.controller is not None
                groups.setdefault(kind, []).append((work, growth))
        for kind, members in groups.items():
            growths = [growth for _, growth in members]
            grown = self._builder(kind, jobs, growths).grow(growths, self.drafters)
            for (work, _), each in zip(members, grown, strict=True):
                work.tree, work.grown = each.tree, each
        return works

    def learn(self, work: Work, verdict: Verdict, batch: int) -> None:
        """Teach the tables what became of the slots that verification reached.

        Slots off the accepted path were looked at by traversal alone: they count for nothing.

        batch  sequences that run
        """
        sequence = work.job.sequence
        grown, regime = work.grown, sequence.regime
        chain = self._chains.get(sequence.speculation)
        if chain is not None:  # of steps without a chain too: how many there were is worth knowing
            chain.observe(sequence.number, work.tree.num_drafted, len(verdict.path), batch)
        if grown is None:
            return
        tree, reached = work.tree, {0, *verdict.path}
        for slot_id, accepted in verdict.examined:
            slot = tree.slots[slot_id]
            if slot.parent not in reached:
                continue
            place = tree.slots_of[slot.parent].index(slot_id)
            self.calibration.record_place(regime, place, accepted)
            if slot_id in grown.features:
                name, features = self.drafters[slot.source].name, grown.features[slot_id]
                fortune = sequence.fortunes.setdefault(slot.source, Fortune())
                self.calibration.record(name, regime, features, accepted, fortune)

    def learn_times(
        self,
        works: ListLike[Work],
        verdicts: ListLike[Verdict],
        before: dict[str, float],
        start_s: float,
    ) -> None:
        """What the step cost and brought, of what was computed and not of where a text ended.

        before, start_s  the seconds of its parts, and the time, when it began
        """
        if self.controller is None:
            return
        now_s, now = time.perf_counter(), self._stats.seconds
        passes = self._stats.passes
        target_s = now["target"] - before["target"]
        # Prompts that drafters were fed are no passes, and no work of the host's
        passes_s = sum([each.seconds for each in passes])
        drafting_s = max(passes_s, now["draft"] - before["draft"])
        # All that is neither model's: what stands between the parts too, and this, as of last time
        host_s = now_s - start_s - target_s - drafting_s
        num_roots = sum([work.job.num_tokens for work in works])
        num_nodes = sum([work.tree.num_drafted for work in works])
        load = StepLoad(
            num_tokens=num_roots + num_nodes,
            num_spans=len(works),
            num_emitted=sum([len(verdict.path) + 1 for verdict in verdicts]),
            num_nodes=num_nodes,
            passes=passes,
            target_s=target_s,
            host_s=max(0.0, host_s) + self._learning_s,
        )
        is_decoding = num_roots == len(works)
        if any(work.job.sequence.choice is not None for work in works):
            rate = self.controller.goodput(load.num_tokens - load.num_nodes, load.num_spans)
            self._learn_choices(works, verdicts, rate)
        self.controller.observe(load, decoding_only=is_decoding)
        self._learning_s = time.perf_counter() - now_s

    def _learn_choices(
        self, works: ListLike[Work], verdicts: ListLike[Verdict], rate: float
    ) -> None:
        """Which drafters were worth their time; rate  tokens per second, what a second is worth."""
        assert self.controller is not None
        emitting = [work for work in works if work.num_logits]
        for work, verdict in zip(emitting, verdicts, strict=True):
            choice = work.job.sequence.choice
            if choice is None or work.grown is None:
                continue
            if tuple(work.sources) in choice.arms:  # not where models could not be asked
                cost = sum(
                    self.controller.pass_s(one) / one.num_spans
                    for one in self._stats.passes
                    if one.source in work.sources
                )
                choice.learn(work.sources, len(verdict.path) - rate * cost)

    def drop(self, number: int) -> None:
        """Forget a sequence."""
        for drafter in self.drafters:
            drafter.drop(number)
        for chain in self._chains.values():
            chain.drop(number)

    def _builder(
        self, kind: tuple[str, bool], jobs: ListLike[Job], growths: ListLike[Growth]
    ) -> Builder:
        """What grows these trees; where times set their size, at this step's prices.

        kind  the tree's name, and whether times set its size
        """
        tree, is_sized = kind
        if kind not in self._builders:
            self._builders[kind] = builder_for(tree, self.calibration)
        builder = self._builders[kind]
        if is_sized:
            assert self.controller is not None
            if isinstance(builder, HeapBuilder):
                num_tokens = sum(job.num_tokens for job in jobs)
                stop = 1 + sum(growth.max_nodes for growth in growths)
                builder.prices = self.controller.prices(num_tokens, len(jobs), stop)
            elif isinstance(builder, SequoiaBuilder):
                most = max(growth.max_nodes for growth in growths)
                builder.set_times(*self.controller.level_times(len(jobs), most), len(jobs))
        return builder

    def _growth(self, job: Job, num_spans: int) -> Growth | None:
        """What a sequence's tree may be; None where there can be none."""
        sequence = job.sequence
        if self.is_unmeasured(sequence.speculation) or sequence.num_pending > 1:
            return None
        sources = self._sources(sequence, num_spans)
        depth = min(sequence.speculation.depth, sequence.num_left - 1)
        chain = self._chain(sequence.speculation)
        if chain is not None:
            depth = min(depth, chain.length(sequence.number, num_spans))
        if not sources or not job.max_nodes or depth < 1:
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
            num_prompt=sequence.num_prompt,
            history=sequence.history,
            urgency=self._urgency(sequence, num_spans),
            fortunes=sequence.fortunes,
        )

    def _may_rest(self, sequence: Sequence) -> bool:
        """Whether only models draft for it: what others find may change from step to step."""
        is_auto = sequence.speculation.tree == "auto"
        has_models_alone = len(self._models) == self._num_drafters
        return is_auto and has_models_alone and not any(self._own_sources(sequence))

    def _own_sources(self, sequence: Sequence) -> tuple[bool, bool]:
        """Whether a prediction and a grammar propose something."""
        return bool(sequence.prediction), sequence.has_grammar

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

    def _sources(self, sequence: Sequence, num_spans: int) -> list[int]:
        """The drafters that know this sequence's positions and have not fallen far behind."""
        if sequence.speculation.is_off:
            return []
        takes_part = [*[True] * self._num_drafters, *self._own_sources(sequence)]
        sources = [
            source
            for source, drafter in enumerate(self.drafters)
            if len(sequence.tokens) <= drafter.max_positions
            and not drafter.is_failed
            and takes_part[source]
            and (num_spans == 1 or not self._must_catch_up(source, sequence))
        ]
        models = [each for each in sources if each in self._models]
        if len(models) < 2 or sequence.speculation.tree != "auto" or self.controller is None:
            return sources
        arms = choices_of(models, [each for each in sources if each not in models])
        if sequence.choice is None or list(sequence.choice.arms) != arms:
            sequence.choice = DrafterChoice.among(arms, self._choices)
        return list(sequence.choice.choose())

    def _must_catch_up(self, source: int, sequence: Sequence) -> bool:
        """Whether a drafter lacks more of a text than one chunk; feeds it some of that.

        A long prompt that a drafter computed all at once would hold up everybody else in the step.
        """
        model = self._models.get(source)
        if model is None:
            return False
        assert sequence.pages is not None
        root = TokenTree(sequence.tokens[-1])
        draft = Draft(sequence.number, sequence.tokens, sequence.pages, root)
        if model.missing(draft) <= self._chunked_prefill_size:
            return False
        if self._left_to_feed:
            with self.drafters[source].guarded(), self._stats.timed("draft"):
                model.feed(draft, self._left_to_feed)
            self._left_to_feed = 0
        return True
