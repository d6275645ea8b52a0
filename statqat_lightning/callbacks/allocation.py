"""Formats within a budget, chosen on the batches that calibrate a training."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn

from statqat_lightning.callbacks.calibration import training_batches
from statqat_lightning.callbacks.trial_copy import running, trial_copy
from statqat_lightning.callbacks.trial_run import FAILED, next_step, run_isolated, step_arguments
from statqat_lightning.fake_quant.fake_quantizer import FakeQuantizer
from statqat_lightning.fake_quant.observers import Reduce
from statqat_lightning.fake_quant.tensor_spec import TensorSpec
from statqat_lightning.formats import get_format
from statqat_lightning.insight.advice import Advice, bits_of
from statqat_lightning.insight.advising import tensors_of
from statqat_lightning.insight.allocation import Allocation, allocate
from statqat_lightning.insight.budgets import Budget
from statqat_lightning.insight.candidates import candidate_quantizers
from statqat_lightning.insight.loss_changes import LossChange, predicted_loss_changes
from statqat_lightning.insight.observed import count_macs
from statqat_lightning.model.insertion import recipe_of
from statqat_lightning.model.quantized_model import quantized_layers
from statqat_lightning.recipes.recipe import QuantRecipe
from statqat_lightning.recipes.rule import full_name

_FAMILIES: Mapping[str, Sequence[str]] = {
    "integer": ("int2", "int3", "int4", "int5", "int6", "int8"),
    "float": ("fp4_e2m1", "fp6_e2m3", "fp6_e3m2", "fp8_e4m3"),
}
"""The formats that a budget chooses among, by the family of those that the weights have."""


def choose_formats(
    trainer: Trainer,
    pl_module: LightningModule,
    budget: Budget,
    num_batches: int,
    reduce: Reduce | None,
) -> Allocation:
    """Formats of least predicted loss within a budget, for a module with quantizers.

    A copy of the module runs training batches forwards and backwards, in eval mode; on several
    ranks, predictions are averaged. Formats are of the family that the weights have, integers or
    floats. The first and the last layer keep their width where it is greater than the others'.

    Args:
        trainer: The Trainer, at the start of training.
        pl_module: The module; it stays as it is.
        budget: What it may cost.
        num_batches: Largest number of batches.
        reduce: Reduction over ranks.

    Raises:
        CannotCalibrate: With the reason, if no batches can be run ahead.
        ValueError: If no choice fits the budget, the weights are of no such family, or inputs count
            whose quantizer keeps no spectrum.
    """
    formats = _candidates(pl_module)
    of_inputs = formats if budget.counts_inputs else []
    if of_inputs:
        _check_inputs(pl_module)
    found: list[Advice] = []

    def run() -> Exception | None:
        def advised() -> Iterator[None]:
            trial = trial_copy(trainer, pl_module)
            batches = training_batches(trainer, pl_module, trial, num_batches)
            trial.eval()
            with running(pl_module):
                # First: candidates are for layers that ran, and maybe nothing was calibrated.
                macs = count_macs(trial, batches[0], loss)
                candidates = candidate_quantizers(trial, formats, of_inputs)
                changes = predicted_loss_changes(trial, batches, loss, candidates)
            tensors = tensors_of(trial, candidates, macs, changes)
            found.append(Advice(tuple(t for t in tensors if t.costs), len(batches)))
            yield

        status, failure = next_step(trainer, advised(), reduce)
        return failure if status == FAILED else None

    def loss(model: nn.Module, batch: Any) -> Tensor:
        trial = cast(LightningModule, model)
        with trainer.precision_plugin.train_step_context():
            result = trial.training_step(*step_arguments(trial, batch, 0))
        loss = result["loss"] if isinstance(result, Mapping) else result
        assert isinstance(loss, Tensor), "a training step returns its loss"
        return loss

    run_isolated(trainer, pl_module, run)
    advice = found[0]
    if reduce is not None:
        advice = _over_ranks(advice, reduce, trainer.world_size, pl_module.device)
    return allocate(advice, budget, first_last_bits=_width_of_ends(pl_module))


def with_formats(pl_module: nn.Module, formats: Mapping[str, str]) -> QuantRecipe:
    """The recipe of a module's quantizers, layer by layer, in other formats.

    Args:
        pl_module: A module with quantizers.
        formats: Formats by the names of tensors, `{layer}/{role}`; others keep theirs.
    """
    quantizers = {full_name(name): own for name, _, own in quantized_layers(pl_module)}

    def chosen(own: Iterable[FakeQuantizer]) -> str | None:
        return next((formats[q.name] for q in own if q.name in formats), None)

    rules = []
    for rule in recipe_of(pl_module).rules:
        own = quantizers[rule.pattern]
        weights = _in_format(rule.weights, chosen(own.weights.values()))
        inputs = _in_format(rule.inputs, chosen(own.inputs.values()))
        rules.append(replace(rule, weights=weights, inputs=inputs))
    return QuantRecipe(rules)


def _in_format(spec: Any, name: str | None) -> Any:
    return spec.with_format(get_format(name)) if isinstance(spec, TensorSpec) and name else spec


def _candidates(pl_module: nn.Module) -> list[str]:
    """Formats of the family of the weights."""
    own = {
        weight.fmt.kind
        for _, _, quantizers in quantized_layers(pl_module)
        for weight in quantizers.weights.values()
    }
    if len(own) != 1 or not own <= {*_FAMILIES}:
        raise ValueError(
            f"StatQATCallback: got a budget for weights in {', '.join(sorted(own)) or 'float'} "
            f"formats; expected all of one family, {' or '.join(_FAMILIES)}. Choose with "
            "`allocate(advise(model, batches, formats=...), budget)` and give its recipe."
        )
    return [*_FAMILIES[own.pop()]]


def _check_inputs(pl_module: nn.Module) -> None:
    """What other formats would do to inputs is told by their spectra."""
    blind = [
        own
        for _, _, quantizers in quantized_layers(pl_module)
        for own in quantizers.inputs.values()
        if not own.observer.needs_spectrum
    ]
    if blind:
        raise ValueError(
            f"StatQATCallback: got a budget that counts inputs, but {blind[0].name} has the "
            f"quantizer {blind[0].quantizer.name!r}, which keeps no energy spectrum to choose a "
            "format by; expected 'iterative' or 'analytic', or a budget of weights alone, such as "
            "'4 bits'."
        )


def _over_ranks(advice: Advice, reduce: Reduce, ranks: int, device: torch.device) -> Advice:
    """Changes of the loss and multiply-accumulates, averaged: all ranks then choose alike.

    A layer may have run on some ranks alone, and sizes of samples may differ between them.
    """
    changes = [
        (0.0, 0.0, 0.0) if own is None else (own.first, own.second, 1.0)
        for tensor in advice.tensors
        for own in [cost.loss_change for cost in tensor.costs.values()]
    ]
    macs = [(float(tensor.macs), 0.0, 0.0) for tensor in advice.tensors]
    table = torch.tensor(changes + macs, dtype=torch.float64, device=device)
    sums = reduce(table, "sum").tolist()
    of_changes, of_macs = iter(sums[: len(changes)]), iter(sums[len(changes) :])

    def averaged(first: float, second: float, count: float) -> LossChange | None:
        return LossChange(first / count, second / count) if count else None

    return replace(
        advice,
        tensors=tuple(
            replace(
                tensor,
                macs=round(next(of_macs)[0] / ranks),
                costs={
                    name: replace(cost, loss_change=averaged(*next(of_changes)))
                    for name, cost in tensor.costs.items()
                },
            )
            for tensor in advice.tensors
        ),
    )


def _width_of_ends(pl_module: nn.Module) -> int | None:
    """Bits of the first and the last layer, if both are wider than most layers between them."""
    bits = [
        max(int(bits_of(weight.spec.format)) for weight in quantizers.weights.values())
        for _, _, quantizers in quantized_layers(pl_module)
        if quantizers.weights
    ]
    between = bits[1:-1]
    usual = max({*between}, key=between.count, default=max(bits))
    ends = min(bits[0], bits[-1])
    return ends if ends > usual else None
