"""Which depthwise kernels can run a problem, the fastest of them, and their launch parameters, by rules that were measured.

Figures in comments are ms on an H200.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from torch_conv_triton.configs import INTERPRETER, Config, Device
from torch_conv_triton.problem import INT32_MAX, Conv1dProblem, ceil_pow2

# samples, outputs and taps of a row that a thread holds
LONGEST_HELD = 16
# positions of a row that is read by words, and registers of a thread for matrices and samples
LONGEST_ROW, MOST_BAND_REGISTERS = 2**29, 96


def depthwise_choices(problem: Conv1dProblem, device: Device) -> list[tuple[str, Config, str]]:
    """The depthwise kernels that can run a depthwise problem, as (name, config, reason), the preferred one last."""
    choices = [(1, "depthwise", depthwise_config(problem), "depthwise: moves bytes, there is no matrix to multiply")]
    if not toeplitz_refusal(problem):
        rank = 2 if prefers_toeplitz(problem) else 0
        choices.append((rank, "depthwise_toeplitz", toeplitz_config(problem), "taps as banded matrices on tensor cores"))
    config = bands_config(problem)
    if not bands_refusal(problem, device, config):
        # p26 0.0129 against 0.0166, p27 0.0273 against 0.0317
        rank = 3 if prefers_toeplitz(problem) and problem.K > 9 else 0
        choices.append((rank, "depthwise_bands", config, "taps as banded matrices of what threads load themselves"))
    if not sliding_refusal(problem):
        # p20, whose rows of 2051 2-byte outputs start on odd addresses, 0.140 against 0.130
        rank = 3 if problem.y_strides[2] != 1 or problem.L_out * problem.dtype.itemsize % 4 == 0 else 0
        choices.append((rank, "depthwise_sliding", sliding_config(problem), "channels-last x: every sample is loaded once"))
    config = skewed_config(problem)
    if not skewed_refusal(problem, config):
        # p20 0.111 against 0.138, p21 0.035 against 0.043, aligned rows 0.091 against 0.092; in float32 (p29) alike, 0.0236
        rank = 4 if problem.dtype.itemsize == 2 else 1
        choices.append((rank, "depthwise_skewed", config, "channels-last x: whole vectors of y, wherever rows start"))
    if not vector_refusal(problem):
        choices.append((5, "depthwise_vector", vector_config(problem), "aligned rows: few taps, shifted in registers"))
    if not short_refusal(problem):
        choices.append((6, "depthwise_short", short_config(problem), "rows of a few samples: a thread holds them whole"))
    return [choice[1:] for choice in sorted(choices, key=lambda choice: choice[0])]


def depthwise_config(problem: Conv1dProblem) -> Config:
    """Tiles that are wide along the contiguous dimension of x."""
    if problem.layout == "NLC":
        # p20 32x64 0.131, 32x128 0.130, 64x64 0.135
        channels = 64 if problem.dtype.itemsize == 2 else 32
        return Config(32, min(channels, max(16, ceil_pow2(problem.C_out))), num_warps=2, num_stages=1)
    # p26 128x4 0.042, 512x2 0.054; p32 128x4 0.017
    length = min(128, max(16, ceil_pow2(problem.L_out)))
    return Config(length, min(512 // length, ceil_pow2(problem.C_out)), num_warps=2, num_stages=1)


def short_refusal(problem: Conv1dProblem) -> str | None:
    """Why a thread cannot hold whole rows of x, or None."""
    if problem.transposed:
        return "outputs take turns with their taps"
    if max(problem.L_in, problem.L_out, problem.K) > LONGEST_HELD:
        return "rows or taps do not fit the registers"
    return None


def short_config(problem: Conv1dProblem) -> Config:
    """Tile of the kernel for rows of a few samples: BLOCK_M samples x BLOCK_N channels, all positions."""
    # us: p24 1x128 7.6, 2x128 7.8, 4x128 8.2; an empty launch is 4.6, a copy of as many bytes 9.1, cuDNN 14.8
    channels = min(128, max(32, ceil_pow2(problem.C_out)))
    return Config(1, channels, num_warps=channels // 32, num_stages=1)


def vector_refusal(problem: Conv1dProblem) -> str | None:
    """Why x and y cannot be read and written by whole vectors that are shifted in registers, or None."""
    if problem.transposed or problem.stride > 1:
        return "samples and outputs lie differently far apart"
    vector = 16 // problem.dtype.itemsize
    sizes = (*problem.x_strides[:2], *problem.y_strides[:2], problem.L_in, problem.L_out)
    rows = problem.x_strides[2] == problem.y_strides[2] == 1
    if not rows or not problem.aligned or any(size % vector for size in sizes):
        return "rows do not begin and end on 16 bytes"
    if problem.K > 9 or (problem.K - 1) * problem.dilation > 2 * vector:
        return "the taps of an output do not fit the registers"
    return None


def vector_config(problem: Conv1dProblem) -> Config:
    """Tile of the kernel that shifts vectors: BLOCK_M outputs of one row."""
    # 8 x 5120 x 2048 K4 in bf16 1024 w1 0.0836, w2 0.0840, 2048 w4 0.0837
    length = min(1024, max(128, ceil_pow2(problem.L_out)))
    return Config(length, 1, num_warps=max(1, length // 512), num_stages=1)


def sliding_refusal(problem: Conv1dProblem) -> str | None:
    """Why threads cannot slide along the positions of channels-last x, or None."""
    if problem.transposed or problem.stride > 1 or (problem.dilation > 1 and problem.y_strides[2] == 1):
        return "neighbouring outputs share no samples"
    if problem.C_in != problem.C_out:
        return "a channel has several filters"
    if problem.layout != "NLC":
        return "x is not channels-last"
    if problem.K > 9:
        return "the taps of an output do not fit the registers"
    return None


def sliding_config(problem: Conv1dProblem) -> Config:
    """Tile of the sliding kernel: a thread has 16 bytes of channels and `run` outputs."""
    if problem.dtype.itemsize == 4:
        # p29 64x32 0.0240, 32x32 0.0254
        return Config(64, 32, num_warps=4, num_stages=1, run=4)
    if problem.L_out % 8:
        # p22 128x64 0.0473, 64x64 0.0534
        return Config(128, 64, num_warps=4, num_stages=1, run=4)
    # 8 x 5120 x 2048 K4 64x64 0.0922, 32x64 0.0938
    return Config(64, 64, num_warps=2, num_stages=1, run=8)


def skewed_refusal(problem: Conv1dProblem, config: Config) -> str | None:
    """Why vectors of outputs cannot be cut where the rows of y start, or None."""
    reason = sliding_refusal(problem)
    if reason:
        return reason
    vector = 16 // problem.dtype.itemsize
    if problem.C_in % vector or problem.y_strides[2] != 1 or (problem.N > 1 and problem.y_strides[0] % config.run):
        return "vectors of channels, or samples of the output, do not start alike"
    if config.run > vector or config.BLOCK_N % vector:
        return "a vector of outputs is longer than 16 bytes"
    return None


def skewed_config(problem: Conv1dProblem) -> Config:
    """Tile of the kernel that cuts vectors of outputs where rows start: a thread has 16 bytes of channels, and of outputs."""
    if problem.dtype.itemsize == 4:
        return Config(64, 32, num_warps=4, num_stages=1, run=4)
    # p20 128x32 0.111, 64x64 0.125, 128x64 0.114, 128x16 0.117; p22 128x32 0.046, 64x64 0.053
    return Config(128, 32, num_warps=2, num_stages=1, run=8)


def toeplitz_refusal(problem: Conv1dProblem, config: Config | None = None) -> str | None:
    """Why a banded matrix product does not compute the problem (with this config), or None."""
    if problem.y_strides[2] != 1:
        return "the output is not stored by rows"
    if problem.transposed and (problem.stride & (problem.stride - 1) or problem.stride > 16):
        return "blocks of outputs are not whole steps of the stride"
    if config is None or config.run == 0:
        return None
    if config.run > 1 and _block_of_x(problem, config.BLOCK_N) % config.BLOCK_K:
        return "neighbouring blocks share no slices"
    if _kept_bytes(problem, config) > MOST_KEPT_BYTES * config.num_warps:
        return "the samples of a tile do not fit the registers"
    return None


def bands_refusal(problem: Conv1dProblem, device: Device, config: Config) -> str | None:
    """Why threads cannot load what their part of a banded product takes, or None."""
    if device == INTERPRETER or torch.version.hip is not None:
        return "its products are instructions of NVIDIA's"
    if problem.transposed or problem.stride > 1 or problem.dilation > 1:
        return "neighbouring outputs do not share neighbouring samples"
    if problem.dtype.itemsize == 4 and problem.precision == "ieee":
        return "full float32 takes three products of split operands"
    if problem.x_strides[2] != 1 or problem.y_strides[2] != 1 or not problem.aligned:
        return "rows are not contiguous, or do not start at words"
    if problem.N > 1 and problem.x_strides[0] * problem.dtype.itemsize % 4:
        return "samples do not start at words"
    if max(problem.L_in, problem.L_out) > LONGEST_ROW or problem.N * problem.L_out > INT32_MAX:
        return "positions pass 2^29"
    kept = (2 * _band_slices(problem) + config.run - 1) * 2 * problem.dtype.itemsize
    if kept > MOST_BAND_REGISTERS or not 1 <= config.run <= 4:
        return "matrices and samples do not fit the registers"
    return None


def bands_config(problem: Conv1dProblem) -> Config:
    """Tile of the banded product without a detour: 16 runs a warp of `run` blocks of 16 outputs."""
    # p26 in runs of 2 0.0129, of 1 0.0150; p27 of 3 0.0273, of 2 0.0308; more tiles a program, or warps, gain nothing
    return Config(16, 16, 16, num_warps=1, num_stages=1, run=3 if problem.L_out > 512 else 2)


def _band_slices(problem: Conv1dProblem) -> int:
    """Slices of 16 samples that carry to a block of 16 outputs."""
    return (problem.K + 31) // 16


def prefers_toeplitz(problem: Conv1dProblem) -> bool:
    """Whether tensor cores beat loading x once a tap."""
    reach = (problem.K - 1) * problem.dilation
    if problem.layout != "NCL":
        # x is copied: x_conformer_nlc (K 31) 0.044 against 0.079
        return problem.K > 9 and reach <= 64 * problem.K and problem.L_out >= 64
    if problem.L_out < 64 or problem.K == 1 or problem.stride > 8:
        return False
    if problem.K <= 3 and (problem.dtype.itemsize == 4 or problem.L_in % 8):
        # 8 x 512 x 4001 K3 0.0453 against 0.0451; 8 x 2048 x 2050 K3 in bf16 0.0945 against 0.0714
        return False
    # K3 d128 0.114 against 0.048
    return reach <= 64 or problem.K > 16


# of the samples of a tile, a warp: they are held in registers
MOST_KEPT_BYTES = 10240


def toeplitz_config(problem: Conv1dProblem) -> Config:
    """Tile of the banded product: BLOCK_M runs of `run` blocks of BLOCK_N outputs, from slices of BLOCK_K samples.

    A `run` of 0 stands for so many taps that their matrices are built in the loop that multiplies by them.
    """
    narrow = problem.dtype.itemsize == 2
    BLOCK_N = max(16, 4 * problem.stride) if problem.transposed else 16
    BLOCK_K = 16
    if narrow and problem.K > 64 and not problem.transposed:
        # K127 16x32x32 0.068, 16x16x16 0.076
        BLOCK_N = BLOCK_K = 32
    blocks = -(-problem.L_out // BLOCK_N)
    # p27 16x16x16 run 3 0.030, 32x16x16 run 1 0.044; in float32, and strided, runs do not pay: p29 in NCL 0.024
    sharing = narrow and problem.stride == 1
    runs = [Config(16, BLOCK_N, BLOCK_K, num_warps=1, num_stages=1, run=run) for run in ((4, 3, 2, 1) if sharing else (1,))]
    if not sharing and blocks > 16:
        runs.append(Config(32, BLOCK_N, BLOCK_K, num_warps=1, num_stages=1))
    runs = [config for config in runs if _kept_bytes(problem, config) <= MOST_KEPT_BYTES]
    if not runs:
        # K1024 of length 16384 in bf16 128x32x64 s3 1.51, 128x64x64 s3 1.50, in float32 128x32x32 1.35, 128x64x32 1.26, but with
        # 64 outputs registers are spilled
        BLOCK_M = 128 if problem.L_out > 4096 else 64
        return Config(BLOCK_M, 32, 64 if narrow else 32, num_warps=4, num_stages=3 if narrow else 1, run=0)

    def tiles(config: Config) -> int:
        return -(-blocks // (config.BLOCK_M * config.run))

    def cost(config: Config) -> float:
        loaded = _slices(problem, config) * config.BLOCK_K / (_block_of_x(problem, BLOCK_N) * config.run)
        return tiles(config) * config.BLOCK_M * config.run * (loaded + 0.3) / (1 if config.BLOCK_M == 16 else 1.05)

    # p27 in one step 0.030, in two 0.032; K127 in four 0.068, in one 0.076; x_conformer in float32 in two 0.0415, in one 0.044
    steps = 4 if BLOCK_K == 32 else 1 if sharing else 2
    return replace(min(runs, key=cost), steps=steps)


def _block_of_x(problem: Conv1dProblem, BLOCK_N: int) -> int:
    """Samples from a block of outputs to the next."""
    return BLOCK_N // problem.stride if problem.transposed else BLOCK_N * problem.stride


def _slices(problem: Conv1dProblem, config: Config) -> int:
    """Slices of BLOCK_K samples that a run of blocks needs, wherever its row starts."""
    vector = 16 // problem.dtype.itemsize
    block = _block_of_x(problem, config.BLOCK_N)
    reach = (problem.K - 1) * problem.dilation // (problem.stride if problem.transposed else 1)
    together = (reach + block + vector) // config.BLOCK_K + 1
    # taps that lie far apart are taken one by one
    alone = (block + vector) // config.BLOCK_K + 1
    more = (config.run - 1) * (block // config.BLOCK_K)
    return min(together + more, problem.K * (alone + more))


def _kept_bytes(problem: Conv1dProblem, config: Config) -> int:
    return _slices(problem, config) * config.BLOCK_M * config.BLOCK_K * problem.dtype.itemsize
