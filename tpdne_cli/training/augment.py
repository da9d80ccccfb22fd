"""Augmentation inside the graph, on photographs and generated images alike, so that few pictures suffice.

`DiffAugment` (Zhao et al. 2020, arXiv 2006.10738) always acts; `Ada` (Karras et al. 2020, arXiv 2006.06676) acts with a
probability that rises while the discriminator knows the photographs too well.
All draws come from torch's default generator of the images' device, and no step waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

Tensor = torch.Tensor
OFTEN = 4  # batches, after whose average the probability of Ada moves


class DiffAugment:
    """Colour, translation by up to 1/8 and a hole of half the width; strength 1 is the paper's, 0 leaves the image."""

    def __init__(self, strength: float = 1.0) -> None:
        self.strength = strength

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[N, 3, R, R] -> the same shape, differentiable."""
        return self._cutout(self._translation(self._colour(x)))

    def _colour(self, x: torch.Tensor) -> torch.Tensor:
        brightness, saturation, contrast = (_uniform(x, -1, 1) * self.strength for _ in range(3))
        x = x + brightness / 2
        grey = x.mean(dim=1, keepdim=True)
        x = (x - grey) * (saturation + 1) + grey
        mean = x.mean(dim=(1, 2, 3), keepdim=True)
        return (x - mean) * (contrast / 2 + 1) + mean

    def _translation(self, x: torch.Tensor) -> torch.Tensor:
        n, _, height, width = x.shape
        reach = self.strength / 8
        shift_y = (_uniform(x, -reach, reach) * height).round() * 2 / height  # in units of grid_sample
        shift_x = (_uniform(x, -reach, reach) * width).round() * 2 / width
        theta = torch.eye(2, 3, device=x.device).repeat(n, 1, 1)
        theta[:, 0, 2], theta[:, 1, 2] = shift_x.view(n), shift_y.view(n)
        grid = F.affine_grid(theta, [n, 1, height, width], align_corners=False)
        return sample(x, grid, "nearest", "zeros")

    def _cutout(self, x: torch.Tensor) -> torch.Tensor:
        height, width = x.shape[2:]
        half_y, half_x = height * self.strength / 4, width * self.strength / 4
        rows = torch.arange(height, device=x.device).view(1, 1, -1, 1) + 0.5
        columns = torch.arange(width, device=x.device).view(1, 1, 1, -1) + 0.5
        near_y = (rows - _uniform(x, 0, height).round()).abs() < half_y
        near_x = (columns - _uniform(x, 0, width).round()).abs() < half_x
        return x.masked_fill(near_y & near_x, 0.0)


class Ada:
    """Pixel blits, geometry and colour ('bgc', section 2.2), each with probability p; p follows the sign of D on reals.

    Simpler than the paper in one point: samples are taken bilinearly with reflected borders, without the wavelet
    filter around it. `p` is a scalar tensor on the device, so that following r_t needs no host synchronisation.
    """

    def __init__(self, device: torch.device, target: float = 0.6, images_to_full: int = 500_000) -> None:
        self.p = torch.zeros((), device=device)
        self.target = target
        self.images_to_full = images_to_full
        self.r_t, self.batches, self.images = torch.zeros((), device=device), 0, 0  # since p moved, r_t summed up
        self.luma = torch.tensor([1.0, 1.0, 1.0, 0.0], device=device) / math.sqrt(3)

    def update(self, r_t: torch.Tensor, images: int) -> None:
        """Moves p, every fourth call, by the images seen: up while r_t = E[sign D(real)] is above its target."""
        self.r_t, self.batches, self.images = self.r_t + r_t, self.batches + 1, self.images + images
        if self.batches == OFTEN:
            self.p.add_(torch.sign(self.r_t / OFTEN - self.target) * (self.images / self.images_to_full)).clamp_(0, 1)
            self.r_t, self.batches, self.images = torch.zeros_like(self.r_t), 0, 0

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"p": self.p, "r_t": self.r_t, "batches": self.batches, "images": self.images}

    def restore(self, state: dict[str, Any]) -> None:
        """Goes on from what state() gave."""
        self.p.copy_(state["p"])
        self.r_t = state["r_t"].to(self.p.device)
        self.batches, self.images = state["batches"], state["images"]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[N, 3, R, R] -> the same shape, differentiable."""
        return self._recolour(self._move(x))

    def _move(self, x: torch.Tensor) -> torch.Tensor:
        n, _, height, width = x.shape
        pick = self._picker(self.p)
        flip = 1 - 2 * pick(torch.randint(0, 2, (n,), device=x.device).float(), 0)
        turn = pick(torch.randint(0, 4, (n,), device=x.device).float(), 0) * (math.pi / 2)
        shift_x, shift_y = pick(torch.stack([_flat(x, -0.125, 0.125), _flat(x, -0.125, 0.125)]), 0)
        shift_x = (shift_x * width).round() * 2 / width
        shift_y = (shift_y * height).round() * 2 / height
        scale = pick(torch.exp2(_normal(x) * 0.2), 1)
        rotate = self._picker(1 - torch.sqrt(1 - self.p))  # at least one of two happens with probability p
        before = rotate(_flat(x, -math.pi, math.pi), 0)
        stretch = pick(torch.exp2(_normal(x) * 0.2), 1)
        after = rotate(_flat(x, -math.pi, math.pi), 0)
        drift_x, drift_y = pick(torch.stack([_normal(x), _normal(x)]) * 0.125, 0) * 2
        one = torch.ones_like(scale)
        theta = (
            _scale(flip, one)
            @ _rotation(turn)
            @ _translation(shift_x, shift_y)
            @ _scale(1 / scale, 1 / scale)
            @ _rotation(before)
            @ _scale(1 / stretch, stretch)
            @ _rotation(after)
            @ _translation(drift_x, drift_y)
        )
        grid = F.affine_grid(theta[:, :2], [n, 1, height, width], align_corners=False)
        return sample(x, grid, "bilinear", "reflection")

    def _recolour(self, x: torch.Tensor) -> torch.Tensor:
        n = len(x)
        pick = self._picker(self.p)
        eye = torch.eye(4, device=x.device)
        along = torch.outer(self.luma, self.luma)
        brightness = pick(_normal(x) * 0.2, 0)
        shift = eye.repeat(n, 1, 1)
        shift[:, :3, 3] = brightness[:, None]
        contrast = pick(torch.exp2(_normal(x) * 0.5), 1)
        scale = torch.diag_embed(torch.stack([contrast, contrast, contrast, torch.ones_like(contrast)], dim=1))
        invert = pick(torch.randint(0, 2, (n,), device=x.device).float(), 0).view(n, 1, 1)
        mirror = eye - 2 * along * invert
        hue = _hue(pick(_flat(x, -math.pi, math.pi), 0), self.luma)
        saturation = pick(torch.exp2(_normal(x)), 1).view(n, 1, 1)
        fade = along + (eye - along) * saturation
        matrix = fade @ hue @ mirror @ scale @ shift  # [N, 4, 4]
        pixels: torch.Tensor = torch.einsum("nij,njhw->nihw", matrix[:, :3, :3], x)
        return pixels + matrix[:, :3, 3, None, None]

    def _picker(self, p: torch.Tensor) -> Callable[[torch.Tensor, float], torch.Tensor]:
        """Keeps each image's value, [N] or [2, N], with probability p; otherwise the value that does nothing."""

        def pick(value: torch.Tensor, otherwise: float) -> torch.Tensor:
            chosen = torch.rand(value.shape[-1], device=value.device) < p
            return torch.where(chosen, value, torch.full_like(value, otherwise))

        return pick


def sample(x: Tensor, grid: Tensor, mode: str, padding: str) -> Tensor:
    """F.grid_sample, [N, C, H, W] and [N, H, W, 2] -> the same shape, to be differentiated by x as often as one likes.

    R1 differentiates it twice, and the one of older torch has no second derivative.
    """
    result: Tensor = _Sample.apply(x, grid, mode, padding)  # type: ignore[no-untyped-call]
    return result


class _Sample(torch.autograd.Function):
    """Linear in x: its derivative is the adjoint, and the adjoint's derivative is itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, grid: Tensor, mode: str, padding: str) -> Tensor:
        ctx.save_for_backward(grid)
        ctx.how = mode, padding
        return F.grid_sample(x, grid, mode, padding, align_corners=False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x = _Adjoint.apply(grad, *ctx.saved_tensors, *ctx.how)  # type: ignore[no-untyped-call]
        return x, None, None, None


class _Adjoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor, grid: Tensor, mode: str, padding: str) -> Tensor:
        ctx.save_for_backward(grid)
        ctx.how = mode, padding
        with torch.enable_grad():  # of a linear function, so it does not matter where
            x = torch.zeros_like(grad, requires_grad=True)
            y = F.grid_sample(x, grid, mode, padding, align_corners=False)
        return torch.autograd.grad(y, x, grad)[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        x = _Sample.apply(grad, *ctx.saved_tensors, *ctx.how)  # type: ignore[no-untyped-call]
        return x, None, None, None


def _uniform(x: torch.Tensor, low: float, high: float) -> torch.Tensor:
    return torch.rand(len(x), 1, 1, 1, device=x.device) * (high - low) + low


def _flat(x: torch.Tensor, low: float, high: float) -> torch.Tensor:
    return torch.rand(len(x), device=x.device) * (high - low) + low


def _normal(x: torch.Tensor) -> torch.Tensor:
    return torch.randn(len(x), device=x.device)


def _matrix(rows: list[list[torch.Tensor]]) -> torch.Tensor:
    return torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)


def _scale(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    one, zero = torch.ones_like(x), torch.zeros_like(x)
    return _matrix([[x, zero, zero], [zero, y, zero], [zero, zero, one]])


def _rotation(angle: torch.Tensor) -> torch.Tensor:
    one, zero, cos, sin = torch.ones_like(angle), torch.zeros_like(angle), angle.cos(), angle.sin()
    return _matrix([[cos, -sin, zero], [sin, cos, zero], [zero, zero, one]])


def _translation(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    one, zero = torch.ones_like(x), torch.zeros_like(x)
    return _matrix([[one, zero, x], [zero, one, y], [zero, zero, one]])


def _hue(angle: torch.Tensor, axis: torch.Tensor) -> torch.Tensor:
    """Rotation about the grey axis [4] (Rodrigues): [N] -> [N, 4, 4]."""
    a = axis[0]
    zero = torch.zeros_like(a)
    cross = torch.stack(
        [
            torch.stack([zero, -a, a, zero]),
            torch.stack([a, zero, -a, zero]),
            torch.stack([-a, a, zero, zero]),
            torch.stack([zero, zero, zero, zero]),
        ]
    )
    eye = torch.eye(4, device=angle.device)
    cos, sin = angle.cos().view(-1, 1, 1), angle.sin().view(-1, 1, 1)
    last = torch.zeros_like(eye)
    last[3, 3] = 1
    rotated = eye * cos + cross * sin + torch.outer(axis, axis) * (1 - cos)
    return torch.where(last.bool(), last, rotated)
