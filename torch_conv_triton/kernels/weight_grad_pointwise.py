"""Gradient of a pointwise convolution's weight for 16-bit channels-last tensors: one matrix product of block copies (Hopper on).

Samples and positions are rows of one matrix of grad_output and of one of x. Rows past the end arrive as zeros. The same product
serves copies that are laid out for it.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from torch_conv_triton.kernels.common import dot_tile, split_program, widen
from torch_conv_triton.kernels.launch import descriptor, launch
from torch_conv_triton.kernels.reduction import partial_sums, shares_of, sum_partials


@triton.jit(do_not_specialize=["blocks", "blocks_per_split", "tiles_o", "tiles_c"])
def product_of_blocks_kernel(
    dy_desc,  # (positions, groups * C_OUT), block [BLOCK_L, BLOCK_O], or with CHANNELS_FIRST its transpose
    x_desc,  # (positions, groups * COLUMNS), block [BLOCK_L, BLOCK_C], or with CHANNELS_FIRST its transpose
    out_ptr,  # (splits, groups * C_OUT, COLUMNS) contiguous
    C_OUT,  # per group
    COLUMNS,  # per group
    blocks,
    blocks_per_split,
    tiles_o,
    tiles_c,
    GROUPS: tl.constexpr,
    CHANNELS_FIRST: tl.constexpr,
    GRAD_LEFT: tl.constexpr,
    PRECISION: tl.constexpr,
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
    to_dy = group * C_OUT + tile_o * BLOCK_O
    to_x = group * COLUMNS + tile_c * BLOCK_C
    first = split * blocks_per_split
    for b in range(first, tl.minimum(first + blocks_per_split, blocks)):
        if CHANNELS_FIRST:
            dy = dy_desc.load([to_dy, b * BLOCK_L])
            x = x_desc.load([to_x, b * BLOCK_L])
        else:
            dy = tl.trans(dy_desc.load([b * BLOCK_L, to_dy]))
            x = tl.trans(x_desc.load([b * BLOCK_L, to_x]))
        acc = dot_tile(x, dy, acc, GRAD_LEFT, PRECISION)

    o = tile_o * BLOCK_O + tl.arange(0, BLOCK_O)
    c = tile_c * BLOCK_C + tl.arange(0, BLOCK_C)
    out_ptr += (widen(split, True) * GROUPS + group) * C_OUT * COLUMNS
    if GRAD_LEFT:
        offsets, mask = (o * COLUMNS)[:, None] + c[None, :], (o < C_OUT)[:, None] & (c < COLUMNS)[None, :]
    else:
        offsets, mask = (o * COLUMNS)[None, :] + c[:, None], (o < C_OUT)[None, :] & (c < COLUMNS)[:, None]
    tl.store(out_ptr + offsets, acc.to(out_ptr.dtype.element_ty), mask=mask)


def product_of_blocks(
    grad_output: Tensor, x: Tensor, grad_weight: Tensor, groups: int, channels_first: bool, precision: str, config
) -> Tensor:
    """Partial sums ``(splits, C_out, C_in / groups, K)`` of the product of two matrices: grad_weight itself, if there is one.

    grad_output ``(positions, C_out)`` and x ``(positions, C_in * K)``, taps next to each other, or with `channels_first` their
    transposes; their rows are contiguous and start on 16 bytes. Block copies need those of whole groups to start so too.
    """
    C_out, columns = grad_weight.shape[0] // groups, grad_weight[0].numel()
    blocks = triton.cdiv(x.shape[1] if channels_first else x.shape[0], config.BLOCK_L)
    per_split, splits = shares_of(blocks, config.splits)
    partials = partial_sums(grad_weight, splits)
    tiles_o, tiles_c = triton.cdiv(C_out, config.BLOCK_O), triton.cdiv(columns, config.BLOCK_C)
    blocks_of = [[config.BLOCK_L, channels] for channels in (config.BLOCK_O, config.BLOCK_C)]
    dy_block, x_block = (block[::-1] if channels_first else block for block in blocks_of)
    launch(
        product_of_blocks_kernel,
        (tiles_c * tiles_o * groups * splits,),
        descriptor(grad_output, list(grad_output.shape), list(grad_output.stride()), dy_block),
        descriptor(x, list(x.shape), list(x.stride()), x_block),
        partials,
        C_out,
        columns,
        blocks,
        per_split,
        tiles_o,
        tiles_c,
        GROUPS=groups,
        CHANNELS_FIRST=channels_first,
        GRAD_LEFT=config.grad_left,
        PRECISION=precision,
        BLOCK_O=config.BLOCK_O,
        BLOCK_C=config.BLOCK_C,
        BLOCK_L=config.BLOCK_L,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    return partials


def conv1d_weight_grad_pointwise(grad_output: Tensor, x: Tensor, grad_weight: Tensor, groups: int, config) -> None:
    """Write the gradient of a pointwise convolution's weight into the contiguous grad_weight ``(C_out, C_in / groups, 1)``.

    grad_output ``(N, C_out, L)`` and x ``(N, C_in, L)`` of 16 bits, whose positions of all samples are rows of channels that lie
    equally far apart and start on 16 bytes. `config` is a `WeightGradConfig`; with more than one split the workspace holds
    `splits` float32 copies of grad_weight.
    """
    rows = (t.as_strided((t.shape[0] * t.shape[2], t.shape[1]), (t.stride(2), 1)) for t in (grad_output, x))
    partials = product_of_blocks(*rows, grad_weight, groups, False, "ieee", config)
    if partials.shape[0] > 1:
        sum_partials(partials, grad_weight)
