"""Products and convolutions with weights that never change, brought once into the order that oneDNN computes in.

torch has these operations for the layers of frozen networks. Its usual ones bring the weights into order at every
call, which takes as long as the arithmetic where an image is small and the channels are many; and its usual matrix
products are another library's, half as fast where a processor has AVX-512 and is not Intel's. What is computed are the
same bits as by the usual convolutions, on any number of threads. A torch without oneDNN uses its usual operations.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 256  # of a product, about: a hint for the order of its matrix


def available() -> bool:
    """Whether torch was built with oneDNN."""
    found: bool = torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
    return found


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
            self.packed = [torch.ops.mkldnn._reorder_linear_weight(m.contiguous(), ROWS) for m in matrices]
        else:
            self.matrices = torch.stack(list(matrices))

    def __call__(self, x: Tensor) -> Tensor:
        if self.matrices is not None:
            return torch.bmm(x, self.matrices.mT)
        linear = torch.ops.mkldnn._linear_pointwise
        return torch.stack([linear(a, m, None, "none", [], "") for a, m in zip(x, self.packed, strict=True)])


class Convolution(Packed):
    """Correlation with a fixed kernel [O, I, k, l], without padding: [H, W, I] -> [H - k + 1, W - l + 1, O]."""

    def __init__(self, weight: Tensor, height: int, width: int) -> None:
        """height, width: of most inputs: a hint for the order of the weights."""
        self.weight = weight.contiguous(memory_format=torch.channels_last)
        self.dilation = 2 if weight.shape[2:] == (1, 1) else 1  # see ops.conv2d
        self.packed = available()
        if self.packed:
            size, dilation = [1, weight.shape[1], height, width], [self.dilation, self.dilation]
            self.weight = torch._C._nn.mkldnn_reorder_conv2d_weight(  # type: ignore[call-arg]
                self.weight.to_mkldnn(), [0, 0], [1, 1], dilation, 1, size
            )

    def __call__(self, x: Tensor) -> Tensor:
        x = x[None].permute(0, 3, 1, 2)
        if self.packed:
            dilation = (self.dilation, self.dilation)
            run = torch.ops.mkldnn._convolution_pointwise
            y: Tensor = run(x, self.weight, None, (0, 0), (1, 1), dilation, 1, "none", [], "")
        else:
            y = F.conv2d(x, self.weight, dilation=self.dilation)
        return y[0].permute(1, 2, 0)
