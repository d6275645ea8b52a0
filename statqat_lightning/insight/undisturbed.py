"""Running a model to look at it, and leaving it as it was."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from statqat_lightning.model.quantized_model import QuantizedLayer


@contextmanager
def same_random_numbers(model: nn.Module) -> Iterator[None]:
    """What is drawn meanwhile, on the CPU or the model's GPUs, is drawn again afterwards."""
    devices = {tensor.device for tensor in model.parameters() if tensor.device.type == "cuda"}
    with torch.random.fork_rng(devices=[*devices]):
        yield


@contextmanager
def undisturbed(model: nn.Module, layers: Sequence[QuantizedLayer]) -> Iterator[None]:
    """Eval mode, nothing observed, and everything put back at the end."""
    modes = [(module, module.training) for module in model.modules()]
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    quantizers = [(q, q.enabled) for layer in layers for q in layer.quantizers.present()]
    activations = [(q, q.observing) for layer in layers for q in layer.quantizers.activations()]
    moments = [
        (layer.quantizers, layer.quantizers.weighing, layer.quantizers.ran) for layer in layers
    ]
    with same_random_numbers(model), torch.compiler.set_stance("force_eager"):
        try:
            for module, _ in modes:
                module.training = False
            for activation, _ in activations:
                activation.observing = False
            for own, _, _ in moments:
                own.weighing = ()
            yield
        finally:
            for module, training in modes:
                module.training = training
            for buffer, before in buffers:
                if not torch.equal(buffer, before):
                    buffer.copy_(before)
            for quantizer, enabled in quantizers:
                quantizer.enabled = enabled
            for activation, observing in activations:
                activation.observing = observing
            for own, weighing, ran in moments:
                own.weighing, own.ran = weighing, ran
