"""Dense convolution, weight-stationary: each program loads its weight matrix once and walks over tiles of the output with it.

Suits many positions and few channels, where the tile kernel would read the weights from L2 again for every tile.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from torch_conv_triton.kernels.common import (
    dot_precision,
    dot_tile,
    load_w_tile,
    load_x_tile,
    needs_int64,
    reduction_slice,
    reduction_steps,
    round_tf32,
    widen,
)
from torch_conv_triton.kernels.epilogue import NO_FUSION, Fusion, store_tile
from torch_conv_triton.kernels.launch import launch
from torch_conv_triton.kernels.weight_matrix import weight_matrix


@triton.jit(do_not_specialize=["tiles_m", "tiles"])
def conv1d_dense_persistent_fwd_kernel(
    x_ptr,  # (N, C_in, L_in), any strides
    w_ptr,  # (C_out, R) in reduction order
    b_ptr,  # (C_out,), or unused
    y_ptr,  # (N, C_out, L_out), any strides
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
    tiles_m,  # of one sample
    tiles,  # tiles_m * N
    tiles_n,
    more,  # as `store_outputs` takes it
    more_strides,
    GROUPS: tl.constexpr,
    C_IN: tl.constexpr,  # per group
    K: tl.constexpr,
    TAP_MAJOR: tl.constexpr,
    ROUND_X: tl.constexpr,
    ROUND_W: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EPILOGUE: tl.constexpr,
    PADDING_MODE: tl.constexpr,
    WEIGHTS_LEFT: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
):
    # a program keeps its channel tile and group; the programs of one output tile run side by side
    pid = tl.program_id(0)
    tile_n = pid % tiles_n
    group = (pid // tiles_n) % GROUPS
    worker = pid // (tiles_n * GROUPS)
    workers = tl.num_programs(0) // (tiles_n * GROUPS)

    STEPS: tl.constexpr = reduction_steps(C_IN, K, TAP_MAJOR, BLOCK_K)
    o = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    w_tiles = ()
    for i in tl.static_range(STEPS):
        c, k, r = reduction_slice(i, C_IN, K, TAP_MAJOR, BLOCK_K)
        w = load_w_tile(w_ptr + group * C_OUT * stride_wo, o, c, r, stride_wo, C_OUT, C_IN, K, TAP_MAJOR, BLOCK_K)
        if ROUND_W:
            w = round_tf32(w)
        w_tiles = w_tiles + (w,)

    x_group = x_ptr + widen(group, INT64) * C_IN * stride_xc
    for tile in tl.range(worker, tiles, workers, num_stages=STAGES):
        sample = (tile // tiles_m).to(tl.int64)
        l_out = widen(tile % tiles_m, INT64) * BLOCK_M + tl.arange(0, BLOCK_M)
        row_mask = l_out < L_out
        pos = l_out * stride - padding
        if WEIGHTS_LEFT:
            acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        else:
            acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for i in tl.static_range(STEPS):
            c, k, r = reduction_slice(i, C_IN, K, TAP_MAJOR, BLOCK_K)
            x = load_x_tile(
                x_group + sample * stride_xn,
                pos,
                row_mask,
                c,
                k,
                K,
                L_in,
                dilation,
                stride_xc,
                stride_xl,
                C_IN,
                K,
                TAP_MAJOR,
                False,
                INT64,
                BLOCK_K,
                PADDING_MODE,
            )
            if ROUND_X:
                x = round_tf32(x)
            acc = dot_tile(x, w_tiles[i], acc, WEIGHTS_LEFT, PRECISION)
        store_tile(
            (acc,),
            sample,
            l_out,
            row_mask,
            widen(group, INT64) * C_OUT,
            tile_n * BLOCK_N,
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


def conv1d_dense_persistent(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    stride: int,
    padding: int,
    dilation: int,
    groups: int,
    tf32: bool,
    programs: int,
    config,
    fusion: Fusion = NO_FUSION,
) -> None:
    """As `conv1d_dense`, with about `programs` programs that each hold BLOCK_N rows of the weight for their whole life."""
    N, _, L_in = x.shape
    _, C_out, L_out = y.shape
    _, C_in, K = weight.shape
    w, stride_wo, rounded = weight_matrix(weight, config.tap_major, tf32)
    tiles_m = triton.cdiv(L_out, config.BLOCK_M)
    columns = triton.cdiv(C_out // groups, config.BLOCK_N) * groups
    workers = min(max(programs // columns, 1), tiles_m * N)
    launch(
        conv1d_dense_persistent_fwd_kernel,
        (workers * columns,),
        x,
        w,
        bias if bias is not None else w,
        y,
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
        tiles_m * N,
        columns // groups,
        GROUPS=groups,
        C_IN=C_in,
        K=K,
        TAP_MAJOR=config.tap_major,
        ROUND_X=tf32 and not fusion.rounded,
        ROUND_W=tf32 and not rounded,
        PRECISION=dot_precision(x.dtype, tf32),
        HAS_BIAS=bias is not None,
        PADDING_MODE=fusion.padding_mode,
        **fusion.arguments(y),
        WEIGHTS_LEFT=config.weights_left,
        INT64=needs_int64(x, y, *fusion.views(y)),
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        BLOCK_K=config.BLOCK_K,
        STAGES=config.num_stages,
        num_warps=config.num_warps,
    )
