"""The witness of the public table: which parameters enter products, and whether rounded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from statqat_lightning import prepare
from statqat_lightning.model.quantized_model import refresh, set_observing
from tests.public.probe import Row, WeightProbe, disagreements

DATA = torch.randn(6, 8, generator=torch.Generator().manual_seed(3))


class Bypassed(nn.Module):
    """Reads the weight of a layer that it never calls."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Any:
        return self.head(F.linear(x, self.inner.weight, self.inner.bias))


class Language(nn.Module):
    """Its embedding is its output head as well."""

    def __init__(self, head: bool = False) -> None:
        super().__init__()
        self.words = nn.Embedding(11, 8)
        self.mix = nn.Linear(8, 8)
        if head:
            self.head = nn.Linear(8, 11, bias=False)
            self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> Any:
        mixed = self.mix(self.words(ids))
        return self.head(mixed) if hasattr(self, "head") else mixed @ self.words.weight.T


def by_hand(rounding: Callable[[Tensor], Tensor]) -> type[nn.Linear]:
    """A layer that rounds its own weight: the probe must not need ours."""

    class ByHand(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return F.linear(input, rounding(self.weight), self.bias)

    return ByHand


class Followed(nn.Module):
    """Weights of one shape that operations on lists of tensors move before each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.online = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
        self.slow = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))

    def forward(self, x: Tensor) -> Any:
        slow, online = [*self.slow.parameters()], [*self.online.parameters()]
        with torch.no_grad():
            torch._foreach_mul_(slow, 0.9)
            torch._foreach_add_(slow, online, alpha=0.1)
            torch._foreach_copy_(slow[:1], torch._foreach_add(slow[:1], 1e-3))
        return self.online(x) - self.slow(x)


def seen(model: nn.Module, *data: Tensor) -> WeightProbe:
    probe = WeightProbe(model)
    with probe.watching(*data):
        model(*data)
    return probe


def quantized(model: nn.Module, *data: Tensor, **options: Any) -> list[Row]:
    """Quantize a model with the package; the rows of its report."""
    report = prepare(model, **options)
    set_observing(model, True)
    model(*data)
    set_observing(model, False)
    refresh(model, search=True)
    return [Row(r.name, r.weight is not None, r.type, r.reason) for r in report.rows]


def test_a_plain_layer_in_float() -> None:
    probe = seen(nn.Linear(8, 4), DATA)
    assert probe.uses["weight"].unrounded == {"addmm"}
    assert not probe.uses["weight"].rounded
    assert not probe.uses["bias"].unrounded  # it is added, not multiplied


@pytest.mark.parametrize(
    "rounding",
    [
        lambda w: (w / 0.1).round() * 0.1,
        lambda w: torch.fake_quantize_per_tensor_affine(w, 0.01, 0, -128, 127),
        lambda w: w.to(torch.float8_e4m3fn).to(w.dtype),
        lambda w: w + ((w / 0.1).round() * 0.1 - w).detach(),
        lambda w: torch.tensor([-0.1, 0.1])[(w > 0).to(torch.int64)],
    ],
    ids=["round", "operator", "float8", "straight-through", "table"],
)
def test_a_layer_that_rounds_by_hand(rounding: Callable[[Tensor], Tensor]) -> None:
    probe = seen(by_hand(rounding)(8, 4), DATA)
    assert probe.uses["weight"].rounded == {"addmm"}
    assert not probe.uses["weight"].unrounded


@pytest.mark.parametrize(
    "same",
    [
        lambda w: w.clone(),
        lambda w: w.t().contiguous().t(),
        lambda w: w.to(torch.float64).to(torch.float32),
        lambda w: torch.cat([w[:2], w[2:]]),
        lambda w: torch.stack(w.unbind(0)),
        lambda w: -w.exp(),
        lambda w: w / w.norm(dim=1, keepdim=True),
        lambda w: torch.empty_like(w).copy_(w),
    ],
    ids=["clone", "views", "casts", "cat", "stack", "arithmetic", "normalised", "copy"],
)
def test_copies_and_functions_of_a_weight_are_in_float(same: Callable[[Tensor], Tensor]) -> None:
    probe = seen(by_hand(same)(8, 4), DATA)
    assert probe.uses["weight"].unrounded == {"addmm"}
    assert not probe.uses["weight"].rounded


def test_operations_on_lists_keep_weights_apart() -> None:
    model = Followed()
    probe = seen(model, DATA)
    assert {name for name, use in probe.uses.items() if use.unrounded} == {
        name for name, p in model.named_parameters() if p.dim() == 2
    }
    rows = quantized(model, DATA, weights="int4", first_last_bits=None)
    probe = seen(model, DATA)
    assert disagreements(probe, rows) == []
    assert sum(bool(use.rounded) for use in probe.uses.values()) == 4


def test_a_rounding_that_changes_nothing_is_none() -> None:
    """As of a format so fine that the weight passes as it is."""
    layer = by_hand(lambda w: (w * 2.0**30).round() / 2.0**30)(64, 16)
    probe = seen(layer, torch.randn(3, 64))
    assert probe.uses["weight"].unrounded == {"addmm"}


@pytest.mark.parametrize("weights", ["int8", "int4", "int2", "fp8_e4m3", "fp4", "nf4", "mxfp4"])
def test_quantized_layers_agree_with_the_report(weights: str) -> None:
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 64), nn.Linear(64, 4))
    data = torch.randn(6, 32)
    rows = quantized(model, data, weights=weights, first_last_bits=None)
    probe = seen(model, data)
    assert all(row.quantized for row in rows)
    assert disagreements(probe, rows) == []
    set_observing(model, True)  # as in a training step
    probe = seen(model, data)
    assert disagreements(probe, rows) == []
    assert all(probe.uses[f"{i}.weight"].rounded for i in (0, 2, 3))


def test_every_kind_of_layer_agrees_with_the_report() -> None:
    class Kinds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(4, 8, 3, groups=2, padding=1)
            self.back = nn.ConvTranspose1d(8, 8, 1)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.lstm = nn.LSTM(8, 8, batch_first=True, bidirectional=True)
            self.cell = nn.GRUCell(16, 8)
            self.norm = nn.LayerNorm(8)

        def forward(self, x: Tensor) -> Any:
            y = self.back(self.conv(x)).transpose(1, 2)
            y, _ = self.lstm(self.attention(y, y, y)[0])
            return self.norm(self.cell(y[:, -1]))

    model, data = Kinds(), torch.randn(2, 4, 5)
    rows = quantized(model, data)
    probe = seen(model, data)
    assert disagreements(probe, rows) == []
    assert probe.uses["attention.in_proj_weight"].rounded
    assert probe.uses["attention.out_proj.weight"].rounded
    assert probe.uses["lstm.weight_hh_l0_reverse"].rounded
    assert not probe.uses["norm.weight"].unrounded


def test_a_weight_that_is_read_without_its_layer() -> None:
    probe = seen(Bypassed(), DATA)
    rows = [Row("inner", True), Row("head", False)]
    assert disagreements(probe, rows) == [
        "inner.weight: reported as quantized, entered addmm in float"
    ]


def test_a_weight_in_float_that_is_reported_so() -> None:
    assert disagreements(seen(Bypassed(), DATA), [Row("inner", False), Row("head", False)]) == []


def test_a_rounded_weight_that_is_reported_as_float() -> None:
    layer = by_hand(lambda w: (w / 0.1).round() * 0.1)(8, 4)
    assert disagreements(seen(layer, DATA), [Row("", False)]) == [
        "weight: reported as float, entered addmm rounded"
    ]


def test_a_layer_that_never_runs() -> None:
    model = nn.ModuleDict({"used": nn.Linear(8, 4), "idle": nn.Linear(8, 4)})
    probe = WeightProbe(model)
    with probe.watching(DATA):
        model["used"](DATA)
    assert disagreements(probe, [Row("used", False), Row("idle", True)]) == [
        "idle.weight: reported as quantized, entered no product"
    ]


def test_an_embedding_used_as_the_output_head() -> None:
    probe = seen(Language(), torch.tensor([[1, 2, 3]]))
    assert probe.uses["words.weight"].unrounded == {"embedding", "mm"}
    assert disagreements(probe, [Row("words", False), Row("mix", False)]) == []
    assert disagreements(probe, [Row("words", True), Row("mix", False)])


def test_a_head_tied_to_an_embedding_in_float() -> None:
    """One parameter, two rows: in float where it is looked up, rounded where it is multiplied."""
    ids = torch.tensor([[1, 2, 3]])
    model = Language(head=True)
    rows = quantized(model, ids)
    probe = seen(model, ids)
    assert probe.names["words.weight"] == ["words.weight", "head.weight"]
    assert probe.uses["words.weight"].unrounded == {"embedding"}
    assert probe.uses["words.weight"].rounded == {"mm"}
    assert disagreements(probe, rows) == []


def test_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        probe = seen(Bypassed(), DATA)
    assert probe.uses["inner.weight"].unrounded == {"addmm"}
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    rows = quantized(model, DATA)
    with torch.autocast("cpu", torch.bfloat16):
        probe = seen(model, DATA)
    assert disagreements(probe, rows) == []
    assert probe.uses["0.weight"].rounded == {"addmm"}


def test_a_parameter_that_multiplies_the_data() -> None:
    """State-space and depthwise code has weights without a layer."""

    class StateSpace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.log_decay = nn.Parameter(torch.zeros(8))
            self.unused = nn.Parameter(torch.zeros(8))

        def forward(self, x: Tensor) -> Tensor:
            return x * -self.log_decay.exp() + self.unused

    probe = seen(StateSpace(), DATA)
    assert probe.uses["log_decay"].unrounded == {"mul"}
    assert not probe.uses["unused"].unrounded


def test_normalised_weights_are_followed_to_their_parameters() -> None:
    layer = torch.nn.utils.parametrizations.weight_norm(nn.Linear(8, 4))
    probe = seen(layer, DATA)
    assert probe.uses["parametrizations.weight.original1"].unrounded == {"addmm"}
    model = nn.Sequential(layer)
    assert disagreements(seen(model, DATA), [Row("0", False)]) == []
    assert disagreements(seen(model, DATA), [Row("0", True)]) == [
        "0.parametrizations.weight.original1: reported as quantized, entered addmm in float"
    ]
    rows = quantized(model, DATA)
    assert disagreements(seen(model, DATA), rows) == []
    layer = torch.nn.utils.parametrizations.spectral_norm(nn.Linear(8, 4))
    probe = seen(layer, DATA)
    assert probe.uses["parametrizations.weight.original"].unrounded == {"addmm"}
    rows = quantized(nn.Sequential(layer), DATA)
    assert disagreements(seen(nn.Sequential(layer), DATA), rows) == []


def test_a_learned_query_is_data_to_the_layer_behind_it() -> None:
    class Query(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.query = nn.Parameter(torch.randn(3, 8))
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Any:
            return self.layer(self.query) @ x.T

    model = Query()
    rows = quantized(model, DATA)
    probe = seen(model, DATA)
    assert probe.uses["layer.weight"].rounded == {"addmm"}
    assert disagreements(probe, rows) == []


def test_data_is_found_in_objects() -> None:
    class Batch:
        def __init__(self) -> None:
            self.parts = {"x": [DATA]}

    model = nn.ParameterList([torch.randn(8)])
    probe = WeightProbe(model)
    batch = Batch()
    with probe.watching(batch):
        batch.parts["x"][0] * model[0]
    assert probe.uses["0"].unrounded == {"mul"}
