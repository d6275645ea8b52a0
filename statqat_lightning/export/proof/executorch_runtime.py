"""A `.pte` file in ExecuTorch's Python runtime."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from statqat_lightning.export.calls.forward_call import ForwardCall, TensorsOnly, outputs_of
from statqat_lightning.export.files.executorch import ABOUT, with_delegates
from statqat_lightning.export.files.tracing import quietly
from statqat_lightning.export.freezing.light_copy import light_copy
from statqat_lightning.export.proof.runtimes import Run, Runtime


class _Program:
    """A program in ExecuTorch's Python runtime; what its methods read lives as long as this."""

    def __init__(self, data: bytes) -> None:
        with quietly():
            from executorch.runtime import Runtime as Executor

            self._data = data
            self._program = Executor.get().load_program(data)
            self._forward = self._program.load_method("forward")

    def run(self, call: ForwardCall) -> list[Tensor]:
        given = [tensor.contiguous() for tensor in call.to_float32().tensors()]
        return [output.clone() for output in outputs_of(self._forward.execute(given))]

    def sizes(self) -> list[list[int]]:
        """Of the inputs."""
        about = self._forward.metadata
        return [list(about.input_tensor_meta(n).sizes()) for n in range(about.num_inputs())]

    def about(self) -> dict[str, Any]:
        """What its writer has to say."""
        known: dict[str, Any] = json.loads(self._program.load_method(ABOUT).execute([])[0])
        return known


def load(path: Path) -> Runtime:
    """A `.pte` file in ExecuTorch's Python runtime."""
    program = _Program(path.read_bytes())
    sizes, in_float = program.sizes(), program.about()["in_float"]
    return Runtime(
        f"ExecuTorch {importlib.metadata.version('executorch')}",
        program.run,
        lambda call: {},
        sizes[0][0] if sizes and sizes[0] else None,
        inputs=[(f"input_{number}", size) for number, size in enumerate(sizes)],
        target="executorch",
        in_float=lambda: in_float,
    )


def float_run(plain: nn.Module, call: ForwardCall) -> Run | None:
    """A float model in the same runtime; None if it cannot be written."""
    call = call.to_float32()
    traced = TensorsOnly(light_copy(plain).cpu().float().eval(), call).eval()
    try:
        with quietly(), torch.no_grad():
            program = torch.export.export(traced, tuple(call.tensors()), strict=False)
            return _Program(with_delegates(program).to_executorch().buffer).run
    except Exception:
        return None
