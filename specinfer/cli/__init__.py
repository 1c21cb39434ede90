"""The command line: `specinfer`, also `python -m specinfer`."""

from specinfer.cli.main import app

__all__ = ["app"]
