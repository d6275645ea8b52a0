"""The report of a model as a page: its data, its text, and what it must not hold."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from statqat_lightning import prepare
from statqat_lightning._page import page
from statqat_lightning.error_analysis import EnergySpectrum
from statqat_lightning.formats import Format, get_format
from statqat_lightning.insight.alternatives import alternatives, most_helpful
from statqat_lightning.insight.model_report import model_report
from statqat_lightning.insight.report_data import LayerEntry, ReportData, short, thinned
from statqat_lightning.insight.tensor_chart import chart_of_spectrum, chart_of_weight
from statqat_lightning.model.insertion_report import InsertionReport, LayerReport
from statqat_lightning.model.quantized_model import refresh, set_enabled, set_observing
from statqat_lightning.numerics.granularity import PerChannel, PerTensor
from statqat_lightning.recipes.recipe import QuantRecipe

VOID = {"meta", "link", "br", "wbr"}


class Parsed(HTMLParser):
    """A page: texts and attributes by tag, and whether each tag is closed where it should be."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def data(self) -> dict[str, Any]:
        """The data in the page, read back."""
        scripts = [text for tag, text in self.texts if tag == "script"]
        found: dict[str, Any] = json.loads(scripts[0])
        return found


def calibrated(net: nn.Sequential, *shape: int, **formats: Any) -> tuple[nn.Module, Any]:
    """A network with quantizers that have seen some batches, and the report of `prepare`."""
    report = prepare(net, **formats)
    set_observing(net, True)
    for _ in range(3):
        net(torch.randn(shape))
        refresh(net)
    set_observing(net, False)
    return net, report


def small() -> tuple[nn.Module, Any]:
    net = nn.Sequential(nn.Linear(64, 48), nn.LayerNorm(48), nn.ReLU(), nn.Linear(48, 8))
    formats: Any = {"weights": "int4", "activations": "int4", "first_last_bits": None}
    return calibrated(net, 32, 64, **formats)


@pytest.fixture
def data() -> ReportData:
    net, report = small()
    steps = [(step, {"0/weight": 10.0 + step, "3/input": 20.0}) for step in range(3)]
    return model_report(
        net,
        report=report,
        histories={"snr_db": steps},
        recipe=QuantRecipe.default("int4", "int4"),
        files=[{"file": "a.onnx", "kB": "1.0"}],
        file_notes=["Compared <carefully>."],
    )


def written(data: ReportData) -> Parsed:
    data.to_html("page.html")
    return Parsed(Path("page.html").read_text(encoding="utf-8"))


# The page


def test_a_page_holds_its_data(data: ReportData) -> None:
    found = written(data).data
    assert found == data.to_dict()
    assert [layer["name"] for layer in found["layers"]] == ["0", "1", "3"]
    assert [t["name"] for t in found["layers"][0]["tensors"]] == ["0/weight", "0/input"]
    assert found["layers"][1]["reason"] == "normalisation stays in float"
    assert found["histories"]["snr_db"]["values"]["0/weight"] == [10, 11, 12]
    assert found["recipe"].startswith("rules:")


def test_a_page_says_without_a_script_what_the_layers_have(data: ReportData) -> None:
    parsed = written(data)
    heads = [head for head in parsed.all("th") if "scope" in head]
    assert heads == parsed.all("th")
    cells = [text for tag, text in parsed.texts if tag in ("td", "span", "b", "th")]
    snr = data.layers[0].tensors[0].snr_db
    assert snr is not None
    assert f"{snr:.1f} dB" in cells
    assert "float: normalisation stays in float" in cells
    assert "a.onnx" in cells
    assert ("li", "Compared <carefully>.") in parsed.texts


def test_a_page_loads_nothing(data: ReportData) -> None:
    parsed = written(data)
    for _, attributes in parsed.tags:
        for name in ("src", "href", "action", "data"):
            value = attributes.get(name) or ""
            assert value.startswith(("#", "data:,")) or value == ""
    text = Path("page.html").read_text(encoding="utf-8")
    assert {*re.findall(r"https?://[^\s\"'<)]+", text)} == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"@import|url\(|import\(|fetch\(|XMLHttpRequest", text)
    policy = next(meta for meta in parsed.all("meta") if "http-equiv" in meta)
    assert (policy["content"] or "").startswith("default-src 'none'")


@pytest.mark.parametrize("name", ["</script><script>alert(1)</script>", "<!--<script>", 'a"b&c'])
def test_names_are_text(name: str) -> None:
    layers = (LayerEntry(name, name, 3, reason=name, remark=name, more={name: name}),)
    parsed = written(
        ReportData(name, layers, {}, name, [{name: name}], [name], [name]),
    )
    assert len(parsed.all("script")) == 2
    assert parsed.data["layers"][0]["name"] == name
    assert parsed.data["title"] == name
    assert ("h1", name) in parsed.texts
    assert ("pre", name) in parsed.texts


def test_three_hundred_layers_are_below_three_megabytes() -> None:
    net = nn.Sequential(
        *(module for _ in range(300) for module in (nn.Linear(32, 32), nn.SiLU(), nn.RMSNorm(32)))
    )
    net, report = calibrated(net, 16, 32, weights="int4", activations="int8")
    found = model_report(net, report=report)
    names = [tensor.name for tensor in found.tensors]
    assert len(names) == 600
    rows = [(step, dict.fromkeys(names, math.pi * step)) for step in range(0, 2000, 10)]
    histories = dict.fromkeys(("snr_db", "output_snr_db", "scale"), rows)
    dataclasses.replace(found, histories=histories).to_html("page.html")
    assert Path("page.html").stat().st_size < 3e6


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="there is no browser")
def test_a_browser_draws_the_page_without_an_error(data: ReportData) -> None:
    data.to_html("page.html")
    page = Path("page.html").resolve().as_uri()
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run")
    quiet = ("--disable-background-networking", "--disable-component-update", "--disable-sync")
    done = subprocess.run(
        [
            *("chromium", *options, *quiet, "--user-data-dir=profile", "--enable-logging=stderr"),
            *("--virtual-time-budget=5000", "--dump-dom", f"{page}#layer=3"),
        ],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert "CONSOLE" not in done.stderr
    # The history of weights, and for both tensors of the layer a chart, and a history of one.
    titles = re.findall(r"<svg[^>]*role=\"img\"[^>]*><title>([^<]+)", done.stdout)
    assert len(titles) == 5
    assert sum(title.startswith("3/weight: energy spectrum") for title in titles) == 1
    assert 'aria-expanded="true"' in done.stdout
    assert 'aria-sort="ascending"' in done.stdout
    assert "2 of 3 layers" in done.stdout


def test_further_columns_are_in_the_table() -> None:
    layers = tuple(LayerEntry(f"layer{i}", "Linear", 3, more={"made here": 1.5}) for i in range(2))
    parsed = written(ReportData("model", layers))
    assert ("th", "made here") in parsed.texts
    assert parsed.texts.count(("td", "1.5")) == 2


def test_a_page_replaces_an_older_one_or_leaves_it(
    data: ReportData, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("page.html").write_text("old")

    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full)
        with pytest.raises(OSError, match=r"page\.html"):
            data.to_html("page.html")
    assert Path("page.html").read_text() == "old"
    assert [path.name for path in Path().iterdir()] == ["page.html"]
    data.to_html("page.html")
    assert Path("page.html").read_text().startswith("<!DOCTYPE html>")


def test_the_insertion_report_is_a_page_too() -> None:
    rows = (
        LayerReport("a", "Linear", 10, "int4 per_channel analytic", "int8 or uint8 per_tensor"),
        LayerReport("b", "LayerNorm", 4, reason="normalisation stays in float"),
    )
    InsertionReport(rows, ("A note.",)).to_html("page.html", title="Net")
    parsed = Parsed(Path("page.html").read_text())
    assert ("h1", "Net") in parsed.texts
    assert ("li", "A note.") in parsed.texts
    assert ("span", "int4 per_channel analytic") in parsed.texts
    assert ("td", "float: normalisation stays in float") in parsed.texts
    assert parsed.data["layers"][0]["tensors"][1]["format"] == "int8 or uint8 per_tensor"


# The data


def test_numbers_for_json_are_short() -> None:
    given = {"a": [1.23456, math.inf, -math.inf, math.nan, 12345678, True, None, "x"], "b": (2.0,)}
    assert short(given) == {"a": [1.23, "inf", "-inf", None, 12345678, True, None, "x"], "b": [2]}


def test_long_histories_keep_both_ends() -> None:
    history = [
        (step, {"a": float(step)} | ({"b": 1.0} if step > 500 else {})) for step in range(1000)
    ]
    found = thinned(history)
    assert (found["steps"][0], found["steps"][-1]) == (0, 999)
    assert len(found["steps"]) == len(found["values"]["a"]) == len(found["values"]["b"]) == 64
    assert found["values"]["a"] == found["steps"]
    assert found["values"]["b"][0] is None


def test_scales_that_moved_are_counted_before_numbers_are_cut_short() -> None:
    history = [(0, {"a": 1.0, "b": 1.0}), (5, {"a": 1.0001, "b": 1.0}), (9, {"a": 2.0, "c": 1.0})]
    assert short(thinned(history)) == {
        "steps": [0, 5, 9],
        "moved": [0, 1, 1],
        "values": {"a": [1, 1, 2], "b": [1, 1, None], "c": [None, None, 1]},
    }


def test_a_run_that_ended_in_nan_has_its_page() -> None:
    net, report = small()
    with torch.no_grad():
        net.get_parameter("0.weight")[0, 0] = math.nan
        net.get_parameter("3.weight")[0, 0] = math.inf
    found = model_report(net, report=report)
    tensors = {t["name"]: t for layer in written(found).data["layers"] for t in layer["tensors"]}
    assert "chart" in tensors["0/input"]
    assert "alternatives" in tensors["0/input"]
    for name in ("0/weight", "3/weight"):
        assert not {"chart", "alternatives"} & tensors[name].keys()


def test_layers_in_float_and_idle_layers_say_why() -> None:
    net, report = small()
    rows = {layer.name: layer for layer in model_report(net, report=report).layers}
    assert rows["1"].reason == "normalisation stays in float"
    assert rows["1"].type == "LayerNorm"
    assert rows["0"].parameters == 64 * 48 + 48
    assert rows["0"].reason == ""
    set_enabled(net, weights=False, inputs=False)
    rows = {layer.name: layer for layer in model_report(net, report=report).layers}
    assert rows["0"].reason == "switched off"
    assert rows["0"].tensors == ()


def test_nothing_in_the_model_changes() -> None:
    net, report = small()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    x = torch.randn(5, 64)
    expected = net(x)
    model_report(net, report=report)
    assert torch.equal(net(x), expected)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


# What would help


def measured(x: Tensor, fmt: Format, scale: Tensor) -> float:
    """SNR in dB by rounding to the nearest value of the grid, in so many words."""
    grid = fmt.values.numpy()
    y = (x / scale).double().numpy()
    nearest = grid[np.searchsorted((grid[1:] + grid[:-1]) / 2, y)]
    x_hat = nearest * np.asarray(scale, dtype=np.float64)
    signal = x.double().numpy()
    return float(10 * np.log10((signal**2).sum() / ((signal - x_hat) ** 2).sum()))


def best_measured(x: Tensor, fmt: Format) -> float:
    """The best over a fine sweep of scales."""
    top = float(x.abs().max()) / max(fmt.max, 1e-9)
    return max(measured(x, fmt, torch.tensor(top * 2**-k)) for k in np.arange(-2, 5, 0.05))


@pytest.mark.parametrize("name", ["int5", "fp4_e2m1", "nf4", "int8"])
def test_gains_are_those_that_a_sweep_of_scales_measures(name: str) -> None:
    x = torch.randn(1, 3000)
    found = alternatives(
        *(EnergySpectrum.of(x), get_format("int4"), PerTensor(), "iterative"), weight=x
    )
    gains = {each.format: each.gain_db for each in found}
    expected = best_measured(x, get_format(name)) - best_measured(x, get_format("int4"))
    # The sweep goes in steps of 3.5 %, within which the SNR of 8 bits moves by 0.15 dB.
    assert gains[name] == pytest.approx(expected, abs=0.2)


def test_scales_per_channel_gain_where_channels_differ() -> None:
    weight = torch.randn(16, 64) * torch.logspace(-2, 0, 16).unsqueeze(1)
    fmt = get_format("int4")
    spectrum = EnergySpectrum.of(weight)
    found = alternatives(spectrum, fmt, PerTensor(), "analytic", weight=weight)
    (finer,) = [each for each in found if each.granularity == "per_channel"]
    one = best_measured(weight, fmt)
    own = torch.stack([_best_scale(row, fmt) for row in weight]).unsqueeze(1)
    assert finer.gain_db == pytest.approx(measured(weight, fmt, own) - one, abs=0.2)
    assert finer.extra_bits == pytest.approx(32 * 15 / weight.numel())
    assert most_helpful(found) is not None


def _best_scale(row: Tensor, fmt: Format) -> Tensor:
    scales = float(row.abs().max()) / fmt.max * torch.exp2(-torch.arange(-0.5, 3, 0.05))
    return max(scales, key=lambda scale: measured(row, fmt, scale))


def test_a_zero_point_is_offered_where_data_is_skewed() -> None:
    skewed = nn.functional.silu(torch.randn(20000))
    spectrum = EnergySpectrum.of(skewed, keep=False)
    found = alternatives(spectrum, get_format("int4"), PerTensor(), "iterative", torch.tensor(0.5))
    (affine,) = [each for each in found if each.change == "zero point"]
    assert affine.format.startswith("uint4_zp")
    there, here = (best_measured(skewed, get_format(n)) for n in (affine.format, "int4"))
    assert affine.gain_db == pytest.approx(there - here, abs=0.2)
    assert affine.extra_bits == 0
    assert most_helpful(found) == affine


def test_unsigned_is_offered_where_nothing_is_negative() -> None:
    spectrum = EnergySpectrum.of(torch.rand(5000), keep=False)
    found = alternatives(spectrum, get_format("int4"), PerTensor(), "iterative", torch.tensor(0.1))
    helpful = most_helpful(found)
    assert helpful is not None
    assert (helpful.change, helpful.format) == ("unsigned", "uint4")
    assert helpful.gain_db == pytest.approx(6, abs=0.7)  # one bit of a uniform density


def test_the_scale_is_blamed_where_the_rule_is_not_of_least_error() -> None:
    x = torch.cat([torch.randn(10000), torch.tensor([30.0])])
    scale = x.abs().max() / 7
    spectrum, fmt = EnergySpectrum.of(x), get_format("int4")
    found = alternatives(spectrum, fmt, PerTensor(), "minmax", scale)
    (better,) = [each for each in found if each.change == "scale of least error"]
    assert better.gain_db == pytest.approx(best_measured(x, fmt) - measured(x, fmt, scale), abs=0.2)
    assert not [
        e
        for e in alternatives(spectrum, fmt, PerTensor(), "iterative", scale)
        if e.change == better.change
    ]


def test_wider_blocks_are_measured() -> None:
    net, report = calibrated(
        nn.Sequential(nn.Linear(64, 32)),
        4,
        64,
        weights="mxfp4",
        activations=None,
        first_last_bits=None,
    )
    (tensor,) = model_report(net, report=report).tensors
    wider, in_float = tensor.alternatives
    assert wider.format == "mxfp6_e2m3"
    assert wider.gain_db > 8  # two bits more of the significand
    assert in_float.gain_db == math.inf
    assert tensor.chart is not None


def test_what_gains_most_for_a_bit_is_named() -> None:
    spectrum = EnergySpectrum.of(torch.randn(10000))
    found = alternatives(spectrum, get_format("int4"), PerTensor(), "iterative", torch.tensor(0.3))
    helpful = most_helpful(found)
    assert helpful is not None
    # Each bit is worth about 6 dB: where that is all there is, one bit is the cheapest.
    assert helpful.format == "int5"


def test_what_leaves_integer_arithmetic_is_no_help() -> None:
    # A few large values: codebooks and floats are far better than integers there.
    x = torch.distributions.StudentT(3.0).sample((20000,))
    spectrum, fmt = EnergySpectrum.of(x), get_format("int4")
    arguments: Any = (spectrum, fmt, PerTensor(), "analytic", None, x)
    free, bound = (alternatives(*arguments, in_integers=k) for k in (False, True))
    best, within = most_helpful(free), most_helpful(bound)
    assert best is not None
    assert within is not None
    assert best.format in ("nf4", "fp4_e2m1")
    assert within.format in ("int5", "int8")
    left = {each.format for each in bound if not each.keeps_kernels}
    assert left == {"nf4", "fp4_e2m1", "float32"}


def test_a_tensor_of_zeros_has_no_chart_and_no_advice() -> None:
    zeros = torch.zeros(4, 8)
    fmt = get_format("int4")
    assert alternatives(EnergySpectrum.of(zeros), fmt, PerTensor(), "minmax", weight=zeros) == []
    assert chart_of_weight(zeros, PerChannel(0), torch.ones(4, 1), [fmt]) is None


# Charts


def test_a_chart_holds_the_energy_of_the_data() -> None:
    x = torch.cat([torch.full((100,), 3.0), torch.full((100,), -0.75)])
    fmt = get_format("int4")
    chart = chart_of_spectrum(EnergySpectrum.of(x, keep=False), torch.tensor(0.5), [fmt])
    assert chart is not None
    total = 100 * 9 + 100 * 0.75**2
    # 3 lies in [2**1.5, 2**1.75), 0.75 in [2**-0.5, 2**-0.25).
    places = {chart.lowest + k / 4: share for k, share in enumerate(chart.energy) if share > 0}
    assert places == {
        1.5: pytest.approx(100 * 900 / total, rel=1e-4),
        -0.5: pytest.approx(100 * 56.25 / total, rel=1e-4),
    }
    assert sum(chart.negative) == pytest.approx(100 * 56.25 / total, rel=1e-4)
    assert chart.clip == pytest.approx(math.log2(0.5 * 7))


@pytest.mark.parametrize("name", ["int4", "fp4_e2m1", "uint4_zp3", "int4_full"])
def test_error_curves_are_those_that_rounding_measures(name: str) -> None:
    x = torch.randn(20000)
    fmt = get_format(name)
    spectrum = EnergySpectrum.of(x, keep=False)
    chart = chart_of_spectrum(spectrum, spectrum.optimal_scale(fmt), [fmt])
    assert chart is not None
    (drawn,) = chart.formats
    known = [(k, db) for k, db in enumerate(drawn.curve) if db is not None]
    assert len(known) > 8
    for k, db in known:
        scale = torch.tensor(2.0 ** (chart.highest_clip - k / 4) / fmt.reach)
        # Candidates of grids with a zero point are an eighth of a bit apart from the points.
        assert db == pytest.approx(measured(x, fmt, scale), abs=0.25)
    assert drawn.snr_db == pytest.approx(best_measured(x, fmt), abs=0.2)
    assert drawn.clip - drawn.zero == pytest.approx(math.log2(fmt.reach * 2 / _step(fmt)))


def _step(fmt: Format) -> float:
    return float(fmt.values.diff().min())


def test_channels_count_relative_to_their_scales() -> None:
    # Two channels of the same shape a thousand times apart: one spectrum in units of the scale.
    row = torch.randn(1, 4096)
    weight = torch.cat([row, 1000 * row])
    scale = torch.tensor([[0.5], [500.0]])
    fmt = get_format("int4")
    chart = chart_of_weight(weight, PerChannel(0), scale, [fmt])
    alone = chart_of_weight(row, PerChannel(0), torch.tensor([[0.5]]), [fmt])
    assert chart is not None
    assert alone is not None
    assert chart.unit == "scale"
    assert alone.unit == "value"
    assert chart.snr_db == pytest.approx(measured(weight, fmt, scale), abs=0.1)
    assert chart.clip == pytest.approx(math.log2(7))
    assert alone.clip == pytest.approx(math.log2(3.5))
    assert chart.energy == pytest.approx(alone.energy, abs=2.0)


def test_a_page_of_plain_data_needs_no_model() -> None:
    empty = ReportData("nothing", ()).to_dict()
    parsed = Parsed(page(empty))
    assert ("h1", "nothing") in parsed.texts
