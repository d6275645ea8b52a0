"""Artefacts as the programs that run them load them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from statqat_lightning.export.calls.dimensions import BATCH, Dynamic
from statqat_lightning.export.calls.forward_call import ForwardCall, TensorsOnly, outputs_of
from statqat_lightning.export.files.loading import frozen_tensors, load_quantized
from statqat_lightning.export.files.on_disk import data_beside
from statqat_lightning.export.files.onnx_files import graph_of
from statqat_lightning.export.files.onnx_graph import PARTS
from statqat_lightning.export.files.tracing import ExportError, quietly, trace
from statqat_lightning.export.freezing.frozen import frozen_layers, weight_key
from statqat_lightning.export.freezing.light_copy import light_copy
from statqat_lightning.export.proof.divergence import LayerOutputs, Roundings, record_layers
from statqat_lightning.model.insertion import remove
from statqat_lightning.model.quantized_model import quantized_layers, state_tensors

Run = Callable[[ForwardCall], list[Tensor]]
_Key = TypeVar("_Key")


@dataclass(frozen=True)
class Runtime:
    """A file, loaded by what runs it.

    Attributes:
        name: The program and its version.
        run: Outputs of a forward.
        layer_outputs: Outputs of layers in a forward, as far as the runtime can tell them.
        batch: The one batch size that the file takes, None if it takes any.
        inputs: Names and sizes of what the file takes, open sizes by name; empty if it does not
            say.
        roundings: Rounded tensors in a forward, of a runtime that fuses rounding into layers.
        target: Name of the target that it is, see `targets`, or None.
        in_float: Names of the quantized layers that it computes in float on this machine.
    """

    name: str
    run: Run
    layer_outputs: Callable[[ForwardCall], LayerOutputs]
    batch: int | None = None
    roundings: Callable[[ForwardCall], Roundings] | None = None
    inputs: Sequence[tuple[str, Sequence[int | str]]] = ()
    target: str | None = None
    in_float: Callable[[], list[str]] = list


def _in_torch(name: str, model: nn.Module, layers: Sequence[str]) -> Runtime:
    return Runtime(
        name,
        lambda call: outputs_of(call.run(model)),
        lambda call: record_layers(model, layers, call),
    )


def _torch() -> str:
    return f"torch {torch.__version__}"


def in_torch(name: str, model: nn.Module, frozen: nn.Module) -> Runtime:
    """A PyTorch model that has been loaded, with the layers of the frozen one."""
    layers = [layer.name for layer in frozen_layers(frozen)]
    return _in_torch(f"{_torch()}, {name}", model, layers)


@torch.no_grad()
def load_native(path: Path, model: nn.Module, module: str = "") -> Runtime:
    """A native file in a copy of the model that has forgotten its weights.

    Args:
        path: The file.
        model: The model with quantizers that was saved.
        module: Name of the submodule to run; empty for the model itself.
    """
    blank = light_copy(model)
    remove(blank)
    forget_weights(blank)
    load_quantized(blank, path)
    part = blank.get_submodule(module)
    return _in_torch(f"{_torch()}, load_quantized", part, names_of_quantized(part))


@torch.no_grad()
def load_codes(path: Path, frozen: nn.Module, module: str = "") -> Runtime:
    """A native file as a frozen model of the codes that it holds, which takes a quarter of memory.

    Args:
        path: The file.
        frozen: The frozen model that was saved; nothing of its state is used.
        module: Name of the submodule to run; empty for the model itself.

    Raises:
        ValueError: If the file lacks a tensor of the model.
    """
    loaded, tensors = light_copy(frozen), frozen_tensors(path)
    if missing := state_tensors(frozen).keys() - tensors.keys():
        raise ValueError(f"{path}: lacks {', '.join(sorted(missing))}.")
    for name, tensor in tensors.items():
        owner, _, own = name.rpartition(".")
        layer = loaded.get_submodule(owner)
        if own in layer._parameters:
            layer._parameters[own] = nn.Parameter(tensor, requires_grad=False)
        else:
            layer._buffers[own] = tensor
    part = loaded.get_submodule(module)
    layers = [layer.name for layer in frozen_layers(part)]
    return _in_torch(f"{_torch()}, codes of the file", part, layers)


def forget_weights(model: nn.Module) -> None:
    """Give a model tensors of NaN: whatever a file does not bring shows up in the outputs."""
    for tensor in state_tensors(model, keep_vars=True).values():
        blank = float("nan") if tensor.is_floating_point() else 0
        tensor.data = torch.full_like(tensor, blank, requires_grad=False)


def names_of_quantized(model: nn.Module) -> list[str]:
    """Names of the layers of a model that have quantizers."""
    return [layer.name for layer in quantized_layers(model)]


def load_program(path: Path, dynamic: Dynamic | None = None) -> Runtime:
    """A `.pt2` file, by `torch.export.load`.

    Args:
        path: The file.
        dynamic: Names of open dimensions, which the file itself calls otherwise.
    """
    program = torch.export.load(path)
    module = program.module()
    return Runtime(
        f"{_torch()}, torch.export",
        lambda call: outputs_of(call.run(module)),
        lambda call: _layers_of_program(program.module(), call),
        _fixed_batch(program),
        inputs=_inputs_of(program, dynamic or {}),
    )


def _inputs_of(
    program: torch.export.ExportedProgram, dynamic: Dynamic
) -> list[tuple[str, list[int | str]]]:
    wanted = set(program.graph_signature.user_inputs)
    found: list[tuple[str, list[int | str]]] = []
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.name in wanted and isinstance(value, Tensor):
            titles = {0: BATCH} | dict(dynamic.get(node.name, {}))
            sizes: list[int | str] = [
                size if isinstance(size, int) else titles.get(number, str(size))
                for number, size in enumerate(value.shape)
            ]
            found.append((node.name, sizes))
    return found


def _fixed_batch(program: torch.export.ExportedProgram) -> int | None:
    inputs = set(program.graph_signature.user_inputs)
    values = [n.meta.get("val") for n in program.graph.nodes if n.name in inputs]
    sizes = [value.shape[0] for value in values if isinstance(value, Tensor) and value.dim()]
    return sizes[0] if sizes and isinstance(sizes[0], int) else None


def _layers_of_program(module: Any, call: ForwardCall) -> LayerOutputs:
    """Values of the last nodes of each run of nodes that belong to one layer."""
    outputs: dict[str, list[Tensor]] = {}
    owners: dict[Any, str] = {}
    for node in module.graph.nodes:
        stack = [entry[0] for entry in (node.meta.get("nn_module_stack") or {}).values()]
        if node.op == "call_function" and stack:
            owners[node] = stack[-1].split("@")[0]

    class Record(torch.fx.Interpreter):
        def run_node(self, n: Any) -> Any:
            value = super().run_node(n)
            # A layer's last node is read by nodes that are not the layer's.
            if (
                n in owners
                and isinstance(value, Tensor)
                and any(owners.get(user) != owners[n] for user in n.users)
            ):
                outputs.setdefault(owners[n], []).append(value.detach().clone())
            return value

    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    with torch.no_grad():
        leaves = [leaf for leaf in call.leaves() if leaf is not None]
        tensors = leaves if len(leaves) == len(placeholders) else call.leaves()
        if len(tensors) == len(placeholders):
            Record(module).run(*tensors)
    return outputs


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


_INTEGER_KERNELS = (
    *("QLinearConv", "QLinearMatMul", "QGemm", "MatMulInteger", "MatMulIntegerToFloat"),
    *("DynamicQuantizeMatMul", "ConvInteger", "MatMulNBits", "QAttention"),
)


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


_ON_THE_WAY = {
    *("DequantizeLinear", "Gather", "Cast", "Mul", "Reshape", "Transpose", "Unsqueeze", "Squeeze"),
    *("Identity", "Flatten", "Slice", "Split"),
}
_PRODUCTS = {"Conv", "ConvTranspose", "Gemm", "MatMul"}


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


# The float model in the same runtimes, to compare speed with.


def float_model(model: nn.Module, module: str = "") -> nn.Module:
    """A part of a copy of a model, without its quantizers."""
    plain = light_copy(model)
    remove(plain)
    return plain.get_submodule(module).cpu().eval()


def float_in_torch(part: nn.Module) -> Run:
    """A float model as it is."""
    return lambda call: outputs_of(call.run(part))


def float_program(part: nn.Module, call: ForwardCall, dynamic: Dynamic | None = None) -> Run | None:
    """A float model by way of `torch.export`; None if it cannot be traced."""
    try:
        program = trace(part, call, dynamic)
    except ExportError:
        return None
    module = program.module()
    return lambda call: outputs_of(call.run(module))


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
