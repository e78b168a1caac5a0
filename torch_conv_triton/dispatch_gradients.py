"""Which kernel computes a gradient, with which config, and why. Pure, as `dispatch` is.

The gradient of the input is a convolution of grad_output, mostly a transposed one, so the kernels of the forward compute it. The
gradient of the weight has kernels of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor

from torch_conv_triton import dispatch
from torch_conv_triton.configs import Device
from torch_conv_triton.configs_gradients import (
    adds_up_grad_output,
    banded_weight_grad_config,
    bias_grad_config,
    depthwise_weight_grad_config,
    pointwise_config,
    pointwise_refusal,
    prefers_rows,
    sliding_refusal,
    sliding_weight_grad_config,
    weight_grad_config,
    weight_grad_config_refusal,
    weight_grad_rows_config,
)
from torch_conv_triton.dispatch import Plan, aten
from torch_conv_triton.problem import (
    INT32_MAX,
    KERNEL_DTYPES,
    Conv1dProblem,
    contiguous_strides,
    current_precision,
    dtype_name,
    output_length,
    starts_aligned,
)
from torch_conv_triton.versus_aten_gradients import (
    CHANNELS_LAST,
    SMALL_SUM_BYTES,
    input_grad_faster_in_aten,
    weight_grad_faster_in_aten,
)


@dataclass(frozen=True, slots=True)
class InputGradProblem(Conv1dProblem):
    """The gradient of an input, described by the convolution of grad_output that it is."""

    kind: ClassVar[str] = "input_grad"


@dataclass(frozen=True, slots=True)
class WeightGradProblem(Conv1dProblem):
    """The gradient of a weight, described by the convolution that it is the gradient of, with grad_output in y's place."""

    kind: ClassVar[str] = "weight_grad"


def input_grad_problem(
    grad_output: Tensor, weight: Tensor, input_length: int, stride: int, padding: int, dilation: int, groups: int
) -> InputGradProblem:
    """The convolution of grad_output ``(N, C_out, L_out)`` that is the gradient of the input ``(N, C_in, input_length)``.

    It is a transposed one, and what the forward left over at the end of the input is its output padding. A depthwise one at
    stride 1 is plain, with the taps of the weight reversed, unless the padding is too wide for that.
    """
    N, C_out, L_out = grad_output.shape
    _, C_in_per_group, K = weight.shape
    C_in, reach = C_in_per_group * groups, dilation * (K - 1)
    transposed = not C_out == C_in == groups > 1 or stride > 1 or padding > reach
    if transposed:
        w_strides = weight.stride()
        output_padding = input_length - output_length(L_out, K, stride, padding, dilation, True)
    else:
        w_strides, output_padding, padding = contiguous_strides(C_out // groups, K), 0, reach - padding
    return InputGradProblem(
        N=N,
        C_in=C_out,
        L_in=L_out,
        C_out=C_in,
        K=K,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        transposed=transposed,
        output_padding=output_padding,
        has_bias=False,
        dtype=grad_output.dtype,
        precision=current_precision(grad_output.dtype),
        x_strides=grad_output.stride(),
        w_strides=w_strides,
        y_strides=contiguous_strides(C_in, input_length),
        aligned=starts_aligned(grad_output) and (starts_aligned(weight) or not transposed),
    )


def weight_grad_problem(
    grad_output: Tensor, x: Tensor, kernel_size: int, stride: int, padding: int, dilation: int, groups: int
) -> WeightGradProblem:
    """The convolution of x ``(N, C_in, L_in)`` whose output has the gradient grad_output ``(N, C_out, L_out)``, in y's place."""
    N, C_in, L_in = x.shape
    C_out = grad_output.shape[1]
    return WeightGradProblem(
        N=N,
        C_in=C_in,
        L_in=L_in,
        C_out=C_out,
        K=kernel_size,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        transposed=False,
        output_padding=0,
        has_bias=False,
        dtype=x.dtype,
        precision=current_precision(x.dtype),
        x_strides=x.stride(),
        w_strides=contiguous_strides(C_in // groups, kernel_size),
        y_strides=grad_output.stride(),
        aligned=starts_aligned(x) and starts_aligned(grad_output),
    )


@lru_cache(maxsize=4096)
def plan_input_grad(problem: Conv1dProblem, device: Device | None) -> Plan:
    """The plan of an `input_grad_problem` on this device. None stands for a device without kernels of ours."""
    return _plan(problem, device)


@lru_cache(maxsize=4096)
def plan_weight_grad(problem: Conv1dProblem, device: Device | None) -> Plan:
    """The plan of a `weight_grad_problem` on this device. None stands for a device without kernels of ours."""
    return _plan(problem, device)


@lru_cache(maxsize=4096)
def plan_weight_bias_grad(problem: Conv1dProblem, device: Device | None) -> Plan:
    """The plan of a `weight_grad_problem` where the gradient of the bias is wanted too.

    Its config says `with_bias` where that comes out of the same pass, which is cheaper than one of its own; else it does not.
    """
    plan = plan_weight_grad(problem, device)
    if plan.is_aten or not adds_up_grad_output(plan.kernel, plan.config, problem):
        return plan
    return replace(plan, config=replace(plan.config, with_bias=True))


def _plan(problem: Conv1dProblem, device: Device | None) -> Plan:
    if device is None:
        return aten("no kernel of ours runs on this device")
    reason = dispatch.refusal(problem)
    if reason:
        return aten(reason)
    return dispatch.tuned_plan(problem, device, plan_refusal) or plan_by_rule(problem, device)


def plan_by_rule(problem: Conv1dProblem, device: Device) -> Plan:
    """The plan of a gradient without a table for it, for a problem that the kernels support."""
    if device.compare_with_aten and max(problem.extents) <= INT32_MAX:
        faster_in_aten = weight_grad_faster_in_aten if problem.kind == "weight_grad" else input_grad_faster_in_aten
        reason = faster_in_aten(problem)
        if reason:
            return Plan("aten_nhwc", None, reason) if reason == CHANNELS_LAST else aten(reason)
    return candidates(problem, device)[-1]


def candidates(problem: Conv1dProblem, device: Device) -> tuple[Plan, ...]:
    """Every kernel that can compute a gradient, each with its heuristic config, the preferred one last."""
    return weight_grad_candidates(problem, device) if problem.kind == "weight_grad" else input_grad_candidates(problem, device)


def plan_refusal(plan: Plan, problem: Conv1dProblem, device: Device) -> str | None:
    """Why a plan found for a similar gradient, or proposed by a search, cannot compute this one, or None."""
    if problem.kind != "weight_grad" or plan.is_aten:
        return dispatch.plan_refusal(plan, problem, device)
    if plan.config is None or all(plan.kernel != candidate.kernel for candidate in candidates(problem, device)):
        return f"no kernel {plan.kernel} computes this gradient"
    return weight_grad_config_refusal(plan.kernel, plan.config, problem, device)


def plan_bias_grad(grad_output: Tensor, device: Device | None) -> Plan:
    """The plan of the sums of grad_output ``(N, C_out, L_out)`` that are the gradient of a bias; device as for the others."""
    if device is None:
        return aten("no kernel of ours runs on this device")
    if grad_output.dtype not in KERNEL_DTYPES:
        return aten(f"{dtype_name(grad_output.dtype)} is computed by aten")
    if grad_output.numel() == 0:
        return aten("the output is empty")
    if device.compare_with_aten and grad_output.numel() * grad_output.element_size() < SMALL_SUM_BYTES:
        return aten("so small that the launch decides, and aten's is the shorter")
    config = bias_grad_config(grad_output.shape, grad_output.stride(), grad_output.element_size(), device)
    return Plan("bias_grad", config, "sums in two fixed steps")


# every kernel family that can run a forward problem can run the same problem as a gradient
input_grad_candidates = dispatch.candidates


def weight_grad_candidates(problem: Conv1dProblem, device: Device) -> tuple[Plan, ...]:
    """Every kernel that can compute a `weight_grad_problem`, each with its heuristic config, the preferred one last."""
    if dispatch.refusal(problem):
        return ()
    if not problem.is_depthwise:
        plans = [Plan("weight_grad", weight_grad_config(problem, device), "a matrix product over samples and positions")]
        if rows_refusal(problem) is None:
            config = weight_grad_rows_config(problem, device)
            plan = Plan("weight_grad_rows", config, "a matrix product of copies, rounded and laid out for it")
            plans.insert(1 if prefers_rows(problem) else 0, plan)
        config = pointwise_config(problem, device)
        if pointwise_refusal(problem, device, config) is None:
            # p02 0.044 against 0.071
            wins = min(problem.C_in_per_group, problem.C_out_per_group) >= 128
            plan = Plan("weight_grad_pointwise", config, "pointwise: a matrix product of block copies")
            plans.insert(len(plans) if wins else 0, plan)
        return tuple(plans)
    plans = [Plan("weight_grad_depthwise", depthwise_weight_grad_config(problem, device), "depthwise: sums of products of rows")]
    if problem.stride == problem.dilation == 1 and problem.K <= 128:
        plan = Plan(
            "weight_grad_banded", banded_weight_grad_config(problem, device), "a long depthwise filter: diagonals of products"
        )
        plans.insert(len(plans) if prefers_banded(problem) else 0, plan)
    if not sliding_refusal(problem):
        config = sliding_weight_grad_config(problem, device)
        plans.insert(0, Plan("weight_grad_sliding", config, "channels-last: every sample is loaded once"))
    return tuple(plans)


def rows_refusal(problem: Conv1dProblem) -> str | None:
    """Why a weight gradient is no product of rows, or None."""
    if problem.dtype != torch.float32 or problem.precision != "tf32":
        return "only float32 is rounded to TF32"
    reach = problem.dilation * (problem.K - 1) // problem.stride
    if problem.N * (problem.L_out + reach) + reach + 256 > INT32_MAX:
        return "a row has 2^31 elements or more"
    return None


def prefers_banded(problem: Conv1dProblem) -> bool:
    """Whether tensor cores pay for a depthwise weight gradient: x_conformer_nlc 0.065 against 0.169, p29 0.094 against 0.040."""
    return (16 if problem.layout == "NLC" else 5) <= problem.K and problem.L_out >= 128
