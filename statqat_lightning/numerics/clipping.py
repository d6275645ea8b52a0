"""Ends of a grid for clipping, in the precision of the tensor."""

from __future__ import annotations

import math
import struct

import torch

_FLOAT32 = struct.Struct("f")


def outward(limit: float, dtype: torch.dtype) -> float:
    """The next value of `dtype` beyond `limit`, away from zero; for 0 the last normal one below."""
    if limit == 0:
        return -torch.finfo(dtype).tiny
    if abs(limit) > torch.finfo(dtype).max:
        return math.copysign(math.inf, limit)
    if dtype == torch.float32:
        limit = _rounded(limit)
    _, exponent = math.frexp(limit)
    return limit + math.copysign(math.ldexp(torch.finfo(dtype).eps, exponent - 1), limit)


def _rounded(limit: float) -> float:
    """The float32 nearest to a number in its normal range."""
    if torch.compiler.is_compiling():
        # Dynamo has no `struct`. Veltkamp's splitting keeps the upper 24 of 53 bits; it may round a
        # tie either way, and the end of a grid is none.
        upper = limit * (2.0**29 + 1)
        return upper - (upper - limit)
    (limit,) = _FLOAT32.unpack(_FLOAT32.pack(limit))
    return limit
