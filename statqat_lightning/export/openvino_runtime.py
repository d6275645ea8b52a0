"""`.onnx` files in OpenVINO, on the CPU."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from statqat_lightning.export.divergence import LayerOutputs, Roundings
from statqat_lightning.export.inputs import ForwardCall
from statqat_lightning.export.onnx_files import graph_of
from statqat_lightning.export.runtimes import (
    Run,
    Runtime,
    float_onnx_model,
    products_by_layer,
    with_layer_outputs,
    with_roundings,
)

_PRODUCTS = ("Convolution", "Deconvolution", "FullyConnected", "MatMul")
_INTEGERS = ("u8", "i8")


def is_installed() -> bool:
    """Whether OpenVINO can be used here."""
    return importlib.util.find_spec("openvino") is not None


def _compiled(model: str | bytes, folder: Path | None = None) -> Any:
    """A file or a graph, compiled to compute in float32 what is not in integers.

    Args:
        model: Path of a file, or a graph.
        folder: Where the weights of a graph may be.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own imports
        import openvino
    options = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        # By default it rounds the inputs of products with narrow weights to 8 bits on the way.
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
    }
    core = openvino.Core()
    if isinstance(model, str):
        return core.compile_model(model, "CPU", options)
    assert folder is not None, "a graph may have its weights in files"
    path = folder / f".{id(model)}.openvino.onnx"
    try:
        path.write_bytes(model)
        return core.compile_model(str(path), "CPU", options)
    finally:
        path.unlink(missing_ok=True)


def _fed(compiled: Any, call: ForwardCall, names: list[str]) -> list[Tensor]:
    known = {name for port in compiled.inputs for name in port.get_names()}
    arrays = [t.numpy() for t in call.to_float32().tensors()]
    feed = {n: a for n, a in zip(names, arrays, strict=True) if n in known}
    found = compiled(feed)
    return [torch.from_numpy(np.array(found[port])) for port in compiled.outputs]


def load(path: Path) -> Runtime:
    """An `.onnx` file in OpenVINO."""
    compiled = _compiled(str(path))
    graph = graph_of(path)
    entry = {e.key: e.value for e in graph.metadata_props}.get("input_names")
    names = entry.split(",") if entry else [i.name for i in graph.graph.input]
    inputs = [
        (i.name, [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim])
        for i in graph.graph.input
    ]
    fixed = inputs[0][1][0] if inputs and inputs[0][1] else None
    num_outputs = len(graph.graph.output)

    def extra(found: dict[Any, list[str]], extended: bytes, call: ForwardCall) -> dict[Any, Any]:
        values = iter(_fed(_compiled(extended, path.parent), call, names)[num_outputs:])
        added = {i.name: next(values) for i in _outputs(extended)[num_outputs:]}
        own = {
            i.name: v for i, v in zip(graph.graph.output, _fed(compiled, call, names), strict=True)
        }
        return {key: [(added | own)[name] for name in each] for key, each in found.items()}

    def layer_outputs(call: ForwardCall) -> LayerOutputs:
        return extra(*with_layer_outputs(path), call)

    def roundings(call: ForwardCall) -> Roundings:
        return extra(*with_roundings(path), call)

    return Runtime(
        f"OpenVINO {importlib.metadata.version('openvino')}",
        lambda call: _fed(compiled, call, names),
        layer_outputs,
        fixed if isinstance(fixed, int) else None,
        roundings,
        inputs,
    )


def _outputs(graph: bytes) -> list[Any]:
    import onnx

    return [*onnx.load_from_string(graph).graph.output]


def layers_in_float(path: Path) -> list[str]:
    """Quantized layers of an `.onnx` file that OpenVINO computes in float on this machine."""
    precisions: dict[str, str] = {}
    for node in _compiled(str(path)).get_runtime_model().get_ops():
        about = {k: node.get_rt_info()[k].astype(str) for k in ("layerType", "runtimePrecision")}
        if about["layerType"] in _PRODUCTS:
            for name in node.get_rt_info()["originalLayersNames"].astype(str).split(","):
                precisions[name] = about["runtimePrecision"]
    found = []
    for layer, nodes in products_by_layer(path).items():
        each = [precisions.get(name) for node in nodes for name in (node.name, node.output[0])]
        if not any(precision in _INTEGERS for precision in each):
            found.append(layer)
    return found


def float_run(part: nn.Module, call: ForwardCall) -> Run | None:
    """A float model in OpenVINO; None if it cannot be written."""
    model = float_onnx_model(part, call)
    if model is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        compiled = _compiled(model, Path(folder))
    names = [port.get_any_name() for port in compiled.inputs]
    return lambda call: _fed(compiled, call, names)
