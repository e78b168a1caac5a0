"""Launch parameters of each kernel without tuning: from the problem and the device alone, by rules that were measured.

Figures in comments are ms on an H200, cuDNN's in brackets, of cases of the benchmark suite.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from torch_conv_triton.problem import Conv1dProblem, ceil_pow2


@dataclass(frozen=True, slots=True)
class Device:
    """What a plan may depend on of a device. `capability` is 90 for sm_90; `shared_memory` is the bytes a block may use.

    `compare_with_aten`: whether aten may win; the interpreter is there to run our kernels.
    """

    name: str
    capability: int
    sm_count: int
    shared_memory: int
    compare_with_aten: bool = True


INTERPRETER = Device("Triton interpreter", capability=90, sm_count=4, shared_memory=227 * 1024, compare_with_aten=False)


@dataclass(frozen=True, slots=True)
class Config:
    """Launch parameters of a kernel: BLOCK_M output positions x BLOCK_N output channels, reduced BLOCK_K at a time.

    `tap_major`: a slice of the reduction is one tap of BLOCK_K channels, else all taps of few channels. `weights_left` puts the
    weights on the left of the tile's product (accumulator [C_out, L]). `programs_per_sm` is for persistent kernels.
    `copy_to_nlc`: x is first copied to NLC, a workspace of the size of x.
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int = 0
    num_warps: int = 4
    num_stages: int = 3
    tap_major: bool = False
    weights_left: bool = False
    programs_per_sm: int = 1
    copy_to_nlc: bool = False

    def __str__(self) -> str:
        blocks = "x".join(str(b) for b in (self.BLOCK_M, self.BLOCK_N, self.BLOCK_K) if b)
        flags = [name for name in ("tap_major", "weights_left", "copy_to_nlc") if getattr(self, name)]
        persistent = [f"p{self.programs_per_sm}"] if self.programs_per_sm > 1 else []
        return " ".join([blocks, f"w{self.num_warps}", f"s{self.num_stages}", *persistent, *flags])


def depthwise_config(problem: Conv1dProblem) -> Config:
    """Tiles that are wide along the contiguous dimension of x, 32 to 64 bytes of it a thread."""
    if problem.layout == "NLC":
        # p20 64x64 0.129, 16x128 0.154; p29 (fp32, K 7) 32x32 0.028
        channels = min(64 if problem.dtype.itemsize == 2 else 32, max(16, ceil_pow2(problem.C_out)))
        return Config(
            BLOCK_M=4096 // channels if channels == 64 else 1024 // channels, BLOCK_N=channels, num_warps=4, num_stages=1
        )
    # p26 128x4 0.042, 512x2 0.054; p32 128x4 0.018
    length = min(128, max(16, ceil_pow2(problem.L_out)))
    return Config(BLOCK_M=length, BLOCK_N=min(512 // length, ceil_pow2(problem.C_out)), num_warps=2, num_stages=1)


def gemm_config(problem: Conv1dProblem, device: Device) -> Config:
    """Tile of the implicit GEMM, for the tile, the transposed and (as a start) the other dense kernels.

    All output channels go into one tile where they fit, so that x is read once.
    """
    channels, C_out, itemsize = problem.C_in_per_group, problem.C_out_per_group, problem.dtype.itemsize
    tap_major = channels >= 16
    copy_to_nlc = copies_to_nlc(problem, device)
    nlc = problem.layout == "NLC" or copy_to_nlc
    BLOCK_N = min(128, max(16, ceil_pow2(C_out)))
    slice_length = channels if tap_major else channels * problem.K
    if itemsize == 4:
        # rounding takes registers, so 4-byte tiles stay small in NCL: s_seed_fp32 64x128x16 2.12, 128x128x16 2.44
        BLOCK_K = 32 if nlc or BLOCK_N == 16 or not tap_major else 16
        BLOCK_M = 64 if problem.stride > 1 and not nlc and not problem.transposed and tap_major else 128
        config = Config(
            BLOCK_M, BLOCK_N, BLOCK_K, num_warps=8 if nlc and BLOCK_N == 128 else 4, num_stages=4 if BLOCK_N > 32 else 2
        )
    else:
        # in NCL an x tile is gathered 2 bytes at a time: s_seed_bf16 128x128x32 w4 1.34, 128x128x64 w8 1.43
        BLOCK_K = 64 if nlc else 32
        config = Config(128, BLOCK_N, BLOCK_K, num_warps=8 if nlc and BLOCK_N == 128 else 4, num_stages=3)
    if channels >= 256 and C_out >= 256 and problem.N * problem.L_out >= 128 * device.sm_count:
        # compute-bound: p15 128x256x32 0.119, 128x128x16 0.142; p13 0.339
        config = replace(
            config, BLOCK_M=128, BLOCK_N=256, BLOCK_K=128 // itemsize, num_warps=8, num_stages=4 if itemsize == 4 else 3
        )
    config = replace(
        config,
        BLOCK_K=min(config.BLOCK_K, max(16, ceil_pow2(slice_length))),
        tap_major=tap_major,
        # on the left the weights are the M of the product, which warp-group instructions need to be 64
        weights_left=not nlc and config.BLOCK_N in (64, 128) and (itemsize == 2 or not tap_major),
        copy_to_nlc=copy_to_nlc,
    )
    return fit(config, problem, device)


def copies_to_nlc(problem: Conv1dProblem, device: Device) -> bool:
    """Whether x is worth a copy to NLC first: many channels in NCL, whose products outweigh the copy."""
    if problem.layout == "NLC" or problem.groups > 1 or problem.K == 1:
        return False
    # p16 0.181 against 0.228 without; p13 0.339 against 0.402; x of 128 channels loses (x_dacdown 0.354 against 0.248)
    return problem.C_in >= 256 and problem.C_out >= 256


def fit(config: Config, problem: Conv1dProblem, device: Device) -> Config:
    """The config within the registers and the shared memory of the device."""
    three_products = problem.dtype == torch.float32 and problem.precision == "ieee"
    if device.capability not in (90, 100) or three_products:
        # accumulators and operands share the registers: at most 64 accumulators a thread
        while 64 * 32 * config.num_warps < config.BLOCK_M * config.BLOCK_N:
            if config.num_warps < 8:
                config = replace(config, num_warps=8)
            elif config.BLOCK_N > 64:
                config = replace(config, BLOCK_N=config.BLOCK_N // 2)
            else:
                config = replace(config, BLOCK_M=config.BLOCK_M // 2)
    while pipeline_bytes(config, problem.dtype.itemsize) > device.shared_memory - 4096 and config.num_stages > 1:
        config = replace(config, num_stages=config.num_stages - 1)
    return config


def pipeline_bytes(config: Config, itemsize: int) -> int:
    """Shared memory of the pipelined operand tiles."""
    return config.num_stages * (config.BLOCK_M + config.BLOCK_N) * config.BLOCK_K * itemsize


def persistent_config(problem: Conv1dProblem, device: Device) -> Config | None:
    """A config whose whole weight matrix stays in shared memory; None where it does not fit or there is little to walk over."""
    config = replace(gemm_config(problem, device), num_stages=2)
    if config.copy_to_nlc or config.BLOCK_M * config.BLOCK_N > 128 * 128:
        return None
    channels = -(-problem.C_in_per_group // config.BLOCK_K) * config.BLOCK_K
    columns = (
        channels * problem.K if config.tap_major else -(-problem.C_in_per_group * problem.K // config.BLOCK_K) * config.BLOCK_K
    )
    weights = config.BLOCK_N * columns * problem.dtype.itemsize
    if columns > 16 * config.BLOCK_K or 2 * weights + pipeline_bytes(config, problem.dtype.itemsize) > device.shared_memory:
        return None
    if problem.N * problem.L_out < 4 * config.BLOCK_M * device.sm_count:
        return None
    return config


def tma_config(problem: Conv1dProblem, device: Device) -> Config:
    """Tile of the tensor-descriptor kernel: BLOCK_K is a divisor of the channels of a group."""
    config = gemm_config(problem, device)
    BLOCK_K = min(64, problem.C_in_per_group & -problem.C_in_per_group)
    # p02 w4 0.0485, w8 0.0491; p16 w4 0.181, w8 0.185
    return replace(
        config, BLOCK_M=128, BLOCK_N=min(config.BLOCK_N, 128), BLOCK_K=BLOCK_K, num_warps=4, num_stages=3, weights_left=False
    )
