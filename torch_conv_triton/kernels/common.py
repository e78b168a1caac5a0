"""What every kernel shares: operand rounding, the dot of one tile, the implicit-GEMM reduction, and offsets."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# beyond it offsets are computed in 64 bits; the margin is for what a tile computes past the end before it masks it
OFFSET_LIMIT = 2**31 - 2**20

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
