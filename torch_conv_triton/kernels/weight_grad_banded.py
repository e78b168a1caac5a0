"""Gradient of a long depthwise filter at stride and dilation 1, on tensor cores: products of neighbourhoods, then diagonals.

Positions are cut into rows of R. The product of R gradients with the WINDOW samples of x around them, summed over all rows, is a
matrix whose entry (j, i) belongs to tap j - i: a tap is the sum of a diagonal. Few of the products are wasted where the filter is
not shorter than R, every load is aligned where x is, and one channel after the other keeps tensor cores busy.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from torch_conv_triton.kernels.common import dot_precision, interpreted, needs_int64, widen
from torch_conv_triton.kernels.launch import launch, workspace
from torch_conv_triton.kernels.reduction import shares_of, sum_partials


@triton.jit(do_not_specialize=["N", "blocks", "blocks_per_sample", "blocks_per_split", "tiles_o"])
def conv1d_weight_grad_banded_kernel(
    dy_ptr,  # (N, C_out, L_out), any strides
    x_ptr,  # (N, C_in, L_in), any strides
    out_ptr,  # (splits, C_out, ROWS, R) contiguous
    bias_ptr,  # (splits, C_out) contiguous
    N,
    L_in,
    L_out,
    C_OUT,
    blocks,
    blocks_per_sample,
    blocks_per_split,
    padding,
    stride_dn,
    stride_do,
    stride_dl,
    stride_xn,
    stride_xc,
    stride_xl,
    tiles_o,
    MULTIPLIER: tl.constexpr,
    ROWS: tl.constexpr,  # K + R - 1
    SHIFT: tl.constexpr,  # what `padding` lacks to a multiple of R
    HAS_BIAS: tl.constexpr,
    PRECISION: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    R: tl.constexpr,
    WINDOW: tl.constexpr,
):
    pid = tl.program_id(0)
    o = (pid % tiles_o) * BLOCK_O + tl.arange(0, BLOCK_O)
    split = pid // tiles_o
    first = split * blocks_per_split
    last = tl.minimum(first + blocks_per_split, blocks)

    i = tl.arange(0, R)
    j = tl.arange(0, WINDOW)
    o_mask = (o < C_OUT)[:, None, None]
    dy_channels = (widen(o, INT64) * stride_do)[:, None, None]
    x_channels = (widen(o // MULTIPLIER, INT64) * stride_xc)[:, None, None]
    acc = tl.zeros((BLOCK_O, WINDOW, R), tl.float32)
    sums = tl.zeros((BLOCK_O, BLOCK_Q, R), tl.float32)
    for b in range(first, last):
        n = (b // blocks_per_sample).to(tl.int64)
        q = (widen(b % blocks_per_sample, INT64) * BLOCK_Q + tl.arange(0, BLOCK_Q)) * R
        l_out = q[:, None] + i[None, :]
        # a multiple of R, so that rows of x start where rows of memory do
        at = (q - (padding + SHIFT))[:, None] + j[None, :]
        dy = tl.load(
            dy_ptr + n * stride_dn + (dy_channels + (l_out * stride_dl)[None, :, :]),
            mask=o_mask & (l_out < L_out)[None, :, :],
            other=0.0,
        )
        if HAS_BIAS:
            sums += dy.to(tl.float32)
        x_mask = (at >= 0) & (at < L_in) & (j < ROWS + SHIFT)[None, :]
        x = tl.load(
            x_ptr + n * stride_xn + (x_channels + (at * stride_xl)[None, :, :]), mask=o_mask & x_mask[None, :, :], other=0.0
        )
        if interpreted():
            # the interpreter multiplies the bit patterns of bfloat16
            dy = dy.to(tl.float32)
            x = x.to(tl.float32)
        acc = tl.dot(tl.permute(x, (0, 2, 1)), dy, acc, input_precision=PRECISION)
    row = j - SHIFT
    out_ptr += split.to(tl.int64) * C_OUT * ROWS * R
    offsets = (o * (ROWS * R))[:, None, None] + (row[:, None] * R + i[None, :])[None, :, :]
    tl.store(out_ptr + offsets, acc, mask=o_mask & ((row >= 0) & (row < ROWS))[None, :, None])
    if HAS_BIAS:
        tl.store(bias_ptr + split.to(tl.int64) * C_OUT + o, tl.sum(tl.sum(sums, 2), 1), mask=o < C_OUT)


def conv1d_weight_grad_banded(
    grad_output: Tensor, x: Tensor, grad_weight: Tensor, grad_bias: Tensor | None, padding: int, config
) -> None:
    """Write the gradient of a depthwise convolution's weight into the contiguous grad_weight ``(C_out, 1, K)``, and that of its
    bias into grad_bias ``(C_out,)`` if there is one.

    grad_output ``(N, C_out, L_out)`` and x ``(N, C_in, L_in)``, any strides; C_out is a multiple of C_in; stride and dilation
    are 1. `config` is a `WeightGradConfig` whose BLOCK_C is R; the workspace holds splits x C_out x (K + R - 1) x R float32,
    and one more a split and channel for the bias.
    """
    N, C_out, L_out = grad_output.shape
    K, R = grad_weight.shape[2], config.BLOCK_C
    rows, shift = K + R - 1, -padding % R
    per_sample = triton.cdiv(L_out, config.BLOCK_L)
    blocks = N * per_sample
    per_split, splits = shares_of(blocks, config.splits)
    partials = workspace((splits, C_out, rows, R), torch.float32, x.device)
    bias_partials = None if grad_bias is None else workspace((splits, C_out), torch.float32, x.device)
    tiles_o = triton.cdiv(C_out, config.BLOCK_O)
    launch(
        conv1d_weight_grad_banded_kernel,
        (tiles_o * splits,),
        grad_output,
        x,
        partials,
        partials if bias_partials is None else bias_partials,
        N,
        x.shape[2],
        L_out,
        C_out,
        blocks,
        per_sample,
        per_split,
        padding,
        *grad_output.stride(),
        *x.stride(),
        tiles_o,
        MULTIPLIER=C_out // x.shape[1],
        ROWS=rows,
        SHIFT=shift,
        HAS_BIAS=grad_bias is not None,
        # aten's depthwise gradients do not round to TF32 either
        PRECISION=dot_precision(x.dtype, tf32=False),
        INT64=needs_int64(x, grad_output),
        BLOCK_O=config.BLOCK_O,
        BLOCK_Q=config.BLOCK_L // R,
        R=R,
        WINDOW=triton.next_power_of_2(rows + shift),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    sum_partials(partials, grad_weight, R, bias_partials, grad_bias)
