"""What a load test is asked to do, as a frozen value that refuses what cannot be done."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from specinfer.config import check_integer, is_number
from specinfer.errors import ConfigError

Endpoint = Literal["chat", "completions"]

GOALS = ("ttft", "tpot", "e2el")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadTest:
    """What to ask of which server, and when.

    base_url         where the server is, with or without /v1
    model            what it calls the model; None: the first that it names
    api_key          sent as a bearer token; also from OPENAI_API_KEY
    endpoint         chat or completions
    num_prompts      requests in all
    request_rate     arrivals per second, a Poisson process; inf: all at once
    max_concurrency  requests at a time, whatever the rate; waiting for a place counts in no
                     latency; None: any number
    max_tokens       the longest answer
    temperature      of every request; None: the server's own
    ignore_eos       every answer is max_tokens long (vLLM's field, which not all servers know)
    extra_body       further fields of every request, as JSON, such as '{"top_k": 20}'
    seed             of the arrivals and of the order of the prompts
    timeout_s        seconds without a word after which a request has failed; None: never
    goodput          goals in milliseconds, ttft:200 tpot:20 e2el:3000: how many requests per second
                     meet them all; may be repeated; None: not counted
    """

    base_url: str = "http://127.0.0.1:8000"
    model: str | None = None
    api_key: str | None = None
    endpoint: Endpoint = "chat"
    num_prompts: int = 100
    request_rate: float = math.inf
    max_concurrency: int | None = None
    max_tokens: int = 128
    temperature: float | None = None
    ignore_eos: bool = False
    extra_body: str | None = None
    seed: int = 0
    timeout_s: float | None = None
    goodput: Sequence[str] = ()

    def __post_init__(self) -> None:
        for name in ("num_prompts", "max_concurrency", "max_tokens"):
            if getattr(self, name) is not None:
                check_integer(name, getattr(self, name), least=1)
        for name in ("request_rate", "timeout_s"):
            value = getattr(self, name)
            if value is not None and not (is_number(value) and value > 0):
                raise ConfigError(f"{name}={value!r} must be a number above 0")
        if not self.base_url.startswith(("http://", "https://")):
            raise ConfigError(f"base_url={self.base_url!r} must begin with http:// or https://")
        if self.endpoint not in get_args(Endpoint):
            raise ConfigError(f"endpoint={self.endpoint!r}: use chat or completions")
        read_goals(self.goodput)
        _read_object(self.extra_body)

    @property
    def goals_ms(self) -> dict[str, float]:
        """What `goodput` asks for, by name."""
        return read_goals(self.goodput)

    def body(self, model: str) -> dict[str, Any]:
        """The fields that all requests share."""
        fields: dict[str, Any] = {"model": model, "max_tokens": self.max_tokens}
        if self.temperature is not None:
            fields["temperature"] = self.temperature
        if self.ignore_eos:
            fields["ignore_eos"] = True
        return fields | _read_object(self.extra_body)


def read_goals(given: Sequence[str]) -> dict[str, float]:
    """`ttft:200 tpot:20` → milliseconds by name.

    raises  ConfigError for anything else
    """
    goals: dict[str, float] = {}
    for each in " ".join(given).split():
        name, _, value = each.partition(":")
        try:
            limit_ms = float(value)
        except ValueError:
            limit_ms = -1.0
        if name not in GOALS or not limit_ms > 0:
            raise ConfigError(
                f"goodput={each!r}: give NAME:MILLISECONDS with NAME one of {', '.join(GOALS)}"
            )
        if name in goals:
            raise ConfigError(f"goodput names {name} twice: give it one goal")
        goals[name] = limit_ms
    return goals


def _read_object(text: str | None) -> dict[str, Any]:
    try:
        fields = json.loads(text or "{}")
    except ValueError as error:
        raise ConfigError(f"extra_body is no JSON ({error})") from None
    if not isinstance(fields, dict):
        raise ConfigError("extra_body must be a JSON object")
    return fields
