"""Log lines for programs: key=value (logfmt) or JSON, one record a line."""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

from specinfer.serve.settings import LogFormat


class _LineFormatter(logging.Formatter):
    """One line per record; a record's `fields` follow its event."""

    def __init__(self, kind: LogFormat) -> None:
        super().__init__()
        self._kind = kind

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        moment = datetime.fromtimestamp(record.created, UTC)
        fields: dict[str, Any] = {
            "time": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        if self._kind == "json":
            return json.dumps(fields, ensure_ascii=False, default=str)
        return " ".join(f"{name}={_quoted(value)}" for name, value in fields.items())


def configure_logs(kind: LogFormat) -> None:
    """Write this program's log to standard error, and nothing but the server library's troubles."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_LineFormatter(kind))
    for name, level in (("specinfer", logging.INFO), ("uvicorn", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)


def _quoted(value: Any) -> str:
    """As it is where that is one word, else as JSON has it: a line stays a line."""
    text = str(value)
    is_word = text.isprintable() and text and not set(text) & {" ", '"', "=", "\\"}
    return text if is_word else json.dumps(text, ensure_ascii=False)
