"""What an export reports: files, sizes, errors, speeds, as data and as text."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from statqat_lightning._tables import html_table
from statqat_lightning.export.files.on_disk import replacing
from statqat_lightning.export.files.registry import FILE_TYPES
from statqat_lightning.export.proof.onnx_runtime import onnx_session as onnx_session
from statqat_lightning.export.wording import Note, first_lines

STEPS = 127
"""Steps from zero to the largest output; see `ArtefactReport.max_steps`."""
COLUMNS, MOST_LINES = 100, 36
"""Of a report on the console."""
_LINES_OF_A_NOTE = 4
_LONGEST_PATH = 34


@dataclass(frozen=True)
class ArtefactReport:
    """One file, compared with the fake-quantized model.

    Attributes:
        path: The file, or the folder.
        bytes: Its size.
        max_difference: Largest absolute difference over all outputs.
        agreement: Share of equal predictions, by the largest entry of the first output; None if it
            has no classes.
        max_steps: Largest difference over all outputs in output quantization steps. A step is what
            an 8-bit grid over the output would have, `max|output| / 127`, with the maximum over
            the fake-quantized model's output in the comparison. So it is defined for outputs that
            no layer makes (a residual sum), and says the same whatever the widths inside.
        snr_db: SNR of the outputs in dB, the fake-quantized model's being the signal; infinite for
            equal outputs.
        accuracy: Share of predictions that equal the labels, None without labels.
        examples: How many examples were compared.
        runtime: What ran the file.
        milliseconds: Median time of a forward; None if not measured.
        float_milliseconds: The same of the float model in the same runtime.
        divergence: The first layer that differs, where the difference is above the bound.
        exact_agreement: Share of predictions equal to those of the model evaluated in float64, for
            files above the bound all of whose layers agree; else None, like the next.
        exact_steps: Largest difference from that.
        remarks: What a reader has to know about this file.
        inputs: What it takes, with sizes; those that are open go by a name.
    """

    path: str
    bytes: int
    max_difference: float
    agreement: float | None
    max_steps: float = math.nan
    snr_db: float = math.nan
    accuracy: float | None = None
    examples: int = 0
    runtime: str = ""
    milliseconds: float | None = None
    float_milliseconds: float | None = None
    divergence: str | None = None
    exact_agreement: float | None = None
    exact_steps: float | None = None
    remarks: tuple[str, ...] = ()
    inputs: str = ""

    @property
    def speedup(self) -> float | None:
        """Time of the float model over that of this one, in the same runtime."""
        if not self.milliseconds or self.float_milliseconds is None:
            return None
        return self.float_milliseconds / self.milliseconds

    def __repr__(self) -> str:
        row = self._figures()
        figures = [f"{key} {row[key]}" for key in ("SNR", "agreement", "accuracy") if key in row]
        return f"<ArtefactReport: {', '.join([self.path, row['kB'] + ' kB', *figures])}>"

    def _repr_html_(self) -> str:
        row = self._figures()
        return html_table([[*row], [*row.values()]], below=self.remarks)

    def _figures(self) -> dict[str, str]:
        """Those that there are; what the float model takes is known to the whole report."""
        row = _row(self, float_bytes=1)
        return {key: text for key, text in row.items() if text and key != "of float"}


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how it compares with the fake-quantized model.

    Attributes:
        native: The `.safetensors` file; None if it was not written, like all others.
        onnx: The `.onnx` file.
        examples: Batch size of the comparison by differences; `ArtefactReport.examples` counts
            those of an evaluation set, too.
        output_range: Largest magnitude in the outputs of the fake-quantized model.
        float_bytes: Size of the float32 model: all parameters and buffers.
        notes: What a reader has to know: tensors left in float, files not written, and why.
        program: The `.pt2` file.
        executorch: The `.pte` file.
        torchao: The `.torchao.pt` file.
        compressed: The folder for language-model runtimes.
        accuracy: Accuracy of the fake-quantized model on the labelled examples, None without.
        details: Full texts of errors that notes tell in short, by kind of file; `model` and
            `target` are of no file.
    """

    native: ArtefactReport | None
    onnx: ArtefactReport | None
    examples: int
    output_range: float
    float_bytes: int
    notes: tuple[str, ...] = ()
    program: ArtefactReport | None = None
    executorch: ArtefactReport | None = None
    torchao: ArtefactReport | None = None
    compressed: ArtefactReport | None = None
    accuracy: float | None = None
    details: Mapping[str, str] = field(default_factory=dict)

    @property
    def by_kind(self) -> dict[str, ArtefactReport]:
        """The files that were written, by their fields here."""
        found = {kind.field: getattr(self, kind.field) for kind in FILE_TYPES}
        return {field: artefact for field, artefact in found.items() if artefact is not None}

    @property
    def artefacts(self) -> list[ArtefactReport]:
        """The files that were written."""
        return [*self.by_kind.values()]

    @property
    def native_path(self) -> str | None:
        """Path of the `.safetensors` file."""
        return self.native.path if self.native is not None else None

    @property
    def onnx_path(self) -> str | None:
        """Path of the `.onnx` file."""
        return self.onnx.path if self.onnx is not None else None

    @property
    def native_bytes(self) -> int | None:
        """Size of the `.safetensors` file."""
        return self.native.bytes if self.native is not None else None

    @property
    def onnx_bytes(self) -> int | None:
        """Size of the `.onnx` file."""
        return self.onnx.bytes if self.onnx is not None else None

    @property
    def max_difference(self) -> float:
        """Largest absolute difference over all files; NaN if nothing could be compared."""
        return max((a.max_difference for a in self.artefacts), default=float("nan"))

    @property
    def agreement(self) -> float | None:
        """Smallest share of equal predictions over all files; None if there are no predictions."""
        shares = [a.agreement for a in self.artefacts if a.agreement is not None]
        return min(shares, default=None)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, the figures over all files included."""
        data = asdict(self)
        data["notes"] = list(self.notes)
        for kind, artefact in self.by_kind.items():
            data[kind] |= {"speedup": artefact.speedup, "remarks": [*artefact.remarks]}
        return data | {
            name: getattr(self, name)
            for name in (
                *("native_path", "native_bytes", "onnx_path", "onnx_bytes"),
                *("max_difference", "agreement"),
            )
        }

    def to_json(self, path: str | Path) -> None:
        """Write `to_dict` to a file; numbers that JSON has no sign for become text."""
        text = json.dumps(_plain(self.to_dict()), indent=2, allow_nan=False)
        with replacing(Path(path)) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")

    def rows(self) -> list[dict[str, str]]:
        """The figures, one row a file; entries that no file has are left out."""
        rows = [_row(artefact, self.float_bytes) for artefact in self.artefacts]
        known = [key for key in (rows[0] if rows else ()) if any(row[key] for row in rows)]
        return [{key: row[key] for key in known} for row in rows]

    def figures(self) -> list[dict[str, str | float | None]]:
        """The figures as numbers, one row a file; None where one was not measured."""
        return [
            {"kind": kind, "path": artefact.path}
            | {name: _number(getattr(artefact, name)) for name in _FIGURES}
            for kind, artefact in self.by_kind.items()
        ]

    def metrics(self) -> dict[str, float]:
        """Numbers for loggers, `export/{kind}/{figure}`; what was not measured is left out."""
        return {
            f"export/{row['kind']}/{name}": value
            for row in self.figures()
            for name in _FIGURES
            if isinstance(value := row[name], float)
        }

    def __repr__(self) -> str:
        return f"<ExportReport: {', '.join(a.path for a in self.artefacts) or 'no files'}>"

    def _repr_html_(self) -> str:
        # Runtimes are in a sentence below.
        rows = [{k: text for k, text in row.items() if k != "runtime"} for row in self.rows()]
        cells = [[*rows[0]], *([*row.values()] for row in rows)] if rows else []
        return html_table(cells, below=self.texts())

    def texts(self) -> list[str]:
        """What is said of the files beside their figures, a line each: remarks and notes."""
        return [" ".join(_wrapped(text)) for text in (*self._sentences(), *self._remarks())]

    def __str__(self) -> str:
        lines = _table(self.rows())
        for text in self._sentences():
            lines += _wrapped(text)
        said = [*map(_wrapped, self._remarks())]
        for number, entry in enumerate(said):
            if len(lines) + len(entry) + 1 > MOST_LINES:
                lines.append(f"{len(said) - number} more notes are in the .export.json file.")
                break
            lines += entry
        return "\n".join(lines)

    def _sentences(self) -> Iterator[str]:
        """What is said of all files."""
        if self.artefacts and self.examples:
            accuracy = "" if self.accuracy is None else f", accuracy {self.accuracy:.2%}"
            yield (
                f"Compared with the fake-quantized model{accuracy} (outputs up to "
                f"{self.output_range:.3g}; a step is 1/{STEPS} of that); "
                f"the float32 model takes {self.float_bytes / 1e3:.1f} kB."
            )
        for title, texts in (
            ("Run by", {Path(a.path).name: a.runtime for a in self.artefacts}),
            ("Inputs", {Path(a.path).name: a.inputs for a in self.artefacts if a.inputs}),
        ):
            if texts:
                fixed = " Sizes in numbers are fixed." * (title == "Inputs")
                yield f"{title}: {_by_text(texts)}.{fixed}"

    def _remarks(self) -> list[str]:
        """Remarks on single files, and notes, in short."""
        remarks = [
            f"{Path(a.path).name}: {_short(remark)}" for a in self.artefacts for remark in a.remarks
        ]
        return [*remarks, *map(_short, self.notes)]


_FIGURES = (
    *("bytes", "max_difference", "max_steps", "snr_db", "agreement", "accuracy"),
    *("milliseconds", "speedup"),
)


def _number(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(value)


def _short(text: str) -> str:
    return text.short if isinstance(text, Note) else text


def _by_text(texts: Mapping[str, str]) -> str:
    """What is said of files, once for all of which it is the same."""
    names: dict[str, list[str]] = {}
    for name, text in texts.items():
        names.setdefault(text, []).append(name)
    if len(names) == 1:
        return next(iter(names))
    return "; ".join(f"{text} ({', '.join(found)})" for text, found in names.items())


def _wrapped(text: str) -> list[str]:
    """A text in lines for the console, few enough to be read; all of it is in the JSON."""
    lines: list[str] = []
    for part in first_lines(text, 8, 10_000).splitlines():
        lines += textwrap.wrap(part, COLUMNS, subsequent_indent="  " if lines else "")
    if len(lines) > _LINES_OF_A_NOTE:
        lines = lines[:_LINES_OF_A_NOTE]
        lines[-1] = lines[-1][: COLUMNS - 4].rstrip() + " ..."
    return lines


def _table(rows: list[dict[str, str]]) -> list[str]:
    """The rows in columns, as many of them as the console takes."""
    rows = [{key: text for key, text in row.items() if key != "runtime"} for row in rows]
    if not rows:
        return []
    title = "file"
    if max(len(row["file"]) for row in rows) > _LONGEST_PATH:
        title = _tail(f"in {Path(rows[0]['file']).parent}")
        rows = [row | {"file": _tail(Path(row["file"]).name)} for row in rows]
    for dropped in (None, "difference", "of float", "speed", "steps"):
        rows = [{key: text for key, text in row.items() if key != dropped} for row in rows]
        titles = {key: title if key == "file" else key for key in rows[0]}
        widths = {key: max(len(row[key]) for row in (titles, *rows)) for key in titles}
        if sum(widths.values()) + 2 * (len(widths) - 1) <= COLUMNS:
            break
    return [
        "  ".join(row[key].ljust(width) for key, width in widths.items()).rstrip()
        for row in (titles, *rows)
    ]


def _tail(text: str) -> str:
    return text if len(text) <= _LONGEST_PATH else "..." + text[3 - _LONGEST_PATH :]


def _row(artefact: ArtefactReport, float_bytes: int) -> dict[str, str]:
    compared = artefact.max_difference == artefact.max_difference
    speedup = artefact.speedup
    return {
        "file": artefact.path,
        "kB": f"{artefact.bytes / 1e3:.1f}",
        "of float": f"{artefact.bytes / max(float_bytes, 1):.2f}",
        "difference": f"{artefact.max_difference:.2g}" if compared else "not compared",
        "steps": f"{artefact.max_steps:.2g}" if compared else "",
        "SNR": f"{artefact.snr_db:.1f} dB" if compared else "",
        "agreement": "" if artefact.agreement is None else f"{artefact.agreement:.2%}",
        "accuracy": "" if artefact.accuracy is None else f"{artefact.accuracy:.2%}",
        "speed": "" if speedup is None else f"{speedup:.2f} x float",
        "runtime": artefact.runtime,
    }


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
