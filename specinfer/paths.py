"""Where files are kept that can be made again."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Where compiled kernels and measured times are kept.

    raises  RuntimeError where nothing says where a user's files are
    """
    if asked := os.environ.get("SPECINFER_CACHE"):
        return Path(asked).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "specinfer"
    return Path.home() / ".cache" / "specinfer"
