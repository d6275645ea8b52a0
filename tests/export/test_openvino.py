"""OpenVINO reads the ONNX file: what it computes, against the fake-quantized model."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from statqat_lightning.export import save_onnx
from statqat_lightning.numerics.snr import snr_db
from statqat_lightning.recipes.recipe import QuantRecipe
from statqat_lightning.targets.placement import place
from tests.export.models import (
    Everything,
    calibrated,
    images,
    observed,
    outputs,
    recipe_of,
    small_net,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of its own imports
    import openvino


def run(path: Path, x: Tensor) -> np.ndarray:
    core = openvino.Core()
    compiled = core.compile_model(
        path,
        "CPU",
        {
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": 1,
            # By default it rounds the inputs of products with narrow weights to 8 bits on the way.
            "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        },
    )
    result: np.ndarray = compiled([x.numpy()])[0]
    return result


@pytest.mark.parametrize(
    ("weights", "inputs"),
    [
        ("int8", "int8"),
        ("int4", "int8"),
        ("int4", "int4"),
        ("int2", None),
        ("fp8", None),
        ("fp4", None),
        ("nf4", "int8"),
    ],
)
def test_openvino_agrees(weights: str, inputs: str | None) -> None:
    model = calibrated(small_net(), recipe_of(weights, inputs), images(64))
    x = images(128)
    save_onnx(model, "m.onnx", x[:2])
    given, expected = run(Path("m.onnx"), x), outputs(model, x).numpy()
    steps = np.abs(given - expected).max(1) / (np.abs(expected).max() / 127)
    # One image in a hundred may have a value on the edge between two codes.
    assert (steps > 1e-3).mean() <= (0.02 if inputs else 0)
    assert (given.argmax(1) == expected.argmax(1)).all()


@pytest.mark.parametrize("bias", [False, True])
def test_convolutions_without_bias_that_several_read(bias: bool) -> None:
    """OpenVINO 2026.4 gives their output to some without its scale."""

    class Read(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3, bias=bias)
            if bias:
                nn.init.zeros_(self.conv.bias)

        def forward(self, x: Tensor) -> Tensor:
            x = self.conv(x)
            return torch.tanh(x) + x

    model, x = Read().eval(), torch.randn(4, 3, 8, 8)
    recipe = place(model, QuantRecipe.default("int8", "int8"), lambda: model(x), "openvino").recipe
    observed(model, recipe, x)
    save_onnx(model, "m.onnx", x, target="openvino")
    assert snr_db(model(x).detach(), torch.from_numpy(run(Path("m.onnx"), x))) > 60


def test_every_layer_in_any_batch_size() -> None:
    network = Everything()
    network.conv1d = nn.Conv1d(8, 4, 3, padding=1)  # OpenVINO 2026.4 has no circular padding
    model = calibrated(network, recipe_of("int4", "int8"), images(64))
    save_onnx(model, "m.onnx", images(2))
    for count in (1, 7):
        x = images(count)
        expected = outputs(model, x).numpy()
        assert np.abs(run(Path("m.onnx"), x) - expected).max() <= 0.03 * np.abs(expected).max()
