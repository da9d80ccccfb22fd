"""bench/oracle.py against images of the published networks, and our networks against it at other shapes."""

from __future__ import annotations

import json
import re
import sys

import pytest
import torch
from conftest import ROOT, golden, load_tensors
from test_stylegan2 import GENERATORS as STYLEGAN2
from test_stylegan2 import config_of as config2
from test_stylegan3 import GENERATORS as STYLEGAN3
from test_stylegan3 import config_of as config3

from tpdne_cli.networks import stylegan2, stylegan3
from tpdne_cli.networks.ops import prepare
from tpdne_cli.sampler import to_uint8

sys.path.insert(0, str(ROOT / "bench"))
from oracle import Oracle
from rows import random_state

PUBLISHED = [("stylegan2", name) for name in STYLEGAN2] + [("stylegan3", name) for name in STYLEGAN3]


@pytest.fixture(scope="module", params=PUBLISHED, ids=lambda pair: pair[1])
def published(request):
    arch, name = request.param
    folder = golden(name)
    config = {"stylegan2": config2, "stylegan3": config3}[arch](json.loads((folder / "config.json").read_text()))
    return Oracle(arch, config, load_tensors(folder / "weights.safetensors")), load_tensors(folder / "io.safetensors")


def test_latents_and_images_for_every_psi_cutoff_and_noise_mode(published):
    oracle, io = published
    keys = [key for key in io if re.match(r"(w|img)_psi[\d.]+(_cut\d+)?(_const|_none|_random)?$", key)]
    assert {key.split("_")[0] for key in keys} == {"w", "img"}
    for key in keys:
        psi, cutoff, noise = re.search(r"psi([\d.]+)(?:_cut(\d+))?(?:_(\w+))?$", key).groups()
        ws = oracle.mapping(io["z"], io.get("c"), float(psi), None if cutoff is None else int(cutoff))
        torch.manual_seed(1234)  # only img_psi1_random draws from it
        got = ws if key.startswith("w") else oracle.synthesis(ws, noise)
        torch.testing.assert_close(got, io[key], atol=2e-5, rtol=1e-5, msg=lambda m, key=key: f"{key}: {m}")


def test_moved_scenes(published):
    oracle, io = published
    moves = [key.removeprefix("transform_") for key in io if key.startswith("transform_")]
    if not moves:
        pytest.skip("only StyleGAN3 goes on beyond its frame")
    for move in moves:
        state = {**oracle.state, "synthesis.input.transform": io[f"transform_{move}"]}
        got = Oracle(oracle.arch, oracle.config, state)(io["z"], io.get("c"))
        torch.testing.assert_close(got, io[f"img_psi1_const_{move}"], atol=2e-5, rtol=1e-5)


SHAPES = {  # wider than the fixtures, where generation takes other kernels
    "StyleGAN2": ("stylegan2", stylegan2.Config(resolution=64, z_dim=64, w_dim=64, channel_base=8192, channel_max=160)),
    "StyleGAN2, residual": (
        "stylegan2",
        stylegan2.Config(resolution=32, z_dim=32, w_dim=32, channel_base=4096, channel_max=128, architecture="resnet"),
    ),
    "StyleGAN3-T": (
        "stylegan3",
        stylegan3.Config(resolution=32, num_layers=5, num_critical=2, z_dim=32, w_dim=32, channel_base=6000,
                         channel_max=150),
    ),
    "StyleGAN3-R": (
        "stylegan3",
        stylegan3.Config(resolution=32, num_layers=5, num_critical=2, z_dim=32, w_dim=32, channel_base=6000,
                         channel_max=150, conv_kernel=1, use_radial_filters=True),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
@torch.inference_mode()
def test_our_images_are_the_oracles_within_one_level(name):
    arch, config = SHAPES[name]
    state = random_state(arch, config)
    ours = {"stylegan2": stylegan2, "stylegan3": stylegan3}[arch].Generator(config)
    ours.load_state_dict(state, strict=True)
    z = torch.randn(2, config.z_dim)
    expected = to_uint8(Oracle(arch, config, state)(z, psi=0.7)).int()
    got = to_uint8(prepare(ours)(z, psi=0.7)).int()
    assert expected.float().std() > 10, "an image of one colour proves nothing"
    assert (got - expected).abs().max() <= 1
    assert (got != expected).float().mean() < 1e-3
