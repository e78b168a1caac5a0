"""Depthwise convolution of channels-last x at stride 1: a thread slides along positions, each sample loaded once.

A thread holds a 16-byte vector of channels, and of their taps, and computes several outputs in a row, a dilation apart, from the
samples between the first and the last that they need. The outputs of a row are put together in registers, so at dilation 1 NCL
outputs too are stored as vectors.
"""

from __future__ import annotations

from math import gcd

import triton
import triton.language as tl
from torch import Tensor

from torch_conv_triton.kernels.common import first_tap, needs_int64, position_in_x, widen
from torch_conv_triton.kernels.epilogue import NO_FUSION, Fusion, store_tile
from torch_conv_triton.kernels.launch import launch
from torch_conv_triton.kernels.program import is_plain
from torch_conv_triton.kernels.vectors import put_together


@triton.jit(do_not_specialize=["tiles_l", "tiles_c"])
def conv1d_depthwise_sliding_fwd_kernel(
    x_ptr,  # (N, C, L_in), C contiguous
    w_ptr,  # (C, 1, K), any strides
    b_ptr,  # (C,), or unused
    y_ptr,  # (N, C, L_out), any strides
    L_in,
    y_vectors,  # L_out / Y_VECTOR
    C,
    padding,
    dilation,
    stride_xn,
    stride_xl,
    stride_wo,
    stride_wk,
    stride_yn,
    stride_yc,  # in vectors of Y_VECTOR elements
    stride_yl,
    tiles_l,  # of STEPS tiles, each of BLOCK_M outputs
    tiles_c,
    more,  # as `store_outputs` takes it
    more_strides,
    K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EPILOGUE: tl.constexpr,
    PADDING_MODE: tl.constexpr,
    Y_NCL: tl.constexpr,  # L is the contiguous dimension of y; then the dilation is 1
    Y_VECTOR: tl.constexpr,  # elements; every row of y starts and ends at a multiple of it
    INT64: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    RUN: tl.constexpr,  # outputs in a row, `dilation` apart
):
    RUNS: tl.constexpr = BLOCK_M // RUN
    pid = tl.program_id(0)
    tile_c = pid % tiles_c
    tile_l = (pid // tiles_c) % tiles_l
    sample = (pid // (tiles_c * tiles_l)).to(tl.int64)
    o = tile_c * BLOCK_N + tl.arange(0, BLOCK_N)
    o_mask = o < C
    x_rows = x_ptr + sample * stride_xn + o[None, :]
    L_out = y_vectors * Y_VECTOR
    stride_yc *= Y_VECTOR

    weights = ()
    for k in tl.static_range(K):
        w = tl.load(w_ptr + o.to(tl.int64) * stride_wo + k * stride_wk, mask=o_mask, other=0.0)
        weights = weights + (w.to(tl.float32)[None, :],)
    bias = tl.zeros((BLOCK_N,), dtype=tl.float32)
    if HAS_BIAS:
        bias = tl.load(b_ptr + o, mask=o_mask, other=0.0).to(tl.float32)

    for step in range(STEPS):
        start = (widen(tile_l, INT64) * STEPS + step) * BLOCK_M
        # as many runs as the dilation take turns over RUN * dilation positions
        run = start // RUN + tl.arange(0, RUNS)
        first = run // dilation * (RUN * dilation) + run % dilation
        window = ()
        for j in tl.static_range(RUN + K - 1):
            at = position_in_x(first + (j * dilation - padding), L_in, PADDING_MODE)
            mask = ((at >= 0) & (at < L_in))[:, None] & o_mask[None, :]
            window = window + (tl.load(x_rows + (at * stride_xl)[:, None], mask=mask, other=0.0),)
        outputs = ()
        for t in tl.static_range(RUN):
            acc = tl.zeros((RUNS, BLOCK_N), dtype=tl.float32) + bias[None, :]
            for k in tl.static_range(K):
                acc += window[t + k].to(tl.float32) * weights[k]
            if is_plain(EPILOGUE):
                acc = acc.to(y_ptr.dtype.element_ty)
            outputs = outputs + (acc[:, :, None],)
        if Y_NCL:
            tile = tl.reshape(tl.permute(put_together(outputs), (1, 0, 2)), (BLOCK_N, BLOCK_M))
            l_out = start + tl.arange(0, BLOCK_M)
            store_tile(
                (tile,),
                sample,
                l_out,
                l_out < L_out,
                0,
                tile_c * BLOCK_N,
                C,
                b_ptr,
                y_ptr,
                stride_yn,
                stride_yc,
                stride_yl,
                more,
                more_strides,
                EPILOGUE,
                False,
                True,
                INT64,
            )
        else:
            for t in tl.static_range(RUN):
                l_out = first + t * dilation
                tile = tl.reshape(outputs[t], (RUNS, BLOCK_N))
                store_tile(
                    (tile,),
                    sample,
                    l_out,
                    l_out < L_out,
                    0,
                    tile_c * BLOCK_N,
                    C,
                    b_ptr,
                    y_ptr,
                    stride_yn,
                    stride_yc,
                    stride_yl,
                    more,
                    more_strides,
                    EPILOGUE,
                    False,
                    False,
                    INT64,
                )


def conv1d_depthwise_sliding(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    padding: int,
    dilation: int,
    config,
    fusion: Fusion = NO_FUSION,
    reverse: bool = False,
) -> None:
    """Write the depthwise convolution, of stride 1, of x ``(N, C, L_in)`` into y ``(N, C, L_out)``, any strides.

    Weight ``(C, 1, K)``. y has its length contiguous at dilation 1 alone. Fast for channels-last x. A program computes `steps`
    tiles of BLOCK_M outputs x BLOCK_N channels, a thread `run` outputs in a row, `dilation` apart.
    `reverse`: the last tap comes first.
    """
    N, C, L_in = x.shape
    L_out = y.shape[2]
    turns = triton.cdiv(L_out, config.run * dilation) * config.run * dilation
    tiles_l = triton.cdiv(turns, config.BLOCK_M * config.steps)
    tiles_c = triton.cdiv(C, config.BLOCK_N)
    y_ncl = y.stride(2) == 1
    y_vector = gcd(16 // y.element_size(), y.stride(0), y.stride(1), L_out) if y_ncl else 1
    taps, tap_stride = first_tap(weight, reverse)
    launch(
        conv1d_depthwise_sliding_fwd_kernel,
        (tiles_l * tiles_c * N,),
        x,
        taps,
        bias if bias is not None else weight,
        y,
        L_in,
        L_out // y_vector,
        C,
        padding,
        dilation,
        x.stride(0),
        x.stride(2),
        weight.stride(0),
        tap_stride,
        y.stride(0),
        y.stride(1) // y_vector,
        y.stride(2),
        tiles_l,
        tiles_c,
        K=weight.shape[2],
        HAS_BIAS=bias is not None,
        PADDING_MODE=fusion.padding_mode,
        **fusion.arguments(y),
        Y_NCL=y_ncl,
        Y_VECTOR=y_vector,
        INT64=needs_int64(x, y, *fusion.views(y)),
        STEPS=config.steps,
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        RUN=config.run,
        num_warps=config.num_warps,
    )
