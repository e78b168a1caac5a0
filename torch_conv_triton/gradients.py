"""Runs the gradients of a convolution by their plans: allocates the result, calls the kernel's launcher or aten."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_conv_triton import dispatch, execute
from torch_conv_triton.dispatch import Plan
from torch_conv_triton.dispatch_gradients import input_grad_problem, plan_input_grad, plan_weight_grad, weight_grad_problem
from torch_conv_triton.problem import Conv1dProblem


def input_grad(
    grad_output: Tensor, weight: Tensor, input_length: int, stride: int, padding: int, dilation: int, groups: int
) -> Tensor:
    """Gradient ``(N, C_in, input_length)`` of a convolution's input, contiguous, from grad_output ``(N, C_out, L_out)``.

    Weight ``(C_out, C_in / groups, K)``. Arguments are already checked.
    """
    problem = input_grad_problem(grad_output, weight, input_length, stride, padding, dilation, groups)
    plan = plan_input_grad(problem, dispatch.device_for(grad_output.device))
    if plan.is_aten:
        return aten_input_grad(grad_output, weight, input_length, stride, padding, dilation, groups)
    return input_grad_with(plan, problem, grad_output, weight)


def input_grad_with(plan: Plan, problem: Conv1dProblem, grad_output: Tensor, weight: Tensor) -> Tensor:
    """Run one given plan of `dispatch_gradients.input_grad_candidates`."""
    if not problem.transposed:
        weight = reversed_weight(weight, problem.groups)
    return execute.forward_with(plan, problem, grad_output, weight, None)


def reversed_weight(weight: Tensor, groups: int) -> Tensor:
    """The weight ``(C_out, C_in / groups, K)`` with taps reversed and channels exchanged: ``(C_in, C_out / groups, K)``."""
    by_group = weight.unflatten(0, (groups, weight.shape[0] // groups))
    return by_group.transpose(1, 2).flatten(0, 1).flip(2)


def weight_grad(
    grad_output: Tensor, x: Tensor, kernel_size: int, stride: int, padding: int, dilation: int, groups: int
) -> Tensor:
    """Gradient ``(C_out, C_in / groups, K)`` of a convolution's weight, contiguous, from grad_output ``(N, C_out, L_out)``.

    x ``(N, C_in, L_in)``. Arguments are already checked.
    """
    problem = weight_grad_problem(grad_output, x, kernel_size, stride, padding, dilation, groups)
    plan = plan_weight_grad(problem, dispatch.device_for(x.device))
    if plan.is_aten:
        return aten_weight_grad(grad_output, x, kernel_size, stride, padding, dilation, groups)
    return weight_grad_with(plan, problem, grad_output, x)


def weight_grad_with(plan: Plan, problem: Conv1dProblem, grad_output: Tensor, x: Tensor) -> Tensor:
    """Run one given plan of `dispatch_gradients.weight_grad_candidates`."""
    p = problem
    grad_weight = x.new_empty((p.C_out, p.C_in_per_group, p.K))
    if x.is_cuda:
        # Triton launches on the current device
        with torch.cuda.device(x.device):
            _launch(plan, p, grad_output, x, grad_weight)
    else:
        _launch(plan, p, grad_output, x, grad_weight)
    return grad_weight


def _launch(plan: Plan, p: Conv1dProblem, grad_output: Tensor, x: Tensor, grad_weight: Tensor) -> None:
    tf32 = p.precision == "tf32"
    config = plan.config
    if config.copy_to_nlc:
        from torch_conv_triton.kernels.layout import channels_last_copy

        x = channels_last_copy(x)
    if plan.kernel == "weight_grad_depthwise":
        from torch_conv_triton.kernels.weight_grad_depthwise import conv1d_weight_grad_depthwise

        conv1d_weight_grad_depthwise(grad_output, x, grad_weight, p.stride, p.padding, p.dilation, config)
    elif plan.kernel == "weight_grad_banded":
        from torch_conv_triton.kernels.weight_grad_banded import conv1d_weight_grad_banded

        conv1d_weight_grad_banded(grad_output, x, grad_weight, p.padding, tf32, config)
    else:
        from torch_conv_triton.kernels.weight_grad import conv1d_weight_grad

        conv1d_weight_grad(grad_output, x, grad_weight, p.stride, p.padding, p.dilation, p.groups, tf32, config)


def aten_input_grad(
    grad_output: Tensor, weight: Tensor, input_length: int, stride: int, padding: int, dilation: int, groups: int
) -> Tensor:
    """`input_grad` as aten computes it, for any dtype that it takes."""
    # aten reads only the sizes of the operand whose gradient is asked for
    x = grad_output.new_empty(()).expand(grad_output.shape[0], weight.shape[1] * groups, input_length)
    return _aten_backward(grad_output, x, weight, stride, padding, dilation, groups, 0)


def aten_weight_grad(
    grad_output: Tensor, x: Tensor, kernel_size: int, stride: int, padding: int, dilation: int, groups: int
) -> Tensor:
    """`weight_grad` as aten computes it, for any dtype that it takes."""
    weight = grad_output.new_empty(()).expand(grad_output.shape[1], x.shape[1] // groups, kernel_size)
    return _aten_backward(grad_output, x, weight, stride, padding, dilation, groups, 1)


def _aten_backward(grad_output, x, weight, stride, padding, dilation, groups, which):
    gradients = torch.ops.aten.convolution_backward.default(
        grad_output, x, weight, None, [stride], [padding], [dilation], False, [0], groups, [which == 0, which == 1, False]
    )
    return gradients[which].contiguous()
