"""Integers with a zero point, against torch's own fake quantization and a search by brute force."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from statqat_lightning import QuantRecipe, QuantRule, TensorSpec, prepare
from statqat_lightning.fake_quant.activation import ActivationFakeQuantizer
from statqat_lightning.fake_quant.observers import ObserverConfig
from statqat_lightning.fake_quant.scale_refresh import refresh_activations
from statqat_lightning.formats import IntFormat, at_least_bits, get_format, unsigned
from statqat_lightning.model.quantized_model import activation_quantizers, refresh, set_observing
from statqat_lightning.model.report_rows import describe

SKEWED: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "hardswish": F.hardswish,
    "leaky relu": lambda x: F.leaky_relu(x, 0.1),
    "below zero": lambda x: 0.5 - F.softplus(x),
}


def spec(bits: int, **options: Any) -> TensorSpec:
    return TensorSpec(f"int{bits}", unsigned_if_nonnegative=True, zero_point=True, **options)


def observing(spec: TensorSpec) -> ActivationFakeQuantizer:
    quantizer = ActivationFakeQuantizer("layer", spec, ObserverConfig(), torch.device("cpu"))
    quantizer.observing = True
    return quantizer


def calibrated(
    spec: TensorSpec, function: Callable[[Tensor], Tensor], batches: int = 9
) -> ActivationFakeQuantizer:
    quantizer = observing(spec)
    for seed in range(batches):
        torch.manual_seed(seed)
        quantizer(function(1.5 * torch.randn(64, 500)))
        refresh_activations([quantizer])
    return quantizer


def snr(x: Any, scale: float, zero_point: int, levels: int) -> float:
    """By numpy alone."""
    codes = np.clip(np.rint(x / scale) + zero_point, 0, levels - 1)
    return 10 * math.log10(float((x**2).sum() / (((codes - zero_point) * scale - x) ** 2).sum()))


def best_snr(x: Any, levels: int) -> float:
    """Over all zero points, or every fourth of many, and a fine grid of scales."""
    found = []
    for zero_point in range(0, levels, 4 if levels > 16 else 1):
        widest = max(
            x.max() / (levels - 1 - zero_point) if zero_point < levels - 1 else 0,
            -x.min() / zero_point if zero_point else 0,
        )
        scales = widest * np.geomspace(0.02 if levels < 16 else 0.3, 1.1, 40)
        found.append(max(snr(x, scale, zero_point, levels) for scale in scales if scale > 0))
    return max(found)


# The format


@pytest.mark.parametrize(("width", "zero_point"), [(8, 20), (8, 128), (8, 255), (4, 3), (2, 1)])
def test_rounds_as_torch_does(width: int, zero_point: int) -> None:
    fmt = get_format(f"uint{width}_zp{zero_point}")
    assert fmt == IntFormat(width, signed=False, zero_point=zero_point)
    assert get_format(fmt.name) is fmt
    assert (fmt.min, fmt.max) == (-zero_point, 2**width - 1 - zero_point)
    torch.manual_seed(0)
    x, scale = 3 * torch.randn(10_000), 0.03125
    expected = torch.fake_quantize_per_tensor_affine(x, scale, zero_point, 0, 2**width - 1)
    assert torch.equal(fmt.round(x / scale) * scale, expected)
    assert torch.equal(fmt.decode(torch.arange(2**width).byte()), fmt.values.float())


def test_the_middle_is_the_full_range_of_signed_integers() -> None:
    assert torch.equal(get_format("uint8_zp128").values, get_format("int8_full").values)


@pytest.mark.parametrize(
    "name", ["uint8_zp256", "uint8_zp0", "uint4_zp16", "int8_zp3", "uint9_zp1"]
)
def test_no_format_of_that_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"got '{name}'"):
        get_format(name)


@pytest.mark.parametrize("options", [{"signed": True}, {"signed": False, "zero_point": 16}])
def test_refuses_a_zero_point_that_no_code_has(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"zero_point=\d+ .* expected 0 to 15, and signed=False"):
        IntFormat(4, **{"zero_point": 3} | options)


def test_a_wider_form_keeps_the_share_of_levels_below_zero() -> None:
    assert at_least_bits(get_format("uint4_zp3"), 8) == get_format("uint8_zp51")
    assert at_least_bits(get_format("uint8_zp51"), 4) == get_format("uint8_zp51")
    assert unsigned(get_format("uint4_zp3")) is None


# What calibration chooses


@pytest.mark.parametrize("bits", [8, 4, 2])
@pytest.mark.parametrize("name", SKEWED)
def test_skewed_data_gets_nearly_the_best_zero_point_and_scale(name: str, bits: int) -> None:
    quantizer = calibrated(spec(bits), SKEWED[name])
    assert isinstance(quantizer.fmt, IntFormat)
    assert not quantizer.fmt.signed
    torch.manual_seed(99)
    x = SKEWED[name](1.5 * torch.randn(20_000)).double().numpy()
    levels = 2**bits
    found = snr(x, float(quantizer.scale), quantizer.fmt.zero_point, levels)
    # At 8 bits the rarest values decide, of which this data has others than the batches had.
    assert found > best_snr(x, levels) - (0.8 if bits == 8 else 0.15)
    around_zero = calibrated(TensorSpec(f"int{bits}"), SKEWED[name])
    middle = snr(x, float(around_zero.scale), 2 ** (bits - 1), levels)
    assert found > middle + 0.5


@pytest.mark.parametrize("bits", [8, 4])
def test_even_data_stays_around_zero(bits: int) -> None:
    assert calibrated(spec(bits), lambda x: x).fmt == get_format(f"int{bits}")


@pytest.mark.parametrize("sign_option", [True, False])
def test_data_without_negative_values_has_all_levels_above(sign_option: bool) -> None:
    given = TensorSpec("int4", unsigned_if_nonnegative=sign_option, zero_point=True)
    assert calibrated(given, F.relu).fmt == get_format("uint4")


def test_it_is_kept_when_calibration_is_over_and_the_scale_moves_on() -> None:
    quantizer = calibrated(spec(8), F.silu, batches=8)
    assert not quantizer.deciding
    fmt, scale = quantizer.fmt, quantizer.scale.clone()
    for _ in range(40):
        quantizer(F.leaky_relu(4 * torch.randn(64, 500), 0.5))
        refresh_activations([quantizer])
    assert quantizer.fmt == fmt
    assert float(quantizer.scale) > 1.5 * float(scale)


def test_min_max_covers_the_range() -> None:
    given = TensorSpec("int8", quantizer="minmax", zero_point=True)
    quantizer = observing(given)
    x = torch.linspace(-1, 15, 4000)
    quantizer(x)
    refresh_activations([quantizer])
    assert quantizer.fmt == get_format("uint8_zp16")
    assert float(quantizer.scale) == pytest.approx(16 / 255, rel=0.01)


def test_state_of_a_quantizer_goes_on_bit_for_bit() -> None:
    quantizer = calibrated(spec(4), F.silu, batches=3)
    other = observing(spec(4))
    other.load_state_dict(copy.deepcopy(quantizer.state_dict()))
    for seed in range(8):
        for each in (quantizer, other):
            torch.manual_seed(100 + seed)
            each(F.silu(torch.randn(64, 100)))
            refresh_activations([each])
    assert quantizer.fmt == other.fmt
    assert torch.equal(quantizer.scale, other.scale)


# Specifications


def test_a_plain_name_takes_one_where_the_data_wants_it(tmp_path: Path) -> None:
    recipe = QuantRecipe([QuantRule("*", "int4", "int8")])
    inputs = recipe.rules[0].inputs
    assert inputs == spec(8)
    assert recipe.rules[0].weights == TensorSpec("int4")
    assert recipe.around_zero().rules[0].inputs == TensorSpec("int8", unsigned_if_nonnegative=True)
    recipe.to_yaml(tmp_path / "recipe.yaml")
    assert QuantRecipe.from_yaml(tmp_path / "recipe.yaml") == recipe
    assert QuantRule("*", "int4", "uint8").inputs == TensorSpec("uint8")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"format": "uint8"}, "got zero_point=True with format 'uint8'; expected signed integers"),
        ({"format": "fp4"}, "with format 'fp4_e2m1'; expected signed integers"),
        ({"format": "int8", "quantizer": "octav"}, "which chooses none; expected one of iterative"),
        ({"format": "int8", "quantizer": "lsq"}, "which chooses none; expected one of iterative"),
        ({"format": "int8", "shared": "cat"}, "expected one of the two"),
    ],
)
def test_refuses_what_has_none(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TensorSpec(**given, zero_point=True)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        (TensorSpec("int8", zero_point=True), "got zero_point for weights"),
        ("uint8_zp20", "got format 'uint8_zp20' for weights; expected one around zero, as 'int8'"),
    ],
)
def test_weights_have_none(weights: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        QuantRule("*", weights)


def test_another_format_keeps_it_where_it_can() -> None:
    assert spec(8).with_format(get_format("int4")) == spec(4)
    assert not spec(8).with_format(get_format("fp8")).zero_point
    assert not spec(8).with_format(get_format("uint4")).zero_point


def test_the_report_names_what_may_be_chosen_and_what_was() -> None:
    model = nn.Sequential(nn.SiLU(), nn.Linear(8, 8))
    (row,) = prepare(model, weights="int8", activations="int4", first_last_bits=None).rows
    assert str(row.input).startswith("int4 or uint4 ")
    (quantizer,) = activation_quantizers(model)
    quantizer.widen(8)  # a first phase of more bits changes nothing of what it comes to
    assert describe(quantizer).startswith("int4 or uint4 ")
    set_observing(model, True)
    torch.manual_seed(0)
    model(torch.randn(512, 8))
    set_observing(model, False)
    refresh(model)
    assert isinstance(quantizer.fmt, IntFormat)
    assert quantizer.fmt.bits == 8
    assert quantizer.fmt.zero_point == 17 * (quantizer.zero_point or 0) > 0  # 255 is 17 times 15
    assert describe(quantizer).startswith(f"uint4_zp{quantizer.zero_point} ")
