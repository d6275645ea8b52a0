"""The report on the console is short, whatever a model has; all of it is in the JSON."""

from __future__ import annotations

import json
import re
from pathlib import Path

import torch
from torch import nn

from statqat_lightning.export import ArtefactReport, ExportReport, export_model
from statqat_lightning.export.wording import Note, first_lines, in_full, in_short
from tests.export.models import calibrated, recipe_of


def test_lists_and_errors_are_folded_on_the_console_and_whole_in_the_json() -> None:
    names = [f"layer{i}.{j}.conv{k}" for i in range(4) for j in range(5) for k in range(3)]
    remarks = [Note.of_names(f"remark {i}: ", names) for i in range(20)]
    files = [
        ArtefactReport(f"{'outputs/' * 9}model.{end}", 10**8, 0.1, 0.99, 2.0, 40.0, 0.9,
                       remarks=tuple(remarks), runtime="ONNX Runtime 1.32.0" * 4, milliseconds=1.0,
                       float_milliseconds=2.0, inputs="x (batch, 3, 224, 224)")
        for end in ("safetensors", "onnx")
    ]  # fmt: skip
    notes = (Note.of_names("Left in float: ", names), "ONNX: not written. " + "graph " * 9999)
    report = ExportReport(*files, 8, 1.0, 4 * 10**8, notes, details={"onnx": "graph " * 9999})
    lines = str(report).splitlines()
    assert len(lines) <= 39
    assert max(map(len, lines)) <= 100
    assert "layer0.0.conv0, layer0.0.conv1, layer0.0.conv2 and 57 more" in " ".join(lines)
    assert "more notes are in the .export.json file." in lines[-1]
    html = report._repr_html_()
    assert max(map(len, html.splitlines())) < 600
    assert html.count("<p>") == html.count("</p>") > len(lines) / 3
    assert repr(report) == f"<ExportReport: {files[0].path}, {files[1].path}>"
    report.to_json("m.export.json")
    stored = json.loads(Path("m.export.json").read_text())
    assert names[-1] in stored["notes"][0]
    assert len(stored["details"]["onnx"]) > 50_000


def test_a_report_in_a_notebook() -> None:
    file = ArtefactReport(
        *("<m>.onnx", 1500, 0.25, 0.5), max_steps=2.0, snr_db=40.0, remarks=("a & b",)
    )
    assert repr(file) == "<ArtefactReport: <m>.onnx, 1.5 kB, SNR 40.0 dB, agreement 50.00%>"
    row = ["&lt;m&gt;.onnx", "1.5", "0.25", "2", "40.0 dB", "50.00%"]
    assert re.findall(r">([^<]*)</td>", file._repr_html_()) == row
    report = ExportReport(None, file, 8, 1.0, 6000, notes=("<i> & more",))
    html = report._repr_html_()
    assert re.findall(r">([^<]*)</th>", html) == [
        *("file", "kB", "of float", "difference", "steps", "SNR", "agreement"),
    ]
    assert re.findall(r">([^<]*)</td>", html) == [*row[:2], "0.25", *row[2:]]
    assert "<p>&lt;m&gt;.onnx: a &amp; b</p>\n<p>&lt;i&gt; &amp; more</p>" in html
    nothing = ExportReport(None, None, 8, 1.0, 6000, notes=("why",))
    assert repr(nothing) == "<ExportReport: no files>"
    assert nothing._repr_html_() == "<p>why</p>"


def test_a_deep_model_left_in_float_is_one_note() -> None:
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(30)])
    model = calibrated(model, recipe_of("int4", "int8"), torch.randn(8, 4))  # type: ignore[assignment]
    for layer in model[:29]:
        layer._statqat.weights["weight"].enabled = False  # type: ignore[union-attr]
    report = export_model(model, "m", torch.randn(2, 4), files=("native",), measure_latency=False)
    (note,) = report.notes
    assert note.count("switched off") == 29
    assert "and 26 more" in " ".join(str(report).split())


def test_errors_in_short_and_in_full() -> None:
    error = RuntimeError("\x1b[31mred\x1b[0m\n\n" + "x" * 999 + "\n3\n4\n5\n6")
    error.__cause__ = KeyError("inner")
    lines = in_short(error).splitlines()
    assert lines[0] == "RuntimeError: red"
    assert len(lines) == 4
    assert max(map(len, lines)) <= 240
    assert in_full(error).endswith("from KeyError: 'inner'")
    assert first_lines("") == ""
