"""How weights lie in the ONNX file, and which kernels ONNX Runtime makes of them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from statqat_lightning.export import compare_files, save_native, save_onnx
from statqat_lightning.export.freezing.frozen import freeze
from statqat_lightning.export.freezing.frozen_layer import FrozenLayer
from statqat_lightning.export.proof.onnx_runtime import onnx_session
from statqat_lightning.recipes.recipe import QuantRecipe, TensorSpec
from statqat_lightning.recipes.rule import QuantRule
from tests.export.models import Conv1D, ScaledLinear, calibrated, outputs, recipe_of

FLOAT_ROUNDING = 2e-6  # of sums in another order, in outputs up to about 1


def kernels(path: Path) -> Counter[str]:
    """Operators of the graph after ONNX Runtime's own optimization."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    options.optimized_model_filepath = str(path.with_suffix(".optimized"))
    onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    optimized = onnx.load(options.optimized_model_filepath)
    return Counter(node.op_type for node in optimized.graph.node)


def initializers(path: Path) -> dict[str, onnx.TensorProto]:
    return {i.name.removeprefix("model."): i for i in onnx.load(path).graph.initializer}


def difference(path: Path, model: nn.Module, x: Tensor) -> float:
    """Largest difference of ONNX Runtime and the fake-quantized model."""
    session = onnx_session(path)
    (given,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return float((torch.from_numpy(given) - outputs(model, x)).abs().max())


NARROW = [
    TensorSpec("int4"),
    TensorSpec("uint3", "per_tensor"),
    TensorSpec("int2", "per_group:16"),
    TensorSpec("int4_full", "per_block:32"),  # 48 inputs: the second block is short
]


@pytest.mark.parametrize("shape", [(5, 48), (3, 5, 48)])
def test_narrow_weights_are_multiplied_as_they_are(shape: tuple[int, ...], tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    layers = [nn.Linear(48, 48, bias=number % 2 == 0) for number in range(len(NARROW))]
    recipe = QuantRecipe([QuantRule(str(n), spec, None) for n, spec in enumerate(NARROW)])
    x = torch.randn(shape)
    model = calibrated(nn.Sequential(*layers), recipe, x)
    save_onnx(model, path, x)
    assert kernels(path)["MatMulNBits"] == len(NARROW)
    stored = initializers(path)
    kinds = [stored[f"{number}.weight_codes"].data_type for number in range(len(NARROW))]
    int4, uint4 = onnx.TensorProto.INT4, onnx.TensorProto.UINT4
    assert kinds == [int4, uint4, int4, int4]
    assert len(stored["0.weight_codes"].raw_data) == 48 * 48 // 2
    assert [[*stored[f"{n}.weight_scale"].dims] for n in range(4)] == [[48], [48], [3, 48], [2, 48]]
    assert difference(path, model, torch.randn(7, *shape[1:])) <= FLOAT_ROUNDING


@pytest.mark.parametrize(
    ("weights", "inputs"),
    [("int8", None), (TensorSpec("int4", "per_group:8"), None), ("int4", "int8"), ("fp4", None)],
)
def test_other_weights_are_not(weights: Any, inputs: str | None, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    x = torch.randn(6, 16)
    model = calibrated(nn.Sequential(nn.Linear(16, 8)), recipe_of(weights, inputs), x)
    save_onnx(model, path, x)
    assert "MatMulNBits" not in kernels(path)
    assert difference(path, model, x) <= FLOAT_ROUNDING


class Shared(nn.Module):
    """A layer that runs twice, one that scales its weight, and two that share one."""

    def __init__(self) -> None:
        super().__init__()
        self.twice = nn.Linear(16, 16)
        self.scaled = ScaledLinear(16, 16)
        self.first = nn.Linear(16, 16)
        self.second = nn.Linear(16, 16)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.scaled(self.twice(self.twice(x)))
        out: Tensor = self.second(self.first(x))
        return out


@pytest.mark.parametrize("inputs", [None, "int8"])
def test_weights_that_are_used_several_times(inputs: str | None, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    x = torch.randn(4, 16)
    model = calibrated(Shared(), recipe_of("int4", inputs), x)
    save_onnx(model, path, x)
    onnx.checker.check_model(onnx.load(path), full_check=True)
    assert difference(path, model, x) <= FLOAT_ROUNDING


@pytest.mark.parametrize("weights", ["int8", "int8_full", "int4", "uint6"])
@pytest.mark.parametrize("inputs", ["int8", "int8_full", "uint8"])
def test_a_linear_layer_sums_in_integers_and_scales_in_float(
    weights: str, inputs: str, tmp_path: Path
) -> None:
    path = tmp_path / "m.onnx"
    x = torch.randn(64, 300)
    model = calibrated(nn.Sequential(nn.Linear(300, 40)), recipe_of(weights, inputs), x)
    save_onnx(model, path, x)
    assert "MatMulIntegerToFloat" in kernels(path)
    stored = {k: onnx.numpy_helper.to_array(v) for k, v in initializers(path).items()}
    codes, scale = stored["0.weight_codes"], stored["0.weight_scale"]
    assert codes.shape == (300, 40)
    input_scale = stored["0.input_scale"]
    low, high = (0, 255) if inputs == "uint8" else (-128 + (inputs == "int8"), 127)
    given = np.rint(x.numpy() / input_scale).clip(low, high).astype(np.int64)
    sums = given @ codes.astype(np.int64)
    expected = sums * (np.float64(input_scale) * scale.astype(np.float64)) + stored["0.bias"]
    (found,) = onnx_session(path).run(None, {"input": x.numpy()})
    assert np.abs(found - expected).max() <= FLOAT_ROUNDING


@pytest.mark.parametrize(
    ("weights", "inputs", "kernel"),
    [("int8", "int8", "MatMulIntegerToFloat"), ("int4", None, "MatMulNBits"), ("int8", None, None)],
)
def test_the_linear_layers_of_transformers_run_on_the_same_kernels(
    weights: str, inputs: str | None, kernel: str | None, tmp_path: Path
) -> None:
    path = tmp_path / "m.onnx"
    x = torch.randn(3, 5, 32)
    model = calibrated(nn.Sequential(Conv1D(32, 32), Conv1D(8, 32)), recipe_of(weights, inputs), x)
    save_onnx(model, path, x)
    if kernel is not None:
        assert kernels(path)[kernel] == 2
    assert difference(path, model, torch.randn(4, 5, 32)) <= 4 * FLOAT_ROUNDING


@pytest.mark.parametrize(("weights", "inputs"), [("int4", None), ("int8", None), ("int8", "int8")])
@pytest.mark.parametrize("shape", [(5, 16), (2, 5, 16)])
def test_square_weights_are_compared_the_right_way_round(
    weights: str, inputs: str | None, shape: tuple[int, ...], tmp_path: Path
) -> None:
    x = torch.randn(shape)
    model = calibrated(nn.Sequential(nn.Linear(16, 16)), recipe_of(weights, inputs), x)
    save_onnx(model, tmp_path / "m.onnx", x)
    save_native(model, tmp_path / "m.safetensors")
    assert compare_files(tmp_path / "m.safetensors", tmp_path / "m.onnx").equal


BLOCKS = [
    *("mxfp4", "mxfp6", "mxfp6_e3m2", "mxfp8", "mxfp8_e5m2", "nvfp4"),
    *(TensorSpec(fmt, "per_block:16") for fmt in ("int4", "uint8", "fp8", "fp6_e2m3", "nf4")),
]


def test_blocks_of_every_format_and_layer(tmp_path: Path) -> None:
    """40 inputs: the second block of 32 and the third of 16 are short."""
    layers: list[nn.Module] = [nn.Linear(40, 40) for _ in BLOCKS]
    rules = [QuantRule(str(n), spec, None) for n, spec in enumerate(BLOCKS)]
    images = [nn.Unflatten(1, (40, 1, 1)), nn.Conv2d(40, 40, 3, padding=1), nn.Flatten()]
    turned = [nn.Unflatten(1, (40, 1)), nn.ConvTranspose1d(40, 36, 2), nn.Flatten()]
    model = nn.Sequential(*layers, *images, *turned)
    rules += [QuantRule("type:Conv2d", "mxfp4", None)]
    rules += [QuantRule("type:ConvTranspose1d", "nvfp4", None)]
    x = torch.randn(6, 40)
    calibrated(model, QuantRecipe(rules), x)
    path = tmp_path / "m.onnx"
    save_onnx(model, path, x)
    save_native(model, tmp_path / "m.safetensors")
    assert difference(path, model, torch.randn(9, 40)) <= FLOAT_ROUNDING
    compared = compare_files(tmp_path / "m.safetensors", path)
    assert len(compared.snr_db) == len(BLOCKS) + 2
    assert compared.equal


def test_mx_codes_are_elements_of_the_standard_times_powers_of_two(tmp_path: Path) -> None:
    elements = {"mxfp4": ml_dtypes.float4_e2m1fn, "mxfp8": ml_dtypes.float8_e4m3fn}
    x = torch.randn(4, 72)
    for name, element in elements.items():
        model = calibrated(nn.Sequential(nn.Linear(72, 8)), recipe_of(name), x)
        save_onnx(model, tmp_path / "m.onnx", x)
        stored = initializers(tmp_path / "m.onnx")
        scale = onnx.numpy_helper.to_array(stored["0.weight_scale"])
        assert np.array_equal(np.frexp(scale)[0], np.full(8 * 3, 0.5))
        packed = np.frombuffer(stored["0.weight_codes"].raw_data, np.uint8)
        if name == "mxfp4":
            packed = np.stack([packed & 15, packed >> 4], 1)
        values = packed.view(element).astype(np.float32).reshape(8 * 3, 32)
        weight = (values * scale[:, None]).reshape(8, 96)[:, :72]
        layer = freeze(model).get_submodule("0")
        assert isinstance(layer, FrozenLayer)
        assert np.array_equal(weight, layer.read_weight("weight").numpy())


def test_integer_convolutions_differ_by_their_bias_rounded_to_integers(tmp_path: Path) -> None:
    """ONNX Runtime's QLinearConv adds a bias in int32 steps of `input scale * weight scale`."""
    x = torch.randn(8, 8, 12, 12)
    net = nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 8, 3))
    model = calibrated(net, recipe_of("int8", "uint8"), x.relu())
    path = tmp_path / "m.onnx"
    save_onnx(model, path, x)
    assert kernels(path)["QLinearConv"] == 1
    optimized = onnx.load(path.with_suffix(".optimized"))
    (node,) = (n for n in optimized.graph.node if n.op_type == "QLinearConv")
    (after,) = (n for n in optimized.graph.node if node.output[0] in n.input)
    name = after.output[0] if after.op_type == "Transpose" else node.output[0]
    optimized.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    session = onnxruntime.InferenceSession(optimized.SerializeToString())
    (codes,) = session.run([name], {session.get_inputs()[0].name: x.numpy()})

    first, _, second = (freeze(model).get_submodule(str(number)) for number in range(3))
    assert isinstance(first, FrozenLayer)
    step = (first.get_buffer("input_scale") * first.get_buffer("weight_scale")).double().flatten()
    bias, scale = first.bias, second.get_buffer("input_scale").double()
    assert isinstance(bias, Tensor)

    def expected(bias: Tensor) -> Tensor:
        given = first.rounded("input", x).double()
        weight = first.read_weight("weight").double()
        out = torch.nn.functional.conv2d(given, weight, bias, padding=1)
        return (out / scale).round().clamp(0, 255)

    ours, theirs = expected(bias.double()), expected((bias.double() / step).round() * step)
    given = torch.from_numpy(codes.astype(np.float64))
    assert (ours != given).any()  # a few are on the edge between two codes
    assert (ours - given).abs().max() == 1
    assert torch.equal(theirs, given)
