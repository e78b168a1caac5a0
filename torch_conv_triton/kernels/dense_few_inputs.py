"""Convolution of very few samples an output, at stride 1, on CUDA cores: it writes far more than it reads and computes.

A thread loads the samples that a vector of neighbouring positions needs once, and computes these positions of one channel after
another. Rows of y whose length no vector divides start at offsets from 16 bytes that differ from channel to channel: there the
positions of a channel begin that much earlier, so that whole vectors are stored, straight from registers.
"""

from __future__ import annotations

from math import gcd

import triton
import triton.language as tl
from torch import Tensor

from torch_conv_triton.kernels.common import needs_int64, widen
from torch_conv_triton.kernels.launch import launch
from torch_conv_triton.kernels.vectors import put_together, take_apart


@triton.jit(
    do_not_specialize=["x_units", "L_out", "C_OUT", "stride_xn", "stride_xc", "stride_yn", "stride_yc", "tiles_l", "tiles_c"]
)
def conv1d_dense_few_inputs_fwd_kernel(
    x_ptr,  # (N, C_in, L_in), L contiguous
    w_ptr,  # (C_out, C_in, K), any strides
    b_ptr,  # (C_out,), or unused
    y_ptr,  # (N, C_out, L_out), L contiguous
    x_units,  # L_in, and the strides of x, in units of X_UNIT elements
    L_out,
    C_OUT,
    stride_xn,
    stride_xc,
    stride_wo,
    stride_wc,
    stride_wk,
    stride_yn,  # in vectors
    stride_yc,
    tiles_l,
    tiles_c,
    C_IN: tl.constexpr,
    K: tl.constexpr,
    DILATION: tl.constexpr,
    SKEW: tl.constexpr,  # stride_yc modulo VECTOR
    CYCLE: tl.constexpr,  # channels after which the skews repeat
    FIRST: tl.constexpr,  # vector of x, counted from that of the outputs, with the first sample that any channel needs
    SHIFT: tl.constexpr,  # where in there the first sample of an unskewed channel is
    NEIGHBOURS: tl.constexpr,  # vectors of x that they need
    VECTOR: tl.constexpr,
    X_UNIT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    VECTORS: tl.constexpr = BLOCK_M // VECTOR
    pid = tl.program_id(0)
    tile_c = pid % tiles_c
    tile_l = (pid // tiles_c) % tiles_l
    sample = (pid // (tiles_c * tiles_l)).to(tl.int64)
    start = widen(tile_l, INT64) * VECTORS
    v = start + tl.arange(0, VECTORS)
    element = tl.arange(0, VECTOR)[None, :]

    samples = ()
    for c in tl.static_range(C_IN):
        x_row = x_ptr + (sample * stride_xn + c * stride_xc.to(tl.int64)) * X_UNIT
        for j in tl.static_range(NEIGHBOURS):
            at = ((v + (FIRST + j)) * VECTOR)[:, None] + element
            x = tl.load(x_row + at, mask=(at >= 0) & (at < x_units * X_UNIT), other=0.0)
            samples = samples + take_apart(x.to(tl.float32), VECTOR)

    at_an_edge = (start == 0) | ((start + VECTORS) * VECTOR > L_out)
    for block in range(0, BLOCK_N, CYCLE):
        for e in tl.static_range(CYCLE):
            o = tl.zeros((), dtype=tl.int64) + (tile_c * BLOCK_N + block + e)
            weights = ()
            for c in tl.static_range(C_IN):
                for k in tl.static_range(K):
                    w = tl.load(w_ptr + (o * stride_wo + c * stride_wc + k * stride_wk), mask=o < C_OUT, other=0.0)
                    weights = weights + (w.to(tl.float32),)
            bias = 0.0
            if HAS_BIAS:
                bias = tl.load(b_ptr + o, mask=o < C_OUT, other=0.0).to(tl.float32)
            outputs = ()
            for i in tl.static_range(VECTOR):
                acc = tl.zeros((VECTORS, 1), dtype=tl.float32) + bias
                for c in tl.static_range(C_IN):
                    for k in tl.static_range(K):
                        acc += (
                            samples[c * NEIGHBOURS * VECTOR + SHIFT - (e * SKEW % VECTOR) + i + k * DILATION] * weights[c * K + k]
                        )
                outputs = outputs + (acc.to(y_ptr.dtype.element_ty),)
            run = put_together(outputs)
            # the compiler sees that it begins at a whole vector
            begin = sample * stride_yn + (o * stride_yc - (e * SKEW % VECTOR)) // VECTOR + v
            pointers = y_ptr + ((begin * VECTOR)[:, None] + element)
            l_out = v * VECTOR - (e * SKEW % VECTOR)
            whole = (l_out >= 0) & (l_out + VECTOR <= L_out) & (o < C_OUT)
            tl.store(pointers, run, mask=whole[:, None])
            if at_an_edge:
                positions = l_out[:, None] + element
                inside = (positions >= 0) & (positions < L_out) & (o < C_OUT)
                tl.store(pointers, run, mask=inside & ~whole[:, None])


def conv1d_dense_few_inputs(
    x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, padding: int, dilation: int, config
) -> None:
    """Write the convolution, of stride 1, of x ``(N, C_in, L_in)`` with weight ``(C_out, C_in, K)`` into y ``(N, C_out, L_out)``.

    x and y have L contiguous. A program computes BLOCK_M positions x BLOCK_N channels.
    """
    N, C_in, L_in = x.shape
    _, C_out, L_out = y.shape
    K = weight.shape[2]
    vector = 16 // x.element_size()
    x_unit = gcd(vector, L_in, x.stride(0), x.stride(1))
    skew = y.stride(1) % vector
    cycle = vector // gcd(skew, vector)
    most = max(e * skew % vector for e in range(cycle))
    first = -(padding + most) // vector
    shift = -padding - first * vector
    tiles_l = triton.cdiv(L_out + most, config.BLOCK_M)
    tiles_c = triton.cdiv(C_out, config.BLOCK_N)
    launch(
        conv1d_dense_few_inputs_fwd_kernel,
        (tiles_l * tiles_c * N,),
        x,
        weight,
        bias if bias is not None else weight,
        y,
        L_in // x_unit,
        L_out,
        C_out,
        x.stride(0) // x_unit,
        x.stride(1) // x_unit,
        *weight.stride(),
        y.stride(0) // vector,
        y.stride(1),
        tiles_l,
        tiles_c,
        C_IN=C_in,
        K=K,
        DILATION=dilation,
        SKEW=skew,
        CYCLE=cycle,
        FIRST=first,
        SHIFT=shift,
        NEIGHBOURS=(shift + vector - 1 + (K - 1) * dilation) // vector + 1,
        VECTOR=vector,
        X_UNIT=x_unit,
        HAS_BIAS=bias is not None,
        INT64=needs_int64(x, y),
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        num_warps=config.num_warps,
    )
