"""checkpoints/: files of Python's pickler and of torch, read without either, against golden tensors and images."""

from __future__ import annotations

import importlib
import io
import json
import os
import tracemalloc
from pathlib import Path

import checkpoint_writers as writers
import numpy as np
import pytest
import torch
from conftest import golden, load_tensors
from safetensors.numpy import load_file, save_file

from tpdne_cli.checkpoints import Checkpoint
from tpdne_cli.checkpoints.sniff import read, read_view, sniff
from tpdne_cli.errors import CheckpointError

STYLEGAN2 = [
    "sg2_skip", "sg2_skip_64ch", "sg2_resnet_clamp", "sg2_orig", "sg2_cond", "sg2_asymfilter", "sg2_filter1",
    "sg2_nonoise_1ch", "sg2_from_sg3repo",
]  # fmt: skip
STYLEGAN3 = ["sg3_t", "sg3_r", "sg3_t_cond_clamp", "sg3_r_small"]
DISCRIMINATORS = ["disc_resnet", "disc_cond", "disc_skip", "disc_orig_clamp"]
TENSORFLOW = ["tf_sg2_skip", "tf_sg2_resnet", "tf_sg2_orig"]
STYLEGAN1 = ["tf_sg1_32", "tf_sg1_128"]

TOLERANCE = 1e-4  # on images of nominal range [-1, 1]


def torch_state(tensors: dict) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.array(array, np.float32, order="C")) for name, array in tensors.items()}


def generator_of(checkpoint: Checkpoint):
    network = importlib.import_module(f"tpdne_cli.networks.{checkpoint.arch}")
    config = json.loads(json.dumps(checkpoint.config))  # it must survive being written into a file
    generator = network.Generator(network.Config(**{k: tuple(v) if type(v) is list else v for k, v in config.items()}))
    generator.load_state_dict(torch_state(checkpoint.tensors), strict=True)
    return generator.eval().requires_grad_(False)


def discriminator_of(checkpoint: Checkpoint):
    from tpdne_cli.networks.discriminator import Discriminator, DiscriminatorConfig

    config = json.loads(json.dumps(checkpoint.discriminator_config))
    config = DiscriminatorConfig(**{k: tuple(v) if type(v) is list else v for k, v in config.items()})
    discriminator = Discriminator(config)
    discriminator.load_state_dict(torch_state(checkpoint.discriminator_tensors), strict=True)
    return discriminator.eval().requires_grad_(False)


def assert_same_tensors(found: dict, expected: dict) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        assert found[name].dtype == value.dtype, name
        assert np.array_equal(found[name], value), name


def assert_same_images(checkpoint: Checkpoint, folder: Path, key: str = "img_psi1_const") -> None:
    numbers = load_tensors(folder / "io.safetensors")
    z, c = numbers["z"].float(), numbers.get("c")
    images = generator_of(checkpoint)(z, None if c is None else c.float())
    torch.testing.assert_close(images, numbers[key], atol=TOLERANCE, rtol=0)


# -- NVIDIA, PyTorch


@pytest.mark.parametrize(("protocol", "old_numpy"), [(3, True), (3, False), (4, True), (4, False), (5, False)])
@pytest.mark.parametrize("name", ["sg2_skip", "sg2_cond", "sg3_r"])
def test_every_protocol_gives_the_same_tensors(name, protocol, old_numpy):
    folder = golden(name)
    checkpoint = read_view(memoryview(writers.nvidia(folder, protocol=protocol, old_numpy=old_numpy)))
    assert_same_tensors(checkpoint.tensors, load_file(folder / "weights.safetensors"))
    assert checkpoint.meta == {"format": "nvidia"}


@pytest.mark.parametrize("name", STYLEGAN2)
def test_nvidia_stylegan2(name):
    folder = golden(name)
    checkpoint = read_view(memoryview(writers.nvidia(folder)))
    assert checkpoint.arch == "stylegan2"
    assert_same_tensors(checkpoint.tensors, load_file(folder / "weights.safetensors"))
    assert_same_images(checkpoint, folder)


@pytest.mark.parametrize("name", STYLEGAN3)
def test_nvidia_stylegan3(name):
    folder = golden(name)
    checkpoint = read_view(memoryview(writers.nvidia(folder)))
    assert checkpoint.arch == "stylegan3"
    assert_same_tensors(checkpoint.tensors, load_file(folder / "weights.safetensors"))
    assert_same_images(checkpoint, folder)


@pytest.mark.parametrize("name", DISCRIMINATORS)
def test_nvidia_discriminator(name):
    folder = golden(name)
    checkpoint = read_view(memoryview(writers.nvidia(golden("sg2_skip"), folder)))
    assert_same_tensors(checkpoint.discriminator_tensors, load_file(folder / "weights.safetensors"))
    numbers = load_tensors(folder / "io.safetensors")
    c = numbers["c"][:8].float() if "c" in numbers else None
    logits = discriminator_of(checkpoint)(numbers["img"][:8], c)
    torch.testing.assert_close(logits, numbers["logits_batch8"], atol=1e-3, rtol=1e-4)


def changed(folder: Path, path: str, **attributes) -> memoryview:
    root = writers.golden_module(folder)
    root.get_submodule(path).__dict__.update(attributes)
    return memoryview(writers.dumps({"G_ema": root, "D": None}, 4))


@pytest.mark.parametrize(
    ("path", "attributes", "sentence"),
    [
        ("mapping.fc3", {"activation": "relu"}, "another activation"),
        ("mapping.fc3", {"bias_gain": 0.1, "weight_gain": 0.1 / 8}, "do not agree on a conv_clamp or lr_multiplier"),
        ("synthesis.b8.torgb", {"weight_gain": 1.0}, "scales its weights in a way of its own"),
        ("synthesis.b8.conv1", {"conv_clamp": 256}, "do not agree on a conv_clamp"),
        ("synthesis.b8.conv1", {"conv_clamp": float("nan")}, "is no number"),
        ("synthesis", {"_modules": {"b4": 1}}, "is no module"),
        ("synthesis.b4", {"_parameters": {"const": 1}}, "is no tensor"),
        ("synthesis.b4", {"_buffers": None}, "is no dict"),
    ],
)
def test_a_fork_that_differs_is_refused(path, attributes, sentence):
    with pytest.raises(CheckpointError, match=sentence):
        read_view(changed(golden("sg2_skip"), path, **attributes))


def test_a_learning_rate_multiplier_of_its_own_is_read_from_the_layers():
    root = writers.golden_module(golden("sg2_skip"))
    for i in range(8):
        root.get_submodule(f"mapping.fc{i}").__dict__.update(bias_gain=0.1, weight_gain=0.1 / np.sqrt(64))
    assert read_view(memoryview(writers.dumps({"G_ema": root}, 4))).config["mapping_lr_multiplier"] == 0.1


def test_a_discriminator_whose_label_mapping_has_no_layers():
    critic = writers.golden_module(golden("disc_cond"))
    for i in range(8):
        critic.mapping._modules.pop(f"fc{i}", None)
    data = writers.dumps({"G_ema": writers.golden_module(golden("sg2_skip")), "D": critic}, 4)
    checkpoint = read_view(memoryview(data))
    assert checkpoint.discriminator_config["mapping_layers"] == 0, checkpoint.meta
    discriminator_of(checkpoint)


def test_a_filter_that_is_not_of_numbers_is_refused():
    root = writers.golden_module(golden("sg2_skip"))
    root.synthesis.b4.register_buffer("resample_filter", torch.tensor([1.0, float("inf")]))
    with pytest.raises(CheckpointError, match="resample_filter holds values that are not numbers"):
        read_view(memoryview(writers.dumps({"G_ema": root}, 4)))


@pytest.mark.parametrize("name", ["sg2_skip", "sg3_t"])
def test_a_generator_without_z_is_refused(name):
    root = writers.golden_module(golden(name))
    for layer in list(root.mapping._modules):
        del root.mapping._modules[layer]
    with pytest.raises(CheckpointError, match="takes no z"):
        read_view(memoryview(writers.dumps({"G_ema": root}, 4)))


def test_a_discriminator_of_another_kind_does_not_spoil_its_generator():
    critic = writers.golden_module(golden("disc_resnet"))
    del critic.b16
    data = writers.dumps({"G_ema": writers.golden_module(golden("sg2_skip")), "D": critic}, 4)
    checkpoint = read_view(memoryview(data))
    assert checkpoint.discriminator_config is None
    assert "its blocks are of the sizes [4, 8, 32]" in checkpoint.meta["discriminator"]


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("wavelets", True), ("channel_base", 4),
        ("channel_max", 1 << 30), ("margin_size", -1), ("first_cutoff", float("nan")), ("filter_size", "6"),
    ],
)  # fmt: skip
def test_stylegan3_with_a_setting_that_cannot_be(setting, value):
    root = writers.golden_module(golden("sg3_t"))
    root.__dict__["_init_kwargs"][setting] = value
    with pytest.raises(CheckpointError, match=setting if setting != "channel_base" else "wrong shape"):
        read_view(memoryview(writers.dumps({"G_ema": root}, 4)))


# -- NVIDIA, TensorFlow


@pytest.mark.parametrize("protocol", [3, 4, 5])
@pytest.mark.parametrize("name", TENSORFLOW)
def test_tensorflow_stylegan2(name, protocol):
    folder = golden(name)
    checkpoint = read_view(memoryview(writers.tensorflow(folder, protocol)))
    assert checkpoint.arch == "stylegan2"
    assert_same_tensors(checkpoint.tensors, load_file(folder / "nvidia_state_dict.safetensors"))
    if protocol == 4:
        assert_same_images(checkpoint, folder, "img_psi1")
        numbers = load_tensors(folder / "disc_io.safetensors")
        logits = discriminator_of(checkpoint)(numbers["img"])
        torch.testing.assert_close(logits, numbers["logits_batch4"], atol=1e-3, rtol=1e-4)


def test_tensorflow_settings_beat_defaults():
    settings = {"mapping_lrmul": 0.02, "conv_clamp": 256, "resample_kernel": [1, 2, 1]}
    checkpoint = read_view(memoryview(writers.tensorflow(golden("tf_sg2_skip"), **settings)))
    config = checkpoint.config
    assert (config["mapping_lr_multiplier"], config["conv_clamp"], config["resample_filter"]) == (0.02, 256, [1, 2, 1])
    generator_of(checkpoint)


def as_grown(variables: dict, prefix: str, colours: str, lod: float = 0) -> dict:
    """The variables of a network of architecture 'orig' under the names that configurations B to D use."""
    renamed = {
        name.replace(f"{prefix}32x32/{colours}/", f"{prefix}{colours}_lod0/"): value
        for name, value in variables.items()
    }
    for smaller in (1, 2, 3):
        renamed[f"{prefix}{colours}_lod{smaller}/bias"] = np.zeros(3, np.float32)
    return renamed | {f"{prefix}lod": np.array(lod, np.float32)}


def test_tensorflow_stylegan2_that_grew(tmp_path):
    """Configurations B to D: the reference's images of 'orig', which is what they compute at lod 0."""
    folder = golden("tf_sg2_orig")
    for name in ("config.json", "io.safetensors"):
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    save_file(
        as_grown(load_file(folder / "variables.safetensors"), "synthesis/", "ToRGB"), tmp_path / "variables.safetensors"
    )
    critic = as_grown(load_file(folder / "disc_variables.safetensors"), "", "FromRGB")
    save_file(critic, tmp_path / "disc_variables.safetensors")
    data = writers.tensorflow(tmp_path, changes={"build_func_name": "training.networks_stylegan2.D_stylegan"})
    checkpoint = read_view(memoryview(data))
    assert checkpoint.config["architecture"] == "orig"
    assert_same_images(checkpoint, folder, "img_psi1")
    numbers = load_tensors(folder / "disc_io.safetensors")
    logits = discriminator_of(checkpoint)(numbers["img"])
    torch.testing.assert_close(logits, numbers["logits_batch4"], atol=1e-3, rtol=1e-4)


def test_tensorflow_stylegan2_that_is_still_growing(tmp_path):
    folder = golden("tf_sg2_orig")
    (tmp_path / "config.json").write_bytes((folder / "config.json").read_bytes())
    variables = as_grown(load_file(folder / "variables.safetensors"), "synthesis/", "ToRGB", lod=0.5)
    save_file(variables, tmp_path / "variables.safetensors")
    with pytest.raises(CheckpointError, match="before it had grown to full size"):
        read_view(memoryview(writers.tensorflow(tmp_path)))


def test_images_that_are_not_square_are_named():
    root = writers.golden_module(golden("sg2_skip"))
    const = root.synthesis.b4.const
    root.synthesis.b4.const = torch.nn.Parameter(const[:, :, :3].detach().clone())
    with pytest.raises(CheckpointError, match="images that are not square; this network begins with 3x4"):
        read_view(memoryview(writers.dumps({"G_ema": root}, 4)))


def test_a_z_of_absurd_size_is_refused():
    """Its mean w would be made from ten thousand of them."""
    state = {"style.1.weight": torch.zeros(64, 1 << 15)}
    folder = golden("rosinality_tiny")
    whole = {k: torch.from_numpy(v) for k, v in load_file(folder / "weights.safetensors").items()}
    file = io.BytesIO()
    torch.save({"g_ema": whole | state}, file)
    with pytest.raises(CheckpointError, match="a generator whose z has 32768 numbers"):
        read_view(memoryview(file.getvalue()))


@pytest.mark.parametrize("name", STYLEGAN1)
def test_tensorflow_stylegan1(name):
    folder = golden(name)
    checkpoint = read_view(memoryview(writers.tensorflow(folder)))
    assert checkpoint.arch == "stylegan1"
    assert (checkpoint.meta["truncation"], checkpoint.meta["truncation_cutoff"]) == (0.7, 8)
    assert_same_images(checkpoint, folder, "img_psi1")


def test_tensorflow_critic_of_another_kind_does_not_spoil_its_generator():
    doubled: list = []
    for _ in range(60):
        doubled = [doubled, doubled]  # to print it would take all memory there is
    for settings in ({"mbstd_group_size": doubled}, {"resample_kernel": doubled}, {"conv_clamp": doubled}):
        checkpoint = read_view(
            memoryview(writers.tensorflow(golden("tf_sg2_skip"), changes={"static_kwargs": settings}))
        )
        assert checkpoint.discriminator_config is None
        assert "left out: damaged" in checkpoint.meta["discriminator"]
    checkpoint = read_view(memoryview(writers.tensorflow(golden("tf_sg2_skip"), changes={"build_func_name": doubled})))
    assert checkpoint.discriminator_config["mbstd_group_size"] is None


@pytest.mark.parametrize(
    ("name", "settings", "sentence"),
    [
        ("tf_sg2_skip", {"nonlinearity": "relu"}, "nonlinearity"),
        ("tf_sg2_skip", {"mapping_lrmul": "fast"}, "mapping_lrmul is no number"),
        ("tf_sg2_skip", {"resample_kernel": []}, "resample_kernel"),
        ("tf_sg1_32", {"use_instance_norm": False}, "use_instance_norm"),
        ("tf_sg1_32", {"fused_scale": True}, "fused_scale"),
        ("tf_sg1_32", {"label_size": 10}, "classes"),
        ("tf_sg1_32", {"blur_filter": [1, 3, 3, 1]}, "filter"),
    ],
)
def test_tensorflow_networks_that_are_not_ours_are_refused(name, settings, sentence):
    with pytest.raises(CheckpointError, match=sentence):
        read_view(memoryview(writers.tensorflow(golden(name), **settings)))


# -- rosinality


def test_rosinality_converted():
    folder = golden("rosinality_tiny")
    checkpoint = read(folder / "checkpoint_convert.pt")
    assert np.array_equal(checkpoint.tensors["mapping.w_avg"], load_file(folder / "io.safetensors")["latent_avg"])
    assert_same_images(checkpoint, folder)
    assert checkpoint.config["channels"] == [32, 32, 32, 16]


@pytest.mark.parametrize("zipped", [True, False])
def test_rosinality_training(zipped):
    torch.manual_seed(0)
    critic = writers.Discriminator(32, 8)
    data = writers.rosinality(golden("rosinality_tiny"), zipped, critic)
    checkpoint = read_view(memoryview(data))
    converted = read(golden("rosinality_tiny") / "checkpoint_convert.pt").tensors
    assert_same_tensors(checkpoint.tensors, {k: v for k, v in converted.items() if k != "mapping.w_avg"})
    images = torch.randn(8, 3, 32, 32)
    torch.testing.assert_close(discriminator_of(checkpoint)(images), critic(images), atol=1e-3, rtol=1e-4)


def test_rosinality_before_it_stored_noise():
    first, second = (
        read_view(memoryview(writers.rosinality(golden("rosinality_tiny"), noises=False))).tensors for _ in range(2)
    )
    assert_same_tensors(first, second)
    assert first["synthesis.b8.conv0.noise_const"].std() == pytest.approx(1, abs=0.3)


def test_rosinality_names_are_those_of_a_real_256_px_model():
    shapes = json.loads((golden("rosinality_tiny") / "keys_real_256_cm2.json").read_text())
    state = {name: torch.zeros(1).expand(shape).clone() for name, shape in shapes.items()}
    for name in state:
        if name.endswith("kernel"):
            state[name] = torch.ones_like(state[name])
    file = io.BytesIO()
    torch.save({"g_ema": state}, file)
    config = read_view(memoryview(file.getvalue())).config
    assert config["resolution"] == 256
    assert config["channels"] == [512, 512, 512, 512, 512, 256, 128]
    assert config["mapping_layers"] == 8


# -- any file


def test_formats_are_told_by_content(tmp_path):
    contents = {
        "nvidia": writers.nvidia(golden("sg2_skip")),
        "tensorflow": writers.tensorflow(golden("tf_sg2_skip")),
        "rosinality": writers.rosinality(golden("rosinality_tiny"), zipped=False),
        "safetensors": (golden("sg2_skip") / "weights.safetensors").read_bytes(),
    }
    for expected, data in contents.items():
        path = tmp_path / f"{expected}.jpg"
        path.write_bytes(data)
        assert sniff(path) == expected


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00", "Git LFS"),
        (b"hello", "not a checkpoint"),
        (b"\x80\x04N.", "pickle of something else"),
        (b"\x80\x04}\x8c\x03GANK\x01s.", "lucidrains"),
        (b"\x80\x04}\x8c\x05otherK\x01s.", "the file holds other, but no network"),
    ],
)
def test_other_files_are_told_apart(tmp_path, data, sentence):
    path = tmp_path / "file.pkl"
    path.write_bytes(data)
    for function in (sniff, read):
        with pytest.raises(CheckpointError, match=sentence) as caught:
            function(path)
        assert str(caught.value).startswith(f"{path}: ")


def test_what_is_no_file(tmp_path):
    paths = [tmp_path, tmp_path / "missing.pkl", tmp_path / "\0.pkl"]
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        paths.append(tmp_path / "pipe")
    for path in paths:
        with pytest.raises(CheckpointError, match="cannot be read"):
            read(path)


def test_one_tensor_under_many_names_is_refused():
    root = writers.golden_module(golden("sg2_skip"))
    shared = torch.zeros(1 << 20)
    for i in range(100):
        root.synthesis.register_buffer(f"again{i}", shared)
    with pytest.raises(CheckpointError, match="larger than the file"):
        read_view(memoryview(writers.dumps({"G_ema": root}, 4)))


def test_reading_copies_nothing(tmp_path):
    root = writers.golden_module(golden("sg2_skip"))
    root.synthesis.register_buffer("unused", torch.zeros(8 << 20))  # 32 MiB
    path = tmp_path / "large.pkl"
    path.write_bytes(writers.dumps({"G_ema": root}, 4))
    tracemalloc.start()
    try:
        checkpoint = read(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20
    assert not checkpoint.tensors["synthesis.unused"].flags.writeable
    assert checkpoint.tensors["synthesis.unused"].base is not None
