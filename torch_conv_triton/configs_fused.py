"""Tiles for convolutions whose epilogue moves as much memory as the convolution itself. Measured on an H200; us in comments.

In compiled graphs float32 is rounded before it is read, and 16 bits need no rounding, so what is left of a short reduction is its
epilogue: a residual is read, two outputs are written. One program of a large tile keeps a multiprocessor waiting for all that;
several small ones overlap.
"""

from __future__ import annotations

from dataclasses import replace

from torch_conv_triton.configs import Config, Device, channel_block
from torch_conv_triton.problem import Conv1dProblem

# Tiles of two parts, by bytes of an element and output channels. With the best tile of one part behind them, K7 with Snake in
# float32: 96 channels 496 and 602, 192 767 and 887, 320 474 and 655, as two tiles of 160 567; in bfloat16 96 292 and 466, 192 445
# and 534.
TWO_PARTS = {
    4: {
        96: Config(128, 64, 32, num_warps=4, num_stages=4, tap_major=True, TAIL_N=32),
        160: Config(128, 128, 32, num_warps=8, num_stages=4, tap_major=True, TAIL_N=32),
        192: Config(64, 128, 32, num_warps=4, num_stages=3, tap_major=True, TAIL_N=64),
        320: Config(128, 256, 32, num_warps=8, num_stages=3, tap_major=True, TAIL_N=64),
    },
    2: {
        96: Config(256, 64, 32, num_warps=4, num_stages=3, tap_major=True, TAIL_N=32),
        192: Config(64, 128, 64, num_warps=4, num_stages=3, tap_major=True, TAIL_N=64),
    },
}

# Tiles of pointwise convolutions beside tiles of operands or of a second output, by output channels. With Snake and a residual,
# both values stored, 96 channels of 4 x 220160 367, gathered as 64x64x32 485; 128 of 4 x 110080 248 and 284; 192 425 and 405.
POINTWISE = {
    96: Config(64, 64, 32, num_warps=4, num_stages=2, tap_major=True, TAIL_N=32),
    128: Config(32, 128, 64, num_warps=4, num_stages=2, tap_major=True),
}


def of_all_channels(problem: Conv1dProblem, device: Device, beside: bool) -> Config | None:
    """A tile of `dense_tma` that is all output channels, in two parts where they are no power of two, if that is the faster.

    `beside`: as in `fused_choice`.
    """
    if problem.transposed or device.capability != 90:
        return None
    return (_pointwise if problem.K == 1 else _in_two_parts)(problem, device, beside)


def _pointwise(problem: Conv1dProblem, device: Device, beside: bool) -> Config | None:
    measured = beside and problem.dtype.itemsize == 4 and problem.groups == 1 and problem.C_in in (96, 128)
    config = POINTWISE.get(problem.C_out) if measured else None
    if config is None or problem.N * problem.L_out < 8 * config.BLOCK_M * device.sm_count:
        return None
    return replace(config, BLOCK_K=channel_block(problem, config.BLOCK_K))


def _in_two_parts(problem: Conv1dProblem, device: Device, beside: bool) -> Config | None:
    config = TWO_PARTS[problem.dtype.itemsize].get(problem.C_out_per_group)
    if config is None:
        return None
    channels = problem.C_in_per_group
    if channels % 32 or channels * problem.K < 512 or problem.L_out < config.BLOCK_M or problem.flops < 2e9:
        return None
    tiles = problem.groups * problem.N * -(-problem.L_out // config.BLOCK_M)
    # 768 -> 192 K3 of 8 x 600, 80 tiles, 33 with 4 stages, 38 with 3, which leave room for a second program; gathered 47
    if tiles < (0.5 if config.BLOCK_M == 64 else 2) * device.sm_count:
        return None
    accumulators = config.BLOCK_M * (config.BLOCK_N + config.TAIL_N) // (32 * config.num_warps)
    if beside and accumulators > 128:
        # else it is spilled
        config = replace(config, BLOCK_M=config.BLOCK_M // 2)
    alone = tiles <= device.sm_count
    return replace(config, BLOCK_K=channel_block(problem, config.BLOCK_K), num_stages=4 if alone else config.num_stages)


def fused_choice(kernel: str, config: Config, problem: Conv1dProblem, beside: bool) -> tuple[str, Config]:
    """The kernel and the tile for 16 bits and for rounded float32, given those of the convolution alone.

    `beside`: whether tiles of operands or of a second output are beside the tile of the output.
    """
    if kernel == "dense_halo":
        return kernel, _halo(config, problem) if beside else config
    if kernel == "transposed_tma":
        # 192 columns: 192 -> 96 K4 with Snake and both outputs stored 443, as 128x128x32 in 4 warps 491
        columns = problem.C_out_per_group * problem.stride
        uneven = problem.rounded and columns == 192 and (config.BLOCK_M, config.BLOCK_N) == (128, 128)
        return kernel, replace(config, BLOCK_N=64, num_warps=8) if beside and uneven else config
    if problem.layout != "NLC" or kernel not in ("dense", "dense_tma"):
        return kernel, config
    return (_dense_16bit if problem.dtype.itemsize == 2 else _dense_32bit)(kernel, config, problem, beside)


def _dense_32bit(kernel: str, config: Config, problem: Conv1dProblem, beside: bool) -> tuple[str, Config]:
    if problem.K == 1 and beside:
        # with Snake and a residual 96 channels 484, 128x128x32 as block copies 1078; 128 channels 284 and 572, 384 263 and 478
        tile = {name: min(size, getattr(config, name)) for name, size in (("BLOCK_M", 64), ("BLOCK_N", 64), ("BLOCK_K", 32))}
        return "dense", replace(config, **tile, num_warps=4, num_stages=3)
    if kernel == "dense_tma" and (config.BLOCK_M, config.BLOCK_N) == (128, 128):
        slices = problem.K * problem.C_in_per_group // config.BLOCK_K
        if not beside:
            # 128 -> 128 K7 375, with 4 stages 459; 384 -> 384 700 and 719; channels that leave a tile unfilled, 96 -> 96 K7, as a
            # gathered GEMM 601, in block copies 702
            unfilled = problem.C_out_per_group < config.BLOCK_N
            return "dense" if unfilled else kernel, replace(config, num_stages=3)
        if slices <= 48:
            # 128 -> 128 K3 69, as 128x128 98, K7 100 and 122; 256 -> 256 K3 55 and 72
            return kernel, replace(config, BLOCK_M=64)
        # 256 -> 256 K7 88, in 4 warps 101
        return kernel, replace(config, num_warps=8)
    return kernel, config


def _dense_16bit(kernel: str, config: Config, problem: Conv1dProblem, beside: bool) -> tuple[str, Config]:
    if kernel == "dense_tma" and config.BLOCK_N == 128 and problem.C_out_per_group % 128 == 64:
        # 192 -> 192 K7 with Snake 532, as 128x128x64 702
        return kernel, replace(config, BLOCK_N=64)
    if kernel == "dense" and beside and config.BLOCK_N == 256:
        # 256 -> 256 of 8 x 2400 K3 32, as 128x256x64 43, K7 48 and 67
        return kernel, replace(config, BLOCK_M=64, BLOCK_N=128, num_warps=4)
    if kernel == "dense" and beside and (config.BLOCK_M, config.BLOCK_N) == (256, 64):
        # 64 -> 64 K7 77, as 256x64x64 94
        return kernel, replace(config, BLOCK_M=128, num_warps=4, weights_left=False)
    return kernel, config


def _halo(config: Config, problem: Conv1dProblem) -> Config:
    reach = (problem.K - 1) * problem.dilation
    if problem.K < 7 or reach > 18 or config.BLOCK_N > 64:
        # a longer reach leaves few outputs a tile
        return config
    if problem.dtype.itemsize == 4:
        # 64 -> 64 K7 144, in tiles of 256 158, in 4 warps 216; 32 -> 32 K7 194 and 231
        return replace(config, BLOCK_M=128, num_warps=8, weights_left=False)
    # 64 -> 64 K11 89, in 4 warps, two programs a multiprocessor, 136, K7 78 and 79
    return replace(config, num_warps=8, programs_per_sm=1) if config.BLOCK_N == 64 else config
