"""The baseline by hand."""

from __future__ import annotations

import pytest
import torch

from statqat_lightning.formats import get_format
from statqat_lightning.numerics.straight_through import fake_quantize
from statqat_lightning.quantizers import MinMax, Statistics

X = torch.tensor([[-14.0, 3.0, 7.0], [0.5, 1.5, 1.0]])


def test_largest_magnitude_becomes_the_largest_value() -> None:
    scale = MinMax().choose_qparams(X, get_format("int4"), "per_channel").scale
    assert scale.flatten().tolist() == pytest.approx([2.0, 1.5 / 7])
    scale = MinMax().choose_qparams(X, get_format("fp4")).scale
    assert scale.item() == pytest.approx(14 / 6)


def test_unsigned_formats_look_at_positive_values() -> None:
    scale = MinMax().choose_qparams(X, get_format("uint4"), "per_channel").scale
    assert scale.flatten().tolist() == pytest.approx([7 / 15, 0.1])


def test_nothing_is_clipped() -> None:
    x = torch.randn(1000)
    params = MinMax().choose_qparams(x, get_format("int3"))
    error = (fake_quantize(x, params, get_format("int3")) - x).abs().max()
    assert error <= params.scale / 2 * (1 + 1e-6)


def test_running_range() -> None:
    statistics = Statistics(low=torch.tensor([-3.0, 0.0, 0.0]), high=torch.tensor([1.5, 6.0, 0.0]))
    assert MinMax().from_statistics(statistics, get_format("int3")).tolist() == [1.0, 2.0, 1.0]
    expected = pytest.approx([0.5, 2.0, 1.0])
    assert MinMax().from_statistics(statistics, get_format("uint2")).tolist() == expected
    assert statistics.has_negative.tolist() == [True, False, False]
