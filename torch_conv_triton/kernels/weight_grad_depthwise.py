"""Gradient of a depthwise convolution's weight on CUDA cores: every tap is a sum of products of two rows.

A program keeps BLOCK_L x BLOCK_O running sums a tap and adds up over the positions at its end. Shares of the positions are added
up in a second, fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from torch_conv_triton.kernels.common import needs_int64, widen
from torch_conv_triton.kernels.launch import launch
from torch_conv_triton.kernels.reduction import block_positions, blocks_of, partial_sums, shares_of, sum_partials


@triton.jit(do_not_specialize=["N", "blocks", "blocks_per_sample", "blocks_per_split", "tiles_o", "tiles_k"])
def conv1d_weight_grad_depthwise_kernel(
    dy_ptr,  # (N, C_out, L_out), any strides
    x_ptr,  # (N, C_in, L_in), any strides
    out_ptr,  # (splits, C_out, 1, K) contiguous
    bias_ptr,  # (splits, C_out) contiguous
    N,
    L_in,
    L_out,
    C_OUT,
    blocks,
    blocks_per_sample,
    blocks_per_split,
    stride,
    padding,
    dilation,
    stride_dn,
    stride_do,
    stride_dl,
    stride_xn,
    stride_xc,
    stride_xl,
    tiles_o,
    tiles_k,
    MULTIPLIER: tl.constexpr,
    K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FLATTEN: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    # taps are the fastest: they read the same rows
    pid = tl.program_id(0)
    k = (pid % tiles_k) * BLOCK_K + tl.arange(0, BLOCK_K)
    o = (pid // tiles_k) % tiles_o * BLOCK_O + tl.arange(0, BLOCK_O)
    split = pid // (tiles_k * tiles_o)
    first = split * blocks_per_split
    last = tl.minimum(first + blocks_per_split, blocks)

    o_mask = o < C_OUT
    dy_channels = (widen(o, INT64) * stride_do)[None, None, :]
    x_channels = (widen(o // MULTIPLIER, INT64) * stride_xc)[None, None, :]
    acc = tl.zeros((BLOCK_K, BLOCK_L, BLOCK_O), tl.float32)
    sums = tl.zeros((1, BLOCK_L, BLOCK_O), tl.float32)
    for b in range(first, last):
        n, l_out, row_mask = block_positions(b, last, N, L_out, blocks_per_sample, FLATTEN, INT64, BLOCK_L)
        if FLATTEN:
            dy_rows = (dy_ptr + n * stride_dn)[None, :, None]
            x_rows = (x_ptr + n * stride_xn)[None, :, None]
        else:
            dy_rows = dy_ptr + n * stride_dn
            x_rows = x_ptr + n * stride_xn
        dy = tl.load(
            dy_rows + ((l_out * stride_dl)[None, :, None] + dy_channels),
            mask=row_mask[None, :, None] & o_mask[None, None, :],
            other=0.0,
        )
        at = (l_out * stride - padding)[None, :] + (k * dilation)[:, None]
        mask = row_mask[None, :] & (at >= 0) & (at < L_in) & (k < K)[:, None]
        x = tl.load(
            x_rows + ((at * stride_xl)[:, :, None] + x_channels), mask=mask[:, :, None] & o_mask[None, None, :], other=0.0
        )
        acc += dy.to(tl.float32) * x.to(tl.float32)
        if HAS_BIAS:
            sums += dy.to(tl.float32)
    out_ptr += split.to(tl.int64) * C_OUT * K
    tl.store(
        out_ptr + (k[:, None] + o[None, :] * K),
        tl.sum(acc, 1).to(out_ptr.dtype.element_ty),
        mask=(k < K)[:, None] & o_mask[None, :],
    )
    if HAS_BIAS:
        bias = tl.sum(tl.sum(sums, 1), 0)
        # one of those that read these rows
        tl.store(
            bias_ptr + split.to(tl.int64) * C_OUT + o, bias.to(bias_ptr.dtype.element_ty), mask=o_mask & (pid % tiles_k == 0)
        )


def conv1d_weight_grad_depthwise(
    grad_output: Tensor,
    x: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor | None,
    stride: int,
    padding: int,
    dilation: int,
    config,
) -> None:
    """Write the gradient of a depthwise convolution's weight into the contiguous grad_weight ``(C_out, 1, K)``, and that of its
    bias into grad_bias ``(C_out,)`` if there is one.

    grad_output ``(N, C_out, L_out)`` and x ``(N, C_in, L_in)``, any strides; C_out is a multiple of C_in. `config` is a
    `WeightGradConfig` whose BLOCK_C counts taps; with more than one split the workspace holds `splits` float32 copies of
    the gradients.
    """
    N, C_out, L_out = grad_output.shape
    K = grad_weight.shape[2]
    flatten, per_sample, blocks = blocks_of(N, L_out, config.BLOCK_L)
    per_split, splits = shares_of(blocks, config.splits)
    partials = partial_sums(grad_weight, splits)
    bias_partials = None if grad_bias is None else partial_sums(grad_bias, splits)
    tiles_o, tiles_k = triton.cdiv(C_out, config.BLOCK_O), triton.cdiv(K, config.BLOCK_C)
    launch(
        conv1d_weight_grad_depthwise_kernel,
        (tiles_k * tiles_o * splits,),
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
        stride,
        padding,
        dilation,
        *grad_output.stride(),
        *x.stride(),
        tiles_o,
        tiles_k,
        MULTIPLIER=C_out // x.shape[1],
        K=K,
        HAS_BIAS=grad_bias is not None,
        FLATTEN=flatten,
        INT64=needs_int64(x, grad_output),
        BLOCK_K=config.BLOCK_C,
        BLOCK_O=config.BLOCK_O,
        BLOCK_L=config.BLOCK_L,
        num_warps=config.num_warps,
    )
    if splits > 1:
        sum_partials(partials, grad_weight, 1, bias_partials, grad_bias)
