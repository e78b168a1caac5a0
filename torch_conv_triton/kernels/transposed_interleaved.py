"""Transposed convolution, all output phases of a tile together: x is read once, and the output is stored in whole lines.

Over positions q of x it is an ordinary convolution whose channels are the pairs (output channel, phase), with
ceil(K / phases) taps; its output, with the phases woven in between the positions, is y. See `Weave`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from torch_conv_triton.kernels.common import (
    OFFSET_LIMIT,
    dot_precision,
    dot_tile,
    load_w_tile,
    load_x_tile,
    needs_int64,
    reduction_slice,
    reduction_steps,
    round_tf32,
    split_program,
    widen,
)
from torch_conv_triton.kernels.epilogue import NO_FUSION, Fusion
from torch_conv_triton.kernels.interleave import mask_phases, pack_interleaved, rows_of_samples, store_interleaved
from torch_conv_triton.kernels.launch import launch
from torch_conv_triton.weave import Weave


@triton.jit
def accumulate_taps(
    acc,
    x_ptr,
    w_ptr,
    pos,
    row_mask,
    rows,
    L_in,
    N_ROWS,
    step,
    stride_xc,
    stride_xl,
    FIRST: tl.constexpr,  # taps FIRST to FIRST + COUNT
    COUNT: tl.constexpr,
    TAPS: tl.constexpr,
    C_IN: tl.constexpr,
    ROUND_X: tl.constexpr,
    PRECISION: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """acc + the products of some taps with x gathered at pos - tap * step."""
    for i in range(0, reduction_steps(C_IN, COUNT, True, BLOCK_K)):
        c, j, _ = reduction_slice(i, C_IN, COUNT, True, BLOCK_K)
        tap = FIRST + j
        x = load_x_tile(
            x_ptr, pos, row_mask, c, tap, TAPS, L_in, -step, stride_xc, stride_xl, C_IN, TAPS, True, False, INT64, BLOCK_K
        )
        w = load_w_tile(w_ptr, rows, c, tap * C_IN + c, TAPS * C_IN, N_ROWS, C_IN, TAPS, True, BLOCK_K)
        if ROUND_X:
            x = round_tf32(x)
        acc = dot_tile(x, w, acc, False, PRECISION)
    return acc


@triton.jit(do_not_specialize=["N", "L_ROWS", "tiles_m", "tiles_n"])
def conv1d_transposed_interleaved_fwd_kernel(
    x_ptr,  # (N, C_in, L_in), any strides; with FLATTEN all samples as one
    w_ptr,  # (C_out * ROWS, TAPS * C_in / groups)
    b_ptr,  # (C_out,), or unused
    y_ptr,  # (N, C_out, L_out), any strides
    N,
    L_ROWS,
    L_in,
    L_out,
    C_OUT,  # per group
    step,
    stride_xn,
    stride_xc,
    stride_xl,
    stride_yn,
    stride_yc,
    stride_yl,
    tiles_m,  # of one sample, or of all with FLATTEN
    tiles_n,
    more,  # as `store_outputs` takes it
    more_strides,
    GROUPS: tl.constexpr,
    C_IN: tl.constexpr,  # per group
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    SPACING: tl.constexpr,
    ROWS: tl.constexpr,
    TAPS: tl.constexpr,
    ROUND_X: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EPILOGUE: tl.constexpr,
    FLATTEN: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # channel tiles are the fastest so that programs that read the same x run together and find it in L2
    tile_n, group, tile_m, sample = split_program(tiles_n, GROUPS, tiles_m)
    sample = sample.to(tl.int64)

    start = widen(tile_m, INT64) * BLOCK_M
    q = start + ((0 if FLATTEN else PADDING // STRIDE) + tl.arange(0, BLOCK_M))
    # rows past the last output read x like any other: a mask that is not constant over 16 bytes would break up its vectors
    row_mask = tl.full((BLOCK_M,), True, tl.int1)
    rows = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    x_ptr += sample * stride_xn + widen(group, INT64) * C_IN * stride_xc
    w_ptr += widen(group, INT64) * C_OUT * (ROWS * TAPS * C_IN)

    PARTIAL: tl.constexpr = K % (STRIDE // SPACING)
    FULL: tl.constexpr = TAPS - (PARTIAL > 0)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if PARTIAL > 0:
        acc = accumulate_taps(
            acc,
            x_ptr,
            w_ptr,
            q,
            row_mask,
            rows,
            L_in,
            C_OUT * ROWS,
            step,
            stride_xc,
            stride_xl,
            FULL,
            1,
            TAPS,
            C_IN,
            ROUND_X,
            PRECISION,
            INT64,
            BLOCK_K,
        )
        acc = mask_phases(acc, rows, PARTIAL, ROWS)
    if FULL > 0:
        acc = accumulate_taps(
            acc,
            x_ptr,
            w_ptr,
            q,
            row_mask,
            rows,
            L_in,
            C_OUT * ROWS,
            step,
            stride_xc,
            stride_xl,
            0,
            FULL,
            TAPS,
            C_IN,
            ROUND_X,
            PRECISION,
            INT64,
            BLOCK_K,
        )
    store_interleaved(
        acc,
        start,
        sample,
        group,
        tile_n,
        N,
        L_ROWS,
        L_out,
        C_OUT,
        b_ptr,
        y_ptr,
        stride_yn,
        stride_yc,
        stride_yl,
        more,
        more_strides,
        STRIDE,
        PADDING,
        SPACING,
        ROWS,
        EPILOGUE,
        HAS_BIAS,
        FLATTEN,
        INT64,
        BLOCK_M,
        BLOCK_N,
    )


def conv1d_transposed_interleaved(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    stride: int,
    padding: int,
    dilation: int,
    groups: int,
    tf32: bool,
    config,
    fusion: Fusion = NO_FUSION,
) -> None:
    """As `conv1d_transposed`, where `Weave.of` finds a weave. BLOCK_N holds all rows of a channel if its phases lie apart."""
    N, C_total, L_in = x.shape
    _, C_out, L_out = y.shape
    weave = Weave.of(weight.shape[2], stride, dilation)
    rows = weave.rows(C_total // groups)
    packed = pack_interleaved(weight, groups, weave, tf32)
    L_rows, flatten = 1, False
    tiles_m = triton.cdiv((L_out - 1 + padding) // stride - padding // stride + 1, config.BLOCK_M)
    if config.copy_to_nlc:
        x_rows, flatten, tiles_m = rows_of_samples(x, weave, stride, padding, L_out, tf32, config.BLOCK_M)
        L_rows = x_rows.shape[1]
        L_in = N * L_rows if flatten else L_rows
        x = x_rows.transpose(1, 2)
    tiles_n = triton.cdiv(C_out // groups * rows, config.BLOCK_N)
    launch(
        conv1d_transposed_interleaved_fwd_kernel,
        (tiles_n * groups * tiles_m * (1 if flatten else N),),
        x,
        packed,
        bias if bias is not None else packed,
        y,
        N,
        L_rows,
        L_in,
        L_out,
        C_out // groups,
        weave.step,
        *x.stride(),
        *y.stride(),
        tiles_m,
        tiles_n,
        GROUPS=groups,
        C_IN=C_total // groups,
        K=weight.shape[2],
        STRIDE=stride,
        PADDING=padding,
        SPACING=weave.spacing,
        ROWS=rows,
        TAPS=weave.taps,
        ROUND_X=tf32 and not (config.copy_to_nlc or fusion.rounded),
        PRECISION=dot_precision(x.dtype, tf32),
        HAS_BIAS=bias is not None,
        **fusion.arguments(y),
        FLATTEN=flatten,
        INT64=needs_int64(x, y, *fusion.views(y)) or N * L_rows * C_total > OFFSET_LIMIT,
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        BLOCK_K=config.BLOCK_K,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
