"""From the device to the host: what is far away, and several tensors with one wait."""

from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor


def is_far(tensor: Tensor) -> bool:
    """Whether copying it to the host costs: then only what is small should be."""
    return tensor.device.type != "cpu"


def to_host(*tensors: Tensor) -> list[npt.NDArray[Any]]:
    """Tensors of one device as arrays, not to be written to: on a processor, views.

    cost  on a GPU one wait for all of them; by way of page-locked memory, which a copy fills at
          several times the speed and without a second copy inside the driver
    """
    if all(tensor.device.type == "cpu" for tensor in tensors):
        return [tensor.numpy() for tensor in tensors]
    copies = [
        torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(
            tensor, non_blocking=True
        )
        for tensor in tensors
    ]
    torch.cuda.current_stream(tensors[0].device).synchronize()
    return [copy.numpy() for copy in copies]
