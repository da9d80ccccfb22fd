"""NVIDIA's PyTorch pickles (the stylegan2-ada and stylegan3 repositories): G_ema, and D as the critic.

Such a file holds whole module objects with the source code that made them. The code stays unread text: each object
becomes a record of its class name and its `__dict__`, and the tensors are gathered from those.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from tpdne_cli.checkpoints import Checkpoint
from tpdne_cli.checkpoints.pickles import Maker, Record, show
from tpdne_cli.checkpoints.shapes import (
    discriminator_config,
    expect,
    finite,
    generator_config,
    latent_mapping_config,
    shape_of,
)
from tpdne_cli.checkpoints.storage import Array, Tensor, new_dict
from tpdne_cli.errors import AGAIN, CheckpointError

MAX_MODULES = 2_000  # StyleGAN2 at 1024 px has some 80
MAX_PARTS = 500  # of one module
MAX_DEPTH = 16
MAX_TENSORS = 5_000  # of a network

# StyleGAN3's settings that neither a tensor nor an attribute tells, and between what they can be
SG3_NUMBERS = {
    "channel_base": (1, 1 << 20),
    "channel_max": (1, 1 << 16),
    "num_critical": (0, 64),
    "first_cutoff": (0.5, 4096.0),
    "first_stopband": (0.5, 4096.0),
    "last_stopband_rel": (0.5, 64.0),
    "margin_size": (0, 256),
    "filter_size": (1, 64),
    "lrelu_upsampling": (1, 8),
}
SG3_TOLD = {
    "img_resolution", "z_dim", "w_dim", "c_dim", "img_channels", "num_layers", "output_scale", "conv_kernel",
    "conv_clamp", "use_radial_filters", "mapping_kwargs",
}  # fmt: skip
SG3_UNUSED = {"magnitude_ema_beta", "num_fp16_res"}  # training's, and a choice of those who run it


class Module(Record):
    """A pickled nn.Module: the name of its class and its `__dict__`."""

    def __init__(self, class_name: str, state: dict[Any, Any]) -> None:
        self.class_name, self.state = class_name, state


def reconstruct(args: tuple[Any, ...]) -> Module:
    """torch_utils.persistence._reconstruct_persistent_obj(meta)"""
    match args:
        case ({"type": "class", "version": version, "class_name": str() as name, "state": dict() as state},):
            if type(version) is int and 1 <= version <= 6:
                return Module(name, state)
    raise CheckpointError(f"refused: a persistent object in an unknown form; {AGAIN}.")


GLOBALS: dict[tuple[str, str], Maker | None] = {
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): reconstruct,
    ("dnnlib.util", "EasyDict"): new_dict,
}


@dataclass
class Network:
    """A module tree laid flat: state-dict names -> arrays, module paths -> attributes."""

    tensors: dict[str, Array]
    attributes: dict[str, dict[Any, Any]]

    def number(self, path: str, name: str) -> float:
        value = self.attributes.get(path, {}).get(name)
        return finite(value, f"{path}.{name}")


def entries(state: dict[Any, Any], name: str) -> Iterator[tuple[str, Any]]:
    """The items of one of a module's dicts that are there, under names that are names."""
    items = state.get(name, {})
    if type(items) is not dict or len(items) > MAX_PARTS:
        raise CheckpointError(f"damaged: {name} of a module is no dict, or a very long one; {AGAIN}.")
    for key, value in items.items():
        if type(key) is not str or not re.fullmatch(r"\w{1,64}", key, re.ASCII):
            raise CheckpointError(f"refused: a module with a part called {show(str(key))}; {AGAIN}.")
        if value is not None:
            yield key, value


def flatten(root: Module) -> Network:
    tensors: dict[str, Array] = {}
    attributes: dict[str, dict[Any, Any]] = {}
    todo = [("", root)]
    while todo:
        path, module = todo.pop()
        attributes[path] = module.state
        prefix = path + "." if path else ""
        hidden = module.state.get("_non_persistent_buffers_set")
        for kind in ("_parameters", "_buffers"):
            for name, value in entries(module.state, kind):
                if not isinstance(value, Tensor):
                    raise CheckpointError(f"damaged: {prefix}{name} is no tensor; {AGAIN}.")
                if kind == "_parameters" or type(hidden) is not set or name not in hidden:
                    tensors[prefix + name] = value.array()
        for name, child in entries(module.state, "_modules"):
            if not isinstance(child, Module):
                raise CheckpointError(f"damaged: {prefix}{name} is no module; {AGAIN}.")
            todo.append((prefix + name, child))
        if len(attributes) + len(todo) > MAX_MODULES or path.count(".") >= MAX_DEPTH or len(tensors) > MAX_TENSORS:
            raise CheckpointError("refused: a network of more parts, or deeper ones, than any generator has.")
    return Network(tensors, attributes)


def read(tree: dict[Any, Any]) -> Checkpoint:
    """The dict that such a file holds -> G_ema and D."""
    root = tree.get("G_ema")
    if not isinstance(root, Module):
        raise CheckpointError("not a generator: the file has no network G_ema.")
    network = flatten(root)
    meta: dict[str, Any] = {"format": "nvidia"}
    if "synthesis.input.freqs" in network.tensors:
        checkpoint = Checkpoint("stylegan3", stylegan3_config(network), network.tensors, meta=meta)
    elif "synthesis.b4.const" in network.tensors:
        lr, clamp = check_layers(network)
        checkpoint = Checkpoint("stylegan2", generator_config(network.tensors, lr, clamp), network.tensors, meta=meta)
    else:
        raise CheckpointError(f"not supported: {show(root.class_name)} is neither StyleGAN2 nor StyleGAN3.")
    if isinstance(tree.get("D"), Module):
        try:
            critic = flatten(tree["D"])
            lr, clamp = check_layers(critic)
            if lr != 0.01 and "mapping.fc0.weight" in critic.tensors:
                raise CheckpointError(f"not supported: a discriminator with the learning rate multiplier {lr}.")
            config = discriminator_config(critic.tensors, group_size(critic), clamp)
            checkpoint.discriminator_config, checkpoint.discriminator_tensors = config, critic.tensors
        except CheckpointError as error:  # a fork's own discriminator does not make its generator any worse
            meta["discriminator"] = f"left out: {error}"
    return checkpoint


def group_size(critic: Network) -> int | None:
    """How many images share a standard deviation; None: the whole batch."""
    size = critic.attributes.get("b4.mbstd", {}).get("group_size", 4)
    if size is not None and (type(size) is not int or not 1 <= size <= 4096):
        raise CheckpointError(f"damaged: b4.mbstd.group_size is no number of images; {AGAIN}.")
    return size


def check_layers(network: Network) -> tuple[float, float | None]:
    """The mapping's learning rate multiplier and the clamp of the convolutions, once all layers agree on them."""
    rates: set[float] = set()
    clamps: set[float | None] = set()
    for path, attributes in network.attributes.items():
        if attributes.get("activation", "linear") not in ("lrelu", "linear"):
            raise CheckpointError(f"not supported: {path} has another activation than leaky ReLU.")
        mapped = re.fullmatch(r"mapping\.fc\d+", path)
        if mapped:
            rates.add(network.number(path, "bias_gain"))
        if re.search(r"\.(conv\d?|torgb|L\d+_\d+_\d+)$", path) and "conv_clamp" in attributes:
            clamp = attributes["conv_clamp"]
            clamps.add(None if clamp is None else finite(clamp, path + ".conv_clamp"))
        if "weight_gain" in attributes and path + ".weight" in network.tensors:
            fan_in = math.prod(network.tensors[path + ".weight"].shape[1:])
            gain = finite(attributes.get("bias_gain", 1.0), path + ".bias_gain") / math.sqrt(fan_in)
            if not math.isclose(network.number(path, "weight_gain"), gain, rel_tol=1e-5):
                raise CheckpointError(f"not supported: {path} scales its weights in a way of its own.")
    if len(rates) > 1 or len(clamps) != 1:
        raise CheckpointError("not supported: the layers of the network do not agree on a conv_clamp or lr_multiplier.")
    return rates.pop() if rates else 0.01, clamps.pop()


def stylegan3_config(network: Network) -> dict[str, Any]:
    """From the tensors and attributes; from init_kwargs only what neither tells."""
    tensors, attributes = network.tensors, network.attributes
    names = [re.fullmatch(r"(synthesis\.L(\d+)_(\d{1,4})_\d+)\.weight", name) for name in tensors]
    layers = {int(match[2]): match[1] for match in names if match}
    if not 2 <= len(layers) <= 64 or sorted(layers) != list(range(len(layers))):
        raise CheckpointError(f"not a complete generator: its layers are numbered {sorted(layers)[:20]}; {AGAIN}.")
    first, last = layers[0], layers[len(layers) - 1]
    lr, clamp = check_layers(network)
    config = latent_mapping_config(tensors, shape_of(tensors, first + ".affine.weight", 2)[1])
    if config.pop("mapping_features") != config["w_dim"] or config.pop("embed_features") not in (None, config["w_dim"]):
        raise CheckpointError("not supported: a StyleGAN3 mapping network with hidden layers of another width.")
    config |= {
        "resolution": int(last.split("_")[1]),
        "img_channels": shape_of(tensors, last + ".weight", 4)[0],
        "mapping_lr_multiplier": lr,
        "num_layers": len(layers) - 1,
        "conv_kernel": shape_of(tensors, first + ".weight", 4)[2],
        "use_radial_filters": any(a.ndim == 2 for name, a in tensors.items() if name.endswith(".down_filter")),
        "conv_clamp": clamp,
        "output_scale": network.number("synthesis", "output_scale"),
    }
    kwargs = attributes[""].get("_init_kwargs")
    if type(kwargs) is not dict:
        raise CheckpointError(f"not a complete generator: G_ema has no _init_kwargs; {AGAIN}.")
    for name, value in kwargs.items():
        if name in SG3_NUMBERS:
            low, high = SG3_NUMBERS[name]
            config[name] = finite(value, name)
            if not low <= config[name] <= high or (type(low) is int and type(config[name]) is not int):
                raise CheckpointError(f"refused: {name} is {config[name]}, and no generator's is.")
        elif name not in SG3_TOLD | SG3_UNUSED:
            raise CheckpointError(f"not supported: StyleGAN3 with the setting {show(str(name))}.")
    # The widest layer is the first; were it not the file's, a network built from this could be of any size.
    base, widest = config.get("channel_base", 32768), config.get("channel_max", 512)
    width = round(min(base / 2 / config.get("first_cutoff", 2.0), widest))
    expect(tensors, "synthesis.input.weight", width, width)
    return config


def reads(tree: Any) -> bool:
    """Whether this is what such a file holds."""
    return type(tree) is dict and isinstance(tree.get("G_ema") or tree.get("G"), Module)
