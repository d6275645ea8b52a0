"""Pictures of a tensor: its energy spectrum under the ranges of formats, and SNR over scale."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from statqat_lightning.error_analysis import EnergySpectrum
from statqat_lightning.error_analysis.spectrum_tables import (
    BINS_PER_OCTAVE,
    BINS_PER_SIDE,
    LOWEST_OCTAVE,
)
from statqat_lightning.formats import FloatFormat, Format, get_format
from statqat_lightning.numerics.qparams import QParams, quantize
from statqat_lightning.numerics.snr import snr_db
from statqat_lightning.quantizers import get_quantizer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLORS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b")
_DPI = 110
_FAINT = 1e-6  # share of the energy below which an octave's end is not drawn
_RUN = 9  # bins that the spectrum is smoothed over
_MEASURED = 33  # points of the error curve that are measured
_LARGEST_SAMPLE = 1 << 20  # values that the measured points are taken from


def plot_spectrum(
    x: Tensor,
    formats: Sequence[str | Format] = ("int4", "fp4_e2m1", "fp8_e4m3"),
    path: str | Path | None = None,
) -> Figure:
    """Draw where the energy of a tensor lies, and what formats can represent of it.

    Above, the share of the energy in each octave of the magnitude. Below, a bar for each format at
    its best scale, with the SNR there: solid from the first level, or the first normal value of a
    float format, to the clip point; pale where values are subnormal or round up to the first level.
    What lies to the left is rounded to zero, to the right clipped.

    Args:
        x: Any shape, floating dtype, finite.
        formats: Formats or their names.
        path: Where the picture is written, whole or not at all; its ending says the kind.

    Returns:
        The matplotlib figure.

    Raises:
        TypeError: If `x` is not floating point.
        ValueError: If `x` is empty, all zero or not finite, or there is no format.
        ModuleNotFoundError: If matplotlib is missing; the message names the extra.
    """
    chosen = [get_format(f) if isinstance(f, str) else f for f in formats]
    if not chosen:
        raise ValueError("plot_spectrum: got no formats; expected at least one.")
    values = _checked(x, "plot_spectrum")
    spectrum = EnergySpectrum.of(values)
    figure = new_figure("plot_spectrum", (7.2, 3.3 + 0.36 * len(chosen)))
    axes = figure.subplots(
        2, 1, sharex=True, gridspec_kw={"height_ratios": [5, 0.5 + 0.75 * len(chosen)]}
    )

    both = (spectrum.energy[0, :BINS_PER_SIDE] + spectrum.energy[0, BINS_PER_SIDE:]).double()
    octaves = (both.view(-1, BINS_PER_OCTAVE).sum(1) / both.sum()).tolist()
    # Energy by width in octaves, of runs of nine bins: single bins are ragged for small tensors.
    edges = torch.arange(BINS_PER_SIDE + 1, dtype=torch.float64)
    whole = (edges / BINS_PER_OCTAVE).floor()
    log_edges = LOWEST_OCTAVE + whole + torch.log2(1 + edges / BINS_PER_OCTAVE - whole)
    runs = both.unfold(0, _RUN, 1).sum(1) / (log_edges[_RUN:] - log_edges[:-_RUN]) / both.sum()
    centers, density = (log_edges[_RUN:] + log_edges[:-_RUN]).numpy() / 2, 100 * runs.numpy()
    seen = [k for k, share in enumerate(octaves) if share > _FAINT]
    axes[0].fill_between(centers, density, color="0.75", linewidth=0)
    axes[0].plot(centers, density, color="0.3", linewidth=1.2)
    axes[0].set_ylabel("energy per octave (%)")
    axes[0].set_ylim(bottom=0)
    axes[0].set_title(f"{values.numel():,} values of RMS {float(spectrum.power.sqrt()):.3g}")

    low, high = LOWEST_OCTAVE + seen[0], LOWEST_OCTAVE + seen[-1] + 1
    for row, fmt in enumerate(chosen):
        color = _COLORS[row % len(_COLORS)]
        scale = float(get_quantizer("iterative").choose_qparams(values, fmt).scale)
        clip, normal, zero = (math.log2(scale * edge) for edge in edges_of_range(fmt))
        high = max(high, math.ceil(clip))
        axes[0].axvline(clip, color=color, linewidth=1, linestyle="--")
        axes[1].barh(row, clip - normal, left=normal, height=0.5, color=color)
        axes[1].barh(row, normal - zero, left=zero, height=0.5, color=color, alpha=0.35)
        snr = _measured_snr(values, fmt, scale)
        axes[1].annotate(
            f"{snr:.1f} dB",
            (clip, row),
            (4, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axes[1].set_yticks(range(len(chosen)), [str(fmt) for fmt in chosen])
    axes[1].set_ylim(len(chosen) - 0.5, -0.5)
    # Room for the figures beside the bars.
    axes[1].set_xlim(low, high + 0.12 * (high - low))
    axes[1].set_xlabel("magnitude")
    axes[1].xaxis.set_major_locator(_whole_numbers())
    axes[1].xaxis.set_major_formatter(lambda value, _: f"$2^{{{value:.0f}}}$")
    axes[1].tick_params(axis="y", length=0)
    for axis in axes:
        axis.grid(axis="x", alpha=0.3)
        axis.set_axisbelow(True)
    if path is not None:
        save_figure(figure, path)
    return figure


def plot_error_curve(x: Tensor, fmt: str | Format, path: str | Path | None = None) -> Figure:
    """Draw SNR over scale: predicted from the energy spectrum, measured, and what rules choose.

    Args:
        x: Any shape, floating dtype, finite; quantized as one tensor with one scale.
        fmt: The number format or its name.
        path: Where the picture is written, whole or not at all; its ending says the kind.

    Returns:
        The matplotlib figure.

    Raises:
        TypeError: If `x` is not floating point.
        ValueError: If `x` is empty, all zero or not finite.
        ModuleNotFoundError: If matplotlib is missing; the message names the extra.
    """
    fmt = get_format(fmt) if isinstance(fmt, str) else fmt
    values = _checked(x, "plot_error_curve")
    spectrum = EnergySpectrum.of(values)
    figure = new_figure("plot_error_curve", (7.2, 4.2))
    axis = figure.subplots()

    curve = spectrum.error_curve(fmt)
    snr = 10 * torch.log10(spectrum.power.unsqueeze(1) / curve.errors)[0]
    shown = curve.scales[0][snr > 0.5]
    low, high = (float(shown.amin()), float(shown.amax())) if len(shown) else (0.0, math.inf)
    inside = (curve.scales[0] >= low) & (curve.scales[0] <= high)
    scales = curve.scales[0][inside]
    axis.plot(scales, snr[inside], color="0.4", linewidth=1.4, label="predicted from the spectrum")
    points = scales[:: max(1, len(scales) // _MEASURED)].tolist()
    measured = [_measured_snr(values, fmt, scale) for scale in points]
    axis.plot(points, measured, "o", color="0.2", markersize=3.2, label="measured")
    rules = {"minmax": "min-max", "analytic": "analytic", "iterative": "iterative"}
    # The later ones are smaller: where rules agree, all of them can be seen.
    for number, (name, label) in enumerate(rules.items()):
        color, marker, size = _COLORS[number], "sD^"[number], (11, 8, 5)[number]
        scale = float(get_quantizer(name).choose_qparams(values, fmt).scale)
        value = _measured_snr(values, fmt, scale)
        axis.axvline(scale, color=color, linewidth=0.8, linestyle="--", zorder=1)
        axis.plot(
            [scale], [value], marker, color=color, markersize=size, markeredgecolor="white",
            label=f"{label}: {value:.2f} dB", linestyle="none", zorder=3,
        )  # fmt: skip
    axis.set_xscale("log", base=2)
    axis.set_xlabel("scale")
    axis.set_ylabel("SNR (dB)")
    axis.set_title(f"{fmt} on {values.numel():,} values of RMS {float(spectrum.power.sqrt()):.3g}")
    axis.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    if path is not None:
        save_figure(figure, path)
    return figure


def _checked(x: Tensor, where: str) -> Tensor:
    """The values of `x` in one row, float32, on CPU."""
    if not x.is_floating_point():
        raise TypeError(f"{where}: got x of dtype {x.dtype}; expected a floating dtype.")
    values = x.detach().to(device="cpu", dtype=torch.float32).reshape(-1)
    if not values.isfinite().all():
        raise ValueError(f"{where}: got NaN or infinite values in x; remove them first.")
    if not values.any():
        raise ValueError(f"{where}: got x of shape {tuple(x.shape)}; expected values beside zero.")
    return values


def edges_of_range(fmt: Format) -> tuple[float, float, float]:
    """Magnitudes at scale 1: the largest one, the end of full precision, the end of zero."""
    smallest = float(fmt.values[fmt.values != 0].abs().min())
    full = 2.0**fmt.min_exponent if isinstance(fmt, FloatFormat) else smallest
    return fmt.reach, min(full, fmt.reach), smallest / 2


def _measured_snr(values: Tensor, fmt: Format, scale: float) -> float:
    # Of a large tensor every so many values do: they only make a dot of the picture.
    sample = values[:: -(-len(values) // _LARGEST_SAMPLE)]
    q = quantize(sample, QParams(torch.tensor(scale)), fmt)
    return float(snr_db(sample, q * scale))


def new_figure(caller: str, size: tuple[float, float]) -> Figure:
    """An empty figure without a window, which a notebook shows as it is.

    Args:
        caller: The function that draws, for the message.
        size: Width and height in inches.

    Raises:
        ModuleNotFoundError: If matplotlib is missing; the message names the extra.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{caller} needs matplotlib: pip install 'statqat-lightning[plot]'."
        ) from error
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    # Notebooks ask for it; on their own they show the figures of pyplot alone.
    setattr(figure, "_repr_png_", partial(_png_of, figure))  # noqa: B010, unknown to type checkers
    return figure


def _png_of(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI)
    return buffer.getvalue()


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write a figure; the file appears whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.stem}.unfinished{path.suffix}")
    figure.savefig(unfinished, dpi=_DPI)
    unfinished.replace(path)


def _whole_numbers() -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(integer=True)
