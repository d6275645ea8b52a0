r"""Scales for which no result of an integer kernel lies halfway between two codes.

A kernel multiplies an integer :math:`n` with :math:`M = s_x s_w / s_y` and rounds. Where
:math:`n M` lies next to the edge between two codes, the last bit of a float decides which of them
it becomes; the fake-quantized model, which divides and adds in another order than the runtime,
decides otherwise, and a single code more or less, early in a deep network, moves thousands of
others. There is no need for such places: if :math:`M = p / q` with an odd :math:`q`, then
:math:`n M` is at least :math:`1 / 2q` away from every edge, for it would be an odd multiple of one
half only if :math:`2 n p = (2 k + 1) q`, an even number and an odd one. Some fraction with a small
odd denominator lies within a thousandth of any :math:`M` (Dirichlet: the smallest :math:`q` is
about :math:`\sqrt{1000 / M}`), so a change of scales that no accuracy can tell takes all decisions
away from float rounding.

Sums, products, means and functions of codes take so few values that all can be listed; there the
scale of the result is searched for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from statqat_lightning.fake_quant.activation import ActivationFakeQuantizer
from statqat_lightning.layers.batch_norm import channel_factor, has_statistics
from statqat_lightning.layers.quantized_layer import is_sharded
from statqat_lightning.numerics.granularity import PerTensor
from statqat_lightning.targets.integer_kernels import MEANS, IntegerKernel, IntegerQuantizers

_WIDTH = 1e-3
"""Relative width of the intervals inside which scales move: 60 dB below what they scale."""
_MARGIN = 0.01
"""Share of an interval at either end that is left free, so that rounding does not leave it."""
_LARGEST = 20_001
"""Largest denominator; with more, the distance to the edges would be that of float rounding."""
_CANDIDATES = 64
"""Scales that are tried in an interval."""
_CLEAR = 1e-5
"""Least distance to an edge, in steps, that is worth a change of scale."""
_MOST_VALUES = 1 << 17

_PAIRS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"add": torch.add, "mul": torch.mul}
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    **{"hardswish": F.hardswish, "Hardswish": F.hardswish},
    **{"hardsigmoid": F.hardsigmoid, "Hardsigmoid": F.hardsigmoid},
    **{"sigmoid": torch.sigmoid, "Sigmoid": torch.sigmoid},
    **{"silu": F.silu, "SiLU": F.silu, "tanh": torch.tanh, "Tanh": torch.tanh},
}
"""Functions of single values, by the kinds of operations that compute them."""


@torch.no_grad()
def avoid_ties(model: nn.Module, kernels: Sequence[IntegerKernel]) -> list[str]:
    """Move scales, by a thousandth at most, to where results stay clear of the edges of codes.

    What changes is the scale of the result where it is that of a sum, a product, a mean or a
    function; then, for the layers, the weight of the BatchNorm behind them, or else the scale of
    their weight. A second call changes nothing. Where nothing is found, all stays as it is.

    Args:
        model: A model with quantizers.
        kernels: What `integer_kernels` found in a run of it.

    Returns:
        Names of the quantizers and layers whose scales have changed.
    """
    quantizers = IntegerQuantizers(model)
    changed = []
    # In the order of the run: a scale that is changed is a term of what follows.
    for kernel in kernels:
        if (gate := quantizers.gate(kernel)) is not None:
            term = quantizers.first(kernel.terms[0])
            changed += [] if term is None else _clear_all([gate], torch.sigmoid(_grid(term)))
        values = None if kernel.has_weights else _values(kernel, kernels, quantizers)
        if values is not None:
            changed += _clear_all(quantizers.all(kernel.results), values)
    for kernel in kernels:
        if kernel.has_weights and _make_rational(model, kernel, quantizers):
            changed.append(kernel.name)
    return changed


def _values(
    kernel: IntegerKernel, kernels: Sequence[IntegerKernel], quantizers: IntegerQuantizers
) -> Tensor | None:
    """All values that a kernel can give, float64; None if they are too many or not known."""
    sets: list[Tensor] = []
    for chain, source in zip(kernel.terms, kernel.sources, strict=True):
        term = quantizers.first(chain)
        if term is not None:
            values: Tensor | None = _grid(term)
        elif source is not None and not quantizers.rounds(chain):  # a function of such values
            values = _values(kernels[source], kernels, quantizers)
        else:
            values = None
        if values is None:
            return None
        sets.append(values)
    if math.prod(map(len, sets)) > _MOST_VALUES:
        return None
    if kernel.kind in _PAIRS and len(sets) == 2:
        return _PAIRS[kernel.kind](sets[0][:, None], sets[1]).flatten()
    if kernel.kind in FUNCTIONS and len(sets) == 1:
        gate = quantizers.gate(kernel)
        return FUNCTIONS[kernel.kind](sets[0]) if gate is None else sets[0] * _gated(gate, sets[0])
    term = quantizers.first(kernel.terms[0])
    if kernel.kind in MEANS and term is not None and len(sets) == 1:
        lowest, highest = (int(end) * kernel.count for end in (term.fmt.min, term.fmt.max))
        if 0 < highest - lowest < _MOST_VALUES:
            return torch.arange(lowest, highest + 1).double() * (_scale(term) / kernel.count)
    return None


def _gated(gate: ActivationFakeQuantizer, x: Tensor) -> Tensor:
    """The sigmoid of values, on the grid of a gate."""
    codes = (torch.sigmoid(x) / _scale(gate)).round().clamp(gate.fmt.min, gate.fmt.max)
    return codes * _scale(gate)


def _grid(quantizer: ActivationFakeQuantizer) -> Tensor:
    codes = torch.arange(int(quantizer.fmt.min), int(quantizer.fmt.max) + 1, dtype=torch.float64)
    return codes * _scale(quantizer)


def _scale(quantizer: ActivationFakeQuantizer) -> float:
    return float(quantizer.qparams.scale)


def _interval(value: Tensor) -> tuple[Tensor, Tensor]:
    """The interval around each positive number that all numbers in it have in common."""
    number = (value.log() / math.log1p(_WIDTH)).floor()
    low = (number * math.log1p(_WIDTH)).exp()
    return low * (1 + _MARGIN * _WIDTH), low * (1 + (1 - _MARGIN) * _WIDTH)


def _clear_all(quantizers: Sequence[ActivationFakeQuantizer], values: Tensor) -> list[str]:
    """Those of several quantizers of one result that have changed; equal ones stay equal.

    Scales that are shared with other results stay as they are.
    """
    changed: dict[tuple[float, str], float] = {}
    names = []
    for quantizer in quantizers:
        if quantizer.spec.shared is not None:
            continue
        key = _scale(quantizer), quantizer.fmt.name
        if key in changed:
            quantizer.scale.fill_(changed[key])
            names.append(quantizer.name)
        elif _clear(quantizer, values):
            changed[key] = _scale(quantizer)
            names.append(quantizer.name)
    return names


def _clear(quantizer: ActivationFakeQuantizer, values: Tensor) -> bool:
    """Give a quantizer the scale of its interval whose edges are farthest from all values."""
    low, high = (float(end) for end in _interval(quantizer.qparams.scale.double().cpu()))
    # Numbers of few bits, so that the float32 scale is the one that was tried.
    values = torch.unique(values)
    step = 2.0 ** math.floor(math.log2((high - low) / _CANDIDATES))
    scales = torch.arange(math.ceil(low / step), math.floor(high / step) + 1).double() * step
    distances = torch.stack([_distance(values / scale, quantizer) for scale in scales])
    best = int(distances.argmax())
    scale = float(scales[best])
    if float(distances[best]) < _CLEAR or scale == _scale(quantizer):
        return False
    quantizer.scale.fill_(scale)
    return True


def _distance(steps: Tensor, quantizer: ActivationFakeQuantizer) -> Tensor:
    """From the edges between codes to the nearest of all values that are not clipped."""
    inside = steps[(steps >= quantizer.fmt.min) & (steps <= quantizer.fmt.max)]
    return ((inside - inside.floor()) - 0.5).abs().amin() if inside.numel() else torch.tensor(0.5)


def _make_rational(model: nn.Module, kernel: IntegerKernel, quantizers: IntegerQuantizers) -> bool:
    """Make the multipliers of a layer fractions with odd denominators."""
    products, results = quantizers.products(kernel), quantizers.all(kernel.results)
    weight = quantizers.weight(kernel.name)
    scales = {_scale(result) for result in results}
    if products is None or weight is None or len(scales) != 1:
        return False
    multiplier = products / results[0].qparams.scale.double()
    norm: Any = None if kernel.norm is None else model.get_submodule(kernel.norm)
    if norm is not None:
        if not has_statistics(norm):
            return False
        multiplier = multiplier * channel_factor(norm).abs()
    gamma = None if norm is None else norm.weight
    if gamma is not None and (is_sharded(gamma) or gamma.dtype.itemsize < 4):
        return False
    if gamma is None and norm is not None and isinstance(weight.granularity, PerTensor):
        return False  # one scale cannot serve all channels
    ratio = (fractions(multiplier.cpu()) / multiplier.cpu()).to(multiplier.device)
    # What float32 cannot tell from 1 was made a fraction before.
    ratio = torch.where((ratio - 1).abs() > 1e-6, ratio, 1.0)
    if gamma is not None:
        gamma.copy_((gamma.double() * ratio).to(gamma.dtype))
    else:
        scale = weight.scale
        scale.copy_((scale.double() * ratio.view_as(scale)).to(scale.dtype))
    return bool((ratio != 1).any())


def fractions(numbers: Tensor) -> Tensor:
    """For each number the fraction in its interval that has the smallest odd denominator.

    Args:
        numbers: float64 `(n,)`. Zero, negative and infinite numbers, and those for which no
            denominator up to 20001 will do, stay as they are.

    Returns:
        float64 `(n,)`; at most a thousandth away, and each its own fraction.
    """
    low, high = _interval(numbers)
    found, left = numbers.clone(), ((numbers > 0) & numbers.isfinite()).nonzero().flatten()
    for start in range(1, _LARGEST + 1, 1000):
        denominators = torch.arange(start, min(start + 1000, _LARGEST + 1), 2, dtype=torch.float64)
        numerators = (low[left, None] * denominators).ceil()
        fits = (numerators > 0) & (numerators <= high[left, None] * denominators)
        rows, columns = fits.any(1), fits.to(torch.uint8).argmax(1)
        solved = rows.nonzero().flatten()
        found[left[solved]] = (numerators / denominators)[solved, columns[solved]]
        left = left[~rows]
        if not left.numel():
            break
    return found
