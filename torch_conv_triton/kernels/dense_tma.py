"""Dense convolution of channels-last x through tensor descriptors (Hopper and later): every tap is a row shift of one block copy.

In NLC a tap moves along an outer dimension, so any padding, dilation and length gives an aligned copy, and rows outside the
signal arrive as zeros. With stride s, x is seen as (N, s, L_in / s, C): a tap is then one (phase, row shift). Channels that are
no whole blocks are padded with zeros: those of x by the copy to NLC or by the descriptor, those of the weight when it is packed.

Products take powers of two of output channels. A tile may have a second part, of fewer: 192 channels are 128 and 64 from one x.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from torch_conv_triton.kernels.common import dot_precision, dot_tile, needs_int64, round_tf32, split_program, widen
from torch_conv_triton.kernels.epilogue import NO_FUSION, Fusion, store_tile
from torch_conv_triton.kernels.launch import descriptor, launch
from torch_conv_triton.kernels.program import halves_channels
from torch_conv_triton.kernels.weight_matrix import has_aligned_rows, weight_matrix


# the same convolution at several dilations, as in a residual block, is one kernel
@triton.jit(do_not_specialize=["dilation", "padding", "tiles_m", "tiles_n"])
def conv1d_dense_tma_fwd_kernel(
    x_desc,  # (N, STRIDE, L_in / STRIDE, GROUPS * C_IN or fewer), block [1, 1, BLOCK_M, BLOCK_K]
    w_desc,  # (C_out, K * C_IN), block [BLOCK_N, BLOCK_K], of half the channels if the program halves them; or its transpose
    tail_desc,  # (C_out, K * C_IN), block [TAIL_N, BLOCK_K]; None without a tail
    b_ptr,  # (C_out,), or unused
    y_ptr,  # (N, C_out, L_out), any strides
    L_out,
    C_OUT,  # per group
    dilation,
    padding,
    stride_yn,
    stride_yc,
    stride_yl,
    tiles_m,
    tiles_n,
    more,  # as `store_outputs` takes it
    more_strides,
    GROUPS: tl.constexpr,
    C_IN: tl.constexpr,  # per group, whole blocks
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    W_TRANSPOSED: tl.constexpr,  # of a pointwise convolution
    ROUND_X: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EPILOGUE: tl.constexpr,
    WEIGHTS_LEFT: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TAIL_N: tl.constexpr,  # channels of the second part of a tile, behind BLOCK_N; 0: there is none
    BLOCK_K: tl.constexpr,
):
    tile_n, group, tile_m, sample = split_program(tiles_n, GROUPS, tiles_m)

    CHUNKS: tl.constexpr = C_IN // BLOCK_K
    # padding rounded up to whole rows of the view keeps the division below on non-negative numbers
    padded_rows = (padding + STRIDE - 1) // STRIDE
    HALVES: tl.constexpr = halves_channels(EPILOGUE)
    COLUMNS: tl.constexpr = BLOCK_N // 2 if HALVES else BLOCK_N
    start = tile_n * (COLUMNS + TAIL_N)
    if WEIGHTS_LEFT:
        acc = tl.zeros((COLUMNS, BLOCK_M), dtype=tl.float32)
        second = tl.zeros((TAIL_N or COLUMNS, BLOCK_M), dtype=tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, COLUMNS), dtype=tl.float32)
        second = tl.zeros((BLOCK_M, TAIL_N or COLUMNS), dtype=tl.float32)
    for i in range(0, K * CHUNKS):
        k = i // CHUNKS
        c = (i % CHUNKS) * BLOCK_K
        shift = k * dilation + (padded_rows * STRIDE - padding)
        row = tile_m * BLOCK_M + shift // STRIDE - padded_rows
        # only leading unit dimensions fold into the copy: any other reshape would go through registers
        x = x_desc.load([sample, shift % STRIDE, row, group * C_IN + c]).reshape(BLOCK_M, BLOCK_K)
        if W_TRANSPOSED:
            w = tl.trans(w_desc.load([c, start]))
        else:
            w = w_desc.load([group * C_OUT + start, k * C_IN + c])
        if ROUND_X:
            x = round_tf32(x)
        acc = dot_tile(x, w, acc, WEIGHTS_LEFT, PRECISION)
        if HALVES:
            w = w_desc.load([C_OUT // 2 + start, k * C_IN + c])
            second = dot_tile(x, w, second, WEIGHTS_LEFT, PRECISION)
        if TAIL_N:
            w = tail_desc.load([group * C_OUT + start + BLOCK_N, k * C_IN + c])
            second = dot_tile(x, w, second, WEIGHTS_LEFT, PRECISION)

    l_out = widen(tile_m, INT64) * BLOCK_M + tl.arange(0, BLOCK_M)
    sums = (acc, second) if HALVES else (acc,)
    for part in tl.static_range(2 if TAIL_N else 1):
        store_tile(
            (second,) if part else sums,
            sample.to(tl.int64),
            l_out,
            l_out < L_out,
            widen(group, INT64) * C_OUT,
            start + part * BLOCK_N,
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


def conv1d_dense_tma(
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
    """As `conv1d_dense`, for x that `dispatch.tma_refusal` accepts: NLC, 16-byte aligned rows, whole channel blocks or one group.

    An x of whole blocks may have more channels than the weight. `w_rounded`: a float32 weight holds TF32 values.
    """
    N, C_total, L_in = x.shape
    L_out = y.shape[2]
    C_out, C_in, K = weight.shape
    C_in = triton.cdiv(C_in, config.BLOCK_K) * config.BLOCK_K
    halved = halves_channels(fusion.epilogue)
    columns, tail = (config.BLOCK_N // 2, 0) if halved else (config.BLOCK_N, config.TAIL_N)
    # with the output channels contiguous it is not packed
    whole = K == groups == 1 and C_in == weight.shape[1] and not halved and not tail
    w_transposed = whole and is_aligned_transpose(weight)
    tail_desc = None
    if w_transposed:
        w, w_desc = weight, descriptor(weight, [C_in, C_out], [weight.stride(1), 1], [config.BLOCK_K, columns])
    else:
        w, stride_wo, _ = weight_matrix(weight, True, rounded=tf32 and not w_rounded, channels=C_in, aligned=True)
        w_desc = descriptor(w, [C_out, K * C_in], [stride_wo, 1], [columns, config.BLOCK_K])
        if tail:
            tail_desc = descriptor(w, [C_out, K * C_in], [stride_wo, 1], [tail, config.BLOCK_K])
    stride_n, _, stride_l = x.stride()
    x_desc = descriptor(
        x,
        [N, stride, L_in // stride, C_total],
        [stride_n, stride_l, stride_l * stride, 1],
        [1, 1, config.BLOCK_M, config.BLOCK_K],
    )
    tiles_m = triton.cdiv(L_out, config.BLOCK_M)
    tiles_n = triton.cdiv(C_out // groups, config.BLOCK_N + tail)
    launch(
        conv1d_dense_tma_fwd_kernel,
        (tiles_n * groups * tiles_m * N,),
        x_desc,
        w_desc,
        tail_desc,
        bias if bias is not None else w,
        y,
        L_out,
        C_out // groups,
        dilation,
        padding,
        *y.stride(),
        tiles_m,
        tiles_n,
        GROUPS=groups,
        C_IN=C_in,
        K=K,
        STRIDE=stride,
        W_TRANSPOSED=w_transposed,
        # a copy rounds on its way
        ROUND_X=tf32 and not (config.copy_to_nlc or fusion.rounded),
        PRECISION=dot_precision(x.dtype, tf32),
        HAS_BIAS=bias is not None,
        **fusion.arguments(y),
        WEIGHTS_LEFT=config.weights_left,
        INT64=needs_int64(y, *fusion.views(y)),
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        TAIL_N=tail,
        BLOCK_K=config.BLOCK_K,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def is_aligned_transpose(weight: Tensor) -> bool:
    """Whether block copies read a 16-bit weight ``(C_out, C_in, 1)`` with its output channels contiguous."""
    return weight.element_size() == 2 and weight.stride(0) == 1 and has_aligned_rows(weight, weight.stride(1))
