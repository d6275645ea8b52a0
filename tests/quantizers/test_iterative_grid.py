"""The iterative quantizer and predicted SNRs on many distributions and formats, by brute force."""

from __future__ import annotations

import importlib
import io
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.special import ndtr
from torch import Tensor

from statqat_lightning.error_analysis import EnergySpectrum
from statqat_lightning.formats import Format, get_format
from statqat_lightning.quantizers import Iterative
from tests.quantizers.test_iterative import affine_error, best_affine_error
from tests.reference import Array, ErrorOf

NAMES = ["int2", "int3", "int4", "int8", "uint4", "uint8", "e2m1", "e2m3", "e3m2", "e4m3", "e5m2"]
FORMATS = [get_format(name) for name in NAMES]
DISTRIBUTIONS = [
    *("normal", "laplace", "student", "relu", "gelu", "log-normal", "uniform", "bimodal"),
    *("outliers", "zeros"),
]
LAYERS = ["conv1", "layer2.1.conv1", "linear"]
LOSS, PREDICTION = 0.02, 0.1  # in dB


def sample(name: str, count: int, seed: int = 0) -> Array:
    rng = np.random.default_rng([seed, *name.encode()])
    x: Array = rng.normal(size=count)
    match name:
        case "laplace":
            x = rng.laplace(size=count)
        case "student":
            x = rng.standard_t(3, size=count)
        case "relu":
            x = np.maximum(x, 0)
        case "gelu":
            x = x * ndtr(x)
        case "log-normal":
            x = np.exp(1.5 * x)
        case "uniform":
            x = rng.uniform(-1, 1, size=count)
        case "bimodal":
            x = rng.choice([-3, 3], count) + 0.1 * x
        case "outliers":
            x[rng.choice(count, max(count // 10_000, 1), replace=False)] *= 100
        case "zeros":
            x = x * (rng.random(count) < 0.1)
        case "shifted":
            x = x + 2
        case "below zero":
            x = x - 2
    return x.astype(np.float32).astype(np.float64)


def least_error(error: ErrorOf, fmt: Format, per_octave: int) -> float:
    """Least error over dense clip points, and closer still around the six best of them."""
    top = np.log2(np.abs(error.x).max())
    points = np.arange(top - 12, top + 1, 1 / per_octave)
    errors = np.array([error(fmt, 2.0**u / fmt.max) for u in points])
    offsets = np.linspace(-1, 1, 33) / per_octave
    near = (points[np.argsort(errors)[:6], None] + offsets).ravel()
    return min(errors.min(), *(error(fmt, 2.0**u / fmt.max) for u in near))


def check(rows: Array, fmt: Format, per_octave: int) -> None:
    """Scales within 0.02 dB of the best ones, and predictions within 0.1 dB of what is measured."""
    rows = rows if fmt.is_signed else np.maximum(rows, 0)
    rows = rows[rows.any(1)]
    tensor = torch.from_numpy(rows).float()
    scales = Iterative().from_rows(tensor, fmt)
    predicted = EnergySpectrum.of_rows(tensor).predicted_snr_db(fmt, scales)
    for row, scale, snr in zip(rows, scales.tolist(), predicted.tolist(), strict=True):
        error, power = ErrorOf(row), float(np.mean(row**2))
        # Differences of sums in float64 are no finer than that.
        got, best = (
            e + 1e-12 * power for e in (error(fmt, scale), least_error(error, fmt, per_octave))
        )
        assert 10 * math.log10(got / best) < LOSS
        assert snr == pytest.approx(10 * math.log10(power / got), abs=PREDICTION)


every_format = pytest.mark.parametrize("fmt", FORMATS, ids=str)
every_distribution = pytest.mark.parametrize("name", DISTRIBUTIONS)


@pytest.mark.slow
@every_distribution
@every_format
def test_per_tensor(fmt: Format, name: str) -> None:
    check(sample(name, 200_000).reshape(1, -1), fmt, 128)


@pytest.mark.slow
@every_distribution
@every_format
@pytest.mark.parametrize(("length", "per_octave"), [(144, 512), (4096, 128)])
def test_per_channel(fmt: Format, name: str, length: int, per_octave: int) -> None:
    check(sample(name, 3 * length).reshape(3, -1), fmt, per_octave)


@pytest.mark.parametrize("name", ["uniform", "bimodal", "outliers"])
@pytest.mark.parametrize("fmt", FORMATS[::2], ids=str)
def test_some_short_rows(fmt: Format, name: str) -> None:
    check(sample(name, 144).reshape(1, -1), fmt, 256)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*DISTRIBUTIONS, "shifted", "below zero"])
@pytest.mark.parametrize("length", [128, 512, 5000])
@pytest.mark.parametrize("fmt", [get_format("uint4"), get_format("uint8")], ids=str)
def test_zero_points(fmt: Format, length: int, name: str) -> None:
    x = sample(name, length)
    tensor = torch.from_numpy(x).float()
    scale, zero = Iterative().affine_from_rows(tensor.view(1, -1), fmt)
    got = affine_error(x, fmt, float(scale), float(zero))
    assert 10 * math.log10(got / best_affine_error(x, fmt)) < LOSS
    predicted = EnergySpectrum.of(tensor).mse(fmt, scale, zero).item()
    assert 10 * math.log10(predicted / got) == pytest.approx(0, abs=PREDICTION)


@pytest.fixture(scope="module")
def activations() -> dict[str, Tensor]:
    """Inputs of three layers of the trained ResNet-20 on 66 images."""
    repository = Path(__file__).resolve().parents[2]
    data = repository.parent / "shared" / "data"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(repository / "examples"))
        network = importlib.import_module("vision").ResNet20()
    network.load_state_dict(torch.load(data / "resnet20_cifar10.pt", weights_only=True))
    network.eval()
    archive = np.load(data / "cifar10_jpeg.npz")
    blob, offsets = archive["train_jpeg"].tobytes(), archive["train_offsets"]
    pictures = [
        np.asarray(Image.open(io.BytesIO(blob[offsets[i] : offsets[i + 1]])).convert("RGB"))
        for i in range(66)
    ]
    pixels = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 255
    middle, width = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 1, 3, 1, 1)
    found: dict[str, Tensor] = {}
    for name in LAYERS:
        network.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: found.__setitem__(name, args[0].clone())
        )
    with torch.no_grad():
        network((pixels - middle) / width)
    return found


@pytest.mark.cifar
@pytest.mark.parametrize("name", LAYERS)
@every_format
def test_real_activations(activations: dict[str, Tensor], fmt: Format, name: str) -> None:
    x = activations[name]
    check(x.reshape(1, -1)[:, :200_000].double().numpy(), fmt, 128)
    channels = x.movedim(1, 0).flatten(1)[:3].double().numpy()
    check(channels[:, :144], fmt, 512)
    check(channels[:, :4096], fmt, 128)
