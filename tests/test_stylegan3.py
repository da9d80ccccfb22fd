"""networks/stylegan3.py and filtered.py against numbers of the published networks, and against each other."""

from __future__ import annotations

import dataclasses
import json
import math
import re

import pytest
import torch
from conftest import golden, load_tensors

from tpdne_cli.networks.filtered import CHANNELS, FilteredLrelu, filtered_lrelu, lowpass, separate
from tpdne_cli.networks.ops import prepare
from tpdne_cli.networks.stylegan3 import Config, Generator, SynthesisLayer, inverse_transform

GENERATORS = ["sg3_t", "sg3_r", "sg3_t_cond_clamp", "sg3_r_small"]
FIELDS = {  # the published code's words for a layer's geometry, and ours
    "name": "name", "in_channels": "in_channels", "out_channels": "out_channels", "in_sampling_rate": "in_rate",
    "out_sampling_rate": "out_rate", "tmp_sampling_rate": "high_rate", "in_cutoff": "in_cutoff",
    "out_cutoff": "out_cutoff", "in_half_width": "in_half_width", "out_half_width": "out_half_width",
    "up_factor": "up", "down_factor": "down", "up_taps": "up_taps", "down_taps": "down_taps", "down_radial": "radial",
    "is_torgb": "is_torgb", "conv_kernel": "kernel",
}  # fmt: skip


def config_of(description: dict) -> Config:
    """The published constructor arguments in our words."""
    kwargs = dict(description["init_kwargs"])
    mapping = kwargs.pop("mapping_kwargs")
    kwargs.pop("magnitude_ema_beta", None)
    return Config(
        resolution=kwargs.pop("img_resolution"), mapping_layers=mapping.get("num_layers", 2), **kwargs
    )  # fmt: skip


@pytest.fixture(scope="module", params=GENERATORS)
def description(request):
    folder = golden(request.param)
    return json.loads((folder / "config.json").read_text()), folder


@pytest.fixture(scope="module", params=["plain", "prepared"])
def published(request, description):
    """A golden generator in the paper's formulation, and in the one that generates on a CPU."""
    numbers, folder = description
    generator = Generator(config_of(numbers))
    generator.load_state_dict(load_tensors(folder / "weights.safetensors"), strict=True)
    with torch.inference_mode():
        if request.param == "prepared":
            prepare(generator)
        assert generator.synthesis.can_generate(torch.zeros(1)) == (request.param == "prepared")
    return generator, load_tensors(folder / "io.safetensors"), folder


def close(got: torch.Tensor, expected: torch.Tensor, what: str, atol: float = 1e-5) -> None:
    torch.testing.assert_close(got, expected, atol=atol, rtol=1e-5, msg=lambda m: f"{what}: {m}")


def test_geometry_follows_from_few_numbers(description):
    numbers, _ = description
    config = config_of(numbers)
    assert config.num_ws == numbers["num_ws"]
    assert len(config.layers) == len(numbers["layers"])
    for layer, expected in zip(config.layers, numbers["layers"], strict=True):
        for theirs, ours in FIELDS.items():
            value, wanted = getattr(layer, ours), expected[theirs]
            same = math.isclose(value, wanted, rel_tol=1e-12) if isinstance(wanted, float) else value == wanted
            assert same, f"{layer.name}: {ours} is {value}, not {wanted}"
        assert [layer.in_size] * 2 == expected["in_size"], layer.name
        assert [layer.out_size] * 2 == expected["out_size"], layer.name
        assert list(layer.padding) == expected["padding"], layer.name
    first = config.layers[0]
    assert [first.in_size] * 2 == numbers["input"]["size"]
    assert (first.in_rate, first.in_cutoff) == (numbers["input"]["sampling_rate"], numbers["input"]["bandwidth"])


def test_filters_of_a_new_network_are_the_published_ones(description):
    numbers, folder = description
    fresh, stored = Generator(config_of(numbers)).state_dict(), load_tensors(folder / "weights.safetensors")
    assert list(fresh) == [name for name in fresh if name in stored] and len(fresh) == len(stored)
    for name in stored:
        if name.endswith("_filter"):
            close(fresh[name], stored[name], name, atol=1e-7)


@torch.inference_mode()
def test_mapping_for_every_psi_and_cutoff(published):
    generator, io, _ = published
    keys = [key for key in io if key.startswith("w_psi")]
    assert keys
    for key in keys:
        psi, cutoff = re.search(r"psi([\d.]+)(?:_cut(\d+))?", key).groups()
        got = generator.mapping(io["z"], io.get("c"), float(psi), None if cutoff is None else int(cutoff))
        close(got, io[key], key)


@torch.inference_mode()
def test_images(published):
    generator, io, _ = published
    keys = [key for key in io if re.fullmatch(r"w_(psi.*|mix)", key)]
    assert keys
    prepared = generator.synthesis.can_generate(torch.zeros(1))
    for key in keys:
        ws, images = io[key], io[f"img_{key[2:]}_const"]
        if not prepared:  # slow, and no row differs from the others
            ws, images = ws[:1], images[:1]
        close(generator.synthesis(ws, noise="const"), images, key)
    if prepared and "u8_psi0.7_const" in io:
        image = generator(io["z"], io.get("c"), psi=0.7).permute(0, 2, 3, 1)
        levels = (image * 127.5 + 128).clamp(0, 255).to(torch.uint8).int()
        assert (levels - io["u8_psi0.7_const"].int()).abs().max() <= 1


@torch.inference_mode()
def test_the_user_turns_and_moves_the_image(published):
    generator, io, folder = published
    transforms = json.loads((folder / "config.json").read_text())["transforms"]
    assert transforms
    buffer = generator.synthesis.input.transform
    try:
        for name, move in transforms.items():
            matrix = inverse_transform(move["rotate"], *move["translate"])
            close(matrix, io[f"transform_{name}"], name, atol=1e-7)
            buffer.copy_(matrix)
            close(generator.synthesis(io["w_psi1"][:1]), io[f"img_psi1_const_{name}"][:1], name)
    finally:
        buffer.copy_(torch.eye(3))


@torch.inference_mode()
def test_activations(published):
    """Slices, mean and spread of what every layer hands on; the prepared layers already multiply by the next style."""
    generator, io, folder = published
    if generator.synthesis.can_generate(torch.zeros(1)):
        pytest.skip("prepared layers hand on other numbers")
    seen = {}
    names = {module: name for name, module in generator.named_modules()}
    for module in generator.modules():
        module.register_forward_hook(lambda module, _, out: seen.setdefault(names[module], out))
    generator(io["z"][:1], None if "c" not in io else io["c"][:1])
    expected = load_tensors(folder / "activations.safetensors")
    for key, value in expected.items():
        name, kind = key.rsplit(".", 1)
        got = seen[name]
        got = got.mean() if kind == "mean" else got.std() if kind == "std" else got
        if kind == "slice":
            got = got[0:1, :4, ::7, ::7] if got.ndim == 4 else got[0:1]
        close(got, value, key)


@torch.inference_mode()
def test_a_row_is_bit_equal_in_any_batch(published):
    generator, io, _ = published
    if not generator.synthesis.can_generate(torch.zeros(1)):
        pytest.skip("the promise is made for prepared networks")
    z, c = io["z"], io.get("c")
    together = generator(z, c, psi=0.7)
    for threads in (1, 2):
        torch.set_num_threads(threads)
        rows = [generator(z[i : i + 1], None if c is None else c[i : i + 1], psi=0.7) for i in range(len(z))]
        assert torch.equal(torch.cat(rows), together), f"a row alone rounds differently with {threads} threads"
    torch.set_num_threads(1)


@pytest.mark.parametrize("radial", [False, True])
@torch.inference_mode()
def test_prepared_and_plain_agree_at_real_widths(radial):
    """Wide layers take other kernels than the small fixtures; and their bits hold for any number of threads."""
    torch.manual_seed(0)
    shape = Config(
        resolution=32, num_layers=4, num_critical=2, channel_base=6000, channel_max=150, conv_kernel=1 if radial else 3,
        use_radial_filters=radial, z_dim=32, w_dim=32,
    )  # fmt: skip
    generator, z = Generator(shape), torch.randn(2, 32)
    plain = generator(z)
    prepare(generator)
    image = generator(z)
    close(image, plain, "prepared against plain", atol=2e-5)
    torch.set_num_threads(2)
    assert torch.equal(generator(z[1:]), image[1:]), "two threads round differently"
    torch.set_num_threads(1)


def test_it_learns():
    """Gradients reach every parameter in the plain formulation, also after the network was prepared."""
    shape = Config(resolution=16, num_layers=3, num_critical=1, channel_base=64, channel_max=8, z_dim=8, w_dim=8)
    generator = Generator(shape)
    generator(torch.randn(2, 8)).square().mean().backward()
    for name, parameter in generator.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_bad_geometry_is_refused():
    for change in ({"num_critical": 14}, {"num_layers": 10**9}, {"resolution": 100}, {"num_critical": 0}):
        with pytest.raises(ValueError, match="StyleGAN3"):
            _ = dataclasses.replace(Config(resolution=64), **change).layers


# Primitives


def primitive(op: str, number: str) -> tuple[dict, dict, torch.Tensor]:
    folder = golden("ops")
    name = f"{number}_{op}"
    args = next(case["args"] for case in json.loads((folder / "ops.json").read_text())["cases"] if case["id"] == name)
    tensors = load_tensors(folder / "ops.safetensors")
    inputs = {key.rsplit(".", 1)[1]: value for key, value in tensors.items() if key.startswith(f"{name}.in.")}
    return args, inputs, tensors[f"{name}.out"]


@pytest.mark.parametrize("number", ["43", "44"])
@torch.inference_mode()
def test_modulated_convolution(number):
    """A layer whose affine returns the given styles, whose input has the given gain, without filters or slope."""
    args, given, expected = primitive("modulated_conv2d_sg3", number)
    layer = Config(resolution=16, num_layers=3, num_critical=1).layers[0]
    channels = {"in_channels": given["w"].shape[1], "out_channels": given["w"].shape[0], "lrelu_upsampling": 1}
    geometry = dataclasses.replace(layer, **channels, kernel=3)
    conv = SynthesisLayer(geometry, Config(resolution=16, w_dim=4, conv_clamp=None))
    conv.weight.copy_(given["w"])
    conv.magnitude_ema.copy_(given["input_gain"] ** -2)
    conv.affine.forward = lambda w: w
    if args["demodulate"]:
        style, demod = conv.modulation(given["s"])
        weight = conv.normal_weight()
    else:  # only torgb does not demodulate; its weights carry a gain besides
        conv.geometry = dataclasses.replace(geometry, is_torgb=True)
        (style, demod), weight = conv.modulation(given["s"]), conv.normal_weight() * math.sqrt(4 * 9)
        assert demod is None
        demod = torch.ones(2, 5)
    got = torch.nn.functional.conv2d(given["x"] * style[:, :, None, None], weight, padding=args["padding"])
    close(got * demod[:, :, None, None], expected, number)


@pytest.mark.parametrize("number", ["45", "46", "47", "48"])
@torch.inference_mode()
def test_filtered_lrelu(number):
    args, given, expected = primitive("filtered_lrelu", number)
    x, bias, fu, fd = given["x"], given["b"], given.get("fu"), given.get("fd")
    padding = args.pop("padding")
    close(filtered_lrelu(x, fu, fd, bias, padding=tuple(padding), **args), expected, number)
    if fu is None or fd is None:
        return
    op = FilteredLrelu(fu, fd, args["up"], args["down"], padding[0], x.shape[-1], expected.shape[-1], args["clamp"])
    for row, wanted in zip(x, expected, strict=True):
        wide = torch.zeros(1, CHANNELS, *row.shape[1:]).contiguous(memory_format=torch.channels_last)
        wide[0, :3] = row
        b, ones = torch.zeros(CHANNELS), torch.ones(CHANNELS)
        b[:3] = bias
        close(op(wide, ones, b, ones)[0, :3], wanted, f"{number} in the cache")


@pytest.mark.parametrize("up, down", [(2, 2), (4, 2), (4, 4), (8, 2), (2, 1)])
@pytest.mark.parametrize("strip_bytes", [1, 1 << 30])
@torch.inference_mode()
def test_filtering_in_strips(up, down, strip_bytes, monkeypatch):
    """Every rate, odd sizes, lopsided filters, positive and negative padding, many strips or one."""
    monkeypatch.setattr("tpdne_cli.networks.filtered.STRIP_BYTES", strip_bytes)
    torch.manual_seed(0)
    channels, size = 2 * CHANNELS, 21
    fu = torch.rand(6 * up) / 6 / up
    fd = torch.rand(6 * down) / 6 / down if up > 2 else torch.rand(6 * down, 6 * down) / (6 * down) ** 2
    x = torch.randn(1, channels, size, size).contiguous(memory_format=torch.channels_last)
    scale, bias, out_scale = torch.randn(3, channels)
    for low, high in ((7, 9), (-5, -2), (12, -3), (0, 0)):
        for clamp in (0.2, 100.0, None):
            full = x * scale[:, None, None]
            expected = filtered_lrelu(full, fu, fd, bias, up, down, (low, high, low, high), clamp=clamp)
            op = FilteredLrelu(fu, fd, up, down, low, size, expected.shape[-1], clamp)
            got = op(x, scale, bias, out_scale)
            close(got, expected * out_scale[:, None, None], f"padding {low}, {high}, clamp {clamp}", atol=2e-6)


@pytest.mark.parametrize("resolution", [256, 512, 1024])
def test_radial_filters_are_a_few_separable_ones(resolution):
    """The published geometries of configuration R: two to four passes reproduce every filter."""
    for layer in Config(resolution, use_radial_filters=True).layers:
        if layer.radial:
            f = lowpass(layer.down_taps, layer.out_cutoff, layer.out_half_width * 2, layer.high_rate, radial=True)
            pairs = separate(f)
            assert 2 <= len(pairs) <= 4, layer.name
            rest = torch.linalg.matrix_norm(f - sum(torch.outer(y, x) for y, x in pairs), 2)
            assert rest < 1e-5 * torch.linalg.matrix_norm(f, 2), layer.name
