"""Products and convolutions with weights that never change, brought once into the order that oneDNN computes in.

torch has these operations for the layers of frozen networks. Its usual ones bring the weights into order at every
call, which takes as long as the arithmetic where an image is small and the channels are many; and its usual matrix
products are another library's, half as fast where a processor has AVX-512 and is not Intel's. What is computed are the
same bits as by the usual convolutions, on any number of threads. A torch without oneDNN uses its usual operations.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 256  # of a product, about: a hint for the order of its matrix


@functools.cache
def available() -> bool:
    """Whether this torch was built with oneDNN and has these operations, which it may change: they are not public."""
    try:
        _linear(torch.ones(1, 1), _pack_linear(torch.ones(1, 1)))
        _convolution(torch.ones(1, 1, 1, 1), _pack_convolution(torch.ones(1, 1, 1, 1), [1, 1, 1, 1], 1), 1)
    except (AttributeError, TypeError, RuntimeError):
        return False
    return True


def _pack_linear(matrix: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(matrix.contiguous(), ROWS)
    return packed


def _linear(x: Tensor, packed: Tensor) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
    return y


def _pack_convolution(weight: Tensor, size: list[int], dilation: int) -> Tensor:
    opaque = weight.contiguous(memory_format=torch.channels_last).to_mkldnn()
    return torch._C._nn.mkldnn_reorder_conv2d_weight(  # type: ignore[call-arg]
        opaque, [0, 0], [1, 1], [dilation, dilation], 1, size
    )


def _convolution(x: Tensor, packed: Tensor, dilation: int) -> Tensor:
    run = torch.ops.mkldnn._convolution_pointwise
    y: Tensor = run(x, packed, None, (0, 0), (1, 1), (dilation, dilation), 1, "none", [], "")
    return y


class Packed:
    """Weights in an order of their own, which torch cannot copy; nothing changes them, so copies may share them."""

    def __deepcopy__(self, memo: dict[int, object]) -> Packed:
        return self


class Products(Packed):
    """x [P, N, I] -> [P, N, O]: one matrix product with a fixed matrix for each of P positions."""

    def __init__(self, matrices: Iterable[Tensor]) -> None:  # P of [O, I]
        self.matrices: Tensor | None = None
        self.packed: list[Tensor] = []
        if available():
            self.packed = [_pack_linear(m) for m in matrices]
        else:
            self.matrices = torch.stack(list(matrices))

    def __call__(self, x: Tensor) -> Tensor:
        if self.matrices is not None:
            return torch.bmm(x, self.matrices.mT)
        return torch.stack([_linear(rows, m) for rows, m in zip(x, self.packed, strict=True)])


class Convolution(Packed):
    """Correlation with a fixed kernel [O, I, k, l], without padding: [H, W, I] -> [H - k + 1, W - l + 1, O]."""

    def __init__(self, weight: Tensor, height: int, width: int) -> None:
        """height, width: of most inputs: a hint for the order of the weights."""
        self.dilation = 2 if weight.shape[2:] == (1, 1) else 1  # see ops.conv2d
        self.packed = available()
        if self.packed:
            self.weight = _pack_convolution(weight, [1, weight.shape[1], height, width], self.dilation)
        else:
            self.weight = weight.contiguous(memory_format=torch.channels_last)

    def __call__(self, x: Tensor) -> Tensor:
        x = x[None].permute(0, 3, 1, 2)
        if self.packed:
            y = _convolution(x, self.weight, self.dilation)
        else:
            y = F.conv2d(x, self.weight, dilation=self.dilation)
        return y[0].permute(1, 2, 0)
