"""Dense convolution of few input channels into rows that do not start on 16 bytes: channels of one tile start alike.

Rows of y whose length no vector divides start at offsets from 16 bytes that differ from channel to channel, and come round again
after a few channels. A tile takes the channels of one offset, and positions that begin that much earlier, so that whole vectors
are stored. Reading x once for every offset costs little where the input has few channels.
"""

from __future__ import annotations

from math import gcd

import triton
import triton.language as tl
from torch import Tensor

from torch_conv_triton.kernels.common import dot_precision, implicit_gemm, needs_int64, split_program, widen
from torch_conv_triton.kernels.launch import launch
from torch_conv_triton.kernels.weight_matrix import weight_matrix


@triton.jit(do_not_specialize=["L_out", "stride_yn", "stride_yc", "tiles_m", "tiles_n"])
def conv1d_dense_skewed_fwd_kernel(
    x_ptr,  # (N, C_in, L_in), any strides
    w_ptr,  # (C_out, C_in * K)
    b_ptr,  # (C_out,), or unused
    y_ptr,  # (N, C_out, L_out), L contiguous
    L_in,
    L_out,
    C_OUT,
    stride,
    padding,
    dilation,
    stride_xn,
    stride_xc,
    stride_xl,
    stride_wo,
    stride_yn,  # in vectors
    stride_yc,
    tiles_m,
    tiles_n,  # of the channels of one offset
    C_IN: tl.constexpr,
    K: tl.constexpr,
    CYCLE: tl.constexpr,  # channels after which the offsets repeat
    VECTOR: tl.constexpr,
    ROUND_X: tl.constexpr,
    ROUND_W: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    tile_n, turn, tile_m, sample = split_program(tiles_n, CYCLE, tiles_m)
    sample = sample.to(tl.int64)

    earlier = turn * (stride_yc % VECTOR) % VECTOR
    start = widen(tile_m, INT64) * BLOCK_M
    i = tl.arange(0, BLOCK_M)
    l_out = start - earlier + i
    o = (tile_n * BLOCK_N + tl.arange(0, BLOCK_N)) * CYCLE + turn
    acc = implicit_gemm(
        x_ptr + sample * stride_xn,
        w_ptr,
        l_out * stride - padding,
        # positions outside the row are computed, and not stored
        tl.full((BLOCK_M,), True, tl.int1),
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
        0,
        False,
        ROUND_X,
        ROUND_W,
        PRECISION,
        True,
        INT64,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    o_mask = (o < C_OUT)[:, None]
    if HAS_BIAS:
        acc += tl.load(b_ptr + o[:, None], mask=o_mask, other=0.0).to(tl.float32)
    y = acc.to(y_ptr.dtype.element_ty)
    # the compiler sees that these begin at whole vectors
    rows = (sample * stride_yn + (o.to(tl.int64) * stride_yc - earlier) // VECTOR) * VECTOR + start
    pointers = y_ptr + (rows[:, None] + i[None, :])
    vector = start + i // VECTOR * VECTOR - earlier
    whole = (vector >= 0) & (vector + VECTOR <= L_out)
    tl.store(pointers, y, mask=o_mask & whole[None, :])
    if (start < earlier) | (start + BLOCK_M > L_out):
        part = (l_out >= 0) & (l_out < L_out) & ~whole
        tl.store(pointers, y, mask=o_mask & part[None, :])


def conv1d_dense_skewed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    stride: int,
    padding: int,
    dilation: int,
    tf32: bool,
    config,
) -> None:
    """As `conv1d_dense`, of one group, with weights on the left and taps running fastest. y has L contiguous.

    16 bytes divide the distance of samples of y.
    """
    N, _, L_in = x.shape
    _, C_out, L_out = y.shape
    _, C_in, K = weight.shape
    w, stride_wo, rounded = weight_matrix(weight, tap_major=False, rounded=tf32)
    vector = 16 // x.element_size()
    skew = y.stride(1) % vector
    cycle = vector // gcd(skew, vector)
    most = max(turn * skew % vector for turn in range(cycle))
    tiles_m = triton.cdiv(L_out + most, config.BLOCK_M)
    tiles_n = triton.cdiv(C_out, config.BLOCK_N * cycle)
    launch(
        conv1d_dense_skewed_fwd_kernel,
        (tiles_n * cycle * tiles_m * N,),
        x,
        w,
        bias if bias is not None else w,
        y,
        L_in,
        L_out,
        C_out,
        stride,
        padding,
        dilation,
        *x.stride(),
        stride_wo,
        y.stride(0) // vector,
        y.stride(1),
        tiles_m,
        tiles_n,
        C_IN=C_in,
        K=K,
        CYCLE=cycle,
        VECTOR=vector,
        ROUND_X=tf32,
        ROUND_W=tf32 and not rounded,
        PRECISION=dot_precision(x.dtype, tf32),
        HAS_BIAS=bias is not None,
        INT64=needs_int64(x, y),
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        BLOCK_K=config.BLOCK_K,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
