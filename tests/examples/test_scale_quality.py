"""The exact optimum against brute force, and what the benchmark of scales measures with it."""

from __future__ import annotations

import importlib
import json
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from statqat_lightning.formats import get_format

GRIDS = ("int2", "int4", "int3_full", "uint3", "fp4_e2m1", "fp6_e3m2", "nf4")


@pytest.fixture
def load(repository: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A module of the benchmarks, by name."""
    monkeypatch.syspath_prepend(repository / "examples" / "benchmarks")
    return importlib.import_module


def loop_error(x: Tensor, scale: float, grid: Tensor) -> float:
    """Sum of squared errors, each value beside every grid point."""
    return float((x.double().unsqueeze(1) - scale * grid).square().amin(1).sum())


def drawn(kind: str, size: int) -> Tensor:
    if kind == "student":
        return torch.distributions.StudentT(2.0).sample((size,))
    return torch.randn(size) + (1.0 if kind == "skewed" else 0.0)


@pytest.mark.parametrize("name", GRIDS)
@pytest.mark.parametrize("kind", ["normal", "skewed", "student"])
@pytest.mark.parametrize("size", [3, 60])
def test_no_scale_is_better_than_the_exact_optimum(
    load: Any, name: str, kind: str, size: int
) -> None:
    grid = get_format(name).values.double()
    x = drawn(kind, size)
    x[0] = abs(x[0])  # an unsigned format has something to represent
    (scale,), (error,) = load("exact_optimum").least_errors(x.unsqueeze(0), grid)
    assert float(error) == pytest.approx(loop_error(x, float(scale), grid), rel=1e-9, abs=1e-12)
    cover = float(x.abs().amax()) / float(grid.abs().amax())
    for trial in (cover * torch.logspace(-8, 4, 1000, base=2, dtype=torch.float64)).tolist():
        assert loop_error(x, trial, grid) >= float(error) * (1 - 1e-9) - 1e-12


def test_three_levels_for_a_normal_density_are_those_of_max_1960(load: Any) -> None:
    from scipy.stats import norm

    count = 20_000
    x = torch.from_numpy(norm.ppf((torch.arange(count).double() + 0.5).numpy() / count))
    (scale,), (error,) = load("exact_optimum").least_errors(
        x.unsqueeze(0), get_format("int2").values.double()
    )
    assert float(scale) == pytest.approx(1.2240, rel=2e-3)  # table II, N = 3
    assert float(error) / count == pytest.approx(0.1902, rel=2e-3)


def test_rows_that_only_zeros_can_stand_for_have_scale_one(load: Any) -> None:
    rows = torch.tensor([[0.0, 0.0], [-1.0, -2.0]])
    scales, errors = load("exact_optimum").least_errors(rows, get_format("uint4").values.double())
    assert scales.tolist() == [1.0, 1.0]
    assert errors.tolist() == [0.0, 5.0]


@pytest.fixture
def run(load: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs the benchmark in this process: its text and its results."""

    def run(*arguments: str) -> tuple[str, dict[str, Any]]:
        module: ModuleType = load("scale_quality")
        for name in ("brevitas", "modelopt", "quant_mp"):  # importing them takes up to 15 s
            monkeypatch.setitem(sys.modules, name, None)
        options = ("--output", "out/scales.json", *arguments)
        monkeypatch.setattr(sys, "argv", ["scale_quality.py", *options])
        module.main()
        return capsys.readouterr().out, json.loads(Path("out/scales.json").read_text())

    return run


@pytest.mark.slow
def test_scales_of_ours_are_never_below_min_max_and_near_the_optimum(run: Any) -> None:
    output, results = run("--values", "2048", "--network", "none")
    assert "Brevitas MSE                  brevitas is not installed" in output
    for name in ("analytic", "iterative"):
        assert f"{name}, distributions: never below min-max" in output
        assert results["summary"]["distributions"][name]["below min-max"] <= 1e-3
    summary = results["summary"]["distributions"]
    assert summary["iterative"]["worst gap"] < 0.05
    assert summary["analytic"]["mean gap"] < 0.1 < summary["min-max"]["mean gap"]
    table = results["snr_db"]["distributions"]
    assert table["optimum"].keys() >= {"normal", "Laplace", "Student-t 3", "uniform"}
    for method, cases in table.items():
        for case, row in cases.items():
            for fmt, value in row.items():
                assert math.isfinite(value)
                # float32 inputs, exact arithmetic: nobody beats the optimum
                assert value <= table["optimum"][case][fmt] + 1e-9, (method, case, fmt)
    assert "uint4" not in table["optimum"]["normal after ReLU"]  # columns are by nominal width
    # One bit more than symmetric integers have, on data of one sign: some 5 dB.
    gain = table["optimum"]["normal after ReLU"]["int4"] - table["optimum"]["normal"]["int4"]
    assert 4 < gain < 7


@pytest.mark.slow
def test_weights_and_inputs_of_a_network_trained_here(run: Any) -> None:
    output, results = run("--values", "512", "--network", "digits", "--formats", "int3", "fp4")
    for kind, layers in (
        ("weights", {"conv1", "conv2", "conv3", "conv4", "linear"}),
        ("inputs", {"conv1", "conv2", "conv3", "conv4", "linear"}),
    ):
        table = results["snr_db"][kind]
        assert set(table["optimum"]) == layers
        for name in ("analytic", "iterative"):
            assert f"{name}, {kind}: never below min-max" in output
            for layer in layers:
                for fmt in ("int3", "fp4_e2m1"):
                    least, own = table["min-max"][layer][fmt], table[name][layer][fmt]
                    assert least - 1e-3 <= own <= table["optimum"][layer][fmt] + 1e-9
    # One scale for a tensor: these have no form for channels.
    assert "torch.ao histogram, observed" not in results["summary"]["weights"]
    assert "torch.ao histogram, observed" in results["summary"]["inputs"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "method", "formats"),
    [
        ("brevitas", "Brevitas MSE", ("int4", "fp4_e2m1", "fp8_e4m3")),
        ("modelopt", "ModelOpt MSE", ("int4", "fp4_e2m1", "nf4")),
        ("quant_mp", "quant_mp analytic", ("int4", "fp4_e2m1", "fp8_e4m3", "nf4", "sf4")),
        ("quant_mp", "quant_mp iterative", ("int4", "fp4_e2m1", "nf4", "sf4")),
    ],
)
def test_peers_scales_are_on_our_grid(
    load: Any, package: str, method: str, formats: tuple[str, ...]
) -> None:
    pytest.importorskip(package)
    peers, exact = load("scale_peers"), load("exact_optimum")
    choose = peers.ways()[0][method]
    cases = [
        (rows, name) for rows in (torch.randn(1, 4096), torch.randn(4, 1024)) for name in formats
    ]
    if package == "brevitas":
        assert choose(torch.randn(4, 1024).relu(), get_format("uint4")) is None
        cases.append((torch.randn(1, 4096).relu(), "uint4"))
    for rows, name in cases:
        fmt = get_format(name)
        grid = fmt.values.double()
        scales = choose(rows, fmt)
        assert scales.shape == (len(rows),)
        error = exact.squared_errors(rows, scales, grid)
        _, least = exact.least_errors(rows, grid)
        covering = rows.abs().amax(1) / fmt.max
        # Both search by the error: near the optimum, where the error of floats ripples.
        assert (error <= 1.2 * least).all(), (name, error / least)
        assert (error <= 1.1 * exact.squared_errors(rows, covering, grid)).all(), name
