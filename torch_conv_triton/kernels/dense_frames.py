"""Long filters over one channel at a stride of whole vectors, as in filter banks: the windows are rows of a matrix.

The window of an output begins `stride` samples after that of the output before, so the windows are the rows of a matrix that
overlap in memory, and the convolution is a product with that matrix: pointwise, over K channels.
"""

from __future__ import annotations

from dataclasses import replace

import triton
import triton.language as tl
from torch import Tensor

from torch_conv_triton.kernels.common import round_tf32, widen
from torch_conv_triton.kernels.dense_tma import conv1d_dense_tma
from torch_conv_triton.kernels.launch import launch, workspace


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


def conv1d_dense_frames(
    x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, stride: int, padding: int, tf32: bool, config
) -> None:
    """Write the convolution of x ``(N, 1, L_in)`` with weight ``(C_out, 1, K)`` into y ``(N, C_out, L_out)``, any strides.

    `stride` is a multiple of 16 bytes, BLOCK_K divides K. x is copied, rounded to TF32 if `tf32`. `padding` is that before x.
    """
    C_out, _, K = weight.shape
    N, _, L_out = y.shape
    # samples of the copy, too, begin at whole vectors: at multiples of the stride
    rows = padded_copy(x, padding, (L_out + triton.cdiv(K, stride) - 1) * stride, rounded=tf32)
    frames = rows.as_strided((N, K, L_out), (rows.stride(0), 1, stride))
    config = replace(config, copy_to_nlc=True)
    # channels beyond the last whole tile, if few, get a narrow tile instead of one that is mostly empty
    whole = C_out // config.BLOCK_N * config.BLOCK_N
    narrow = max(16, triton.next_power_of_2(C_out - whole))
    parts = [(0, C_out, config)]
    if whole and C_out > whole and narrow < config.BLOCK_N:
        parts = [(0, whole, config), (whole, C_out, replace(config, BLOCK_N=narrow))]
    for first, last, tile in parts:
        part = slice(first, last)
        taps = weight[part].transpose(1, 2)
        conv1d_dense_tma(frames, taps, bias if bias is None else bias[part], y[:, part], 1, 0, 1, 1, tf32, tile)
