"""Tracing a frozen model with `torch.export`, and where in the user's code it stopped."""

from __future__ import annotations

import contextlib
import logging
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram, ShapesCollection

from statqat_lightning.export.calls.dimensions import Dynamic, open_dimensions
from statqat_lightning.export.calls.forward_call import ForwardCall, first_that_runs
from statqat_lightning.export.wording import in_short

_PACKAGE = Path(__file__).resolve().parents[2]
_TORCH = Path(torch.__file__).resolve().parent
_EXPORTERS = {"onnx", "onnx_ir", "onnxscript"}


class ExportError(RuntimeError):
    """A model that cannot be written in a format; the message says what stands in the way."""


def trace(model: nn.Module, call: ForwardCall, dynamic: Dynamic | None = None) -> ExportedProgram:
    """The graph of a model's forward, of any batch size if all tensors agree on what that is.

    Args:
        model: The model.
        call: Input of a forward.
        dynamic: Open dimensions beside the batch.

    Raises:
        ExportError: If the forward cannot be traced; the message names the line.
    """
    try:
        with quietly(), torch.no_grad():
            # Few rows, because they are computed, but not one: that would be taken for a constant.
            # What is computed once and kept, such as the ends of a grid, cannot be traced: so the
            # model is run here.
            call = first_that_runs(model, call.with_batch(3, least=3), call)
            shapes = ShapesCollection()  # type: ignore[no-untyped-call]
            dimensions = open_dimensions(call, call.names(model), dynamic or {})
            for tensor, titles in zip(call.tensors(), dimensions, strict=True):
                if titles:
                    shapes[tensor] = dict.fromkeys(titles, torch.export.Dim.AUTO)
            return torch.export.export(
                model,
                call.args,
                call.kwargs,
                dynamic_shapes=shapes.dynamic_shapes(model, call.args, call.kwargs),  # type: ignore[no-untyped-call]
                strict=False,
            )
    except Exception as error:
        raise ExportError(
            f"torch.export stopped{where_it_stopped(error)}: {in_short(error)}\n"
            "This forward cannot be traced as it is. If only a part of the model is needed, name "
            "it (module=...); the native file does not need tracing."
        ) from error


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """Without what tracing, translation and lowering say of their own insides."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def where_it_stopped(error: BaseException) -> str:
    """The last line of the user's own code that an error passed, or nothing.

    Args:
        error: An error that was caught around a call of the model.

    Returns:
        ` at "file", line 12, in forward: source of the line`.
    """
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        # The traceback begins where the error was caught: the callers of the export are not in it.
        for frame in reversed(traceback.extract_tb(current.__traceback__)):
            path = Path(frame.filename)
            ours = any(path.resolve().is_relative_to(home) for home in (_PACKAGE, _TORCH))
            if path.is_file() and not ours and not _EXPORTERS & {*path.parts}:
                return f' at "{frame.filename}", line {frame.lineno}, in {frame.name}: {frame.line}'
        current = current.__cause__ or current.__context__
    return ""


def operators_of(program: ExportedProgram) -> set[str]:
    """Names of all operators in the graph of a program, `aten.linear.default` for one."""
    return {
        str(node.target)
        for module in program.graph_module.modules()
        if isinstance(graph := getattr(module, "graph", None), torch.fx.Graph)
        for node in graph.nodes
        if node.op == "call_function"
    }


def forget_sources(program: ExportedProgram) -> None:
    """Drop the example inputs and the lines of code that a program would carry into its file."""
    program.example_inputs = None
    for module in program.graph_module.modules():
        graph: Any = getattr(module, "graph", None)
        if isinstance(graph, torch.fx.Graph):
            for node in graph.nodes:
                node.meta.pop("stack_trace", None)
