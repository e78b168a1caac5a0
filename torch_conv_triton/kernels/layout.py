"""Copy of an NCL tensor into NLC: torch's own copy of such a transpose runs at a quarter of the memory's speed."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from torch_conv_triton.kernels.common import needs_int64, round_tf32, widen
from torch_conv_triton.kernels.launch import launch, workspace


@triton.jit(do_not_specialize=["tiles_c", "tiles_l"])
def ncl_to_nlc_kernel(
    x_ptr,  # (N, C, L), any strides
    out_ptr,  # (N, L_PADDED, columns) contiguous, with PAIRS of two channels each
    C,
    columns,  # C or more, or with PAIRS half as many
    L,
    L_PADDED,
    stride_xn,
    stride_xc,
    stride_xl,
    stride_on,
    stride_ol,
    tiles_c,
    tiles_l,
    PAIRS: tl.constexpr,
    ROUND: tl.constexpr,
    INT64: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_L: tl.constexpr,
):
    pid = tl.program_id(0)
    tile_c = pid % tiles_c
    tile_l = (pid // tiles_c) % tiles_l
    sample = (pid // (tiles_c * tiles_l)).to(tl.int64)
    c = tile_c * BLOCK_C + tl.arange(0, BLOCK_C)
    at = tile_l * BLOCK_L + tl.arange(0, BLOCK_L)
    within = (at < L)[None, :]
    from_l = (widen(at, INT64) * stride_xl)[None, :]
    to = (widen(at, INT64) * stride_ol)[None, :] + c[:, None]
    x_ptr += sample * stride_xn
    if PAIRS:
        # two 16-bit channels travel as one 32-bit value: half as many elements cross shared memory
        first, second = 2 * c, 2 * c + 1
        mask = (first < C)[:, None] & within
        even = tl.load(x_ptr + ((widen(first, INT64) * stride_xc)[:, None] + from_l), mask=mask, other=0)
        mask = (second < C)[:, None] & within
        odd = tl.load(x_ptr + ((widen(second, INT64) * stride_xc)[:, None] + from_l), mask=mask, other=0)
        x = (even.to(tl.int32) & 0xFFFF) | (odd.to(tl.int32) << 16)
    else:
        mask = (c < C)[:, None] & within
        x = tl.load(x_ptr + ((widen(c, INT64) * stride_xc)[:, None] + from_l), mask=mask, other=0)
    if ROUND:
        x = round_tf32(x)
    tl.store(out_ptr + sample * stride_on + to, x, mask=(c < columns)[:, None] & (at < L_PADDED)[None, :])


def channels_last_copy(x: Tensor, multiple: int = 1, rounded: bool = False, channels: int = 1) -> Tensor:
    """A copy of x ``(N, C, L)``, stored NLC, with zeros up to the next length that `multiple` divides. 16- or 32-bit dtypes.

    Further channels of zeros make their number a multiple of `channels`. `rounded` float32 is rounded to TF32 on the way, so that
    a kernel need not pass it through registers to do so.
    """
    N, C, L = x.shape
    L_padded = triton.cdiv(L, multiple) * multiple
    C_padded = triton.cdiv(C, channels) * channels
    out = workspace((N, L_padded, C_padded), dtype=x.dtype, device=x.device)
    copy = out.transpose(1, 2)
    pairs = x.element_size() == 2 and C_padded % 2 == 0
    # bits are moved, not numbers, unless they are rounded
    source = x if rounded else x.view(torch.int16 if x.element_size() == 2 else torch.int32)
    target = out.view(torch.int32 if pairs else source.dtype)
    # us beyond an empty launch: 256 x 512 x 8 in tiles of 16 positions 3.3, of 64 6.3
    block_c, block_l = 32 if pairs else 64, min(64, max(16, triton.next_power_of_2(L_padded)))
    columns = target.shape[2]
    tiles_c, tiles_l = triton.cdiv(columns, block_c), triton.cdiv(L_padded, block_l)
    launch(
        ncl_to_nlc_kernel,
        (tiles_c * tiles_l * N,),
        source,
        target,
        C,
        columns,
        L,
        L_padded,
        *source.stride(),
        *target.stride()[:2],
        tiles_c,
        tiles_l,
        PAIRS=pairs,
        ROUND=rounded,
        INT64=needs_int64(x, copy),
        BLOCK_C=block_c,
        BLOCK_L=block_l,
        num_warps=min(4, block_c * block_l // 512),
    )
    return copy
