"""Dense packing of codes: `bits` bits each, least significant first, across byte borders."""

from __future__ import annotations

import torch
from torch import Tensor

_PIECE = 2**16
"""Words that are made at a time: a code takes eight bytes in one."""


def packed_size(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take."""
    return (count * bits + 7) // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes as a dense bit string.

    Args:
        codes: uint8, any shape, read in row-major order; the lowest `bits` bits hold the code.
        bits: Width of a code, 1 to 8.

    Returns:
        uint8 `(packed_size(codes.numel(), bits),)`; bit `i * bits + j` of the string is bit `j` of
        code `i`, and bits beyond the last code are zero. Codes of 8 bits are that already.

    Raises:
        ValueError: If `bits` is out of range, or a code needs more bits.
    """
    _check_bits(bits)
    flat = codes.reshape(-1)
    if flat.numel() and int(flat.max()) >= 2**bits:
        raise ValueError(f"pack: got code {int(flat.max())}; expected codes below 2**{bits}.")
    if bits == 8:
        return flat
    # Eight codes fill `bits` whole bytes, and fit into one 64-bit word.
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % 8))
    shifts = 8 * torch.arange(bits, device=codes.device)
    pieces = [
        ((_words(piece, bits).unsqueeze(1) >> shifts) & 0xFF).to(torch.uint8).flatten()
        for piece in torch.split(padded, 8 * _PIECE)
    ]
    return torch.cat(pieces)[: packed_size(flat.numel(), bits)]


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """The `count` codes that `pack` packed.

    Args:
        packed: uint8 `(packed_size(count, bits),)`.
        bits: Width of a code, 1 to 8.
        count: How many codes there are.

    Returns:
        uint8 `(count,)`.

    Raises:
        ValueError: If `bits` is out of range, or `packed` has another size.
    """
    _check_bits(bits)
    if packed.dim() != 1 or packed.numel() != packed_size(count, bits):
        raise ValueError(
            f"unpack: got shape {tuple(packed.shape)}; expected ({packed_size(count, bits)},) for "
            f"{count} codes of {bits} bits."
        )
    if bits == 8:
        return packed
    padded = torch.nn.functional.pad(packed, (0, -packed.numel() % bits))
    shifts = bits * torch.arange(8, device=packed.device)
    pieces = [
        ((_words(piece, 8, bits).unsqueeze(1) >> shifts) & (2**bits - 1)).to(torch.uint8).flatten()
        for piece in torch.split(padded, bits * _PIECE)
    ]
    return torch.cat(pieces)[:count]


def _words(parts: Tensor, bits: int, per_word: int = 8) -> Tensor:
    """Each run of `per_word` parts of `bits` bits as one int64, first part lowest."""
    shifts = bits * torch.arange(per_word, device=parts.device)
    words: Tensor = (parts.reshape(-1, per_word).to(torch.int64) << shifts).sum(1)
    return words


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits: got {bits!r}; expected 1 to 8.")
