"""The quantizers of one layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from statqat_lightning.fake_quant.activation import ActivationFakeQuantizer
from statqat_lightning.fake_quant.fake_quantizer import INPUT, WEIGHT, FakeQuantizer, recomputing
from statqat_lightning.fake_quant.weight import WeightFakeQuantizer


class LayerQuantizers:
    """The quantizers of one layer.

    Attributes:
        weights: By name of the parameter.
        inputs: By name of the input, see `LayerKind`.
        output: That of the output, or None.
        results: Those of results of functions that the forward calls, see `function_results`.
        counts: How often the forward called each kind of those when it first ran.
        weight, input: Those of these names, or None: most layers have no others.
        shown: Quantized weights that the layer's attributes hold while a module runs that reads
            them without calling the layer, see `weight_views`.
        weighing: The weights for which moments of inputs are wanted, now or at another step.
        watchers: Functions that are told the name and the value of each input.
        ran: Whether the layer has run, or a module that reads its weights, since it has these
            quantizers.
    """

    def __init__(
        self,
        weights: Mapping[str, WeightFakeQuantizer] | None = None,
        inputs: Mapping[str, ActivationFakeQuantizer] | None = None,
        output: ActivationFakeQuantizer | None = None,
        results: Mapping[str, ActivationFakeQuantizer] | None = None,
    ) -> None:
        self.weights = dict(weights or {})
        self.inputs = dict(inputs or {})
        self.output = output
        self.results = dict(results or {})
        self.counts: dict[str, int] | None = None
        self.weight = self.weights.get(WEIGHT)
        self.input = self.inputs.get(INPUT)
        self.shown: dict[str, Tensor] = {}
        self.weighing: tuple[WeightFakeQuantizer, ...] = ()
        self.watchers: tuple[Callable[[str, Any], None], ...] = ()
        self.ran = False

    def weight_for(self, module: nn.Module, role: str = WEIGHT) -> Tensor:
        """A weight of the layer as its forward is to use it, for `module`, the layer itself."""
        if (shown := self.shown.get(role)) is not None:
            return shown
        own: Tensor = getattr(module, role)
        quantizer = self.weights.get(role)
        return own if quantizer is None else quantizer(own)

    def weigh(self, role: str, x: Any) -> None:
        """Add an input to the moments of those weights that are searched for next.

        Whoever watches is told, too.
        """
        for tell in self.watchers:
            tell(role, x)
        for weight in self.weighing:
            # A compiled graph must not depend on what changes from step to step: it always adds.
            if (torch.compiler.is_compiling() or weight.is_due) and not recomputing():
                assert weight.input_moments is not None, "it is one of those with moments"
                weight.input_moments.add(role, x)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"shown": {}, "watchers": ()}  # of a graph, and of a moment

    def of_input(self, role: str) -> ActivationFakeQuantizer | None:
        """That of an input, or None."""
        return self.inputs.get(role)

    def present(self) -> list[FakeQuantizer]:
        """All of them: weights, inputs, results of functions, output."""
        return [*self.weights.values(), *self.activations()]

    def activations(self) -> list[ActivationFakeQuantizer]:
        """Those of inputs, then those of results of functions, then that of the output."""
        found = [*self.inputs.values(), *self.results.values()]
        return found if self.output is None else [*found, self.output]
