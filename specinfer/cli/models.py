"""`specinfer models`: what is bundled."""

import json as jsonlib
import math
import re
from importlib.resources import files
from importlib.resources.abc import Traversable
from typing import Annotated, Any

import typer

from specinfer.cli.report import print_json


def models(
    json: Annotated[bool, typer.Option("--json", help="Print a JSON array.")] = False,
) -> None:
    """List the bundled models."""
    bundled = list_bundled()
    if json:
        print_json(bundled)
        return
    for model in bundled:
        size = f"{model['num_parameters'] / 1e6:.1f}M parameters, {model['num_bytes'] / 1e6:.1f} MB"
        typer.echo(f"{model['name']}  ({size})\n    {model['card']}")


def list_bundled() -> list[dict[str, Any]]:
    """Name, size and the card's first sentence of every model in the zoo, the largest first."""
    folders = [
        each for each in files("specinfer.zoo").iterdir() if (each / "config.json").is_file()
    ]
    described = [_describe(folder) for folder in folders]
    return sorted(described, key=lambda model: -int(model["num_parameters"]))


def _describe(folder: Traversable) -> dict[str, Any]:
    weights = folder / "model.safetensors"
    with weights.open("rb") as file:
        # A safetensors file starts with its header's length and the header: no need for torch.
        header = jsonlib.loads(file.read(int.from_bytes(file.read(8), "little")))
        num_bytes = file.seek(0, 2)
    tensors = [tensor for name, tensor in header.items() if name != "__metadata__"]
    return {
        "name": f"zoo:{folder.name}",
        "num_parameters": sum(math.prod(tensor["shape"]) for tensor in tensors),
        "num_bytes": num_bytes,
        "card": _first_sentence((folder / "README.md").read_text(encoding="utf-8")),
    }


def _first_sentence(card: str) -> str:
    """The first words of the card below its front matter and its title."""
    body = re.sub(r"\A---\n.*?\n---\n", "", card, flags=re.DOTALL)
    paragraphs = (" ".join(part.split()) for part in body.split("\n\n"))
    first = next((part for part in paragraphs if part and not part.startswith("#")), "")
    return re.split(r"(?<=[.:])\s+(?=[A-Z])", first)[0]
