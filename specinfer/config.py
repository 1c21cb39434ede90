"""What was asked for, as frozen values that refuse what cannot be true.

Each class checks itself when it is made, so that nothing downstream has to. What becomes true
only when the model is known (lengths, pages, dtype) is resolved once, in `engine/build.py`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from specinfer.errors import ConfigError

Draw = Literal["auto", "iid", "without-replacement", "pick"]
VerifierName = Literal["auto", "match", "topdown", "traversal", "kseq", "gbv"]

Control = Literal["auto", "gammatune", "smartspec"]

SchedulingPolicy = Literal["fcfs", "priority", "predicted"]

IID_VERIFIERS = ("kseq", "gbv")
"""Exact for slots drawn independently from one law, and for nothing else."""

PAPER_TREE = "1,1,3,1,1,1,1,1"
"""The shape SpecInfer was evaluated with: depth 8, 20 nodes."""

MAX_DEPTH = 256
"""Levels of a tree: far beyond what is ever accepted, and what a recursive verifier can walk."""

TREE_NAMES = ("auto", "off", "calibrated", "best-first", "sequoia")

GROWN_TREES = ("auto", "calibrated", "best-first")
"""Trees that grow where acceptance is likeliest; "auto" at prices set by the controller."""

_DEFAULT_NODES = {"auto": 64, "calibrated": 32, "best-first": 32, "sequoia": 64}
_DEFAULT_DEPTH = 16
_MAX_NODES = 2048

LARGEST = 1e30
"""Of temperatures and biases: with all others at their largest, float32 still holds a logit."""


def parse_tree(text: str) -> tuple[int, ...]:
    """Read a fixed shape: `"1,1,3"` means 1 child, then 1, then 3 children per node of a level.

    raises  ConfigError if a width is not a whole number of at least 1, or there are too many
    """
    words = [word.strip() for word in text.split(",")] if isinstance(text, str) else []
    if not words or not all(re.fullmatch(r"0*[1-9][0-9]{0,8}", word) for word in words):
        raise ConfigError(
            f"tree={text!r} is not a tree shape: give widths of at least 1 separated by commas, "
            f'such as "{PAPER_TREE}", paths such as "4x8", or one of {", ".join(TREE_NAMES)}'
        )
    if len(words) > MAX_DEPTH:
        raise ConfigError(f"tree has {len(words)} levels: give at most {MAX_DEPTH}")
    return tuple(int(word) for word in words)


def parse_paths(text: str) -> tuple[int, int] | None:
    """Read `"4x8"`, 4 independent paths of 8 tokens; None where the text is something else.

    raises  ConfigError if there are too many levels
    """
    found = re.fullmatch(r"\s*0*([1-9][0-9]{0,3})x0*([1-9][0-9]{0,3})\s*", text)
    if found is None:
        return None
    num_paths, depth = int(found[1]), int(found[2])
    if depth > MAX_DEPTH:
        raise ConfigError(f"tree has {depth} levels: give at most {MAX_DEPTH}")
    return num_paths, depth


def count_nodes(widths: tuple[int, ...]) -> int:
    """How many nodes a fixed shape has at most, without the root."""
    total, level = 0, 1
    for width in widths:
        level *= width
        total += level
    return total


def is_number(value: object) -> bool:
    """Whether this is a number; True and False are not."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_integer(name: str, value: object, *, least: int) -> None:
    """Refuse what is no whole number of at least `least`.

    raises  ConfigError
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise ConfigError(f"{name}={value!r} must be a whole number")
    if value < least:
        raise ConfigError(f"{name}={value} must be at least {least}")


@dataclass(frozen=True, slots=True)
class Speculation:
    """How to guess ahead and how to verify.

    tree               "auto" (grown by learnt acceptance, as large as measured times make it worth)
                       | "off" | "calibrated" (the same at a given size) | "best-first" (by what
                       drafters say) | "sequoia" | widths such as "1,1,3,1,1,1,1,1" | independent
                       paths such as "4x8"
    verifier           "auto" (traversal) | "match" | "topdown" | "traversal", or, to be measured
                       against, "kseq" | "gbv"; greedy and seeded requests have one lawful token
                       per node and are always matched
    max_nodes          drafted nodes per request and step, those of all drafters together, without
                       the root: levels of a shape that do not fit are left out; None: as the
                       shape says, else 32, at most 64 for "auto" and "sequoia", which then have
                       the size that measured times make best
    max_depth          deepest node, in tokens after the root; None: as the shape says, else 16
    draft_temperature  the drafters' temperature, in [1e-5, 1e30]; None: the request's own
    control            who sets the length of a chain in each step: "auto" (nobody; prices set the
                       size of tree="auto"), or, to be measured against, "gammatune" | "smartspec"
    draw               how slots are drawn: "auto" (picks when greedy, seeded, matched or no warmer
                       than 0.05, else without replacement) | "iid" | "without-replacement" | "pick"
    """

    tree: str = "auto"
    verifier: VerifierName = "auto"
    max_nodes: int | None = None
    max_depth: int | None = None
    draft_temperature: float | None = None
    draw: Draw = "auto"
    control: Control = "auto"

    def __post_init__(self) -> None:
        if self.tree not in TREE_NAMES and not self._is_paths:
            parse_tree(self.tree)
        if self.verifier not in get_args(VerifierName):
            raise ConfigError(
                f"verifier={self.verifier!r}: use one of {', '.join(get_args(VerifierName))}"
            )
        if self.draw not in get_args(Draw):
            raise ConfigError(f"draw={self.draw!r}: use one of {', '.join(get_args(Draw))}")
        if self.control not in get_args(Control):
            raise ConfigError(
                f"control={self.control!r}: use one of {', '.join(get_args(Control))}"
            )
        if self.control != "auto" and not re.fullmatch(r"1(,1)*", self.tree):
            raise ConfigError(
                f"control={self.control!r} sets the length of a chain: give the longest as "
                f'tree="1,1,1,1", not tree={self.tree!r}'
            )
        for name in ("max_nodes", "max_depth"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), least=1)
        if self.max_nodes is not None and self.max_nodes > _MAX_NODES:
            raise ConfigError(f"max_nodes={self.max_nodes} must be at most {_MAX_NODES}")
        if self.max_depth is not None and self.max_depth > MAX_DEPTH:
            raise ConfigError(f"max_depth={self.max_depth} must be at most {MAX_DEPTH}")
        temperature = self.draft_temperature
        if temperature is not None and not (
            is_number(temperature) and 1e-5 <= temperature <= LARGEST
        ):
            raise ConfigError(f"draft_temperature={temperature!r} must be in [1e-5, 1e30]")
        self._check_independence()

    def _check_independence(self) -> None:
        """Some verifiers are exact for independent draws alone, and some trees never have them."""
        if self.verifier in IID_VERIFIERS and self.draw not in ("auto", "iid"):
            raise ConfigError(f'verifier={self.verifier!r} needs draw="iid", not {self.draw!r}')
        if self.tree in GROWN_TREES:
            if self.draw == "iid":
                raise ConfigError(
                    f"tree={self.tree!r} draws without replacement: leave draw out, or take a "
                    f'shape such as "{PAPER_TREE}"'
                )
            if self.verifier in IID_VERIFIERS:
                raise ConfigError(
                    f"verifier={self.verifier!r} needs independent draws, which "
                    f'tree={self.tree!r} does not make: take paths such as "4x8"'
                )

    @property
    def _is_paths(self) -> bool:
        return isinstance(self.tree, str) and parse_paths(self.tree) is not None

    @property
    def is_off(self) -> bool:
        """Whether nothing is guessed."""
        return self.tree == "off"

    @property
    def needs_times(self) -> bool:
        """Whether steps have to be measured before it can be carried out."""
        is_sized = self.tree == "auto" or (self.tree == "sequoia" and self.max_nodes is None)
        return is_sized or self.control == "smartspec"

    @property
    def depth(self) -> int:
        """The deepest node a tree may have."""
        if self.is_off:
            return 0
        if self.tree in TREE_NAMES:
            return self.max_depth or _DEFAULT_DEPTH
        paths = parse_paths(self.tree)
        depth = paths[1] if paths else len(parse_tree(self.tree))
        return min(depth, self.max_depth or depth)

    def num_nodes(self, num_drafters: int) -> int:
        """Drafted nodes a tree of so many drafters may have.

        returns  0 for no speculation
        raises   ConfigError if there is no drafter for what was asked, or max_nodes leaves nothing
        """
        if num_drafters == 0 and self not in (Speculation(), Speculation(tree="off")):
            asked = ", ".join(
                f"{field.name}={getattr(self, field.name)!r}"
                for field in fields(self)
                if getattr(self, field.name) != field.default
            )
            raise ConfigError(f"{asked} needs a drafter: give one (--drafter), or leave it out")
        if self.is_off or num_drafters == 0:
            return 0
        if self.tree in TREE_NAMES:
            return self.max_nodes or _DEFAULT_NODES[self.tree]
        levels = self._level_counts()
        fitting = [count * num_drafters for count in levels]
        if self.max_nodes is not None:
            fitting = [count for count in fitting if count <= self.max_nodes]
            if not fitting:
                raise ConfigError(
                    f"max_nodes={self.max_nodes} has no room for the first level of "
                    f'tree={self.tree!r} of {num_drafters} drafters: raise it, or use tree="off"'
                )
        return fitting[-1]

    def _level_counts(self) -> list[int]:
        """Nodes of one drafter's shape down to depth 1, 2, …"""
        paths = parse_paths(self.tree)
        if paths is not None:
            return [paths[0] * depth for depth in range(1, self.depth + 1)]
        widths = parse_tree(self.tree)
        return [count_nodes(widths[:depth]) for depth in range(1, self.depth + 1)]


def read_speculation(options: Mapping[str, Any]) -> Speculation:
    """`Speculation` from its fields' names and values.

    raises  ConfigError for a name it does not have
    """
    known = [each.name for each in fields(Speculation)]
    for name in options:
        if name not in known:
            raise ConfigError(f"speculation has no {name!r}: known are {', '.join(known)}")
    return Speculation(**options)


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """The engine's limits.

    max_num_seqs            sequences computed in one step; a request has n of them
    max_num_batched_tokens  tokens computed in one step: prompt chunks, roots and drafted nodes
    chunked_prefill_size    prompt tokens computed in one step while other requests write: how long
                            a long prompt can hold them up
    max_model_len           prompt + output tokens of one request; None: the model's own limit
    kv_cache_memory         bytes for pages, the drafters' included, as a number or such as "4GiB",
                            "512M" or "2.5GB"; None: enough for max_num_seqs requests of
                            max_model_len, at most a quarter of the free memory
    kv_cache_memory_fraction  the same as a part of the memory that is free once the weights are
                            read, in (0, 1)
    enable_prefix_caching   keep the K and V of past texts, and share those of equal beginnings
    scheduling_policy       who waits is served in the order of arrival ("fcfs"), of priorities
                            ("priority") or of the output that past ones make likely, the shortest
                            first ("predicted"); waiting counts in each, so nobody waits for ever
    block_size              tokens per page
    seed                    base of the randomness of unseeded requests
    """

    max_num_seqs: int = 16
    max_num_batched_tokens: int = 2048
    chunked_prefill_size: int = 512
    max_model_len: int | None = None
    kv_cache_memory: int | str | None = None
    kv_cache_memory_fraction: float | None = None
    enable_prefix_caching: bool = True
    scheduling_policy: SchedulingPolicy = "fcfs"
    block_size: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        limits = ("max_num_seqs", "max_num_batched_tokens", "chunked_prefill_size", "block_size")
        for name in limits:
            check_integer(name, getattr(self, name), least=1)
        if self.max_model_len is not None:
            check_integer("max_model_len", self.max_model_len, least=1)
        check_integer("seed", self.seed, least=0)
        _ = self.kv_cache_bytes
        fraction = self.kv_cache_memory_fraction
        if fraction is not None:
            if not is_number(fraction) or not 0 < fraction < 1:
                raise ConfigError(
                    f"kv_cache_memory_fraction={fraction!r} must be between 0 and 1, such as 0.5"
                )
            if self.kv_cache_memory is not None:
                raise ConfigError(
                    "kv_cache_memory and kv_cache_memory_fraction both say how much: give one"
                )
        if not isinstance(self.enable_prefix_caching, bool):
            raise ConfigError(
                f"enable_prefix_caching={self.enable_prefix_caching!r} must be True or False"
            )
        if self.scheduling_policy not in get_args(SchedulingPolicy):
            raise ConfigError(
                f"scheduling_policy={self.scheduling_policy!r}: use one of "
                f"{', '.join(get_args(SchedulingPolicy))}"
            )

    @property
    def kv_cache_bytes(self) -> int | None:
        """`kv_cache_memory` as a number.

        raises  ConfigError where it is none
        """
        given = self.kv_cache_memory
        if isinstance(given, str):
            given = parse_bytes("kv_cache_memory", given)
        if given is not None:
            check_integer("kv_cache_memory", given, least=1)
        return given


def parse_bytes(name: str, text: str) -> int:
    """Read a size: a number, and a unit of powers of 1024 (K, KiB, M …) or of 1000 (kB, MB …).

    raises  ConfigError
    """
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(?:([KMGT])(iB|B)?)?\s*", text, re.IGNORECASE)
    if found is None:
        raise ConfigError(f'{name}={text!r} is no size: give bytes, or such as "4GiB" or "512M"')
    number, unit, suffix = found.groups()
    power = 0 if unit is None else 1 + "KMGT".index(unit.upper())
    return int(float(number) * (1000 if suffix in ("B", "b") else 1024) ** power)
