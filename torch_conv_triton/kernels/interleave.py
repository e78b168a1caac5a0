"""What the interleaved transposed kernels share: the weight by phases, x as rows of all samples, the weaving of the output."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from torch_conv_triton.kernels.common import round_tf32, widen
from torch_conv_triton.kernels.epilogue import store_outputs, store_tile
from torch_conv_triton.kernels.launch import launch, workspace
from torch_conv_triton.kernels.layout import channels_last_copy
from torch_conv_triton.kernels.weight_matrix import of_launch
from torch_conv_triton.problem import ceil_pow2
from torch_conv_triton.weave import Weave


@triton.jit
def pack_interleaved_kernel(
    w_ptrs,  # (C_in, C_out / groups, K), any strides
    out_ptrs,  # (C_out, ROWS, TAPS, C_in / groups)
    C_OUT,  # per group
    stride_wc,
    stride_wo,
    stride_wk,
    tiles_c,
    tiles_z,
    C_IN: tl.constexpr,  # per group
    K: tl.constexpr,
    PHASES: tl.constexpr,
    ROWS: tl.constexpr,
    TAPS: tl.constexpr,
    REVERSE: tl.constexpr,
    ROUND: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_Z: tl.constexpr,
):
    """Transposes tiles of [channels, (output channel, tap)]; rows and taps that do not exist are zero."""
    pid = tl.program_id(0)
    tile_c = pid % tiles_c
    tile_z = (pid // tiles_c) % tiles_z
    group = (pid // (tiles_c * tiles_z)).to(tl.int64)
    c = tile_c * BLOCK_C + tl.arange(0, BLOCK_C)
    # in the order of k for each output channel, which a contiguous weight has too
    z = tile_z * BLOCK_Z + tl.arange(0, BLOCK_Z)
    o = z // (TAPS * ROWS)
    j = (z // ROWS) % TAPS
    phase = z % ROWS
    k = j * PHASES + phase
    there = (c < C_IN)[:, None] & (o < C_OUT)[None, :]
    w_c = (group * C_IN + c) * stride_wc
    w_z = o.to(tl.int64) * stride_wo + k.to(tl.int64) * stride_wk
    w = tl.load(of_launch(w_ptrs) + (w_c[:, None] + w_z[None, :]), mask=there & ((phase < PHASES) & (k < K))[None, :], other=0.0)
    if ROUND:
        w = round_tf32(w)
    if REVERSE:
        j = TAPS - 1 - j
    row = ((group * C_OUT + o) * ROWS + phase) * TAPS + j
    tl.store(of_launch(out_ptrs) + (row[None, :] * C_IN + c[:, None]), w, mask=there)


def pack_interleaved(weight: Tensor, groups: int, weave: Weave, rounded: bool, reverse: bool = False) -> Tensor:
    """Weight ``(C_in, C_out / groups, K)`` as the matrix ``(C_out * rows, taps * C_in / groups)``, tap-major columns.

    Rounded to TF32 if `rounded`; `reverse` puts the last tap first.
    """
    C_total, C_out, K = weight.shape
    C_in = C_total // groups
    rows = weave.rows(C_in)
    packed = workspace((groups * C_out * rows, weave.taps * C_in), dtype=weight.dtype, device=weight.device)
    block_c, block_z = min(64, max(16, ceil_pow2(C_in))), 64
    tiles_c, tiles_z = triton.cdiv(C_in, block_c), triton.cdiv(C_out * rows * weave.taps, block_z)
    launch(
        pack_interleaved_kernel,
        (tiles_c * tiles_z * groups,),
        (weight,),
        (packed,),
        C_out,
        *weight.stride(),
        tiles_c,
        tiles_z,
        C_IN=C_in,
        K=K,
        PHASES=weave.phases,
        ROWS=rows,
        TAPS=weave.taps,
        REVERSE=reverse,
        ROUND=rounded,
        BLOCK_C=block_c,
        BLOCK_Z=block_z,
    )
    return packed


def reversed_weight(weight: Tensor, groups: int, rounded: bool) -> Tensor:
    """The weight ``(C_out, C_in / groups, K)`` of the plain convolution that a transposed one of stride 1 is.

    Rounded to TF32 if `rounded`.
    """
    C_total, C_out, K = weight.shape
    packed = pack_interleaved(weight, groups, Weave.of(K, 1, 1), rounded, reverse=True)
    return packed.view(groups * C_out, K, C_total // groups).transpose(1, 2)


def rows_of_samples(
    x: Tensor, weave: Weave, stride: int, padding: int, L_out: int, tf32: bool, BLOCK_M: int
) -> tuple[Tensor, bool, int]:
    """A copy of x ``(N, C_in, L_in)`` as ``(N, rows, C_in)``, with rows of zeros between samples, rounded to TF32 if `tf32`.

    Also whether tiles of BLOCK_M rows shall run over all samples as over one long signal, and how many there are, of all samples
    or else of one.
    """
    N, _, L_in = x.shape
    positions = (L_out - 1 + padding) // stride + 1
    # zeros follow each sample as far as its last position, and as far as the next sample's first reads back
    rows = channels_last_copy(x, multiple=max(L_in + weave.reach, positions), rounded=tf32).transpose(1, 2)
    # a tile over several samples stores single values, not vectors: worth it where a sample leaves much of its last tile empty
    positions -= padding // stride
    tiles = triton.cdiv(positions, BLOCK_M)
    flatten = N > 1 and 8 * (tiles * BLOCK_M - positions) > positions
    return rows, flatten, triton.cdiv(N * rows.shape[1], BLOCK_M) if flatten else tiles


@triton.jit
def mask_phases(acc, rows, PHASES_WITH: tl.constexpr, ROWS: tl.constexpr):
    """Zero for the phases that lack the last tap: their zero weights do not stop a NaN or Inf of x."""
    return tl.where((rows % ROWS < PHASES_WITH)[None, :], acc, 0.0)


@triton.constexpr_function
def is_power_of_two(n):
    return n & (n - 1) == 0


@triton.jit
def output_positions(
    row,  # of the tile
    within,  # output of the row's position, 0 to STRIDE - 1
    start,
    sample,
    N,
    L_ROWS,
    L_out,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    """Samples, positions in y and mask of the outputs of some rows, see `store_interleaved`."""
    if FLATTEN:
        m = start + row
        n = m // L_ROWS
        t = m % L_ROWS * STRIDE + within - PADDING
        return n.to(tl.int64), t, (n < N) & (t >= 0) & (t < L_out)
    else:
        t = start * STRIDE + (PADDING // STRIDE * STRIDE - PADDING) + (row * STRIDE + within)
        return sample, t, (t >= 0) & (t < L_out)


@triton.jit
def store_interleaved(
    acc,  # [BLOCK_M, BLOCK_N]: positions x (output channel, phase)
    start,  # first row of the tile
    sample,  # int64; unused with FLATTEN
    group,
    tile_n,
    N,
    L_ROWS,
    L_out,
    C_OUT,  # per group
    b_ptr,
    y_ptr,
    stride_yn,
    stride_yc,
    stride_yl,
    more,
    more_strides,
    STRIDE: tl.constexpr,
    PADDING: tl.constexpr,
    SPACING: tl.constexpr,
    ROWS: tl.constexpr,
    EPILOGUE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    FLATTEN: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Weave phases between positions, zeros between phases that lie apart, and end as `store_outputs` does.

    Row m of the tiles is position PADDING // STRIDE + m of one sample; with FLATTEN, position m % L_ROWS of sample m // L_ROWS.
    """
    first = widen(group, INT64) * C_OUT
    if is_power_of_two(ROWS) and ROWS <= BLOCK_N:
        BLOCK_O: tl.constexpr = BLOCK_N // ROWS
        GAP: tl.constexpr = triton.next_power_of_2(SPACING)
        WIDTH: tl.constexpr = ROWS * GAP  # of one position, at least STRIDE
        tile = tl.permute(tl.reshape(acc, (BLOCK_M, BLOCK_O, ROWS)), (1, 0, 2))
        if GAP > 1:
            spread = (tl.arange(0, GAP) == 0)[None, None, None, :]
            tile = tl.where(spread, tl.reshape(tile, (BLOCK_O, BLOCK_M, ROWS, 1)), 0.0)
        tile = tl.reshape(tile, (BLOCK_O, BLOCK_M * WIDTH))
        i = tl.arange(0, BLOCK_M * WIDTH)
        if WIDTH == STRIDE and not FLATTEN:
            # the compiler sees that these are neighbours, and stores vectors
            n, t, mask = output_positions(0, i, start, sample, N, L_ROWS, L_out, STRIDE, PADDING, FLATTEN)
        else:
            within = (i // GAP) % ROWS * SPACING + i % GAP
            n, t, mask = output_positions(i // WIDTH, within, start, sample, N, L_ROWS, L_out, STRIDE, PADDING, FLATTEN)
            mask = mask & (i % GAP < SPACING) & (within < STRIDE)
        store_tile(
            (tile,),
            n,
            t,
            mask,
            first,
            tile_n * BLOCK_O,
            C_OUT,
            b_ptr,
            y_ptr,
            stride_yn,
            stride_yc,
            stride_yl,
            more,
            more_strides,
            EPILOGUE,
            HAS_BIAS,
            True,
            INT64,
        )
    else:
        # neighbours of a row of the accumulator are the phases of a position, which are neighbours in y
        r = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
        m = tl.arange(0, BLOCK_M)[:, None]
        n, t, mask = output_positions(m, (r % ROWS)[None, :], start, sample, N, L_ROWS, L_out, STRIDE, PADDING, FLATTEN)
        store_outputs(
            acc,
            n,
            t,
            mask,
            first,
            (r // ROWS)[None, :],
            ((r // ROWS < C_OUT) & (r % ROWS < STRIDE))[None, :],
            b_ptr,
            y_ptr,
            stride_yn,
            stride_yc,
            stride_yl,
            more,
            more_strides,
            EPILOGUE,
            HAS_BIAS,
            INT64,
        )
