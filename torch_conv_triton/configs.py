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

    `tap_major`: a slice of the reduction is one tap of BLOCK_K channels, else all taps of few channels. `merge_taps`
    (tap_major): a slice may span taps. `weights_left` puts the weights on the left of the tile's product (accumulator
    [C_out, L]). `programs_per_sm` is for persistent kernels. `copy_to_nlc`: x is first copied to NLC, a workspace of the size of
    x, and rounded to TF32 where products are. `prefetch`: a tile asks for all of its x at the start. Of depthwise kernels: `run`
    outputs, or blocks of them, in a row share the x that they have in common; a program computes `steps` tiles.
    `TAIL_N` (`dense_tma`): output channels of a second product beside the BLOCK_N, so that a tile has 128 + 64 of them.
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int = 0
    num_warps: int = 4
    num_stages: int = 3
    tap_major: bool = False
    merge_taps: bool = False
    weights_left: bool = False
    programs_per_sm: int = 1
    copy_to_nlc: bool = False
    prefetch: bool = False
    run: int = 1
    steps: int = 1
    TAIL_N: int = 0

    def __str__(self) -> str:
        channels = f"{self.BLOCK_N}+{self.TAIL_N}" if self.TAIL_N else self.BLOCK_N
        blocks = "x".join(str(b) for b in (self.BLOCK_M, channels, self.BLOCK_K) if b)
        flags = [name for name in ("tap_major", "merge_taps", "weights_left", "copy_to_nlc", "prefetch") if getattr(self, name)]
        counts = {"p": self.programs_per_sm, "run": self.run, "steps": self.steps}
        repeats = [f"{name}{count}" for name, count in counts.items() if count != 1]
        return " ".join([blocks, f"w{self.num_warps}", f"s{self.num_stages}", *repeats, *flags])


def gemm_config(problem: Conv1dProblem, device: Device) -> Config:
    """Tile of the implicit GEMM.

    All output channels go into one tile where they fit, so that x is read once.
    """
    tap_major = problem.C_in_per_group >= 16
    copy_to_nlc = copies_to_nlc(problem)
    nlc = problem.layout == "NLC" or copy_to_nlc
    BLOCK_N = min(128, max(16, ceil_pow2(problem.C_out_per_group)))
    config = (
        _tile_32bit(problem, BLOCK_N, nlc, tap_major)
        if problem.dtype.itemsize == 4
        else _tile_16bit(problem, BLOCK_N, nlc, tap_major)
    )
    if min(problem.C_in_per_group, problem.C_out_per_group) >= 256:
        config = _compute_bound_tile(problem, config)
    elif problem.dtype.itemsize == 4 and 128 < problem.C_out_per_group <= 256 and _fills_wide_tiles(problem, device):
        # 192 -> 192 K7 128x256x32 1.24, 128x128x16 1.41
        config = Config(128, 256, 32, num_warps=8, num_stages=4)
    elif problem.dtype.itemsize == 4 and copy_to_nlc:
        # x_hifi128_k7 s3 0.093; s4 leaves room for one program an SM
        config = replace(config, num_stages=3)
    if not copy_to_nlc:
        config = _spread(config, problem, device)
        if config.BLOCK_M == config.BLOCK_N == 32 and not nlc and problem.flops < 100e6:
            # weights in channel-major order need no packing, which is a launch of its own: 1x64x256 K3 4.0 us, 5.2 tap by tap
            tap_major = False
    merge_taps = _merges_taps(problem, config, nlc)
    if merge_taps:
        config = replace(config, num_stages=4)
    slice_length = problem.C_in_per_group * (1 if tap_major else problem.K)
    config = replace(
        config,
        merge_taps=merge_taps,
        BLOCK_K=min(config.BLOCK_K, max(16, ceil_pow2(slice_length))),
        tap_major=tap_major,
        # On the left the weights are the M of the product, of which warp-group instructions need 64. Below that triton 3.6
        # miscompiles 16-bit slices that are not TAP_MAJOR.
        weights_left=config.BLOCK_N in (64, 128) and (problem.dtype.itemsize == 2 or not tap_major),
        copy_to_nlc=copy_to_nlc,
    )
    return fit(config, problem, device)


def _merges_taps(problem: Conv1dProblem, config: Config, nlc: bool) -> bool:
    """Whether slices run on into the next tap, where channels do not fill them: p28 (48 channels a group) 0.238 against 0.298."""
    channels = problem.C_in_per_group
    return nlc and problem.dtype.itemsize == 2 and problem.K > 1 and channels % 16 == 0 and channels % config.BLOCK_K != 0


def _spread(config: Config, problem: Conv1dProblem, device: Device) -> Config:
    """Smaller tiles where large ones would leave most of the GPU without work."""

    def tiles(BLOCK_M: int, BLOCK_N: int) -> int:
        columns = problem.groups * -(-problem.C_out_per_group // BLOCK_N)
        rows = -(-problem.L_out // BLOCK_M) * problem.N if problem.L_out >= BLOCK_M else -(-problem.N * problem.L_out // BLOCK_M)
        return rows * columns

    BLOCK_M, BLOCK_N = config.BLOCK_M, config.BLOCK_N
    while tiles(BLOCK_M, BLOCK_N) < 0.75 * device.sm_count and max(BLOCK_M, BLOCK_N) > 32:
        if BLOCK_M >= BLOCK_N:
            BLOCK_M //= 2
        else:
            BLOCK_N //= 2
    if (BLOCK_M, BLOCK_N) == (config.BLOCK_M, config.BLOCK_N):
        return config
    # us: 1x256x100 K3 32x32x32 10.1, 64x64x16 14.2, 64x128x16 17.6; 8x64x1024 K7 64x64x16 12.5; in fp16 32x32x64 8.5
    BLOCK_K = (32 if problem.dtype.itemsize == 4 else 64) if BLOCK_M == 32 else config.BLOCK_K
    return replace(config, BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, num_warps=4, prefetch=False)


def _tile_32bit(problem: Conv1dProblem, BLOCK_N: int, nlc: bool, tap_major: bool) -> Config:
    # rounding goes through registers, so tiles stay small in NCL: s_seed_fp32 64x128x16 2.12, 128x128x16 2.44
    if nlc:
        # rounded 64 -> 64 K7 of 8 x 38400 s3 0.108, s4 0.117; 128 -> 128 K7 of 8 x 9600 0.077 and 0.088
        return Config(128, BLOCK_N, 32, num_warps=8 if BLOCK_N == 128 else 4, num_stages=3 if problem.rounded else 4)
    if BLOCK_N <= 32:
        # p17 128x16x32 s2 0.195, s4 0.237; x_hifi32_k3 256x32x16 s2 0.149, s4 0.169
        return Config(256 if BLOCK_N == 32 else 128, BLOCK_N, 16 if BLOCK_N == 32 else 32, num_warps=4, num_stages=2)
    BLOCK_M = 64 if problem.stride > 1 and tap_major else 128
    return Config(BLOCK_M, BLOCK_N, 16 if tap_major else 32, num_warps=4, num_stages=4)


def _tile_16bit(problem: Conv1dProblem, BLOCK_N: int, nlc: bool, tap_major: bool) -> Config:
    if nlc:
        # p28 256x64x64 w8 0.299, 128x64x64 w4 0.340
        return Config(256 if BLOCK_N == 64 else 128, BLOCK_N, 64, num_warps=8 if BLOCK_N >= 64 else 4, num_stages=3)
    if not tap_major:
        # p11 128x128x16 w8 0.264, w4 0.276; x_dna 128x128x64 w4 0.526, w8 0.617
        wide = BLOCK_N == 128 and problem.C_in_per_group * problem.K <= 32
        return Config(128, BLOCK_N, 64, num_warps=8 if wide else 4, num_stages=3)
    # an NCL tile is gathered 2 bytes at a time
    if BLOCK_N == 128 and problem.stride > 1 and problem.C_in_per_group >= 64:
        # s_seed_bf16 with prefetch 1.31, without 128x128x32 s2 1.33, s3 1.35
        return Config(128, BLOCK_N, 64, num_warps=4, num_stages=2, prefetch=True)
    if BLOCK_N <= 32:
        # x_hifi32_bf16 256x32x16 0.380, 128x32x32 0.511
        return Config(256, BLOCK_N, 16, num_warps=4, num_stages=3)
    return Config(128, BLOCK_N, 32, num_warps=4, num_stages=3)


def _fills_wide_tiles(problem: Conv1dProblem, device: Device) -> bool:
    """Whether tiles of 256 channels have enough to compute, and occupy the GPU: 250 -> 250 K7 of 16 x 500 0.104, else 0.090."""
    return problem.C_in_per_group * problem.K >= 1024 and problem.N * problem.L_out >= 128 * device.sm_count


def _compute_bound_tile(problem: Conv1dProblem, config: Config) -> Config:
    """The tile for many channels: as large as the number of tiles allows."""
    tiles = problem.N * problem.L_out * problem.C_out_per_group * problem.groups // (128 * 256)
    if tiles < 64:
        # p25 64x128x32 0.058, 128x128x32 0.077
        return replace(config, BLOCK_M=64)
    BLOCK_K, num_stages = (32, 4) if problem.dtype.itemsize == 4 else (64, 3)
    # p15 128x256x32 0.119, 128x128x16 0.142; 384 channels fill three tiles of 128: 0.963, two of 256: 1.09
    BLOCK_N = 256 if problem.C_out_per_group % 256 == 0 or problem.C_out_per_group > 1024 else 128
    return replace(config, BLOCK_M=128, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, num_warps=8, num_stages=num_stages)


def copies_to_nlc(problem: Conv1dProblem) -> bool:
    """Whether x is worth a copy to NLC first: many channels in NCL, whose products outweigh the copy."""
    if problem.layout == "NLC" or problem.K == 1:
        return False
    if problem.groups > 1:
        # 8 x 768 x 499 K128 in 16 groups 0.228 against 0.389 without; each group alone is to be worth it
        return problem.dtype.itemsize == 2 and problem.C_in_per_group >= 32 and problem.K >= 16 and problem.L_out >= 128
    if problem.dtype.itemsize == 2:
        if problem.L_out < 128:
            return False
        # p16 0.112 against 0.228 without; x_whisper1 (128 -> 1280) 0.074 against 0.119
        return problem.C_in >= 128 and problem.C_out >= 256
    if problem.precision == "ieee":
        return False
    # Rounded on the way, x goes from memory to the tensor cores without passing registers: p13 0.260 against 0.402, p05 (128
    # channels) 0.434 and 0.512, x_k7c384 0.663 and 0.878. K 3 gains nothing (p15 0.097 and 0.096), and fewer channels lose
    # (x_dacdown 0.274 against 0.227).
    # A small one (192 -> 384 K5 of 8 x 400, 16 us) takes less time than the host does to launch the copy.
    channels = min(problem.C_in, problem.C_out)
    many = channels >= 256 or (channels >= 128 and problem.C_in % 32 == 0 and problem.stride == 1)
    return many and problem.K > 3 and problem.flops > 4e9


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
    return config.num_stages * (config.BLOCK_M + config.BLOCK_N + config.TAIL_N) * config.BLOCK_K * itemsize


def persistent_config(problem: Conv1dProblem, device: Device) -> Config | None:
    """A config whose whole weight matrix stays in shared memory; None where it does not fit or there is little to walk over."""
    if device.capability != 90 or (problem.dtype == torch.float32 and problem.precision == "ieee"):
        # what the compiler makes of it elsewhere is not verified; three products a slice do not leave the room
        return None
    config = gemm_config(problem, device)
    if problem.dtype.itemsize == 2 and problem.layout == "NLC":
        # s_seed_bf16 in NLC 128x128x64 w4 s3 0.866, as a tensor-descriptor kernel 0.895
        config = replace(config, BLOCK_M=128, num_warps=4, num_stages=3, weights_left=False)
    else:
        config = replace(config, num_stages=2, programs_per_sm=2 if config.BLOCK_N <= 32 else 1)
    if config.copy_to_nlc or config.BLOCK_M * config.BLOCK_N > 128 * 128:
        return None
    if not stays_resident(config, problem, device):
        return None
    if problem.N * problem.L_out < 4 * config.BLOCK_M * device.sm_count:
        return None
    return config


def stays_resident(config: Config, problem: Conv1dProblem, device: Device) -> bool:
    """Whether the whole weight matrix of a tile's channels fits into shared memory, beside what passes through it."""
    slices = -(-problem.C_in_per_group // config.BLOCK_K) * problem.K
    if not config.tap_major:
        slices = -(-problem.C_in_per_group * problem.K // config.BLOCK_K)
    # beside the weights lie the x tiles of one output tile, for every stage but the last, and the accumulators on their way out;
    # float32 that is not rounded is multiplied where it lies, which takes one more
    stages = config.num_stages if problem.rounded else config.num_stages - 1
    resident = slices * config.BLOCK_K * (config.BLOCK_N + stages * config.BLOCK_M) * problem.dtype.itemsize
    return slices <= 16 and resident + 4 * config.BLOCK_M * config.BLOCK_N <= device.shared_memory


def config_refusal(config: Config, problem: Conv1dProblem, device: Device) -> str | None:
    """Why a tile of a matrix product cannot have this config, or None."""
    sides = config.BLOCK_M, config.BLOCK_N, config.BLOCK_K, config.TAIL_N or config.BLOCK_N
    if min(sides) < 16 or any(side & (side - 1) for side in sides):
        return "tensor cores take tiles of powers of two from 16 on"
    if config.weights_left and not config.tap_major and config.BLOCK_N < 64 and problem.dtype.itemsize == 2:
        return "triton 3.6 miscompiles it"
    if fit(config, problem, device) != config:
        return "it does not fit into the registers or the shared memory of a block"
    return None


def pads_channels(problem: Conv1dProblem) -> bool:
    """Whether a copy of x to NLC is a candidate for its rows padded to whole blocks of channels alone."""
    if problem.layout == "NLC" or problem.groups > 1 or problem.K == 1 or problem.C_in < 64 or problem.C_in % 32 == 0:
        return False
    if problem.dtype.itemsize == 4 and problem.precision == "ieee":
        return False
    return problem.L_out >= 128 and problem.flops > 1e9


def padding_wins(problem: Conv1dProblem, device: Device) -> bool:
    """Whether block copies of padded channels beat the gathered product and cuDNN, by measurement.

    ms on an H200, gathered and [cuDNN without bias] behind: 250 -> 250 K7 of 16 x 500 0.036, 0.090 [0.079], K48 s2 0.153, 0.476
    [0.425]; 250 -> 2000 K32 0.72, 2.04 [1.26], fp16 0.43, 1.55 [0.89]; 80 -> 512 K5 of 16 x 3000 0.110, 0.128 [0.149], s2 0.066,
    0.079 [0.094], fp16 0.072, 0.107 [0.112]; 100 -> 512 K7 0.060, 0.111 [0.101]; 201 -> 256 K5 0.043, 0.080 [0.079]; 513 -> 512
    K3 0.103, 0.187 [0.195], bf16 0.063, 0.449 [0.104].
    """
    return device.capability >= 90 and pads_channels(problem) and problem.C_out >= 128 and problem.flops > 4e9


def channel_block(problem: Conv1dProblem, BLOCK_K: int) -> int:
    """Channels of a block copy, at most BLOCK_K: a power of two that divides those of a group, or pads those of a single one."""
    channels = problem.C_in_per_group
    whole = min(BLOCK_K, channels & -channels)
    if problem.groups > 1 or whole >= 32 or channels < 32:
        return whole
    # narrow blocks lose more than a few zeros cost
    return min((BLOCK_K, 32) if channels > 64 else (32, 16), key=lambda block: -channels % block)


def tma_config(problem: Conv1dProblem, device: Device) -> Config:
    """Tile of the tensor-descriptor kernel."""
    return fit(_tma_tile(problem, device), problem, device)


def _tma_tile(problem: Conv1dProblem, device: Device) -> Config:
    config = gemm_config(problem, device)
    channels = problem.C_in_per_group
    if problem.dtype.itemsize == 4:
        BLOCK_K, num_stages = 32, 4
    else:
        # s_seed_bf16 in NLC 128x128x32 s4 0.895, 128x128x64 s3 0.989; p02 and p16 the reverse
        BLOCK_K, num_stages = (32, 4) if channels <= 64 else (64, 3)
    # p02 w4 0.0485, w8 0.0491; p16 w4 0.181, w8 0.185
    config = replace(
        config,
        # x_hifi32_bf16 in NLC 256x32x32 0.314, 128x32x32 0.331
        BLOCK_M=128 if config.BLOCK_N >= 64 else 256,
        BLOCK_N=min(config.BLOCK_N, 128),
        BLOCK_K=channel_block(problem, BLOCK_K),
        copy_to_nlc=config.copy_to_nlc or pads_channels(problem),
        # tensor cores of sm_100 leave the accumulators to an epilogue that spills with fewer
        num_warps=8 if device.capability >= 100 else 4,
        num_stages=num_stages,
        merge_taps=False,
        weights_left=False,
        prefetch=False,
    )
    if problem.rounded and config.BLOCK_N <= 64:
        # the best of five: 64 -> 64 K7 of 8 x 38400 0.103, 32 -> 32 K3 of 8 x 153600 0.123
        return replace(config, BLOCK_M=128, num_stages=3)
    if problem.dtype.itemsize == 4 and config.BLOCK_N == 128:
        tiles = problem.N * -(-problem.L_out // 128) * -(-problem.C_out_per_group // 128)
        if tiles < 1.5 * device.sm_count:
            # x_hifi512 64x128 s3 0.087, 256x128 0.095
            return replace(config, BLOCK_M=64, num_stages=3)
        wide = problem.C_out_per_group % 256 == 0 and tiles >= 8 * device.sm_count
        if wide or (problem.C_out_per_group > 1024 and tiles >= 4 * device.sm_count):
            # p14 128x256 w8 0.320, 128x128 0.325; x_k7c768, with fewer tiles, 0.367 and 0.358; 250 -> 2000 K32 0.73 and 0.92
            return replace(config, BLOCK_N=256, num_warps=8)
    return config
