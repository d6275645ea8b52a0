"""What a file holds, and how two files differ, without the model that they were made from."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from statqat_lightning._tables import aligned, html_table
from statqat_lightning.export.files.loading import (
    file_kind,
    native_weights,
    read_checkpoint,
)
from statqat_lightning.export.files.native import KEY, read_header
from statqat_lightning.export.files.on_disk import size_of
from statqat_lightning.export.freezing.frozen import weight_key
from statqat_lightning.export.proof.runtimes import constant_weights, require_onnx
from statqat_lightning.fake_quant.fake_quantizer import OUTPUT
from statqat_lightning.fake_quant.input_sums import InputSums
from statqat_lightning.formats import BlockFormat, get_format
from statqat_lightning.layers.function_results import is_result
from statqat_lightning.layers.layer_kinds import INPUT_ROLES
from statqat_lightning.numerics.granularity import (
    Granularity,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
)
from statqat_lightning.numerics.qparams import QParams
from statqat_lightning.numerics.snr import snr_db
from statqat_lightning.numerics.straight_through import fake_quantize
from statqat_lightning.recipes.recipe import ROLES, QuantRecipe


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
        columns += ["output"] * any(_column(role) == "output" for role in roles)
        cells: list[tuple[str, ...]] = [("layer", *columns)]
        for name, tensors in self.layers.items():
            found = [_in_words(tensors, column) for column in columns]
            cells.append((name or "(model)", *found))
        return cells


def _in_words(tensors: Mapping[str, TensorEntry], column: str) -> str:
    """What the weights, the inputs or the output of a layer have; most often all the same."""
    found = [str(tensor) for role, tensor in tensors.items() if _column(role) == column]
    return ", ".join(dict.fromkeys(found)) or "float"


def _column(role: str) -> str:
    if role == OUTPUT or is_result(role):
        return "output"
    return "input" if role in INPUT_ROLES else "weight"


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
        if _column(role) == "weight":
            weight = _weight_in(checkpoint["state_dict"], layer, role)
            granularity = _granularity_of(state, weight)
            if weight is not None and state["ready"]:
                decibels = float(snr_db(weight.float(), _quantized(weight, state).float()))
        elif (sums := state.get("running_sums")) is not None and InputSums(sums).noise > 0:
            decibels = 10 * math.log10(float(InputSums(sums).signal / InputSums(sums).noise))
        finite = decibels is not None and math.isfinite(decibels)
        layers.setdefault(layer, {})[role] = TensorEntry(
            fmt.name, fmt.bits, str(granularity), decibels if finite else None
        )
    entry = checkpoint[KEY]
    return Inspection(str(path), "checkpoint", size_of(path), "", entry["recipe"], layers)


def _weight_in(state: Mapping[str, Tensor], layer: str, role: str) -> Tensor | None:
    return state.get(f"{layer}.{role}" if layer else role)


def _granularity_of(state: Mapping[str, Any], weight: Tensor | None) -> Granularity:
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


def _quantized(weight: Tensor, state: Mapping[str, Any]) -> Tensor:
    qparams = QParams(state["scale"], None, _granularity_of(state, weight))
    return fake_quantize(weight, qparams, get_format(state["format"]))


def _inspect_onnx(path: Path) -> Inspection:
    model = _onnx_model(path)
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
        elif what == "scale" and _column(role) != "weight":
            zero = _zero_point_type(model, name)
            layers.setdefault(layer, {})[role] = TensorEntry(zero, 8, "per_tensor")
    if not layers:
        raise ValueError(
            f"{path}: an .onnx file without quantized layers of ours. Expected a file by "
            "ExportCallback or save_onnx."
        )
    text = str(_metadata(model).get("library_version", ""))
    return Inspection(str(path), "onnx", size_of(path), text, None, layers)


def _metadata(model: Any) -> dict[str, Any]:
    """What we wrote into an `.onnx` file about it."""
    text = next((entry.value for entry in model.metadata_props if entry.key == KEY), "{}")
    metadata: dict[str, Any] = json.loads(text)
    return metadata


def _onnx_model(path: Path) -> Any:
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
        if _column(role) == "weight"
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
    folded: dict[str, int] = _metadata(_onnx_model(path)).get("folded", {})
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
        _onnx_model(path)
        return constant_weights(path)
    if file_kind(path) == "native":
        return native_weights(path)
    checkpoint = read_checkpoint(path, trust)
    found = {}
    for name, state in checkpoint[KEY]["quantizers"].items():
        layer, _, role = name.rpartition("/")
        if _column(role) == "weight" and state["ready"]:
            weight = _weight_in(checkpoint["state_dict"], layer, role)
            if weight is not None:
                found[weight_key(layer, role)] = _quantized(weight, state)
    return found
