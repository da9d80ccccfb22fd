"""Distances between two sets of features: how well one set of images stands for another. Rows are images, [N, F]."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK = 1024  # rows compared at once, so that no full table of distances is ever in memory


def moments(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean [F] and unbiased covariance [F, F], float64."""
    x = features.double()
    return x.mean(0), torch.cov(x.T).reshape(x.shape[1], x.shape[1])


def frechet_distance(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> float:
    """Between normal distributions (mean [F], covariance [F, F]): |m - n|^2 + tr(A + B - 2 (A B)^1/2) (1706.08500).

    A B has the eigenvalues of the symmetric A^1/2 B A^1/2, so only real, stable decompositions are needed.
    """
    (mean_a, cov_a), (mean_b, cov_b) = a, b
    values, vectors = torch.linalg.eigh(cov_a)
    root = (vectors * values.clamp_min(0).sqrt()) @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov_b @ root).clamp_min(0).sqrt().sum()
    return float((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * cross)


def chunks(rows: Tensor) -> Iterator[Tensor]:
    """The rows in pieces of CHUNK."""
    return (rows[start : start + CHUNK] for start in range(0, len(rows), CHUNK))


def radii(features: Tensor, k: int = 3) -> Tensor:
    """Distance [N] of each row to its k-th nearest other row."""
    # Itself is the nearest of all, so it comes out first and is dropped with the rest.
    return torch.cat([torch.cdist(x, features).topk(k + 1, largest=False)[0][:, k] for x in chunks(features)])


def covered(queries: Tensor, references: Tensor, reach: Tensor) -> Tensor:
    """Whether each query lies within reach [M] of any reference; bool [N]."""
    return torch.cat([(torch.cdist(x, references) <= reach).any(1) for x in chunks(queries)])


def precision_recall(real: Tensor, fake: Tensor, k: int = 3) -> tuple[float, float]:
    """Shares of fakes within the reals' manifold, and of reals within the fakes' (Kynkaanniemi et al., 1904.06991).

    A manifold is the union of balls that reach to each row's k-th neighbour. The sets should be of one size.
    """
    precision, recall = covered(fake, real, radii(real, k)), covered(real, fake, radii(fake, k))
    return float(precision.double().mean()), float(recall.double().mean())


def nearest(queries: Tensor, references: Tensor, excluded: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Distance [N] to and row number [N] of the nearest reference. excluded: rows [N, E] that do not count."""
    distances, rows = [], []
    for start in range(0, len(queries), CHUNK):
        table = torch.cdist(queries[start : start + CHUNK], references)
        if excluded is not None:
            table.scatter_(1, excluded[start : start + CHUNK], torch.inf)
        distance, row = table.min(1)
        distances.append(distance)
        rows.append(row)
    return torch.cat(distances), torch.cat(rows)
