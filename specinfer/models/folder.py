"""From a model's name to its folder: on disk, bundled, or on the Hugging Face hub."""

import re
from pathlib import Path
from typing import Any

from specinfer.errors import ModelNotFoundError
from specinfer.models.checkpoint import read_json

_ZOO = Path(__file__).parent.parent / "zoo"
_HUB_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.txt", "tokenizer.model"]
_HUB_IGNORED = ["*/*", "consolidated*"]


def resolve_model(name: str) -> Path:
    """Find the folder of a model, downloading it if it is a hub id that is not cached.

    name    a folder, "zoo:NAME" for a bundled model, or a Hugging Face id
    raises  ModelNotFoundError if there is none
    """
    if name.startswith("zoo:"):
        return _resolve_zoo(name.removeprefix("zoo:"))
    try:
        folder = Path(name).expanduser()
        if name and folder.is_dir():
            return folder
        is_something = folder.exists()
    except (OSError, RuntimeError) as error:  # a name too long, or ~nobody
        raise ModelNotFoundError(f"{name!r} is no folder: {error}") from None
    if is_something or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise ModelNotFoundError(
            f"{name!r} is no folder: give a model's folder, a Hugging Face id or zoo:NAME"
        )
    return _download(name)


def read_config(path: Path) -> dict[str, Any]:
    """Parse a model folder's config.json.

    raises  CheckpointError if it is missing or no JSON object
    """
    file = path / "config.json"
    return read_json(file, f"{path} has no config.json: give the folder of a Hugging Face model")


def _bundled() -> list[str]:
    return sorted(folder.parent.name for folder in _ZOO.glob("*/config.json"))


def _resolve_zoo(name: str) -> Path:
    names = _bundled()
    if name not in names:
        listed = ", ".join(f"zoo:{known}" for known in names) or "none in this installation"
        raise ModelNotFoundError(f"zoo:{name} is not bundled: there are {listed}")
    return _ZOO / name


def _download(name: str) -> Path:
    # Imported late: most runs read a folder, and the hub's client is slow to import.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(name, allow_patterns=_HUB_PATTERNS, ignore_patterns=_HUB_IGNORED)
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelNotFoundError(
            f"{name!r} is no folder here and could not be had from the Hugging Face hub "
            f"({reason}): give a folder, an id you may read, or zoo:"
            + (name if name in _bundled() else "NAME")
        ) from error
