"""Moments of inputs, by which errors of weights count: against what the layers' outputs show."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from statqat_lightning import QuantRecipe, QuantRule, TensorSpec, prepare
from statqat_lightning.fake_quant.input_moments import (
    MOMENTUM,
    InputChannels,
    InputMoments,
    fold_moments,
    sums_of,
)
from statqat_lightning.layers.quantized_layer import attached
from statqat_lightning.model.quantized_model import (
    load_quantizer_state,
    quantized_layers,
    quantizer_state,
    refresh,
    set_centred,
    set_frozen,
    set_observing,
)

WEIGHTS_ONLY: dict[str, Any] = {"weights": "int3", "activations": None, "first_last_bits": None}


def uneven(number: int) -> Tensor:
    """Spreads of channels: every eighth carries nearly all of the energy."""
    spread = torch.ones(number)
    spread[::8] = 30.0
    return spread


class Case:
    """A layer, and batches whose channels are independent and differ in energy.

    Args:
        layer: The layer.
        shape: Shape of a batch.
        axis: Axis of the channels.
    """

    def __init__(self, layer: nn.Module, shape: tuple[int, ...], axis: int) -> None:
        self.layer, self.axis = layer, axis
        self._shape = shape

    def batch(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(self._shape, generator=generator)
        return x * uneven(x.shape[self.axis]).view(-1, *(1,) * (-self.axis - 1))

    def run(self, x: Tensor) -> Tensor:
        out: Tensor
        if isinstance(self.layer, nn.MultiheadAttention):
            out = self.layer(x, x, x, need_weights=False)[0]
        elif isinstance(self.layer, (nn.LSTM, nn.GRU, nn.RNN)):
            out = self.layer(x)[0]
        else:
            out = self.layer(x)
        return out


CASES: dict[str, Callable[[], Case]] = {
    "Linear": lambda: Case(nn.Linear(32, 24), (6, 5, 32), -1),
    "Linear of vectors": lambda: Case(nn.Linear(32, 24), (32,), -1),
    "Conv1d": lambda: Case(nn.Conv1d(16, 12, 3), (4, 16, 20), -2),
    "Conv2d": lambda: Case(nn.Conv2d(16, 12, 3, padding=1), (4, 16, 9, 9), -3),
    "Conv2d without batch": lambda: Case(nn.Conv2d(16, 12, 3), (16, 9, 9), -3),
    "Conv3d": lambda: Case(nn.Conv3d(16, 12, 2), (4, 16, 4, 5, 6), -4),
    "grouped": lambda: Case(nn.Conv2d(32, 12, 3, groups=2), (4, 32, 9, 9), -3),
    "ConvTranspose1d": lambda: Case(nn.ConvTranspose1d(16, 12, 3), (4, 16, 9), -2),
    "ConvTranspose2d": lambda: Case(nn.ConvTranspose2d(16, 12, 3), (4, 16, 9, 9), -3),
    "grouped ConvTranspose2d": lambda: Case(
        nn.ConvTranspose2d(32, 12, 3, groups=2), (4, 32, 9, 9), -3
    ),
}


def moments_of(layer: nn.Module, role: str = "weight") -> InputMoments:
    """Those of a weight that has some."""
    moments = attached(layer).weights[role].input_moments
    assert moments is not None
    return moments


def observed(model: nn.Module, *runs: Callable[[], Any]) -> None:
    """Show a prepared model some batches, and let it search."""
    for run in runs:
        set_observing(model, True)
        run()
        set_observing(model, False)
        refresh(model, search=True)


def output_error(case: Case, seeds: range) -> float:
    """Mean squared error of the layer's output, on batches that nothing was chosen by."""
    layer = copy.deepcopy(case.layer)
    for quantizer in attached(layer).weights.values():
        quantizer.enabled = False
    errors = []
    with torch.no_grad():
        for seed in seeds:
            x = case.batch(seed)
            errors.append(float((case.run(x) - Case.run(_with(case, layer), x)).square().mean()))
    return float(np.mean(errors))


def _with(case: Case, layer: nn.Module) -> Case:
    other = copy.copy(case)
    other.layer = layer
    return other


@pytest.mark.parametrize("name", CASES)
def test_moments_are_those_of_the_channels(name: str) -> None:
    torch.manual_seed(0)
    case = CASES[name]()
    prepare(case.layer, **WEIGHTS_ONLY)
    batches = [case.batch(seed) for seed in (1, 2)]
    set_observing(case.layer, True)
    for x in batches:
        case.run(x)
    refresh(case.layer)
    values = np.stack([np.moveaxis(x.double().numpy(), case.axis, 0) for x in batches], 1)
    rows = values.reshape(len(values), -1)
    moments = moments_of(case.layer)
    np.testing.assert_allclose(moments.mean[0], rows.mean(1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(moments.mean_square[0], np.square(rows).mean(1), rtol=1e-5)


@pytest.mark.parametrize("name", [n for n in CASES if n != "Linear of vectors"])
def test_scales_by_the_output_beat_those_by_the_weight_on_other_batches(name: str) -> None:
    torch.manual_seed(0)
    errors = {}
    for objective in ("weight", "output"):
        torch.manual_seed(1)
        case = CASES[name]()
        # Where inputs are large, weights are large: a search by the weight's error clips them.
        with torch.no_grad():
            weight: Any = case.layer.weight
            groups = getattr(case.layer, "groups", 1)
            along = 0 if isinstance(case.layer, nn.modules.conv._ConvTransposeNd) else 1
            large = uneven(weight.shape[along] * (1 if along == 0 else groups)) > 1
            factor = torch.where(large[: weight.shape[along]], 3.0, 1.0)
            weight.mul_(factor.view(-1, *(1,) * (weight.dim() - 1 - along)))
        spec = TensorSpec("int3", objective=objective)
        prepare(case.layer, spec, None, first_last_bits=None)
        observed(case.layer, *[lambda s=s, c=case: c.run(c.batch(s)) for s in range(8)])
        errors[objective] = output_error(case, range(100, 104))
    assert errors["output"] < 0.9 * errors["weight"]


def test_each_projection_of_attention_has_the_moments_of_its_input() -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(16, 2, batch_first=True)
    prepare(attention, **WEIGHTS_ONLY)
    query, key, value = torch.randn(2, 5, 16), 7 * torch.randn(2, 6, 16), torch.rand(2, 6, 16)
    set_observing(attention, True)
    attention(query, key, value)
    attention(query, query, query)
    refresh(attention)
    moments = moments_of(attention, "in_proj_weight")
    for row, first in zip(moments.mean_square, (query, key, value), strict=True):
        seen = torch.cat([first.flatten(0, 1), query.flatten(0, 1)])
        torch.testing.assert_close(row, seen.square().mean(0))
    _, mean = moments.variance_and_mean()
    assert mean is not None
    assert torch.equal(mean.expand(48, 16)[::16], moments.mean)
    assert moments_of(attention.out_proj).known


@pytest.mark.parametrize("cls", [nn.LSTM, nn.GRU, nn.RNN])
def test_the_first_layer_of_a_recurrent_network_has_the_moments_of_its_input(cls: Any) -> None:
    torch.manual_seed(0)
    layer = cls(12, 8, num_layers=2, bidirectional=True, batch_first=True)
    prepare(layer, **WEIGHTS_ONLY)
    x = torch.randn(3, 5, 12) * uneven(12)
    packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([5, 3, 2]), batch_first=True)
    set_observing(layer, True)
    layer(packed)
    refresh(layer)
    weights = attached(layer).weights
    for role, quantizer in weights.items():
        moments = quantizer.input_moments
        assert (moments is not None) == (role in ("weight_ih_l0", "weight_ih_l0_reverse"))
        if moments is not None:
            torch.testing.assert_close(moments.mean_square[0], packed.data.square().mean(0))


def test_rows_of_embeddings_count_by_how_often_they_are_picked() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, 6), nn.Linear(6, 4))
    spec = TensorSpec("int4", "per_tensor")
    prepare(model, recipe=QuantRecipe([QuantRule("type:Embedding", spec)]))
    indices = torch.tensor([[1, 1, 1, 2], [1, 9, 9, 2]])
    with torch.no_grad():
        model[0].weight[0] *= 50  # never picked: it must not widen the grid of all others
    observed(model, lambda: model(indices))
    counts = torch.bincount(indices.flatten(), minlength=10).float()
    assert torch.equal(moments_of(model[0]).mean_square[0], counts)
    seen = model[0].weight.detach()[counts > 0]
    assert float(attached(model[0]).weights["weight"].scale) < float(seen.abs().max()) / 5
    # A scale for each row does not depend on how often it is picked.
    alone = nn.Embedding(10, 6)
    prepare(alone, recipe=QuantRecipe([QuantRule("type:Embedding", TensorSpec("int4"))]))
    assert attached(alone).weights["weight"].input_moments is None


def test_scales_that_no_input_can_change_have_no_moments() -> None:
    layer = nn.ConvTranspose2d(8, 8, 3, groups=8)  # a scale for each input channel
    prepare(layer, **WEIGHTS_ONLY)
    assert attached(layer).weights["weight"].input_moments is None
    prepare(layer, TensorSpec("int3", "per_tensor"), None, first_last_bits=None)
    assert attached(layer).weights["weight"].input_moments is not None


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel", "per_group:8"])
@pytest.mark.parametrize("fmt", ["int4", "nf4", "mxfp4"])
def test_weights_of_errors_have_the_rows_of_the_weight(granularity: str, fmt: str) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(32, 4)
    spec = TensorSpec(fmt, None if fmt == "mxfp4" else granularity)
    prepare(layer, spec, None, first_last_bits=None)
    x = torch.randn(50, 32) * uneven(32)
    observed(layer, lambda: layer(x))
    quantizer = attached(layer).weight
    assert quantizer is not None
    rows = quantizer.granularity.rows(layer.weight)
    weights = quantizer.error_weights(layer.weight)
    assert weights is not None
    assert weights.mean is not None
    assert weights.parts == (4 if granularity == "per_tensor" and fmt != "mxfp4" else 1)
    for found, expected in (
        (weights.variance, x.var(0, correction=0)),
        (weights.mean, x.mean(0)),
    ):
        wanted = quantizer.granularity.rows(expected.expand(4, 32))
        torch.testing.assert_close(found.expand(rows.shape), wanted)


def test_batches_are_averaged_evenly_at_first_and_forgotten_slowly() -> None:
    moments = InputMoments(InputChannels(("input",), -1, (1, 2)))
    expected = np.zeros(2)
    for number in range(1, 13):
        moments.add("input", torch.tensor([[float(number), 1.0]]))
        fold_moments([moments], sums_of([moments]))
        weight = max(1 / number, MOMENTUM)
        expected += weight * (np.array([number**2, 1.0]) - expected)
        np.testing.assert_allclose(moments.mean_square[0], expected, rtol=1e-6)
    assert moments.num_batches.tolist() == [12.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_moments_are_float32_whatever_the_inputs_are(dtype: torch.dtype) -> None:
    moments = InputMoments(InputChannels(("input",), -1, (1, 3)))
    x = torch.tensor([[300.0, 2.0, 0.5]] * 4, dtype=dtype)  # its squares leave float16
    moments.add("input", x)
    fold_moments([moments], sums_of([moments]))
    assert moments.mean_square.dtype == torch.float32
    assert moments.mean_square[0].tolist() == [90000.0, 4.0, 0.25]
    assert moments.mean[0].tolist() == [300.0, 2.0, 0.5]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_batch_with_nan_or_infinities_changes_nothing(bad: float) -> None:
    moments = InputMoments(InputChannels(("input",), -1, (1, 2)))
    moments.add("input", torch.tensor([[1.0, 2.0]]))
    fold_moments([moments], sums_of([moments]))
    moments.add("input", torch.tensor([[3.0, bad]]))
    fold_moments([moments], sums_of([moments]))
    assert moments.mean[0].tolist() == [1.0, 2.0]
    assert moments.mean_square[0].tolist() == [1.0, 4.0]
    assert moments.num_batches.tolist() == [1.0]


@pytest.mark.parametrize(
    "x", [torch.ones(2, 5), torch.tensor(1.0), torch.ones(3, 0), torch.ones(2, 3).long(), "text"]
)
def test_inputs_of_another_kind_are_left_out(x: Any) -> None:
    moments = InputMoments(InputChannels(("input",), -1, (1, 3)))
    moments.add("input", x)
    moments.add("other", torch.ones(2, 3))
    assert not moments.filled
    assert not moments.sums.any()


def test_only_steps_before_a_search_are_observed_and_frozen_ones_never() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(8, 4)
    prepare(layer, **WEIGHTS_ONLY)
    moments = moments_of(layer)
    observed_at = []
    for step in range(20):
        set_observing(layer, True)
        layer(torch.randn(5, 8))
        set_observing(layer, False)
        if moments.filled:
            observed_at.append(step)
        refresh(layer)
        assert not moments.filled
    # The first search is that of insertion, so the numbers are one ahead of the steps.
    assert observed_at == [0, 1, 3, 7, 15]
    attached(layer).weights["weight"].num_refreshes = 32
    set_frozen(layer, True)
    set_observing(layer, True)
    layer(torch.randn(5, 8))
    assert not moments.filled


def test_a_checkpointed_segment_is_counted_once() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    prepare(model, **WEIGHTS_ONLY)
    set_observing(model, True)
    x = torch.randn(5, 8, requires_grad=True)
    out = checkpoint(model, x, use_reentrant=False)
    assert isinstance(out, Tensor)
    out.sum().backward()
    for _, layer, _ in quantized_layers(model):
        assert moments_of(layer).sums[0, -1] == 5


def test_moments_are_kept_in_the_state_and_follow_copies_and_pickles() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    prepare(model, **WEIGHTS_ONLY)
    observed(model, lambda: model(torch.randn(5, 8) * uneven(8)))
    buffer = io.BytesIO()
    torch.save(quantizer_state(model), buffer)
    state = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    fresh = copy.deepcopy(model)
    prepare(fresh, "int4", None, first_last_bits=None)
    prepare(fresh, **WEIGHTS_ONLY)
    load_quantizer_state(fresh, state)
    for other in (fresh, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        for ours, theirs in zip(quantized_layers(model), quantized_layers(other), strict=True):
            own, known = moments_of(ours.module), moments_of(theirs.module)
            assert known.known
            assert torch.equal(own.mean, known.mean)
            assert torch.equal(own.num_batches, known.num_batches)


@pytest.mark.parametrize("reduce", [None, lambda tensor, operation: tensor])
def test_what_nobody_has_seen_is_not_known(reduce: Any) -> None:
    model = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)])
    prepare(model, **WEIGHTS_ONLY)
    set_observing(model, True)
    model[0](torch.randn(20, 8))
    model[1](torch.full((20, 8), float("nan")))
    refresh(model, reduce=reduce)
    assert [moments_of(layer).known for layer in model] == [True, False, False]
    assert [attached(layer).weights["weight"].weighed for layer in model] == [True, False, False]


def test_a_state_without_moments_loads_and_one_of_another_shape_does_not() -> None:
    model = nn.Linear(8, 4)
    prepare(model, **WEIGHTS_ONLY)
    observed(model, lambda: model(torch.randn(5, 8)))
    state = quantizer_state(model)
    old = {
        name: {k: v for k, v in own.items() if k != "input_moments"} for name, own in state.items()
    }
    load_quantizer_state(model, old)
    assert not moments_of(model).known
    assert not moments_of(model).mean.any()
    state["weight"]["input_moments"]["mean"] = torch.ones(1, 9)
    with pytest.raises(ValueError, match=r"its inputs have shape \(1, 9\).*\(1, 8\)"):
        load_quantizer_state(model, state)


def test_moments_follow_the_layer_from_device_to_device_but_stay_float32() -> None:
    layer = nn.Linear(8, 4)
    prepare(layer, **WEIGHTS_ONLY)
    layer.to(torch.bfloat16)
    assert moments_of(layer).mean.dtype == torch.float32
    set_observing(layer, True)
    layer(torch.randn(3, 8, dtype=torch.bfloat16))
    assert moments_of(layer).filled


def test_a_compiled_model_is_compiled_once_and_observes_the_same() -> None:
    torch.manual_seed(0)
    graphs = []

    def counting(graph: Any, example: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    prepare(model, **WEIGHTS_ONLY)
    copied = copy.deepcopy(model)
    compiled = torch.compile(model, backend=counting)
    for step in range(6):
        x = torch.randn(5, 8)
        for own, call in ((model, compiled), (copied, copied)):
            set_observing(own, True)
            call(x)
            set_observing(own, False)
            refresh(own)
        if step == 0:
            first = len(graphs)
    assert len(graphs) == first
    for ours, theirs in zip(quantized_layers(model), quantized_layers(copied), strict=True):
        mine, other = moments_of(ours.module), moments_of(theirs.module)
        torch.testing.assert_close(mine.mean, other.mean)
        assert torch.equal(mine.num_batches, other.num_batches)


def test_objectives_are_checked_and_written_down() -> None:
    assert TensorSpec("int4").weighs
    assert TensorSpec("mxfp4").weighs
    assert not TensorSpec("int4", objective="weight").weighs
    assert not TensorSpec("int4", quantizer="minmax").weighs
    spec = TensorSpec("int4", objective="weight")
    assert TensorSpec(**spec.to_dict()) == spec
    assert spec.to_dict()["objective"] == "weight"
    assert "objective" not in TensorSpec("int4").to_dict()
    with pytest.raises(ValueError, match=r"objective='speed'.*output, weight"):
        TensorSpec("int4", objective="speed")
    with pytest.raises(ValueError, match="'minmax', which weighs all errors alike"):
        TensorSpec("int4", quantizer="minmax", objective="output")


def with_means(centred: bool) -> tuple[nn.Linear, Tensor, Tensor, Tensor]:
    """A layer, its inputs with means as after a ReLU, and the energies of output and error."""
    torch.manual_seed(0)
    layer = nn.Linear(32, 16, bias=False)
    prepare(layer, **WEIGHTS_ONLY)
    set_centred(layer, [""] if centred else [])
    x = torch.rand(200_000, 32) * uneven(32)
    observed(layer, lambda: layer(x))
    signal, noise = attached(layer).weights["weight"].energies(layer.weight, of_output=True)
    return layer, x, signal, noise


def test_the_error_of_the_output_is_that_of_independent_inputs() -> None:
    layer, x, signal, noise = with_means(centred=False)
    with torch.no_grad():
        exact = F.linear(x, layer.weight)
        error = exact - layer(x)
    torch.testing.assert_close(signal, exact.square().sum(1).mean(), rtol=0.02, atol=0)
    torch.testing.assert_close(noise, error.square().sum(1).mean(), rtol=0.02, atol=0)


def test_behind_a_norm_only_what_varies_of_the_output_counts() -> None:
    norm = nn.BatchNorm1d(16, affine=False)
    layer, x, signal, noise = with_means(centred=True)
    with torch.no_grad():
        exact = F.linear(x, layer.weight)
        varying = exact - exact.mean(0)
        error = norm(layer(x)) - norm(exact)
        own = layer(x) - exact
    torch.testing.assert_close(signal, varying.square().sum(1).mean(), rtol=0.02, atol=0)
    own -= own.mean(0)
    torch.testing.assert_close(noise, own.square().sum(1).mean(), rtol=0.02, atol=0)

    set_centred(layer, [])
    refresh(layer, search=True)
    with torch.no_grad():
        other = norm(layer(x)) - norm(exact)
    assert error.square().mean() < 0.9 * other.square().mean()


def test_a_weight_that_layers_share_is_centred_if_all_of_them_are() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    prepare(model, **WEIGHTS_ONLY)
    set_centred(model, ["0"])
    assert not moments_of(model[0]).centred
    set_centred(model, ["0", "2"])
    assert moments_of(model[2]).centred
    other = copy.deepcopy(model)
    set_centred(other, [])
    load_quantizer_state(other, quantizer_state(model))
    assert moments_of(other[0]).centred


def test_a_scale_chosen_before_inputs_were_known_is_no_start() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(64, 256, bias=False)
    prepare(layer, "int4", None, first_last_bits=None)
    quantizer = attached(layer).weights["weight"]
    before = quantizer.scale.clone()
    x = torch.rand(100, 64) + 0.2 * torch.rand(64)
    observed(layer, lambda: layer(x))
    weights = quantizer.error_weights(layer.weight)
    assert weights is not None
    rows = layer.weight.detach()
    cold, current_scale = (
        quantizer.quantizer.from_weighted_rows(rows, quantizer.fmt, weights, start)
        for start in (None, before.flatten())
    )
    assert torch.equal(quantizer.scale.flatten(), cold)
    assert (current_scale == before.flatten()).any(), "some would have stayed as they were"
    # From then on they rest.
    refresh(layer, search=True)
    assert torch.equal(quantizer.scale.flatten(), cold)

    loaded = nn.Linear(64, 256, bias=False)
    loaded.load_state_dict(layer.state_dict())
    prepare(loaded, "int4", None, first_last_bits=None)
    load_quantizer_state(loaded, quantizer_state(layer))
    refresh(loaded, search=True)
    assert torch.equal(attached(loaded).weights["weight"].scale.flatten(), cold)


def test_layers_that_share_a_weight_share_its_moments_and_its_scale() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    prepare(model, **WEIGHTS_ONLY)
    x = torch.randn(50, 8) * uneven(8)
    with torch.no_grad():
        seen = torch.cat([x, model[1](model[0](x))])
    observed(model, lambda: model(x))
    moments = moments_of(model[0])
    assert moments is moments_of(model[2])
    assert moments.num_batches.tolist() == [1.0]
    torch.testing.assert_close(moments.mean_square[0], seen.square().mean(0))
    first, second = (attached(model[i]).weights["weight"].scale for i in (0, 2))
    assert torch.equal(first, second)
    copied = copy.deepcopy(model)
    assert moments_of(copied[0]) is moments_of(copied[2])
    prepare(model, **WEIGHTS_ONLY)  # kept as they are
    assert moments_of(model[0]) is moments is moments_of(model[2])


def test_an_embedding_and_the_head_that_shares_its_weight_have_one_scale() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(12, 8), nn.Linear(8, 12, bias=False))
    model[1].weight = model[0].weight
    rules = [QuantRule("type:Embedding", "int4"), QuantRule("*", "int4")]
    prepare(model, recipe=QuantRecipe(rules))
    observed(model, lambda: model(torch.randint(12, (5, 7))))
    first, second = (attached(layer).weights["weight"] for layer in model)
    assert first.input_moments is second.input_moments is None
    assert torch.equal(first.scale, second.scale)


class Largest(TorchDispatchMode):
    """Notes the most elements that a new tensor has."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x._base is None:
                self.most = max(self.most, x.numel())
        return result


@torch.no_grad()
def layer_error(weight: Tensor, scale: Tensor, x: Tensor) -> Tensor:
    """What independent inputs with the variances and means of `x` make of int4 errors, by row."""
    error = torch.clamp(torch.round(weight / scale), -7, 7) * scale - weight
    variance, mean = torch.var_mean(x, 0, correction=0)
    return error.square() @ variance + (error @ mean).square()


def test_a_refresh_of_many_layers_needs_little_memory_and_finds_what_each_alone_does() -> None:
    torch.manual_seed(0)
    sizes = [(256, 256)] * 40 + [(1024, 256)] * 2  # 3.1 million weights
    model = nn.ModuleList([nn.Linear(n, m) for m, n in sizes])
    alone = [copy.deepcopy(nn.Sequential(layer)) for layer in model]
    prepare(model, "int4", None, first_last_bits=None)
    x = torch.randn(64, 256).abs()
    for layer, single in zip(model, alone, strict=True):
        prepare(single, "int4", None, first_last_bits=None)
        for part, run in ((model, layer), (single, single)):
            set_observing(part, True)
            run(x)
        refresh(single, search=True)
    with Largest() as largest:
        refresh(model, search=True)
    assert largest.most <= 1 << 20
    for layer, single in zip(model, alone, strict=True):
        own, other = (attached(m).weights["weight"].scale for m in (layer, single[0]))
        # Sums of other parts round otherwise, and of two scales as good the other is then found.
        same = torch.isclose(own, other, rtol=1e-4, atol=0)
        assert same.double().mean() >= 0.99
        errors = [layer_error(layer.weight, scale, x) for scale in (own, other)]
        torch.testing.assert_close(errors[0].sum(), errors[1].sum(), rtol=0.01, atol=0)
