"""Transposed convolution, dense and grouped, gathered by output phase: every output is written once, by one program.

Output positions with the same (t + padding) mod stride receive the same taps, an arithmetic progression, so one phase is an
ordinary stride-1 convolution of x with a subset of the taps and a negative dilation.
"""

from __future__ import annotations

from math import gcd

import triton
import triton.language as tl
from torch import Tensor

from torch_conv_triton.kernels.common import dot_precision, implicit_gemm, needs_int64, round_tf32, widen
from torch_conv_triton.kernels.epilogue import NO_FUSION, Fusion, store_tile
from torch_conv_triton.kernels.launch import launch, workspace


@triton.jit
def first_tap(phase, GCD: tl.constexpr, TAP_STEP: tl.constexpr, TAP_INVERSE: tl.constexpr):
    """Smallest tap k with k * dilation = phase (mod stride); only phases that are multiples of GCD have taps."""
    return (phase // GCD) * TAP_INVERSE % TAP_STEP


@triton.jit(do_not_specialize=["numel"])
def pack_phases_kernel(
    w_ptr,  # (C_in, C_out / groups, K), any strides
    out_ptr,  # (stride, C_out, R)
    numel,
    C_OUT,  # per group
    stride_wc,
    stride_wo,
    stride_wk,
    GROUPS: tl.constexpr,
    C_IN: tl.constexpr,  # per group
    K: tl.constexpr,
    PHASE_TAPS: tl.constexpr,
    GCD: tl.constexpr,
    TAP_STEP: tl.constexpr,
    TAP_INVERSE: tl.constexpr,
    TAP_MAJOR: tl.constexpr,
    ROUND: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One weight matrix a phase, rows output channels, columns in the order of the reduction; taps that do not exist are zero."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    r = i % (C_IN * PHASE_TAPS)
    row = i // (C_IN * PHASE_TAPS)
    o = row % C_OUT
    group = (row // C_OUT) % GROUPS
    phase = row // (C_OUT * GROUPS)
    if TAP_MAJOR:
        j = r // C_IN
        c = r % C_IN
    else:
        j = r % PHASE_TAPS
        c = r // PHASE_TAPS
    k = first_tap(phase, GCD, TAP_STEP, TAP_INVERSE) + j * TAP_STEP
    mask = (i < numel) & (k < K) & (phase % GCD == 0)
    c_in = (group * C_IN + c).to(tl.int64)
    w = tl.load(w_ptr + (c_in * stride_wc + o.to(tl.int64) * stride_wo + k.to(tl.int64) * stride_wk), mask=mask, other=0.0)
    if ROUND:
        w = round_tf32(w)
    tl.store(out_ptr + i, w, mask=i < numel)


@triton.jit(do_not_specialize=["tiles_m", "tiles_n"])
def conv1d_transposed_fwd_kernel(
    x_ptr,  # (N, C_in, L_in), any strides
    w_ptr,  # (stride, C_out, R)
    b_ptr,  # (C_out,), or unused
    y_ptr,  # (N, C_out, L_out), any strides
    L_in,
    L_out,
    C_OUT,  # per group
    stride,
    padding,
    dilation,
    stride_xn,
    stride_xc,
    stride_xl,
    stride_wo,
    stride_yn,
    stride_yc,
    stride_yl,
    tiles_m,
    tiles_n,
    more,  # as `store_outputs` takes it
    more_strides,
    GROUPS: tl.constexpr,
    C_IN: tl.constexpr,  # per group
    K: tl.constexpr,
    PHASE_TAPS: tl.constexpr,
    GCD: tl.constexpr,
    TAP_STEP: tl.constexpr,
    TAP_INVERSE: tl.constexpr,
    TAP_MAJOR: tl.constexpr,
    ROUND_X: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    EPILOGUE: tl.constexpr,
    WEIGHTS_LEFT: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # channel tiles and phases are the fastest: they read the same x, and phases fill each other's cache lines of y
    pid = tl.program_id(0)
    tile_n = pid % tiles_n
    phase = (pid // tiles_n) % stride
    pid = pid // (tiles_n * stride)
    group = pid % GROUPS
    tile_m = (pid // GROUPS) % tiles_m
    sample = (pid // (GROUPS * tiles_m)).to(tl.int64)

    # q counts positions of x: output t = q * stride + phase - padding
    q = padding // stride + widen(tile_m, INT64) * BLOCK_M + tl.arange(0, BLOCK_M)
    t = q * stride + phase - padding
    row_mask = (t >= 0) & (t < L_out)
    o = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    first = first_tap(phase, GCD, TAP_STEP, TAP_INVERSE)
    taps = tl.where(phase % GCD == 0, (K - first + TAP_STEP - 1) // TAP_STEP, 0)

    acc = implicit_gemm(
        x_ptr + sample * stride_xn + widen(group, INT64) * C_IN * stride_xc,
        w_ptr + (phase * GROUPS + group) * C_OUT * stride_wo,
        q - (first * dilation - phase) // stride,
        row_mask,
        o,
        taps,
        L_in,
        C_OUT,
        -(dilation // GCD),
        stride_xc,
        stride_xl,
        stride_wo,
        C_IN,
        PHASE_TAPS,
        TAP_MAJOR,
        True,
        ROUND_X,
        False,
        PRECISION,
        WEIGHTS_LEFT,
        INT64,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
    )
    store_tile(
        (acc,),
        sample,
        t,
        row_mask,
        widen(group, INT64) * C_OUT,
        tile_n * BLOCK_N,
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
        WEIGHTS_LEFT,
        INT64,
    )


def conv1d_transposed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    y: Tensor,
    stride: int,
    padding: int,
    dilation: int,
    groups: int,
    tf32: bool,
    config,
    fusion: Fusion = NO_FUSION,
) -> None:
    """Write the transposed convolution of x ``(N, C_in, L_in)`` into y ``(N, C_out, L_out)``.

    Weight ``(C_in, C_out / groups, K)``, any strides; output padding is in the length of y. The weight is packed by phase
    first (one pass over it).
    """
    N, _, L_in = x.shape
    _, C_out, L_out = y.shape
    K = weight.shape[2]
    C_in = weight.shape[0] // groups
    common = gcd(stride, dilation)
    step = stride // common
    phase_taps = triton.cdiv(K, step)
    phases = {
        "GROUPS": groups,
        "C_IN": C_in,
        "K": K,
        "PHASE_TAPS": phase_taps,
        "GCD": common,
        "TAP_STEP": step,
        "TAP_INVERSE": pow(dilation // common, -1, step) if step > 1 else 0,
        "TAP_MAJOR": config.tap_major,
    }
    packed = workspace((stride, C_out, C_in * phase_taps), dtype=weight.dtype, device=weight.device)
    block = 1024
    launch(
        pack_phases_kernel,
        (triton.cdiv(packed.numel(), block),),
        weight,
        packed,
        packed.numel(),
        C_out // groups,
        *weight.stride(),
        **phases,
        ROUND=tf32,
        BLOCK=block,
    )
    tiles_m = triton.cdiv((L_out - 1 + padding) // stride - padding // stride + 1, config.BLOCK_M)
    tiles_n = triton.cdiv(C_out // groups, config.BLOCK_N)
    launch(
        conv1d_transposed_fwd_kernel,
        (tiles_n * stride * groups * tiles_m * N,),
        x,
        packed,
        bias if bias is not None else packed,
        y,
        L_in,
        L_out,
        C_out // groups,
        stride,
        padding,
        dilation,
        *x.stride(),
        packed.stride(1),
        *y.stride(),
        tiles_m,
        tiles_n,
        **phases,
        ROUND_X=tf32 and not fusion.rounded,
        PRECISION=dot_precision(x.dtype, tf32),
        HAS_BIAS=bias is not None,
        **fusion.arguments(y),
        WEIGHTS_LEFT=config.weights_left,
        INT64=needs_int64(x, y, *fusion.views(y)),
        BLOCK_M=config.BLOCK_M,
        BLOCK_N=config.BLOCK_N,
        BLOCK_K=config.BLOCK_K,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )
