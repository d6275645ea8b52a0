"""What insertion did to each layer of a model, and what it left in float and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class LayerReport(NamedTuple):
    """What happened to one layer.

    Attributes:
        name: Its name in the model.
        type: Its class.
        parameters: How many parameters it holds itself.
        weight: Format, granularity and quantizer of its weight; None for float.
        input: The same of its inputs.
        output: The same of its output.
        reason: Why it was left in float; empty if it was not.
    """

    name: str
    type: str
    parameters: int
    weight: str | None = None
    input: str | None = None
    output: str | None = None
    reason: str = ""


@dataclass(frozen=True)
class InsertionReport:
    """What was done to each layer with parameters; prints as a table.

    Attributes:
        rows: The layers, in the order of the model.
        notes: What else there is to know, such as why there was no calibration.
    """

    rows: tuple[LayerReport, ...]
    notes: tuple[str, ...] = ()

    @property
    def num_quantized(self) -> int:
        """Number of layers with quantizers."""
        return sum(not row.reason for row in self.rows)

    def __str__(self) -> str:
        header = ["layer", "type", "parameters", "weight", "input"]
        outputs = any(row.output for row in self.rows)
        header += ["output"] * outputs
        cells = []
        for row in self.rows:
            tensors = [row.weight, row.input, *[row.output] * outputs]
            found = [tensor or "float" for tensor in tensors]
            if row.reason:
                found = [f"float: {row.reason}", *[""] * (len(tensors) - 1)]
            cells.append([row.name or "(model)", row.type, f"{row.parameters:,}", *found])
        # A reason may reach into the columns after it.
        widths = [
            max(len(line[i]) for line in [header, *(c for c in cells if i != 3 or c[4])])
            for i in range(len(header))
        ]
        lines = [
            "  ".join(
                text.rjust(width) if i == 2 else text.ljust(width)
                for i, (text, width) in enumerate(zip(line, widths, strict=True))
            ).rstrip()
            for line in [header, *cells]
        ]
        total = sum(row.parameters for row in self.rows)
        inside = sum(row.parameters for row in self.rows if not row.reason)
        lines.append(
            f"{self.num_quantized} of {len(self.rows)} layers with parameters are quantized; "
            f"they hold {inside:,} of {total:,} parameters ({100 * inside / max(total, 1):.1f} %)."
        )
        return "\n".join([*lines, *self.notes])
