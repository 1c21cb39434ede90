"""`specinfer bench latency`: plain against tree decoding on this machine."""

import json as jsonlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from specinfer.cli.generate import as_conversation, read_prompt
from specinfer.cli.options import Asked
from specinfer.cli.report import check_writable
from specinfer.config import Speculation
from specinfer.errors import ConfigError
from specinfer.outputs import RequestOutput
from specinfer.request import SamplingParams

if TYPE_CHECKING:
    from specinfer.bench import Spread, System
    from specinfer.llm import LLM

QUESTIONS = (
    "Tell me a short story about a lost kite.",
    "I would like to book a table for two tonight.",
    "Write a fable about a fox and a river.",
    "Tom has 12 apples and gives away 5. How many are left?",
    "How do I list all files in a folder, newest first?",
    "I want to order a large pizza with mushrooms.",
)
"""Asked when no prompts are given: what the bundled pair was trained to talk about."""


@dataclass(frozen=True, slots=True)
class Result:
    """One system's runs.

    runs       tokens per second, prompt by prompt, round by round
    speedup    over plain decoding, each run against its neighbour
    same_text  runs that wrote the tokens that plain decoding wrote
    """

    tokens_per_s: "Spread"
    speedup: "Spread"
    tokens_per_step: float
    same_text: int
    runs: list[float]


def bench_latency(
    prompts: Annotated[
        list[str] | None,
        typer.Argument(help="What to ask; nothing: a few bundled questions.", show_default=False),
    ] = None,
    file: Annotated[
        Path | None, typer.Option("--file", "-f", help="Prompts from a file, one per line.")
    ] = None,
    pairs: Annotated[
        int, typer.Option("--pairs", min=1, help="How often each prompt is run by each system.")
    ] = 3,
    json: Annotated[
        Path | None, typer.Option("--json", help='Write all runs to a file; "-": to stdout.')
    ] = None,
    *,
    asked: Asked,
) -> None:
    """Time plain decoding against the tree of --tree, in turns, on the same prompts.

    Greedy and 64 tokens long unless --temperature and --max-tokens say otherwise. Prompts go
    through the chat template if the model has one.
    """
    if not asked.drafters or not asked.speculation.num_nodes(len(asked.drafters)):
        raise ConfigError("there is nothing to compare: give --drafter and a --tree")
    if asked.sampling.get("n", 1) != 1:
        raise ConfigError(f"n={asked.sampling['n']}: latency is that of one continuation")
    texts = _read_prompts(prompts or [], file)
    to_stdout = json is not None and str(json) == "-"
    if json is not None and not to_stdout:
        check_writable(json)
    asked = replace(asked, sampling={"temperature": 0.0, "max_tokens": 64} | dict(asked.sampling))
    llm = asked.load()
    results = _measure(llm, asked, [_encode(llm, text) for text in texts], pairs)
    asked.keep(llm)
    if not to_stdout:
        _print_table(results, asked.speculation.tree)
        typer.echo(f"medians of {len(texts)} prompts × {pairs} pairs, run in turns")
        typer.echo(_explain(llm, asked, results), nl=False)
    if json is not None:
        found = jsonlib.dumps(_describe(asked, texts, pairs) | _to_objects(results))
        if to_stdout:
            typer.echo(found)
        else:
            json.write_text(found + "\n", encoding="utf-8")
            typer.echo(f"wrote {json}", err=True)


def _read_prompts(prompts: list[str], file: Path | None) -> list[str]:
    texts = [read_prompt(prompt, None) for prompt in prompts]
    if file is not None:
        texts += [line for line in read_prompt(None, file).splitlines() if line.strip()]
    return texts or list(QUESTIONS)


def _encode(llm: "LLM", text: str) -> list[int]:
    if llm.tokenizer.chat_templates:
        return llm.tokenizer.apply_chat_template(as_conversation(text))
    return llm.tokenizer.encode(text)


def _measure(llm: "LLM", asked: Asked, prompts: list[list[int]], pairs: int) -> dict[str, Result]:
    """One engine takes both parts, so that the weights are there once."""
    from specinfer.bench import Spread, measure, ratio

    params = asked.params(llm)
    kept: dict[str, list[RequestOutput]] = {"plain": [], "tree": []}
    trees = {"plain": Speculation(tree="off"), "tree": asked.speculation}
    with show_progress(len(trees) * (pairs * len(prompts) + 1)) as advance:
        systems = {
            name: _system(llm, tree, params, kept[name], advance) for name, tree in trees.items()
        }
        rates = measure(systems, prompts * pairs)
    results = {}
    for name in systems:
        outputs, plain = kept[name][1:], kept["plain"][1:]  # without the warm-up
        num_steps = sum(output.stats.num_target_steps for output in outputs)
        num_tokens = sum(output.stats.num_output_tokens for output in outputs)
        same = (_tokens(a) == _tokens(b) for a, b in zip(outputs, plain, strict=True))
        results[name] = Result(
            Spread.of(rates[name]),
            ratio(rates, name, "plain"),
            num_tokens / num_steps,
            sum(same),
            rates[name],
        )
    return results


def _system(
    llm: "LLM",
    speculation: Speculation,
    params: SamplingParams,
    keep: list[RequestOutput],
    advance: Callable[[], None],
) -> "System":
    def run(prompt: Sequence[int]) -> int:
        llm.engine.set_speculation(speculation)
        [output] = llm.generate([list(prompt)], params)
        keep.append(output)
        advance()
        return output.stats.num_output_tokens

    return run


def _tokens(output: RequestOutput) -> list[int]:
    return output.outputs[0].token_ids


@contextmanager
def show_progress(total: int) -> Iterator[Callable[[], None]]:
    """A bar where standard error is a terminal; call what it gives once per piece of work."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bars:
        task = bars.add_task("measuring", total=total)
        yield lambda: bars.advance(task)


def _describe(asked: Asked, texts: list[str], pairs: int) -> dict[str, Any]:
    return {
        "model": asked.loading.model,
        "drafters": list(asked.drafters),
        "speculation": asdict(asked.speculation)
        | {"max_nodes": asked.speculation.num_nodes(len(asked.drafters))},
        "sampling": dict(asked.sampling),
        "prompts": texts,
        "pairs": pairs,
    }


def _to_objects(results: dict[str, Result]) -> dict[str, Any]:
    return {"systems": {name: asdict(result) for name, result in results.items()}}


def _print_table(results: dict[str, Result], tree: str) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for column in ("tokens/s (quartiles)", "speed-up", "tokens/step", "same text"):
        table.add_column(column, justify="right", overflow="fold")
    for name, result in results.items():
        speed = result.tokens_per_s
        table.add_row(
            f"tree {tree}" if name == "tree" else name,
            f"{speed.median:.0f} ({speed.low:.0f}–{speed.high:.0f})",
            str(result.speedup),
            f"{result.tokens_per_step:.2f}",
            f"{result.same_text} of {len(result.runs)}",
        )
    Console().print(table)


def _explain(llm: "LLM", asked: Asked, results: dict[str, Result]) -> str:
    """Why texts can differ, where some do."""
    if all(result.same_text == len(result.runs) for result in results.values()):
        return ""
    if not asked.params(llm).is_greedy and asked.sampling.get("seed") is None:
        return "texts differ because they are sampled: --seed makes them comparable\n"
    dtype = str(llm.engine.target.decoder.dtype).removeprefix("torch.")
    if dtype == "float32":
        return "texts differ, which float32 leaves to the rarest near-ties: please report it\n"
    return (
        f"rounding to {dtype} can decide between two nearly equal tokens, and it differs with the "
        "number of tokens in a step: --dtype float32 shows whether that is why texts differ\n"
    )
