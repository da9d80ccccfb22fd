"""Training away from the CPU, tried where there is no GPU.

Torch's meta device keeps no values, but the rules of a GPU: what lies on it and what lies on the CPU do not mix. A mode
around every operation sees to that, and notes each time the host would wait for the device.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from tpdne_cli import devices
from tpdne_cli.training import checkpoint, growth
from tpdne_cli.training.config import TrainConfig
from tpdne_cli.training.loop import Run

META = torch.device("meta")
aten = torch.ops.aten


class Accelerator(TorchDispatchMode):
    """Refuses operations that mix devices, and lets values come back as zeros, noting that the host waited.

    It waits for copies to the device as well, unless they are asked not to block.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        away = any(t.device == META for t in tensors)
        if away and func is aten._local_scalar_dense.default:
            self.waits.append(str(func))
            return 0.5 if args[0].dtype.is_floating_point else True
        if away and func is aten.copy_.default and args[0].device.type == "cpu":
            self.waits.append(str(func))
            return args[0].zero_()
        if away and func is aten._to_copy.default and torch.device(kwargs.get("device") or META).type == "cpu":
            self.waits.append(str(func))
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if not away and torch.device(kwargs.get("device") or "cpu") == META and not kwargs.get("non_blocking"):
            self.waits += [str(func) for _ in tensors]
        if func is aten.copy_.default and args[0].device != args[1].device and args[1].dim():
            self.waits.append(str(func))
        if func not in (aten.copy_.default, aten._to_copy.default):
            places = {t.device.type for t in tensors if t.dim()}  # a CPU's scalar may join in anywhere
            assert len(places) <= 1, f"{func} mixes {places}"
        return func(*args, **kwargs)


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Makes runs that take the meta device for their GPU, from 8 to 16 px, with ten pictures."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(10):
        Image.fromarray(np.full((16, 16, 3), 20 * i, np.uint8)).save(folder / f"{i}.png")
    config = TrainConfig(
        data=str(folder), run_dir=str(tmp_path / "run"), schedule="8:8,16", images=24, batch=4, z_dim=8, w_dim=8,
        mapping_layers=2, channel_base=128, channel_max=8, r1_every=2, log_every=2, critic_head_start=4,
        checkpoint_seconds=1e9,
    )  # fmt: skip
    (tmp_path / "run").mkdir()
    monkeypatch.setattr(devices, "choose", lambda _: META)

    def save(run_dir: Path, state: dict[str, Any]) -> Path:
        torch.save(tree_map_only(torch.Tensor, torch.Tensor.cpu, state), run_dir / checkpoint.LATEST)
        return run_dir / checkpoint.LATEST

    monkeypatch.setattr(checkpoint, "save", save)
    return lambda state=None, **changes: Run(dataclasses.replace(config, **changes), state)


@pytest.mark.parametrize("augment", ["diffaugment", "ada", "none"])
def test_a_run_stays_on_its_device_through_growth_and_resume(run: Any, augment: str) -> None:
    with Accelerator():
        first = run(augment=augment)
        assert first.dtype == torch.bfloat16
        assert len(list(first.until(lambda: False))) == 3
        assert first.stage.resolution == 16
        first.save()
        again = run(checkpoint.load(first.run_dir), augment=augment, images=32)
        assert [progress.images for progress in again.until(lambda: False)] == [32]
    for net in (again.nets.generator, again.nets.ema, again.nets.discriminator):
        assert {t.device for t in net.state_dict().values()} == {META}


@pytest.mark.parametrize("augment", ["diffaugment", "ada", "none"])
def test_no_step_waits_for_the_device(run: Any, augment: str) -> None:
    with Accelerator() as accelerator:
        training = run(augment=augment)
        training.step()  # the first brings the order of the pictures
        accelerator.waits.clear()
        for _ in range(5):  # R1 in every other; with ten pictures, two passes
            training.step()
        assert len(accelerator.waits) <= 2, accelerator.waits


def test_a_mixed_operation_does_not_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle itself: what the first growth on a GPU would once have died of."""
    config = TrainConfig(data="", run_dir="", z_dim=8, w_dim=8, mapping_layers=2, channel_base=128, channel_max=8)
    nets = growth.build(config, 8)
    nets.discriminator.to(META)
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: self)
    with Accelerator(), pytest.raises(AssertionError, match="mixes"):
        growth.grow(nets)
