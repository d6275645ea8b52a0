"""Insertion: with quantizers in it, the model stays the user's model."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import spectral_norm

from statqat_lightning.fake_quant.observers import ObserverConfig
from statqat_lightning.insight.snr import snr_by_tensor
from statqat_lightning.layers.quantized_layer import base_class, is_quantized, weight_of
from statqat_lightning.model.insertion import prepare, remove
from statqat_lightning.model.insertion_report import InsertionReport
from statqat_lightning.model.quantized_model import (
    activation_quantizers,
    quantized_layers,
    quantizer_state,
    refresh,
    set_enabled,
    set_observing,
)
from statqat_lightning.numerics.qparams import QParams
from statqat_lightning.numerics.straight_through import fake_quantize
from statqat_lightning.recipes.recipe import QuantRecipe, TensorSpec
from statqat_lightning.recipes.rule import QuantRule


class Net(nn.Module):
    """One layer of each supported kind, a normalisation and a tensor of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv2d = nn.Conv2d(1, 4, 3, padding=1, padding_mode="reflect")
        self.norm = nn.BatchNorm2d(4)
        self.conv1d = nn.Conv1d(4, 4, 3, groups=2, bias=False)
        self.conv3d = nn.Conv3d(1, 2, 2, stride=2)
        self.gain = nn.Parameter(torch.ones(1))
        self.head = nn.Linear(24, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv2d(x)).relu()  # (n, 4, 6, 6)
        x = self.conv1d(x.flatten(2))  # (n, 4, 34)
        x = self.conv3d(x[..., :32].reshape(-1, 1, 4, 4, 8)[..., :6])  # (n, 2, 2, 2, 3)
        y: Tensor = self.head(x.flatten(1)) * self.gain
        return y


X = torch.randn(5, 1, 6, 6, generator=torch.Generator().manual_seed(0))
LAYERS = ["conv2d", "conv1d", "conv3d", "head"]


M = TypeVar("M", bound=nn.Module)


def calibrated(model: M, *arguments: Any, x: Tensor = X, **options: Any) -> M:
    prepare(model, *arguments, **options)
    set_observing(model, True)
    model(x)
    refresh(model)
    return model


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def test_weights_that_start_as_zeros_get_a_scale_with_the_first_step() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    nn.init.zeros_(model[1].weight)  # type: ignore[arg-type]
    prepare(model, "int4", None, first_last_bits=None)
    with torch.no_grad():
        model[1].weight.add_(0.01 * torch.randn(4, 4))  # type: ignore[operator, arg-type]
    refresh(model)
    (_, second) = quantized_layers(model)
    assert second.quantizers.weight is not None
    assert (second.quantizers.weight(second.module.weight) != 0).float().mean() > 0.5  # type: ignore[arg-type]


# What must not change


def test_keys_parameters_and_types_are_those_of_the_float_model() -> None:
    model = Net()
    keys, parameters = list(model.state_dict()), dict(model.named_parameters())
    buffers, modules = dict(model.named_buffers()), dict(model.named_modules())
    calibrated(model, "int4", "int4")
    assert list(model.state_dict()) == keys
    assert list(dict(model.named_parameters())) == list(parameters)
    assert all(p is parameters[name] for name, p in model.named_parameters())
    assert all(b is buffers[name] for name, b in model.named_buffers())
    assert list(dict(model.named_modules())) == list(modules)
    assert all(m is modules[name] for name, m in model.named_modules())
    assert isinstance(model.head, nn.Linear)
    assert isinstance(model.conv3d, nn.Conv3d)
    assert not isinstance(model.conv1d, nn.Conv2d)
    assert is_quantized(model.head)
    assert not is_quantized(model.norm)
    assert base_class(model.head) is nn.Linear
    assert repr(model.head).endswith("(in_features=24, out_features=3, bias=True)")


def test_checkpoints_load_strictly_in_both_directions() -> None:
    float_model, model = Net(), calibrated(Net(), "int4", "int4")
    assert model.load_state_dict(float_model.state_dict(), strict=True)
    assert float_model.load_state_dict(model.state_dict(), strict=True)


def test_remove_restores_the_float_model() -> None:
    model = Net()
    types = [type(module) for module in model.modules()]
    attributes = [set(vars(module)) for module in model.modules()]
    before = model(X)
    model.load_state_dict(fresh := state(model))
    calibrated(model, "int2", "int2")
    model.load_state_dict(fresh)  # the batch norm has moved on
    assert not torch.equal(model(X), before)
    model.load_state_dict(fresh)
    remove(model)
    assert [type(module) for module in model.modules()] == types
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert torch.equal(model(X), before)
    assert quantized_layers(model) == []


@pytest.mark.parametrize("switched_off", ["disabled", "uncalibrated"])
def test_switched_off_it_trains_bit_for_bit_like_the_float_model(switched_off: str) -> None:
    float_model = Net()
    model = copy.deepcopy(float_model)
    if switched_off == "disabled":
        prepare(model, "int2", "int2")
        set_enabled(model, weights=False, inputs=False)
    else:
        prepare(model, None, "int2")  # inputs without statistics pass unchanged
    set_observing(model, True)
    for net in (float_model, model):
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
        for step in range(4):
            optimizer.zero_grad()
            net(X * (step + 1)).square().mean().backward()
            optimizer.step()
            if net is model and switched_off == "disabled":
                refresh(net)
    for ours, theirs in zip(state(model).values(), state(float_model).values(), strict=True):
        assert torch.equal(ours, theirs)


# What it computes


def test_layers_compute_with_quantized_weight_and_input() -> None:
    model = calibrated(Net(), "int4", "fp4", first_last_bits=None).eval()
    weights = {n: q.weight(weight_of(m)) for n, m, q in quantized_layers(model) if q.weight}
    inputs: dict[str, Callable[[Tensor], Tensor]] = {
        n: q.input.quantize for n, _, q in quantized_layers(model) if q.input
    }
    assert list(weights) == list(inputs) == LAYERS

    x = F.pad(inputs["conv2d"](X), (1, 1, 1, 1), mode="reflect")
    x = F.conv2d(x, weights["conv2d"], model.conv2d.bias)
    x = inputs["conv1d"](model.norm(x).relu().flatten(2))
    x = F.conv1d(x, weights["conv1d"], groups=2)[..., :32]
    x = inputs["conv3d"](x.reshape(-1, 1, 4, 4, 8)[..., :6])
    x = F.conv3d(x, weights["conv3d"], model.conv3d.bias, stride=2)
    x = F.linear(inputs["head"](x.flatten(1)), weights["head"], model.head.bias)
    assert torch.equal(model(X), x * model.gain)


def test_gradients_reach_weights_straight_through() -> None:
    layer = nn.Linear(3, 2, bias=False)
    calibrated(layer, TensorSpec("int2", quantizer="minmax"), None, x=torch.randn(4, 3))
    x, upstream = torch.randn(5, 3), torch.randn(5, 2)
    layer(x).backward(upstream)
    assert layer.weight.grad is not None
    torch.testing.assert_close(layer.weight.grad, upstream.T @ x)  # min-max clips nothing


class Scaled(nn.Linear):
    """A subclass with a forward of its own, more arguments, and two uses of the weight."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor, factor: float = 1.0, *, shift: float = 0.0) -> Tensor:
        self.seen.append(self.weight)
        return factor * F.linear(x, self.weight, self.bias) + shift * self.weight.sum()


class Inherited(Scaled):
    pass


class CallsSuper(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 2


class Raises(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        raise RuntimeError("boom")


@pytest.mark.parametrize("cls", [Scaled, Inherited])
def test_a_subclass_with_its_own_forward(cls: type[Scaled]) -> None:
    layer = cls(4, 3)
    parameter = layer.weight
    x = torch.randn(6, 4)
    calibrated(layer, "int4", "int4", x=x)
    ((_, _, quantizers),) = quantized_layers(layer)
    assert quantizers.weight is not None
    assert quantizers.input is not None
    w, x_hat = quantizers.weight(parameter), quantizers.input.quantize(x)
    expected = 3.0 * F.linear(x_hat, w, layer.bias) + 0.5 * w.sum()
    assert torch.equal(layer(x, 3.0, shift=0.5), expected)
    assert torch.equal(layer(x=x, factor=3.0, shift=0.5), expected)
    assert layer.weight is parameter
    assert isinstance(layer, cls)
    assert "weight" not in vars(layer)
    layer(x, 3.0).sum().backward()
    assert parameter.grad is not None


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def test_a_parametrized_weight_is_quantized_or_reported() -> None:
    plain, own = nn.Linear(4, 3), Scaled(4, 3)
    for layer in (plain, own):
        parametrize.register_parametrization(layer, "weight", Doubled())
    model = nn.Sequential(plain, own)
    report = {row.name: row.reason for row in prepare(model, "int4", None).rows}
    assert report["0"] == ""
    assert report["1"] == "its own forward reads a parametrized weight"
    x = torch.randn(2, 4)
    (quantizer,) = (q.weight for _, _, q in quantized_layers(model))
    assert quantizer is not None
    expected = fake_quantize(plain.weight, quantizer.qparams, quantizer.fmt)
    assert torch.equal(plain(x), F.linear(x, expected, plain.bias))


def test_looking_at_a_parametrized_weight_changes_nothing() -> None:
    model = nn.Sequential(spectral_norm(nn.Linear(6, 5)), nn.ReLU(), nn.Linear(5, 2))
    modes = [module.training for module in model.modules()]
    before = state(model)
    prepare(model, "int4", "int4")
    refresh(model)
    snr_by_tensor(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(model).items())
    assert [module.training for module in model.modules()] == modes
    model(torch.randn(3, 6))  # the layer's own forward in training goes on as ever
    assert not torch.equal(
        model.state_dict()["0.parametrizations.weight.0._u"],
        before["0.parametrizations.weight.0._u"],
    )


def test_a_subclass_that_calls_super() -> None:
    layer = CallsSuper(1, 2, 3)
    x = torch.randn(2, 1, 5, 5)
    calibrated(layer, "int4", None, x=x)
    ((_, _, quantizers),) = quantized_layers(layer)
    assert quantizers.weight is not None
    expected = F.conv2d(x, quantizers.weight(layer.weight), layer.bias) * 2
    assert torch.equal(layer(x), expected)


def test_a_forward_that_raises_leaves_the_weight_in_place() -> None:
    layer = Raises(2, 2)
    parameter = layer.weight
    prepare(layer, "int4", None)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="boom"):
            layer(torch.ones(1, 2))
    assert layer.weight is parameter


def test_input_by_keyword_as_torch_names_it() -> None:
    layer, x = nn.Linear(3, 2), torch.randn(4, 3)
    calibrated(layer, x=x)
    assert torch.equal(layer(input=x), layer(x))


def test_hooks_of_the_user_still_run() -> None:
    layer, seen = nn.Linear(3, 2), []
    layer.register_forward_pre_hook(lambda module, inputs: seen.append("before"))
    calibrated(layer, x=torch.randn(4, 3))
    layer.register_forward_hook(lambda module, inputs, output: seen.append("after"))
    layer(torch.randn(4, 3))
    assert seen == ["before", "before", "after"]


# Report and mistakes


def test_report_of_every_layer_with_parameters() -> None:
    recipe = QuantRecipe(
        [
            QuantRule("conv1d"),
            QuantRule("conv3d", "int4"),
            QuantRule("head", TensorSpec("fp4", "per_group:8"), "fp8"),
            QuantRule("conv2d", TensorSpec("int2", "per_tensor", "minmax"), "int4"),
        ]
    )
    report = prepare(Net(), recipe=recipe)
    rows = {row.name: (row.type, row.parameters, row.weight, row.input) for row in report.rows}
    assert rows == {
        "": ("Net", 1, None, None),
        "conv2d": ("Conv2d", 40, "int2 per_tensor minmax", "int4 or uint4 per_tensor iterative"),
        "norm": ("BatchNorm2d", 8, None, None),
        "conv1d": ("Conv1d", 24, None, None),
        "conv3d": ("Conv3d", 18, "int4 per_channel analytic", None),
        "head": ("Linear", 75, "fp4_e2m1 per_group:8 analytic", "fp8_e4m3 per_tensor iterative"),
    }
    reasons = {row.name: row.reason for row in report.rows if row.reason}
    assert reasons == {
        "": "type not supported",
        "norm": "normalisation stays in float",
        "conv1d": "left in float by rule 'conv1d'",
    }
    assert report.num_quantized == 3
    lines = str(report).splitlines()
    assert lines[0] == "3 of 6 layers quantized, 133 of 166 parameters (80.1 %)"
    assert lines[1].split() == ["layers", "type", "parameters", "weight", "input"]
    assert " ".join(lines[2].split()) == "conv2d Conv2d 40 int2 per_tensor minmax int4|uint4"
    assert lines[5:] == [
        "in float:",
        "  (model) Net (1): type not supported",
        "  norm BatchNorm2d (8): normalisation stays in float",
        "  conv1d Conv1d (24): left in float by rule 'conv1d'",
    ]
    table = report.table().splitlines()
    assert len(table) == 7
    assert table[0].split()[:5] == ["layer", "type", "parameters", "weight", "input"]
    assert table[1].startswith("(model)  Net")
    assert report.to_dict()["rows"][1]["weight"] == "int2 per_tensor minmax"
    assert repr(report) == f"<InsertionReport: {lines[0]}>"
    html = report.with_notes(["one & two"])._repr_html_()
    assert html.startswith(f"<p>{lines[0]}</p>\n<table>")
    assert html.endswith("</table>\n<p>one &amp; two</p>")
    rows = [[*re.findall(r">([^<]*)</t[hd]>", row)] for row in html.split("<tr>")[1:]]
    assert [row[0] for row in rows[:3]] == ["layer", "(model)", "conv2d"]
    assert rows[2][1:4] == ["Conv2d", "40", "int2 per_tensor minmax"]


def test_report_of_a_prepared_model_tells_what_is_there() -> None:
    model = Net()
    first = prepare(model, "int4", "fp8", first_last_bits=None)
    again = prepare(model, "int4", "fp8", first_last_bits=None)
    assert again == first
    assert isinstance(again, InsertionReport)


class _OwnAttention(nn.MultiheadAttention):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


def test_attention_with_its_own_forward_is_named_and_its_projection_left_alone() -> None:
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    model.self_attn = _OwnAttention(8, 2, batch_first=True)
    report = prepare(model, "int8", "int8")
    rows = {row.name: row for row in report.rows}
    own = "its own forward takes the place of that of MultiheadAttention"
    assert rows["self_attn"].reason == own
    assert rows["self_attn.out_proj"].reason == "its parent reads the weight without calling it"
    assert rows["linear1"].weight
    set_observing(model, True)
    model(torch.randn(2, 3, 8))
    assert not refresh(model).any()


def test_a_model_without_layers_to_quantize_lists_what_there_is() -> None:
    model = nn.Sequential(nn.Embedding(5, 4), nn.ReLU(), nn.LayerNorm(4))
    with pytest.raises(ValueError, match="Sequential: no layer can be quantized") as caught:
        prepare(model)
    assert "0 (Embedding), 2 (LayerNorm)" in str(caught.value)
    assert "Supported are Linear, Conv1d, Conv2d, Conv3d" in str(caught.value)
    with pytest.raises(ValueError, match="Layers with parameters here: none"):
        prepare(nn.ReLU())


def test_a_recipe_that_leaves_all_in_float_lists_the_layers() -> None:
    with pytest.raises(ValueError, match="leaves all layers in float: conv2d, conv1d, conv3d, he"):
        prepare(Net(), recipe=QuantRecipe([QuantRule("*")]))


@pytest.mark.parametrize(
    ("exclude", "hint"),
    [("conv_1d", "'conv1d'"), ("type:Conv2", "'type:Conv2d'"), ("heed", "'head'")],
)
def test_an_unknown_pattern_suggests_near_misses(exclude: str, hint: str) -> None:
    model = Net()
    with pytest.raises(ValueError, match=f"matched no layer. Did you mean {hint}"):
        prepare(model, exclude=[exclude])
    assert quantized_layers(model) == []


@pytest.mark.parametrize("lazy", [nn.LazyLinear(3), nn.LazyConv2d(3, 1)])
@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_a_lazy_layer_is_refused_by_name(lazy: nn.Module) -> None:
    model = nn.Sequential(nn.Linear(4, 4), lazy)
    with pytest.raises(ValueError, match="Layers 1 are lazy and not initialised yet"):
        prepare(model)
    assert quantized_layers(model) == []


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_lazy_layers_that_stay_in_float_are_no_obstacle() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(3))
    report = prepare(model, exclude=["3"])
    assert [(row.name, row.parameters, row.reason) for row in report.rows] == [
        ("0", 20, ""),
        ("1", 0, "normalisation stays in float; not initialised yet"),
        ("3", 0, "left in float by rule '3'; not initialised yet"),
    ]
    assert model(torch.randn(2, 1, 5, 5)).shape == (2, 3)
    assert [row.parameters for row in prepare(model, exclude=["3"]).rows] == [20, 4, 57]


def test_a_report_that_fails_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object) -> str:
        raise RuntimeError("boom")

    monkeypatch.setattr("statqat_lightning.model.report_rows.describe", fail)
    model = Net()
    with pytest.raises(RuntimeError, match="boom"):
        prepare(model)
    assert quantized_layers(model) == []


def test_a_mistake_in_one_layer_leaves_the_model_as_it_was() -> None:
    model = Net()
    with pytest.raises(ValueError, match="conv2d/weight: PerGroup: got size=12 for rows of 9"):
        prepare(model, TensorSpec("int4", "per_group:12"), recipe=None, first_last_bits=None)
    recipe = QuantRecipe(
        [QuantRule("conv2d", "int4"), QuantRule("*", TensorSpec("int4", "per_group:5"))]
    )
    with pytest.raises(ValueError, match="conv1d/weight: PerGroup: got size=5"):
        prepare(model, recipe=recipe)
    assert quantized_layers(model) == []


def test_a_model_that_is_a_layer_itself() -> None:
    layer = nn.Linear(4, 2)
    x = torch.randn(3, 4)
    calibrated(layer, "int4", "int4", x=x)
    assert list(quantizer_state(layer)) == ["weight", "input"]
    (quantizer,) = activation_quantizers(layer)
    expected = fake_quantize(x, QParams(quantizer.scale), quantizer.fmt)
    assert torch.equal(quantizer.quantize(x), expected)


def test_another_recipe_replaces_quantizers_and_the_same_one_keeps_them() -> None:
    model = Net()
    prepare(model, "int8", "int8")
    first = {name: quantizers for name, _, quantizers in quantized_layers(model)}
    prepare(model, "int8", "int8")
    assert {name: q for name, _, q in quantized_layers(model)} == first
    recipe = QuantRecipe([QuantRule("conv*", "int2", "int8"), QuantRule("head")])
    report = prepare(model, recipe=recipe)
    now = {name: quantizers for name, _, quantizers in quantized_layers(model)}
    assert list(now) == ["conv2d", "conv1d", "conv3d"]
    assert all(q.weight is not None and q.weight.fmt.name == "int2" for q in now.values())
    assert {row.name: row.reason for row in report.rows}["head"] == "left in float by rule 'head'"
    assert type(model.head) is nn.Linear


def test_kept_quantizers_observe_as_asked_last() -> None:
    model = Net()
    prepare(model)
    first = activation_quantizers(model)
    config = ObserverConfig(0.5, 2**20)
    prepare(model, observer=config)
    assert [id(q) for q in activation_quantizers(model)] == [id(q) for q in first]
    assert all(q.observer.config == config for q in first)
    prepare(model)
    assert all(q.observer.config == config for q in first)


def test_a_recipe_replaces_nothing_silently(tmp_path: Path) -> None:
    recipe = QuantRecipe([QuantRule("head", "int4")])
    model = Net()
    with pytest.raises(ValueError, match="got weights='int2', exclude="):
        prepare(model, "int2", recipe=recipe, exclude=["conv2d"])
    assert quantized_layers(model) == []
    recipe.to_yaml(tmp_path / "recipe.yaml")
    prepare(model, recipe=tmp_path / "recipe.yaml")
    assert [name for name, _, _ in quantized_layers(model)] == ["head"]


# Models that other tools have converted


@pytest.mark.filterwarnings("ignore:(?s).*torch.ao.quantization is deprecated")
@pytest.mark.filterwarnings("ignore:(?s).*reduce_range will be deprecated:UserWarning")
def test_a_model_prepared_by_torch_ao_is_refused() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).train()
    model.qconfig = torch.ao.quantization.default_qat_qconfig  # type: ignore[assignment]
    torch.ao.quantization.prepare_qat(model, inplace=True)
    with pytest.raises(ValueError, match=r"Layer '0' is already converted: .*torch\.ao"):
        prepare(model)


def test_a_tensor_of_another_library_is_refused() -> None:
    class AffineQuantizedTensor(Tensor):
        """As torchao holds the weights of a converted layer."""

    AffineQuantizedTensor.__module__ = "torchao.dtypes"
    model = nn.Sequential(nn.Linear(4, 4))
    model[0].weight = nn.Parameter(torch.randn(4, 4).as_subclass(AffineQuantizedTensor))
    with pytest.raises(ValueError, match=r"Layer '0' is already converted: .*torchao\.dtypes"):
        prepare(model)
