"""vmap rules of the operators: a vmapped dimension is folded into the batch, the groups or the output channels."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_ops = torch.ops.triton_conv


def conv1d(info, in_dims, input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    def run(input, weight, bias, groups):
        return _ops.conv1d.default(input, weight, bias, stride, padding, dilation, groups)

    return _convolution(run, info.batch_size, in_dims, input, weight, bias, groups, out_channels=0)


def conv_transpose1d(info, in_dims, input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1):
    def run(input, weight, bias, groups):
        return _ops.conv_transpose1d.default(input, weight, bias, stride, padding, output_padding, groups, dilation)

    return _convolution(run, info.batch_size, in_dims, input, weight, bias, groups, out_channels=1)


def conv1d_input_grad(info, in_dims, grad_output, weight, input_length, stride=1, padding=0, dilation=1, groups=1):
    def run(grad_output, weight, _, groups):
        return _ops.conv1d_input_grad.default(grad_output, weight, input_length, stride, padding, dilation, groups)

    # the gradient is a transposed convolution of grad_output, so it folds like one
    return _convolution(run, info.batch_size, in_dims[:2], grad_output, weight, None, groups, out_channels=1)


def conv1d_weight_grad(info, in_dims, grad_output, input, kernel_size, stride=1, padding=0, dilation=1, groups=1):
    size = info.batch_size
    grad_dim, input_dim = in_dims[:2]
    out = 0
    if groups > 1 or (grad_dim is not None and input_dim is not None):
        grad_output, input, groups = _fold(grad_output, grad_dim, size, 1), _fold(input, input_dim, size, 1), size * groups
    elif grad_dim is not None:
        grad_output = _fold(grad_output, grad_dim, size, 1)
    else:
        input, out = _fold(input, input_dim, size, 1), 1
    result = _ops.conv1d_weight_grad.default(grad_output, input, kernel_size, stride, padding, dilation, groups)
    return _unfold(result, size, out)


def conv1d_bias_grad(info, in_dims, grad_output):
    return _unfold(_ops.conv1d_bias_grad.default(_fold(grad_output, in_dims[0], info.batch_size, 1)), info.batch_size, 0)


def conv1d_weight_bias_grad(info, in_dims, grad_output, input, kernel_size, stride=1, padding=0, dilation=1, groups=1):
    weight = conv1d_weight_grad(info, in_dims, grad_output, input, kernel_size, stride, padding, dilation, groups)
    bias = conv1d_bias_grad(info, in_dims, grad_output)
    return tuple(zip(weight, bias, strict=True))


def _convolution(
    run: Callable[..., Tensor],
    size: int,
    in_dims,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    groups: int,
    out_channels: int,
) -> tuple[Tensor, int]:
    """`run` over a vmapped dimension; `out_channels` is the dimension of the weight that holds output channels."""
    input_dim, weight_dim, bias_dim = (*in_dims, None)[:3]
    if weight_dim is None and bias_dim is not None:
        bias = bias.movedim(bias_dim, 0)[:, None, :, None]
        if input_dim is None:
            return run(input, weight, None, groups) + bias, 0
        return _unfold(run(_fold(input, input_dim, size, 0), weight, None, groups), size, 0)[0] + bias, 0
    if weight_dim is None:
        return _unfold(run(_fold(input, input_dim, size, 0), weight, bias, groups), size, 0)
    if bias is not None:
        bias = _fold(bias, bias_dim, size, 0)
    if input_dim is None and groups == 1:
        # one input for all the weights: they are further output channels
        return _unfold(run(input, _fold(weight, weight_dim, size, out_channels), bias, 1), size, 1)
    return _unfold(run(_fold(input, input_dim, size, 1), _fold(weight, weight_dim, size, 0), bias, size * groups), size, 1)


def _fold(tensor: Tensor, dim: int | None, size: int, into: int) -> Tensor:
    """Merge the vmapped dimension, broadcast if there is none, into dimension `into` as its slower part."""
    if dim is None:
        shape = list(tensor.shape)
        shape.insert(into, size)
        tensor = tensor.unsqueeze(into).expand(shape)
    else:
        tensor = tensor.movedim(dim, into)
    return tensor.flatten(into, into + 1)


def _unfold(tensor: Tensor, size: int, dim: int) -> tuple[Tensor, int]:
    return tensor.unflatten(dim, (size, tensor.shape[dim] // size)), dim
