"""Launch parameters of the weight-gradient kernels without tuning, by rules that were measured.

Figures in comments are ms on an H200 of cases of the benchmark suite, named with BLOCK_O x BLOCK_C x BLOCK_L.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from torch_conv_triton.configs import Device
from torch_conv_triton.problem import INT32_MAX, Conv1dProblem, ceil_pow2, layout_of

# bytes of partial sums that a weight gradient may allocate, or a quarter of what it reads where that is more
WORKSPACE_BYTES = 64 * 2**20
# Positions that one accumulator may sum while the workspace has room for more. Tensor cores cut off what they add, so the error
# grows with them: 1.5e-4 after 65536, 3.5e-5 after 16384, where rounding to TF32 is 2.9e-4.
POSITIONS_PER_SPLIT = 2**15


@dataclass(frozen=True, slots=True)
class WeightGradConfig:
    """Launch parameters of a weight gradient: BLOCK_O output channels x BLOCK_C columns, over BLOCK_L positions at a time.

    A column is an input channel at a tap; `tap_major`: the channels of one tap follow each other, else the taps of one channel.
    In the depthwise kernel BLOCK_C counts taps, in the banded one it is the length of a row. `splits`: shares that the positions
    are cut into, each a float32 copy of the gradient in the workspace unless there is one only. `grad_left` puts grad_output on
    the left of the product. `prefetch`: blocks are loaded ahead into registers instead of shared memory. `copy_to_nlc`: what
    of grad_output and x is not NLC is copied to NLC first, a workspace of their size. `exchanged`, at stride 1 only: x and
    grad_output take each other's place, so BLOCK_O counts input channels and a column is an output channel at a tap. `with_bias`:
    grad_output is added up too, which is the gradient of the bias, with partial sums of its own in the workspace. `tap_rows`, of
    the product of rows: x is copied for each tap.
    """

    BLOCK_O: int
    BLOCK_C: int
    BLOCK_L: int
    splits: int = 1
    num_warps: int = 4
    num_stages: int = 3
    tap_major: bool = False
    grad_left: bool = True
    prefetch: bool = False
    copy_to_nlc: bool = False
    exchanged: bool = False
    with_bias: bool = False
    tap_rows: bool = False

    def __str__(self) -> str:
        flags = [
            name
            for name in ("tap_major", "grad_left", "prefetch", "copy_to_nlc", "exchanged", "with_bias", "tap_rows")
            if getattr(self, name)
        ]
        blocks = f"{self.BLOCK_O}x{self.BLOCK_C}x{self.BLOCK_L}"
        return " ".join([blocks, f"w{self.num_warps}", f"s{self.num_stages}", f"{self.splits} splits", *flags])


def with_splits(
    config: WeightGradConfig, programs: int, per_sm: int, partial_bytes: int, problem: Conv1dProblem, device: Device
) -> WeightGradConfig:
    """The config with as many splits as give each multiprocessor `per_sm` programs, keep sums short and fit the workspace.

    `programs` run for one split, whose partial sums take `partial_bytes`.
    """
    blocks = problem.N * -(-problem.L_out // config.BLOCK_L)
    wanted = max(per_sm * device.sm_count // programs, problem.N * problem.L_out // POSITIONS_PER_SPLIT)
    # a program with little to sum spends its time on beginning and ending
    return replace(config, splits=max(1, min(wanted, blocks // 4, workspace_bytes(problem) // partial_bytes)))


def workspace_bytes(problem: Conv1dProblem) -> int:
    """Bytes that the partial sums of a weight gradient may take."""
    return max(WORKSPACE_BYTES, sum(problem.extents) * problem.dtype.itemsize // 4)


def partial_sums_bytes(kernel: str, config: WeightGradConfig, problem: Conv1dProblem) -> int:
    """Bytes that the partial sums of a weight gradient take; none where one program makes each sum."""
    banded = kernel == "weight_grad_banded"
    if config.splits == 1 and not banded:
        return 0
    partial = (problem.K + config.BLOCK_C - 1) * config.BLOCK_C if banded else problem.C_in_per_group * problem.K
    return config.splits * 4 * problem.C_out * (partial + config.with_bias)


def weight_grad_config(problem: Conv1dProblem, device: Device) -> WeightGradConfig:
    """Tile of the weight gradient as a matrix product; x is the problem's input and y's strides are those of grad_output."""
    if _is_better_exchanged(problem):
        return replace(_weight_grad_config(exchanged(problem), device), exchanged=True)
    return _weight_grad_config(problem, device)


def _is_better_exchanged(problem: Conv1dProblem) -> bool:
    """Whether few rows of grad_output are better shifted by taps than the many rows of x."""
    y_layout = layout_of(problem.y_strides, problem.C_out, problem.L_out)
    few = problem.C_out_per_group <= 16 and problem.C_out_per_group < problem.C_in_per_group
    return few and problem.stride == 1 and problem.layout == y_layout == "NCL"


def exchanged(problem: Conv1dProblem) -> Conv1dProblem:
    """At stride 1, the problem in which x and grad_output stand in each other's place: its gradient has the taps reversed."""
    return replace(
        problem,
        C_in=problem.C_out,
        L_in=problem.L_out,
        C_out=problem.C_in,
        padding=problem.dilation * (problem.K - 1) - problem.padding,
        x_strides=problem.y_strides,
        y_strides=problem.x_strides,
    )


def _weight_grad_config(problem: Conv1dProblem, device: Device) -> WeightGradConfig:
    if problem.layout == "NLC":
        config = _tile_of_rows(problem)
    else:
        config = _gathered_tile_16bit(problem) if problem.dtype.itemsize == 2 else _gathered_tile_32bit(problem)
    three_products = problem.dtype == torch.float32 and problem.precision == "ieee"
    if device.capability not in (90, 100) or three_products:
        # accumulators, operands and what is loaded ahead share the registers
        BLOCK_L = min(config.BLOCK_L, 32) if config.prefetch else config.BLOCK_L
        config = replace(config, BLOCK_O=min(config.BLOCK_O, 64), BLOCK_C=min(config.BLOCK_C, 64), BLOCK_L=BLOCK_L, num_warps=4)
    # On the left lies the M of the product, of which warp-group instructions need 64.
    config = replace(config, grad_left=config.BLOCK_O >= 64 or config.BLOCK_C < 64)
    while config.num_stages > 1 and pipeline_bytes(config, problem.dtype.itemsize) > device.shared_memory - 4096:
        config = replace(config, num_stages=config.num_stages - 1)
    columns = problem.C_in_per_group * problem.K
    programs = -(-problem.C_out_per_group // config.BLOCK_O) * -(-columns // config.BLOCK_C) * problem.groups
    per_sm = 2 if config.BLOCK_O * config.BLOCK_C >= 64 * 128 else 4
    return with_splits(config, programs, per_sm, 4 * problem.C_out * columns, problem, device)


def _blocks(problem: Conv1dProblem, columns: int) -> tuple[int, int]:
    """BLOCK_O, and BLOCK_C of at most `columns`: powers of two that the problem fills."""
    BLOCK_O = min(128, max(16, ceil_pow2(problem.C_out_per_group)))
    return BLOCK_O, min(columns, max(16, ceil_pow2(problem.C_in_per_group * problem.K)))


def _tile_of_rows(problem: Conv1dProblem) -> WeightGradConfig:
    """x in NLC: a column's channels are contiguous, and loads are wide."""
    C_in = problem.C_in_per_group
    if problem.dtype.itemsize == 4:
        # s_seed 128x64x64 2.19, 128x64x32 2.56; x_hifi32_k3 32x32x64 0.151, 32x128x32 0.256
        BLOCK_O, BLOCK_C = _blocks(problem, min(64, max(16, ceil_pow2(C_in))) if C_in >= 16 else 64)
        return WeightGradConfig(BLOCK_O, BLOCK_C, 64, num_warps=4, tap_major=C_in >= 16)
    if C_in < 64:
        # x_hifi32 32x256x64 0.150, 32x128x32 0.189; p28 64x128x64 0.341
        BLOCK_O, BLOCK_C = _blocks(problem, 256 if problem.C_out_per_group <= 32 else 128)
        return WeightGradConfig(BLOCK_O, BLOCK_C, 64, num_warps=4, tap_major=C_in >= 16)
    # p08 128x128x64 0.888, 128x64x64 1.2; s_seed 128x64x64 w4 0.765, p04 (192 channels) 0.039
    BLOCK_O, BLOCK_C = _blocks(problem, 128 if C_in % 128 == 0 else 64)
    return WeightGradConfig(BLOCK_O, BLOCK_C, 64, num_warps=8 if BLOCK_O * BLOCK_C == 128 * 128 else 4, tap_major=True)


def _gathered_tile_32bit(problem: Conv1dProblem) -> WeightGradConfig:
    """x in NCL or strided: taps shift along the contiguous dimension. Blocks go through registers to be rounded anyway."""
    C_in, C_out = problem.C_in_per_group, problem.C_out_per_group
    if C_out <= 64:
        # p17 16x128x32 tap_major 0.244, not 0.30; p06 64x128x32 0.33, 64x128x16 0.45
        BLOCK_O, BLOCK_C = _blocks(problem, 128)
        BLOCK_L = 32 if BLOCK_C > 16 else 64
        return WeightGradConfig(BLOCK_O, BLOCK_C, BLOCK_L, num_stages=1, prefetch=True, tap_major=C_in >= 32)
    if _aligned_taps(problem):
        # p15 128x128x32 w8 0.22, prefetched 0.26; p03 0.116 and 0.162
        BLOCK_O, BLOCK_C = _blocks(problem, 128)
        return WeightGradConfig(BLOCK_O, BLOCK_C, 32, num_warps=8, tap_major=C_in >= 32)
    if C_in >= 96 and problem.flops > 50e9 and problem.stride == 1:
        # s_kb64 128x128x16 w4 3.13, 128x64x32 w8 3.85; x_dac96 1.42, 1.64; with less to compute p15 0.263, 0.278
        return WeightGradConfig(128, 128, 16, num_warps=4, num_stages=1, prefetch=True, tap_major=True)
    # Taps first where a tile is one tap; with a stride, the taps of a channel share cache lines: p18 0.297, tap_major 0.437.
    # s_seed 128x64x32 w4 2.6, prefetched into shared memory 14.7
    whole = C_in >= 128 and problem.stride < 4
    BLOCK_O, BLOCK_C = _blocks(problem, 64)
    num_warps = 8 if C_in >= 128 else 4
    return WeightGradConfig(BLOCK_O, BLOCK_C, 32, num_warps=num_warps, num_stages=1, prefetch=True, tap_major=whole)


def _aligned_taps(problem: Conv1dProblem) -> bool:
    """Whether x under every tap of a block starts on a vector, as Triton can see: 16 divides every shift."""
    shifts = (problem.L_in, problem.padding, problem.dilation * (problem.K > 1))
    return problem.layout == "NCL" and problem.aligned and problem.stride == 1 and not any(shift % 16 for shift in shifts)


def _gathered_tile_16bit(problem: Conv1dProblem) -> WeightGradConfig:
    """x in NCL or strided: two bytes at a time, so many channels are worth a copy to NLC."""
    C_in, C_out = problem.C_in_per_group, problem.C_out_per_group
    if min(C_in, C_out) >= 128 and problem.K > 1:
        # p08 128x256x64 1.25, 128x128x64 1.34, without the copy 2.53; p16 128x64x64 0.212, without 0.356; p10 0.350, 0.733
        long = problem.N * problem.L_out >= 100_000
        BLOCK_C = 64 if not long else 256 if C_in % 256 == 0 else 128
        return WeightGradConfig(128, BLOCK_C, 64, num_warps=8 if long else 4, tap_major=True, copy_to_nlc=True)
    if C_out > 64:
        # s_seed 128x64x128 1.77, 128x64x64 1.84; x_dna 0.512, 0.606; p11 (10 columns) 128x16x64 0.217
        BLOCK_O, BLOCK_C = _blocks(problem, 64)
        return WeightGradConfig(BLOCK_O, BLOCK_C, 128 if BLOCK_C == 64 else 64, num_warps=8, num_stages=1, prefetch=True)
    # x_hifi32_bf16 32x256x32 w8 tap_major 0.497, not 0.66; x_pos 64x128x64 w4 tap_major 0.634, not 0.79
    BLOCK_O, BLOCK_C = _blocks(problem, 128 if C_out > 32 else 256)
    BLOCK_L, num_warps = (64, 4) if BLOCK_C <= 128 else (32, 8)
    return WeightGradConfig(BLOCK_O, BLOCK_C, BLOCK_L, num_warps=num_warps, num_stages=1, prefetch=True, tap_major=C_in >= 32)


def pipeline_bytes(config: WeightGradConfig, itemsize: int) -> int:
    """Shared memory of the operand tiles."""
    return config.num_stages * (config.BLOCK_O + config.BLOCK_C) * config.BLOCK_L * itemsize


def products_an_element(problem: Conv1dProblem) -> float:
    """Multiplications and additions for each element of x and grad_output, which tells whether copies of them pay."""
    return problem.flops / sum(problem.extents)


def prefers_rows(problem: Conv1dProblem) -> bool:
    """Whether the products are worth copies into rows: 64 -> 64 K11 0.284 against 0.392, p06 (K 3) 0.493 against 0.33."""
    if problem.dtype != torch.float32 or problem.precision != "tf32" or problem.layout == "NLC":
        return False
    # strided x is gathered sample by sample without them: 96 -> 192 K4 s2 0.672 against 0.997; p09 and p30 more so
    least = 320 if problem.stride > 1 else 640
    return products_an_element(problem) >= least and problem.N * problem.L_out >= 12_000


def weight_grad_rows_config(problem: Conv1dProblem, device: Device) -> WeightGradConfig:
    """Tile of the product of rows: as large as fills the GPU, for what passes through the caches limits it."""
    channels = problem.C_out_per_group
    if channels > 128:
        # p14 256x128 0.517, 128x256 0.567; p13 0.407 and 0.429, 128x128 0.477
        config = WeightGradConfig(256, 128, 32, num_warps=8)
    elif channels > 64:
        # p05 128x256 0.706, 128x128 0.731, 256x128 1.03
        config = WeightGradConfig(128, 256, 32, num_warps=8)
    else:
        # x_hifi64_k11 64x128 w4 0.284, 64x256 w8 0.295; p31 32x128 w4 0.148, 32x256 w8 0.160
        config = WeightGradConfig(max(16, ceil_pow2(channels)), 128, 32, grad_left=channels > 32)
    columns = problem.C_in_per_group * problem.K
    config = replace(config, BLOCK_C=min(config.BLOCK_C, max(16, ceil_pow2(columns))))
    if device.capability not in (90, 100):
        # accumulators and operands share the registers
        config = replace(config, BLOCK_O=min(config.BLOCK_O, 128), BLOCK_C=min(config.BLOCK_C, 64))
    config = replace(config, grad_left=config.BLOCK_O >= 64 or config.BLOCK_C < 64)
    while config.num_stages > 1 and pipeline_bytes(config, problem.dtype.itemsize) > device.shared_memory - 4096:
        config = replace(config, num_stages=config.num_stages - 1)
    programs = -(-channels // config.BLOCK_O) * -(-columns // config.BLOCK_C) * problem.groups
    per_sm = 1 if config.num_warps == 8 else 2
    return with_splits(config, programs, per_sm, 4 * problem.C_out * columns, problem, device)


def pointwise_refusal(problem: Conv1dProblem, device: Device, config: WeightGradConfig) -> str | None:
    """Why this weight gradient is no product of block copies with this config, or None."""
    if device.capability < 90:
        return "tensor descriptors need sm_90"
    if problem.dtype.itemsize != 2 or problem.K > 1 or problem.stride > 1 or problem.padding:
        return "only 16-bit pointwise convolutions are products of rows of channels as they are"
    if (problem.C_in_per_group | problem.C_out_per_group) % 8 or problem.N * problem.L_out > INT32_MAX:
        return "channels of a group are not multiples of 16 bytes, or rows are too many"
    for C, (stride_n, stride_c, stride_l) in ((problem.C_in, problem.x_strides), (problem.C_out, problem.y_strides)):
        copied = config.copy_to_nlc and stride_c != 1
        even = stride_c == 1 and stride_l % 8 == 0 and stride_l >= C and (problem.N == 1 or stride_n == problem.L_out * stride_l)
        if not (copied or (even and problem.aligned)):
            return "positions are not aligned rows, equally far apart"
    return None


def pointwise_config(problem: Conv1dProblem, device: Device) -> WeightGradConfig:
    """Tile of the product of block copies: a deep pipeline, as most grids give a multiprocessor one program."""
    BLOCK_O, BLOCK_C = (min(128, max(16, ceil_pow2(channels))) for channels in (problem.C_out_per_group, problem.C_in_per_group))
    # p02 in four warps 0.0439, in eight 0.0441; elsewhere accumulators and operands share the registers
    num_warps = 4 if device.capability in (90, 100) else 8
    copied = problem.layout != "NLC" or layout_of(problem.y_strides, problem.C_out, problem.L_out) != "NLC"
    config = WeightGradConfig(BLOCK_O, BLOCK_C, 64, num_warps=num_warps, num_stages=4, copy_to_nlc=copied)
    config = replace(config, grad_left=BLOCK_O >= 64 or BLOCK_C < 64)
    while config.num_stages > 1 and pipeline_bytes(config, problem.dtype.itemsize) > device.shared_memory - 4096:
        config = replace(config, num_stages=config.num_stages - 1)
    programs = -(-problem.C_out_per_group // BLOCK_O) * -(-problem.C_in_per_group // BLOCK_C) * problem.groups
    return with_splits(config, programs, 1, 4 * problem.C_out * problem.C_in_per_group, problem, device)


def weight_grad_config_refusal(kernel: str, config: WeightGradConfig, problem: Conv1dProblem, device: Device) -> str | None:
    """Why this kernel cannot compute the weight gradient with this config, or should not, or None."""
    if config.with_bias and not adds_up_grad_output(kernel, config, problem):
        return "grad_output does not pass through the registers of a few tiles, where it could be added up"
    if config.exchanged and (problem.stride > 1 or kernel != "weight_grad"):
        return "x and grad_output take each other's place at stride 1 only"
    if config.tap_rows and (
        kernel != "weight_grad_rows" or device.capability < 90 or tap_rows_bytes(problem) > 2 * WORKSPACE_BYTES
    ):
        return "x is not copied for each tap, or is too large for that, or there are no block copies"
    if kernel == "weight_grad_pointwise" and (reason := pointwise_refusal(problem, device, config)):
        return reason
    most = 128
    if kernel == "weight_grad_banded":
        window = ceil_pow2(problem.K + config.BLOCK_C - 1 + -problem.padding % config.BLOCK_C)
        accumulators = config.BLOCK_O * config.BLOCK_C * window
        if config.BLOCK_C < 16 or config.BLOCK_L % config.BLOCK_C or config.BLOCK_L // config.BLOCK_C < 16:
            return "tensor cores take no tile below 16"
    elif kernel == "weight_grad_depthwise":
        accumulators, most = config.BLOCK_O * config.BLOCK_L * config.BLOCK_C, 64
    elif kernel == "weight_grad_sliding":
        # a sum a tap, and of 16 bits half as many registers for what is loaded
        run, halves = config.BLOCK_C, problem.dtype.itemsize == 2
        held = problem.K + (2 * run + problem.K - 1) / (2 if halves else 1)
        accumulators, most = config.BLOCK_O * config.BLOCK_L // run * held, 160
    else:
        accumulators = config.BLOCK_O * config.BLOCK_C
        if min(config.BLOCK_O, config.BLOCK_C, config.BLOCK_L) < 16:
            return "tensor cores take no tile below 16"
        if pipeline_bytes(config, problem.dtype.itemsize) > device.shared_memory - 4096:
            return "it does not fit into the shared memory of a block"
        if device.capability not in (90, 100) or (problem.dtype == torch.float32 and problem.precision == "ieee"):
            # accumulators and operands share the registers
            most = 64
    if accumulators > most * 32 * config.num_warps:
        return "it does not fit into the registers of a block"
    if config.splits > 1 and partial_sums_bytes(kernel, config, problem) > workspace_bytes(problem):
        return "the partial sums do not fit into the workspace"
    if problem.N * problem.L_out > 4 * POSITIONS_PER_SPLIT * config.splits:
        return "an accumulator would sum too many positions"
    return None


def tap_rows_bytes(problem: Conv1dProblem) -> int:
    """Bytes of what each tap reads of x."""
    return problem.N * problem.L_out * problem.C_in * problem.K * problem.dtype.itemsize


def adds_up_grad_output(kernel: str, config: WeightGradConfig, problem: Conv1dProblem) -> bool:
    """Whether a pass for the weight's gradient gives the bias's too, and cheaper than one of its own.

    Every tile of columns adds up the grad_output that it reads, where that is prefetched into registers: p06 (3 tiles) 0.364,
    apart 0.387; p01 (8) 0.081 and 0.075. Of 16 bits it is unpacked for that, in as many registers again: the whole backward
    of p11 0.83, apart 0.67.
    """
    if kernel != "weight_grad":
        return kernel != "weight_grad_pointwise"
    tiles = -(-problem.C_in_per_group * problem.K // config.BLOCK_C)
    return config.prefetch and not config.exchanged and problem.dtype.itemsize == 4 and tiles <= 4


def depthwise_weight_grad_config(problem: Conv1dProblem, device: Device) -> WeightGradConfig:
    """Tiles that are wide along the contiguous dimension of x, small, and many."""
    BLOCK_K = min(4, ceil_pow2(problem.K))
    if problem.layout == "NLC":
        # p20 128x4x8 0.148, 64x4x32 0.172; p29 128x4x4 0.040, 128x8x16 0.044
        config = WeightGradConfig(min(128, max(16, ceil_pow2(problem.C_out))), BLOCK_K, 8, num_stages=1)
        if problem.dtype.itemsize == 4 and layout_of(problem.y_strides, problem.C_out, problem.L_out) == "NCL":
            # p29 with grad_output in NCL 32x4x32 0.047, 128x4x8 0.054
            config = replace(config, BLOCK_O=min(config.BLOCK_O, 32), BLOCK_L=32)
    elif problem.L_out < 16:
        # p24 0.0092
        config = WeightGradConfig(4, BLOCK_K, 32, num_warps=1, num_stages=1)
    else:
        # x_tasnet 2x4x512 0.096, 8x4x128 0.102; p32 2x4x512 0.027; x_mamba (16 bits) 8x4x128 0.202
        length = min(512 if problem.dtype.itemsize == 4 else 128, ceil_pow2(problem.L_out))
        # the longest were measured with two warps, where their running sums spill
        num_warps = 4 if length == 512 else 2
        config = WeightGradConfig(
            min(1024 // length, ceil_pow2(problem.C_out)), BLOCK_K, length, num_warps=num_warps, num_stages=1
        )
    programs = -(-problem.C_out // config.BLOCK_O) * -(-problem.K // BLOCK_K)
    return with_splits(config, programs, 12, 4 * problem.C_out * problem.K, problem, device)


def sliding_refusal(problem: Conv1dProblem) -> str | None:
    """Why threads cannot slide along the positions of a depthwise weight gradient, or None."""
    if problem.stride > 1 or problem.dilation > 1 or problem.K > 9 or problem.C_in != problem.C_out:
        return "neighbouring positions share no samples, or taps are too many"
    if problem.layout != "NLC" or layout_of(problem.y_strides, problem.C_out, problem.L_out) != "NLC":
        return "x or grad_output is not channels-last"
    return None


def sliding_weight_grad_config(problem: Conv1dProblem, device: Device) -> WeightGradConfig:
    """Tiles in which a thread has 16 bytes of channels and BLOCK_C positions in a row."""
    run, vector, num_warps = (8 if problem.K <= 4 and problem.dtype.itemsize == 2 else 4), 16 // problem.dtype.itemsize, 4
    BLOCK_O = min(64, max(16, ceil_pow2(problem.C_out)))
    config = WeightGradConfig(BLOCK_O, run, 32 * num_warps * vector // BLOCK_O * run, num_warps=num_warps, num_stages=1)
    return with_splits(config, -(-problem.C_out // BLOCK_O), 8, 4 * problem.C_out * problem.K, problem, device)


def banded_weight_grad_config(problem: Conv1dProblem, device: Device) -> WeightGradConfig:
    """Rows of 16 or 32 positions; a program walks over the positions of a few channels."""
    if problem.layout == "NLC":
        # x_conformer_nlc 8x16x256 w8 0.065
        config = WeightGradConfig(8, 16, 256, num_warps=8, num_stages=2)
    else:
        # x_conformer 4x32x512 0.059, 8x16x512 0.062; p27 4x32x512 0.071
        R = 16 if problem.K <= 16 else 32
        config = WeightGradConfig(4, R, 16 * R, num_warps=4, num_stages=2)
    programs = -(-problem.C_out // config.BLOCK_O)
    R = config.BLOCK_C
    return with_splits(config, programs, 2, 4 * problem.C_out * (problem.K + R - 1) * R, problem, device)


def bias_grad_config(shape: Sequence[int], strides: Sequence[int], itemsize: int, device: Device) -> WeightGradConfig:
    """Tiles of grad_output ``(N, C, L)`` that are wide along its contiguous dimension; BLOCK_C has no meaning."""
    N, C, L = shape
    if layout_of(strides, C, L) == "NLC":
        # 8 KiB in three stages, us, and 128 channels wide in one: p02 12.8, 16.7; p04 12.9, 15.6; p22 26.1, 29.5; p28 8.4, 12.9
        BLOCK_O = min(64, max(16, ceil_pow2(C)))
        BLOCK_L, num_stages, programs = 8192 // itemsize // BLOCK_O, 3, 6
    else:
        BLOCK_L = min(1024, max(16, ceil_pow2(L)))
        BLOCK_O, num_stages, programs = min(2048 // BLOCK_L, ceil_pow2(C)), 1, 8
    blocks = N * -(-L // BLOCK_L)
    splits = programs * device.sm_count // -(-C // BLOCK_O)
    return WeightGradConfig(BLOCK_O, 1, BLOCK_L, splits=max(1, min(splits, blocks // 4)), num_stages=num_stages)
