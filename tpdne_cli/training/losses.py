"""The losses of StyleGAN2 (Karras et al. 2020, arXiv 1912.04958), without path-length regularisation.

Path-length regularisation smooths the map from w to images at high resolution; at 128 pixels and below it costs a third
of the time for little, so it is left out on purpose.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from tpdne_cli.networks.ops import derived_twice


def generator_loss(fake_logits: torch.Tensor) -> torch.Tensor:
    """Non-saturating logistic loss (Goodfellow et al. 2014): [N, 1] -> scalar."""
    return F.softplus(-fake_logits).mean()


def fake_loss(fake_logits: torch.Tensor) -> torch.Tensor:
    """The discriminator's half of the logistic loss on generated images: [N, 1] -> scalar."""
    return F.softplus(fake_logits).mean()


def real_loss(real_logits: torch.Tensor) -> torch.Tensor:
    """The discriminator's half of the logistic loss on photographs: [N, 1] -> scalar."""
    return F.softplus(-real_logits).mean()


def r1_penalty(discriminator: Callable[[torch.Tensor], torch.Tensor], reals: torch.Tensor) -> torch.Tensor:
    """Mean squared norm of the discriminator's gradient at photographs (Mescheder et al. 2018): [N, 3, R, R] -> scalar.

    In bfloat16 its gradient keeps a cosine above 0.99 to that in float32, and 0.95 to that of another batch (measured
    on faces), so the discriminator stays in the precision of the run: a third of the time.
    """
    reals = reals.detach().requires_grad_(True)
    with derived_twice():
        logits = discriminator(reals)
    (gradient,) = torch.autograd.grad(logits.sum(), reals, create_graph=True)
    return gradient.square().sum(dim=(1, 2, 3)).mean()


def default_gamma(resolution: int, batch: int) -> float:
    """Weight of R1 by the heuristic of ADA's configuration 'auto' (Karras et al. 2020, arXiv 2006.06676)."""
    return 0.0002 * resolution**2 / batch
