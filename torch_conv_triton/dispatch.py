"""Which kernel runs a problem, with which config, and why. Pure: no tensors, no Triton, no GPU needed."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from math import gcd

import torch

from torch_conv_triton.configs import (
    INTERPRETER,
    Config,
    Device,
    config_refusal,
    gemm_config,
    padding_wins,
    persistent_config,
    stays_resident,
    tma_config,
)
from torch_conv_triton.configs_depthwise import bands_refusal, depthwise_choices, skewed_refusal, toeplitz_refusal
from torch_conv_triton.configs_fused import fused_choice, of_all_channels
from torch_conv_triton.configs_halo import halo_config, halo_refusal, halo_wins
from torch_conv_triton.configs_thin import THIN, thin_choices, thin_refusal
from torch_conv_triton.configs_transposed import (
    WIDEST,
    copies_transposed,
    interleaved_config,
    stored_in_blocks,
    transposed_config,
    transposed_tma_config,
)
from torch_conv_triton.problem import INT32_MAX, KERNEL_DTYPES, Conv1dProblem, dtype_name
from torch_conv_triton.tuning import tables
from torch_conv_triton.versus_aten import faster_in_aten
from torch_conv_triton.weave import Weave

# aten's convolution as it is, and its two-dimensional one on channels-last views
ATEN = ("aten", "aten_nhwc")
# kernels that end with a program of instructions
FUSING = (
    "dense",
    "dense_few_outputs",
    "dense_frames",
    "dense_halo",
    "dense_persistent",
    "dense_runs",
    "dense_tma",
    "transposed",
    "transposed_interleaved",
    "transposed_tma",
    "depthwise",
    "depthwise_bands",
    "depthwise_sliding",
    "depthwise_vector",
    "depthwise_toeplitz",
)
# those of them whose tiles may hold the same channels of both halves of the output
HALVING = ("dense", "dense_tma")
# those that may begin with one, once for each element of x
PREPARING = ("dense_halo",)
# kernels that gather x, and so read it by any padding mode
GATHERING = ("dense", "dense_persistent", "depthwise", "depthwise_sliding")


@dataclass(frozen=True, slots=True)
class Plan:
    """How a problem runs: `kernel` is one of `ATEN` or the name of a kernel family, `reason` says why in words.

    `tuned`: the reason is that it was measured, for problems like this one.
    """

    kernel: str
    config: Config | None
    reason: str
    tuned: bool = False

    @property
    def is_aten(self) -> bool:
        return self.kernel in ATEN


def aten(reason: str) -> Plan:
    return Plan("aten", None, reason)


def device_for(device: torch.device) -> Device | None:
    """The device's properties, or None where no kernel of ours runs. With TRITON_INTERPRET=1 the CPU runs kernels too."""
    return _properties(_rehearsed_on.get() or device if device.type == "meta" else device)


@contextmanager
def meta_stands_for(device: torch.device) -> Iterator[None]:
    """Within the context, calls on tensors of the device "meta" are planned as for `device`."""
    token = _rehearsed_on.set(device)
    try:
        yield
    finally:
        _rehearsed_on.reset(token)


_rehearsed_on: ContextVar[torch.device | None] = ContextVar("rehearsed_on", default=None)


@cache
def _properties(device: torch.device) -> Device | None:
    if device.type == "cuda" and torch.version.cuda:
        properties = torch.cuda.get_device_properties(device)
        capability = 10 * properties.major + properties.minor
        if capability < 80:
            return None
        return Device(properties.name, capability, properties.multi_processor_count, properties.shared_memory_per_block_optin)
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return INTERPRETER
    return None


def refusal(problem: Conv1dProblem) -> str | None:
    """Why no kernel of ours computes this problem, or None. The one statement of what the kernels support."""
    if problem.dtype not in KERNEL_DTYPES:
        return f"{dtype_name(problem.dtype)} is computed by aten"
    if min(problem.N, problem.C_in, problem.C_out, problem.L_in, problem.L_out) <= 0:
        return "the input or the output is empty"
    if problem.transposed and problem.padding < 0:
        return "the output begins before what x reaches"
    if _weight_elements(problem) > INT32_MAX:
        return "the weight has 2^31 elements or more"
    return None


def _weight_elements(problem: Conv1dProblem) -> int:
    """Elements of the weight as the kernels read it; a transposed one is packed by output phase, each phase with as many taps."""
    taps = problem.K
    if problem.transposed:
        step = problem.stride // gcd(problem.stride, problem.dilation)
        taps = problem.stride * -(-problem.K // step)
        weave = Weave.of(problem.K, problem.stride, problem.dilation)
        if weave:
            taps = max(taps, weave.rows(problem.C_in_per_group) * weave.taps)
    return problem.C_out * problem.C_in_per_group * taps


def tma_refusal(problem: Conv1dProblem, device: Device, config: Config) -> str | None:
    """Why x cannot be read through a tensor descriptor with this config, or None."""
    if device.capability < 90:
        return "tensor descriptors need sm_90"
    if problem.dtype == torch.float32 and not (problem.precision == "tf32" and (config.copy_to_nlc or problem.rounded)):
        return "float32 is rounded in registers, where a block copy has no gain"
    if config.BLOCK_K < 16 or (problem.groups > 1 and problem.C_in_per_group % config.BLOCK_K):
        return "the channels of a group are not a multiple of 16"
    if problem.C_in_per_group < config.BLOCK_K:
        return "a block has more channels than there are"
    if problem.C_out * -(-problem.C_in_per_group // config.BLOCK_K) * config.BLOCK_K * problem.K > INT32_MAX:
        return "the weight has 2^31 elements or more when its channels are padded"
    if config.copy_to_nlc:
        return None
    if problem.x_strides[1] != 1:
        return "x is not channels-last"
    if not problem.aligned:
        return "x or the weight does not start on 16 bytes"
    per_vector = 16 // problem.dtype.itemsize
    if problem.x_strides[0] % per_vector or problem.x_strides[2] % per_vector:
        return "rows of x are not multiples of 16 bytes"
    if problem.L_in < problem.stride:
        return "x is shorter than the stride"
    last = (problem.L_out - 1) * problem.stride + (problem.K - 1) * problem.dilation - problem.padding
    if problem.L_in % problem.stride and last >= problem.L_in // problem.stride * problem.stride:
        return "the stride does not divide the length and the last samples are needed"
    return None


def interleaved_refusal(problem: Conv1dProblem, weave: Weave | None) -> str | None:
    """Why the phases of this transposed convolution cannot be computed together, or None."""
    if weave is None:
        return "neither of stride and dilation divides the other, so phases read different positions"
    if weave.spacing > 1 and weave.rows(problem.C_in_per_group) > 64:
        return "more phases that lie apart than a tile holds"
    return None


def transposed_tma_refusal(problem: Conv1dProblem, weave: Weave, device: Device, config: Config) -> str | None:
    """Why x, or a copy of it, cannot be read by block copies with this config, or None."""
    if device.capability < 90:
        return "tensor descriptors need sm_90"
    if problem.dtype == torch.float32 and problem.precision == "ieee":
        return "full float32 is split in registers, where a block copy has no gain"
    if config.BLOCK_K < 16 or problem.C_in_per_group % config.BLOCK_K:
        return "the channels of a group are not a multiple of 16"
    if not config.copy_to_nlc:
        return None if stored_in_blocks(problem) else "x is not stored in aligned rows of rounded channels"
    positions = (problem.L_out - 1 + problem.padding) // problem.stride + 1
    if problem.N * max(problem.L_in + weave.reach, positions) > INT32_MAX:
        return "the copy of x has 2^31 rows or more"
    return None


@lru_cache(maxsize=4096)
def plan(problem: Conv1dProblem, device: Device | None) -> Plan:
    """The plan that runs this problem on this device. None stands for a device without kernels of ours."""
    if device is None:
        return aten("no kernel of ours runs on this device")
    reason = refusal(problem)
    if reason:
        return aten(reason)
    return tuned_plan(problem, device) or plan_by_rule(problem, device)


def tuned_plan(
    problem: Conv1dProblem, device: Device, refuse: Callable[[Plan, Conv1dProblem, Device], str | None] | None = None
) -> Plan | None:
    """The plan that a table has for problems like this one, or None where it has none that runs this very one.

    `refuse` says why a plan does not run a problem (default: `plan_refusal`).
    """
    # tables know only float32 that has to be rounded
    entry = None if problem.rounded else tables.lookup(problem, device)
    if entry is None:
        return None
    beside = "" if entry.aten_ms is None else f", aten {entry.aten_ms:.3g}"
    found = Plan(entry.kernel, entry.config, f"tuned: {entry.ms:.3g} ms{beside}", tuned=True)
    return None if (refuse or plan_refusal)(found, problem, device) else found


def plan_by_rule(problem: Conv1dProblem, device: Device) -> Plan:
    """The plan without a table, for a problem that the kernels support."""
    if device.compare_with_aten and max(problem.extents) <= INT32_MAX:
        # beyond 2^31 elements aten is silently wrong, so a faster aten is no reason there
        reason = None if padding_wins(problem, device) else faster_in_aten(problem)
        if reason:
            return aten(reason)
    return candidates(problem, device)[-1]


def plan_refusal(plan: Plan, problem: Conv1dProblem, device: Device) -> str | None:
    """Why a plan found for a similar problem, or proposed by a search, cannot run this one, or None."""
    if plan.is_aten:
        return "aten is wrong beyond 2^31 elements" if max(problem.extents) > INT32_MAX else None
    config = plan.config
    if config is None or all(plan.kernel != candidate.kernel for candidate in candidates(problem, device)):
        return f"no kernel {plan.kernel} computes this problem"
    plain = as_plain(problem) if problem.transposed and plan.kernel.startswith("dense") else problem
    weave = Weave.of(problem.K, problem.stride, problem.dilation) if problem.transposed else None
    together = plan.kernel in ("transposed_interleaved", "transposed_tma")
    if together and weave.spacing > 1 and config.BLOCK_N % weave.rows(problem.C_in_per_group):
        return "a tile ends between the phases of a channel"
    if plan.kernel == "dense_tma":
        return tma_refusal(plain, device, config) or config_refusal(config, plain, device)
    if plan.kernel == "dense_halo":
        return halo_refusal(plain, device, config)
    if plan.kernel == "transposed_tma":
        return transposed_tma_refusal(problem, weave, device, config) or config_refusal(config, problem, device)
    if plan.kernel == "dense_persistent" and not stays_resident(config, plain, device):
        return "the weights do not stay in shared memory"
    if plan.kernel in THIN:
        return thin_refusal(plan.kernel, config, plain, device)
    if plan.kernel == "depthwise_toeplitz":
        return toeplitz_refusal(problem, config)
    if plan.kernel == "depthwise_bands":
        return bands_refusal(problem, device, config)
    if plan.kernel == "depthwise_skewed":
        return skewed_refusal(problem, config)
    return None if plan.kernel.startswith("depthwise") else config_refusal(config, plain, device)


def candidates(problem: Conv1dProblem, device: Device) -> tuple[Plan, ...]:
    """Every kernel family that can run this problem, each with its heuristic config: what tests check and tuners time."""
    if refusal(problem):
        return ()
    plans = _by_preference(problem, device)
    if problem.padding_mode != "zeros":
        plans = [plan for plan in plans if plan.kernel in GATHERING]
    return tuple(plans)


def fused_plan(problem: Conv1dProblem, device: Device | None, beside: bool = False, halves: bool = False) -> Plan:
    """The plan that runs this problem with what follows it: that of the problem alone, where the kernel can.

    `beside`: whether a tile of the output has tiles of operands or of a second output beside it. `halves`: whether what follows
    is computed of both halves of the output channels.
    """
    # resident weights leave them no shared memory
    fusing = [kernel for kernel in FUSING if not (beside and kernel == "dense_persistent")]
    found = plan(problem, device)
    if found.is_aten:
        return found
    if halves:
        if problem.transposed or problem.groups > 1:
            return aten("halves of the channels are computed together where all channels are one group")
        fusing = HALVING
    if found.kernel not in fusing:
        found = next(candidate for candidate in reversed(candidates(problem, device)) if candidate.kernel in fusing)
    if not found.tuned and (problem.rounded or problem.dtype.itemsize == 2):
        kernel, config = fused_choice(found.kernel, found.config, problem, beside)
        whole = None if halves or kernel not in HALVING else of_all_channels(problem, device, beside)
        if whole and not plan_refusal(Plan("dense_tma", whole, ""), problem, device):
            kernel, config = "dense_tma", whole
        if kernel != found.kernel:
            found = next(candidate for candidate in candidates(problem, device) if candidate.kernel == kernel)
        if config != found.config:
            return Plan(kernel, config, f"{found.reason}; in tiles that suit what follows")
    return found


def _by_preference(problem: Conv1dProblem, device: Device) -> list[Plan]:
    """The plans that can run the problem, the preferred one last."""
    if problem.transposed:
        return _transposed_by_preference(problem, device)
    if problem.is_depthwise:
        general = Plan("dense", gemm_config(problem, device), "implicit GEMM, one channel a group")
        return [general, *(Plan(*choice) for choice in depthwise_choices(problem, device))]
    ranked = [(1, Plan("dense", gemm_config(problem, device), "implicit GEMM over any strides"))]
    config = tma_config(problem, device)
    if not tma_refusal(problem, device, config):
        # A descriptor costs the host tens of microseconds, so the kernel has to outlast it. Narrow copies lose (p28, 16
        # channels wide: 0.53 against 0.34).
        whole = config.BLOCK_K >= 32 and problem.C_in_per_group % config.BLOCK_K == 0
        wins = problem.flops > 20e9 and whole and problem.L_out >= 64
        if problem.dtype == torch.float32:
            # x_k7c192 as a gathered GEMM with tiles of 256 channels 0.959, in block copies 1.054
            wins = wins and problem.C_out_per_group % 128 == 0
        if problem.rounded:
            # 64 -> 64 K3, K7 and K11 of 8 x 38400 0.068, 0.103 and 0.150, gathered 0.069, 0.108 and 0.160; 32 -> 32 K3 of 8 x
            # 153600 0.123 and 0.118
            fills = problem.C_out_per_group <= 128 or problem.C_out_per_group % 128 == 0 or problem.C_out_per_group > 1024
            # zeros for the rest of a block are read nowhere and cost a product: 250 -> 250 K7 in rows of 256 0.031, copied 0.036
            whole = whole or (config.BLOCK_K >= 32 and problem.C_in_per_group > 8 * config.BLOCK_K)
            wins = problem.flops > 2e9 and whole and config.BLOCK_N >= 64 and problem.L_out >= 64 and fills
        wins = wins or padding_wins(problem, device)
        plan = Plan("dense_tma", config, "channels-last x: every tap is a row shift of one block copy")
        ranked.append((2 if wins else 0, plan))
    config = persistent_config(problem, device)
    if config:
        # in NLC x_hifi32_k3 0.135 against 0.140, s_seed_bf16 0.866 against 0.895; otherwise it loses
        wins = problem.layout == "NLC" and (config.BLOCK_N <= 32) == (problem.dtype.itemsize == 4) and not problem.rounded
        plan = Plan("dense_persistent", config, "the weights stay in shared memory while a program walks over tiles")
        ranked.append((3 if wins else 0, plan))
    config = halo_config(problem)
    if not halo_refusal(problem, device, config):
        plan = Plan("dense_halo", config, "a tile of x with its halo is read once for all taps")
        ranked.append((4 if halo_wins(problem, device, config) else 0, plan))
    for wins, *choice in thin_choices(problem, device):
        ranked.append((4 if wins else 0, Plan(*choice)))
    return [plan for _, plan in sorted(ranked, key=lambda pair: pair[0])]


def _transposed_by_preference(problem: Conv1dProblem, device: Device) -> list[Plan]:
    general = Plan("transposed", transposed_config(problem, device), "one output phase a program, every output written once")
    if problem.is_depthwise:
        return [general, *(Plan(*choice) for choice in depthwise_choices(problem, device))]
    weave = Weave.of(problem.K, problem.stride, problem.dilation)
    if interleaved_refusal(problem, weave):
        return [general]
    plans = [general]
    plain = as_plain(problem)
    if plain:
        plans += [replace(p, reason=f"stride 1: a plain convolution; {p.reason}") for p in _by_preference(plain, device)]
    else:
        config = interleaved_config(problem, weave, device)
        plans.append(
            Plan("transposed_interleaved", config, "all output phases of a tile together: x read once, whole lines stored")
        )
        if problem.C_in_per_group < 16:
            plans.reverse()
    config = transposed_tma_config(problem, weave, device)
    if not transposed_tma_refusal(problem, weave, device, config):
        plan = Plan("transposed_tma", config, "all output phases of a tile together, from block copies of channels-last x")
        wins = copies_transposed(problem, weave) or (problem.rounded and not config.copy_to_nlc and config.BLOCK_N >= WIDEST)
        wins = wins and not (plain and _is_better_plain(plain, plans[-1]))
        plans.insert(len(plans) if wins else 0, plan)
    return plans


def _is_better_plain(plain: Conv1dProblem, plan: Plan) -> bool:
    """Whether this plan of the plain convolution that a transposed one is beats a copy for the transposed kernels."""
    if plain.groups > 1 or plain.L_out < 16:
        # p04 0.0235 against 0.0337, p25 0.0478 against 0.0573
        return True
    # 256 -> 256 K11 of 8 x 2400 0.119 against 0.140, 512 -> 512 K5 of 64 x 600 0.328 against 0.324
    return plan.kernel == "dense_tma" and min(plain.C_in, plain.C_out) < 512


def as_plain(problem: Conv1dProblem) -> Conv1dProblem | None:
    """The plain convolution, channels exchanged and taps reversed, that a transposed one of stride 1 is; None if it is none."""
    reach = problem.dilation * (problem.K - 1)
    padding = reach - problem.padding
    if problem.stride > 1 or padding < 0 or problem.output_padding:
        return None
    end = None if problem.padding_end is None else reach - problem.padding_end
    stride_i, stride_o, stride_k = problem.w_strides
    return replace(problem, transposed=False, padding=padding, padding_end=end, w_strides=(stride_o, stride_i, stride_k))
