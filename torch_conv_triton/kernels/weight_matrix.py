"""Weights as the matrices that products read: as they are stored, or packed in reduction order by a launch of their own."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from torch_conv_triton.kernels.common import OFFSET_LIMIT, round_tf32, split_program
from torch_conv_triton.kernels.launch import launch, workspace

# taps from which on a weight is packed by tiles, us: 2000 x 250 x 32 37, element by element 75, 768 x 768 x 7 14 and 25
MANY_TAPS = 7

# tiles of a row from which on a weight is rounded in a launch of its own rather than by each of them
OFTEN_READ = 64


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
