"""The analytic quantizer: constants of the theory, the cap, and never worse than min-max."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from statqat_lightning.formats import Format, get_format
from statqat_lightning.quantizers import Analytic, MinMax
from tests.reference import ALL_FORMATS, ErrorOf

INT4 = get_format("int4")

# Best scale of a unit-variance normal or Laplace variable, by numerical integration.
NORMAL = {"int2": 1.224006, "int3": 0.650770, "int4": 0.353411, "fp4_e2m1": 0.487079}
LAPLACE = {"int2": 1.414214, "int3": 0.821753, "int4": 0.486885, "fp4_e2m1": 0.691141}

WEIGHTS = {
    "normal": torch.randn(8, 200, generator=torch.Generator().manual_seed(0)),
    "laplace": torch.from_numpy(np.random.default_rng(0).laplace(size=(8, 200))).float(),
    "student": torch.from_numpy(np.random.default_rng(0).standard_t(3, size=(8, 200))).float(),
    "uniform": torch.rand(8, 200, generator=torch.Generator().manual_seed(0)) * 2 - 1,
    "few": torch.randn(8, 9, generator=torch.Generator().manual_seed(0)),
    "outlier": torch.cat([torch.full((8, 1), 50.0), torch.randn(8, 100)], 1),
    "constant": torch.full((8, 5), -0.3),
}


def errors(rows: Tensor, scales: Tensor, fmt: Format) -> list[float]:
    return [ErrorOf(row.numpy())(fmt, float(s)) for row, s in zip(rows, scales, strict=True)]


@pytest.mark.parametrize(("prior", "constants"), [("normal", NORMAL), ("laplace", LAPLACE)])
@pytest.mark.parametrize("name", NORMAL)
def test_closed_form_is_the_constant_times_the_rms(
    prior: str, constants: dict[str, float], name: str
) -> None:
    x = torch.randn(100_000) * 0.07
    got = Analytic(prior, refine=False).choose_qparams(x, get_format(name)).scale.item()
    rms = float(np.sqrt(np.mean(x.double().numpy() ** 2)))
    assert got == pytest.approx(constants[name] * rms, rel=1e-4)


def test_closed_form_never_clips_beyond_the_data() -> None:
    x = torch.tensor([[1.0, -1.0, 1.0, -1.0], [0.5, 0.25, -1.0, 0.1]])
    got = Analytic(refine=False).choose_qparams(x, get_format("int8"), "per_channel").scale
    assert got.flatten().tolist() == pytest.approx([1 / 127, 1 / 127])


@pytest.mark.parametrize("data", WEIGHTS)
@pytest.mark.parametrize("fmt", ALL_FORMATS, ids=str)
def test_never_worse_than_minmax_on_any_row(fmt: Format, data: str) -> None:
    rows = WEIGHTS[data]
    analytic = errors(rows, Analytic().from_rows(rows, fmt), fmt)
    minmax = errors(rows, MinMax().from_rows(rows, fmt), fmt)
    for ours, baseline, row in zip(analytic, minmax, rows, strict=True):
        # float32 decides between candidates; what it cannot tell apart is 1e-6 of the error, and
        # 1e-12 of the energy where the error is zero.
        assert ours <= baseline * (1 + 1e-6) + 1e-12 * float(row.square().mean())


@pytest.mark.parametrize("name", ["int2", "int3", "int4", "fp4_e2m1"])
@pytest.mark.parametrize("data", ["normal", "laplace"])
def test_refined_scale_is_near_the_best_one(name: str, data: str) -> None:
    fmt, rows = get_format(name), WEIGHTS[data]
    got = np.mean(errors(rows, Analytic().from_rows(rows, fmt), fmt))
    best = np.mean([ErrorOf(row.numpy()).best(fmt) for row in rows])
    # Rows of 200 values have ripples that one fixed-point step does not see: 0.8 dB.
    assert got < best * 1.2


def test_unsigned_formats_look_at_the_side_they_represent() -> None:
    rows = torch.tensor([[-50.0, 1.0, 2.0, 3.0, 0.4]])
    fmt = get_format("uint4")
    got = Analytic().from_rows(rows, fmt)
    assert errors(rows, got, fmt) <= errors(rows, MinMax().from_rows(rows, fmt), fmt)
    assert got.item() == pytest.approx(0.2, rel=0.05)


@given(st.sampled_from(ALL_FORMATS), st.floats(0.3, 3.0))
def test_a_scale_in_force_is_kept_unless_something_is_better(fmt: Format, factor: float) -> None:
    rows = WEIGHTS["laplace"]
    warm = factor * MinMax().from_rows(rows, fmt)
    got = errors(rows, Analytic().from_rows(rows, fmt, warm), fmt)
    for ours, before in zip(got, errors(rows, warm, fmt), strict=True):
        assert ours <= before * (1 + 1e-6) + 1e-12


def test_tracking_follows_a_moving_weight() -> None:
    rows = WEIGHTS["normal"].clone()
    quantizer = Analytic()
    scale = quantizer.from_rows(rows, INT4)
    step = torch.Generator().manual_seed(1)
    for _ in range(16):
        rows += 0.01 * torch.randn(rows.shape, generator=step)
        before = errors(rows, scale, INT4)
        scale = quantizer.track(rows, INT4, scale)
        after = errors(rows, scale, INT4)
        assert all(a <= b * (1 + 1e-6) for a, b in zip(after, before, strict=True))
    fresh = np.mean(errors(rows, quantizer.from_rows(rows, INT4), INT4))
    assert np.mean(errors(rows, scale, INT4)) < fresh * 1.1  # 0.4 dB


@pytest.mark.parametrize("name", ["int4", "int8", "fp4", "fp8"])
def test_tracking_is_never_worse_than_minmax_or_standing_still(name: str) -> None:
    fmt, step = get_format(name), torch.Generator().manual_seed(2)
    rows = 0.05 * torch.randn(64, 144, generator=step)
    quantizer = Analytic()
    scale = quantizer.from_rows(rows, fmt)
    for _ in range(15):
        rows += 0.01 * 0.05 * torch.randn(rows.shape, generator=step)
        baselines = (scale, MinMax().from_rows(rows, fmt))
        scale = quantizer.track(rows, fmt, scale)
        ours = errors(rows, scale, fmt)
        for baseline in baselines:
            theirs = errors(rows, baseline, fmt)
            assert all(a <= b * (1 + 1e-6) for a, b in zip(ours, theirs, strict=True))


def test_tracking_without_refinement_is_the_closed_form() -> None:
    rows = WEIGHTS["normal"]
    quantizer = Analytic(refine=False)
    warm = torch.full((8,), 123.0)
    assert torch.equal(quantizer.track(rows, INT4, warm), quantizer.from_rows(rows, INT4))
