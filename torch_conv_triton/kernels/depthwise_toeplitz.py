"""Depthwise convolution along contiguous rows, on tensor cores: products with banded (Toeplitz) matrices.

A row of x, cut into blocks, times a matrix T with T[i, j] = w[tap that carries sample j to output i] is a block of outputs. A
row need not start on 16 bytes: x and y are addressed from the last 16-byte boundary before it, and T takes up the difference,
as it takes up the padding. So every load and store is a whole vector, whatever the lengths.

A product with T also multiplies samples outside an output's window, by zero; where that is not harmless because some of them
are not finite, the tile is computed again tap by tap.
"""

from __future__ import annotations

from math import gcd

import triton
import triton.language as tl
from torch import Tensor

from torch_conv_triton.kernels.common import dot_precision, dot_tile, needs_int64, round_tf32, widen
from torch_conv_triton.kernels.depthwise_rows import exact_blocks, load_blocks, rows_of_channel, store_blocks
from torch_conv_triton.kernels.epilogue import NO_FUSION, Fusion
from torch_conv_triton.kernels.launch import launch
from torch_conv_triton.kernels.layout import channels_last_copy
from torch_conv_triton.kernels.vectors import floor_multiple

# bytes; rows that could only be cut into narrower vectors are addressed from the boundary before them
NARROWEST = 4


@triton.jit
def first_sample(
    step,
    shift,
    TAPS: tl.constexpr,
    SLICES: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    VECTOR: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Where the slice of x begins that a step multiplies, counted from the start of a block: a multiple of VECTOR."""
    first_tap = step // SLICES * TAPS
    if TRANSPOSED:
        UNIT: tl.constexpr = STRIDE * VECTOR
        first = floor_multiple(shift - (first_tap + TAPS - 1) * DILATION, UNIT) // UNIT * VECTOR
    else:
        first = floor_multiple(first_tap * DILATION - shift, VECTOR)
    return first + step % SLICES * BLOCK_K


@triton.jit
def toeplitz_tile(
    w_ptr,  # row of the output channel
    step,
    first,
    shift,
    stride_wk,
    K: tl.constexpr,
    TAPS: tl.constexpr,
    SLICES: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The matrix [BLOCK_N, BLOCK_K] that carries a slice of samples to the outputs of a block by the taps of a step."""
    i = tl.arange(0, BLOCK_N)[:, None]
    column = (first + tl.arange(0, BLOCK_K))[None, :]
    first_tap = step // SLICES * TAPS
    reach = (i - column * STRIDE if TRANSPOSED else column - i * STRIDE) + shift - first_tap * DILATION
    tap = first_tap + reach // DILATION
    mask = (reach >= 0) & (reach < TAPS * DILATION) & (reach % DILATION == 0) & (tap < K)
    return tl.load(w_ptr + tap * stride_wk, mask=mask, other=0.0)


@triton.jit(
    do_not_specialize=[
        "N",
        "C_OUT",
        "L_in",
        "L_out",
        "padding",
        "stride_xn",
        "stride_xc",
        "stride_yn",
        "stride_yc",
        "tiles",
        "programs",
    ]
)
def conv1d_depthwise_toeplitz_fwd_kernel(
    x_ptr,  # (N, C_in, L_in), L contiguous
    w_ptr,  # (C_out, 1, K), any strides
    b_ptr,  # (C_out,), or unused
    y_ptr,  # (N, C_out, L_out), L contiguous
    N,
    C_OUT,
    L_in,
    L_out,
    padding,
    stride_xn,  # in vectors of X_VECTOR elements
    stride_xc,
    stride_wo,
    stride_wk,
    stride_yn,  # in vectors of Y_VECTOR elements
    stride_yc,
    tiles,  # of outputs, in a row
    programs,  # of a channel
    more,  # as `store_outputs` takes it
    more_strides,
    MULTIPLIER: tl.constexpr,
    K: tl.constexpr,
    STRIDE: tl.constexpr,
    DILATION: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    TAPS: tl.constexpr,  # of a pass: all of them, or one where they lie far apart
    SLICES: tl.constexpr,  # of BLOCK_K samples, in a pass
    X_VECTOR: tl.constexpr,  # elements; divides the strides of the samples
    Y_VECTOR: tl.constexpr,
    X_EDGES: tl.constexpr,  # rows of x may begin or end within a vector
    Y_EDGES: tl.constexpr,
    RUN: tl.constexpr,  # consecutive blocks of outputs share the samples they have in common; 0: one block, too many matrices
    TILES: tl.constexpr,  # of outputs, in a program
    ROUND: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EPILOGUE: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,  # runs in a tile
    BLOCK_N: tl.constexpr,  # outputs in a block
    BLOCK_K: tl.constexpr,
):
    PASSES: tl.constexpr = (K + TAPS - 1) // TAPS
    BLOCKS: tl.constexpr = max(RUN, 1)
    BLOCK_X: tl.constexpr = BLOCK_N // STRIDE if TRANSPOSED else BLOCK_N * STRIDE
    SHIFT: tl.constexpr = BLOCK_X // BLOCK_K  # slices from a block to the next; whole where RUN > 1
    pid = tl.program_id(0)
    o = pid // programs
    x_ptr, x_phase, y_ptr, y_phase = rows_of_channel(x_ptr, y_ptr, o, stride_xc, stride_yc, MULTIPLIER, X_VECTOR, Y_VECTOR)
    w_ptr += o.to(tl.int64) * stride_wo
    if TRANSPOSED:
        shift = padding - y_phase + x_phase * STRIDE
    else:
        shift = padding - x_phase + y_phase * STRIDE
    bias = 0.0
    if HAS_BIAS:
        bias = tl.load(b_ptr + o).to(tl.float32)

    matrices = ()
    for step in tl.static_range(PASSES * SLICES if RUN else 0):
        first = first_sample(step, shift, TAPS, SLICES, STRIDE, DILATION, TRANSPOSED, X_VECTOR, BLOCK_K)
        t = toeplitz_tile(w_ptr, step, first, shift, stride_wk, K, TAPS, SLICES, STRIDE, DILATION, TRANSPOSED, BLOCK_N, BLOCK_K)
        matrices = matrices + (round_tf32(t) if ROUND else t,)

    start = pid % programs * TILES
    for unit in range(start, tl.minimum(start + TILES, N * tiles)):
        sample = (unit // tiles).to(tl.int64)
        block = (widen(unit % tiles, INT64) * BLOCK_M + tl.arange(0, BLOCK_M)) * BLOCKS
        x_row = x_ptr + sample * stride_xn * X_VECTOR
        y_row = y_ptr + sample * stride_yn * Y_VECTOR
        sums = ()
        for _ in tl.static_range(BLOCKS):
            sums = sums + (tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32),)
        if RUN:
            for p in tl.static_range(PASSES):
                first = first_sample(p * SLICES, shift, TAPS, SLICES, STRIDE, DILATION, TRANSPOSED, X_VECTOR, BLOCK_K)
                slices = ()
                for j in tl.static_range((RUN - 1) * SHIFT + SLICES):
                    begin = block * BLOCK_X + (first + j * BLOCK_K)
                    x = load_blocks(x_row, begin, x_phase, L_in, X_VECTOR, X_EDGES, BLOCK_K)
                    slices = slices + (round_tf32(x) if ROUND else x,)
                added = ()
                for r in tl.static_range(RUN):
                    acc = sums[r]
                    for j in tl.static_range(SLICES):
                        acc = dot_tile(slices[r * SHIFT + j], matrices[p * SLICES + j], acc, False, PRECISION)
                    added = added + (acc,)
                sums = added
        else:
            acc = sums[0]
            for step in range(PASSES * SLICES):
                first = first_sample(step, shift, TAPS, SLICES, STRIDE, DILATION, TRANSPOSED, X_VECTOR, BLOCK_K)
                t = toeplitz_tile(
                    w_ptr, step, first, shift, stride_wk, K, TAPS, SLICES, STRIDE, DILATION, TRANSPOSED, BLOCK_N, BLOCK_K
                )
                x = load_blocks(x_row, block * BLOCK_X + first, x_phase, L_in, X_VECTOR, X_EDGES, BLOCK_K)
                if ROUND:
                    x = round_tf32(x)
                    t = round_tf32(t)
                acc = dot_tile(x, t, acc, False, PRECISION)
            sums = (acc,)

        # zero times what is not finite is NaN
        finite = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for r in tl.static_range(BLOCKS):
            finite += sums[r] * 0.0
        if tl.sum(finite) == 0.0:
            for r in tl.static_range(BLOCKS):
                store_blocks(
                    y_row,
                    sums[r] + bias,
                    sample,
                    o,
                    (block + r) * BLOCK_N,
                    y_phase,
                    C_OUT,
                    L_out,
                    more,
                    more_strides,
                    EPILOGUE,
                    Y_VECTOR,
                    Y_EDGES,
                    INT64,
                    BLOCK_N,
                )
        else:
            for b in range(BLOCKS):
                to = (block + b) * BLOCK_N
                l_out = to[:, None] + tl.arange(0, BLOCK_N)[None, :] - y_phase
                exact = exact_blocks(x_row + x_phase, w_ptr, l_out, L_in, padding, stride_wk, K, STRIDE, DILATION, TRANSPOSED)
                store_blocks(
                    y_row,
                    exact + bias,
                    sample,
                    o,
                    to,
                    y_phase,
                    C_OUT,
                    L_out,
                    more,
                    more_strides,
                    EPILOGUE,
                    Y_VECTOR,
                    Y_EDGES,
                    INT64,
                    BLOCK_N,
                )


def conv1d_depthwise_toeplitz(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    stride: int,
    padding: int,
    dilation: int,
    transposed: bool,
    tf32: bool,
    config,
    fusion: Fusion = NO_FUSION,
) -> None:
    """Write the depthwise convolution of x ``(N, C_in, L_in)`` into y ``(N, C_out, L_out)``; C_out is a multiple of C_in.

    Weight ``(C_out, 1, K)``, or ``(C_in, C_out / C_in, K)`` when `transposed`, any strides. y has L contiguous; an x that has
    not is copied. A program computes `steps` tiles of one channel, each BLOCK_M runs of `run` blocks of BLOCK_N outputs, from
    slices of BLOCK_K samples; `transposed`, the stride divides BLOCK_N. A `run` of 0: one block, its matrices built as needed.
    """
    if x.stride(2) != 1:
        x = channels_last_copy(x.transpose(1, 2)).transpose(1, 2)
    N, C_in, L_in = x.shape
    _, C_out, L_out = y.shape
    if transposed:
        weight = weight.reshape(C_out, 1, weight.shape[2])
    K = weight.shape[2]
    x_vector, y_vector = vector_length(x), vector_length(y)
    if transposed:
        # a block of outputs begins at a whole vector of x
        x_vector = min(x_vector, config.BLOCK_N // stride)
    x_phased, y_phased = x.stride(1) % x_vector != 0, y.stride(1) % y_vector != 0
    lead = None if x_phased or y_phased else padding
    passes = [
        (taps, slices_of_pass(taps, K, stride, lead, dilation, transposed, x_vector, config.BLOCK_N, config.BLOCK_K))
        for taps in (K, 1)
    ]
    taps, slices = min(passes, key=lambda p: triton.cdiv(K, p[0]) * p[1])
    tiles = triton.cdiv(L_out + (y_vector - 1 if y_phased else 0), config.BLOCK_M * config.BLOCK_N * max(config.run, 1))
    programs = triton.cdiv(N * tiles, config.steps)
    launch(
        conv1d_depthwise_toeplitz_fwd_kernel,
        (programs * C_out,),
        x,
        weight,
        bias if bias is not None else weight,
        y,
        N,
        C_out,
        L_in,
        L_out,
        padding,
        x.stride(0) // x_vector,
        x.stride(1),
        weight.stride(0),
        weight.stride(2),
        y.stride(0) // y_vector,
        y.stride(1),
        tiles,
        programs,
        MULTIPLIER=C_out // C_in,
        K=K,
        STRIDE=stride,
        DILATION=dilation,
        TRANSPOSED=transposed,
        TAPS=taps,
        SLICES=slices,
        X_VECTOR=x_vector,
        Y_VECTOR=y_vector,
        X_EDGES=x_phased or L_in % x_vector != 0,
        Y_EDGES=y_phased or L_out % y_vector != 0,
        RUN=config.run,
        TILES=config.steps,
        ROUND=tf32,
        PRECISION=dot_precision(x.dtype, tf32),
        HAS_BIAS=bias is not None,
        **fusion.arguments(y),
        INT64=needs_int64(x, y, *fusion.views(y)),
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        BLOCK_K=config.BLOCK_K,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def vector_length(tensor: Tensor) -> int:
    """Elements of the vectors, of up to 16 bytes, in which an ``(N, C, L)`` tensor with L contiguous is read or written.

    Rows that all start at multiples of 4 bytes or more are cut into the widest vectors that they start at. Other rows are
    addressed from the boundary before them, so only the samples have to start at one.
    """
    if tensor.data_ptr() % 16:
        return 1
    N, _, L = tensor.shape
    widest = 16 // tensor.element_size()
    sample = gcd(widest, tensor.stride(0)) if N > 1 else widest
    row = gcd(sample, tensor.stride(1), L)
    return row if row * tensor.element_size() >= NARROWEST else sample


def slices_of_pass(
    taps: int,
    K: int,
    stride: int,
    padding: int | None,
    dilation: int,
    transposed: bool,
    vector: int,
    block_n: int,
    block_k: int,
) -> int:
    """Slices of `block_k` samples that hold what `taps` taps carry to a block of outputs, counted from a multiple of `vector`.

    A `padding` of None stands for rows whose start within a vector is not known.
    """
    unit = vector * (stride if transposed else 1)
    start = padding - (taps - 1) * dilation if transposed and padding is not None else -(padding or 0)
    known = padding is not None and (taps == K or dilation % unit == 0)
    reach = (start % unit if known else unit - 1) + (taps - 1) * dilation
    if transposed:
        return (reach + block_n - 1) // stride // block_k + 1
    return (reach + (block_n - 1) * stride) // block_k + 1
