"""JSON by bounded schemas: valid, the same as plain decoding's, and how much faster with trees.

    python -m benchmarks.structured --check 200           # the pair in float32: validity, identity
    python -m benchmarks.structured --model 1b            # timed, against plain decoding

Schemas are made at random of bounded strings, integers, enums, booleans, arrays and objects; every
request has its own. Greedy, one request at a time when timed; ratios are medians of paired runs.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from benchmarks import write_result
from benchmarks.exactness import find_divergence
from benchmarks.latency import MODELS, _native_dtype, resolve
from benchmarks.prompts import load_chats
from benchmarks.throughput import interval_of_median
from specinfer.bench import Spread, System, measure
from specinfer.config import Speculation
from specinfer.llm import LLM
from specinfer.request import SamplingParams

NAMES = ("name", "age", "mood", "title", "city", "tags", "rating", "is_open", "author", "colour")
WORDS = ("happy", "sad", "red", "dark green", "small", "very large", "north", "south-west", "none")
MAX_TOKENS = 700


def random_schema(rng: np.random.Generator) -> dict[str, Any]:
    """An object of two to five bounded properties, all required."""
    names = rng.choice(NAMES, int(rng.integers(2, 6)), replace=False).tolist()
    properties = {name: _random_value(rng) for name in names}
    return {"type": "object", "properties": properties, "required": names}


def _random_value(rng: np.random.Generator, *, nested: bool = False) -> dict[str, Any]:
    kind = int(rng.integers(4 if nested else 6))
    if kind == 0:
        return {"type": "string", "maxLength": int(rng.integers(1, 25))}
    if kind == 1:
        return {"enum": rng.choice(WORDS, int(rng.integers(2, 5)), replace=False).tolist()}
    if kind == 2:
        low = int(rng.integers(-50, 100))
        return {"type": "integer", "minimum": low, "maximum": low + int(rng.integers(1, 2000))}
    if kind == 3:
        return {"type": "boolean"}
    if kind == 4:
        most = int(rng.integers(1, 4))
        return {"type": "array", "items": _random_value(rng, nested=True), "maxItems": most}
    inner = {name: _random_value(rng, nested=True) for name in ("first", "second")}
    return {"type": "object", "properties": inner, "required": list(inner)}


def conforms(value: Any, schema: dict[str, Any]) -> bool:
    """Whether a value is what such a schema asks for."""
    if "enum" in schema:
        return value in schema["enum"]
    if schema["type"] == "string":
        return isinstance(value, str) and len(value) <= schema["maxLength"]
    if schema["type"] == "boolean":
        return isinstance(value, bool)
    if schema["type"] == "integer":
        is_integer = isinstance(value, int) and not isinstance(value, bool)
        return is_integer and schema["minimum"] <= value <= schema["maximum"]
    if schema["type"] == "array":
        is_short = isinstance(value, list) and len(value) <= schema["maxItems"]
        return is_short and all(conforms(each, schema["items"]) for each in value)
    is_whole = isinstance(value, dict) and list(value) == schema["required"]
    return is_whole and all(conforms(value[k], v) for k, v in schema["properties"].items())


@dataclass(slots=True)
class Checked:
    """How many requests were as they should be.

    excused  parted from plain decoding at a near-tie of the two best tokens
    """

    requests: int = 0
    valid: int = 0
    identical: int = 0
    excused: int = 0
    tokens: int = 0
    steps: int = 0

    @property
    def is_good(self) -> bool:
        """Whether all were."""
        return self.valid == self.requests == self.identical + self.excused


def params_of(schema: dict[str, Any], tree: str, *, compact: bool) -> SamplingParams:
    """A greedy request for a schema."""
    return SamplingParams(
        temperature=0.0,
        max_tokens=MAX_TOKENS,
        structured_outputs={"json": schema, "disable_any_whitespace": compact},
        speculation={"tree": tree},
    )


def check(llm: LLM, prompts: Sequence[list[int]], *, compact: bool, seed: int = 0) -> Checked:
    """Every prompt with a schema of its own: with trees, and plainly."""
    rng = np.random.default_rng(seed)
    schemas = [random_schema(rng) for _ in prompts]
    drafted = llm.generate(prompts, [params_of(each, "auto", compact=compact) for each in schemas])
    asked = [params_of(each, "off", compact=compact) for each in schemas]
    checked = Checked(requests=len(prompts))
    for prompt, schema, params, alone, output in zip(
        prompts, schemas, asked, llm.generate(prompts, asked), drafted, strict=True
    ):
        plain, said = alone.outputs[0], output.outputs[0]
        with suppress(ValueError):
            checked.valid += conforms(json.loads(said.text), schema)
        checked.tokens += output.stats.num_output_tokens
        checked.steps += output.stats.num_target_steps
        if plain.token_ids == said.token_ids:
            checked.identical += plain.finish_reason == said.finish_reason
            continue
        parted = find_divergence(llm.engine, prompt, params, plain.token_ids, said.token_ids)
        checked.excused += parted is not None and parted.is_excused
    return checked


def time_trees(
    llm: LLM, prompts: Sequence[list[int]], *, compact: bool
) -> dict[str, tuple[list[float], list[float]]]:
    """Per system its rates, and their ratios to plain decoding of the same prompt and schema."""
    rng = np.random.default_rng(1)
    schemas = {tuple(prompt): random_schema(rng) for prompt in prompts}

    def system(tree: str) -> System:
        def run(prompt: Sequence[int]) -> int:
            params = params_of(schemas[tuple(prompt)], tree, compact=compact)
            return llm.generate(list(prompt), params)[0].stats.num_output_tokens

        return run

    rates = measure({tree: system(tree) for tree in ("off", "auto")}, prompts, warm_up=2)
    return {
        name: (own, [a / b for a, b in zip(own, rates["off"], strict=True)])
        for name, own in rates.items()
    }


def main() -> int:
    """Measure, print, and write JSON; 1 where something checked was not as it should be."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--check", type=int, default=0, metavar="REQUESTS")
    parser.add_argument("--model", choices=MODELS, default="1b")
    parser.add_argument("--drafter", choices=("bare", "1/50"), default="bare")
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default=_native_dtype())
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, metavar="FILE")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    console, rows, is_good = Console(width=120), {}, True
    model, dtype = ("pair", "float32") if args.check else (args.model, args.dtype)
    target, drafter, note = resolve(model, args.drafter)
    llm = LLM(
        target, drafters=[drafter], dtype=dtype, speculation=Speculation(), show_progress=False
    )
    encode = llm.tokenizer.apply_chat_template
    what = f"{note}; {dtype}, {args.threads} threads, greedy"
    num = args.check or args.prompts
    chats = load_chats(encode=encode)
    prompts = [encode(chats[index % len(chats)]) for index in range(num)]
    console.print(f"{what}; {num} prompts, each with a schema of its own")
    for name, compact in (("any whitespace", False), ("one line", True)):
        if args.check:
            checked = check(llm, prompts, compact=compact)
            is_good = is_good and checked.is_good
            rows[name] = asdict(checked) | {"tokens_per_step": checked.tokens / checked.steps}
            console.print(f"  {name:16} {rows[name]}")
            continue
        for system, (rates, ratios) in time_trees(llm, prompts, compact=compact).items():
            low, high = interval_of_median(ratios)
            rows[f"{name}, {system}"] = {
                "tokens_per_s": Spread.of(rates).median,
                "to_plain": asdict(Spread.of(ratios)),
                "interval": (low, high),
            }
            shown = f"{Spread.of(ratios)} × plain, 95 % {low:.2f}–{high:.2f}"
            console.print(f"  {name:16} {system:6} {shown}")
    if args.json:
        write_result(args.json, what, rows=rows)
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
