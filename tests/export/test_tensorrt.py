"""Files for TensorRT: each rule of its parser is kept, and a graph that breaks it is found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx import TensorProto, helper, save
from torch import nn

from statqat_lightning.export import export_model, save_onnx
from statqat_lightning.export.files.onnx_files import graph_of
from statqat_lightning.export.proof.tensorrt_rules import violations
from statqat_lightning.model.quantized_model import activation_quantizers
from statqat_lightning.recipes.recipe import QuantRecipe, TensorSpec
from statqat_lightning.recipes.rule import QuantRule
from statqat_lightning.targets.placement import place
from tests.export.models import Everything, observed
from tests.layers.test_gates import Excited
from tests.targets.test_placement import W8A8, Residual
from tests.targets.test_shared_scales import Mixed

INT8, UINT8, INT4 = TensorProto.INT8, TensorProto.UINT8, TensorProto.INT4


def tensor(name: str, values: Any, kind: int = TensorProto.FLOAT) -> Any:
    array = np.asarray(values, np.float32 if kind == TensorProto.FLOAT else np.int64)
    return helper.make_tensor(name, kind, array.shape, array.flatten().tolist())


def graph(path: Path, nodes: list[Any], tensors: list[Any]) -> Path:
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 6, 6])]
    outputs = [helper.make_empty_tensor_value_info(nodes[-1].output[0])]
    made = helper.make_graph(nodes, "g", inputs, outputs, tensors)
    save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)]), path)
    return path


def of_input(scale: Any, zero: Any, **attributes: Any) -> tuple[list[Any], list[Any]]:
    names = ["x", "s", "z"] if zero is not None else ["x", "s"]
    nodes = [
        helper.make_node("QuantizeLinear", names, ["q"], "quantize", **attributes),
        helper.make_node("DequantizeLinear", ["q", *names[1:]], ["y"], "dequantize", **attributes),
    ]
    return nodes, [scale] + ([] if zero is None else [zero])


def of_weight(codes: Any, scale: Any, **attributes: Any) -> tuple[list[Any], list[Any]]:
    node = helper.make_node("DequantizeLinear", ["w", "s"], ["y"], "weight", **attributes)
    return [node], [codes, scale]


def ones(*shape: int) -> Any:
    return np.ones(shape)


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        (of_input(tensor("s", 0.1), tensor("z", 0, UINT8)), "codes are UINT8"),
        (of_input(tensor("s", 0.1), None), "codes are UINT8"),
        (of_input(tensor("s", 0.1), tensor("z", 3, INT8)), "its zero point is not 0"),
        (of_input(tensor("s", -0.1), tensor("z", 0, INT8)), "positive and finite"),
        (of_input(tensor("s", 0.0), tensor("z", 0, INT8)), "positive and finite"),
        (of_input(tensor("s", [0.1]), tensor("z", [0, 0], INT8)), "2 zero points for 1 scales"),
        (
            of_input(tensor("s", [0.1] * 4), tensor("z", [0] * 4, INT8), axis=1),
            "has 4 scales; TensorRT has one for each tensor",
        ),
        (of_weight(tensor("w", ones(4, 3), INT8), tensor("s", [1.0] * 3), axis=0), "3 scales for"),
        (
            of_weight(tensor("w", ones(4, 6), INT8), tensor("s", ones(2, 2)), axis=1, block_size=3),
            "blocks lie along one axis",
        ),
        (of_weight(tensor("w", ones(4, 3), INT4), tensor("s", 1.0)), "packed in pairs"),
        (of_weight(tensor("w", ones(4, 4), UINT8), tensor("s", 1.0)), "codes are UINT8"),
        (
            ([helper.make_node("QuickGelu", ["x"], ["y"], "gelu", domain="com.microsoft")], []),
            "no operator of ONNX",
        ),
        (of_input(tensor("other", 0.1), tensor("z", 0, INT8)), "its scale is no constant"),
        (of_input(tensor("s", 0.1), tensor("other", 0, INT8)), "its zero point is no constant"),
    ],
)
def test_a_graph_that_breaks_a_rule_is_found(
    broken: tuple[list[Any], list[Any]], why: str, tmp_path: Path
) -> None:
    found = violations(graph(tmp_path / "m.onnx", *broken))
    assert found
    assert all(why in str(violation) for violation in found)


@pytest.mark.parametrize(
    "kept",
    [
        of_input(tensor("s", 0.1), tensor("z", 0, INT8)),
        of_input(tensor("s", [0.1]), tensor("z", 0, INT8)),
        of_input(tensor("s", 0.1), None, output_dtype=INT8),
        of_weight(tensor("w", ones(4, 3), INT8), tensor("s", [1.0] * 4), axis=0),
        of_weight(tensor("w", ones(4, 3), INT8), tensor("s", [1.0] * 3), axis=-1),
        of_weight(tensor("w", ones(4, 6), INT4), tensor("s", ones(4, 2)), axis=1, block_size=3),
    ],
)
def test_a_graph_that_keeps_them_is_not(kept: tuple[list[Any], list[Any]], tmp_path: Path) -> None:
    assert violations(graph(tmp_path / "m.onnx", *kept)) == []


def test_constants_may_be_nodes(tmp_path: Path) -> None:
    nodes, (scale, zero) = of_input(tensor("s", 0.1), tensor("z", 3, INT8))
    constants = [helper.make_node("Constant", [], [t.name], value=t) for t in (scale, zero)]
    found = violations(graph(tmp_path / "m.onnx", [*constants, *nodes], []))
    assert {violation.node for violation in found} == {"quantize", "dequantize"}


@pytest.mark.parametrize("network", [Residual, Mixed, Excited])
@pytest.mark.timed
def test_what_is_written_for_it_keeps_all_rules(
    network: Callable[[], nn.Module], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model, x = network().eval(), torch.randn(16, 3, 16, 16)
    placement = place(model, W8A8, lambda: model(x[:2]), "tensorrt")
    assert placement.left == ()
    observed(model, placement.recipe, x)
    assert all(q.fmt.is_signed for q in activation_quantizers(model))

    path = tmp_path / "m.onnx"
    report = export_model(model, path, x, files=("onnx",), target="tensorrt")

    assert violations(path) == []
    assert report.onnx is not None
    assert report.onnx.agreement == 1
    assert report.onnx.max_steps < 1e-2
    assert report.onnx.float_milliseconds is None
    said = " ".join(report.onnx.remarks)
    assert "no engine was built. All hold." in said
    assert "without its optimizations" in report.onnx.runtime


def test_sums_take_one_rounded_term() -> None:
    """The other is added to the sums of a convolution, which are rounded afterwards."""
    model = Residual().eval()
    recipe = place(model, W8A8, lambda: model(torch.randn(2, 3, 8, 8)), "tensorrt").recipe
    rules = {rule.pattern: rule for rule in recipe.rules}
    for block in ("blocks.0", "blocks.1"):
        assert f"{block}.bn2" not in rules
        assert rules[f"{block}.conv2"].outputs is None
    assert rules["blocks.0"].inputs is not None  # what the first block adds, and its convolution


def test_layers_of_other_kinds_are_signed_too(tmp_path: Path) -> None:
    """Attention and recurrent layers, which have no integer kernels to be placed for."""
    model = Everything().eval()
    x = torch.randn(8, 1, 8, 8)
    recipe = place(model, W8A8, lambda: model(x[:2]), "tensorrt").recipe
    observed(model, recipe, x)
    assert all(q.fmt.is_signed for q in activation_quantizers(model))
    save_onnx(model, tmp_path / "m.onnx", x, target="tensorrt")
    assert violations(tmp_path / "m.onnx") == []


def test_files_for_other_runtimes_break_rules(tmp_path: Path) -> None:
    model, x = Residual().eval(), torch.randn(8, 3, 16, 16)
    observed(model, place(model, W8A8, lambda: model(x[:2]), "onnxruntime").recipe, x)
    save_onnx(model, tmp_path / "m.onnx", x)
    assert any("codes are UINT8" in violation.why for violation in violations(tmp_path / "m.onnx"))

    report = export_model(
        model, tmp_path / "t.onnx", x, files=("onnx",), target="tensorrt", strict=False
    )
    assert report.onnx is not None
    assert any("nodes break one: " in remark for remark in report.onnx.remarks)


def test_unsigned_formats_are_refused() -> None:
    model = Residual().eval()
    recipe = QuantRecipe([QuantRule("*", "int8", TensorSpec("uint8"))])
    with pytest.raises(ValueError, match=r"tensorrt has signed integers only: use 'int8'"):
        place(model, recipe, lambda: model(torch.randn(2, 3, 8, 8)), "tensorrt")


def test_numbers_of_a_file_are_read_from_beside_it(tmp_path: Path) -> None:
    """Scales in a file of their own, as large models have their weights."""
    nodes, tensors = of_input(tensor("s", [-0.1]), tensor("z", [0], INT8))
    path = graph(tmp_path / "m.onnx", nodes, tensors)
    proto = graph_of(path)
    save(
        proto,
        path,
        save_as_external_data=True,
        location="m.data",
        size_threshold=0,
        convert_attribute=False,
    )
    assert any("positive and finite" in v.why for v in violations(path))
