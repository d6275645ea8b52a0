"""Densities of unit variance and zero mean, known by their partial moments.

Quantization error under a density needs only `P(a < x < b)`, `E[x; a < x < b]` and `E[x^2; a < x <
b]` (theory: expand the square in the error integral). Each density gives the three as functions of
the upper limit.
"""

from __future__ import annotations

import math
import re
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
        """`P(x < t)`, `E[x; x < t]`, `E[x^2; x < t]` for finite float64 `t <= 0`, any shape.

        They are accurate relative to themselves, far in the tail too.
        """


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


@dataclass(frozen=True)
class Logistic(Density):
    r"""The logistic density of unit variance, scale :math:`b = \sqrt 3 / \pi`.

    With :math:`z = t/b` and :math:`v = \log(1 + e^z)` the partial moments are those of

    .. math:: F(z), \quad z F(z) - v, \quad z^2 F(z) - 2 z v - 2 \mathrm{Li}_2(-e^z) .

    Landen's identity turns the dilogarithm into the Debye series :math:`-\mathrm{Li}_2(-e^z) =
    v + v^2/4 + \sum_n B_{2n} v^{2n+1} / (2n+1)!`, which at :math:`v \le \log 2` gains two digits a
    term.
    """

    @property
    def name(self) -> str:
        return "logistic"

    def lower_moments(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        b = math.sqrt(3) / math.pi
        z = t / b
        tail = torch.sigmoid(z)
        v = torch.log1p(torch.exp(z))
        square = v * v
        series = torch.zeros_like(v)
        for coefficient in reversed(_DEBYE):
            series = (series + coefficient) * square
        minus_dilogarithm = v * (1 + v / 4 + series)
        return tail, b * (z * tail - v), b * b * (z * z * tail - 2 * z * v + 2 * minus_dilogarithm)


_BERNOULLI = (1 / 6, -1 / 30, 1 / 42, -1 / 30, 5 / 66, -691 / 2730, 7 / 6, -3617 / 510)
_DEBYE = [b / math.factorial(2 * n + 1) for n, b in enumerate(_BERNOULLI, 1)]


@dataclass(frozen=True)
class Uniform(Density):
    r"""The uniform density of unit variance, on :math:`|x| < \sqrt 3`."""

    @property
    def name(self) -> str:
        return "uniform"

    def lower_moments(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a = math.sqrt(3)
        inside = (t + a).clamp_min(0.0)  # factored out: the moments vanish at -a to the last digit
        t = t.clamp_min(-a)
        return inside / (2 * a), inside * (t - a) / (4 * a), inside * (t * t - a * t + 3) / (6 * a)


@dataclass(frozen=True)
class StudentT(Density):
    r"""Student's t density of unit variance: :math:`x = u \sqrt{(\nu - 2)/\nu}`.

    The mass of a tail is a regularized incomplete beta function, :math:`2 P(u < t) =
    I_y(\nu/2, 1/2)` with :math:`y = \nu / (\nu + t^2)`; the first moment is elementary, and a
    recurrence with positive terms (DLMF 8.17.18) leads from the mass to the second.

    Args:
        degrees: Degrees of freedom :math:`\nu`, more than 2: below there is no variance.
    """

    degrees: float = 5.0

    def __post_init__(self) -> None:
        if not 2 < self.degrees < math.inf:
            raise ValueError(
                f"StudentT: got degrees={self.degrees!r}; expected a number above 2, "
                "where the variance is finite."
            )

    @property
    def name(self) -> str:
        return "student_t" if self.degrees == 5 else f"student_t:{_short(self.degrees)}"

    def lower_moments(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        nu = self.degrees
        width = math.sqrt((nu - 2) / nu)
        u = t / width
        square = u * u
        a = nu / 2
        log_y = -torch.log1p(square / nu)
        log_norm = math.lgamma(a + 0.5) - math.lgamma(a) - 0.5 * math.log(math.pi * nu)
        power = torch.exp(log_norm + (a - 0.5) * log_y)
        mass = 0.5 * _incomplete_beta(torch.exp(log_y), square / (nu + square), a, 0.5)
        return mass, -width * nu / (nu - 1) * power, mass - u * power


def _incomplete_beta(x: Tensor, complement: Tensor, a: float, b: float) -> Tensor:
    """Regularized incomplete beta function `I_x(a, b)`.

    By the continued fraction of DLMF 8.17.22, which converges fast below `(a + 1) / (a + b + 2)`;
    above it the complement does.

    Args:
        x: float64 in [0, 1], any shape.
        complement: `1 - x`, known better than by subtraction.
        a: Positive.
        b: Positive.
    """
    near = x < (a + 1) / (a + b + 2)
    log_beta = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    tail = _beta_fraction(torch.where(near, x, 0.5 * (a + 1) / (a + b + 2)), a, b)
    rest = _beta_fraction(torch.where(near, 0.5 * (b + 1) / (a + b + 2), complement), b, a)
    factor = x.pow(a) * complement.pow(b) * math.exp(-log_beta)
    return torch.where(near, factor * tail / a, 1 - factor * rest / b)


def _beta_fraction(x: Tensor, a: float, b: float) -> Tensor:
    """The continued fraction of `I_x(a, b)` by Lentz's algorithm, to machine precision."""
    c = torch.ones_like(x)
    d = 1 / (1 - (a + b) * x / (a + 1))
    value = d
    for m in range(1, 1000):
        even = m * (b - m) / ((a + 2 * m - 1) * (a + 2 * m)) * x
        d, c = 1 / (1 + even * d), 1 + even / c
        value = value * (d * c)
        odd = -(a + m) * (a + b + m) / ((a + 2 * m) * (a + 2 * m + 1)) * x
        d, c = 1 / (1 + odd * d), 1 + odd / c
        change = d * c
        value = value * change
        if (change - 1).abs().amax() < 1e-15:
            break
    return value


@dataclass(frozen=True)
class GeneralizedNormal(Density):
    r"""The generalized normal (generalized Gaussian) density of unit variance.

    .. math:: p(x) \propto \exp(-(|x|/\alpha)^\beta), \quad
        \alpha^2 = \Gamma(1/\beta) / \Gamma(3/\beta)

    Shape 1 is the Laplace density, 2 the normal one, and a large shape nears the uniform one. The
    partial moments are regularized incomplete gamma functions at :math:`1/\beta, 2/\beta, 3/\beta`.

    Args:
        shape: :math:`\beta`, from 0.2 to 50; the default lies between Laplace and normal.
    """

    shape: float = 1.5

    def __post_init__(self) -> None:
        if not 0.2 <= self.shape <= 50:
            raise ValueError(
                f"GeneralizedNormal: got shape={self.shape!r}; expected a number from 0.2 to 50."
            )

    @property
    def name(self) -> str:
        suffix = "" if self.shape == 1.5 else f":{_short(self.shape)}"
        return f"generalized_normal{suffix}"

    @property
    def mean_magnitude(self) -> float:
        """`E|x|`, relative to the standard deviation of 1."""
        g1, g2, g3 = (math.lgamma(n / self.shape) for n in (1, 2, 3))
        return math.exp(g2 - 0.5 * (g1 + g3))

    def lower_moments(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        g1, g3 = (math.lgamma(n / self.shape) for n in (1, 3))
        y = (-t * math.exp(0.5 * (g3 - g1))).pow(self.shape)
        mass, first, second = (
            torch.special.gammaincc(torch.tensor(n / self.shape, dtype=y.dtype), y)
            for n in (1, 2, 3)
        )
        return 0.5 * mass, -0.5 * self.mean_magnitude * first, 0.5 * second


def _short(number: float) -> str:
    return str(number).removesuffix(".0")


_DENSITIES: dict[str, type[Density]] = {
    "normal": Normal,
    "laplace": Laplace,
    "logistic": Logistic,
    "uniform": Uniform,
    "student_t": StudentT,
    "generalized_normal": GeneralizedNormal,
}
_PARAMETERS = {"student_t": "degrees of freedom", "generalized_normal": "shape"}


def density_names() -> list[str]:
    """Every name that `get_density` knows, without parameters."""
    return [*_DENSITIES]


def get_density(name: str | Density) -> Density:
    """The density of the given name; a `Density` is returned as it is.

    Args:
        name: `normal`, `laplace`, `logistic`, `uniform`, `student_t` (5 degrees of freedom) or
            `student_t:4`, `generalized_normal` (shape 1.5) or `generalized_normal:1.2`.

    Raises:
        ValueError: If there is no such density, or its parameter is not a number in its range.

    Examples:
        >>> get_density("student_t:4").name
        'student_t:4'
    """
    if isinstance(name, Density):
        return name
    match = re.fullmatch(r"(\w+)(?::(.+))?", name) if isinstance(name, str) else None
    kind, parameter = (match[1], match[2]) if match else ("", None)
    if kind not in _DENSITIES:
        raise ValueError(f"density: got {name!r}; expected one of {', '.join(_DENSITIES)}.")
    if parameter is None:
        return _DENSITIES[kind]()
    if kind not in _PARAMETERS:
        raise ValueError(f"density: got {name!r}, but {kind} has no parameter; give {kind!r}.")
    try:
        number = float(parameter)
    except ValueError:
        raise ValueError(
            f"density: got {name!r}; expected a number ({_PARAMETERS[kind]}) after the colon."
        ) from None
    return StudentT(number) if kind == "student_t" else GeneralizedNormal(number)
