"""Advice from a checkpoint alone: what every format would cost, without the model's class."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from statqat_lightning.export.files.native import KEY
from statqat_lightning.export.files.reading import checked_checkpoint, file_kind, read_any
from statqat_lightning.export.inspection import granularity_of, weight_in
from statqat_lightning.fake_quant.activation import ActivationFakeQuantizer
from statqat_lightning.fake_quant.fake_quantizer import FakeQuantizer
from statqat_lightning.fake_quant.observers import ObserverConfig
from statqat_lightning.fake_quant.scale_refresh import refresh_weights
from statqat_lightning.fake_quant.weight import WeightFakeQuantizer
from statqat_lightning.formats import BlockFormat, get_format
from statqat_lightning.insight.advice import Advice, FormatCost, TensorAdvice
from statqat_lightning.insight.advising import DEFAULT_FORMATS, for_inputs, names_of_formats
from statqat_lightning.insight.candidates import (
    candidate_for_input,
    predicted_energies,
)
from statqat_lightning.insight.observed import DID_NOT_RUN
from statqat_lightning.insight.snr import tensor_column
from statqat_lightning.layers.layer_kinds import GATE
from statqat_lightning.numerics.granularity import PerBlock, PerChannel
from statqat_lightning.numerics.snr import energies_db
from statqat_lightning.recipes.recipe import TensorSpec
from statqat_lightning.recipes.rule import activation_spec

_KEPT = ("running_spectrum", "running_sums", "num_batches")
"""What scales of least error are chosen by."""


def file_advice(
    path: str | Path, formats: Sequence[str] = DEFAULT_FORMATS, trust: bool = False
) -> Advice:
    """What each format would do to each tensor of a Lightning checkpoint, as SNR.

    Weights are those of the checkpoint, with scales of least error that as many elements share as
    in the file; inputs are the running spectra that the training kept. Which errors of a weight
    count for the output, and what they do to the loss, is known to the model alone: see `advise`.

    Args:
        path: A checkpoint of a training with `StatQATCallback`.
        formats: Names of formats. Block formats are for weights alone.
        trust: Whether the checkpoint may hold any object, see `read_checkpoint`.

    Returns:
        Advice without changes of the loss, of 0 batches. Inputs whose quantizers kept no spectrum,
        such as those of `minmax`, have no row.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no checkpoint of such a training, or a format is unknown.
    """
    path = Path(path)
    names = names_of_formats("file_advice", formats)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file.")
    if path.suffix == ".onnx" or file_kind(path) == "native":
        raise ValueError(
            f"{path}: a file of codes, which are rounded already; expected the checkpoint of the "
            "training, which holds weights and spectra of inputs."
        )
    checkpoint = read_any(path, trust)
    if isinstance(checkpoint, Mapping) and KEY not in checkpoint:
        raise ValueError(
            f"{path}: a checkpoint without the entry {KEY!r}: a float model, whose inputs nobody "
            "has seen. Expected one of a training with StatQATCallback. Of a float model: "
            "advise(model, batches), or statqat advise with --module, --checkpoint and --batch."
        )
    checkpoint = checked_checkpoint(checkpoint, str(path))
    weights: Mapping[str, Tensor] = checkpoint["state_dict"]
    first: dict[int, str] = {}
    rows: list[TensorAdvice] = []
    skipped: dict[str, str] = {}
    for name, state in checkpoint[KEY]["quantizers"].items():
        layer, _, role = name.rpartition("/")
        if not state.get("ran", True):
            skipped[layer] = DID_NOT_RUN
        elif tensor_column(role) == "weight":
            weight = weight_in(weights, layer, role)
            if weight is not None:
                place = f"{first.setdefault(weight.data_ptr(), layer)}: weights"
                rows.append(_of_weight(name, weight.float(), state, names, place))
        elif tensor_column(role) == "input" and role != GATE:
            rows += _of_input(name, state, for_inputs(names))
    return Advice(tuple(rows), 0, skipped)


def _of_weight(
    name: str, weight: Tensor, state: Mapping[str, Any], names: Sequence[str], shares: str
) -> TensorAdvice:
    layer, _, role = name.rpartition("/")
    sharing = granularity_of(state, weight)
    axis = sharing.axis if isinstance(sharing, PerChannel | PerBlock) else 0
    costs = {}
    for fmt in names:
        own_blocks = isinstance(get_format(fmt), BlockFormat) or isinstance(sharing, PerBlock)
        granularity = None if own_blocks else _in_short(str(sharing))
        quantizer = WeightFakeQuantizer(layer, TensorSpec(fmt, granularity), weight, axis, role)
        refresh_weights([(quantizer, weight)], search=True)
        costs[fmt] = _cost(quantizer, weight)
    return TensorAdvice(name, layer, role, True, weight.numel(), 0, costs, shares)


def _in_short(granularity: str) -> str:
    """The granularity of a specification, whose axis is that of the layer."""
    return "per_channel" if granularity.startswith("per_channel") else granularity


def _of_input(name: str, state: Mapping[str, Any], names: Sequence[str]) -> list[TensorAdvice]:
    """A row for an input, none where nothing is known of it."""
    layer, _, role = name.rpartition("/")
    spec = activation_spec("int8", "inputs")
    assert spec is not None
    observed = ActivationFakeQuantizer(layer, spec, ObserverConfig(), torch.device("cpu"), role)
    observer = observed.observer
    running = {own: state.get(own) for own in _KEPT}
    if any(x is None or x.shape != getattr(observer, own).shape for own, x in running.items()):
        return []
    for own, x in running.items():
        getattr(observer, own).copy_(x)
    observed.lowest.copy_(state.get("lowest", observed.lowest))
    if not observer.num_batches > 0:
        return []
    costs = {fmt: _cost(candidate_for_input(observed, fmt), None) for fmt in names}
    return [TensorAdvice(name, layer, role, False, 0, 0, costs, f"{layer}: inputs")]


def _cost(quantizer: FakeQuantizer, weight: Tensor | None) -> FormatCost:
    signal, noise, _ = predicted_energies(quantizer, weight)
    return FormatCost(energies_db(signal, noise))
