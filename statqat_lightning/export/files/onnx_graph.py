"""Graphs as ONNX Runtime's kernels want them; each pass changes a graph in place.

None changes what a graph computes, apart from the order of sums.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

_KEEPS_CODES = {"Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity"}
"""What ONNX Runtime moves DequantizeLinear past, to have integers in front of a product."""


def is_rounded(x: Any) -> bool:
    """Whether a value comes from integers."""
    import onnx_ir

    source = _dequantized_by(x)
    return source is not None and bool(source.inputs[2].dtype == onnx_ir.DataType.UINT8)


def _dequantized_by(x: Any) -> Any:
    """The DequantizeLinear that a value comes from, in whatever shape; None if from none."""
    producer = x.producer()
    while producer is not None and producer.op_type in _KEEPS_CODES:
        producer = producer.inputs[0].producer()
    is_source = producer is not None and producer.op_type == "DequantizeLinear"
    return producer if is_source else None


def _constant(graph: Any, name: str, array: Any) -> Any:
    """A new initializer."""
    import onnx_ir

    tensor = onnx_ir.tensor(array, name=name)
    value = onnx_ir.Value(name=name, const_value=tensor)
    value.dtype, value.shape = tensor.dtype, onnx_ir.Shape(array.shape)
    graph.graph.register_initializer(value)
    return value


def store(value: Any, array: Any, kind: Any) -> None:
    """Give an initializer other contents."""
    import onnx_ir

    array = np.ascontiguousarray(array).astype(kind.numpy())
    value.const_value = onnx_ir.Tensor(array, dtype=kind, name=value.name)
    value.dtype, value.shape = kind, onnx_ir.Shape(array.shape)


def drop_clips(graph: Any) -> None:
    """Drop Clip where the QuantizeLinear behind it saturates at the same codes."""
    for node, consumers in _clips_before_rounding(graph):
        bounds = (("Min", _bound(node, 2)), ("Max", _bound(node, 1)))
        if all(bound is None or _saturate_at(consumers, bound, kind) for kind, bound in bounds):
            for consumer in consumers:
                consumer.replace_input_with(0, node.inputs[0])
            graph.graph.remove(node, safe=True)


def split_clips(graph: Any) -> None:
    """Write Clip as Min and Max where the QuantizeLinear behind it does not clip as far.

    ONNX Runtime looks through Clip and Relu to QuantizeLinear, and rounds the bias of the layer
    before to a multiple of `input scale * weight scale`. That is a coarse step for formats narrower
    than their container, and gains no speed, because such a Clip keeps the integer kernel away.
    """
    import onnx_ir

    for node, consumers in _clips_before_rounding(graph):
        value, last = node.inputs[0], node
        for kind, bound in (("Min", _bound(node, 2)), ("Max", _bound(node, 1))):
            if bound is None or _saturate_at(consumers, bound, kind):
                continue
            step = onnx_ir.node(kind, [value, bound])
            graph.graph.insert_after(last, step)
            step.outputs[0].dtype, step.outputs[0].shape = (
                node.outputs[0].dtype,
                node.outputs[0].shape,
            )
            value, last = step.outputs[0], step
        for consumer in consumers:
            consumer.replace_input_with(0, value)
        graph.graph.remove(node, safe=True)


def _clips_before_rounding(graph: Any) -> Iterator[tuple[Any, Any]]:
    """Each Clip whose output only QuantizeLinear reads, and those that do."""
    for node in list(graph.graph):
        if node.op_type != "Clip" or node.outputs[0].is_graph_output():
            continue
        consumers = node.outputs[0].consumers()
        if consumers and all(c.op_type == "QuantizeLinear" for c in consumers):
            yield node, consumers


def _bound(clip: Any, place: int) -> Any:
    return clip.inputs[place] if place < len(clip.inputs) else None


def _saturate_at(rounding: Sequence[Any], bound: Any, kind: str) -> bool:
    """Whether each QuantizeLinear gives a bound the last of its codes, at the upper or lower end.

    Args:
        rounding: The QuantizeLinear nodes.
        bound: A constant.
        kind: Min for an upper bound, Max for a lower one.
    """
    limit = bound.const_value.numpy()
    for quantize in rounding:
        scale, zero = (value.const_value.numpy() for value in quantize.inputs[1:3])
        if zero.dtype != np.uint8:
            return False  # float8 saturates nowhere, see `_translate_input`
        code = np.round(limit / scale) + zero
        if code < 255 if kind == "Min" else code > 0:
            return False
    return True


PARTS = "_of_parts"
"""End of the names of scales that parts of a rounded tensor are rounded with once more."""


def round_parts(graph: Any) -> None:
    """Round the parts of a rounded tensor that Split gives, which changes none of them.

    ONNX Runtime splits codes only where each part is rounded with the scale of the whole.
    """
    import onnx_ir

    for node in list(graph.graph):
        if node.op_type != "Split":
            continue
        source = _dequantized_by(node.inputs[0])
        scale = _constant_scale(source)
        if scale is None or scale.size != 1:
            continue
        zero = source.inputs[2]
        own = _constant(graph, f"{node.outputs[0].name}_scale{PARTS}", scale)
        for part in node.outputs:
            uses = list(part.uses())
            if part.is_graph_output():
                continue
            quantize = onnx_ir.node("QuantizeLinear", [part, own, zero])
            dequantize = onnx_ir.node("DequantizeLinear", [quantize.outputs[0], own, zero])
            for new, kind in ((quantize, zero.dtype), (dequantize, part.dtype)):
                new.outputs[0].dtype, new.outputs[0].shape = kind, part.shape
            graph.graph.insert_after(node, [quantize, dequantize])
            for user, place in uses:
                user.replace_input_with(place, dequantize.outputs[0])


def keep_biases(graph: Any) -> None:
    """Keep convolutions in float whose bias ONNX Runtime would round too coarsely.

    It rounds the bias of an integer convolution to multiples of input scale times weight scale,
    which is a coarse step where these are of few bits. A model that was trained for it has such
    biases already. Max stands in the way where ONNX Runtime would look through Relu and Clip.
    """
    import onnx_ir

    for node in list(graph.graph):
        if node.op_type != "Conv":
            continue
        quantize, error = rounded_by(node.outputs[0]), bias_error(node)
        if quantize is None or error is None:
            continue
        if error.absolute <= _HARMLESS * float(quantize.inputs[1].const_value.numpy()):
            continue
        (follower,) = node.outputs[0].consumers()
        is_relu = follower.op_type == "Relu"
        low = 0.0 if is_relu else _low_end(quantize)
        if not np.isfinite(low):
            continue
        bound = _constant(graph, f"{node.name}_low", np.float32(low))
        barrier = onnx_ir.node("Max", [node.outputs[0], bound])
        barrier.outputs[0].dtype, barrier.outputs[0].shape = (
            node.outputs[0].dtype,
            node.outputs[0].shape,
        )
        graph.graph.insert_after(node, barrier)
        if is_relu:
            for user, place in list(follower.outputs[0].uses()):
                user.replace_input_with(place, barrier.outputs[0])
            graph.graph.remove(follower, safe=True)
        else:
            follower.replace_input_with(0, barrier.outputs[0])


def keep_weights(graph: Any) -> None:
    """Keep ONNX Runtime from rounding weights of tables, blocks and floats to int8.

    It has no integers for them, computes them when it loads, and then takes them for float weights
    that somebody forgot: where inputs and output of a layer are rounded, it makes int8 of them
    (`WeightBiasQuantization`; 20 to 45 dB). It does so for Conv, ConvTranspose and Gemm with
    rounding behind, or a Relu, Clip or BatchNormalization and then rounding. Max with the least of
    all numbers changes nothing, and stands in the way.
    """
    import onnx_ir

    for node in list(graph.graph):
        if node.op_type not in ("Conv", "ConvTranspose", "Gemm"):
            continue
        x, weight = (value.producer() for value in node.inputs[:2])
        is_rounded = x is not None and x.op_type == "DequantizeLinear"
        has_codes = weight is not None and weight.op_type == "DequantizeLinear"
        output = node.outputs[0]
        if not is_rounded or has_codes or output.is_graph_output():
            continue
        least = np.float32(np.finfo(np.float32).min)
        bound = _constant(graph, f"{node.name or output.name}_least", least)
        uses = list(output.uses())
        barrier = onnx_ir.node("Max", [output, bound])
        barrier.outputs[0].dtype, barrier.outputs[0].shape = output.dtype, output.shape
        graph.graph.insert_after(node, barrier)
        for user, place in uses:
            user.replace_input_with(place, barrier.outputs[0])


class _BiasError(NamedTuple):
    """How far a bias is, at most, from multiples of input scale times weight scale."""

    absolute: float
    of_multiple: float


def bias_error(node: Any) -> _BiasError | None:
    """That of a Conv or Gemm; None unless its inputs are integers with scales that are known."""
    scales = [_constant_scale(value.producer()) for value in node.inputs[:2]]
    if any(scale is None for scale in scales):
        return None
    if len(node.inputs) < 3 or node.inputs[2] is None:
        return _BiasError(0.0, 0.0)
    if node.inputs[2].const_value is None:
        return None
    step = np.abs(scales[0] * scales[1]).reshape(-1)
    bias = node.inputs[2].const_value.numpy()
    error = np.abs(bias - np.round(bias / step) * step)
    return _BiasError(float(error.max()), float((error / step).max()))


_PASSED = ("Relu", "Clip", "Reshape", "Flatten", "Transpose", "Squeeze", "Unsqueeze", "MaxPool")
"""What ONNX Runtime looks through, or moves rounding in front of."""


def rounded_by(value: Any) -> Any:
    """The QuantizeLinear that is all a value goes to, None if it goes elsewhere."""
    while (consumer := _only_consumer(value)) is not None:
        if consumer.op_type == "QuantizeLinear":
            return consumer if consumer.inputs[1].const_value is not None else None
        if consumer.op_type not in _PASSED:
            return None
        value = consumer.outputs[0]
    return None


_HARMLESS = 0.02
"""Share of an output's step that the rounding of a bias may take."""


def _only_consumer(value: Any) -> Any:
    consumers = value.consumers()
    return consumers[0] if len(consumers) == 1 and not value.is_graph_output() else None


def _constant_scale(dequantize: Any) -> Any:
    """The scale of DequantizeLinear, None for anything else."""
    if dequantize is None or dequantize.op_type != "DequantizeLinear":
        return None
    scale = dequantize.inputs[1].const_value
    return None if scale is None else scale.numpy()


def _low_end(quantize: Any) -> float:
    """Where QuantizeLinear saturates below; for float8 nowhere, see `_translate_input`."""
    scale, zero = (value.const_value.numpy() for value in quantize.inputs[1:3])
    return -float(scale) * int(zero) if zero.dtype == np.uint8 else -math.inf


def pool_means(graph: Any) -> None:
    """Write means over all places of an image as GlobalAveragePool, where they are of codes.

    ONNX Runtime has an integer kernel for that, and none for ReduceMean.
    """
    for node in graph.graph:
        if node.op_type != "ReduceMean" or len(node.inputs) < 2:
            continue
        x, axes = node.inputs[0], node.inputs[1].const_value
        if axes is None or x.shape is None or not node.attributes.get_int("keepdims", 1):
            continue
        rank = len(x.shape)
        over = sorted(int(axis) % rank for axis in axes.numpy().flatten())
        if rank < 3 or over != list(range(2, rank)) or not is_rounded(x):
            continue
        node.op_type = "GlobalAveragePool"
        node.attributes.clear()
        node.resize_inputs(1)


def centre_codes(graph: Any) -> None:
    """Store signed codes of inputs and outputs as int8 around 0, and not as uint8 around 128."""
    import onnx_ir

    zeros: dict[str, Any] = {}
    for node in list(graph.graph):
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear") or len(node.inputs) < 3:
            continue
        zero, codes = node.inputs[2], node.inputs[0]
        if codes.const_value is not None or zero.const_value is None:
            continue  # a weight
        number = zero.const_value.numpy()
        if number.dtype != np.uint8 or number.size != 1 or int(number.flat[0]) != 128:
            continue
        if zero.name not in zeros:
            none = np.zeros(number.shape, np.int8)
            zeros[zero.name] = _constant(graph, f"{zero.name}_signed", none)
        node.replace_input_with(2, zeros[zero.name])
        if node.op_type == "QuantizeLinear":
            node.outputs[0].dtype = onnx_ir.DataType.INT8


def own_zero_points(graph: Any) -> None:
    """Give each weight's DequantizeLinear a zero point of its own.

    The optimizer makes one constant of all that are equal. OpenVINO computes a layer in float where
    one is shared by products of several kinds, and ONNX Runtime refuses a file of several layers
    that share one with `session.x64quantprecision=1`.
    """
    for node in graph.graph:
        if node.op_type != "DequantizeLinear" or node.inputs[0].const_value is None:
            continue
        zero = node.inputs[2] if len(node.inputs) > 2 else None
        if zero is None or zero.const_value is None or len(zero.uses()) == 1:
            continue
        own = _constant(graph, f"{node.inputs[0].name}_zero_point", zero.const_value.numpy())
        node.replace_input_with(2, own)


def pack_tables(graph: Any) -> None:
    """Store the indices of 16-entry tables in 4 bits."""
    import onnx_ir

    for node in graph.graph:
        if node.op_type != "Gather" or (indices := node.inputs[1].producer()) is None:
            continue
        table, codes = node.inputs[0], indices.inputs[0]
        table_size = table.const_value.size if table.const_value is not None else 0
        stored = codes.const_value
        if (
            indices.op_type == "Cast"
            and table_size == 16
            and stored is not None
            and stored.dtype == onnx_ir.DataType.UINT8
        ):
            store(codes, stored.numpy(), onnx_ir.DataType.UINT4)


def tidy(graph: Any, opened: Sequence[Mapping[int, str]]) -> None:
    """Call open dimensions by their names, and drop the exporter's traces of Python code.

    Args:
        graph: The graph, changed in place.
        opened: Names of the open dimensions of each input.
    """
    import onnx_ir

    values = [*graph.graph.inputs, *graph.graph.outputs]
    for node in graph.graph:
        node.metadata_props.clear()
        node.doc_string = None
        values += node.outputs
    titles: dict[Any, str] = {}
    for value, names in zip(graph.graph.inputs, opened, strict=True):
        for dimension, name in names.items():
            size = value.shape[dimension] if value.shape is not None else None
            if isinstance(size, onnx_ir.SymbolicDim) and not _is_fixed(size):
                titles.setdefault(size.value, name)
    for value in values:
        value.metadata_props.clear()
        if value.shape is not None:
            value.shape = onnx_ir.Shape(_size(d, titles) for d in value.shape)


def _is_fixed(size: Any) -> bool:
    """Whether a size that the exporter took for dynamic is one number: the forward fixes it."""
    return str(size.value).isdecimal()


def _size(size: Any, titles: Mapping[Any, str]) -> Any:
    import onnx_ir

    if not isinstance(size, onnx_ir.SymbolicDim):
        return size
    if _is_fixed(size):
        return int(str(size.value))
    return titles.get(size.value, size)
