"""What a file holds, and how two files differ, without the model that they were made from."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from statqat_lightning._tables import aligned, html_table
from statqat_lightning.export.files.native import KEY, read_header
from statqat_lightning.export.files.on_disk import size_of
from statqat_lightning.export.files.reading import file_kind, read_checkpoint
from statqat_lightning.export.proof.onnx_runtime import require_onnx
from statqat_lightning.fake_quant.input_sums import InputSums
from statqat_lightning.formats import BlockFormat, get_format
from statqat_lightning.insight.snr import tensor_column
from statqat_lightning.numerics.granularity import (
    Granularity,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
)
from statqat_lightning.numerics.qparams import QParams
from statqat_lightning.numerics.snr import energies_db, snr_db
from statqat_lightning.numerics.straight_through import fake_quantize
from statqat_lightning.recipes.recipe import QuantRecipe
from statqat_lightning.recipes.rule import ROLES


@dataclass(frozen=True)
class TensorEntry:
    """One quantized tensor of a file.

    Attributes:
        format: Name of its number format, or the type that the file stores it in.
        bits: Bits of a code.
        granularity: Which elements share a scale.
        snr_db: At the end of the training, where the file knows it.
    """

    format: str
    bits: int
    granularity: str
    snr_db: float | None = None

    def __str__(self) -> str:
        snr = "" if self.snr_db is None else f" {self.snr_db:.1f} dB"
        return f"{self.format} {self.granularity}{snr}"


@dataclass(frozen=True)
class Inspection:
    """What a file says about itself.

    Attributes:
        path: The file.
        kind: `native`, `checkpoint` or `onnx`.
        bytes: Its size.
        library_version: Of the package that wrote it, empty if it does not say.
        recipe: The recipe of the training as plain data, None if it does not say.
        layers: By name, the quantized tensors of each layer by role, see `FrozenLayer`.
    """

    path: str
    kind: str
    bytes: int
    library_version: str
    recipe: Mapping[str, Any] | None
    layers: Mapping[str, Mapping[str, TensorEntry]]

    def __repr__(self) -> str:
        return f"<Inspection: {self._summary()}, {len(self.layers)} layers>"

    def _repr_html_(self) -> str:
        recipe = None if self.recipe is None else QuantRecipe.from_dict(self.recipe)
        return html_table(
            self._cells(),
            above=self._summary(),
            below=() if recipe is None else [f"Recipe: {recipe!r}"],
        )

    def __str__(self) -> str:
        lines = [self._summary()]
        if self.recipe is not None:
            lines.append("recipe:")
            for rule in QuantRecipe.from_dict(self.recipe).rules:
                parts = [
                    f"{role} {spec.format}" if spec is not None else f"{role} float"
                    for role in ROLES
                    for spec in [getattr(rule, role)]
                    if spec is not None or role in ("weights", "inputs")
                ]
                lines.append(f"  {rule.pattern}: {', '.join(parts)}")
        return "\n".join([*lines, *aligned(self._cells())])

    def _summary(self) -> str:
        version = f", written by statqat-lightning {self.library_version}"
        summary = f"{self.path}: {self.kind}, {self.bytes / 1e3:.1f} kB"
        return summary + (version if self.library_version else "")

    def _cells(self) -> list[tuple[str, ...]]:
        columns = ["weight", "input"]
        roles = {role for tensors in self.layers.values() for role in tensors}
        columns += ["output"] * any(tensor_column(role) == "output" for role in roles)
        cells: list[tuple[str, ...]] = [("layer", *columns)]
        for name, tensors in self.layers.items():
            found = [_in_words(tensors, column) for column in columns]
            cells.append((name or "(model)", *found))
        return cells


def _in_words(tensors: Mapping[str, TensorEntry], column: str) -> str:
    """What the weights, the inputs or the output of a layer have; most often all the same."""
    found = [str(tensor) for role, tensor in tensors.items() if tensor_column(role) == column]
    return ", ".join(dict.fromkeys(found)) or "float"


def inspect_file(path: str | Path, trust: bool = False) -> Inspection:
    """What a native file, an `.onnx` file or a Lightning checkpoint holds.

    Args:
        path: The file.
        trust: Whether a checkpoint may hold any object, see `read_checkpoint`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is none of these, truncated, or without quantizers.
    """
    path = Path(path)
    if path.suffix == ".onnx":
        return _inspect_onnx(path)
    if file_kind(path) == "native":
        return _inspect_native(path)
    return _inspect_checkpoint(path, trust)


def _inspect_native(path: Path) -> Inspection:
    header = read_header(path)
    snr = header.get("snr_db", {})
    layers = {
        name: {
            role: TensorEntry(
                part["format"],
                get_format(part["format"]).bits,
                part["granularity"],
                snr.get(f"{name}/{role}" if name else role),
            )
            for role, part in entry.items()
        }
        for name, entry in header["layers"].items()
    }
    return Inspection(
        str(path), "native", size_of(path), header["library_version"], header["recipe"], layers
    )


def _inspect_checkpoint(path: Path, trust: bool) -> Inspection:
    checkpoint = read_checkpoint(path, trust)
    layers: dict[str, dict[str, TensorEntry]] = {}
    for name, state in checkpoint[KEY]["quantizers"].items():
        layer, _, role = name.rpartition("/")
        fmt, decibels = get_format(state["format"]), None
        granularity: Granularity = PerTensor()
        if tensor_column(role) == "weight":
            weight = weight_in(checkpoint["state_dict"], layer, role)
            granularity = granularity_of(state, weight)
            if weight is not None and state["ready"]:
                decibels = float(snr_db(weight.float(), quantized_weight(weight, state).float()))
        elif (sums := state.get("running_sums")) is not None and InputSums(sums).noise > 0:
            decibels = energies_db(float(InputSums(sums).signal), float(InputSums(sums).noise))
        finite = decibels is not None and math.isfinite(decibels)
        layers.setdefault(layer, {})[role] = TensorEntry(
            fmt.name, fmt.bits, str(granularity), decibels if finite else None
        )
    entry = checkpoint[KEY]
    return Inspection(str(path), "checkpoint", size_of(path), "", entry["recipe"], layers)


def weight_in(state: Mapping[str, Tensor], layer: str, role: str) -> Tensor | None:
    """A weight of a layer in a `state_dict`; None if it is not there."""
    return state.get(f"{layer}.{role}" if layer else role)


def granularity_of(state: Mapping[str, Any], weight: Tensor | None) -> Granularity:
    """Which elements share a scale, from the shape of the scale."""
    fmt, shape = get_format(state["format"]), tuple(state["scale"].shape)
    if isinstance(fmt, BlockFormat):
        return _blocks_of(fmt, weight, state["scale"])
    if not shape:
        return PerTensor()
    if weight is None or (len(shape) == weight.dim() and sum(n > 1 for n in shape) <= 1):
        axis = next((i for i, n in enumerate(shape) if n > 1), 0)
        if weight is None or shape[axis] == weight.shape[axis]:
            return PerChannel(axis)
    return PerGroup(weight[0].numel() // shape[1])


def _blocks_of(fmt: BlockFormat, weight: Tensor | None, scale: Tensor) -> Granularity:
    """Blocks along the axis that the scale's shape tells, or its values where two axes are alike.

    Transposed convolutions have their blocks along the first axis, all other layers along the
    second.
    """
    usual = PerBlock(fmt.block_size)
    if weight is None:
        return usual
    axes = [PerBlock(fmt.block_size, axis) for axis in (1, 0) if axis < weight.dim()]
    shape = tuple(weight.shape)
    fitting = [g for g in axes if g.scale_shape(shape) == tuple(scale.shape)]

    def noise(granularity: Granularity) -> float:
        wide = weight.float()
        quantized = fake_quantize(wide, QParams(scale, None, granularity), fmt)
        return float((wide - quantized).square().sum())

    return min(fitting, key=noise) if len(fitting) > 1 else (fitting or [usual])[0]


def quantized_weight(weight: Tensor, state: Mapping[str, Any]) -> Tensor:
    """A weight on the grid of a quantizer whose state a checkpoint holds."""
    qparams = QParams(state["scale"], None, granularity_of(state, weight))
    return fake_quantize(weight, qparams, get_format(state["format"]))


def _inspect_onnx(path: Path) -> Inspection:
    model = load_onnx_model(path)
    import onnx

    tensors = {i.name: i for i in model.graph.initializer}
    layers: dict[str, dict[str, TensorEntry]] = {}
    for name, tensor in tensors.items():
        layer, _, buffer = name.rpartition(".")
        layer, (role, _, what) = (
            layer.removeprefix("model").removeprefix("."),
            buffer.rpartition("_"),
        )
        if what == "codes":
            scale = tensors.get(name.removesuffix("codes") + "scale")
            count = math.prod(scale.dims) if scale is not None else 1
            granularity = "per_tensor" if count == 1 else f"{count} scales"
            kind = onnx.TensorProto.DataType.Name(tensor.data_type).lower()
            bits = _bits(tensor)
            layers.setdefault(layer, {})[role] = TensorEntry(kind, bits, granularity)
        elif what == "scale" and tensor_column(role) != "weight":
            zero = _zero_point_type(model, name)
            layers.setdefault(layer, {})[role] = TensorEntry(zero, 8, "per_tensor")
    if not layers:
        raise ValueError(
            f"{path}: an .onnx file without quantized layers of ours. Expected a file by "
            "ExportCallback or save_onnx."
        )
    text = str(metadata_of(model).get("library_version", ""))
    return Inspection(str(path), "onnx", size_of(path), text, None, layers)


def metadata_of(model: Any) -> dict[str, Any]:
    """What we wrote into an `.onnx` file about it."""
    text = next((entry.value for entry in model.metadata_props if entry.key == KEY), "{}")
    metadata: dict[str, Any] = json.loads(text)
    return metadata


def load_onnx_model(path: Path) -> Any:
    """The ONNX model in a file, without weights kept in a second one that is missing."""
    require_onnx()
    import onnx

    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file.")
    try:
        return onnx.load(path)
    except Exception as error:
        raise ValueError(
            f"{path}: not a whole .onnx file ({type(error).__name__}). It may have been cut off on "
            "the way; copy or export it again."
        ) from error


def _bits(tensor: Any) -> int:
    """Bits that the codes of an initializer need, at most those of its type."""
    import onnx

    array = onnx.numpy_helper.to_array(tensor)
    kind = onnx.TensorProto.DataType.Name(tensor.data_type).lower()
    if not kind.startswith(("int", "uint")):
        return 8 * array.itemsize
    low, high = (int(array.astype("int64").min()), int(array.astype("int64").max()))
    signed = kind.startswith("int")
    magnitude = max(high.bit_length(), (-low - 1 if low < 0 else 0).bit_length())
    return magnitude + int(signed)


def _zero_point_type(model: Any, scale: str) -> str:
    import onnx

    for node in model.graph.node:
        if node.op_type == "QuantizeLinear" and node.input[1] == scale:
            zero = next((i for i in model.graph.initializer if i.name == node.input[2]), None)
            if zero is not None:
                return str(onnx.TensorProto.DataType.Name(zero.data_type)).lower()
    return "arithmetic"
