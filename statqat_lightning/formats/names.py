"""Formats by their names: one place that parses them."""

from __future__ import annotations

import re
from functools import lru_cache

from statqat_lightning._words import did_you_mean, short
from statqat_lightning.formats.base import Format
from statqat_lightning.formats.blocks import E4M3, E8M0, BlockFormat
from statqat_lightning.formats.codebooks import CodebookFormat, standard_codebook
from statqat_lightning.formats.floats import FloatFormat
from statqat_lightning.formats.integers import IntFormat
from statqat_lightning.formats.shifted_floats import ShiftedFloatFormat

_FLOATS = {
    fmt.name: fmt
    for fmt in (
        FloatFormat(4, 3, num_special=1),  # OCP OFP8 v1.0; torch.float8_e4m3fn
        FloatFormat(5, 2, num_special=4),  # OCP OFP8 v1.0; torch.float8_e5m2
        FloatFormat(2, 3),  # OCP MX v1.0
        FloatFormat(3, 2),  # OCP MX v1.0
        FloatFormat(2, 1),  # OCP MX v1.0
        FloatFormat(3, 0),
    )
}
_SHIFTED = [f"u{name}" for name, fmt in _FLOATS.items() if ShiftedFloatFormat.has_form_for(fmt)]
_BLOCKS = {
    fmt.name: fmt
    for fmt in (
        BlockFormat("mxfp8_e4m3", _FLOATS["fp8_e4m3"], 32, E8M0),
        BlockFormat("mxfp8_e5m2", _FLOATS["fp8_e5m2"], 32, E8M0),
        BlockFormat("mxfp6_e2m3", _FLOATS["fp6_e2m3"], 32, E8M0),
        BlockFormat("mxfp6_e3m2", _FLOATS["fp6_e3m2"], 32, E8M0),
        BlockFormat("mxfp4", _FLOATS["fp4_e2m1"], 32, E8M0),
        BlockFormat("nvfp4", _FLOATS["fp4_e2m1"], 16, E4M3),
    )
}
_CODEBOOKS = ("nf4", "sf4")
_ALIASES = {
    "fp8": "fp8_e4m3",
    "fp4": "fp4_e2m1",
    "ufp8": "ufp8_e4m3",
    "ufp4": "ufp4_e2m1",
    "mxfp8": "mxfp8_e4m3",
    "mxfp6": "mxfp6_e2m3",
    "mxfp4_e2m1": "mxfp4",
    "nvfp4_e2m1": "nvfp4",
}
_IN_FLOAT = ("none", "null", "float", "full", "half", "fp32", "fp16", "bf16", "bfloat16", "tf32")
"""What people write for no format, beside `float16` and the like."""
_WIDTHS = range(2, 9)
_INTS = [
    *(f"int{width}" for width in _WIDTHS),
    *(f"int{width}_full" for width in _WIDTHS),
    *(f"uint{width}" for width in _WIDTHS),
]


def format_names() -> list[str]:
    """Canonical names of all formats of single values, but for other floats and lists of levels."""
    return [*_INTS, *_FLOATS, *_SHIFTED, *_CODEBOOKS]


def block_format_names() -> list[str]:
    """Canonical names of all block formats."""
    return [*_BLOCKS]


def aliases(name: str) -> tuple[str, ...]:
    """Other names of the format with a canonical name."""
    return tuple(alias for alias, known in _ALIASES.items() if known == name)


def get_format(name: str) -> Format:
    """The format with the given name; `list_formats` shows all of them.

    Args:
        name: One of these, in lower or upper case:

            - `int2` to `int8`, symmetric (-7 to 7 for `int4`), `int2_full` to `int8_full` (-8 to
              7), `uint2` to `uint8`, `uint8_zp20` and the like with a zero point (-20 to 235);
            - `fp8_e4m3`, `fp8_e5m2`, `fp6_e2m3`, `fp6_e3m2`, `fp4_e2m1`, `fp4_e3m0`, and any other
              `fp{bits}_e{x}m{y}` of up to 8 bits, or `e{x}m{y}` in short; `fp8` is E4M3, `fp4`
              E2M1. E4M3 and E5M2 have the special codes of OCP OFP8 v1.0, others have none;
            - `ufp8_e4m3`, `ufp6_e2m3`, `ufp6_e3m2`, `ufp4_e2m1`, the same with a zero point, for
              data that is not negative, see `ShiftedFloatFormat`; `ufp8` and `ufp4` in short;
            - `nf4` (QLoRA, arXiv 2305.14314) and `sf4` (Student-float with 5 degrees of freedom,
              arXiv 2405.03103), `levels:-1,-0.5,0,0.5,1` for levels of one's own;
            - block formats, for weights: `mxfp8_e4m3` (or `mxfp8`), `mxfp8_e5m2`, `mxfp6_e2m3` (or
              `mxfp6`), `mxfp6_e3m2`, `mxfp4`, `nvfp4`.

    Raises:
        ValueError: If there is no such format; the message lists near misses and all names. If
            levels are not a list that `CodebookFormat` takes.

    Examples:
        >>> get_format("fp4").values.tolist()[-4:]
        [2.0, 3.0, 4.0, 6.0]
    """
    fmt = _parse(name) if isinstance(name, str) else None
    if fmt is not None:
        return fmt
    key = canonical_name(name) if isinstance(name, str) else ""
    known = [*format_names(), *block_format_names()]
    if meant := _meant(key):
        raise ValueError(f"format: got {short(name)}.{meant}")
    hint = did_you_mean(key, [*known, *_ALIASES], most=3)
    raise ValueError(
        f"format: got {short(name)}.{hint} Known formats: {', '.join(known)}; "
        "any fp{bits}_e{x}m{y} with bits = 1 + x + y of at most 8; levels:-1,-0.5,0,0.5,1 for "
        "levels of your own. Signed integers are symmetric, int4 from -7 to 7; int4_full has -8, "
        "and uint4_zp3 is -3 to 12."
    )


def _meant(key: str) -> str:
    """What whoever wrote something that is no format is likely to want; empty if nobody knows."""
    if key in _IN_FLOAT or re.fullmatch(r"float\d+", key):
        return " None in place of a format (null in YAML) leaves a tensor in float."
    if match := re.fullmatch(r"w(\d+)a(\d+)", key):
        weights, inputs = (f"'int{n}'" if int(n) in _WIDTHS else "None" for n in match.groups())
        return f" Expected weights={weights}, activations={inputs}, or a preset (list_presets())."
    if key.endswith("weight_only"):
        return f" Expected preset={key!r}, if list_presets() has it, or the format alone."
    return ""


def canonical_name(name: str) -> str:
    """A name in lower case, its alias resolved; there need not be a format of it."""
    key = name.lower()
    return key if key.startswith("levels:") else _ALIASES.get(key := key.replace("-", "_"), key)


@lru_cache(maxsize=1024)
def _parse(name: str) -> Format | None:
    key = canonical_name(name)
    if match := re.fullmatch(r"(u?)int([2-8])", key):
        return IntFormat(int(match[2]), signed=not match[1])
    if match := re.fullmatch(r"int([2-8])_full", key):
        return IntFormat(int(match[1]), full_range=True)
    if match := re.fullmatch(r"uint([2-8])_zp(\d{1,3})", key):
        width, zero_point = int(match[1]), int(match[2])
        if not 0 < zero_point < 2**width:
            return None
        return IntFormat(width, signed=False, zero_point=zero_point)
    if match := re.fullmatch(r"(?:(u?)fp(\d)_)?e(\d)m(\d)", key):
        exponent_bits, mantissa_bits = int(match[3]), int(match[4])
        bits = 1 + exponent_bits + mantissa_bits
        if exponent_bits < 1 or bits > 8 or match[2] not in (None, str(bits)):
            return None
        other = FloatFormat(exponent_bits, mantissa_bits)
        other = _FLOATS.get(other.name, other)
        return unsigned(other) if match[1] else other
    if key.startswith("levels:"):
        try:
            return CodebookFormat(tuple(map(float, key.removeprefix("levels:").split(","))))
        except ValueError as error:
            said = str(error) if len(str(error)) <= 200 else f"{str(error)[:197]}..."
            raise ValueError(f"format: got {short(name)}: {said}") from error
    return standard_codebook(key) if key in _CODEBOOKS else _BLOCKS.get(key)


def unsigned(fmt: Format) -> Format | None:
    """The format of the same width for data that is not negative; None if there is none."""
    if isinstance(fmt, IntFormat) and fmt.signed:
        return IntFormat(fmt.width, signed=False)
    if isinstance(fmt, FloatFormat) and ShiftedFloatFormat.has_form_for(fmt):
        return ShiftedFloatFormat(fmt)
    return None


def at_least_bits(fmt: Format, bits: int) -> Format:
    """`fmt`, or the narrowest wider one of its family if it has fewer than `bits` bits.

    Floats, with or without a zero point, and codebooks widen to FP6 E2M3 and FP8 E4M3, block
    formats to the MX formats of these, and no further.
    """
    if fmt.bits >= bits:
        return fmt
    if isinstance(fmt, IntFormat):
        share = fmt.zero_point / (2**fmt.width - 1)
        return IntFormat(bits, fmt.signed, fmt.full_range, round(share * (2**bits - 1)))
    prefix = "mx" if isinstance(fmt, BlockFormat) else ""
    prefix = "u" if isinstance(fmt, ShiftedFloatFormat) else prefix
    wider = map(get_format, (f"{prefix}fp6_e2m3", f"{prefix}fp8_e4m3"))
    return next((f for f in wider if f.bits >= bits), fmt)
