"""One step: schedule, draft, verify, commit. Nothing else writes state."""

import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as ListLike
from dataclasses import dataclass

from torch import Tensor

from specinfer.cache.blocks import BlockAllocator
from specinfer.config import EngineConfig, Speculation
from specinfer.draft.base import Draft, Drafter
from specinfer.draft.calibration import Calibration
from specinfer.engine.constraints import Constraints
from specinfer.engine.controller import Controller
from specinfer.engine.logprobs import emitted_logprobs, take_prompt_rows
from specinfer.engine.measure import Report
from specinfer.engine.scheduler import Job, Scheduler
from specinfer.engine.sequence import Sequence
from specinfer.engine.speculator import Speculator
from specinfer.engine.stats import EngineStats
from specinfer.engine.tracing import StepTime, chances_of, keep_trees
from specinfer.engine.verification import rows_kept, verify_works
from specinfer.engine.work import Work
from specinfer.errors import RequestError
from specinfer.outputs import Logprobs
from specinfer.request import SamplingParams
from specinfer.run.batch import Span
from specinfer.run.runner import Runner
from specinfer.text.tokenizer import Tokenizer
from specinfer.tree import TokenTree
from specinfer.verify import Verdict

_log = logging.getLogger("specinfer")


@dataclass(frozen=True, slots=True)
class StepTrace:
    """What one step did for one sequence: for drawing trees.

    num_new  emitted tokens: the accepted path and the target's own, up to where the text ended
    """

    sequence: Sequence
    tree: TokenTree
    verdict: Verdict
    num_new: int


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
        self.stats = EngineStats()
        self.speculator = Speculator(
            drafters,
            self.stats,
            calibration=calibration or Calibration(),
            measure=measure,
            max_num_batched_tokens=config.max_num_batched_tokens,
            chunked_prefill_size=config.chunked_prefill_size,
        )
        self.tokenizer = tokenizer
        self.constraints = Constraints(tokenizer, target.vocab_size)
        self.max_model_len = max_model_len
        self.config = config
        self._seed = config.seed
        self.scheduler = Scheduler(allocator, config, self.stats)
        self._num_added = 0
        self.broken: ListLike[Sequence] = ()
        """What the last step ended because it failed, or because these did; () where none did."""
        self.set_speculation(speculation)

    def set_speculation(self, speculation: Speculation) -> None:
        """Guess and verify differently from now on, for requests added from now on.

        raises  ConfigError for a tree that no drafter grows or no step has room for
        """
        self.speculator.max_nodes(speculation)
        self.speculation = speculation

    def measure(self, report: Report | None = None) -> None:
        """Time the models' steps, as speculation="auto" needs it; once, while nothing runs.

        report  told of each model: steps measured so far, and in all
        """
        assert not self.scheduler.running, "it writes into pages, whoever owns them"
        self.scheduler.clear()
        self.speculator.measure(report)

    def add(self, request_id: str, prompt: ListLike[int], params: SamplingParams) -> list[Sequence]:
        """Queue a request: one sequence per sample.

        raises  RequestError if the prompt is empty, leaves no room for a token or has tokens the
                model does not know, or for a priority that nobody would look at; CapacityError if
                its pages could never be had
        """
        max_total = self._check(prompt, params)
        self.scheduler.check_priority(params.priority)
        speculation = params.own_speculation or self.speculation
        prediction = self._encode_prediction(params)
        has_guesses = bool(prediction) or params.structure is not None
        max_nodes = self.speculator.max_nodes(speculation, predicted=has_guesses)
        if speculation.tree == "auto":  # of no given size: no reason to refuse a request
            max_nodes = min(max_nodes, max(0, self.scheduler.num_slots - max_total))
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
                constraints=self.constraints,
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
        its pages; waiting ones stay. A sequence whose own logits are not finite ends so alone, and
        nothing is raised. What ended stands in `broken` then.
        """
        self.broken = ()
        try:
            return self._step()
        except BaseException:
            # What was half-done cannot be told any more: what ran ends here, what waits goes on.
            ran = self.scheduler.clear()
            for sequence in ran:
                sequence.abort()
                self._forget(sequence)
            self.broken = [*self.broken, *ran]
            raise

    def _step(self) -> list[StepTrace]:
        timed, before = self.stats.timed, dict(self.stats.seconds)
        self.stats.passes.clear()
        if not self.scheduler.running and any(
            self.speculator.is_unmeasured(each.speculation) and each.max_nodes
            for each in self.scheduler.waiting
        ):
            self.measure()
        start_s = time.perf_counter()
        with timed("schedule"):
            jobs = self.scheduler.schedule()
        if not jobs:
            return []
        _note_start(jobs)
        with timed("grow"):
            works = self.speculator.draft(jobs)
        with timed("target"):
            spans = [work.span() for work in works]
            logits = self.target.run(spans)
        with timed("verify"):
            logits = take_prompt_rows(works, logits, self.tokenizer)
            emitting = [work for work in works if work.num_logits]
            found = verify_works(emitting, logits)
            if None in found:
                logits = self._end_lawless(emitting, found, logits)
                works = [work for work in works if not work.job.sequence.is_finished]
                emitting = [work for work in works if work.num_logits]
            verdicts = [verdict for verdict in found if verdict is not None]
            logprobs = emitted_logprobs(emitting, verdicts, logits, self.tokenizer)
        chances = chances_of(emitting, verdicts, logits)
        with timed("commit"):
            traces = self._commit(works, verdicts, logprobs)
        self._count_step(spans, works, traces)
        if chances:
            names = [drafter.name for drafter in self.speculator.drafters]
            keep_trees(emitting, traces, chances, names, self._step_time(works, before))
        if not self.broken:  # else some of what was computed is not among the works any more
            self.speculator.learn_times(works, verdicts, before, start_s)
        return traces

    def _end_lawless(
        self, works: ListLike[Work], found: ListLike[Verdict | None], logits: Tensor
    ) -> Tensor:
        """End the sequences that have no verdict; returns the others' rows."""
        kept = [verdict is not None for verdict in found]
        sequences = [work.job.sequence for work in works]
        self.broken = [each for each, is_kept in zip(sequences, kept, strict=True) if not is_kept]
        names = ", ".join(each.request_id for each in self.broken)
        _log.error("ended: %s: the target's logits are not finite (NaN or infinity)", names)
        self.abort(self.broken)
        self.scheduler.forget_unused()
        return rows_kept(works, kept, logits)

    def _check(self, prompt: ListLike[int], params: SamplingParams) -> int:
        if not prompt:
            raise RequestError("the prompt is empty: give at least one token")
        if len(prompt) >= self.max_model_len:
            raise RequestError(
                f"the prompt has {len(prompt)} tokens and prompt and output together may have "
                f"{self.max_model_len} (max_model_len): shorten the prompt"
            )
        self._check_tokens("the prompt", prompt)
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            self._check_tokens(name, list(getattr(params, name) or ()))
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
            prediction = self.tokenizer.encode(prediction, add_special_tokens=False)
        self._check_tokens("the prediction", prediction)
        return prediction

    # --- commit -----------------------------------------------------------------------------------

    def _commit(
        self,
        works: ListLike[Work],
        verdicts: ListLike[Verdict],
        logprobs: dict[int, list[Logprobs]],
    ) -> list[StepTrace]:
        for work in works:
            work.job.sequence.num_computed += work.job.num_tokens
        emitting = [work for work in works if work.num_logits]
        self._keep_paths(emitting, verdicts)
        traces = []
        for work, verdict in zip(emitting, verdicts, strict=True):
            sequence, tree = work.job.sequence, work.tree
            new = [*(tree.tokens[node] for node in verdict.path), verdict.next_token]
            num_new = sequence.append(new, logprobs.get(sequence.number, ()))
            if sequence.first_s is None:
                sequence.first_s = time.perf_counter()
            self._count_path(work, verdict.path[:num_new])
            self.speculator.learn(work, verdict, len(self.scheduler.running))
            if sequence.noise is not None:
                sequence.noise.forget(len(sequence.tokens))
            traces.append(StepTrace(sequence, tree, verdict, num_new))
            if sequence.is_finished:
                self._remove(sequence)
        return traces

    def _keep_paths(self, works: ListLike[Work], verdicts: ListLike[Verdict]) -> None:
        """Move the accepted nodes' K and V to where committed tokens stand, in every pool."""
        sources, targets = [], []
        admitted: dict[int, list[tuple[Draft, list[int]]]] = {}
        for work, verdict in zip(works, verdicts, strict=True):
            sequence = work.job.sequence
            assert sequence.pages is not None
            root = sequence.num_computed - 1  # node i stands i keys behind the root
            for depth, node in enumerate(verdict.path, start=1):
                if node != depth:
                    sources.append(sequence.pages.slot(root + node))
                    targets.append(sequence.pages.slot(root + depth))
            sequence.num_computed += len(verdict.path)
            if work.grown is not None:
                for source, (draft, _) in work.grown.parts.items():
                    own_path = work.grown.own_path(source, verdict.path)
                    admitted.setdefault(source, []).append((draft, own_path))
        self.target.pool.move(sources, targets)
        for source, accepted in admitted.items():
            self.speculator.drafters[source].admit(accepted)

    def _count_step(
        self, spans: ListLike[Span], works: ListLike[Work], traces: ListLike[StepTrace]
    ) -> None:
        self.stats.num_steps += 1
        self.stats.num_target_tokens += sum(len(span.tokens) for span in spans)
        self.stats.num_output_tokens += sum(trace.num_new for trace in traces)
        num_nodes = sum(work.tree.num_drafted for work in works)
        counts = self.stats.steps_by_nodes
        counts[num_nodes] = counts.get(num_nodes, 0) + 1

    def _count_path(self, work: Work, emitted_path: ListLike[int]) -> None:
        tree, drafters = work.tree, self.speculator.drafters
        sources = [tree.sources_of(node) for node in range(1, len(tree))]
        names = [drafters[each[0]].name for each in sources]
        self.stats.count_tree(tree.depths[1:], names)
        prediction = self.speculator.prediction
        for stats in (work.job.sequence.stats, self.stats.sums):
            stats.count_step(
                tree.num_drafted,
                accepted=[names[node - 1] for node in emitted_path],
                num_predicted=sum(prediction in sources[node - 1] for node in emitted_path),
            )

    def _step_time(self, works: ListLike[Work], before: dict[str, float]) -> StepTime:
        seconds = {part: total - before[part] for part, total in self.stats.seconds.items()}
        controller, plain_s = self.speculator.controller, None
        if controller is not None:
            plain_s = controller.plain_s(sum(work.job.num_tokens for work in works), len(works))
        return StepTime(seconds, len(works), plain_s)

    def _remove(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)
        self._forget(sequence)

    def _forget(self, sequence: Sequence) -> None:
        self.speculator.drop(sequence.number)
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


def _note_start(jobs: ListLike[Job]) -> None:
    now = time.perf_counter()
    for job in jobs:
        if job.sequence.scheduled_s is None:
            job.sequence.scheduled_s = now
