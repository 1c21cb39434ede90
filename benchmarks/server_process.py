"""`specinfer serve` as a child process: its address, its memory, its metrics and its log."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

_START_S = 180.0
_END_S = 60.0
_PREFIX = "specinfer:"
_SIGNS = ("Traceback", "Exception", "never retrieved", "never awaited", "Error:")


class ServerProcess:
    """A server; leaving the block ends it with SIGTERM, and what it logged can then be read.

    url         where it listens
    returncode  how it ended; None while it runs
    """

    def __init__(self, model: str, flags: Mapping[str, object]) -> None:
        self.url = ""
        self.returncode: int | None = None
        self._flags = [f"--{n.replace('_', '-')}={value}" for n, value in flags.items()]
        self._model = model
        self._folder = tempfile.TemporaryDirectory(prefix="specinfer-")
        self._log = Path(self._folder.name) / "server.log"

    def __enter__(self) -> "ServerProcess":
        command = [sys.executable, "-m", "specinfer", "serve", self._model, *self._flags]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*command, "--port=0", "--log-format=json"], stdout=log, stderr=log
            )
        until_s = time.perf_counter() + _START_S
        while not self.url:
            time.sleep(0.1)
            serving = [e for e in self._events() if e.get("event") == "serving"]
            if serving:
                self.url = serving[0]["url"]
            elif self._process.poll() is not None or time.perf_counter() > until_s:
                self._process.kill()
                raise SystemExit(f"the server did not start:\n{self.log()}")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self.returncode = self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self.returncode = self._process.wait()

    def rss_bytes(self) -> int:
        """Resident memory now; 0 once it has died."""
        try:
            pages = Path(f"/proc/{self._process.pid}/statm").read_text(encoding="ascii").split()[1]
        except (OSError, IndexError):
            return 0
        return int(pages) * os.sysconf("SC_PAGE_SIZE")

    async def metrics(self, http: httpx.AsyncClient) -> dict[str, float]:
        """Our own metrics without their prefix; those with several labels added up."""
        response = await http.get(f"{self.url}/metrics")
        response.raise_for_status()
        found: dict[str, float] = {}
        for family in text_string_to_metric_families(response.text):
            for sample in family.samples:
                if sample.name.startswith(_PREFIX):
                    name = sample.name.removeprefix(_PREFIX)
                    found[name] = found.get(name, 0.0) + sample.value
        return found

    def log(self) -> str:
        """All it wrote."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    def errors(self) -> list[str]:
        """Lines of the log that tell of trouble."""
        return find_errors(self.log())

    def _events(self) -> Iterator[dict[str, Any]]:
        return (event for line in self.log().splitlines() if (event := _event(line)))


def find_errors(log: str) -> list[str]:
    """Events of level error or worse, exceptions in any event, and tracebacks outside of events."""
    found = []
    for line in log.split("\n"):
        event = _event(line)
        if event is None:
            is_bad = any(sign in line for sign in _SIGNS)
        else:
            is_bad = event.get("level") in ("error", "critical") or "exception" in event
        if is_bad:
            found.append(line[:2000])
    return found


def _event(line: str) -> dict[str, Any] | None:
    try:
        event = json.loads(line)
    except ValueError:
        return None
    return event if isinstance(event, dict) else None
