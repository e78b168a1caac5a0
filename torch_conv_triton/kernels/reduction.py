"""What the gradients of weight and bias share: sums over samples and positions, as partial sums added in a fixed order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from torch_conv_triton.kernels.common import OFFSET_LIMIT, widen
from torch_conv_triton.kernels.launch import launch, workspace


@triton.jit
def block_positions(b, last, N, L_out, blocks_per_sample, FLATTEN: tl.constexpr, INT64: tl.constexpr, BLOCK_L: tl.constexpr):
    """Sample (FLATTEN: one a position), output positions and mask of the BLOCK_L positions of block b, none from `last` on."""
    if FLATTEN:
        m = b * BLOCK_L + tl.arange(0, BLOCK_L)
        return (m // L_out).to(tl.int64), m % L_out, (m < N * L_out) & (b < last)
    else:
        l_out = widen(b % blocks_per_sample, INT64) * BLOCK_L + tl.arange(0, BLOCK_L)
        return (b // blocks_per_sample).to(tl.int64), l_out, (l_out < L_out) & (b < last)


def blocks_of(N: int, L_out: int, block: int) -> tuple[bool, int, int]:
    """(FLATTEN, blocks of one sample, all blocks): how N samples of L_out positions are cut into blocks of `block`.

    Short samples are cut as one sequence, so that no block is mostly padding.
    """
    flatten = N > 1 and L_out < 2 * block and L_out % block != 0 and N * L_out <= OFFSET_LIMIT
    per_sample = triton.cdiv(L_out, block)
    return flatten, per_sample, triton.cdiv(N * L_out, block) if flatten else N * per_sample


def shares_of(blocks: int, splits: int) -> tuple[int, int]:
    """(blocks of one split, splits): so many blocks in shares of one size, in fewer splits where some would get none."""
    per_split = triton.cdiv(blocks, splits)
    return per_split, triton.cdiv(blocks, per_split)


@triton.jit
def store_sums(
    tile,
    partials_ptr,  # (splits, split_size)
    out_ptr,  # (numel,)
    numel,
    splits,
    split_size,
    channel_size,  # elements of a partial sum for one channel
    K: tl.constexpr,
    TERMS: tl.constexpr,  # elements of a partial sum that make one output
    BLOCK_S: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Output e = (channel, k) is the sum over splits of its terms: element e, or a diagonal of rows of TERMS from row k on."""
    e = tile * BLOCK + tl.arange(0, BLOCK)
    if TERMS == 1:
        start = e
    else:
        start = (e // K) * channel_size + (e % K) * TERMS
    acc = tl.zeros((BLOCK_S, BLOCK), tl.float32)
    for s in range(0, splits * TERMS, BLOCK_S):
        row = s + tl.arange(0, BLOCK_S)
        offsets = (row // TERMS).to(tl.int64) * split_size + (row % TERMS) * (TERMS + 1)
        mask = (row < splits * TERMS)[:, None] & (e < numel)[None, :]
        acc += tl.load(partials_ptr + (offsets[:, None] + start[None, :]), mask=mask, other=0.0)
    tl.store(out_ptr + e, tl.sum(acc, 0).to(out_ptr.dtype.element_ty), mask=e < numel)


@triton.jit(do_not_specialize=["splits", "bias_splits", "tiles"])
def sum_partials_kernel(
    partials_ptr,
    out_ptr,
    numel,
    splits,
    split_size,
    channel_size,
    bias_partials_ptr,  # (bias_splits, bias_numel)
    bias_ptr,  # (bias_numel,)
    bias_numel,
    bias_splits,
    tiles,  # of `out`; those after them are of the bias
    K: tl.constexpr,
    TERMS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK: tl.constexpr,
    BIAS_BLOCK: tl.constexpr,
):
    tile = tl.program_id(0)
    if HAS_BIAS:
        if tile < tiles:
            store_sums(tile, partials_ptr, out_ptr, numel, splits, split_size, channel_size, K, TERMS, BLOCK_S, BLOCK)
        else:
            store_sums(tile - tiles, bias_partials_ptr, bias_ptr, bias_numel, bias_splits, bias_numel, 1, 1, 1, 128, BIAS_BLOCK)
    else:
        store_sums(tile, partials_ptr, out_ptr, numel, splits, split_size, channel_size, K, TERMS, BLOCK_S, BLOCK)


def sum_partials(
    partials: Tensor, out: Tensor, terms: int = 1, bias_partials: Tensor | None = None, grad_bias: Tensor | None = None
) -> None:
    """Write the sum of partials ``(splits, ...)`` into the contiguous out ``(C_out, C_in / groups, K)``, in one fixed order.

    With `terms` above 1 a partial sum is ``(C_out, rows, terms)``, and tap k the sum of a diagonal: row k + i, column i. The same
    launch writes the sum of bias_partials ``(bias_splits, C_out)``, if there are any, into grad_bias ``(C_out,)``.
    """
    numel, rows = out.numel(), triton.next_power_of_2(partials.shape[0] * terms)
    if rows < 32:
        # wide tiles, of enough programs: 3 splits of 589824 in tiles of 32 rows 0.0147
        block_s, block = rows, max(32, min(4096 // rows, 1024, triton.next_power_of_2(numel // 512)))
    else:
        block = 128 if numel >= 32768 else min(32, triton.next_power_of_2(numel))
        # few outputs leave room to have more of their terms under way
        block_s = max(32, min(4096 // block, rows))
    bias_block = 32
    has_bias = bias_partials is not None
    tiles = triton.cdiv(numel, block)
    launch(
        sum_partials_kernel,
        (tiles + (triton.cdiv(grad_bias.numel(), bias_block) if has_bias else 0),),
        partials,
        out,
        numel,
        partials.shape[0],
        partials[0].numel(),
        partials[0, 0].numel(),
        bias_partials if has_bias else partials,
        grad_bias if has_bias else out,
        grad_bias.numel() if has_bias else 0,
        bias_partials.shape[0] if has_bias else 0,
        tiles,
        K=out.shape[2],
        TERMS=terms,
        HAS_BIAS=has_bias,
        BLOCK_S=block_s,
        BLOCK=block,
        BIAS_BLOCK=bias_block,
    )


def partial_sums(out: Tensor, splits: int) -> Tensor:
    """Where the kernels write: `out` as the only part, or an uninitialised workspace of float32, ``(splits, *out.shape)``."""
    if splits == 1:
        return out.unsqueeze(0)
    return workspace((splits, *out.shape), torch.float32, out.device)
