"""How one tensor of a layer is quantized, as plain data."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Any, Final, Literal, get_args

from statqat_lightning._tables import html_table
from statqat_lightning._words import did_you_mean
from statqat_lightning.formats import BlockFormat, Format, IntFormat, get_format, unsigned
from statqat_lightning.numerics.granularity import Granularity, get_granularity
from statqat_lightning.numerics.straight_through import GRADIENTS, Gradient
from statqat_lightning.quantizers import (
    Block,
    Quantizer,
    check_pairing,
    get_quantizer,
    option_names,
    quantizer_names,
)

Objective = Literal["output", "weight"]
"""What the scales of a weight minimise, see `TensorSpec`."""
OUTPUT_ERROR: Final = "output"
WEIGHT_ERROR: Final = "weight"
OBJECTIVES: tuple[Objective, ...] = get_args(Objective)


@dataclass(frozen=True, init=False)
class TensorSpec:
    """How one tensor of a layer is quantized.

    Args:
        format: Name of a number format, see `get_format`.
        granularity: `per_tensor`, `per_channel`, `per_group:SIZE` or `per_block:SIZE`; None for the
            default of the role: weights per output channel, inputs per tensor. A block format
            brings its own.
        quantizer: Name of a quantizer, see `get_quantizer`; None for the default of the role:
            weights analytic (they are Gaussian-like), inputs iterative (they can be anything).
            `block` belongs to block formats, and they to it.
        unsigned_if_nonnegative: Where calibration sees no negative value, use the unsigned integers
            of the same width, or the floats with a zero point (`ufp4_e2m1` for `fp4_e2m1`): after a
            ReLU that is one bit won, or 4 dB.
        gradient: Straight-through gradient, see `fake_quantize`.
        objective: Whose squared error the scales of a weight minimise: `output` counts the error of
            each element by the energy of the input channel it is multiplied with, wherever those
            inputs were seen; `weight` counts all alike. None is `output` where the quantizer can
            weigh errors. Scales of inputs and outputs do not depend on it.
        max_value: The largest value that an input or output can have, as 6 behind a ReLU6, beyond
            which its scale never reaches; None where there is none.
        shared: A name that inputs and outputs have in common if one scale serves them all, as some
            runtimes need it where tensors are concatenated. It is the scale of least squared error
            in the mean of the tensors. None for a scale of its own.
        zero_point: Give an integer grid a zero point where the data reaches further on one side of
            zero than on the other, as behind a SiLU, a HardSwish or a GELU. Calibration chooses it
            with the scale: of `2**bits` levels, as many lie below zero as give the least error, if
            that is half a decibel less than around zero. It is kept from then on, while the scale
            goes on moving.
        **options: Options of the quantizer.

    Raises:
        ValueError: If a name or an option is unknown, if format, granularity and quantizer do not
            go together, or the sign option comes with a format that has no unsigned one.
    """

    format: str
    granularity: str | None = None
    quantizer: str | None = None
    unsigned_if_nonnegative: bool = False
    gradient: Gradient = "clipped"
    objective: Objective | None = None
    max_value: float | None = None
    shared: str | None = None
    zero_point: bool = False
    options: tuple[tuple[str, Any], ...] = ()

    def __init__(
        self,
        format: str,
        granularity: str | None = None,
        quantizer: str | None = None,
        unsigned_if_nonnegative: bool = False,
        gradient: Gradient = "clipped",
        objective: Objective | None = None,
        max_value: float | None = None,
        shared: str | None = None,
        zero_point: bool = False,
        **options: Any,
    ) -> None:
        if isinstance(options.get("options"), tuple):  # from `dataclasses.replace`
            options = dict(options.pop("options")) | options
        _refuse_unknown(options)
        fmt = get_format(format)
        if granularity is not None:
            get_granularity(granularity)
        if quantizer is not None:
            rule = get_quantizer(quantizer, **options)
            rule.check_format((unsigned(fmt) or fmt) if unsigned_if_nonnegative else fmt)
            if rule.learned and gradient != "clipped":
                raise ValueError(
                    f"TensorSpec: got gradient={gradient!r} with quantizer {quantizer!r}; expected "
                    "'clipped': the gradient of a learned scale belongs to that of clipping."
                )
            if rule.learned and shared is not None:
                raise ValueError(
                    f"TensorSpec: got shared={shared!r} with quantizer {quantizer!r}; expected "
                    "None: each layer learns a scale of its own."
                )
        elif options:
            raise ValueError(
                f"TensorSpec: got options {[*options]} without a quantizer; "
                "name the quantizer they belong to."
            )
        blocks = isinstance(fmt, BlockFormat)
        if quantizer is not None or blocks:
            check_pairing(quantizer or Block.name, fmt, granularity)
        if unsigned_if_nonnegative and unsigned(fmt) is None:
            raise ValueError(
                f"TensorSpec: got unsigned_if_nonnegative=True with format {fmt.name!r}; "
                "expected signed integers, or floats with a form for a zero point: "
                "fp8_e4m3, fp6_e2m3, fp6_e3m2, fp4_e2m1."
            )
        if gradient not in GRADIENTS:
            raise ValueError(
                f"TensorSpec: got gradient={gradient!r}; expected one of {', '.join(GRADIENTS)}."
                f"{did_you_mean(gradient, GRADIENTS)}"
            )
        if objective not in (None, *OBJECTIVES):
            raise ValueError(
                f"TensorSpec: got objective={objective!r}; expected one of {', '.join(OBJECTIVES)}."
                f"{did_you_mean(objective, OBJECTIVES)}"
            )
        if max_value is not None and not (
            isinstance(max_value, int | float) and 0 < max_value < math.inf
        ):
            raise ValueError(
                f"TensorSpec: got max_value={max_value!r}; expected a positive number, or None."
            )
        if shared is not None and not (isinstance(shared, str) and shared):
            raise ValueError(f"TensorSpec: got shared={shared!r}; expected a name, or None.")
        if zero_point:
            _check_zero_point(fmt, quantizer, shared)
        values = {
            "format": fmt.name,
            "granularity": granularity,
            "quantizer": quantizer,
            "unsigned_if_nonnegative": unsigned_if_nonnegative,
            "gradient": gradient,
            "objective": objective,
            "max_value": max_value,
            "shared": shared,
            "zero_point": bool(zero_point),
            "options": tuple(sorted(options.items())),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)
        if objective == OUTPUT_ERROR and not self.weight_quantizer().weighs:
            raise ValueError(
                f"TensorSpec: got objective={objective!r} with quantizer {quantizer!r}, which "
                "weighs all errors alike; expected none, 'analytic', 'iterative' or 'block', or "
                f"objective={WEIGHT_ERROR!r}."
            )

    def with_format(self, fmt: Format) -> TensorSpec:
        """The same specification in another format, without what is void there.

        That is the sign option where the format is of another family, or has no unsigned form, and
        granularity and quantizer between a block format and another one.
        """
        old = get_format(self.format)
        adapts = self.unsigned_if_nonnegative and isinstance(fmt, type(old))
        adapts = adapts and unsigned(fmt) is not None
        if isinstance(old, BlockFormat) != isinstance(fmt, BlockFormat):
            return TensorSpec(
                fmt.name,
                unsigned_if_nonnegative=adapts,
                gradient=self.gradient,
                objective=self.objective,
                max_value=self.max_value,
                shared=self.shared,
            )
        zero_point = self.zero_point and isinstance(fmt, IntFormat) and fmt.signed
        granularity = None if isinstance(fmt, BlockFormat) else self.granularity
        return replace(
            self,
            format=fmt.name,
            granularity=granularity,
            unsigned_if_nonnegative=adapts,
            zero_point=zero_point,
        )

    def weight_granularity(self, axis: int = 0) -> Granularity:
        """How a weight whose kept axis is `axis` shares scales."""
        fmt = get_format(self.format)
        if isinstance(fmt, BlockFormat):
            return get_granularity(f"per_block:{fmt.block_size}", axis)
        return get_granularity(self.granularity or "per_channel", axis)

    def weight_quantizer(self) -> Quantizer:
        """The rule that chooses a weight's scales."""
        default = Block.name if isinstance(get_format(self.format), BlockFormat) else "analytic"
        return get_quantizer(self.quantizer or default, **dict(self.options))

    @property
    def weighs(self) -> bool:
        """Whether a weight's scales minimise the error of the output, see `objective`."""
        return self.objective != WEIGHT_ERROR and self.weight_quantizer().weighs

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without the entries that hold their defaults."""
        entries: dict[str, Any] = {"format": self.format}
        if self.granularity is not None:
            entries["granularity"] = self.granularity
        if self.quantizer is not None:
            entries["quantizer"] = self.quantizer
        if self.unsigned_if_nonnegative:
            entries["unsigned_if_nonnegative"] = True
        if self.gradient != "clipped":
            entries["gradient"] = self.gradient
        if self.objective is not None:
            entries["objective"] = self.objective
        if self.max_value is not None:
            entries["max_value"] = self.max_value
        if self.shared is not None:
            entries["shared"] = self.shared
        if self.zero_point:
            entries["zero_point"] = True
        return entries | dict(self.options)

    def __repr__(self) -> str:
        arguments = [f"{name}={value!r}" for name, value in self.to_dict().items()]
        arguments[0] = repr(self.format)
        return f"TensorSpec({', '.join(arguments)})"

    def _repr_html_(self) -> str:
        entries = [(name, str(value)) for name, value in self.to_dict().items()]
        return html_table([("TensorSpec", ""), *entries])


def _check_zero_point(fmt: Format, quantizer: str | None, shared: str | None) -> None:
    if not (isinstance(fmt, IntFormat) and fmt.signed):
        raise ValueError(
            f"TensorSpec: got zero_point=True with format {fmt.name!r}; expected signed integers, "
            "as 'int8': the data chooses how many of the levels lie below zero."
        )
    if quantizer is not None and not get_quantizer(quantizer).has_zero_point:
        able = [name for name in quantizer_names() if get_quantizer(name).has_zero_point]
        raise ValueError(
            f"TensorSpec: got zero_point=True with quantizer {quantizer!r}, which chooses none; "
            f"expected one of {', '.join(able)}."
        )
    if shared is not None:
        raise ValueError(
            f"TensorSpec: got zero_point=True with shared={shared!r}; expected one of the two: "
            "tensors that share a scale have no zero point in common."
        )


def _refuse_unknown(options: dict[str, Any]) -> None:
    """Refuse options that no quantizer has: misspelt entries end up among them."""
    own = [field.name for field in fields(TensorSpec) if field.name != "options"]
    options_of_all = [option for name in quantizer_names() for option in option_names(name)]
    known = [*own, *dict.fromkeys(options_of_all)]
    if unknown := [option for option in options if option not in known]:
        hint = did_you_mean(unknown[0], known, most=2)
        raise ValueError(
            f"TensorSpec: got unknown entries {unknown}.{hint} Known are {', '.join(own)} and the "
            f"options of quantizers, {', '.join(known[len(own) :])}."
        )
