"""Densities of unit variance and zero mean, known by their partial moments.

Quantization error under a density needs only `P(a < x < b)`, `E[x; a < x < b]` and `E[x^2; a < x <
b]` (theory: expand the square in the error integral). Each density gives the three as functions of
the upper limit.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor


class Density(ABC):
    """A symmetric density with mean 0 and variance 1."""

    @property
    @abstractmethod
    def name(self) -> str:
        """Name under which `get_density` finds it."""

    @abstractmethod
    def lower_moments(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """`P(x < t)`, `E[x; x < t]`, `E[x^2; x < t]` for finite float64 `t <= 0`, any shape."""

    def cell_moments(self, lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Moments over cells `lower < x < upper` of one sign, without cancellation in the tails.

        Cells on the positive side are mirrored to the negative one, where the lower moments are
        small numbers.

        Args:
            lower: Lower ends, float64, any shape; minus infinity allowed.
            upper: Upper ends, same shape; plus infinity allowed. No cell has zero in its inside.
        """
        mirrored = lower >= 0
        near = torch.where(mirrored, -lower, upper)
        far = torch.where(mirrored, -upper, lower)
        infinite = far == -math.inf
        upper_moments = self.lower_moments(near)
        lower_moments = self.lower_moments(torch.where(infinite, near, far))
        m0, m1, m2 = (
            u - torch.where(infinite, 0.0, v)
            for u, v in zip(upper_moments, lower_moments, strict=True)
        )
        return m0, torch.where(mirrored, -m1, m1), m2


@dataclass(frozen=True)
class Normal(Density):
    """The standard normal density."""

    @property
    def name(self) -> str:
        return "normal"

    def lower_moments(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        pdf = torch.exp(-0.5 * t * t) / math.sqrt(2 * math.pi)
        cdf = 0.5 * torch.special.erfc(-t / math.sqrt(2))
        return cdf, -pdf, cdf - t * pdf


@dataclass(frozen=True)
class Laplace(Density):
    r"""The Laplace density of unit variance, :math:`\exp(-\sqrt 2 |x|) / \sqrt 2`."""

    @property
    def name(self) -> str:
        return "laplace"

    def lower_moments(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b = 1 / math.sqrt(2)
        tail = 0.5 * torch.exp(t / b)
        return tail, tail * (t - b), tail * (t * t - 2 * b * t + 2 * b * b)


_DENSITIES: dict[str, Density] = {density.name: density for density in (Normal(), Laplace())}


def get_density(name: str | Density) -> Density:
    """The density called `normal` or `laplace`; a `Density` is returned as it is.

    Raises:
        ValueError: If there is no such density.
    """
    if isinstance(name, Density):
        return name
    if name not in _DENSITIES:
        raise ValueError(f"density: got {name!r}; expected one of {', '.join(_DENSITIES)}.")
    return _DENSITIES[name]
