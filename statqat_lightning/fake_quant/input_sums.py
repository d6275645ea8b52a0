"""Sums over the samples of an input that are kept beside its energy spectrum, by name."""

from __future__ import annotations

from torch import Tensor


class _Columns:
    """Some columns of the table, as an attribute: a view, to read and to write in place."""

    def __init__(self, columns: int | slice) -> None:
        self.columns = columns

    def __get__(self, sums: InputSums, owner: type[InputSums]) -> Tensor:
        return sums.table[..., self.columns]


class InputSums:
    """Named columns of a table of sums, one row for each input.

    The sums of all inputs lie in one table, so that they are added up, reduced over ranks and
    turned into running means in a few operations. In running means, each sum is that of one value.

    Attributes:
        table: float32 `(..., WIDTH)`. Every other attribute is a view of it.
        count: Number of values `(...)`.
        negative: Number of negative values, where the format has none.
        nonfinite: NaN where data held NaN or an infinity, else 0.
        signal, noise: Energies of the values that were quantized, and of their errors.
        quantized: Number of these values; in running means 1 once there were some.
        peaks: How far the input reaches above and below zero, and its number of values `(..., 3)`,
            times the number of values of samples that know it.
        peaked: Number of values of these samples; in running means 1 once there were some.
        all_of_peaks: `peaks` and `peaked` as one view `(..., 4)`.
    """

    WIDTH = 10
    count = _Columns(0)
    negative = _Columns(1)
    nonfinite = _Columns(2)
    signal = _Columns(3)
    noise = _Columns(4)
    quantized = _Columns(5)
    peaks = _Columns(slice(6, 9))
    peaked = _Columns(9)
    all_of_peaks = _Columns(slice(6, 10))
    _errors = _Columns(slice(3, 5))
    _of_errors = _Columns(slice(5, 6))
    _of_peaks = _Columns(slice(9, 10))

    def __init__(self, table: Tensor) -> None:
        self.table = table

    @property
    def parts(self) -> tuple[tuple[Tensor, Tensor], ...]:
        """What only some samples hold, `(..., k)`, each with the number of its values `(..., 1)`.

        First the energies, then the peaks.
        """
        return (self._errors, self._of_errors), (self.peaks, self._of_peaks)
