"""The training room: pictures, losses, augmentation, growth, and runs that can be stopped at any moment."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from running import start

from tpdne_cli import devices, models
from tpdne_cli.errors import CheckpointError, DeviceError, TrainingError
from tpdne_cli.networks.ops import downsample2d, setup_filter, upsample2d
from tpdne_cli.training import checkpoint, data, growth, losses, precision
from tpdne_cli.training.augment import Ada, DiffAugment, sample
from tpdne_cli.training.config import Stage, TrainConfig, parse_schedule, recommended
from tpdne_cli.training.export import export
from tpdne_cli.training.loop import LOG, Run, train


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Ten 16x16 pictures."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    pixels = np.random.RandomState(0).randint(0, 256, (10, 16, 16, 3), dtype=np.uint8)
    for i, picture in enumerate(pixels):
        Image.fromarray(picture).save(folder / f"{i}.png")
    return folder


def tiny(pictures: Path, run_dir: Path, **changes) -> TrainConfig:
    """A run of seconds: 16 px, eight channels."""
    small = TrainConfig(
        data=str(pictures), run_dir=str(run_dir), schedule="16", images=16, batch=4, z_dim=8, w_dim=8, mapping_layers=2,
        channel_base=128, channel_max=8, precision="float32", device="cpu", r1_every=2, log_every=2, critic_head_start=4
    )  # fmt: skip
    return dataclasses.replace(small, **changes)


def nets(resolution: int = 8) -> growth.Networks:
    torch.manual_seed(0)
    config = TrainConfig(
        data="", run_dir="", z_dim=8, w_dim=8, mapping_layers=2, channel_base=128, channel_max=8, schedule="8"
    )
    return growth.build(config, resolution)


def assert_same(a: dict, b: dict) -> None:
    """Two checkpoints, bit for bit."""
    assert a.keys() == b.keys()
    for key in a:
        if isinstance(a[key], torch.Tensor):
            assert torch.equal(a[key], b[key]), key
        elif isinstance(a[key], dict):
            assert_same(a[key], b[key])
        elif key not in ("seconds", "run_dir", "images", "log_every"):
            assert a[key] == b[key], key


# --- pictures


def test_pictures_are_cropped_at_the_centre_and_averaged(tmp_path: Path) -> None:
    pixels = np.random.RandomState(1).randint(0, 256, (32, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    square = pixels[:, 8:40].astype(np.float64)
    blocks = square.reshape(16, 2, 16, 2, 3).mean(axis=(1, 3))
    found = data.load_images(tmp_path, 16)
    assert found.dtype == torch.uint8 and found.shape == (1, 3, 16, 16)
    assert np.abs(found[0].permute(1, 2, 0).numpy() - blocks).max() <= 0.5 + 1e-9


def test_folder_and_zip_give_the_same_and_pass_other_files_over(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "deeper").mkdir(parents=True)
    for i, name in enumerate(["a.png", "b.JPG", "deeper/c.webp"]):
        Image.new("RGB", (20, 20), (i * 100, 0, 50)).save(folder / name)
    (folder / "sources.csv").write_text("file,source\n")
    (folder / ".hidden.png").write_bytes(b"no picture")
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for file in sorted(folder.rglob("*.*")):
            archive.write(file, file.relative_to(folder))
    from_folder, from_zip = data.load_images(folder, 8), data.load_images(tmp_path / "all.zip", 8)
    assert torch.equal(from_folder, from_zip)
    assert [round(float(c)) // 90 for c in from_folder[:, 0].float().mean((1, 2))] == [0, 1, 2]


def test_transparency_becomes_white_and_grey_becomes_colour(tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "a.png")
    Image.new("L", (8, 8), 7).save(tmp_path / "b.png")
    found = data.load_images(tmp_path, 8)
    assert (found[0] == 255).all() and (found[1] == 7).all()


def test_photographs_are_turned_as_their_camera_says(tmp_path: Path) -> None:
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[:, :8] = 255  # the left half is bright
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees to the right
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    (found,) = data.load_images(tmp_path, 16)
    assert (found[:, :8] == 255).all() and (found[:, 8:] == 0).all(), "the upper half is bright"


def test_sixteen_bits_of_grey_become_eight(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    with Image.open(tmp_path / "deep.png") as image:
        assert image.mode.startswith("I")
    assert np.abs(data.load_images(tmp_path, 8)[0].numpy() - ramp / 257).max() < 1


def test_pictures_too_small_for_the_last_stage_are_refused_at_the_first(tmp_path: Path, pictures: Path) -> None:
    with pytest.raises(TrainingError, match="16x16 pixels, smaller than the 32"):
        Run(tiny(pictures, tmp_path / "run", schedule="16:4,32"), None)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.png", b"no picture", "x.png is not a readable picture"),
        ("sources.csv", b"a,b", "no PNG, JPEG or WebP"),
        ("small.png", None, "small.png is 9x12 pixels, smaller than the 16"),
    ],
)
def test_bad_pictures_are_named(tmp_path: Path, name: str, content: bytes | None, words: str) -> None:
    if content is None:
        Image.new("RGB", (9, 12)).save(tmp_path / name)
    else:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(TrainingError, match=words):
        data.load_images(tmp_path, 16)


def test_missing_source_and_broken_zip_are_named(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="does not exist"):
        data.load_images(tmp_path / "nowhere", 16)
    (tmp_path / "broken.zip").write_bytes(b"PK but not really")
    with pytest.raises(TrainingError, match="neither a folder nor a readable zip"):
        data.load_images(tmp_path / "broken.zip", 16)


def test_every_pass_shows_every_picture_once_in_a_new_order() -> None:
    seen, position = [], 0
    for _ in range(5):
        indices, position = data.batch_indices(10, 4, 0, position)
        seen += indices.tolist()
    assert position == 20 and sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]
    again, _ = data.batch_indices(10, 4, 0, 8)
    assert again.tolist() == seen[8:12]


# --- losses


def test_losses_are_the_logistic_ones() -> None:
    x = torch.linspace(-5, 5, 11, dtype=torch.float64)
    sigmoid = 1 / (1 + np.exp(-x.numpy()))
    assert np.isclose(losses.generator_loss(x), -np.log(sigmoid).mean())
    assert np.isclose(losses.real_loss(x), -np.log(sigmoid).mean())
    assert np.isclose(losses.fake_loss(x), -np.log(1 - sigmoid).mean())


def test_r1_is_the_squared_gradient_and_can_be_derived_again() -> None:
    weight = torch.nn.Parameter(torch.randn(3, 4, 4, dtype=torch.float64))
    x = torch.randn(5, 3, 4, 4, dtype=torch.float64)
    penalty = losses.r1_penalty(lambda y: (y.square() * weight).sum((1, 2, 3))[:, None], x)
    assert np.isclose(penalty.item(), (2 * x * weight).square().sum((1, 2, 3)).mean().item())
    penalty.backward()
    assert torch.allclose(weight.grad, (8 * x.square() * weight).mean(0))


# --- augmentation


def test_r1_convolves_with_no_kernel_as_large_as_an_image() -> None:
    """As autograd would, which is slow, and wrong in bfloat16 on some processors; its gradient is the same."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Kernels(TorchDispatchMode):
        seen: list[int] = []  # noqa: RUF012

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.convolution.default:
                self.seen.append(max(args[1].shape[2:]))
            return func(*args, **(kwargs or {}))

    critic = nets(32).discriminator
    reals = torch.rand(4, 3, 32, 32)
    with Kernels() as kernels:
        losses.r1_penalty(critic, reals).backward()
    assert kernels.seen and max(kernels.seen) <= 4
    image = reals.clone().requires_grad_(True)  # the same by autograd's own way
    (gradient,) = torch.autograd.grad(critic(image).sum(), image, create_graph=True)
    learning = [p for p in critic.parameters() if p.grad is not None]
    found = torch.autograd.grad(gradient.square().sum(dim=(1, 2, 3)).mean(), learning, allow_unused=True)
    for parameter, wanted in zip(learning, found, strict=True):
        if wanted is not None:
            torch.testing.assert_close(parameter.grad, wanted, rtol=1e-4, atol=1e-7)
        else:
            assert not parameter.grad.any()


@pytest.mark.skipif(not devices.bfloat16_survives(), reason="no bfloat16 on this processor")
@pytest.mark.parametrize("batch", [4, 8])
def test_r1_in_bfloat16_points_where_that_in_float32_does(batch: int) -> None:
    config = TrainConfig(data="", run_dir="", schedule="64", channel_base=2048, channel_max=64)
    torch.manual_seed(0)
    critic = growth.build(config, 64).discriminator.to(memory_format=torch.channels_last)
    reals = torch.rand(batch, 3, 64, 64).contiguous(memory_format=torch.channels_last) * 2 - 1
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        critic.set_precision(dtype)
        critic.zero_grad()
        losses.r1_penalty(critic, reals).backward()
        found.append({name: p.grad.flatten() for name, p in critic.named_parameters() if p.grad is not None})
    for name in found[0]:
        if name.endswith("weight"):
            assert F.cosine_similarity(found[0][name], found[1][name], dim=0) > 0.98, name


def test_augmentation_of_no_strength_changes_nothing() -> None:
    x = torch.rand(6, 3, 16, 16) * 2 - 1
    assert torch.allclose(Ada(torch.device("cpu"))(x), x, atol=1e-5)
    assert torch.allclose(DiffAugment(0.0)(x), x, atol=1e-5)


@pytest.mark.parametrize("kind", ["diffaugment", "ada"])
def test_augmentation_changes_each_image_its_own_way_and_lets_gradients_through(kind: str) -> None:
    torch.manual_seed(0)
    ada = Ada(torch.device("cpu"))
    ada.p.fill_(1.0)
    x = (torch.rand(1, 3, 16, 16) * 2 - 1).repeat(4, 1, 1, 1).requires_grad_()
    y = (ada if kind == "ada" else DiffAugment())(x)
    assert y.shape == x.shape and y.isfinite().all()
    assert all((y[i] - y[j]).abs().max() > 0.05 for i in range(4) for j in range(i))
    y.sum().backward()
    assert x.grad is not None and (x.grad != 0).any(dim=3).any(dim=2).all()


def test_translation_moves_by_whole_pixels_and_fills_with_grey() -> None:
    torch.manual_seed(1)
    x = torch.rand(32, 3, 16, 16) + 1
    y = DiffAugment()._translation(x)
    padded = torch.nn.functional.pad(x, (2, 2, 2, 2))
    for i in range(32):
        shifts = [padded[i, :, a : a + 16, b : b + 16] for a in range(5) for b in range(5)]
        assert any(torch.equal(y[i], shifted) for shifted in shifts)


@pytest.mark.parametrize(("mode", "padding"), [("nearest", "zeros"), ("bilinear", "reflection")])
def test_sampling_is_torchs_and_can_be_derived_twice(mode: str, padding: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 2, 5, 5, dtype=torch.float64, requires_grad=True)
    grid = torch.rand(2, 5, 5, 2, dtype=torch.float64) * 3 - 1.5
    ours = sample(x, grid, mode, padding)
    assert torch.equal(ours, F.grid_sample(x, grid, mode, padding, align_corners=False))
    assert torch.autograd.gradcheck(lambda x: sample(x, grid, mode, padding), x)
    assert torch.autograd.gradgradcheck(lambda x: sample(x, grid, mode, padding).square(), x)


def test_cutout_takes_at_most_a_quarter() -> None:
    torch.manual_seed(2)
    holes = (DiffAugment()._cutout(torch.ones(64, 3, 16, 16)) == 0)[:, 0].sum((1, 2))
    assert holes.min() >= 16 and holes.max() == 64


def test_ada_follows_the_sign_of_the_critic() -> None:
    ada = Ada(torch.device("cpu"), target=0.6, images_to_full=100)
    for r_t in (1.0, 1.0, 0.2, 0.3):  # of four batches the average counts, 0.625
        assert ada.p.item() == 0.0
        ada.update(torch.tensor(r_t), 10)
    assert ada.p.item() == pytest.approx(0.4)
    for _ in range(12):
        ada.update(torch.tensor(0.1), 10)
    assert ada.p.item() == 0.0


def test_ada_moves_both_ways_or_not_at_all() -> None:
    torch.manual_seed(0)
    ada = Ada(torch.device("cpu"))
    pick = ada._picker(torch.tensor(0.5))
    x, y = pick(torch.ones(2, 1000), 0)
    assert torch.equal(x, y) and 400 < x.sum() < 600


def test_ada_colours_keep_grey_grey_under_hue_and_saturation() -> None:
    torch.manual_seed(0)
    ada = Ada(torch.device("cpu"))
    ada.p.fill_(1.0)
    grey = torch.full((16, 3, 4, 4), 0.25)
    y = ada._recolour(grey)
    assert (y - y.mean(1, keepdim=True)).abs().max() < 1e-5


# --- networks that grow


def test_growing_the_generator_leaves_its_image_as_it_was() -> None:
    small = nets()
    for generator in (small.generator, small.ema):
        with torch.no_grad():
            generator.mapping.w_avg.normal_()
    large = growth.grow(small)
    z = torch.randn(3, 8)
    for before, after in ((small.generator, large.generator), (small.ema, large.ema)):
        with torch.no_grad():
            expected = upsample2d(before(z, psi=0.7, noise="const"), setup_filter([1, 3, 3, 1]))
            assert (after(z, psi=0.7, noise="const") - expected).abs().max() < 1e-5
    assert large.generator.config.resolution == large.discriminator.config.resolution == 16


def test_growing_the_critic_leaves_its_judgement_as_it_was() -> None:
    small = nets()
    with torch.no_grad():
        small.discriminator.b8.fromrgb.bias.normal_()
    large = growth.grow(small)
    images = torch.rand(8, 3, 16, 16) * 2 - 1
    with torch.no_grad():
        expected = small.discriminator(downsample2d(images, setup_filter([1, 3, 3, 1])))
        found = large.discriminator(images)
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()
    large.discriminator(images).sum().backward()
    front = large.discriminator.b16
    assert all((p.grad != 0).any() for p in (front.conv1.weight, front.skip.weight, front.fromrgb.weight))
    old, new = small.discriminator.state_dict(), large.discriminator.state_dict()
    assert torch.equal(old["b8.conv0.weight"], new["b8.conv0.weight"]) and "b8.fromrgb.weight" not in new


def test_adams_moments_survive_growth() -> None:
    small, large = nets(), growth.grow(nets())
    before = torch.optim.Adam(small.generator.parameters())
    small.generator(torch.randn(2, 8)).sum().backward()
    before.step()
    after = torch.optim.Adam(large.generator.parameters())
    growth.carry_moments(small.generator, before, large.generator, after)
    moments = after.state[large.generator.mapping.fc0.weight]
    assert torch.equal(moments["exp_avg_sq"], before.state[small.generator.mapping.fc0.weight]["exp_avg_sq"])
    assert large.generator.synthesis.b16.conv0.weight not in after.state


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("32,64:1k", "every stage but the last"),
        ("48", "powers of two"),
        ("32:1k,128", "doubles"),
        ("big", "no stage"),
    ],
)
def test_schedules_that_are_none(text: str, words: str) -> None:
    with pytest.raises(TrainingError, match=words):
        parse_schedule(text)


def test_a_schedule() -> None:
    assert parse_schedule("32:60k, 64:1.5M,128") == (Stage(32, 60_000), Stage(64, 1_500_000), Stage(128, None))


# --- checkpoints


def test_a_checkpoint_reaches_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order = []
    for owner, name in ((os, "fsync"), (Path, "replace")):
        original = getattr(owner, name)

        def spy(*arguments, original=original, name=name):
            order.append(name)
            return original(*arguments)

        monkeypatch.setattr(owner, name, spy)
    for number in (1, 2):
        checkpoint.save(tmp_path, {"number": number})
    assert order == ["fsync", "replace", "fsync", "fsync", "replace", "replace", "fsync"], "at last the folder's"


def test_the_checkpoint_before_is_kept_and_serves_when_the_newest_is_damaged(tmp_path: Path) -> None:
    for number in (1, 2):
        checkpoint.save(tmp_path, {"number": number})
    assert checkpoint.load(tmp_path)["number"] == 2
    (tmp_path / checkpoint.LATEST).write_bytes(b"half")
    assert checkpoint.load(tmp_path)["number"] == 1
    (tmp_path / checkpoint.LATEST).unlink()  # what a kill between the two renames leaves
    assert checkpoint.load(tmp_path)["number"] == 1
    (tmp_path / checkpoint.LATEST).write_bytes(b"half")
    rename = os.replace
    with pytest.MonkeyPatch.context() as patch:  # killed there once more
        patch.setattr(Path, "replace", lambda a, b: rename(a, b) if b.name == checkpoint.PREVIOUS else 1 / 0)
        with pytest.raises(ZeroDivisionError):
            checkpoint.save(tmp_path, {"number": 3})
    assert checkpoint.load(tmp_path)["number"] == 3


def test_a_checkpoint_never_runs_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"config": Evil()}, tmp_path / checkpoint.LATEST)
    with pytest.raises(TrainingError):
        checkpoint.load(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_no_checkpoint_is_one_sentence(tmp_path: Path, pictures: Path) -> None:
    with pytest.raises(TrainingError, match="holds no checkpoint"):
        train(tiny(pictures, tmp_path / "run"), resume=True)


# --- runs


@pytest.mark.parametrize("augment", ["ada", "diffaugment", "none"])
def test_a_stopped_run_ends_bit_for_bit_where_an_unbroken_one_does(
    tmp_path: Path, pictures: Path, augment: str
) -> None:
    settings = {"schedule": "8:24,16", "images": 48, "augment": augment, "ada_images": 50}
    whole = tiny(pictures, tmp_path / "whole", **settings)
    train(whole)
    broken = dataclasses.replace(whole, run_dir=str(tmp_path / "broken"))
    for limit in (16, 28, 40, 48):  # within a stage, right after growth, later, the end
        steps = dataclasses.replace(broken, images=limit)
        train(steps, resume=limit != 16)
    assert_same(checkpoint.load(tmp_path / "whole"), checkpoint.load(tmp_path / "broken"))


def test_should_stop_leaves_a_checkpoint_and_the_callers_random_state(tmp_path: Path, pictures: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train(tiny(pictures, tmp_path / "run"), should_stop=lambda: True)
    assert torch.equal(torch.rand(3), expected)
    assert checkpoint.load(tmp_path / "run")["counters"]["images"] == 0
    with pytest.raises(TrainingError, match="--resume"):
        train(tiny(pictures, tmp_path / "run"))


def test_a_run_killed_outright_goes_on(tmp_path: Path, pictures: Path) -> None:
    config = tiny(pictures, tmp_path / "run", images=10**9, checkpoint_seconds=0.0)
    program = (
        "import json, sys\n"
        "from tpdne_cli.training import config, loop\n"
        "loop.train(config.TrainConfig(**json.loads(sys.argv[1])))"
    )
    child = subprocess.Popen([sys.executable, "-c", program, json.dumps(config.to_json())])
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "run" / checkpoint.PREVIOUS).exists():
            assert child.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        child.send_signal(signal.SIGKILL if hasattr(signal, "SIGKILL") else signal.SIGTERM)
        child.wait()
    images = checkpoint.load(tmp_path / "run")["counters"]["images"]
    log = tmp_path / "run" / LOG
    with log.open("a") as file:  # written after the checkpoint, and half a line at the kill
        file.write(json.dumps({"images": images + 8}) + '\n{"ima')
    train(dataclasses.replace(config, images=images + 8), resume=True)
    assert checkpoint.load(tmp_path / "run")["counters"]["images"] == images + 8
    logged = [json.loads(line)["images"] for line in log.read_text().splitlines()]
    assert logged == sorted(set(logged)) and logged[-1] == images + 8


def test_a_run_from_a_device_without_fused_adam_goes_on(tmp_path: Path, pictures: Path) -> None:
    config = tiny(pictures, tmp_path / "run", images=8)
    train(config)
    state = checkpoint.load(tmp_path / "run")
    for name in ("g_optimizer", "d_optimizer"):
        state[name]["param_groups"][0]["fused"] = False
    for optimizer in (run := Run(dataclasses.replace(config, learning_rate=0.125), state)).g_optimizer, run.d_optimizer:
        assert optimizer.param_groups[0]["fused"] is True
    assert run.g_optimizer.param_groups[0]["lr"] == 0.125
    assert all(torch.is_tensor(s["step"]) and s["step"] > 0 for s in run.g_optimizer.state.values())


def test_a_run_leaves_log_samples_and_files_that_generate(tmp_path: Path, pictures: Path) -> None:
    heard = []
    train(tiny(pictures, tmp_path / "run"), on_progress=heard.append)
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [line["images"] for line in lines] == [p.images for p in heard] == [8, 16]
    assert lines[-1]["resolution"] == 16 and lines[-1]["r1"] > 0
    with Image.open(tmp_path / "run" / "samples-00000016.png") as sheet:
        assert sheet.size == (128, 128)
    generator, critic = export(tmp_path / "run", tmp_path / "mine.safetensors", {"licence": "mine"})
    model = models.load(generator)
    state = checkpoint.load(tmp_path / "run")
    assert model.info["licence"] == "mine" and model.info["images_seen"] == 16 and model.truncation == 0.7
    assert torch.equal(model.generator.synthesis.b4.const, state["ema"]["synthesis.b4.const"].half().float())
    w = model.generator.mapping(torch.randn(4000, 8))[:, 0]
    assert (model.generator.mapping.w_avg - w.mean(0)).abs().max() < 0.1 * w.std() + 1e-3
    assert critic.name == "mine-critic.safetensors" and critic.exists()


def test_transfer_begins_with_the_other_generators_weights(tmp_path: Path, pictures: Path) -> None:
    train(tiny(pictures, tmp_path / "first"))
    path, _ = export(tmp_path / "first", tmp_path / "first.safetensors")
    second = tiny(pictures, tmp_path / "second", from_model=str(path), images=4)
    run = Run(second, None)
    state = checkpoint.load(tmp_path / "first")
    for net, stored in ((run.nets.generator, state["ema"]), (run.nets.discriminator, state["discriminator"])):
        for name, tensor in net.state_dict().items():
            if name != "mapping.w_avg":
                assert torch.equal(tensor, stored[name].half().float()), name
    run.step()
    with pytest.raises(TrainingError, match="begin the schedule"):
        Run(dataclasses.replace(second, schedule="8:4,16"), None)


def test_frozen_blocks_of_the_critic_stay_and_the_rest_learns(tmp_path: Path, pictures: Path) -> None:
    train(tiny(pictures, tmp_path / "first", schedule="8"))  # blocks b8 and b4
    path, _ = export(tmp_path / "first", tmp_path / "first.safetensors")
    before = checkpoint.load(tmp_path / "first")["discriminator"]
    config = tiny(pictures, tmp_path / "second", from_model=str(path), freeze_critic=1, schedule="8:8,16", images=16)
    train(config)
    state = checkpoint.load(tmp_path / "second")
    assert state["counters"]["stage"] == 1
    for name, tensor in state["discriminator"].items():
        if name in before and "weight" in name:
            assert torch.equal(before[name].half().float(), tensor) == name.startswith("b8."), name
    # Where it goes on alone, the schedule may name the last stage only: what was frozen stays so.
    resumed = Run(dataclasses.replace(config, schedule="16"), state).nets.discriminator
    assert {name for name, p in resumed.named_parameters() if not p.requires_grad} == {
        f"b8.{name}" for name in ("conv0.weight", "conv0.bias", "conv1.weight", "conv1.bias", "skip.weight")
    }
    assert state["d_optimizer"]["state"].keys() == {i for i, p in enumerate(resumed.parameters()) if p.requires_grad}


def test_a_step_follows_the_gradients_of_both_losses_and_no_others(tmp_path: Path, pictures: Path) -> None:
    """Both networks learn from one forward pass; here each loss has a pass of its own."""
    run = Run(tiny(pictures, tmp_path, augment="none"), None)
    generator, critic = run.nets.generator, run.nets.discriminator
    reals = torch.rand(4, 3, 16, 16) * 2 - 1
    fakes = run._generate()

    d_loss = F.softplus(critic(fakes.detach())).mean() + F.softplus(-critic(reals)).mean()
    g_loss = F.softplus(-critic(fakes)).mean()
    wanted = {
        "critic": torch.autograd.grad(d_loss, list(critic.parameters())),
        "generator": torch.autograd.grad(g_loss, list(generator.parameters()), retain_graph=True),
    }
    run._critic_on_reals(reals)
    run._both_on_fakes(fakes)
    for name, network in (("critic", critic), ("generator", generator)):
        for (tensor, parameter), gradient in zip(network.named_parameters(), wanted[name], strict=True):
            torch.testing.assert_close(parameter.grad, gradient, msg=lambda m, t=tensor: f"{t}: {m}")


@pytest.mark.parametrize("mirror", [True, False])
def test_mirroring_turns_left_to_right_and_nothing_else(tmp_path: Path, pictures: Path, mirror: bool) -> None:
    run = Run(tiny(pictures, tmp_path / "run", batch=8, mirror=mirror), None)
    originals, seen = data.to_float(run.pictures), set()
    for _ in range(4):
        for real in run._next_reals():
            for x in originals:
                ways = {"as it is": x, "mirrored": x.flip(2), "upside down": x.flip(1)}
                seen |= {way for way, turned in ways.items() if torch.equal(real, turned)}
    assert seen == ({"as it is", "mirrored"} if mirror else {"as it is"})


@pytest.mark.parametrize("share", [1.0, 0.0])
def test_styles_are_mixed_from_some_layer_on(tmp_path: Path, pictures: Path, share: float) -> None:
    run, seen = Run(tiny(pictures, tmp_path / "run", batch=8, style_mixing=share), None), []
    synthesis = run._synthesis
    run._synthesis = lambda ws, noise: seen.append(ws.detach()) or synthesis(ws, noise=noise)
    for _ in range(4):
        run._generate()
    changes = (torch.cat(seen).diff(dim=1).abs().amax(2) > 0).sum(1)  # between one layer and the next
    assert (changes == int(share)).all(), "one crossover in each image, or none"


@pytest.mark.parametrize("gamma", [3.0, None])
def test_the_lazy_penalty_weighs_as_much_as_one_in_every_step(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch, gamma: float | None
) -> None:
    """Section B of 1912.04958, for the gradient and for Adam."""
    run = Run(tiny(pictures, tmp_path / "run", augment="none", r1_every=4, gamma=gamma), None)
    assert losses.default_gamma(128, 16) == pytest.approx(0.2048)  # what --help and the recipe of ADA say
    reals, critic = torch.rand(4, 3, 16, 16) * 2 - 1, run.nets.discriminator
    weight = (losses.default_gamma(16, 4) if gamma is None else gamma) / 2 * 4
    wanted = torch.autograd.grad(
        losses.r1_penalty(critic, reals) * weight, list(critic.parameters()), allow_unused=True
    )
    monkeypatch.setattr(Run, "_apply", staticmethod(lambda _: None))
    run._step_r1(reals)
    for parameter, gradient in zip(critic.parameters(), wanted, strict=True):
        if gradient is not None:
            torch.testing.assert_close(parameter.grad, gradient)
    (group,) = run.d_optimizer.param_groups
    assert (group["lr"], group["betas"]) == (pytest.approx(0.0025 * 4 / 5), (0.0, pytest.approx(0.99 ** (4 / 5))))
    (group,) = run.g_optimizer.param_groups
    assert (group["lr"], group["betas"]) == (0.0025, (0.0, 0.99))


def test_a_generator_that_comes_without_its_critic(tmp_path: Path, pictures: Path) -> None:
    """A fresh critic gets a head start, since it would teach nonsense, and is not frozen as it was born."""
    train(tiny(pictures, tmp_path / "first"))
    path, critic = export(tmp_path / "first", tmp_path / "first.safetensors")
    critic.unlink()
    config = tiny(pictures, tmp_path / "second", from_model=str(path), critic_head_start=8, images=8)
    with pytest.raises(TrainingError, match="no critic beside it"):
        Run(dataclasses.replace(config, freeze_critic=1), None)
    train(config)
    state = checkpoint.load(tmp_path / "second")
    begun = growth.from_file(path, 16)
    assert torch.equal(state["generator"]["synthesis.b16.conv1.weight"], begun.generator.synthesis.b16.conv1.weight)
    assert not torch.equal(state["discriminator"]["b16.conv1.weight"], begun.discriminator.b16.conv1.weight)
    run = Run(config, state)
    run.step()
    moved = run.nets.generator.synthesis.b16.conv1.weight
    assert not torch.equal(moved, begun.generator.synthesis.b16.conv1.weight), "once the critic has caught up"


@pytest.mark.parametrize(("changes", "words"), [({"c_dim": 3}, "classes"), ({"img_channels": 1}, "red, green, blue")])
def test_generators_that_training_does_not_know(tmp_path: Path, changes: dict, words: str) -> None:
    from tpdne_cli.networks.stylegan2 import Config, Generator

    config = Config(8, 128, 8, z_dim=8, w_dim=8, mapping_layers=2, **changes)
    models.save(tmp_path / "g.safetensors", "stylegan2", config, Generator(config).state_dict())
    with pytest.raises(TrainingError, match=words):
        growth.from_file(tmp_path / "g.safetensors", 8)


def test_a_generator_that_clamps_and_knows_no_mean_w_can_be_trained(tmp_path: Path, pictures: Path) -> None:
    from tpdne_cli.networks.stylegan2 import Config, Generator

    config = Config(16, 128, 8, z_dim=8, w_dim=8, mapping_layers=2, conv_clamp=0.5)
    source = Generator(config)
    tensors = {name: tensor for name, tensor in source.state_dict().items() if name != "mapping.w_avg"}
    models.save(tmp_path / "g.safetensors", "stylegan2", config, tensors)
    run = Run(tiny(pictures, tmp_path / "run", from_model=str(tmp_path / "g.safetensors"), critic_head_start=0), None)
    run.step()
    assert run.nets.generator.mapping.w_avg.abs().max() > 0
    assert not torch.equal(run.nets.generator.synthesis.b16.conv1.weight, source.synthesis.b16.conv1.weight)


def test_what_no_run_can_be(tmp_path: Path, pictures: Path) -> None:
    with pytest.raises(TrainingError, match="groups of 4: a batch of 6"):
        Run(tiny(pictures, tmp_path, batch=6), None)
    Run(tiny(pictures, tmp_path, batch=3), None)
    with pytest.raises(TrainingError, match="channel_base is 64, and must be at least 128"):
        tiny(pictures, tmp_path, schedule="64:4,128", channel_base=64)


def test_a_resumed_run_stays_at_its_resolution(tmp_path: Path, pictures: Path) -> None:
    config = tiny(pictures, tmp_path / "run", schedule="8:8,16", images=12)
    train(config)
    state = checkpoint.load(tmp_path / "run")
    run = Run(dataclasses.replace(config, schedule="16", images=16), state)
    assert run.stage == Stage(16, None)
    run.step()
    with pytest.raises(TrainingError, match="stands at 16 px, which the schedule 32 does not have"):
        Run(dataclasses.replace(config, schedule="32"), state)


def test_a_critic_that_is_no_number_is_not_stored(tmp_path: Path, pictures: Path) -> None:
    run = Run(tiny(pictures, tmp_path), None)
    run.nets.discriminator.b16.conv0.weight.data.fill_(float("nan"))
    with pytest.raises(TrainingError, match="The critic holds values that are not numbers"):
        run.save()
    assert not checkpoint.exists(tmp_path)


def test_a_disk_that_is_full_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_state: object, file: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise RuntimeError("[enforce fail at inline_container.cc] unexpected pos 64 vs 0\nmore")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(TrainingError, match=r"cannot be written: .*unexpected pos 64 vs 0\.$"):
        checkpoint.save(tmp_path, {})
    assert not list(tmp_path.iterdir()), "what is half written does not stay on a full disk"


def test_want_of_memory_is_one_sentence(tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Run) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB.")

    monkeypatch.setattr(Run, "step", full)
    with pytest.raises(
        TrainingError, match=r"not enough memory on cpu for batches of 4 pictures: give a smaller --batch"
    ):
        train(tiny(pictures, tmp_path / "run"))


def test_freezing_needs_something_to_freeze(tmp_path: Path, pictures: Path) -> None:
    with pytest.raises(TrainingError, match="needs a model"):
        tiny(pictures, tmp_path, freeze_critic=1)
    with pytest.raises(TrainingError, match="has 2 blocks"):
        tiny(pictures, tmp_path, schedule="16", from_model="any.safetensors", freeze_critic=3)


def test_the_average_follows_the_generator(tmp_path: Path, pictures: Path) -> None:
    run = Run(tiny(pictures, tmp_path, ema_images=4, ema_rampup=1e9), None)
    before = run.nets.ema.synthesis.b4.const.clone()
    run.step()
    run.step()
    after = run.nets.generator.synthesis.b4.const
    # Half life of one batch: the first step's change is seen half, and half of that remains one step later.
    assert not torch.equal(before, after)
    run.nets.generator.synthesis.b4.const.data.copy_(torch.ones_like(after))
    average = run.nets.ema.synthesis.b4.const.clone()
    run._step_average()
    assert torch.allclose(run.nets.ema.synthesis.b4.const, average / 2 + 0.5)


def test_training_learns_the_colour_of_the_pictures(tmp_path: Path) -> None:
    folder = tmp_path / "red"
    folder.mkdir()
    noise = np.random.RandomState(0)
    for i in range(8):
        pixels = np.clip(np.array([220, 40, 40]) + noise.randint(-20, 20, (8, 8, 3)), 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    config = tiny(folder, tmp_path / "run", schedule="8", images=1200, augment="none", ema_images=100)
    train(config)
    state = checkpoint.load(tmp_path / "run")
    run = Run(config, state)
    with torch.no_grad():
        mean = run.nets.ema(torch.randn(16, 8)).mean((0, 2, 3))
    assert mean[0] > 0.3 > -0.3 > mean[1:].max()


def test_numbers_that_are_none_end_the_run_without_a_checkpoint(tmp_path: Path, pictures: Path) -> None:
    config = tiny(pictures, tmp_path / "run", learning_rate=1e38)
    with pytest.raises(TrainingError, match="lower rate"):
        train(config)
    assert not checkpoint.exists(tmp_path / "run")


def test_precision_is_probed_in_a_child(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    for gain, auto in ((0.0, torch.float32), (1.1, torch.float32), (4.0, torch.bfloat16)):
        monkeypatch.setattr(precision, "bfloat16_gain", lambda gain=gain: gain)
        assert precision.choose_dtype("auto", cpu) == auto
        assert precision.choose_dtype("float32", cpu) == torch.float32
    for before in ("bfloat16", "float32"):  # a run that goes on, whatever the clock says this time
        for gain in (0.9, 4.0):
            monkeypatch.setattr(precision, "bfloat16_gain", lambda gain=gain: gain)
            assert precision.choose_dtype("auto", cpu, before) == getattr(torch, before)
    monkeypatch.setattr(precision, "bfloat16_gain", lambda: 0.0)
    assert precision.choose_dtype("auto", cpu, "bfloat16") == torch.float32, "where it crashes"
    with pytest.raises(DeviceError, match="float32"):
        precision.choose_dtype("bfloat16", cpu)
    monkeypatch.undo()
    monkeypatch.setattr(precision, "TRIAL", "import os, signal; os.kill(os.getpid(), signal.SIGILL)")
    precision.bfloat16_gain.cache_clear()
    assert precision.bfloat16_gain() == 0.0
    precision.bfloat16_gain.cache_clear()


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), torch.float32), ((9, 0), torch.bfloat16)])
def test_gpus_without_bfloat16_train_in_float32(monkeypatch: pytest.MonkeyPatch, capability: tuple, expected) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert precision.choose_dtype("auto", torch.device("cuda")) == expected
    assert precision.choose_dtype("bfloat16", torch.device("cuda")) == torch.bfloat16


def test_what_an_export_weakened_comes_back_and_what_was_seen_counts(tmp_path: Path, pictures: Path) -> None:
    """A chain of runs, each from the file of the one before: the noise does not fade, the average remembers."""
    train(tiny(pictures, tmp_path / "first"))
    first, _ = export(tmp_path / "first", tmp_path / "first.safetensors", noise=0.25)
    train(tiny(pictures, tmp_path / "second", from_model=str(first), images=4))
    second, _ = export(tmp_path / "second", tmp_path / "second.safetensors", noise=0.25)
    noises = [models.load(path).generator.synthesis.b16.conv1.noise_const for path in (first, second)]
    assert torch.allclose(noises[0], noises[1], rtol=2e-3)
    info = models.load(second).info
    assert (info["images_seen"], info["images_before"]) == (4, 16)


def test_damaged_transfer_source_is_refused(tmp_path: Path, pictures: Path) -> None:
    (tmp_path / "bad.safetensors").write_bytes(b"nonsense")
    with pytest.raises(CheckpointError):
        Run(tiny(pictures, tmp_path / "run", from_model=str(tmp_path / "bad.safetensors")), None)


# --- the command


def test_the_command_trains_exports_and_goes_on(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    from tpdne_cli.cli import run

    monkeypatch.chdir(tmp_path)
    new = ["train", str(pictures), "-o", "mine.safetensors", "--resolution", "16", "--images", "8", "--batch", "4"]
    assert run([*new, "--channel-base", "64", "--device", "cpu", "--precision", "float32"]) == 0
    assert capfd.readouterr().out.splitlines() == ["mine.safetensors", "mine-critic.safetensors"]
    assert models.load("mine.safetensors").resolution == 16
    assert run(new) == 1  # the file exists
    assert run(["train", "--resume", "-o", "mine.safetensors", "--images", "16", "--batch", "2"]) == 0
    assert models.load("mine.safetensors").info["images_seen"] == 16
    assert run(["train", "--export-only", "-o", "copy.safetensors", "--run", "runs/mine"]) == 0
    assert models.load("copy.safetensors").info["images_seen"] == 16
    assert run(["train", "--resume", "-o", "mine.safetensors", "--channel-base", "32"]) == 2
    assert run(["train", "--resume", "-o", "nowhere/mine.safetensors"]) == 1
    assert run(["train", str(tmp_path / "nothing"), "-o", "other.safetensors", "--precision", "float32"]) == 1
    assert "does not exist" in capfd.readouterr().err
    again = ["train", str(pictures), "-o", "other.safetensors", "--images=4", "--batch=4", "--precision=float32"]
    assert run([*again, "--from", "mine.safetensors", "--resolution", "8"]) == 2
    assert "--resolution 16 or more" in capfd.readouterr().err
    assert run([*again, "--from", "nobody"]) == 2
    monkeypatch.setenv("TPDNE_HOME", str(tmp_path / "home"))
    assert run(["models", "import", "mine.safetensors", "--name", "mine", "--licence", "mine"]) == 0
    assert run([*again, "--from", "mine", "--resolution", "16"]) == 0, "an installed name"
    assert models.load("other.safetensors").info["images_before"] == 16


def test_every_option_is_in_the_settings_of_the_run(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tpdne_cli.cli import run
    from tpdne_cli.training import loop

    given = {
        "images": 8, "schedule": "8:4,16", "augment": "ada", "augment_strength": 0.5, "mirror": False, "batch": 4,
        "channel_base": 64, "learning_rate": 0.001, "gamma": 2.5, "ema_images": 77, "seed": 5, "threads": 1,
        "checkpoint_seconds": 9.0, "device": "cpu", "precision": "float32", "compile": False,
    }  # fmt: skip
    words = []
    for name, value in given.items():
        flag = name.replace("_", "-")
        words += [f"--no-{flag}"] if value is False else [f"--{flag}", str(value)]
    heard = []

    def stop(config, *_):
        heard.append(config)
        raise KeyboardInterrupt

    monkeypatch.setattr(loop, "train", stop)
    output = ["-o", str(tmp_path / "m.safetensors"), "--run", str(tmp_path / "r")]
    assert run(["train", str(pictures), *output, *words]) == 130
    assert {name: getattr(heard[0], name) for name in given} == given
    assert (heard[0].data, heard[0].run_dir) == (str(pictures), str(tmp_path / "r"))


@pytest.mark.skipif(sys.platform == "win32", reason="signals are sent to no process there")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_with_a_checkpoint_that_goes_on(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture, number: int
) -> None:
    from tpdne_cli.cli import run

    small = ["--resolution=16", "--batch=4", "--channel-base=64", "--device=cpu", "--precision=float32", "--threads=1"]
    child = start("train", pictures, "-o", "mine.safetensors", "--images=1000000", *small, cwd=tmp_path)
    log = tmp_path / "runs" / "mine" / LOG
    deadline = time.monotonic() + 120
    while not log.exists():
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    child.send_signal(number)
    out, err = child.communicate(timeout=120)
    assert (child.returncode, out) == (130, b""), err
    assert b"Stopping with a checkpoint; once more stops at once." in err
    words = err.decode().splitlines()[-1].split("Go on with: tpdne ")[1].split()
    assert not (tmp_path / "mine.safetensors").exists()
    monkeypatch.chdir(tmp_path)
    seen = checkpoint.load(tmp_path / "runs" / "mine")["counters"]["images"]
    assert run([*words, "--images", str(seen + 4)]) == 0, capfd.readouterr().err
    assert models.load("mine.safetensors").info["images_seen"] == seen + 4


def test_recommended_growth_spends_three_fifths_below_the_top() -> None:
    stages = parse_schedule(recommended(128, 500_000, on_gpu=False)["schedule"])
    assert stages == (Stage(32, 150_000), Stage(64, 150_000), Stage(128, None))
    assert parse_schedule(recommended(16, 100, False, lowest=16)["schedule"]) == (Stage(16, None),)
    assert parse_schedule(recommended(128, 100, True, lowest=128)["schedule"]) == (Stage(128, None),)
