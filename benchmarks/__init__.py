"""Measurements: each module writes JSON, prints a table, and says what was inflated."""

import json
import platform
import time
from pathlib import Path
from typing import Any


def write_result(file: Path, what: str, **measured: Any) -> None:
    """Write what was measured, with the day and the machine."""
    import torch

    result = {
        "what": what,
        "when": time.strftime("%Y-%m-%d"),
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        **measured,
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
