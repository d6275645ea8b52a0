"""Every tensor of a model in every candidate format: quantizers with the scales they would have."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from statqat_lightning.error_analysis.spectrum import EnergySpectrum
from statqat_lightning.fake_quant.activation import ActivationFakeQuantizer
from statqat_lightning.fake_quant.fake_quantizer import INPUT, WEIGHT, FakeQuantizer
from statqat_lightning.fake_quant.observers import statistics_of
from statqat_lightning.fake_quant.scale_refresh import follow_statistics, refresh_weights
from statqat_lightning.fake_quant.weight import WeightFakeQuantizer
from statqat_lightning.formats import BlockFormat, get_format
from statqat_lightning.layers.layer_kinds import has_weights
from statqat_lightning.layers.layer_quantizers import LayerQuantizers
from statqat_lightning.layers.quantized_layer import kind_of, weight_of
from statqat_lightning.model.quantized_model import QuantizedLayer, quantized_layers
from statqat_lightning.numerics.snr import energies_db
from statqat_lightning.recipes.rule import activation_spec, weight_spec

Candidates = dict[str, dict[str, FakeQuantizer]]
"""Quantizers by the names of the tensor, `{layer}/{role}`, and of the format."""


@torch.no_grad()
def candidate_quantizers(
    model: nn.Module, weights: Sequence[str], inputs: Sequence[str]
) -> Candidates:
    """A quantizer for each weight and each input of a model in each format, with its scale.

    Scales of inputs come from the running statistics of the quantizers that the model has, those of
    weights from the weights and the moments of their inputs. Layers that have not run have none: of
    them no input is known.

    Args:
        model: A model with quantizers whose inputs have been observed.
        weights: Names of formats for weights.
        inputs: Names of formats for inputs; no block formats.

    Raises:
        ValueError: If a format is unknown, or a block format is meant for inputs.
    """
    of_inputs = candidates_for_inputs(model, inputs)
    for quantizers in of_inputs.values():
        for quantizer in quantizers.values():
            _decide_now(quantizer)
    return candidates_for_weights(model, weights) | ready_candidates(model, of_inputs)


@torch.no_grad()
def candidates_for_weights(model: nn.Module, names: Sequence[str]) -> Candidates:
    """A quantizer for each weight of a model in each format, with its scale.

    Args:
        model: A model with quantizers whose inputs have been observed.
        names: Names of formats.
    """
    return {
        own.name: {name: _for_weight(layer, role, own, name) for name in names}
        for layer in layers_that_ran(model)
        for role, own in layer.quantizers.weights.items()
    }


def ready_candidates(model: nn.Module, inputs: Candidates) -> Candidates:
    """Those candidates of inputs that have scales, of layers that have run."""
    return {
        observed.name: inputs[observed.name]
        for layer in layers_that_ran(model)
        for observed in layer.quantizers.inputs.values()
        if any(quantizer.ready for quantizer in inputs.get(observed.name, {}).values())
    }


def candidates_for_inputs(model: nn.Module, names: Sequence[str]) -> Candidates:
    """A quantizer for each input of a model in each format, which is to follow the statistics.

    Signs and zero points of plain integer names will be chosen by the same statistics.

    Args:
        model: A model with quantizers whose inputs will be observed.
        names: Names of formats; block formats have one scale a block, and no input is quantized
            like that.

    Raises:
        ValueError: If a format is unknown, or a block format.
    """
    for name in names:
        if isinstance(get_format(name), BlockFormat):
            raise ValueError(
                f"candidate formats of inputs: got {name!r}; expected formats with one scale for "
                "the tensor. Block formats are for weights."
            )
    return {
        observed.name: {name: _for_input(observed, name) for name in names}
        for layer in layers_with_weights(model)
        for role, observed in layer.quantizers.inputs.items()
        if role in kind_of(layer.module).inputs
    }


def follow_inputs(model: nn.Module, candidates: Candidates) -> None:
    """Let candidates of inputs choose format and scale as `refresh` does after each batch.

    A search keeps a scale that is nearly as good, so the scale of a calibration depends on the way
    there.

    Args:
        model: A model with quantizers whose statistics hold one more batch.
        candidates: See `candidates_for_inputs`.
    """
    quantizers: list[ActivationFakeQuantizer] = []
    for layer in layers_with_weights(model):
        for observed in layer.quantizers.inputs.values():
            for quantizer in candidates.get(observed.name, {}).values():
                assert isinstance(quantizer, ActivationFakeQuantizer), quantizer.name
                quantizer.lowest = observed.lowest
                quantizers.append(quantizer)
    follow_statistics([quantizer for quantizer in quantizers if quantizer.ready])
    for quantizer in quantizers:
        quantizer.decide()


def layers_with_weights(model: nn.Module) -> list[QuantizedLayer]:
    """The quantized layers whose kind has weights, those with parametrizations included."""
    return [layer for layer in quantized_layers(model) if has_weights(kind_of(layer.module))]


def layers_that_ran(model: nn.Module) -> list[QuantizedLayer]:
    """Those of them that have run, or whose weights another module has read."""
    return [layer for layer in layers_with_weights(model) if layer.quantizers.ran]


def _for_weight(
    layer: QuantizedLayer, role: str, own: WeightFakeQuantizer, name: str
) -> FakeQuantizer:
    spec, weight = weight_spec(name), weight_of(layer.module, role)
    assert spec is not None
    kind = kind_of(layer.module)
    channels = kind.channels(layer.module, role, tuple(weight.shape))
    axis = kind.weights(layer.module)[role]
    quantizer = WeightFakeQuantizer(layer.name, spec, weight, axis, role, channels)
    if quantizer.input_moments is not None:
        quantizer.input_moments = own.input_moments
    refresh_weights([(quantizer, weight)], search=True)
    return quantizer


def _for_input(observed: ActivationFakeQuantizer, name: str) -> ActivationFakeQuantizer:
    spec = activation_spec(name, "inputs")
    assert spec is not None
    device = observed.scale.device
    quantizer = ActivationFakeQuantizer(
        observed.layer, spec, observed.observer.config, device, observed.role
    )
    quantizer.observer, quantizer.lowest = observed.observer, observed.lowest
    return quantizer


def candidate_for_input(observed: ActivationFakeQuantizer, name: str) -> FakeQuantizer:
    """A quantizer of a format for an input that has been observed, with the scale it would have."""
    quantizer = _for_input(observed, name)
    _decide_now(quantizer)
    return quantizer


def _decide_now(quantizer: FakeQuantizer) -> None:
    """Choose sign, zero point and scale: all that will be seen has been seen."""
    assert isinstance(quantizer, ActivationFakeQuantizer), quantizer.name
    quantizer.deciding = False
    quantizer.decide()


@torch.no_grad()
def predicted_energies(
    quantizer: FakeQuantizer, weight: Tensor | None, spectrum: EnergySpectrum | None = None
) -> tuple[float, float, float | None]:
    """Energies that a tensor has, and that its error would have with a quantizer.

    Args:
        quantizer: A candidate.
        weight: The weight that it is for; None for an input.
        spectrum: Of an input, one row; None: the running one of its quantizer, which is that of a
            sample.

    Returns:
        Energy of the tensor, energy of its error: of a weight measured, of an input predicted from
        its spectrum; and the SNR in dB of the layer's output if this weight alone is rounded, None
        for inputs and where it is not known.
    """
    if isinstance(quantizer, WeightFakeQuantizer):
        assert weight is not None, "the candidate is for one"
        signal, noise = (float(energy) for energy in quantizer.energies(weight))
        moments = quantizer.input_moments
        if moments is None or not moments.known:
            return signal, noise, None
        of_output = [float(energy) for energy in quantizer.energies(weight, of_output=True)]
        return signal, noise, energies_db(*of_output) if of_output[0] > 0 else None
    assert isinstance(quantizer, ActivationFakeQuantizer)
    if spectrum is None:
        spectrum = statistics_of([quantizer.observer]).spectrum
    assert spectrum is not None, "candidates of inputs choose their scales by the spectrum"
    noise = float(spectrum.mse(quantizer.fmt, quantizer.qparams.scale.reshape(1)))
    return float(spectrum.power), noise, None


@contextmanager
def alone(layer: QuantizedLayer, candidate: FakeQuantizer) -> Iterator[None]:
    """Quantize one tensor of a layer with a candidate, whatever its own quantizer does.

    The other tensors of the layer are quantized as they are switched.
    """
    own, role, attributes = layer.quantizers, candidate.role, layer.module.__dict__
    before = own.weights[role] if role in own.weights else own.inputs[role]
    reads_itself = isinstance(before, WeightFakeQuantizer) and bool(before.read_by)
    if reads_itself:
        # A forward of the user's own reads its weight as an attribute, see `weight_views`.
        attributes[role] = candidate.quantize(weight_of(layer.module, role))
    put_in(own, candidate)
    try:
        yield
    finally:
        put_in(own, before)
        if reads_itself:
            del attributes[role]


def put_in(quantizers: LayerQuantizers, quantizer: FakeQuantizer) -> None:
    """Let a quantizer take the place of the one that its layer has for the same tensor."""
    if isinstance(quantizer, WeightFakeQuantizer):
        quantizers.weights[quantizer.role] = quantizer
        quantizers.weight = quantizers.weights.get(WEIGHT)
    else:
        assert isinstance(quantizer, ActivationFakeQuantizer), quantizer.name
        quantizers.inputs[quantizer.role] = quantizer
        quantizers.input = quantizers.inputs.get(INPUT)
