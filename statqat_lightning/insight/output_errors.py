"""What quantization does to the output of each layer: made in the layer, or inherited by it.

Two runs of a batch and two extra calls of each layer tell all layers apart: the float network and
the quantized one run once each, and each layer runs the other way, too, on the inputs it gets.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from statqat_lightning.fake_quant.fake_quantizer import FakeQuantizer
from statqat_lightning.insight.layer_snr import LayerSNR
from statqat_lightning.insight.snr import OutputErrors
from statqat_lightning.insight.undisturbed import undisturbed
from statqat_lightning.model.quantized_model import QuantizedLayer, quantized_layers

_LARGEST_SAMPLE = 1 << 18
"""Values of an output that are compared: spread evenly over larger ones."""


@torch.no_grad()
def output_errors(model: nn.Module, run: Callable[[], Any]) -> dict[str, OutputErrors]:
    """The SNR of each layer's output, split into what the layer makes and what it inherits.

    The model runs in eval mode. Modes, buffers, random numbers and what quantizers have observed
    are put back, so that nothing shows that it ran. It costs four forward passes, whatever the
    number of layers, and keeps 262 144 values of each output at most.

    Args:
        model: A model with quantizers, with the scales in force.
        run: Runs it on one batch: `lambda: model(x)`. It runs twice and has to do the same.

    Returns:
        Errors by the name of the layer, in the order in which the layers run; infinite where
        nothing was lost. These are the layers with parameters of their own that ran; those whose
        output is no floating-point tensor are left out.

    Raises:
        ValueError: If the model has no quantized layer, or ran other layers, or with other shapes,
            the second time.
    """
    comparison = OutputComparison(model)
    comparison.run(run)
    return comparison.errors()


class OutputComparison:
    """Runs a model in float and quantized, and adds up what its layers' outputs differ by.

    Args:
        model: A model with quantizers.
        over_ranks: Whether `errors` sums over all ranks of `torch.distributed`, all of which then
            have to ask. One reduction serves all layers.

    Raises:
        ValueError: If the model has no quantized layer with parameters.
    """

    def __init__(self, model: nn.Module, over_ranks: bool = False) -> None:
        self._model = model
        self._found = quantized_layers(model)
        self._layers = [layer for layer in self._found if _has_parameters(layer.module)]
        if not self._layers:
            raise ValueError(
                f"output_errors: {type(model).__name__} has no quantized layers with parameters; "
                "call `prepare` first."
            )
        names = [layer.name for layer in self._layers]
        device = next(model.parameters()).device
        self._made, self._inherited, self._total = (
            LayerSNR(names, sync_on_compute=over_ranks).to(device) for _ in range(3)
        )
        self._float: dict[str, list[Tensor]] = {}
        self._switches: dict[str, list[FakeQuantizer]] = {}
        self._number: dict[str, int] = {}
        self._busy = False

    @torch.no_grad()
    def run(self, run: Callable[[], Any]) -> None:
        """Add one batch, see `output_errors`."""
        self._switches = {
            layer.name: [q for q in layer.quantizers.present() if q.enabled]
            for layer in self._found
        }
        self._float.clear()
        with undisturbed(self._model, self._found):
            self._run(run, quantized=False)
            self._run(run, quantized=True)

    def _run(self, run: Callable[[], Any], quantized: bool) -> None:
        """Run the model with its quantizers on or off, and each layer the other way, too."""
        for switches in self._switches.values():
            _switch(switches, quantized)
        self._number = {}
        with ExitStack() as stack:
            for layer in self._layers:
                hook = self._hook(layer, quantized)
                handle = layer.module.register_forward_hook(hook, prepend=True, with_kwargs=True)
                stack.callback(handle.remove)
            run()
        if quantized:
            for name, outputs in self._float.items():
                if len(outputs) != self._number.get(name, 0):
                    raise _differs(name)

    def _hook(self, layer: QuantizedLayer, quantized: bool) -> Callable[..., None]:
        switches = self._switches[layer.name]

        def compare(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if self._busy:
                return  # a layer inside of one that runs the other way
            # Taken before anything else runs: activations may write to the output.
            own = _sample(output)
            if own is None:
                return
            self._busy = True
            _switch(switches, not quantized)
            try:
                other = _sample(module.forward(*args, **kwargs))
            finally:
                _switch(switches, quantized)
                self._busy = False
            assert other is not None, "the same layer with the same inputs"
            number = self._number.get(layer.name, 0)
            self._number[layer.name] = number + 1
            if not quantized:
                self._float.setdefault(layer.name, []).append(own)
                self._made.update({layer.name: own}, {layer.name: other})
                return
            outputs = self._float.get(layer.name, [])
            if number >= len(outputs) or outputs[number].shape != own.shape:
                raise _differs(layer.name)
            exact = {layer.name: outputs[number]}
            self._inherited.update(exact, {layer.name: other})
            self._total.update(exact, {layer.name: own})

        return compare

    def errors(self) -> dict[str, OutputErrors]:
        """SNR of the outputs over all batches, in decibels."""
        tables = [_values_of(metric) for metric in (self._made, self._inherited, self._total)]
        names = dict.fromkeys([*self._float, *(layer.name for layer in self._layers)])
        return {
            name: OutputErrors(*values)
            for name in names
            for values in [[table[name] for table in tables]]
            if not math.isnan(values[0])
        }


def _values_of(metric: LayerSNR) -> dict[str, float]:
    """Decibels by layer; one transfer from the device serves all."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The ``compute`` method of metric .* was called before")
        values = metric.compute()
    assert isinstance(values, dict), "the metric has names"
    return dict(zip(values, torch.stack([*values.values()]).tolist(), strict=True))


def _differs(name: str) -> ValueError:
    return ValueError(
        f"output_errors: {name} ran otherwise in the second run; expected `run` to do the same "
        "each time."
    )


def _has_parameters(module: nn.Module) -> bool:
    """Whether it can run twice at little cost: blocks hold layers, activations may overwrite."""
    return any(True for _ in module.parameters(recurse=False))


def _switch(quantizers: Sequence[FakeQuantizer], on: bool) -> None:
    for quantizer in quantizers:
        quantizer.enabled = on


def _sample(output: Any) -> Tensor | None:
    """Values of the first floating-point tensor of an output, float32 `(n,)`, as a copy."""
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.numel():
            every = -(-leaf.numel() // _LARGEST_SAMPLE)
            return leaf.detach().reshape(-1)[::every].to(torch.float32, copy=True)
    return None
