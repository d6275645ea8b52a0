"""The SNR of every tensor of a quantized model: as numbers, as a summary and as a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from statqat_lightning.insertion import quantized_layers, weight_of


@torch.no_grad()
def snr_by_tensor(model: nn.Module) -> dict[str, float]:
    """SNR in dB of each quantized weight and input, by `{layer}/{weight|input}`.

    Weights are measured now, on the whole weight. Inputs are measured in training, on a sample of
    every batch, as a running mean of signal and of noise energy. Where nothing was lost the SNR is
    infinite; inputs not quantized yet are left out. One transfer from the device serves all
    tensors.
    """
    names: list[str] = []
    energies: list[Tensor] = []
    for _, module, quantizers in quantized_layers(model):
        if quantizers.weight is not None:
            names.append(quantizers.weight.name)
            energies.append(torch.stack(quantizers.weight.energies(weight_of(module))))
        if quantizers.input is not None:
            names.append(quantizers.input.name)
            energies.append(torch.stack(quantizers.input.mean_energies()))
    if not energies:
        return {}
    decibels = {}
    for name, (signal, noise) in zip(names, torch.stack(energies).tolist(), strict=True):
        if not math.isnan(signal) and signal > 0:
            decibels[name] = 10 * math.log10(signal / noise) if noise > 0 else math.inf
    return decibels


@dataclass(frozen=True)
class SNRSummary:
    """A few figures over the SNRs of many tensors.

    Attributes:
        mean: Mean in dB over tensors with a finite SNR; NaN if there is none.
        min: Smallest in dB; NaN if there is none.
        worst: Name of the tensor with the smallest; empty if there is none.
    """

    mean: float
    min: float
    worst: str

    @classmethod
    def of(cls, decibels: Mapping[str, float]) -> SNRSummary:
        """Summary of the result of `snr_by_tensor`."""
        finite = {name: value for name, value in decibels.items() if math.isfinite(value)}
        if not finite:
            return cls(math.nan, math.nan, "")
        worst = min(finite, key=finite.__getitem__)
        return cls(sum(finite.values()) / len(finite), finite[worst], worst)


def plot_snr(
    history: Sequence[tuple[int, Mapping[str, float]]], path: str | Path, title: str = ""
) -> None:
    """Draw the SNR of every tensor over training steps: weights above, inputs below.

    The first layers are dark, the last ones bright.

    Args:
        history: Steps and SNRs by tensor, as `SNRMonitor.history` holds them.
        path: Where the picture is written; its ending says the kind.
        title: Title of the picture.

    Raises:
        ValueError: If there is nothing to draw.
        ModuleNotFoundError: If matplotlib is missing; the message names the extra.
    """
    if not history:
        raise ValueError("plot_snr: got an empty history; expected at least one step.")
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "plot_snr needs matplotlib: pip install 'statqat-lightning[plot]'."
        ) from error
    from matplotlib import colormaps

    figure = Figure(figsize=(8, 6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 1, sharex=True)
    for axis, role in zip(axes, ("weight", "input"), strict=True):
        names = [
            name
            for name in dict.fromkeys(n for _, row in history for n in row)
            if name.endswith(role)
        ]
        for number, name in enumerate(names):
            points = [(step, row[name]) for step, row in history if name in row]
            layer = name.rpartition("/")[0] or name
            color = colormaps["viridis"](number / max(len(names) - 1, 1))
            axis.plot(
                *zip(*points, strict=True),
                color=color,
                label=layer,
                linewidth=1.2,
                marker=".",
                markersize=3,
            )
        axis.set_ylabel(f"{role} SNR (dB)")
        axis.grid(alpha=0.3)
        if names:
            columns = 1 + (len(names) - 1) // 12
            axis.legend(fontsize=6, ncols=columns, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes[1].set_xlabel("optimizer step")
    if title:
        figure.suptitle(title)
    figure.savefig(path, dpi=110)
