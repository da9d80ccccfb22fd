"""NVIDIA's TensorFlow pickles: StyleGAN2 (configurations B to F, and ADA's) and StyleGAN1; Gs, and D as the critic.

A tuple (G, D, Gs) of Network objects, each a dict of settings, a list of (name, array) variables and the networks it
is composed of. Kernels are stored [height, width, in, out], dense weights [in, out].
"""

from __future__ import annotations

import re
from typing import Any

from tpdne_cli.checkpoints import Checkpoint, stylegan1
from tpdne_cli.checkpoints.pickles import Maker, Record
from tpdne_cli.checkpoints.renaming import (
    DENSE,
    KERNEL,
    MAX_LAYERS,
    SIZES,
    Table,
    Transform,
    add_filters,
    noise_layer,
    plus_one,
    refuse_unfinished,
    rename,
    same,
    turned,
    without,
)
from tpdne_cli.checkpoints.shapes import discriminator_config, finite, generator_config
from tpdne_cli.checkpoints.storage import Array, array_of
from tpdne_cli.errors import AGAIN, CheckpointError

MAX_VARIABLES = 5_000

# What other values would change, and no published generator changes; the second part is StyleGAN1's
USUAL = {
    "nonlinearity": "lrelu",
    "mapping_nonlinearity": "lrelu",
    "normalize_latents": True,
    "use_wscale": True,
    "use_pixel_norm": False,
    "use_instance_norm": True,
    "use_styles": True,
    "const_input_layer": True,
    "fused_scale": "auto",
}


class Network(Record):
    """A pickled dnnlib.tflib.network.Network: its state."""

    def __init__(self) -> None:
        self.state: dict[Any, Any] = {}

    def build(self, state: Any) -> None:
        if type(state) is not dict:
            raise CheckpointError(f"damaged: a Network's state is no dict; {AGAIN}.")
        self.state = state


def new_network(args: tuple[Any, ...]) -> Network:
    if args:
        raise CheckpointError(f"refused: a Network with arguments; {AGAIN}.")
    return Network()


GLOBALS: dict[tuple[str, str], Maker | None] = {("dnnlib.tflib.network", "Network"): new_network}


def reads(tree: Any) -> bool:
    """Whether this is what such a file holds."""
    return type(tree) is tuple and len(tree) == 3 and isinstance(tree[2], Network)


def read(tree: tuple[Any, ...]) -> Checkpoint:
    """(G, D, Gs) -> Gs and D."""
    variables = variables_of(tree[2])
    settings = settings_of(tree[2])
    if stylegan1.reads(variables):
        if settings.get("label_size", 0) != 0 or numbers_of(settings, "blur_filter", [1, 2, 1]) != [1, 2, 1]:
            raise CheckpointError("not supported: a StyleGAN1 with classes, or with another filter than [1, 2, 1].")
        return stylegan1.read(variables, rate_of(settings))
    if any("LabelConcat" in name for name in variables):
        raise CheckpointError("not supported: a conditional StyleGAN2 of TensorFlow that is not ADA's.")
    variables = grown(variables, "synthesis/", "ToRGB")
    tensors = rename(variables, generator_table(), ignored="lod|synthesis/lod")
    add_filters(tensors, "synthesis.", numbers_of(settings, "resample_kernel", [1, 3, 3, 1]))
    config = generator_config(tensors, rate_of(settings), clamp_of(settings))
    checkpoint = Checkpoint("stylegan2", config, tensors, meta={"format": "tensorflow"})
    if isinstance(tree[1], Network):
        try:
            checkpoint.discriminator_config, checkpoint.discriminator_tensors = discriminator(tree[1])
        except CheckpointError as error:  # the generator is none the worse for it
            checkpoint.meta["discriminator"] = f"left out: {error}"
    return checkpoint


def variables_of(network: Network, prefix: str = "") -> dict[str, Array]:
    """The network's own variables, and its components' under their names."""
    found: dict[str, Array] = {}
    variables = network.state.get("variables")
    if type(variables) is not list or len(variables) > MAX_VARIABLES:
        raise CheckpointError(f"damaged: a Network has no list of variables; {AGAIN}.")
    for item in variables:
        match item:
            case (str() as name, value) if re.fullmatch(r"[\w/]{1,128}", name, re.ASCII):
                found[prefix + name] = array_of(value)
            case _:
                raise CheckpointError(f"damaged: a variable of a Network is no name and array; {AGAIN}.")
    components = network.state.get("components")
    if not prefix and type(components) is dict:
        for name in ("mapping", "synthesis"):
            if isinstance(components.get(name), Network):
                found |= variables_of(components[name], name + "/")
    return found


def grown(variables: dict[str, Array], prefix: str, colours: str) -> dict[str, Array]:
    """A network of configurations B to D, which grew, as the one of full size that it is in the end (fig. 7, 'orig').

    Such a network has a layer from or to colours for each size it once had: '{colours}_lod0' is that of the full size.
    """
    pattern = re.compile(rf"{prefix}{colours}_lod(\d{{1,2}})/(.*)")
    top = max((size for size in SIZES if any(n.startswith(f"{prefix}{size}x{size}/") for n in variables)), default=4)
    kept: dict[str, Array] = {}
    for name, value in variables.items():
        of_a_size = pattern.fullmatch(name)
        if of_a_size is None:
            kept[name] = value
        elif int(of_a_size[1]) == 0:
            kept[f"{prefix}{top}x{top}/{colours}/{of_a_size[2]}"] = value
    if len(kept) < len(variables):
        refuse_unfinished(variables)
    return kept


def settings_of(network: Network) -> dict[Any, Any]:
    """static_kwargs, where nothing in them asks for a network that is not ours."""
    settings = network.state.get("static_kwargs")
    if type(settings) is not dict:
        raise CheckpointError(f"damaged: a Network has no static_kwargs; {AGAIN}.")
    for name, usual in USUAL.items():
        value = settings.get(name, usual)
        if type(value) is not type(usual) or value != usual:
            raise CheckpointError(f"not supported: a network whose {name} is not {usual!r}.")
    return settings


def numbers_of(settings: dict[Any, Any], name: str, usual: list[float]) -> list[float]:
    """A filter's taps."""
    taps = settings.get(name, usual)
    if type(taps) not in (list, tuple) or not 1 <= len(taps) <= 64:
        raise CheckpointError(f"damaged: {name} is no list of numbers; {AGAIN}.")
    values = [finite(tap, name) for tap in taps]
    if sum(values) <= 0:
        raise CheckpointError(f"damaged: {name} does not sum to anything; {AGAIN}.")
    return values


def clamp_of(settings: dict[Any, Any]) -> float | None:
    clamp = settings.get("conv_clamp")
    return None if clamp is None else finite(clamp, "conv_clamp")


def rate_of(settings: dict[Any, Any]) -> float:
    return finite(settings.get("mapping_lrmul", 0.01), "mapping_lrmul")


# -- names


def dense(theirs: str, ours: str) -> Table:
    return {f"{theirs}/weight": (f"{ours}.weight", DENSE), f"{theirs}/bias": (f"{ours}.bias", same)}


def layer(theirs: str, ours: str, kernel: Transform = KERNEL) -> Table:
    return {
        f"{theirs}/weight": (f"{ours}.weight", kernel),
        f"{theirs}/bias": (f"{ours}.bias", same),
        f"{theirs}/noise_strength": (f"{ours}.noise_strength", same),
        f"{theirs}/mod_weight": (f"{ours}.affine.weight", DENSE),
        f"{theirs}/mod_bias": (f"{ours}.affine.bias", plus_one),
    }


def generator_table() -> Table:
    table: Table = {
        "dlatent_avg": ("mapping.w_avg", same),
        "synthesis/4x4/Const/const": ("synthesis.b4.const", without(1)),
    }
    table |= dense("mapping/LabelEmbed", "mapping.embed") | layer("synthesis/4x4/Conv", "synthesis.b4.conv1")
    for i in range(MAX_LAYERS):
        table |= dense(f"mapping/Dense{i}", f"mapping.fc{i}")
        table[f"synthesis/noise{i}"] = (noise_layer(i), without(2))
    for size in SIZES:
        theirs, ours = f"synthesis/{size}x{size}", f"synthesis.b{size}"
        table |= layer(f"{theirs}/Conv0_up", f"{ours}.conv0", turned) | layer(f"{theirs}/Conv1", f"{ours}.conv1")
        table |= layer(f"{theirs}/ToRGB", f"{ours}.torgb")
        table[f"{theirs}/Skip/weight"] = (f"{ours}.skip.weight", turned)
    return table


def discriminator_table() -> Table:
    table = layer("4x4/Conv", "b4.conv") | dense("4x4/Dense0", "b4.fc") | dense("Output", "b4.out")
    for size in SIZES:
        theirs, ours = f"{size}x{size}", f"b{size}"
        table |= layer(f"{theirs}/FromRGB", f"{ours}.fromrgb") | layer(f"{theirs}/Conv0", f"{ours}.conv0")
        table |= layer(f"{theirs}/Conv1_down", f"{ours}.conv1")
        table[f"{theirs}/Skip/weight"] = (f"{ours}.skip.weight", KERNEL)
    return table


def discriminator(network: Network) -> tuple[dict[str, Any], dict[str, Array]]:
    variables, settings = variables_of(network), settings_of(network)
    if any(name.startswith("Label") for name in variables):
        raise CheckpointError("not supported: a conditional discriminator of TensorFlow.")
    tensors = rename(grown(variables, "", "FromRGB"), discriminator_table(), ignored="lod")
    add_filters(tensors, "", numbers_of(settings, "resample_kernel", [1, 3, 3, 1]))
    # StyleGAN2's own takes groups of 4 unless told otherwise, ADA's the whole batch
    function = network.state.get("build_func_name")
    own = type(function) is str and "D_stylegan" in function
    group = settings.get("mbstd_group_size", 4 if own else None)
    if group is not None and (type(group) is not int or not 1 <= group <= 4096):
        raise CheckpointError(f"damaged: mbstd_group_size is no number of images; {AGAIN}.")
    return discriminator_config(tensors, group, clamp_of(settings)), tensors
