"""The operators ``triton_conv::*``: schemas and what PyTorch asks of them (fake tensors, autograd, autocast, vmap).

The operators are closed under differentiation, so double backward and compiled backward graphs use them too: ``conv1d``,
``conv_transpose1d``, ``conv1d_input_grad``, ``conv1d_weight_grad``, ``conv1d_bias_grad``, and ``conv1d_weight_bias_grad`` which
gives what the two before it give. Every output is contiguous. How a convolution is computed is decided below, in `execute` and
`gradients`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from torch._C import DispatchKey, DispatchKeySet
from torch.autograd import forward_ad

from torch_conv_triton import execute, gradients, vmap
from torch_conv_triton.direct import add_direct, is_unwatched
from torch_conv_triton.problem import check_arguments, output_length, single

_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)
_GEOMETRY = "int[1] stride=1, int[1] padding=0, int[1] dilation=1, int groups=1"
_TRANSPOSED_GEOMETRY = "int[1] stride=1, int[1] padding=0, int[1] output_padding=0, int groups=1, int[1] dilation=1"
_ARGUMENTS = {
    "conv1d": f"Tensor input, Tensor weight, Tensor? bias=None, {_GEOMETRY}",
    "conv_transpose1d": f"Tensor input, Tensor weight, Tensor? bias=None, {_TRANSPOSED_GEOMETRY}",
    "conv1d_input_grad": f"Tensor grad_output, Tensor weight, SymInt input_length, {_GEOMETRY}",
    "conv1d_weight_grad": f"Tensor grad_output, Tensor input, SymInt kernel_size, {_GEOMETRY}",
    "conv1d_bias_grad": "Tensor grad_output",
    "conv1d_weight_bias_grad": f"Tensor grad_output, Tensor input, SymInt kernel_size, {_GEOMETRY}",
}

_library = torch.library.Library("triton_conv", "DEF")
for _name, _arguments in _ARGUMENTS.items():
    _returned = "(Tensor, Tensor)" if _name == "conv1d_weight_bias_grad" else "Tensor"
    _library.define(f"{_name}({_arguments}) -> {_returned}", tags=_TAGS)

conv1d = torch.ops.triton_conv.conv1d.default
conv_transpose1d = torch.ops.triton_conv.conv_transpose1d.default
conv1d_input_grad = torch.ops.triton_conv.conv1d_input_grad.default
conv1d_weight_grad = torch.ops.triton_conv.conv1d_weight_grad.default
conv1d_bias_grad = torch.ops.triton_conv.conv1d_bias_grad.default
conv1d_weight_bias_grad = torch.ops.triton_conv.conv1d_weight_bias_grad.default

_aten = torch.ops.aten
_below_autograd = torch._C._AutoDispatchBelowAutograd
_functorch_active = torch._C._are_functorch_transforms_active
_any_requires_grad = torch._C._any_requires_grad


# what is computed, and the shapes that fake tensors need


def compute_conv1d(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    stride, padding, dilation = _geometry(stride, padding, dilation)
    if input.is_complex():
        return _aten.conv1d.default(input, weight, bias, [stride], [padding], [dilation], groups)
    return execute.forward(input, weight, bias, stride, padding, dilation, groups, False, 0)


def _conv1d_fake(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    stride, padding, dilation = _geometry(stride, padding, dilation)
    check_arguments(input, weight, bias, stride, padding, dilation, groups)
    length = output_length(input.shape[2], weight.shape[2], stride, padding, dilation)
    # aten answers no input channels with no output channels
    channels = weight.shape[0] if input.shape[1] else 0
    return input.new_empty((input.shape[0], channels, length))


def compute_conv_transpose1d(input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1):
    stride, padding, dilation = _geometry(stride, padding, dilation)
    output_padding = single(output_padding, "output_padding")
    if input.is_complex():
        return _aten.conv_transpose1d.default(input, weight, bias, [stride], [padding], [output_padding], groups, [dilation])
    return execute.forward(input, weight, bias, stride, padding, dilation, groups, True, output_padding)


def _conv_transpose1d_fake(input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1):
    stride, padding, dilation = _geometry(stride, padding, dilation)
    output_padding = single(output_padding, "output_padding")
    check_arguments(input, weight, bias, stride, padding, dilation, groups, True, output_padding)
    length = output_length(input.shape[2], weight.shape[2], stride, padding, dilation, True, output_padding)
    return input.new_empty((input.shape[0], weight.shape[1] * groups, length))


def _conv1d_input_grad(
    grad_output, weight, input_length, stride=1, padding=0, dilation=1, groups=1, *, compute=gradients.input_grad
):
    return compute(grad_output, weight, input_length, *_geometry(stride, padding, dilation), groups)


def _conv1d_input_grad_fake(grad_output, weight, input_length, stride=1, padding=0, dilation=1, groups=1):
    input = grad_output.new_empty((grad_output.shape[0], weight.shape[1] * groups, input_length))
    gradients.check_backward(grad_output, input, weight, *_geometry(stride, padding, dilation), groups)
    return input


def _conv1d_weight_grad(
    grad_output, input, kernel_size, stride=1, padding=0, dilation=1, groups=1, *, compute=gradients.weight_grad
):
    return compute(grad_output, input, kernel_size, *_geometry(stride, padding, dilation), groups)


def _conv1d_weight_grad_fake(grad_output, input, kernel_size, stride=1, padding=0, dilation=1, groups=1):
    weight = grad_output.new_empty((grad_output.shape[1], input.shape[1] // groups, kernel_size))
    gradients.check_backward(grad_output, input, weight, *_geometry(stride, padding, dilation), groups)
    return weight


def _conv1d_bias_grad_fake(grad_output):
    return grad_output.new_empty(grad_output.shape[1])


def _conv1d_weight_bias_grad(grad_output, input, kernel_size, stride=1, padding=0, dilation=1, groups=1):
    return gradients.weight_bias_grad(grad_output, input, kernel_size, *_geometry(stride, padding, dilation), groups)


def _conv1d_weight_bias_grad_fake(grad_output, *args):
    return _conv1d_weight_grad_fake(grad_output, *args), _conv1d_bias_grad_fake(grad_output)


def _geometry(stride, padding, dilation):
    return single(stride, "stride"), single(padding, "padding"), single(dilation, "dilation")


# what the operators run below autograd
COMPUTE: dict[torch._ops.OpOverload, Callable] = {}
for _name, _kernel, _fake in (
    ("conv1d", compute_conv1d, _conv1d_fake),
    ("conv_transpose1d", compute_conv_transpose1d, _conv_transpose1d_fake),
    ("conv1d_input_grad", _conv1d_input_grad, _conv1d_input_grad_fake),
    ("conv1d_weight_grad", _conv1d_weight_grad, _conv1d_weight_grad_fake),
    ("conv1d_bias_grad", gradients.bias_grad, _conv1d_bias_grad_fake),
    ("conv1d_weight_bias_grad", _conv1d_weight_bias_grad, _conv1d_weight_bias_grad_fake),
):
    _library.impl(_name, _kernel, "CPU")
    _library.impl(_name, _kernel, "CUDA")
    torch.library.register_fake(f"triton_conv::{_name}", _fake, lib=_library)
    _op = getattr(torch.ops.triton_conv, _name).default
    add_direct(_op, _kernel)
    COMPUTE[_op] = _kernel


# autograd


@contextmanager
def _autocast_excluded():
    keys = DispatchKeySet(DispatchKey.AutocastCPU) | DispatchKeySet(DispatchKey.AutocastCUDA)
    with torch._C._ExcludeDispatchKeyGuard(keys):
        yield


class Conv1d(torch.autograd.Function):
    """Differentiable `conv1d`; takes all arguments by position."""

    @staticmethod
    def forward(ctx, input, weight, bias, stride, padding, dilation, groups):
        ctx.save_for_backward(input, weight)
        ctx.geometry = stride, padding, dilation, groups
        with _below_autograd():
            return conv1d(input, weight, bias, stride, padding, dilation, groups)

    @staticmethod
    def backward(ctx, grad):
        input, weight = ctx.saved_tensors
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_input = conv1d_input_grad(grad, weight, input.shape[2], *ctx.geometry) if needs_input else None
        if needs_weight and needs_bias:
            grad_weight, grad_bias = conv1d_weight_bias_grad(grad, input, weight.shape[2], *ctx.geometry)
        else:
            grad_weight = conv1d_weight_grad(grad, input, weight.shape[2], *ctx.geometry) if needs_weight else None
            grad_bias = conv1d_bias_grad(grad) if needs_bias else None
        return grad_input, grad_weight, grad_bias, *(None,) * 4


class ConvTranspose1d(torch.autograd.Function):
    """Differentiable `conv_transpose1d`; takes all arguments by position."""

    @staticmethod
    def forward(ctx, input, weight, bias, stride, padding, output_padding, groups, dilation):
        ctx.save_for_backward(input, weight)
        ctx.geometry = stride, padding, dilation, groups
        # an output padding of a stride or more lets the convolution of the gradient run past the input's end
        ctx.surplus = single(output_padding, "output_padding") // single(stride, "stride")
        with _below_autograd():
            return conv_transpose1d(input, weight, bias, stride, padding, output_padding, groups, dilation)

    @staticmethod
    def backward(ctx, grad):
        input, weight = ctx.saved_tensors
        needs_input, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_input = grad_weight = None
        if needs_input:
            with _autocast_excluded():
                grad_input = conv1d(grad, weight, None, *ctx.geometry)
            if ctx.surplus:
                grad_input = grad_input.narrow(2, 0, input.shape[2])
        if needs_weight:
            padded = torch.nn.functional.pad(input, (0, ctx.surplus)) if ctx.surplus else input
            grad_weight = conv1d_weight_grad(padded, grad, weight.shape[2], *ctx.geometry)
        return grad_input, grad_weight, conv1d_bias_grad(grad) if needs_bias else None, *(None,) * 5


class Conv1dInputGrad(torch.autograd.Function):
    """Differentiable `conv1d_input_grad`; takes all arguments by position."""

    @staticmethod
    def forward(ctx, grad_output, weight, input_length, stride, padding, dilation, groups):
        ctx.save_for_backward(grad_output, weight)
        ctx.geometry = stride, padding, dilation, groups
        with _below_autograd():
            return conv1d_input_grad(grad_output, weight, input_length, stride, padding, dilation, groups)

    @staticmethod
    def backward(ctx, grad):
        grad_output, weight = ctx.saved_tensors
        with _autocast_excluded():
            return (
                conv1d(grad, weight, None, *ctx.geometry) if ctx.needs_input_grad[0] else None,
                conv1d_weight_grad(grad_output, grad, weight.shape[2], *ctx.geometry) if ctx.needs_input_grad[1] else None,
                *(None,) * 5,
            )


class Conv1dWeightGrad(torch.autograd.Function):
    """Differentiable `conv1d_weight_grad`; takes all arguments by position."""

    @staticmethod
    def forward(ctx, grad_output, input, kernel_size, stride, padding, dilation, groups):
        ctx.save_for_backward(grad_output, input)
        ctx.geometry = stride, padding, dilation, groups
        with _below_autograd():
            return conv1d_weight_grad(grad_output, input, kernel_size, stride, padding, dilation, groups)

    @staticmethod
    def backward(ctx, grad):
        grad_output, input = ctx.saved_tensors
        with _autocast_excluded():
            return (
                conv1d(input, grad, None, *ctx.geometry) if ctx.needs_input_grad[0] else None,
                conv1d_input_grad(grad_output, grad, input.shape[2], *ctx.geometry) if ctx.needs_input_grad[1] else None,
                *(None,) * 5,
            )


class Conv1dBiasGrad(torch.autograd.Function):
    """Differentiable `conv1d_bias_grad`."""

    @staticmethod
    def forward(ctx, grad_output):
        ctx.sizes = grad_output.shape
        with _below_autograd():
            return conv1d_bias_grad(grad_output)

    @staticmethod
    def backward(ctx, grad):
        return grad[:, None].expand(ctx.sizes)


class Conv1dWeightBiasGrad(torch.autograd.Function):
    """Differentiable `conv1d_weight_bias_grad`; takes all arguments by position."""

    @staticmethod
    def forward(ctx, grad_output, input, kernel_size, stride, padding, dilation, groups):
        ctx.save_for_backward(grad_output, input)
        ctx.geometry = stride, padding, dilation, groups
        with _below_autograd():
            return conv1d_weight_bias_grad(grad_output, input, kernel_size, stride, padding, dilation, groups)

    @staticmethod
    def backward(ctx, grad_weight, grad_bias):
        grad_output, input = ctx.saved_tensors
        with _autocast_excluded():
            return (
                conv1d(input, grad_weight, grad_bias, *ctx.geometry) if ctx.needs_input_grad[0] else None,
                conv1d_input_grad(grad_output, grad_weight, input.shape[2], *ctx.geometry) if ctx.needs_input_grad[1] else None,
                *(None,) * 5,
            )


def differentiable(function, op, composite, *args):
    """Run `op` on all of its arguments, by position, with gradients through `function`.

    Functorch transforms and forward AD differentiate only what aten is made of, complex gradients need aten's conjugates,
    and without channels the shapes are aten's own, so those run `composite`.
    """
    if _functorch_active() or forward_ad._current_level >= 0 or args[0].is_complex() or 0 in args[0].shape[1:2]:
        return composite(*args)
    if torch.is_grad_enabled() and _any_requires_grad(*args):
        return function.apply(*args)
    if args[0].is_cuda and is_unwatched(*(arg for arg in args if isinstance(arg, Tensor))):
        # another pass through the dispatcher takes as long as the rest of the call
        return COMPUTE[op](*args)
    with _below_autograd():
        return op(*args)


def _conv1d_autograd(input, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    args = input, weight, bias, stride, padding, dilation, groups
    return differentiable(Conv1d, conv1d, torch.conv1d, *args)


def _conv_transpose1d_autograd(input, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1):
    args = input, weight, bias, stride, padding, output_padding, groups, dilation
    return differentiable(ConvTranspose1d, conv_transpose1d, torch.conv_transpose1d, *args)


def _conv1d_input_grad_autograd(grad_output, weight, input_length, stride=1, padding=0, dilation=1, groups=1):
    args = grad_output, weight, input_length, stride, padding, dilation, groups
    composite = partial(_conv1d_input_grad, compute=gradients.aten_input_grad)
    return differentiable(Conv1dInputGrad, conv1d_input_grad, composite, *args)


def _conv1d_weight_grad_autograd(grad_output, input, kernel_size, stride=1, padding=0, dilation=1, groups=1):
    args = grad_output, input, kernel_size, stride, padding, dilation, groups
    composite = partial(_conv1d_weight_grad, compute=gradients.aten_weight_grad)
    return differentiable(Conv1dWeightGrad, conv1d_weight_grad, composite, *args)


def _conv1d_bias_grad_autograd(grad_output):
    return differentiable(Conv1dBiasGrad, conv1d_bias_grad, lambda grad_output: grad_output.sum((0, 2)), grad_output)


def _conv1d_weight_bias_grad_autograd(grad_output, input, kernel_size, stride=1, padding=0, dilation=1, groups=1):
    def composite(grad_output, *args):
        return _conv1d_weight_grad(grad_output, *args, compute=gradients.aten_weight_grad), grad_output.sum((0, 2))

    args = grad_output, input, kernel_size, stride, padding, dilation, groups
    return differentiable(Conv1dWeightBiasGrad, conv1d_weight_bias_grad, composite, *args)


_library.impl("conv1d", _conv1d_autograd, "Autograd")
_library.impl("conv_transpose1d", _conv_transpose1d_autograd, "Autograd")
_library.impl("conv1d_input_grad", _conv1d_input_grad_autograd, "Autograd")
_library.impl("conv1d_weight_grad", _conv1d_weight_grad_autograd, "Autograd")
_library.impl("conv1d_bias_grad", _conv1d_bias_grad_autograd, "Autograd")
_library.impl("conv1d_weight_bias_grad", _conv1d_weight_bias_grad_autograd, "Autograd")


# autocast: the casts of aten's convolutions, to the dtype in force; float64 stays as it is


def _autocast(op, device: str):
    def cast(tensor, dtype):
        eligible = tensor is not None and tensor.is_floating_point() and tensor.dtype != torch.float64
        return tensor.to(dtype) if eligible and tensor.device.type == device else tensor

    def kernel(input, weight, bias=None, *geometry):
        dtype = torch.get_autocast_dtype(device)
        with _autocast_excluded():
            return op(cast(input, dtype), cast(weight, dtype), cast(bias, dtype), *geometry)

    return kernel


for _op in (conv1d, conv_transpose1d):
    _name = _op._schema.name.removeprefix("triton_conv::")
    _library.impl(_name, _autocast(_op, "cpu"), "AutocastCPU")
    _library.impl(_name, _autocast(_op, "cuda"), "AutocastCUDA")

for _rule in (
    vmap.conv1d,
    vmap.conv_transpose1d,
    vmap.conv1d_input_grad,
    vmap.conv1d_weight_grad,
    vmap.conv1d_bias_grad,
    vmap.conv1d_weight_bias_grad,
):
    torch.library.register_vmap(f"triton_conv::{_rule.__name__}", _rule, lib=_library)
