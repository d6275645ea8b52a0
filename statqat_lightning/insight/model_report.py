"""The data of a report, collected from a model with quantizers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
import yaml
from torch import Tensor, nn

from statqat_lightning.error_analysis.spectrum import EnergySpectrum
from statqat_lightning.fake_quant.fake_quantizer import FakeQuantizer
from statqat_lightning.formats import BlockFormat, Format, IntFormat, get_format
from statqat_lightning.insight.alternatives import Alternative, alternatives
from statqat_lightning.insight.report_data import (
    LayerEntry,
    ReportData,
    TensorEntry,
    latest_errors,
)
from statqat_lightning.insight.snr import History, tensor_column
from statqat_lightning.insight.tensor_chart import (
    TensorChart,
    chart_of_spectrum,
    chart_of_weight,
)
from statqat_lightning.insight.tensor_facts import TensorFacts, tensor_facts, tensor_spectra
from statqat_lightning.layers.module_names import plain_name
from statqat_lightning.layers.quantized_layer import base_class, is_quantized, weight_of
from statqat_lightning.model.insertion_report import InsertionReport
from statqat_lightning.model.quantized_model import quantized_layers
from statqat_lightning.model.report_rows import rows_in_use
from statqat_lightning.numerics.granularity import Granularity
from statqat_lightning.recipes.recipe import QuantRecipe

_MOST_FORMATS = 5
"""Of a chart, the one in force included: more cannot be told apart."""


@torch.no_grad()
def model_report(
    model: nn.Module,
    title: str = "",
    report: InsertionReport | None = None,
    histories: Mapping[str, History] | None = None,
    recipe: QuantRecipe | None = None,
    files: Sequence[Mapping[str, str]] = (),
    file_notes: Sequence[str] = (),
) -> ReportData:
    """What a report shows of a model with quantizers; nothing in the model changes.

    Args:
        model: The model. Weights are looked at as they are now, inputs and outputs by their running
            statistics.
        title: What the page is about; the class of the model if empty.
        report: What `prepare` returned, for the reasons of layers in float and for notes.
        histories: By what they are of, see `ReportData`.
        recipe: The recipe of the training.
        files: A row for each exported file, its figures by title, see `ExportReport.rows`.
        file_notes: What is to be known of those files.

    Example:
        >>> from statqat_lightning import prepare
        >>> model = nn.Sequential(nn.Linear(4, 4))
        >>> report = prepare(model, weights="int4", activations=None)
        >>> [layer.name for layer in model_report(model, report=report).layers]
        ['0']
    """
    return ReportData(
        title or base_class(model).__name__,
        _layers(model, report, latest_errors(histories or {})),
        histories or {},
        recipe_text(None if recipe is None else recipe.to_dict()),
        files,
        file_notes,
        () if report is None else report.notes,
    )


def recipe_text(recipe: Mapping[str, Any] | None) -> str:
    """A recipe as YAML; empty for None."""
    return "" if recipe is None else str(yaml.safe_dump(dict(recipe), sort_keys=False))


def _layers(
    model: nn.Module,
    report: InsertionReport | None,
    more: Mapping[str, Mapping[str, float | str]],
) -> tuple[LayerEntry, ...]:
    said = {} if report is None else {row.name: row for row in report.rows}
    reasons = {name: change.get("reason") for name, change in rows_in_use(model).items()}
    facts = tensor_facts(model)
    entries: dict[str, list[TensorEntry]] = {}
    quantizers = {
        q.name: (layer, q) for layer in quantized_layers(model) for q in layer.quantizers.present()
    }
    spectra = tensor_spectra(model)
    spectrum = next(spectra, None)  # one at a time: rows of weights take ten megabytes
    for name, fact in facts.items():
        layer, quantizer = quantizers[name]
        own = None
        if spectrum is not None and spectrum[0] == name:
            own, spectrum = spectrum[1], next(spectra, None)
        weight = weight_of(layer.module, fact.role) if fact.parameters else None
        formats = {tensor_column(q.role): q.fmt for q in layer.quantizers.present() if q.enabled}
        entry = _tensor(fact, quantizer, own, weight, multiplies_integers(formats))
        entries.setdefault(layer.name, []).append(entry)
    found = []
    for name, module in _modules(model):
        row = said.get(name)
        count = sum(p.numel() for p in module.parameters(recurse=False)) if row is None else 0
        found.append(
            LayerEntry(
                name,
                base_class(module).__name__ if row is None else row.type,
                count if row is None else row.parameters,
                tuple(entries.get(name, ())),
                "" if name in entries else reasons.get(name) or (row.reason if row else ""),
                "" if row is None else row.remark,
                more.get(name, {}),
            )
        )
    return tuple(found)


def _modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules with quantizers or parameters of their own, in the order of the network."""
    named = {layer.name: layer.module for layer in quantized_layers(model)}
    others = [
        (plain_name(name), module)
        for name, module in model.named_modules()
        if is_quantized(module) or any(True for _ in module.parameters(recurse=False))
    ]
    return [(name, named.get(name, module)) for name, module in dict(others).items()]


def _tensor(
    fact: TensorFacts,
    quantizer: FakeQuantizer,
    spectrum: EnergySpectrum | None,
    weight: Tensor | None,
    in_integers: bool,
) -> TensorEntry:
    return tensor_entry(
        fact.name,
        fact.role,
        quantizer.fmt,
        quantizer.granularity,
        quantizer.quantizer.name,
        quantizer.qparams.scale,
        weight,
        spectrum,
        in_integers,
        snr_db=None if fact.snr_db is None else _known(fact.snr_db),
        output_snr_db=fact.output_snr_db,
        clipped=_known(fact.clipped),
        grid_used=_known(fact.grid_used),
        refreshes=quantizer.num_refreshes,
    )


def multiplies_integers(formats: Mapping[str, Format]) -> bool:
    """Whether a layer's weights and inputs are both integers, by the formats of its tensors."""
    factors = formats.get("weight"), formats.get("input")
    return all(isinstance(fmt, IntFormat) for fmt in factors)


def _known(number: float) -> float | None:
    return None if math.isnan(number) else number


def tensor_entry(
    name: str,
    role: str,
    fmt: Format,
    granularity: Granularity,
    quantizer: str,
    scale: Tensor,
    weight: Tensor | None,
    spectrum: EnergySpectrum | None,
    in_integers: bool = False,
    **known: Any,
) -> TensorEntry:
    """One tensor with its chart and its alternatives.

    Args:
        name: `{layer}/{role}`.
        role: Name of the weight or the input, or `output`.
        fmt: The format in force.
        granularity: Which elements share a scale.
        quantizer: Name of the rule that chose the scales, empty where it is not known.
        scale: Scales in force, float32.
        weight: The weight; None for inputs and outputs, or where only its codes are known.
        spectrum: Rows that share scales, as `tensor_spectra` gives them; None where not known.
        in_integers: Whether the layer multiplies integers, see `alternatives`.
        **known: Other fields of `TensorEntry`.
    """
    chart: TensorChart | None = None
    others: tuple[Alternative, ...] = ()
    is_finite = weight is None or bool(weight.isfinite().all())
    if spectrum is not None and is_finite and bool(scale.isfinite().all()):
        others = tuple(
            alternatives(spectrum, fmt, granularity, quantizer, scale, weight, in_integers)
        )
        formats = _drawn(fmt, others, granularity)
        if weight is None:
            chart = chart_of_spectrum(spectrum, scale, formats)
        else:
            chart = chart_of_weight(weight, granularity, scale, formats)
    scales = scale.detach().double().flatten()
    geometric = float(scales.log().mean().exp())
    return TensorEntry(
        name,
        role,
        fmt.name,
        fmt.bits,
        str(granularity),
        quantizer,
        scales=(float(scales.min()), geometric, float(scales.max())),
        num_scales=len(scales),
        chart=chart,
        alternatives=others,
        **{"values": 0 if weight is None else weight.numel()} | known,
    )


def _drawn(fmt: Format, found: Iterable[Alternative], granularity: Granularity) -> list[Format]:
    """Formats to compare in a picture: the one in force, and alternatives with the same scales."""
    if isinstance(fmt, BlockFormat):
        return [fmt]
    others = [each for each in found if each.granularity == str(granularity)]
    names = dict.fromkeys([fmt.name, *(each.format for each in others)])
    return [fmt, *(get_format(name) for name in names if name != fmt.name)][:_MOST_FORMATS]
