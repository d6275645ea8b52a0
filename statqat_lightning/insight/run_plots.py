"""Pictures of a training: SNR of all tensors over its steps, and error curves of the worst."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from statqat_lightning.error_analysis.spectrum import EnergySpectrum
from statqat_lightning.formats import Format
from statqat_lightning.insight.plots import new_figure, save_figure
from statqat_lightning.insight.snr import History, tensor_column

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_STEPS = 200  # columns of the heat map
_MOST_NAMED = 60  # rows that have room for a name
_ROW = 0.19  # inches
_OCTAVES = 2.0  # on either side of the scale in force
_POINTS = 33
_COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e")


def plot_snr_heat_map(history: History, path: str | Path | None = None) -> Figure:
    """Draw the SNR of all tensors over the steps of a run: a row a tensor, weights above inputs.

    Args:
        history: `SNRMonitor.history`; of long ones every so many steps are drawn.
        path: Where the picture is written, whole or not at all; its ending says the kind.

    Returns:
        The matplotlib figure.

    Raises:
        ValueError: If the history is empty.
        ModuleNotFoundError: If matplotlib is missing; the message names the extra.
    """
    names = [*dict.fromkeys(name for _, row in history for name in row)]
    if not names:
        raise ValueError("plot_snr_heat_map: got an empty history; expected at least one step.")
    kinds = ("weight", "input", "output")
    names.sort(key=lambda name: kinds.index(tensor_column(name.rpartition("/")[2])))
    every = -(-len(history) // _MOST_STEPS)
    shown = [*history[::-1][::every]][::-1]  # the last one among them
    values = torch.tensor(
        [[_finite(row.get(name, math.nan)) for _, row in shown] for name in names],
        dtype=torch.float64,
    )
    figure = new_figure("plot_snr_heat_map", (9.0, 1.4 + _ROW * min(len(names), 150)))
    axis = figure.subplots()
    axis.set_facecolor("0.9")  # where nothing was measured
    image = axis.imshow(values.numpy(), aspect="auto", interpolation="nearest", cmap="viridis")
    every_name = -(-len(names) // _MOST_NAMED)
    rows = range(0, len(names), every_name)
    axis.set_yticks([*rows], [names[row] for row in rows], fontsize=7)
    columns = [*range(0, len(shown), max(1, len(shown) // 8))]
    axis.set_xticks(columns, [str(shown[column][0]) for column in columns], fontsize=8)
    axis.set_xlabel("training step")
    figure.colorbar(image, ax=axis, label="SNR (dB)", fraction=0.03, pad=0.01)
    if path is not None:
        save_figure(figure, path)
    return figure


def _finite(value: float) -> float:
    return value if math.isfinite(value) else math.nan


@dataclass(frozen=True)
class TensorOnGrid:
    """What an error curve is drawn from.

    Attributes:
        spectrum: Spectra of the rows that share scales.
        fmt: The format in use.
        scales: The scales in force of these rows, float32 `(n,)`.
    """

    spectrum: EnergySpectrum
    fmt: Format
    scales: Tensor

    def snr_db(self, factor: float) -> float:
        """Predicted SNR in dB if all scales were this many times as large."""
        errors = self.spectrum.mse(self.fmt, self.scales * factor).sum()
        return float(10 * torch.log10(self.spectrum.power.sum() / errors))


def plot_error_curves(
    tensors: Mapping[str, TensorOnGrid], path: str | Path | None = None
) -> Figure:
    """Draw the predicted SNR of tensors over their scale, with the scale in force marked.

    Args:
        tensors: What to draw, by name.
        path: Where the picture is written, whole or not at all; its ending says the kind.

    Returns:
        The matplotlib figure.

    Raises:
        ValueError: If there is nothing to draw.
        ModuleNotFoundError: If matplotlib is missing; the message names the extra.
    """
    if not tensors:
        raise ValueError("plot_error_curves: got no tensors; expected at least one.")
    figure = new_figure("plot_error_curves", (7.6, 4.4))
    axis = figure.subplots()
    steps = torch.linspace(-_OCTAVES, _OCTAVES, _POINTS).tolist()
    for number, (name, tensor) in enumerate(tensors.items()):
        color = _COLORS[number % len(_COLORS)]
        now = tensor.snr_db(1.0)
        curve = [tensor.snr_db(2.0**step) for step in steps]
        label = f"{name}, {tensor.fmt}: {now:.1f} dB"
        axis.plot(steps, curve, color=color, linewidth=1.4, label=label)
        axis.plot([0.0], [now], "o", color=color, markersize=6, markeredgecolor="white", zorder=3)
    axis.axvline(0.0, color="0.5", linewidth=0.8, linestyle="--", zorder=1)
    axis.set_xticks(_whole(steps), [f"{2.0**x:g}" for x in _whole(steps)])
    axis.set_xlabel("scale, in units of the scale in force")
    axis.set_ylabel("predicted SNR (dB)")
    axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=1, frameon=False, fontsize=8)
    if path is not None:
        save_figure(figure, path)
    return figure


def _whole(steps: Sequence[float]) -> list[float]:
    return [float(x) for x in range(math.ceil(steps[0]), math.floor(steps[-1]) + 1)]
