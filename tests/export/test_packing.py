from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from statqat_lightning.export.files.packing import pack, packed_size, unpack


def bit_string(codes: list[int], bits: int) -> list[int]:
    """The layout in so many words: one long number, first code lowest, cut into bytes."""
    number = sum(code << (bits * i) for i, code in enumerate(codes))
    return list(number.to_bytes((len(codes) * bits + 7) // 8, "little"))


@given(st.integers(1, 8), st.integers(0, 40), st.randoms(use_true_random=False))
def test_pack_writes_one_long_number(bits: int, count: int, random: object) -> None:
    codes = [random.randrange(2**bits) for _ in range(count)]  # type: ignore[attr-defined]
    packed = pack(torch.tensor(codes, dtype=torch.uint8), bits)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == bit_string(codes, bits)
    assert packed.numel() == packed_size(count, bits)
    assert unpack(packed, bits, count).tolist() == codes


def test_every_code_of_every_width_survives_in_any_shape() -> None:
    for bits in range(1, 9):
        codes = torch.arange(2**bits, dtype=torch.uint8).repeat(3).view(3, -1).t()
        again = unpack(pack(codes, bits), bits, codes.numel()).view(codes.shape)
        assert torch.equal(again, codes)


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="got code 4; expected codes below 2\\*\\*2"):
        pack(torch.tensor([1, 4], dtype=torch.uint8), 2)
    with pytest.raises(ValueError, match="got 9; expected 1 to 8"):
        pack(torch.zeros(1, dtype=torch.uint8), 9)
    with pytest.raises(ValueError, match=r"expected \(3,\) for 5 codes of 4 bits"):
        unpack(torch.zeros(4, dtype=torch.uint8), 4, 5)
