"""Predicted changes of the loss against per-sample gradients of torch.func."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from statqat_lightning.insight.candidates import Candidates, candidate_quantizers
from statqat_lightning.insight.loss_changes import LossChange, predicted_loss_changes
from statqat_lightning.insight.observed import candidates_of, observed_copy
from statqat_lightning.model.insertion import prepare, remove
from statqat_lightning.model.quantized_model import quantizer_state, refresh, set_observing
from tests.callbacks.digits import assert_same

FORMATS = ["int3", "int8"]
Batch = tuple[Tensor, Tensor]


def mean_loss(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def quantizers_of(
    model: nn.Module, batches: list[Batch], loss: Callable[[nn.Module, Any], Tensor] = mean_loss
) -> tuple[nn.Module, Candidates]:
    """A copy of a model with quantizers, and candidates for its tensors."""
    observed = observed_copy(model, batches, loss, FORMATS)
    return observed.model, candidates_of(observed, FORMATS)


def predicted(
    model: nn.Module,
    batches: list[Batch],
    loss: Callable[[nn.Module, Any], Tensor] = mean_loss,
) -> tuple[dict[tuple[str, str], LossChange], Candidates, nn.Module]:
    trial, candidates = quantizers_of(model, batches, loss)
    return predicted_loss_changes(trial, batches, loss, candidates), candidates, trial


def by_hand(
    model: nn.Module, batches: list[Batch], name: str, error: Tensor
) -> tuple[float, float]:
    """First and second order for an error of a parameter, from the gradient of each sample."""
    parameters = {key: p.detach() for key, p in model.named_parameters()}

    def of_sample(own: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, own, (x.unsqueeze(0),)), y.unsqueeze(0))

    orders = []
    for x, y in batches:
        if any(isinstance(module, nn.LSTM) for module in model.modules()):  # vmap has no rule
            own = [grad(of_sample)(parameters, *sample)[name] for sample in zip(x, y, strict=True)]
            gradients = torch.stack(own)
        else:
            gradients = vmap(grad(of_sample), in_dims=(None, 0, 0))(parameters, x, y)[name]
        products = (gradients * error).flatten(1).sum(1)
        orders.append((products.mean(), products.square().mean() / 2))
    first, second = (float(torch.stack(x).mean()) for x in zip(*orders, strict=True))
    return first, second


class Loop(nn.Module):
    """One layer runs three times for each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.step, self.head = nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = torch.tanh(self.step(x)) + x
        out: Tensor = self.head(x)
        return out


class InPlace(nn.Module):
    """Outputs are overwritten, one of them a view of another tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.up = nn.Linear(6, 8), nn.Conv1d(1, 1, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu_()
        x = self.up(x.unsqueeze(1)).squeeze(1)
        x.mul_(2.0).tanh_()
        out: Tensor = self.head(x)
        out += 1.0
        return out


def convolutional() -> nn.Module:
    layers = nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 4, 3), nn.GELU(), nn.Conv1d(4, 4, 2, groups=2)
    return nn.Sequential(*layers, nn.Flatten(), nn.ReLU(inplace=True), nn.Linear(12, 4))


class Attention(nn.Module):
    """The rows of the last projection lie by place, then by sample."""

    def __init__(self, batch_first: bool, width: int = 2) -> None:
        super().__init__()
        self.width = width
        self.attention = nn.MultiheadAttention(width, 1, batch_first=batch_first)
        self.head = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unflatten(1, (-1, self.width))  # (samples, places, width)
        if not self.attention.batch_first:
            x = x.transpose(0, 1)
        mixed, _ = self.attention(x, x, x)
        mixed += 1.0  # in place: the output of the attention is a view
        out: Tensor = self.head(mixed).mean(1 if self.attention.batch_first else 0)
        return out


def batches(number: int = 2, size: int = 9) -> list[Batch]:
    return [(torch.randn(size, 6), torch.randint(0, 4, (size,))) for _ in range(number)]


@pytest.mark.parametrize(
    ("make", "layers"),
    [
        (lambda: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), ("0", "2")),
        (Loop, ("step", "head")),
        (InPlace, ("first", "up", "head")),
        (convolutional, ("1", "3", "6")),
        (lambda: Attention(True), ("attention.out_proj", "head")),
        (lambda: Attention(False), ("attention.out_proj", "head")),
    ],
)
def test_weights_against_the_gradients_of_single_samples(
    make: Callable[[], nn.Module], layers: tuple[str, ...]
) -> None:
    model, data = make().eval(), batches()
    changes, candidates, _ = predicted(model, data)
    for layer in layers:
        weight = model.get_parameter(f"{layer}.weight").detach()
        for fmt in FORMATS:
            error = candidates[f"{layer}/weight"][fmt].quantize(weight) - weight
            first, second = by_hand(model, data, f"{layer}.weight", error)
            found = changes[f"{layer}/weight", fmt]
            assert second > 0
            assert found.first == pytest.approx(first, rel=1e-3, abs=1e-6)
            assert found.second == pytest.approx(second, rel=1e-3, abs=1e-9)
            assert found.total == found.first + found.second


def test_more_places_than_samples_in_attention_that_is_not_batch_first() -> None:
    """As many places as a multiple of the samples are not taken for windows of them."""
    model = Attention(False, width=1).eval()
    data = batches(1, size=3)
    changes, candidates, _ = predicted(model, data)
    for layer in ("attention.out_proj", "head"):
        weight = model.get_parameter(f"{layer}.weight").detach()
        error = candidates[f"{layer}/weight"]["int3"].quantize(weight) - weight
        _, second = by_hand(model, data, f"{layer}.weight", error)
        found = changes[f"{layer}/weight", "int3"].second
        assert found == pytest.approx(second, rel=1e-3, abs=1e-12)


def test_inputs_against_the_gradients_of_single_samples() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    data = batches()
    changes, candidates, _ = predicted(model, data)
    for fmt in FORMATS:
        orders = []
        for x, y in data:
            hidden = model[:2](x).detach()
            error = candidates["2/input"][fmt].quantize(hidden) - hidden

            def of_sample(h: Tensor, y: Tensor) -> Tensor:
                return F.cross_entropy(model[2](h.unsqueeze(0)), y.unsqueeze(0))

            products = (vmap(grad(of_sample))(hidden, y) * error).sum(1).detach()
            orders.append((products.mean(), products.square().mean() / 2))
        first, second = (float(torch.stack(x).mean()) for x in zip(*orders, strict=True))
        assert changes["2/input", fmt].first == pytest.approx(first, rel=1e-3, abs=1e-6)
        assert changes["2/input", fmt].second == pytest.approx(second, rel=1e-3)


class OwnForward(nn.Linear):
    """A user's layer reads its weight in a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * 2.0, self.bias)


def doubled(layer: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, layer.weight * 2.0, layer.bias)


class Reader(nn.Module):
    """Reads a weight without calling its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.read, self.idle = OwnForward(6, 8), nn.Linear(8, 4), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.own(x).relu(), self.read.weight, self.read.bias)


@pytest.mark.parametrize("on_the_instance", [False, True])
def test_layers_that_are_not_called_as_layers(on_the_instance: bool) -> None:
    model, data = Reader().eval(), batches()
    if on_the_instance:
        model.own = nn.Linear(6, 8)
        model.own.forward = types.MethodType(doubled, model.own)  # type: ignore[method-assign]
    changes, candidates, _ = predicted(model, data)
    weight = model.own.weight.detach()
    error = candidates["own/weight"]["int3"].quantize(weight) - weight
    _, second = by_hand(model, data, "own.weight", error)
    assert changes["own/weight", "int3"].second == pytest.approx(second, rel=1e-3)
    # Nothing is predicted where the output of the layer does not show the error, or there is none.
    assert {name for name, _ in changes} - {"own/input"} == {"own/weight"}
    assert "read/weight" in candidates
    assert not any(name.startswith("idle") for name in candidates)


class LastState(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(2, 5, batch_first=True), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        _, (hidden, _) = self.lstm(x.unflatten(1, (3, 2)))
        out: Tensor = self.head(hidden[0])
        return out


def test_a_recurrent_layer_whose_last_state_alone_is_used() -> None:
    model, data = LastState().eval(), batches()
    changes, candidates, _ = predicted(model, data)
    weight = model.lstm.weight_hh_l0.detach()
    error = candidates["lstm/weight_hh_l0"]["int8"].quantize(weight) - weight
    first, second = by_hand(model, data, "lstm.weight_hh_l0", error)
    found = changes["lstm/weight_hh_l0", "int8"]
    # The layer's own error is exact here, and linear in that of the weight to first order only.
    assert found.first == pytest.approx(first, rel=0.05, abs=1e-5)
    assert found.second == pytest.approx(second, rel=0.05)


def test_half_precision_does_not_underflow() -> None:
    model, data = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), batches()
    exact, _, _ = predicted(model.eval(), data)
    halves = [(x.bfloat16(), y) for x, y in data]
    rough, _, _ = predicted(model.bfloat16(), halves)
    for key in (("0/weight", "int3"), ("2/weight", "int3")):
        assert rough[key].second == pytest.approx(exact[key].second, rel=0.2)
    tiny, _, _ = predicted(
        model.half(), [(x.half(), y) for x, y in data], lambda m, b: 1e-3 * mean_loss(m, b)
    )
    # The products of gradients and errors are far below what float16 holds.
    key = ("0/weight", "int3")
    assert tiny[key].second == pytest.approx(1e-6 * exact[key].second, rel=0.2)


def test_under_autocast_layers_run_again_as_they_ran() -> None:
    def loss(model: nn.Module, batch: Batch) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return mean_loss(model, batch)

    model, data = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).eval(), batches()
    exact, _, _ = predicted(model, data)
    changes, _, _ = predicted(model, data, loss)
    for key in (("0/weight", "int3"), ("2/weight", "int3")):
        assert changes[key].second == pytest.approx(exact[key].second, rel=0.2)


def test_the_model_is_left_as_it_was() -> None:
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 4)).train()
    data = batches()
    prepare(net, "int8", "int8")
    set_observing(net, True)
    net.eval()(data[0][0])
    refresh(net.train(), search=True)
    candidates = candidate_quantizers(net, FORMATS, FORMATS)
    before = (net.state_dict(), quantizer_state(net), torch.get_rng_state())
    before = {"s": {k: v.clone() for k, v in before[0].items()}, "q": before[1], "r": before[2]}
    hooks = [len(module._forward_hooks) for module in net.modules()]

    def loss(model: nn.Module, batch: Batch) -> Tensor:
        return mean_loss(model, batch) + torch.rand(()) * 0

    assert predicted_loss_changes(net, data, loss, candidates)
    after = {"s": net.state_dict(), "q": quantizer_state(net), "r": torch.get_rng_state()}
    assert_same(before, after)
    assert [len(module._forward_hooks) for module in net.modules()] == hooks
    assert all(p.grad is None for p in net.parameters())
    assert net[1].training
    assert not net[0].weight.is_inference()
    remove(net)


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (lambda m, b: m(b[0]), r"got a tensor of shape \(9, 4\); expected a scalar"),
        (lambda m, b: m(b[0]).sum().detach(), "without a gradient"),
        (lambda m, b: 3.0, "got float; expected a scalar"),
        (lambda m, b: m(b[0]).sum() * torch.inf, "expected a finite number"),
        (lambda m, b: m[0].bias.sum() + m(b[0]).sum().detach(), "depends on no layer"),
    ],
)
def test_what_is_no_loss(loss: Any, said: str) -> None:
    model = nn.Sequential(nn.Linear(6, 4)).eval()
    data = batches(1)
    trial, candidates = quantizers_of(model, data)
    with pytest.raises(ValueError, match=said):
        predicted_loss_changes(trial, data, loss, candidates)
    assert not any(module._forward_hooks for module in trial.modules())


def test_no_batches() -> None:
    trial, _ = quantizers_of(nn.Sequential(nn.Linear(6, 4)), batches(1))
    with pytest.raises(ValueError, match="got no batches"):
        predicted_loss_changes(trial, [], mean_loss, {})
