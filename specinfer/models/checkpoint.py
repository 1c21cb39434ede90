"""The safetensors files of a model folder, mapped and read tensor by tensor."""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from specinfer.errors import CheckpointError

INDEX = "model.safetensors.index.json"
_STORED = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
"""safetensors' word for each."""


class Checkpoint:
    """The safetensors files of a folder: which tensor is in which."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.shard_of: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        for shard in self._shards():
            with self._open(shard) as file:
                for name in file.keys():  # noqa: SIM118, it is no mapping
                    self.shard_of[name] = shard
                    header = file.get_slice(name)
                    self.shapes[name] = tuple(header.get_shape())
                    self.dtypes[name] = _STORED.get(header.get_dtype(), header.get_dtype())

    def read(self, name: str) -> Tensor:
        """A view of the mapped file: its pages go when the tensor does."""
        with self._open(self.shard_of[name]) as file:
            return file.get_tensor(name)  # type: ignore[no-any-return]

    def _open(self, shard: Path) -> Any:
        try:
            return safe_open(str(shard), framework="pt")
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{shard} cannot be read, it may be truncated ({error}): download it again"
            ) from error

    def _shards(self) -> list[Path]:
        single = self.path / "model.safetensors"
        if single.exists():
            return [single]
        index = self.path / INDEX
        if index.exists():
            named = read_json(index, "").get("weight_map")
            if not isinstance(named, dict) or not all(isinstance(v, str) for v in named.values()):
                raise CheckpointError(f"{index} has no weight_map: download it again")
            shards = [self.path / shard for shard in sorted(set(named.values()))]
            missing = [shard.name for shard in shards if not shard.exists()]
            if missing:
                raise CheckpointError(
                    f"{self.path} lacks {', '.join(missing)}, which {INDEX} names: "
                    "download the folder again"
                )
            return shards
        if any(self.path.glob("*.bin")):
            raise CheckpointError(
                f"{self.path} has only PyTorch .bin weights: convert them to safetensors, "
                "for instance with transformers' save_pretrained"
            )
        raise CheckpointError(f"{self.path} has no weights: it needs model.safetensors or {INDEX}")


def read_json(file: Path, absent: str) -> dict[str, Any]:
    """Parse a file that holds a JSON object.

    absent  what to say where there is none
    raises  CheckpointError
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(absent) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} cannot be read ({error}): download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file} is no JSON object: download it again")
    return value
