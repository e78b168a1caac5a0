"""The operator ``triton_conv::conv1d_fused``: a convolution with its padding, and with what follows it, in one go.

For inference graphs only: it has no gradient. A kernel computes it where `plan` names one; elsewhere the ordinary convolution and
torch's operators do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_conv_triton import execute
from torch_conv_triton.dispatch import Plan, aten
from torch_conv_triton.epilogue import Program, allocate, evaluate, parse
from torch_conv_triton.problem import Conv1dProblem, check_operands, current_precision

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")

_library = torch.library.Library("triton_conv", "FRAGMENT")
_library.define(
    "conv1d_fused(Tensor input, Tensor weight, Tensor? bias, int stride, SymInt[2] padding, int dilation, int groups, "
    "bool transposed, str padding_mode, str epilogue, Tensor[] operands, bool rounded) -> Tensor[]",
    tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
)
conv1d_fused = torch.ops.triton_conv.conv1d_fused.default


def check_fused(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: Sequence[int],
    dilation: int,
    groups: int,
    transposed: bool,
    padding_mode: str,
    epilogue: str,
    operands: Sequence[Tensor],
    rounded: bool,
) -> tuple[Program, int]:
    """The program and the length of the output. Raises RuntimeError or ValueError for arguments that make no sense."""
    check_operands(input, weight, bias, stride, 0, dilation, groups, transposed)
    if padding_mode not in PADDING_MODES or (transposed and padding_mode != "zeros"):
        raise ValueError(f"padding_mode '{padding_mode}' is not supported{' of a transposed convolution' if transposed else ''}")
    start, end = padding
    L_in = input.shape[2]
    if padding_mode != "zeros":
        most = {"reflect": L_in - 1, "circular": L_in, "replicate": None}[padding_mode]
        torch._check(
            all(side >= 0 and (most is None or side <= most) for side in padding),
            lambda: f"{padding_mode} padding of {list(padding)} does not suit the length {L_in}",
        )
    L_out = fused_length(L_in, weight.shape[2], stride, start, end, dilation, transposed)
    torch._check(
        L_out > 0, lambda: f"Calculated output length {L_out} is too small: input length {L_in}, padding={list(padding)}"
    )
    program = parse(epilogue, input.dtype)
    if program.operands > len(operands):
        raise ValueError(f"the epilogue reads {program.operands} operands, but got {len(operands)}: {epilogue}")
    shape = input.shape[0], weight.shape[1] * groups if transposed else weight.shape[0], L_out
    for i, operand in enumerate(operands):
        if operand.dim() > 3:
            raise RuntimeError(f"operand a{i} of size {list(operand.shape)} does not broadcast to {list(shape)}")
        for size, wanted in zip(reversed(operand.shape), reversed(shape), strict=False):
            torch._check(
                size == 1 or size == wanted,
                lambda i=i, operand=operand: f"operand a{i} of size {list(operand.shape)} does not broadcast to {list(shape)}",
            )
    return program, L_out


def fused_length(L_in, K, stride, start, end, dilation, transposed):
    """Length of the output; plain arithmetic, so symbolic lengths pass through."""
    reach = dilation * (K - 1)
    if transposed:
        return (L_in - 1) * stride + reach + 1 - start - end
    return (L_in + start + end - reach - 1) // stride + 1


def problem_of(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: Sequence[int],
    dilation: int,
    groups: int,
    transposed: bool,
    padding_mode: str,
    epilogue: str,
    operands: Sequence[Tensor],
    rounded: bool,
) -> Conv1dProblem:
    """The problem that valid arguments describe; it writes the epilogue's first output."""
    start, end = padding
    plain = Conv1dProblem.from_tensors(input, weight, bias, stride, start, dilation, groups, transposed)
    asymmetric = replace(
        plain,
        padding_end=None if start == end else end,
        padding_mode=padding_mode,
        rounded=rounded and plain.precision == "tf32",
    )
    first = parse(epilogue, input.dtype).outputs[0]
    return replace(asymmetric, y_strides=first.strides(plain.C_out, asymmetric.L_out))


def plan(*arguments) -> Plan:
    """How the operator would run these arguments, its own, and why."""
    return aten("no kernel has an epilogue yet")


def supports(*arguments) -> bool:
    """Whether one kernel of ours would compute all of what these arguments, the operator's own, ask for."""
    return not plan(*arguments).is_aten


def compute_conv1d_fused(
    input, weight, bias, stride, padding, dilation, groups, transposed, padding_mode, epilogue, operands, rounded
):
    arguments = input, weight, bias, stride, padding, dilation, groups, transposed, padding_mode, epilogue, operands, rounded
    program, _ = check_fused(*arguments)
    y = _convolution(input, weight, bias, stride, padding, dilation, groups, transposed, padding_mode)
    return evaluate(program, y, operands, current_precision(input.dtype) == "tf32")


def _conv1d_fused_fake(
    input, weight, bias, stride, padding, dilation, groups, transposed, padding_mode, epilogue, operands, rounded
):
    arguments = input, weight, bias, stride, padding, dilation, groups, transposed, padding_mode, epilogue, operands, rounded
    program, L_out = check_fused(*arguments)
    return allocate(program, input, (input.shape[0], weight.shape[1] * groups if transposed else weight.shape[0], L_out))


def _convolution(input, weight, bias, stride, padding, dilation, groups, transposed, padding_mode) -> Tensor:
    """The convolution by the ordinary operators, with a padded copy of x or a slice of y where they know no such padding."""
    start, end = padding
    if transposed:
        surplus = start - end
        if start >= 0 and 0 <= surplus < max(stride, dilation):
            return execute.forward(input, weight, bias, stride, start, dilation, groups, True, surplus)
        whole = execute.forward(input, weight, None, stride, 0, dilation, groups, True)
        y = F.pad(whole, (-start, -end))
        return y if bias is None else y + bias[:, None]
    if padding_mode == "zeros" and start == end and start >= 0:
        return execute.forward(input, weight, bias, stride, start, dilation, groups)
    padded = F.pad(input, (start, end), mode="constant" if padding_mode == "zeros" else padding_mode)
    return execute.forward(padded, weight, bias, stride, 0, dilation, groups)


_library.impl("conv1d_fused", compute_conv1d_fused, "CPU")
_library.impl("conv1d_fused", compute_conv1d_fused, "CUDA")
torch.library.register_fake("triton_conv::conv1d_fused", _conv1d_fused_fake, lib=_library)
