"""Sine and cosine of float32 without branches, for epilogues.

A library's sine takes large arguments along a path of their own, a hundred instructions behind a branch, for each element of a
tile: 128x128 of them made 720 kB of code, and a model slower than without. Here the argument is reduced to half a period with pi
in three parts (Cody and Waite), and a polynomial of degree 9 of least maximal error (5e-9) does the rest.

The result is within 1.5e-7 of the sine of an argument that a few roundings, 2^-22 of it, take to the given one. Convolutions sum
in some order and round more than that, so no more of a sine of theirs is defined: float32 has no period left beyond 1e7.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sine(x, SHIFT: tl.constexpr):
    """sin(x + SHIFT * pi) for float32 x; SHIFT is 0 for the sine, 0.5 for the cosine. NaN for infinities."""
    # adding 1.5 * 2^23 rounds to an integer, whose parity is the lowest bit
    rounded = tl.fma(x, 0.3183098861837907, SHIFT) + 12582912.0
    halves = (rounded - 12582912.0) - SHIFT
    r = tl.fma(halves, -3.1415927410125732, x)
    r = tl.fma(halves, 8.742277657347586e-08, r)
    r = tl.fma(halves, 3.4302490200117637e-15, r)
    z = r * r
    p = tl.fma(z, 2.60002420491315e-06, -0.00019806601468488875)
    p = tl.fma(z, p, 0.00833301710280536)
    p = tl.fma(z, p, -0.16666657088860337)
    y = tl.fma(r * z, p, r)
    sign = rounded.to(tl.int32, bitcast=True) << 31
    y = (y.to(tl.int32, bitcast=True) ^ sign).to(tl.float32, bitcast=True)
    y = tl.minimum(y, 1.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.maximum(y, -1.0, propagate_nan=tl.PropagateNan.ALL)
