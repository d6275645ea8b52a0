"""Running statistics of inputs: every figure is computed again in numpy."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from statqat_lightning.error_analysis import EnergySpectrum
from statqat_lightning.fake_quant.input_sums import InputSums
from statqat_lightning.fake_quant.observers import (
    InputObserver,
    ObserverConfig,
    Reduce,
    add_up,
    statistics_of,
    update_running,
)
from statqat_lightning.formats import get_format
from statqat_lightning.numerics.qparams import QParams
from statqat_lightning.numerics.straight_through import fake_quantize

BAD = [math.nan, math.inf, -math.inf]


def spectral(**config: float) -> InputObserver:
    return InputObserver(ObserverConfig(**config), needs_spectrum=True, needs_range=False)  # type: ignore[arg-type]


def ranged(**config: float) -> InputObserver:
    return InputObserver(ObserverConfig(**config), needs_spectrum=False, needs_range=True)  # type: ignore[arg-type]


def averaged(momentum: float = 0.01) -> InputObserver:
    return InputObserver(ObserverConfig(), False, needs_range=True, range_momentum=momentum)


def add(observer: InputObserver, x: Tensor, quantized: bool = False) -> None:
    scale = torch.tensor(0.1) if quantized else None
    observer.add(x, get_format("int4"), scale, statistics=True)


def test_sums_of_one_step_by_numpy() -> None:
    observer, x, y = spectral(), torch.randn(30, 4), torch.randn(7)
    add(observer, x, quantized=True)
    add(observer, y)
    add_up([observer])
    assert not observer.pending
    q = np.clip(np.rint(x.double().numpy() / 0.1), -7, 7) * 0.1
    expected = {
        "count": 127,
        "signal": np.sum(x.double().numpy() ** 2),
        "noise": np.sum((q - x.double().numpy()) ** 2),
        "quantized": 120,
        "negative": 0,
        "nonfinite": 0,
        "peaked": 0,
    }
    sums = InputSums(observer.sums)
    found = {name: getattr(sums, name).item() for name in expected}
    assert found == pytest.approx(expected, rel=1e-5)
    assert sums.peaks.tolist() == [0, 0, 0]


def test_running_spectrum_is_the_mean_over_all_values_of_a_batch() -> None:
    observer = spectral()
    x = torch.randn(50, 6)
    for part in torch.split(x, 20):  # a layer used three times in one step
        add(observer, part)
    assert not update_running([observer], statistics=True).any()
    expected = EnergySpectrum.of(x.flatten())
    torch.testing.assert_close(observer.running_spectrum, expected.energy[0])
    assert observer.num_batches == 1
    assert observer.spectrum.count_nonzero() == observer.sums.count_nonzero() == 0


@pytest.mark.parametrize("momentum", [0.1, 0.3, 1.0])
def test_weights_of_batches(momentum: float) -> None:
    spectra, extremes = spectral(momentum=momentum), ranged(momentum=momentum)
    power, low, high = 0.0, math.inf, -math.inf
    rng = np.random.default_rng(0)
    for number in range(25):
        x = torch.from_numpy(rng.normal(size=100) * (1 + number)).float()
        for observer in (spectra, extremes):
            add(observer, x)
        update_running([spectra, extremes], statistics=True)
        weight = max(1 / (number + 1), momentum)
        power += weight * (float(x.double().square().mean()) - power)
        low, high = min(low, float(x.min())), max(high, float(x.max()))
        assert spectra.num_batches == extremes.num_batches == number + 1
    statistics = statistics_of([spectra])
    assert statistics.spectrum is not None
    assert statistics.spectrum.power.item() == pytest.approx(power, rel=1e-4)
    statistics = statistics_of([extremes])
    assert statistics.low is not None
    assert statistics.high is not None
    assert statistics.low.item() == low
    assert statistics.high.item() == high


@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated:DeprecationWarning")
def test_averaged_range_is_that_of_torch_ao() -> None:
    peer = torch.ao.quantization.MovingAverageMinMaxObserver(averaging_constant=0.03)
    observers = [averaged(0.03), ranged(), averaged(0.5)]  # folded together, each by its own rule
    for number in range(12):
        x = torch.randn(200) * (1 + number) - 2
        peer(x)
        for observer in observers:
            add(observer, x)
        update_running(observers, statistics=True)
    for observer, equal in zip(observers, (True, False, False), strict=True):
        expected = torch.stack([-peer.min_val, peer.max_val])
        assert torch.allclose(observer.running_extremes, expected, rtol=1e-5) == equal


def test_snr_starts_at_the_first_quantized_batch() -> None:
    observer, x = spectral(), torch.randn(200)
    for _ in range(5):
        add(observer, x)
        update_running([observer], statistics=True)
    sums = InputSums(observer.running_sums)
    assert [sums.signal, sums.noise, sums.quantized] == [0, 0, 0]
    add(observer, x, quantized=True)
    update_running([observer], statistics=True)
    error = fake_quantize(x, QParams(torch.tensor(0.1)), get_format("int4")) - x
    assert InputSums(observer.running_sums).signal.item() == pytest.approx(
        x.square().mean().item(), rel=1e-5
    )
    expected = error.square().mean().item()
    assert InputSums(observer.running_sums).noise.item() == pytest.approx(expected, rel=1e-5)
    assert InputSums(observer.running_sums).quantized == 1
    # The next batch counts a seventh: it is the seventh that was folded in.
    add(observer, 2 * x, quantized=True)
    update_running([observer], statistics=True)
    expected = x.square().mean().item() * (1 + 3 / 7)
    assert InputSums(observer.running_sums).signal.item() == pytest.approx(expected, rel=1e-5)


def test_share_of_negative_values() -> None:
    observer = spectral()
    x = torch.tensor([-1.0, -0.0, 0.0, 3.0, -1e-30])
    for scale in (None, torch.tensor(0.1)):  # passed on as it is, or quantized
        observer.add(x, get_format("uint4"), scale, statistics=True)
        update_running([observer], statistics=True)
        assert InputSums(observer.running_sums).negative.item() == pytest.approx(2 / 5)
    observer = spectral()
    add(observer, x)  # a signed format loses nothing of them
    update_running([observer], statistics=True)
    assert InputSums(observer.running_sums).negative == 0


def test_peaks_are_those_of_all_values_and_averaged() -> None:
    observer, fmt = spectral(max_observed=256), get_format("int8")
    large, small, whole = torch.randn(5000), torch.rand(3000), torch.full((200,), 9.0)
    for x in (large, small, whole):  # a layer used often in one step; the last is no sample
        observer.add(x, fmt, None, statistics=True, peaks=True)
    update_running([observer], statistics=True)
    reaches = np.array([[large.max(), -large.min(), 5000], [small.max(), 0, 3000]])
    expected = reaches.mean(0)  # as many values were observed of each
    found = statistics_of([observer]).peaks
    assert found is not None
    np.testing.assert_allclose(found[0].numpy(), expected, rtol=1e-6)
    observer.add(torch.ones(200), fmt, None, statistics=True)
    update_running([observer], statistics=True)
    np.testing.assert_allclose(InputSums(observer.running_sums).peaks.numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("bad", BAD)
def test_peaks_of_a_bad_batch_do_not_count(bad: float) -> None:
    observer, fmt, x = spectral(max_observed=256), get_format("int8"), torch.randn(5000)
    observer.add(x, fmt, None, statistics=True, peaks=True)
    update_running([observer], statistics=True)
    before = [part.clone() for part in InputSums(observer.running_sums).parts[1]]
    harmed = x.clone()
    harmed[4999] = bad  # no sample shows it
    observer.add(harmed, fmt, None, statistics=True, peaks=True)
    assert update_running([observer], statistics=True).tolist() == [True]
    after = InputSums(observer.running_sums).parts[1]
    assert before[0].sum() > 5000
    assert all(map(torch.equal, after, before))


def test_many_samples_do_not_pile_up() -> None:
    observer, copied = spectral(), spectral()
    parts = torch.randn(50, 30).unbind()
    for part in parts:  # micro-batches
        add(observer, part, quantized=True)
        assert len(observer.pending) < 8
        add(copied, part, quantized=True)
        add_up([copied])
    add_up([observer])
    assert InputSums(observer.sums).count == 1500
    torch.testing.assert_close(observer.sums, copied.sums)
    torch.testing.assert_close(observer.spectrum, copied.spectrum)


def test_samples_of_different_layers_stay_apart() -> None:
    together, alone = [spectral() for _ in range(6)], [spectral() for _ in range(6)]
    formats = [get_format(name) for name in ("int4", "uint4", "fp4")]
    for i, (one, other) in enumerate(zip(together, alone, strict=True)):
        for size in (100, 60):  # two uses in one step
            x = torch.randn(size) * (i + 1)
            for observer in (one, other):
                observer.add(x, formats[i % 3], torch.tensor(0.1 * (i + 1)), statistics=True)
        add_up([other])
    add_up(together)
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one.sums, other.sums)
        torch.testing.assert_close(one.spectrum, other.spectrum)


@pytest.mark.parametrize("make", [spectral, ranged, averaged])
@pytest.mark.parametrize("bad", BAD)
def test_a_bad_value_is_reported_and_leaves_statistics_unharmed(
    make: Callable[..., InputObserver], bad: float
) -> None:
    observer = make()
    clean = torch.randn(300, generator=torch.Generator().manual_seed(0))
    add(observer, clean, quantized=True)
    assert update_running([observer], statistics=True).tolist() == [False]
    before = {name: getattr(observer, name).clone() for name in observer.RUNNING}
    harmed = clean.clone()
    harmed[17] = bad
    add(observer, harmed, quantized=True)
    assert update_running([observer], statistics=True).tolist() == [True]
    for name in observer.RUNNING:
        assert getattr(observer, name).isfinite().all()
    for name in ("running_spectrum", "running_extremes", "running_sums"):
        # One of 300 values is missing in the spectrum of a batch that counts a half.
        torch.testing.assert_close(
            getattr(observer, name).sum(), before[name].sum(), rtol=0.03, atol=0
        )
    add(observer, clean, quantized=True)
    assert update_running([observer], statistics=True).tolist() == [False]


@pytest.mark.parametrize("make", [spectral, ranged, averaged])
def test_a_first_batch_of_nothing_finite_does_not_count(make: Callable[..., InputObserver]) -> None:
    observer = make()
    add(observer, torch.full((10,), torch.nan))
    assert update_running([observer], statistics=True).tolist() == [True]
    assert observer.num_batches == 0
    add(observer, torch.ones(10))
    update_running([observer], statistics=True)
    statistics = statistics_of([observer])
    if statistics.spectrum is not None:
        assert statistics.spectrum.power.item() == pytest.approx(1)
    else:
        assert statistics.high is not None
        assert statistics.high.item() == 1


@pytest.mark.parametrize("make", [spectral, ranged, averaged])
def test_no_input_no_news(make: Callable[..., InputObserver]) -> None:
    observer, idle = make(), make()
    for _ in range(3):
        add(observer, torch.randn(40), quantized=True)
        add(observer, torch.empty(0, 4), quantized=True)
        update_running([observer, idle], statistics=True)
    before = {name: getattr(observer, name).clone() for name in observer.RUNNING}
    assert not update_running([observer, idle], statistics=True).any()
    assert all(torch.equal(getattr(observer, name), before[name]) for name in observer.RUNNING)
    assert idle.num_batches == 0
    assert all(getattr(idle, name).count_nonzero() == 0 for name in idle.RUNNING)


@pytest.mark.parametrize("make", [spectral, ranged, averaged])
def test_frozen_statistics_stay_and_the_snr_goes_on(make: Callable[..., InputObserver]) -> None:
    observer = make()
    add(observer, torch.randn(100), quantized=True)
    update_running([observer], statistics=True)
    before = {name: getattr(observer, name).clone() for name in observer.RUNNING}
    observer.add(torch.full((9,), 5.0), get_format("int4"), torch.tensor(0.1), statistics=False)
    update_running([observer], statistics=False)
    for name in ("running_spectrum", "running_extremes", "num_batches"):
        assert torch.equal(getattr(observer, name), before[name])
    # The second batch counts a half.
    expected = (InputSums(before["running_sums"]).signal.item() + 25) / 2
    assert InputSums(observer.running_sums).signal.item() == pytest.approx(expected)


@pytest.mark.parametrize(
    ("shape", "channels_last"),
    [
        ((64, 768), False),  # 3 divides the row
        ((50, 3, 40, 40), False),
        ((50, 3, 40, 40), True),
        ((8, 64, 56, 56), False),
        ((8, 64, 56, 56), True),
        ((7, 9, 11, 13, 15), False),
        ((40, 1500, 15), False),
    ],
    ids=str,
)
def test_sample_meets_every_index_of_every_dimension(
    shape: tuple[int, ...], channels_last: bool
) -> None:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    for dim, size in enumerate(shape):
        # Each value says its index along `dim`, by a bin of the spectrum of its own.
        index = torch.arange(size)
        marks = 2.0 ** (index // 32 - 30) * (1 + index % 32 / 32)
        x = marks.view([-1 if i == dim else 1 for i in range(len(shape))]).expand(shape)
        observer = spectral(max_observed=16384)
        add(observer, x.contiguous(memory_format=layout))
        add_up([observer])
        assert InputSums(observer.sums).count < x.numel() or x.numel() < 2 * 16384
        update_running([observer], statistics=True)
        # 1 024 runs of 16 values cannot meet 1 500 rows of 15; they miss none of the shorter ones.
        least = size if size <= 1024 else size // 2
        assert observer.running_spectrum.count_nonzero() >= least


def test_sample_has_about_the_wanted_size_and_small_inputs_are_taken_whole() -> None:
    for numel in (255, 256, 257, 10_000, 99_991, 2**17, 30_030 * 4):
        observer = spectral(max_observed=256)
        add(observer, torch.ones(numel))
        add_up([observer])
        taken = int(InputSums(observer.sums).count)
        assert taken == (numel if numel < 272 else 256)


@pytest.mark.parametrize("numel", [2**16, 99_991, 600_000])
def test_places_of_a_sample_move_on_with_every_batch(numel: int) -> None:
    x = torch.arange(numel, dtype=torch.float32)
    observer = spectral(max_observed=4096)
    times = torch.zeros(numel)
    num_batches = 10 * numel // 4096
    for batch in range(num_batches):
        add(observer, x)
        (sample,) = observer.pending
        taken = sample.values.long()
        assert len(taken.unique()) == 4096
        if batch == 20:  # a run that goes on from here takes the same
            copied = spectral(max_observed=4096)
            copied.num_batches.copy_(observer.num_batches)
            add(copied, x)
            assert copied.pending[0].values.equal(sample.values)
        times[taken] += 1
        update_running([observer], statistics=True)
    # The share of a value is that of the places at which a run meets it.
    part = numel // 256
    span = part - 15
    place = torch.arange(part)
    meeting = torch.minimum(place, torch.tensor(span - 1)) - (place - 15).clamp_min(0) + 1
    expected = num_batches / span * meeting.tile(256)
    assert (times[: 256 * part] - expected).abs().max() < 5
    assert times[256 * part :].sum() == 0


def test_range_is_exact_however_small_the_sample() -> None:
    observer = ranged(max_observed=256)
    x = torch.randn(100_000)
    add(observer, x)
    assert observer.extremes.tolist() == [-float(x.min()), float(x.max())]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("make", [spectral, ranged, averaged])
def test_statistics_are_float32_whatever_the_input(
    make: Callable[..., InputObserver], dtype: torch.dtype
) -> None:
    x = torch.randn(64).to(dtype)
    observer, reference = make(), make()
    add(observer, x)
    add(reference, x.float())
    for name in observer.tensors():
        assert getattr(observer, name).dtype == torch.float32
        assert torch.equal(getattr(observer, name), getattr(reference, name))


def test_state_is_float32_under_another_default_dtype_and_device() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            observer = spectral()
    finally:
        torch.set_default_dtype(torch.float32)
    for name in observer.tensors():
        assert getattr(observer, name).dtype == torch.float32
        assert getattr(observer, name).device.type == "cpu"


class TwoRanks:
    """Two ranks in two threads: each reduction waits for the other rank's tensor."""

    def __init__(self) -> None:
        self.barrier = threading.Barrier(2)
        self.tensors: dict[int, Tensor] = {}
        self.num_reductions = 0

    def reduce(self, rank: int) -> Reduce:
        def reduced(tensor: Tensor, how: str) -> Tensor:
            self.tensors[rank] = tensor.clone()
            self.barrier.wait(timeout=20)
            mine, other = self.tensors[rank], self.tensors[1 - rank]
            total = mine + other if how == "sum" else mine.maximum(other)
            self.barrier.wait(timeout=20)
            self.num_reductions += rank == 0
            return total

        return reduced

    def update(self, observers: list[list[InputObserver]]) -> list[Tensor]:
        found: dict[int, Tensor] = {}

        def run(rank: int) -> None:
            found[rank] = update_running(observers[rank], True, self.reduce(rank))

        threads = [threading.Thread(target=run, args=(rank,)) for rank in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [found[0], found[1]]


@pytest.mark.parametrize("bad", [None, *BAD])
def test_two_ranks_equal_the_pooled_data(bad: float | None) -> None:
    ranks = [[spectral(), ranged()] for _ in range(2)]
    pooled = [spectral(), ranged()]
    for step in range(4):
        x = torch.randn(90) * (step + 1)
        if bad is not None and step == 2:
            x[3] = bad
        for observers, part in ((ranks[0], x[:30]), (ranks[1], x[30:]), (pooled, x)):
            for observer in observers:
                add(observer, part, quantized=step > 0)
        world = TwoRanks()
        overflow = world.update(ranks)
        assert world.num_reductions == 2  # sums, and the range
        expected = update_running(pooled, statistics=True)
        assert torch.equal(overflow[0], overflow[1])
        assert torch.equal(overflow[0], expected)
    if bad is not None:
        # The pooled range of step 2 is unknown; of the ranks, the other one's is known.
        ranks, pooled = [observers[:1] for observers in ranks], pooled[:1]
    for index, whole in enumerate(pooled):
        for name in whole.RUNNING:
            first, second = (getattr(observers[index], name) for observers in ranks)
            assert torch.equal(first, second)
            torch.testing.assert_close(first, getattr(whole, name))


def test_one_reduction_serves_all_layers() -> None:
    calls: list[str] = []

    def reduce(tensor: Tensor, how: str) -> Tensor:
        calls.append(how)
        return tensor

    observers = [spectral() for _ in range(5)]
    update_running(observers, True, reduce)
    assert calls == ["sum"]


@pytest.mark.parametrize("momentum", [0.0, -0.1, 1.1])
def test_momentum_out_of_range(momentum: float) -> None:
    with pytest.raises(ValueError, match=rf"momentum: got {momentum}; expected a number in \(0, 1"):
        ObserverConfig(momentum=momentum)


def test_sample_too_small() -> None:
    with pytest.raises(ValueError, match="max_observed: got 255; expected at least 256"):
        ObserverConfig(max_observed=255)


def test_statistics_do_not_depend_on_the_default_dtype() -> None:
    x = torch.randn(100)
    folded = []
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            observer = InputObserver(ObserverConfig(), needs_spectrum=True, needs_range=True)
            observer.add(x, get_format("int4"), torch.ones((), dtype=torch.float32), True)
            update_running([observer], statistics=True)
        finally:
            torch.set_default_dtype(torch.float32)
        folded.append(observer)
    for name in folded[0].tensors():
        one, other = (getattr(observer, name) for observer in folded)
        assert one.dtype == torch.float32
        assert torch.equal(one, other), name


def test_a_lone_nan_in_data_is_noticed_however_large_the_data() -> None:
    x = torch.rand(2_000_000)
    x[1_234_567] = torch.nan
    observer = spectral()
    add(observer, x)
    assert update_running([observer], statistics=True).tolist() == [True]
    assert observer.running_spectrum.isfinite().all()
    assert observer.num_batches == 1
