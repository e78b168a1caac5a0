"""Depthwise convolution of rows of a few samples, as in decoding: lanes run over channels, a thread holds whole rows.

A tile along positions would be mostly empty. Here each thread loads the few samples of its rows and computes all of their
outputs; what neighbouring threads load lies side by side, so lines of memory are used whole.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from torch_conv_triton.kernels.common import first_tap
from torch_conv_triton.kernels.launch import launch


@triton.constexpr_function
def sample_of(t, k, L_IN, STRIDE, PADDING, DILATION):
    """The sample that tap k carries to output t; below 0 if it is none."""
    at = t * STRIDE - PADDING + k * DILATION
    return at if at < L_IN else -1


@triton.jit(do_not_specialize=["N", "C_OUT", "tiles_c"])
def conv1d_depthwise_short_fwd_kernel(
    x_ptr,  # (N, C_in, L_IN), any strides
    w_ptr,  # (C_out, 1, K), any strides
    b_ptr,  # (C_out,), or unused
    y_ptr,  # (N, C_out, L_OUT), any strides
    N,
    C_OUT,
    stride_xn,
    stride_xc,
    stride_xl,
    stride_wo,
    stride_wk,
    stride_yn,
    stride_yc,
    stride_yl,
    tiles_c,
    MULTIPLIER: tl.constexpr,
    K: tl.constexpr,
    L_IN: tl.constexpr,
    L_OUT: tl.constexpr,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    DILATION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    pid = tl.program_id(0)
    n = pid // tiles_c * BLOCK_M + tl.arange(0, BLOCK_M)
    o = pid % tiles_c * BLOCK_N + tl.arange(0, BLOCK_N)
    o_mask = o < C_OUT
    mask = (n < N)[:, None] & o_mask[None, :]
    x_rows = x_ptr + (n.to(tl.int64) * stride_xn)[:, None] + ((o // MULTIPLIER).to(tl.int64) * stride_xc)[None, :]
    y_rows = y_ptr + (n.to(tl.int64) * stride_yn)[:, None] + (o.to(tl.int64) * stride_yc)[None, :]
    w_rows = w_ptr + o.to(tl.int64) * stride_wo

    samples = ()
    for j in tl.static_range(L_IN):
        samples = samples + (tl.load(x_rows + j * stride_xl, mask=mask, other=0.0),)
    weights = ()
    for k in tl.static_range(K):
        weights = weights + (tl.load(w_rows + k * stride_wk, mask=o_mask, other=0.0).to(tl.float32)[None, :],)
    bias = tl.zeros((BLOCK_N,), dtype=tl.float32)
    if HAS_BIAS:
        bias = tl.load(b_ptr + o, mask=o_mask, other=0.0).to(tl.float32)
    for t in tl.static_range(L_OUT):
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32) + bias[None, :]
        for k in tl.static_range(K):
            if sample_of(t, k, L_IN, STRIDE, PADDING, DILATION) >= 0:
                acc += samples[sample_of(t, k, L_IN, STRIDE, PADDING, DILATION)].to(tl.float32) * weights[k]
        tl.store(y_rows + t * stride_yl, acc.to(y_ptr.dtype.element_ty), mask=mask)


def conv1d_depthwise_short(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    stride: int,
    padding: int,
    dilation: int,
    config,
    reverse: bool = False,
) -> None:
    """Write the depthwise convolution of x ``(N, C_in, L_in)`` into y ``(N, C_out, L_out)``; C_out is a multiple of C_in.

    Weight ``(C_out, 1, K)``. Any strides; lengths and taps are few, as they are held in registers. A program computes all
    positions of BLOCK_M samples x BLOCK_N channels. `reverse`: the last tap comes first.
    """
    N, C_in, L_in = x.shape
    _, C_out, L_out = y.shape
    tiles_c = triton.cdiv(C_out, config.BLOCK_N)
    taps, tap_stride = first_tap(weight, reverse)
    launch(
        conv1d_depthwise_short_fwd_kernel,
        (tiles_c * triton.cdiv(N, config.BLOCK_M),),
        x,
        taps,
        bias if bias is not None else weight,
        y,
        N,
        C_out,
        *x.stride(),
        weight.stride(0),
        tap_stride,
        *y.stride(),
        tiles_c,
        MULTIPLIER=C_out // C_in,
        K=weight.shape[2],
        L_IN=L_in,
        L_OUT=L_out,
        STRIDE=stride,
        PADDING=padding,
        DILATION=dilation,
        HAS_BIAS=bias is not None,
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        num_warps=config.num_warps,
    )
