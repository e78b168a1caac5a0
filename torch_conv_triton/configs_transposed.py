"""Launch parameters of the transposed kernels without tuning: from the problem and the device alone, by rules that were measured.

Figures in comments are ms on an H200.
"""

from __future__ import annotations

from dataclasses import replace

from torch_conv_triton.configs import Config, Device, fit
from torch_conv_triton.problem import Conv1dProblem, ceil_pow2
from torch_conv_triton.weave import Weave

# output channels x phases of one tile
WIDEST = 128


def transposed_config(problem: Conv1dProblem, device: Device) -> Config:
    """Tile of the kernel that computes one phase a program: the general one, for what the others do not take."""
    tap_major = problem.C_in_per_group >= 16
    wide_slices = problem.layout == "NLC" or not tap_major
    BLOCK_N = min(128, max(16, ceil_pow2(problem.C_out_per_group)))
    if problem.dtype.itemsize == 4:
        config = Config(128, BLOCK_N, 32 if wide_slices else 16, num_stages=4 if BLOCK_N > 32 else 2)
        weights_left = BLOCK_N >= 64 and not tap_major
    else:
        config = Config(128, BLOCK_N, 64 if wide_slices else 32, num_stages=3)
        # Below 64 warp-group instructions cannot have the weights on the left, and triton 3.6 miscompiles slices that are not
        # TAP_MAJOR.
        weights_left = BLOCK_N >= 64
    config = replace(
        config,
        BLOCK_K=_slice(config.BLOCK_K, problem.C_in_per_group * (1 if tap_major else problem.K)),
        num_warps=8 if wide_slices and BLOCK_N == 128 else 4,
        tap_major=tap_major,
        weights_left=weights_left,
    )
    return fit(config, problem, device)


def interleaved_config(problem: Conv1dProblem, weave: Weave, device: Device) -> Config:
    """Tile of the kernel that computes all phases together. BLOCK_N holds all phases of a channel if they lie apart."""
    rows = weave.rows(problem.C_in_per_group)
    BLOCK_N = min(WIDEST, max(16, ceil_pow2(problem.C_out_per_group * rows)))
    nlc = problem.layout == "NLC"
    if problem.dtype.itemsize == 2:
        # 64 -> 32 K4 s2 bf16 128x64x32 s3 0.133, s4 0.135; 512 -> 256 K16 s8 bf16 in NLC 128x128x64 w8 0.059
        config = Config(128, BLOCK_N, 64 if nlc else 32, num_warps=8 if nlc and BLOCK_N == 128 else 4, num_stages=3)
    elif nlc:
        # 64 -> 32 K4 s2 64x64x32 w4 s4 0.179, 128x64x32 w8 s3 0.192; 256 -> 128 K8 s4 128x128x32 w8 s3 0.056
        config = Config(64, BLOCK_N, 32, num_warps=4, num_stages=4)
        if BLOCK_N == 128:
            config = Config(128, BLOCK_N, 32, num_warps=8, num_stages=3)
    elif BLOCK_N == 128:
        # 128 -> 64 K8 s4 of length 30000 128x128x16 s4 0.230, 64x128x16 s3 0.238; 256 -> 128 K8 s4 of 2400 0.081 and 0.074
        many = _tiles(problem, weave, 128, BLOCK_N) >= 20 * device.sm_count
        config = Config(128, 128, 16, num_stages=4) if many else Config(64, 128, 16, num_stages=3)
    elif weave.spacing > 1:
        # s_kb79 64x64x32 0.493, 128x64x16 0.548
        config = Config(max(16, 128 // ceil_pow2(weave.spacing)), BLOCK_N, 32, num_stages=4)
    else:
        # 512 -> 1 K16 s8 256x16x16 0.065, 128x16x16 0.070; 48 -> 8 K8 s4 128x32x16 0.049; 64 -> 32 K4 s2 128x64x16 0.190
        config = Config(256 if BLOCK_N == 16 else 128, BLOCK_N, 16, num_stages=3)
    config = replace(
        config,
        BLOCK_M=min(config.BLOCK_M, max(16, ceil_pow2(_positions(problem)))),
        BLOCK_K=_slice(config.BLOCK_K, problem.C_in_per_group),
        tap_major=True,
    )
    return fit(config, problem, device)


def transposed_tma_config(problem: Conv1dProblem, weave: Weave, device: Device) -> Config:
    """Tile of the block-copy kernel: BLOCK_K is a power of two that divides the channels of a group."""
    channels = problem.C_in_per_group
    BLOCK_N = min(WIDEST, max(16, ceil_pow2(problem.C_out_per_group * weave.rows(channels))))
    config = Config(128, BLOCK_N, 32 if problem.dtype.itemsize == 4 else 64, num_stages=3)
    if problem.dtype.itemsize == 4 and BLOCK_N == WIDEST and channels * weave.taps >= 1536 and weave.spacing == 1:
        # 768 -> 384 K16 s8 128x256 0.388, 128x128 0.412; 1536 -> 768 K16 s8 0.269 and 0.332; 512 -> 256 K8 s4 0.064 and 0.053
        config = Config(128, 256, 32, num_warps=8, num_stages=4)
    config = replace(
        config,
        BLOCK_M=min(128, max(16, ceil_pow2(problem.N * _positions(problem)))),
        BLOCK_K=min(config.BLOCK_K, channels & -channels),
        tap_major=True,
        copy_to_nlc=True,
    )
    return fit(config, problem, device)


def _slice(BLOCK_K: int, length: int) -> int:
    return min(BLOCK_K, max(16, ceil_pow2(length)))


def _positions(problem: Conv1dProblem) -> int:
    """Positions of x that have outputs, of one sample."""
    return (problem.L_out - 1 + problem.padding) // problem.stride - problem.padding // problem.stride + 1


def _tiles(problem: Conv1dProblem, weave: Weave, BLOCK_M: int, BLOCK_N: int) -> int:
    columns = problem.C_out_per_group * weave.rows(problem.C_in_per_group)
    return problem.N * problem.groups * -(-_positions(problem) // BLOCK_M) * -(-columns // BLOCK_N)
