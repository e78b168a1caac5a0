"""Convolution to very few channels, at stride 1, on CUDA cores: whole vectors of x in, sums over channels in registers.

A matrix product would be mostly empty columns. Instead a thread computes a vector of neighbouring outputs from the vectors of x
around it, which it loads as they lie in memory and shifts in registers, where a shift is only a choice of elements.
"""

from __future__ import annotations

from math import gcd

import triton
import triton.language as tl
from torch import Tensor

from torch_conv_triton.kernels.common import needs_int64, widen
from torch_conv_triton.kernels.epilogue import NO_FUSION, Fusion, store_outputs
from torch_conv_triton.kernels.launch import launch
from torch_conv_triton.kernels.vectors import put_together, take_apart


@triton.jit(do_not_specialize=["x_units", "y_units", "stride_xn", "stride_xc", "stride_yn", "stride_yc", "tiles"])
def conv1d_dense_few_outputs_fwd_kernel(
    x_ptr,  # (N, C_in, L_in), L contiguous
    w_ptr,  # (C_out, C_in, K), any strides
    b_ptr,  # (C_out,), or unused
    y_ptr,  # (N, C_out, L_out), any strides
    x_units,  # L_in, and the strides of x, in units of X_UNIT elements
    y_units,  # L_out, and the strides of samples and channels of y, in units of Y_UNIT elements
    stride_xn,
    stride_xc,
    stride_wo,
    stride_wc,
    stride_wk,
    stride_yn,
    stride_yc,
    stride_yl,
    tiles,  # in a row
    more,  # as `store_outputs` takes it
    more_strides,
    C_IN: tl.constexpr,
    C_OUT: tl.constexpr,
    K: tl.constexpr,
    DILATION: tl.constexpr,
    FIRST: tl.constexpr,  # vector of x, counted from that of the outputs, with the first sample that they need
    SHIFT: tl.constexpr,  # where it is in there
    NEIGHBOURS: tl.constexpr,  # vectors of x that they need
    VECTOR: tl.constexpr,
    X_UNIT: tl.constexpr,
    Y_UNIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EPILOGUE: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,  # channels side by side
):
    VECTORS: tl.constexpr = BLOCK_M // VECTOR
    pid = tl.program_id(0)
    sample = (pid // tiles).to(tl.int64)
    row = tl.arange(0, BLOCK_K * VECTORS)
    start = widen(pid % tiles, INT64) * VECTORS
    v = start + row % VECTORS
    element = tl.arange(0, VECTOR)[None, :]
    x_sample = x_ptr + sample * stride_xn * X_UNIT

    sums = ()
    for _ in tl.static_range(C_OUT):
        sums = sums + (tl.zeros((BLOCK_K * VECTORS, VECTOR), dtype=tl.float32),)
    for first_channel in tl.range(0, C_IN, BLOCK_K, loop_unroll_factor=2):
        c = tl.zeros((), dtype=tl.int64) + first_channel
        if BLOCK_K > 1:
            c += (row // VECTORS)[:, None].to(tl.int64)
        x_row = x_sample + c * stride_xc * X_UNIT
        window = ()
        for j in tl.static_range(NEIGHBOURS):
            at = ((v + (FIRST + j)) * VECTOR)[:, None] + element
            mask = (at >= 0) & (at < x_units * X_UNIT)
            if C_IN % BLOCK_K != 0:
                mask = mask & (c < C_IN)
            window = window + take_apart(tl.load(x_row + at, mask=mask, other=0.0).to(tl.float32), VECTOR)
        added = ()
        for o in tl.static_range(C_OUT):
            weights = ()
            for k in tl.static_range(K):
                pointer = w_ptr + (c * stride_wc + o * stride_wo + k * stride_wk)
                weights = weights + (tl.load(pointer, mask=c < C_IN, other=0.0).to(tl.float32),)
            parts = take_apart(sums[o], VECTOR)
            outputs = ()
            for e in tl.static_range(VECTOR):
                acc = parts[e]
                for k in tl.static_range(K):
                    acc += window[SHIFT + e + k * DILATION] * weights[k]
                outputs = outputs + (acc,)
            added = added + (put_together(outputs),)
        sums = added

    at = ((start + tl.arange(0, VECTORS)) * VECTOR)[:, None] + element
    for o in tl.static_range(C_OUT):
        y = sums[o]
        if BLOCK_K > 1:
            y = tl.sum(tl.reshape(y, (BLOCK_K, VECTORS, VECTOR)), 0)
        store_outputs(
            y,
            sample,
            at,
            at < y_units * Y_UNIT,
            0,
            tl.full((1, 1), o, tl.int32),
            tl.full((1, 1), True, tl.int1),
            b_ptr,
            y_ptr,
            stride_yn * Y_UNIT,
            stride_yc * Y_UNIT,
            stride_yl,
            more,
            more_strides,
            EPILOGUE,
            HAS_BIAS,
            INT64,
        )


def conv1d_dense_few_outputs(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    padding: int,
    dilation: int,
    config,
    fusion: Fusion = NO_FUSION,
) -> None:
    """Write the convolution, of stride 1, of x ``(N, C_in, L_in)`` with weight ``(C_out, C_in, K)`` into y ``(N, C_out, L_out)``.

    x has L contiguous; rows that start on 16 bytes are read, and written, by whole vectors. `padding` is that before x; the
    length of y says what is after it. A program computes BLOCK_M positions, BLOCK_K input channels side by side.
    """
    N, C_in, L_in = x.shape
    _, C_out, L_out = y.shape
    K = weight.shape[2]
    vector = 16 // x.element_size()
    x_unit = gcd(vector, L_in, x.stride(0), x.stride(1))
    y_unit = gcd(vector, L_out, y.stride(0), y.stride(1))
    shift = -padding % vector
    tiles = triton.cdiv(L_out, config.BLOCK_M)
    launch(
        conv1d_dense_few_outputs_fwd_kernel,
        (tiles * N,),
        x,
        weight,
        bias if bias is not None else weight,
        y,
        L_in // x_unit,
        L_out // y_unit,
        x.stride(0) // x_unit,
        x.stride(1) // x_unit,
        *weight.stride(),
        y.stride(0) // y_unit,
        y.stride(1) // y_unit,
        y.stride(2),
        tiles,
        C_IN=C_in,
        C_OUT=C_out,
        K=K,
        DILATION=dilation,
        FIRST=-padding // vector,
        SHIFT=shift,
        NEIGHBOURS=(shift + vector - 1 + (K - 1) * dilation) // vector + 1,
        VECTOR=vector,
        X_UNIT=x_unit,
        Y_UNIT=y_unit,
        HAS_BIAS=bias is not None,
        **fusion.arguments(y),
        INT64=needs_int64(x, y, *fusion.views(y)),
        BLOCK_M=config.BLOCK_M,
        BLOCK_K=config.BLOCK_K,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
