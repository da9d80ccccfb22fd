"""networks/winograd.py against the direct convolution in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tpdne_cli.networks.winograd import Winograd


@pytest.mark.parametrize(
    "height, width, padding", [(4, 4, 1), (9, 14, 2), (36, 36, 2), (33, 18, 0), (3, 3, 0), (31, 8, 1)]
)
@torch.inference_mode()
def test_every_size_and_padding(height, width, padding):
    torch.manual_seed(height)
    x = torch.randn(1, 112, height, width).to(memory_format=torch.channels_last)
    weight = torch.randn(96, 112, 3, 3)
    expected = F.conv2d(x.double(), weight.double(), padding=padding)
    got = Winograd(weight)(x, padding)
    assert got.shape == expected.shape
    error = (got - expected) / expected.std()
    assert error.abs().max() < 2e-5, "wrong, or rounded far worse than a direct convolution"


@torch.inference_mode()
def test_rounding_is_near_that_of_the_direct_sum():
    torch.manual_seed(0)
    x, weight = torch.randn(1, 256, 32, 32).to(memory_format=torch.channels_last), torch.randn(128, 256, 3, 3)
    exact = F.conv2d(x.double(), weight.double(), padding=1)
    errors = [(y - exact).std() / exact.std() for y in (Winograd(weight)(x, 1), F.conv2d(x, weight, padding=1))]
    assert errors[0] < 4 * errors[1] and errors[0] < 3e-6


@torch.inference_mode()
def test_bits_do_not_depend_on_the_number_of_threads():
    torch.manual_seed(0)
    for outputs, inputs, sizes in ((160, 192, (8, 36, 70)), (512, 512, (8, 36)), (96, 1024, (6, 20))):
        convolution = Winograd(torch.randn(outputs, inputs, 3, 3))
        for size in sizes:
            x = torch.randn(1, inputs, size, size).to(memory_format=torch.channels_last)
            alone = convolution(x, 2)
            for threads in (2, 3, 16):
                torch.set_num_threads(threads)
                assert torch.equal(convolution(x, 2), alone), f"{inputs} channels, {size} px with {threads} threads"
            torch.set_num_threads(1)
