"""The data of a report, collected from a file without the model that it was made from."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from statqat_lightning.error_analysis.spectrum import EnergySpectrum
from statqat_lightning.export.files.native import KEY, read_header
from statqat_lightning.export.files.reading import (
    file_kind,
    read_checkpoint,
    read_tensors,
)
from statqat_lightning.export.files.registry import FILE_TYPES, REPORT_ENDING, with_ending
from statqat_lightning.export.freezing.frozen_layer import codes_name, scale_name
from statqat_lightning.export.inspection import granularity_of, quantized_weight, weight_in
from statqat_lightning.export.proof.report import ArtefactReport, ExportReport
from statqat_lightning.fake_quant.input_sums import InputSums
from statqat_lightning.formats import Format, get_format
from statqat_lightning.insight.model_report import multiplies_integers, recipe_text, tensor_entry
from statqat_lightning.insight.report_data import (
    LayerEntry,
    ReportData,
    TensorEntry,
    error_histories,
    latest_errors,
)
from statqat_lightning.insight.snr import History, OutputErrors, tensor_column
from statqat_lightning.insight.tensor_facts import evenly_spread, grid_of_spectrum
from statqat_lightning.numerics.granularity import PerTensor, get_granularity
from statqat_lightning.numerics.snr import energies_db
from statqat_lightning.recipes.recipe import TensorSpec

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
"""Buffers of norms, which are no parameters."""
_FLOAT = "no quantizer in the file"
_NO_SPECTRA = (
    "The file holds codes and scales alone: spectra, error curves and what would help are in the "
    "report of the checkpoint."
)
_AVERAGED = (
    "The checkpoint holds averaged weights, and scales of the weights in training: the SNR of "
    "weights is lower here than in the model that is loaded from it."
)


def file_report(path: str | Path, trust: bool = False) -> ReportData:
    """What a report shows of a Lightning checkpoint or a native file.

    What an export of the same name has proved, and written to `.export.json`, is shown, too.

    Args:
        path: The file.
        trust: Whether a checkpoint may hold any object, see `read_checkpoint`.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is neither, truncated, or without quantizers.
    """
    path = Path(path)
    if path.suffix == ".onnx":
        raise ValueError(
            f"{path}: got an .onnx file; expected the checkpoint of the training, or the "
            ".safetensors file beside it, which know recipe and SNR."
        )
    found = _native(path) if file_kind(path) == "native" else _checkpoint(path, trust)
    stem = path.with_suffix("") if path.suffix == ".ckpt" else path
    export = _export_beside(with_ending(stem, REPORT_ENDING))
    if export is None:
        return found
    return dataclasses.replace(found, files=export.rows(), file_notes=export.texts())


def _export_beside(path: Path) -> ExportReport | None:
    """The export that a `.export.json` tells of; None if there is none that can be read."""
    if not path.is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        artefacts: dict[str, Any] = {
            kind.field: None if data.get(kind.field) is None else _artefact(data[kind.field])
            for kind in FILE_TYPES
        }
        figures = {name: data[name] for name in ("examples", "output_range", "float_bytes")}
        notes = tuple(map(str, data["notes"]))
        return ExportReport(**artefacts, **figures, notes=notes, accuracy=data.get("accuracy"))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: not the report of an export ({type(error).__name__}: {error}). Expected what "
            "ExportCallback or export_model wrote; remove it, or export again."
        ) from error


def _artefact(data: Mapping[str, Any]) -> ArtefactReport:
    known = {field.name: field for field in dataclasses.fields(ArtefactReport)}
    numbers = {name for name, field in known.items() if str(field.type).startswith("float")}
    found = {name: value for name, value in data.items() if name in known}
    # Infinities and NaN are texts in JSON.
    found |= {name: float(found[name]) for name in numbers if isinstance(found.get(name), str)}
    return ArtefactReport(**found | {"remarks": tuple(data.get("remarks", ()))})


# Checkpoints


@torch.no_grad()
def _checkpoint(path: Path, trust: bool) -> ReportData:
    checkpoint = read_checkpoint(path, trust)
    entry, weights = checkpoint[KEY], checkpoint["state_dict"]
    used = dict(zip(("weight", "input"), entry.get("quantized", (True, True)), strict=True))
    used["output"] = used["input"]
    tensors: dict[str, list[TensorEntry]] = {}
    reasons: dict[str, str] = {}
    formats: dict[str, dict[str, Format]] = {}
    for name, state in entry["quantizers"].items():
        layer, _, role = name.rpartition("/")
        if state["ready"] and used[tensor_column(role)]:
            formats.setdefault(layer, {})[tensor_column(role)] = get_format(state["format"])
    for name, state in entry["quantizers"].items():
        layer, _, role = name.rpartition("/")
        tensors.setdefault(layer, [])
        if not (state["ready"] and used[tensor_column(role)]):
            reasons[layer] = "switched off" if state["ready"] else "no statistics"
        elif not state.get("ran", True):
            reasons[layer] = "never ran"
        else:
            weight, in_integers = (
                weight_in(weights, layer, role),
                multiplies_integers(formats[layer]),
            )
            tensors[layer].append(_of_state(name, state, weight, in_integers))
    sizes = {key: x.numel() for key, x in weights.items() if isinstance(x, Tensor)}
    histories = _histories(checkpoint.get("callbacks", {}))
    return ReportData(
        path.name,
        _layers(tensors, reasons, sizes, latest_errors(histories)),
        histories,
        recipe_text(entry["recipe"]),
        notes=[_AVERAGED] * bool(entry.get("averaged")),
    )


def _of_state(
    name: str, state: Mapping[str, Any], weight: Tensor | None, in_integers: bool
) -> TensorEntry:
    """A tensor from the state of its quantizer and, for a weight, its values."""
    fmt, scale = get_format(state["format"]), state["scale"]
    role = name.rpartition("/")[2]
    known: dict[str, Any] = {
        "refreshes": state.get("num_refreshes"),
        "in_integers": in_integers,
    }
    if tensor_column(role) == "weight":
        granularity, spectrum = granularity_of(state, weight), None
        if weight is not None:
            weight = weight.float()
            rows = granularity.rows(weight)
            few = evenly_spread(len(rows), rows.device)
            spectrum = EnergySpectrum.of_rows(rows[few], check=False)
            error = weight - quantized_weight(weight, state)
            known["snr_db"] = _snr_db(weight.square().sum(), error.square().sum())
        return tensor_entry(name, role, fmt, granularity, "", scale, weight, spectrum, **known)
    energy, sums = state.get("running_spectrum"), state.get("running_sums")
    spectrum = None if energy is None or not len(energy) else EnergySpectrum(energy.unsqueeze(0))
    if sums is not None and float(InputSums(sums).quantized) > 0:
        known["snr_db"] = _snr_db(InputSums(sums).signal, InputSums(sums).noise)
    if spectrum is not None:
        known |= zip(
            ("clipped", "grid_used"), grid_of_spectrum(spectrum, fmt, float(scale)), strict=False
        )
    return tensor_entry(name, role, fmt, PerTensor(), "", scale, None, spectrum, **known)


def _snr_db(signal: Tensor, noise: Tensor) -> float | None:
    value = energies_db(float(signal), float(noise))
    return None if math.isnan(value) else value


def _histories(callbacks: Mapping[str, Any]) -> dict[str, History]:
    """The histories of the `SNRMonitor` in a checkpoint."""
    names = {"history": "snr_db", "output_history": "output_snr_db", "scale_history": "scale"}
    for key, state in callbacks.items():
        if str(key).startswith("SNRMonitor") and isinstance(state, Mapping):
            errors = [
                (int(step), {layer: OutputErrors(*own) for layer, own in row.items()})
                for step, row in state.get("error_history", ())
            ]
            return {
                title: [(int(step), dict(row)) for step, row in state[name]]
                for name, title in names.items()
                if state.get(name)
            } | error_histories(errors)
    return {}


# Native files


def _native(path: Path) -> ReportData:
    header, tensors = read_header(path), read_tensors(path)
    snr = header.get("snr_db", {})
    found: dict[str, list[TensorEntry]] = {}
    sizes = {key: tensor.numel() for key, tensor in tensors.items()}
    for layer, entry in header["layers"].items():
        found[layer] = []
        for role, part in entry.items():
            before = f"{layer}." if layer else ""
            scale, count = tensors[before + scale_name(role)], math.prod(part.get("shape", [0]))
            name = f"{layer}/{role}" if layer else role
            sizes[before + scale_name(role)] = 0
            if count:
                sizes[before + codes_name(role)] = count
            found[layer].append(
                tensor_entry(
                    name,
                    role,
                    get_format(part["format"]),
                    get_granularity(part["granularity"], part["axis"]),
                    _quantizer(part["spec"], is_weight="shape" in part),
                    scale.float(),
                    None,
                    None,
                    values=count,
                    snr_db=snr.get(name),
                )
            )
    return ReportData(
        path.name,
        _layers(found, {}, sizes, {}),
        recipe=recipe_text(header["recipe"]),
        notes=[_NO_SPECTRA, *header.get("remarks", ())],
    )


def _quantizer(spec: Mapping[str, Any], is_weight: bool) -> str:
    own = TensorSpec(**spec)
    return own.weight_quantizer().name if is_weight else own.quantizer or "iterative"


# Layers


def _layers(
    quantized: Mapping[str, Sequence[TensorEntry]],
    reasons: Mapping[str, str],
    sizes: Mapping[str, int],
    more: Mapping[str, Mapping[str, float | str]],
) -> tuple[LayerEntry, ...]:
    """Layers in the order of the file: those with quantizers, and others that hold tensors.

    Args:
        quantized: Tensors with quantizers in use, by layer.
        reasons: Why others are not in use, by layer.
        sizes: Elements of each tensor of the model, by key.
        more: Further columns, by layer.
    """
    counts: dict[str, int] = {}
    for key, size in sizes.items():
        layer, _, tensor = key.rpartition(".")
        if tensor not in _STATISTICS:
            counts[layer] = counts.get(layer, 0) + size
    # Layers without tensors of their own, as residual sums, come before what is in them.
    place = {name: number for number, name in enumerate(counts)}
    for layer in quantized:
        inside = [place[name] for name in counts if name.startswith(f"{layer}.") or not layer]
        place.setdefault(layer, min(inside, default=len(place)))
    names = sorted(place, key=lambda name: (place[name], name in counts))
    return tuple(
        LayerEntry(
            name,
            parameters=counts.get(name, 0),
            tensors=tuple(quantized.get(name, ())),
            reason="" if quantized.get(name) else reasons.get(name, _FLOAT),
            more=more.get(name, {}),
        )
        for name in names
    )
