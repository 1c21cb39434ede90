"""`specinfer quantize`: a checkpoint rounded once, and kept."""

from pathlib import Path
from typing import Annotated

import typer


def quantize(
    model: Annotated[str, typer.Argument(help="A Hugging Face id, a folder, or zoo:NAME.")],
    out: Annotated[Path, typer.Argument(help="The folder to write; it must not be there.")],
    quantization: Annotated[
        str, typer.Option(help="int8, int4 (groups of 32), int4-64, int4-128 or fp8 (for GPUs).")
    ] = "int8",
) -> None:
    """Write a model with its weights rounded to int8, int4 or fp8.

    The folder loads by its name like any other, computes what --quantization computes, and is in
    compressed-tensors' format.
    """
    from specinfer.models.folder import resolve_model
    from specinfer.models.quantization import read_quantization
    from specinfer.models.quantized_folder import quantize_folder
    from specinfer.progress import show_loading

    scheme = read_quantization(quantization)
    source = resolve_model(model)
    with show_loading(None) as report:
        num_bytes = quantize_folder(
            source,
            out,
            scheme,
            progress=None if report is None else lambda done, total: report(model, done, total),
        )
    typer.echo(f"{out}: {num_bytes / 1e6:.1f} MB of weights, {quantization}")
