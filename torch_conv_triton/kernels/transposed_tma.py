"""Interleaved transposed convolution by block copies (Hopper and later), for many channels.

In NLC a tap is a shift along an outer dimension, so any step and padding gives an aligned block copy. An x that is not NLC, or
not rounded, is copied first. The copy rounds float32 to TF32, which leaves nothing to do between the block copies and the tensor
cores, and puts zeros between samples, over which tiles then run as over one long signal.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from torch_conv_triton.kernels.common import dot_precision, dot_tile, needs_int64, split_program, widen
from torch_conv_triton.kernels.epilogue import NO_FUSION, Fusion
from torch_conv_triton.kernels.interleave import mask_phases, pack_interleaved, rows_of_samples, store_interleaved
from torch_conv_triton.kernels.launch import descriptor, launch
from torch_conv_triton.weave import Weave


@triton.jit
def accumulate_blocks(
    acc,
    x_desc,
    w_desc,
    sample,
    x_row,  # of tap 0
    c_start,
    w_row,
    STEP: tl.constexpr,
    FIRST: tl.constexpr,  # taps FIRST to FIRST + COUNT
    COUNT: tl.constexpr,
    C_IN: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """acc + the products of some taps, tap j with the rows of x from x_row - j * STEP on."""
    for i in range(0, COUNT * (C_IN // BLOCK_K)):
        tap = FIRST + i % COUNT
        c = i // COUNT * BLOCK_K
        x = x_desc.load([sample, x_row - tap * STEP, c_start + c]).reshape(BLOCK_M, BLOCK_K)
        w = w_desc.load([w_row, tap * C_IN + c])
        acc = dot_tile(x, w, acc, False, PRECISION)
    return acc


@triton.jit(do_not_specialize=["N", "L_ROWS", "tiles_m", "tiles_n"])
def conv1d_transposed_tma_fwd_kernel(
    x_desc,  # (N, rows, C_in), or with FLATTEN (1, N * L_ROWS, C_in), block [1, BLOCK_M, BLOCK_K]
    w_desc,  # (C_out * ROWS, TAPS * C_in / groups), block [BLOCK_N, BLOCK_K]
    b_ptr,  # (C_out,), or unused
    y_ptr,  # (N, C_out, L_out), any strides
    N,
    L_ROWS,
    L_out,
    C_OUT,  # per group
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
    STEP: tl.constexpr,
    ROWS: tl.constexpr,
    TAPS: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EPILOGUE: tl.constexpr,
    FLATTEN: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile_n, group, tile_m, sample = split_program(tiles_n, GROUPS, tiles_m)

    x_row = tile_m * BLOCK_M + (0 if FLATTEN else PADDING // STRIDE)
    w_row = group * C_OUT * ROWS + tile_n * BLOCK_N
    PARTIAL: tl.constexpr = K % (STRIDE // SPACING)
    FULL: tl.constexpr = TAPS - (PARTIAL > 0)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if PARTIAL > 0:
        acc = accumulate_blocks(
            acc, x_desc, w_desc, sample, x_row, group * C_IN, w_row, STEP, FULL, 1, C_IN, PRECISION, BLOCK_M, BLOCK_K
        )
        acc = mask_phases(acc, tile_n * BLOCK_N + tl.arange(0, BLOCK_N), PARTIAL, ROWS)
    if FULL > 0:
        acc = accumulate_blocks(
            acc, x_desc, w_desc, sample, x_row, group * C_IN, w_row, STEP, 0, FULL, C_IN, PRECISION, BLOCK_M, BLOCK_K
        )
    store_interleaved(
        acc,
        widen(tile_m, INT64) * BLOCK_M,
        sample.to(tl.int64),
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


def conv1d_transposed_tma(
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
    """As `conv1d_transposed_interleaved`, for x that `dispatch.transposed_tma_refusal` accepts."""
    N, C_total, _ = x.shape
    _, C_out, L_out = y.shape
    weave = Weave.of(weight.shape[2], stride, dilation)
    C_in = C_total // groups
    rows = weave.rows(C_in)
    packed = pack_interleaved(weight, groups, weave, tf32)
    if config.copy_to_nlc:
        x_rows, flatten, tiles_m = rows_of_samples(x, weave, stride, padding, L_out, tf32, config.BLOCK_M)
    else:
        x_rows, flatten = x.transpose(1, 2), False
        tiles_m = triton.cdiv((L_out - 1 + padding) // stride - padding // stride + 1, config.BLOCK_M)
    L_rows = x_rows.shape[1]
    x_shape = [1, N * L_rows, C_total] if flatten else [N, L_rows, C_total]
    tiles_n = triton.cdiv(C_out // groups * rows, config.BLOCK_N)
    launch(
        conv1d_transposed_tma_fwd_kernel,
        (tiles_n * groups * tiles_m * (1 if flatten else N),),
        descriptor(x_rows, x_shape, [x_rows.stride(0), x_rows.stride(1), 1], [1, config.BLOCK_M, config.BLOCK_K]),
        descriptor(packed, list(packed.shape), list(packed.stride()), [config.BLOCK_N, config.BLOCK_K]),
        bias if bias is not None else packed,
        y,
        N,
        L_rows,
        L_out,
        C_out // groups,
        *y.stride(),
        tiles_m,
        tiles_n,
        GROUPS=groups,
        C_IN=C_in,
        K=weight.shape[2],
        STRIDE=stride,
        PADDING=padding,
        SPACING=weave.spacing,
        STEP=weave.step,
        ROWS=rows,
        TAPS=weave.taps,
        PRECISION=dot_precision(x.dtype, tf32),
        HAS_BIAS=bias is not None,
        **fusion.arguments(y),
        FLATTEN=flatten,
        INT64=needs_int64(y, *fusion.views(y)),
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        BLOCK_K=config.BLOCK_K,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
