"""Fake quantization under `torch.func`, `torch.compile`, `torch.export`, and off the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.utils._python_dispatch import TorchDispatchMode

from statqat_lightning.formats import FloatFormat, Format, get_format
from statqat_lightning.model.insertion import prepare
from statqat_lightning.model.quantized_model import refresh, set_observing
from statqat_lightning.numerics import straight_through
from statqat_lightning.numerics.granularity import Granularity, PerChannel, PerGroup, PerTensor
from statqat_lightning.numerics.learned import learned_fake_quantize
from statqat_lightning.numerics.qparams import QParams
from statqat_lightning.numerics.straight_through import fake_quantize

RULES = ["clipped", "pass_through", "magnitude", "learned"]
FORMATS = [get_format(name) for name in ("int4", "uint8", "fp4", "fp8_e5m2")]
every_rule = pytest.mark.parametrize("rule", RULES)
every_format = pytest.mark.parametrize("fmt", FORMATS, ids=str)


def quantized(x: Tensor, params: QParams, fmt: Format, rule: str) -> Tensor:
    if rule == "learned":
        return learned_fake_quantize(x, params, fmt)
    return fake_quantize(x, params, fmt, rule)


def loop(function: Callable[..., Tensor], *batches: Tensor) -> Tensor:
    return torch.stack([function(*parts) for parts in zip(*batches, strict=True)])


# torch.func


def skip_where_vmap_cannot_round(fmt: Format) -> None:
    """Floats read exponents from the bits of their values."""
    try:
        vmap(lambda x: x.view(torch.int32))(torch.ones(2))
    except RuntimeError:
        if isinstance(fmt, FloatFormat):
            pytest.skip(f"vmap of torch {torch.__version__} has no rule for aten::view.dtype")


@every_rule
@every_format
@pytest.mark.parametrize("kind", ["scalar", "channel"])
def test_vmap_is_a_loop(rule: str, fmt: Format, kind: str) -> None:
    skip_where_vmap_cannot_round(fmt)
    x, scale = torch.randn(5, 3, 7) * 3, torch.rand(5, *(() if kind == "scalar" else (3, 1))) + 0.05
    zero_points = torch.arange(5.0)

    def alone(values: Tensor, s: Tensor, z: Tensor | None = None) -> Tensor:
        return quantized(values, QParams(s, z), fmt, rule)

    def slope(values: Tensor, s: Tensor) -> Tensor:
        return grad(lambda v: (alone(v, s) * values).sum())(values)

    same_x, same_s = x[:1].expand(5, 3, 7), scale[:1].expand(scale.shape)
    for function in (alone, slope):
        torch.testing.assert_close(vmap(function)(x, scale), loop(function, x, scale))
        over_x = vmap(function, (0, None))(x, scale[0])
        torch.testing.assert_close(over_x, loop(function, x, same_s))
        over_scale = vmap(function, (None, 0))(x[0], scale)
        torch.testing.assert_close(over_scale, loop(function, same_x, scale))
    over_offset = vmap(alone, (None, None, 0))(x[0], scale[0], zero_points)
    torch.testing.assert_close(over_offset, loop(alone, same_x, same_s, zero_points))
    assert torch.equal(vmap(alone)(x, scale), loop(alone, x, scale))  # values: to the last bit


@every_rule
@every_format
def test_grad_of_torch_func_is_that_of_autograd(rule: str, fmt: Format) -> None:
    x, params = torch.randn(3, 7) * 3, QParams(torch.tensor(0.31))
    weights = torch.randn(3, 7)
    leaf = x.clone().requires_grad_()
    (quantized(leaf, params, fmt, rule) * weights).sum().backward()
    got = grad(lambda v: (quantized(v, params, fmt, rule) * weights).sum())(x)
    torch.testing.assert_close(got, leaf.grad, rtol=1e-6, atol=0)


def test_grad_of_torch_func_to_a_learned_scale() -> None:
    x, scale = torch.randn(6, 8), torch.rand(6, 1) + 0.05
    leaf = scale.clone().requires_grad_()
    learned_fake_quantize(
        x, QParams(leaf, None, PerChannel()), FORMATS[0]
    ).square().sum().backward()

    def energy(s: Tensor) -> Tensor:
        params = QParams(s, None, PerChannel())
        return learned_fake_quantize(x, params, FORMATS[0]).square().sum()

    torch.testing.assert_close(grad(energy)(scale), leaf.grad)


# torch.compile and torch.export


@every_rule
@pytest.mark.parametrize(
    ("dtype", "fmt", "granularity"),
    [
        (torch.float32, FORMATS[1], PerGroup(8)),
        (torch.bfloat16, FORMATS[2], PerTensor()),
        (torch.float64, FORMATS[3], PerChannel()),
    ],
    ids=str,
)
def test_compiled_in_one_graph_equals_eager(
    rule: str, dtype: torch.dtype, fmt: Format, granularity: Granularity
) -> None:
    torch.compiler.reset()
    x, upstream = torch.randn(4, 16).to(dtype), torch.randn(4, 16).to(dtype)
    scale = torch.rand(granularity.scale_shape((4, 16))) * 0.1 + 0.02
    for zero_point in (None, torch.ones_like(scale)):

        def run(x: Tensor, scale: Tensor, z: Tensor | None = zero_point) -> Tensor:
            return quantized(x, QParams(scale, z, granularity), fmt, rule)

        results = []
        for function in (run, torch.compile(run, backend="aot_eager", fullgraph=True)):
            leaf, s = x.clone().requires_grad_(), scale.clone()
            s.requires_grad_(rule == "learned")
            y = function(leaf, s)
            y.backward(upstream)
            results.append((y.detach(), leaf.grad, s.grad))
        (y, g, sg), (compiled_y, compiled_g, compiled_sg) = results
        assert torch.equal(compiled_y, y)
        assert g is not None
        assert compiled_g is not None
        # One way in eager mode passes a division and a multiplication by the scale.
        torch.testing.assert_close(compiled_g, g, rtol=1e-6, atol=0)
        if rule == "learned":
            torch.testing.assert_close(compiled_sg, sg)


class Quantizes(nn.Module):
    def __init__(self, rule: str, fmt: Format) -> None:
        super().__init__()
        self.rule, self.fmt = rule, fmt
        self.register_buffer("scale", torch.rand(4, 1) * 0.1 + 0.02)

    scale: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return quantized(x, QParams(self.scale, None, PerChannel()), self.fmt, self.rule)


@every_rule
@pytest.mark.parametrize("fmt", FORMATS[1:3], ids=str)
def test_exported_program_equals_eager(rule: str, fmt: Format) -> None:
    module, x = Quantizes(rule, fmt), torch.randn(4, 16)
    program = torch.export.export(module, (x,))
    other = torch.randn(4, 16)
    assert torch.equal(program.module()(other), module(other))


def test_a_prepared_layer_can_be_exported() -> None:
    layer, x = nn.Linear(16, 4), torch.randn(8, 16)
    prepare(layer, "int4", "fp8", first_last_bits=None)
    set_observing(layer, True)
    layer(x)
    set_observing(layer, False)
    refresh(layer)
    program = torch.export.export(layer, (x,))
    torch.testing.assert_close(program.module()(x), layer(x))


# Other devices: nothing may wait for a number to reach the host


class NothingReachesTheHost(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.is_nonzero.default,
            torch.ops.aten.equal.default,
            torch.ops.aten.nonzero.default,
            torch.ops.aten.masked_select.default,
        ), func
        return func(*args, **(kwargs or {}))


@every_rule
@every_format
@pytest.mark.parametrize("shape", [(), (4, 1)])
@pytest.mark.parametrize("offset", [False, True])
def test_no_number_is_read_by_the_host_off_the_cpu(
    rule: str, fmt: Format, shape: tuple[int, ...], offset: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    scale = torch.rand(shape) * 0.1 + 0.02
    params = QParams(scale, torch.ones(shape) if offset else None)
    x, upstream = torch.randn(4, 16), torch.randn(4, 16)
    results = []
    for off_the_cpu in (False, True):
        if off_the_cpu:
            monkeypatch.setattr(straight_through, "is_plain_cpu", lambda x: False)
        leaf = x.clone().requires_grad_()
        if off_the_cpu:
            with NothingReachesTheHost():
                y = quantized(leaf, params, fmt, rule)
                y.backward(upstream)
        else:
            y = quantized(leaf, params, fmt, rule)
            y.backward(upstream)
        results.append((y.detach(), leaf.grad))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-6, atol=0)


def test_the_check_notices_a_number_that_is_read() -> None:
    with NothingReachesTheHost(), pytest.raises(AssertionError, match="_local_scalar_dense"):
        torch.ones(()).item()


@every_rule
@every_format
@pytest.mark.parametrize("shape", [(), (4, 1)])
def test_runs_without_values(rule: str, fmt: Format, shape: tuple[int, ...]) -> None:
    x = torch.empty(4, 16, device="meta", requires_grad=True)
    params = QParams(torch.empty(shape, device="meta"))
    y = quantized(x, params, fmt, rule)
    assert y.device.type == "meta"
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == (4, 16)
