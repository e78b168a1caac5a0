"""Runs a convolution by its plan: allocates the output, calls the kernel's launcher, repeats its launches, or calls aten."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torch_conv_triton import dispatch
from torch_conv_triton.dispatch import Plan
from torch_conv_triton.problem import Conv1dProblem, check_arguments, current_precision

if TYPE_CHECKING:
    from torch_conv_triton.kernels.launch import Recording


@dataclass(slots=True)
class _Call:
    """What is decided by everything of a call but its values and addresses. `recording`: its launches, once they were made."""

    problem: Conv1dProblem
    plan: Plan
    recording: Recording | None = None


_MAX_CALLS = 4096
_calls: dict[tuple, _Call] = {}


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: int,
    dilation: int,
    groups: int,
    transposed: bool = False,
    output_padding: int = 0,
) -> Tensor:
    """The (transposed) convolution of x ``(N, C_in, L_in)``: ``(N, C_out, L_out)``, contiguous. Raises as `check_arguments` does.

    A call like an earlier one is neither checked nor planned again, and its launches are repeated from a recording.
    """
    geometry = stride, padding, dilation, groups, transposed, output_padding
    key = geometry, current_precision(x.dtype), _signature(x), _signature(weight), bias is not None and _signature(bias)
    call = _calls.get(key)
    if call is None:
        check_arguments(x, weight, bias, *geometry)
        problem = Conv1dProblem.from_tensors(x, weight, bias, *geometry)
        call = _Call(problem, dispatch.plan(problem, dispatch.device_for(x.device)))
        if len(_calls) >= _MAX_CALLS:
            _calls.clear()
        _calls[key] = call
    if call.plan.is_aten:
        return _aten(call.problem, x, weight, bias)
    return _run(call, x, weight, bias)


def _signature(tensor: Tensor) -> tuple:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.data_ptr() % 16


def forward_with(plan: Plan, problem: Conv1dProblem, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Run one given plan of `dispatch.candidates`, or aten."""
    return _aten(problem, x, weight, bias) if plan.is_aten else _run(_Call(problem, plan), x, weight, bias)


def _aten(p: Conv1dProblem, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # a device that computes convolutions in another layout returns it in that layout
    return torch.ops.aten.convolution.default(
        x, weight, bias, [p.stride], [p.padding], [p.dilation], p.transposed, [p.output_padding], p.groups
    ).contiguous()


def _run(call: _Call, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    p = call.problem
    if bias is not None:
        bias = bias.contiguous()
    y = x.new_empty((p.N, p.C_out, p.L_out))
    if not x.is_cuda:
        _launch(call.plan, p, x, weight, bias, y)
    elif x.get_device() == torch.cuda.current_device():
        _launch_or_repeat(call, x, weight, bias, y)
    else:
        # Triton launches on the current device
        with torch.cuda.device(x.device):
            _launch_or_repeat(call, x, weight, bias, y)
    return y


def _launch_or_repeat(call: _Call, x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> None:
    recording = call.recording
    if recording is None:
        from torch_conv_triton.kernels.launch import Recording

        with Recording(x, weight, bias, y) as recording:
            _launch(call.plan, call.problem, x, weight, bias, y)
        call.recording = recording
    elif recording.repeatable:
        recording.repeat(x, weight, bias, y)
    else:
        _launch(call.plan, call.problem, x, weight, bias, y)


def _launch(plan: Plan, p: Conv1dProblem, x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> None:
    tf32 = p.precision == "tf32"
    config = plan.config
    padding = p.padding
    if p.transposed and plan.kernel.startswith("dense"):
        from torch_conv_triton.kernels.transposed_interleaved import reversed_weight

        weight, padding = reversed_weight(weight, p.groups), p.dilation * (p.K - 1) - p.padding
    if config.copy_to_nlc and plan.kernel.startswith("dense"):
        from torch_conv_triton.kernels.layout import channels_last_copy

        # whole strides: the tensor-descriptor kernel sees x as rows of `stride` samples, and zeros beyond the end change nothing
        x = channels_last_copy(x, p.stride)
    if plan.kernel == "depthwise":
        from torch_conv_triton.kernels.depthwise import conv1d_depthwise

        conv1d_depthwise(x, weight, bias, y, p.stride, p.padding, p.dilation, p.transposed, config)
    elif plan.kernel == "transposed":
        from torch_conv_triton.kernels.transposed import conv1d_transposed

        conv1d_transposed(x, weight, bias, y, p.stride, p.padding, p.dilation, p.groups, tf32, config)
    elif plan.kernel == "transposed_interleaved":
        from torch_conv_triton.kernels.transposed_interleaved import conv1d_transposed_interleaved

        conv1d_transposed_interleaved(x, weight, bias, y, p.stride, p.padding, p.dilation, p.groups, tf32, config)
    elif plan.kernel == "transposed_tma":
        from torch_conv_triton.kernels.transposed_tma import conv1d_transposed_tma

        conv1d_transposed_tma(x, weight, bias, y, p.stride, p.padding, p.dilation, p.groups, tf32, config)
    elif plan.kernel == "dense_persistent":
        from torch_conv_triton.kernels.dense_persistent import conv1d_dense_persistent

        programs = dispatch.device_for(x.device).sm_count * config.programs_per_sm
        conv1d_dense_persistent(x, weight, bias, y, p.stride, padding, p.dilation, p.groups, tf32, programs, config)
    elif plan.kernel == "dense_tma":
        from torch_conv_triton.kernels.dense_tma import conv1d_dense_tma

        conv1d_dense_tma(x, weight, bias, y, p.stride, padding, p.dilation, p.groups, tf32, config)
    else:
        from torch_conv_triton.kernels.dense import conv1d_dense

        conv1d_dense(x, weight, bias, y, p.stride, padding, p.dilation, p.groups, tf32, config)
