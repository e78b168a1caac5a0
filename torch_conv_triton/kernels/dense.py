"""Dense and grouped convolution as implicit GEMM: a program computes BLOCK_M positions x BLOCK_N channels of one group."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from torch_conv_triton.kernels.common import (
    OFFSET_LIMIT,
    dot_precision,
    implicit_gemm,
    needs_int64,
    prefetch_rows,
    split_program,
    split_rows,
    widen,
)
from torch_conv_triton.kernels.epilogue import NO_FUSION, Fusion, rows_of_weight, store_tile, sums_of_tile
from torch_conv_triton.kernels.launch import launch
from torch_conv_triton.kernels.weight_matrix import weight_matrix


@triton.jit(do_not_specialize=["N", "tiles_m", "tiles_n"])
def conv1d_dense_fwd_kernel(
    x_ptr,  # (N, C_in, L_in), any strides
    w_ptr,  # (C_out, R) in reduction order
    b_ptr,  # (C_out,), or unused
    y_ptr,  # (N, C_out, L_out), any strides
    N,
    L_in,
    L_out,
    C_OUT,  # per group
    stride,
    padding,
    dilation,
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
    FLATTEN: tl.constexpr,  # rows run over N * L_out instead of the L_out of one sample
    TAP_MAJOR: tl.constexpr,
    ROUND_X: tl.constexpr,
    ROUND_W: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EPILOGUE: tl.constexpr,
    PADDING_MODE: tl.constexpr,
    WEIGHTS_LEFT: tl.constexpr,
    INT64: tl.constexpr,
    PREFETCH_CHANNELS: tl.constexpr,
    PREFETCH_LINES: tl.constexpr,  # 0: do not prefetch
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # channel tiles are the fastest so that programs that read the same x run together and find it in L2
    tile_n, group, tile_m, sample = split_program(tiles_n, GROUPS, tiles_m)

    m = widen(tile_m, INT64) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_mask, n, l_out = split_rows(m, sample, N, L_out, FLATTEN)
    x_rows = x_ptr + n * stride_xn
    if FLATTEN:
        x_rows = x_rows[:, None]
    o = rows_of_weight(tile_n, C_OUT, EPILOGUE, BLOCK_N)
    x_rows += widen(group, INT64) * C_IN * stride_xc
    if PREFETCH_LINES:
        first = tile_m * BLOCK_M * stride - padding
        span = (BLOCK_M - 1) * stride + (K - 1) * dilation
        prefetch_rows(x_rows, first, span, L_in, stride_xc, C_IN, PREFETCH_CHANNELS, PREFETCH_LINES)

    acc = implicit_gemm(
        x_rows,
        w_ptr + group * C_OUT * stride_wo,
        l_out * stride - padding,
        row_mask,
        o,
        K,
        L_in,
        C_OUT,
        dilation,
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
        WEIGHTS_LEFT,
        INT64,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        PADDING_MODE,
    )
    sums = sums_of_tile(acc, EPILOGUE, WEIGHTS_LEFT)
    store_tile(
        sums,
        n,
        l_out,
        row_mask,
        widen(group, INT64) * C_OUT,
        tile_n * (BLOCK_N // len(sums)),
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
        WEIGHTS_LEFT,
        INT64,
    )


def conv1d_dense(
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
    w_rounded: bool = False,
) -> None:
    """Write the convolution of x ``(N, C_in, L_in)`` with weight ``(C_out, C_in / groups, K)`` into y ``(N, C_out, L_out)``.

    Any strides. If `fusion` halves the channels, y has C_out / 2 of them and there is one group.
    `config` holds BLOCK_M, BLOCK_N, BLOCK_K, tap_major, merge_taps, weights_left, prefetch, num_warps, num_stages.
    `padding` is that before x; the length of y says what is after it. `w_rounded`: a float32 weight holds TF32 values.
    """
    N, _, L_in = x.shape
    L_out = y.shape[2]
    C_out, C_in, K = weight.shape
    flatten = N > 1 and L_out < config.BLOCK_M and N * L_out <= OFFSET_LIMIT
    rows = N * L_out if flatten else L_out
    tiles_m, samples = triton.cdiv(rows, config.BLOCK_M), 1 if flatten else N
    w, stride_wo, rounded = weight_matrix(weight, config.tap_major, tf32 and not w_rounded, readers=tiles_m * samples)
    prefetch_lines = 0
    if config.prefetch and x.stride(2) == 1 and not flatten and not needs_int64(x):
        span = (config.BLOCK_M - 1) * stride + (K - 1) * dilation + 1
        prefetch_lines = triton.next_power_of_2(triton.cdiv(span * x.element_size(), 128) + 1)
    tiles_n = triton.cdiv(C_out // groups, config.BLOCK_N)
    launch(
        conv1d_dense_fwd_kernel,
        (tiles_n * groups * tiles_m * samples,),
        x,
        w,
        bias if bias is not None else w,
        y,
        N,
        L_in,
        L_out,
        C_out // groups,
        stride,
        padding,
        dilation,
        *x.stride(),
        stride_wo,
        *y.stride(),
        tiles_m,
        tiles_n,
        GROUPS=groups,
        C_IN=C_in,
        K=K,
        FLATTEN=flatten,
        TAP_MAJOR=2 if config.merge_taps else int(config.tap_major),
        # a copy rounds on its way
        ROUND_X=tf32 and not (config.copy_to_nlc or fusion.rounded),
        ROUND_W=tf32 and not (rounded or w_rounded),
        PRECISION=dot_precision(x.dtype, tf32),
        HAS_BIAS=bias is not None,
        PADDING_MODE=fusion.padding_mode,
        **fusion.arguments(y),
        WEIGHTS_LEFT=config.weights_left,
        INT64=needs_int64(x, y, *fusion.views(y)),
        PREFETCH_CHANNELS=triton.next_power_of_2(C_in),
        PREFETCH_LINES=prefetch_lines,
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        BLOCK_K=config.BLOCK_K,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
