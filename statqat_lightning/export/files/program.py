"""The `.pt2` file: the frozen model as a graph of PyTorch's own operators.

`torch.export.load(path).module()` gives a module that is called as the model was, in a process that
has torch and nothing else. Codes are stored in a byte each, and decoded in each forward.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch
from torch import nn

from statqat_lightning.export.calls.dimensions import dimensions_of
from statqat_lightning.export.calls.forward_call import ForwardCall
from statqat_lightning.export.files.on_disk import replacing
from statqat_lightning.export.files.tracing import ExportError, forget_sources, operators_of, trace
from statqat_lightning.export.freezing.frozen import frozen_copy

_NAMESPACES = ("aten.", "prim.", "prims.", "_operator.", "<built-in function", "torch._ops.higher")


def save_program(model: nn.Module, path: str | Path, example: Any, *, dynamic: Any = None) -> None:
    """Write a quantized model to a `.pt2` file with a dynamic batch dimension.

    The file appears under its name when it is complete.

    Args:
        model: A frozen model, or a model with quantizers, which is frozen first.
        path: The file.
        example: Input of one forward call: a tensor, a tuple of positional or a mapping of keyword
            arguments, or a `ForwardCall`. The first dimension of tensors is the batch, if all
            agree. Flags, numbers and None among them become constants of the graph.
        dynamic: Which other dimensions are open, see `export_model`; None for none.

    Raises:
        ValueError: If `dynamic` names no input or no dimension.
        ExportError: If the forward cannot be traced, or calls operators that torch alone does not
            have.
        OSError: If the file cannot be written.
    """
    frozen = frozen_copy(model)
    call = ForwardCall.of(example).copy()
    frozen = frozen.cpu().eval()
    program = trace(frozen, call, dimensions_of(dynamic, call, frozen))
    foreign = sorted(o for o in operators_of(program) if not o.startswith(_NAMESPACES))
    if foreign:
        raise ExportError(
            f"the forward calls {', '.join(foreign)}, which torch alone does not have. Export the "
            "part of the model without them (module=...)."
        )
    forget_sources(program)
    # By way of memory: on a full disk, torch's own writer of files ends the process.
    data = io.BytesIO()
    torch.export.save(program, data)
    with replacing(Path(path)) as temporary:
        temporary.write_bytes(data.getbuffer())
