"""A weight in a layout of its own: opaque, made once at load, good for nothing but products."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class PackedWeight(ABC):
    """A weight [outputs, inputs] that multiplies rows."""

    @abstractmethod
    def multiply(
        self, x: Tensor, bias: Tensor | None = None, *, dtype: torch.dtype | None = None
    ) -> Tensor:
        """x @ weight.T + bias.

        x        [n, inputs], any strides, n may be 0
        bias     [outputs] or None
        dtype    of what is returned; None: x's
        returns  [n, outputs]
        """


class PackedRows(PackedWeight):
    """A packed weight that can still be read: one copy serves an embedding and its head."""

    @abstractmethod
    def rows(self, indices: Tensor) -> Tensor:
        """The weight's rows at indices [n] int64 or int32: [n, inputs], exactly."""
