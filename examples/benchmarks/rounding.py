"""Ways to round the weights of a trained network, shared by benchmarks that do it without training.

Scales of ours need to know what the layers' inputs are like; all others follow from the weights.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from statqat_lightning import QuantRecipe, TensorSpec, compensate, prepare
from statqat_lightning.model.quantized_model import refresh, set_enabled, set_observing


class Method(NamedTuple):
    """How scales are chosen.

    Attributes:
        quantizer: Its name, None for ours.
        objective: Of ours.
        compensates: Whether rounding errors are made up for.
    """

    quantizer: str | None
    objective: str | None = None
    compensates: bool = False

    def spec(self, fmt: str, granularity: str | None = None) -> TensorSpec:
        """The weights' specification.

        Raises:
            ValueError: If the method has no form for the format.
        """
        return TensorSpec(fmt, granularity, self.quantizer, objective=self.objective)


OURS = "StatQAT"
METHODS = {
    OURS: Method(None, "output"),
    "StatQAT, compensated": Method(None, "output", compensates=True),
    "least error of the weight": Method(None, "weight"),
    "min-max": Method("minmax"),
    "MSE grid": Method("mse_grid"),
    "OCTAV": Method("octav"),
}


@torch.no_grad()
def rounded(
    model: nn.Module, recipe: QuantRecipe, method: Method, seen: Iterable[Tensor]
) -> nn.Module:
    """A copy of a model, in eval mode, with its weights rounded; inputs stay in float.

    Args:
        model: In float; it is left as it is.
        recipe: What to round, with the method's `spec`.
        method: How.
        seen: Batches that inputs are seen on.
    """
    model = copy.deepcopy(model).eval()
    prepare(model, recipe=recipe)
    batches = list(seen)

    def run() -> None:
        for batch in batches:
            model(batch)

    if method.objective == "output":
        set_enabled(model, weights=False)
        set_observing(model, True)
        run()
        set_observing(model, False)
        refresh(model, search=True)
        set_enabled(model, weights=True)
    if method.compensates:
        compensate(model, run)
    return model
