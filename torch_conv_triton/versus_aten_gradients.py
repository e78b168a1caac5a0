"""Where aten computes a gradient faster than our kernels: rules read off measurements on an H200.

Figures in comments are ms, ours against [aten's], of cases of the benchmark and layers of its models.
"""

from __future__ import annotations

from torch_conv_triton.configs_gradients import prefers_rows, products_an_element
from torch_conv_triton.problem import Conv1dProblem
from torch_conv_triton.versus_aten import TILE, faster_in_aten, launch_bound
from torch_conv_triton.weave import Weave

PRODUCTS = "cuDNN is faster at the products of many channels and taps"
CHANNELS_LAST = f"{PRODUCTS}, and fastest on channels-last tensors"
POINTWISE = "a pointwise convolution is one matrix product, which cuBLAS has"
LAUNCH = "so small that the launch decides, and aten's is the shorter"
# p24 (1.4 MB) 0.008 in aten, p26 (6 MB) 0.038
SMALL_SUM_BYTES = 2_000_000


def input_grad_faster_in_aten(problem: Conv1dProblem) -> str | None:
    """Why aten is the faster for an input gradient, or None; the problem is the convolution that computes it."""
    if launch_bound(problem):
        return LAUNCH
    if problem.layout != "NCL" or (problem.groups > 1 and not problem.is_depthwise):
        # aten copies grad_output to NCL first, and computes groups one by one
        return None
    if problem.is_depthwise:
        # p27 (K 63) 0.293 [0.105], p26 (K 31) 0.047 [0.080]: as in the forward
        return None if problem.transposed else faster_in_aten(problem)
    if problem.dtype.itemsize == 2:
        return _input_grad_16bit(problem)
    return _input_grad_32bit(problem)


def _input_grad_16bit(problem: Conv1dProblem) -> str | None:
    if problem.stride > 1 and Weave.of(problem.K, problem.stride, problem.dilation) is None:
        # s_seed_bf16 (stride 3, dilation 4) 13.8 [5.6]
        return "neither of stride and dilation divides the other, and phases are gathered one by one"
    if problem.stride == 1 and problem.K == 1:
        # a length that breaks alignment costs aten the gain: p02 0.074 [0.278]
        return POINTWISE if problem.L_in % 8 == 0 else None
    if problem.stride == 1 and problem.C_out <= 8 and problem.C_in >= 256:
        # 768 -> 4 K15 7.2 [3.4]; with a stride p11 (512 -> 1) 0.30 [1.63]
        return "cuDNN is faster from many channels to a few"
    return None


def _input_grad_32bit(problem: Conv1dProblem) -> str | None:
    if problem.stride > 1:
        # p09 0.40 [0.56], 64 -> 128 K4 s2 0.22 [0.44], s_seed_fp32 4.3 [9.3]
        return None
    channels = min(problem.C_in, problem.C_out)
    if problem.K == 1:
        return POINTWISE if problem.L_in % 4 == 0 else None
    if channels >= 256 and problem.L_out >= 16 and problem.N * problem.L_out * problem.C_out < 170 * TILE:
        # short ones are ours: p25 0.048 [0.076]
        return "too few tiles to fill the GPU, where cuDNN splits the reduction"
    # 192 -> 192 K7 0.97 [1.07], 128 -> 128 K7 0.48 [0.58], 256 -> 256 K11 0.27 [0.32], 512 -> 512 K5 0.32 [0.39]
    return None


def weight_grad_faster_in_aten(problem: Conv1dProblem) -> str | None:
    """Why aten is the faster for a weight gradient, or None; the problem is the forward's, with grad_output's strides for y's."""
    if problem.is_depthwise:
        # p24 (one token) 0.009 [0.155], p26 0.026 [0.205], p27 0.071 [0.325]
        return None
    if launch_bound(problem):
        return LAUNCH
    if problem.groups > 1 or min(problem.C_in, problem.C_out) < 128:
        # x_pos 0.634 [0.681]; s_seed_fp32 2.6 [5.6], x_dac96 1.42 [3.6], p06 (128 -> 64) 0.33 [0.62]
        return None
    if problem.layout != "NCL":
        # p02 0.044 [0.213, channels-last 0.040, which costs the host more]
        return None
    if problem.K == 1:
        # p03 0.116 [0.101]; a length that breaks alignment costs aten the gain: p01 0.058 [0.101]
        return POINTWISE if problem.dtype.itemsize == 2 or problem.L_in % 4 == 0 else None
    if problem.dtype.itemsize == 2:
        # p10 0.33 [0.27, channels-last 0.22], p08 1.24 [1.29, channels-last 1.08], 512 -> 512 K3 s2 0.48 [0.34, channels-last
        # 0.28]; p16 (dilated) 0.21 [0.28]
        return CHANNELS_LAST if problem.dilation == 1 else None
    if prefers_rows(problem):
        # p14 0.52 [0.75], p09 0.61 [0.71], p05 0.70 [0.76]; with less to sum 128 -> 128 K7 of 8 x 9600 0.172 [0.165,
        # channels-last 0.27]
        few = problem.N * problem.L_out < 100_000
        return PRODUCTS if few and products_an_element(problem) < 1000 else None
    # p18 (6880 positions) 0.213 [0.198, channels-last 0.200], p25 0.098 [0.082]; s_kb64 (K 3) 3.1 [4.5]. With rows of each tap,
    # which these two have from the table: 0.154 and 0.054
    slower = problem.K > 3 or (problem.dilation == 1 and min(problem.C_in, problem.C_out) >= 256)
    return PRODUCTS if slower else None
