"""Linear layers of an ONNX graph, laid out as the integer kernels of ONNX Runtime want them."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from statqat_lightning.export.files.onnx_graph import bias_error, is_rounded, rounded_by, store

_SMALLEST_BLOCK = 16
"""Of ONNX Runtime's kernel for narrow weights; it takes powers of two."""
_FLOAT_NOISE = 0.02
"""Share of a multiple that is the float32 rounding of a bias that was made one."""


class _Product(NamedTuple):
    """A node that multiplies with a weight, and what else goes into it.

    Attributes:
        node: The node.
        x: What it multiplies.
        bias: What it adds, or None.
        turned: Whether the weight is `(out, in)`, as in `nn.Linear`, and not `(in, out)`.
    """

    node: Any
    x: Any
    bias: Any | None
    turned: bool


def lay_out_linears(graph: Any) -> None:
    """Store weights of linear layers as `(in, out)`, and multiply with MatMul, where it gains.

    - Where inputs are integers, MatMul becomes ONNX Runtime's MatMulIntegerToFloat, which sums in
      integers and scales in float32. The bias comes by Sum, because ONNX Runtime makes a Gemm of
      MatMul and Add, and of that QGemm, which rounds the bias to a multiple of the product of the
      scales and the output to the grid of the layer behind in one go; or a product in float, if no
      layer is behind. Where there is such a layer and the bias is such a multiple, as in a model
      that was trained for it, QGemm is the faster one, and the Gemm stays.
    - Where inputs are in float and codes of a column fit into 4 bits, they become MatMulNBits,
      which multiplies with the codes as they are. 8-bit codes stay: that kernel takes many times as
      long with them unless it is allowed to round inputs. So do weights of several products, which
      ONNX Runtime would dequantize for each.
    """
    import onnx_ir

    for node in list(graph.graph):
        if node.op_type != "DequantizeLinear":
            continue
        codes, products = node.inputs[0], _products(node.outputs[0])
        stored, is_shared = codes.const_value, any(len(v.uses()) > 1 for v in node.inputs[:2])
        if stored is None or len(stored.shape) != 2 or not stored.size or not products or is_shared:
            continue
        if stored.dtype not in (onnx_ir.DataType.INT8, onnx_ir.DataType.UINT8):
            continue
        turned = {product.turned for product in products}
        block = node.attributes.get_int("block_size", 0)
        if len(turned) > 1 or (block and turned == {False}):
            continue
        rounded = [is_rounded(product.x) for product in products]
        integers = stored.numpy()
        if all(rounded) and not block:
            if all(_is_exact_in_integers(product) for product in products):
                continue
            kind = stored.dtype
        elif rounded == [False] and _fits(integers) and _is_fast_block(block):
            kind = _narrow(stored.dtype)
        else:
            continue
        _store_for_matmul(node, integers, kind, block, turned=turned == {True})
        for product in products:
            _multiply(graph, product, node.outputs[0], "Sum" if all(rounded) else "Add")


def _products(weight: Any) -> list[_Product]:
    """All that a weight is used for, if that is nothing but products."""
    found: list[_Product] = []
    for node, index in weight.uses():
        if node.op_type == "Gemm" and index == 1 and _is_plain(node):
            bias = node.inputs[2] if len(node.inputs) > 2 else None
            turned = bool(node.attributes.get_int("transB", 0))
            found.append(_Product(node, node.inputs[0], bias, turned))
        elif node.op_type == "Transpose" and [*node.attributes.get_ints("perm", ())] == [1, 0]:
            uses = node.outputs[0].uses()
            if any(user.op_type != "MatMul" or place != 1 for user, place in uses):
                return []
            found += [_Product(user, user.inputs[0], None, True) for user, _ in uses]
        else:
            return []
    return found


def _is_exact_in_integers(product: _Product) -> bool:
    """Whether a Gemm is followed by rounding and adds what its kernel for integers can add."""
    if product.node.op_type != "Gemm" or rounded_by(product.node.outputs[0]) is None:
        return False
    error = bias_error(product.node)
    return error is not None and error.of_multiple <= _FLOAT_NOISE


def _is_plain(gemm: Any) -> bool:
    """Whether it is `x @ weight.T + bias` or `x @ weight + bias`."""
    attributes = gemm.attributes
    factors = attributes.get_float("alpha", 1.0), attributes.get_float("beta", 1.0)
    return not attributes.get_int("transA", 0) and factors == (1.0, 1.0)


def _fits(integers: Any) -> bool:
    low, high = (0, 15) if integers.dtype == np.uint8 else (-8, 7)
    return bool(integers.min() >= low and integers.max() <= high)


def _is_fast_block(size: int) -> bool:
    return size == 0 or (size >= _SMALLEST_BLOCK and size & (size - 1) == 0)


def _narrow(kind: Any) -> Any:
    import onnx_ir

    is_signed = kind == onnx_ir.DataType.INT8
    return onnx_ir.DataType.INT4 if is_signed else onnx_ir.DataType.UINT4


def _store_for_matmul(dequantize: Any, integers: Any, kind: Any, block: int, turned: bool) -> None:
    """Store codes as `(in, out)` of a type, and scales along with them."""
    import onnx_ir

    scale = dequantize.inputs[1]
    scales = scale.const_value.numpy()
    if turned:
        integers, scales = integers.T, scales.T
    store(dequantize.inputs[0], integers, kind)
    dequantize.outputs[0].shape = dequantize.inputs[0].shape
    if kind in (onnx_ir.DataType.INT4, onnx_ir.DataType.UINT4):
        dequantize.resize_inputs(2)  # without the zeros of the wider type
        if not scales.ndim:
            # MatMulNBits wants one a column.
            scales = np.broadcast_to(scales, integers.shape[1])
    store(scale, scales, scale.const_value.dtype)
    if scales.ndim:
        dequantize.attributes["axis"] = onnx_ir.AttrInt64("axis", 0 if block else 1)


def _multiply(graph: Any, product: _Product, weight: Any, sum_with_bias: str) -> None:
    """MatMul, and a sum with the bias if there is one, in place of a product."""
    import onnx_ir

    old = product.node.outputs[0]
    turned = product.node.inputs[1].producer()
    nodes = [onnx_ir.node("MatMul", [product.x, weight])]
    if product.bias is not None:
        nodes.append(onnx_ir.node(sum_with_bias, [nodes[0].outputs[0], product.bias]))
    for node in nodes:
        node.outputs[0].dtype, node.outputs[0].shape = old.dtype, old.shape
    new = nodes[-1].outputs[0]
    onnx_ir.convenience.replace_nodes_and_values(
        graph.graph, product.node, [product.node], nodes, [old], [new]
    )
    if turned.op_type == "Transpose" and not turned.outputs[0].uses():
        graph.graph.remove(turned, safe=True)
