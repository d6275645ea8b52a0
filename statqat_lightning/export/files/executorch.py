"""The `.pte` file: the frozen model for ExecuTorch, its layers in integer kernels of XNNPACK.

Roundings are `quantized_decomposed` operators around int8 codes, which XNNPACK's partitioner knows;
what is never negative has the zero point -128. The file takes batches of one size.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from statqat_lightning.export.calls.forward_call import ForwardCall, TensorsOnly
from statqat_lightning.export.files.on_disk import replacing
from statqat_lightning.export.files.tracing import ExportError, quietly, where_it_stopped
from statqat_lightning.export.freezing.folding import fold_batch_norm
from statqat_lightning.export.freezing.frozen import frozen_copy, frozen_layers, use_float_weights
from statqat_lightning.export.freezing.frozen_layer import (
    FrozenLayer,
    FrozenTensor,
    codes_name,
    scale_name,
)
from statqat_lightning.export.wording import in_short
from statqat_lightning.formats import IntFormat
from statqat_lightning.numerics.granularity import PerChannel, PerTensor

_LOWEST, _HIGHEST = -128, 127
ABOUT = "statqat_lightning"
"""Name of the method of a file that says what is to be known of it, as JSON."""
_KEEPS_GRID = (
    *("view", "reshape", "flatten", "permute", "transpose", "squeeze", "unsqueeze", "clone"),
    *("contiguous", "max_pool2d", "relu", "slice", "select", "expand", "cat"),
)
"""Operators whose results lie on the grid of what they are given, if that is one."""
_PARTING = ("chunk", "split", "split_with_sizes", "unbind", "tensor_split")
"""Operators that give parts of what they are given."""
_IN_INTEGERS = (
    *("linear", "conv1d", "conv2d", "conv_transpose2d", "add", "mul", "cat", "mean"),
    *("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d"),
)
"""Operators that XNNPACK has kernels for integers of."""
_IDENTITIES = ("dropout", "feature_dropout", "alpha_dropout")
"""Operators that do nothing in evaluation."""


def require_executorch() -> None:
    """Check that ExecuTorch is installed.

    Raises:
        ModuleNotFoundError: If it is not; the message names the extra.
    """
    if importlib.util.find_spec("executorch") is None:
        raise ModuleNotFoundError(
            'A .pte file needs ExecuTorch: pip install "statqat-lightning[executorch]", or, in a '
            'checkout, pip install ".[executorch]".'
        )


def save_executorch(
    model: nn.Module, path: str | Path, example: Any, *, remarks: Sequence[str] = ()
) -> None:
    """Write a quantized model to a `.pte` file for batches of one.

    The file computes in float32 what is not in integers, and appears under its name when it is
    complete. BatchNorm is folded into the layers before it where that is exact. Layers that XNNPACK
    has no integer kernel for, because nothing rounds their output for instance, are written with
    float weights; `StatQATCallback(target="executorch")` trains a model without such layers.

    Args:
        model: A frozen model, or a model with quantizers, which is frozen first.
        path: The file.
        example: Input of one forward call: a tensor, a tuple of positional or a mapping of keyword
            arguments, or a `ForwardCall`. Sizes other than the batch are fixed as they are there.
        remarks: What is to be known of the training, for the record.

    Raises:
        ModuleNotFoundError: If the extra `executorch` is not installed.
        ExportError: If the forward cannot be traced or lowered.
        OSError: If the file cannot be written.
    """
    require_executorch()
    frozen = frozen_copy(model)
    frozen = frozen.cpu().float().eval()
    call = ForwardCall.of(example).copy().to_float32().with_batch(1)
    frozen = fold_batch_norm(frozen, call).model
    _decompose(frozen)
    in_float: list[str] = []
    try:
        while True:
            lowered, rest = _lowered(frozen, call, {"in_float": in_float, "remarks": [*remarks]})
            if not rest:
                break
            in_float += rest
            for name in rest:
                use_float_weights(frozen.get_submodule(name))
        with quietly():
            data = lowered.to_executorch().buffer
    except Exception as error:
        raise ExportError(
            f"Stopped{where_it_stopped(error)}: {in_short(error)}\n"
            "This forward cannot be exported to ExecuTorch as it is. If only a part of the model "
            "is needed, name it (module=...); the native file does not need tracing."
        ) from error
    with replacing(Path(path)) as temporary:
        temporary.write_bytes(data)


class DecomposedLayer(FrozenLayer):
    """A frozen layer whose roundings are `quantized_decomposed` operators."""

    decomposed: dict[str, tuple[float, int]]
    """Scale and zero point of inputs and output, by role."""
    only_scales: dict[str, float]
    """The scale of each weight that has one for all its channels: a trace must not read it."""

    def dequantized_weight(self, role: str) -> Tensor:
        codes, scale = self.get_buffer(codes_name(role)), self.get_buffer(scale_name(role))
        operators = torch.ops.quantized_decomposed
        ends = (_LOWEST, _HIGHEST, torch.int8)
        weight: Tensor
        if scale.dim() == 0:
            weight = operators.dequantize_per_tensor(codes, self.only_scales[role], 0, *ends)
        else:
            zeros = self.get_buffer(f"{role}_zero_points")
            axis = self.frozen_weights[role].granularity.axis  # type: ignore[attr-defined]
            weight = operators.dequantize_per_channel(codes, scale, zeros, axis, *ends)
        return weight

    def rounded(self, role: str, x: Tensor) -> Tensor:
        if role not in self.decomposed:
            return super().rounded(role, x)
        return _rounded(x, *self.decomposed[role])


def _rounded(x: Tensor, scale: float, zero_point: int) -> Tensor:
    operators, ends = torch.ops.quantized_decomposed, (_LOWEST, _HIGHEST, torch.int8)
    codes = operators.quantize_per_tensor(x, scale, zero_point, *ends)
    rounded: Tensor = operators.dequantize_per_tensor(codes, scale, zero_point, *ends)
    return rounded


_CLASSES: dict[type[Any], type[Any]] = {}


@torch.no_grad()
def _decompose(frozen: nn.Module) -> None:
    """Make layers compute by the operators that the partitioner knows, in place."""
    with quietly():
        importlib.import_module("executorch.exir")  # brings these operators along

    for _, layer in frozen_layers(frozen):
        own = type(layer)
        if own not in _CLASSES:
            _CLASSES[own] = type(f"Decomposed{own.__name__}", (DecomposedLayer, own), {})
        changed: Any = layer
        changed.decomposed = {
            role: (
                float(layer.get_buffer(scale_name(role))),
                0 if tensor.fmt.signed else tensor.fmt.zero_point + _LOWEST,
            )
            for role, tensor in layer.frozen_activations.items()
            if isinstance(tensor.fmt, IntFormat) and tensor.fmt.bits == 8
        }
        if not all(_has_kernels(tensor) for tensor in layer.frozen_weights.values()):
            use_float_weights(changed)
        changed.__class__ = _CLASSES[own]
        changed.only_scales = {}
        for role, tensor in layer.frozen_weights.items():
            codes = tensor.fmt.decode(layer.get_buffer(codes_name(role))).to(torch.int8)
            scale = layer.get_buffer(scale_name(role))
            scale = scale.flatten() if isinstance(tensor.granularity, PerChannel) else scale
            layer.register_buffer(codes_name(role), codes)
            layer.register_buffer(scale_name(role), scale.contiguous())
            if scale.dim() == 0:
                changed.only_scales[role] = float(scale)
            else:
                zeros = torch.zeros(len(scale), dtype=torch.int64)
                layer.register_buffer(f"{role}_zero_points", zeros)


def _has_kernels(tensor: FrozenTensor) -> bool:
    is_integer = isinstance(tensor.fmt, IntFormat) and tensor.fmt.is_signed and tensor.fmt.bits <= 8
    return is_integer and isinstance(tensor.granularity, PerChannel | PerTensor)


def _lowered(frozen: nn.Module, call: ForwardCall, about: dict[str, Any]) -> tuple[Any, list[str]]:
    """A model with XNNPACK's delegates, and the quantized layers that are in none of them."""
    with quietly():
        inputs = tuple(call.tensors())
        traced = TensorsOnly(frozen, call).eval()
        with torch.no_grad():
            module = torch.export.export(traced, inputs, strict=False).module()
            _round_again(module)
            program = torch.export.export(module, inputs, strict=False)
        lowered = with_delegates(program, {ABOUT: json.dumps(about)})
    exported = lowered.exported_program()
    names = exported.graph_signature.inputs_to_buffers
    buffers = {names.get(node.name) for node in exported.graph.nodes if node.op == "placeholder"}
    codes = [name for name in buffers if name is not None and name.endswith("_codes")]
    layers = {name.rpartition(".")[0].removeprefix("model").removeprefix(".") for name in codes}
    return lowered, sorted(layers)


def with_delegates(
    program: torch.export.ExportedProgram, methods: dict[str, str] | None = None
) -> Any:
    """A program in which XNNPACK computes what it takes, with methods that return constants."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    return to_edge_transform_and_lower(
        program, partitioner=[XnnpackPartitioner()], constant_methods=methods
    )


def _round_again(module: Any) -> None:
    """Round what an operator has left on its grid once more, which changes nothing.

    The partitioner takes what follows in integers only if it reads what was rounded just before.
    """
    operators = torch.ops.quantized_decomposed
    dequantize = operators.dequantize_per_tensor.default
    grids: dict[Any, tuple[Any, ...]] = {}
    for node in list(module.graph.nodes):
        if node.op == "call_function" and _kind(node) in _IDENTITIES:
            node.replace_all_uses_with(node.args[0])
            module.graph.erase_node(node)
    parts: dict[Any, tuple[Any, ...]] = {}
    for node in list(module.graph.nodes):
        if node.op != "call_function":
            continue
        if node.target is dequantize:
            grids[node] = node.args[1:]
            continue
        given = {grids.get(arg, parts.get(arg)) for arg in node.all_input_nodes}
        grid = given.pop() if len(given) == 1 else None
        if grid is None:
            continue
        if _kind(node) in _PARTING:
            parts[node] = grid
            continue
        keeps = _kind(node) in (*_KEEPS_GRID, "getitem")
        if not (keeps and _leads_to_integers(node)):
            continue
        users = list(node.users)
        with module.graph.inserting_after(node):
            codes = module.graph.call_function(operators.quantize_per_tensor.default, (node, *grid))
        with module.graph.inserting_after(codes):
            again = module.graph.call_function(dequantize, (codes, *grid))
        for user in users:
            user.replace_input_with(node, again)
        grids[again] = grid
    # Each reader gets what was rounded from an operator of its own: of one that several share, the
    # partitioner makes delegates that need one another.
    for node in grids:
        for user in list(node.users)[1:]:
            with module.graph.inserting_before(user):
                own = module.graph.call_function(dequantize, node.args)
            user.replace_input_with(node, own)
    module.graph.lint()
    module.recompile()


def _kind(node: Any) -> str:
    """The name of an operator whatever its form: `view` for `view_copy.default`."""
    name: str = getattr(node.target, "__name__", "").partition(".")[0]
    return name.removesuffix("_copy").rstrip("_")


def _leads_to_integers(node: Any) -> bool:
    """Whether what has a kernel for integers reads a result, or what leaves it on its grid."""
    return any(
        _kind(user) in _IN_INTEGERS
        or (_kind(user) in (*_KEEPS_GRID, *_PARTING, "getitem") and _leads_to_integers(user))
        for user in node.users
    )
