"""The generators whose speed is compared, in their official shapes with random weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:  # reading the table imports nothing heavy
    from torch import Tensor


class Row(NamedTuple):
    """One line of the table. settings: of the network's Config, where they differ from its defaults."""

    title: str
    arch: str
    settings: dict[str, Any]
    batch: int

    @property
    def config(self) -> Any:
        from tpdne_cli.networks import stylegan2, stylegan3

        return {"stylegan2": stylegan2, "stylegan3": stylegan3}[self.arch].Config(**self.settings)


SMALL = {"resolution": 256, "channel_base": 16384}
LARGE = {"resolution": 1024, "channel_base": 32768}
RADIAL = {"conv_kernel": 1, "use_radial_filters": True, "channel_base": 65536, "channel_max": 1024}
ROWS = {
    "sg2-256-b1": Row("StyleGAN2 256, channel_base 16384", "stylegan2", SMALL, 1),
    "sg2-256-b8": Row("StyleGAN2 256, channel_base 16384", "stylegan2", SMALL, 8),
    "sg2-1024-b1": Row("StyleGAN2 1024, config F", "stylegan2", LARGE, 1),
    "sg2-1024-b4": Row("StyleGAN2 1024, config F", "stylegan2", LARGE, 4),
    "sg3t-512-b1": Row("StyleGAN3-T 512", "stylegan3", {"resolution": 512}, 1),
    "sg3r-512-b1": Row("StyleGAN3-R 512", "stylegan3", {"resolution": 512, **RADIAL}, 1),
}


def random_state(arch: str, config: Any, seed: int = 0) -> dict[str, Tensor]:
    """A state dict as training begins with, but for noise and biases, which are zero there and would prove nothing."""
    import torch

    from tpdne_cli.networks import stylegan2, stylegan3

    torch.manual_seed(seed)
    state = {"stylegan2": stylegan2, "stylegan3": stylegan3}[arch].Generator(config).state_dict()
    for name, value in state.items():
        if name.endswith(("noise_strength", ".bias")) and not name.startswith("mapping"):
            value.add_(0.1 * torch.randn(value.shape))
    return state
