"""Depthwise convolution of channels-last x into rows that do not start on 16 bytes: each channel's outputs are cut where they do.

A thread holds a 16-byte vector of channels and computes RUN outputs in a row of each. Rows of y whose length no vector divides
start at offsets from 16 bytes that differ from channel to channel, but in the same way for every vector of channels. So the runs
of a channel begin that many outputs earlier, and every run within a row is stored as one vector, straight from registers.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from torch_conv_triton.kernels.common import first_tap, needs_int64, widen
from torch_conv_triton.kernels.launch import launch
from torch_conv_triton.kernels.vectors import put_together, take_apart


@triton.jit(do_not_specialize=["L_in", "L_out", "C", "padding", "stride_yn", "stride_yc", "tiles_l", "tiles_c"])
def conv1d_depthwise_skewed_fwd_kernel(
    x_ptr,  # (N, C, L_in), C contiguous
    w_ptr,  # (C, 1, K), any strides
    b_ptr,  # (C,), or unused
    y_ptr,  # (N, C, L_out), L contiguous
    L_in,
    L_out,
    C,
    padding,
    stride_xn,
    stride_xl,
    stride_wo,
    stride_wk,
    stride_yn,  # in runs
    stride_yc,
    tiles_l,
    tiles_c,
    K: tl.constexpr,
    SKEW: tl.constexpr,  # stride_yc modulo RUN
    MOST: tl.constexpr,  # outputs by which the run of any channel begins earlier
    VECTOR: tl.constexpr,  # channels of a thread
    RUN: tl.constexpr,  # outputs of a thread in a row; divides VECTOR
    HAS_BIAS: tl.constexpr,
    INT64: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    RUNS: tl.constexpr = BLOCK_M // RUN
    VECTORS: tl.constexpr = BLOCK_N // VECTOR
    pid = tl.program_id(0)
    tile_c = pid % tiles_c
    tile_l = (pid // tiles_c) % tiles_l
    sample = (pid // (tiles_c * tiles_l)).to(tl.int64)
    row = tl.arange(0, RUNS * VECTORS)
    o = tile_c * BLOCK_N + row % VECTORS * VECTOR
    there = (o < C)[:, None]
    element = tl.arange(0, VECTOR)[None, :]
    x_row = x_ptr + sample * stride_xn + (o[:, None] + element)
    t = tl.arange(0, RUN)[None, :]

    weights = ()
    for k in tl.static_range(K):
        w = tl.load(w_ptr + ((o[:, None] + element).to(tl.int64) * stride_wo + k * stride_wk), mask=there, other=0.0)
        weights = weights + take_apart(w.to(tl.float32), VECTOR)
    biases = tl.zeros((RUNS * VECTORS, VECTOR), dtype=tl.float32)
    if HAS_BIAS:
        biases += tl.load(b_ptr + (o[:, None] + element), mask=there, other=0.0).to(tl.float32)
    biases = take_apart(biases, VECTOR)

    for step in range(STEPS):
        start = (widen(tile_l, INT64) * STEPS + step) * BLOCK_M
        first = start + row // VECTORS * RUN
        samples = ()
        for j in tl.static_range(MOST + RUN + K - 1):
            at = first + (j - MOST - padding)
            mask = ((at >= 0) & (at < L_in))[:, None] & there
            x = tl.load(x_row + (at * stride_xl)[:, None], mask=mask, other=0.0)
            samples = samples + take_apart(x, VECTOR)
        for e in tl.static_range(VECTOR):
            outputs = ()
            for i in tl.static_range(RUN):
                acc = biases[e]
                for k in tl.static_range(K):
                    acc += samples[(MOST - (e * SKEW % RUN) + i + k) * VECTOR + e].to(tl.float32) * weights[k * VECTOR + e]
                outputs = outputs + (acc.to(y_ptr.dtype.element_ty),)
            run = put_together(outputs)
            # the compiler sees that it begins at a whole run
            begin = ((o + e).to(tl.int64) * stride_yc - (e * SKEW % RUN)) // RUN + first // RUN
            pointers = y_ptr + ((sample * stride_yn + begin) * RUN)[:, None] + t
            l_out = first - (e * SKEW % RUN)
            whole = (l_out >= 0) & (l_out + RUN <= L_out)
            tl.store(pointers, run, mask=whole[:, None] & there)
            if (start < MOST) | (start + BLOCK_M > L_out):
                positions = l_out[:, None] + t
                tl.store(pointers, run, mask=(positions >= 0) & (positions < L_out) & ~whole[:, None] & there)


def conv1d_depthwise_skewed(
    x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, padding: int, config, reverse: bool = False
) -> None:
    """Write the depthwise convolution, of stride and dilation 1, of x ``(N, C, L_in)`` into y ``(N, C, L_out)``.

    Weight ``(C, 1, K)``, any strides. x has C contiguous, y has L; 16 bytes divide C. A program computes `steps` tiles of
    BLOCK_M outputs x BLOCK_N channels, a thread `run` outputs in a row. `reverse`: the last tap comes first.
    """
    N, C, L_in = x.shape
    L_out = y.shape[2]
    vector = 16 // x.element_size()
    run = config.run
    skew = y.stride(1) % run
    most = max(e * skew % run for e in range(vector))
    tiles_l = triton.cdiv(L_out + most, config.BLOCK_M * config.steps)
    tiles_c = triton.cdiv(C, config.BLOCK_N)
    taps, tap_stride = first_tap(weight, reverse)
    launch(
        conv1d_depthwise_skewed_fwd_kernel,
        (tiles_l * tiles_c * N,),
        x,
        taps,
        bias if bias is not None else weight,
        y,
        L_in,
        L_out,
        C,
        padding,
        x.stride(0),
        x.stride(2),
        weight.stride(0),
        tap_stride,
        y.stride(0) // run,
        y.stride(1),
        tiles_l,
        tiles_c,
        K=weight.shape[2],
        SKEW=skew,
        MOST=most,
        VECTOR=vector,
        RUN=run,
        HAS_BIAS=bias is not None,
        INT64=needs_int64(x, y),
        STEPS=config.steps,
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        num_warps=config.num_warps,
    )
