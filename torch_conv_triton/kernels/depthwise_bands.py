"""Depthwise convolution along contiguous rows at stride 1, on tensor cores: banded products of what threads load themselves.

The products are those of `depthwise_toeplitz`. Here layouts are chosen by hand: a thread loads the very words of x that its part
of a product takes, and stores the outputs that it gets, so that nothing is moved between threads. The rows of a tile are runs of
blocks, of one sample after another, so that short signals leave no part of a tile empty.

Written in Gluon. The products are those of sm_80 and later.
"""

from __future__ import annotations

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from torch_conv_triton.kernels.common import first_tap, needs_int64, round_tf32
from torch_conv_triton.kernels.depthwise_rows import inside, rows_of_channel
from torch_conv_triton.kernels.depthwise_toeplitz import vector_length
from torch_conv_triton.kernels.epilogue import NO_FUSION, Fusion, store_outputs
from torch_conv_triton.kernels.launch import launch
from torch_conv_triton.kernels.program import is_plain
from torch_conv_triton.kernels.vectors import floor_multiple

# runs of a tile for each warp, outputs of a block, samples of a slice
BLOCK = 16


@triton.constexpr_function
def beyond_rows():
    """A position that is in no row, nor are those near it."""
    return 1 << 30


@triton.constexpr_function
def output_layout(NUM_WARPS):
    """Where the outputs of a block are: a thread has four neighbours in each of two rows."""
    warps = [[16 << i, 0] for i in range(NUM_WARPS.bit_length() - 1)]
    lanes = [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout([[0, 1], [0, 2], [8, 0]], lanes, warps, [], [16 * NUM_WARPS, 16])


@gluon.jit
def store_block(
    acc,  # [BLOCK_M, 16] in `output_layout`
    y_rows,  # [BLOCK_M, 1] the boundary before each row
    sample,  # [BLOCK_M, 1], int64
    o,
    begin,  # [BLOCK_M, 1] first output of each block, counted from the boundary
    phase,  # where a row begins, counted from the boundary
    C_OUT,
    L_out,
    more,
    more_strides,
    EPILOGUE: gl.constexpr,
    VECTOR: gl.constexpr,
    EDGES: gl.constexpr,
    INT64: gl.constexpr,
    LAYOUT: gl.constexpr,
):
    """Store the outputs that lie within the row, by whole vectors but at its edges; or end as `store_outputs` does."""
    i = gl.arange(0, 16, layout=gl.SliceLayout(0, LAYOUT))[None, :]
    if is_plain(EPILOGUE):
        y = acc.to(y_rows.dtype.element_ty)
        pointers = y_rows + (begin + i)
        vector = begin + i // VECTOR * VECTOR
        if EDGES:
            whole = (vector >= phase) & (vector + VECTOR <= L_out + phase)
            gl.store(pointers, y, mask=whole)
            gl.store(pointers, y, mask=inside(begin + i - phase, L_out) & (whole == 0))
        else:
            gl.store(pointers, y, mask=vector < L_out)
    else:
        at = begin + i - phase
        rows = y_rows + phase
        store_outputs(
            acc, sample, at, inside(at, L_out), 0, o, o < C_OUT, rows, rows, 0, 0, 1, more, more_strides, EPILOGUE, False, INT64
        )


@gluon.jit(
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
        "runs",
        "programs",
    ]
)
def conv1d_depthwise_bands_fwd_kernel(
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
    runs,  # of a sample
    programs,  # of a channel
    more,  # as `store_outputs` takes it
    more_strides,
    MULTIPLIER: gl.constexpr,
    K: gl.constexpr,
    SLICES: gl.constexpr,  # of 16 samples that carry to a block of outputs
    RUN: gl.constexpr,  # blocks of 16 outputs in a row share the samples that they have in common
    TILES: gl.constexpr,  # of a program
    X_VECTOR: gl.constexpr,
    Y_VECTOR: gl.constexpr,
    X_EDGES: gl.constexpr,  # rows of x may begin or end within a vector
    Y_EDGES: gl.constexpr,
    ROUND: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    EPILOGUE: gl.constexpr,
    INT64: gl.constexpr,
    BLOCK_M: gl.constexpr,  # 16 runs a warp
    NUM_WARPS: gl.constexpr,
):
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [NUM_WARPS, 1], [16, 8])
    K_WIDTH: gl.constexpr = 32 // x_ptr.dtype.element_ty.primitive_bitwidth
    left: gl.constexpr = gl.DotOperandLayout(0, mma, K_WIDTH)
    right: gl.constexpr = gl.DotOperandLayout(1, mma, K_WIDTH)
    out: gl.constexpr = output_layout(NUM_WARPS)

    pid = gl.program_id(0)
    o = pid // programs
    x_ptr, x_phase, y_ptr, y_phase = rows_of_channel(x_ptr, y_ptr, o, stride_xc, stride_yc, MULTIPLIER, X_VECTOR, Y_VECTOR)
    w_ptr += o.to(gl.int64) * stride_wo
    # tap k carries sample i + k - shift to output i, counted from their boundaries
    shift = padding - x_phase + y_phase
    first = floor_multiple(-shift, X_VECTOR)
    bias = 0.0
    if HAS_BIAS:
        bias = gl.load(b_ptr + o).to(gl.float32)

    j = gl.arange(0, 16, layout=gl.SliceLayout(1, right))[:, None]
    column = gl.arange(0, 16, layout=gl.SliceLayout(0, right))[None, :]
    # columns are in such an order that the four of a thread are neighbours
    tap = first + shift + j - (column % 8 // 2 * 4 + column // 8 * 2 + column % 2)
    w_ptrs = w_ptr + tap * stride_wk
    matrices = ()
    for s in gl.static_range(SLICES):
        t = gl.load(w_ptrs + (16 * s) * stride_wk, mask=(tap >= -16 * s) & (tap < K - 16 * s), other=0.0)
        matrices = matrices + (round_tf32(t) if ROUND else t,)

    row = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, left))
    y_row = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, out))
    i = gl.arange(0, 16, layout=gl.SliceLayout(0, left))[None, :]
    for tile in range(TILES):
        start = (pid % programs * TILES + tile) * BLOCK_M
        unit = start + row
        x_rows = x_ptr + (unit // runs).to(gl.int64) * stride_xn * X_VECTOR
        begin = unit % runs * (16 * RUN) + first
        x_ptrs = x_rows[:, None] + (begin[:, None] + i)
        begin = gl.where(unit < N * runs, begin, beyond_rows())[:, None]
        slices = ()
        for s in gl.static_range(RUN - 1 + SLICES):
            vector = begin + (16 * s) + i // X_VECTOR * X_VECTOR
            x = gl.load(x_ptrs + 16 * s, mask=inside(vector, L_in + x_phase), other=0.0)
            if X_EDGES:
                x = gl.where(inside(begin + (16 * s) + i - x_phase, L_in), x, 0.0)
            slices = slices + (round_tf32(x) if ROUND else x,)
        sums = ()
        for r in gl.static_range(RUN):
            acc = gl.full([BLOCK_M, 16], bias, gl.float32, layout=mma)
            for s in gl.static_range(SLICES):
                acc = mma_v2(slices[r + s], matrices[s], acc)
            acc = acc.reshape([BLOCK_M, 2, 4, 2]).permute((0, 2, 1, 3)).reshape([BLOCK_M, 16])
            sums = sums + (gl.convert_layout(acc, out, assert_trivial=True),)
        total = sums[0]
        for r in gl.static_range(1, RUN):
            total += sums[r]

        unit = start + y_row
        sample = (unit // runs).to(gl.int64)[:, None]
        y_rows = y_ptr + sample * stride_yn * Y_VECTOR
        to = gl.where(unit < N * runs, unit % runs * (16 * RUN), beyond_rows())[:, None]
        # zero times what is not finite is NaN
        if gl.sum(gl.sum(total, 1), 0) * 0.0 == 0.0:
            for r in gl.static_range(RUN):
                store_block(
                    sums[r],
                    y_rows,
                    sample,
                    o,
                    to + 16 * r,
                    y_phase,
                    C_OUT,
                    L_out,
                    more,
                    more_strides,
                    EPILOGUE,
                    Y_VECTOR,
                    Y_EDGES,
                    INT64,
                    out,
                )
        else:
            signal = x_ptr + sample * stride_xn * X_VECTOR + x_phase
            for block in range(RUN):
                l_out = to + 16 * block + gl.arange(0, 16, layout=gl.SliceLayout(0, out))[None, :] - y_phase
                exact = gl.full([BLOCK_M, 16], bias, gl.float32, layout=out)
                for k in range(K):
                    at = l_out + (k - padding)
                    samples = gl.load(signal + at, mask=inside(at, L_in), other=0.0)
                    exact += samples.to(gl.float32) * gl.load(w_ptr + k * stride_wk).to(gl.float32)
                store_block(
                    exact,
                    y_rows,
                    sample,
                    o,
                    to + 16 * block,
                    y_phase,
                    C_OUT,
                    L_out,
                    more,
                    more_strides,
                    EPILOGUE,
                    Y_VECTOR,
                    Y_EDGES,
                    INT64,
                    out,
                )


def conv1d_depthwise_bands(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    padding: int,
    tf32: bool,
    config,
    fusion: Fusion = NO_FUSION,
    reverse: bool = False,
) -> None:
    """Write the depthwise convolution, of stride and dilation 1, of x ``(N, C_in, L_in)`` into y ``(N, C_out, L_out)``.

    C_out is a multiple of C_in. Weight ``(C_out, 1, K)``, any strides. x and y have L contiguous; float32 only in TF32. A program
    computes `steps` tiles of one channel, each 16 runs a warp of `run` blocks of 16 outputs. `reverse`: the last tap comes first.
    """
    N, C_in, L_in = x.shape
    _, C_out, L_out = y.shape
    K = weight.shape[2]
    # a thread loads 4 bytes at a time, and has four outputs in a row
    x_vector, y_vector = min(vector_length(x), 4 // x.element_size()), min(vector_length(y), 4)
    x_phased, y_phased = x.stride(1) % x_vector != 0, y.stride(1) % y_vector != 0
    lead = x_vector - 1 if x_phased or y_phased else -padding % x_vector
    runs = triton.cdiv(L_out + (y_vector - 1 if y_phased else 0), BLOCK * config.run)
    programs = triton.cdiv(N * runs, BLOCK * config.num_warps * config.steps)
    taps, tap_stride = first_tap(weight, reverse)
    launch(
        conv1d_depthwise_bands_fwd_kernel,
        (programs * C_out,),
        x,
        taps,
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
        tap_stride,
        y.stride(0) // y_vector,
        y.stride(1),
        runs,
        programs,
        MULTIPLIER=C_out // C_in,
        K=K,
        SLICES=triton.cdiv(lead + K - 1 + BLOCK, BLOCK),
        RUN=config.run,
        TILES=config.steps,
        X_VECTOR=x_vector,
        Y_VECTOR=y_vector,
        X_EDGES=x_phased or L_in % x_vector != 0,
        Y_EDGES=y_phased or L_out % y_vector != 0,
        ROUND=tf32,
        HAS_BIAS=bias is not None,
        **fusion.arguments(y),
        INT64=needs_int64(y, *fusion.views(y)),
        BLOCK_M=BLOCK * config.num_warps,
        NUM_WARPS=config.num_warps,
        num_warps=config.num_warps,
    )
