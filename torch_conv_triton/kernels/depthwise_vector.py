"""Depthwise convolution with few taps along contiguous, aligned rows: whole vectors in, whole vectors out.

A tap moves a row by less than a vector, so a vector of outputs needs the vectors of x around it and nothing else. They are
loaded as they lie in memory and shifted in registers, where a shift is only a choice of elements.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from torch_conv_triton.kernels.common import first_tap, needs_int64, widen
from torch_conv_triton.kernels.epilogue import NO_FUSION, Fusion, store_outputs
from torch_conv_triton.kernels.launch import launch
from torch_conv_triton.kernels.program import is_plain
from torch_conv_triton.kernels.vectors import put_together, take_apart


@triton.jit(do_not_specialize=["x_vectors", "y_vectors", "C_OUT", "stride_xn", "stride_xc", "stride_yn", "stride_yc", "tiles"])
def conv1d_depthwise_vector_fwd_kernel(
    x_ptr,  # (N, C_in, L_in), L contiguous
    w_ptr,  # (C_out, 1, K), any strides
    b_ptr,  # (C_out,), or unused
    y_ptr,  # (N, C_out, L_out), L contiguous
    x_vectors,  # in a row
    y_vectors,
    C_OUT,
    stride_xn,  # strides of x and y in vectors
    stride_xc,
    stride_wo,
    stride_wk,
    stride_yn,
    stride_yc,
    tiles,  # in a row
    more,  # as `store_outputs` takes it
    more_strides,
    MULTIPLIER: tl.constexpr,
    K: tl.constexpr,
    DILATION: tl.constexpr,
    FIRST: tl.constexpr,  # vector of x, counted from that of the outputs, with the first sample that they need
    SHIFT: tl.constexpr,  # where it is in there
    NEIGHBOURS: tl.constexpr,  # vectors of x that they need
    VECTOR: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EPILOGUE: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    pid = tl.program_id(0)
    o = (pid // tiles) % C_OUT
    sample = (pid // tiles // C_OUT).to(tl.int64)
    x_row = x_ptr + (sample * stride_xn + (o // MULTIPLIER).to(tl.int64) * stride_xc) * VECTOR
    y_row = y_ptr + (sample * stride_yn + o.to(tl.int64) * stride_yc) * VECTOR
    w_ptr += o.to(tl.int64) * stride_wo
    v = widen(pid % tiles, INT64) * (BLOCK_M // VECTOR) + tl.arange(0, BLOCK_M // VECTOR)
    element = tl.arange(0, VECTOR)[None, :]

    window = ()
    for j in tl.static_range(NEIGHBOURS):
        at = v + (FIRST + j)
        x = tl.load(x_row + (at[:, None] * VECTOR + element), mask=((at >= 0) & (at < x_vectors))[:, None], other=0.0)
        window = window + take_apart(x, VECTOR)
    weights = ()
    for k in tl.static_range(K):
        weights = weights + (tl.load(w_ptr + k * stride_wk).to(tl.float32),)
    bias = 0.0
    if HAS_BIAS:
        bias = tl.load(b_ptr + o).to(tl.float32)
    outputs = ()
    for e in tl.static_range(VECTOR):
        acc = tl.zeros((BLOCK_M // VECTOR, 1), dtype=tl.float32) + bias
        for k in tl.static_range(K):
            acc += window[SHIFT + e + k * DILATION].to(tl.float32) * weights[k]
        outputs = outputs + (acc.to(y_ptr.dtype.element_ty) if is_plain(EPILOGUE) else acc,)
    at = v[:, None] * VECTOR + element
    mask = (v < y_vectors)[:, None]
    if is_plain(EPILOGUE):
        tl.store(y_row + at, put_together(outputs), mask=mask)
    else:
        store_outputs(
            put_together(outputs),
            sample,
            at,
            mask,
            0,
            o,
            o < C_OUT,
            b_ptr,
            y_row,
            0,
            0,
            1,
            more,
            more_strides,
            EPILOGUE,
            False,
            INT64,
        )


def conv1d_depthwise_vector(
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
    """Write the depthwise convolution, of stride 1, of x ``(N, C_in, L_in)`` into y ``(N, C_out, L_out)``.

    C_out is a multiple of C_in. Weight ``(C_out, 1, K)``, any strides. x and y have L contiguous and start on 16 bytes; their
    lengths and other strides are multiples of 16 bytes. A program computes BLOCK_M outputs of one channel.
    `reverse`: the last tap comes first.
    """
    N, C_in, L_in = x.shape
    _, C_out, L_out = y.shape
    K = weight.shape[2]
    vector = 16 // x.element_size()
    shift = -padding % vector
    tiles = triton.cdiv(L_out, config.BLOCK_M)
    taps, tap_stride = first_tap(weight, reverse)
    launch(
        conv1d_depthwise_vector_fwd_kernel,
        (tiles * C_out * N,),
        x,
        taps,
        bias if bias is not None else weight,
        y,
        L_in // vector,
        L_out // vector,
        C_out,
        x.stride(0) // vector,
        x.stride(1) // vector,
        weight.stride(0),
        tap_stride,
        y.stride(0) // vector,
        y.stride(1) // vector,
        tiles,
        MULTIPLIER=C_out // C_in,
        K=K,
        DILATION=dilation,
        FIRST=-padding // vector,
        SHIFT=shift,
        NEIGHBOURS=(shift + vector - 1 + (K - 1) * dilation) // vector + 1,
        VECTOR=vector,
        HAS_BIAS=bias is not None,
        **fusion.arguments(y),
        INT64=needs_int64(x, y, *fusion.views(y)),
        BLOCK_M=config.BLOCK_M,
        num_warps=config.num_warps,
    )
