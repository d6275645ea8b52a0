"""All named formats in one table, to print, to go through and to look up."""

from __future__ import annotations

import textwrap
from typing import NamedTuple, SupportsIndex, overload

from statqat_lightning._tables import aligned, html_table
from statqat_lightning.formats.base import Format
from statqat_lightning.formats.blocks import BlockFormat
from statqat_lightning.formats.names import (
    aliases,
    block_format_names,
    canonical_name,
    format_names,
    get_format,
)

_WIDTH = 80
_HEADER = ("name", "alias", "kind", "bits", "values", "largest", "block", "for")
_NUMBERS = (3, 4, 5, 6)
_OTHERS = (
    "Any other float of at most 8 bits has a name, too, such as fp5_e2m2; a list such as "
    "levels:-1,0,1 is a format of your own levels."
)


class FormatInfo(NamedTuple):
    """One format, in figures.

    Attributes:
        name: The canonical name, which `get_format` takes.
        kind: Its family: `integer`, `float`, `shifted float` (with a zero point), `codebook` or
            `block`.
        bits: Bits of one code; a block format stores a scale for each block, too.
        num_values: How many different values there are, zero included.
        max: The largest value at scale 1; of a block format, that of its elements.
        block_size: Values that share a stored scale; None where formats have no blocks.
        weights: Whether it suits weights, which have both signs. Unsigned formats are taken for
            weights, but make zero of all that is negative.
        activations: Whether inputs and outputs of layers can have it. Block formats are refused
            there: they need a scale for each block, and inputs have one for the tensor.
        aliases: Its other names.
    """

    name: str
    kind: str
    bits: int
    num_values: int
    max: float
    block_size: int | None
    weights: bool
    activations: bool
    aliases: tuple[str, ...]

    @classmethod
    def of(cls, fmt: Format) -> FormatInfo:
        """The figures of a format."""
        block_size = fmt.block_size if isinstance(fmt, BlockFormat) else None
        return cls(
            name=fmt.name,
            kind=fmt.kind,
            bits=fmt.bits,
            num_values=len(fmt.values),
            max=fmt.max,
            block_size=block_size,
            weights=fmt.is_signed,
            activations=block_size is None,
            aliases=aliases(fmt.name),
        )


class FormatTable(tuple[FormatInfo, ...]):
    """Formats in figures: a tuple of `FormatInfo` that prints as a table, with look-up by name."""

    __slots__ = ()

    @overload
    def __getitem__(self, key: SupportsIndex | str) -> FormatInfo: ...

    @overload
    def __getitem__(self, key: slice) -> FormatTable: ...

    def __getitem__(self, key: SupportsIndex | str | slice) -> FormatInfo | FormatTable:
        """The format at an index or with a name, or the table of a slice.

        Names are those that `get_format` takes, of formats that no row has included.

        Raises:
            ValueError: If there is no format of that name; the message lists near misses.
        """
        if isinstance(key, str):
            return FormatInfo.of(get_format(key))
        if isinstance(key, slice):
            return FormatTable(super().__getitem__(key))
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        if isinstance(key, str):
            return canonical_name(key) in [row.name for row in self]
        return super().__contains__(key)

    def __repr__(self) -> str:
        return "\n".join([*aligned(self._cells(), _NUMBERS), *textwrap.wrap(_OTHERS, _WIDTH)])

    def _repr_html_(self) -> str:
        return html_table(self._cells(), _NUMBERS, below=[_OTHERS])

    def _cells(self) -> list[tuple[str, ...]]:
        return [_HEADER, *map(_cells_of, self)]


def _cells_of(row: FormatInfo) -> tuple[str, ...]:
    both = row.weights and row.activations
    return (
        row.name,
        ", ".join(row.aliases),
        row.kind,
        str(row.bits),
        str(row.num_values),
        f"{row.max:g}",
        str(row.block_size or ""),
        "both" if both else "weights" if row.weights else "activations",
    )


def list_formats() -> FormatTable:
    """Every format that has a name of its own, with what it can hold and what it is for.

    Returns:
        A tuple of `FormatInfo`, integers first, block formats last. It prints as a table, in a
        notebook as one of HTML. An index may be a name, see `get_format`.

    Examples:
        >>> list_formats()[2:4]
        name  alias  kind     bits  values  largest  block  for
        int4         integer     4      15        7         both
        int5         integer     5      31       15         both
        Any other float of at most 8 bits has a name, too, such as fp5_e2m2; a list such
        as levels:-1,0,1 is a format of your own levels.
        >>> list_formats()["fp4"].max
        6.0
        >>> [row.name for row in list_formats() if row.bits == 6 and row.activations]
        ['int6', 'int6_full', 'uint6', 'fp6_e2m3', 'fp6_e3m2', 'ufp6_e2m3', 'ufp6_e3m2']
    """
    names = [*format_names(), *block_format_names()]
    return FormatTable(FormatInfo.of(get_format(name)) for name in names)
