"""`.onnx` files in OpenVINO, on the CPU."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from statqat_lightning.export.calls.forward_call import ForwardCall
from statqat_lightning.export.files.onnx_files import graph_of
from statqat_lightning.export.proof.divergence import LayerOutputs, Roundings
from statqat_lightning.export.proof.onnx_runtime import (
    float_onnx_model,
    products_by_layer,
    with_layer_outputs,
    with_roundings,
)
from statqat_lightning.export.proof.runtimes import Run, Runtime

_PRODUCTS = ("Convolution", "Deconvolution", "FullyConnected", "MatMul")
_INTEGERS = ("u8", "i8")


def is_installed() -> bool:
    """Whether OpenVINO can be used here."""
    return importlib.util.find_spec("openvino") is not None


def compiled(model: Any, folder: Path | None = None) -> Any:
    """A model, compiled to compute in float32 what is not in integers, on torch's threads.

    Args:
        model: Path of a file, an ONNX graph as bytes, or a model of OpenVINO.
        folder: Where the weights of a graph may be.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own imports
        import openvino
    if isinstance(model, bytes):
        assert folder is not None, "a graph may have its weights in files"
        path = folder / f".{id(model)}.openvino.onnx"
        try:
            path.write_bytes(model)
            return compiled(path)
        finally:
            path.unlink(missing_ok=True)
    options = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        # By default it rounds the inputs of products with narrow weights to 8 bits on the way.
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
    }
    return openvino.Core().compile_model(model, "CPU", options)


class Kernel(NamedTuple):
    """One step of a compiled model.

    Attributes:
        kind: Its type, such as Convolution.
        precision: What it computes in, such as u8.
        names: The operations of the original graph that it is.
    """

    kind: str
    precision: str
    names: list[str]


def kernels(model: Any) -> list[Kernel]:
    """The steps of a compiled model."""
    found = []
    for node in model.get_runtime_model().get_ops():
        about = node.get_rt_info()
        keys = ("layerType", "runtimePrecision", "originalLayersNames")
        kind, precision, names = (about[key].astype(str) for key in keys)
        found.append(Kernel(kind, precision, names.split(",")))
    return found


def _fed(model: Any, call: ForwardCall, names: list[str]) -> list[Tensor]:
    known = {name for port in model.inputs for name in port.get_names()}
    arrays = [t.numpy() for t in call.to_float32().tensors()]
    feed = {n: a for n, a in zip(names, arrays, strict=True) if n in known}
    found = model(feed)
    return [torch.from_numpy(np.array(found[port])) for port in model.outputs]


def load(path: Path) -> Runtime:
    """An `.onnx` file in OpenVINO."""
    import onnx

    model = compiled(path)
    graph = graph_of(path)
    entry = {e.key: e.value for e in graph.metadata_props}.get("input_names")
    names = entry.split(",") if entry else [i.name for i in graph.graph.input]
    inputs = [
        (i.name, [d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim])
        for i in graph.graph.input
    ]
    fixed = inputs[0][1][0] if inputs and inputs[0][1] else None

    def values(found: Mapping[Any, list[str]], extended: bytes, call: ForwardCall) -> Any:
        outputs = [o.name for o in onnx.load_from_string(extended).graph.output]
        given = _fed(compiled(extended, path.parent), call, names)
        known = dict(zip(outputs, given, strict=True))
        return {key: [known[name] for name in each] for key, each in found.items()}

    def layer_outputs(call: ForwardCall) -> LayerOutputs:
        found: LayerOutputs = values(*with_layer_outputs(path), call)
        return found

    def roundings(call: ForwardCall) -> Roundings:
        found: Roundings = values(*with_roundings(path), call)
        return found

    return Runtime(
        f"OpenVINO {importlib.metadata.version('openvino')}",
        lambda call: _fed(model, call, names),
        layer_outputs,
        fixed if isinstance(fixed, int) else None,
        roundings,
        inputs,
        "openvino",
        lambda: layers_in_float(path),
    )


def layers_in_float(path: Path) -> list[str]:
    """Quantized layers of an `.onnx` file that OpenVINO computes in float on this machine."""
    in_integers = [
        # `node/DequantizationMultiply`
        {part for name in kernel.names for part in (name, name.rpartition("/")[0])}
        for kernel in kernels(compiled(path))
        if kernel.kind in _PRODUCTS and kernel.precision in _INTEGERS
    ]
    products = {
        layer: {name for node in nodes for name in (node.name, node.output[0])}
        for layer, nodes in products_by_layer(path).items()
    }
    known = set[str]().union(*in_integers)
    rest = [layer for layer, names in products.items() if not names & known]
    # A product that takes in what multiplies its channels has no name of its own left.
    of_layers = set[str]().union(*products.values())
    nameless = sum(not names & of_layers for names in in_integers)
    return [] if nameless >= len(rest) else rest


def float_run(part: nn.Module, call: ForwardCall) -> Run | None:
    """A float model in OpenVINO; None if it cannot be written."""
    model = float_onnx_model(part, call)
    if model is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        plain = compiled(model, Path(folder))
    names = [port.get_any_name() for port in plain.inputs]
    return lambda call: _fed(plain, call, names)
