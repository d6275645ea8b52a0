"""Number formats against ml_dtypes, torch and a search among the grid's midpoints."""

from __future__ import annotations

import copy
import pickle
import re

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from statqat_lightning.formats import (
    FloatFormat,
    Format,
    IntFormat,
    at_least_bits,
    format_names,
    get_format,
)
from tests.reference import ALL_FORMATS, FLOAT_FORMATS, every_finite_bfloat16, nearest

ML_DTYPES = {
    "fp8_e4m3": ml_dtypes.float8_e4m3fn,
    "fp8_e5m2": ml_dtypes.float8_e5m2,
    "fp6_e2m3": ml_dtypes.float6_e2m3fn,
    "fp6_e3m2": ml_dtypes.float6_e3m2fn,
    "fp4_e2m1": ml_dtypes.float4_e2m1fn,
}
formats = st.sampled_from(ALL_FORMATS)
floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


def test_every_float_format_has_an_oracle() -> None:
    assert set(ML_DTYPES) == {fmt.name for fmt in FLOAT_FORMATS}


@pytest.mark.parametrize("name", ML_DTYPES)
def test_round_equals_ml_dtypes_on_every_finite_bfloat16(name: str) -> None:
    fmt = get_format(name)
    x = every_finite_bfloat16().float()
    # ml_dtypes may overflow to NaN or infinity where we saturate, so it gets the clamped values.
    expected = x.clamp(-fmt.max, fmt.max).numpy().astype(ML_DTYPES[name]).astype(np.float32)
    assert torch.equal(fmt.round(x), torch.from_numpy(expected))


@pytest.mark.parametrize(
    ("name", "dtype"), [("fp8_e4m3", torch.float8_e4m3fn), ("fp8_e5m2", torch.float8_e5m2)]
)
def test_round_equals_torch_float8_on_every_finite_bfloat16(name: str, dtype: torch.dtype) -> None:
    fmt = get_format(name)
    x = every_finite_bfloat16()
    inside = x[x.abs() <= fmt.max]
    assert torch.equal(fmt.round(inside.float()), inside.to(dtype).float())
    assert torch.equal(fmt.round(inside), inside.to(dtype).to(torch.bfloat16))


@pytest.mark.parametrize("name", ML_DTYPES)
def test_ties_and_their_float32_neighbours_equal_ml_dtypes(name: str) -> None:
    fmt = get_format(name)
    ties = ((fmt.values[1:] + fmt.values[:-1]) / 2).to(torch.float32)
    infinity = torch.tensor(torch.inf)
    x = torch.cat([ties, ties.nextafter(infinity), ties.nextafter(-infinity)])
    expected = x.numpy().astype(ML_DTYPES[name]).astype(np.float32)
    assert torch.equal(fmt.round(x), torch.from_numpy(expected))


@pytest.mark.parametrize("name", [name for name in format_names() if "int" in name])
def test_integer_round_equals_rint_and_clip_on_every_finite_bfloat16(name: str) -> None:
    width = int(name[-1])
    low, high = (
        (0, 2**width - 1) if name[0] == "u" else (1 - 2 ** (width - 1), 2 ** (width - 1) - 1)
    )
    x = every_finite_bfloat16().float()
    expected = np.clip(np.rint(x.numpy()), low, high)
    assert torch.equal(get_format(name).round(x), torch.from_numpy(expected))


@pytest.mark.parametrize("fmt", ALL_FORMATS, ids=str)
def test_round_in_float64_finds_the_nearest_value_beside_ties(fmt: Format) -> None:
    ties = ((fmt.values[1:] + fmt.values[:-1]) / 2).numpy()
    x = np.concatenate([ties, np.nextafter(ties, np.inf), np.nextafter(ties, -np.inf)])
    x = np.concatenate([x, np.random.default_rng(0).normal(0, fmt.max / 2, 1000), [0.0, -0.0]])
    assert torch.equal(fmt.round(torch.from_numpy(x)), torch.from_numpy(nearest(fmt, x)))


@pytest.mark.parametrize("name", ML_DTYPES)
def test_code_values_equal_ml_dtypes_code_by_code(name: str) -> None:
    fmt = get_format(name)
    expected = np.arange(2**fmt.bits, dtype=np.uint8).view(ML_DTYPES[name]).astype(np.float64)
    expected[~np.isfinite(expected)] = np.nan
    np.testing.assert_array_equal(fmt.code_values.numpy(), expected)


@pytest.mark.parametrize("name", ML_DTYPES)
def test_codes_equal_ml_dtypes(name: str) -> None:
    fmt = get_format(name)
    q = fmt.values.to(torch.float32)
    expected = q.numpy().astype(ML_DTYPES[name]).view(np.uint8)
    assert torch.equal(fmt.encode(q), torch.from_numpy(expected))


@pytest.mark.parametrize("width", range(2, 9))
def test_integer_codes_are_twos_complement(width: int) -> None:
    signed, unsigned = IntFormat(width), IntFormat(width, signed=False)
    q = torch.arange(1 - 2 ** (width - 1), 2 ** (width - 1))
    assert torch.equal(signed.encode(q.float()).long(), q % 2**width)
    assert torch.equal(unsigned.encode(torch.arange(2.0**width)).long(), torch.arange(2**width))


@pytest.mark.parametrize("fmt", ALL_FORMATS, ids=str)
def test_decode_inverts_encode_in_any_shape(fmt: Format) -> None:
    q = fmt.values.to(torch.float32).flip(0).view(-1, 1).T
    assert torch.equal(fmt.decode(fmt.encode(q)), q)


def test_zero_of_either_sign_encodes_to_code_zero() -> None:
    zeros = torch.tensor([0.0, -0.0])
    assert all(fmt.encode(zeros).tolist() == [0, 0] for fmt in ALL_FORMATS)


@pytest.mark.parametrize("off_grid", [0.3, 1e6, -1e6, torch.nan, torch.inf])
def test_encode_refuses_values_off_the_grid(off_grid: float) -> None:
    with pytest.raises(ValueError, match=r"int4\.encode: got values off the grid"):
        get_format("int4").encode(torch.tensor([1.0, off_grid]))


@pytest.mark.parametrize("fmt", ALL_FORMATS, ids=str)
def test_infinities_saturate_and_nan_stays(fmt: Format) -> None:
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, 3.0e38, -3.0e38])
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        got = fmt.round(x.to(dtype)).double()
        assert got[[0, 1, 3, 4]].tolist() == [fmt.max, fmt.min, fmt.max, fmt.min]
        assert got[2].isnan()


@pytest.mark.parametrize("fmt", ALL_FORMATS, ids=str)
def test_subnormal_inputs_round_to_zero(fmt: Format) -> None:
    tiny = torch.tensor([1e-45, -1e-45, 1e-39, 5e-324], dtype=torch.float64)
    assert fmt.round(tiny).count_nonzero() == 0
    assert fmt.round(tiny.float()).count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_round_keeps_dtype_and_shape_and_its_argument(dtype: torch.dtype) -> None:
    x = torch.linspace(-9, 9, 24, dtype=dtype).view(2, 3, 4)
    before = x.clone()
    got = get_format("fp4").round(x.mT)
    assert got.dtype == dtype
    assert torch.equal(x, before)
    assert torch.equal(got, get_format("fp4").round(x).mT)
    assert get_format("fp4").round(x[:0]).shape == (0, 3, 4)
    assert get_format("int4").round(torch.tensor(2.5)).item() == 2.0


def test_round_refuses_integers() -> None:
    with pytest.raises(
        TypeError, match=r"int4\.round: got dtype torch\.int64; expected a floating"
    ):
        get_format("int4").round(torch.tensor([1]))


@given(formats, floats)
def test_round_is_idempotent(fmt: Format, value: float) -> None:
    once = fmt.round(torch.tensor([value]))
    assert torch.equal(fmt.round(once), once)
    assert once.double().item() in fmt.values


@given(formats, floats, floats)
def test_round_is_monotone(fmt: Format, a: float, b: float) -> None:
    low, high = fmt.round(torch.tensor([min(a, b), max(a, b)])).tolist()
    assert low <= high


@given(st.sampled_from([fmt for fmt in ALL_FORMATS if fmt.is_signed]), floats)
def test_round_of_signed_formats_is_odd(fmt: Format, value: float) -> None:
    x = torch.tensor([value])
    assert torch.equal(fmt.round(-x), -fmt.round(x))


@pytest.mark.parametrize("fmt", ALL_FORMATS, ids=str)
def test_values_ascend_and_facts_follow_from_them(fmt: Format) -> None:
    assert fmt.values.dtype == torch.float64
    assert (fmt.values.diff() > 0).all()
    assert 0.0 in fmt.values
    assert (fmt.min, fmt.max) == (fmt.values[0].item(), fmt.values[-1].item())
    assert fmt.is_signed == (fmt.name[0] != "u")
    assert len(fmt.values) <= 2**fmt.bits


@pytest.mark.parametrize(
    ("name", "largest", "smallest_positive"),
    [  # OCP OFP8 v1.0, tables 1 and 2; OCP Microscaling v1.0, tables 4 and 5
        ("fp8_e4m3", 448.0, 2.0**-9),
        ("fp8_e5m2", 57344.0, 2.0**-16),
        ("fp6_e2m3", 7.5, 0.125),
        ("fp6_e3m2", 28.0, 0.0625),
        ("fp4_e2m1", 6.0, 0.5),
    ],
)
def test_limits_equal_the_standards(name: str, largest: float, smallest_positive: float) -> None:
    fmt = get_format(name)
    assert fmt.max == -fmt.min == largest
    assert fmt.values[fmt.values > 0].min().item() == smallest_positive


def test_get_format_reads_aliases_and_spellings() -> None:
    assert get_format("fp8") is get_format("FP8-E4M3") is get_format("e4m3")
    assert get_format("fp4") == FloatFormat(2, 1)
    assert get_format("uint3") == IntFormat(3, signed=False) == get_format("int3").as_unsigned()  # type: ignore[attr-defined]
    assert [get_format(name).name for name in format_names()] == format_names()
    assert [str(get_format(name)) for name in format_names()] == format_names()


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("int9", "Did you mean 'int8'|Did you mean 'uint"),
        ("fp8_e4m4", "Did you mean 'fp8_e4m3'"),
        ("itn4", "Did you mean 'int4'"),
        ("zzzzzz", "got 'zzzzzz'. Known formats: int2, int3"),
        (4, "got 4. Known formats"),
    ],
)
def test_unknown_format_names_near_misses(name: str, hint: str) -> None:
    with pytest.raises(ValueError, match=hint) as caught:
        get_format(name)
    assert all(known in str(caught.value) for known in format_names())


def test_formats_with_equal_facts_are_one_key() -> None:
    assert len({IntFormat(4), get_format("int4"), copy.deepcopy(get_format("int4"))}) == 1
    assert pickle.loads(pickle.dumps(get_format("fp8"))) == get_format("fp8")
    assert IntFormat(4) != IntFormat(4, signed=False)


@pytest.mark.parametrize("width", [-1, 0, 1, 9])
def test_integer_width_out_of_range(width: int) -> None:
    with pytest.raises(ValueError, match=re.escape(f"got width={width}; expected 2 to 8 bits")):
        IntFormat(width)


@pytest.mark.parametrize(("exponent", "mantissa"), [(0, 3), (4, -1), (5, 3)])
def test_float_widths_out_of_range(exponent: int, mantissa: int) -> None:
    with pytest.raises(ValueError, match=f"exponent_bits={exponent} and mantissa_bits={mantissa}"):
        FloatFormat(exponent, mantissa)


@pytest.mark.parametrize("exponent_bits", range(1, 7))
@pytest.mark.parametrize("mantissa_bits", range(4))
def test_any_small_float_format_rounds_to_its_nearest_value(
    exponent_bits: int, mantissa_bits: int
) -> None:
    if exponent_bits + mantissa_bits > 7:
        mantissa_bits = 7 - exponent_bits
    fmt = FloatFormat(exponent_bits, mantissa_bits)
    x = np.random.default_rng(1).normal(0, 1, 500) * np.exp2(
        np.random.default_rng(2).uniform(fmt.min_exponent - 3, np.log2(fmt.max) + 1, 500)
    )
    x = x.astype(np.float32).astype(np.float64)
    expected = torch.from_numpy(nearest(fmt, x))
    assert torch.equal(fmt.round(torch.from_numpy(x)), expected)
    assert torch.equal(fmt.round(torch.from_numpy(x).float()).double(), expected)


@pytest.mark.parametrize(
    ("name", "bits", "expected"),
    [
        ("int4", 8, "int8"),
        ("uint2", 6, "uint6"),
        ("int8", 4, "int8"),
        ("fp4", 8, "fp8_e4m3"),
        ("fp4", 5, "fp6_e2m3"),
        ("fp6_e3m2", 8, "fp8_e4m3"),
        ("fp8_e5m2", 8, "fp8_e5m2"),
    ],
)
def test_at_least_bits_stays_in_the_family(name: str, bits: int, expected: str) -> None:
    assert at_least_bits(get_format(name), bits).name == expected
