"""networks/ops.py against golden numbers of the published operations and plain float64 formulas."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import SHARED, golden, load_tensors

from tpdne_cli.networks import ops

CASES_FILE = SHARED / "golden" / "ops" / "ops.json"
ALL_CASES = json.loads(CASES_FILE.read_text())["cases"] if CASES_FILE.exists() else []
RESAMPLING = {"upfirdn2d", "upsample2d", "downsample2d", "filter2d", "conv2d_resample", "bias_act"}


@pytest.fixture(scope="module")
def tensors():
    return load_tensors(golden("ops") / "ops.safetensors")


def inputs(tensors, case):
    prefix = f"{case['id']}.in."
    return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}


@pytest.mark.parametrize("case", [c for c in ALL_CASES if c["op"] in RESAMPLING], ids=lambda c: c["id"])
def test_primitive_equals_the_published_one(tensors, case):
    got = getattr(ops, case["op"])(**inputs(tensors, case), **case["args"])
    torch.testing.assert_close(got, tensors[f"{case['id']}.out"], atol=1e-5, rtol=1e-5)


def test_there_are_cases_wherever_the_golden_numbers_are():
    golden("ops")
    assert sum(c["op"] in RESAMPLING for c in ALL_CASES) == 40


def test_linear_is_the_float64_product():
    torch.manual_seed(0)
    x, w, b = torch.randn(5, 96), torch.randn(40, 96), torch.randn(40)
    with torch.inference_mode():
        got = ops.linear(x, w, b)
    torch.testing.assert_close(got.double(), x.double() @ w.double().T + b.double(), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("features", [40, 96, 256, 512])
def test_linear_of_a_row_is_bit_equal_alone_and_in_any_batch(features):
    torch.manual_seed(features)
    x, w, b = torch.randn(9, features), torch.randn(300, features), torch.randn(300)
    with torch.inference_mode():
        together = ops.linear(x, w, b)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for size in (1, 2, 5):
                parts = torch.cat([ops.linear(part, w, b) for part in x.split(size)])
                assert torch.equal(parts, together), f"batch {size} with {threads} threads rounds differently"
    torch.set_num_threads(1)


def test_upfirdn_is_the_definition_in_float64():
    """Insert zeros, pad, convolve, keep every second: written out with numpy for one channel."""
    import numpy as np

    rng = np.random.RandomState(0)
    x, f = rng.randn(5, 6), rng.randn(3, 4)
    up = np.zeros((10, 12))
    up[::2, ::2] = x
    padded = np.pad(up, [(1, 2), (2, 1)])
    full = np.array(
        [
            [(padded[i : i + 3, j : j + 4] * f[::-1, ::-1]).sum() for j in range(padded.shape[1] - 3)]
            for i in range(padded.shape[0] - 2)
        ]
    )
    got = ops.upfirdn2d(torch.tensor(x)[None, None], torch.tensor(f), up=2, down=(2, 1), padding=(2, 1, 1, 2), gain=3.0)
    np.testing.assert_allclose(got[0, 0].numpy(), full[:, ::2] * 3, atol=1e-12)


def test_resampling_gradients_are_those_of_the_definition_to_second_order():
    """The hand-written gradient against finite differences, and against autograd through the plain formulation."""
    torch.manual_seed(0)
    f = torch.tensor([[1.0, 3, 2], [0.5, 1, 2], [1, 4, 1], [2, 1, 1]], dtype=torch.float64)
    for up, down, padding in [(1, 1, 1), (2, 1, (2, 1, 2, 1)), (1, 2, (1, 1, 2, 0)), (2, 1, (-1, 2, 1, -1)), (1, 1, 0)]:
        x = torch.randn(2, 3, 6, 7, dtype=torch.float64, requires_grad=True)

        def run(x, up=up, down=down, padding=padding):
            return ops.upfirdn2d(x, f, up=up, down=down, padding=padding, gain=1.5)

        torch.testing.assert_close(run(x), run(x.detach()), atol=1e-12, rtol=0)
        assert torch.autograd.gradcheck(run, x)
        assert torch.autograd.gradgradcheck(lambda x, run=run: run(x).square(), x)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("up, down, kernel", [(1, 1, 3), (1, 2, 3), (1, 2, 1), (2, 1, 3)])
def test_a_bias_of_a_resampled_convolution_is_added_to_the_result(up, down, kernel, grad):
    torch.manual_seed(0)
    x, w, b = (torch.randn(*s, dtype=torch.float64) for s in ((2, 3, 8, 8), (4, 3, kernel, kernel), (4,)))
    f = ops.setup_filter((1, 3, 3, 1)).double()
    with torch.set_grad_enabled(grad):
        without = ops.conv2d_resample(x.requires_grad_(grad), w, f, up, down, padding=kernel // 2)
        biased = ops.conv2d_resample(x, w, f, up, down, padding=kernel // 2, bias=b)
    torch.testing.assert_close(biased, without + b[:, None, None], atol=1e-12, rtol=0)
