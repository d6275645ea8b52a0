from __future__ import annotations

import importlib.util
import logging
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from statqat_lightning.export.calls.forward_call import ForwardCall
from statqat_lightning.export.files.onnx import OPSET, ONNXExportError, save_onnx
from statqat_lightning.export.freezing.frozen import freeze
from statqat_lightning.export.proof.verify import onnx_session
from statqat_lightning.formats import get_format
from statqat_lightning.model.quantized_model import quantized_layers
from tests.export.models import (
    FLOATS,
    Branches,
    Everything,
    calibrated,
    images,
    outputs,
    recipe_of,
    small_net,
)

# Rounding of sums in another order, in outputs up to about 1.
FLOAT_ROUNDING = 2e-6


def run(path: Path, *batch: Tensor) -> list[np.ndarray[Any, Any]]:
    session = onnx_session(path)
    names = [i.name for i in session.get_inputs()]
    feed = {n: t.numpy() for n, t in zip(names, batch, strict=True)}
    result: list[np.ndarray[Any, Any]] = session.run(None, feed)
    return result


def initializers(path: Path) -> dict[str, onnx.TensorProto]:
    return {i.name: i for i in onnx.load(path).graph.initializer}


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


@pytest.mark.parametrize(
    ("weights", "inputs", "granularity"),
    [
        ("int8", "int8", "per_channel"),
        ("int4", "int4", "per_channel"),
        ("int2", "int2", "per_channel"),
        ("int3", None, "per_group:4"),
        ("fp8_e4m3", "fp8_e4m3", "per_channel"),
        ("fp8_e5m2", "fp8_e5m2", "per_tensor"),
        ("fp6_e2m3", "fp6_e2m3", "per_tensor"),
        ("fp6_e3m2", "fp6_e3m2", "per_channel"),
        ("fp4_e2m1", "fp4_e2m1", "per_channel"),
        ("fp4_e2m1", "int6", "per_group:4"),
    ],
)
def test_onnx_runtime_agrees(
    weights: str, inputs: str | None, granularity: str, tmp_path: Path
) -> None:
    net = small_net()[2:]
    model = calibrated(net, recipe_of(weights, inputs, granularity), torch.randn(64, 8, 8, 8))
    x = torch.randn(128, 8, 8, 8)
    save_onnx(model, tmp_path / "m.onnx", x[:1])
    (given,), expected = run(tmp_path / "m.onnx", x), outputs(model, x).numpy()
    # With 8-bit inputs, ONNX Runtime uses integer kernels, whose rescaling may flip a last bit.
    tolerance = 3e-3 if inputs == "int8" else FLOAT_ROUNDING
    assert np.abs(given - expected).max() <= tolerance
    assert (given.argmax(1) == expected.argmax(1)).mean() >= (0.99 if inputs == "int8" else 1)


def test_every_supported_layer_and_a_user_class(tmp_path: Path) -> None:
    model = calibrated(Everything(), recipe_of("int4", "int4"), images())
    x = images(7)
    save_onnx(model, tmp_path / "m.onnx", x[:1])
    (given,) = run(tmp_path / "m.onnx", x)
    assert np.abs(given - outputs(model, x).numpy()).max() <= FLOAT_ROUNDING


class Identity(nn.Linear):
    """A layer whose output shows its input, and its weight in the last row."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.weight * torch.ones_like(x[:1])])


@pytest.mark.parametrize("fmt", [*FLOATS, "int8", "uint2"])
def test_rounding_is_ours_on_ties_subnormals_and_beyond_the_range(fmt: str, tmp_path: Path) -> None:
    grid = get_format(fmt)
    values = grid.values.float()
    scale = 0.0625  # a power of two keeps the ties exact
    ties = (values[1:] + values[:-1]) / 2
    near = torch.cat([ties.nextafter(torch.tensor(9e9)), ties.nextafter(torch.tensor(-9e9))])
    far = torch.tensor([1e-30, -1e-30, 1e6, -1e6, grid.max * 1.01, grid.min * 1.01])
    points = torch.cat([values, ties, near, far, torch.randn(300) * grid.max / 3]) * scale
    columns = -(-len(points) // 4)
    x = nn.functional.pad(points, (0, 4 * columns - len(points))).view(4, columns)
    weights = fmt if grid.is_signed else "int4"
    model = calibrated(
        nn.Sequential(Identity(columns, 1, bias=False)), recipe_of(weights, fmt), x.clamp_min(0)
    )
    for _, _, quantizers in quantized_layers(model):
        assert quantizers.input is not None
        quantizers.input.fmt = grid
        quantizers.input.scale.fill_(scale)
    expected = outputs(model, x)
    assert torch.equal(expected[:4], grid.round(x / scale) * scale)
    save_onnx(model, tmp_path / "m.onnx", x)
    (given,) = run(tmp_path / "m.onnx", x)
    assert np.array_equal(given, expected.numpy())


def test_integers_are_int8_codes_with_a_scale_per_channel(tmp_path: Path) -> None:
    model = calibrated(small_net(), recipe_of("int4", "int4"), images())
    save_onnx(model, tmp_path / "m.onnx", images(4))
    stored = initializers(tmp_path / "m.onnx")
    layer: Any = model.get_submodule("2")
    quantizer = layer._statqat.weight
    codes = next(v for k, v in stored.items() if k.endswith("2.weight_codes"))
    scale = next(v for k, v in stored.items() if k.endswith("2.weight_scale"))
    assert codes.data_type == onnx.TensorProto.INT8
    integers = onnx.numpy_helper.to_array(codes)
    assert (integers.min(), integers.max()) >= (-7, -7)
    assert integers.max() <= 7
    expected = quantizer.fmt.round(layer.weight.detach() / quantizer.scale)
    assert np.array_equal(integers, expected.numpy())
    assert onnx.numpy_helper.to_array(scale).shape == (8,)
    counts = operators(tmp_path / "m.onnx")
    assert (counts["QuantizeLinear"], counts["DequantizeLinear"]) == (4, 8)
    # No weight in float beside its codes.
    large = [i for i in stored.values() if i.data_type == onnx.TensorProto.FLOAT]
    assert all(np.prod(i.dims) <= 24 for i in large)


def test_float_formats_are_float8_and_tables(tmp_path: Path) -> None:
    for fmt, kind in (
        ("fp8_e4m3", onnx.TensorProto.FLOAT8E4M3FN),
        ("fp6_e3m2", onnx.TensorProto.UINT8),
        ("fp4_e2m1", onnx.TensorProto.UINT4),
    ):
        model = calibrated(nn.Sequential(nn.Linear(16, 8)), recipe_of(fmt), torch.randn(4, 16))
        save_onnx(model, tmp_path / "m.onnx", torch.randn(4, 16))
        stored = [i for k, i in initializers(tmp_path / "m.onnx").items() if "codes" in k]
        assert [i.data_type for i in stored] == [kind]
        if kind == onnx.TensorProto.UINT4:
            assert len(stored[0].raw_data) == 16 * 8 // 2


def test_the_file_is_tidy(tmp_path: Path) -> None:
    model = calibrated(small_net(), recipe_of("int4", "int4"), images())
    save_onnx(model, tmp_path / "m.onnx", images(4))
    proto = onnx.load(tmp_path / "m.onnx")
    onnx.checker.check_model(proto, full_check=True)
    assert [(o.domain, o.version) for o in proto.opset_import] == [("", OPSET)]
    assert [i.name for i in proto.graph.input] == ["input"]
    assert [o.name for o in proto.graph.output] == ["output"]
    for value in (*proto.graph.input, *proto.graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"
    assert proto.producer_name == "statqat_lightning"
    assert not any(node.doc_string or node.metadata_props for node in proto.graph.node)


class Named(nn.Module):
    """Several inputs, one of them a flag, and named outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(4, 3)
        self.right = nn.Linear(4, 3)

    def forward(
        self, x: Tensor, pair: dict[str, Tensor], double: bool = False
    ) -> dict[str, Tensor]:
        total = self.left(x) + self.right(pair["y"])
        return {"logits": 2 * total if double else total, "mask": pair["mask"] > 0}


def test_nested_inputs_flags_and_named_outputs(tmp_path: Path) -> None:
    model = Named()
    batch = torch.randn(8, 4), {"y": torch.randn(8, 4), "mask": torch.arange(8)}
    call = ForwardCall(batch, {"double": True})
    calibrated(model, recipe_of("int4", "int4"), *batch)  # type: ignore[arg-type]
    save_onnx(model, tmp_path / "m.onnx", call)
    session = onnx_session(tmp_path / "m.onnx")
    assert [i.name for i in session.get_inputs()] == ["x", "pair_y", "pair_mask"]
    assert [o.name for o in session.get_outputs()] == ["logits", "mask"]
    given = session.run(
        None,
        {"x": batch[0].numpy(), "pair_y": batch[1]["y"].numpy(), "pair_mask": np.arange(8)},
    )
    expected = call.run(model)
    assert np.abs(given[0] - expected["logits"].numpy()).max() <= FLOAT_ROUNDING
    assert np.array_equal(given[1], expected["mask"].numpy())


def test_half_precision_becomes_float32(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4)).to(torch.bfloat16)
    x = torch.randn(16, 8)
    calibrated(model, recipe_of("int4", "int8"), x.bfloat16())
    frozen: Any = freeze(model)
    save_onnx(frozen, tmp_path / "m.onnx", x.bfloat16())
    (given,) = run(tmp_path / "m.onnx", x)
    assert given.dtype == np.float32
    # bfloat16 keeps 8 bits.
    assert np.abs(given - frozen(x.bfloat16()).float().numpy()).max() <= 2**-6
    assert frozen[0].weight.dtype == torch.bfloat16


def test_a_forward_that_cannot_be_traced(tmp_path: Path) -> None:
    model = calibrated(Branches(), recipe_of("int4", "int4"), torch.randn(4, 4))
    (tmp_path / "m.onnx").write_bytes(b"old")
    with pytest.raises(ONNXExportError, match=r"(?s)the culprit.*name it \(module="):
        save_onnx(model, tmp_path / "m.onnx", torch.randn(4, 4))
    assert (tmp_path / "m.onnx").read_bytes() == b"old"
    assert [f.name for f in tmp_path.iterdir()] == ["m.onnx"]


def test_export_is_silent(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    model = calibrated(small_net(), recipe_of("int4", "int4"), images())
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        warnings.simplefilter("error")
        save_onnx(model, tmp_path / "m.onnx", images(4))
        run(tmp_path / "m.onnx", images(4))
    assert capfd.readouterr() == ("", "")
    assert not caplog.records


def test_a_missing_package_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name: None if name == "onnxscript" else find(name),
    )
    with pytest.raises(ModuleNotFoundError, match=r"needs onnxscript: .*statqat-lightning\[onnx\]"):
        save_onnx(small_net(), tmp_path / "m.onnx", images())


def test_what_has_no_operators_is_refused(tmp_path: Path) -> None:
    x = images()
    model = calibrated(small_net(), recipe_of("int8", "nf4"), x)
    message = "0/input: got format 'nf4'; expected integers or floats, because"
    with pytest.raises(ONNXExportError, match=message):
        save_onnx(model, tmp_path / "model.onnx", x)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("fmt", ["int4_full", "fp4_e3m0", "nf4", "levels:-1,0,0.5"])
def test_new_grids_give_the_outputs_of_the_model(fmt: str, tmp_path: Path) -> None:
    x = images()
    inputs = None if fmt.startswith(("nf", "levels")) else fmt
    model = calibrated(small_net(), recipe_of(fmt, inputs), x)
    save_onnx(model, tmp_path / "model.onnx", x)
    (got,) = run(tmp_path / "model.onnx", x)
    expected = outputs(model, x).numpy()
    # A value that lies between two steps of an input's grid may take the other one.
    assert np.mean(np.abs(got - expected) > FLOAT_ROUNDING) <= (0.05 if inputs else 0)
