"""Runs the gradients of a convolution by their plans, as `execute` does: kernels, their repeated launches, or aten."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from torch_conv_triton import dispatch, execute, memory
from torch_conv_triton.calls import Call, remember, run, signature
from torch_conv_triton.dispatch import Plan
from torch_conv_triton.dispatch_gradients import (
    input_grad_problem,
    plan_bias_grad,
    plan_input_grad,
    plan_weight_bias_grad,
    plan_weight_grad,
    weight_grad_problem,
)
from torch_conv_triton.problem import Conv1dProblem, check_arguments, contiguous_strides, current_precision, output_length

_input_calls: dict[tuple, Call] = {}
_weight_calls: dict[tuple, Call] = {}
_weight_bias_calls: dict[tuple, Call] = {}
_bias_calls: dict[tuple, Call] = {}


def input_grad(
    grad_output: Tensor, weight: Tensor, input_length: int, stride: int, padding: int, dilation: int, groups: int
) -> Tensor:
    """Gradient ``(N, C_in, input_length)`` of a convolution's input, contiguous, from grad_output ``(N, C_out, L_out)``.

    Weight ``(C_out, C_in / groups, K)``. Raises as `check_backward` does; a call like an earlier one is not checked again.
    """
    geometry = stride, padding, dilation, groups
    key = geometry, input_length, current_precision(weight.dtype), signature(grad_output), signature(weight)
    call = _input_calls.get(key)
    if call is None:
        check_backward(grad_output, input_like(grad_output, weight, input_length, groups), weight, *geometry)
        problem = input_grad_problem(grad_output, weight, input_length, *geometry)
        plan = plan_input_grad(problem, dispatch.device_for(grad_output.device))
        call = remember(_input_calls, key, input_grad_call(plan, problem))
    if call.plan.is_aten:
        return input_grad_with(call.plan, call.problem, grad_output, weight)
    return run_input_grad(call, grad_output, weight)


def input_grad_with(plan: Plan, problem: Conv1dProblem, grad_output: Tensor, weight: Tensor) -> Tensor:
    """Run one given plan of an `input_grad_problem`: one of `dispatch_gradients.candidates`, with any config, or aten."""
    if not plan.is_aten:
        return run_input_grad(input_grad_call(plan, problem), grad_output, weight)
    p = problem
    padding = p.padding if p.transposed else p.dilation * (p.K - 1) - p.padding
    function = _aten_nhwc_input_grad if plan.kernel == "aten_nhwc" else aten_input_grad
    return function(grad_output, weight, p.L_out, p.stride, padding, p.dilation, p.groups)


def input_grad_call(plan: Plan, problem: Conv1dProblem) -> Call:
    """The call of a plan of an `input_grad_problem`."""
    p = problem
    if not p.transposed and plan.kernel == "depthwise_toeplitz":
        # transposed, of stride 1, it has the taps reversed
        problem = replace(p, transposed=True, padding=p.dilation * (p.K - 1) - p.padding)
    return Call(problem, plan)


def run_input_grad(call: Call, grad_output: Tensor, weight: Tensor) -> Tensor:
    """Make an `input_grad_call` of our kernels, with the weight of the convolution."""
    if not call.problem.transposed and not call.plan.kernel.startswith("depthwise"):
        # the other kernels read the taps of a filter in reverse
        weight = weight.flip(2)
    return execute.run_kernels(call, grad_output, weight, None)


def weight_grad(
    grad_output: Tensor, x: Tensor, kernel_size: int, stride: int, padding: int, dilation: int, groups: int
) -> Tensor:
    """Gradient ``(C_out, C_in / groups, K)`` of a convolution's weight, contiguous, from grad_output ``(N, C_out, L_out)``.

    x ``(N, C_in, L_in)``. Raises as `check_backward` does; a call like an earlier one is not checked again.
    """
    geometry = stride, padding, dilation, groups
    key = geometry, kernel_size, current_precision(x.dtype), signature(grad_output), signature(x)
    call = _weight_calls.get(key)
    if call is None:
        check_backward(grad_output, x, weight_like(grad_output, x, kernel_size, groups), *geometry)
        problem = weight_grad_problem(grad_output, x, kernel_size, *geometry)
        call = remember(_weight_calls, key, Call(problem, plan_weight_grad(problem, dispatch.device_for(x.device))))
    if call.plan.is_aten:
        return weight_grad_with(call.plan, call.problem, grad_output, x)
    return run_weight_grad(call, grad_output, x)


def weight_grad_with(plan: Plan, problem: Conv1dProblem, grad_output: Tensor, x: Tensor) -> Tensor:
    """Run one given plan of a `weight_grad_problem`: one of `dispatch_gradients.candidates`, with any config, or aten."""
    if not plan.is_aten:
        return run_weight_grad(Call(problem, plan), grad_output, x)
    p = problem
    if plan.kernel == "aten_nhwc":
        return _aten_nhwc_weight_grad(p, grad_output, x)
    return aten_weight_grad(grad_output, x, p.K, p.stride, p.padding, p.dilation, p.groups)


def run_weight_grad(call: Call, grad_output: Tensor, x: Tensor) -> Tensor:
    """Make a call of our kernels for a `weight_grad_problem`."""
    grad_weight = _empty_weight(call.problem, x)
    run(call, _launch, grad_output, x, grad_weight, None)
    return grad_weight


def weight_bias_grad(
    grad_output: Tensor, x: Tensor, kernel_size: int, stride: int, padding: int, dilation: int, groups: int
) -> tuple[Tensor, Tensor]:
    """What `weight_grad` and `bias_grad` give, from one pass over grad_output where that is cheaper."""
    geometry = stride, padding, dilation, groups
    key = geometry, kernel_size, current_precision(x.dtype), signature(grad_output), signature(x)
    call = _weight_bias_calls.get(key)
    if call is None:
        check_backward(grad_output, x, weight_like(grad_output, x, kernel_size, groups), *geometry)
        problem = weight_grad_problem(grad_output, x, kernel_size, *geometry)
        call = remember(_weight_bias_calls, key, Call(problem, plan_weight_bias_grad(problem, dispatch.device_for(x.device))))
    if call.plan.is_aten:
        return weight_grad_with(call.plan, call.problem, grad_output, x), bias_grad(grad_output)
    return run_weight_bias_grad(call, grad_output, x)


def run_weight_bias_grad(call: Call, grad_output: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Make a call of our kernels for a `weight_grad_problem` and the bias: in one pass if the plan says so."""
    if not call.plan.config.with_bias:
        return run_weight_grad(call, grad_output, x), bias_grad(grad_output)
    grad_weight, grad_bias = _empty_weight(call.problem, x), _empty_bias(call.problem.C_out, x)
    run(call, _launch, grad_output, x, grad_weight, grad_bias)
    return grad_weight, grad_bias


def _empty_weight(p: Conv1dProblem, x: Tensor) -> Tensor:
    shape = p.C_out, p.C_in_per_group, p.K
    return memory.uninitialised(shape, contiguous_strides(*shape[1:]), x.dtype, x.device)


def _empty_bias(channels: int, x: Tensor) -> Tensor:
    return memory.uninitialised((channels,), (1,), x.dtype, x.device)


def _launch(plan: Plan, p: Conv1dProblem, grad_output: Tensor, x: Tensor, grad_weight: Tensor, grad_bias: Tensor | None) -> None:
    tf32 = p.precision == "tf32"
    config = plan.config
    if config.copy_to_nlc:
        from torch_conv_triton.kernels.layout import channels_last_copy

        grad_output, x = (channels_last_copy(t) if t.stride(1) != 1 else t for t in (grad_output, x))
    if plan.kernel == "weight_grad_depthwise":
        from torch_conv_triton.kernels.weight_grad_depthwise import conv1d_weight_grad_depthwise

        conv1d_weight_grad_depthwise(grad_output, x, grad_weight, grad_bias, p.stride, p.padding, p.dilation, config)
    elif plan.kernel == "weight_grad_sliding":
        from torch_conv_triton.kernels.weight_grad_sliding import conv1d_weight_grad_sliding

        conv1d_weight_grad_sliding(grad_output, x, grad_weight, grad_bias, p.padding, config)
    elif plan.kernel == "weight_grad_banded":
        from torch_conv_triton.kernels.weight_grad_banded import conv1d_weight_grad_banded

        conv1d_weight_grad_banded(grad_output, x, grad_weight, grad_bias, p.padding, config)
    elif plan.kernel == "weight_grad_pointwise":
        from torch_conv_triton.kernels.weight_grad_pointwise import conv1d_weight_grad_pointwise

        conv1d_weight_grad_pointwise(grad_output, x, grad_weight, p.groups, config)
    elif plan.kernel == "weight_grad_rows":
        from torch_conv_triton.kernels.weight_grad_rows import conv1d_weight_grad_rows

        conv1d_weight_grad_rows(grad_output, x, grad_weight, grad_bias, p.stride, p.padding, p.dilation, p.groups, config)
    else:
        from torch_conv_triton.kernels.weight_grad import conv1d_weight_grad

        conv1d_weight_grad(grad_output, x, grad_weight, grad_bias, p.stride, p.padding, p.dilation, p.groups, tf32, config)


def forget_plans() -> None:
    """Plan every gradient anew, after the tables have changed."""
    plan_input_grad.cache_clear()
    plan_weight_grad.cache_clear()
    plan_weight_bias_grad.cache_clear()
    _input_calls.clear()
    _weight_calls.clear()
    _weight_bias_calls.clear()


def bias_grad(grad_output: Tensor) -> Tensor:
    """Gradient ``(C_out,)`` of a convolution's bias from grad_output ``(N, C_out, L_out)``, contiguous."""
    key = signature(grad_output)
    call = _bias_calls.get(key)
    if call is None:
        plan = plan_bias_grad(grad_output, dispatch.device_for(grad_output.device))
        call = remember(_bias_calls, key, Call(None, plan))
    if call.plan.is_aten:
        return grad_output.sum((0, 2))
    grad_bias = _empty_bias(grad_output.shape[1], grad_output)
    run(call, _launch_bias_grad, grad_output, grad_bias)
    return grad_bias


def _launch_bias_grad(plan: Plan, _: None, grad_output: Tensor, grad_bias: Tensor) -> None:
    from torch_conv_triton.kernels.bias_grad import conv1d_bias_grad

    conv1d_bias_grad(grad_output, grad_bias, plan.config)


def aten_input_grad(
    grad_output: Tensor, weight: Tensor, input_length: int, stride: int, padding: int, dilation: int, groups: int
) -> Tensor:
    """`input_grad` as aten computes it, for any dtype that it takes. Arguments are already checked."""
    # of x only the sizes are read, but aten copies one that is not contiguous
    x = grad_output.new_empty((grad_output.shape[0], weight.shape[1] * groups, input_length))
    geometry = [stride], [padding], [dilation], False, [0], groups
    return _aten_backward(grad_output, x, weight, geometry, 0).contiguous()


def aten_weight_grad(
    grad_output: Tensor, x: Tensor, kernel_size: int, stride: int, padding: int, dilation: int, groups: int
) -> Tensor:
    """`weight_grad` as aten computes it, for any dtype that it takes. Arguments are already checked."""
    # as above
    weight = grad_output.new_empty((grad_output.shape[1], x.shape[1] // groups, kernel_size))
    geometry = [stride], [padding], [dilation], False, [0], groups
    return _aten_backward(grad_output, x, weight, geometry, 1).contiguous()


def _aten_nhwc_input_grad(
    grad_output: Tensor, weight: Tensor, input_length: int, stride: int, padding: int, dilation: int, groups: int
) -> Tensor:
    """That of a two-dimensional convolution of height 1 on channels-last views: what is not NLC is copied, and the result."""
    # its strides tell aten the layout
    x = grad_output.new_empty((grad_output.shape[0], 1, input_length, weight.shape[1] * groups)).permute(0, 3, 1, 2)
    grad_output = execute.channels_last_view(grad_output)
    weight = weight.unsqueeze(2).contiguous(memory_format=torch.channels_last)
    geometry = [1, stride], [0, padding], [1, dilation], False, [0, 0], groups
    return execute.channels_first(_aten_backward(grad_output, x, weight, geometry, 0))


def _aten_nhwc_weight_grad(p: Conv1dProblem, grad_output: Tensor, x: Tensor) -> Tensor:
    """That of a two-dimensional convolution of height 1 on channels-last views: what is not NLC is copied."""
    grad_output, x = (execute.channels_last_view(t) for t in (grad_output, x))
    weight = grad_output.new_empty((p.C_out, 1, p.K, p.C_in_per_group)).permute(0, 3, 1, 2)
    geometry = [1, p.stride], [0, p.padding], [1, p.dilation], False, [0, 0], p.groups
    return _aten_backward(grad_output, x, weight, geometry, 1).squeeze(2).contiguous()


def _aten_backward(grad_output: Tensor, x: Tensor, weight: Tensor, geometry: tuple, which: int) -> Tensor:
    mask = [which == 0, which == 1, False]
    with _repeatable(grad_output):
        return torch.ops.aten.convolution_backward.default(grad_output, x, weight, None, *geometry, mask)[which]


@contextmanager
def _repeatable(tensor: Tensor) -> Iterator[None]:
    """Let cuDNN compute only in ways that give the same bits each time, as our kernels do."""
    before = torch._C._get_cudnn_deterministic()
    if before or not tensor.is_cuda:
        yield
        return
    torch._C._set_cudnn_deterministic(True)
    try:
        yield
    finally:
        torch._C._set_cudnn_deterministic(before)


def input_like(grad_output: Tensor, weight: Tensor, input_length: int, groups: int) -> Tensor:
    """Stands for the input whose gradient is asked for: of it only the sizes are read."""
    return grad_output.new_empty(()).expand(grad_output.shape[0], weight.shape[1] * groups, input_length)


def weight_like(grad_output: Tensor, x: Tensor, kernel_size: int, groups: int) -> Tensor:
    """Stands for the weight whose gradient is asked for: of it only the sizes are read."""
    return grad_output.new_empty(()).expand(grad_output.shape[1], x.shape[1] // groups, kernel_size)


def check_backward(grad_output: Tensor, x: Tensor, weight: Tensor, stride: int, padding: int, dilation: int, groups: int) -> None:
    """Raise RuntimeError unless grad_output is the gradient of a valid convolution's output; lengths may be symbolic."""
    check_arguments(x, weight, None, stride, padding, dilation, groups)
    length = output_length(x.shape[2], weight.shape[2], stride, padding, dilation)
    expected = (x.shape[0], weight.shape[0], length)
    if grad_output.dim() != 3:
        raise RuntimeError(f"Expected 3D grad_output, but got grad_output of size: {list(grad_output.shape)}")
    for size, wanted in zip(grad_output.shape, expected, strict=True):
        torch._check(
            size == wanted,
            lambda: f"Expected grad_output of size {list(expected)}, but got grad_output of size {list(grad_output.shape)}",
        )
