"""The server as a process: its socket, its signals, and how it ends."""

import asyncio
import contextlib
import logging
import math
import os
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from types import FrameType

import uvicorn

from specinfer.errors import ConfigError, SpecInferError
from specinfer.serve.app import make_app
from specinfer.serve.errors import ApiError
from specinfer.serve.settings import ServerSettings
from specinfer.serve.state import Service

_log = logging.getLogger("specinfer.serve")

_GRACE_S = 5
"""Seconds that answers have for their last words once the time for draining is over."""

_MOST_FILES = 1 << 16


def bind(settings: ServerSettings) -> socket.socket:
    """Take the address, without listening yet: a model is loaded first.

    raises  ConfigError where it cannot be had
    """
    taken = None
    try:
        found = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)
        family, kind, protocol, _, address = found[0]
        taken = socket.socket(family, kind, protocol)
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(address)
    except OSError as error:
        if taken is not None:
            taken.close()
        raise ConfigError(
            f"host={settings.host!r} port={settings.port} cannot be had ({error.strerror}): give "
            "another --host or --port"
        ) from None
    return taken


def run_server(service: Service, taken: socket.socket) -> None:
    """Serve until a signal; then let what runs finish, for drain_seconds.

    raises  SpecInferError where the engine's thread has ended by itself
    """
    config = uvicorn.Config(
        make_app(service),
        log_config=None,
        access_log=False,
        lifespan="off",
        server_header=False,
        timeout_graceful_shutdown=math.ceil(service.settings.drain_seconds) + _GRACE_S,
    )
    _allow_connections()
    _Server(config, service, taken).run(sockets=[taken])
    if not service.llm.is_alive:
        raise SpecInferError("the engine ended by a failure, which is in the log: start it again")


def _allow_connections() -> None:
    """Let the process hold as many connections as it may: often 1024 where it need not be so few.

    Each waiting request has one. Idle ones count, too: a limit of uvicorn's (limit_concurrency)
    would refuse others for them, and closing them is a proxy's business.
    """
    if sys.platform == "win32":  # it has no such limit
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, _MOST_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


class _Server(uvicorn.Server):
    """A uvicorn that ends well: exit code 0 after draining, at once at the second signal."""

    def __init__(self, config: uvicorn.Config, service: Service, taken: socket.socket) -> None:
        super().__init__(config)
        self._service = service
        self._url = _url_of(taken)

    async def startup(self, sockets: Sequence[socket.socket] | None = None) -> None:
        """Listen, and say where."""
        await super().startup(list(sockets or ()))
        settings = self._service.settings
        names = ",".join(self._service.model_names)
        _log.info("serving", extra={"fields": {"url": self._url, "model": names}})
        if not settings.api_key and settings.host not in ("127.0.0.1", "::1", "localhost"):
            _log.warning("whoever reaches %s may use it: set --api-key", self._url)

    async def on_tick(self, counter: int) -> bool:
        """Whether to end: also where the engine has, for nothing can be served any more."""
        return await super().on_tick(counter) or not self._service.llm.is_alive

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle signals here and leave them at that: the process ends by itself, with 0."""
        self._loop = asyncio.get_running_loop()
        handled = (signal.SIGINT, signal.SIGTERM)
        before = {number: signal.signal(number, self.handle_exit) for number in handled}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, the second ends."""
        if self.should_exit:
            os._exit(128 + sig)
        self.should_exit = True
        self._loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        self._service.is_draining = True
        seconds = self._service.settings.drain_seconds
        _log.info(
            "draining", extra={"fields": {"seconds": seconds, "running": self._service.num_taken}}
        )
        gone = ApiError(503, "the server is shutting down", code="shutting_down")
        self._loop.call_later(seconds, self._service.llm.fail_all, gone)


def _url_of(taken: socket.socket) -> str:
    host, port = taken.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
