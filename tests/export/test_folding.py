"""BatchNorm folded into the layers before it, against the model that still has it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from statqat_lightning.export.calls.forward_call import ForwardCall
from statqat_lightning.export.freezing.folding import fold_batch_norm
from statqat_lightning.export.freezing.frozen import freeze, frozen_layers
from statqat_lightning.export.freezing.frozen_layer import FrozenLayer
from statqat_lightning.export.freezing.light_copy import light_copy
from statqat_lightning.model.insertion import prepare
from statqat_lightning.recipes.recipe import QuantRecipe, TensorSpec
from statqat_lightning.recipes.rule import QuantRule
from tests.export.models import observed

LAYERS: dict[str, tuple[Any, Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(8, 6), nn.BatchNorm1d, (5, 8)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, bias=False), nn.BatchNorm1d, (5, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d, (5, 4, 7, 7)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d, (5, 4, 7, 7)),
    "depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6, bias=False), nn.BatchNorm2d, (5, 6, 7, 7)),
    "conv3d": (lambda: nn.Conv3d(2, 6, 3), nn.BatchNorm3d, (5, 2, 5, 5, 5)),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), nn.BatchNorm2d, (5, 4, 5, 5)),
}


def with_random_statistics(norm: Any, seed: int = 0) -> Any:
    """Gammas of both signs, one of zero and one next to it; far means; wide variances."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        norm.running_mean.normal_(0, 2, generator=generator)
        norm.running_var.uniform_(0.01, 9, generator=generator)
        if norm.weight is not None:
            norm.weight.normal_(generator=generator)
            norm.weight[1], norm.weight[2] = 0.0, -1e-45
            norm.bias.normal_(generator=generator)
    return norm


def frozen_pair(
    layer: nn.Module, norm: nn.Module, shape: tuple[int, ...], rule: QuantRule, *behind: nn.Module
) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(layer, norm, *behind).eval()
    x = torch.randn(shape)
    return freeze(observed(model, QuantRecipe([rule]), x)), x


def equal_but_for_rounding(ours: Tensor, theirs: Tensor) -> None:
    # 1e-6 of the largest output: sums of some hundred products in float32, in another order.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6 * float(theirs.abs().max()))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize(
    ("weights", "inputs"),
    [
        (TensorSpec("int8"), "int8"),
        (TensorSpec("int4"), None),
        (TensorSpec("int4", "per_tensor"), "int8"),
        (TensorSpec("fp4_e2m1"), "fp8_e4m3"),
        (None, "int8"),
    ],
    ids=["int8", "int4", "per_tensor", "fp4", "float weights"],
)
def test_outputs_are_the_same(
    kind: str, weights: TensorSpec | None, inputs: str | None, seed: int
) -> None:
    make, norm, shape = LAYERS[kind]
    frozen, x = frozen_pair(
        make(), with_random_statistics(norm(6), seed), shape, QuantRule("0", weights, inputs)
    )

    folded = fold_batch_norm(frozen, ForwardCall.of(x))

    assert folded.layers == {"0": "1"}
    assert folded.left == {}
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in folded.model.modules())
    equal_but_for_rounding(folded.model(x), frozen(x))


class OwnForward(nn.BatchNorm2d):
    """Calls the function by itself, and more.

    Args:
        gain: Added to the weight that the function gets.
    """

    def __init__(self, channels: int, gain: float) -> None:
        super().__init__(channels)
        self.gain = gain

    def forward(self, x: Tensor) -> Tensor:
        weight: Any = self.weight + self.gain if self.gain else self.weight
        mean, variance = self.running_mean, self.running_var
        y = F.batch_norm(x, mean, variance, weight, bias=self.bias, eps=self.eps)
        return F.silu(y)


@pytest.mark.parametrize("gain", [0.0, 1.0])
def test_a_norm_that_calls_the_function_is_folded_if_it_is_its_own(gain: float) -> None:
    norm = with_random_statistics(OwnForward(6, gain))
    rule = QuantRule("0", "int8", "int8")
    frozen, x = frozen_pair(nn.Conv2d(4, 6, 3), norm, (5, 4, 7, 7), rule)

    folded = fold_batch_norm(frozen, ForwardCall.of(x))

    assert folded.layers == ({} if gain else {"0": "1"})
    equal_but_for_rounding(folded.model(x), frozen(x))


@pytest.mark.parametrize("outputs", [None, "int8"])
def test_a_model_whose_norm_keeps_its_forward_can_be_copied(outputs: str | None) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3), with_random_statistics(OwnForward(6, 0.0))).eval()
    x, rules = torch.randn(5, 4, 7, 7), [QuantRule("0", "int8", "int8")]
    rules += [] if outputs is None else [QuantRule("1", outputs=outputs)]
    frozen = freeze(observed(model, QuantRecipe(rules), x))

    folded = fold_batch_norm(frozen, ForwardCall.of(x)).model

    assert torch.equal(copy.deepcopy(folded)(x), folded(x))
    assert torch.equal(light_copy(folded)(x), folded(x))
    y = torch.randn(5, 6, 5, 5)
    assert not torch.equal(folded[1](y), frozen[1](y))  # it is folded indeed


def test_groups_of_a_row_are_folded() -> None:
    rule = QuantRule("0", TensorSpec("int4", "per_group:4"))
    norm = with_random_statistics(nn.BatchNorm1d(6))
    frozen, x = frozen_pair(nn.Linear(8, 6), norm, (5, 8), rule)

    folded = fold_batch_norm(frozen, ForwardCall.of(x))

    assert folded.layers == {"0": "1"}
    equal_but_for_rounding(folded.model(x), frozen(x))


def test_the_frozen_model_itself_stays_as_it_is() -> None:
    frozen, x = frozen_pair(
        nn.Conv2d(4, 6, 3),
        with_random_statistics(nn.BatchNorm2d(6)),
        (2, 4, 5, 5),
        QuantRule("0", "int8"),
    )
    before = {key: value.clone() for key, value in frozen.state_dict().items()}
    outputs = frozen(x)

    fold_batch_norm(frozen, ForwardCall.of(x))

    assert all(torch.equal(value, before[key]) for key, value in frozen.state_dict().items())
    assert torch.equal(frozen(x), outputs)


def test_codes_change_at_most_their_sign() -> None:
    norm = with_random_statistics(nn.BatchNorm2d(6))
    frozen, x = frozen_pair(nn.Conv2d(4, 6, 3), norm, (2, 4, 5, 5), QuantRule("0", "int8"))
    folded = fold_batch_norm(frozen, ForwardCall.of(x)).model
    (_, before), (_, after) = frozen_layers(frozen)[0], frozen_layers(folded)[0]

    def values(layer: FrozenLayer) -> Tensor:
        return layer.frozen_weights["weight"].fmt.decode(layer.get_buffer("weight_codes"))

    sign = norm.weight.sign()
    sign[2] = 0  # 1e-45 times a scale is nothing
    assert torch.equal(values(after), values(before) * sign.view(-1, 1, 1, 1))
    assert (after.get_buffer("weight_scale") > 0).all()


def test_a_norm_without_parameters_is_folded() -> None:
    norm = with_random_statistics(nn.BatchNorm2d(6, affine=False))
    frozen, x = frozen_pair(nn.Conv2d(4, 6, 3), norm, (2, 4, 5, 5), QuantRule("0", "int8"))

    folded = fold_batch_norm(frozen, ForwardCall.of(x))

    assert folded.layers == {"0": "1"}
    equal_but_for_rounding(folded.model(x), frozen(x))


def test_a_quantized_output_of_the_norm_stays_quantized() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(4, 6, 3), with_random_statistics(nn.BatchNorm2d(6))).eval()
    x = torch.randn(2, 4, 5, 5)
    rules = [QuantRule("0", "int8", "int8"), QuantRule("1", outputs="int4")]
    frozen = freeze(observed(model, QuantRecipe(rules), x))

    folded = fold_batch_norm(frozen, ForwardCall.of(x))

    assert folded.layers == {"0": "1"}
    ours, theirs = folded.model(x), frozen(x)
    assert len(theirs.unique()) <= 16
    # Equal codes, but for those that stood on the edge between two.
    assert ((ours - theirs).abs() > 1e-5).float().mean() < 0.01
    assert copy.deepcopy(folded.model)(x).equal(ours)


class Twice(nn.Module):
    """A layer whose output others read, too; or that runs twice."""

    def __init__(self, case: str) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = with_random_statistics(nn.BatchNorm2d(4))
        self.case = case

    def forward(self, x: Tensor) -> Any:
        if self.case == "runs twice":
            return self.norm(self.conv(F.relu(self.norm(self.conv(x)))))
        y = self.conv(x)
        if self.case == "sum":
            return self.norm(y) + y
        if self.case == "returned":
            return self.norm(y), y
        return self.norm(y) + y.detach().view(-1).view(y.shape)


@pytest.mark.parametrize("case", ["runs twice", "sum", "returned", "view"])
def test_a_norm_that_is_not_all_that_reads_a_layer_stays(case: str) -> None:
    torch.manual_seed(0)
    model = Twice(case).eval()
    prepare(model, "int8", None)
    frozen, x = freeze(model), torch.randn(2, 4, 5, 5)

    folded = fold_batch_norm(frozen, ForwardCall.of(x))

    assert folded.layers == {}
    assert ("more than once" if case == "runs twice" else "is read by") in folded.left["norm"]
    assert isinstance(folded.model.norm, nn.BatchNorm2d)


@pytest.mark.parametrize(
    ("layer", "norm", "shape", "rule", "reason"),
    [
        (nn.Linear(8, 3), nn.BatchNorm1d(3), (2, 3, 8), QuantRule("0", "int8"), "another axis"),
        (
            nn.Conv2d(4, 6, 3),
            nn.BatchNorm2d(6, track_running_stats=False),
            (2, 4, 5, 5),
            QuantRule("0", "int8"),
            "no running statistics",
        ),
        (
            nn.ConvTranspose2d(4, 4, 3, groups=2),
            nn.BatchNorm2d(4),
            (2, 4, 5, 5),
            QuantRule("0", "int8"),
            "share channels",
        ),
        (
            nn.Conv2d(32, 6, 3),
            nn.BatchNorm2d(6),
            (2, 32, 5, 5),
            QuantRule("0", "mxfp4"),
            "scales of few values",
        ),
        (
            nn.Conv2d(4, 6, 3),
            nn.BatchNorm2d(6),
            (2, 4, 5, 5),
            QuantRule("0", "int8", outputs="int8"),
            "the output of the layer before it is quantized",
        ),
    ],
)
def test_what_cannot_be_folded_is_named(
    layer: nn.Module, norm: nn.Module, shape: tuple[int, ...], rule: QuantRule, reason: str
) -> None:
    frozen, x = frozen_pair(layer, norm, shape, rule)

    folded = fold_batch_norm(frozen, ForwardCall.of(x))

    assert folded.layers == {}
    assert reason in folded.left["1"]
    assert torch.equal(folded.model(x), frozen(x))


def test_the_lowest_code_of_a_full_range_has_no_negative() -> None:
    norm = with_random_statistics(nn.BatchNorm1d(6))
    layer = nn.Linear(8, 6)
    with torch.no_grad():
        layer.weight[:, 0] = -3.0  # so that the lowest code is in use
        norm.weight.fill_(-1.0)
    rule = QuantRule("0", TensorSpec("int4_full", quantizer="minmax"))
    frozen, x = frozen_pair(layer, norm, (5, 8), rule)

    folded = fold_batch_norm(frozen, ForwardCall.of(x))

    assert "no negative" in folded.left["1"]
    assert torch.equal(folded.model(x), frozen(x))
