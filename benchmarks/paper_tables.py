"""What SpecInfer measured on its drafts: is the target's token among them, and is it accepted?

    ranks   the paper's table 1: the target's token among the drafter's first k
    sampled the paper's table 3: multi-step against naive sampling, on the same drawn trees

Table 2, tokens per step by width, is the comparison's own (benchmarks/acceptance.py).
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.counts import Counts
from benchmarks.settings import Inputs, Setting, is_whole, load_prompts, walk
from specinfer.cache.blocks import Pages
from specinfer.config import Speculation
from specinfer.logits import RowFilters, target_laws
from specinfer.models.decoder import Decoder
from specinfer.models.folder import resolve_model
from specinfer.models.weights import load_decoder
from specinfer.request import SamplingParams
from specinfer.run.batch import Span
from specinfer.run.runner import Runner
from specinfer.tree import Floats, TokenTree
from specinfer.verify import verify_match, verify_topdown, verify_traversal

NUM_RANKS = 5
VERIFIERS = {
    "naive": verify_match,
    "multi-step": verify_topdown,
    "traversal": verify_traversal,
}
EVERY = 5
"""Trees of every fifth step are verified: neighbouring ones are alike, and each takes a pass."""
REPEATS = 16
"""Verifications of one tree by each verifier."""


def count_ranks(inputs: Inputs, source: str, num_prompts: int, temperature: float) -> list[Counts]:
    """Per k = 1 … 5: output tokens among the drafter's first k, and all, prompt by prompt."""
    prompts = load_prompts(inputs, source, num_prompts)
    texts = [list(prompt) for prompt in prompts]
    for place, trace in walk(inputs, prompts, Speculation(tree="off"), temperature):
        texts[place] = list(trace.sequence.tokens)
    drafter = _load(inputs.drafter)
    counts = [Counts.zeros(len(texts)) for _ in range(NUM_RANKS)]
    for place, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        ranks = _ranks(drafter, text, len(prompt))
        for k, each in enumerate(counts, start=1):
            each.add(place, float((ranks < k).sum()), len(ranks))
    return counts


def _ranks(drafter: Decoder, text: Sequence[int], start: int) -> np.ndarray:
    """How many tokens the drafter finds likelier than each of the text's, from `start` on."""
    pages = Pages(range(len(text)), 1)
    span = Span(text, range(len(text)), pages, 0, 0, None, len(text))
    logits = Runner(drafter, len(text)).run([span])[start - 1 : -1]
    own = logits.gather(-1, torch.tensor(text[start:])[:, None])
    ranks: np.ndarray = (logits > own).sum(-1).numpy()
    return ranks


def count_sampled(
    inputs: Inputs, source: str, num_prompts: int, setting: Setting, budget: int
) -> dict[str, Counts]:
    """Tokens per step of each verifier on the same trees, at temperature 1.0.

    The trees are those of an engine that verifies as `setting` does; each is then verified
    `REPEATS` times by every verifier, from laws computed afresh.
    """
    params = SamplingParams(temperature=1.0)
    prompts = load_prompts(inputs, source, num_prompts)
    target = _load(inputs.target)
    counts = {name: Counts.zeros(len(prompts)) for name in VERIFIERS}
    num_steps = 0
    for place, trace in walk(inputs, prompts, setting.speculation(budget, 1.0), 1.0):
        if not is_whole(trace):
            continue
        num_steps += 1
        if num_steps % EVERY:
            continue
        tokens = trace.sequence.tokens
        known = tokens[: len(tokens) - trace.num_new]
        p = tree_laws(target, known, trace.tree, params)
        for name, verify in VERIFIERS.items():
            rng = np.random.default_rng(num_steps)
            for _ in range(REPEATS):
                counts[name].add(place, len(verify(trace.tree, p, rng).path) + 1)
    return counts


def tree_laws(
    target: Decoder, known: Sequence[int], tree: TokenTree, params: SamplingParams
) -> Floats:
    """[nodes, vocab] float32: the target's law after each node of a tree that hangs from a text.

    known  the tokens so far; the last one is the root
    """
    root = len(known) - 1
    pages = Pages(range(root + len(tree)), 1)
    runner = Runner(target, root + len(tree))
    if root:
        runner.run([Span(known[:root], range(root), pages, 0, 0, None, 1)])
    positions = [root + depth for depth in tree.depths]
    mask = tree.ancestor_mask()
    logits = runner.run([Span(tree.tokens, positions, pages, root, root, mask, len(tree))])
    laws: Floats = target_laws(logits, RowFilters.of([(params, len(tree))])).numpy()
    return laws


def _load(name: str) -> Decoder:
    path: Path = resolve_model(name)
    return load_decoder(path, dtype="float32")
