"""What `StatQATCallback` adds to checkpoints, and how a resumed run reads it.

Exports read checkpoints by `export.files.reading`, without a Trainer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from statqat_lightning.model.insertion import is_prepared_by, recipe_of
from statqat_lightning.model.quantized_model import (
    learned_by_key,
    quantized_layers,
    quantizer_state,
)
from statqat_lightning.recipes.recipe import QuantRecipe, difference
from statqat_lightning.targets.registry import AUTO

CHECKPOINT_KEY = "statqat_lightning"
STATE_VERSION = 1


@dataclass(frozen=True)
class QuantizerEntry:
    """Writes the entry of a module's quantizers into its checkpoints.

    It holds plain data and no callback, so that it can stay with a module when the fit is over.

    Attributes:
        recipe: The recipe in force as plain data.
        weights: Whether weights are quantized in the phase of the training.
        inputs: Whether inputs are.
        averaged: Whether the checkpoint holds averaged weights, of which the scales know nothing.
        placed_for: The target that the recipe was placed for, if any, and the recipe before that.
        bits: Fewest bits that a format has in the phase of the training; 0 for its own width.
        budget: The budget that formats were chosen for, in words, if any.
    """

    recipe: Mapping[str, Any]
    weights: bool
    inputs: bool
    averaged: bool
    placed_for: tuple[str | None, Mapping[str, Any]] | None = None
    bits: int = 0
    budget: str | None = None

    def __call__(self, module: nn.Module, checkpoint: dict[str, Any]) -> None:
        """Write it, unless the quantizers were taken out or the checkpoint has it already.

        Scales that are parameters leave the weights: they are in the entry, and a float module that
        loads the checkpoint strictly has no place for them.
        """
        if not quantized_layers(module):
            return
        for key in learned_by_key(module):
            checkpoint["state_dict"].pop(key, None)
        if CHECKPOINT_KEY in checkpoint:
            return
        # The module may have got other quantizers since this entry was made, by `prepare` for one.
        is_current = is_prepared_by(module, QuantRecipe.from_dict(self.recipe))
        current = dict(self.recipe) if is_current else recipe_of(module).to_dict()
        checkpoint[CHECKPOINT_KEY] = {
            "version": STATE_VERSION,
            "recipe": current,
            "quantizers": quantizer_state(module),
            "quantized": [self.weights, self.inputs],
            "bits": self.bits,
            "averaged": self.averaged,
            "zero_points": True,
        }
        if self.placed_for is not None and is_current:
            target, recipe = self.placed_for
            placed_for = {"target": target, "recipe": dict(recipe)}
            if self.budget is not None:
                placed_for["budget"] = self.budget
            checkpoint[CHECKPOINT_KEY]["placed_for"] = placed_for


def give_back_scales(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Put learned scales among the weights of a checkpoint again, for a module that has them."""
    quantizers = checkpoint.get(CHECKPOINT_KEY, {}).get("quantizers", {})
    for key, quantizer in learned_by_key(module).items():
        if quantizer.name in quantizers:
            checkpoint["state_dict"].setdefault(key, quantizers[quantizer.name]["scale"])


def read_entry(
    checkpoint: Mapping[str, Any],
    recipe: QuantRecipe,
    target: str | None = None,
    budget: str | None = None,
) -> Mapping[str, Any] | None:
    """The entry in a checkpoint; None in that of a float run.

    Args:
        checkpoint: The checkpoint.
        recipe: The recipe that it should be of.
        target: The target that it should have been placed for; "auto" for any.
        budget: The budget that its formats should have been chosen for, in words.

    Raises:
        ValueError: If it is of a later version, of another recipe, or for another target or budget.
    """
    entry: Mapping[str, Any] | None = checkpoint.get(CHECKPOINT_KEY)
    if entry is None:
        return None
    if entry["version"] > STATE_VERSION:
        raise ValueError(
            f"StatQATCallback: the quantizer state in the checkpoint has version "
            f"{entry['version']}; this one reads {STATE_VERSION}. Update statqat-lightning."
        )
    placed_for = _placed_for(entry)
    if target not in (AUTO, placed_for["target"]):
        raise ValueError(
            f"StatQATCallback: got target={target!r}, but the checkpoint was trained for "
            f"{placed_for['target']!r}. Use that target, or load only the weights (they are those "
            "of the float model)."
        )
    if placed_for.get("budget") != budget:
        raise ValueError(
            f"StatQATCallback: got budget={budget!r}, but the formats in the checkpoint were "
            f"chosen for {placed_for.get('budget')!r}. Use that budget, or load only the weights "
            "(they are those of the float model)."
        )
    if not entry.get("zero_points", False):
        # Plain names of integers had none when it was written, and its run goes on without them.
        recipe = recipe.around_zero()
    if _for_layers(placed_for["recipe"]) != _for_layers(recipe.to_dict()):
        raise ValueError(
            "StatQATCallback: the checkpoint was made with another recipe. Use that recipe, or "
            "load only the weights (they are those of the float model). Checkpoint (-) and "
            f"callback (+):\n{difference(placed_for['recipe'], recipe.to_dict())}"
        )
    return entry


def _for_layers(recipe: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What layers get by a recipe, which is the same for rules that are optional."""
    return [{k: v for k, v in rule.items() if k != "optional"} for rule in recipe["rules"]]


def target_in(entry: Mapping[str, Any]) -> str | None:
    """The target that the run of a checkpoint was placed for."""
    target: str | None = _placed_for(entry)["target"]
    return target


def _placed_for(entry: Mapping[str, Any]) -> Mapping[str, Any]:
    placed: Mapping[str, Any] = entry.get("placed_for", {"target": None, "recipe": entry["recipe"]})
    return placed
