"""Scales by an error in which elements count by their importance, against brute force."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from statqat_lightning import fake_quantize, get_format
from statqat_lightning.numerics.qparams import QParams
from statqat_lightning.quantizers import ErrorWeights, get_quantizer
from statqat_lightning.quantizers.minmax import MinMax

FORMATS = ("int2", "int3", "int4", "int8", "fp4_e2m1", "fp6_e2m3", "fp8_e4m3", "nf4")
BLOCKS = ("mxfp4", "mxfp6_e2m3", "mxfp8", "nvfp4")


def errors(x: Tensor, x_hat: Tensor, importance: Tensor) -> np.ndarray:
    squares = np.square(x.double().numpy() - x_hat.double().numpy())
    return np.asarray((squares * importance.double().numpy()).sum(1))


def by_brute_force(x: Tensor, name: str, importance: Tensor) -> np.ndarray:
    """The least weighted error of each row, over scales in steps of 0.2 %, in float64."""
    grid = get_format(name).values.double().numpy()
    middles = (grid[1:] + grid[:-1]) / 2
    rows, weights = x.double().numpy(), importance.expand(x.shape).double().numpy()
    peak = np.abs(rows).max(1, keepdims=True) / grid.max()
    least = np.full(len(rows), np.inf)
    for factor in np.geomspace(0.01, 2.5, 2800):
        scale = peak * factor
        codes = grid[np.searchsorted(middles, rows / scale)]
        error = (weights * np.square(codes * scale - rows)).sum(1)
        least = np.minimum(least, error)
    return least


def problem(kind: str, columns: int = 96) -> tuple[Tensor, Tensor]:
    """Rows and the energies of their inputs, which differ by 1, 10 000 or more."""
    torch.manual_seed(3)
    x = torch.randn(12, columns) * torch.rand(12, 1).exp()
    energies = torch.ones(1, columns)
    if kind == "outliers":  # large weights where inputs are large, as in language models
        energies[0, ::16] = 1e4
        x[:, ::16] *= 4
    elif kind == "small weights":
        energies[0, ::4] = 1e3
        x[:, ::4] *= 0.2
    elif kind == "each row":
        energies = torch.randn(12, columns).exp().square()
    elif kind == "dead":
        energies[0, : columns // 2] = 0
    return x, energies


@pytest.mark.parametrize("rule", ["analytic", "iterative"])
@pytest.mark.parametrize("kind", ["outliers", "small weights", "each row"])
@pytest.mark.parametrize("name", FORMATS)
def test_scales_have_the_least_weighted_error(name: str, kind: str, rule: str) -> None:
    x, energies = problem(kind)
    fmt = get_format(name)
    scale = get_quantizer(rule).from_weighted_rows(x, fmt, ErrorWeights(energies))
    found = errors(x, fmt.round(x / scale[:, None]) * scale[:, None], energies)
    least = by_brute_force(x, name, energies)
    # Where 6 of 96 elements carry the error, it ripples as that of so short a row.
    worst, most = (1.5, 1.12) if rule == "analytic" else (1.01, 1.01)
    if name == "int8":  # finer ripples than either looks for
        worst, most = 1.8, max(most, 1.2)
    assert (found <= worst * least).all()
    assert found.sum() <= most * least.sum()
    # On no row worse than min-max, and well below what equal weights give.
    for other, most in ((MinMax(), 1 + 1e-6), (get_quantizer("analytic"), 1.0 + 1e-3)):
        scale = other.from_rows(x, fmt)
        theirs = errors(x, fmt.round(x / scale[:, None]) * scale[:, None], energies)
        if isinstance(other, MinMax):
            assert (found <= most * theirs).all()
        assert found.sum() <= most * theirs.sum()


@pytest.mark.parametrize("rule", ["analytic", "iterative"])
@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("name", FORMATS)
def test_errors_that_add_up_under_inputs_of_one_sign_count_as_they_do(
    name: str, parts: int, rule: str
) -> None:
    """Inputs with means, as after a ReLU: against brute force in float64."""
    x, variance = problem("outliers")
    torch.manual_seed(4)
    mean = torch.rand(1, 96) * variance.sqrt()
    fmt, quantizer = get_format(name), get_quantizer(rule)
    grid = fmt.values.double().numpy()
    middles = (grid[1:] + grid[:-1]) / 2
    rows, v, m = x.double().numpy(), variance.double().numpy(), mean.double().numpy()

    def of_output(error: np.ndarray) -> np.ndarray:
        sums = (error * m).reshape(len(error), parts, -1).sum(2)
        return np.asarray((v * np.square(error)).sum(1) + np.square(sums).sum(1))

    peak = np.abs(rows).max(1, keepdims=True) / grid.max()
    least = np.full(len(rows), np.inf)
    for factor in np.geomspace(0.01, 1.5, 4000):
        codes = grid[np.searchsorted(middles, rows / (peak * factor))]
        least = np.minimum(least, of_output(codes * peak * factor - rows))
    weights = ErrorWeights(variance, mean, parts)
    found = {}
    for kind, scale in (
        ("of output", quantizer.from_weighted_rows(x, fmt, weights)),
        ("of weight", quantizer.from_rows(x, fmt)),
        ("min-max", MinMax().from_rows(x, fmt)),
    ):
        found[kind] = of_output((fmt.round(x / scale[:, None]) * scale[:, None]).numpy() - rows)
    assert (found["of output"] <= found["min-max"] * (1 + 1e-5)).all()
    assert found["of output"].sum() <= (0.7 if fmt.bits < 8 else 0.9) * found["of weight"].sum()
    # Its error has a kink wherever one of the values moves to another level, and sums of few large
    # ones meet zero in between: the least of 4000 scales is far from the next.
    assert np.median(found["of output"] / least) <= (1.3 if rule == "analytic" else 1.01)


@pytest.mark.parametrize("columns", [96, 576])
@pytest.mark.parametrize("name", FORMATS)
def test_sums_of_errors_are_near_their_least_after_a_relu(name: str, columns: int) -> None:
    """Means are most of the energy there, and a step to nearest codes can make sums larger."""
    torch.manual_seed(0)
    x, mean = torch.randn(32, columns), 4 * torch.rand(1, columns)
    fmt = get_format(name)
    grid = fmt.values.double().numpy()
    rows, m = x.double().numpy(), mean.double().numpy()

    def of_output(error: np.ndarray) -> np.ndarray:
        return np.asarray(np.square(error).sum(1) + np.square((error * m).sum(1)))

    peak = np.abs(rows).max(1, keepdims=True) / grid.max()
    middles = (grid[1:] + grid[:-1]) / 2
    least = np.full(len(rows), np.inf)
    for factor in np.geomspace(0.2, 1.5, 1500):
        codes = grid[np.searchsorted(middles, rows / (peak * factor))]
        least = np.minimum(least, of_output(codes * peak * factor - rows))
    weights = ErrorWeights(torch.ones(1, columns), mean)
    scale = get_quantizer("analytic").from_weighted_rows(x, fmt, weights)
    found = of_output((fmt.round(x / scale[:, None]) * scale[:, None]).double().numpy() - rows)
    assert found.sum() <= 1.3 * least.sum()


@pytest.mark.parametrize("name", BLOCKS)
def test_blocks_have_the_least_weighted_error_of_what_they_can_store(name: str) -> None:
    x, energies = problem("outliers", 128)
    fmt, quantizer = get_format(name), get_quantizer("block")
    weighted = quantizer.choose_qparams(x, fmt, variance=energies[0])
    plain = quantizer.choose_qparams(x, fmt)
    specified = get_quantizer("block", rule="max").choose_qparams(x, fmt)
    found, *others = (
        errors(x, fake_quantize(x, qparams, fmt), energies).sum()
        for qparams in (weighted, plain, specified)
    )
    assert all(found < other if fmt.bits == 4 else found <= other for other in others)
    stored = {*plain.scale.flatten().tolist(), *specified.scale.flatten().tolist()}
    assert len({*weighted.scale.flatten().tolist()} - stored) <= weighted.scale.numel() // 2


@pytest.mark.parametrize("prior", ["normal", "auto"])
@pytest.mark.parametrize("refine", [False, True])
def test_equal_importances_are_none(prior: str, refine: bool) -> None:
    x, _ = problem("plain")
    quantizer, fmt = get_quantizer("analytic", prior=prior, refine=refine), get_format("int4")
    plain = quantizer.from_rows(x, fmt)
    for importance in (torch.ones(1, 96), torch.full((12, 96), 1e-42), torch.zeros(1, 96)):
        scale = quantizer.from_weighted_rows(x, fmt, ErrorWeights(importance))
        assert torch.allclose(scale, plain, rtol=1e-5)


@pytest.mark.parametrize("quantizer", ["analytic", "iterative", "block"])
def test_only_ratios_of_importances_matter(quantizer: str) -> None:
    x, energies = problem("outliers")
    fmt = get_format("mxfp4" if quantizer == "block" else "int4")
    rows = x.view(-1, 32) if quantizer == "block" else x
    energies = energies.expand(x.shape).reshape(-1, 32) if quantizer == "block" else energies
    rule = get_quantizer(quantizer)
    scale = rule.from_weighted_rows(rows, fmt, ErrorWeights(energies))
    for factor in (2.0**-100, 2.0**80):
        assert torch.equal(
            rule.from_weighted_rows(rows, fmt, ErrorWeights(energies * factor)), scale
        )


def test_channels_without_energy_still_count_a_little() -> None:
    """A weight whose input is zero in the sample is not clipped to nothing."""
    x, energies = problem("dead")
    x[:, 0] = 40.0
    fmt = get_format("int8")
    scale = get_quantizer("analytic").from_weighted_rows(x, fmt, ErrorWeights(energies))
    assert (fmt.round(x / scale[:, None]) * scale[:, None])[:, 0].min() > 5


@pytest.mark.parametrize("rule", ["analytic", "iterative"])
def test_a_scale_in_force_rests_by_its_weighted_error(rule: str) -> None:
    x, energies = problem("outliers")
    fmt, quantizer = get_format("int4"), get_quantizer(rule)
    best = quantizer.from_weighted_rows(x, fmt, ErrorWeights(energies))
    assert torch.equal(quantizer.from_weighted_rows(x, fmt, ErrorWeights(energies), best), best)
    plain = quantizer.from_rows(x, fmt)
    moved = quantizer.from_weighted_rows(x, fmt, ErrorWeights(energies), plain)
    assert (moved != plain).sum() > 8


@pytest.mark.parametrize(
    ("granularity", "transposed"),
    [
        *(("per_channel", transposed) for transposed in (False, True)),
        *(("per_tensor", transposed) for transposed in (False, True)),
        ("per_group:32", False),  # groups run along the last axes of `(out, in)`
    ],
)
def test_the_output_of_a_layer_is_nearer(granularity: str, transposed: bool) -> None:
    """What it is for: convolutions and linear layers of inputs whose channels differ."""
    torch.manual_seed(5)
    spread = torch.randn(64).mul(1.5).exp()
    x = torch.randn(500, 64) * spread
    weight = torch.distributions.StudentT(4.0).sample((48, 64)) * 0.1
    energy = x[:250].square().mean(0)
    fmt, quantizer = get_format("int3"), get_quantizer("analytic")
    axis = 0 if granularity == "per_channel" else None
    if transposed:  # the weight as `(in, out)`
        importance, shown = energy.view(64, 1), weight.T.contiguous()
        axis = None if axis is None else 1
    else:
        importance, shown = energy, weight
    noise = []
    for given in (importance, None):
        name = None if axis is not None else granularity
        qparams: QParams = quantizer.choose_qparams(shown, fmt, name, axis, variance=given)
        w_hat = fake_quantize(shown, qparams, fmt)
        w_hat = w_hat.T if transposed else w_hat
        noise.append((x[250:] @ (w_hat - weight).T).square().mean().item())
    assert noise[0] < 0.97 * noise[1]


def test_bad_importances_are_refused() -> None:
    x, fmt = torch.randn(4, 8), get_format("int4")
    choose = get_quantizer("analytic").choose_qparams
    with pytest.raises(ValueError, match=r"variance of shape \(4,\); expected .* \(4, 8\)"):
        choose(x, fmt, variance=torch.ones(4))
    for value in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="negative, NaN or infinite values of the variance"):
            choose(x, fmt, variance=torch.full((8,), value))
    with pytest.raises(ValueError, match=r"'minmax' weighs all errors alike; expected one of anal"):
        get_quantizer("minmax").choose_qparams(x, fmt, variance=torch.ones(8))
    with pytest.raises(ValueError, match="zero_point=True and a variance"):
        get_quantizer("iterative").choose_qparams(x, fmt, zero_point=True, variance=torch.ones(8))
