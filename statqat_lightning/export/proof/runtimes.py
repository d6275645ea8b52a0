"""Artefacts as the programs that run them load them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from statqat_lightning.export.calls.dimensions import BATCH, Dynamic
from statqat_lightning.export.calls.forward_call import ForwardCall, outputs_of
from statqat_lightning.export.files.loading import load_quantized
from statqat_lightning.export.files.reading import frozen_tensors
from statqat_lightning.export.files.tracing import ExportError, trace
from statqat_lightning.export.freezing.frozen import frozen_layers
from statqat_lightning.export.freezing.light_copy import light_copy
from statqat_lightning.export.proof.divergence import LayerOutputs, Roundings, record_layers
from statqat_lightning.model.insertion import remove
from statqat_lightning.model.quantized_model import quantized_layers, state_tensors

Run = Callable[[ForwardCall], list[Tensor]]


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
