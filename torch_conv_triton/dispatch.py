"""Which kernel runs a problem, with which config, and why. Pure: no tensors, no Triton, no GPU needed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

import torch

from torch_conv_triton.problem import INT32_MAX, KERNEL_DTYPES, Conv1dProblem, ceil_pow2, dtype_name


@dataclass(frozen=True, slots=True)
class Device:
    """What a plan may depend on of a device. `capability` is 90 for sm_90; `shared_memory` is the bytes a block may use."""

    name: str
    capability: int
    sm_count: int
    shared_memory: int


INTERPRETER = Device("Triton interpreter", capability=90, sm_count=4, shared_memory=227 * 1024)


@dataclass(frozen=True, slots=True)
class Config:
    """Launch parameters of a kernel: BLOCK_M output positions x BLOCK_N output channels, reduced BLOCK_K at a time.

    `weights_left` puts the weights on the left of the tile's product (accumulator [C_out, L]); `programs_per_sm` is for
    persistent kernels.
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int = 0
    num_warps: int = 4
    num_stages: int = 3
    weights_left: bool = False
    programs_per_sm: int = 1

    def __str__(self) -> str:
        blocks = "x".join(str(b) for b in (self.BLOCK_M, self.BLOCK_N, self.BLOCK_K) if b)
        left = " weights_left" if self.weights_left else ""
        return f"{blocks} w{self.num_warps} s{self.num_stages}{left}"


@dataclass(frozen=True, slots=True)
class Plan:
    """How a problem runs: `kernel` is "aten" or the name of a kernel family, `reason` says why in words."""

    kernel: str
    config: Config | None
    reason: str

    @property
    def is_aten(self) -> bool:
        return self.kernel == "aten"


def aten(reason: str) -> Plan:
    return Plan("aten", None, reason)


@lru_cache(maxsize=None)
def device_for(device: torch.device) -> Device | None:
    """The device's properties, or None where no kernel of ours runs. With TRITON_INTERPRET=1 the CPU runs kernels too."""
    if device.type == "cuda" and torch.version.cuda:
        properties = torch.cuda.get_device_properties(device)
        capability = 10 * properties.major + properties.minor
        if capability < 80:
            return None
        return Device(
            properties.name, capability, properties.multi_processor_count, properties.shared_memory_per_block_optin
        )
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return INTERPRETER
    return None


def refusal(problem: Conv1dProblem) -> str | None:
    """Why no kernel of ours computes this problem, or None. The one statement of what the kernels support."""
    if problem.dtype not in KERNEL_DTYPES:
        return f"{dtype_name(problem.dtype)} is computed by aten"
    if min(problem.N, problem.C_in, problem.C_out, problem.L_in, problem.L_out) <= 0:
        return "the input or the output is empty"
    if problem.C_out * problem.C_in_per_group * problem.K > INT32_MAX:
        return "the weight has 2^31 elements or more"
    return None


def tma_refusal(problem: Conv1dProblem, device: Device, BLOCK_K: int) -> str | None:
    """Why x cannot be read through a tensor descriptor in blocks of BLOCK_K channels, or None."""
    if device.capability < 90:
        return "tensor descriptors need sm_90"
    if problem.transposed:
        return "a transposed convolution reads x by output phase"
    if problem.x_strides[1] != 1:
        return "x is not channels-last"
    if not problem.aligned:
        return "x or the weight does not start on 16 bytes"
    per_vector = 16 // problem.dtype.itemsize
    if problem.x_strides[0] % per_vector or problem.x_strides[2] % per_vector:
        return "rows of x are not multiples of 16 bytes"
    if problem.C_in_per_group % BLOCK_K:
        return f"{problem.C_in_per_group} channels are not a multiple of {BLOCK_K}"
    if problem.L_in < problem.stride:
        return "x is shorter than the stride"
    last = (problem.L_out - 1) * problem.stride + (problem.K - 1) * problem.dilation - problem.padding
    if problem.L_in % problem.stride and last >= problem.L_in // problem.stride * problem.stride:
        return "the stride does not divide the length and the last samples are needed"
    return None


def plan(problem: Conv1dProblem, device: Device | None) -> Plan:
    """The plan that runs this problem on this device. None stands for a device without kernels of ours."""
    if device is None:
        return aten("no kernel of ours runs on this device")
    reason = refusal(problem)
    if reason:
        return aten(reason)
    return _choose(problem, device)


def candidates(problem: Conv1dProblem, device: Device) -> tuple[Plan, ...]:
    """Every kernel family that can run this problem, each with its heuristic config: what tests check and tuners time."""
    if refusal(problem):
        return ()
    return tuple(_candidates(problem, device))


def _candidates(problem: Conv1dProblem, device: Device) -> Iterator[Plan]:
    if problem.is_depthwise:
        yield Plan("depthwise", depthwise_config(problem), "depthwise: moves bytes, no matrix to multiply")
    if problem.transposed:
        yield Plan("transposed", gemm_config(problem, device), "gathers by output phase, contiguous in channels")
        return
    yield Plan("dense", gemm_config(problem, device), "implicit GEMM over any strides")
    config = persistent_config(problem, device)
    if config:
        yield Plan("dense_persistent", config, "the weights fit beside the tiles, so they are loaded once")
    config = tma_config(problem, device)
    if config:
        yield Plan("dense_tma", config, "channels-last x: every tap is a row shift of one block copy")


def _choose(problem: Conv1dProblem, device: Device) -> Plan:
    return list(_candidates(problem, device))[-1] if not problem.is_depthwise else next(_candidates(problem, device))


def depthwise_config(problem: Conv1dProblem) -> Config:
    """Tiles that are wide along the contiguous dimension of x."""
    if problem.layout == "NLC":
        channels = min(128, max(16, ceil_pow2(problem.C_out)))
        return Config(BLOCK_M=max(8, 2048 // channels), BLOCK_N=channels, num_warps=4, num_stages=1)
    length = min(1024, max(16, ceil_pow2(problem.L_out)))
    return Config(BLOCK_M=length, BLOCK_N=max(1, min(1024 // length, ceil_pow2(problem.C_out))), num_warps=4, num_stages=1)


def gemm_config(problem: Conv1dProblem, device: Device) -> Config:
    """Tile of the implicit GEMM: all output channels in one tile where they fit, so that x is read once."""
    BLOCK_N = min(128, max(16, ceil_pow2(problem.C_out_per_group)))
    reduction = problem.C_in_per_group * problem.K
    BLOCK_K = min(32 if problem.dtype.itemsize == 4 else 64, max(16, ceil_pow2(reduction)))
    BLOCK_M = 128
    config = Config(BLOCK_M, BLOCK_N, BLOCK_K, num_warps=4 if BLOCK_N <= 64 else 8, num_stages=3)
    while config.num_stages > 1 and pipeline_bytes(config, problem.dtype.itemsize) > device.shared_memory - 2048:
        config = replace(config, num_stages=config.num_stages - 1)
    return config


def persistent_config(problem: Conv1dProblem, device: Device) -> Config | None:
    """A config whose whole weight matrix stays in shared memory, or None where it does not fit or there is too little to walk over."""
    base = gemm_config(problem, device)
    reduction = problem.C_in_per_group * problem.K
    steps = -(-reduction // base.BLOCK_K)
    weights = base.BLOCK_N * steps * base.BLOCK_K * problem.dtype.itemsize
    tile = base.BLOCK_M * base.BLOCK_K * problem.dtype.itemsize
    if steps > 16 or weights + 3 * tile > device.shared_memory // 2 + 32 * 1024:
        return None
    if problem.N * problem.L_out < 4 * base.BLOCK_M * device.sm_count:
        return None
    return replace(base, num_stages=2)


def tma_config(problem: Conv1dProblem, device: Device) -> Config | None:
    base = gemm_config(problem, device)
    base = replace(base, BLOCK_K=min(base.BLOCK_K, problem.C_in_per_group & -problem.C_in_per_group))
    if base.BLOCK_K < 16 or tma_refusal(problem, device, base.BLOCK_K):
        return None
    return base


def pipeline_bytes(config: Config, itemsize: int) -> int:
    """Shared memory of the pipelined operand tiles."""
    return config.num_stages * (config.BLOCK_M + config.BLOCK_N) * config.BLOCK_K * itemsize
