"""A model with quantizers: copies and states, dtypes and devices, switches and refresh."""

from __future__ import annotations

import copy
import io
import math
import pickle
from collections.abc import Callable
from typing import cast

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from statqat_lightning.fake_quant.input_sums import InputSums
from statqat_lightning.fake_quant.observers import add_up
from statqat_lightning.layers.quantized_layer import weight_of
from statqat_lightning.model.insertion import prepare, remove
from statqat_lightning.model.quantized_model import (
    activation_quantizers,
    follow_averaged_weights,
    load_quantizer_state,
    quantized_layers,
    quantizer_state,
    refresh,
    set_enabled,
    set_frozen,
    set_observing,
)
from statqat_lightning.quantizers import get_quantizer
from tests.model.test_insertion import LAYERS, Net, X, calibrated

# Copies


def through_pickle(model: nn.Module) -> nn.Module:
    copied: nn.Module = pickle.loads(pickle.dumps(model))
    return copied


def through_torch_save(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    copied: nn.Module = torch.load(buffer, weights_only=False)
    return copied


@pytest.mark.parametrize("copied_by", [copy.deepcopy, through_pickle, through_torch_save])
def test_a_copy_is_quantized_and_independent(copied_by: Callable[[nn.Module], nn.Module]) -> None:
    model = calibrated(Net(), "int4", "int4").eval()
    before = model(X)
    copied = copied_by(model).eval()
    assert torch.equal(copied(X), before)
    assert [type(m) for m in copied.modules()] == [type(m) for m in model.modules()]
    with torch.no_grad():
        for parameter in copied.parameters():
            parameter.add_(1.0)
    set_observing(copied, True)
    copied(X)
    refresh(copied)
    set_enabled(copied, weights=False)
    assert torch.equal(model(X), before)
    remove(copied)
    assert torch.equal(model(X), before)


def test_quantizer_state_goes_from_model_to_model() -> None:
    model = calibrated(Net(), "int4", "int4")
    copied = Net()
    copied.load_state_dict(model.state_dict())
    prepare(copied, "int4", "int4")
    load_quantizer_state(copied, quantizer_state(model))
    assert torch.equal(copied.eval()(X), model.eval()(X))
    assert list(quantizer_state(model)) == [
        f"{name}/{role}" for name in LAYERS for role in ("weight", "input")
    ]


def test_quantizer_state_of_other_layers_is_refused() -> None:
    model, other = calibrated(Net(), "int4"), Net()
    prepare(other, "int4", exclude=["conv1d"])
    before = quantizer_state(other)
    message = r"only in the model: \[\]; only in the state: \['conv1d/input', 'conv1d/weight'\]"
    with pytest.raises(ValueError, match=message):
        load_quantizer_state(other, quantizer_state(model))
    for name, entries in quantizer_state(other).items():
        assert torch.equal(entries["scale"], before[name]["scale"])


def test_quantizer_state_of_other_shapes_is_refused_as_a_whole() -> None:
    model, other = calibrated(Net(), "int4"), Net()
    prepare(other, "int4", "int4")
    before, state = quantizer_state(other), quantizer_state(model)
    state["conv1d/input"]["running_sums"] = torch.zeros(6)
    with pytest.raises(ValueError, match=r"running_sums has shape \(6,\); expected \(10,\)"):
        load_quantizer_state(other, state)
    for name, entries in quantizer_state(other).items():
        assert torch.equal(entries["scale"], before[name]["scale"])
        assert entries["num_refreshes"] == before[name]["num_refreshes"]


# Layers that are shared, used often, or recomputed


def test_tied_weights_stay_tied() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encode, self.decode = nn.Linear(4, 4), nn.Linear(4, 4)
            self.decode.weight = self.encode.weight

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.decode(self.encode(x))
            return y

    model = calibrated(Tied(), "int4", "int4", x=torch.randn(8, 4))
    assert model.encode.weight is model.decode.weight
    assert len(list(model.parameters())) == 3
    model(torch.randn(8, 4)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    refresh(model)
    (_, _, first), (_, _, second) = quantized_layers(model)
    assert first.weight is not None
    assert second.weight is not None
    assert torch.equal(first.weight.scale, second.weight.scale)


def test_a_module_under_two_names_is_one_layer() -> None:
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    report = prepare(model, "int4", "int4")
    assert report.num_quantized == 1
    assert [name for name, _, _ in quantized_layers(model)] == ["0"]
    set_observing(model, True)
    model(torch.randn(6, 4))
    (quantizer,) = activation_quantizers(model)
    add_up([quantizer.observer])
    assert InputSums(quantizer.observer.sums).count == 48  # both uses
    refresh(model)
    assert quantizer.observer.num_batches == 1


def perceptron(width: int) -> nn.Module:
    layers = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 2))
    return calibrated(layers, "int4", "int4", x=torch.randn(6, width))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_gradient_checkpointing_observes_once_and_changes_nothing(use_reentrant: bool) -> None:
    plain = perceptron(4)
    # Two copies: in both, each weight is quantized by itself and lies in memory of its own, on
    # which the last bit of a sum may depend.
    plain, model = copy.deepcopy(plain), copy.deepcopy(plain)
    x = torch.randn(6, 4, requires_grad=True)
    plain(x).square().sum().backward()
    checkpoint(model, x, use_reentrant=use_reentrant).square().sum().backward()
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        assert torch.equal(ours.grad, theirs.grad)
    for one, other in zip(activation_quantizers(model), activation_quantizers(plain), strict=True):
        add_up([one.observer, other.observer])
        assert InputSums(one.observer.sums).count == 24
        assert torch.equal(one.observer.sums, other.observer.sums)
        assert torch.equal(one.observer.spectrum, other.observer.spectrum)


# Dtype and device


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_statistics_stay_float32_when_the_model_changes_precision(dtype: torch.dtype) -> None:
    model = calibrated(Net(), "int4", "int4").eval()
    scales = {name: entries["scale"] for name, entries in quantizer_state(model).items()}
    model.to(dtype)
    for _, module, quantizers in quantized_layers(model):
        assert module.weight.dtype == dtype
        assert quantizers.weight is not None
        assert quantizers.input is not None
        assert quantizers.weight.scale.dtype == torch.float32
        observer = quantizers.input.observer
        assert {getattr(observer, n).dtype for n in observer.tensors()} == {torch.float32}
    assert all(torch.equal(e["scale"], scales[n]) for n, e in quantizer_state(model).items())
    set_observing(model, True)
    assert model(X.to(dtype)).dtype == dtype
    assert not refresh(model).any()


def test_autocast() -> None:
    model = calibrated(
        nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2)), "int4", "int4", x=torch.randn(4, 8)
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(torch.randn(4, 8))
    assert y.dtype == torch.bfloat16
    y.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    assert not refresh(model).any()


def test_from_the_meta_device_to_the_cpu() -> None:
    expected = calibrated(Net(), "int4", "int4").eval()
    with torch.device("meta"):
        model = Net()
    prepare(model, "int4", "int4")
    for _, _, quantizers in quantized_layers(model):
        assert all(q.scale.device.type == "cpu" and not q.ready for q in quantizers.present())
    model.to_empty(device="cpu")
    model.load_state_dict(expected.state_dict())
    load_quantizer_state(model, quantizer_state(expected))
    assert torch.equal(model.eval()(X), expected(X))


def test_to_empty_leaves_scales_intact() -> None:
    model = calibrated(Net(), "int4", "int4")
    before = quantizer_state(model)
    model.to_empty(device="cpu")
    for name, entries in quantizer_state(model).items():
        assert torch.equal(entries["scale"], before[name]["scale"])


def test_scales_do_not_vanish_on_the_meta_device() -> None:
    model = calibrated(Net(), "int4", "int4")
    model.to("meta")
    assert all(q.scale.device.type == "cpu" for q in activation_quantizers(model))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_model_equals_the_eager_one(backend: str) -> None:
    model = perceptron(8)
    copied = copy.deepcopy(model)
    compiled = cast(nn.Module, torch.compile(copied, backend=backend))
    x = torch.randn(4, 8)
    for net in (model, compiled):
        net(x).square().sum().backward()
        refresh(net)
    assert [name for name, _, _ in quantized_layers(compiled)] == ["0", "2"]
    for ours, theirs in zip(copied.parameters(), model.parameters(), strict=True):
        assert ours.grad is not None
        assert theirs.grad is not None
        torch.testing.assert_close(ours.grad, theirs.grad)
    for one, other in zip(activation_quantizers(copied), activation_quantizers(model), strict=True):
        assert one.observer.num_batches == other.observer.num_batches == 2
        torch.testing.assert_close(one.scale, other.scale)


# Switches and refresh


def test_frozen_inputs_and_enabled_switches() -> None:
    model = calibrated(Net(), "int4", "int4").eval()
    quantized = model(X)
    set_frozen(model, True)
    before = quantizer_state(model)
    model(100 * X)
    refresh(model, weights=False)
    for name, entries in quantizer_state(model).items():
        assert torch.equal(entries["scale"], before[name]["scale"])
    set_enabled(model, weights=False, inputs=False)
    off = model(X)
    set_enabled(model, weights=True)
    weights_only = model(X)
    set_enabled(model, inputs=True)
    assert torch.equal(model(X), quantized)
    assert len({y.sum().item() for y in (quantized, off, weights_only)}) == 3


def test_refresh_follows_the_weight() -> None:
    model = calibrated(Net(), "int8", None)
    before = quantizer_state(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    refresh(model, weights=False)
    assert torch.equal(
        quantizer_state(model)["head/weight"]["scale"], before["head/weight"]["scale"]
    )
    for _ in range(17):  # a search is due by then
        refresh(model)
    followed = weight_snrs(model)
    for layer in quantized_layers(model):
        quantizer, weight = layer.quantizers.weight, weight_of(layer.module)
        assert quantizer is not None
        minmax = get_quantizer("minmax").from_rows(weight.detach().flatten(1), quantizer.fmt)
        quantizer.scale.copy_(minmax.view_as(quantizer.scale))
    for name, snr in weight_snrs(model).items():
        assert followed[name] >= snr - 1e-3


def weight_snrs(model: nn.Module) -> dict[str, float]:
    snrs = {}
    for name, module, quantizers in quantized_layers(model):
        assert quantizers.weight is not None
        signal, noise = quantizers.weight.energies(weight_of(module))
        snrs[name] = 10 * math.log10(float(signal / noise))
    return snrs


def test_bad_inputs_are_reported_by_layer() -> None:
    model = calibrated(Net(), "int4", "int4")
    model(X)
    assert refresh(model).tolist() == [False] * 4
    bad = X.clone()
    bad[0, 0, 0, 0] = torch.nan
    model.eval()(bad)
    assert refresh(model).tolist() == [True] * 4  # NaN spreads to all that follows
    assert all(torch.isfinite(e["scale"]).all() for e in quantizer_state(model).values())


@pytest.mark.parametrize(("factor", "kept"), [(1.02, True), (2.0, False)])
def test_averaged_weights_keep_scales_that_still_serve(factor: float, kept: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))
    prepare(model, "int3", None, first_last_bits=None)
    weights = [layer.quantizers.weights["weight"] for layer in quantized_layers(model)]
    before = [quantizer.scale.clone() for quantizer in weights]
    with torch.no_grad():
        for layer in (model[0], model[2]):
            layer.weight.mul_(factor).add_(0.002 * torch.randn_like(layer.weight))

    follow_averaged_weights(model)

    for quantizer, scale in zip(weights, before, strict=True):
        assert torch.equal(quantizer.scale, scale) == kept
        if not kept:
            torch.testing.assert_close(quantizer.scale, factor * scale, rtol=0.3, atol=0)
