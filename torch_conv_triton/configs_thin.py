"""Dense kernels for convolutions that are thin on one side: few channels in or out, many taps; which of them run and win.

Rules were measured on an H200; figures in comments are ms there, those of the other kernels in brackets.
"""

from __future__ import annotations

from dataclasses import replace
from math import gcd

import torch

from torch_conv_triton.configs import Config, Device, config_refusal, fit
from torch_conv_triton.problem import INT32_MAX, Conv1dProblem, ceil_pow2

THIN = ("dense_skewed", "dense_runs", "dense_frames", "dense_few_inputs", "dense_few_outputs")
# elements of x, or of the weight, that a thread holds
MOST_HELD = 64


def thin_choices(problem: Conv1dProblem, device: Device) -> list[tuple[bool, str, Config, str]]:
    """The kernels for thin convolutions that can run a plain one, as (whether it wins, name, config, reason), the best last."""
    configs = (
        ("dense_skewed", skewed_config(problem), _prefers_skewed, "rows start off 16 bytes: a tile's channels start alike"),
        ("dense_runs", runs_config(problem, device), _prefers_runs, "many taps: outputs in a row are columns of one product"),
        ("dense_frames", frames_config(problem, device), _prefers_frames, "windows a stride apart are rows of a matrix"),
        ("dense_few_inputs", few_inputs_config(problem), _prefers_few_inputs, "few samples an output: it writes, mostly"),
        ("dense_few_outputs", few_outputs_config(problem, device), _prefers_few_outputs, "few channels out: sums in registers"),
    )
    return [
        (wins(problem), name, config, reason)
        for name, config, wins, reason in configs
        if not thin_refusal(name, config, problem, device)
    ]


def thin_refusal(kernel: str, config: Config, problem: Conv1dProblem, device: Device) -> str | None:
    """Why one of these kernels cannot run a plain convolution with this config, or None."""
    if kernel == "dense_few_outputs":
        return few_outputs_refusal(problem) or _too_many_a_thread(problem, config)
    if kernel == "dense_few_inputs":
        return _few_inputs_refusal(problem) or _too_many_a_thread(problem, config)
    own = {"dense_runs": _runs_refusal, "dense_frames": _frames_refusal, "dense_skewed": _skewed_refusal}[kernel]
    return own(problem, device, config) or config_refusal(config, problem, device)


def vector_length(problem: Conv1dProblem) -> int:
    """Elements in 16 bytes."""
    return 16 // problem.dtype.itemsize


def skew(problem: Conv1dProblem) -> int:
    """Elements by which a channel of y starts further from 16 bytes than the one before."""
    return problem.y_strides[1] % vector_length(problem)


def skew_refusal(problem: Conv1dProblem) -> str | None:
    """Why channels do not start off 16 bytes in the same way in every sample of y, or None."""
    if problem.y_strides[2] != 1:
        return "rows of the output are not contiguous"
    if problem.N > 1 and problem.y_strides[0] % vector_length(problem):
        return "samples of the output do not start on 16 bytes"
    return None


def _window(problem: Conv1dProblem, outputs: int) -> int:
    """Samples of a channel that a thread holds for so many outputs in a row."""
    vector = vector_length(problem)
    return outputs + (problem.K - 1) * problem.dilation + 2 * vector


def _too_many_a_thread(problem: Conv1dProblem, config: Config) -> str | None:
    vector = vector_length(problem)
    if config.BLOCK_M % vector or (config.BLOCK_N % vector and config.BLOCK_N > 1):
        return "tiles end within vectors"
    vectors = config.BLOCK_M * max(config.BLOCK_K, 1) // (32 * config.num_warps * vector)
    return "a thread would hold too many outputs" if vectors > 4 else None


def few_outputs_refusal(problem: Conv1dProblem) -> str | None:
    """Why sums over channels cannot be held in registers, or None."""
    if problem.stride > 1 or problem.groups > 1:
        return "neighbouring outputs share no samples"
    if problem.x_strides[2] != 1:
        return "rows of x are not contiguous"
    vector = vector_length(problem)
    if problem.C_out > 8 or _window(problem, vector) > MOST_HELD or problem.C_out * problem.K > MOST_HELD:
        return "the samples and weights of an output do not fit the registers"
    return None


def _prefers_few_outputs(problem: Conv1dProblem) -> bool:
    # p23 0.073 [0.274], in bfloat16 0.045 [0.320], with rows off 16 bytes 0.079 [0.297]; 64 -> 2 K7 of 8 x 80000 0.067 [0.198];
    # 1024 -> 1 K3 of 32 x 128 0.019 [0.070]
    return problem.C_out <= 4


def few_outputs_config(problem: Conv1dProblem, device: Device) -> Config:
    """A program of 256 threads, its channels side by side where positions are few."""
    vector = vector_length(problem)
    # a second vector for each thread saves weights: in bfloat16 0.045 against 0.061, but p23 0.084 against 0.073
    each = 2 if problem.dtype.itemsize == 2 or problem.C_out > 1 else 1
    config = Config(1024, 1, 1, num_warps=max(1, 1024 // (32 * vector * each)), num_stages=1)
    while (
        problem.N * -(-problem.L_out // config.BLOCK_M) < 2 * device.sm_count
        and 8 * vector < config.BLOCK_M
        and problem.C_in > config.BLOCK_K
    ):
        config = replace(config, BLOCK_M=config.BLOCK_M // 2, BLOCK_K=config.BLOCK_K * 2)
    return config


def _few_inputs_refusal(problem: Conv1dProblem) -> str | None:
    if problem.stride > 1 or problem.groups > 1:
        return "neighbouring outputs share no samples"
    if problem.x_strides[2] != 1:
        return "rows of x are not contiguous"
    vector = vector_length(problem)
    if problem.C_in * problem.K > 16 or problem.C_in * _window(problem, 2 * vector) > MOST_HELD:
        return "the samples of an output do not fit the registers"
    return skew_refusal(problem)


def _prefers_few_inputs(problem: Conv1dProblem) -> bool:
    # p12 0.0180 [0.0207]; 1 -> 128 K15 of 16 x 22050 0.058 [0.074]; 1 -> 64 K7 of 8 x 220160 0.119 [0.123], in bfloat16 0.068
    # [0.064], but of 8 x 220150 0.080 [0.171]
    return problem.C_out >= 16 and (problem.dtype.itemsize == 4 or skew(problem) != 0)


def few_inputs_config(problem: Conv1dProblem) -> Config:
    """Two vectors of positions a thread, 16 channels one after another."""
    vector = vector_length(problem)
    length = min(256 * vector, max(32 * vector, ceil_pow2(problem.L_out + vector)))
    return Config(length, 16, num_warps=max(1, length // (64 * vector)), num_stages=1)


def _runs_refusal(problem: Conv1dProblem, device: Device, config: Config) -> str | None:
    if problem.stride > 1 or problem.dilation > 1:
        return "outputs in a row do not share neighbouring samples"
    if problem.K < 8 or not 1 < config.run <= problem.K:
        return "the outputs of a run share few samples"
    if config.BLOCK_N // config.run < 16 or config.run & (config.run - 1):
        return "a tile has too few channels, or not whole runs"
    if problem.dtype == torch.float32 and problem.precision == "ieee":
        return "three products a slice do not leave the registers for the tile that is computed again"
    return None


def _prefers_runs(problem: Conv1dProblem) -> bool:
    # p28 0.157 [0.242], 8 x 768 x 499 0.113 [0.134]; in float32 0.252 [0.455]; p31 0.060 [0.120]
    channels = problem.C_in_per_group, problem.C_out_per_group
    return problem.K >= 16 and min(channels) >= 24 and channels[1] <= 64 and problem.L_out >= 64 and problem.flops > 1e9


def runs_config(problem: Conv1dProblem, device: Device) -> Config:
    """Runs of four outputs, all of a group's channels in one tile where they fit."""
    narrow = problem.dtype.itemsize == 2
    # p28 128x256x64 0.157, 128x128x64 in runs of 8 0.166; p31 128x128x32 w8 0.060, 128x64x32 w4 0.071
    config = Config(
        128,
        min(256, max(64, ceil_pow2(4 * problem.C_out_per_group))),
        64 if narrow else 32,
        num_warps=8,
        num_stages=3,
        tap_major=True,
        merge_taps=True,
        copy_to_nlc=problem.layout != "NLC" and problem.C_in >= 16,
        run=4,
    )
    return fit(config, problem, device)


def _frames_refusal(problem: Conv1dProblem, device: Device, config: Config) -> str | None:
    if device.capability < 90:
        return "tensor descriptors need sm_90"
    if problem.C_in > 1 or problem.dilation > 1:
        return "a window is not one row of memory"
    if problem.dtype == torch.float32 and problem.precision == "ieee":
        return "full float32 is split in registers, where a block copy has no gain"
    vector = vector_length(problem)
    if problem.stride % vector or not problem.aligned:
        return "windows, x or the weight do not start on 16 bytes"
    if config.BLOCK_K < 16:
        return "the taps do not fill a slice of the reduction"
    if problem.C_out * -(-problem.K // vector) * vector > INT32_MAX:
        return "the weight has 2^31 elements or more when its rows are padded"
    return None


def _prefers_frames(problem: Conv1dProblem) -> bool:
    # p30 0.158 [0.267]; 1 -> 250 K250 stride 160 of 16 x 160000 0.021 [0.106], in bfloat16 0.014 [0.086]; 1 -> 402 K400 0.107
    # [0.239]; 1 -> 64 K321 stride 80 of 32 x 64000 0.019 [0.124]; but 1 -> 256 K20 stride 8 of 16 x 32000 0.034 [0.029]
    return problem.flops > 1e9 and problem.C_out >= 64 and problem.K >= 64


def frames_config(problem: Conv1dProblem, device: Device) -> Config:
    """1 -> 402 K400 of 16 x 480000 in float32 0.107, as 128x256x32 0.117; in float16 0.064, in 4 warps, which spill, 0.063."""
    narrow = problem.dtype.itemsize == 2
    BLOCK_N = min(128, max(16, ceil_pow2(problem.C_out)))
    config = Config(
        128,
        BLOCK_N,
        min(64 if narrow else 32, 1 << (problem.K.bit_length() - 1)),
        num_warps=8 if device.capability >= 100 or BLOCK_N == 128 else 4,
        num_stages=3,
        tap_major=True,
        copy_to_nlc=not narrow,
    )
    return fit(config, problem, device)


def _skewed_refusal(problem: Conv1dProblem, device: Device, config: Config) -> str | None:
    if problem.groups > 1 or problem.C_in * problem.K > 64:
        return "x is worth reading once"
    if not skew(problem):
        return "rows of the output start on 16 bytes"
    if config.BLOCK_N < 64:
        return "weights on the left of a product fill 64 rows"
    return skew_refusal(problem)


def _prefers_skewed(problem: Conv1dProblem) -> bool:
    # p11 0.208 [0.260]; a tile takes every CYCLE-th channel
    cycle = vector_length(problem) // gcd(skew(problem), vector_length(problem))
    return problem.dtype.itemsize == 2 and problem.C_in * problem.K <= 32 and problem.C_out >= 64 * cycle


def skewed_config(problem: Conv1dProblem) -> Config:
    """p11 128x64 w4 0.208, 256x64 w8 0.229, 128x128 w4 0.313."""
    BLOCK_K = max(16, ceil_pow2(problem.C_in_per_group * problem.K))
    return Config(128, 64, min(64, BLOCK_K), num_warps=4, num_stages=1, weights_left=True)
