"""Packs a weight as products of warp groups read it from shared memory."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from torch_conv_triton.kernels.common import round_tf32
from torch_conv_triton.kernels.launch import launch, workspace
from torch_conv_triton.kernels.weight_matrix import of_launch


@triton.jit
def pack_weight_chunks_kernel(
    w_ptrs,
    out_ptrs,
    numel,
    C_OUT,
    stride_wo,
    stride_wc,
    stride_wk,
    C_IN: tl.constexpr,
    K: tl.constexpr,
    ROUND: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[tile, k, chunk, o, v] = w[tile * BLOCK_N + o, chunk * CHUNK + v, k], zero beyond C_OUT."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = i % CHUNK
    o = i // CHUNK % BLOCK_N
    chunk = i // (CHUNK * BLOCK_N) % (C_IN // CHUNK)
    k = i // (BLOCK_N * C_IN) % K
    o += i // (BLOCK_N * C_IN * K) * BLOCK_N
    c = chunk * CHUNK + v
    offsets = o.to(tl.int64) * stride_wo + c.to(tl.int64) * stride_wc + k.to(tl.int64) * stride_wk
    w = tl.load(of_launch(w_ptrs) + offsets, mask=(i < numel) & (o < C_OUT), other=0.0)
    if ROUND:
        w = round_tf32(w)
    tl.store(of_launch(out_ptrs) + i, w, mask=i < numel)


def pack_weight_chunks(weight: Tensor, BLOCK_N: int, rounded: bool) -> Tensor:
    """The weight ``(C_out, C_in, K)`` as shared memory holds it: chunks of 16 bytes for each tap of each BLOCK_N channels."""
    C_out, C_in, K = weight.shape
    padded = triton.cdiv(C_out, BLOCK_N) * BLOCK_N
    packed = workspace((padded * C_in * K,), dtype=weight.dtype, device=weight.device)
    block = 1024
    launch(
        pack_weight_chunks_kernel,
        (triton.cdiv(packed.numel(), block),),
        (weight,),
        (packed,),
        packed.numel(),
        C_out,
        *weight.stride(),
        C_IN=C_in,
        K=K,
        ROUND=rounded,
        CHUNK=16 // weight.element_size(),
        BLOCK_N=BLOCK_N,
        BLOCK=block,
    )
    return packed
