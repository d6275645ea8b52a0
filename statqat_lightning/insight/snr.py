"""The SNR of every tensor of a quantized model: as numbers, as a summary and as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from statqat_lightning.fake_quant.fake_quantizer import OUTPUT
from statqat_lightning.insight.plots import new_figure, save_figure
from statqat_lightning.layers.function_results import is_result
from statqat_lightning.layers.layer_kinds import INPUT_ROLES
from statqat_lightning.layers.quantized_layer import weight_of
from statqat_lightning.model.quantized_model import quantized_layers
from statqat_lightning.numerics.snr import energies_db

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@torch.no_grad()
def snr_by_tensor(model: nn.Module) -> dict[str, float]:
    """SNR in dB of each quantized tensor, by `{layer}/{role}`: weights, inputs and outputs.

    Weights are measured now, on the whole weight. Activations are measured in training, on a
    sample of every batch, as a running mean of signal and of noise energy. Where nothing was lost
    the SNR is infinite; what is switched off or not quantized yet is left out. One transfer from
    the device serves all tensors.
    """
    names: list[str] = []
    energies: list[Tensor] = []
    for _, module, quantizers in quantized_layers(model):
        for name, weight in quantizers.weights.items():
            if weight.enabled and weight.ready:
                names.append(weight.name)
                energies.append(torch.stack(weight.energies(weight_of(module, name))))
        for activation in quantizers.activations():
            if activation.enabled:
                names.append(activation.name)
                energies.append(torch.stack(activation.mean_energies()))
    return _decibels(names, energies)


@torch.no_grad()
def output_snr_by_weight(model: nn.Module) -> dict[str, float]:
    """SNR in dB that the output of a layer has if its weight alone is rounded, by `{layer}/{role}`.

    The weight's own SNR counts all errors alike, the output's by the inputs that they meet: their
    running means and mean squares, with channels taken for independent, see `InputMoments`. Outputs
    whose means a norm takes away count by what varies of them. Weights whose inputs nobody has
    seen, or whose scales do not depend on them, are left out.
    """
    names: list[str] = []
    energies: list[Tensor] = []
    for _, module, quantizers in quantized_layers(model):
        for name, weight in quantizers.weights.items():
            moments = weight.input_moments
            if weight.enabled and weight.ready and moments is not None and moments.known:
                names.append(weight.name)
                of_output = weight.energies(weight_of(module, name), of_output=True)
                energies.append(torch.stack(of_output))
    return _decibels(names, energies)


def _decibels(names: list[str], energies: list[Tensor]) -> dict[str, float]:
    """SNR by name, from energies of signal and noise `(2,)`: one transfer from the device."""
    if not energies:
        return {}
    decibels = {}
    for name, (signal, noise) in zip(names, torch.stack(energies).tolist(), strict=True):
        if not math.isnan(value := energies_db(signal, noise)):
            decibels[name] = value
    return decibels


@dataclass(frozen=True)
class SNRSummary:
    """A few figures over the SNRs of many tensors.

    Attributes:
        mean: Mean in dB over tensors with a finite SNR; NaN if there is none.
        min: Smallest in dB; NaN if there is none.
        worst: Name of the tensor with the smallest; empty if there is none.
        five_worst: Names and SNRs of the five with the smallest, ascending.
    """

    mean: float
    min: float
    worst: str
    five_worst: tuple[tuple[str, float], ...] = ()

    @classmethod
    def of(cls, decibels: Mapping[str, float]) -> SNRSummary:
        """Summary of the result of `snr_by_tensor`."""
        finite = {name: value for name, value in decibels.items() if math.isfinite(value)}
        if not finite:
            return cls(math.nan, math.nan, "")
        ascending = tuple(sorted(finite.items(), key=lambda entry: entry[1])[:5])
        worst, least = ascending[0]
        return cls(sum(finite.values()) / len(finite), least, worst, ascending)


@dataclass(frozen=True)
class OutputErrors:
    """SNR in dB of a layer's output against that of the float network, on one batch.

    Attributes:
        made: Only this layer is quantized: what the layer itself loses.
        inherited: Only the layers before it are quantized: what it gets and passes on.
        total: All layers are quantized.
    """

    made: float
    inherited: float
    total: float


def tensor_column(role: str) -> str:
    """What a tensor is to its layer, by its role: `weight`, `input` or `output`."""
    if role == OUTPUT or is_result(role):
        return "output"
    return "input" if role in INPUT_ROLES else "weight"


History = Sequence[tuple[int, Mapping[str, float]]]
"""Steps with the SNR in dB of each tensor, as `SNRMonitor.history` holds them."""


def plot_snr(histories: Mapping[str, History], path: str | Path | None = None) -> Figure:
    """Draw the SNR of every tensor over training steps: a column a run, weights above activations.

    A tensor is a weight unless it is called as inputs and outputs are: layers with several weights
    have a line for each. Outputs are dashed.

    The first layers are dark, the last ones bright.

    Args:
        histories: Histories of runs by title.
        path: Where the picture is written, whole or not at all; its ending says the kind.

    Returns:
        The matplotlib figure.

    Raises:
        ValueError: If there is nothing to draw.
        ModuleNotFoundError: If matplotlib is missing; the message names the extra.
    """
    tensors = [
        name for history in histories.values() for _, decibels in history for name in decibels
    ]
    if not tensors:
        raise ValueError("plot_snr: got empty histories; expected at least one step.")
    figure = new_figure("plot_snr", (1.8 + 3.4 * len(histories), 5.4))
    from matplotlib import colormaps

    names = list(dict.fromkeys(tensors))
    layers = list(dict.fromkeys(name.rpartition("/")[0] for name in names))
    # The brightest yellow is hard to see on white.
    colors = {
        layer: colormaps["viridis"](0.92 * number / max(len(layers) - 1, 1))
        for number, layer in enumerate(layers)
    }
    axes = figure.subplots(2, len(histories), sharex="col", sharey=True, squeeze=False)
    for column, (title, history) in enumerate(histories.items()):
        for name in names:
            kind = tensor_column(name.rpartition("/")[2])
            axis = axes[int(kind != "weight"), column]
            points = [(step, row[name]) for step, row in history if name in row]
            if points:
                style = "--" if kind == "output" else "-"
                steps, decibels = zip(*points, strict=True)
                color = colors[name.rpartition("/")[0]]
                axis.plot(steps, decibels, style, color=color, linewidth=1.3)
        for axis in axes[:, column]:
            axis.grid(alpha=0.3)
        axes[0, column].set_title(title)
        axes[1, column].set_xlabel("training step")
    axes[0, 0].set_ylabel("SNR of weights (dB)")
    axes[1, 0].set_ylabel("SNR of inputs and outputs (dB)")
    handles = [
        axes[0, 0].plot([], [], color=color, label=layer)[0] for layer, color in colors.items()
    ]
    figure.legend(
        handles=handles,
        loc="outside right center",
        ncols=1 + (len(layers) - 1) // 24,
        frameon=False,
        fontsize=7,
        title="layer",
    )
    if path is not None:
        save_figure(figure, path)
    return figure
