"""Ways to speculate by the name of who proposed them, and their steps counted on given prompts.

All are settings of one engine. What counts are steps that had a tree, and whose tree `max_tokens`
did not cut: steps that start with fewer than `DEPTH` + 1 tokens left are left out, for all settings
alike, as are prompt steps. A step's tokens are its accepted path and one more, those after the
text's own end included. Learnt tables start from the bundled priors and learn during the run.
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.counts import Counts
from benchmarks.prompts import DATA, load_chats, load_outside
from specinfer.config import Draw, Speculation, VerifierName
from specinfer.draft.calibration import COLDEST_DRAW
from specinfer.engine.engine import StepTrace
from specinfer.llm import LLM
from specinfer.request import SamplingParams
from specinfer.text.tokenizer import Tokenizer

TARGET, DRAFTER = "zoo:parley", "zoo:parley-draft"
IN_DOMAIN = "in-domain"
MAX_LEN = 256
"""Prompt and output together: the bundled pair has seen no longer context."""
MAX_PROMPT = 64
DEPTH = 16
"""The deepest tree of any setting, the default of grown trees."""
BATCH = 16
_WIDE = 6
"""Nodes of `<1,1,k,1,1,1,1,1>` per k, after its first two."""
_PATH = 8


@dataclass(frozen=True, slots=True)
class Setting:
    """A builder, a verifier, and how slots are drawn; greedy requests' are always picked.

    tree  as `Speculation` has it, or "chain", "fixed" or "paths", of as many nodes as may be
    """

    tree: str
    verifier: VerifierName
    draw: Draw

    def speculation(self, budget: int, temperature: float) -> Speculation:
        """This setting with at most so many drafted nodes."""
        tree, draw, verifier = self.tree, self.draw, self.verifier
        if tree == "chain":
            tree = ",".join(["1"] * min(budget, DEPTH))
        elif tree == "fixed":
            tree = fixed_tree(max(1, (budget - 2) // _WIDE))
        elif tree == "paths":
            tree = f"{max(1, budget // _PATH)}x{_PATH}"
        if temperature == 0:
            draw, verifier = "auto", "auto"
        return Speculation(tree=tree, verifier=verifier, draw=draw, max_nodes=budget)


SETTINGS = {
    "ours": Setting("calibrated", "auto", "auto"),
    "calibrated drawn": Setting("calibrated", "traversal", "without-replacement"),
    "calibrated topdown": Setting("calibrated", "topdown", "without-replacement"),
    "calibrated picks": Setting("calibrated", "match", "pick"),
    "best-first traversal": Setting("best-first", "traversal", "without-replacement"),
    "DySpec": Setting("best-first", "topdown", "without-replacement"),
    "SpecExec": Setting("best-first", "match", "pick"),
    "Sequoia": Setting("sequoia", "topdown", "without-replacement"),
    "Sequoia traversal": Setting("sequoia", "traversal", "without-replacement"),
    "SpecInfer": Setting("fixed", "topdown", "iid"),
    "SpecTr": Setting("paths", "kseq", "iid"),
    "GBV": Setting("paths", "gbv", "iid"),
    "paths traversal": Setting("paths", "traversal", "iid"),
    "chain": Setting("chain", "topdown", "without-replacement"),
}
OURS, BASE = "ours", "SpecInfer"

WIDTHS = {k: 2 + _WIDE * k for k in range(1, 6)}
"""Nodes of SpecInfer's shape by k."""


def fixed_tree(k: int) -> str:
    """SpecInfer's shape with k children at the third level."""
    return f"1,1,{k},1,1,1,1,1"


@dataclass(frozen=True, slots=True)
class Case:
    """One setting at one temperature and budget on one set of prompts."""

    setting: str
    temperature: float
    budget: int
    num_prompts: int
    source: str = IN_DOMAIN

    @property
    def speculation(self) -> Speculation:
        """What the engine is asked for."""
        return SETTINGS[self.setting].speculation(self.budget, self.temperature)

    @property
    def law(self) -> tuple[object, ...]:
        """Cases that agree in this are the same: picks are matched by every verifier."""
        asked = self.speculation
        verifier = "traversal" if asked.verifier == "auto" else asked.verifier
        draw = asked.draw
        if draw == "auto":
            draw = "pick" if self.temperature <= COLDEST_DRAW else "without-replacement"
        if self.temperature == 0 or draw == "pick":
            draw, verifier = "pick", "match"
        tree = (asked.tree, draw, verifier, asked.max_nodes)
        return (*tree, self.temperature, self.num_prompts, self.source)


@dataclass(slots=True, eq=False)
class Counted:
    """What one case counted.

    steps    per prompt, tokens of steps with a tree, and those steps
    drafted  drafted nodes of the same steps
    """

    steps: Counts
    drafted: int = 0


@dataclass(frozen=True, slots=True)
class Inputs:
    """Where models and prompts come from, and how far texts go."""

    target: str = TARGET
    drafter: str = DRAFTER
    data: Path = DATA
    max_len: int = MAX_LEN
    quantization: str | None = None
    prompts: tuple[tuple[int, ...], ...] | None = field(default=None)


def load_prompts(inputs: Inputs, source: str, num_prompts: int) -> list[list[int]]:
    """Chat prompts in tokens; longer ones than `MAX_PROMPT` are left out.

    returns  of an outside set fewer, where it has fewer
    """
    if inputs.prompts is not None:
        return [list(each) for each in inputs.prompts[:num_prompts]]
    encode = _tokenizer(inputs.target).apply_chat_template
    if source == IN_DOMAIN:
        chats = load_chats(
            num_prompts, encode=encode, max_prompt_tokens=MAX_PROMPT, folder=inputs.data
        )
        return [encode(chat) for chat in chats]
    texts = load_outside(source, folder=inputs.data)
    prompts = [encode([{"role": "user", "content": text}]) for text in texts]
    return [prompt for prompt in prompts if len(prompt) <= MAX_PROMPT][:num_prompts]


@functools.cache
def _tokenizer(target: str) -> Tokenizer:
    from specinfer.models.folder import resolve_model

    return Tokenizer.from_folder(resolve_model(target))


def walk(
    inputs: Inputs, prompts: Sequence[Sequence[int]], speculation: Speculation, temperature: float
) -> Iterator[tuple[int, StepTrace]]:
    """Every step of every prompt, in batches, by a fresh float32 engine: (prompt, what it did)."""
    llm = LLM(
        inputs.target,
        drafters=[inputs.drafter],
        speculation=speculation,
        dtype="float32",
        quantization=inputs.quantization,
        max_num_seqs=BATCH,
        max_num_batched_tokens=4096,
        max_model_len=inputs.max_len,
        show_progress=False,
    )
    params = SamplingParams(temperature=temperature, max_tokens=None)
    requests = [llm.submit(list(prompt), params) for prompt in prompts]
    places = {request.sequences[0].number: place for place, request in enumerate(requests)}
    while llm.engine.has_work:
        for trace in llm.engine.step():
            yield places[trace.sequence.number], trace


def is_whole(trace: StepTrace) -> bool:
    """Whether a step had a tree, and room for the deepest one."""
    num_left = trace.sequence.num_left + trace.num_new
    return trace.tree.num_drafted > 0 and num_left > DEPTH


def count(case: Case, inputs: Inputs) -> Counted:
    """Run one case."""
    prompts = load_prompts(inputs, case.source, case.num_prompts)
    counted = Counted(Counts.zeros(len(prompts)))
    for prompt, trace in walk(inputs, prompts, case.speculation, case.temperature):
        if is_whole(trace):
            counted.steps.add(prompt, len(trace.verdict.path) + 1)
            counted.drafted += trace.tree.num_drafted
    return counted
