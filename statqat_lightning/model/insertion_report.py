"""What was done to each layer of a model, and what was left in float and why."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from statqat_lightning._files import write_whole
from statqat_lightning._page import page
from statqat_lightning._tables import aligned, html_table

_WIDTH = 80
_USUAL = {"weight": " per_channel analytic", "input": " per_tensor iterative"}
"""Granularity and quantizer that go without saying in the short table."""
_INTENDED = ("normalisation stays in float", "left in float by rule", "no rule")
"""How reasons begin that the recipe, or the kind of layer, gives on purpose."""
ROUNDED_BEFORE = "rounded before"
"""In place of an input's format where whatever made the input has rounded it already."""


class LayerReport(NamedTuple):
    """What happened to one layer.

    Attributes:
        name: Its name in the model.
        type: Its class; with its module path where torch has another class of that name.
        parameters: How many parameters it holds itself, those of its parametrizations included.
        weight: Format, granularity and quantizer of its weight; None for float.
        input: The same of its inputs; `rounded before` where they arrive on a grid.
        output: The same of its output.
        reason: Why it was left in float; empty if it was not.
        remark: What else there is to know about it.
    """

    name: str
    type: str
    parameters: int
    weight: str | None = None
    input: str | None = None
    output: str | None = None
    reason: str = ""
    remark: str = ""


def float_row(name: str, type: str, parameters: int, reason: str) -> LayerReport:
    """The row of a layer that is left in float."""
    return LayerReport(name, type, parameters, reason=reason)


@dataclass(frozen=True)
class InsertionReport:
    """What was done to each layer with parameters; prints as a short table.

    Attributes:
        rows: The layers, in the order of the model.
        notes: What else there is to know, such as why there was no calibration.
    """

    rows: tuple[LayerReport, ...]
    notes: tuple[str, ...] = ()

    @property
    def num_quantized(self) -> int:
        """Number of layers with parameters whose weights or inputs are quantized."""
        return sum(bool(row.weight or row.input) for row in self._layers)

    @property
    def share_quantized(self) -> float:
        """Share of the parameters whose weight is quantized, 0 to 1."""
        total = sum(row.parameters for row in self.rows)
        return sum(row.parameters for row in self.rows if row.weight) / max(total, 1)

    @property
    def _layers(self) -> list[LayerReport]:
        return [row for row in self.rows if row.parameters or row.reason]

    def left_unintended(self) -> dict[str, int]:
        """Parameters in layers that are in float although no rule says so, by type and reason."""
        found: dict[str, int] = {}
        for row in self.rows:
            if row.reason and not row.reason.startswith(_INTENDED):
                what = f"{row.type}: {row.reason}"
                found[what] = found.get(what, 0) + row.parameters
        return dict(sorted(found.items(), key=lambda entry: -entry[1]))

    def updated(self, changes: Mapping[str, Mapping[str, Any]]) -> InsertionReport:
        """The report with other fields in some rows, by the names of the layers."""
        rows = (row._replace(**changes.get(row.name, {})) for row in self.rows)
        return replace(self, rows=tuple(rows))

    def with_notes(self, notes: Iterable[str]) -> InsertionReport:
        """The report with more notes, each once."""
        return replace(self, notes=tuple(dict.fromkeys((*self.notes, *notes))))

    def to_dict(self) -> dict[str, Any]:
        """Plain data: the rows and the notes."""
        return {"rows": [row._asdict() for row in self.rows], "notes": [*self.notes]}

    def to_html(self, path: str | Path, title: str = "Quantized layers") -> None:
        """Write one HTML page with the layers, their formats and why others are in float.

        `model_report` of `statqat_lightning.insight` knows more: SNR, spectra, what would help.

        Args:
            path: The file; it appears whole or not at all.
            title: What the page is about.

        Raises:
            OSError: If the file cannot be written; the message names it.
        """
        summary = {
            "layers": len(self._layers),
            "quantized_layers": self.num_quantized,
            "parameters": sum(row.parameters for row in self.rows),
            "quantized_parameters": sum(row.parameters for row in self.rows if row.weight),
        }
        data = {
            "title": title,
            "summary": summary,
            "layers": [_page_row(row) for row in self.rows],
            **{"histories": {}, "recipe": "", "files": [], "file_notes": []},
            "notes": [*self.notes],
        }
        write_whole(Path(path), page(data))

    def table(self) -> str:
        """All layers, a line each, with formats in full."""
        return "\n".join(aligned(self._cells(), numbers={2}))

    def _cells(self) -> list[tuple[str, ...]]:
        header = ("layer", "type", "parameters", "weight", "input", "output", "remark")
        cells = [
            (
                row.name or "(model)",
                row.type,
                f"{row.parameters:,}",
                f"float: {row.reason}" if row.reason else row.weight or "float",
                "" if row.reason else row.input or "float",
                "" if row.reason else row.output or "float",
                row.remark,
            )
            for row in self.rows
        ]
        return [header, *cells]

    def summary(self) -> str:
        """How many layers and parameters are quantized, in one line."""
        layers = self._layers
        inside = sum(row.parameters for row in self.rows if row.weight)
        total = sum(row.parameters for row in self.rows)
        return (
            f"{self.num_quantized} of {len(layers)} layers quantized, {_count(inside)} of "
            f"{_count(total)} parameters ({100 * self.share_quantized:.1f} %)"
        )

    def __repr__(self) -> str:
        return f"<InsertionReport: {self.summary()}>"

    def _repr_html_(self) -> str:
        return html_table(self._cells(), {2}, above=self.summary(), below=self.notes)

    def __str__(self) -> str:
        quantized = _folded([row for row in self.rows if not row.reason])
        left = _folded([row for row in self.rows if row.reason])
        lines = [self.summary()]
        if quantized:
            outputs = any(row.output for row, _ in quantized)
            cells = [("layers", "type", "parameters", "weight", "input", "output")[: 5 + outputs]]
            for row, group in quantized:
                tensors = [_short(row.weight, "weight"), _short(row.input, "input")]
                tensors += [_short(row.output, "input")] * outputs
                cells.append((*_group(row, group), *tensors))
            lines += _narrow(cells)
        if left:
            lines.append("in float:")
            for row, group in left:
                names, kind, parameters = _group(row, group)
                text = f"{names} {kind} ({parameters}): {row.reason}"
                lines += textwrap.wrap(text, _WIDTH, initial_indent="  ", subsequent_indent="    ")
        remarks = _folded([row for row in self.rows if row.remark], by=("type", "remark"))
        for row, group in remarks:
            names, kind, _ = _group(row, group)
            text = f"{names} {kind}: {row.remark}"
            lines += textwrap.wrap(text, _WIDTH, subsequent_indent="  ")
        for note in self.notes:
            lines += textwrap.wrap(note, _WIDTH, subsequent_indent="  ")
        return "\n".join(lines)


def _page_row(row: LayerReport) -> dict[str, Any]:
    """A layer as a page shows it: each text about a tensor stands for its format."""
    texts = {"weight": row.weight, "input": row.input, "output": row.output}
    tensors = [
        {"name": f"{row.name}/{role}", "role": role, "column": role, "format": text}
        for role, text in texts.items()
        if text is not None
    ]
    own = {"name": row.name, "type": row.type, "parameters": row.parameters, "more": {}}
    return own | {"reason": row.reason, "remark": row.remark, "tensors": tensors}


_Group = tuple[LayerReport, list[LayerReport]]


def _folded(
    rows: Sequence[LayerReport],
    by: Sequence[str] = ("type", "weight", "input", "output", "reason"),
) -> list[_Group]:
    """Rows that say the same, together with the first of them, in the order of those."""
    groups: dict[tuple[Any, ...], list[LayerReport]] = {}
    for row in rows:
        groups.setdefault(tuple(getattr(row, name) for name in by), []).append(row)
    return [(group[0], group) for group in groups.values()]


def _group(row: LayerReport, group: list[LayerReport]) -> tuple[str, str, str]:
    """How many layers there are, or which; their class; how many parameters they have."""
    names = str(len(group)) if len(group) > 1 else row.name or "(model)"
    return names, row.type, _count(sum(r.parameters for r in group))


def _count(number: int) -> str:
    return f"{number:,}" if number < 1_000_000 else f"{number / 1e6:,.2f} M"


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"...{text[3 - most :]}"


def _short(tensor: str | None, role: str) -> str:
    if tensor is None:
        return "float"
    return tensor.removesuffix(_USUAL[role]).replace(" or ", "|")


def _narrow(cells: Sequence[tuple[str, ...]]) -> list[str]:
    """The short table in at most 80 columns: names and classes give way."""
    names, types = 20, 22
    while True:
        cut = [(_cut(line[0], names), _cut(line[1], types), *line[2:]) for line in cells]
        lines = aligned(cut, numbers={2})
        if max(map(len, lines)) <= _WIDTH or names == types == 8:
            return [line[:_WIDTH] for line in lines]
        names, types = max(names - 2, 8), max(types - 2, 8)
