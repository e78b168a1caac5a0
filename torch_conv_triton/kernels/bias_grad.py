"""Gradient of a convolution's bias: the sums of grad_output over samples and positions."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from torch_conv_triton.kernels.common import needs_int64, widen
from torch_conv_triton.kernels.launch import launch
from torch_conv_triton.kernels.reduction import block_positions, blocks_of, partial_sums, shares_of, sum_partials


@triton.jit(do_not_specialize=["N", "blocks", "blocks_per_sample", "blocks_per_split", "tiles_o"])
def conv1d_bias_grad_kernel(
    dy_ptr,  # (N, C, L), any strides
    out_ptr,  # (splits, C) contiguous
    N,
    L,
    C,
    blocks,
    blocks_per_sample,
    blocks_per_split,
    stride_dn,
    stride_dc,
    stride_dl,
    tiles_o,
    FLATTEN: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_L: tl.constexpr,
    STAGES: tl.constexpr,
):
    pid = tl.program_id(0)
    o = (pid % tiles_o) * BLOCK_O + tl.arange(0, BLOCK_O)
    split = pid // tiles_o
    first = split * blocks_per_split
    last = tl.minimum(first + blocks_per_split, blocks)

    o_mask = o < C
    channels = (widen(o, INT64) * stride_dc)[None, :]
    acc = tl.zeros((BLOCK_L, BLOCK_O), tl.float32)
    for b in tl.range(first, last, num_stages=STAGES):
        n, at, row_mask = block_positions(b, last, N, L, blocks_per_sample, FLATTEN, INT64, BLOCK_L)
        if FLATTEN:
            rows = (dy_ptr + n * stride_dn)[:, None]
        else:
            rows = dy_ptr + n * stride_dn
        dy = tl.load(rows + ((at * stride_dl)[:, None] + channels), mask=row_mask[:, None] & o_mask[None, :], other=0.0)
        acc += dy.to(tl.float32)
    tl.store(out_ptr + split.to(tl.int64) * C + o, tl.sum(acc, 0).to(out_ptr.dtype.element_ty), mask=o_mask)


def conv1d_bias_grad(grad_output: Tensor, grad_bias: Tensor, config) -> None:
    """Write the gradient of a convolution's bias into the contiguous grad_bias ``(C_out,)``.

    grad_output ``(N, C_out, L_out)``, any strides. `config` is a `WeightGradConfig`, of which BLOCK_C has no meaning; with more
    than one split the workspace holds `splits` float32 copies of grad_bias.
    """
    N, C, L = grad_output.shape
    flatten, per_sample, blocks = blocks_of(N, L, config.BLOCK_L)
    per_split, splits = shares_of(blocks, config.splits)
    sums = grad_bias.view(C, 1, 1)
    partials = partial_sums(sums, splits)
    tiles_o = triton.cdiv(C, config.BLOCK_O)
    launch(
        conv1d_bias_grad_kernel,
        (tiles_o * splits,),
        grad_output,
        partials,
        N,
        L,
        C,
        blocks,
        per_sample,
        per_split,
        *grad_output.stride(),
        tiles_o,
        FLATTEN=flatten,
        INT64=needs_int64(grad_output),
        BLOCK_O=config.BLOCK_O,
        BLOCK_L=config.BLOCK_L,
        STAGES=config.num_stages,
        num_warps=config.num_warps,
    )
    if splits > 1:
        sum_partials(partials, sums)
