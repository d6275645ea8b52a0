"""`advise`: from a few batches, what every format would cost every layer. Nothing is trained."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, Literal, get_args

import torch
from torch import nn

from statqat_lightning._words import did_you_mean
from statqat_lightning.error_analysis.spectrum import EnergySpectrum
from statqat_lightning.formats import BlockFormat, get_format
from statqat_lightning.insight.advice import Advice, FormatCost, TensorAdvice
from statqat_lightning.insight.candidates import (
    Candidates,
    layers_with_weights,
    predicted_energies,
)
from statqat_lightning.insight.loss_changes import LossChange, predicted_loss_changes
from statqat_lightning.insight.observed import (
    Loss,
    candidates_of,
    kept_batches,
    observed_copy,
    on_the_side,
    own_loss,
    run_batch,
)
from statqat_lightning.layers.quantized_layer import weight_of
from statqat_lightning.model.quantized_model import quantized_layers
from statqat_lightning.numerics.snr import energies_db

DEFAULT_FORMATS = ("int2", "int3", "int4", "fp4_e2m1", "int6", "int8", "fp8_e4m3")

Sensitivity = Literal["fisher", "none"]
SENSITIVITIES: tuple[Sensitivity, ...] = get_args(Sensitivity)


def advise(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    loss: Loss | None = None,
    formats: Sequence[str] = DEFAULT_FORMATS,
    sensitivity: Sensitivity | None = None,
    exclude: Sequence[str] = (),
) -> Advice:
    """Predict what each format would do to each weight and input of a model.

    The batches run in float to observe the inputs, and with a loss once more, forwards and
    backwards, for the sensitivity. A copy of the model runs, in eval mode; the model, its buffers
    and the random numbers stay as they are.

    Args:
        model: Any module, in float or with quantizers, which do not matter.
        batches: A few batches, as the model, or `loss`, takes them; all are kept in memory, on the
            model's device. A tuple, a list or a mapping is handed to a plain model as its
            arguments.
        loss: `loss(model, batch)`, the mean over the samples of a batch, `()`, of the model that it
            is given, which is the copy. None: that of `training_step` if the model has one.
        formats: Names of formats. Block formats are for weights alone.
        sensitivity: `"fisher"` predicts the change of the loss, see `LossChange`; `"none"` leaves
            it at SNRs. None: `"fisher"` if there is a loss.
        exclude: Patterns of layers that stay in float.

    Returns:
        The table; its `recipe(target_db)` is a recipe.

    Raises:
        ValueError: If there is no batch, a format or a sensitivity is unknown, no layer can be
            quantized, `"fisher"` is asked for without a loss, or the loss runs the model itself
            and not the copy.

    Examples:
        >>> net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        >>> advice = advise(net, [torch.randn(64, 8)], formats=["int4", "int8"])
        >>> [tensor.name for tensor in advice.tensors]
        ['0/weight', '0/input', '2/weight', '2/input']
        >>> advice.recipe(target_db=30.0)
        QuantRecipe([QuantRule('*', weights='int8', inputs='int8')])
    """
    loss = loss or own_loss(model)
    sensitivity = sensitivity or ("fisher" if loss is not None else "none")
    if sensitivity not in SENSITIVITIES:
        raise ValueError(
            f"advise: got sensitivity={sensitivity!r}; expected one of {', '.join(SENSITIVITIES)}."
            f"{did_you_mean(sensitivity, SENSITIVITIES)}"
        )
    if sensitivity == "fisher" and loss is None:
        raise ValueError(
            "advise: got sensitivity='fisher' without a loss; expected loss=lambda model, batch: "
            "..., or sensitivity='none'."
        )
    names = names_of_formats("advise", formats)
    kept = kept_batches("advise", model, batches)
    with on_the_side("advise", model):
        observed = observed_copy(model, kept, loss or run_batch, for_inputs(names), exclude)
        trial = observed.model
        candidates = candidates_of(observed, names)
        changes: dict[tuple[str, str], LossChange] = {}
        if sensitivity == "fisher":
            assert loss is not None, "checked above"
            changes = predicted_loss_changes(trial, kept, loss, candidates)
        return Advice(
            tensors_of(trial, candidates, observed.macs, changes, observed.spectra),
            len(kept),
            observed.skipped,
        )


def names_of_formats(where: str, formats: Sequence[str]) -> list[str]:
    """Names of formats as the package writes them, each once.

    Args:
        where: Who asks, for messages.
        formats: Names.

    Raises:
        ValueError: If there is none, or one is unknown.
    """
    given = [formats] if isinstance(formats, str) else [*formats]
    if not given:
        raise ValueError(f"{where}: got no formats; expected names such as 'int4'.")
    return [*dict.fromkeys(get_format(name).name for name in given)]


def for_inputs(names: Sequence[str]) -> list[str]:
    """The names of those formats that inputs can have: one scale serves the tensor."""
    return [name for name in names if not isinstance(get_format(name), BlockFormat)]


@torch.no_grad()
def tensors_of(
    model: nn.Module,
    candidates: Candidates,
    macs: Mapping[str, int],
    changes: Mapping[tuple[str, str], LossChange],
    spectra: Mapping[str, EnergySpectrum] = MappingProxyType({}),
) -> tuple[TensorAdvice, ...]:
    """A row for each tensor that has candidates.

    Args:
        model: A model with quantizers.
        candidates: See `candidate_quantizers`.
        macs: Multiply-accumulates of layers.
        changes: Predicted changes of the loss by tensor and format, as far as they are known.
        spectra: Those of inputs, one row each, as far as more is known than the samples that their
            quantizers took.
    """
    groups = _shared_weights(model)
    rows = []
    for layer in layers_with_weights(model):
        for quantizer in layer.quantizers.present():
            formats = candidates.get(quantizer.name)
            if formats is None:
                continue
            is_weight = quantizer.role in layer.quantizers.weights
            weight = weight_of(layer.module, quantizer.role) if is_weight else None
            spectrum = spectra.get(quantizer.name)
            costs = {}
            for name, candidate in formats.items():
                signal, noise, of_output = predicted_energies(candidate, weight, spectrum)
                change = changes.get((quantizer.name, name))
                costs[name] = FormatCost(energies_db(signal, noise), of_output, change)
            group = groups.get(layer.name, layer.name)
            rows.append(
                TensorAdvice(
                    quantizer.name,
                    layer.name,
                    quantizer.role,
                    is_weight,
                    0 if weight is None else weight.numel(),
                    macs.get(layer.name, 0),
                    costs,
                    # One rule serves all weights of a layer, and one all its inputs.
                    f"{group}: weights" if is_weight else f"{layer.name}: inputs",
                )
            )
    return tuple(rows)


def _shared_weights(model: nn.Module) -> dict[str, str]:
    """For layers of which another one has a weight, too, the name of the first that has it."""
    first: dict[int, str] = {}
    found: dict[str, str] = {}
    for layer in quantized_layers(model):
        for role in layer.quantizers.weights:
            parameter = layer.module._parameters.get(role)
            if parameter is not None:
                before = first.setdefault(id(parameter), layer.name)
                if before != layer.name:
                    found[layer.name] = found.get(before, before)
    return found
