"""Depthwise convolution, plain and transposed, any channel multiplier, on CUDA cores: there is no matrix to multiply."""

from __future__ import annotations

from math import gcd

import triton
import triton.language as tl
from torch import Tensor

from torch_conv_triton.kernels.common import first_tap, needs_int64, position_in_x, widen
from torch_conv_triton.kernels.epilogue import NO_FUSION, Fusion, store_tile
from torch_conv_triton.kernels.launch import launch


@triton.jit(do_not_specialize=["tiles_l", "tiles_c"])
def conv1d_depthwise_fwd_kernel(
    x_ptr,  # (N, C_in, L_in), any strides
    w_ptr,  # (C_out, 1, K); transposed: (C_in, C_out / C_in, K), which is the same rows
    b_ptr,  # (C_out,), or unused
    y_ptr,  # (N, C_out, L_out), any strides
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
    stride_wk,
    stride_yn,
    stride_yc,
    stride_yl,
    tiles_l,
    tiles_c,
    more,  # as `store_outputs` takes it
    more_strides,
    MULTIPLIER: tl.constexpr,
    K: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    GCD: tl.constexpr,  # of stride and dilation (transposed only)
    TAP_STEP: tl.constexpr,  # stride // GCD: taps of one output phase are this far apart
    TAP_INVERSE: tl.constexpr,  # inverse of dilation // GCD modulo TAP_STEP
    HAS_BIAS: tl.constexpr,
    EPILOGUE: tl.constexpr,
    PADDING_MODE: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # tiles along L are the fastest: neighbours share the halo
    pid = tl.program_id(0)
    tile_l = pid % tiles_l
    tile_c = (pid // tiles_l) % tiles_c
    sample = (pid // (tiles_l * tiles_c)).to(tl.int64)

    l_out = widen(tile_l, INT64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o = tile_c * BLOCK_N + tl.arange(0, BLOCK_N)
    o_mask = o < C_OUT
    row_mask = l_out < L_out
    x_rows = x_ptr + sample * stride_xn + (widen(o // MULTIPLIER, INT64) * stride_xc)[None, :]
    w_rows = w_ptr + o.to(tl.int64) * stride_wo

    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if TRANSPOSED:
        # output t receives x[(t + padding - k * dilation) / stride] for the taps k of its phase, an arithmetic progression
        u = l_out + padding
        phase = u % stride
        first = ((phase // GCD) * TAP_INVERSE % TAP_STEP).to(tl.int32)
        pos = u // stride - (first * dilation - phase) // stride
        row_mask_taps = row_mask & (phase % GCD == 0)
        for j in range(0, (K + TAP_STEP - 1) // TAP_STEP):
            k = first + j * TAP_STEP
            at = pos - j * (dilation // GCD)
            mask = row_mask_taps & (k < K) & (at >= 0) & (at < L_in)
            x = tl.load(x_rows + (at * stride_xl)[:, None], mask=mask[:, None] & o_mask[None, :], other=0.0)
            w = tl.load(w_rows[None, :] + (k * stride_wk)[:, None], mask=(k < K)[:, None] & o_mask[None, :], other=0.0)
            acc += x.to(tl.float32) * w.to(tl.float32)
    else:
        for k in tl.range(0, K, loop_unroll_factor=4):
            at = position_in_x(l_out * stride - padding + k * dilation, L_in, PADDING_MODE)
            mask = row_mask & (at >= 0) & (at < L_in)
            x = tl.load(x_rows + (at * stride_xl)[:, None], mask=mask[:, None] & o_mask[None, :], other=0.0)
            w = tl.load(w_rows + k * stride_wk, mask=o_mask, other=0.0)
            acc += x.to(tl.float32) * w.to(tl.float32)[None, :]
    store_tile(
        (acc,),
        sample,
        l_out,
        row_mask,
        0,
        tile_c * BLOCK_N,
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


def conv1d_depthwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    stride: int,
    padding: int,
    dilation: int,
    transposed: bool,
    config,
    fusion: Fusion = NO_FUSION,
    reverse: bool = False,
) -> None:
    """Write the depthwise convolution of x ``(N, C_in, L_in)`` into y ``(N, C_out, L_out)``; C_out is a multiple of C_in.

    Weight ``(C_out, 1, K)``, or ``(C_in, C_out / C_in, K)`` when `transposed`. Any strides. A program computes
    BLOCK_M positions x BLOCK_N channels. `reverse`: the last tap comes first.
    """
    N, C_in, L_in = x.shape
    _, C_out, L_out = y.shape
    if transposed:
        weight = weight.reshape(C_out, 1, weight.shape[2])
    common = gcd(stride, dilation) if transposed else 1
    step = stride // common if transposed else 1
    tiles_l = triton.cdiv(L_out, config.BLOCK_M)
    tiles_c = triton.cdiv(C_out, config.BLOCK_N)
    taps, tap_stride = first_tap(weight, reverse)
    launch(
        conv1d_depthwise_fwd_kernel,
        (tiles_l * tiles_c * N,),
        x,
        taps,
        bias if bias is not None else weight,
        y,
        L_in,
        L_out,
        C_out,
        stride,
        padding,
        dilation,
        *x.stride(),
        weight.stride(0),
        tap_stride,
        *y.stride(),
        tiles_l,
        tiles_c,
        MULTIPLIER=C_out // C_in,
        K=weight.shape[2],
        TRANSPOSED=transposed,
        GCD=common,
        TAP_STEP=step,
        TAP_INVERSE=pow(dilation // common, -1, step) if step > 1 else 0,
        HAS_BIAS=bias is not None,
        PADDING_MODE=fusion.padding_mode,
        **fusion.arguments(y),
        INT64=needs_int64(x, y, *fusion.views(y)),
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        num_warps=config.num_warps,
    )
