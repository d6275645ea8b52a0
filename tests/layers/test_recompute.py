"""Inputs quantized again in the backward pass: the same numbers, and less memory."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from statqat_lightning import prepare
from statqat_lightning.fake_quant.tensor_spec import TensorSpec
from statqat_lightning.model.quantized_model import (
    activation_quantizers,
    quantized_layers,
    refresh,
    set_observing,
    set_recompute,
)


class OwnForward(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input * 2)


class Attention(nn.Module):
    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True, **options)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x.flip(1))[0]  # type: ignore[no-any-return]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(8, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]  # type: ignore[no-any-return]


class Shared(nn.Module):
    """A layer that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.linear(x).relu())  # type: ignore[no-any-return]


IMAGES, TOKENS = (4, 8, 6, 6), (4, 5, 8)
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(8, 8), (4, 8)),
    "linear of tokens": (lambda: nn.Linear(8, 8), TOKENS),
    "one example": (lambda: nn.Linear(8, 8), (8,)),
    "no example": (lambda: nn.Linear(8, 8), (0, 8)),
    "convolution": (lambda: nn.Conv2d(8, 4, 3, padding=1, groups=2), IMAGES),
    "reflected": (lambda: nn.Conv2d(8, 4, 3, padding=1, padding_mode="reflect"), IMAGES),
    "transposed": (lambda: nn.ConvTranspose2d(8, 4, 3, stride=2), IMAGES),
    "own forward": (lambda: OwnForward(8, 8), TOKENS),
    "attention": (Attention, TOKENS),
    "keys apart": (lambda: Attention(kdim=8, vdim=8), TOKENS),
    "recurrent": (Recurrent, TOKENS),
    "twice": (Shared, TOKENS),
}
SPECS = {
    "int8": TensorSpec("int8"),
    "uint4": TensorSpec("uint4"),
    "fp8": TensorSpec("fp8"),
    "pass_through": TensorSpec("int3", gradient="pass_through"),
    "magnitude": TensorSpec("int3", gradient="magnitude"),
    "learned": TensorSpec("int4", quantizer="lsq"),
}


def ready(model: nn.Module, example: Tensor, inputs: TensorSpec, weights: str | None) -> nn.Module:
    prepare(model, weights, inputs, first_last_bits=None)
    set_observing(model, True)
    model(example)
    set_observing(model, False)
    refresh(model)
    return model


def gradients(run: Callable[[Tensor], Tensor], model: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, and the gradients of the input and of all parameters."""
    x = x.clone().requires_grad_()
    model.zero_grad()
    # An operation that keeps its input, as ReLU keeps its output.
    y = run(x.sigmoid())
    upstream = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
    y.backward(upstream)
    grads = [x.grad, *(p.grad for p in model.parameters())]
    return [y.detach(), *(g.clone() for g in grads if g is not None)]


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("name", MODELS)
def test_no_number_changes(name: str, spec: str) -> None:
    torch.manual_seed(0)
    make, shape = MODELS[name]
    example = torch.randn(4, *shape[1:]) if 0 in shape else torch.randn(shape)
    model = ready(make(), example.sigmoid(), SPECS[spec], "int4")
    x = torch.randn(shape)
    if len(shape) == 4:
        x = x.to(memory_format=torch.channels_last)
    expected = gradients(model, model, x)
    set_recompute(model, True)
    own = gradients(model, model, x)
    assert len(own) == len(expected) > 2
    assert all(torch.equal(a, b) for a, b in zip(own, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_no_number_changes_in_other_precisions(dtype: torch.dtype) -> None:
    model = ready(nn.Linear(8, 8), torch.randn(4, 8), TensorSpec("int4"), "int4").to(dtype)
    x = torch.randn(4, 8, dtype=dtype)
    expected = gradients(model, model, x)
    set_recompute(model, True)
    assert all(map(torch.equal, gradients(model, model, x), expected))


def test_no_number_changes_under_autocast() -> None:
    model = ready(nn.Linear(8, 8), torch.randn(4, 8), TensorSpec("int4"), "int4")
    x = torch.randn(4, 8)

    def run(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return model(x)  # type: ignore[no-any-return]

    expected = gradients(run, model, x)
    set_recompute(model, True)
    assert all(map(torch.equal, gradients(run, model, x), expected))


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes of tensors that a forward pass allocates and keeps for the backward pass."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profiler:
        y = model(x)
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()
    del y
    return sum(e.nbytes() for e in events if e.name() == "[memory]")


def chain(depth: int = 6) -> nn.Module:
    layers = [(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()) for _ in range(depth)]
    return nn.Sequential(*itertools.chain.from_iterable(layers))


def test_memory_is_nearly_that_of_the_float_model() -> None:
    x = torch.randn(16, 8, 16, 16)
    network = chain()
    plain = kept_bytes(network, x)
    model = ready(copy.deepcopy(network), x, TensorSpec("int8"), "int8")
    kept = kept_bytes(model, x)
    assert kept > 1.35 * plain  # the test sees what it is about
    set_recompute(model, True)
    assert kept_bytes(model, x) < 1.05 * plain


def test_the_scale_is_that_of_the_forward_pass() -> None:
    model = ready(nn.Linear(8, 8), torch.randn(4, 8), TensorSpec("uint4"), "int4")
    (quantizer,) = activation_quantizers(model)
    scale, x = quantizer.scale.clone(), torch.randn(4, 8)
    expected = gradients(model, model, x)

    def run(x: Tensor) -> Tensor:
        y: Tensor = model(x)
        quantizer.scale.mul_(3)
        quantizer.fmt = type(quantizer.fmt)(8)
        return y

    set_recompute(model, True)
    fmt = quantizer.fmt
    own = gradients(run, model, x)
    assert not torch.equal(quantizer.scale, scale)
    assert quantizer.fmt != fmt
    assert all(map(torch.equal, own, expected))


def test_an_input_that_was_written_to_is_named() -> None:
    model = ready(nn.Sequential(nn.Linear(8, 8)), torch.randn(4, 8), TensorSpec("int4"), None)
    set_recompute(model, True)
    x = torch.randn(4, 8)  # data: torch itself keeps nothing that would notice
    y = model(x)
    x.mul_(2)
    with pytest.raises(RuntimeError, match=r"0/input: .*in-place.*recompute_inputs"):
        y.sum().backward()


def test_a_graph_can_be_kept_and_differentiated_twice() -> None:
    model = ready(nn.Conv1d(4, 4, 3), torch.randn(2, 4, 9), TensorSpec("int4"), "int4")
    (layer,) = (module for _, module, _ in quantized_layers(model))
    x = torch.randn(2, 4, 9, requires_grad=True)

    def penalty() -> list[Tensor]:
        y = model(x)
        first = torch.autograd.grad(y.square().sum(), (x, layer.weight), create_graph=True)
        second = torch.autograd.grad(
            sum(g.square().sum() for g in first), (x, layer.weight), retain_graph=True
        )
        return [*first, *second, *torch.autograd.grad(y.sum(), (x, layer.weight))]

    expected = penalty()
    set_recompute(model, True)
    assert all(map(torch.equal, penalty(), expected))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_decides_for_itself(reentrant: bool) -> None:
    network = chain(3)
    x = torch.randn(4, 8, 8, 8)
    model = ready(copy.deepcopy(network), x, TensorSpec("int8"), "int8").eval()

    def run(x: Tensor) -> Any:
        return checkpoint(model, x, use_reentrant=reentrant)

    expected = gradients(run, model, x)
    set_recompute(model, True)
    assert all(map(torch.equal, gradients(run, model, x), expected))


def test_torch_compile_decides_for_itself() -> None:
    model = ready(nn.Linear(8, 8), torch.randn(4, 8), TensorSpec("int4"), "int4")
    set_recompute(model, True)
    x = torch.randn(4, 8, requires_grad=True)
    expected = torch.autograd.grad(model(x).square().sum(), (x, *model.parameters()))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    own = torch.autograd.grad(compiled(x).square().sum(), (x, *model.parameters()))
    for gradient, wanted in zip(own, expected, strict=True):
        torch.testing.assert_close(gradient, wanted)


def test_transforms_keep_what_they_want() -> None:
    model = ready(nn.Linear(8, 8), torch.randn(4, 8), TensorSpec("int4"), "int4")
    x = torch.randn(4, 8)
    loss = torch.func.grad(lambda x: model(x).square().sum())
    expected = loss(x)
    set_recompute(model, True)
    assert torch.equal(loss(x), expected)
