"""What the tests of the command line share: run it in this process, and what a refusal is."""

import logging

from typer.testing import CliRunner, Result

from specinfer.cli import app

STORY = ("Tell me a story", "--chat", "--temperature", "0", "--max-tokens", "24")


def run(*args: str, stdin: str | bytes | None = None) -> Result:
    """What a server would log to is gone with the command: whoever comes next logs as before."""
    loggers = [logging.getLogger(name) for name in ("specinfer", "uvicorn")]
    before = [(each.handlers, each.propagate, each.level) for each in loggers]
    try:
        return CliRunner().invoke(app, list(args), input=stdin)
    finally:
        for logger, (handlers, propagate, level) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)


def refuses(result: Result, words: list[str]) -> None:
    """One sentence on standard error, nothing on standard output, exit code 2."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    for word in words:
        assert word in result.stderr
