"""What formats really do to the tensors of a model: each is switched to each, and measured."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from statqat_lightning.formats import BlockFormat, get_format
from statqat_lightning.insight.snr import output_snr_by_weight, snr_by_tensor
from statqat_lightning.model.insertion import prepare
from statqat_lightning.model.quantized_model import (
    quantized_layers,
    refresh,
    set_enabled,
    set_observing,
)
from statqat_lightning.recipes import QuantRecipe, QuantRule


@torch.no_grad()
def measured_snr(
    model: nn.Module, batches: Iterable[Any], run: Callable[[nn.Module, Any], Any], fmt: str
) -> dict[str, float]:
    """SNR in dB of each tensor after a switch of all layers to a format, by `{layer}/{role}`.

    Of weights whose inputs are known that of the output. Inputs are those of the float model, all
    their values; what a layer makes of quantized ones is another question.
    """
    model = copy.deepcopy(model).eval()
    inputs = None if isinstance(get_format(fmt), BlockFormat) else fmt
    prepare(model, recipe=QuantRecipe([QuantRule("*", fmt, inputs)]))
    set_enabled(model, weights=False, inputs=False)
    for batch in batches:
        set_observing(model, True)
        run(model, batch)
        set_observing(model, False)
        refresh(model, weights=False, search=True)
    refresh(model, inputs=False, search=True)
    sums: dict[str, list[float]] = {}

    def compare(quantizer: Any) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def measure(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            quantizer.enabled = True
            error = quantizer.quantize(x) - x
            quantizer.enabled = False
            own = sums.setdefault(quantizer.name, [0.0, 0.0])
            own[0] += float(x.double().square().sum())
            own[1] += float(error.double().square().sum())

        return measure

    for layer in quantized_layers(model):
        for quantizer in layer.quantizers.inputs.values():
            layer.module.register_forward_pre_hook(compare(quantizer))
    for batch in batches:
        run(model, batch)
    set_enabled(model, weights=True)
    found = snr_by_tensor(model) | output_snr_by_weight(model)
    of_inputs = {name: 10 * math.log10(signal / noise) for name, (signal, noise) in sums.items()}
    return {name: found[name] for name in found if "/weight" in name} | of_inputs
