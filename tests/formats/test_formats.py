"""Number formats against ml_dtypes, torch and a search among the grid's midpoints."""

from __future__ import annotations

import copy
import math
import pickle
import re

import ml_dtypes
import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given
from hypothesis import strategies as st

from statqat_lightning.formats import (
    BlockFormat,
    CodebookFormat,
    FloatFormat,
    Format,
    IntFormat,
    at_least_bits,
    block_format_names,
    format_names,
    get_format,
    unsigned,
)
from tests.reference import EVERY_FORMAT, FLOAT_FORMATS, every_finite_bfloat16, nearest

ML_DTYPES = {
    "fp8_e4m3": ml_dtypes.float8_e4m3fn,
    "fp8_e5m2": ml_dtypes.float8_e5m2,
    "fp6_e2m3": ml_dtypes.float6_e2m3fn,
    "fp6_e3m2": ml_dtypes.float6_e3m2fn,
    "fp4_e2m1": ml_dtypes.float4_e2m1fn,
}
ANY_FLOATS = [FloatFormat(e, m) for e in range(1, 8) for m in range(8 - e)]
LEVELS = [
    get_format("levels:-1,-0.5,0,0.5,1"),
    get_format("levels:0,0.1,0.2,5"),
    get_format("levels:-1,-1e-6,0,1e-9,1,1e6"),  # too irregular for cells
    CodebookFormat(tuple(i**3 / 4096 for i in range(-128, 128))),
]
MANY_FORMATS = [*EVERY_FORMAT, *ANY_FLOATS, *LEVELS]
formats = st.sampled_from(MANY_FORMATS)


def short(fmt: Format) -> str:
    return fmt.name[:30]


floats = st.floats(width=32, allow_nan=False, allow_infinity=False)


def test_every_float_format_of_a_standard_has_an_oracle() -> None:
    assert set(ML_DTYPES) == {fmt.name for fmt in FLOAT_FORMATS} - {"fp4_e3m0"}


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


@pytest.mark.parametrize("fmt", [*ANY_FLOATS, *EVERY_FORMAT, *LEVELS], ids=short)
def test_round_equals_a_search_on_every_finite_bfloat16(fmt: Format) -> None:
    x = every_finite_bfloat16().float()
    expected = torch.from_numpy(nearest(fmt, x.double().numpy()))
    assert torch.equal(fmt.round(x).double(), expected)
    assert torch.equal(fmt.round(x.double()), expected)


def test_e3m4_equals_ml_dtypes_up_to_its_largest_value() -> None:
    # An IEEE-like type of ml_dtypes: the top exponent is infinity and NaN. Below it, it is ours.
    x = every_finite_bfloat16().float()
    x = x[x.abs() <= 15.5]
    expected = x.numpy().astype(ml_dtypes.float8_e3m4).astype(np.float32)
    assert torch.equal(get_format("fp8_e3m4").round(x), torch.from_numpy(expected))


@pytest.mark.parametrize("name", ["fp4_e3m0", "fp8_e7m0"])
def test_floats_without_mantissa_round_like_e8m0(name: str) -> None:
    fmt = get_format(name)
    x = every_finite_bfloat16().float()
    x = x[(x >= fmt.values[fmt.values > 0][0]) & (x <= fmt.max)]
    expected = x.numpy().astype(ml_dtypes.float8_e8m0fnu).astype(np.float32)
    assert torch.equal(fmt.round(x), torch.from_numpy(expected))
    assert torch.equal(fmt.round(x), x.to(torch.float8_e8m0fnu).float())


@pytest.mark.parametrize("name", [name for name in format_names() if "int" in name])
def test_integer_round_equals_rint_and_clip_on_every_finite_bfloat16(name: str) -> None:
    width = int(name.removesuffix("_full")[-1])
    low, high = (
        (0, 2**width - 1) if name[0] == "u" else (1 - 2 ** (width - 1), 2 ** (width - 1) - 1)
    )
    low -= name.endswith("_full")
    x = every_finite_bfloat16().float()
    expected = np.clip(np.rint(x.numpy()), low, high)
    assert torch.equal(get_format(name).round(x), torch.from_numpy(expected))


@pytest.mark.parametrize("fmt", MANY_FORMATS, ids=short)
def test_round_in_float64_finds_the_nearest_value_beside_ties(fmt: Format) -> None:
    ties = ((fmt.values[1:] + fmt.values[:-1]) / 2).numpy()
    x = np.concatenate([ties, np.nextafter(ties, np.inf), np.nextafter(ties, -np.inf)])
    x = np.concatenate([x, np.random.default_rng(0).normal(0, fmt.max / 2, 1000), [0.0, -0.0]])
    assert torch.equal(fmt.round(torch.from_numpy(x)), torch.from_numpy(nearest(fmt, x)))
    narrow = x.astype(np.float32)
    narrow = np.concatenate([narrow, np.nextafter(narrow, np.float32(0))])
    expected = torch.from_numpy(nearest(fmt, narrow.astype(np.float64)))
    assert torch.equal(fmt.round(torch.from_numpy(narrow)).double(), expected)


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
    q = torch.arange(-(2 ** (width - 1)), 2 ** (width - 1))
    assert torch.equal(IntFormat(width, full_range=True).encode(q.float()).long(), q % 2**width)
    assert torch.equal(unsigned.encode(torch.arange(2.0**width)).long(), torch.arange(2**width))


@pytest.mark.parametrize("fmt", MANY_FORMATS, ids=short)
def test_decode_inverts_encode_in_any_shape(fmt: Format) -> None:
    q = fmt.values.to(torch.float32).flip(0).view(-1, 1).T
    assert torch.equal(fmt.decode(fmt.encode(q)), q)


def test_zero_of_either_sign_encodes_to_code_zero() -> None:
    zeros = torch.tensor([0.0, -0.0])
    assert all(fmt.encode(zeros).tolist() == [0, 0] for fmt in [*FLOAT_FORMATS, IntFormat(4)])
    assert get_format("nf4").encode(zeros).tolist() == [7, 7]


@pytest.mark.parametrize("off_grid", [0.3, 1e6, -1e6, torch.nan, torch.inf])
def test_encode_refuses_values_off_the_grid(off_grid: float) -> None:
    with pytest.raises(ValueError, match=r"int4\.encode: got values off the grid"):
        get_format("int4").encode(torch.tensor([1.0, off_grid]))


@pytest.mark.parametrize("fmt", MANY_FORMATS, ids=short)
def test_infinities_saturate_and_nan_stays(fmt: Format) -> None:
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, 3.0e38, -3.0e38])
    limits = torch.tensor([fmt.max, fmt.min], dtype=torch.float64)
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        got = fmt.round(x.to(dtype)).double()
        assert torch.equal(got[[0, 1, 3, 4]], limits.to(dtype).double().repeat(2))
        assert got[2].isnan()


@pytest.mark.parametrize("fmt", MANY_FORMATS, ids=short)
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


@given(st.sampled_from([fmt for fmt in EVERY_FORMAT if fmt.is_symmetric]), floats)
def test_round_of_symmetric_formats_is_odd(fmt: Format, value: float) -> None:
    x = torch.tensor([value])
    assert torch.equal(fmt.round(-x), -fmt.round(x))


@pytest.mark.parametrize("fmt", MANY_FORMATS, ids=short)
def test_values_ascend_and_facts_follow_from_them(fmt: Format) -> None:
    assert fmt.values.dtype == torch.float64
    assert (fmt.values.diff() > 0).all()
    assert 0.0 in fmt.values
    assert (fmt.min, fmt.max) == (fmt.values[0].item(), fmt.values[-1].item())
    assert fmt.is_signed == bool((fmt.values < 0).any())
    assert fmt.is_symmetric == (fmt.values.tolist() == (-fmt.values).tolist()[::-1])
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
    assert get_format("uint3") == IntFormat(3, signed=False) == unsigned(get_format("int3"))
    assert [get_format(name).name for name in format_names()] == format_names()
    names = [*format_names(), *block_format_names(), *(fmt.name for fmt in ANY_FLOATS)]
    assert [str(get_format(name)) for name in names] == names
    assert get_format("int4_full") == IntFormat(4, full_range=True) == get_format("INT4-FULL")
    assert get_format("e3m0") is get_format("fp4_e3m0") is get_format("fp4-e3m0")
    assert get_format("fp5_e2m2") == FloatFormat(2, 2) == get_format("e2m2")
    assert get_format("mxfp8") is get_format("mxfp8_e4m3")
    assert get_format("mxfp6") is get_format("MXFP6-E2M3")
    assert get_format("levels: -1, 0.10, 0.1e0, 1".replace("0.10", "0")).name == "levels:-1,0,0.1,1"


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("int9", "Did you mean 'int8'|Did you mean 'uint"),
        ("fp8_e4m4", "Did you mean 'fp8_e4m3'"),
        ("fp8_e4m2", r"any fp\{bits\}_e\{x\}m\{y\} with bits = 1"),
        ("e0m3", r"any fp\{bits\}_e\{x\}m\{y\} with bits = 1"),
        ("uint4_full", "int4 from -7 to 7; int4_full has -8"),
        ("int4-ful", "Did you mean 'int4_full'"),
        ("mxfp5", "Did you mean .*'mxfp4'"),
        ("nf5", "Did you mean 'nf4'"),
        ("level:0,1", "levels:-1,-0.5,0,0.5,1 for levels of your own"),
        (None, "got None. Known formats"),
        (["int4"], re.escape("got ['int4']. Known formats")),
        ("itn4", "Did you mean 'int4'"),
        ("zzzzzz", "got 'zzzzzz'. Known formats: int2, int3"),
        (4, "got 4. Known formats"),
    ],
)
def test_unknown_format_names_near_misses(name: str, hint: str) -> None:
    with pytest.raises(ValueError, match=hint) as caught:
        get_format(name)
    assert all(known in str(caught.value) for known in format_names() + block_format_names())


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
        ("int4_full", 8, "int8_full"),
        ("nf4", 8, "fp8_e4m3"),
        ("levels:-1,0,1", 5, "fp6_e2m3"),
        ("mxfp4", 8, "mxfp8_e4m3"),
        ("nvfp4", 5, "mxfp6_e2m3"),
        ("ufp4", 8, "ufp8_e4m3"),
        ("mxfp8_e5m2", 8, "mxfp8_e5m2"),
    ],
)
def test_at_least_bits_stays_in_the_family(name: str, bits: int, expected: str) -> None:
    assert at_least_bits(get_format(name), bits).name == expected


# As bitsandbytes prints it (functional.create_normal_map), and appendix E of QLoRA.
NF4_TABLE = [
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
]
# arXiv 2405.03103, table of data types.
SF4_TABLE = "-1 -.628 -.455 -.334 -.237 -.153 -.075 0 .066 .133 .205 .284 .376 .491 .657 1"


def test_nf4_equals_the_published_table_to_the_bit() -> None:
    assert get_format("nf4").code_values.tolist() == NF4_TABLE


def test_sf4_consists_of_quantiles_of_students_t() -> None:
    last = 1 - (1 / 32 + 1 / 30) / 2
    positive, negative = (
        scipy.stats.t.ppf(np.linspace(last, 0.5, count + 1)[:-1], 5) for count in (8, 7)
    )
    expected = np.concatenate([-negative, [0], positive[::-1]]) / positive[0]
    levels = get_format("sf4").code_values.numpy()
    np.testing.assert_array_equal(levels, expected.astype(np.float32))
    np.testing.assert_allclose(levels, [*map(float, SF4_TABLE.split())], atol=6e-4)


@pytest.mark.parametrize("fmt", LEVELS, ids=short)
def test_levels_are_named_by_what_reads_them_back(fmt: CodebookFormat) -> None:
    assert get_format(fmt.name) == fmt
    assert torch.equal(fmt.encode(fmt.values).long(), torch.arange(len(fmt.levels)))
    assert fmt.bits == math.ceil(math.log2(len(fmt.levels)))


def test_levels_are_float32_numbers() -> None:
    fmt = CodebookFormat((-0.1, -0.0, 1 / 3))
    assert fmt.name == "levels:-0.1,0,0.33333334"
    assert fmt.values.tolist() == [float(np.float32(-0.1)), 0.0, float(np.float32(1 / 3))]
    assert fmt.bits == 2
    assert fmt.code_values[3].isnan()


@pytest.mark.parametrize(
    ("levels", "message"),
    [
        ((-1.0, 1.0), "expected zero and a positive number among them"),
        ((-1.0, 0.0), "expected zero and a positive number among them"),
        ((0.0, 1.0, 0.5), r"\(0\.0, 1\.0, 0\.5\); expected strictly ascending .* Sort them"),
        ((0.0, 1.0, 1.0), "expected strictly ascending"),
        ((0.0, 1.0, 1.0 + 1e-9), "expected strictly ascending float32 numbers"),
        ((0.0,), "got 1 levels; expected 2 to 256"),
        ((), "got 0 levels; expected 2 to 256"),
        (tuple(map(float, range(257))), "got 257 levels; expected 2 to 256"),
        ((0.0, math.nan), "expected finite float32 numbers"),
        ((0.0, math.inf), "expected finite float32 numbers"),
        ((0.0, 1e39), "expected finite float32 numbers"),
    ],
)
def test_bad_levels(levels: tuple[float, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CodebookFormat(levels)


@pytest.mark.parametrize("name", ["levels:", "levels:0,x", "levels:1,0", "levels:0"])
def test_bad_names_of_levels(name: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"format: got {name!r}: ")):
        get_format(name)


@pytest.mark.parametrize("fmt", [get_format("nf4"), LEVELS[2]], ids=short)
def test_codebooks_round_alike_compiled_and_batched(fmt: Format) -> None:
    x = torch.randn(40, 7)
    expected = fmt.round(x)
    assert torch.equal(torch.compile(fmt.round, fullgraph=True, backend="aot_eager")(x), expected)
    assert torch.equal(torch.func.vmap(fmt.round_inside_)(x.clamp(fmt.min, fmt.max)), expected)


def test_full_range_is_for_signed_integers() -> None:
    with pytest.raises(ValueError, match="got full_range=True with signed=False"):
        IntFormat(4, signed=False, full_range=True)
    assert (IntFormat(4, full_range=True).min, IntFormat(4, full_range=True).max) == (-8, 7)


@pytest.mark.parametrize(
    ("name", "element", "size", "bits"),  # OCP Microscaling v1.0, table 1; NVFP4
    [
        ("mxfp8_e4m3", "fp8_e4m3", 32, 8.25),
        ("mxfp8_e5m2", "fp8_e5m2", 32, 8.25),
        ("mxfp6_e2m3", "fp6_e2m3", 32, 6.25),
        ("mxfp6_e3m2", "fp6_e3m2", 32, 6.25),
        ("mxfp4", "fp4_e2m1", 32, 4.25),
        ("nvfp4", "fp4_e2m1", 16, 4.5),
    ],
)
def test_block_formats_are_their_elements_and_a_scale(
    name: str, element: str, size: int, bits: float
) -> None:
    fmt, grid = get_format(name), get_format(element)
    assert isinstance(fmt, BlockFormat)
    assert (fmt.element, fmt.block_size, fmt.bits_per_value) == (grid, size, bits)
    x = torch.randn(1000) * fmt.max
    assert torch.equal(fmt.round(x), grid.round(x))
    assert torch.equal(fmt.encode(fmt.round(x)), grid.encode(grid.round(x)))
    assert (fmt.bits, fmt.max, fmt.min) == (grid.bits, grid.max, grid.min)


def test_bad_block_formats() -> None:
    with pytest.raises(ValueError, match="got block_size=0; expected a positive number"):
        BlockFormat("mine", FloatFormat(2, 1), 0, "e8m0")
    with pytest.raises(ValueError, match="got scale_format='e5m3'; expected e8m0 or e4m3"):
        BlockFormat("mine", FloatFormat(2, 1), 32, "e5m3")


@pytest.mark.parametrize("name", ["int4", "fp8_e4m3", "nf4"])
def test_large_tensors_are_looked_up_in_pieces(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fmt = get_format(name)
    values = fmt.round(torch.randn(7, 11))
    codes = fmt.encode(values)
    monkeypatch.setattr("statqat_lightning.formats.base._PIECE", 10)
    assert torch.equal(fmt.encode(values), codes)
    assert torch.equal(fmt.encode(values.T), codes.T)
    assert torch.equal(fmt.decode(codes), values)
    assert (fmt.encode(values).dtype, fmt.decode(codes).dtype) == (torch.uint8, torch.float32)
    values[-1, -1] = 0.37
    with pytest.raises(ValueError, match="got values off the grid"):
        fmt.encode(values)
    decode = torch.export.export(Decoder(fmt), (codes,), strict=False)
    assert sum(node.op == "call_function" for node in decode.graph.nodes) < 6  # and a trace at once


class Decoder(torch.nn.Module):
    def __init__(self, fmt: Format) -> None:
        super().__init__()
        self.fmt = fmt

    def forward(self, codes: torch.Tensor) -> torch.Tensor:
        return self.fmt.decode(codes)
