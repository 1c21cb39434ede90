"""What the bundled pair's drafts are worth: the tables that every new drafter starts from.

    python -m benchmarks.priors --chats chats.jsonl

writes specinfer/draft/priors.json. `chats.jsonl` holds `{"messages": [{"role", "content"}, …]}` a
line and must share nothing with tests/data, on which acceptance is measured. The priors shipped
were made from 480 training conversations of the pair (80 of each source), first turns of at most
64 tokens, none twice.
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from specinfer import LLM, SamplingParams, Speculation
from specinfer.draft.calibration import Calibration, kind_of
from specinfer.progress import show_loading

PRIORS = Path(__file__).resolve().parent.parent / "specinfer" / "draft" / "priors.json"

WEIGHT = 3000.0
"""A table weighs as much as so many slots at most, so that other drafters soon outweigh it."""

SAMPLING: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.8, "seed": 1},
    {"temperature": 0.3},
    {"temperature": 0.6},
    {"temperature": 1.0},
)
"""One for each regime."""


def read_prompts(file: Path, llm: LLM, longest: int = 64) -> list[list[int]]:
    """First turns as token ids, none twice."""
    prompts: dict[tuple[int, ...], None] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        ids = llm.tokenizer.apply_chat_template([json.loads(line)["messages"][0]])
        if len(ids) <= longest:
            prompts[tuple(ids)] = None
    return [list(prompt) for prompt in prompts]


def edited(tokens: Sequence[int], rng: np.random.Generator, vocab_size: int) -> list[int]:
    """A text with about one token in twenty replaced, left out or put in."""
    text: list[int] = []
    for token in tokens:
        other, chance = int(rng.integers(4, vocab_size)), rng.random() * 60
        if chance >= 3:
            text.append(token)
        elif chance < 2:
            text += [other] if chance < 1 else [other, token]
    return text


def learn(llm: LLM, prompts: Sequence[list[int]], num_tokens: int) -> None:
    """Let an engine see slots of every regime; greedy texts once more with predictions."""
    rng = np.random.default_rng(0)
    for fields in SAMPLING:
        params = SamplingParams(max_tokens=num_tokens, **fields)
        outputs = llm.generate(prompts, params)
        texts = [list(output.outputs[0].token_ids) for output in outputs]
        predictions = [edited(text, rng, llm.engine.target.vocab_size) for text in texts]
        for index in range(0, len(texts), 4):  # one prediction in four has nothing to do with it
            predictions[index] = texts[index - 1]
        predicted = [
            SamplingParams(max_tokens=num_tokens, prediction=prediction or None, **fields)
            for prediction in predictions
        ]
        llm.engine.set_speculation(Speculation(tree="calibrated", max_nodes=32))
        llm.generate(prompts[: len(prompts) // 3], predicted[: len(prompts) // 3])


def priors_of(calibration: Calibration) -> dict[str, Any]:
    """The tables in the form of priors.json."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "calibration.json"
        calibration.save(file)
        content = json.loads(file.read_text(encoding="utf-8"))
    priors: dict[str, Any] = {"places": {}}
    for table in content["tables"]:
        kind = priors.setdefault(kind_of(table["drafter"]), {})
        kind[table["regime"]] = {
            name: scaled(table[name]["trials"], table[name]["hits"]) for name in ("before", "after")
        }
    for regime, (trials, hits) in content["places"].items():
        counts = scaled(trials, hits)
        priors["places"][regime] = [counts["trials"], counts["hits"]]
    return priors


def scaled(trials: Any, hits: Any) -> dict[str, Any]:
    """Counts that weigh at most WEIGHT together."""
    share = min(1.0, WEIGHT / float(np.sum(trials)))
    kept = np.maximum(0.01, np.round(np.array(trials) * share, 2))
    rates = np.array(hits) / np.array(trials)
    return {"trials": kept.tolist(), "hits": np.round(rates * kept, 3).tolist()}


def main() -> None:
    """Learn with the model drafter, then with n-grams alone, and write the priors."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--chats", type=Path, required=True, metavar="FILE")
    parser.add_argument("--tokens", type=int, default=160, help="per prompt")
    parser.add_argument("--out", type=Path, default=PRIORS, metavar="FILE")
    args = parser.parse_args()
    calibration = Calibration(bundled=False)
    for drafter in ("zoo:parley-draft", "ngram"):
        with show_loading(None):
            llm = LLM(
                "zoo:parley",
                drafters=[drafter],
                speculation=Speculation(tree="calibrated", max_nodes=32),
                dtype="float32",
            )
        llm.engine.speculator.calibration = calibration
        prompts = read_prompts(args.chats, llm)
        learn(llm, prompts if drafter != "ngram" else prompts[::3], args.tokens)
    args.out.write_text(
        json.dumps(priors_of(calibration), separators=(",", ":")) + "\n", encoding="utf-8"
    )


if __name__ == "__main__":
    main()
