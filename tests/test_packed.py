"""networks/packed.py against float64, and against the usual operations of a torch without oneDNN."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from tpdne_cli.networks import packed
from tpdne_cli.networks.packed import Convolution, Products


@torch.inference_mode()
def test_products_with_and_without_onednn(monkeypatch):
    torch.manual_seed(0)
    matrices, x = torch.randn(5, 24, 40), torch.randn(5, 33, 40)
    expected = x.double() @ matrices.double().mT
    ordered = Products(matrices)
    monkeypatch.setattr(packed, "available", lambda: False)
    plain = Products(matrices)
    assert ordered.packed and not plain.packed, "both ways are to be seen here"
    for products in (ordered, plain, copy.deepcopy(ordered)):
        torch.testing.assert_close(products(x).double(), expected, rtol=1e-5, atol=1e-4)


@torch.inference_mode()
@pytest.mark.parametrize("kernel", [(2, 2), (2, 1), (1, 2), (1, 1), (3, 3)])
def test_convolutions_with_and_without_onednn(monkeypatch, kernel):
    torch.manual_seed(0)
    weight, x = torch.randn(24, 40, *kernel), torch.randn(13, 9, 40)
    expected = F.conv2d(x.permute(2, 0, 1)[None].double(), weight.double())[0].permute(1, 2, 0)
    ordered = Convolution(weight, 9, 9)
    monkeypatch.setattr(packed, "available", lambda: False)
    plain = Convolution(weight, 9, 9)
    assert ordered.packed and not plain.packed, "both ways are to be seen here"
    for convolution in (ordered, plain, copy.deepcopy(ordered)):
        torch.testing.assert_close(convolution(x).double(), expected, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(convolution(x[:5]).double(), expected[: 6 - kernel[0]], rtol=1e-5, atol=1e-4)
