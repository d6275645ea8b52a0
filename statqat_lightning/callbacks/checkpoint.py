"""What `StatQATCallback` adds to checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from statqat_lightning.insertion import quantized_layers, quantizer_state
from statqat_lightning.recipe import QuantRecipe, difference

CHECKPOINT_KEY = "statqat_lightning"
STATE_VERSION = 1


@dataclass(frozen=True)
class QuantizerEntry:
    """Writes the entry of a module's quantizers into its checkpoints.

    It holds plain data and no callback, so that it can stay with a module when the fit is over.

    Attributes:
        recipe: The recipe as plain data.
        weights: Whether weights are quantized in the phase of the training.
        inputs: Whether inputs are.
        averaged: Whether the checkpoint holds averaged weights, of which the scales know nothing.
    """

    recipe: Mapping[str, Any]
    weights: bool
    inputs: bool
    averaged: bool

    def __call__(self, module: nn.Module, checkpoint: dict[str, Any]) -> None:
        """Write it, unless the quantizers were taken out or the checkpoint has it already."""
        if CHECKPOINT_KEY in checkpoint or not quantized_layers(module):
            return
        checkpoint[CHECKPOINT_KEY] = {
            "version": STATE_VERSION,
            "recipe": dict(self.recipe),
            "quantizers": quantizer_state(module),
            "quantized": [self.weights, self.inputs],
            "averaged": self.averaged,
        }


def read_entry(checkpoint: Mapping[str, Any], recipe: QuantRecipe) -> Mapping[str, Any] | None:
    """The entry in a checkpoint; None in that of a float run.

    Raises:
        ValueError: If it is of a later version or of another recipe.
    """
    entry: Mapping[str, Any] | None = checkpoint.get(CHECKPOINT_KEY)
    if entry is None:
        return None
    if entry["version"] > STATE_VERSION:
        raise ValueError(
            f"StatQATCallback: the quantizer state in the checkpoint has version "
            f"{entry['version']}; this one reads {STATE_VERSION}. Update statqat-lightning."
        )
    if entry["recipe"] != recipe.to_dict():
        raise ValueError(
            "StatQATCallback: the checkpoint was made with another recipe. Use that recipe, or "
            "load only the weights (they are those of the float model). Checkpoint (-) and "
            f"callback (+):\n{difference(entry['recipe'], recipe.to_dict())}"
        )
    return entry
