"""Speculation without a drafter model: n-grams, and a text the user predicted, against plain.

    python -m benchmarks.prediction --model 1b

Predictions are made from the model's own greedy output: with one token in twenty replaced, left out
or put in, and, unrelated, the output for another prompt. Greedy, one request at a time; ratios are
medians of paired runs.
"""

import argparse
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from rich.console import Console

from benchmarks import write_result
from benchmarks.latency import MODELS, _native_dtype, resolve
from benchmarks.priors import edited
from benchmarks.prompts import load_chats
from benchmarks.throughput import interval_of_median
from specinfer.bench import Spread, System, measure
from specinfer.config import Speculation
from specinfer.llm import LLM
from specinfer.request import SamplingParams


def greedy_texts(llm: LLM, prompts: Sequence[list[int]], num_tokens: int) -> list[list[int]]:
    """What the model says to each prompt."""
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    return [list(output.outputs[0].token_ids) for output in llm.generate(prompts, params)]


def systems_of(
    llm: LLM,
    prompts: Sequence[list[int]],
    predictions: dict[str, list[list[int]]],
    num_tokens: int,
) -> dict[str, System]:
    """Plain, n-grams, and n-grams with each kind of prediction."""
    number = {tuple(prompt): index for index, prompt in enumerate(prompts)}

    def system(tree: str, texts: list[list[int]] | None) -> System:
        def run(prompt: Sequence[int]) -> int:
            llm.engine.set_speculation(Speculation(tree=tree))
            params = SamplingParams(
                temperature=0.0,
                max_tokens=num_tokens,
                ignore_eos=True,
                prediction=texts[number[tuple(prompt)]] if texts else None,
            )
            return llm.generate(list(prompt), params)[0].stats.num_output_tokens

        return run

    return {
        "plain": system("off", None),
        "ngram": system("auto", None),
        **{name: system("auto", texts) for name, texts in predictions.items()},
    }


def main() -> None:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--model", choices=MODELS, default="1b")
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=96, help="per prompt")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default=_native_dtype())
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    target, _, note = resolve(args.model, "bare")
    llm = LLM(target, drafters=["ngram"], dtype=args.dtype, max_num_seqs=16)
    encode = llm.tokenizer.apply_chat_template
    prompts = [encode(chat) for chat in load_chats(args.prompts, encode=encode)]
    texts = greedy_texts(llm, prompts, args.tokens)
    rng = np.random.default_rng(0)
    vocab_size = llm.engine.target.vocab_size
    predictions = {
        "prediction, 1 edit in 20": [edited(text, rng, vocab_size) for text in texts],
        "prediction, exact": texts,
        "prediction, unrelated": [*texts[1:], texts[0]],
    }
    systems = systems_of(llm, prompts, predictions, args.tokens)
    rates = measure(systems, prompts, warm_up=2)
    what = f"{note.split(',')[0]}; {args.dtype}, {args.threads} threads, {args.tokens} tokens"
    console = Console(width=120)
    console.print(f"{what}; {len(prompts)} prompts, greedy, batch 1")
    rows = {}
    for name in systems:
        ratios = [a / b for a, b in zip(rates[name], rates["plain"], strict=True)]
        rows[name] = {
            "tokens_per_s": Spread.of(rates[name]).median,
            "to_plain": asdict(Spread.of(ratios)),
            "interval": interval_of_median(ratios),
        }
        low, high = interval_of_median(ratios)
        console.print(f"  {name:28} {Spread.of(ratios)} × plain, 95 % {low:.2f}–{high:.2f}")
    if args.json:
        write_result(args.json, what, rows=rows)


if __name__ == "__main__":
    main()
