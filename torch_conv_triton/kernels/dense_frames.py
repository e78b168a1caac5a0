"""Long filters over one channel at a stride of whole vectors, as in filter banks: the windows are rows of a matrix.

The window of an output begins `stride` samples after that of the output before, so the windows are the rows of a matrix that
overlap in memory, and the convolution is a product with that matrix: pointwise, over K channels.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from torch_conv_triton.kernels.common import dot_precision, dot_tile, needs_int64, round_tf32, widen
from torch_conv_triton.kernels.epilogue import NO_FUSION, Fusion, store_tile
from torch_conv_triton.kernels.launch import descriptor, launch, workspace
from torch_conv_triton.kernels.weight_matrix import weight_matrix

# channels of a narrow tile, the fewest that a product takes
NARROW = 16


@triton.jit
def padded_copy_kernel(
    x_ptr,  # (N, 1, L), any strides
    out_ptr,  # (N, LENGTH) contiguous
    L,
    LENGTH,
    start,
    stride_xn,
    stride_xl,
    tiles,
    ROUND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    sample = (pid // tiles).to(tl.int64)
    i = widen(pid % tiles, True) * BLOCK + tl.arange(0, BLOCK)
    at = i - start
    x = tl.load(x_ptr + sample * stride_xn + at * stride_xl, mask=(at >= 0) & (at < L), other=0.0)
    if ROUND:
        x = round_tf32(x)
    tl.store(out_ptr + sample * LENGTH + i, x, mask=i < LENGTH)


def padded_copy(x: Tensor, start: int, length: int, rounded: bool) -> Tensor:
    """A copy of `length` samples of x ``(N, 1, L)``, from `start` before its first on, as ``(N, length)``; zeros outside of x.

    Rounded to TF32 if `rounded`.
    """
    N, _, L = x.shape
    out = workspace((N, length), dtype=x.dtype, device=x.device)
    block = 1024
    tiles = triton.cdiv(length, block)
    launch(
        padded_copy_kernel,
        (tiles * N,),
        x,
        out,
        L,
        length,
        start,
        x.stride(0),
        x.stride(2),
        tiles,
        ROUND=rounded,
        BLOCK=block,
    )
    return out


@triton.jit(do_not_specialize=["tiles_m", "tiles_n"])
def conv1d_dense_frames_fwd_kernel(
    x_desc,  # windows (N, L_out, K), block [1, BLOCK_M, BLOCK_K]
    w_desc,  # (C_out, K), block [BLOCK_N, BLOCK_K]
    narrow_desc,  # the same, block [NARROW, BLOCK_K]
    b_ptr,  # (C_out,), or unused
    y_ptr,  # (N, C_out, L_out), any strides
    L_out,
    C_OUT,
    stride_yn,
    stride_yc,
    stride_yl,
    tiles_m,
    tiles_n,
    more,  # as `store_outputs` takes it
    more_strides,
    K: tl.constexpr,
    NARROW: tl.constexpr,  # channels that a program computes beside its tile, of those beyond all tiles; 0: there are none
    ROUND_X: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EPILOGUE: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # channel tiles are the fastest so that programs that read the same windows run together and find them in L2
    pid = tl.program_id(0)
    tile_n = pid % tiles_n
    tile_m = (pid // tiles_n) % tiles_m
    sample = pid // (tiles_n * tiles_m)
    start = tile_n * BLOCK_N
    narrow_start = tiles_n * BLOCK_N + tile_n * NARROW

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    narrow = tl.zeros((BLOCK_M, max(NARROW, 1)), dtype=tl.float32)
    for i in range(0, tl.cdiv(K, BLOCK_K)):  # both matrices are zero beyond their last tap
        x = x_desc.load([sample, tile_m * BLOCK_M, i * BLOCK_K]).reshape(BLOCK_M, BLOCK_K)
        if ROUND_X:
            x = round_tf32(x)
        acc = dot_tile(x, w_desc.load([start, i * BLOCK_K]), acc, False, PRECISION)
        if NARROW:
            narrow = dot_tile(x, narrow_desc.load([narrow_start, i * BLOCK_K]), narrow, False, PRECISION)

    l_out = widen(tile_m, INT64) * BLOCK_M + tl.arange(0, BLOCK_M)
    for part in tl.static_range(2 if NARROW else 1):
        store_tile(
            (narrow if part else acc,),
            sample.to(tl.int64),
            l_out,
            l_out < L_out,
            0,
            narrow_start if part else start,
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


def conv1d_dense_frames(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    stride: int,
    padding: int,
    tf32: bool,
    config,
    fusion: Fusion = NO_FUSION,
) -> None:
    """Write the convolution of x ``(N, 1, L_in)`` with weight ``(C_out, 1, K)`` into y ``(N, C_out, L_out)``, any strides.

    `stride` is a multiple of 16 bytes. With `copy_to_nlc`, or where windows reach beyond x or do not start on 16 bytes, x is
    copied, rounded to TF32 if `tf32`. `padding` is that before x.
    """
    C_out, _, K = weight.shape
    N, _, L_in = x.shape
    L_out = y.shape[2]
    within = padding == 0 and (L_out - 1) * stride + K <= L_in
    copied = config.copy_to_nlc or not within or x.stride(2) != 1 or (N > 1 and x.stride(0) * x.element_size() % 16 != 0)
    # samples of the copy, too, begin at whole vectors: at multiples of the stride
    rounds = tf32 and not fusion.rounded
    rows = padded_copy(x, padding, (L_out + triton.cdiv(K, stride) - 1) * stride, rounds) if copied else x
    vector = 16 // weight.element_size()
    taps = triton.cdiv(K, vector) * vector
    w, stride_wo, _ = weight_matrix(weight.transpose(1, 2), tap_major=True, rounded=tf32, channels=taps, aligned=True)
    # a single sample may have any length
    between = rows.stride(0) if N > 1 else stride
    x_desc = descriptor(rows, [N, L_out, K], [between, stride, 1], [1, config.BLOCK_M, config.BLOCK_K])
    w_desc, narrow_desc = (descriptor(w, [C_out, K], [stride_wo, 1], [n, config.BLOCK_K]) for n in (config.BLOCK_N, NARROW))
    # channels beyond the last whole tile, if few, are shared among the programs instead of a tile that is mostly empty
    tiles_n = C_out // config.BLOCK_N
    left = C_out - tiles_n * config.BLOCK_N
    narrow = NARROW if 0 < left <= tiles_n * NARROW else 0
    tiles_n += left > 0 and not narrow
    tiles_m = triton.cdiv(L_out, config.BLOCK_M)
    launch(
        conv1d_dense_frames_fwd_kernel,
        (tiles_n * tiles_m * N,),
        x_desc,
        w_desc,
        narrow_desc,
        bias if bias is not None else w,
        y,
        L_out,
        C_out,
        *y.stride(),
        tiles_m,
        tiles_n,
        K=K,
        NARROW=narrow,
        ROUND_X=rounds and not copied,
        PRECISION=dot_precision(x.dtype, tf32),
        HAS_BIAS=bias is not None,
        **fusion.arguments(y),
        INT64=needs_int64(y, *fusion.views(y)),
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        BLOCK_K=config.BLOCK_K,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
