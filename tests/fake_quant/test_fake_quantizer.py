"""Fake quantizers: switches, sign of the format, refreshes in groups, state."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch

from statqat_lightning.error_analysis import EnergySpectrum
from statqat_lightning.fake_quant.activation import ActivationFakeQuantizer
from statqat_lightning.fake_quant.input_sums import InputSums
from statqat_lightning.fake_quant.observers import ObserverConfig, statistics_of
from statqat_lightning.fake_quant.scale_refresh import refresh_activations, refresh_weights
from statqat_lightning.fake_quant.tensor_spec import TensorSpec
from statqat_lightning.fake_quant.weight import WeightFakeQuantizer
from statqat_lightning.model.insertion import prepare
from statqat_lightning.model.quantized_model import set_observing
from statqat_lightning.numerics.qparams import QParams
from statqat_lightning.numerics.straight_through import fake_quantize
from statqat_lightning.quantizers import get_quantizer
from tests.reference import ErrorOf

CPU = torch.device("cpu")
ADAPTIVE = TensorSpec("int4", unsigned_if_nonnegative=True)


def for_input(spec: TensorSpec, layer: str = "fc") -> ActivationFakeQuantizer:
    quantizer = ActivationFakeQuantizer(layer, spec, ObserverConfig(), CPU)
    quantizer.observing = True
    return quantizer


def for_weight(spec: TensorSpec, weight: torch.Tensor) -> WeightFakeQuantizer:
    quantizer = WeightFakeQuantizer("fc", spec, weight)
    refresh_weights([(quantizer, weight)])
    return quantizer


# Weights


@pytest.mark.parametrize("granularity", [None, "per_tensor", "per_channel", "per_group:4"])
def test_a_weight_gets_the_scale_of_its_quantizer(granularity: str | None) -> None:
    weight = torch.randn(6, 8)
    quantizer = for_weight(TensorSpec("int4", granularity), weight)
    expected = get_quantizer("analytic").choose_qparams(
        weight, quantizer.fmt, granularity or "per_channel"
    )
    assert torch.equal(quantizer.scale, expected.scale)
    assert torch.equal(quantizer(weight), fake_quantize(weight, expected, quantizer.fmt))


def test_a_weight_passes_unchanged_until_there_is_a_scale() -> None:
    weight = torch.randn(6, 8)
    quantizer = WeightFakeQuantizer("fc", TensorSpec("int4"), weight)
    assert quantizer(weight) is weight
    refresh_weights([(quantizer, weight)])
    assert not torch.equal(quantizer(weight), weight)
    quantizer.enabled = False
    assert quantizer(weight) is weight


def test_weights_refreshed_together_equal_weights_refreshed_alone() -> None:
    shapes = [(4, 8), (7, 8), (5, 12), (3, 2, 2, 2), (1, 8)]
    specs = [TensorSpec("int4"), TensorSpec("fp4"), TensorSpec("int4", "per_tensor")]
    specs += [TensorSpec("int4", quantizer="minmax")]
    weights = [torch.randn(shape) for shape in shapes for _ in specs]
    together, alone = (
        [WeightFakeQuantizer("", spec, torch.empty(s)) for s in shapes for spec in specs]
        for _ in range(2)
    )
    for _ in range(3):
        refresh_weights(list(zip(together, weights, strict=True)))
        for pair in zip(alone, weights, strict=True):
            refresh_weights([pair])
        for one, other in zip(together, alone, strict=True):
            # Sums over rows of another matrix may run in another order.
            torch.testing.assert_close(one.scale, other.scale, rtol=1e-5, atol=0)
        weights = [weight + 0.01 * torch.randn_like(weight) for weight in weights]
    assert {quantizer.num_refreshes for quantizer in together + alone} == {3}


@pytest.mark.parametrize(
    ("fmt", "expected"),
    [("int2", [1, 2, 4, 8, 16, 32, 48, 64, 80]), ("int6", [1, 2, 4, 8, 16, 32, 64])],
)
def test_a_search_comes_every_so_many_refreshes(fmt: str, expected: list[int]) -> None:
    rng = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 64, generator=rng)
    quantizer = for_weight(TensorSpec(fmt), weight)
    small = weight / 30
    searches = []
    for number in range(90):
        searches += [] if quantizer.skip_refresh() else [number]
        if searches[-1:] == [number]:
            refresh_weights([(quantizer, small)])
    assert [n + 1 for n in searches] == expected
    best = get_quantizer("analytic").choose_qparams(small, quantizer.fmt, "per_channel").scale
    for row, scale, fresh in zip(small, quantizer.scale, best, strict=True):
        error = ErrorOf(row.numpy())
        assert error(quantizer.fmt, float(scale)) <= error(quantizer.fmt, float(fresh)) * 1.001


def test_energies_by_numpy() -> None:
    weight = torch.randn(5, 7)
    quantizer = for_weight(TensorSpec("int3"), weight)
    signal, noise = quantizer.energies(weight.requires_grad_())
    x, x_hat = weight.detach().double().numpy(), quantizer(weight).detach().double().numpy()
    assert float(signal) == pytest.approx(np.sum(x**2), rel=1e-6)
    assert float(noise) == pytest.approx(np.sum((x - x_hat) ** 2), rel=1e-5)
    assert not signal.requires_grad


def test_a_group_that_does_not_fit_names_the_layer() -> None:
    with pytest.raises(ValueError, match=r"layer1\.fc/weight: PerGroup: got size=5 for rows of 8"):
        WeightFakeQuantizer("layer1.fc", TensorSpec("int4", "per_group:5"), torch.empty(3, 8))


# Inputs


def test_an_input_passes_unchanged_until_calibrated() -> None:
    quantizer, x = for_input(ADAPTIVE), torch.randn(50)
    assert quantizer(x) is x
    assert math.isnan(quantizer.mean_energies()[0])
    refresh_activations([quantizer])
    assert quantizer.ready
    x_hat = quantizer(x)
    assert torch.equal(x_hat, fake_quantize(x, QParams(quantizer.scale), quantizer.fmt))
    refresh_activations([quantizer])
    signal, noise = quantizer.mean_energies()
    assert float(signal) == pytest.approx(float(x.double().square().mean()), rel=1e-5)
    assert float(noise) == pytest.approx(float((x - x_hat).double().square().mean()), rel=1e-5)


@pytest.mark.parametrize("quantizer_name", ["analytic", "iterative", "minmax"])
@pytest.mark.parametrize(("low", "expected"), [(0.0, "uint4"), (-1e-3, "int4"), (-5.0, "int4")])
def test_calibration_chooses_the_sign(quantizer_name: str, low: float, expected: str) -> None:
    spec = TensorSpec("int4", quantizer=quantizer_name, unsigned_if_nonnegative=True)
    quantizer = for_input(spec)
    quantizer(torch.tensor([low, 0.0, 3.0]))
    refresh_activations([quantizer])
    assert quantizer.fmt.name == expected
    # A negative value in the first batches changes it, later ones do not.
    for _ in range(quantizer.batches_to_decide - 1):
        quantizer(torch.tensor([0.0, 3.0]))
        refresh_activations([quantizer])
    quantizer(torch.tensor([-9.0, 1.0]))
    refresh_activations([quantizer])
    assert quantizer.fmt.name == expected


def test_a_negative_value_in_a_later_calibration_batch_makes_the_format_signed() -> None:
    quantizer = for_input(TensorSpec("int4", unsigned_if_nonnegative=True))
    quantizer(torch.rand(1_000))
    refresh_activations([quantizer])
    assert quantizer.fmt.name == "uint4"
    x = torch.rand(300_000)
    x[123_457] = -0.5  # no sample needs to meet it
    quantizer(x)
    refresh_activations([quantizer])
    assert quantizer.fmt.name == "int4"
    assert float(quantizer.scale) == pytest.approx(1 / 7, rel=0.2)


@pytest.mark.parametrize(("low", "expected"), [(-0.5, "int4_full"), (0.0, "uint4")])
def test_calibration_keeps_the_full_range(low: float, expected: str) -> None:
    quantizer = for_input(TensorSpec("int4_full", unsigned_if_nonnegative=True))
    quantizer(torch.tensor([low, 0.0, 3.0]))
    refresh_activations([quantizer])
    assert quantizer.fmt.name == expected


def test_negative_values_under_an_unsigned_format_are_counted() -> None:
    quantizer = for_input(TensorSpec("uint4"))
    x = torch.tensor([-1.0, 1.0, 2.0, 3.0])
    quantizer(x)
    refresh_activations([quantizer])
    assert quantizer.negative_share == 0.25
    assert quantizer(x)[0] == 0
    signed = for_input(TensorSpec("int4"))
    signed(x)
    refresh_activations([signed])
    assert signed.negative_share == 0


def test_integer_inputs_are_left_alone() -> None:
    quantizer, tokens = for_input(ADAPTIVE), torch.arange(5)
    quantizer(torch.randn(9))
    refresh_activations([quantizer])
    assert quantizer(tokens) is tokens
    assert not quantizer.observer.sums.any()


def test_without_observing_nothing_is_added() -> None:
    quantizer = for_input(ADAPTIVE)
    quantizer.observing = False
    quantizer(torch.randn(9))
    assert not quantizer.observer.sums.any()
    assert not quantizer.decide()


@pytest.mark.parametrize("wide", range(8))
def test_every_batch_of_calibration_counts(wide: int) -> None:
    quantizer = for_input(TensorSpec("int8"))
    for number in range(8):
        quantizer(torch.randn(4000) * (4 if number == wide else 1))
        refresh_activations([quantizer], search=True)
    spectrum = statistics_of([quantizer.observer]).spectrum
    assert spectrum is not None
    own = spectrum.mse(quantizer.fmt, quantizer.scale.reshape(1))
    best = spectrum.mse(quantizer.fmt, spectrum.optimal_scale(quantizer.fmt))
    assert own <= 1.06 * best  # what a scale may rest within


def test_frozen_inputs_keep_their_scale() -> None:
    quantizer = for_input(ADAPTIVE)
    quantizer(torch.rand(100))
    refresh_activations([quantizer])
    before = quantizer.state_dict()
    quantizer.frozen = True
    quantizer(100 * torch.rand(100))
    refresh_activations([quantizer])
    for name in ("scale", "running_spectrum", "num_batches"):
        assert torch.equal(quantizer.state_dict()[name], before[name])
    assert float(quantizer.mean_energies()[0]) > 100


def test_inputs_refreshed_together_equal_inputs_refreshed_alone() -> None:
    specs = [ADAPTIVE, ADAPTIVE, TensorSpec("fp8"), TensorSpec("int4", quantizer="minmax")]
    specs += [TensorSpec("int4", quantizer="analytic"), TensorSpec("uint4")]
    together = [for_input(spec) for spec in specs]
    alone = [for_input(spec) for spec in specs]
    for step in range(4):
        for number, pair in enumerate(zip(together, alone, strict=True)):
            x = torch.randn(200) * (1 + number + step)
            for quantizer in pair:
                quantizer(x if number else x.relu())
        refresh_activations(together)
        for quantizer in alone:
            refresh_activations([quantizer])
    for one, other in zip(together, alone, strict=True):
        assert one.fmt == other.fmt
        torch.testing.assert_close(one.scale, other.scale, rtol=1e-5, atol=0)
    assert together[0].fmt.name == "uint4"
    assert together[1].fmt.name == "int4"


def test_bad_values_are_reported_for_the_input_that_held_them() -> None:
    quantizers = [for_input(spec) for spec in (ADAPTIVE, ADAPTIVE, TensorSpec("fp4"))]
    for quantizer in quantizers:
        quantizer(torch.ones(8))
    assert refresh_activations(quantizers).tolist() == [False] * 3
    scales = [quantizer.scale.clone() for quantizer in quantizers]
    quantizers[1](torch.tensor([1.0, torch.nan]))
    assert refresh_activations(quantizers).tolist() == [False, True, False]
    for quantizer, scale in zip(quantizers, scales, strict=True):
        torch.testing.assert_close(quantizer.scale, scale)
    assert refresh_activations([]).shape == (0,)


def test_inputs_are_searched_every_so_many_refreshes() -> None:
    specs = [TensorSpec("int4"), TensorSpec("int4", quantizer="iterative", tolerance=0.0)]
    resting, restless = (for_input(spec) for spec in specs)
    moves: dict[str, list[int]] = {"resting": [], "restless": []}
    for number in range(18):
        # Data that grows by a quarter every time: no scale in force is within the tolerance.
        for name, quantizer in zip(moves, (resting, restless), strict=True):
            before = quantizer.scale.clone()
            quantizer(torch.linspace(-1, 1, 500) * 1.25**number)
            refresh_activations([quantizer])
            moves[name] += [] if torch.equal(quantizer.scale, before) else [number]
    assert moves["restless"] == [*range(18)]
    # The first gave the scale; then searches number 0, 1, 2, 4, 8, 12, 16.
    assert moves["resting"] == [0, 1, 2, 3, 5, 9, 13, 17]


def test_scale_approaches_the_one_of_all_data() -> None:
    quantizer = for_input(TensorSpec("int4"))
    x = torch.randn(40, 500)
    for batch in x:
        quantizer(batch)
        refresh_activations([quantizer])
    error = ErrorOf(x.numpy())
    # The statistic weighs the last batches more; 5 000 of 20 000 values, so to speak. 0.2 dB.
    assert error(quantizer.fmt, float(quantizer.scale)) < 1.05 * error.best(quantizer.fmt)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["laplace", "standard_exponential", "half-normal"])
def test_int8_is_not_clipped_by_what_a_sample_shows(name: str, seed: int) -> None:
    rng, size = np.random.default_rng(seed), 2**20
    x = np.abs(rng.normal(size=size)) if name == "half-normal" else getattr(rng, name)(size=size)
    quantizer = for_input(TensorSpec("int8", unsigned_if_nonnegative=True))
    for batch in torch.from_numpy(x).float().chunk(8):
        quantizer(batch)
        refresh_activations([quantizer], search=True)
    error = ErrorOf(x)
    best = error.best(quantizer.fmt)
    assert error(quantizer.fmt, float(quantizer.scale)) < 1.1 * best  # 0.4 dB
    if name != "half-normal":  # the sample alone shows enough of that
        alone = EnergySpectrum(quantizer.observer.running_spectrum.unsqueeze(0))
        assert error(quantizer.fmt, float(alone.optimal_scale(quantizer.fmt))) > 1.05 * best


def test_peaks_are_looked_at_where_a_search_comes_next() -> None:
    quantizer = for_input(TensorSpec("int8"))
    sums, looked = quantizer.observer.running_sums, []
    expected = np.zeros(3)
    for number in range(18):
        x = torch.randn(9_000 + number)
        due, before = quantizer.is_due, sums.clone()
        quantizer(x)
        refresh_activations([quantizer])
        assert torch.equal(InputSums(sums).peaks, InputSums(before).peaks) == (not due)
        if due:
            looked.append(number)
            reach = np.array([x.max(), -x.min(), len(x)])
            weight = 1.0 if len(looked) == 1 else max(0.1, 1 / (number + 1))
            expected += weight * (reach - expected)
            np.testing.assert_allclose(InputSums(sums).peaks.numpy(), expected, rtol=1e-5)
    assert looked == [0, 1, 2, 3, 5, 9, 13, 17]


@pytest.mark.parametrize(
    "spec", [TensorSpec("int6"), TensorSpec("fp8"), TensorSpec("int8", quantizer="lsq")], ids=str
)
def test_nobody_looks_at_peaks_that_no_rule_reads(spec: TensorSpec) -> None:
    quantizer = for_input(spec)
    quantizer(torch.randn(9_000))
    refresh_activations([quantizer])
    assert InputSums(quantizer.observer.running_sums).peaked == 0


def test_an_int8_input_that_is_seen_whole_keeps_its_own_tail() -> None:
    quantizer, batches = for_input(TensorSpec("int8")), []
    for number in range(16):  # one value in 16 384 lies far beyond a hard edge
        batches.append(torch.rand(2048) * 2 - 1)
        batches[-1][5] = 3.0 if number % 8 == 0 else 0.0
        quantizer(batches[-1])
        refresh_activations([quantizer], search=True)
    error = ErrorOf(torch.cat(batches).numpy())
    assert error(quantizer.fmt, float(quantizer.scale)) < 1.05 * error.best(quantizer.fmt)


def test_a_compiled_int8_input_gets_the_scales_of_an_eager_one() -> None:
    eager, other = (for_input(TensorSpec("int8")) for _ in range(2))
    compiled = torch.compile(lambda x: other(x), backend="eager")
    for number in range(12):
        x = torch.distributions.Laplace(0.0, 2 ** (number / 10)).sample((1 << 18,))
        eager(x)
        compiled(x)
        for quantizer in (eager, other):
            refresh_activations([quantizer])
        assert torch.equal(other.scale, eager.scale), number


def test_where_tensors_are_made_by_default_does_not_matter() -> None:
    quantizer, x = for_input(TensorSpec("int8")), torch.randn(9_137)  # of a size of its own
    with torch.device("meta"):
        quantizer(x)
    refresh_activations([quantizer])
    assert quantizer.ready


# State


@pytest.mark.parametrize("spec", [ADAPTIVE, TensorSpec("fp8"), TensorSpec("int4", None, "minmax")])
def test_input_state_round_trip_continues_identically(spec: TensorSpec) -> None:
    first = for_input(spec)
    for _ in range(3):
        first(torch.rand(100))
        refresh_activations([first])
    first(torch.rand(5))  # what this step has added so far is no state
    state = copy.deepcopy(first.state_dict())
    second = for_input(spec)
    second(torch.rand(7))
    second.load_state_dict(state)
    first.observer.reset_accumulators()
    x = torch.rand(100)
    for quantizer in (first, second):
        quantizer(x)
        refresh_activations([quantizer])
    assert second.fmt == first.fmt
    assert all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


def test_statistics_of_another_size_are_refused_and_nothing_is_loaded() -> None:
    first, second = for_input(ADAPTIVE), for_input(ADAPTIVE)
    first(torch.rand(100))
    refresh_activations([first])
    state = first.state_dict()
    state["running_spectrum"] = state["running_spectrum"][:4096]
    before = copy.deepcopy(second.state_dict())
    expected = r"fc/input: the saved running_spectrum has shape \(4096,\); expected \(5120,\)\..*"
    with pytest.raises(ValueError, match=expected + "calibrate again"):
        second.load_state_dict(state)
    for name, value in second.state_dict().items():
        other = before[name]
        same = torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
        assert same, name


def test_state_is_a_copy() -> None:
    weight = torch.randn(3, 4)
    quantizer = for_weight(TensorSpec("int4"), weight)
    state = quantizer.state_dict()
    scale = state["scale"].clone()
    quantizer.scale.mul_(2)
    assert torch.equal(state["scale"], scale)
    fresh = WeightFakeQuantizer("fc", TensorSpec("int4"), weight)
    fresh.load_state_dict(state)
    assert torch.equal(fresh.scale, scale)
    assert fresh.ready
    assert fresh.num_refreshes == 1


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (torch.nn.Linear(3, 2), r"linear\(\): argument 'input' .* must be Tensor, not list"),
        (torch.nn.Conv1d(3, 2, 1), r"conv1d\(\) received an invalid combination .*\(list, "),
    ],
)
def test_torch_itself_complains_about_a_list(layer: torch.nn.Module, message: str) -> None:
    given: Any = [torch.randn(4, 3)]
    with pytest.raises(TypeError, match=message):  # without quantizers
        layer(given)
    model = torch.nn.Sequential(layer)
    prepare(model, "int4", "int4", first_last_bits=None)
    set_observing(model, True)
    with pytest.raises(TypeError, match=message):
        model(given)


def test_what_is_no_float_tensor_passes_untouched() -> None:
    quantizer = for_input(TensorSpec("int4"))
    quantizer(torch.randn(8))
    refresh_activations([quantizer])
    assert quantizer.ready
    for given in ([torch.randn(2)], torch.arange(3), None):
        assert quantizer(given) is given  # type: ignore[arg-type]
