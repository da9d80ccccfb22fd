"""Sample sheets: the same 8x8 latents at every checkpoint, so that a run can be watched."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tpdne_cli.networks.stylegan2 import Generator

SEED = 20260101


def write(generator: Generator, path: Path, psi: float = 0.7, side: int = 8) -> None:
    """A PNG of side x side images by the generator at truncation `psi`; the random state is left alone."""
    z = np.random.RandomState(SEED).randn(side * side, generator.config.z_dim).astype(np.float32)
    device = next(generator.parameters()).device
    with torch.no_grad():
        rows = [generator(torch.from_numpy(row).to(device), psi=psi) for row in np.split(z, side)]
    pixels = torch.stack(rows).float().clamp(-1, 1).add(1).mul(127.5).round().byte().cpu()  # [S, S, 3, R, R]
    resolution = pixels.shape[-1]
    grid = pixels.permute(0, 3, 1, 4, 2).reshape(side * resolution, side * resolution, 3)
    partial = path.with_suffix(".partial")
    Image.fromarray(grid.numpy()).save(partial, format="PNG")
    partial.replace(path)
