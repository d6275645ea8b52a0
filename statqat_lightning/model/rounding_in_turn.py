"""Rounding the rows of a weight column by column, later columns making up for earlier ones."""

from __future__ import annotations

import torch
from torch import Tensor

from statqat_lightning.formats import Format

_BLOCK = 128  # columns that are rounded before all later ones are moved


def round_in_turn(
    weight: Tensor, scale: Tensor, fmt: Format, moments: Tensor, damping: float
) -> tuple[Tensor, float, float, float]:
    """Round the columns of matrices one after the other, each making up for those before it.

    Columns of large inputs come first: what they lose, the many smaller ones can make up for. Rows
    that come out no better than rounded as they are, are.

    Args:
        weight: float32 `(parts, n, m)`; parts without inputs stay as they are.
        scale: Scale of each element, same shape.
        fmt: The number format.
        moments: Second moments of the inputs up to a factor, float64 `(parts, m, m)`.
        damping: What is added to their diagonals, in units of these diagonals' mean.

    Returns:
        The rounded weights, same shape; the energy of the outputs, of their error when the given
        weights are rounded, and of their error when the returned ones are.
    """
    moved = weight.clone()
    signal = before = after = 0.0
    for number in range(len(weight)):
        own, h = weight[number], moments[number]
        if not h.diagonal().any():
            continue
        plain = fmt.round(own / scale[number]) * scale[number]
        turned = _round_in_turn(own, scale[number], fmt, h, damping)
        wide = own.to(torch.float64)
        error = _energy(wide - plain, h)
        error_turned = _energy(wide - turned, h)
        better = (error_turned < error).unsqueeze(1)
        moved[number] = torch.where(better, turned, plain)
        signal += float(_energy(wide, h).sum())
        before += float(error.sum())
        after += float(error.minimum(error_turned).sum())
    return moved, signal, before, after


def _energy(rows: Tensor, h: Tensor) -> Tensor:
    """`sum_jk r_j h_jk r_k` of each row, float64 `(n,)`."""
    return (rows.to(h.dtype) @ h).mul_(rows).sum(1)


def _round_in_turn(
    weight: Tensor, scale: Tensor, fmt: Format, moments: Tensor, damping: float
) -> Tensor:
    """The rounded matrix of one part, see `round_in_turn`; float32 `(n, m)`."""
    diagonal = moments.diagonal()
    order = diagonal.argsort(descending=True)
    upper = _factor(moments[order][:, order], damping).to(torch.float32)
    rest, scale = weight[:, order], scale[:, order]
    rounded = torch.empty_like(rest)
    for start in range(0, rest.shape[1], _BLOCK):
        block = slice(start, min(start + _BLOCK, rest.shape[1]))
        columns, factor = rest[:, block].clone(), upper[block, block]
        errors = torch.empty_like(columns)
        for j in range(columns.shape[1]):
            s = scale[:, start + j]
            q = fmt.round(columns[:, j] / s) * s
            rounded[:, start + j] = q
            errors[:, j] = (columns[:, j] - q) / factor[j, j]
            columns[:, j + 1 :].addr_(errors[:, j], factor[j, j + 1 :], alpha=-1)
        rest[:, block.stop :].addmm_(errors, upper[block, block.stop :], alpha=-1)
    result = torch.empty_like(rounded)
    result[:, order] = rounded
    return result


def _factor(moments: Tensor, damping: float) -> Tensor:
    """Upper Cholesky factor of the inverse of damped moments, float64, in units of their mean.

    In float32 the factorization fails on inputs of language models. Where it fails in float64, more
    damping is added.
    """
    mean = moments.diagonal().mean()
    while True:
        damped = moments / mean
        damped.diagonal().add_(damping)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            inverse = torch.cholesky_inverse(lower)
            upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed:
                factor: Tensor = upper
                return factor
        damping *= 10


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in float32, or in float64 if it is that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
