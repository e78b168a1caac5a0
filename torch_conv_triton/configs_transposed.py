"""Launch parameters of the transposed kernels without tuning: from the problem and the device alone, by rules that were measured.

Figures in comments are ms on an H200.
"""

from __future__ import annotations

from dataclasses import replace

from torch_conv_triton.configs import Config, Device, fit
from torch_conv_triton.problem import Conv1dProblem, ceil_pow2
from torch_conv_triton.versus_aten import launch_bound
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
    BLOCK_N = min(WIDEST, max(16, ceil_pow2(_columns(problem, weave))))
    copy_to_nlc = copies_transposed(problem, weave)
    nlc = problem.layout == "NLC" or copy_to_nlc
    if nlc and BLOCK_N == WIDEST:
        # 512 -> 256 K16 s8 128x128x32 w8 s3 0.120, 64x128x32 w4 s4 0.154; 1024 -> 512 K4 s2 of 8 x 64 64x128x32 w4 s3 0.035
        BLOCK_K = 32 if problem.dtype.itemsize == 4 else 64
        few = _tiles(problem, weave, 128, BLOCK_N) < 0.5 * device.sm_count
        config = Config(64 if few else 128, BLOCK_N, BLOCK_K, num_warps=4 if few else 8, num_stages=3)
    elif problem.dtype.itemsize == 2:
        # 64 -> 32 K4 s2 bf16 128x64x32 s3 0.133, s4 0.135
        config = Config(128, BLOCK_N, 64 if nlc else 32, num_stages=3)
    elif nlc:
        # 64 -> 32 K4 s2 64x64x32 w4 s4 0.179, 128x64x32 w8 s3 0.192
        config = Config(64, BLOCK_N, 32, num_stages=4)
    elif BLOCK_N == WIDEST:
        # 128 -> 64 K8 s4 of length 30000 128x128x16 s4 0.230, 64x128x16 s3 0.238; 128 -> 64 K3 s2 of 16384 0.102 and 0.095
        many = _tiles(problem, weave, 128, BLOCK_N) >= 20 * device.sm_count
        config = Config(128, BLOCK_N, 16, num_stages=4) if many else Config(64, BLOCK_N, 16, num_stages=3)
    elif weave.spacing > 1:
        # s_kb79 64x64x32 0.493, 128x64x16 0.548
        config = Config(max(16, 128 // ceil_pow2(weave.spacing)), BLOCK_N, 32, num_stages=4)
    else:
        # 512 -> 1 K16 s8 256x16x16 0.065, 128x16x16 0.070; 48 -> 8 K8 s4 128x32x16 0.049; 64 -> 32 K4 s2 128x64x16 0.190
        config = Config(256 if BLOCK_N == 16 else 128, BLOCK_N, 16, num_stages=3)
    config = replace(
        config,
        BLOCK_M=min(config.BLOCK_M, max(16, ceil_pow2(_positions(problem) * (problem.N if copy_to_nlc else 1)))),
        BLOCK_K=_slice(config.BLOCK_K, problem.C_in_per_group),
        tap_major=True,
        copy_to_nlc=copy_to_nlc,
    )
    return fit(_room_for_left_over_taps(config, problem, weave), problem, device)


def copies_transposed(problem: Conv1dProblem, weave: Weave) -> bool:
    """Whether a copy of x to NLC, rounded and with zeros between its samples, is faster to read than x itself."""
    channels = problem.C_in_per_group
    if launch_bound(problem) or (problem.dtype.itemsize == 4 and problem.precision == "ieee") or stored_in_blocks(problem):
        return False
    if _columns(problem, weave) < WIDEST:
        # little is computed from what is copied: 512 -> 1 K16 s8 0.114 against 0.066
        return False
    if problem.K == 1 and problem.dtype.itemsize == 4:
        # nor here: 512 -> 128 of 16 x 3999 0.130 against 0.076
        return False
    if problem.dtype.itemsize == 2:
        # block copies against x: 128 -> 64 K4 s2 bf16 0.165 and 0.178, 192 -> 96 K4 s2 bf16 0.303 and 0.413
        return problem.layout != "NLC" and channels >= 128
    # block copies against x: 256 -> 128 K8 s4 0.063 and 0.072, 192 -> 96 K4 s2 0.526 and 0.515; in NLC 512 -> 256 K16 s8 0.116
    # and 0.121, 256 -> 128 K8 s4 0.062 and 0.054; 512 -> 512 K3 s1 0.101 against 0.141
    return channels >= (512 if problem.layout == "NLC" else 256)


def stored_in_blocks(problem: Conv1dProblem) -> bool:
    """Whether block copies can read x as it is, and no copy of it could be better."""
    rounded = problem.rounded or problem.dtype.itemsize == 2
    rows = problem.x_strides[0] * problem.dtype.itemsize, problem.x_strides[2] * problem.dtype.itemsize
    return rounded and problem.x_strides[1] == 1 and problem.aligned and all(size % 16 == 0 for size in rows)


def transposed_tma_config(problem: Conv1dProblem, weave: Weave, device: Device) -> Config:
    """Tile of the block-copy kernel: BLOCK_K is a power of two that divides the channels of a group."""
    channels = problem.C_in_per_group
    BLOCK_N = min(WIDEST, max(16, ceil_pow2(_columns(problem, weave))))
    BLOCK_K = 32 if problem.dtype.itemsize == 4 else 64
    # 1024 -> 512 K4 s2 of 8 x 64 64x128 0.035, 128x128 0.039
    few = _tiles(problem, weave, 128, BLOCK_N) < 0.5 * device.sm_count
    config = Config(64 if few else 128, BLOCK_N, BLOCK_K, num_stages=3)
    many_products = problem.dtype.itemsize == 4 and BLOCK_N == WIDEST and channels * weave.taps >= 1536
    even = weave.spacing == 1 and problem.K % weave.phases == 0
    if many_products and even and _tiles(problem, weave, 128, 256) >= 0.7 * device.sm_count:
        # 768 -> 384 K16 s8 128x256 0.388, 128x128 0.412; 1536 -> 768 K16 s8 0.247 and 0.260; with few tiles 768 -> 384 K7 s3 of
        # 1 x 1500 0.072 and 0.050
        config = Config(128, 256, 32, num_warps=8, num_stages=4)
    config = replace(
        config,
        BLOCK_M=min(config.BLOCK_M, max(16, ceil_pow2(problem.N * _positions(problem)))),
        BLOCK_K=min(config.BLOCK_K, channels & -channels),
        tap_major=True,
        copy_to_nlc=not stored_in_blocks(problem),
    )
    return fit(_room_for_left_over_taps(config, problem, weave), problem, device)


def _room_for_left_over_taps(config: Config, problem: Conv1dProblem, weave: Weave) -> Config:
    """Their loop is one more that holds the accumulators: fewer of them a thread, else up to 800 bytes a thread are spilled."""
    if problem.K % weave.phases and config.BLOCK_M * config.BLOCK_N >= 128 * 128:
        return replace(config, num_warps=8)
    return config


def _slice(BLOCK_K: int, length: int) -> int:
    return min(BLOCK_K, max(16, ceil_pow2(length)))


def _positions(problem: Conv1dProblem) -> int:
    """Positions of x that have outputs, of one sample."""
    return (problem.L_out - 1 + problem.padding) // problem.stride - problem.padding // problem.stride + 1


def _columns(problem: Conv1dProblem, weave: Weave) -> int:
    return problem.C_out_per_group * weave.rows(problem.C_in_per_group)


def _tiles(problem: Conv1dProblem, weave: Weave, BLOCK_M: int, BLOCK_N: int) -> int:
    return problem.groups * -(-problem.N * _positions(problem) // BLOCK_M) * -(-_columns(problem, weave) // BLOCK_N)
