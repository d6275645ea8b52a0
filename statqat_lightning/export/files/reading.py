"""What native files and Lightning checkpoints hold, read and checked."""

from __future__ import annotations

import math
import pickle
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from statqat_lightning.export.files.native import KEY, read_header, read_scale
from statqat_lightning.export.files.packing import packed_size, unpack
from statqat_lightning.export.freezing.frozen_layer import codes_name, scale_name, weight_key
from statqat_lightning.fake_quant.fake_quantizer import OUTPUT, FakeQuantizer
from statqat_lightning.formats import get_format
from statqat_lightning.layers.function_results import is_result
from statqat_lightning.layers.layer_kinds import GATE
from statqat_lightning.layers.quantized_layer import weight_of
from statqat_lightning.model.quantized_model import QuantizedLayer
from statqat_lightning.numerics.granularity import get_granularity
from statqat_lightning.numerics.qparams import QParams, dequantize
from statqat_lightning.recipes.recipe import TensorSpec
from statqat_lightning.recipes.rule import QuantRule, full_name


def aliases_in(header: Mapping[str, Any]) -> dict[str, str]:
    """Other names of layers that are in the model several times, and the name of each."""
    found: dict[str, str] = {}
    for alias, name in header["aliases"].items():
        (other, tensor), (layer, own) = (key.rpartition(".")[::2] for key in (alias, name))
        roles = header["layers"].get(layer, {})
        if tensor == own and any(tensor in (codes_name(r), scale_name(r)) for r in roles):
            found[other] = layer
    return found


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a native file by name, scales in the precision they were written in."""
    with safetensors.safe_open(path, framework="pt") as file:
        return {
            name: read_scale(name, file.get_tensor(name))
            for name in file.keys()  # noqa: SIM118
        }


def native_weights(path: Path) -> dict[str, Tensor]:
    """The dequantized weights of a native file, by layer; see `weight_key`."""
    header, tensors = read_header(path), read_tensors(path)
    entries = (NativeEntry(path, name, entry) for name, entry in header["layers"].items())
    return {
        weight_key(e.name, role): e.dequantized(role, tensors)
        for e in entries
        for role in e.weights
    }


def frozen_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a native file by their names in the frozen model, codes unpacked."""
    header, tensors = read_header(path), read_tensors(path)
    for name, layer in header["layers"].items():
        entry = NativeEntry(path, name, layer)
        for role in entry.weights:
            tensors[entry.key(codes_name(role))] = entry.codes(role, tensors)
    return tensors | {alias: tensors[name] for alias, name in header["aliases"].items()}


def read_checkpoint(path: Path, trust: bool = False) -> Mapping[str, Any]:
    """A Lightning checkpoint of a training with `StatQATCallback`, on the CPU.

    Args:
        path: The file.
        trust: Whether to load any object in it, which may run code.

    Raises:
        ValueError: If it is truncated, foreign, or holds objects and is not trusted.
    """
    return checked_checkpoint(read_any(path, trust), str(path))


def read_any(path: Path, trust: bool = False) -> Any:
    """What `torch.save` wrote to a file, on the CPU.

    Args:
        path: The file.
        trust: Whether to load any object in it, which may run code.

    Raises:
        ValueError: If it is truncated, or holds objects and is not trusted.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=not trust)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path}: the checkpoint holds objects that are not loaded from a file one may not "
            f"trust ({error}). If you trust it: "
            "load_checkpoint(model, torch.load(path, weights_only=False))."
        ) from error
    except (RuntimeError, EOFError, KeyError) as error:
        raise ValueError(
            f"{path}: not a whole checkpoint ({error}). It may have been cut off; copy it again."
        ) from error


def checked_checkpoint(checkpoint: Any, where: str) -> Mapping[str, Any]:
    """A checkpoint that holds what this version reads; else a ValueError that says what it is."""
    if not isinstance(checkpoint, Mapping) or "state_dict" not in checkpoint:
        raise ValueError(f"{where}: no 'state_dict' in it; expected a Lightning checkpoint.")
    if KEY not in checkpoint:
        raise ValueError(
            f"{where}: a checkpoint without the entry {KEY!r}: it was trained without "
            "StatQATCallback and holds a float model. "
            "Load it with load_from_checkpoint."
        )
    if checkpoint[KEY]["version"] > 1:
        raise ValueError(
            f"{where}: got version {checkpoint[KEY]['version']} of {KEY!r}; this one reads 1. "
            "Update statqat-lightning."
        )
    return checkpoint


class NativeEntry:
    """One layer of a native file."""

    def __init__(self, path: Path, name: str, entry: Mapping[str, Any]) -> None:
        self.where = f"{path}: layer {name!r}"
        self.name = name
        self.weights = {role: part for role, part in entry.items() if "shape" in part}
        self.activations = {role: part for role, part in entry.items() if "shape" not in part}

    def key(self, tensor: str) -> str:
        return f"{self.name}.{tensor}" if self.name else tensor

    def keys_in_file(self) -> list[str]:
        names = [codes_name(role) for role in self.weights]
        names += [scale_name(role) for role in (*self.weights, *self.activations)]
        return [self.key(name) for name in names]

    def rule(self) -> QuantRule:
        named = {
            role: TensorSpec(**part["spec"])
            for role, part in self.activations.items()
            if is_result(role)
        }
        others = (OUTPUT, GATE, *named)
        inputs = (part for role, part in self.activations.items() if role not in others)
        return QuantRule(
            full_name(self.name),
            _spec(next(iter(self.weights.values()), None)),
            _spec(next(inputs, None)),
            _spec(self.activations.get(OUTPUT)),
            _spec(self.activations.get(GATE)),
            named,
        )

    def codes(self, role: str, tensors: Mapping[str, Tensor]) -> Tensor:
        """Codes of a weight, uint8 in its shape."""
        part = self.weights[role]
        fmt, shape = get_format(part["format"]), tuple(part["shape"])
        packed, count = self._tensor(tensors, codes_name(role)), math.prod(shape)
        if packed.numel() != packed_size(count, fmt.bits):
            raise ValueError(
                f"{self.where}: got {packed.numel()} bytes of codes; expected "
                f"{packed_size(count, fmt.bits)} for shape {shape} "
                f"in {fmt.name}. The file is damaged; export it again."
            )
        return unpack(packed, fmt.bits, count).view(shape)

    def dequantized(self, role: str, tensors: Mapping[str, Tensor]) -> Tensor:
        part = self.weights[role]
        shape = tuple(part["shape"])
        granularity = get_granularity(part["granularity"], part["axis"])
        scale = self._tensor(tensors, scale_name(role))
        if tuple(scale.shape) != granularity.scale_shape(shape):
            raise ValueError(
                f"{self.where}: got a scale of shape {tuple(scale.shape)}; expected "
                f"{granularity.scale_shape(shape)} for a weight "
                f"of shape {shape}, {granularity}. The file is damaged; export it again."
            )
        dtype: torch.dtype = getattr(torch, part["dtype"])
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        values = get_format(part["format"]).decode(self.codes(role, tensors)).to(wide)
        return dequantize(values, QParams(scale, None, granularity)).to(dtype)

    def restore(self, layer: QuantizedLayer, tensors: Mapping[str, Tensor]) -> None:
        """Give a layer's quantizers format and scale, and check that they reproduce the codes."""
        for role, weight in layer.quantizers.weights.items():
            if role not in self.weights:
                continue
            part = self.weights[role]
            _restore(weight, part["format"], self._tensor(tensors, scale_name(role)))
            weight.read_by = tuple(part.get("read_by", ()))
            own = weight_of(layer.module, role)
            if not torch.equal(weight(own), self.dequantized(role, tensors).to(own)):
                raise ValueError(
                    f"{self.where}: the model's {role} does not quantize to the codes of the file. "
                    f"Expected a weight of its own in {part['dtype']}; it may be shared with a "
                    "layer of another format, or the model's precision too low."
                )
        for activation in layer.quantizers.activations():
            if (entry := self.activations.get(activation.role)) is not None:
                scale = self._tensor(tensors, scale_name(activation.role))
                _restore(activation, entry["format"], scale)

    def _tensor(self, tensors: Mapping[str, Tensor], name: str) -> Tensor:
        if self.key(name) not in tensors:
            raise ValueError(f"{self.where}: {name} is missing. The file is damaged; export again.")
        return tensors[self.key(name)]


def _spec(part: Mapping[str, Any] | None) -> TensorSpec | None:
    return None if part is None else TensorSpec(**part["spec"])


def _restore(quantizer: FakeQuantizer, fmt: str, scale: Tensor) -> None:
    quantizer.fmt = get_format(fmt)
    with torch.no_grad():
        quantizer.scale.copy_(scale)
    quantizer.ready = True


def file_kind(path: Path) -> str:
    """`native` or `checkpoint`, by the first bytes of a file.

    Raises:
        ValueError: If it is neither, or a folder.
    """
    if path.is_dir():
        raise ValueError(
            f"{path}: got a folder; expected a file. A sharded checkpoint is turned into one by "
            "`python -m lightning.pytorch.utilities.consolidate_checkpoint`."
        )
    with path.open("rb") as file:
        start = file.read(9)
    if start[:4] == b"PK\x03\x04":
        return "checkpoint"
    if len(start) == 9 and start[8:] == b"{" and struct.unpack("<Q", start[:8])[0] < 1e8:
        return "native"
    raise ValueError(
        f"{path}: neither a .safetensors file nor a checkpoint (it begins with {start!r}). "
        "Expected a file by ExportCallback, "
        "or a checkpoint of a training with StatQATCallback."
    )
