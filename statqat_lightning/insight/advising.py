"""`advise`: from a few batches, what every format would cost every layer. Nothing is trained."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from statqat_lightning._words import did_you_mean
from statqat_lightning.formats import BlockFormat, get_format
from statqat_lightning.insight.advice import Advice, FormatCost, TensorAdvice
from statqat_lightning.insight.candidates import (
    Candidates,
    candidate_quantizers,
    decibels,
    layers_with_weights,
    predicted_energies,
)
from statqat_lightning.insight.loss_changes import Loss, predicted_loss_changes
from statqat_lightning.layers.layer_kinds import INPUT_ROLES
from statqat_lightning.model.insertion import prepare
from statqat_lightning.model.isolated_copy import isolated_copy
from statqat_lightning.model.quantized_model import (
    QuantizedLayer,
    quantized_layers,
    refresh,
    set_enabled,
    set_observing,
)
from statqat_lightning.recipes.recipe import QuantRecipe
from statqat_lightning.recipes.rule import QuantRule

DEFAULT_FORMATS = ("int2", "int3", "int4", "fp4_e2m1", "int6", "int8", "fp8_e4m3")

Sensitivity = Literal["fisher", "none"]
SENSITIVITIES: tuple[Sensitivity, ...] = ("fisher", "none")

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


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

    The batches run twice: once in float, to observe the inputs, and once, with `loss`, forwards and
    backwards for the sensitivity. A copy of the model runs, in eval mode.

    Args:
        model: Any module, in float or with quantizers, which do not matter.
        batches: A few batches, as the model, or `loss`, takes them. A tuple, a list or a mapping is
            handed to a plain model as its arguments.
        loss: `loss(model, batch)`, the mean over the samples of a batch, `()`. None: that of
            `training_step` if the model has one.
        formats: Names of formats. Block formats are for weights alone.
        sensitivity: `"fisher"` predicts the change of the loss, see `loss_changes`; `"none"` leaves
            it at SNRs. None: `"fisher"` if there is a loss.
        exclude: Patterns of layers that stay in float.

    Returns:
        The table; its `recipe(target_db)` is a recipe.

    Raises:
        ValueError: If there is no batch, a format or a sensitivity is unknown, no layer can be
            quantized, or `"fisher"` is asked for without a loss.
    """
    kept = [*batches]
    if not kept:
        raise ValueError("advise: got no batches; expected a few.")
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
    names = [get_format(name).name for name in dict.fromkeys(formats)]
    of_inputs = [name for name in names if not isinstance(get_format(name), BlockFormat)]
    trial, skipped = observed_copy(model, exclude)
    for parameter in trial.parameters():
        if parameter.is_floating_point():
            parameter.requires_grad_(True)  # so that gradients reach all layers
    run = _runner(loss)
    macs = observe(trial, kept, run)
    candidates = candidate_quantizers(trial, names, of_inputs)
    changes = {}
    if sensitivity == "fisher":
        assert loss is not None, "checked above"
        changes = predicted_loss_changes(trial, kept, loss, candidates)
    return Advice(tensors_of(trial, candidates, macs, changes), len(kept), skipped)


def observed_copy(model: nn.Module, exclude: Sequence[str]) -> tuple[nn.Module, dict[str, str]]:
    """A copy of a model in eval mode whose layers all have quantizers, and who has none and why."""
    trial = isolated_copy(model).eval()
    float_rules = [QuantRule(pattern) for pattern in exclude]
    report = prepare(trial, recipe=QuantRecipe([*float_rules, QuantRule("*", "int8", "int8")]))
    return trial, {row.name: row.reason for row in report.rows if row.reason}


def own_loss(model: nn.Module) -> Loss | None:
    """The loss of a LightningModule's own step."""
    if not callable(getattr(model, "training_step", None)):
        return None

    def loss(model: nn.Module, batch: Any) -> Tensor:
        with warnings.catch_warnings():
            # It logs, and has no Trainer to log to.
            warnings.filterwarnings("ignore", r".*You are trying to `self\.log\(\)`")
            result = model.training_step(batch, 0)  # type: ignore[operator]
        found: Tensor = result["loss"] if isinstance(result, Mapping) else result
        return found

    return loss


def _runner(loss: Loss | None) -> Callable[[nn.Module, Any], Any]:
    return loss if loss is not None else run_batch


def run_batch(model: nn.Module, batch: Any) -> Any:
    """Call a model with a batch: a tuple or a list as arguments, a mapping by name."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


@torch.no_grad()
def observe(
    model: nn.Module, batches: Iterable[Any], run: Callable[[nn.Module, Any], Any]
) -> dict[str, int]:
    """Run batches in float, and let the quantizers of a model know its inputs.

    Args:
        model: A model with quantizers, in eval mode.
        batches: The batches.
        run: Runs the model on one.

    Returns:
        Multiply-accumulates of each layer for one sample, by its name.
    """
    set_enabled(model, weights=False, inputs=False)
    macs: dict[str, int] = {}
    with ExitStack() as stack:
        for layer in layers_with_weights(model):
            hook = _counting(layer, macs)
            stack.callback(layer.module.register_forward_hook(hook, with_kwargs=True).remove)
        for number, batch in enumerate(batches):
            if number == 1:
                stack.close()  # one batch is enough to count
            set_observing(model, True)
            run(model, batch)
            set_observing(model, False)
            refresh(model, weights=False, search=True)
    refresh(model, inputs=False, search=True)
    return macs


def _counting(layer: QuantizedLayer, macs: dict[str, int]) -> Callable[..., None]:
    def count(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given = next((x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)), None)
        made = next((x for x in tree_leaves(output) if isinstance(x, Tensor)), None)
        if given is None or made is None or not given.is_floating_point():
            return
        if isinstance(module, _CONVOLUTIONS):
            places = math.prod(made.shape[2:])
        elif isinstance(module, _TRANSPOSED):
            places = math.prod(given.shape[2:])
        else:
            places = made.numel() // made.shape[-1] // max(1, len(made))
        elements = sum(
            parameter.numel()
            for role in layer.quantizers.weights
            if (parameter := module._parameters.get(role)) is not None
        )
        macs[layer.name] = macs.get(layer.name, 0) + places * elements

    return count


def tensors_of(
    model: nn.Module,
    candidates: Candidates,
    macs: Mapping[str, int],
    changes: Mapping[tuple[str, str], Any],
) -> tuple[TensorAdvice, ...]:
    """A row for each tensor that has candidates.

    Args:
        model: A model with quantizers.
        candidates: See `candidate_quantizers`.
        macs: Multiply-accumulates of layers.
        changes: Predicted changes of the loss by tensor and format, as far as they are known.
    """
    groups = _shared_weights(model)
    rows = []
    for layer in quantized_layers(model):
        for quantizer in layer.quantizers.present():
            formats = candidates.get(quantizer.name)
            if formats is None:
                continue
            is_weight = quantizer.role not in INPUT_ROLES
            weight = layer.quantizers.weights.get(quantizer.role)
            costs = {}
            for name, candidate in formats.items():
                signal, noise, of_output = predicted_energies(candidate, layer)
                change = changes.get((quantizer.name, name))
                costs[name] = FormatCost(decibels(signal, noise), of_output, change)
            group = groups.get(layer.name, layer.name)
            parameter = layer.module._parameters.get(quantizer.role) if weight else None
            rows.append(
                TensorAdvice(
                    quantizer.name,
                    layer.name,
                    quantizer.role,
                    is_weight,
                    0 if parameter is None else parameter.numel(),
                    macs.get(layer.name, 0),
                    costs,
                    # One rule serves all weights of a layer, and one all its inputs.
                    f"{group}: weights" if is_weight else f"{layer.name}: inputs",
                )
            )
    return tuple(rows)


def _shared_weights(model: nn.Module) -> dict[str, str]:
    """For layers whose weight another layer has, too, the name of the first that has it."""
    first: dict[int, str] = {}
    found: dict[str, str] = {}
    for layer in quantized_layers(model):
        for role in layer.quantizers.weights:
            parameter = layer.module._parameters.get(role)
            if parameter is not None:
                found[layer.name] = first.setdefault(id(parameter), layer.name)
    return found
