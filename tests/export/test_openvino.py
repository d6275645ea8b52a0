"""OpenVINO reads the ONNX file: what it computes, against the fake-quantized model."""

from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
from torch import Tensor

from statqat_lightning.export import save_onnx
from statqat_lightning.export.onnx import OPSET
from tests.export.models import Everything, calibrated, images, outputs, recipe_of, small_net

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of its own imports
    import openvino


def run(path: Path, x: Tensor) -> np.ndarray:
    core = openvino.Core()
    compiled = core.compile_model(
        path, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    )
    result: np.ndarray = compiled([x.numpy()])[0]
    return result


@pytest.mark.parametrize(
    ("weights", "inputs", "steps"),
    [
        ("int8", "int8", 2),
        ("int4", "int8", 2),
        ("int4", "int4", 0.01),
        ("int2", None, 0.01),
        ("fp8", None, 0.01),
        ("fp4", None, 0.01),
        ("nf4", "int8", 2),
    ],
)
def test_openvino_agrees(weights: str, inputs: str | None, steps: float) -> None:
    model = calibrated(small_net(), recipe_of(weights, inputs), images(64))
    x = images(128)
    save_onnx(model, "m.onnx", x[:2])
    given, expected = run(Path("m.onnx"), x), outputs(model, x).numpy()
    largest = np.abs(given - expected).max() / (np.abs(expected).max() / 127)
    print(f"W{weights} A{inputs}: {largest:.3g} steps, opset {OPSET}")
    assert largest <= steps
    assert (given.argmax(1) == expected.argmax(1)).mean() >= (0.98 if steps > 1 else 1)


def test_every_layer_in_any_batch_size() -> None:
    model = calibrated(Everything(), recipe_of("int4", "int8"), images(64))
    save_onnx(model, "m.onnx", images(2))
    for count in (1, 7):
        x = images(count)
        expected = outputs(model, x).numpy()
        assert np.abs(run(Path("m.onnx"), x) - expected).max() <= 0.03 * np.abs(expected).max()
