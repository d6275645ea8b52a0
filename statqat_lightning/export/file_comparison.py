"""How two files differ, without the model that they were made from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from statqat_lightning._tables import aligned, html_table
from statqat_lightning.export.files.native import KEY
from statqat_lightning.export.files.reading import file_kind, native_weights, read_checkpoint
from statqat_lightning.export.freezing.frozen_layer import weight_key
from statqat_lightning.export.inspection import (
    Inspection,
    inspect_file,
    load_onnx_model,
    metadata_of,
    quantized_weight,
    weight_in,
)
from statqat_lightning.export.proof.onnx_runtime import constant_weights
from statqat_lightning.insight.snr import tensor_column
from statqat_lightning.numerics.snr import snr_db


@dataclass(frozen=True)
class FileComparison:
    """How the weights of two files differ.

    Attributes:
        a: The first file, the reference.
        b: The second.
        snr_db: By layer that both have, SNR of the second's dequantized weight against the first's;
            infinite where they are equal.
        only_a: Layers that only the first has.
        only_b: Layers that only the second has.
    """

    a: Inspection
    b: Inspection
    snr_db: Mapping[str, float]
    only_a: Sequence[str]
    only_b: Sequence[str]

    @property
    def equal(self) -> bool:
        """Whether all weights are equal."""
        equal = all(math.isinf(v) and v > 0 for v in self.snr_db.values())
        return equal and not self.only_a and not self.only_b

    def __repr__(self) -> str:
        found = "equal" if self.equal else "different"
        return f"<FileComparison: {self.a.path} and {self.b.path}, {found} weights>"

    def _repr_html_(self) -> str:
        return html_table(self._cells(), {3}, below=self._sentences())

    def __str__(self) -> str:
        return "\n".join([*self._sentences(), *aligned(self._cells())])

    def _sentences(self) -> list[str]:
        lines = [f"{x.path}: {x.kind}, {x.bytes / 1e3:.1f} kB" for x in (self.a, self.b)]
        lines[1] += f", {self.b.bytes / self.a.bytes:.2f} times the first"
        for names, path in ((self.only_a, self.a.path), (self.only_b, self.b.path)):
            lines += [f"only in {path}: {', '.join(names)}"] if names else []
        return lines

    def _cells(self) -> list[tuple[str, ...]]:
        cells: list[tuple[str, ...]] = [
            ("layer", "first", "second", "SNR of the second against the first")
        ]
        for name, decibels in self.snr_db.items():
            equal = math.isinf(decibels) and decibels > 0
            first, second = (_weight_entry(x, name) for x in (self.a, self.b))
            found = "equal" if equal else f"{decibels:.1f} dB"
            cells.append((name or "(model)", first, second, found))
        return cells


def _weight_entry(inspection: Inspection, name: str) -> str:
    entries = {
        weight_key(layer, role): tensor
        for layer, tensors in inspection.layers.items()
        for role, tensor in tensors.items()
        if tensor_column(role) == "weight"
    }
    known = _match(name, entries)
    return str(entries[known]) if known is not None else "float"


def compare_files(a: str | Path, b: str | Path, trust: bool = False) -> FileComparison:
    """Compare the weights of two files layer by layer.

    Files of a part of a model are compared with files of the whole: `net.fc` of one is `fc` of the
    other. Where one file has a BatchNorm folded into a layer and the other has not, channels are
    compared up to the factor that it gave them.

    Args:
        a: The reference: a native file, an `.onnx` file or a checkpoint.
        b: What is compared with it.
        trust: See `read_checkpoint`.

    Raises:
        FileNotFoundError: If one is not there.
        ValueError: If one is foreign or truncated, or no layer is in both.
    """
    first, second = _weights(Path(a), trust), _weights(Path(b), trust)
    folded = _folded(Path(a)), _folded(Path(b))
    pairs = {name: _match(name, second) for name in first}
    common = {name: other for name, other in pairs.items() if other is not None}
    if not common:
        raise ValueError(
            f"{a} and {b} have no layer in common. The first has {', '.join(first)}; the second "
            f"{', '.join(second)}."
        )
    decibels = {}
    for name, other in common.items():
        x, y = first[name].double(), second[other].double()
        if x.shape != y.shape and x.dim() == 2 and x.shape == y.t().shape:
            y = y.t()
        if x.shape != y.shape:
            raise ValueError(
                f"layer {name!r}: shape {tuple(x.shape)} in {a}, {tuple(y.shape)} in {b}. Compare "
                "files of the same model."
            )
        if (name in folded[0]) != (other in folded[1]):
            x, y = _without_factors(x, y, {**folded[1], **folded[0]}.get(name, 0))
        decibels[name] = math.inf if torch.equal(x, y) else float(snr_db(x, y))
    return FileComparison(
        inspect_file(a, trust),
        inspect_file(b, trust),
        decibels,
        [name for name in first if name not in common],
        [name for name in second if name not in common.values()],
    )


def _folded(path: Path) -> dict[str, int]:
    """Layers of an `.onnx` file that hold a BatchNorm, and the axis of their channels."""
    if path.suffix != ".onnx":
        return {}
    folded: dict[str, int] = metadata_of(load_onnx_model(path)).get("folded", {})
    return folded


def _without_factors(x: Tensor, y: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Two weights, each channel divided by its entry that is largest in both; zeros have none."""
    x, y = (t.movedim(axis, 0).flatten(1) for t in (x, y))
    largest = (x * y).abs().argmax(1, keepdim=True)
    factors = x.gather(1, largest), y.gather(1, largest)
    there = (factors[0] * factors[1] != 0).flatten()
    return (x / factors[0])[there], (y / factors[1])[there]


def _match(name: str, others: Mapping[str, Any]) -> str | None:
    if name in others:
        return name
    near = [o for o in others if f".{o}".endswith(f".{name}") or f".{name}".endswith(f".{o}")]
    return near[0] if len(near) == 1 else None


def _weights(path: Path, trust: bool) -> dict[str, Tensor]:
    if path.suffix == ".onnx":
        load_onnx_model(path)
        return constant_weights(path)
    if file_kind(path) == "native":
        return native_weights(path)
    checkpoint = read_checkpoint(path, trust)
    found = {}
    for name, state in checkpoint[KEY]["quantizers"].items():
        layer, _, role = name.rpartition("/")
        if tensor_column(role) == "weight" and state["ready"]:
            weight = weight_in(checkpoint["state_dict"], layer, role)
            if weight is not None:
                found[weight_key(layer, role)] = quantized_weight(weight, state)
    return found
