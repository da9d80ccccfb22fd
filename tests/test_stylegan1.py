"""networks/stylegan1.py against images of the published network, run under TensorFlow."""

from __future__ import annotations

import math
import re

import pytest
import torch
from conftest import golden, load_tensors

from tpdne_cli.networks.ops import prepare
from tpdne_cli.networks.stylegan1 import Config, Generator

SHAPES = {
    "tf_sg1_32": Config(32, channel_base=1024, channel_max=32, z_dim=64, w_dim=64),
    "tf_sg1_128": Config(128, channel_base=2048, channel_max=16, z_dim=64, w_dim=64),
}


def from_tensorflow(variables: dict[str, torch.Tensor], resolution: int) -> dict[str, torch.Tensor]:
    """TensorFlow's variables under our names."""
    state = {"mapping.w_avg": variables["dlatent_avg"]}
    for name in variables:
        if match := re.fullmatch(r"mapping/Dense(\d+)/weight", name):
            fc, theirs = f"mapping.fc{match[1]}", name.removesuffix("weight")
            state[f"{fc}.weight"] = variables[name].t()
            state[f"{fc}.bias"] = variables[theirs + "bias"] / math.sqrt(2)
    for r in [2**i for i in range(2, int(math.log2(resolution)) + 1)]:
        first = 2 * int(math.log2(r)) - 4
        for conv, theirs in (("conv0", "Const" if r == 4 else "Conv0_up"), ("conv1", "Conv" if r == 4 else "Conv1")):
            ours, theirs = f"synthesis.b{r}.{conv}", f"synthesis/{r}x{r}/{theirs}"
            if f"{theirs}/weight" in variables:
                weight = variables[f"{theirs}/weight"].permute(3, 2, 0, 1)
                # From 128 px on they convolve where they correlate below.
                state[f"{ours}.weight"] = weight.flip([2, 3]) if r >= 128 and conv == "conv0" else weight
            bias = variables[f"{theirs}/StyleMod/bias"].clone()
            bias[: len(bias) // 2] += 1
            state |= {
                f"{ours}.bias": variables[f"{theirs}/bias"],
                f"{ours}.noise_strength": variables[f"{theirs}/Noise/weight"],
                f"{ours}.noise_const": variables[f"synthesis/noise{first + int(conv[-1])}"][0, 0],
                f"{ours}.affine.weight": variables[f"{theirs}/StyleMod/weight"].t(),
                f"{ours}.affine.bias": bias,
            }
    state["synthesis.b4.const"] = variables["synthesis/4x4/Const/const"][0]
    state[f"synthesis.b{resolution}.torgb.weight"] = variables["synthesis/ToRGB_lod0/weight"].permute(3, 2, 0, 1)
    state[f"synthesis.b{resolution}.torgb.bias"] = variables["synthesis/ToRGB_lod0/bias"]
    return state


@pytest.fixture(scope="module", params=SHAPES)
def published(request):
    folder, config = golden(request.param), SHAPES[request.param]
    generator = Generator(config)
    state = from_tensorflow(load_tensors(folder / "variables.safetensors"), config.resolution)
    generator.load_state_dict(state, strict=True)
    return generator, load_tensors(folder / "io.safetensors")


def test_images_for_every_psi_and_cutoff(published):
    generator, io = published
    keys = [key for key in io if key.startswith("img_")]
    assert len(keys) == 3
    for folded in (False, True):
        if folded:
            prepare(generator)
        for key in keys:
            psi, cutoff = re.search(r"psi([\d.]+)(?:_cut(\d+))?", key).groups()
            with torch.inference_mode():
                image = generator(io["z"], psi=float(psi), cutoff=None if cutoff is None else int(cutoff))
            where = f"{key}, {'prepared' if folded else 'as loaded'}"
            torch.testing.assert_close(image, io[key], atol=1e-4, rtol=0, msg=lambda m, w=where: f"{w}: {m}")
            levels = [(x * 127.5 + 128).clamp(0, 255).to(torch.uint8).int() for x in (image, io[key])]
            assert (levels[0] - levels[1]).abs().max() <= 1, f"{where}: more than one level apart in 8 bits"


@torch.inference_mode()
def test_a_row_is_bit_equal_in_any_batch():
    torch.manual_seed(0)
    shape = Config(resolution=64, channel_base=4096, channel_max=256, z_dim=64, w_dim=64, mapping_layers=2)
    generator, z = prepare(Generator(shape)), torch.randn(5, 64)
    together = generator(z)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for size in (1, 2, 5):
            parts = torch.cat([generator(part) for part in z.split(size)])
            assert torch.equal(parts, together), f"batches of {size} with {threads} threads round differently"
    torch.set_num_threads(1)


@torch.inference_mode()
def test_noise_modes():
    torch.manual_seed(0)
    shape = Config(resolution=16, channel_max=8, z_dim=16, w_dim=16, mapping_layers=1)
    generator = Generator(shape)
    for name, parameter in generator.named_parameters():
        if name.endswith("noise_strength"):
            parameter.fill_(0.5)
    prepare(generator)
    ws = generator.mapping(torch.randn(2, 16))
    assert torch.equal(generator.synthesis(ws, "const"), generator.synthesis(ws, "const"))
    assert not torch.equal(generator.synthesis(ws, "random"), generator.synthesis(ws, "random"))
    asked: list[tuple[int, int]] = []

    def silence(height: int, width: int) -> torch.Tensor:
        asked.append((height, width))
        return torch.zeros(2, 1, height, width)

    torch.testing.assert_close(generator.synthesis(ws, silence), generator.synthesis(ws, "none"))
    assert asked == [(4, 4), (4, 4), (8, 8), (8, 8), (16, 16), (16, 16)]
    with pytest.raises(ValueError, match="noise mode"):
        generator.synthesis(ws, "loud")


def test_widths_follow_the_published_defaults():
    """512 maps up to 32 px, then half as many at every doubling (table 1 of the paper's appendix)."""
    shape = Config(resolution=1024)
    assert [shape.width(2**i) for i in range(2, 11)] == [512, 512, 512, 512, 256, 128, 64, 32, 16]
    assert shape.num_ws == 18
