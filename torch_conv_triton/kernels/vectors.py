"""16-byte vectors in registers: taken apart into elements and put together again, which moves nothing between threads."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def floor_multiple(a, M: tl.constexpr):
    """The largest multiple of M that is not above a, which may be negative. The compiler sees that M divides it."""
    return tl.where(a >= 0, a, a - (M - 1)) // M * M


@triton.jit
def take_apart(tile, SIZE: tl.constexpr):
    """The SIZE (a power of two, at most 8) columns of a tile [ROWS, SIZE]: a tuple of tiles [ROWS, 1]."""
    parts = (tile,)
    for level in tl.static_range(3):
        if SIZE >> level > 1:
            evens = ()
            odds = ()
            for i in tl.static_range(len(parts)):
                even, odd = tl.split(tl.reshape(parts[i], [tile.shape[0], SIZE >> (level + 1), 2]))
                evens = evens + (even,)
                odds = odds + (odd,)
            parts = evens + odds
    return parts


@triton.jit
def put_together(parts):
    """The tile [..., SIZE] whose columns are the tiles [..., 1] of a tuple; SIZE is a power of two, at most 8."""
    for _ in tl.static_range(3):
        if len(parts) > 1:
            merged = ()
            for i in tl.static_range(len(parts) // 2):
                merged = merged + (tl.interleave(parts[i], parts[i + len(parts) // 2]),)
            parts = merged
    return parts[0]
