"""Gradient of the weight for many products of float32: a matrix product of copies, rounded to TF32 and laid out for it.

A sum over positions wants rows of positions. Each channel of grad_output becomes one row, its samples one after another with
zeros between them; so does each channel of x at each phase of the stride. A tap then is a shift along the row, the same for all
samples, and nothing passes through registers on its way to the tensor cores. Where x is small, each tap may have rows of its
own instead: then samples touch each other, and block copies read both.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from torch_conv_triton.kernels.common import OFFSET_LIMIT, dot_tile, needs_int64, round_tf32, split_program, widen
from torch_conv_triton.kernels.launch import launch, workspace
from torch_conv_triton.kernels.reduction import partial_sums, shares_of, sum_partials
from torch_conv_triton.kernels.weight_grad_pointwise import product_of_blocks


@triton.jit(do_not_specialize=["samples", "tiles"])
def copy_to_rows_kernel(
    x_ptr,  # (N, C, L), any strides
    out_ptr,  # (C, ROWS, row), each sample taking `pitch` places of a row
    sums_ptr,  # (tiles, C), what each program copies added up
    C,
    L,
    left,  # zeros before a sample
    samples,
    pitch,
    row,
    stride_xn,
    stride_xc,
    stride_xl,
    tiles,
    ROWS: tl.constexpr,  # of a channel
    STEP: tl.constexpr,  # positions from place to place
    SHIFT: tl.constexpr,  # positions by which a row is ahead of the one before it
    SUMS: tl.constexpr,
    SHORT: tl.constexpr,  # a tile spans more than two samples
    INT64: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    start = pid % tiles * BLOCK
    c = pid // tiles % C
    r = pid // tiles // C * BLOCK_R + tl.arange(0, BLOCK_R)
    sample = start // pitch
    j = start - sample * pitch + tl.arange(0, BLOCK)
    if SHORT:
        ahead = j // pitch
    else:
        ahead = (j >= pitch).to(tl.int32)
    at = ((j - ahead * pitch) * STEP - left)[:, None] + (r * SHIFT)[None, :]
    is_row = (r < ROWS)[None, :]
    mask = (ahead < samples - sample)[:, None] & (at >= 0) & (at < L) & is_row
    x_ptr += sample.to(tl.int64) * stride_xn + c.to(tl.int64) * stride_xc
    x = tl.load(x_ptr + ((widen(ahead, INT64) * stride_xn)[:, None] + widen(at, INT64) * stride_xl), mask=mask, other=0.0)
    out_ptr += c.to(tl.int64) * ROWS * row + start
    places = tl.arange(0, BLOCK)
    to = (widen(r, INT64) * row)[None, :] + places[:, None]
    tl.store(out_ptr + to, round_tf32(x), mask=(start + places < row)[:, None] & is_row)
    if SUMS:
        tl.store(sums_ptr + (pid % tiles).to(tl.int64) * C + c, tl.sum(tl.sum(x, 1), 0))


def copy_to_rows(
    x: Tensor, rows: int, step: int, shift: int, left: int, pitch: int, length: int, summed: bool = False
) -> tuple[Tensor, Tensor | None]:
    """x ``(N, C, L)`` of float32 as `rows` of each channel, rounded to TF32; and partial sums ``(parts, C)`` if `summed`.

    Rows are ``(C, rows, length)``. Place n * pitch + j of row r holds sample n at position j * step + r * shift - left, zero
    where there is none. What is summed has one row.
    """
    N, C, L = x.shape
    out = workspace((C, rows, length), dtype=x.dtype, device=x.device)
    block_r = min(32, triton.next_power_of_2(rows))
    block = 1024 // block_r
    tiles = triton.cdiv(length, block)
    sums = workspace((tiles, C), dtype=x.dtype, device=x.device) if summed else None
    # that a tile may touch
    samples = triton.cdiv(block, pitch) + 1
    launch(
        copy_to_rows_kernel,
        (tiles * C * triton.cdiv(rows, block_r),),
        x,
        out,
        sums if summed else out,
        C,
        L,
        left,
        N,
        pitch,
        length,
        *x.stride(),
        tiles,
        ROWS=rows,
        STEP=step,
        SHIFT=shift,
        SUMS=summed,
        SHORT=pitch < block,
        INT64=max(samples * x.stride(0), out.numel()) > OFFSET_LIMIT or needs_int64(x),
        BLOCK_R=block_r,
        BLOCK=block,
        num_warps=4,
    )
    return out, sums


@triton.jit(do_not_specialize=["blocks", "blocks_per_split", "tiles_o", "tiles_c"])
def conv1d_weight_grad_rows_kernel(
    dy_ptr,  # (groups * C_OUT, dy_row)
    x_ptr,  # (groups * C_IN, PHASES, x_row)
    out_ptr,  # (splits, groups * C_OUT, C_IN, K) contiguous
    dy_row,
    x_row,
    pitch,
    L_out,
    C_OUT,  # per group
    blocks,
    blocks_per_split,
    dilation,
    tiles_o,
    tiles_c,
    GROUPS: tl.constexpr,
    C_IN: tl.constexpr,  # per group
    K: tl.constexpr,
    PHASES: tl.constexpr,
    TAP_MAJOR: tl.constexpr,
    GRAD_LEFT: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    # the tiles of one split are neighbours: they read the same blocks and find them in L2
    tile_c, tile_o, group, split = split_program(tiles_c, tiles_o, GROUPS)

    o = tile_o * BLOCK_O + tl.arange(0, BLOCK_O)
    r = tile_c * BLOCK_C + tl.arange(0, BLOCK_C)
    # what is past the end is computed from what is there, and not stored
    column = tl.minimum(r, C_IN * K - 1)
    if TAP_MAJOR:
        c = column % C_IN
        k = column // C_IN
    else:
        c = column // K
        k = column % K
    shift = k * dilation
    j = tl.arange(0, BLOCK_L)
    rows_of_dy = widen(group * C_OUT + tl.minimum(o, C_OUT - 1), INT64) * dy_row
    rows_of_x = widen((group * C_IN + c) * PHASES + shift % PHASES, INT64) * x_row + shift // PHASES
    if GRAD_LEFT:
        acc = tl.zeros((BLOCK_O, BLOCK_C), dtype=tl.float32)
    else:
        acc = tl.zeros((BLOCK_C, BLOCK_O), dtype=tl.float32)
    first = split * blocks_per_split
    for b in range(first, tl.minimum(first + blocks_per_split, blocks)):
        start = b * BLOCK_L
        dy = tl.load(dy_ptr + start + (rows_of_dy[:, None] + j[None, :]))
        # between samples dy is zero, but zero times a NaN that only other taps may see is none
        is_position = (start + j) % pitch < L_out
        x = tl.load(x_ptr + start + (rows_of_x[None, :] + j[:, None]), mask=is_position[:, None], other=0.0)
        acc = dot_tile(tl.trans(x), dy, acc, GRAD_LEFT, "tf32")

    # the weight's own order, whatever the order of the columns
    out_ptr += (split.to(tl.int64) * GROUPS + group) * C_OUT * (C_IN * K)
    to_row, to_column = o * (C_IN * K), c * K + k
    o_mask, column_mask = o < C_OUT, r < C_IN * K
    if GRAD_LEFT:
        offsets = to_row[:, None] + to_column[None, :]
        mask = o_mask[:, None] & column_mask[None, :]
    else:
        offsets = to_row[None, :] + to_column[:, None]
        mask = o_mask[None, :] & column_mask[:, None]
    tl.store(out_ptr + offsets, acc, mask=mask)


def conv1d_weight_grad_rows(
    grad_output: Tensor,
    x: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor | None,
    stride: int,
    padding: int,
    dilation: int,
    groups: int,
    config,
) -> None:
    """Write the gradient of a convolution's weight into the contiguous grad_weight ``(C_out, C_in / groups, K)``, and that of its
    bias into grad_bias ``(C_out,)`` if there is one, all float32.

    grad_output ``(N, C_out, L_out)`` and x ``(N, C_in, L_in)``, any strides. `config` is a `WeightGradConfig`. The workspace
    holds a copy of grad_output and of the samples of x that have a gradient, with `tap_rows` for each tap, and with more than one
    split `splits` float32 copies of grad_weight; for the bias a sum for every 1024 places of a row.
    """
    N, C_out, L_out = grad_output.shape
    _, C_in, K = grad_weight.shape
    reach = 0 if config.tap_rows else dilation * (K - 1) // stride
    # so that rows start on 16 bytes, and blocks do
    pitch = L_out + reach
    blocks = triton.cdiv(N * pitch, config.BLOCK_L)
    dy_row = blocks * config.BLOCK_L
    x_row = triton.cdiv(dy_row + reach, 16) * 16
    dy_rows, bias_partials = copy_to_rows(grad_output, 1, 1, 0, 0, pitch, dy_row, summed=grad_bias is not None)
    rows, shift = (K, dilation) if config.tap_rows else (stride, 1)
    x_rows, _ = copy_to_rows(x, rows, stride, shift, padding, pitch, x_row)
    if config.tap_rows:
        matrices = dy_rows.view(C_out, dy_row), x_rows.view(-1, x_row)
        partials = product_of_blocks(*matrices, grad_weight, groups, True, "tf32", config)
    else:
        per_split, splits = shares_of(blocks, config.splits)
        partials = partial_sums(grad_weight, splits)
        tiles_o = triton.cdiv(C_out // groups, config.BLOCK_O)
        tiles_c = triton.cdiv(C_in * K, config.BLOCK_C)
        launch(
            conv1d_weight_grad_rows_kernel,
            (tiles_c * tiles_o * groups * splits,),
            dy_rows,
            x_rows,
            partials,
            dy_row,
            x_row,
            pitch,
            L_out,
            C_out // groups,
            blocks,
            per_split,
            dilation,
            tiles_o,
            tiles_c,
            GROUPS=groups,
            C_IN=C_in,
            K=K,
            PHASES=stride,
            TAP_MAJOR=config.tap_major,
            GRAD_LEFT=config.grad_left,
            INT64=max(dy_rows.numel(), x_rows.numel()) > OFFSET_LIMIT,
            BLOCK_O=config.BLOCK_O,
            BLOCK_C=config.BLOCK_C,
            BLOCK_L=config.BLOCK_L,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )
    if partials.shape[0] > 1:
        sum_partials(partials, grad_weight, 1, bias_partials, grad_bias)
    elif grad_bias is not None:
        sum_partials(bias_partials, grad_bias.view(C_out, 1, 1))
