"""Gradient of a depthwise convolution's weight for channels-last tensors and few taps: every sample is loaded once.

A thread has 16 bytes of channels and some positions in a row, whose taps share samples; it keeps a sum for each tap. Threads of a
tile are added up at a program's end, and shares of the positions in a second, fixed order.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from torch_conv_triton.kernels.common import needs_int64, widen
from torch_conv_triton.kernels.launch import launch
from torch_conv_triton.kernels.reduction import partial_sums, shares_of, sum_partials


@triton.jit(do_not_specialize=["tiles_l", "blocks", "blocks_per_split", "tiles_o"])
def conv1d_weight_grad_sliding_kernel(
    dy_ptr,  # (N, C, L_out), C contiguous
    x_ptr,  # (N, C, L_in), C contiguous
    out_ptr,  # (splits, C, 1, K) contiguous
    bias_ptr,  # (splits, C) contiguous
    L_in,
    L_out,
    C,
    padding,
    stride_dn,
    stride_dl,
    stride_xn,
    stride_xl,
    tiles_l,  # of a sample
    blocks,
    blocks_per_split,
    tiles_o,
    K: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_L: tl.constexpr,
    RUN: tl.constexpr,  # positions in a row
):
    RUNS: tl.constexpr = BLOCK_L // RUN
    pid = tl.program_id(0)
    o = pid % tiles_o * BLOCK_O + tl.arange(0, BLOCK_O)
    split = pid // tiles_o
    o_mask = o < C
    first = split * blocks_per_split
    acc = tl.zeros((RUNS, BLOCK_O), tl.float32)
    sums = ()
    for _ in tl.static_range(K + 1 if HAS_BIAS else K):
        sums = sums + (acc,)
    for b in range(first, tl.minimum(first + blocks_per_split, blocks)):
        sample = (b // tiles_l).to(tl.int64)
        start = widen(b % tiles_l, INT64) * BLOCK_L + tl.arange(0, RUNS) * RUN
        dy_rows = dy_ptr + sample * stride_dn + o[None, :]
        x_rows = x_ptr + sample * stride_xn + o[None, :]
        gradients = ()
        for t in tl.static_range(RUN):
            mask = (start + t < L_out)[:, None] & o_mask[None, :]
            gradients = gradients + (tl.load(dy_rows + ((start + t) * stride_dl)[:, None], mask=mask, other=0.0),)
        window = ()
        for j in tl.static_range(RUN + K - 1):
            at = start + (j - padding)
            mask = ((at >= 0) & (at < L_in))[:, None] & o_mask[None, :]
            window = window + (tl.load(x_rows + (at * stride_xl)[:, None], mask=mask, other=0.0),)
        added = ()
        for k in tl.static_range(K):
            acc = sums[k]
            for t in tl.static_range(RUN):
                # past the end the gradient is zero, but zero times a NaN that only other taps may see is none
                x = tl.where((start + t < L_out)[:, None], window[t + k], 0.0)
                acc += gradients[t].to(tl.float32) * x.to(tl.float32)
            added = added + (acc,)
        if HAS_BIAS:
            acc = sums[K]
            for t in tl.static_range(RUN):
                acc += gradients[t].to(tl.float32)
            added = added + (acc,)
        sums = added

    for k in tl.static_range(K):
        to = out_ptr + split.to(tl.int64) * C * K + (o * K + k)
        tl.store(to, tl.sum(sums[k], 0).to(out_ptr.dtype.element_ty), mask=o_mask)
    if HAS_BIAS:
        tl.store(bias_ptr + split.to(tl.int64) * C + o, tl.sum(sums[K], 0).to(bias_ptr.dtype.element_ty), mask=o_mask)


def conv1d_weight_grad_sliding(
    grad_output: Tensor, x: Tensor, grad_weight: Tensor, grad_bias: Tensor | None, padding: int, config
) -> None:
    """Write the gradient of a depthwise convolution's weight, of stride and dilation 1, into the contiguous grad_weight
    ``(C, 1, K)``, and that of its bias into grad_bias ``(C,)`` if there is one.

    grad_output ``(N, C, L_out)`` and x ``(N, C, L_in)`` have C contiguous. `config` is a `WeightGradConfig` whose BLOCK_C counts
    the positions in a row that a thread has, of BLOCK_L in a tile; with more than one split the workspace holds `splits` float32
    copies of the gradients.
    """
    N, C, L_out = grad_output.shape
    K = grad_weight.shape[2]
    tiles_l, tiles_o = triton.cdiv(L_out, config.BLOCK_L), triton.cdiv(C, config.BLOCK_O)
    blocks = N * tiles_l
    per_split, splits = shares_of(blocks, config.splits)
    partials = partial_sums(grad_weight, splits)
    bias_partials = None if grad_bias is None else partial_sums(grad_bias, splits)
    launch(
        conv1d_weight_grad_sliding_kernel,
        (tiles_o * splits,),
        grad_output,
        x,
        partials,
        partials if bias_partials is None else bias_partials,
        x.shape[2],
        L_out,
        C,
        padding,
        grad_output.stride(0),
        grad_output.stride(2),
        x.stride(0),
        x.stride(2),
        tiles_l,
        blocks,
        per_split,
        tiles_o,
        K=K,
        HAS_BIAS=grad_bias is not None,
        INT64=needs_int64(x, grad_output),
        BLOCK_O=config.BLOCK_O,
        BLOCK_L=config.BLOCK_L,
        RUN=config.BLOCK_C,
        num_warps=config.num_warps,
    )
    if splits > 1:
        sum_partials(partials, grad_weight, 1, bias_partials, grad_bias)
