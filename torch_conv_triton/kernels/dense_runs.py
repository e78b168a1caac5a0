"""Dense and grouped convolution with many taps, at stride 1: RUN outputs in a row are the columns of one product.

RUN neighbouring outputs of a channel need K + RUN - 1 samples, little more than one of them. Computed together, as a convolution
of stride RUN with RUN times as many channels, they fill a tile that the channels of a group alone do not fill, and each sample
that is loaded serves all of them. The weight of output i of a run is that of the first, i taps later, so no larger weight is
ever stored.

Such a product multiplies samples outside an output's window by zero; where that is not harmless because some of them are not
finite, the tile is computed again without.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from torch_conv_triton.kernels.common import (
    OFFSET_LIMIT,
    dot_precision,
    dot_tile,
    implicit_gemm,
    load_x_tile,
    needs_int64,
    reduction_slice,
    reduction_steps,
    round_tf32,
    split_program,
    split_rows,
    widen,
)
from torch_conv_triton.kernels.epilogue import NO_FUSION, Fusion, store_tile
from torch_conv_triton.kernels.interleave import store_interleaved
from torch_conv_triton.kernels.launch import launch
from torch_conv_triton.kernels.weight_matrix import weight_matrix


@triton.jit
def load_w_run(
    w_ptr,  # (C_out, K * C_IN), tap-major
    columns,  # [BLOCK_N] (output channel, output of the run)
    r,  # [BLOCK_K] (tap of the run, input channel)
    stride_wo,
    C_OUT,
    C_IN: tl.constexpr,
    K: tl.constexpr,
    RUN: tl.constexpr,
):
    """What each output of a run multiplies with each sample that the run needs: [BLOCK_N, BLOCK_K]."""
    at = r[None, :] - (columns % RUN * C_IN)[:, None]
    mask = (columns < C_OUT * RUN)[:, None] & (at >= 0) & (at < K * C_IN)
    return tl.load(w_ptr + ((columns // RUN * stride_wo)[:, None] + at), mask=mask, other=0.0)


@triton.jit(do_not_specialize=["N", "RUNS", "tiles_m", "tiles_n"])
def conv1d_dense_runs_fwd_kernel(
    x_ptr,  # (N, C_in, L_in), any strides
    w_ptr,  # (C_out, K * C_in / groups), tap-major
    b_ptr,  # (C_out,), or unused
    y_ptr,  # (N, C_out, L_out), any strides
    N,
    RUNS,  # of a sample
    L_in,
    L_out,
    C_OUT,  # per group
    padding,
    stride_xn,
    stride_xc,
    stride_xl,
    stride_wo,
    stride_yn,
    stride_yc,
    stride_yl,
    tiles_m,
    tiles_n,
    more,  # as `store_outputs` takes it
    more_strides,
    GROUPS: tl.constexpr,
    C_IN: tl.constexpr,  # per group
    K: tl.constexpr,
    RUN: tl.constexpr,  # outputs in a row
    FLATTEN: tl.constexpr,  # rows are the runs of all samples instead of those of one
    ROUND_X: tl.constexpr,
    ROUND_W: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EPILOGUE: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # column tiles are the fastest so that programs that read the same x run together and find it in L2
    tile_n, group, tile_m, sample = split_program(tiles_n, GROUPS, tiles_m)
    sample = sample.to(tl.int64)

    start = widen(tile_m, INT64) * BLOCK_M
    m = start + tl.arange(0, BLOCK_M)
    x_ptr += widen(group, INT64) * C_IN * stride_xc
    row_mask, n, run = split_rows(m, sample, N, RUNS, FLATTEN)
    l_out = run * RUN
    x_rows = x_ptr + n * stride_xn
    if FLATTEN:
        x_rows = x_rows[:, None]
    w_ptr += group * C_OUT * stride_wo
    columns = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)

    TAPS: tl.constexpr = K + RUN - 1
    # slices of the reduction may span taps, see `reduction_slice`
    TAP_MAJOR: tl.constexpr = 2
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for i in range(0, reduction_steps(C_IN, TAPS, 0, BLOCK_K)):
        c, k, r = reduction_slice(i, C_IN, TAPS, TAP_MAJOR, BLOCK_K)
        x = load_x_tile(
            x_rows,
            l_out - padding,
            row_mask,
            c,
            k,
            TAPS,
            L_in,
            1,
            stride_xc,
            stride_xl,
            C_IN,
            TAPS,
            TAP_MAJOR,
            False,
            INT64,
            BLOCK_K,
        )
        w = load_w_run(w_ptr, columns, r, stride_wo, C_OUT, C_IN, K, RUN)
        if ROUND_X:
            x = round_tf32(x)
        if ROUND_W:
            w = round_tf32(w)
        acc = dot_tile(x, w, acc, False, PRECISION)

    # zero times what is not finite is NaN
    if tl.sum(acc * 0.0) == 0.0:
        store_interleaved(
            acc,
            start,
            sample,
            group,
            tile_n,
            N,
            RUNS,
            L_out,
            C_OUT,
            b_ptr,
            y_ptr,
            stride_yn,
            stride_yc,
            stride_yl,
            more,
            more_strides,
            RUN,
            0,
            1,
            RUN,
            EPILOGUE,
            HAS_BIAS,
            FLATTEN,
            INT64,
            BLOCK_M,
            BLOCK_N,
        )
    else:
        BLOCK_O: tl.constexpr = BLOCK_N // RUN
        for i in range(RUN):
            exact = implicit_gemm(
                x_rows,
                w_ptr,
                l_out + (i - padding),
                row_mask,
                tile_n * BLOCK_O + tl.arange(0, BLOCK_O),
                K,
                L_in,
                C_OUT,
                1,
                stride_xc,
                stride_xl,
                stride_wo,
                C_IN,
                K,
                TAP_MAJOR,
                False,
                ROUND_X,
                ROUND_W,
                PRECISION,
                False,
                INT64,
                BLOCK_M,
                BLOCK_O,
                BLOCK_K,
            )
            store_tile(
                (exact,),
                n,
                l_out + i,
                row_mask & (l_out + i < L_out),
                widen(group, INT64) * C_OUT,
                tile_n * BLOCK_O,
                C_OUT,
                b_ptr,
                y_ptr,
                stride_yn,
                stride_yc,
                stride_yl,
                more,
                more_strides,
                EPILOGUE,
                HAS_BIAS,
                False,
                INT64,
            )


def conv1d_dense_runs(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    padding: int,
    groups: int,
    tf32: bool,
    config,
    fusion: Fusion = NO_FUSION,
) -> None:
    """As `conv1d_dense`, at stride and dilation 1.

    A tile is BLOCK_M runs of `run` outputs, a power of two, x BLOCK_N / run channels, at least 16.
    """
    N, _, L_in = x.shape
    _, C_out, L_out = y.shape
    _, C_in, K = weight.shape
    w, stride_wo, rounded = weight_matrix(weight, tap_major=True, rounded=tf32)
    runs = triton.cdiv(L_out, config.run)
    tiles_m = triton.cdiv(runs, config.BLOCK_M)
    flatten = N > 1 and 8 * (tiles_m * config.BLOCK_M - runs) > runs and N * L_out <= OFFSET_LIMIT
    if flatten:
        tiles_m = triton.cdiv(N * runs, config.BLOCK_M)
    tiles_n = triton.cdiv(C_out // groups * config.run, config.BLOCK_N)
    launch(
        conv1d_dense_runs_fwd_kernel,
        (tiles_n * groups * tiles_m * (1 if flatten else N),),
        x,
        w,
        bias if bias is not None else w,
        y,
        N,
        runs,
        L_in,
        L_out,
        C_out // groups,
        padding,
        *x.stride(),
        stride_wo,
        *y.stride(),
        tiles_m,
        tiles_n,
        GROUPS=groups,
        C_IN=C_in,
        K=K,
        RUN=config.run,
        FLATTEN=flatten,
        # a copy rounds on its way
        ROUND_X=tf32 and not (config.copy_to_nlc or fusion.rounded),
        ROUND_W=tf32 and not rounded,
        PRECISION=dot_precision(x.dtype, tf32),
        HAS_BIAS=bias is not None,
        **fusion.arguments(y),
        INT64=needs_int64(x, y, *fusion.views(y)),
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        BLOCK_K=config.BLOCK_K,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
