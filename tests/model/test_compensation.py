"""Compensation of rounding errors: against an independent recursion, and what layers really do."""

from __future__ import annotations

import copy
import functools
import itertools
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from statqat_lightning import QuantRecipe, QuantRule, TensorSpec, get_format, prepare
from statqat_lightning.layers.quantized_layer import attached
from statqat_lightning.model.compensation import compensate
from statqat_lightning.model.quantized_model import (
    quantized_layers,
    refresh,
    set_enabled,
    set_observing,
)
from statqat_lightning.model.rounding_in_turn import round_in_turn

PLAIN_FORMATS = ("int2", "int3", "int4", "fp4_e2m1", "nf4")
ALONE: dict[str, Any] = {"activations": None, "first_last_bits": None}


def correlated(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Samples whose channels are mixtures of few sources, and differ in energy."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns // 3, columns, generator=torch.Generator().manual_seed(99))
    sources = torch.randn(rows, columns // 3, generator=generator)
    noise = torch.randn(rows, columns, generator=generator)
    return (sources @ mixing + 0.3 * noise) * torch.linspace(0.2, 3, columns)


def by_elimination(
    weight: np.ndarray, scale: np.ndarray, fmt: str, moments: np.ndarray, damping: float
) -> np.ndarray:
    """The recursion of optimal brain quantization: one column out of the inverse at a time."""
    grid = get_format(fmt).values.double().numpy()
    h = moments + damping * np.diag(moments).mean() * np.eye(len(moments))
    left = list(np.argsort(-np.diag(moments), kind="stable"))
    inverse = np.linalg.inv(h)
    w, rounded = weight.copy(), np.zeros_like(weight)
    while left:
        j = left[0]
        nearest = np.abs(w[:, j : j + 1] / scale[:, j : j + 1] - grid[None]).argmin(1)
        rounded[:, j] = grid[nearest] * scale[:, j]
        error = (w[:, j] - rounded[:, j]) / inverse[j, j]
        w -= np.outer(error, inverse[j])
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        left.pop(0)
    return rounded


@pytest.mark.parametrize("fmt", PLAIN_FORMATS)
@pytest.mark.parametrize("columns", [12, 200])  # more than a block, too
def test_columns_are_rounded_as_by_eliminating_them_one_by_one(fmt: str, columns: int) -> None:
    torch.manual_seed(0)
    weight = torch.randn(1, 6, columns)
    scale = weight.abs().amax(2, keepdim=True).expand_as(weight) / get_format(fmt).max
    x = correlated(400, columns).double()
    moments = (x.T @ x).unsqueeze(0)
    moved, *_ = round_in_turn(weight, scale, get_format(fmt), moments, 0.01)
    expected = by_elimination(
        weight[0].double().numpy(), scale[0].double().numpy(), fmt, moments[0].numpy(), 0.01
    )
    assert not torch.equal(moved, weight)
    # Sums of float32 may carry a value that lies between two levels to the other one, and what
    # follows in its row then differs.
    same = np.isclose(moved[0].numpy(), expected, rtol=1e-5, atol=1e-6).mean(1)
    assert np.median(same) == 1.0


def test_uncorrelated_inputs_leave_nothing_to_make_up_for() -> None:
    torch.manual_seed(0)
    weight = torch.randn(1, 5, 40)
    scale = torch.full_like(weight, 0.3)
    moments = torch.diag(torch.rand(40, dtype=torch.float64)).unsqueeze(0)
    fmt = get_format("int4")
    moved, signal, before, after = round_in_turn(weight, scale, fmt, moments, 0.01)
    assert torch.equal(fmt.round(moved / scale), fmt.round(weight / scale))
    assert before == after
    assert signal == pytest.approx(
        float((weight[0].double().square() * moments[0].diagonal()).sum())
    )


class Case:
    """A layer and batches that it runs on."""

    def __init__(self, layer: nn.Module, *shape: int) -> None:
        self.layer, self.shape = layer, shape

    def batch(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(self.shape, generator=generator)
        smooth = x.cumsum(-1)  # neighbours are correlated
        return smooth + 0.5 * smooth.roll(1, -2) if len(self.shape) > 1 else smooth


CASES: dict[str, Callable[[], Case]] = {
    "Linear": lambda: Case(nn.Linear(48, 24), 64, 48),
    "Linear of sequences": lambda: Case(nn.Linear(48, 24), 8, 16, 48),
    "Conv1d": lambda: Case(nn.Conv1d(8, 12, 5, stride=2, padding=3), 6, 8, 40),
    "Conv1d dilated": lambda: Case(nn.Conv1d(8, 12, 3, dilation=2, padding="same"), 6, 8, 40),
    "Conv2d": lambda: Case(nn.Conv2d(8, 12, 3, padding=1), 6, 8, 12, 12),
    "Conv2d stride": lambda: Case(nn.Conv2d(8, 12, (3, 2), stride=(2, 1)), 6, 8, 12, 12),
    "Conv2d reflect": lambda: Case(
        nn.Conv2d(8, 12, 3, padding=1, padding_mode="reflect"), 6, 8, 12, 12
    ),
    "Conv2d circular": lambda: Case(
        nn.Conv2d(8, 12, (3, 5), padding=(1, 2), padding_mode="circular"), 6, 8, 12, 12
    ),
    "Conv2d grouped": lambda: Case(nn.Conv2d(8, 12, 3, groups=2), 6, 8, 12, 12),
    "Conv2d depthwise": lambda: Case(nn.Conv2d(8, 8, 3, groups=8), 6, 8, 12, 12),
    "Conv2d channels last": lambda: Case(
        nn.Conv2d(8, 12, 3, padding=1).to(memory_format=torch.channels_last), 6, 8, 12, 12
    ),
    "Conv2d without batch": lambda: Case(nn.Conv2d(8, 12, 3), 8, 24, 24),
    "Conv3d": lambda: Case(nn.Conv3d(4, 6, 2), 3, 4, 6, 7, 8),
}


def output_snr(layer: nn.Module, exact: nn.Module, batches: list[Tensor]) -> float:
    """SNR in dB of what a layer makes of batches, beside what another one makes, bias apart.

    In sequences it is that of tokens of unit norm.
    """
    signal = noise = 0.0
    tokens = isinstance(exact, nn.Linear) and batches[0].dim() > 2
    with torch.no_grad():
        for x in batches:
            bias = exact(torch.zeros_like(x))
            wanted = (exact(x) - bias).double()
            error = layer(x).double() - bias - wanted
            counts = 1 / x.double().square().sum(-1, keepdim=True) if tokens else 1.0
            signal += float((wanted.square() * counts).sum())
            noise += float((error.square() * counts).sum())
    return 10 * math.log10(signal / noise)


@pytest.mark.parametrize("name", CASES)
def test_the_report_is_what_the_layer_does_and_other_batches_gain_too(name: str) -> None:
    torch.manual_seed(0)
    case = CASES[name]()
    exact = copy.deepcopy(case.layer)
    prepare(case.layer, "int3", **ALONE)
    rounded = copy.deepcopy(case.layer)
    seen = [case.batch(seed) for seed in range(4)]
    report = compensate(case.layer, lambda: [case.layer(x) for x in seen])
    (row,) = report.rows
    assert row.name == "weight"
    assert not report.skipped
    assert row.before == pytest.approx(output_snr(rounded, exact, seen), abs=0.01)
    assert row.after == pytest.approx(output_snr(case.layer, exact, seen), abs=0.01)
    assert row.after > row.before + 1
    others = [case.batch(seed) for seed in range(100, 104)]
    assert output_snr(case.layer, exact, others) > output_snr(rounded, exact, others) + 0.5


@pytest.mark.parametrize(
    ("fmt", "granularity"),
    [
        *itertools.product(PLAIN_FORMATS, ["per_tensor", "per_channel", "per_group:16"]),
        ("mxfp4", None),
        ("nvfp4", None),
    ],
)
def test_compensated_weights_lie_on_their_grids_and_quantizing_them_changes_nothing(
    fmt: str, granularity: str | None
) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 12)
    prepare(layer, TensorSpec(fmt, granularity), **ALONE)
    x = correlated(300, 64)
    exact = layer.weight.detach().clone()
    compensate(layer, lambda: layer(x))
    quantizer = attached(layer).weights["weight"]
    assert (layer.weight.detach() != exact).any(1).all()
    for _ in range(2):
        turned = quantizer(layer.weight).detach()
        torch.testing.assert_close(turned, layer.weight.detach(), rtol=1e-6, atol=1e-7)
        refresh(layer, search=True)


def test_no_token_of_a_sequence_takes_it_all() -> None:
    torch.manual_seed(0)
    exact = nn.Linear(48, 24)
    ordinary = correlated(600, 48).view(30, 20, 48)
    massive = 300 * correlated(30, 48, seed=1).view(30, 1, 48)
    seen = torch.cat([massive, ordinary], 1)
    found = {}
    for name, x in {"sequences": seen, "rows": seen.flatten(0, 1)}.items():
        layer = copy.deepcopy(exact)
        prepare(layer, "int3", **ALONE)
        compensate(layer, functools.partial(layer, x))
        found[name] = output_snr(layer, exact, [ordinary])
    assert found["sequences"] > found["rows"] + 1


def test_layers_see_what_compensated_ones_before_them_make() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 8)
    )
    exact = copy.deepcopy(model)
    prepare(model, "int3", **ALONE)
    x = correlated(500, 24)
    runs = []

    def run(of: nn.Module) -> None:
        runs.append(of(x))

    once, separate_signs = copy.deepcopy(model), copy.deepcopy(model)
    report = compensate(once, lambda: run(once))
    assert len(runs) == 2  # one for the order, and one for all of the layers
    runs.clear()
    compensate(separate_signs, lambda: run(separate_signs), memory=1)
    assert len(runs) == 4
    assert [row.name for row in report.rows] == ["0/weight", "2/weight", "4/weight"]
    with torch.no_grad():
        wanted = exact(x)
        errors = [float((own(x) - wanted).square().mean()) for own in (model, once, separate_signs)]
    assert errors[2] < errors[1] < 0.7 * errors[0]


def test_each_projection_of_attention_is_compensated_for_its_own_input() -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(24, 2, batch_first=True)
    exact = copy.deepcopy(attention)
    prepare(attention, "int3", **ALONE)
    rounded = copy.deepcopy(attention)
    query, key = correlated(160, 24).view(8, 20, 24), 0.1 * correlated(240, 24, 1).view(8, 30, 24)
    report = compensate(attention, lambda: attention(query, key, key, need_weights=False))
    assert [row.name for row in report.rows] == ["in_proj_weight", "out_proj/weight"]
    assert all(row.after > row.before + 1 for row in report.rows)
    with torch.no_grad():
        wanted, without, with_ = (
            m(query, key, key, need_weights=False)[0] for m in (exact, rounded, attention)
        )
    assert (with_ - wanted).square().mean() < 0.8 * (without - wanted).square().mean()


def test_a_small_language_model_loses_less_than_by_rounding() -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    exact = copy.deepcopy(model)
    prepare(model, "int3", **ALONE)
    rounded = copy.deepcopy(model)
    x = correlated(800, 32).view(20, 40, 32)
    compensate(model, lambda: model(x))
    others = correlated(800, 32, 5).view(20, 40, 32)
    with torch.no_grad():
        wanted = exact(others)
        without, with_ = ((m(others) - wanted).square().mean() for m in (rounded, model))
    assert with_ < 0.9 * without


def test_what_cannot_be_compensated_is_named_with_the_reason() -> None:
    torch.manual_seed(0)

    class Same(nn.Conv1d):
        """Pads by itself, as timm's `Conv2dSame`."""

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(F.pad(x, (1, 1)))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(8, 12)
            self.first = nn.Linear(12, 12)
            self.made = weight_norm(nn.Linear(12, 12))
            self.tied = nn.Linear(12, 12, bias=False)
            self.again = nn.Linear(12, 12, bias=False)
            self.again.weight = self.tied.weight
            self.up = nn.ConvTranspose1d(12, 12, 3)
            self.memory = nn.GRU(12, 12, batch_first=True)
            self.idle = nn.Linear(12, 12)
            self.off = nn.Linear(12, 12)
            self.same = Same(12, 12, 3)

        def forward(self, indices: Tensor) -> Tensor:
            x = self.again(self.tied(self.made(self.first(self.embed(indices)))))
            x = self.up(self.same(x.transpose(1, 2))).transpose(1, 2)
            out: Tensor = self.off(self.memory(x)[0])
            return out

    model = Model()
    rules = [
        QuantRule("type:Embedding", TensorSpec("int4", "per_tensor")),
        QuantRule("*", TensorSpec("int4")),
    ]
    prepare(model, recipe=QuantRecipe(rules))
    attached(model.off).weights["weight"].enabled = False
    report = compensate(model, lambda: model(torch.randint(8, (4, 9))))
    assert {row.name for row in report.rows} == {"first/weight", "memory/weight_ih_l0"}
    assert report.skipped == {
        "embed/weight": "its rows are picked, and not summed over",
        "made/weight": "it is made of other parameters",
        "tied/weight": "it is shared with another layer",
        "again/weight": "it is shared with another layer",
        "up/weight": "it belongs to a transposed convolution",
        "memory/weight_hh_l0": "nobody sees the inputs that it is multiplied with",
        "idle/weight": "its layer did not run",
        "off/weight": "it is not quantized now",
        "same/weight": "its layer has a forward of its own, which may pad or standardize",
    }
    text = str(report)
    assert text.startswith("2 weights compensated, +")
    assert all(
        name in text and len(line) <= 100
        for name, line in zip(report.skipped, text.splitlines()[1:], strict=True)
    )
    assert repr(report) == f"<CompensationReport: {text.splitlines()[0]}>"
    html = report._repr_html_()
    cells = [(row.name, f"{row.before:.1f}", f"{row.after:.1f}") for row in report.rows]
    assert re.findall(r">([^<]*)</td>", html) == [text for row in cells for text in row]
    assert html.count("<p>") == 1 + len(report.skipped)


def test_inputs_with_nan_move_no_weight() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    prepare(model, "int4", **ALONE)
    before = [p.detach().clone() for p in model.parameters()]
    x = torch.randn(20, 8)
    bad = x.clone()
    bad[3, 2] = torch.nan
    report = compensate(model, lambda: (model(x), model[0](bad)))
    assert report.skipped == {"0/weight": "its inputs held NaN or infinite values"}
    assert torch.equal(before[0], model[0].weight)
    assert not torch.equal(before[2], model[1].weight)


@pytest.mark.parametrize("rows", [1, 5])
def test_fewer_rows_than_channels_and_dead_channels_do_no_harm(rows: int) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(32, 8)
    exact = copy.deepcopy(layer)
    prepare(layer, "int3", **ALONE)
    rounded = copy.deepcopy(layer)
    x = torch.randn(rows, 32)
    x[:, ::2] = 0
    compensate(layer, lambda: layer(x))
    assert layer.weight.isfinite().all()
    assert output_snr(layer, exact, [x]) > output_snr(rounded, exact, [x])


def test_with_inputs_quantized_the_whole_model_gains() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(256, 10),
    ).eval()
    exact = copy.deepcopy(model)
    prepare(model, "int3", "int8", first_last_bits=None)
    x = torch.randn(32, 3, 12, 12).cumsum(-1)
    set_observing(model, True)
    model(x)
    set_observing(model, False)
    refresh(model, search=True)
    rounded = copy.deepcopy(model)
    compensate(model, lambda: model(x))
    with torch.no_grad():
        wanted = exact(x)
        without, with_ = ((m(x) - wanted).square().mean() for m in (rounded, model))
    assert with_ < 0.6 * without
    set_enabled(model, weights=False)
    with torch.no_grad():  # the weights themselves are the quantized ones now
        torch.testing.assert_close((model(x) - wanted).square().mean(), with_, rtol=1e-3, atol=0)


@pytest.mark.parametrize("damping", [0.0, -1.0, 1.5, math.nan])
def test_damping_is_checked(damping: float) -> None:
    layer = nn.Linear(4, 4)
    prepare(layer, "int4", **ALONE)
    with pytest.raises(ValueError, match=r"damping=.*expected a number in \(0, 1\]"):
        compensate(layer, lambda: layer(torch.ones(2, 4)), damping=damping)


def test_a_model_without_quantizers_and_a_run_without_the_model_are_refused() -> None:
    layer = nn.Linear(4, 4)
    with pytest.raises(ValueError, match="Linear has no quantized weights; call prepare first"):
        compensate(layer, lambda: None)
    prepare(layer, "int4", **ALONE)
    with pytest.raises(ValueError, match="expected `run` to call the model"):
        compensate(layer, lambda: None)
    with pytest.raises(ValueError, match="memory=0"):
        compensate(layer, lambda: None, memory=0)


def test_a_run_that_fails_leaves_no_watchers_behind() -> None:
    layer = nn.Linear(4, 4)
    prepare(layer, "int4", **ALONE)

    def run() -> None:
        layer(torch.ones(2, 4))
        raise KeyError("data")

    with pytest.raises(KeyError):
        compensate(layer, run)
    assert all(not own.quantizers.watchers for own in quantized_layers(layer))
