"""networks/stylegan2.py against images, latents and logits of the published networks."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from conftest import golden, load_tensors

from tpdne_cli.networks.discriminator import Discriminator, DiscriminatorConfig
from tpdne_cli.networks.ops import prepare
from tpdne_cli.networks.stylegan2 import Config, Generator, SynthesisLayer, ToRGB

GENERATORS = [
    "sg2_skip", "sg2_skip_64ch", "sg2_resnet_clamp", "sg2_orig", "sg2_cond", "sg2_asymfilter", "sg2_filter1",
    "sg2_nonoise_1ch", "sg2_from_sg3repo",
]  # fmt: skip
DISCRIMINATORS = ["disc_resnet", "disc_cond", "disc_skip", "disc_orig_clamp"]


def config_of(description: dict) -> Config:
    """The published constructor arguments in our words."""
    kwargs = dict(description["init_kwargs"])
    mapping = kwargs.pop("mapping_kwargs")
    kwargs |= kwargs.pop("synthesis_kwargs", {})
    from_sg3repo = "networks_stylegan2" in description["source"]
    return Config(
        resolution=kwargs["img_resolution"],
        z_dim=kwargs["z_dim"],
        w_dim=kwargs["w_dim"],
        c_dim=kwargs["c_dim"],
        img_channels=kwargs["img_channels"],
        mapping_layers=mapping.get("num_layers", 8),
        mapping_features=mapping.get("layer_features"),
        channel_base=kwargs["channel_base"],
        channel_max=kwargs["channel_max"],
        architecture=kwargs.get("architecture", "skip"),
        resample_filter=tuple(kwargs.get("resample_filter", (1, 3, 3, 1))),
        conv_clamp=kwargs.get("conv_clamp", 256 if from_sg3repo else None),
        use_noise=kwargs.get("use_noise", True),
    )


@pytest.fixture(scope="module", params=GENERATORS)
def published(request):
    folder = golden(request.param)
    generator = Generator(config_of(json.loads((folder / "config.json").read_text())))
    generator.load_state_dict(load_tensors(folder / "weights.safetensors"), strict=True)
    return prepare(generator), load_tensors(folder / "io.safetensors"), folder


def settings(key: str) -> dict:
    """psi and cutoff out of a golden tensor's name."""
    psi, cutoff = re.search(r"psi([\d.]+)(?:_cut(\d+))?", key).groups()
    return {"psi": float(psi), "cutoff": None if cutoff is None else int(cutoff)}


def to_uint8(img: torch.Tensor) -> torch.Tensor:
    return (img * 127.5 + 128).clamp(0, 255).to(torch.uint8)


@torch.inference_mode()
def test_mapping_for_every_psi_and_cutoff(published):
    generator, io, _ = published
    keys = [k for k in io if k.startswith("w_psi")]
    assert keys
    for key in keys:
        got = generator.mapping(io["z"], io.get("c"), **settings(key))
        torch.testing.assert_close(got, io[key], atol=1e-5, rtol=1e-5, msg=lambda m, key=key: f"{key}: {m}")


@torch.inference_mode()
def test_images_for_every_psi_cutoff_and_noise_mode(published):
    generator, io, _ = published
    keys = [k for k in io if k.startswith("img_psi")]
    assert keys
    for key in keys:
        noise = key.rsplit("_", 1)[1]
        torch.manual_seed(1234)  # only img_psi1_random draws from it, one [N, 1, R, R] per layer
        got = generator(io["z"], io.get("c"), **settings(key), noise=noise)
        torch.testing.assert_close(got, io[key], atol=1e-4, rtol=0, msg=lambda m, key=key: f"{key}: {m}")


@torch.inference_mode()
def test_eight_bit_images_within_one_level(published):
    generator, io, folder = published
    if "u8_psi0.7_const" not in io:
        pytest.skip("this fixture has no 8-bit images")
    got = to_uint8(generator(io["z"], io.get("c"), psi=0.7)).permute(0, 2, 3, 1)
    off = (got.int() - io["u8_psi0.7_const"].int()).abs()
    assert off.max() <= 1
    assert off.float().mean() < 1e-3
    for row, seed in enumerate(json.loads((folder / "config.json").read_text())["seeds"]):
        png = folder / "png_trunc0.7" / f"seed{seed:04d}.png"
        if png.exists():
            from PIL import Image

            assert np.abs(np.asarray(Image.open(png), int) - got[row].numpy()).max() <= 1, png.name


@torch.inference_mode()
def test_style_mixing(published):
    generator, io, _ = published
    if "w_mix" not in io:
        pytest.skip("this fixture has no mixed styles")
    ws = generator.mapping(io["z"], io.get("c"))
    mixed = ws[:1].clone()
    mixed[:, :4] = ws[1:2, :4]
    torch.testing.assert_close(mixed, io["w_mix"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(generator.synthesis(mixed), io["img_mix_const"], atol=1e-4, rtol=0)


@torch.inference_mode()
def test_activations_layer_by_layer(published):
    generator, io, folder = published
    if not (folder / "activations.safetensors").exists():
        pytest.skip("this fixture has no activations")
    expected = load_tensors(folder / "activations.safetensors")
    seen = {}
    hooks = [
        module.register_forward_hook(lambda _m, _i, out, name=name: seen.__setitem__(name, out.clone()))
        for name, module in generator.named_modules()
        if isinstance(module, SynthesisLayer)
    ]
    generator(io["z"][:1])
    for hook in hooks:
        hook.remove()
    assert seen
    for name, got in seen.items():
        torch.testing.assert_close(got, expected[name], atol=1e-4, rtol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


@torch.inference_mode()
@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_row_is_bit_equal_in_any_batch(published, size):
    generator, io, _ = published
    z, c = io["z"].repeat(2, 1), io["c"].repeat(2, 1) if "c" in io else None
    together = generator(z, c, psi=0.7)
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for start in range(0, len(z), size):
            part = generator(z[start : start + size], None if c is None else c[start : start + size], psi=0.7)
            same = torch.equal(part, together[start : start + size])
            assert same, f"rows from {start} differ in batches of {size} with {threads} threads"
    torch.set_num_threads(1)


@torch.inference_mode()
def test_a_row_is_bit_equal_in_any_batch_at_real_widths():
    """The bundled generators' shape, where other kernels are chosen than for the small fixtures."""
    torch.manual_seed(0)
    shape = Config(resolution=64, z_dim=256, w_dim=256, mapping_layers=4, channel_base=4096, channel_max=256)
    generator, z = prepare(Generator(shape)), torch.randn(5, 256)
    together = generator(z)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for size in (1, 2, 4, 5):
            parts = torch.cat([generator(part) for part in z.split(size)])
            assert torch.equal(parts, together), f"batches of {size} with {threads} threads round differently"
    torch.set_num_threads(1)


def test_prepared_and_learning_networks_agree(published):
    """Folding constants and the row-wise layers change nothing but rounding."""
    generator, io, _ = published
    learning = Generator(generator.config)
    learning.load_state_dict(generator.state_dict())
    torch.testing.assert_close(learning(io["z"], io.get("c")), io["img_psi1_const"], atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", DISCRIMINATORS)
@torch.inference_mode()
def test_logits(name):
    folder = golden(name)
    kwargs = json.loads((folder / "config.json").read_text())["init_kwargs"]
    epilogue = kwargs.pop("epilogue_kwargs", {})
    discriminator = Discriminator(DiscriminatorConfig(resolution=kwargs.pop("img_resolution"), **kwargs, **epilogue))
    discriminator.load_state_dict(load_tensors(folder / "weights.safetensors"), strict=True)
    io = load_tensors(folder / "io.safetensors")
    for n in (1, 4, 8):
        got = discriminator(io["img"][:n], io["c"][:n] if "c" in io else None)
        torch.testing.assert_close(got, io[f"logits_batch{n}"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_close(dtype):
    torch.manual_seed(0)
    generator = prepare(Generator(Config(resolution=32, z_dim=32, w_dim=32, channel_base=512, channel_max=32)))
    z = torch.randn(4, 32)
    with torch.inference_mode():
        full = generator(z)
        generator.synthesis.set_precision(dtype)
        half = generator(z)
    assert half.dtype == torch.float32
    assert (half - full).abs().mean() / full.std() < (0.01 if dtype == torch.float16 else 0.05)


@torch.inference_mode()
@pytest.mark.parametrize(("what", "exact"), [("styles", True), ("activations", False)])
def test_half_precision_bears_what_its_range_does_not_hold(what, exact):
    """Styles and activations that are far beyond 65504 once they are summed up; float32 does not notice."""
    torch.manual_seed(0)
    generator = Generator(Config(resolution=32, z_dim=32, w_dim=32, channel_base=512, channel_max=32))
    for layer in generator.modules():
        if isinstance(layer, SynthesisLayer):
            layer.affine.bias.fill_(1e5) if what == "styles" else layer.bias.fill_(3e4)
    prepare(generator)
    z = torch.randn(4, 32)
    full = generator(z)
    generator.synthesis.set_precision(torch.float16)
    half = generator(z)
    assert half.isfinite().all()
    if exact:
        assert (half - full).abs().mean() / full.std() < 0.01


def test_torgb_learns_in_bfloat16_what_it_does_in_float32():
    torch.manual_seed(0)
    layer = ToRGB(32, 16, Config(resolution=16, w_dim=8))
    x, w, pull = torch.randn(4, 32, 16, 16).bfloat16(), torch.randn(4, 8), torch.randn(4, 3, 16, 16)

    def learn(module, x, w):
        x.requires_grad_()
        image = module(x, w)
        image.mul(pull.to(image.dtype)).sum().backward()
        return [t.double() for t in (image.detach(), x.grad, *(p.grad for p in module.parameters()))]

    half = learn(layer, x.clone(), w)
    weight, bias, style = layer.weight.double(), layer.bias.double(), layer.affine(w).double() / 32**0.5
    image = torch.einsum("nihw,oi,ni->nohw", x.double(), weight[:, :, 0, 0], style) + bias[:, None, None]
    torch.testing.assert_close(half[0], image, atol=0.02 * image.std().item(), rtol=0.02)
    exact = ToRGB(32, 16, Config(resolution=16, w_dim=8))
    exact.load_state_dict(layer.state_dict())
    for got, want in zip(half[1:], learn(exact, x.float(), w)[1:], strict=True):
        assert (got - want).norm() < 0.02 * want.norm()


def test_gradients_reach_every_parameter():
    torch.manual_seed(0)
    generator = Generator(Config(resolution=16, z_dim=16, w_dim=16, channel_base=128, channel_max=16, mapping_layers=2))
    discriminator = Discriminator(DiscriminatorConfig(resolution=16, channel_base=128, channel_max=16))
    discriminator(generator(torch.randn(4, 16), noise="random")).sum().backward()
    missing = [n for m in (generator, discriminator) for n, p in m.named_parameters() if p.grad is None]
    assert not missing
