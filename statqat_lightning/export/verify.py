"""Proof that files are right: each is read back by its runtime, and run."""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from statqat_lightning.export.inputs import ForwardCall, outputs_of
from statqat_lightning.export.native import load_quantized
from statqat_lightning.insertion import remove


@dataclass(frozen=True)
class ArtefactReport:
    """One file, compared with the fake-quantized model.

    Attributes:
        path: The file.
        bytes: Its size.
        max_difference: Largest absolute difference over all outputs.
        agreement: Share of equal predictions, by the largest entry of the first output; None if it
            has no classes.
    """

    path: str
    bytes: int
    max_difference: float
    agreement: float | None


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how it compares with the fake-quantized model.

    Attributes:
        native: The `.safetensors` file; None if it was not written.
        onnx: The `.onnx` file; None if it was not written.
        examples: Batch size of the comparison.
        output_range: Largest magnitude in the outputs of the fake-quantized model.
        float_bytes: Size of the float32 model: all parameters and buffers.
        notes: What a reader has to know: tensors left in float, files not written, and why.
    """

    native: ArtefactReport | None
    onnx: ArtefactReport | None
    examples: int
    output_range: float
    float_bytes: int
    notes: tuple[str, ...] = ()

    @property
    def artefacts(self) -> list[ArtefactReport]:
        """The files that were written."""
        return [artefact for artefact in (self.native, self.onnx) if artefact is not None]

    @property
    def native_path(self) -> str | None:
        """Path of the `.safetensors` file."""
        return self.native.path if self.native is not None else None

    @property
    def onnx_path(self) -> str | None:
        """Path of the `.onnx` file."""
        return self.onnx.path if self.onnx is not None else None

    @property
    def native_bytes(self) -> int | None:
        """Size of the `.safetensors` file."""
        return self.native.bytes if self.native is not None else None

    @property
    def onnx_bytes(self) -> int | None:
        """Size of the `.onnx` file."""
        return self.onnx.bytes if self.onnx is not None else None

    @property
    def max_difference(self) -> float:
        """Largest absolute difference over all files; NaN if nothing could be compared."""
        return max((a.max_difference for a in self.artefacts), default=float("nan"))

    @property
    def agreement(self) -> float | None:
        """Smallest share of equal predictions over all files; None if there are no predictions."""
        shares = [a.agreement for a in self.artefacts if a.agreement is not None]
        return min(shares, default=None)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, the figures over all files included."""
        data = asdict(self)
        data["notes"] = list(self.notes)
        return data | {
            name: getattr(self, name)
            for name in (
                *("native_path", "native_bytes", "onnx_path", "onnx_bytes"),
                *("max_difference", "agreement"),
            )
        }

    def __str__(self) -> str:
        lines = []
        for artefact in self.artefacts:
            share = "" if artefact.agreement is None else f", agreement {artefact.agreement:.2%}"
            compared = (
                f"largest difference {artefact.max_difference:.2g}{share}"
                if artefact.max_difference == artefact.max_difference
                else "not compared"
            )
            lines.append(f"{artefact.path}: {artefact.bytes / 1e3:.1f} kB, {compared}")
        if lines and self.examples:
            lines.append(
                f"Compared with the fake-quantized model on {self.examples} examples (outputs up "
                f"to {self.output_range:.3g}); "
                f"the float32 model takes {self.float_bytes / 1e3:.1f} kB."
            )
        return "\n".join([*lines, *self.notes])


@torch.no_grad()
def check_native(
    path: Path, model: nn.Module, module: str, call: ForwardCall | None, expected: list[Tensor]
) -> ArtefactReport:
    """Load a native file into a copy of the model that has forgotten its weights, and run it.

    Args:
        path: The file.
        model: The model with quantizers that was saved.
        module: Name of the submodule to run; empty for the model itself.
        call: Its input; None loads without running.
        expected: Outputs of the fake-quantized model.
    """
    blank = copy.deepcopy(model)
    remove(blank)
    for tensor in blank.state_dict().values():
        # Whatever the file does not bring shows up in the outputs.
        tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor.zero_()
    load_quantized(blank, path)
    given = outputs_of(call.run(blank.get_submodule(module))) if call else []
    return _report(path, [t.float().numpy() for t in given], expected)


def check_onnx(
    path: Path, call: ForwardCall, expected: list[Tensor]
) -> tuple[ArtefactReport, str | None]:
    """Run an `.onnx` file in ONNX Runtime on the CPU, with the runtime's own optimizations.

    Returns:
        The comparison, and a remark if the file takes one batch size only.
    """
    session = onnx_session(path)
    remark = None
    size = call.batch_size
    dimensions = session.get_inputs()[0].shape if session.get_inputs() else []
    if dimensions and isinstance(dimensions[0], int) and dimensions[0] != size:
        remark = f"ONNX: the forward fixes its batch size, so the file takes {dimensions[0]} only."
        call = call.with_batch(dimensions[0], least=dimensions[0])
        expected = [t[: dimensions[0]] if t.dim() and len(t) == size else t for t in expected]
    # The exporter drops inputs that no output depends on.
    known = {i.name for i in session.get_inputs()}
    arrays = [t.numpy() for t in call.to_float32().tensors()]
    names = session.get_modelmeta().custom_metadata_map["input_names"].split(",")
    feed = {n: a for n, a in zip(names, arrays, strict=True) if n in known}
    return _report(path, session.run(None, feed), expected), remark


def onnx_session(path: str | Path) -> Any:
    """An ONNX Runtime session that computes what the file says.

    By default, ONNX Runtime rounds the inputs of products with narrow weights to 8 bits on the way
    (`session.qdq_matmulnbits_accuracy_level=4`); here it does not.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "0")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _report(path: Path, given: list[Any], expected: list[Tensor]) -> ArtefactReport:
    differences, agreement = [], None
    for number, (ours, reference) in enumerate(zip(given, expected, strict=False)):
        wanted = reference.float().numpy()
        differences.append(float(np.abs(ours.astype(np.float32) - wanted).max(initial=0)))
        if number == 0 and wanted.ndim >= 2:
            # (N, C), (N, T, C), but images (N, C, H, W).
            axis = 1 if wanted.ndim >= 4 else -1
            if wanted.shape[axis] > 1 and wanted.size:
                agreement = float((ours.argmax(axis) == wanted.argmax(axis)).mean())
    # `max` would pass over a NaN that does not come first.
    worst = float(np.max(differences)) if differences else float("nan")
    return ArtefactReport(str(path), path.stat().st_size, worst, agreement)
