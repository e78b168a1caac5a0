"""Gradient of a pointwise convolution's weight for 16-bit channels-last tensors: one matrix product of block copies (Hopper on).

Samples and positions are rows of one matrix of grad_output and of one of x. Rows past the end arrive as zeros.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from torch_conv_triton.kernels.common import dot_tile, split_program, widen
from torch_conv_triton.kernels.launch import descriptor, launch
from torch_conv_triton.kernels.reduction import partial_sums, sum_partials


@triton.jit(do_not_specialize=["blocks", "blocks_per_split", "tiles_o", "tiles_c"])
def conv1d_weight_grad_pointwise_kernel(
    dy_desc,  # (rows, groups * C_OUT), block [BLOCK_L, BLOCK_O]
    x_desc,  # (rows, groups * C_IN), block [BLOCK_L, BLOCK_C]
    out_ptr,  # (splits, groups * C_OUT, C_IN) contiguous
    C_OUT,  # per group
    C_IN,  # per group
    blocks,
    blocks_per_split,
    tiles_o,
    tiles_c,
    GROUPS: tl.constexpr,
    GRAD_LEFT: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    # the tiles of one split are neighbours: they read the same blocks and find them in L2
    tile_c, tile_o, group, split = split_program(tiles_c, tiles_o, GROUPS)
    if GRAD_LEFT:
        acc = tl.zeros((BLOCK_O, BLOCK_C), dtype=tl.float32)
    else:
        acc = tl.zeros((BLOCK_C, BLOCK_O), dtype=tl.float32)
    first = split * blocks_per_split
    for b in range(first, tl.minimum(first + blocks_per_split, blocks)):
        dy = dy_desc.load([b * BLOCK_L, group * C_OUT + tile_o * BLOCK_O])
        x = x_desc.load([b * BLOCK_L, group * C_IN + tile_c * BLOCK_C])
        acc = dot_tile(tl.trans(x), tl.trans(dy), acc, GRAD_LEFT, "ieee")

    o = tile_o * BLOCK_O + tl.arange(0, BLOCK_O)
    c = tile_c * BLOCK_C + tl.arange(0, BLOCK_C)
    out_ptr += (widen(split, True) * GROUPS + group) * C_OUT * C_IN
    if GRAD_LEFT:
        offsets, mask = (o * C_IN)[:, None] + c[None, :], (o < C_OUT)[:, None] & (c < C_IN)[None, :]
    else:
        offsets, mask = (o * C_IN)[None, :] + c[:, None], (o < C_OUT)[None, :] & (c < C_IN)[:, None]
    tl.store(out_ptr + offsets, acc.to(out_ptr.dtype.element_ty), mask=mask)


def conv1d_weight_grad_pointwise(grad_output: Tensor, x: Tensor, grad_weight: Tensor, groups: int, config) -> None:
    """Write the gradient of a pointwise convolution's weight into the contiguous grad_weight ``(C_out, C_in / groups, 1)``.

    grad_output ``(N, C_out, L)`` and x ``(N, C_in, L)`` of 16 bits, whose positions of all samples are rows of channels that lie
    equally far apart and start on 16 bytes. `config` is a `WeightGradConfig`; with more than one split the workspace holds
    `splits` float32 copies of grad_weight.
    """
    N, C_out, L = grad_output.shape
    C_in = grad_weight.shape[1]
    blocks = triton.cdiv(N * L, config.BLOCK_L)
    per_split = triton.cdiv(blocks, config.splits)
    splits = triton.cdiv(blocks, per_split)
    partials = partial_sums(grad_weight, splits)
    tiles_o, tiles_c = triton.cdiv(C_out // groups, config.BLOCK_O), triton.cdiv(C_in, config.BLOCK_C)
    launch(
        conv1d_weight_grad_pointwise_kernel,
        (tiles_c * tiles_o * groups * splits,),
        descriptor(grad_output, [N * L, C_out], [grad_output.stride(2), 1], [config.BLOCK_L, config.BLOCK_O]),
        descriptor(x, [N * L, C_in * groups], [x.stride(2), 1], [config.BLOCK_L, config.BLOCK_C]),
        partials,
        C_out // groups,
        C_in,
        blocks,
        per_split,
        tiles_o,
        tiles_c,
        GROUPS=groups,
        GRAD_LEFT=config.grad_left,
        BLOCK_O=config.BLOCK_O,
        BLOCK_C=config.BLOCK_C,
        BLOCK_L=config.BLOCK_L,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if splits > 1:
        sum_partials(partials, grad_weight)
