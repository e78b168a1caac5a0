"""Gradient of a convolution's weight, dense and grouped, as a matrix product over samples and positions.

A program sums BLOCK_O output channels x BLOCK_C columns over its share of the positions; a column is an input channel at a tap,
whose operand is x shifted by that tap: gathered, never stored. Shares are added up in a second, fixed order.
"""

from __future__ import annotations

from math import gcd

import triton
import triton.language as tl
from torch import Tensor

from torch_conv_triton.kernels.common import (
    dot_precision,
    dot_tile,
    load_x_tile,
    needs_int64,
    round_tf32,
    split_program,
    widen,
)
from torch_conv_triton.kernels.launch import launch
from torch_conv_triton.kernels.reduction import block_positions, blocks_of, partial_sums, shares_of, sum_partials


@triton.jit
def weight_columns(tile, C_IN: tl.constexpr, K: tl.constexpr, TAP_MAJOR: tl.constexpr, BLOCK_C: tl.constexpr):
    """Channel and tap of each column of a tile: TAP_MAJOR columns of one tap follow each other, else the taps of one channel.

    A tap-major tile no wider than the channels lies within one tap, which then is a scalar.
    """
    j = tl.arange(0, BLOCK_C)
    if TAP_MAJOR and BLOCK_C <= C_IN:
        return (tile // K) * BLOCK_C + j, tile % K
    elif TAP_MAJOR:
        r = tile * BLOCK_C + j
        return r % C_IN, r // C_IN
    else:
        r = tile * BLOCK_C + j
        return r // K, r % K


@triton.jit
def load_operands(
    b,
    last,
    grad,  # pointer with the group already added, strides of (N, C_out, L_out)
    signal,  # pointer with the group already added, strides of (N, C_in, L_in)
    lengths,  # N, L_in, L_out, blocks of one sample
    geometry,  # stride, padding, dilation
    rows,  # output channels [BLOCK_O] and their mask
    columns,  # input channels and taps [BLOCK_C]
    C_IN: tl.constexpr,
    K: tl.constexpr,
    TAP_MAJOR: tl.constexpr,
    FLATTEN: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_L: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Block b of the gradient, [BLOCK_O, BLOCK_L], and the x under each of its columns, [BLOCK_L, BLOCK_C]."""
    dy_ptr, stride_dn, stride_do, stride_dl = grad
    x_ptr, stride_xn, stride_xc, stride_xl = signal
    N, L_in, L_out, blocks_per_sample = lengths
    stride, padding, dilation = geometry
    o, o_mask = rows
    c, k = columns
    n, l_out, row_mask = block_positions(b, last, N, L_out, blocks_per_sample, FLATTEN, INT64, BLOCK_L)
    if FLATTEN:
        dy_rows = (dy_ptr + n * stride_dn)[None, :]
        x_rows = (x_ptr + n * stride_xn)[:, None]
    else:
        dy_rows = dy_ptr + n * stride_dn
        x_rows = x_ptr + n * stride_xn
    dy_offsets = (widen(o, INT64) * stride_do)[:, None] + (l_out * stride_dl)[None, :]
    dy = tl.load(dy_rows + dy_offsets, mask=o_mask[:, None] & row_mask[None, :], other=0.0)
    x = load_x_tile(
        x_rows,
        l_out * stride - padding,
        row_mask,
        c,
        k,
        K,
        L_in,
        dilation,
        stride_xc,
        stride_xl,
        C_IN,
        K,
        TAP_MAJOR and BLOCK_C <= C_IN,
        TAP_MAJOR and BLOCK_C > C_IN,
        INT64,
        BLOCK_C,
    )
    return dy, x


@triton.jit
def add_product(dy, x, acc, ROUND: tl.constexpr, GRAD_LEFT: tl.constexpr, PRECISION: tl.constexpr):
    if ROUND:
        dy = round_tf32(dy)
        x = round_tf32(x)
    if PRECISION == "tf32x3":
        # Tensor cores cut off what they add to an accumulator, which shows in full float32 after some thousand positions. As
        # plain additions these would become part of the product.
        return tl.fma(dot_tile(tl.trans(x), dy, tl.zeros_like(acc), GRAD_LEFT, PRECISION), 1.0, acc)
    return dot_tile(tl.trans(x), dy, acc, GRAD_LEFT, PRECISION)


@triton.jit(do_not_specialize=["N", "blocks", "blocks_per_sample", "blocks_per_split", "tiles_o", "tiles_c"])
def conv1d_weight_grad_kernel(
    dy_ptr,  # (N, C_out, L_out), any strides
    x_ptr,  # (N, C_in, L_in), any strides
    out_ptr,  # (splits, C_out, C_in / groups, K) contiguous
    bias_ptr,  # (splits, C_out) contiguous
    N,
    L_in,
    L_out,  # in units of VECTOR, as are the next two
    stride_dn,
    stride_do,
    C_OUT,  # per group
    blocks,
    blocks_per_sample,
    blocks_per_split,
    stride,
    padding,
    dilation,
    stride_dl,
    stride_xn,
    stride_xc,
    stride_xl,
    tiles_o,
    tiles_c,
    GROUPS: tl.constexpr,
    C_IN: tl.constexpr,  # per group
    K: tl.constexpr,
    HAS_BIAS: tl.constexpr,  # with PREFETCH only
    TAP_MAJOR: tl.constexpr,
    FLATTEN: tl.constexpr,
    ROUND: tl.constexpr,
    PRECISION: tl.constexpr,
    GRAD_LEFT: tl.constexpr,  # the accumulator is [BLOCK_O, BLOCK_C], else its transpose
    EXCHANGED: tl.constexpr,  # x and grad_output stand in each other's place, and taps are reversed
    PREFETCH: tl.constexpr,  # a block is loaded into registers while the one before is multiplied
    VECTOR: tl.constexpr,  # elements of grad_output that one access can take
    INT64: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    # Triton sees by itself only that 16 divides a number, and 16 bytes are 8 or 4 elements
    L_out *= VECTOR
    stride_dn *= VECTOR
    stride_do *= VECTOR
    # the tiles of one split are neighbours: they read the same blocks and find them in L2
    tile_c, tile_o, group, split = split_program(tiles_c, tiles_o, GROUPS)

    o = tile_o * BLOCK_O + tl.arange(0, BLOCK_O)
    o_mask = o < C_OUT
    c, k = weight_columns(tile_c, C_IN, K, TAP_MAJOR, BLOCK_C)
    grad = dy_ptr + widen(group, INT64) * C_OUT * stride_do, stride_dn, stride_do, stride_dl
    signal = x_ptr + widen(group, INT64) * C_IN * stride_xc, stride_xn, stride_xc, stride_xl
    lengths = N, L_in, L_out, blocks_per_sample
    geometry = stride, padding, dilation
    rows, columns = (o, o_mask), (c, k)
    first = split * blocks_per_split
    last = tl.minimum(first + blocks_per_split, blocks)
    if GRAD_LEFT:
        acc = tl.zeros((BLOCK_O, BLOCK_C), dtype=tl.float32)
    else:
        acc = tl.zeros((BLOCK_C, BLOCK_O), dtype=tl.float32)
    sums = tl.zeros((BLOCK_O,), dtype=tl.float32)

    if PREFETCH:
        dy, x = load_operands(
            first, last, grad, signal, lengths, geometry, rows, columns, C_IN, K, TAP_MAJOR, FLATTEN, INT64, BLOCK_L, BLOCK_C
        )
        for b in range(first, last):
            next_dy, next_x = load_operands(
                b + 1, last, grad, signal, lengths, geometry, rows, columns, C_IN, K, TAP_MAJOR, FLATTEN, INT64, BLOCK_L, BLOCK_C
            )
            if HAS_BIAS:
                sums += tl.sum(dy.to(tl.float32), 1)
            acc = add_product(dy, x, acc, ROUND, GRAD_LEFT, PRECISION)
            dy, x = next_dy, next_x
    else:
        for b in range(first, last):
            dy, x = load_operands(
                b, last, grad, signal, lengths, geometry, rows, columns, C_IN, K, TAP_MAJOR, FLATTEN, INT64, BLOCK_L, BLOCK_C
            )
            acc = add_product(dy, x, acc, ROUND, GRAD_LEFT, PRECISION)

    # the weight's own order, whatever the order of the columns
    out_ptr += (split.to(tl.int64) * GROUPS + group) * C_OUT * (C_IN * K)
    if EXCHANGED:
        to_row, to_column = o * K, c * (C_OUT * K) + (K - 1 - k)
    else:
        to_row, to_column = o * (C_IN * K), c * K + k
    column_mask = (c < C_IN) & (k < K)
    if GRAD_LEFT:
        offsets = to_row[:, None] + to_column[None, :]
        mask = o_mask[:, None] & column_mask[None, :]
    else:
        offsets = to_row[None, :] + to_column[:, None]
        mask = o_mask[None, :] & column_mask[:, None]
    tl.store(out_ptr + offsets, acc.to(out_ptr.dtype.element_ty), mask=mask)
    if HAS_BIAS:
        bias_ptr += (split.to(tl.int64) * GROUPS + group) * C_OUT
        # one of the tiles that read these rows
        tl.store(bias_ptr + o, sums.to(bias_ptr.dtype.element_ty), mask=o_mask & (tile_c == 0))


def conv1d_weight_grad(
    grad_output: Tensor,
    x: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor | None,
    stride: int,
    padding: int,
    dilation: int,
    groups: int,
    tf32: bool,
    config,
) -> None:
    """Write the gradient of a convolution's weight into the contiguous grad_weight ``(C_out, C_in / groups, K)``, and that of its
    bias into grad_bias ``(C_out,)`` if there is one.

    grad_output ``(N, C_out, L_out)`` and x ``(N, C_in, L_in)``, any strides. `config` is a `WeightGradConfig`; with more than one
    split the workspace holds `splits` float32 copies of the gradients. A grad_bias asks for `prefetch`, not `exchanged`.
    """
    K = grad_weight.shape[2]
    if config.exchanged:
        grad_output, x, padding = x, grad_output, dilation * (K - 1) - padding
    N, C_out, L_out = grad_output.shape
    C_in = x.shape[1] // groups
    flatten, per_sample, blocks = blocks_of(N, L_out, config.BLOCK_L)
    per_split, splits = shares_of(blocks, config.splits)
    partials = partial_sums(grad_weight, splits)
    bias_partials = None if grad_bias is None else partial_sums(grad_bias, splits)
    vector = gcd(L_out, *grad_output.stride()[:2], 16 // x.element_size()) if grad_output.stride(2) == 1 else 1
    tiles_o = triton.cdiv(C_out // groups, config.BLOCK_O)
    if config.tap_major and C_in >= config.BLOCK_C:
        tiles_c = triton.cdiv(C_in, config.BLOCK_C) * K
    else:
        tiles_c = triton.cdiv(C_in * K, config.BLOCK_C)
    launch(
        conv1d_weight_grad_kernel,
        (tiles_c * tiles_o * groups * splits,),
        grad_output,
        x,
        partials,
        partials if bias_partials is None else bias_partials,
        N,
        x.shape[2],
        L_out // vector,
        grad_output.stride(0) // vector,
        grad_output.stride(1) // vector,
        C_out // groups,
        blocks,
        per_sample,
        per_split,
        stride,
        padding,
        dilation,
        grad_output.stride(2),
        *x.stride(),
        tiles_o,
        tiles_c,
        GROUPS=groups,
        C_IN=C_in,
        K=K,
        HAS_BIAS=grad_bias is not None,
        TAP_MAJOR=config.tap_major,
        FLATTEN=flatten,
        ROUND=tf32,
        PRECISION=dot_precision(x.dtype, tf32),
        GRAD_LEFT=config.grad_left,
        EXCHANGED=config.exchanged,
        PREFETCH=config.prefetch,
        VECTOR=vector,
        INT64=needs_int64(x, grad_output),
        BLOCK_O=config.BLOCK_O,
        BLOCK_C=config.BLOCK_C,
        BLOCK_L=config.BLOCK_L,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
    if splits > 1:
        sum_partials(partials, grad_weight, 1, bias_partials, grad_bias)
