"""`LayerSNR` against torchmetrics' own SNR, sums written out, and ranks."""

from __future__ import annotations

import math
import pickle

import pytest
import torch
from torchmetrics.functional.audio import signal_noise_ratio

from statqat_lightning.insight.layer_snr import LayerSNR


def test_agrees_with_torchmetrics_where_both_are_defined() -> None:
    """A single sample: `SignalNoiseRatio` is the mean of the decibels of samples."""
    torch.manual_seed(0)
    for scale in (0.3, 1.0, 30.0):  # it adds 1e-7 to both energies
        x = torch.randn(1, 4000) * scale
        x_hat = x + torch.randn_like(x) * 0.05 * scale
        metric = LayerSNR()
        metric.update(x, x_hat)
        value = metric.compute()
        assert isinstance(value, torch.Tensor)
        torch.testing.assert_close(value, signal_noise_ratio(x_hat, x)[0], atol=1e-4, rtol=0)


def test_streams_over_batches_of_any_size_and_dtype() -> None:
    torch.manual_seed(0)
    parts = [torch.randn(n, 3) * n for n in (1, 7, 100)]
    errors = [torch.randn_like(part) for part in parts]
    metric = LayerSNR()
    for part, error in zip(parts, errors, strict=True):
        metric.update(part.double(), part.double() + error.double())
    signal = sum(float(part.double().square().sum()) for part in parts)
    noise = sum(float(error.double().square().sum()) for error in errors)
    assert float(metric.compute()) == pytest.approx(10 * math.log10(signal / noise), abs=1e-5)
    metric.reset()
    half = parts[2].bfloat16()
    metric.update(half, half + 0.5)
    expected = float(half.double().square().sum() / (half + 0.5 - half).double().square().sum())
    assert float(metric.compute()) == pytest.approx(10 * math.log10(expected), abs=1e-4)


def test_a_million_small_batches_lose_nothing() -> None:
    """Sums run in float64: in float32 the small ones would stop counting."""
    metric = LayerSNR()
    metric.update(torch.tensor([2.0**13]), torch.tensor([2.0**13 + 1.0]))
    small = torch.full((1,), 0.5)
    for _ in range(1000):
        metric.update(small, small)
    assert float(metric.signal[0]) == 2.0**26 + 250.0


def test_layers_by_name() -> None:
    metric = LayerSNR(["a", "b", "c"])
    ones = torch.ones(4)
    metric.update({"a": ones, "b": ones}, {"a": ones * 0.9, "b": ones})
    metric.update({"a": ones}, {"a": ones * 1.1})
    values = metric.compute()
    assert isinstance(values, dict)
    assert float(values["a"]) == pytest.approx(20.0, abs=1e-4)
    assert float(values["b"]) == math.inf
    assert math.isnan(values["c"])
    copied = pickle.loads(pickle.dumps(metric))
    assert float(copied.compute()["a"]) == pytest.approx(20.0, abs=1e-4)


def test_ranks_are_summed() -> None:
    """As torchmetrics reduces states over ranks: by the sum that each state asks for."""
    whole = LayerSNR(["a"])
    ranks = [LayerSNR(["a"]) for _ in range(2)]
    for number, rank in enumerate(ranks):
        x = torch.arange(1.0, 5.0) * (number + 1)
        for metric in (rank, whole):
            metric.update({"a": x}, {"a": x + 0.1})
    for name in ("signal", "noise"):
        reduction = ranks[0]._reductions[name]
        assert reduction is not None
        states = torch.stack([getattr(rank, name) for rank in ranks])
        torch.testing.assert_close(reduction(states), getattr(whole, name))  # type: ignore[operator]


def test_plots() -> None:
    pytest.importorskip("matplotlib")
    single, named = LayerSNR(), LayerSNR(["a", "b"])
    x = torch.ones(3)
    single.update(x, x * 0.9)
    named.update({"a": x, "b": x}, {"a": x * 0.9, "b": x * 0.99})
    for metric in (single, named):
        figure, axis = metric.plot()
        assert axis.lines or axis.collections or axis.patches
        figure.clear()


def test_errors() -> None:
    x = torch.ones(3)
    with pytest.raises(ValueError, match=r"got shapes \(3,\) and \(2,\); expected equal shapes"):
        LayerSNR().update(x, x[:2])
    with pytest.raises(TypeError, match=r"LayerSNR\(layers=\[\.\.\.\]\) for tensors by name"):
        LayerSNR().update({"a": x}, {"a": x})
    with pytest.raises(TypeError, match="expected them by the names of layers"):
        LayerSNR(["a"]).update(x, x)
    with pytest.raises(ValueError, match="got 'b'; expected names among a"):
        LayerSNR(["a"]).update({"b": x}, {"b": x})
    with pytest.raises(ValueError, match=r"got \['b'\] on one side only"):
        LayerSNR(["a", "b"]).update({"a": x, "b": x}, {"a": x})
    with pytest.raises(ValueError, match=r"shapes .* for a; expected"):
        LayerSNR(["a"]).update({"a": x}, {"a": x[:1]})
    for names in ([], ["a", "a"]):
        with pytest.raises(ValueError, match="expected names, each once"):
            LayerSNR(names)
