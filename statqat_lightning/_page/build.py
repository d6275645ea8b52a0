"""The page as text: tables for every reader, data and script for pictures on demand.

Pictures are inline SVG that a script of our own draws from the data: a chart library would add
more than all data of a network of 300 layers, and none of them draws ranges of formats.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from importlib import resources
from typing import Any
from urllib.parse import quote

_COLUMNS = ("weight", "input", "output")
_NUM_WORST = 10
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"

Data = Mapping[str, Any]


def page(data: Data) -> str:
    """The page as text, with everything that it needs.

    Args:
        data: What `ReportData.to_dict` returns: `title`, `layers` and what else is known.
    """
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    # Nothing in a script may look like its end, or like a comment.
    text = text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
    title = escape(data["title"])
    sections = [*_sections(data)]
    links = "".join(f'<a href="#{name}">{label}</a>' for name, label, _ in sections)
    body = "\n".join(
        f'<section id="{name}" aria-labelledby="{name}-title">\n'
        f'<h2 id="{name}-title">{label}</h2>\n{content}\n</section>'
        for name, label, content in sections
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="color-scheme" content="light dark">
<title>{title}: quantization report</title>
<link rel="icon" href="data:,">
<style>
{_asset("report.css")}</style>
</head>
<body>
<header>
<p class="kind">Quantization report</p>
<h1>{title}</h1>
{_summary(data)}
<nav aria-label="Sections">{links}</nav>
</header>
<main>
{body}
</main>
<footer>Written by StatQAT for Lightning. One file: it loads nothing from elsewhere.</footer>
<script type="application/json" id="report-data">{text}</script>
<script>
{_asset("charts.js")}{_asset("report.js")}</script>
</body>
</html>
"""


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _sections(data: Data) -> Iterator[tuple[str, str, str]]:
    """Identifier, title and content of each section that there is something to say in."""
    if worst := _worst(data):
        yield "worst", "Worst tensors, and what would help", worst
    if data["histories"]:
        yield "timeline", "Over the run", '<div id="timeline-charts"></div>\n' + _without_script()
    if data["files"]:
        yield "files", "Exported files", _files(data)
    if data["recipe"]:
        summary = "<summary>The rules, as YAML: the first that matches a layer counts</summary>"
        recipe = f"<details>{summary}<pre>{escape(data['recipe'])}</pre></details>"
        yield "recipe", "Recipe", recipe
    if data["notes"]:
        yield "notes", "Notes", _list(data["notes"])
    yield "layers", "Layers", _layers(data)


def _without_script() -> str:
    return "<noscript><p>The pictures need JavaScript; the tables do not.</p></noscript>"


def _list(texts: Sequence[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(text)}</li>' for text in texts)}</ul>"


def _summary(data: Data) -> str:
    found = data["summary"]
    cards = [("layers quantized", f"{found['quantized_layers']} of {found['layers']}")]
    if found["parameters"]:
        share = 100 * found["quantized_parameters"] / found["parameters"]
        cards.append(("parameters quantized", f"{share:.1f} %"))
    if "bits_per_weight" in found:
        cards.append(("bits per quantized weight", f"{found['bits_per_weight']:.3g}"))
    if "mean_snr_db" in found:
        cards.append(("mean SNR", decibels(found["mean_snr_db"])))
        cards.append(("least SNR", decibels(found["least_snr_db"])))
    items = "".join(f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in cards)
    return f'<dl class="cards">{items}</dl>'


def decibels(value: float | str | None) -> str:
    """An SNR in words: `exact` where nothing was lost."""
    if value is None:
        return "not known"
    return "exact" if isinstance(value, str) else f"{value:.1f} dB"


def count(number: float) -> str:
    """A number of parameters in few characters."""
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:g}"


def _bar(value: float | str | None, most: float) -> str:
    """A bar of an SNR beside its number; the number says it all to those who see no bar."""
    if value is None:
        return '<span class="snr none">no SNR</span>'
    share = 100.0 if isinstance(value, str) else min(max(100 * value / most, 0), 100)
    return (
        f'<span class="snr"><span class="bar" aria-hidden="true">'
        f'<i style="width:{share:.0f}%"></i></span><b>{decibels(value)}</b></span>'
    )


def _most(data: Data) -> float:
    found = [t["snr_db"] for _, t in _tensors(data) if isinstance(t.get("snr_db"), (int, float))]
    return float(max([*found, 1.0]))


def _tensors(data: Data) -> Iterator[tuple[Data, Data]]:
    for layer in data["layers"]:
        yield from ((layer, tensor) for tensor in layer["tensors"])


def _name(layer: Data) -> str:
    """The name of a layer, which may break behind its dots."""
    return escape(layer["name"] or "(model)").replace(".", ".<wbr>")


# The worst tensors


def _worst(data: Data) -> str:
    found = [
        (layer, tensor)
        for layer, tensor in _tensors(data)
        if isinstance(tensor.get("snr_db"), (int, float)) and tensor.get("alternatives")
    ]
    found.sort(key=lambda pair: pair[1]["snr_db"])
    if not found:
        return ""
    most, found = _most(data), found[:_NUM_WORST]
    costs: dict[str, float] = {}
    for _, tensor in found:
        for each in tensor["alternatives"]:
            costs.setdefault(_change(each), each["extra_bits"])
    changes = sorted(costs, key=lambda change: (costs[change], change))
    heads = ("tensor", "format", "SNR", *changes)
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in heads)
    rows = "".join(_worst_row(layer, tensor, changes, most) for layer, tensor in found)
    note = (
        "What each change would gain in dB, as predicted from the spectrum of the tensor as it is "
        "now, with scales of least error; what training makes of it is not in there. In bold and "
        "with a \u25c6: what gains most for each bit that it costs, in the arithmetic that the "
        "layer has. In brackets: what takes the layer out of integer arithmetic."
    )
    return (
        f'<p class="note">{note}</p><div class="wide"><table class="worst"><thead><tr>{head}</tr>'
        f"</thead><tbody>{rows}</tbody></table></div>"
    )


def _change(found: Data) -> str:
    """What a column of changes is called."""
    return str(found["format"] if found["change"] == "same width" else found["change"])


def _worst_row(layer: Data, tensor: Data, changes: Sequence[str], most: float) -> str:
    link = f'<a href="#layer={escape(quote(layer["name"]))}">{_name(layer)}</a>'
    cells = [
        f'<th scope="row">{link} <small>{escape(tensor["role"])}</small></th>',
        f"<td>{escape(tensor['format'])} <small>{escape(tensor['granularity'])}</small></td>",
        f"<td>{_bar(tensor['snr_db'], most)}</td>",
    ]
    known = {_change(each): (k, each) for k, each in enumerate(tensor["alternatives"])}
    for change in changes:
        number, each = known.get(change, (None, None))
        if each is None:
            cells.append('<td class="empty"></td>')
            continue
        helpful = number == tensor.get("helpful")
        label = f'data-label="{escape(change)}"{" class=helpful" if helpful else ""}'
        cells.append(f"<td {label}>{_gain(each, helpful)}</td>")
    return f"<tr>{''.join(cells)}</tr>"


def _gain(found: Data, helpful: bool) -> str:
    """The gain of an alternative in dB, and what it costs where that is no whole number of bits."""
    if isinstance(found["gain_db"], str):
        text = "exact"
    else:
        text = f"{found['gain_db']:+.1f}".replace("-", "\u2212")
    if not found["keeps_kernels"]:
        text = f"({text})"
    cost = found["extra_bits"]
    part = "" if isinstance(cost, int) else f" <small>+{cost:.2g} bit</small>"
    mark = '\u25c6 <span class="hidden-text">most for each bit: </span>' if helpful else ""
    return f"<span>{mark}{text}{part}</span>"


# Exported files


def _files(data: Data) -> str:
    keys = [*dict.fromkeys(key for row in data["files"] for key in row)]
    head = "".join(f'<th scope="col">{escape(key)}</th>' for key in keys)
    rows = []
    for row in data["files"]:
        cells = [escape(str(row.get(key, ""))).replace("inf dB", "exact") for key in keys]
        first = f'<th scope="row">{cells[0]}</th>'
        rows.append(f"<tr>{first}{''.join(f'<td>{cell}</td>' for cell in cells[1:])}</tr>")
    notes = _list(data["file_notes"]) if data["file_notes"] else ""
    return (
        f'<div class="wide"><table class="files"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>{notes}"
    )


# The layers


def _layers(data: Data) -> str:
    columns = [c for c in _COLUMNS if any(t["column"] == c for _, t in _tensors(data))]
    more = [*dict.fromkeys(key for layer in data["layers"] for key in layer["more"])]
    helps = any(tensor.get("alternatives") for _, tensor in _tensors(data))
    typed = any(layer["type"] for layer in data["layers"])
    heads = [("layer", "order"), *[("type", "type")] * typed, ("parameters", "parameters")]
    heads += [(column, column) for column in columns]
    heads += [("would help", "help")] * helps + [(key, f"more-{i}") for i, key in enumerate(more)]
    head = "".join(
        f'<th scope="col" class="{key}" data-key="{key}">{escape(label)}</th>'
        for label, key in heads
    )
    most = _most(data)
    rows = "\n".join(
        _row(number, layer, columns, (typed, helps), more, most)
        for number, layer in enumerate(data["layers"])
    )
    return (
        '<div id="layer-tools"></div><div class="wide"><table class="layers" id="layer-table">'
        "<caption>Layers in the order of the network; bars are SNR in dB.</caption>"
        f"<thead><tr>{head}</tr></thead><tbody>\n{rows}\n</tbody></table></div>"
    )


def _row(
    number: int,
    layer: Data,
    columns: Sequence[str],
    shown: tuple[bool, bool],
    more: Sequence[str],
    most: float,
) -> str:
    """A row of the table; `shown` says whether there are columns of types and of help."""
    typed, helps = shown
    name = _name(layer)
    kind = f'<small class="under">{escape(layer["type"])}</small>' if layer["type"] else ""
    cells = [
        f'<th scope="row" class="order"><span class="name">{name}</span>{kind}</th>',
        *[f'<td class="type">{escape(layer["type"])}</td>'] * typed,
        f'<td class="parameters" data-v="{layer["parameters"]}">{count(layer["parameters"])}</td>',
    ]
    if not layer["tensors"]:
        reason = escape(layer["reason"] or "no quantizer")
        if columns:
            cells.append(f'<td class="float" colspan="{len(columns) + helps}">float: {reason}</td>')
        elif helps:
            cells.append("<td></td>")
    else:
        cells += [_cell(column, layer, most) for column in columns]
        cells += [_help_cell(layer)] * helps
    for i, key in enumerate(more):
        value = layer["more"].get(key, "")
        text = escape("exact" if value == "inf" else str(value))
        place = "1e6" if value == "inf" else text
        cells.append(f'<td class="more-{i}" data-v="{place}">{text}</td>')
    state = "quantized" if layer["tensors"] else "float"
    return f'<tr data-i="{number}" data-state="{state}">{"".join(cells)}</tr>'


def _cell(column: str, layer: Data, most: float) -> str:
    """The tensors of one column: the one with the least SNR, and how many others there are."""
    found = [tensor for tensor in layer["tensors"] if tensor["column"] == column]
    if not found:
        return f'<td class="{column}"><span class="fmt">float</span></td>'
    found.sort(key=_sortable)
    formats = ", ".join(dict.fromkeys(escape(tensor["format"]) for tensor in found))
    others = f" <small>least of {len(found)}</small>" if len(found) > 1 else ""
    value = _sortable(found[0])
    return (
        f'<td class="{column}" data-v="{value:.6g}"><span class="fmt">{formats}{others}</span>'
        f"{_bar(found[0].get('snr_db'), most)}</td>"
    )


def _sortable(tensor: Data) -> float:
    """SNR in dB for sorting; what is not known comes last."""
    value = tensor.get("snr_db")
    return 1e9 if value is None else 1e6 if isinstance(value, str) else float(value)


def _help_cell(layer: Data) -> str:
    """What helps the worst tensor of a layer most that anything helps."""
    found = [
        (tensor, tensor["alternatives"][tensor["helpful"]])
        for tensor in layer["tensors"]
        if "helpful" in tensor
    ]
    if not found:
        return '<td class="help" data-v="0"></td>'
    tensor, best = min(found, key=lambda pair: _sortable(pair[0]))
    what = best["format"] if best["format"] != tensor["format"] else best["granularity"]
    return (
        f'<td class="help" data-v="{best["gain_db"]}"><b>{best["gain_db"]:+.1f} dB</b> '
        f"{escape(what)} <small>{escape(tensor['role'])}</small></td>"
    )
