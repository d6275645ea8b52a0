"""Weights that ONNX Runtime has no integers for stay what they are beside rounded inputs."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from statqat_lightning import TensorSpec
from statqat_lightning.export import save_onnx
from statqat_lightning.export.proof.onnx_runtime import onnx_session
from tests.export.models import calibrated, outputs, recipe_of


class EveryProduct(nn.Module):
    """Linear layers, convolutions with and without BatchNorm, transposed ones: each before one."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 32, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(32)
        self.depthwise = nn.Conv2d(32, 32, 3, groups=32)
        self.up = nn.ConvTranspose2d(32, 32, 2, 2)
        self.last = nn.Conv2d(32, 32, 1)
        self.hidden, self.head = nn.Linear(32, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.norm(self.conv(x)))
        x = F.relu(self.up(F.relu(self.depthwise(x))))
        x = self.last(x).mean((2, 3))
        out: Tensor = self.head(F.relu(self.hidden(x)))
        return out


@pytest.mark.parametrize("weights", [None, "nf4", "fp6_e2m3", "mxfp4", "mxfp8", "nvfp4"])
def test_weights_without_integers_are_exact_beside_rounded_inputs(weights: str | None) -> None:
    x = torch.randn(16, 3, 6, 6)
    inputs = TensorSpec("int8", unsigned_if_nonnegative=True)
    model = calibrated(EveryProduct(), recipe_of(weights, inputs), x)
    save_onnx(model, "m.onnx", x)
    (given,) = onnx_session("m.onnx").run(None, {"x": x.numpy()})
    expected = outputs(model, x).numpy()
    noise = np.square(given - expected).sum() / np.square(expected).sum()
    assert 10 * np.log10(max(noise, 1e-30)) < -60  # int8 weights would be at -20 to -45


def test_eight_bit_weights_do_not_saturate() -> None:
    """On processors without VNNI, products of uint8 and int8 are added up in 16 bits by default."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3))
    model[0].weight.data = model[0].weight.data.sign() * 0.1  # every code is an end of the range
    x = torch.rand(8, 16, 8, 8) + 1
    inputs = TensorSpec("int8", unsigned_if_nonnegative=True)
    model = calibrated(model, recipe_of("int8", inputs), x)  # type: ignore[assignment]
    save_onnx(model, "m.onnx", x)
    (given,) = onnx_session("m.onnx").run(None, {"input": x.numpy()})
    expected = outputs(model, x).numpy()
    assert np.abs(given - expected).max() < 0.05 * np.abs(expected).max()
    stored = {i.name: i for i in onnx.load("m.onnx").graph.initializer}
    assert stored["model.0.weight_codes"].data_type == onnx.TensorProto.INT8


def test_where_the_processor_has_no_vnni_the_file_runs_on_unsigned_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Several layers with as many channels: ONNX Runtime refuses zero points that they share."""
    x = torch.rand(4, 8, 6, 6)
    layers = [nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1)]
    inputs = TensorSpec("int8", unsigned_if_nonnegative=True)
    model = calibrated(nn.Sequential(*layers), recipe_of("int8", inputs), x)
    save_onnx(model, "m.onnx", x)
    zeros = {n.input[2] for n in onnx.load("m.onnx").graph.node if "weight_codes" in n.input[0]}
    assert len(zeros) == 2
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    (given,) = onnx_session("m.onnx").run(None, {"input": x.numpy()})
    expected = outputs(model, x).numpy()
    assert np.abs(given - expected).max() < 0.02 * np.abs(expected).max()
