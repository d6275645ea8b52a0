"""The native file: packed codes, scales and everything else of a model, in one `.safetensors`.

Layout, file version 1. Tensors carry the names of the frozen model's `state_dict`: for a quantized
layer `{layer}.weight_codes` (uint8, packed by `packing.pack`), `{layer}.weight_scale` and
`{layer}.input_scale` (float32; scales of MX blocks are uint8, the exponent plus 127), and the same
with the roles of its other tensors, see `FrozenLayer`; all others as they are. The metadata entry
`statqat_lightning` is JSON: `file_version`, `library_version`, `recipe` (or null), `module` (the
submodule that the ONNX file beside it holds), `layers` (by name and role: format, granularity, kept
axis, specification, and for weights shape, precision and the modules that read them, if any,
without calling their layer), `aliases` (names of tensors that share the memory of another),
`snr_db` (of quantized tensors at the end of the training, where it is known) and `remarks` (what is
to be known of the training).
"""

from __future__ import annotations

import errno
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from statqat_lightning.export.files.on_disk import replacing
from statqat_lightning.export.files.packing import pack
from statqat_lightning.export.freezing.frozen import freeze, frozen_layers
from statqat_lightning.export.freezing.frozen_layer import (
    FrozenLayer,
    FrozenTensor,
    codes_name,
    scale_name,
)
from statqat_lightning.formats import BlockFormat, Format
from statqat_lightning.insight.snr import snr_by_tensor
from statqat_lightning.numerics.granularity import PerBlock
from statqat_lightning.recipes.recipe import QuantRecipe

KEY = "statqat_lightning"
"""Name of our entry, in the file's metadata and in a Lightning checkpoint."""
FILE_VERSION = 1


def library_version() -> str:
    """The installed version, `unknown` in a source tree that is not installed."""
    try:
        return metadata.version("statqat-lightning")
    except metadata.PackageNotFoundError:
        return "unknown"


def save_native(
    model: nn.Module,
    path: str | Path,
    recipe: QuantRecipe | None = None,
    module: str = "",
    snr_db: Mapping[str, float] | None = None,
    remarks: Sequence[str] = (),
) -> None:
    """Write a quantized model to one `.safetensors` file, from which `load_quantized` rebuilds it.

    The file appears under its name when it is complete; until then an older one stays in place.

    Args:
        model: A frozen model, or a model with quantizers, which is frozen first.
        path: The file.
        recipe: The recipe of the training, for the record; loading goes by what each layer has.
        module: Name of a submodule, for the record: the one in the ONNX file beside this one.
        snr_db: SNR of each quantized tensor, for the record, see `snr_by_tensor`; None measures it,
            if `model` has quantizers. A frozen model has forgotten what was quantized.
        remarks: What is to be known of the training, for the record.

    Raises:
        ValueError: If the model cannot be frozen.
        OSError: If the file cannot be written.
    """
    path = Path(path)
    frozen = model if frozen_layers(model) else freeze(model)
    if snr_db is None:
        snr_db = snr_by_tensor(model)
    tensors, aliases = _tensors(frozen)
    layers = {}
    for name, layer in frozen_layers(frozen):
        layers[name] = _describe(layer)
        before = f"{name}." if name else ""
        for role, tensor in layer.frozen_weights.items():
            codes, scale = before + codes_name(role), before + scale_name(role)
            tensors[codes] = pack(tensors[codes], tensor.fmt.bits)
            tensors[scale] = _short_scale(tensors[scale], tensor.fmt)
    header = {
        "file_version": FILE_VERSION,
        "library_version": library_version(),
        "recipe": recipe and recipe.to_dict(),
        "module": module,
        "layers": layers,
        "aliases": aliases,
        "remarks": [*remarks],
        "snr_db": {name: round(v, 3) for name, v in (snr_db or {}).items() if math.isfinite(v)},
    }
    with replacing(path) as temporary:
        try:
            save_file(tensors, temporary, metadata={KEY: json.dumps(header)})
        except safetensors.SafetensorError as error:
            raise as_os_error(error) from error


def as_os_error(error: safetensors.SafetensorError) -> OSError:
    """What went wrong with the disk; safetensors tells it in its text only."""
    number = re.search(r"(?:os error|code:) (\d+)", str(error))
    code = int(number[1]) if number else errno.EIO
    return OSError(code, os.strerror(code))


def read_header(path: str | Path) -> dict[str, Any]:
    """What a native file says about itself: versions, recipe, layers.

    Raises:
        ValueError: If this is not a whole native file.
    """
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            entries = file.metadata() or {}
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{path}: not a whole .safetensors file ({error}). It may have been cut off on the "
            "way; copy or export it again."
        ) from error
    if KEY not in entries:
        raise ValueError(
            f"{path}: a .safetensors file without the entry {KEY!r}: another program wrote it. "
            "Expected a file by "
            "ExportCallback or save_native."
        )
    header: dict[str, Any] = json.loads(entries[KEY])
    if header["file_version"] > FILE_VERSION:
        raise ValueError(
            f"{path}: got file version {header['file_version']}, written by statqat-lightning "
            f"{header['library_version']}; this "
            f"one reads up to {FILE_VERSION}. Update statqat-lightning."
        )
    return header


def _tensors(frozen: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """State of a model on the CPU, each tensor once, and the other names it goes by."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[int, str] = {}
    seen: set[int] = set()
    for name, tensor in frozen.state_dict(keep_vars=True).items():
        if not isinstance(tensor, Tensor):
            continue  # `get_extra_state` may return anything
        known = first.setdefault(id(tensor), name)
        if known != name:
            aliases[name] = known
        else:
            tensors[name] = _of_its_own(tensor.detach().cpu(), seen)
    return tensors, aliases


def _of_its_own(tensor: Tensor, seen: set[int]) -> Tensor:
    """The tensor, or a copy where it is a view: safetensors refuses those that share memory."""
    memory = tensor.untyped_storage()
    is_whole = tensor.is_contiguous() and memory.nbytes() == tensor.nbytes
    if is_whole and memory.data_ptr() not in seen:
        seen.add(memory.data_ptr())
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def _describe(layer: FrozenLayer) -> dict[str, Any]:
    """The tensors of a layer as plain data, by role."""
    entry = {}
    for role, tensor in layer.frozen_weights.items():
        entry[role] = _describe_tensor(tensor) | {
            "shape": list(layer.get_buffer(codes_name(role)).shape),
            "dtype": str(layer.weight_dtype).removeprefix("torch."),
        }
    for role, tensor in layer.frozen_activations.items():
        scale = layer.get_buffer(scale_name(role)).item()
        entry[role] = _describe_tensor(tensor) | {"scale": scale}
    return entry


def _describe_tensor(tensor: FrozenTensor) -> dict[str, Any]:
    kept = getattr(tensor.granularity, "axis", 0)
    if isinstance(tensor.granularity, PerBlock):
        kept = 1 - kept
    return {
        "format": tensor.fmt.name,
        "granularity": str(tensor.granularity),
        "axis": kept,
        "spec": tensor.spec.to_dict(),
        **({"read_by": [*tensor.read_by]} if tensor.read_by else {}),
    }


_E8M0_BIAS = 127


def _short_scale(scale: Tensor, fmt: Format) -> Tensor:
    """Scales of MX blocks in their 8 bits: the exponent plus 127; all others as they are."""
    if not (isinstance(fmt, BlockFormat) and fmt.scale_format == "e8m0"):
        return scale
    mantissa, exponent = torch.frexp(scale)
    if not bool((mantissa == 0.5).all()):
        return scale
    return (exponent - 1 + _E8M0_BIAS).to(torch.uint8)


def read_scale(name: str, tensor: Tensor) -> Tensor:
    """A tensor of a native file; scales in 8 bits as the float32 that they stand for."""
    if tensor.dtype != torch.uint8 or not name.endswith("weight_scale"):
        return tensor
    ones = torch.ones(tensor.shape, dtype=torch.float64)
    return torch.ldexp(ones, tensor.to(torch.int32) - _E8M0_BIAS).to(torch.float32)
