"""How the server serves, as a frozen value that refuses what cannot be true."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from specinfer.config import check_integer, is_number
from specinfer.errors import ConfigError

ToolFormat = Literal["hermes", "llama3_json", "mistral"]
LogFormat = Literal["logfmt", "json"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """How the server serves.

    host               the address it listens on: other machines reach it only if you say so
    port               the port it listens on; 0: any that is free
    api_key            clients must send it as a bearer token; may be repeated, any one will do;
                       also from SPECINFER_API_KEY, several separated by commas; None: open to all
    served_model_name  what clients call the model, the first one in answers; may be repeated; None:
                       the model as it was given
    allowed_origins    web pages of these origins may call it from a browser ("*": any); may be
                       repeated; None: only its own page
    max_body_bytes     a longer request body is refused
    max_prompt_tokens  a longer prompt is refused; None: what the context holds
    max_waiting        continuations that may wait because max_num_seqs run, or as many as memory
                       holds; a request with which more would wait gets 503 with Retry-After
    request_timeout_s  seconds from its arrival until an unfinished request is ended with 504;
                       None: never
    body_timeout_s     seconds that a request's body may take to arrive; then 408
    stall_timeout_s    seconds that the reader of a stream may leave it unread; then it is ended
    grammar_timeout_s  seconds that compiling one schema, expression or grammar may take; then 400
    drain_seconds      how long SIGTERM lets running requests finish
    tool_call_parser   how the model writes tool calls: hermes, llama3_json or mistral; None: as its
                       chat template shows, where it does
    log_format         logfmt (key=value) or json
    log_prompts        write prompts into the log
    metrics_prefix     in front of the names of metrics: "vllm:" suits dashboards made for vLLM
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: Sequence[str] = ()
    served_model_name: Sequence[str] = ()
    allowed_origins: Sequence[str] = ()
    max_body_bytes: int = 8 << 20
    max_prompt_tokens: int | None = None
    max_waiting: int = 1024
    request_timeout_s: float | None = None
    body_timeout_s: float = 60.0
    stall_timeout_s: float = 60.0
    grammar_timeout_s: float = 10.0
    drain_seconds: float = 30.0
    tool_call_parser: ToolFormat | None = None
    log_format: LogFormat = "logfmt"
    log_prompts: bool = False
    metrics_prefix: str = "specinfer:"

    def __post_init__(self) -> None:
        check_integer("port", self.port, least=0)
        if self.port > 65535:
            raise ConfigError(f"port={self.port} must be at most 65535")
        check_integer("max_body_bytes", self.max_body_bytes, least=1)
        check_integer("max_waiting", self.max_waiting, least=0)
        if self.max_prompt_tokens is not None:
            check_integer("max_prompt_tokens", self.max_prompt_tokens, least=1)
        names = ("request_timeout_s", "body_timeout_s", "stall_timeout_s", "grammar_timeout_s")
        for name, least in (("drain_seconds", 0), *((name, 1e-3) for name in names)):
            value = getattr(self, name)
            if value is not None and not (is_number(value) and value >= least):
                raise ConfigError(f"{name}={value!r} must be a number of at least {least}")
        for name, choices in (("tool_call_parser", ToolFormat), ("log_format", LogFormat)):
            value = getattr(self, name)
            if value is not None and value not in get_args(choices):
                raise ConfigError(f"{name}={value!r}: use one of {', '.join(get_args(choices))}")
        if any(not key or key != key.strip() or not key.isascii() for key in self.api_key):
            raise ConfigError("api_key must be ASCII, not empty, and without spaces around it")
        if not self.metrics_prefix.replace(":", "_").replace("_", "a").isalnum():
            raise ConfigError(
                f"metrics_prefix={self.metrics_prefix!r} must be letters, digits, ':' and '_'"
            )
