"""The ONNX file: QuantizeLinear and DequantizeLinear around integer or float8 codes.

- Inputs: Clip to the grid where the container type is wider than the format, QuantizeLinear and
  DequantizeLinear with zero point 0, or 128 for signed integers (0 where the target wants int8);
  FP6 and FP4 by arithmetic that rounds as the format does.
- Weights: DequantizeLinear over int8, uint8, int4, uint4 or float8 initializers; FP6, FP4 and
  codebooks as indices of a table of values (in 4 bits where it has 16), and block formats as rows
  of blocks times a scale each: ONNX Runtime turns these into weights once, when it loads.
- Convolutions: as torch.onnx writes them, between their roundings; `_give_biases`,
  `_leave_slow_layers_in_float` and `onnx_graph.keep_biases` change what a runtime would get wrong
  or run slowly. What they need around them is in `targets`.
- Linear layers: see `onnx_linears.lay_out_linears`.

QuantizeLinear divides by the scale and rounds half to even, as fake quantization does.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from statqat_lightning.export.calls.dimensions import dimensions_of, open_dimensions
from statqat_lightning.export.calls.forward_call import (
    ForwardCall,
    TensorsOnly,
    first_that_runs,
    output_names,
)
from statqat_lightning.export.files.native import KEY, library_version
from statqat_lightning.export.files.on_disk import data_name
from statqat_lightning.export.files.onnx_files import replacing_onnx
from statqat_lightning.export.files.onnx_graph import (
    centre_codes,
    drop_clips,
    keep_biases,
    keep_weights,
    own_zero_points,
    pack_tables,
    pool_means,
    round_parts,
    split_clips,
    tidy,
)
from statqat_lightning.export.files.onnx_linears import lay_out_linears
from statqat_lightning.export.files.onnx_operators import FLOAT8, is_table, use_operators
from statqat_lightning.export.files.tracing import quietly, where_it_stopped
from statqat_lightning.export.freezing.folding import fold_batch_norm
from statqat_lightning.export.freezing.frozen import frozen_copy, frozen_layers, use_float_weights
from statqat_lightning.export.wording import in_short
from statqat_lightning.fake_quant.fake_quantizer import WEIGHT
from statqat_lightning.formats import (
    BlockFormat,
    CodebookFormat,
    FloatFormat,
    IntFormat,
    ShiftedFloatFormat,
    get_format,
)
from statqat_lightning.targets.base import Target
from statqat_lightning.targets.registry import TARGETS, check_target

FLOAT8_ONNX = {"fp8_e4m3": "FLOAT8E4M3FN", "fp8_e5m2": "FLOAT8E5M2"}
OPSET = 21
"""The first with 4-bit types and blocks in DequantizeLinear. ONNX Runtime 1.25 reads all of it."""
MOST_BYTES = 2**28
"""Most bytes of weights in an `.onnx` file. Protobuf ends at 2 GiB, and whoever reads or writes a
file holds it in memory several times; weights in a file of their own are streamed and mapped."""
PACKAGES = ("onnx", "onnxscript", "onnxruntime", "ml_dtypes")

_NEXT_TO_NOTHING = 1e-30
"""A bias that changes no sum, and that no optimizer takes for none."""
_CONVOLUTIONS = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)

# The optimizer computes ahead of time what is constant, and would turn codes into float weights. It
# leaves alone what has more elements than this: the smallest table has 16.
_MOST_FOLDED = 15


class ONNXExportError(RuntimeError):
    """A model that cannot be written as ONNX; the message says where it stopped."""


def require_packages() -> None:
    """Check that what ONNX export needs is installed.

    Raises:
        ModuleNotFoundError: If something is missing; the message names the extra.
    """
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ModuleNotFoundError(
            f'ONNX export needs {", ".join(missing)}: pip install "statqat-lightning[onnx]", or, '
            'in a checkout, pip install ".[onnx]". Or export without it: files=("native",).'
        )


def save_onnx(
    model: nn.Module,
    path: str | Path,
    example: Any,
    *,
    dynamic: Any = None,
    remarks: Sequence[str] = (),
    target: str = "onnxruntime",
) -> None:
    """Write a quantized model to an `.onnx` file with a dynamic batch dimension.

    The file computes in float32, and appears under its name when it is complete. BatchNorm is
    folded into the layers before it where that is exact, see `fold_batch_norm`. A model
    with more than `MOST_BYTES` of weights has them in a second file beside it,
    `{name}.{digits}.data`, see `replacing_onnx`.

    Args:
        model: A frozen model, or a model with quantizers, which is frozen first.
        path: The file.
        example: Input of one forward call: a tensor, a tuple of positional or a mapping of keyword
            arguments, or a `ForwardCall`. The first dimension of tensors is the batch, if all
            agree.
        dynamic: Which other dimensions are open, see `export_model`; None for none.
        remarks: What is to be known of the training, for the file's metadata.
        target: The runtime whose kernels the graph is laid out for. Others run it, too; but
            ONNX Runtime 1.32 refuses some graphs with int8 inputs, which `openvino` has.

    Raises:
        ValueError: If `dynamic` names no input or no dimension, or there is no such target.
        ModuleNotFoundError: If the extra `onnx` is not installed.
        ONNXExportError: If the forward cannot be traced or translated.
        OSError: If the file cannot be written.
    """
    require_packages()
    check_target(target)
    frozen = frozen_copy(model)
    frozen = frozen.cpu().float()
    _refuse_what_has_no_operators(frozen)
    # A dimension of size 1 would be taken for a constant.
    call = ForwardCall.of(example).copy().to_float32()
    call = first_that_runs(frozen, call.with_batch(least=2), call)
    names = call.names(frozen)
    opened = open_dimensions(call, names, dimensions_of(dynamic, call, frozen))
    outputs = call.run(frozen)
    folded = fold_batch_norm(frozen, call)
    frozen = folded.model
    if TARGETS[target].needs_biases:
        _give_biases(frozen)
    _leave_slow_layers_in_float(frozen, TARGETS[target])
    use_operators(frozen)
    metadata: dict[str, Any] = {"library_version": library_version(), "folded": folded.axes}
    if remarks:
        metadata["remarks"] = [*remarks]
    traced = TensorsOnly(frozen, call).eval()
    graph = _translate(traced, call, opened, names, output_names(outputs))
    is_large = _bytes_of(graph) >= MOST_BYTES
    del frozen, folded, traced
    if is_large:
        gc.collect()  # codes that are laid out anew leave memory: traces go round in circles
    _lay_out(graph, target)
    tidy(graph, opened)
    graph.producer_name = "statqat_lightning"
    graph.producer_version = library_version()
    graph.metadata_props[KEY] = json.dumps(metadata)
    graph.metadata_props["input_names"] = ",".join(names)
    with replacing_onnx(Path(path)) as temporary:
        _write(graph, temporary, is_large)
    del graph
    if is_large:
        gc.collect()


@torch.no_grad()
def _give_biases(frozen: nn.Module) -> None:
    """Give convolutions a bias that is not zero, in place, where they have none."""
    for _, layer in frozen_layers(frozen):
        bias = layer._parameters.get("bias")
        if isinstance(layer, _CONVOLUTIONS) and (bias is None or not bias.any()):
            channels: Any = layer.out_channels
            layer.register_parameter(
                "bias", nn.Parameter(torch.full((channels,), _NEXT_TO_NOTHING), False)
            )


@torch.no_grad()
def _leave_slow_layers_in_float(frozen: nn.Module, target: Target) -> None:
    """Let convolutions that are slower in integers hold floats: codes would be taken for integers.

    Those of fewer bits keep their codes, which are there for the file's size, and so do all where
    nothing else is rounded.
    """
    layers = [layer for _, layer in frozen_layers(frozen)]
    if not any(layer.frozen_activations for layer in layers):
        return
    for layer in layers:
        weight = layer.frozen_weights.get(WEIGHT)
        if isinstance(layer, _CONVOLUTIONS) and weight is not None:
            is_int8 = isinstance(weight.fmt, IntFormat) and weight.fmt.bits == 8
            if is_int8 and target.is_slow(layer):
                use_float_weights(layer)


def _bytes_of(graph: Any) -> int:
    values = (value.const_value for value in graph.graph.initializers.values())
    return sum(value.nbytes for value in values if value is not None)


def _write(graph: Any, path: Path, is_large: bool) -> None:
    """Write a graph, with its weights in a file of their own if it is large."""
    import onnx
    import onnx_ir

    if not is_large:
        onnx_ir.save(graph, path)
    else:
        onnx_ir.save(graph, path, external_data=data_name(path), size_threshold_bytes=256)
    onnx.checker.check_model(path)


def _refuse_what_has_no_operators(frozen: nn.Module) -> None:
    for name, layer in frozen_layers(frozen):
        for role, activation in layer.frozen_activations.items():
            if isinstance(activation.fmt, CodebookFormat):
                raise ONNXExportError(
                    f"{name}/{role}: got format {activation.fmt.name!r}; expected integers or "
                    "floats, because ONNX has no operator that rounds to levels. The native file "
                    "holds them."
                )


def _translate(
    model: nn.Module,
    call: ForwardCall,
    opened: list[dict[int, str]],
    input_names: list[str],
    output_names: list[str],
) -> Any:
    import onnxscript.optimizer

    tensors = tuple(call.tensors())
    automatic = torch.export.Dim.AUTO
    shapes = tuple(dict.fromkeys(titles, automatic) if titles else None for titles in opened)
    try:
        with quietly(), torch.no_grad():
            program = torch.export.export(model, tensors, dynamic_shapes=(shapes,), strict=False)
            translated = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                input_names=input_names,
                output_names=output_names,
                optimize=False,
                verbose=False,
                custom_translation_table={
                    torch.ops.statqat.round_to_grid.default: _translate_input,
                    torch.ops.statqat.dequantize_weight.default: _translate_weight,
                },
            )
            assert translated is not None
            return onnxscript.optimizer.optimize(translated.model, input_size_limit=_MOST_FOLDED)
    except Exception as error:
        raise ONNXExportError(
            f"Stopped{where_it_stopped(error)}: {in_short(error)}\n"
            "This forward cannot be exported to ONNX as it is. If only a part of "
            "the model is needed, name it (module=...); the native file does not need tracing."
        ) from error


def _lay_out(graph: Any, target: str) -> None:
    """Turn a graph into what the kernels of a target want, in place."""
    drop_clips(graph)
    if TARGETS[target].signed_codes:
        centre_codes(graph)
    if target == "onnxruntime":
        round_parts(graph)
        pool_means(graph)
        split_clips(graph)
        keep_biases(graph)
        lay_out_linears(graph)
        keep_weights(graph)
    pack_tables(graph)
    own_zero_points(graph)


def _translate_input(x: Any, scale: Any, low: float, high: float, format: str) -> Any:
    """QuantizeLinear and DequantizeLinear, or arithmetic where runtimes lack the type."""
    import onnx

    op, fmt = _operators(), get_format(format)
    if isinstance(fmt, ShiftedFloatFormat):
        unit, shift = high / fmt.max, op.Mul(scale, _constant(op, fmt.zero_point))
        ends = unit * fmt.element.min, unit * fmt.element.max
        x = op.Sub(op.Clip(x, _constant(op, 0.0)), shift)
        return op.Add(_translate_input(x, scale, *ends, fmt.element.name), shift)
    if isinstance(fmt, IntFormat):
        middle = 128 if fmt.signed else fmt.zero_point
        lowest, highest = -float(middle), 255.0 - middle
        # Signed codes are shifted: ONNX Runtime turns int8 inputs into uint8 on x86, and 1.32 makes
        # graphs of them that it refuses itself where a Transpose follows.
        kind = onnx.TensorProto.UINT8
    elif format in FLOAT8:
        # The type saturates by itself. But ONNX Runtime 1.32 takes its zero point of 0 for the
        # lower end of the range and removes a ReLU in front, so something must stand between.
        lowest, highest = -math.inf, fmt.max
        kind, middle = getattr(onnx.TensorProto, FLOAT8_ONNX[format]), 0
    else:
        assert isinstance(fmt, FloatFormat)
        return op.Mul(_round_to_float(op, op.Div(x, scale), fmt), scale)
    bounds = low if fmt.min > lowest else None, high if fmt.max < highest else None
    if bounds != (None, None):
        x = op.Clip(x, *(None if bound is None else _constant(op, bound) for bound in bounds))
    zero = op.Constant(value=onnx.helper.make_tensor("zero_point", kind, [], [middle]))
    return op.DequantizeLinear(op.QuantizeLinear(x, scale, zero), scale, zero)


def _round_to_float(op: Any, x: Any, fmt: FloatFormat) -> Any:
    """`fmt.round`: count in steps of the binade that `x` lies in; Round goes half to even."""
    x = op.Clip(x, _constant(op, fmt.min), _constant(op, fmt.max))
    magnitude = op.Abs(x)
    spacing = 2.0 ** (fmt.min_exponent - fmt.mantissa_bits)
    step, exponent = _constant(op, spacing), fmt.min_exponent + 1
    while 2.0**exponent <= fmt.max:
        spacing *= 2
        reached = op.GreaterOrEqual(magnitude, _constant(op, 2.0**exponent))
        step = op.Where(reached, _constant(op, spacing), step)
        exponent += 1
    return op.Mul(op.Round(op.Div(x, step)), step)


def _translate_weight(
    codes: Any, scale: Any, format: str, axis: int, group: int, shape: list[int]
) -> Any:
    """DequantizeLinear, or a table of values where runtimes lack the type."""
    import onnx

    op, fmt = _operators(), get_format(format)
    if is_table(fmt):
        values = fmt.code_values.to(torch.float32)
        table = onnx.helper.make_tensor(
            "table", onnx.TensorProto.FLOAT, [len(values)], values.tolist()
        )
        indices = op.Cast(codes, to=onnx.TensorProto.INT32)
        return _scaled(op, op.Gather(op.Constant(value=table), indices), scale, axis, group, shape)
    if isinstance(fmt, BlockFormat):
        # ONNX Runtime dequantizes float8 at each forward anew; this it computes when it loads.
        values = op.Cast(codes, to=onnx.TensorProto.FLOAT)
        return _scaled(op, values, scale, axis, group, shape)
    if group:
        weight = op.DequantizeLinear(codes, scale, axis=axis, block_size=group)
        return _reshaped(op, weight, shape) if [*codes.shape] != shape else weight
    if axis >= 0 and isinstance(fmt, IntFormat):
        # ONNX Runtime before 1.28 fuses Gemm, and then misses zero points in the scales' shape.
        kind = onnx.TensorProto.INT8 if fmt.is_signed else onnx.TensorProto.UINT8
        size = shape[axis]
        zeros = onnx.helper.make_tensor("zero_points", kind, [size], [0] * size)
        return op.DequantizeLinear(codes, scale, op.Constant(value=zeros), axis=axis)
    if axis >= 0:
        return op.DequantizeLinear(codes, scale, axis=axis)
    return op.DequantizeLinear(codes, scale)


def _scaled(op: Any, values: Any, scale: Any, axis: int, group: int, shape: list[int]) -> Any:
    """Values of codes times scale."""
    if group:
        groups = [shape[0], -1, group]
        product = op.Mul(_reshaped(op, values, groups), op.Unsqueeze(scale, _integers(op, [-1])))
        return _reshaped(op, product, shape)
    if axis >= 0:
        ones = [1] * (len(shape) - 1 - axis)
        scale = _reshaped(op, scale, [*([1] * axis), -1, *ones])
    return op.Mul(values, scale)


def _operators() -> Any:
    from onnxscript import opset21

    return opset21


def _constant(op: Any, value: float) -> Any:
    return op.Constant(value_float=value)


def _integers(op: Any, values: list[int]) -> Any:
    return op.Constant(value_ints=values)


def _reshaped(op: Any, x: Any, shape: list[int]) -> Any:
    return op.Reshape(x, _integers(op, shape))
