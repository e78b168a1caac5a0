"""Where aten is faster than our kernels: rules read off measurements on an H200, so that dispatch is never the slower choice.

Figures in comments are ms, ours against [aten's], of layers of the models of the benchmark at full size.
"""

from __future__ import annotations

from torch_conv_triton.configs import copies_to_nlc
from torch_conv_triton.configs_depthwise import short_refusal
from torch_conv_triton.configs_thin import few_outputs_refusal
from torch_conv_triton.problem import Conv1dProblem

# a problem below both takes a GPU less time than a launch takes the host
LAUNCH_BYTES = 8_000_000
LAUNCH_FLOPS = 1_000_000_000
# a compute-bound tile has this many outputs; a GPU has about a hundred places to put one
TILE = 128 * 128


def faster_in_aten(problem: Conv1dProblem) -> str | None:
    """Why aten is the faster, or None. A bias costs aten a pass over the output, and our kernels nothing."""
    if problem.layout != "NCL":
        # aten copies x to NCL first
        return None
    if problem.is_depthwise:
        return _depthwise(problem)
    if problem.groups > 1:
        return None
    if problem.transposed:
        return _transposed(problem)
    if problem.K == 1 and problem.stride == 1:
        return _pointwise(problem)
    if problem.dtype.itemsize == 4 and problem.C_in >= 64:
        return _dense_32bit(problem)
    return None


def launch_bound(problem: Conv1dProblem) -> bool:
    """Whether the host takes longer to reach an operator of ours and to launch than the GPU to compute the problem."""
    return problem.bytes < LAUNCH_BYTES and problem.flops < LAUNCH_FLOPS


def _depthwise(problem: Conv1dProblem) -> str | None:
    if problem.L_out < 16 and launch_bound(problem) and short_refusal(problem):
        # taps that no thread holds: 64 x 5120 x 4 K4 in float32, tap by tap, 14.1 us [6.2]
        return "a depthwise tile is wider than so short an output"
    return None


def _transposed(problem: Conv1dProblem) -> str | None:
    # 1024 -> 512 K16 s5 0.223 [0.215, without bias 0.201]; where the stride divides the taps 1536 -> 768 K16 s8 0.247 [without
    # bias 0.384], 512 -> 256 K16 s8 0.117 [0.160], 2048 -> 1024 K8 s4 0.244 [0.306], 256 -> 128 K10 s5 0.205 [0.255]
    if problem.C_in * problem.K >= 16384 and problem.K % problem.stride and problem.N * problem.L_in >= 1024:
        return "cuDNN is faster at transposed convolutions of many channels whose taps the stride does not divide"
    return None


def _pointwise(problem: Conv1dProblem) -> str | None:
    if problem.dtype.itemsize == 2:
        # 768 -> 768 0.092 [0.038, without bias 0.021], 1024 -> 1024 0.077 [0.073, 0.055]
        wins = not problem.has_bias or min(problem.C_in, problem.C_out) >= 256
    else:
        # 192 -> 192 of length 110080 0.355 [0.465, without bias 0.206]; a length that breaks alignment costs aten the gain:
        # 128 -> 512 of length 4001 0.101 [0.221, 0.119]
        wins = not problem.has_bias and problem.L_in % 4 == 0
    return "a pointwise convolution is one matrix product, which cuBLAS has" if wins else None


def _dense_32bit(problem: Conv1dProblem) -> str | None:
    if problem.C_out <= 4 and not few_outputs_refusal(problem):
        # 1024 -> 1 K3 of 32 x 128 0.019 [0.048]
        return None
    reduction = problem.C_in * problem.K
    tiles = problem.N * problem.L_out * problem.C_out // TILE
    # 512 -> 128 K7 of 8 x 756 0.098 [0.059]; small ones are ours, in us: 1x512x256 K3 18.5 [23.1 without bias], 1x128x4096 K7
    # 20.8 [15.3]; so are short ones, p25 0.043 [0.063 without bias]
    if problem.C_in >= 128 and tiles < 64 and problem.flops > 500e6 and problem.L_out >= 128:
        return "too few tiles to fill the GPU, where cuDNN splits the reduction"
    if copies_to_nlc(problem) and problem.C_in % 32 == 0:
        # p09 0.470 [0.475 without bias], x_k7c768 0.358 [0.396], x_k7c192 0.959 [1.124]
        return None
    if problem.stride > 1:
        # gathered 250 -> 250 K48 s2 0.596 [0.437]; 128 -> 256 K8 s4 0.440 [0.791]
        slower = reduction >= 1280 and problem.C_in < 512
    elif problem.has_bias:
        # 250 -> 2000 K32 2.04 [1.32]
        slower = reduction > 6000 and _short_reach(problem)
    else:
        # in channels that are no whole blocks, or 3 taps: 250 -> 250 K7 of 16 x 500 0.104 [0.090]; small ones of 3 taps are
        # ours, in us: 256 -> 256 of length 100 10.7 [14.4], 512 -> 512 18.3 [25.2], but 256 -> 256 K7 26.4 [20.2]
        small = problem.K <= 3 and problem.flops <= 500e6
        slower = (reduction >= 1280 or problem.C_in >= 256) and _short_reach(problem) and not small
    return "cuDNN is faster at the products of many channels and taps" if slower else None


def _short_reach(problem: Conv1dProblem) -> bool:
    """Whether cuDNN's fast kernels take the dilation: 512 -> 512 K7 d3 0.218 [0.199 without bias], d9 0.217 [0.287]."""
    reach = (problem.K - 1) * problem.dilation
    return problem.dilation == 1 or reach <= (24 if problem.C_in >= 256 else 10)
