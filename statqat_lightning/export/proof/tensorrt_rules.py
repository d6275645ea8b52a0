"""What TensorRT's ONNX parser asks of quantized graphs, checked on a file without TensorRT.

The rules are those of `QuantDequantLinearHelper` in onnx-tensorrt 10.1 (`onnxOpImporters.cpp`),
each of which ends the import there, and of the page on explicit quantization in TensorRT's
documentation: symmetric codes of int8, FP8 or int4, constant positive scales, one for each tensor
of inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from statqat_lightning.export.files.onnx_files import graph_of

PARSER = "onnx-tensorrt 10.1"
_ROUNDING = ("QuantizeLinear", "DequantizeLinear")


class Violation(NamedTuple):
    """A node that the parser refuses.

    Attributes:
        node: Its name, or that of its result.
        why: The rule that it breaks.
    """

    node: str
    why: str

    def __str__(self) -> str:
        return f"{self.node}: {self.why}"


def violations(path: Path) -> list[Violation]:
    """The nodes of an `.onnx` file that break a rule of the parser, in the order of the graph.

    Args:
        path: The file; what its weights are does not matter, but their shapes and types do.
    """
    import onnx

    model = graph_of(path)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant":
            value = next((a.t for a in node.attribute if a.name == "value"), None)
            if value is not None:
                constants[node.output[0]] = value
    found = []
    for node in model.graph.node:
        name = node.name or node.output[0]
        if node.domain not in ("", "ai.onnx"):
            why = f"{node.op_type} is no operator of ONNX but of {node.domain}"
            found.append(Violation(name, why))
        elif node.op_type in _ROUNDING:
            attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
            found += [Violation(name, why) for why in _broken(node, attributes, constants, path)]
    return found


def _broken(
    node: Any, attributes: Mapping[str, Any], constants: Mapping[str, Any], path: Path
) -> Iterator[str]:
    """The rules that a QuantizeLinear or DequantizeLinear breaks."""
    import onnx

    types = onnx.TensorProto
    allowed = {types.INT8, types.FLOAT8E4M3FN, types.INT4}
    codes = constants.get(node.input[0])
    zero = constants.get(node.input[2]) if len(node.input) > 2 and node.input[2] else None
    if len(node.input) > 2 and node.input[2] and zero is None:
        yield "its zero point is no constant"
        return
    if zero is not None:
        kind = zero.data_type
    elif node.op_type == "QuantizeLinear":
        kind = attributes.get("output_dtype", types.UINT8)  # as ONNX has it
    else:
        kind = types.INT8 if codes is None else codes.data_type
    if codes is not None and node.op_type == "DequantizeLinear":
        kind = codes.data_type
    if kind not in allowed:
        name = types.DataType.Name(kind)
        yield f"codes are {name}; TensorRT has INT8, FLOAT8E4M3FN and INT4"
        return
    scale = constants.get(node.input[1])
    if scale is None:
        yield "its scale is no constant"
        return
    scales, size = _values(scale, path), int(np.prod(scale.dims))
    if not ((scales > 0) & np.isfinite(scales)).all():
        yield "not all of its scales are positive and finite"
    if zero is not None:
        if int(np.prod(zero.dims)) != size:
            yield f"{int(np.prod(zero.dims))} zero points for {size} scales"
        if zero.data_type != types.FLOAT8E4M3FN and _values(zero, path).any():
            yield "its zero point is not 0; TensorRT quantizes symmetrically"
    shape = None if codes is None else tuple(codes.dims)
    if size == 1:
        pass
    elif shape is None:
        yield f"an input or output has {size} scales; TensorRT has one for each tensor"
    elif len(scale.dims) == 1:
        axis = int(attributes.get("axis", 1))
        channels = shape[axis] if -len(shape) <= axis < len(shape) else 0
        if channels != size and not attributes.get("block_size", 0):
            yield f"{size} scales for {channels} channels of axis {axis}"
    elif len(scale.dims) != len(shape):
        yield f"scales have {len(scale.dims)} axes, and codes {len(shape)}"
    else:
        shared = [n for n, own in zip(shape, scale.dims, strict=True) if n != own]
        if len(shared) > 1 or any(n % own for n, own in zip(shape, scale.dims, strict=True)):
            yield "blocks lie along one axis, and all are of one size"
    if kind == types.INT4 and shape is not None and shape and shape[-1] % 2:
        yield f"INT4 codes are packed in pairs, and the last axis has {shape[-1]}"


def _values(tensor: Any, path: Path) -> Any:
    import onnx

    return onnx.numpy_helper.to_array(tensor, base_dir=str(path.parent)).astype(np.float32)


def remarks(path: Path) -> list[str]:
    """What a report says of an `.onnx` file that was written for TensorRT."""
    found = violations(path)
    text = f"checked against the quantization rules of {PARSER}; no engine was built."
    if not found:
        return [f"{text} All hold."]
    shown = "; ".join(map(str, found[:3])) + ("; …" if len(found) > 3 else "")
    return [f"{text} {len(found)} nodes break one: {shown}."]
