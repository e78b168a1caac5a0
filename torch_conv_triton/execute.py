"""Runs a convolution by its plan: allocates the output, calls the kernel's launcher, repeats its launches, or calls aten."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torch_conv_triton import dispatch, memory
from torch_conv_triton.calls import Call, remember, run, signature
from torch_conv_triton.configs_halo import HaloShape
from torch_conv_triton.dispatch import Plan
from torch_conv_triton.problem import Conv1dProblem, check_arguments, contiguous_strides, current_precision, layout_of

if TYPE_CHECKING:
    from torch_conv_triton.kernels.epilogue import Fusion

_calls: dict[tuple, Call] = {}


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
    key = geometry, current_precision(x.dtype), signature(x), signature(weight), bias is not None and signature(bias)
    call = _calls.get(key)
    if call is None:
        check_arguments(x, weight, bias, *geometry)
        problem = Conv1dProblem.from_tensors(x, weight, bias, *geometry)
        call = remember(_calls, key, Call(problem, dispatch.plan(problem, dispatch.device_for(x.device))))
    if call.plan.is_aten:
        return _aten(call.plan, call.problem, x, weight, bias)
    return run_kernels(call, x, weight, bias)


def forward_with(plan: Plan, problem: Conv1dProblem, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Run one given plan: one of `dispatch.candidates`, with any config that `dispatch.plan_refusal` accepts, or aten."""
    return _aten(plan, problem, x, weight, bias) if plan.is_aten else run_kernels(Call(problem, plan), x, weight, bias)


def forget_plans() -> None:
    """Plan every call anew, after the tables have changed."""
    dispatch.plan.cache_clear()
    _calls.clear()


def _aten(plan: Plan, p: Conv1dProblem, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if plan.kernel == "aten_nhwc":
        return _aten_nhwc(p, x, weight, bias)
    # torch.ops.aten.convolution takes the host nearly twice as long to be called; a device that computes convolutions in another
    # layout returns it in that layout
    return torch.convolution(
        x, weight, bias, (p.stride,), (p.padding,), (p.dilation,), p.transposed, (p.output_padding,), p.groups
    ).contiguous()


def _aten_nhwc(p: Conv1dProblem, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A two-dimensional convolution of height 1 on channels-last views: an x that is not NLC is copied, and so is the output."""
    x, weight = channels_last_view(x), weight.unsqueeze(2).contiguous(memory_format=torch.channels_last)
    geometry = [1, p.stride], [0, p.padding], [1, p.dilation], p.transposed, [0, p.output_padding], p.groups
    return channels_first(torch.ops.aten.convolution.default(x, weight, bias, *geometry))


def channels_last_view(t: Tensor) -> Tensor:
    """A tensor ``(N, C, L)`` as a channels-last ``(N, C, 1, L)``, a copy unless it is NLC."""
    if t.shape[1] > 1 and layout_of(t.stride(), *t.shape[1:]) != "NLC":
        t = _channels_last(t)
    return t.unsqueeze(2).contiguous(memory_format=torch.channels_last)


def channels_first(t: Tensor) -> Tensor:
    """A tensor ``(N, C, 1, L)`` as a contiguous ``(N, C, L)``, a copy unless it is NCL."""
    t = t.squeeze(2)
    return t if t.is_contiguous() else _channels_last(t.transpose(1, 2)).transpose(1, 2)


def _channels_last(t: Tensor) -> Tensor:
    from torch_conv_triton.kernels.layout import channels_last_copy

    # Triton launches on the current device
    with torch.cuda.device_of(t):
        return channels_last_copy(t)


def run_kernels(call: Call, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Run a call whose plan is not aten."""
    if bias is not None:
        bias = bias.contiguous()
    p = call.problem
    y = memory.uninitialised((p.N, p.C_out, p.L_out), contiguous_strides(p.C_out, p.L_out), x.dtype, x.device)
    run(call, _launch, x, weight, bias, y)
    return y


def _launch(plan: Plan, p: Conv1dProblem, x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> None:
    from torch_conv_triton.kernels.epilogue import NO_FUSION

    launch_kernel(plan, p, x, weight, bias, y, NO_FUSION)


def launch_kernel(
    plan: Plan, p: Conv1dProblem, x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor, fusion: Fusion
) -> None:
    """Launch the plan's kernel, with the copies that it wants made first, to write y (and what `fusion` adds)."""
    tf32 = p.precision == "tf32"
    config = plan.config
    padding = p.padding
    if p.transposed and plan.kernel.startswith("dense"):
        from torch_conv_triton.kernels.interleave import reversed_weight

        # one tap needs no reversal, and block copies read it with either of the channels contiguous
        as_it_is = plan.kernel == "dense_tma" and p.K == p.groups == 1 and weight.element_size() == 2
        # those that are told so need not round it again
        rounded = tf32 and plan.kernel in ("dense", "dense_tma")
        weight = weight.transpose(0, 1) if as_it_is else reversed_weight(weight, p.groups, rounded)
        padding = p.dilation * (p.K - 1) - p.padding
    if config.copy_to_nlc and plan.kernel.startswith("dense") and plan.kernel != "dense_frames":
        from torch_conv_triton.kernels.layout import channels_last_copy

        # whole strides and blocks of channels: the tensor-descriptor kernel sees x as rows of `stride` samples, and zeros beyond
        # the end change nothing
        channels = config.BLOCK_K if plan.kernel == "dense_tma" else 1
        x = channels_last_copy(x, p.stride if p.padding_mode == "zeros" else 1, rounded=tf32, channels=channels)
    # a plain convolution takes outputs back to inputs when the taps of its filters are reversed
    reverse = p.kind == "input_grad" and not p.transposed
    if plan.kernel == "depthwise":
        from torch_conv_triton.kernels.depthwise import conv1d_depthwise

        conv1d_depthwise(x, weight, bias, y, p.stride, p.padding, p.dilation, p.transposed, config, fusion, reverse)
    elif plan.kernel == "depthwise_toeplitz":
        from torch_conv_triton.kernels.depthwise_toeplitz import conv1d_depthwise_toeplitz

        conv1d_depthwise_toeplitz(x, weight, bias, y, p.stride, p.padding, p.dilation, p.transposed, tf32, config, fusion)
    elif plan.kernel == "depthwise_bands":
        from torch_conv_triton.kernels.depthwise_bands import conv1d_depthwise_bands

        conv1d_depthwise_bands(x, weight, bias, y, p.padding, tf32, config, fusion, reverse)
    elif plan.kernel == "depthwise_short":
        from torch_conv_triton.kernels.depthwise_short import conv1d_depthwise_short

        conv1d_depthwise_short(x, weight, bias, y, p.stride, p.padding, p.dilation, config, reverse)
    elif plan.kernel == "depthwise_skewed":
        from torch_conv_triton.kernels.depthwise_skewed import conv1d_depthwise_skewed

        conv1d_depthwise_skewed(x, weight, bias, y, p.padding, config, reverse)
    elif plan.kernel == "depthwise_sliding":
        from torch_conv_triton.kernels.depthwise_sliding import conv1d_depthwise_sliding

        conv1d_depthwise_sliding(x, weight, bias, y, p.padding, p.dilation, config, fusion, reverse)
    elif plan.kernel == "depthwise_vector":
        from torch_conv_triton.kernels.depthwise_vector import conv1d_depthwise_vector

        conv1d_depthwise_vector(x, weight, bias, y, p.padding, p.dilation, config, fusion, reverse)
    elif plan.kernel == "transposed":
        from torch_conv_triton.kernels.transposed import conv1d_transposed

        conv1d_transposed(x, weight, bias, y, p.stride, p.padding, p.dilation, p.groups, tf32, config, fusion)
    elif plan.kernel == "transposed_interleaved":
        from torch_conv_triton.kernels.transposed_interleaved import conv1d_transposed_interleaved

        conv1d_transposed_interleaved(x, weight, bias, y, p.stride, p.padding, p.dilation, p.groups, tf32, config, fusion)
    elif plan.kernel == "transposed_tma":
        from torch_conv_triton.kernels.transposed_tma import conv1d_transposed_tma

        conv1d_transposed_tma(x, weight, bias, y, p.stride, p.padding, p.dilation, p.groups, tf32, config, fusion)
    elif plan.kernel == "dense_persistent":
        from torch_conv_triton.kernels.dense_persistent import conv1d_dense_persistent

        programs = dispatch.device_for(x.device).sm_count * config.programs_per_sm
        conv1d_dense_persistent(x, weight, bias, y, p.stride, padding, p.dilation, p.groups, tf32, programs, config, fusion)
    elif plan.kernel == "dense_few_inputs":
        from torch_conv_triton.kernels.dense_few_inputs import conv1d_dense_few_inputs

        conv1d_dense_few_inputs(x, weight, bias, y, padding, p.dilation, config)
    elif plan.kernel == "dense_few_outputs":
        from torch_conv_triton.kernels.dense_few_outputs import conv1d_dense_few_outputs

        conv1d_dense_few_outputs(x, weight, bias, y, padding, p.dilation, config, fusion)
    elif plan.kernel == "dense_frames":
        from torch_conv_triton.kernels.dense_frames import conv1d_dense_frames

        conv1d_dense_frames(x, weight, bias, y, p.stride, padding, tf32, config, fusion)
    elif plan.kernel == "dense_runs":
        from torch_conv_triton.kernels.dense_runs import conv1d_dense_runs

        conv1d_dense_runs(x, weight, bias, y, padding, p.groups, tf32, config, fusion)
    elif plan.kernel == "dense_skewed":
        from torch_conv_triton.kernels.dense_skewed import conv1d_dense_skewed

        conv1d_dense_skewed(x, weight, bias, y, p.stride, padding, p.dilation, tf32, config)
    elif plan.kernel == "dense_tma":
        from torch_conv_triton.kernels.dense_tma import conv1d_dense_tma

        conv1d_dense_tma(x, weight, bias, y, p.stride, padding, p.dilation, p.groups, tf32, config, fusion, p.transposed)
    elif plan.kernel == "dense_halo":
        from torch_conv_triton.kernels.dense_halo import conv1d_dense_halo

        shape = HaloShape.of(dispatch.as_plain(p) if p.transposed else p, config)
        programs = dispatch.device_for(x.device).sm_count * config.programs_per_sm
        conv1d_dense_halo(x, weight, bias, y, padding, p.dilation, tf32, shape, programs, config, fusion)
    else:
        from torch_conv_triton.kernels.dense import conv1d_dense

        conv1d_dense(x, weight, bias, y, p.stride, padding, p.dilation, p.groups, tf32, config, fusion, p.transposed)
