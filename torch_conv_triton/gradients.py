"""Runs the gradients of a convolution by their plans, as `execute` does: kernels, their repeated launches, or aten."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_conv_triton import dispatch, execute
from torch_conv_triton.calls import Call, remember, run, signature
from torch_conv_triton.dispatch import Plan
from torch_conv_triton.dispatch_gradients import (
    input_grad_problem,
    plan_bias_grad,
    plan_input_grad,
    plan_weight_grad,
    weight_grad_problem,
)
from torch_conv_triton.problem import Conv1dProblem, current_precision

_input_calls: dict[tuple, Call] = {}
_weight_calls: dict[tuple, Call] = {}
_bias_calls: dict[tuple, Call] = {}


def input_grad(
    grad_output: Tensor, weight: Tensor, input_length: int, stride: int, padding: int, dilation: int, groups: int
) -> Tensor:
    """Gradient ``(N, C_in, input_length)`` of a convolution's input, contiguous, from grad_output ``(N, C_out, L_out)``.

    Weight ``(C_out, C_in / groups, K)``. Arguments are already checked.
    """
    geometry = stride, padding, dilation, groups
    key = geometry, input_length, current_precision(weight.dtype), signature(grad_output), signature(weight)
    call = _input_calls.get(key)
    if call is None:
        problem = input_grad_problem(grad_output, weight, input_length, *geometry)
        plan = plan_input_grad(problem, dispatch.device_for(grad_output.device))
        call = remember(_input_calls, key, Call(problem, plan))
    if call.plan.is_aten:
        return aten_input_grad(grad_output, weight, input_length, *geometry)
    return _run_input_grad(call, grad_output, weight)


def input_grad_with(plan: Plan, problem: Conv1dProblem, grad_output: Tensor, weight: Tensor) -> Tensor:
    """Run one given plan of `dispatch_gradients.input_grad_candidates`."""
    return _run_input_grad(Call(problem, plan), grad_output, weight)


def _run_input_grad(call: Call, grad_output: Tensor, weight: Tensor) -> Tensor:
    if not call.problem.transposed:
        # a depthwise filter takes outputs back to inputs when its taps are reversed
        weight = weight.flip(2)
    return execute.run_kernels(call, grad_output, weight, None)


def weight_grad(
    grad_output: Tensor, x: Tensor, kernel_size: int, stride: int, padding: int, dilation: int, groups: int
) -> Tensor:
    """Gradient ``(C_out, C_in / groups, K)`` of a convolution's weight, contiguous, from grad_output ``(N, C_out, L_out)``.

    x ``(N, C_in, L_in)``. Arguments are already checked.
    """
    geometry = stride, padding, dilation, groups
    key = geometry, kernel_size, current_precision(x.dtype), signature(grad_output), signature(x)
    call = _weight_calls.get(key)
    if call is None:
        problem = weight_grad_problem(grad_output, x, kernel_size, *geometry)
        call = remember(_weight_calls, key, Call(problem, plan_weight_grad(problem, dispatch.device_for(x.device))))
    if call.plan.is_aten:
        return aten_weight_grad(grad_output, x, kernel_size, *geometry)
    return _run_weight_grad(call, grad_output, x)


def weight_grad_with(plan: Plan, problem: Conv1dProblem, grad_output: Tensor, x: Tensor) -> Tensor:
    """Run one given plan of `dispatch_gradients.weight_grad_candidates`."""
    return _run_weight_grad(Call(problem, plan), grad_output, x)


def _run_weight_grad(call: Call, grad_output: Tensor, x: Tensor) -> Tensor:
    p = call.problem
    grad_weight = x.new_empty((p.C_out, p.C_in_per_group, p.K))
    run(call, _launch, grad_output, x, grad_weight)
    return grad_weight


def _launch(plan: Plan, p: Conv1dProblem, grad_output: Tensor, x: Tensor, grad_weight: Tensor) -> None:
    tf32 = p.precision == "tf32"
    config = plan.config
    if config.copy_to_nlc:
        from torch_conv_triton.kernels.layout import channels_last_copy

        grad_output, x = (channels_last_copy(t) if t.stride(1) != 1 else t for t in (grad_output, x))
    if plan.kernel == "weight_grad_depthwise":
        from torch_conv_triton.kernels.weight_grad_depthwise import conv1d_weight_grad_depthwise

        conv1d_weight_grad_depthwise(grad_output, x, grad_weight, p.stride, p.padding, p.dilation, config)
    elif plan.kernel == "weight_grad_banded":
        from torch_conv_triton.kernels.weight_grad_banded import conv1d_weight_grad_banded

        conv1d_weight_grad_banded(grad_output, x, grad_weight, p.padding, config)
    elif plan.kernel == "weight_grad_rows":
        from torch_conv_triton.kernels.weight_grad_rows import conv1d_weight_grad_rows

        conv1d_weight_grad_rows(grad_output, x, grad_weight, p.stride, p.padding, p.dilation, p.groups, config)
    else:
        from torch_conv_triton.kernels.weight_grad import conv1d_weight_grad

        conv1d_weight_grad(grad_output, x, grad_weight, p.stride, p.padding, p.dilation, p.groups, tf32, config)


def bias_grad(grad_output: Tensor) -> Tensor:
    """Gradient ``(C_out,)`` of a convolution's bias from grad_output ``(N, C_out, L_out)``, contiguous."""
    key = signature(grad_output)
    call = _bias_calls.get(key)
    if call is None:
        plan = plan_bias_grad(grad_output, dispatch.device_for(grad_output.device))
        call = remember(_bias_calls, key, Call(None, plan))
    if call.plan.is_aten:
        return grad_output.sum((0, 2))
    grad_bias = grad_output.new_empty(grad_output.shape[1])
    run(call, _launch_bias_grad, grad_output, grad_bias)
    return grad_bias


def _launch_bias_grad(plan: Plan, _: None, grad_output: Tensor, grad_bias: Tensor) -> None:
    from torch_conv_triton.kernels.bias_grad import conv1d_bias_grad

    conv1d_bias_grad(grad_output, grad_bias, plan.config)


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
