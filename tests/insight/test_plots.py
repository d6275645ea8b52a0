"""Pictures of a tensor: what they show is read back from the figure and held against numpy."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from statqat_lightning.formats import get_format
from statqat_lightning.insight.plots import plot_error_curve, plot_spectrum
from tests.reference import ErrorOf


def test_spectrum_shows_the_energy_and_the_ranges(tmp_path: Path) -> None:
    x = torch.randn(200_000)
    figure = plot_spectrum(x.view(400, 500), ("int4", "fp4"), tmp_path / "new" / "spectrum.png")
    above, below = figure.axes
    octave, density = above.lines[0].get_data()
    # Energy per octave of a normal density: 2 x^3 p(x) log 2.
    magnitude = 2.0 ** np.asarray(octave)
    expected = 200 * magnitude**3 * np.exp(-(magnitude**2) / 2) / math.sqrt(2 * math.pi)
    assert np.abs(np.asarray(density) - expected * math.log(2)).max() < 2  # percent, of 64
    assert [label.get_text() for label in below.get_yticklabels()] == ["int4", "fp4_e2m1"]
    solid, pale, float_solid, float_pale = below.patches
    # The best clip point of int4 on a normal is 2.474; of E2M1, 2.922 (by numerical integration).
    for bar, clip, ratio in ((solid, 2.474, 7), (float_solid, 2.922, 6)):
        left, right = bar.get_x(), bar.get_x() + bar.get_width()
        assert right == pytest.approx(math.log2(clip), abs=0.03)
        assert right - left == pytest.approx(math.log2(ratio), abs=1e-4)
    assert pale.get_width() == pytest.approx(1.0, abs=1e-4)  # from half a level to the first
    assert float_pale.get_width() == pytest.approx(2.0, abs=1e-4)  # 0.25 to 1
    assert float(below.texts[0].get_text().removesuffix(" dB")) == pytest.approx(18.9, abs=0.15)
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["spectrum.png"]
    assert (tmp_path / "new/spectrum.png").stat().st_size > 5000


def test_error_curve_shows_prediction_measurement_and_choices(tmp_path: Path) -> None:
    x = torch.distributions.Laplace(0.0, 1.0).sample((20_000,))
    fmt = get_format("int4")
    figure = plot_error_curve(x, "int4", tmp_path / "curve.png")
    (axis,) = figure.axes
    lines = {str(line.get_label()): line.get_data() for line in axis.lines}
    error, power = ErrorOf(x.numpy()), float(x.double().square().mean())

    def snr(scale: float) -> float:
        return 10 * math.log10(power / error(fmt, scale))

    for label, tolerance in (("measured", 1e-3), ("predicted from the spectrum", 0.1)):
        scales, decibels = lines[label]
        assert len(scales) > 20
        for scale, value in zip(scales, decibels, strict=True):
            assert value == pytest.approx(snr(float(scale)), abs=tolerance)
    best = 10 * math.log10(power / error.best(fmt))
    chosen = {label.split(":")[0]: label for label in lines if label.endswith(" dB")}
    assert list(chosen) == ["min-max", "analytic", "iterative"]
    for rule, label in chosen.items():
        (scale,), (value,) = lines[label]
        assert value == pytest.approx(snr(float(scale)), abs=1e-3)
        assert label == f"{rule}: {value:.2f} dB"
        if rule == "min-max":
            assert scale == pytest.approx(float(x.abs().max()) / 7)
        else:
            assert value > best - 0.02
    assert (tmp_path / "curve.png").exists()


@pytest.mark.parametrize("name", ["uint4", "int2", "int8", "fp8_e5m2"])
def test_every_kind_of_format_and_of_data(name: str) -> None:
    for x in (torch.rand(50), torch.tensor([0.5]), torch.tensor([3.0, 0.0, 1e-3]).bfloat16()):
        assert len(plot_spectrum(x, (name,)).axes) == 2
        assert len(plot_error_curve(x, get_format(name)).axes) == 1


@pytest.mark.parametrize("plot", [plot_spectrum, lambda x: plot_error_curve(x, "int4")])
def test_bad_input_is_refused(plot) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(TypeError, match=r"got x of dtype torch\.int64; expected a floating dtype"):
        plot(torch.tensor([1]))
    for nothing in (torch.zeros(3, 2), torch.empty(0)):
        with pytest.raises(ValueError, match="expected values beside zero"):
            plot(nothing)
    with pytest.raises(ValueError, match="got NaN or infinite values in x"):
        plot(torch.tensor([1.0, math.nan]))
    with pytest.raises(ValueError, match="plot_spectrum: got no formats; expected at least one"):
        plot_spectrum(torch.ones(3), ())


@pytest.mark.parametrize("plot", [plot_spectrum, lambda x: plot_error_curve(x, "int4")])
def test_missing_matplotlib_names_the_extra(plot, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'statqat-lightning\[plot\]'"):
        plot(torch.ones(3))
