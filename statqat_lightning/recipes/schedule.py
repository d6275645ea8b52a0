"""When in a training quantization begins, narrows and stops: plain data, derived from the step."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple, get_args

from statqat_lightning._tables import html_table
from statqat_lightning._words import did_you_mean

When = int | float | str
"""A moment of a training: a share (float, 0 to 1), optimizer steps (int), or `"3 epochs"`."""

BatchNormMode = Literal["train", "freeze", "reestimate"]
"""What happens to BatchNorm statistics, see `QuantSchedule`."""
BATCH_NORM_MODES: tuple[BatchNormMode, ...] = get_args(BatchNormMode)


class Progress(NamedTuple):
    """How far a training is.

    Attributes:
        step: Optimizer steps taken.
        epoch: Epochs done, with the part of the running one; whole ones where its length is
            unknown.
        share: Part of the training that is done, 0 to 1; 0 where its end is unknown.
    """

    step: int
    epoch: float
    share: float


def reached(when: When, progress: Progress) -> bool:
    """Whether a training is at or past a moment."""
    if isinstance(when, str):
        return progress.epoch >= _epochs("when", when)
    if isinstance(when, float):
        return progress.share >= when
    return progress.step >= when


@dataclass(frozen=True)
class QuantSchedule:
    """The phases of a quantization-aware training.

    Each phase follows from the progress of the training alone, so a resumed run cannot disagree
    with the run it resumes.

    A moment is a share of the training (a float from 0 to 1), a number of optimizer steps (an int)
    or a text such as `"2 epochs"`.

    Args:
        weights_at: Moment from which weights are quantized.
        activations_at: Moment from which inputs are quantized; they are observed before.
        freeze_at: Moment from which scales and statistics stay as they are; None never freezes.
        widths: `(moment, bits)` pairs, bits falling: until that moment no format has fewer bits;
            after the last one all have their own width. `[(0.3, 8), (0.6, 4)]` trains an int2
            recipe at 8 bits, then 4, then 2. No statistics start anew: the energy spectrum of an
            input serves all formats.
        batch_norm: What happens to BatchNorm statistics: `"train"` leaves them to the training,
            `"freeze"` keeps them as they are from `batch_norm_at` on, `"reestimate"` replaces them
            after the last step by their mean over `batch_norm_batches` training batches of the
            quantized model.
        batch_norm_at: Moment for `"freeze"`.
        batch_norm_batches: Batches for `"reestimate"`.

    Raises:
        ValueError: If a moment, a width or a mode is out of range.

    Examples:
        >>> schedule = QuantSchedule(activations_at="1 epoch", widths=[(0.5, 8)])
        >>> schedule.min_bits(Progress(step=9, epoch=1, share=0.2))
        8
    """

    weights_at: When = 0
    activations_at: When = 0
    freeze_at: When | None = 0.9
    widths: Sequence[tuple[When, int]] = ()
    batch_norm: BatchNormMode = "train"
    batch_norm_at: When = 0.9
    batch_norm_batches: int = 32

    def __post_init__(self) -> None:
        for name in ("weights_at", "activations_at", "freeze_at", "batch_norm_at"):
            _check(name, getattr(self, name), optional=name == "freeze_at")
        if self.freeze_at is not None and reached(self.freeze_at, Progress(0, 0.0, 0.0)):
            raise ValueError(
                f"QuantSchedule: got freeze_at={self.freeze_at!r}; expected a moment after the "
                "start: there would be no statistics to freeze. None never freezes."
            )
        widths = tuple((when, bits) for when, bits in self.widths)
        object.__setattr__(self, "widths", widths)
        for when, bits in widths:
            _check("widths", when)
            if not isinstance(bits, int) or not 2 <= bits <= 8:
                raise ValueError(f"QuantSchedule: got {bits!r} bits in widths; expected 2 to 8.")
        if [bits for _, bits in widths] != sorted({bits for _, bits in widths}, reverse=True):
            raise ValueError(
                f"QuantSchedule: got widths={list(widths)}; expected bits that fall from moment to "
                "moment."
            )
        if self.batch_norm not in BATCH_NORM_MODES:
            raise ValueError(
                f"QuantSchedule: got batch_norm={self.batch_norm!r}; expected one of "
                f"{', '.join(BATCH_NORM_MODES)}.{did_you_mean(self.batch_norm, BATCH_NORM_MODES)}"
            )
        if self.batch_norm_batches < 1:
            raise ValueError(
                f"QuantSchedule: got batch_norm_batches={self.batch_norm_batches!r}; expected at "
                "least 1."
            )

    def min_bits(self, progress: Progress) -> int:
        """Fewest bits that a format may have now; 0 where each has its own width."""
        return next((bits for when, bits in self.widths if not reached(when, progress)), 0)

    def frozen(self, progress: Progress) -> bool:
        """Whether scales and statistics stay as they are."""
        return self.freeze_at is not None and reached(self.freeze_at, progress)

    @property
    def quantizes_weights_at_once(self) -> bool:
        """Whether weights have the formats of their own from the first step on."""
        return reached(self.weights_at, Progress(0, 0.0, 0.0)) and not self.widths

    def moments(self) -> dict[str, When]:
        """The moments at which something changes, by what they are called."""
        found: dict[str, When] = {
            "weights_at": self.weights_at,
            "activations_at": self.activations_at,
        }
        found |= {f"widths[{i}]": when for i, (when, _) in enumerate(self.widths)}
        if self.batch_norm == "freeze":
            found["batch_norm_at"] = self.batch_norm_at
        if self.freeze_at is not None:
            found["freeze_at"] = self.freeze_at
        return found

    def __repr__(self) -> str:
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        defaults = {field.name: field.default for field in fields(self)}
        changed = [f"{name}={v!r}" for name, v in given.items() if v != defaults[name]]
        return f"QuantSchedule({', '.join(changed)})"

    def _repr_html_(self) -> str:
        entries = [(name, str(value)) for name, value in self.to_dict().items()]
        return html_table([("QuantSchedule", ""), *entries])

    def to_dict(self) -> dict[str, Any]:
        """Plain data, as `from_dict` reads it."""
        entries = {field.name: getattr(self, field.name) for field in fields(self)}
        return entries | {"widths": [list(pair) for pair in self.widths]}

    @classmethod
    def from_dict(cls, entries: Mapping[str, Any]) -> QuantSchedule:
        """The schedule that `to_dict` described.

        Raises:
            ValueError: If an entry is unknown or out of range.
        """
        known = [field.name for field in fields(cls)]
        if unknown := [name for name in entries if name not in known]:
            hint = did_you_mean(unknown[0], known, most=2)
            raise ValueError(
                f"QuantSchedule: got unknown entries {unknown}.{hint} Known: {', '.join(known)}."
            )
        return cls(**entries)


def _check(name: str, when: Any, optional: bool = False) -> None:
    if optional and when is None:
        return
    if isinstance(when, str):
        _epochs(name, when)
        return
    is_number = isinstance(when, int | float) and not isinstance(when, bool)
    if not is_number or when < 0 or (isinstance(when, float) and when > 1):
        _refuse(name, when)


def _epochs(name: str, when: str) -> float:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*epochs?\s*", when)
    if match is None:
        _refuse(name, when)
        raise AssertionError
    return float(match[1])


def _refuse(name: str, when: Any) -> None:
    raise ValueError(
        f"QuantSchedule: got {name}={when!r}; expected a share of the training (a float from 0 to "
        '1), a number of optimizer steps (an int) or a text such as "2 epochs".'
    )
