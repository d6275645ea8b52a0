"""Granularities: which elements share a scale, spelled out on small tensors."""

from __future__ import annotations

import pytest
import torch

from statqat_lightning.numerics.granularity import (
    Granularity,
    PerBlock,
    PerChannel,
    PerGroup,
    PerTensor,
    get_granularity,
)

X = torch.arange(24.0).view(2, 3, 4)


@pytest.mark.parametrize(
    ("granularity", "rows", "scale_shape"),
    [
        (PerTensor(), [[*range(24)]], ()),
        (PerChannel(), [[*range(12)], [*range(12, 24)]], (2, 1, 1)),
        (
            PerChannel(1),
            [[*range(i, i + 4), *range(i + 12, i + 16)] for i in (0, 4, 8)],
            (1, 3, 1),
        ),
        (PerChannel(-1), [[i + 4 * j for j in range(6)] for i in range(4)], (1, 1, 4)),
        (PerGroup(6), [[*range(i, i + 6)] for i in (0, 6, 12, 18)], (2, 2, 1)),
        (PerBlock(2, 2), [[i, i + 1] for i in range(0, 24, 2)], (2, 3, 2, 1)),
        (PerBlock(4, -1), [[*range(i, i + 4)] for i in range(0, 24, 4)], (2, 3, 1, 1)),
        (PerBlock(3), [[i, i + 4, i + 8] for j in (0, 12) for i in range(j, j + 4)], (2, 4, 1, 1)),
        (PerBlock(1, 0), [[j + i] for j in range(12) for i in (0, 12)], (3, 4, 2, 1)),
    ],
    ids=str,
)
def test_rows_and_scale_shape(
    granularity: Granularity, rows: list[list[int]], scale_shape: tuple[int, ...]
) -> None:
    assert granularity.rows(X).tolist() == rows
    assert granularity.scale_shape(tuple(X.shape)) == scale_shape
    # The scale multiplies the view, and a row's number is its index in the flattened scale.
    numbers = torch.arange(float(len(rows))).view(scale_shape)
    spread = granularity.restore(torch.zeros_like(granularity.view(X)) + numbers, X.shape)
    assert torch.equal(granularity.restore(granularity.view(X), X.shape), X)
    for number, row in enumerate(granularity.rows(spread)):
        assert row.unique().tolist() == [number]


def test_a_short_last_block_is_filled_with_zeros_and_crosses_no_row() -> None:
    blocks = PerBlock(5, 2)
    assert blocks.rows(X)[:2].tolist() == [[0, 1, 2, 3, 0], [4, 5, 6, 7, 0]]
    assert PerBlock(3, 2).rows(X)[:4].tolist() == [[0, 1, 2], [3, 0, 0], [4, 5, 6], [7, 0, 0]]
    for granularity in (blocks, PerBlock(3, 2), PerBlock(2), PerBlock(32), PerBlock(7, 0)):
        view = granularity.view(X)
        shape = granularity.scale_shape(tuple(X.shape))
        assert (view + torch.zeros(shape)).shape == view.shape
        assert granularity.rows(X).shape == (view[..., 0].numel(), granularity.size)
        assert view[..., :1].shape == shape
        assert torch.equal(granularity.restore(view, tuple(X.shape)), X)


def test_blocks_of_a_convolution_lie_along_its_input_channels() -> None:
    weight = torch.arange(2 * 64 * 3 * 3.0).view(2, 64, 3, 3)
    rows = PerBlock(32).rows(weight)
    assert torch.equal(rows[0], weight[0, :32, 0, 0])
    assert torch.equal(rows[1], weight[0, 32:, 0, 0])
    assert torch.equal(rows[2], weight[0, :32, 0, 1])


def test_rows_of_a_permuted_tensor_follow_its_logical_order() -> None:
    x = X.permute(2, 0, 1)
    for granularity in (PerTensor(), PerChannel(), PerChannel(2), PerGroup(3), PerBlock(2)):
        assert torch.equal(granularity.rows(x), granularity.rows(x.contiguous()))


@pytest.mark.parametrize("granularity", [PerTensor(), PerChannel(3), PerGroup(32)], ids=str)
def test_names_read_back(granularity: Granularity) -> None:
    assert get_granularity(str(granularity), axis=3) == granularity
    assert get_granularity(granularity, axis=1) is granularity


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("per_chanel", "got 'per_chanel'. Did you mean 'per_channel'"),
        ("tensor", "Did you mean 'per_tensor'"),
        ("per_group", "Did you mean 'per_group:32'"),
        ("per_group:x", "Expected per_tensor, per_channel, per_group:SIZE or"),
        ("per_group:0", "PerGroup: got size=0; expected a positive number"),
        ("per_block:0", "PerBlock: got size=0; expected a positive number"),
        ("per_blocks:4", "Did you mean 'per_block:32'"),
        (3, "granularity: got 3. Expected"),
    ],
)
def test_unknown_names(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        get_granularity(name)


@pytest.mark.parametrize("axis", [3, -4])
def test_axis_out_of_range(axis: int) -> None:
    with pytest.raises(ValueError, match=f"got axis={axis}; expected -3 to 2 for a tensor of 3"):
        PerChannel(axis).rows(X)
    with pytest.raises(ValueError, match=f"got axis={axis}"):
        PerChannel(axis).scale_shape((2, 3, 4))
    message = rf"PerBlock: got axis={axis} for a tensor of shape \(2, 3, 4\); expected -3 to 2"
    with pytest.raises(ValueError, match=message):
        PerBlock(2, axis).rows(X)
    with pytest.raises(ValueError, match=message):
        PerBlock(2, axis).scale_shape((2, 3, 4))


def test_group_must_divide_the_row() -> None:
    message = r"got size=5 for rows of 12 elements \(shape \(2, 3, 4\)\); expected a divisor"
    with pytest.raises(ValueError, match=message):
        PerGroup(5).rows(X)
    with pytest.raises(ValueError, match=r"shape \(24,\); expected two dimensions or more"):
        PerGroup(4).scale_shape((24,))


def test_blocks_of_a_weight_lie_along_the_axis_that_is_not_kept() -> None:
    assert get_granularity("per_block:16") == PerBlock(16, 1)
    assert get_granularity("per_block:16", axis=1) == PerBlock(16, 0)
    with pytest.raises(ValueError, match=r"got axis=1 for a tensor of shape \(24,\)"):
        PerBlock(4).scale_shape((24,))
