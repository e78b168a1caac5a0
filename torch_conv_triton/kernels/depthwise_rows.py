"""Rows cut into blocks, as banded matrix products take them: loaded and stored by whole vectors, wherever a row begins."""

from __future__ import annotations

import triton
import triton.language as tl

from torch_conv_triton.kernels.epilogue import store_outputs
from torch_conv_triton.kernels.program import is_plain


@triton.jit
def inside(a, n):
    """Whether 0 <= a < n, in one comparison."""
    unsigned: tl.constexpr = tl.uint64 if a.dtype.primitive_bitwidth == 64 else tl.uint32
    return a.to(unsigned, bitcast=True) < n.to(unsigned)


@triton.jit
def rows_of_channel(
    x_ptr,
    y_ptr,
    o,  # channel of y
    stride_xc,
    stride_yc,
    MULTIPLIER: tl.constexpr,
    X_VECTOR: tl.constexpr,
    Y_VECTOR: tl.constexpr,
):
    """Rows of a channel in the first sample: of x and of y the boundary before it, and where it begins, counted from there."""
    x_start = (o // MULTIPLIER).to(tl.int64) * stride_xc
    y_start = o.to(tl.int64) * stride_yc
    x_phase = (x_start % X_VECTOR).to(tl.int32)
    y_phase = (y_start % Y_VECTOR).to(tl.int32)
    return x_ptr + x_start // X_VECTOR * X_VECTOR, x_phase, y_ptr + y_start // Y_VECTOR * Y_VECTOR, y_phase


@triton.jit
def load_blocks(
    x_row,
    begin,  # [BLOCK_M] first sample of each block, counted from x_row
    phase,  # where the row of x begins, counted from x_row
    L_in,
    VECTOR: tl.constexpr,
    EDGES: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The samples begin .. begin + BLOCK_K, zero outside the row: [BLOCK_M, BLOCK_K], loaded by whole vectors."""
    j = tl.arange(0, BLOCK_K)
    # one truth for all of a vector, so that it is loaded as one
    vector = begin[:, None] + (j // VECTOR * VECTOR)[None, :]
    at = begin[:, None] + j[None, :]
    x = tl.load(x_row + at, mask=inside(vector, L_in + phase), other=0.0)
    if EDGES:
        x = tl.where(inside(at - phase, L_in), x, 0.0)
    return x


@triton.jit
def store_blocks(
    y_row,  # from the boundary before it on
    y,  # [BLOCK_M, BLOCK_N] in float32
    sample,
    o,
    begin,  # [BLOCK_M] first output of each block, counted from the boundary
    phase,  # where the row of y begins, counted from the boundary
    C_OUT,
    L_out,
    more,
    more_strides,
    EPILOGUE: tl.constexpr,
    VECTOR: tl.constexpr,
    EDGES: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Store the outputs that lie within the row, by whole vectors but at its edges; or end as `store_outputs` does."""
    i = tl.arange(0, BLOCK_N)[None, :]
    at = begin[:, None] + i
    vector = begin[:, None] + i // VECTOR * VECTOR
    whole = (vector >= phase) & (vector + VECTOR <= L_out + phase)
    if is_plain(EPILOGUE):
        y = y.to(y_row.dtype.element_ty)
        tl.store(y_row + at, y, mask=whole)
        if EDGES:
            part = (vector < phase) | (vector + VECTOR > L_out + phase)
            tl.store(y_row + at, y, mask=inside(at - phase, L_out) & part)
    else:
        if EDGES:
            y_row += phase
            at -= phase
            whole = inside(at, L_out)
        store_outputs(y, sample, at, whole, 0, o, o < C_OUT, y_row, y_row, 0, 0, 1, more, more_strides, EPILOGUE, False, INT64)


@triton.jit
def exact_blocks(
    x_row,  # first sample of the row
    w_ptr,
    l_out,  # [BLOCK_M, BLOCK_N]
    L_in,
    padding,
    stride_wk,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """The outputs l_out, tap by tap: a sample meets no output but those whose windows hold it."""
    acc = tl.zeros(l_out.shape, dtype=tl.float32)
    for k in range(K):
        if TRANSPOSED:
            reach = l_out + padding - k * DILATION
            at = reach // STRIDE
            mask = (reach >= 0) & (reach % STRIDE == 0) & (at < L_in)
        else:
            at = l_out * STRIDE - padding + k * DILATION
            mask = (at >= 0) & (at < L_in)
        x = tl.load(x_row + at, mask=mask, other=0.0)
        acc += x.to(tl.float32) * tl.load(w_ptr + k * stride_wk).to(tl.float32)
    return acc
