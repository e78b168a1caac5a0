"""`conv1d` and `conv_transpose1d` as `torch.nn.functional` has them, run by our operators where those can.

The rest goes to `torch.nn.functional`: devices and dtypes without a kernel of ours, tensor subclasses, functorch
transforms and forward-mode AD.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from operator import index
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.fx.experimental.symbolic_shapes import has_static_value

from torch_conv_triton import execute, ops
from torch_conv_triton.problem import KERNEL_DTYPES, single

# the tracers' own tensors stand for plain ones
_PLAIN_TYPES = (Tensor, torch.nn.Parameter, FakeTensor, FunctionalTensor)
_any_autocast = torch._C._is_any_autocast_enabled


def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    """1-D convolution, called like `torch.nn.functional.conv1d`.

    Args:
        input: ``(N, C_in, L_in)`` or ``(C_in, L_in)``; any strides, channels-last ones are not copied.
        weight: ``(C_out, C_in / groups, K)``, of the dtype and device of input, as is bias.
        bias: ``(C_out,)``.
        stride, dilation: a positive integer, or a list of one.
        padding: zeros added on both sides (an integer or a list of one), ``"valid"`` (none) or ``"same"`` (as many as
            keep the length; stride 1 only; an odd one out goes to the right).
        groups: divides C_in and C_out.

    Returns:
        ``(N, C_out, L_out)`` or ``(C_out, L_out)`` of input's dtype, contiguous, with
        ``L_out = (L_in + 2 * padding - dilation * (K - 1) - 1) // stride + 1``.

    Raises:
        RuntimeError, TypeError: as `torch.nn.functional.conv1d` does; the message names the argument and its value.
    """
    if not _runs_here(input, weight, bias):
        return F.conv1d(input, weight, bias, stride, padding, dilation, groups)
    stride, dilation, groups = _integer(stride, "stride"), _integer(dilation, "dilation"), _index(groups, "groups")
    if isinstance(padding, str):
        input, padding = _string_padding(input, weight, stride, padding, dilation)
    else:
        padding = _integer(padding, "padding")
    if input.dim() == 2:
        return _call(_CONV1D, input.unsqueeze(0), weight, bias, stride, padding, dilation, groups).squeeze(0)
    return _call(_CONV1D, input, weight, bias, stride, padding, dilation, groups)


def conv_transpose1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    output_padding: int | Sequence[int] = 0,
    groups: int = 1,
    dilation: int | Sequence[int] = 1,
) -> Tensor:
    """Transposed 1-D convolution, called like `torch.nn.functional.conv_transpose1d`.

    Args:
        input: ``(N, C_in, L_in)`` or ``(C_in, L_in)``; any strides.
        weight: ``(C_in, C_out / groups, K)``, of the dtype and device of input, as is bias.
        bias: ``(C_out,)``.
        stride, dilation: a positive integer, or a list of one.
        padding: output positions cut off on both sides.
        output_padding: positions added on the right, fewer than the stride or the dilation.
        groups: divides C_in and C_out.

    Returns:
        ``(N, C_out, L_out)`` or ``(C_out, L_out)`` of input's dtype, contiguous, with
        ``L_out = (L_in - 1) * stride - 2 * padding + dilation * (K - 1) + output_padding + 1``.

    Raises:
        RuntimeError, TypeError: as `torch.nn.functional.conv_transpose1d` does; the message names the argument and its value.
    """
    if not _runs_here(input, weight, bias):
        return F.conv_transpose1d(input, weight, bias, stride, padding, output_padding, groups, dilation)
    geometry = (
        _integer(stride, "stride"),
        _integer(padding, "padding"),
        _integer(output_padding, "output_padding"),
        _index(groups, "groups"),
        _integer(dilation, "dilation"),
    )
    if input.dim() == 2:
        return _call(_CONV_TRANSPOSE1D, input.unsqueeze(0), weight, bias, *geometry).squeeze(0)
    return _call(_CONV_TRANSPOSE1D, input, weight, bias, *geometry)


class _Ways(NamedTuple):
    """What computes a convolution: with gradients, in a graph, as torch has it, and where nothing but the result is asked for."""

    differentiable: type[torch.autograd.Function]
    operator: torch._ops.OpOverload
    composite: Callable[..., Tensor]
    plain: Callable[..., Tensor]


_CONV1D = _Ways(ops.Conv1d, ops.conv1d, torch.conv1d, execute.forward)
_CONV_TRANSPOSE1D = _Ways(ops.ConvTranspose1d, ops.conv_transpose1d, torch.conv_transpose1d, ops.compute_conv_transpose1d)


def _call(ways: _Ways, input: Tensor, weight: Tensor, bias: Tensor | None, *geometry) -> Tensor:
    # a graph holds the operator
    if torch.compiler.is_compiling():
        # its schema takes integers; a padding that follows from a length that changes is torch's business
        run = ways.operator if all(map(has_static_value, geometry)) else ways.composite
        return run(input, weight, bias, *geometry)
    if _any_autocast() and torch.is_autocast_enabled(input.device.type):
        return ways.operator(input, weight, bias, *geometry)
    # in eager mode every pass through the dispatcher that nothing asks for is saved
    if ops.is_unwatched(input, weight, bias):
        return ways.plain(input, weight, bias, *geometry)
    return ops.differentiable(ways.differentiable, ways.operator, ways.composite, input, weight, bias, *geometry)


def _runs_here(input: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    if type(input) not in _PLAIN_TYPES or type(weight) not in _PLAIN_TYPES:
        return False
    if bias is not None and type(bias) not in _PLAIN_TYPES:
        return False
    if input.dtype not in KERNEL_DTYPES or not (input.is_cuda or _interpreted(input)):
        return False
    return not torch._C._are_functorch_transforms_active() and forward_ad._current_level < 0


def _interpreted(input: Tensor) -> bool:
    return input.is_cpu and os.environ.get("TRITON_INTERPRET") == "1"


def _integer(value: int | Sequence[int], name: str) -> int:
    return value if type(value) is int else _index(single(value, name), name, "an int or a list of one int")


def _index(value: int, name: str, wanted: str = "an int") -> int:
    """The integer that `value` is, NumPy's and a tensor's too, as torch reads them."""
    if type(value) is int or isinstance(value, torch.SymInt):
        return value
    try:
        if type(value) is not bool:
            return index(value)
    except TypeError:
        pass
    raise TypeError(f"{name} must be {wanted}, but got {name}={value!r} of type {type(value).__name__}")


def _string_padding(input: Tensor, weight: Tensor, stride: int, padding: str, dilation: int) -> tuple[Tensor, int]:
    """The input and the padding on both sides that ``"same"`` or ``"valid"`` stand for."""
    if padding == "valid":
        return input, 0
    if padding != "same":
        raise RuntimeError(f"padding must be 'same', 'valid' or an integer, but got padding={padding!r}")
    if stride != 1:
        raise RuntimeError(f"padding='same' is not supported for strided convolutions, but got stride={stride}")
    total = dilation * (weight.shape[-1] - 1)
    return F.pad(input, (0, 1)) if total % 2 else input, total // 2
