"""Dense convolution at stride 1 of channels-first x with few channels: a tile of x with its halo is kept for all taps.

A tap is the same tile read some rows further down. Warp-group products read their operands from shared memory in cores of 8 rows
x 16 bytes. With the channels of 16 bytes together and the rows of such a chunk one after the other, every row starts on 16 bytes,
so that a product may begin at any of them. x is thus read, rounded and transposed once instead of once a tap.

Written in Gluon, which lays out shared memory by hand. The products are those of sm_90.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.ampere import async_copy

from torch_conv_triton.kernels.common import needs_int64, round_tf32, widen
from torch_conv_triton.kernels.epilogue import NO_FUSION, Fusion, store_outputs
from torch_conv_triton.kernels.launch import launch
from torch_conv_triton.kernels.program import prepare
from torch_conv_triton.kernels.weight_chunks import pack_weight_chunks

# triton 3.7 renamed it
barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier


@triton.constexpr_function
def chunked(ROWS, CHANNELS, CHUNK):
    """Shared layout of [ROWS, CHANNELS]: CHUNK channels together, the rows of a chunk one after the other, chunk after chunk."""
    bases = [[0, 1 << i] for i in range(CHUNK.bit_length() - 1)]
    bases += [[1 << i, 0] for i in range(ROWS.bit_length() - 1)]
    bases += [[0, CHUNK << i] for i in range((CHANNELS // CHUNK).bit_length() - 1)]
    return gl.SharedLinearLayout(bases)


@triton.constexpr_function
def accumulator_layout(WEIGHTS_LEFT, BLOCK_M, BLOCK_N, CHUNK, NUM_WARPS):
    rows, columns = (BLOCK_N, BLOCK_M) if WEIGHTS_LEFT else (BLOCK_M, BLOCK_N)
    down = NUM_WARPS
    while down > 4 and 16 * down > rows:
        down //= 2
    across = NUM_WARPS // down
    return gl.NVMMADistributedLayout([3, 0], [down, across], [16, min(256, columns // across), 2 * CHUNK])


@triton.constexpr_function
def load_layout(BLOCK_M, X_VECTOR, CHUNK, NUM_WARPS):
    """A thread has X_VECTOR rows of whole chunks, so that it loads along rows and stores along channels."""
    down = min(NUM_WARPS, BLOCK_M // (32 * X_VECTOR))
    return gl.BlockedLayout([X_VECTOR, CHUNK], [32, 1], [down, NUM_WARPS // down], [0, 1])


@triton.constexpr_function
def store_layout(BLOCK_M, Y_VECTOR, NUM_WARPS):
    """A warp stores as much of a row of y as it can: [BLOCK_N, BLOCK_M]."""
    along = min(32, BLOCK_M // Y_VECTOR)
    return gl.BlockedLayout([1, Y_VECTOR], [32 // along, along], [NUM_WARPS, 1], [1, 0])


@gluon.jit
def load_tile(
    x_ptr,
    tile,
    tiles_m,
    ahead,
    L_in,
    stride_xn,
    stride_xc,
    SLICES: gl.constexpr,
    STEP: gl.constexpr,
    LAYOUT: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_K: gl.constexpr,
):
    """Slices [BLOCK_M, BLOCK_K] of the rows of x that a tile reads, zero outside the signal."""
    at = (tile % tiles_m) * STEP - ahead + gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1, LAYOUT))
    mask = ((at >= 0) & (at < L_in))[:, None]
    c = gl.arange(0, BLOCK_K, layout=gl.SliceLayout(0, LAYOUT))
    x_ptr += (tile // tiles_m).to(gl.int64) * stride_xn
    slices = ()
    for i in gl.static_range(SLICES):
        x = gl.load(x_ptr + (at[:, None] + ((c + i * BLOCK_K) * stride_xc)[None, :]), mask=mask, other=0.0)
        slices = slices + (x,)
    return slices


@gluon.jit
def copy_weights(ws, w_ptrs, slot, i, W_TILE: gl.constexpr):
    """Begin to copy weight tile i into a slot."""
    async_copy.async_copy_global_to_shared(ws.index(slot), w_ptrs + i * W_TILE)
    async_copy.commit_group()


@gluon.jit
def store_slices(
    xs,
    x_tile,
    SLICES: gl.constexpr,
    PROLOGUE: gl.constexpr,
    ROUND_X: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_K: gl.constexpr,
    CHUNK: gl.constexpr,
):
    """Put what is convolved of the slices of a tile, rounded, into shared memory chunk by chunk."""
    LAYOUT: gl.constexpr = chunked(BLOCK_M, BLOCK_K, CHUNK)
    for i in gl.static_range(SLICES):
        x = prepare(x_tile[i], PROLOGUE)
        if ROUND_X:
            x = round_tf32(x)
        xs.index(i * (BLOCK_M * BLOCK_K // CHUNK))._reinterpret(x.dtype, [BLOCK_M, BLOCK_K], LAYOUT).store(x)


@gluon.jit
def begin_product(
    acc,
    xs,
    ws,
    i,
    slot,
    dilation,
    SLICES: gl.constexpr,
    LEAD: gl.constexpr,
    WEIGHTS_LEFT: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    CHUNK: gl.constexpr,
):
    """Begin acc + x w^T, or its transpose, for weight tile i: slices follow each other within a tap."""
    row = i % SLICES * (BLOCK_M * BLOCK_K // CHUNK) + i // SLICES * dilation + LEAD
    x = xs.index(row)._reinterpret(xs.dtype, [BLOCK_M, BLOCK_K], chunked(BLOCK_M, BLOCK_K, CHUNK))
    w = ws.index(slot)._reinterpret(ws.dtype, [BLOCK_N, BLOCK_K], chunked(BLOCK_N, BLOCK_K, CHUNK))
    if WEIGHTS_LEFT:
        return hopper.warpgroup_mma(w, x.permute((1, 0)), acc, is_async=True)
    else:
        return hopper.warpgroup_mma(x, w.permute((1, 0)), acc, is_async=True)


@gluon.jit(do_not_specialize=["tiles_m", "tiles"])
def conv1d_dense_halo_fwd_kernel(
    x_ptr,  # (N, C_in, L_in), contiguous along L_in
    w_ptr,  # as `pack_weight_chunks` has it
    b_ptr,  # (C_out,), or unused
    y_ptr,  # (N, C_out, L_out), any strides
    ahead,  # vectors that a tile of x begins before its outputs
    L_in,  # this and the strides of x in vectors of X_VECTOR
    stride_xn,
    stride_xc,
    L_out,  # this and the strides of y in vectors of Y_VECTOR
    stride_yn,
    stride_yc,
    stride_yl,  # in elements
    C_OUT,
    dilation,
    tiles_m,  # of one sample
    tiles,  # tiles_m * N
    more,  # as `store_outputs` takes it
    more_strides,
    SLICES: gl.constexpr,  # of BLOCK_K channels
    K: gl.constexpr,
    LEAD: gl.constexpr,  # rows before that of the first tap
    STEP: gl.constexpr,  # outputs of a tile: the rows that all taps of theirs are among
    EXTRA: gl.constexpr,  # rows that the last taps read beyond the tile, for outputs that are not stored
    X_VECTOR: gl.constexpr,
    Y_VECTOR: gl.constexpr,
    PROLOGUE: gl.constexpr,
    ROUND_X: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    EPILOGUE: gl.constexpr,
    WEIGHTS_LEFT: gl.constexpr,
    PREFETCH: gl.constexpr,  # load the next tile while this one is computed
    STAGED: gl.constexpr,  # outputs pass through shared memory on their way, to be stored in whole lines
    INT64: gl.constexpr,  # of y
    SLOTS: gl.constexpr,  # for weight tiles; all of them stay if they have one each, else they pass through
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,
    BLOCK_K: gl.constexpr,
    NUM_WARPS: gl.constexpr,
):
    dtype: gl.constexpr = x_ptr.dtype.element_ty
    CHUNK: gl.constexpr = 128 // dtype.primitive_bitwidth
    # a loop between products leaves the tensor cores idle, and written out in full its addresses are kept in registers
    UNROLL: gl.constexpr = max(1, min(6, K * SLICES // 2))
    W_TILE: gl.constexpr = BLOCK_N * BLOCK_K
    TILES_W: gl.constexpr = K * SLICES
    X_ROWS: gl.constexpr = SLICES * (BLOCK_M * BLOCK_K // CHUNK) + EXTRA
    STAGE_ROWS: gl.constexpr = BLOCK_M * BLOCK_N // 4 if STAGED else 0
    # a view begins at a row of one chunk; with a unit dimension before it, rows can be indexed
    rows: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    xs = gl.allocate_shared_memory(dtype, [max(X_ROWS, STAGE_ROWS), 1, CHUNK], rows)
    ws = gl.allocate_shared_memory(dtype, [SLOTS, 1, W_TILE], rows)
    acc_layout: gl.constexpr = accumulator_layout(WEIGHTS_LEFT, BLOCK_M, BLOCK_N, CHUNK, NUM_WARPS)
    tile_layout: gl.constexpr = load_layout(BLOCK_M, X_VECTOR, CHUNK, NUM_WARPS)

    flat: gl.constexpr = gl.BlockedLayout([1, min(CHUNK, W_TILE // (32 * NUM_WARPS))], [1, 32], [1, NUM_WARPS], [1, 0])
    tile_n = gl.program_id(1)
    w_ptrs = w_ptr + tile_n * (TILES_W * W_TILE) + gl.arange(0, W_TILE, layout=gl.SliceLayout(0, flat))[None, :]
    for w_tile in range(TILES_W if SLOTS == TILES_W else SLOTS - 2):
        copy_weights(ws, w_ptrs, w_tile, w_tile, W_TILE)
    done = 0

    L_in *= X_VECTOR
    stride_xn *= X_VECTOR
    stride_xc *= X_VECTOR
    ahead *= X_VECTOR
    L_out *= Y_VECTOR
    stride_yn *= Y_VECTOR
    stride_yc *= Y_VECTOR
    if PREFETCH:
        x_tile = load_tile(
            x_ptr, gl.program_id(0), tiles_m, ahead, L_in, stride_xn, stride_xc, SLICES, STEP, tile_layout, BLOCK_M, BLOCK_K
        )
    for tile in range(gl.program_id(0), tiles, gl.num_programs(0)):
        if not PREFETCH:
            x_tile = load_tile(
                x_ptr, tile, tiles_m, ahead, L_in, stride_xn, stride_xc, SLICES, STEP, tile_layout, BLOCK_M, BLOCK_K
            )
        store_slices(xs, x_tile, SLICES, PROLOGUE, ROUND_X, BLOCK_M, BLOCK_K, CHUNK)
        if SLOTS == TILES_W:
            async_copy.wait_group(0)
        # products read shared memory through another path than stores write it
        hopper.fence_async_shared()
        barrier()
        if PREFETCH:
            following = gl.minimum(tile + gl.num_programs(0), tiles - 1)
            x_tile = load_tile(
                x_ptr, following, tiles_m, ahead, L_in, stride_xn, stride_xc, SLICES, STEP, tile_layout, BLOCK_M, BLOCK_K
            )

        if WEIGHTS_LEFT:
            acc = hopper.warpgroup_mma_init(gl.zeros([BLOCK_N, BLOCK_M], gl.float32, layout=acc_layout))
        else:
            acc = hopper.warpgroup_mma_init(gl.zeros([BLOCK_M, BLOCK_N], gl.float32, layout=acc_layout))
        if SLOTS == TILES_W:
            for group in range(TILES_W // UNROLL):
                for member in gl.static_range(UNROLL):
                    w_tile = group * UNROLL + member
                    acc = begin_product(
                        acc, xs, ws, w_tile, w_tile, dilation, SLICES, LEAD, WEIGHTS_LEFT, BLOCK_M, BLOCK_N, BLOCK_K, CHUNK
                    )
            for rest in range(TILES_W // UNROLL * UNROLL, TILES_W):
                acc = begin_product(
                    acc, xs, ws, rest, rest, dilation, SLICES, LEAD, WEIGHTS_LEFT, BLOCK_M, BLOCK_N, BLOCK_K, CHUNK
                )
        else:
            for i in range(TILES_W):
                async_copy.wait_group(SLOTS - 3)
                hopper.fence_async_shared()
                barrier()
                # into the slot whose product all warps have waited for
                copy_weights(ws, w_ptrs, (done + SLOTS - 2) % SLOTS, (i + SLOTS - 2) % TILES_W, W_TILE)
                acc = begin_product(
                    acc, xs, ws, i, done % SLOTS, dilation, SLICES, LEAD, WEIGHTS_LEFT, BLOCK_M, BLOCK_N, BLOCK_K, CHUNK
                )
                acc = hopper.warpgroup_mma_init(hopper.warpgroup_mma_wait(1, deps=[acc]))
                done += 1
        sums = hopper.warpgroup_mma_wait(0, deps=[acc])

        sample = (tile // tiles_m).to(gl.int64)
        first = widen(tile % tiles_m, INT64) * STEP
        if STAGED:
            # banks apart for the lanes that hold neighbouring channels of the accumulators
            stage_layout: gl.constexpr = gl.SwizzledSharedLayout(8, 1 if WEIGHTS_LEFT else 2, 4, [1, 0])
            stage = xs.index(0)._reinterpret(gl.float32, [BLOCK_N, BLOCK_M], stage_layout)
            barrier()
            if WEIGHTS_LEFT:
                stage.store(sums)
            else:
                stage.permute((1, 0)).store(sums)
            barrier()
            out_layout: gl.constexpr = store_layout(BLOCK_M, Y_VECTOR, NUM_WARPS)
            sums = stage.load(out_layout)
        else:
            out_layout: gl.constexpr = acc_layout
        LEFT: gl.constexpr = 1 if WEIGHTS_LEFT or STAGED else 0
        row = gl.arange(0, BLOCK_M, layout=gl.SliceLayout(1 - LEFT, out_layout))
        o = tile_n * BLOCK_N + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(LEFT, out_layout))
        store_outputs(
            sums,
            sample,
            tl.expand_dims(first + row, 1 - LEFT),
            tl.expand_dims((row < STEP) & (first + row < L_out), 1 - LEFT),
            0,
            tl.expand_dims(o, LEFT),
            tl.expand_dims(o < C_OUT, LEFT),
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
        barrier()
    # what is still being copied is not to outlive the program
    async_copy.wait_group(0)


def conv1d_dense_halo(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    padding: int,
    dilation: int,
    tf32: bool,
    shape,
    programs: int,
    config,
    fusion: Fusion = NO_FUSION,
) -> None:
    """Write the convolution at stride 1 of x ``(N, C_in, L_in)`` with weight ``(C_out, C_in, K)`` into y ``(N, C_out, L_out)``.

    x contiguous along L_in, C_in a multiple of BLOCK_K, float32 only in TF32. `shape`: the `HaloShape` of the problem and
    `config`, which holds BLOCK_M (rows of a tile of x), BLOCK_N, BLOCK_K, weights_left, prefetch, num_warps.
    """
    N, C_in, L_in = x.shape
    _, C_out, L_out = y.shape
    K = weight.shape[2]
    tiles_m = triton.cdiv(L_out, shape.step)
    tiles_n = triton.cdiv(C_out, config.BLOCK_N)
    X, Y = shape.x_vector, shape.y_vector
    launch(
        conv1d_dense_halo_fwd_kernel,
        (min(tiles_m * N, max(1, programs // tiles_n)), tiles_n),
        x,
        pack_weight_chunks(weight, config.BLOCK_N, tf32),
        bias if bias is not None else x,
        y,
        (padding + shape.lead) // X,
        L_in // X,
        x.stride(0) // X,
        x.stride(1) // X,
        L_out // Y,
        y.stride(0) // Y,
        y.stride(1) // Y,
        y.stride(2),
        C_out,
        dilation,
        tiles_m,
        tiles_m * N,
        SLICES=C_in // config.BLOCK_K,
        K=K,
        LEAD=shape.lead,
        STEP=shape.step,
        EXTRA=shape.extra,
        X_VECTOR=X,
        Y_VECTOR=Y,
        PROLOGUE=fusion.prologue,
        ROUND_X=tf32 and not (fusion.rounded and not fusion.prologue),
        HAS_BIAS=bias is not None,
        WEIGHTS_LEFT=config.weights_left,
        PREFETCH=config.prefetch,
        STAGED=shape.staged,
        INT64=needs_int64(y, *fusion.views(y)),
        SLOTS=shape.slots,
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        BLOCK_K=config.BLOCK_K,
        NUM_WARPS=config.num_warps,
        num_warps=config.num_warps,
        **fusion.arguments(y),
    )
