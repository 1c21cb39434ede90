"""What a run did, for people (`--stats`) and for programs (`--json`)."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from specinfer.errors import ConfigError
from specinfer.outputs import RequestOutput, RequestStats

if TYPE_CHECKING:
    from specinfer.llm import LLM


def to_object(output: RequestOutput) -> dict[str, Any]:
    """The output's fields as they are in Python, with the ratio that `stats` computes."""
    fields = asdict(output)
    fields["stats"]["tokens_per_step"] = output.stats.tokens_per_step
    return fields


def print_json(value: Any) -> None:
    """One line on standard output."""
    typer.echo(json.dumps(value, ensure_ascii=False))


def timing(llm: "LLM", wall_s: float) -> dict[str, Any]:
    """Where the time went since the engine's counts were reset, and how many goals were met."""
    stats = llm.engine.stats
    parts = dict(stats.seconds)
    parts["other"] = max(0.0, wall_s - sum(parts.values()))
    return {
        "wall_s": wall_s,
        "num_steps": stats.num_steps,
        "num_goals": stats.num_goals,
        "num_goals_met": stats.num_goals_met,
        "seconds": parts,
    }


def add_up(outputs: Sequence[RequestOutput]) -> RequestStats:
    """The requests' counts together."""
    total = RequestStats()
    for output in outputs:
        total.add(output.stats)
    return total


def tell_full(outputs: Sequence[RequestOutput], max_model_len: int, max_tokens: int | None) -> None:
    """Say of texts that they end where the context does, on standard error.

    max_tokens  as it was asked for
    """
    ends = [
        choice.finish_reason == "length"
        and len(choice.token_ids) != max_tokens
        and len(output.prompt_token_ids) + len(choice.token_ids) >= max_model_len
        for output in outputs
        for choice in output.outputs
    ]
    if any(ends):
        which = "the text ends" if len(ends) == 1 else f"{sum(ends)} of {len(ends)} texts end"
        typer.echo(f"({which} where the context is full: max_model_len={max_model_len})", err=True)


def print_stats(stats: RequestStats, time: Mapping[str, Any], goal_s: float | None = None) -> None:
    """Tokens per step, acceptance, latency goal and time by part, on standard error.

    goal_s  what was asked for as target_tpot_s
    """
    wall_s, num_steps = time["wall_s"], time["num_steps"]
    rate = stats.num_output_tokens / wall_s if wall_s else 0.0
    rows = [
        (
            "tokens",
            f"{stats.num_output_tokens} in {stats.num_target_steps} steps = "
            f"{stats.tokens_per_step:.2f} per step",
        ),
        ("speed", f"{rate:.1f} tokens/s ({wall_s:.2f} s)"),
    ]
    if goal_s is not None and time["num_goals"]:
        rows.append(("goal", _goal(stats, time, goal_s)))
    if stats.num_drafted:
        share = stats.num_accepted / stats.num_drafted
        rows += [
            ("drafted", f"{stats.num_drafted}, accepted {stats.num_accepted} ({share:.0%})"),
            ("by depth", _depths(stats)),
            *(("by source", f"{name} {count}") for name, count in stats.accepted_by_source.items()),
        ]
    for part, seconds in time["seconds"].items():
        share = seconds / wall_s if wall_s else 0.0
        per_step = 1e3 * seconds / num_steps if num_steps else 0.0
        rows.append((part, f"{per_step:7.2f} ms per step {share:6.1%}"))
    for name, text in rows:
        typer.echo(f"{name:>10}  {text}", err=True)


def _goal(stats: RequestStats, time: Mapping[str, Any], goal_s: float) -> str:
    """Whether the time per token was as short as asked; of several texts the slowest counts."""
    num, num_met = time["num_goals"], time["num_goals_met"]
    took = f"{1e3 * stats.tpot_s:.1f} ms per token"
    if num == 1:
        verdict = f"{'met' if num_met else 'missed'}: {took}"
    else:
        verdict = f"met by {num_met} of {num}: at most {took}"
    return f"{verdict} (asked for {1e3 * goal_s:.1f})"


def _depths(stats: RequestStats) -> str:
    """Share of the steps that accepted a token at depth 1, 2, ..."""
    shares = (count / stats.num_target_steps for count in stats.accepted_by_depth)
    return " ".join(f"{depth}:{share:.0%}" for depth, share in enumerate(shares, start=1))


def check_writable(file: Path) -> None:
    """Refuse what could not be written before anything is computed."""
    if file.is_dir() or not file.absolute().parent.is_dir():
        raise ConfigError(f"{file} cannot be written: give a file in a folder that exists")
