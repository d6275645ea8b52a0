"""ONNX files in ONNX Runtime: sessions, outputs of layers, roundings, what is computed in float."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from statqat_lightning.export.calls.forward_call import ForwardCall, TensorsOnly
from statqat_lightning.export.files.on_disk import data_beside
from statqat_lightning.export.files.onnx_files import graph_of
from statqat_lightning.export.files.onnx_graph import PARTS
from statqat_lightning.export.files.tracing import quietly, trace
from statqat_lightning.export.freezing.frozen_layer import weight_key
from statqat_lightning.export.freezing.light_copy import light_copy
from statqat_lightning.export.proof.divergence import LayerOutputs, Roundings
from statqat_lightning.export.proof.runtimes import Run, Runtime

_Key = TypeVar("_Key")
_INTEGER_KERNELS = (
    *("QLinearConv", "QLinearMatMul", "QGemm", "MatMulInteger", "MatMulIntegerToFloat"),
    *("DynamicQuantizeMatMul", "ConvInteger", "MatMulNBits", "QAttention"),
)
_ON_THE_WAY = {
    *("DequantizeLinear", "Gather", "Cast", "Mul", "Reshape", "Transpose", "Unsqueeze", "Squeeze"),
    *("Identity", "Flatten", "Slice", "Split"),
}
_PRODUCTS = {"Conv", "ConvTranspose", "Gemm", "MatMul"}


def load_onnx(path: Path, optimize: bool = True) -> Runtime:
    """An `.onnx` file in ONNX Runtime on the CPU.

    Args:
        path: The file.
        optimize: Whether with the runtime's own optimizations, or operator by operator as the file
            says: what is written for another runtime need not be to its taste.
    """
    sessions = _Sessions(path, optimize)
    session = sessions.plain()
    dimensions = session.get_inputs()[0].shape if session.get_inputs() else []
    fixed = dimensions[0] if dimensions and isinstance(dimensions[0], int) else None

    def layer_outputs(call: ForwardCall) -> LayerOutputs:
        names, session = sessions.extended(with_layer_outputs)
        values = _fed(session, call, [n for layer in names.values() for n in layer])
        given = iter(values)
        return {layer: [next(given) for _ in layer_names] for layer, layer_names in names.items()}

    def roundings(call: ForwardCall) -> Roundings:
        names, session = sessions.extended(with_roundings)
        values = iter(_fed(session, call, [n for each in names.values() for n in each]))
        return {place: [next(values) for _ in each] for place, each in names.items()}

    inputs = [(i.name, [*i.shape]) for i in session.get_inputs()]
    return Runtime(
        f"ONNX Runtime {importlib.metadata.version('onnxruntime')}"
        f"{'' if optimize else ' without its optimizations'}",
        lambda call: _fed(sessions.plain(), call),
        layer_outputs,
        fixed,
        roundings,
        inputs,
        "onnxruntime",
        lambda: layers_in_float(path),
    )


class _Sessions:
    """Sessions of a file and of its graph with more outputs: one at a time if it is large."""

    def __init__(self, path: Path, optimize: bool) -> None:
        self._path, self._optimize = path, optimize
        self._is_large = bool(data_beside(path))
        self._plain: Any = None

    def plain(self) -> Any:
        """The session of the file as it is."""
        if self._plain is None:
            self._plain = _session(str(self._path), optimize=self._optimize)
        return self._plain

    def extended(
        self, extend: Callable[[Path], tuple[dict[_Key, list[str]], bytes]]
    ) -> tuple[dict[_Key, list[str]], Any]:
        """Names of further outputs, and a session that has them."""
        if self._is_large:
            self._plain = None
        names, graph = extend(self._path)
        return names, _session(graph, folder=self._path.parent, optimize=self._optimize)


def onnx_session(path: str | Path, optimized: Path | None = None) -> Any:
    """An ONNX Runtime session that computes what the file says.

    By default, ONNX Runtime rounds the inputs of products with narrow weights to 8 bits on the way
    (`session.qdq_matmulnbits_accuracy_level=4`); here it does not. And on x86 processors without
    VNNI it adds up products of uint8 and int8 in 16 bits, where they saturate: a small convolution
    was off by 25 steps of its output. `session.x64quantprecision=1` has it multiply uint8 with
    uint8, whose sums do not saturate, at half the speed where VNNI is there.

    Args:
        path: The file.
        optimized: Where to write the graph that it runs in the end.
    """
    return _session(str(path), optimized)


def _session(
    model: str | bytes,
    optimized: Path | None = None,
    folder: Path | None = None,
    optimize: bool = True,
) -> Any:
    """A session of a file, or of a graph whose weights may be in files of a folder."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4  # what goes wrong is raised
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    if _sums_in_16_bits():
        options.add_session_config_entry("session.x64quantprecision", "1")
    if folder is not None:
        entry = "session.model_external_initializers_file_folder_path"
        options.add_session_config_entry(entry, str(folder.resolve()))
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
        entry = "session.optimized_model_external_initializers_file_name"
        options.add_session_config_entry(entry, f"{optimized.name}.data")
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def _sums_in_16_bits() -> bool:
    """Whether this is an x86 processor without VNNI."""
    is_x86 = platform.machine().lower() in ("x86_64", "amd64", "x86", "i386", "i686")
    return is_x86 and not torch.cpu._is_vnni_supported()


def _fed(session: Any, call: ForwardCall, outputs: list[str] | None = None) -> list[Tensor]:
    # The exporter drops inputs that no output depends on.
    known = {i.name for i in session.get_inputs()}
    arrays = [t.numpy() for t in call.to_float32().tensors()]
    entry = session.get_modelmeta().custom_metadata_map.get("input_names")
    names = entry.split(",") if entry else [i.name for i in session.get_inputs()]
    feed = {n: a for n, a in zip(names, arrays, strict=True) if n in known}
    return [torch.from_numpy(np.array(value)) for value in session.run(outputs, feed)]


def layers_in_float(path: Path) -> list[str]:
    """Quantized layers of an `.onnx` file that ONNX Runtime computes in float on this machine.

    The runtime fuses what it has integer kernels for when it loads a file; this is what it leaves.
    """
    with tempfile.TemporaryDirectory() as folder:
        optimized = Path(folder, "optimized.onnx")
        _session(str(path), optimized)
        nodes = graph_of(optimized).graph.node
    kernels = [node for node in nodes if node.op_type in _INTEGER_KERNELS]
    named = {n.partition("_codes")[0] for node in kernels for n in node.input if "_codes" in n}
    own = [i.name for i in graph_of(path).graph.initializer]
    layers = [name.removesuffix("_codes") for name in own if name.endswith("_codes")]
    rest = [name for name in layers if name not in named]
    # A weight that was turned on the way has another name then, which tells how many those are.
    nameless = sum(not any("_codes" in name for name in node.input) for node in kernels)
    if nameless >= len(rest):
        return []
    return [name.rpartition(".")[0].removeprefix("model").removeprefix(".") for name in rest]


def products_by_layer(path: Path) -> dict[str, list[Any]]:
    """The products of an `.onnx` file that its quantized layers are, by layer.

    A layer is known by the names of its tensors: `model.{layer}.weight_codes` leads, through what
    dequantizes it, to the product.
    """
    return {_layer_name(p): nodes for p, nodes in _products_by_prefix(graph_of(path)).items()}


def _layer_name(prefix: str) -> str:
    return prefix.removeprefix("model").removeprefix(".")


def _products_by_prefix(model: Any) -> dict[str, list[Any]]:
    consumers = _consumers(model)
    found: dict[str, list[Any]] = {}
    for initializer in model.graph.initializer:
        prefix, _, tensor = initializer.name.rpartition(".")
        if tensor.endswith("_codes"):
            found.setdefault(prefix, []).extend(_products(initializer.name, consumers))
    return found


def _consumers(model: Any) -> dict[str, list[Any]]:
    consumers: dict[str, list[Any]] = {}
    for node in model.graph.node:
        for name in node.input:
            consumers.setdefault(name, []).append(node)
    return consumers


def with_layer_outputs(path: Path) -> tuple[dict[str, list[str]], bytes]:
    """The graph with the outputs of its layers added to its own, and what they are called.

    A layer is known as in `products_by_layer`, and by `model.{layer}.bias`, which leads to its end.
    """
    import onnx

    model = graph_of(path)
    consumers = _consumers(model)
    found: dict[str, list[str]] = {}
    for prefix, nodes in _products_by_prefix(model).items():
        for node in nodes:
            output = node.output[0]
            following = consumers.get(output, [])
            if len(following) == 1 and f"{prefix}.bias" in following[0].input:
                output = following[0].output[0]
            found.setdefault(_layer_name(prefix), []).append(output)
    known = {value.name for value in model.graph.output}
    for names in found.values():
        for name in names:
            if name not in known:
                known.add(name)
                model.graph.output.append(onnx.helper.make_empty_tensor_value_info(name))
    return found, model.SerializeToString()


def with_roundings(path: Path) -> tuple[dict[tuple[str, str], list[str]], bytes]:
    """The graph with its rounded tensors added to its outputs, and what they are called.

    They are known by the names of their scales: `model.{layer}.{role}_scale`. Unlike the outputs of
    layers, they keep nothing from being fused.
    """
    import onnx

    model = graph_of(path)
    consumers = _consumers(model)
    found: dict[tuple[str, str], list[str]] = {}
    known = {value.name for value in model.graph.output}
    for quantize in model.graph.node:
        if quantize.op_type != "QuantizeLinear" or quantize.input[1].endswith(PARTS):
            continue
        layer, _, scale = quantize.input[1].rpartition(".")
        place = _layer_name(layer), scale.removesuffix("_scale")
        for node in consumers.get(quantize.output[0], [])[:1]:
            found.setdefault(place, []).append(node.output[0])
            if node.output[0] not in known:
                known.add(node.output[0])
                output = onnx.helper.make_empty_tensor_value_info(node.output[0])
                model.graph.output.append(output)
    return found, model.SerializeToString()


def _products(name: str, consumers: dict[str, list[Any]]) -> Iterator[Any]:
    for node in consumers.get(name, []):
        if node.op_type in _PRODUCTS:
            yield node
        elif node.op_type in _ON_THE_WAY:
            yield from _products(node.output[0], consumers)


def float_onnx_model(part: nn.Module, call: ForwardCall) -> bytes | None:
    """A float model as ONNX; None if it cannot be written."""
    part = light_copy(part).float()
    call = call.to_float32()
    traced = TensorsOnly(part, call).eval()
    try:
        program = trace(traced, ForwardCall(tuple(call.tensors()), {}))
        with quietly(), torch.no_grad():
            translated = torch.onnx.export(program, dynamo=True, verbose=False)
        assert translated is not None
        graph: bytes = translated.model_proto.SerializeToString()
    except Exception:
        return None
    return graph


def float_onnx(part: nn.Module, call: ForwardCall) -> Run | None:
    """A float model in ONNX Runtime; None if it cannot be written or loaded."""
    graph = float_onnx_model(part, call)
    if graph is None:
        return None
    try:
        session = _session(graph)
    except Exception:
        return None
    names = [i.name for i in session.get_inputs()]

    def run(call: ForwardCall) -> list[Tensor]:
        arrays = [t.numpy() for t in call.to_float32().tensors()]
        feed = dict(zip(names, arrays, strict=False))
        return [torch.from_numpy(np.array(value)) for value in session.run(None, feed)]

    return run


def require_onnx() -> None:
    """Check that `.onnx` files can be read.

    Raises:
        ModuleNotFoundError: If not; the message names the extra.
    """
    if importlib.util.find_spec("onnx") is None or importlib.util.find_spec("onnxruntime") is None:
        raise ModuleNotFoundError(
            'Reading .onnx files needs onnx and onnxruntime: pip install "statqat-lightning[onnx]".'
        )


def constant_weights(path: Path) -> dict[str, Tensor]:
    """The dequantized weights of an `.onnx` file, by layer, as ONNX Runtime computes them."""
    import onnx

    model = graph_of(path)
    graph = model.graph
    constants = {i.name for i in graph.initializer}
    nodes = []
    for node in graph.node:
        if all(name in constants or not name for name in node.input):
            nodes.append(node)
            constants.update(node.output)
    consumers = _consumers(model)
    wanted: dict[str, str] = {}
    for initializer in graph.initializer:
        layer, _, tensor = initializer.name.rpartition(".")
        if not tensor.endswith("_codes"):
            continue
        value = initializer.name
        while (
            following := [n for n in consumers.get(value, []) if n.op_type in _ON_THE_WAY]
        ) and following[0].output[0] in constants:
            value = following[0].output[0]
        layer, role = layer.removeprefix("model").removeprefix("."), tensor.removesuffix("_codes")
        wanted[weight_key(layer, role)] = value
    names = [*dict.fromkeys(wanted.values())]
    # MatMul takes weights as (in, out).
    turned = {name for name in names for n in consumers.get(name, []) if n.op_type == "MatMul"}
    del graph.node[:]
    graph.node.extend(nodes)
    del graph.input[:]
    del graph.output[:]
    graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in names)
    session = _session(model.SerializeToString(), folder=path.parent)
    values = dict(zip(names, session.run(names, {}), strict=True))
    return {
        layer: torch.from_numpy(np.array(values[name].T if name in turned else values[name]))
        for layer, name in wanted.items()
    }
