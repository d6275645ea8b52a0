"""What the report of a quantized model holds, as plain data: the page is drawn from it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from statqat_lightning._files import write_whole
from statqat_lightning._page import page
from statqat_lightning.insight.alternatives import Alternative, most_helpful
from statqat_lightning.insight.snr import History, OutputErrors, tensor_column
from statqat_lightning.insight.tensor_chart import TensorChart

VERSION = 1
"""Of the data in a page."""
_MOST_STEPS = 64
"""Steps of a history that a page keeps: more are not told apart on a screen."""
_DIGITS = 3


@dataclass(frozen=True)
class TensorEntry:
    """One quantized tensor of a layer.

    Attributes:
        name: `{layer}/{role}`, as in log keys and histories.
        role: Name of the weight or the input, or `output`.
        format: Name of its number format.
        bits: Bits of one code.
        granularity: Which elements share a scale.
        quantizer: The rule that chose the scales, empty where it is not known.
        values: Elements of a weight; 0 for inputs and outputs.
        scales: Smallest, geometric mean and largest of the scales; empty where not known.
        num_scales: How many there are.
        snr_db: Measured SNR in dB; infinite where nothing was lost, None where it is not known.
        output_snr_db: SNR in dB of the layer's output if this weight alone is rounded.
        clipped: Share of the values beyond the ends of the grid.
        grid_used: Share of the grid's values that occur.
        refreshes: How often the scale was looked at.
        chart: Its spectrum under ranges and error curves; None where there is no spectrum.
        alternatives: What other formats would gain, as predicted.
    """

    name: str
    role: str
    format: str
    bits: int
    granularity: str
    quantizer: str = ""
    values: int = 0
    scales: tuple[float, ...] = ()
    num_scales: int = 0
    snr_db: float | None = None
    output_snr_db: float | None = None
    clipped: float | None = None
    grid_used: float | None = None
    refreshes: int | None = None
    chart: TensorChart | None = None
    alternatives: tuple[Alternative, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data, without what is not known."""
        helpful = most_helpful(self.alternatives)
        found = {
            "name": self.name,
            "role": self.role,
            "column": tensor_column(self.role),
            "format": self.format,
            "bits": self.bits,
            "granularity": self.granularity,
            "quantizer": self.quantizer,
            "values": self.values,
            "scales": [*self.scales],
            "num_scales": self.num_scales,
            "snr_db": self.snr_db,
            "output_snr_db": self.output_snr_db,
            "clipped": self.clipped,
            "grid_used": self.grid_used,
            "refreshes": self.refreshes,
            "chart": None
            if self.chart is None
            else vars(self.chart) | {"formats": [vars(each) for each in self.chart.formats]},
            "alternatives": [vars(each) for each in self.alternatives],
            "helpful": None if helpful is None else self.alternatives.index(helpful),
        }
        return {key: value for key, value in found.items() if value not in (None, "", [])}


@dataclass(frozen=True)
class LayerEntry:
    """One layer, in float or quantized.

    Attributes:
        name: Its name in the model.
        type: Its class, empty where it is not known.
        parameters: How many parameters it holds itself.
        tensors: Its quantized tensors.
        reason: Why it was left in float; empty if it was not, or nobody said.
        remark: What else there is to know about it.
        more: Further columns of the table, by title: numbers or texts.
    """

    name: str
    type: str = ""
    parameters: int = 0
    tensors: tuple[TensorEntry, ...] = ()
    reason: str = ""
    remark: str = ""
    more: Mapping[str, float | str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "name": self.name,
            "type": self.type,
            "parameters": self.parameters,
            "tensors": [tensor.to_dict() for tensor in self.tensors],
            "reason": self.reason,
            "remark": self.remark,
            "more": dict(self.more),
        }


@dataclass(frozen=True)
class ReportData:
    """What a page shows of a quantized model.

    Attributes:
        title: What the page is about, as the class of the model or the name of a file.
        layers: In the order of the network.
        histories: By what they are of: `snr_db`, `output_snr_db` and `scale`, steps with a number
            for each tensor; `made_db`, `inherited_db` and `total_db`, for each layer, see
            `OutputErrors`.
        recipe: The recipe of the training, as YAML; empty where it is not known.
        files: A row for each exported file, its figures by title.
        file_notes: What is to be known of those files.
        notes: What is to be known of the model.
    """

    title: str
    layers: tuple[LayerEntry, ...]
    histories: Mapping[str, History] = field(default_factory=dict)
    recipe: str = ""
    files: Sequence[Mapping[str, str]] = ()
    file_notes: Sequence[str] = ()
    notes: Sequence[str] = ()

    @property
    def tensors(self) -> list[TensorEntry]:
        """All quantized tensors."""
        return [tensor for layer in self.layers for tensor in layer.tensors]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON: numbers of three digits, infinities as text, few steps."""
        data = {
            "version": VERSION,
            "title": self.title,
            "summary": self._summary(),
            "layers": [layer.to_dict() for layer in self.layers],
            "histories": {
                name: thinned(history) for name, history in self.histories.items() if history
            },
            "recipe": self.recipe,
            "files": [dict(row) for row in self.files],
            "file_notes": [str(note) for note in self.file_notes],
            "notes": [str(note) for note in self.notes],
        }
        return {key: short(value) for key, value in data.items()}

    def to_html(self, path: str | Path) -> None:
        """Write one self-contained HTML page, whole or not at all.

        Raises:
            OSError: If the file cannot be written; the message names it.
        """
        write_whole(Path(path), page(self.to_dict()))

    def _summary(self) -> dict[str, Any]:
        quantized = [layer for layer in self.layers if layer.tensors]
        total = sum(layer.parameters for layer in self.layers)
        weights = [tensor for tensor in self.tensors if tensor.values]
        count = sum(tensor.values for tensor in weights)
        known = [t.snr_db for t in self.tensors if t.snr_db is not None and math.isfinite(t.snr_db)]
        found: dict[str, Any] = {
            "layers": len(self.layers),
            "quantized_layers": len(quantized),
            "parameters": total,
            "quantized_parameters": count,
        }
        if count:
            found["bits_per_weight"] = sum(t.values * t.bits for t in weights) / count
        if known:
            found |= {"mean_snr_db": sum(known) / len(known), "least_snr_db": min(known)}
        return found


def error_histories(
    history: Sequence[tuple[int, Mapping[str, OutputErrors]]],
) -> dict[str, History]:
    """Histories by layer from those of `SNRMonitor.error_history`."""
    kinds = {"made_db": "made", "inherited_db": "inherited", "total_db": "total"}
    return {
        title: [(step, {k: getattr(own, name) for k, own in row.items()}) for step, row in history]
        for title, name in kinds.items()
        if history
    }


def latest_errors(histories: Mapping[str, History]) -> dict[str, dict[str, float | str]]:
    """Columns of a table by layer: what its output's error was when it was last compared."""
    titles = {"made_db": "made here, dB", "inherited_db": "inherited, dB"}
    found: dict[str, dict[str, float | str]] = {}
    for kind, title in titles.items():
        for _, row in histories.get(kind, ())[-1:]:
            for layer, value in row.items():
                found.setdefault(layer, {})[title] = value
    return found


def thinned(history: History) -> dict[str, Any]:
    """A history by tensor: `steps`, and for each name a number or None for each of them.

    Of many steps, some are kept that are spread evenly, the first and the last among them. `moved`
    says of how many names the number has changed since the step before, however little.
    """
    count = min(len(history), _MOST_STEPS)
    last = max(count - 1, 1)
    kept = [history[number * (len(history) - 1) // last] for number in range(count)]
    names = dict.fromkeys(name for _, row in kept for name in row)
    moved = [
        sum(before[name] != now[name] for name in before.keys() & now.keys())
        for (_, before), (_, now) in itertools.pairwise(kept)
    ]
    return {
        "moved": [0, *moved],
        "steps": [int(step) for step, _ in kept],
        "values": {name: [row.get(name) for _, row in kept] for name in names},
    }


def short(value: Any) -> Any:
    """Data for JSON: floats of three digits, `inf` and `-inf` as text, NaN as None."""
    if isinstance(value, bool) or value is None or isinstance(value, (str, int)):
        return value
    if isinstance(value, Mapping):
        return {str(key): short(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [short(entry) for entry in value]
    number = float(value)
    if math.isnan(number):
        return None
    if math.isinf(number):
        return str(number)
    rounded = float(f"{number:.{_DIGITS}g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 1e15 else rounded
