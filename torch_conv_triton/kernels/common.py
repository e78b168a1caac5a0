"""What every kernel shares: operand rounding, the dot of one tile, the implicit-GEMM reduction, offsets and packed weights."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from torch_conv_triton.kernels.launch import launch, workspace

# beyond it offsets are computed in 64 bits; the margin is for what a tile computes past the end before it masks it
OFFSET_LIMIT = 2**31 - 2**20

# taps from which on a weight is packed by tiles, us: 2000 x 250 x 32 37, element by element 75, 768 x 768 x 7 14 and 25
MANY_TAPS = 7

# tiles of a row from which on a weight is rounded in a launch of its own rather than by each of them
OFTEN_READ = 64

# Kernels let Triton specialise on lengths and padding (whether 16 divides them): a mask that is not known to be constant over
# 16 bytes makes it store the elements of a 16-byte vector one by one, several times slower.

# Kernels read constants from functions: with global ones the key under which Triton caches a kernel depends on which kernels were
# compiled before it (triton 3.6 and 3.7), and another process does not find it.

# padding that is none, only for defaults: triton 3.6 wants the default of a helper's argument as a constant
ZEROS = tl.constexpr("zeros")


@triton.constexpr_function
def interpreted():
    """Whether kernels run in the interpreter, which is decided when Triton decorates them."""
    return triton.knobs.runtime.interpret


@triton.constexpr_function
def has_ptx():
    """Whether kernels may hold instructions of NVIDIA's own."""
    return not triton.knobs.runtime.interpret and torch.version.hip is None


@triton.jit
def round_tf32(x):
    """Round float32 to the nearest TF32 value, ties away from zero: tl.dot by itself truncates the low 13 bits."""
    if has_ptx():
        return tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        bits = x.to(tl.int32, bitcast=True)
        rounded = ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
        # NaN and Inf have all exponent bits set; adding to them could carry into the sign
        return tl.where((bits & 0x7F800000) == 0x7F800000, x, rounded)


@triton.jit
def dot_tile(x, w, acc, WEIGHTS_LEFT: tl.constexpr, PRECISION: tl.constexpr):
    """acc + x w^T for x [BLOCK_M, BLOCK_K] and w [BLOCK_N, BLOCK_K]; transposed ([BLOCK_N, BLOCK_M]) with WEIGHTS_LEFT."""
    if interpreted():
        # the interpreter multiplies the bit patterns of bfloat16
        x = x.to(tl.float32)
        w = w.to(tl.float32)
    if WEIGHTS_LEFT:
        return tl.dot(w, tl.trans(x), acc, input_precision=PRECISION)
    else:
        return tl.dot(x, tl.trans(w), acc, input_precision=PRECISION)


@triton.jit
def widen(index, INT64: tl.constexpr):
    """The index in the type in which offsets are computed: int64 only where a tensor spans 2^31 elements or more."""
    if INT64:
        return index.to(tl.int64)
    else:
        return index


@triton.jit
def split_program(a, b, c):
    """The program's number as four indices: one below a, which runs fastest, one below b, one below c, and what is left."""
    pid = tl.program_id(0)
    return pid % a, (pid // a) % b, (pid // (a * b)) % c, pid // (a * b * c)


@triton.jit
def split_rows(m, sample, N, rows, FLATTEN: tl.constexpr):
    """Mask of rows m, the sample of each, its row in it: rows of `sample`, or with FLATTEN of N samples of `rows` rows each."""
    if FLATTEN:
        mask = m < N * rows
        return mask, (m // rows).to(tl.int64), m % rows
    else:
        return m < rows, sample.to(tl.int64), m


@triton.constexpr_function
def reduction_steps(C_IN, K, TAP_MAJOR, BLOCK_K):
    """Number of slices of BLOCK_K that the reduction over C_IN channels and K taps is cut into."""
    if TAP_MAJOR == 1:
        return K * -(-C_IN // BLOCK_K)
    return -(-C_IN * K // BLOCK_K)


@triton.jit
def reduction_slice(i, C_IN: tl.constexpr, K: tl.constexpr, TAP_MAJOR: tl.constexpr, BLOCK_K: tl.constexpr):
    """Slice i of the reduction: (channels [BLOCK_K], tap, columns of the weight matrix [BLOCK_K]).

    TAP_MAJOR 1: BLOCK_K channels of one tap (a scalar); the taps of the same channels follow each other, so that the x they
    share is still in L1. TAP_MAJOR 2: channels run fastest and a slice may span taps, for channels that BLOCK_K does not divide.
    TAP_MAJOR 0: taps run fastest, as in a contiguous weight, and a slice may hold several channels, for few channels.
    """
    j = tl.arange(0, BLOCK_K)
    if TAP_MAJOR == 1:
        k = i % K
        c = (i // K) * BLOCK_K + j
        return c, k, k * C_IN + c
    elif TAP_MAJOR == 2:
        r = i * BLOCK_K + j
        return r % C_IN, r // C_IN, r
    else:
        r = i * BLOCK_K + j
        return r // K, r % K, r


@triton.jit
def position_in_x(at, L_in, PADDING_MODE: tl.constexpr):
    """The sample that stands at a position: the same one within the signal, by the padding mode outside of it."""
    if PADDING_MODE == "reflect":
        at = tl.where(at < 0, -at, at)
        return tl.where(at < L_in, at, 2 * (L_in - 1) - at)
    elif PADDING_MODE == "replicate":
        return tl.minimum(tl.maximum(at, 0), L_in - 1)
    elif PADDING_MODE == "circular":
        at = tl.where(at < 0, at + L_in, at)
        return tl.where(at < L_in, at, at - L_in)
    else:
        tl.static_assert(PADDING_MODE == "zeros")
        return at


@triton.jit
def load_x_tile(
    x_ptr,  # row start of the tile: sample (scalar or one per row) and group already added
    pos,  # [BLOCK_M] position in x of tap 0
    row_mask,  # [BLOCK_M]
    c,  # [BLOCK_K]
    k,  # scalar or [BLOCK_K]
    taps,  # taps that exist; the reduction may have more
    L_in,
    dilation,
    stride_xc,
    stride_xl,
    C_IN: tl.constexpr,
    K: tl.constexpr,
    TAP_MAJOR: tl.constexpr,
    FEWER_TAPS: tl.constexpr,  # `taps` may be below K
    INT64: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PADDING_MODE: tl.constexpr = ZEROS,
):
    """Gather x[pos + k * dilation, c], outside the signal by the padding mode: [BLOCK_M, BLOCK_K]."""
    if TAP_MAJOR == 1:
        rows = position_in_x(pos + k * dilation, L_in, PADDING_MODE)
        row_mask = row_mask & (rows >= 0) & (rows < L_in)
        if FEWER_TAPS:
            row_mask = row_mask & (k < taps)
        mask = row_mask[:, None]
        if C_IN % BLOCK_K != 0:
            mask = mask & (c < C_IN)[None, :]
        offsets = (rows * stride_xl)[:, None]
    else:
        at = position_in_x(pos[:, None] + (k * dilation)[None, :], L_in, PADDING_MODE)
        mask = row_mask[:, None] & (at >= 0) & (at < L_in)
        if FEWER_TAPS:
            mask = mask & (k < taps)[None, :]
        if (C_IN * K) % BLOCK_K != 0:
            mask = mask & (c + k * C_IN < C_IN * K if TAP_MAJOR else c < C_IN)[None, :]
        offsets = at * stride_xl
    return tl.load(x_ptr + (offsets + (widen(c, INT64) * stride_xc)[None, :]), mask=mask, other=0.0)


@triton.jit
def prefetch_rows(x_ptr, first, span, L_in, stride_xc, C_IN: tl.constexpr, CHANNELS: tl.constexpr, LINES: tl.constexpr):
    """Ask for positions first .. first + span of C_IN contiguous rows of x, so that L2 has them when they are gathered.

    Loads narrower than 4 bytes are not pipelined, so each would wait for the memory. CHANNELS >= C_IN and LINES, of 128 bytes
    and enough for the span, are powers of two.
    """
    LINE: tl.constexpr = 1024 // x_ptr.dtype.element_ty.primitive_bitwidth
    c = tl.minimum(tl.arange(0, CHANNELS), C_IN - 1)
    at = first + tl.minimum(tl.arange(0, LINES) * LINE, span)
    at = tl.minimum(tl.maximum(at, 0), L_in - 1)
    pointers = x_ptr + ((c * stride_xc)[:, None] + at[None, :])
    if has_ptx():
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [pointers], dtype=tl.int32, is_pure=False, pack=1
        )


@triton.jit
def load_w_tile(
    w_ptr,
    o,
    c,
    r,
    stride_wo,
    C_OUT,
    C_IN: tl.constexpr,
    K: tl.constexpr,
    TAP_MAJOR: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Rows o and columns r (contiguous) of the weight matrix [C_OUT, R]: [BLOCK_N, BLOCK_K]."""
    mask = (o < C_OUT)[:, None]
    if (C_IN if TAP_MAJOR == 1 else C_IN * K) % BLOCK_K != 0:
        mask = mask & (r < C_IN * K if TAP_MAJOR == 2 else c < C_IN)[None, :]
    return tl.load(w_ptr + (o[:, None] * stride_wo + r[None, :]), mask=mask, other=0.0)


@triton.jit
def implicit_gemm(
    x_ptr,
    w_ptr,
    pos,
    row_mask,
    o,
    taps,
    L_in,
    C_OUT,
    dilation,
    stride_xc,
    stride_xl,
    stride_wo,
    C_IN: tl.constexpr,
    K: tl.constexpr,
    TAP_MAJOR: tl.constexpr,
    FEWER_TAPS: tl.constexpr,
    ROUND_X: tl.constexpr,
    ROUND_W: tl.constexpr,
    PRECISION: tl.constexpr,
    WEIGHTS_LEFT: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PADDING_MODE: tl.constexpr = ZEROS,
):
    """Sum over channels and taps of one output tile: a matrix product whose x operand is gathered, never stored."""
    if WEIGHTS_LEFT:
        acc = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for i in range(0, reduction_steps(C_IN, K, TAP_MAJOR, BLOCK_K)):
        c, k, r = reduction_slice(i, C_IN, K, TAP_MAJOR, BLOCK_K)
        x = load_x_tile(
            x_ptr,
            pos,
            row_mask,
            c,
            k,
            taps,
            L_in,
            dilation,
            stride_xc,
            stride_xl,
            C_IN,
            K,
            TAP_MAJOR,
            FEWER_TAPS,
            INT64,
            BLOCK_K,
            PADDING_MODE,
        )
        w = load_w_tile(w_ptr, o, c, r, stride_wo, C_OUT, C_IN, K, TAP_MAJOR, BLOCK_K)
        if ROUND_X:
            x = round_tf32(x)
        if ROUND_W:
            w = round_tf32(w)
        acc = dot_tile(x, w, acc, WEIGHTS_LEFT, PRECISION)
    return acc


@triton.jit
def of_launch(pointers):
    """The pointer of a tuple that programs of this place in the second dimension of the grid work on.

    Launches that take all of their tensors so, in tuples of one, are made as one where they differ in nothing else.
    """
    pointer = pointers[0]
    for i in tl.static_range(1, len(pointers)):
        if tl.program_id(1) == i:
            pointer = pointers[i]
    return pointer


@triton.jit
def pack_weight_kernel(
    w_ptrs,
    out_ptrs,
    numel,
    stride_wo,
    stride_wc,
    stride_wk,
    C_IN: tl.constexpr,
    CHANNELS: tl.constexpr,
    K: tl.constexpr,
    TAP_MAJOR: tl.constexpr,
    ROUND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[o, r] = w[o, c, k] with r in the order of the reduction, rounded to TF32 where asked; 0 for c of C_IN to CHANNELS."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    o = i // (CHANNELS * K)
    r = i % (CHANNELS * K)
    if TAP_MAJOR:
        k = r // CHANNELS
        c = r % CHANNELS
    else:
        k = r % K
        c = r // K
    offsets = o.to(tl.int64) * stride_wo + c.to(tl.int64) * stride_wc + k.to(tl.int64) * stride_wk
    w = tl.load(of_launch(w_ptrs) + offsets, mask=(i < numel) & (c < C_IN), other=0.0)
    if ROUND:
        w = round_tf32(w)
    tl.store(of_launch(out_ptrs) + i, w, mask=i < numel)


@triton.jit(do_not_specialize=["tiles_c", "tiles_k"])
def pack_taps_kernel(
    w_ptrs,
    out_ptrs,
    C_OUT,
    stride_wo,
    stride_wc,
    stride_wk,
    tiles_c,
    tiles_k,
    C_IN: tl.constexpr,
    CHANNELS: tl.constexpr,
    K: tl.constexpr,
    ROUND: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """`pack_weight_kernel` with TAP_MAJOR for many taps: a tile is read along them and written along channels."""
    tile_c, tile_k, tile_o, _ = split_program(tiles_c, tiles_k, tl.cdiv(C_OUT, BLOCK_O))
    row = tl.arange(0, BLOCK_O * BLOCK_T)
    o = (tile_o * BLOCK_O + row // BLOCK_T)[None, :]
    k = (tile_k * BLOCK_T + row % BLOCK_T)[None, :]
    c = (tile_c * BLOCK_C + tl.arange(0, BLOCK_C))[:, None]
    mask = (o < C_OUT) & (k < K)
    offsets = o.to(tl.int64) * stride_wo + c.to(tl.int64) * stride_wc + k.to(tl.int64) * stride_wk
    w = tl.load(of_launch(w_ptrs) + offsets, mask=mask & (c < C_IN), other=0.0)
    if ROUND:
        w = round_tf32(w)
    tl.store(of_launch(out_ptrs) + ((o.to(tl.int64) * K + k) * CHANNELS + c), w, mask=mask & (c < CHANNELS))


def pack_weight(weight: Tensor, tap_major: bool, rounded: bool, channels: int) -> Tensor:
    """The weight ``(C_out, C_in / groups, K)`` as a matrix ``(C_out, channels * K)`` in reduction order.

    Zero for the channels that the weight does not have; TF32-rounded if `rounded`.
    """
    C_out, C_in, K = weight.shape
    packed = workspace((C_out, channels * K), dtype=weight.dtype, device=weight.device)
    sizes = {"C_IN": C_in, "CHANNELS": channels, "K": K, "ROUND": rounded}
    if tap_major and K >= MANY_TAPS:
        block_t = min(32, triton.next_power_of_2(K))
        block_o, block_c = 32 // block_t, 64
        tiles_c, tiles_k = triton.cdiv(channels, block_c), triton.cdiv(K, block_t)
        launch(
            pack_taps_kernel,
            (tiles_c * tiles_k * triton.cdiv(C_out, block_o),),
            (weight,),
            (packed,),
            C_out,
            *weight.stride(),
            tiles_c,
            tiles_k,
            **sizes,
            BLOCK_O=block_o,
            BLOCK_C=block_c,
            BLOCK_T=block_t,
        )
        return packed
    block = 1024
    launch(
        pack_weight_kernel,
        (triton.cdiv(packed.numel(), block),),
        (weight,),
        (packed,),
        packed.numel(),
        *weight.stride(),
        **sizes,
        TAP_MAJOR=tap_major,
        BLOCK=block,
    )
    return packed


def weight_matrix(
    weight: Tensor,
    tap_major: bool,
    rounded: bool,
    channels: int | None = None,
    readers: int = OFTEN_READ,
    aligned: bool = False,
) -> tuple[Tensor, int, bool]:
    """The weight in reduction order: (tensor, row stride, whether its values are already rounded to TF32).

    A weight that is stored in that order is used as it is, unless it is worth rounding for all of its `readers`, the tiles of a
    row; any other is packed, which costs one pass over it. `channels`: as many of each tap, of which those that the weight does
    not have are zero (default: its own). `aligned`: rows are to start on 16 bytes, for block copies.
    """
    C_out, C_in, K = weight.shape
    channels = channels or C_in
    stride_o, stride_c, stride_k = weight.stride()
    if C_out * stride_o > OFFSET_LIMIT or channels > C_in or (aligned and not has_aligned_rows(weight, stride_o)):
        in_order = False
    elif tap_major:
        in_order = (stride_c == 1 or C_in == 1) and (stride_k == C_in or K == 1)
    else:
        in_order = (stride_k == 1 or K == 1) and (stride_c == K or C_in == 1)
    if in_order and not (tap_major and rounded and readers >= OFTEN_READ):
        return weight, stride_o, False
    packed = pack_weight(weight, tap_major, rounded, channels)
    return packed, packed.stride(0), rounded


def has_aligned_rows(weight: Tensor, stride: int) -> bool:
    """Whether rows so many elements apart all start on 16 bytes, and none is repeated: what block copies ask of a matrix."""
    return stride > 0 and stride * weight.element_size() % 16 == 0 and weight.data_ptr() % 16 == 0


def first_tap(weight: Tensor, reverse: bool) -> tuple[Tensor, int]:
    """Where the first tap of weight ``(C_out, 1, K)`` is, read forwards or in reverse, and how many elements on the next one."""
    return (weight[:, :, -1:], -weight.stride(2)) if reverse else (weight, weight.stride(2))


def needs_int64(*tensors: Tensor) -> bool:
    """Whether an offset within one sample of a ``(N, C, L)`` tensor, or a position in it, can pass 2^31 - 1."""
    for tensor in tensors:
        _, C, L = tensor.shape
        _, stride_c, stride_l = tensor.stride()
        if max((C - 1) * abs(stride_c) + (L - 1) * abs(stride_l), L) > OFFSET_LIMIT:
            return True
    return False


def dot_precision(dtype: torch.dtype, tf32: bool) -> str:
    """`input_precision` of tl.dot: full float32 is three TF32 products (error near 2^-22), which keeps it on tensor cores."""
    if dtype != torch.float32 or tf32:
        return "tf32"
    return "tf32x3" if has_ptx() else "ieee"
