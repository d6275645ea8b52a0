"""What the statistics say about each quantized tensor: SNR, clipping, the grid and its spectrum."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from statqat_lightning.error_analysis.spectrum import EnergySpectrum
from statqat_lightning.error_analysis.spectrum_tables import BINS_PER_SIDE, edges_and_squares
from statqat_lightning.fake_quant.activation import ActivationFakeQuantizer
from statqat_lightning.fake_quant.fake_quantizer import FakeQuantizer
from statqat_lightning.fake_quant.observers import statistics_of
from statqat_lightning.fake_quant.weight import WeightFakeQuantizer
from statqat_lightning.formats import Format
from statqat_lightning.insight.run_plots import TensorOnGrid
from statqat_lightning.insight.snr import output_snr_by_weight, snr_by_tensor
from statqat_lightning.layers.quantized_layer import base_class, weight_of
from statqat_lightning.model.quantized_model import QuantizedLayer, quantized_layers
from statqat_lightning.numerics.snr import energies_db

_MOST_ROWS = 512
"""Rows of a weight that its spectrum holds: a spectrum takes 20 KiB, and more rows tell no more."""
_RARE = 1e-6  # share of the values below which a level counts as unused; sums of float32 err by it


@dataclass(frozen=True)
class TensorFacts:
    """What is known about one quantized tensor.

    Attributes:
        name: `{layer}/{role}`, as in log keys.
        layer: Name of the layer.
        role: Name of the weight or the input, or `output`.
        layer_type: Class of the layer.
        parameters: Elements of a weight; 0 for inputs and outputs.
        format: Name of the number format in use.
        bits: Bits of one code.
        granularity: Which elements share a scale.
        quantizer: The rule that chooses the scale.
        scale: Geometric mean of the scales.
        snr_db: Measured SNR in dB; infinite where nothing was lost, None where nothing is known.
        predicted_snr_db: The same as the energy spectrum predicts it.
        output_snr_db: SNR in dB of the layer's output if this weight alone is rounded; None for
            inputs, and where it is not known.
        clipped: Share of the values that lie beyond the ends of the grid; of inputs and outputs as
            far as the spectrum tells, which resolves 1/32 of a magnitude.
        grid_used: Share of the grid's values that occur.
        outer_energy: Share of the energy that is rounded to one of the ends of the grid.
    """

    name: str
    layer: str
    role: str
    layer_type: str
    parameters: int
    format: str
    bits: int
    granularity: str
    quantizer: str
    scale: float
    snr_db: float | None
    predicted_snr_db: float | None
    output_snr_db: float | None
    clipped: float
    grid_used: float
    outer_energy: float


@torch.no_grad()
def tensor_facts(model: nn.Module) -> dict[str, TensorFacts]:
    """What is known about each quantized tensor of a model, by name, in the order of the layers.

    Weights are looked at as they are now, inputs and outputs by their running statistics. Tensors
    that are switched off or have no scale so far are left out.

    Args:
        model: A model with quantizers; nothing in it changes.
    """
    decibels, of_outputs = snr_by_tensor(model), output_snr_by_weight(model)
    found = {}
    for layer, quantizer in _in_use(model):
        name, predicted = quantizer.name, None
        spectrum = _spectrum(layer, quantizer)
        if spectrum is not None:
            value = energies_db(*_predicted(spectrum, quantizer))
            predicted = None if math.isnan(value) else value
        if isinstance(quantizer, WeightFakeQuantizer):
            weight = weight_of(layer.module, quantizer.role)
            clipped, used, outer = grid_of_values(weight, quantizer)
            count = weight.numel()
        else:
            clipped = used = outer = math.nan
            count = 0
            if spectrum is not None:
                scale = float(quantizer.qparams.scale)
                clipped, used, outer = grid_of_spectrum(spectrum, quantizer.fmt, scale)
        found[name] = TensorFacts(
            name,
            layer.name,
            quantizer.role,
            base_class(layer.module).__name__,
            count,
            quantizer.fmt.name,
            quantizer.fmt.bits,
            str(quantizer.granularity),
            quantizer.quantizer.name,
            mean_scale(quantizer),
            decibels.get(name),
            predicted,
            of_outputs.get(name),
            clipped,
            used,
            outer,
        )
    return found


@torch.no_grad()
def tensor_spectra(model: nn.Module) -> Iterator[tuple[str, EnergySpectrum]]:
    """The energy spectrum of each quantized tensor of a model, one after the other, by name.

    A weight has a row for each group of elements that shares a scale, 512 of them at most, spread
    evenly. Inputs and outputs have one row, their running statistic; those whose quantizer keeps
    none, as min-max, are left out.

    Args:
        model: A model with quantizers; nothing in it changes.
    """
    for layer, quantizer in _in_use(model):
        spectrum = _spectrum(layer, quantizer)
        if spectrum is not None:
            yield quantizer.name, spectrum


@torch.no_grad()
def tensors_on_grids(model: nn.Module, names: Collection[str]) -> dict[str, TensorOnGrid]:
    """Spectra, formats and scales of some tensors, for `plot_error_curves`.

    Args:
        model: A model with quantizers; nothing in it changes.
        names: Names of tensors, in the order wanted; those without a spectrum are left out.
    """
    found = {}
    for layer, quantizer in _in_use(model):
        if quantizer.name in names and (spectrum := _spectrum(layer, quantizer)) is not None:
            scales = _scales_of(quantizer, len(spectrum.energy))
            found[quantizer.name] = TensorOnGrid(spectrum, quantizer.fmt, scales)
    return {name: found[name] for name in names if name in found}


def candidate_snr_db(spectrum: EnergySpectrum, fmt: Format) -> float:
    """Predicted SNR in dB of a tensor in another format, each row at its best scale.

    Args:
        spectrum: Spectra of the rows that share scales; their energies are added up.
        fmt: The format.
    """
    errors = spectrum.mse(fmt, spectrum.optimal_scale(fmt))
    return energies_db(float(spectrum.power.sum()), float(errors.sum()))


def mean_scale(quantizer: FakeQuantizer) -> float:
    """Geometric mean of the scales of a quantizer."""
    return float(quantizer.qparams.scale.cpu().double().log().mean().exp())


def _in_use(model: nn.Module) -> Iterator[tuple[QuantizedLayer, FakeQuantizer]]:
    for layer in quantized_layers(model):
        for quantizer in layer.quantizers.present():
            if quantizer.enabled and quantizer.ready:
                yield layer, quantizer


def _spectrum(layer: QuantizedLayer, quantizer: FakeQuantizer) -> EnergySpectrum | None:
    if isinstance(quantizer, WeightFakeQuantizer):
        weight = weight_of(layer.module, quantizer.role)
        rows = quantizer.granularity.rows(weight.detach().to(torch.float32))
        return EnergySpectrum.of_rows(rows[evenly_spread(len(rows), rows.device)], check=False)
    assert isinstance(quantizer, ActivationFakeQuantizer)
    return statistics_of([quantizer.observer]).spectrum


def evenly_spread(rows: int, device: torch.device) -> Tensor:
    """Indices of rows that stand for all of them: spread evenly, 512 at most."""
    count = min(rows, _MOST_ROWS)
    return torch.arange(count, device=device) * rows // count


def _predicted(spectrum: EnergySpectrum, quantizer: FakeQuantizer) -> tuple[float, float]:
    """Energy of the rows of a spectrum, and the error predicted at the scales in force."""
    scales = _scales_of(quantizer, len(spectrum.energy))
    return float(spectrum.power.sum()), float(spectrum.mse(quantizer.fmt, scales).sum())


def _scales_of(quantizer: FakeQuantizer, rows: int) -> Tensor:
    """The scales of the rows that a spectrum holds."""
    scale = quantizer.qparams.scale.flatten()
    return scale[evenly_spread(len(scale), scale.device)].expand(rows)


def grid_of_values(weight: Tensor, quantizer: FakeQuantizer) -> tuple[float, float, float]:
    """How a weight lies on its grid.

    Args:
        weight: The weight, floating dtype.
        quantizer: Its quantizer, with a scale.

    Returns:
        Shares as in `TensorFacts`: clipped, grid used, outer energy.
    """
    fmt = quantizer.fmt
    rows = quantizer.granularity.rows(weight.detach().to(torch.float32))
    scale = quantizer.qparams.scale.reshape(-1, 1).to(rows.device)
    y = rows / scale
    q = fmt.round(y)
    clipped = ((y > fmt.max) | (y < fmt.min)).float().mean()
    values = fmt.values.to(rows.device, torch.float32)
    used = torch.bincount(torch.searchsorted(values, q.flatten()), minlength=len(values)) > 0
    at_end = (q == fmt.max) | ((q == fmt.min) & (q < 0))
    energy = rows.square()
    outer = (energy * at_end).sum() / energy.sum()
    return float(clipped), float(used.float().mean()), float(outer)


def grid_of_spectrum(
    spectrum: EnergySpectrum, fmt: Format, scale: float
) -> tuple[float, float, float]:
    """How a tensor that is known by its spectrum lies on a grid; like `grid_of_values`.

    Values count as evenly spread in each of the 32 bins of an octave.

    Args:
        spectrum: A spectrum of one row.
        fmt: The format.
        scale: The scale in force.
    """
    edges, squares = edges_and_squares(torch.device("cpu"))
    energy = spectrum.energy[0].cpu().double().view(2, BINS_PER_SIDE)
    total = float(energy.sum())
    if not total > 0:
        return math.nan, math.nan, math.nan
    counts = _Cumulative(energy / squares.double(), edges.double())
    energies = _Cumulative(energy, edges.double())
    grid = fmt.values * scale
    middles = (grid[1:] + grid[:-1]) / 2
    up, down = float(grid[-1]), float(-grid[0])
    clipped = counts.above(0, up) + counts.above(1, down)
    outer = energies.above(0, float(middles[-1]))
    if fmt.is_signed:
        outer += energies.above(1, float(-middles[0]))
    # Shares of the values below each end of a cell; zeros, which no bin holds, lie at zero.
    below = torch.tensor([counts.below(float(x)) for x in middles], dtype=torch.float64)
    zeros = 1 - float(counts.sums[:, -1].sum())
    below += zeros * (middles > 0)
    ends = torch.cat([below.new_zeros(1), below, below.new_ones(1)])
    used = (ends.diff() > _RARE).double().mean()
    return clipped, float(used), outer / total


class _Cumulative:
    """Sums over magnitude of what the bins of both signs hold, positive values first.

    Attributes:
        sums: float64 `(2, bins + 1)`: what lies below each edge.
    """

    def __init__(self, bins: Tensor, edges: Tensor) -> None:
        self.sums = torch.nn.functional.pad(bins.cumsum(1), (1, 0))
        self._edges = edges

    def above(self, side: int, magnitude: float) -> float:
        """What lies on a side of zero beyond a magnitude."""
        return float(self.sums[side, -1]) - self._up_to(side, magnitude)

    def below(self, x: float) -> float:
        """What lies below a number of either sign, exact zeros apart."""
        negative = float(self.sums[1, -1])
        return negative + self._up_to(0, x) if x >= 0 else self.above(1, -x)

    def _up_to(self, side: int, magnitude: float) -> float:
        edges = self._edges
        number = int(torch.searchsorted(edges, torch.tensor(magnitude, dtype=edges.dtype)))
        if number == 0:
            return 0.0
        if number == len(edges):
            return float(self.sums[side, -1])
        low, high = float(edges[number - 1]), float(edges[number])
        part = (magnitude - low) / (high - low)
        first, last = float(self.sums[side, number - 1]), float(self.sums[side, number])
        return first + part * (last - first)


@dataclass(frozen=True)
class GridFigures:
    """What changes of a tensor's grid from step to step.

    Attributes:
        format: Name of the number format in use.
        scale: Geometric mean of the scales.
        clipped: Share of the values that lie beyond the ends of the grid; NaN where it is not
            known.
    """

    format: str
    scale: float
    clipped: float


@torch.no_grad()
def grid_figures(model: nn.Module) -> dict[str, GridFigures]:
    """Format, scale and share of clipped values of each quantized tensor, by name.

    For every so many steps: it takes a few operations a tensor and one transfer from the device.

    Args:
        model: A model with quantizers; nothing in it changes.
    """
    used = [*_in_use(model)]
    if not used:
        return {}
    scales, clipped = [], []
    for layer, quantizer in used:
        scale, fmt = quantizer.qparams.scale, quantizer.fmt
        scales.append(scale.log().mean() if scale.dim() else scale.log())
        if isinstance(quantizer, WeightFakeQuantizer):
            weight = weight_of(layer.module, quantizer.role)
            rows = quantizer.granularity.rows(weight.detach().to(torch.float32))
            y = rows / scale.reshape(-1, 1)
            beyond = torch.count_nonzero(y.clamp(fmt.min, fmt.max) - y)
            clipped.append(beyond / y.numel())
        else:
            assert isinstance(quantizer, ActivationFakeQuantizer)
            clipped.append(_clipped(quantizer.observer.running_spectrum, quantizer))
    table = torch.stack([torch.stack(scales).exp(), torch.stack(clipped)], 1).tolist()
    return {
        quantizer.name: GridFigures(quantizer.fmt.name, scale, share)
        for (_, quantizer), (scale, share) in zip(used, table, strict=True)
    }


def _clipped(spectrum: Tensor, quantizer: FakeQuantizer) -> Tensor:
    """Share of the values of a spectrum that lie beyond a grid, by whole bins; float32 `()`."""
    if spectrum.numel() == 0:
        return spectrum.new_full((), torch.nan)
    edges, squares = edges_and_squares(spectrum.device)
    counts = spectrum.view(2, BINS_PER_SIDE) / squares
    scale, fmt = quantizer.qparams.scale, quantizer.fmt
    # A bin counts if its middle lies beyond the end.
    middles = (edges[1:] + edges[:-1]) / 2
    above = (counts[0] * (middles > fmt.max * scale)).sum()
    below = (counts[1] * (middles > -fmt.min * scale)).sum()
    return above + below
