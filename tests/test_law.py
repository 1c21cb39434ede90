"""Law: what the engine really emits follows the target's law, by a G-test over many runs.

The verifiers are proven by enumeration in test_verify.py; here everything around them runs as it
does in production: drafters, filters, batches, trees cut by max_tokens, generators.
"""

from collections import Counter
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import numpy as np
import pytest
import torch

from specinfer.config import Draw, EngineConfig, Speculation, VerifierName
from specinfer.draft import shapes
from specinfer.draft.base import Drafter
from specinfer.draft.ngram import NgramDrafter
from specinfer.logits import RowFilters, target_laws
from specinfer.models.decoder import Decoder
from specinfer.request import SamplingParams
from specinfer.sampling import draw_without_replacement
from specinfer.tree import Floats, Law, TokenTree
from tests.engines import far_away, fresh_logits, model_drafter, toy_decoder, toy_engine
from tests.helpers import top_k_tokens

VOCAB = 6
PROMPT = [4]  # one token: the first step has a tree already
REPEATING = [4, 1, 3, 4, 1, 2, 4, 1, 4]  # for n-grams
NUM_RUNS = 1200
SIGNIFICANCE = 1e-3  # chance of a false alarm over the whole family of tests; seeds are fixed
BLIND = 1e-6  # a mutation must be seen at least this clearly


def toy(seed: int) -> Decoder:
    """A model of six tokens with sharp laws that depend on the context."""
    return toy_decoder(
        seed, head=0.45, vocab_size=VOCAB, num_hidden_layers=1, hidden_size=16, intermediate_size=16
    )


TARGET, FIRST, SECOND = toy(1), toy(2), toy(3)


def g_test(counts: Counter[tuple[int, ...]], law: dict[tuple[int, ...], float]) -> float:
    """The chance of counts at least this far from the law, were it true.

    Cells that expect fewer than 5 are one cell. An impossible outcome has chance 0.
    """
    if any(law.get(outcome, 0.0) == 0.0 for outcome in counts):
        return 0.0
    total = counts.total()
    cells: list[tuple[float, float]] = []
    rest = [0.0, 0.0]
    for outcome, share in law.items():
        observed, expected = float(counts[outcome]), share * total
        if expected >= 5:
            cells.append((observed, expected))
        else:
            rest = [rest[0] + observed, rest[1] + expected]
    if rest[1] > 0:
        cells.append((rest[0], rest[1]))
    g = 2 * sum(o * np.log(o / e) for o, e in cells if o > 0)
    half = torch.tensor([(len(cells) - 1) / 2, g / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def holm(chances: Sequence[float]) -> float:
    """The smallest significance at which Holm's procedure rejects any of these."""
    return min(chances) * len(chances)


def pair_law(
    params: SamplingParams, prompt: Sequence[int] = PROMPT
) -> dict[tuple[int, ...], float]:
    """The law of the first two tokens, from plain passes."""

    def law(text: list[int]) -> list[float]:
        filters = RowFilters.of([(params, 1)])
        p = target_laws(fresh_logits(TARGET, text)[-1:], filters)[0].double()
        return (p / p.sum()).tolist()

    return {
        (first, second): share * other
        for first, share in enumerate(law([*prompt]))
        for second, other in enumerate(law([*prompt, first]))
        if share * other > 0
    }


def chance_of(
    speculation: Speculation,
    *,
    drafters: Sequence[Decoder | Drafter] = (FIRST,),
    prompt: Sequence[int] = PROMPT,
    num_runs: int = NUM_RUNS,
    engine_seed: int = 0,
    device: str = "cpu",
    **fields: Any,
) -> float:
    """The G-test's chance for the first two of three tokens."""
    params = SamplingParams(max_tokens=3, n=num_runs, **fields)
    num_blocks = 256
    engine = toy_engine(
        deepcopy(TARGET).to(device),
        [
            model_drafter(deepcopy(each).to(device), num_blocks * 32)
            if isinstance(each, Decoder)
            else each
            for each in drafters
        ],
        speculation=speculation,
        config=EngineConfig(
            max_num_seqs=256, max_num_batched_tokens=8192, block_size=32, seed=engine_seed
        ),
        num_blocks=num_blocks,
    )
    sequences = engine.add("law", prompt, params)
    while engine.has_work:
        engine.step()
        engine.abort([each for each in sequences if each.num_output >= 2])  # two are judged
    counts = Counter(tuple(sequence.output.token_ids[:2]) for sequence in sequences)
    if drafters:  # the trees were of use, and not always
        accepted = sum(sequence.stats.num_accepted for sequence in sequences)
        assert 0.1 * num_runs < accepted < 1.99 * num_runs
    return g_test(counts, pair_law(params, prompt))


VERIFIERS: tuple[VerifierName, ...] = ("match", "topdown", "traversal")
DRAWS: tuple[Draw, ...] = ("iid", "without-replacement", "pick")
TREES = ("2,2", "3,1")


def law_family(num_runs: int) -> dict[str, float]:
    """Every verifier with every draw, trees and filters in turn; then what is special."""
    chances = {"plain": chance_of(Speculation(), drafters=(), num_runs=num_runs)}
    for row, verifier in enumerate(VERIFIERS):
        for column, draw in enumerate(DRAWS):
            tree = TREES[(row + column) % 2]
            chances[f"{verifier}, {draw}, {tree}"] = chance_of(
                Speculation(tree=tree, verifier=verifier, draw=draw), num_runs=num_runs
            )
    special: dict[str, tuple[Speculation, dict[str, Any]]] = {
        "two drafters, topdown": (
            Speculation(tree="2,1", verifier="topdown", draw="iid"),
            {"drafters": (FIRST, SECOND)},
        ),
        "two drafters, traversal": (
            Speculation(tree="2,2"),
            {"drafters": (FIRST, SECOND)},
        ),
        "filters": (Speculation(tree="2,2"), {"temperature": 0.8, "top_k": 5, "top_p": 0.9}),
        "seeded": (Speculation(tree="2,2"), {"seed": 5, "temperature": 1.3}),
        "hot drafter": (Speculation(tree="3,1", draft_temperature=2.0), {}),
    }
    grown: dict[str, tuple[Speculation, dict[str, Any]]] = {
        "calibrated": (Speculation(tree="calibrated", max_nodes=4), {}),
        "calibrated, topdown": (
            Speculation(tree="calibrated", max_nodes=5, verifier="topdown"),
            {"drafters": (FIRST, SECOND)},
        ),
        "best-first": (Speculation(tree="best-first", max_nodes=4), {"temperature": 1.2}),
        "best-first, picked": (Speculation(tree="best-first", max_nodes=4, draw="pick"), {}),
        "sequoia": (Speculation(tree="sequoia", max_nodes=4), {}),
        "n-gram and model": (
            Speculation(tree="calibrated", max_nodes=4),
            {"drafters": (NgramDrafter(), FIRST), "prompt": REPEATING},
        ),
        "a prediction": (
            Speculation(tree="calibrated", max_nodes=4),
            {"prediction": [2, 3, 2, 3]},
        ),
        "kseq, paths": (Speculation(tree="2x2", verifier="kseq"), {}),
        "gbv, paths": (Speculation(tree="2x2", verifier="gbv"), {}),
    }
    for name, (speculation, options) in special.items():
        chances[name] = chance_of(speculation, num_runs=num_runs, **options)
    for name, (speculation, options) in grown.items():
        chances[name] = chance_of(speculation, num_runs=num_runs // 2, **options)
    return chances


def check(chances: dict[str, float]) -> None:
    assert holm(list(chances.values())) > SIGNIFICANCE, sorted(chances.items(), key=lambda c: c[1])


def test_the_engine_follows_the_law() -> None:
    check(law_family(NUM_RUNS))


def test_the_engine_follows_the_law_far_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafters' laws are cut to three tokens of six; what is verified stays where it is."""
    far_away(monkeypatch, support=3)
    chances = {"plain": chance_of(Speculation(), drafters=(), num_runs=NUM_RUNS)}
    options: dict[str, Any]
    for tree, verifier, draw, options in (
        ("2,2", "traversal", "without-replacement", {}),
        ("3,1", "topdown", "iid", {}),
        ("2,2", "match", "pick", {}),
        ("2x2", "kseq", "iid", {}),
        ("2x2", "gbv", "iid", {}),
        ("calibrated", "auto", "auto", {"drafters": (NgramDrafter(), FIRST, SECOND)}),
        ("2,1", "traversal", "iid", {"drafters": (FIRST, SECOND), "top_p": 0.9}),
        ("2,2", "auto", "auto", {"seed": 5}),
    ):
        max_nodes = 4 if tree == "calibrated" else None
        speculation = Speculation(tree=tree, verifier=verifier, draw=draw, max_nodes=max_nodes)
        name = f"{verifier}, {draw}, {tree}"
        chances[name] = chance_of(speculation, num_runs=NUM_RUNS // 2, **options)
    check(chances)


@pytest.mark.gpu
def test_the_engine_follows_the_law_on_a_gpu() -> None:
    def chance(tree: str, verifier: VerifierName, draw: Draw, **options: Any) -> float:
        speculation = Speculation(tree=tree, verifier=verifier, draw=draw)
        return chance_of(speculation, device="cuda", **options)

    check(
        {
            "traversal": chance("2,2", "traversal", "without-replacement"),
            "topdown": chance("3,1", "topdown", "iid", drafters=(FIRST, SECOND)),
            "match": chance("2,2", "match", "pick"),
            "plain": chance("off", "auto", "auto", drafters=()),
        }
    )


@pytest.mark.slow
def test_the_engine_follows_the_law_closely() -> None:
    default = {"default": chance_of(Speculation(tree="2,2"), num_runs=200_000, engine_seed=1)}
    check(law_family(15_000) | default)


# --- the test is not blind ------------------------------------------------------------------------


def record_plain_law(
    tree: TokenTree, parent: int, rows: Floats, row: int, k: int, rng: Any, **of: Any
) -> list[int]:
    """Drawn without replacement, recorded as if drawn from the whole law each time."""
    tokens = draw_without_replacement(rows[row], k, rng)
    return [tree.add(parent, token, source=of["source"], law=Law(rows, row)) for token in tokens]


def record_picks_as_drawn(
    tree: TokenTree, parent: int, rows: Floats, row: int, k: int, rng: Any, **of: Any
) -> list[int]:
    """The likeliest tokens, recorded as if drawn: "top-k" read literally."""
    seen: tuple[int, ...] = ()
    nodes = []
    for token in top_k_tokens(rows[row], k):
        nodes.append(tree.add(parent, token, source=of["source"], law=Law(rows, row, seen)))
        seen = (*seen, token)
    return nodes


def drop_repeated_slots(
    tree: TokenTree, parent: int, rows: Floats, row: int, k: int, rng: Any, **of: Any
) -> list[int]:
    """Drawn independently, but a slot of a token that is there already is thrown away."""
    tokens = dict.fromkeys(int(rng.choice(VOCAB, p=rows[row] / rows[row].sum())) for _ in range(k))
    return [tree.add(parent, token, source=of["source"], law=Law(rows, row)) for token in tokens]


MUTATIONS = {  # the tree and the number of runs that show it
    "without replacement as plain": (record_plain_law, "3,1", 700),
    "picks as drawn": (record_picks_as_drawn, "3,1", 700),
    "repeated slots dropped": (drop_repeated_slots, "4", 4000),
}


@pytest.mark.parametrize("verifier", ["topdown", "traversal"])
@pytest.mark.parametrize("mutation", MUTATIONS)
def test_false_laws_are_seen(
    monkeypatch: pytest.MonkeyPatch, mutation: str, verifier: VerifierName
) -> None:
    add, tree, num_runs = MUTATIONS[mutation]
    monkeypatch.setattr(shapes, "add_without_replacement", add)
    speculation = Speculation(tree=tree, verifier=verifier, draw="without-replacement")
    assert chance_of(speculation, num_runs=num_runs) < BLIND


def test_another_target_is_seen() -> None:
    """Temperatures 5 % apart."""
    counts = pair_law(SamplingParams(temperature=1.0))
    law = pair_law(SamplingParams(temperature=0.95))
    total = 20_000
    observed = Counter({outcome: round(share * total) for outcome, share in counts.items()})
    assert g_test(observed, counts) > 0.99
    assert g_test(observed, law) < BLIND
