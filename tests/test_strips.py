"""networks/strips.py against the layer written out in float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tpdne_cli.networks import strips


def exact(x, weight, taps, style, demod, bias, noise):
    """lrelu(conv(x * style) * demod + bias + noise) in float64: [H, W, C] as there, by zero insertion and full sums."""
    x, weight, style, demod, bias = (t.double() for t in (x, weight, style, demod, bias))
    x = (x * style).permute(2, 0, 1)[None]
    if taps is None:
        y = F.conv2d(x, weight, padding=1)
    else:
        (height, width), (fh, fw) = x.shape[2:], taps.shape
        spread = torch.zeros(1, x.shape[1], 2 * height, 2 * width, dtype=torch.float64)
        spread[:, :, ::2, ::2] = x
        y = F.conv2d(F.pad(spread, [2, 1, 2, 1]), weight.flip([2, 3]))  # a true convolution, 2H + 1 samples
        y = F.pad(y, [(fw + 1) // 2 - 1, (fw - 2) // 2, (fh + 1) // 2 - 1, (fh - 2) // 2])
        kernel = taps.double().flip([0, 1]).expand(len(weight), 1, fh, fw) * 4
        y = F.conv2d(y, kernel, groups=len(weight))
    y = y[0].permute(1, 2, 0) * demod + bias
    return F.leaky_relu(y if noise is None else y + noise.double()[:, :, None], 0.2)


def case(inputs, outputs, size, up):
    """Everything a layer takes, random: x, style, demod, bias, noise, weight."""
    torch.manual_seed(size + inputs)
    return (
        torch.randn(size, size, inputs),
        torch.rand(inputs) + 0.5,
        torch.rand(outputs) / inputs**0.5,
        torch.randn(outputs),
        torch.randn(up * size, up * size),
        torch.randn(outputs, inputs, 3, 3),
    )


FILTERS = [
    None,
    [[1, 3, 3, 1]],
    [[1, 2, 1]],
    [[1, 1]],
    [[1, 4, 2, 5, 1, 3]],
    [[2, 1, 3], [1, 5, 2], [4, 1, 1], [1, 2, 6]],
]


@torch.inference_mode()
@pytest.mark.parametrize("strip_bytes", [1, 1 << 16, 8 << 20], ids=["short", "medium", "whole"])
@pytest.mark.parametrize("taps", FILTERS, ids=str)
@pytest.mark.parametrize("inputs, outputs", [(12, 8), (160, 128), (16, 16), (128, 128)])
def test_a_layer_is_its_formula(monkeypatch, inputs, outputs, taps, strip_bytes):
    monkeypatch.setattr(strips, "STRIP_BYTES", strip_bytes)
    monkeypatch.setattr(strips, "WIDE_BYTES", strip_bytes // outputs)
    if taps is not None:
        taps = torch.tensor(taps, dtype=torch.float32)
        taps = taps / taps.sum()
        taps = taps if len(taps) > 1 else torch.outer(taps[0], taps[0])
    up = 1 if taps is None else 2
    x, style, demod, bias, noise, weight = case(inputs, outputs, 20, up)
    compute = strips.layer(weight, 20, taps)
    for own in (noise, None):
        out = torch.empty(20 * up, 20 * up, outputs)
        compute(x, style, demod, bias, own, out)
        expected = exact(x, weight, taps, style, demod, bias, own)
        error = (out - expected).abs().max() / expected.std()
        assert error < 2e-5, f"{type(compute).__name__} with {taps} is off by {error}"
        if inputs == outputs and up == 1:
            over = x.clone()
            compute(over, style, demod, bias, own, over)
            assert torch.equal(over, out), "in place of its input the result is another one"


@torch.inference_mode()
@pytest.mark.parametrize(
    "inputs, outputs, size",
    [(64, 32, 64), (256, 128, 16), (136, 128, 36), (64, 64, 64), (32, 32, 128), (128, 128, 64), (512, 512, 16)],
)
@pytest.mark.parametrize("up", [1, 2])
def test_bits_do_not_depend_on_the_number_of_threads(inputs, outputs, size, up):
    x, style, demod, bias, noise, weight = case(inputs, outputs, size, up)
    compute = strips.layer(weight, size * up, torch.tensor([1.0, 3, 3, 1]) / 8 if up > 1 else None)

    def run(threads):
        torch.set_num_threads(threads)
        out = torch.empty(up * size, up * size, outputs)
        compute(x, style, demod, bias, noise, out)
        return out

    alone = run(1)
    for threads in (2, 3, 4, 16):
        assert torch.equal(run(threads), alone), f"{type(compute).__name__} rounds differently on {threads} threads"
    torch.set_num_threads(1)


def test_layers_that_this_room_leaves_to_others():
    weight = torch.randn(8, 8, 3, 3)
    assert strips.layer(weight, strips.LEAST_SIZE // 2, None) is None, "small images go together"
    assert strips.layer(torch.randn(8, 8, 1, 1), 64, None) is None
    assert strips.layer(weight, 64, torch.ones(1)) is None, "without a filter there is nothing to read beyond the edge"
    assert strips.layer(weight.to("meta"), 64, None) is None
    assert not strips.suits(torch.zeros(1)), "while gradients are asked for"
    with torch.inference_mode():
        assert strips.suits(torch.zeros(1)) and not strips.suits(torch.zeros(1, dtype=torch.float16))
