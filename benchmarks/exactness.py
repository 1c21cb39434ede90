"""Does the tree change what the target says? Plain decoding against every other way, in float32.

    python -m benchmarks.exactness --prompts 200 --tokens 192 --batch 1 8 --transformers

Greedy and seeded sampling, plain and with trees, alone and in batches, all against plain decoding
alone. Kernels round differently for different batches, so a text may part from plain decoding where
the target's two best tokens are nearly tied. Each such place is listed with its gap, recomputed by
one plain pass over the text before it, beside the measured error of the kernels. A gap below
`EXCUSED_GAP` excuses a divergence; any other makes the program fail.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.prompts import load_chats
from specinfer.cache.blocks import Pages
from specinfer.config import PAPER_TREE, Speculation, parse_tree
from specinfer.engine.engine import Engine
from specinfer.llm import LLM
from specinfer.logits import RowFilters, target_laws
from specinfer.models.decoder import Decoder
from specinfer.models.folder import resolve_model
from specinfer.request import SamplingParams
from specinfer.run.batch import Span
from specinfer.run.runner import Runner
from specinfer.sampling import gumbel_noise
from specinfer.tree import TokenTree

EXCUSED_GAP = 4e-5
"""In float32, in logits (seeded: in log p + noise): twice the measured kernel error, for each of
the two scores may be off by it once."""


@dataclass(frozen=True, slots=True)
class Divergence:
    """Where a text parts from plain decoding.

    position  output tokens before it, which agree
    expected  plain decoding's token; -1: it ended
    actual    the other's token; -1: it ended
    gap       score of `expected` minus score of `actual` after those tokens; inf where one ended
    """

    prompt: int
    position: int
    expected: int
    actual: int
    gap: float

    @property
    def is_excused(self) -> bool:
        """Whether the two tokens are nearly tied."""
        return abs(self.gap) < EXCUSED_GAP


@dataclass(frozen=True, slots=True)
class Comparison:
    """One way of decoding against plain decoding alone.

    tokens_per_step  the engine's; 0 for transformers
    """

    law: str
    mode: str
    prompts: int
    tokens: int
    identical: int
    tokens_per_step: float
    seconds: float
    divergences: list[Divergence] = field(default_factory=list)

    @property
    def num_unexcused(self) -> int:
        """Divergences that no near-tie explains."""
        return sum(not each.is_excused for each in self.divergences)


def plain_logits(decoder: Decoder, tokens: Sequence[int]) -> Tensor:
    """[tokens, vocab] float32: one plain pass over a whole sequence, with pages of its own."""
    pages = Pages(range(len(tokens)), 1)
    span = Span(tokens, range(len(tokens)), pages, 0, 0, None, len(tokens))
    return Runner(decoder, len(tokens)).run([span])


def find_divergence(
    engine: Engine,
    prompt: Sequence[int],
    params: SamplingParams,
    expected: Sequence[int],
    actual: Sequence[int],
    *,
    sample: int = 0,
    number: int = 0,
) -> Divergence | None:
    """Where two outputs of one greedy or seeded request part, and how near the tie was.

    sample  which of the request's n continuations
    number  of the prompt, for the report
    """
    if list(expected) == list(actual):
        return None
    shared = min(len(expected), len(actual))
    position = next((i for i in range(shared) if expected[i] != actual[i]), shared)
    if position == shared:  # equal as far as both go: no tie explains that
        ended = [*expected, -1][position], [*actual, -1][position]
        return Divergence(number, position, *ended, math.inf)
    text = [*prompt, *expected[:position]]
    scores = plain_logits(engine.target.decoder, text)[-1:]
    ends = frozenset() if params.ignore_eos else engine.tokenizer.eos_token_ids
    history = engine.constraints.history(
        params, len(prompt), ends.union(params.stop_token_ids or ())
    )
    edits = None if history is None else history.edits(text, TokenTree(text[-1]), [0])
    filters = RowFilters.of([(params, 1)], edits=[edits], device=scores.device)
    if params.is_greedy:
        scores = scores if filters.edits is None else filters.edits.apply(scores)
    else:
        assert params.seed is not None, "only greedy and seeded texts can be compared"
        noise = gumbel_noise(params.seed, sample, len(text), scores.shape[-1])
        p = target_laws(scores, filters)
        scores = p.log() + torch.from_numpy(noise).to(p.device)
    pair = expected[position], actual[position]
    gap = float(scores[0, pair[0]] - scores[0, pair[1]])
    return Divergence(number, position, *pair, gap)


def kernel_error(decoder: Decoder, texts: Sequence[Sequence[int]], tree: str) -> float:
    """The largest difference in a logit between a plain pass and steps with trees.

    texts  prompt and output; the tree hangs from the middle, with random tokens off the text
    """
    worst, rng = 0.0, np.random.default_rng(0)
    widths, vocab = parse_tree(tree), decoder.architecture.vocab_size
    for text in texts:
        root = len(text) // 2
        token_tree, level = TokenTree(text[root]), [0]
        for depth, width in enumerate(widths, start=1):
            known = text[root + depth] if root + depth < len(text) else 0
            level = [
                token_tree.add(node, token)
                for node in level
                for token in [known, *rng.integers(0, vocab, width - 1).tolist()]
            ]
        pages = Pages(range(root + len(token_tree)), 1)
        runner = Runner(decoder, root + len(token_tree))
        for position in range(root):  # one token at a time, as plain decoding does
            chain = [position]
            span = Span([text[position]], chain, pages, position, position, None, 1)
            runner.run([span])
        positions = [root + depth for depth in token_tree.depths]
        mask = token_tree.ancestor_mask()
        span = Span(token_tree.tokens, positions, pages, root, root, mask, len(token_tree))
        logits = runner.run([span])
        for node in range(len(token_tree)):
            path = [token_tree.tokens[each] for each in token_tree.path(node)]
            fresh = plain_logits(decoder, [*text[: root + 1], *path])[-1]
            worst = max(worst, float((logits[node] - fresh).abs().max()))
    return worst


@dataclass(frozen=True, slots=True)
class Settings:
    """What is compared."""

    model: str = "zoo:parley"
    drafters: tuple[str, ...] = ("zoo:parley-draft",)
    tree: str = PAPER_TREE
    prompts: int = 20
    tokens: int = 64
    batches: tuple[int, ...] = (1, 8)
    temperature: float = 0.8
    transformers: bool = False
    stop_at_eos: bool = False


class Exactness:
    """Runs every way of decoding over the same prompts and compares."""

    def __init__(self, settings: Settings, progress: Any = None) -> None:
        self.settings = settings
        self.comparisons: list[Comparison] = []
        self._say = progress or (lambda message: None)
        self._plain = self._load(batch=1, tree=False)
        template = self._plain.tokenizer.apply_chat_template
        chats = load_chats(settings.prompts, encode=template)
        self._prompts = [template(chat) for chat in chats]

    def run(self) -> float:
        """Fill `comparisons`; returns the measured kernel error."""
        laws = {
            "greedy": [self._params()] * len(self._prompts),
            "seeded": [
                self._params(temperature=self.settings.temperature, seed=number)
                for number in range(len(self._prompts))
            ],
        }
        references = {}
        for law, params in laws.items():
            references[law], _, seconds = self._decode(self._plain, params)
            num_tokens = sum(map(len, references[law]))
            self._say(f"{law}: plain alone, {num_tokens} tokens in {seconds:.0f} s")
        for batch in self.settings.batches:
            for tree in (False, True):
                if batch == 1 and not tree:
                    continue  # the reference itself
                llm = self._load(batch=batch, tree=tree)
                place = "alone" if batch == 1 else f"batches of {batch}"
                mode = f"{'tree' if tree else 'plain'}, {place}"
                for law, params in laws.items():
                    self._compare(law, mode, params, references[law], self._decode(llm, params))
        if self.settings.transformers:
            start = time.perf_counter()
            texts = self._decode_with_transformers()
            timed = texts, 0.0, time.perf_counter() - start
            greedy = laws["greedy"]
            self._compare("greedy", "transformers, alone", greedy, references["greedy"], timed)
        sample = zip(self._prompts[:5], references["greedy"], strict=False)
        texts = [[*prompt, *output] for prompt, output in sample]
        return kernel_error(self._plain.engine.target.decoder, texts, self.settings.tree)

    def _load(self, *, batch: int, tree: bool) -> LLM:
        return LLM(
            self.settings.model,
            drafters=self.settings.drafters if tree else (),
            speculation=Speculation(tree=self.settings.tree if tree else "off"),
            dtype="float32",
            max_num_seqs=batch,
            max_model_len=64 + self.settings.tokens,
            show_progress=False,
        )

    def _params(self, **changes: Any) -> SamplingParams:
        fields = {
            "temperature": 0.0,
            "max_tokens": self.settings.tokens,
            "ignore_eos": not self.settings.stop_at_eos,
        }
        return SamplingParams(**(fields | changes))

    def _decode(
        self, llm: LLM, params: list[SamplingParams]
    ) -> tuple[list[list[int]], float, float]:
        """The outputs' tokens, tokens per step, seconds."""
        start = time.perf_counter()
        outputs = llm.generate(self._prompts, params)
        seconds = time.perf_counter() - start
        num_tokens = sum(output.stats.num_output_tokens for output in outputs)
        num_steps = sum(output.stats.num_target_steps for output in outputs)
        return [o.outputs[0].token_ids for o in outputs], num_tokens / num_steps, seconds

    def _decode_with_transformers(self) -> list[list[int]]:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        model = AutoModelForCausalLM.from_pretrained(
            resolve_model(self.settings.model), dtype=torch.float32
        ).eval()
        ends = sorted(self._plain.tokenizer.eos_token_ids) if self.settings.stop_at_eos else None
        model.generation_config.eos_token_id = ends
        texts = []
        for prompt in self._prompts:
            ids = torch.tensor([prompt])
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=self.settings.tokens,
            )
            texts.append(output[0, len(prompt) :].tolist())
        return texts

    def _compare(
        self,
        law: str,
        mode: str,
        params: list[SamplingParams],
        references: list[list[int]],
        decoded: tuple[list[list[int]], float, float],
    ) -> None:
        texts, tokens_per_step, seconds = decoded
        found = [
            find_divergence(self._plain.engine, prompt, each, expected, actual, number=number)
            for number, (prompt, each, expected, actual) in enumerate(
                zip(self._prompts, params, references, texts, strict=True)
            )
        ]
        divergences = [each for each in found if each is not None]
        self.comparisons.append(
            Comparison(
                law=law,
                mode=mode,
                prompts=len(texts),
                tokens=sum(map(len, texts)),
                identical=len(texts) - len(divergences),
                tokens_per_step=tokens_per_step,
                seconds=seconds,
                divergences=divergences,
            )
        )
        self._say(f"{law}: {mode}, {len(texts) - len(divergences)} of {len(texts)} identical")


def show(settings: Settings, comparisons: Sequence[Comparison], error: float) -> None:
    """Print the table, and each divergence below it."""
    console = Console()
    console.width = max(console.width, 110)
    table = Table(
        title=f"{settings.model} in float32 against plain decoding alone, tree {settings.tree}"
    )
    for name in ("law", "mode", "prompts", "tokens", "identical", "near-ties", "unexcused"):
        table.add_column(name, justify="left" if name in ("law", "mode") else "right")
    table.add_column("tokens/step", justify="right")
    table.add_column("seconds", justify="right")
    for each in comparisons:
        table.add_row(
            each.law,
            each.mode,
            str(each.prompts),
            str(each.tokens),
            str(each.identical),
            str(len(each.divergences) - each.num_unexcused),
            str(each.num_unexcused),
            f"{each.tokens_per_step:.2f}" if each.tokens_per_step else "",
            f"{each.seconds:.1f}",
        )
    console.print(table)
    for each in comparisons:
        for d in each.divergences:
            verdict = "near-tie" if d.is_excused else "NOT EXCUSED"
            console.print(
                f"{each.law}, {each.mode}: prompt {d.prompt} parts at output token {d.position} "
                f"({d.expected} or {d.actual}), gap {d.gap:.2e}: {verdict}"
            )
    console.print(f"measured kernel error: {error:.1e} in a logit; excused below {EXCUSED_GAP:.0e}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns 1 if any divergence is not excused."""
    defaults = Settings()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.exactness")
    parser.add_argument("--model", default=defaults.model)
    parser.add_argument("--drafter", action="append", default=[])
    parser.add_argument("--tree", default=defaults.tree)
    parser.add_argument("--prompts", type=int, default=defaults.prompts)
    parser.add_argument("--tokens", type=int, default=defaults.tokens)
    parser.add_argument("--batch", type=int, nargs="+", default=list(defaults.batches))
    parser.add_argument("--temperature", type=float, default=defaults.temperature)
    parser.add_argument("--transformers", action="store_true", help="compare with its generate")
    parser.add_argument("--stop-at-eos", action="store_true", help="do not go on past the end")
    parser.add_argument("--json", type=Path, help="write the result here")
    options = parser.parse_args(arguments)
    settings = Settings(
        model=options.model,
        drafters=tuple(options.drafter) or defaults.drafters,
        tree=options.tree,
        prompts=options.prompts,
        tokens=options.tokens,
        batches=tuple(options.batch),
        temperature=options.temperature,
        transformers=options.transformers,
        stop_at_eos=options.stop_at_eos,
    )
    exactness = Exactness(settings, lambda message: print(message, file=sys.stderr))
    error = exactness.run()
    show(settings, exactness.comparisons, error)
    if options.json:
        rows = [asdict(each) for each in exactness.comparisons]
        for divergence in (d for row in rows for d in row["divergences"]):
            if math.isinf(divergence["gap"]):
                divergence["gap"] = None  # JSON knows no infinity
        result = {"settings": asdict(settings), "kernel_error": error, "comparisons": rows}
        options.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return int(any(each.num_unexcused for each in exactness.comparisons))


if __name__ == "__main__":
    sys.exit(main())
