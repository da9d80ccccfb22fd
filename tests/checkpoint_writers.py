"""Files as the other programs write them, from golden numbers: Python's own pickler, torch's own tensors and modules.

The classes that those programs pickle are stood in for by empty ones of the same names, known to sys.modules only
while a file is written.
"""

from __future__ import annotations

import argparse
import io
import json
import pickle
import sys
import types
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file
from torch import nn

BUFFERS = {
    "resample_filter",
    "noise_const",
    "w_avg",
    "magnitude_ema",
    "up_filter",
    "down_filter",
    "freqs",
    "phases",
    "transform",
}


SOURCE = "import os\nos.system('never run')\n" * 1000


class EasyDict(dict):
    __module__ = "dnnlib.util"

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class Network:
    __module__ = "dnnlib.tflib.network"

    def __init__(self, **state: Any) -> None:
        self.state = state

    def __getstate__(self) -> dict[str, Any]:
        return self.state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.state = state


def _reconstruct_persistent_obj(meta: dict[str, Any]) -> None: ...


_reconstruct_persistent_obj.__module__ = "torch_utils.persistence"


class Persistent(nn.Module):
    """A module that pickles itself as NVIDIA's do: a dict of class name, source code and __dict__."""

    class_name = "Module"

    def __reduce__(self) -> Any:
        meta = {
            "type": "class",
            "version": 6,
            "module_src": SOURCE,
            "class_name": self.class_name,
            "state": {k: v for k, v in self.__dict__.items() if k != "class_name"},
        }
        return _reconstruct_persistent_obj, (meta,), None


@contextmanager
def foreign_modules() -> Iterator[None]:
    contents = {
        "torch_utils": {},
        "torch_utils.persistence": {"_reconstruct_persistent_obj": _reconstruct_persistent_obj},
        "dnnlib": {},
        "dnnlib.util": {"EasyDict": EasyDict},
        "dnnlib.tflib": {},
        "dnnlib.tflib.network": {"Network": Network},
    }
    for name, attributes in contents.items():
        module = types.ModuleType(name)
        module.__dict__.update(attributes)
        sys.modules[name] = module
    try:
        yield
    finally:
        for name in contents:
            del sys.modules[name]


class OldNumpyPickler(pickle._Pickler):  # type: ignore[name-defined]
    """Names numpy's modules as before numpy 2."""

    def save_global(self, obj: Any, name: str | None = None) -> None:
        module = getattr(obj, "__module__", None) or ""
        if not module.startswith("numpy._core"):
            return super().save_global(obj, name)
        old = module.replace("numpy._core", "numpy.core")
        if self.proto >= 4:
            self.save(old)
            self.save(obj.__name__)
            self.write(pickle.STACK_GLOBAL)
        else:
            self.write(pickle.GLOBAL + f"{old}\n{obj.__name__}\n".encode())
        self.memoize(obj)

    dispatch = pickle._Pickler.dispatch.copy()  # type: ignore[attr-defined]


def dumps(value: Any, protocol: int, old_numpy: bool = False) -> bytes:
    with foreign_modules(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own pickling of storages is deprecated, and what the files have
        if not old_numpy:
            return pickle.dumps(value, protocol)
        file = io.BytesIO()
        OldNumpyPickler(file, protocol).dump(value)
        return file.getvalue()


# -- NVIDIA, PyTorch


def _attributes(path: str, kind: str, module: Persistent, settings: dict[str, Any]) -> dict[str, Any]:
    """Plain attributes as the networks set them; numpy scalars where they compute with numpy."""
    last = path.rsplit(".", 1)[-1]
    weight = module._parameters.get("weight")
    clamp = settings.get("conv_clamp")
    if kind == "FullyConnectedLayer":
        mapped = last.startswith("fc") and "mapping" in path
        lr = settings["lr_multiplier"] if mapped else 1
        return {
            "activation": "lrelu" if last.startswith("fc") else "linear",
            "weight_gain": lr / np.sqrt(weight.shape[1]),
            "bias_gain": lr,
        }
    if kind == "SynthesisLayer":
        return {
            "activation": "lrelu",
            "act_gain": np.sqrt(2),
            "conv_clamp": clamp,
            "use_noise": "noise_strength" in module._parameters,
            "up": 2 if last == "conv0" else 1,
            "padding": 1,
        }
    if kind == "ToRGBLayer":
        return {"conv_clamp": clamp, "weight_gain": 1 / np.sqrt(weight.shape[1])}
    if kind == "Conv2dLayer":
        return {
            "activation": "linear" if last == "skip" else "lrelu",
            "weight_gain": 1 / np.sqrt(weight[0].numel()),
            "conv_clamp": None if last == "skip" else clamp,
            "up": 1,
            "down": 2 if last in ("conv1", "skip") else 1,
        }
    if kind == "Sg3Layer":
        return {
            "conv_clamp": clamp,
            "conv_kernel": weight.shape[2],
            "in_size": np.asarray([36, 36]),
            "in_sampling_rate": np.float64(16.0),
            "padding": [9, 8, 9, 8],
        }
    if kind == "SynthesisNetwork" and settings.get("output_scale"):
        return {"output_scale": settings["output_scale"], "img_resolution": settings["img_resolution"]}
    return {}


def _kind(path: str, names: set[str]) -> str:
    last = path.rsplit(".", 1)[-1]
    if last == "":
        return "Generator"
    if last in ("mapping",):
        return "MappingNetwork"
    if last == "synthesis":
        return "SynthesisNetwork"
    if last == "torgb":
        return "ToRGBLayer"
    if last.startswith("L") and "_" in last:
        return "Sg3Layer"
    if last in ("affine", "embed", "out") or last.startswith("fc"):
        return "FullyConnectedLayer"
    if last.startswith("conv") and any(n.startswith(path + ".affine") for n in names):
        return "SynthesisLayer"
    if last.startswith("conv") or last in ("skip", "fromrgb"):
        return "Conv2dLayer"
    return "Block"


def module_tree(weights: dict[str, np.ndarray], init_kwargs: dict[str, Any], settings: dict[str, Any]) -> Persistent:
    """Real nn.Modules around a flat state dict."""
    root = Persistent()
    modules = {"": root}
    for name in weights:
        parts = name.split(".")[:-1]
        for depth in range(1, len(parts) + 1):
            path = ".".join(parts[:depth])
            if path not in modules:
                modules[path] = Persistent()
                modules[".".join(parts[: depth - 1])].add_module(parts[depth - 1], modules[path])
    for name, value in weights.items():
        path, _, leaf = name.rpartition(".")
        tensor = torch.from_numpy(np.array(value))
        if tensor.ndim == 4 and min(tensor.shape) > 1:
            tensor = tensor.to(memory_format=torch.channels_last)  # permuted strides, as trained ones may have
        if leaf in BUFFERS:
            modules[path].register_buffer(leaf, tensor)
        else:
            modules[path].register_parameter(leaf, nn.Parameter(tensor))
    for path, module in modules.items():
        kind = _kind(path, set(weights))
        module.__dict__["class_name"] = kind
        module.__dict__.update(_attributes(path, kind, module, settings))
        module.__dict__["_init_args"] = ()
        module.__dict__["_init_kwargs"] = EasyDict(init_kwargs) if path == "" else EasyDict()
    return root


def golden_module(folder: Path) -> Persistent:
    config = json.loads((folder / "config.json").read_text())
    kwargs = config["init_kwargs"]
    synthesis = {**kwargs, **kwargs.get("synthesis_kwargs", {})}
    third = "stylegan3" in config["source"]
    settings = {
        "lr_multiplier": 0.01,
        "conv_clamp": synthesis.get("conv_clamp", 256 if third else None),
        "img_resolution": kwargs["img_resolution"],
    }
    if config["arch"].startswith("stylegan3"):
        settings["output_scale"] = synthesis.get("output_scale", 0.25)
    root = module_tree(load_file(folder / "weights.safetensors"), kwargs, settings)
    if "discriminator" in config["arch"]:
        root.__dict__["class_name"] = "Discriminator"
        epilogue = kwargs.get("epilogue_kwargs", {})
        mbstd = Persistent()
        mbstd.__dict__.update(
            class_name="MinibatchStdLayer", group_size=epilogue.get("mbstd_group_size", 4), num_channels=1
        )
        root._modules["b4"].add_module("mbstd", mbstd)
    return root


def nvidia(generator: Path, discriminator: Path | None = None, protocol: int = 4, old_numpy: bool = False) -> bytes:
    """{'G', 'D', 'G_ema', ...} as the training loops write it."""
    network = golden_module(generator)
    snapshot = {
        "training_set_kwargs": EasyDict(class_name="training.dataset.ImageFolderDataset", path="/data", xflip=True),
        "G": golden_module(generator),
        "D": golden_module(discriminator) if discriminator else None,
        "G_ema": network,
        "augment_pipe": None,
    }
    return dumps(snapshot, protocol, old_numpy)


# -- NVIDIA, TensorFlow


def _component(key: str, settings: dict[str, Any], variables: dict[str, np.ndarray]) -> Network:
    mine = [(k.removeprefix(key + "/"), v) for k, v in variables.items() if k.startswith(key + "/")]
    return Network(
        version=4, name=f"G_{key}", static_kwargs=dict(settings), components={}, variables=mine,
        build_module_src="import os\nos.system('never run')", build_func_name=f"G_{key}",
    )  # fmt: skip


def _variable(value: np.ndarray) -> Any:
    return value if value.ndim else value[()]  # 0-d variables come out of TensorFlow as numpy scalars


def tensorflow(folder: Path, protocol: int = 4, old_numpy: bool = True, changes: Any = (), **settings: Any) -> bytes:
    """(G, D, Gs); changes: what is different in D's state."""
    config = json.loads((folder / "config.json").read_text())
    kwargs = {**config["static_kwargs"], "randomize_noise": True, "w_avg_beta": np.float32(0.995), **settings}
    variables = {k: _variable(v) for k, v in load_file(folder / "variables.safetensors").items()}
    components = {key: _component(key, kwargs, variables) for key in ("synthesis", "mapping")}
    own = [(k, v) for k, v in variables.items() if "/" not in k]
    generator = Network(
        version=config["version"], name="Gs", static_kwargs=kwargs, components=components, variables=own,
        build_module_src="", build_func_name="G_main",
    )  # fmt: skip
    critic = None
    if (folder / "disc_variables.safetensors").exists():
        critic = Network(
            version=4, name="D", static_kwargs=config["disc_static_kwargs"], components={},
            variables=list(load_file(folder / "disc_variables.safetensors").items()),
            build_module_src="", build_func_name="D_stylegan2",
        )  # fmt: skip
    if critic:
        critic.state |= dict(changes)
    return dumps((generator, critic, generator), protocol, old_numpy)


# -- rosinality


class Discriminator(nn.Module):
    """The layout and the arithmetic of rosinality's, for tests: names matter, numbers are random."""

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        blocks = [nn.Sequential(_Conv(3, width, 1), _Bias(width))]
        resolution = size
        while resolution > 4:
            block = nn.Module()
            block.conv1 = nn.Sequential(_Conv(width, width, 3), _Bias(width))
            block.conv2 = nn.Sequential(_Blur(), _Conv(width, width, 3), _Bias(width))
            block.skip = nn.Sequential(_Blur(), _Conv(width, width, 1))
            blocks.append(block)
            resolution //= 2
        self.convs = nn.Sequential(*blocks)
        self.final_conv = nn.Sequential(_Conv(width + 1, width, 3), _Bias(width))
        self.final_linear = nn.Sequential(nn.Linear(width * 16, width), nn.Linear(width, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        def conv(x: torch.Tensor, layer: Any, stride: int = 1, padding: int = 0) -> torch.Tensor:
            return nn.functional.conv2d(
                x, layer.weight / layer.weight[0].numel() ** 0.5, stride=stride, padding=padding
            )

        def blur(x: torch.Tensor, layer: Any, pad: tuple[int, int]) -> torch.Tensor:
            x = nn.functional.pad(x, (*pad, *pad))
            kernel = layer.kernel.flip(0, 1)[None, None].repeat(x.shape[1], 1, 1, 1)
            return nn.functional.conv2d(x, kernel, groups=x.shape[1])

        def act(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
            shape = (1, -1, 1, 1) if x.ndim == 4 else (1, -1)
            return nn.functional.leaky_relu(x + bias.view(shape), 0.2) * 2**0.5

        first, *blocks = self.convs
        x = act(conv(x, first[0]), first[1].bias)
        for block in blocks:
            y = act(conv(x, block.conv1[0], padding=1), block.conv1[1].bias)
            y = act(conv(blur(y, block.conv2[0], (2, 2)), block.conv2[1], stride=2), block.conv2[2].bias)
            x = (y + conv(blur(x, block.skip[0], (1, 1)), block.skip[1], stride=2)) / 2**0.5
        n, c, h, w = x.shape
        group = min(n, 4)
        std = (
            (x.view(group, -1, 1, c, h, w).var(0, unbiased=False) + 1e-8)
            .sqrt()
            .mean([2, 3, 4], keepdim=True)
            .squeeze(2)
        )
        x = torch.cat([x, std.repeat(group, 1, h, w)], 1)
        x = act(conv(x, self.final_conv[0], padding=1), self.final_conv[1].bias).flatten(1)
        fc, out = self.final_linear
        x = act(x @ fc.weight.T / fc.weight.shape[1] ** 0.5, fc.bias)
        return x @ out.weight.T / out.weight.shape[1] ** 0.5 + out.bias


class _Conv(nn.Module):
    def __init__(self, into: int, out: int, kernel: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out, into, kernel, kernel))


class _Bias(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.randn(width) * 0.1)


class _Blur(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        line = torch.tensor([1.0, 3.0, 3.0, 1.0])
        self.register_buffer("kernel", torch.outer(line, line) / 64)


def rosinality(folder: Path, zipped: bool = True, discriminator: nn.Module | None = None, noises: bool = True) -> bytes:
    """What train.py saves: {'g', 'd', 'g_ema', 'g_optim', 'd_optim', 'args', 'ada_aug_p'}."""
    state: OrderedDict[str, torch.Tensor] = OrderedDict(
        (k, torch.from_numpy(v)) for k, v in load_file(folder / "weights.safetensors").items()
        if noises or not k.startswith("noises.")
    )  # fmt: skip
    state._metadata = OrderedDict({"": {"version": 1}})  # type: ignore[attr-defined]
    layer = nn.Linear(4, 4)
    optimizer = torch.optim.Adam(layer.parameters(), lr=2e-3, betas=(0.0, 0.99))
    layer(torch.zeros(1, 4)).sum().backward()
    optimizer.step()
    value = {
        "g": {k: v.clone() for k, v in state.items()},
        "d": discriminator.state_dict() if discriminator else {},
        "g_ema": state,
        "g_optim": optimizer.state_dict(),
        "d_optim": optimizer.state_dict(),
        "args": argparse.Namespace(path="data", size=32, r1=10.0, wandb=False, ckpt=None, start_iter=0),
        "ada_aug_p": 0.0,
    }
    file = io.BytesIO()
    torch.save(value, file, _use_new_zipfile_serialization=zipped)
    return file.getvalue()
