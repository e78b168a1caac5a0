"""Runs a convolution by its plan: allocates the output, calls the kernel's launcher or aten."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_conv_triton import dispatch
from torch_conv_triton.dispatch import Plan
from torch_conv_triton.problem import Conv1dProblem


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
    """The (transposed) convolution of x ``(N, C_in, L_in)``: ``(N, C_out, L_out)``, contiguous. Arguments are already checked."""
    problem = Conv1dProblem.from_tensors(x, weight, bias, stride, padding, dilation, groups, transposed, output_padding)
    plan = dispatch.plan(problem, dispatch.device_for(x.device))
    return forward_with(plan, problem, x, weight, bias)


def forward_with(plan: Plan, problem: Conv1dProblem, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Run one given plan of `dispatch.candidates`, or aten."""
    p = problem
    if plan.is_aten:
        # a device that computes convolutions in another layout returns it in that layout
        return torch.ops.aten.convolution(
            x, weight, bias, [p.stride], [p.padding], [p.dilation], p.transposed, [p.output_padding], p.groups
        ).contiguous()
    if bias is not None:
        bias = bias.contiguous()
    y = x.new_empty((p.N, p.C_out, p.L_out))
    if x.is_cuda:
        # Triton launches on the current device
        with torch.cuda.device(x.device):
            _launch(plan, p, x, weight, bias, y)
    else:
        _launch(plan, p, x, weight, bias, y)
    return y


def _launch(plan: Plan, p: Conv1dProblem, x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> None:
    tf32 = p.precision == "tf32"
    config = plan.config
    if config.copy_to_nlc:
        from torch_conv_triton.kernels.layout import channels_last_copy

        # whole strides: the tensor-descriptor kernel sees x as rows of `stride` samples, and zeros beyond the end change nothing
        x = channels_last_copy(x, p.stride)
    if plan.kernel == "depthwise":
        from torch_conv_triton.kernels.depthwise import conv1d_depthwise

        conv1d_depthwise(x, weight, bias, y, p.stride, p.padding, p.dilation, p.transposed, config)
    elif plan.kernel == "transposed":
        from torch_conv_triton.kernels.transposed import conv1d_transposed

        conv1d_transposed(x, weight, bias, y, p.stride, p.padding, p.dilation, p.groups, tf32, config)
    elif plan.kernel == "dense_persistent":
        from torch_conv_triton.kernels.dense_persistent import conv1d_dense_persistent

        programs = dispatch.device_for(x.device).sm_count * config.programs_per_sm
        conv1d_dense_persistent(x, weight, bias, y, p.stride, p.padding, p.dilation, p.groups, tf32, programs, config)
    elif plan.kernel == "dense_tma":
        from torch_conv_triton.kernels.dense_tma import conv1d_dense_tma

        conv1d_dense_tma(x, weight, bias, y, p.stride, p.padding, p.dilation, p.groups, tf32, config)
    else:
        from torch_conv_triton.kernels.dense import conv1d_dense

        conv1d_dense(x, weight, bias, y, p.stride, p.padding, p.dilation, p.groups, tf32, config)
