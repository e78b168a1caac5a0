"""Launch parameters of the weight-gradient kernels without tuning, by rules that were measured."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from torch_conv_triton.configs import Device
from torch_conv_triton.problem import Conv1dProblem, ceil_pow2, layout_of

# bytes of partial sums that a weight gradient may allocate
WORKSPACE_BYTES = 64 * 2**20
# positions that one float32 accumulator may sum while the workspace has room for more
POSITIONS_PER_SPLIT = 2**16


@dataclass(frozen=True, slots=True)
class WeightGradConfig:
    """Launch parameters of a weight gradient: BLOCK_O output channels x BLOCK_C columns, over BLOCK_L positions at a time.

    A column is an input channel at a tap; `tap_major`: the channels of one tap follow each other, else the taps of one channel.
    In the depthwise kernel BLOCK_C counts taps, in the banded one it is the length of a row. `splits`: shares that the positions
    are cut into, each a float32 copy of the gradient in the workspace unless there is one only. `grad_left` puts grad_output on
    the left of the product. `prefetch`: blocks are loaded ahead into registers instead of shared memory. `copy_to_nlc`: x is
    first copied to NLC, a workspace of the size of x.
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

    def __str__(self) -> str:
        flags = [name for name in ("tap_major", "grad_left", "prefetch", "copy_to_nlc") if getattr(self, name)]
        blocks = f"{self.BLOCK_O}x{self.BLOCK_C}x{self.BLOCK_L}"
        return " ".join([blocks, f"w{self.num_warps}", f"s{self.num_stages}", f"{self.splits} splits", *flags])


def with_splits(config: WeightGradConfig, programs: int, partial_bytes: int, problem: Conv1dProblem, device: Device):
    """The config with as many splits as fill the device about twice, keep sums short and fit the workspace.

    `programs` run for one split, whose partial sums take `partial_bytes`.
    """
    blocks = problem.N * -(-problem.L_out // config.BLOCK_L)
    wanted = max(2 * device.sm_count // programs, problem.N * problem.L_out // POSITIONS_PER_SPLIT)
    # a program with little to sum spends its time on beginning and ending
    return replace(config, splits=max(1, min(wanted, blocks // 4, WORKSPACE_BYTES // partial_bytes)))


def weight_grad_config(problem: Conv1dProblem, device: Device) -> WeightGradConfig:
    """Tile of the weight gradient as a matrix product; x is the problem's input and y's strides are those of grad_output."""
    C_in, C_out = problem.C_in_per_group, problem.C_out_per_group
    nlc = problem.layout == "NLC"
    tap_major = nlc and C_in >= 16
    columns = C_in * problem.K
    BLOCK_O = min(128, max(16, ceil_pow2(C_out)))
    BLOCK_C = min(128, max(16, ceil_pow2(C_in if tap_major and C_in >= 64 else columns)))
    half = problem.dtype.itemsize == 2
    config = WeightGradConfig(
        BLOCK_O,
        BLOCK_C,
        64 if half else 32,
        num_warps=8 if BLOCK_O * BLOCK_C >= 128 * 128 else 4,
        tap_major=tap_major,
        # the left operand is the M of the product, of which warp-group instructions need 64
        grad_left=BLOCK_O >= 64 or BLOCK_C < 64,
        prefetch=half and not nlc,
    )
    three_products = problem.dtype == torch.float32 and problem.precision == "ieee"
    if device.capability not in (90, 100) or three_products:
        # accumulators and operands share the registers
        config = replace(config, BLOCK_O=min(config.BLOCK_O, 64), BLOCK_C=min(config.BLOCK_C, 64), num_warps=4)
    while config.num_stages > 1 and pipeline_bytes(config, problem.dtype.itemsize) > device.shared_memory - 4096:
        config = replace(config, num_stages=config.num_stages - 1)
    programs = -(-C_out // config.BLOCK_O) * -(-columns // config.BLOCK_C) * problem.groups
    return with_splits(config, programs, 4 * problem.C_out * columns, problem, device)


def pipeline_bytes(config: WeightGradConfig, itemsize: int) -> int:
    """Shared memory of the operand tiles."""
    return config.num_stages * (config.BLOCK_O + config.BLOCK_C) * config.BLOCK_L * itemsize


def depthwise_weight_grad_config(problem: Conv1dProblem, device: Device) -> WeightGradConfig:
    """Tiles that are wide along the contiguous dimension of grad_output and x."""
    BLOCK_K = min(8, ceil_pow2(problem.K))
    per_vector = 16 // problem.dtype.itemsize
    if problem.layout == "NLC":
        channels = min(64, max(16, ceil_pow2(problem.C_out)))
        config = WeightGradConfig(channels, BLOCK_K, 2 * 32 * per_vector // channels, num_warps=2, num_stages=1)
    else:
        length = min(256, max(16, ceil_pow2(problem.L_out)))
        config = WeightGradConfig(min(512 // length, ceil_pow2(problem.C_out)), BLOCK_K, length, num_warps=4, num_stages=1)
    programs = -(-problem.C_out // config.BLOCK_O) * -(-problem.K // BLOCK_K)
    return with_splits(config, programs, 4 * problem.C_out * problem.K, problem, device)


def banded_weight_grad_config(problem: Conv1dProblem, device: Device) -> WeightGradConfig:
    """Rows of 16 positions, 32 for long filters; a program walks over the positions of a few channels."""
    R = 16 if problem.K <= 16 else 32
    BLOCK_O = 4 if problem.layout == "NCL" else 16
    config = WeightGradConfig(BLOCK_O, R, 16 * R, num_warps=4, num_stages=2)
    programs = -(-problem.C_out // BLOCK_O)
    return with_splits(config, programs, 4 * problem.C_out * (problem.K + R - 1) * R, problem, device)


def grad_layout(problem: Conv1dProblem) -> str:
    """Layout of grad_output, whose strides are the problem's y_strides."""
    return layout_of(problem.y_strides, problem.C_out, problem.L_out)
