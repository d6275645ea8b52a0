"""Weights quantized together: the same values and gradients as each by itself."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from statqat_lightning.fake_quant.tensor_spec import TensorSpec
from statqat_lightning.layers.quantized_layer import weight_of
from statqat_lightning.model.insertion import prepare
from statqat_lightning.model.quantized_model import (
    quantized_layers,
    refresh,
    set_enabled,
    set_observing,
)
from statqat_lightning.recipes.recipe import QuantRecipe
from statqat_lightning.recipes.rule import QuantRule


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.Conv2d(8, 8, 3),
        nn.Flatten(),
        nn.Linear(32, 5),
    )


def quantized_weights(model: nn.Module) -> list[Tensor]:
    """What each layer's forward gets for its weight."""
    return [q.weight(weight_of(m)) for _, m, q in quantized_layers(model) if q.weight]


def assert_like_alone(model: nn.Module) -> None:
    """Values and gradients of all weights are those that each quantizer gives by itself."""
    for layer, y in zip(quantized_layers(model), quantized_weights(model), strict=True):
        weight, quantizer = weight_of(layer.module), layer.quantizers.weight
        assert quantizer is not None
        upstream = torch.randn(weight.shape)
        (gradient,) = torch.autograd.grad(y, weight, upstream)
        x = weight.detach().clone().requires_grad_()
        alone = quantizer.quantize(x)
        (expected,) = torch.autograd.grad(alone, x, upstream)
        assert torch.equal(y, alone)
        torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=0)
        assert torch.equal(gradient == 0, expected == 0)


@pytest.mark.parametrize("fmt", ["int2", "int8", "fp4_e2m1", "fp8_e4m3"])
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel", "per_group:3"])
def test_values_and_gradients(fmt: str, granularity: str) -> None:
    model = network()
    if granularity == "per_group:3":
        model[5] = nn.Linear(33, 5)  # a multiple of three
    recipe = QuantRecipe([QuantRule("*", weights=TensorSpec(fmt, granularity))])
    prepare(model, recipe=recipe)
    set_observing(model, True)
    assert_like_alone(model)


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel", "per_group:9"])
def test_channels_last(granularity: str) -> None:
    model = network().to(memory_format=torch.channels_last)
    model[0] = nn.Conv2d(9, 8, 3).to(memory_format=torch.channels_last)
    model[2] = nn.Conv2d(9, 8, 3).to(memory_format=torch.channels_last)
    model[3] = nn.Conv2d(9, 8, 3).to(memory_format=torch.channels_last)
    model[5] = nn.Linear(36, 5)
    recipe = QuantRecipe([QuantRule("*", weights=TensorSpec("int4", granularity))])
    prepare(model, recipe=recipe)
    set_observing(model, True)
    assert_like_alone(model)
    first = quantized_layers(model)[0]
    quantizer, weight = first.quantizers.weight, weight_of(first.module)
    assert quantizer is not None
    assert quantizer.together is not None
    together = quantizer.together.take(quantizer, weight)
    # Groups run along the input channels and the places of a kernel, not as these lie in memory.
    assert (together is None) == (granularity == "per_group:9")
    if together is not None:
        assert together.is_contiguous(memory_format=torch.channels_last)


def write_in_place(weight: Tensor) -> None:
    with torch.no_grad():
        weight.mul_(1.5)


def swap_storage(weight: Tensor) -> None:
    weight.data = weight.detach() * 1.5


def load(weight: Tensor) -> None:
    nn.ParameterList([weight]).load_state_dict({"0": weight.detach() * 1.5})


@pytest.mark.parametrize("change", [write_in_place, swap_storage, load])
def test_a_weight_that_changes_within_a_step_is_quantized_anew(
    change: Callable[[Tensor], None],
) -> None:
    model = network()
    prepare(model, "int4", None)
    set_observing(model, True)
    assert_like_alone(model)
    change(weight_of(model[2]))
    assert_like_alone(model)


def test_an_edit_of_data_before_the_first_forward_is_seen() -> None:
    model = network()
    prepare(model, "int4", None)
    set_observing(model, True)
    weight_of(model[2]).data.clamp_(-0.01, 0.01)
    assert_like_alone(model)


def test_every_step_starts_anew() -> None:
    model = network()
    prepare(model, "int4", None)
    for _ in range(2):
        set_observing(model, True)
        assert_like_alone(model)
        set_observing(model, False)
        weight_of(model[2]).data.mul_(0.5)
        assert_like_alone(model)


def test_scales_that_change_within_a_step_are_seen() -> None:
    model = network()
    prepare(model, "int4", None)
    set_observing(model, True)
    assert_like_alone(model)
    write_in_place(weight_of(model[2]))
    refresh(model)
    assert_like_alone(model)


def test_switches_are_heeded() -> None:
    model = network()
    prepare(model, "int4", None)
    set_observing(model, True)
    quantized_weights(model)
    set_enabled(model, weights=False)
    weights = [weight_of(m) for _, m, _ in quantized_layers(model)]
    assert all(a is b for a, b in zip(quantized_weights(model), weights, strict=True))


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
def test_a_copy_within_a_step_has_its_own_weights(
    duplicate: Callable[[nn.Sequential], nn.Sequential],
) -> None:
    model = network()
    prepare(model, "int4", None)
    set_observing(model, True)
    quantized_weights(model)
    copied = duplicate(model)
    write_in_place(weight_of(copied[2]))
    assert_like_alone(copied)
    assert_like_alone(model)


@pytest.mark.parametrize("gradient", ["pass_through", "magnitude"])
def test_other_gradients_are_left_to_the_layer(gradient: str) -> None:
    model = network()
    recipe = QuantRecipe([QuantRule("*", weights=TensorSpec("int2", gradient=gradient))])
    prepare(model, recipe=recipe)
    set_observing(model, True)
    assert_like_alone(model)


def test_half_precision_weights_are_left_to_the_layer() -> None:
    model = network().to(torch.bfloat16)
    prepare(model, "int4", None)
    set_observing(model, True)
    assert [w.dtype for w in quantized_weights(model)] == [torch.bfloat16] * 4


def test_a_shared_weight_and_a_transposed_one() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6))
    model[1].weight = model[0].weight
    model[2].weight = nn.Parameter(torch.randn(6, 6).T)
    prepare(model, "int4", None)
    set_observing(model, True)
    assert_like_alone(model)
