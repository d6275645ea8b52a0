"""SNR of a model's tensors: figures by numpy, the summary, the picture."""

from __future__ import annotations

import io
import math
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from statqat_lightning.insight.snr import SNRSummary, plot_snr, snr_by_tensor
from statqat_lightning.model.insertion import prepare
from statqat_lightning.model.quantized_model import (
    quantized_layers,
    refresh,
    set_enabled,
    set_observing,
)
from statqat_lightning.recipes.recipe import QuantRecipe, TensorSpec
from statqat_lightning.recipes.rule import QuantRule
from tests.reference import snr_db


def model_in_training() -> tuple[nn.Module, torch.Tensor]:
    model = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    x = torch.randn(40, 6)
    recipe = QuantRecipe([QuantRule("0", "int4", "int4"), QuantRule("2", "fp4")])
    prepare(model, recipe=recipe)
    set_observing(model, True)
    model(x)
    refresh(model)
    return model, x


def test_snr_of_weights_and_inputs_by_numpy() -> None:
    model, x = model_in_training()
    assert list(snr_by_tensor(model)) == ["0/weight", "2/weight"]  # no input was quantized so far
    (_, _, quantizers), _ = quantized_layers(model)
    assert quantizers.input is not None
    x_hat = quantizers.input.quantize(x)
    model(x)
    refresh(model, weights=False)
    decibels = snr_by_tensor(model)
    assert list(decibels) == ["0/weight", "0/input", "2/weight"]
    signal = x.double().numpy()
    expected = snr_db(signal, signal - x_hat.double().numpy())
    assert decibels["0/input"] == pytest.approx(expected, abs=1e-4)
    for name, module, layer in quantized_layers(model):
        assert layer.weight is not None
        w = module.weight.detach().double().numpy()  # type: ignore[operator]
        w_hat = layer.weight(module.weight).detach().double().numpy()  # type: ignore[arg-type]
        assert decibels[f"{name}/weight"] == pytest.approx(snr_db(w, w - w_hat), abs=1e-4)


def test_snr_is_the_ratio_of_mean_energies_over_batches() -> None:
    model, x = model_in_training()
    signal, noise = [], []
    for step in range(3):
        (_, _, quantizers), _ = quantized_layers(model)
        assert quantizers.input is not None
        batch = x * (1 + step)
        x_hat = quantizers.input.quantize(batch)
        signal.append(float(batch.double().square().mean()))
        noise.append(float((batch - x_hat).double().square().mean()))
        model(batch)
        refresh(model, weights=False)
    # Calibration was the first batch, so the second and third batch weigh 1/3 and 1/4.
    for energies in (signal, noise):
        mean = energies[0]
        for weight, energy in zip((1 / 3, 1 / 4), energies[1:], strict=True):
            mean += weight * (energy - mean)
        energies.append(mean)
    expected = 10 * math.log10(signal[-1] / noise[-1])
    assert snr_by_tensor(model)["0/input"] == pytest.approx(expected, abs=1e-4)


def test_nothing_lost_is_infinite_and_nothing_quantized_is_empty() -> None:
    layer = nn.Linear(2, 2)
    assert snr_by_tensor(layer) == {}
    nn.init.constant_(layer.weight, 0.5)
    prepare(layer, TensorSpec("int2", quantizer="minmax"), None, first_last_bits=None)
    assert snr_by_tensor(layer) == {"weight": math.inf}


def test_what_is_not_quantized_is_left_out() -> None:
    model, x = model_in_training()
    model(x)
    refresh(model)
    assert list(snr_by_tensor(model)) == ["0/weight", "0/input", "2/weight"]
    set_enabled(model, weights=False)
    assert list(snr_by_tensor(model)) == ["0/input"]
    set_enabled(model, weights=True, inputs=False)
    assert list(snr_by_tensor(model)) == ["0/weight", "2/weight"]
    _, (_, _, last) = quantized_layers(model)
    assert last.weight is not None
    last.weight.ready = False
    assert list(snr_by_tensor(model)) == ["0/weight"]


def test_a_weight_of_zeros_has_no_snr() -> None:
    layer = nn.Linear(3, 2)
    nn.init.zeros_(layer.weight)
    prepare(layer, "int4", None)
    assert snr_by_tensor(layer) == {}


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_a_weight_that_is_not_finite_has_no_snr(value: float) -> None:
    layer = nn.Linear(4, 2)
    prepare(layer, activations=None)
    with torch.no_grad():
        layer.weight[0, 0] = value  # the last one has squares beyond float32
    assert snr_by_tensor(layer) == {}


def test_summary() -> None:
    summary = SNRSummary.of({"a": 20.0, "b": 10.0, "c": math.inf, "d": 30.0})
    ascending = (("b", 10.0), ("a", 20.0), ("d", 30.0))
    assert summary == SNRSummary(20.0, 10.0, "b", ascending)
    for nothing in ({}, {"a": math.inf}):
        empty = SNRSummary.of(nothing)
        assert math.isnan(empty.mean)
        assert math.isnan(empty.min)
        assert empty.worst == ""


HISTORY = [
    (0, {"conv/weight": 20.0}),
    (10, {"conv/weight": 21.0, "conv/input": 15.0, "head/weight": math.inf, "head/input": 30.0}),
    (20, {"conv/weight": 22.0, "conv/input": 16.0, "head/weight": 40.0, "head/input": 31.0}),
]


def test_picture_shows_a_curve_for_every_tensor(tmp_path: Path) -> None:
    from matplotlib import image

    plot_snr({"run": HISTORY}, tmp_path / "new" / "snr.png")
    with_curves = image.imread(tmp_path / "new" / "snr.png")
    # A single step gives no line; what color there is, is that of the legend.
    plot_snr({"run": HISTORY[:1]}, tmp_path / "empty.png")
    without = image.imread(tmp_path / "empty.png")
    assert [file.name for file in (tmp_path / "new").iterdir()] == ["snr.png"]
    assert with_curves.shape[2] == 4
    assert min(with_curves.shape[:2]) > 400

    def colored(pixels: np.ndarray) -> int:
        return int((np.ptp(pixels[..., :3], axis=-1) > 0.2).sum())

    assert colored(with_curves) > colored(without) + 500


@pytest.mark.parametrize("role", ["weight", "in_proj_weight", "bias", "input", "query", "output"])
def test_picture_draws_tensors_of_every_role(role: str, tmp_path: Path) -> None:
    from matplotlib import image

    pictures = []
    for steps in (3, 1):  # a single step gives no line
        history = [(step, {f"layer/{role}": 10.0 + step}) for step in range(steps)]
        plot_snr({"run": history}, tmp_path / "snr.png")
        pictures.append(image.imread(tmp_path / "snr.png")[..., :3])
    with_curve, without = ((np.ptp(pixels, axis=-1) > 0.1).any(1) for pixels in pictures)
    rows = np.flatnonzero(with_curve & ~without)
    below = role in ("input", "query", "output")
    assert (rows.mean() > len(with_curve) / 2) == below  # weights above, activations below


def test_a_figure_without_a_file_shows_itself_in_a_notebook(tmp_path: Path) -> None:
    from matplotlib import image

    figure: Any = plot_snr({"run": HISTORY})
    assert not [*tmp_path.iterdir()]
    plot_snr({"run": HISTORY}, tmp_path / "snr.png")
    shown = image.imread(io.BytesIO(figure._repr_png_()))
    assert np.array_equal(shown, image.imread(tmp_path / "snr.png"))
    again = pickle.loads(pickle.dumps(figure))
    again.axes[0].clear()
    assert not np.array_equal(image.imread(io.BytesIO(again._repr_png_())), shown)
    assert np.array_equal(image.imread(io.BytesIO(figure._repr_png_())), shown)


def test_picture_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="plot_snr: got empty histories; expected at least one"):
        plot_snr({"run": [], "other": [(0, {})]}, tmp_path / "snr.png")


def test_missing_matplotlib_names_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'statqat-lightning\[plot\]'"):
        plot_snr({"run": HISTORY}, tmp_path / "snr.png")
