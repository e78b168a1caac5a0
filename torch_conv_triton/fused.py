"""The operator ``triton_conv::conv1d_fused``: a convolution with its padding, and with what follows it, in one go.

For inference graphs only: it has no gradient. A kernel computes it where `plan` names one; elsewhere the ordinary convolution and
torch's operators do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_conv_triton import dispatch, execute
from torch_conv_triton.calls import Call, Launch, remember, run, signature
from torch_conv_triton.dispatch import Plan, aten
from torch_conv_triton.epilogue import Program, allocate, evaluate, parse
from torch_conv_triton.problem import (
    KERNEL_DTYPES,
    Conv1dProblem,
    Strides,
    check_operands,
    current_precision,
    dtype_name,
)

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")

_library = torch.library.Library("triton_conv", "FRAGMENT")
# `one` is for programs of one output: Inductor's C++ wrapper (torch 2.13) crashes on a list of one tensor
for _name, _results in (("conv1d_fused", "Tensor[]"), ("conv1d_fused.one", "Tensor")):
    _library.define(
        f"{_name}(Tensor input, Tensor weight, Tensor? bias, int stride, SymInt[2] padding, int dilation, int groups, "
        f"bool transposed, str padding_mode, str epilogue, Tensor[] operands, bool rounded) -> {_results}",
        tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
    )
conv1d_fused = torch.ops.triton_conv.conv1d_fused.default

_calls: dict[tuple, FusedCall] = {}


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


def plan(
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
) -> Plan:
    """How the operator would run these arguments, its own, and why. Tensors need no memory."""
    arguments = input, weight, bias, stride, padding, dilation, groups, transposed, padding_mode, epilogue, operands, rounded
    stored = [output.dtype for output in parse(epilogue, input.dtype).outputs]
    for dtype in (*stored, *(operand.dtype for operand in operands)):
        if dtype not in KERNEL_DTYPES:
            return aten(f"{dtype_name(dtype)} is computed by aten")
    beside = len(stored) > 1 or any(operand.dim() > 1 and min(operand.shape[-2:]) > 1 for operand in operands)
    return dispatch.fused_plan(problem_of(*arguments), dispatch.device_for(input.device), beside)


def supports(*arguments) -> bool:
    """Whether one kernel of ours would compute all of what these arguments, the operator's own, ask for."""
    return not plan(*arguments).is_aten


def compute_conv1d_fused(
    input, weight, bias, stride, padding, dilation, groups, transposed, padding_mode, epilogue, operands, rounded
):
    # models compiled ahead of time hand over an empty list of tensors as None
    operands = operands or []
    geometry = stride, *padding, dilation, groups, transposed, padding_mode, epilogue, rounded, current_precision(input.dtype)
    if bias is not None:
        bias = bias.contiguous()
    given = [input, weight, *operands] if bias is None else [input, weight, bias, *operands]
    # where each operand is first given: a call that gives one tensor twice is another call than one that gives two
    firsts = tuple([next(i for i, t in enumerate(given) if t is operand) for operand in operands])
    key = geometry, firsts, bias is None, tuple([signature(t) for t in given])
    call = _calls.get(key)
    if call is None:
        arguments = input, weight, bias, stride, padding, dilation, groups, transposed, padding_mode, epilogue, operands, rounded
        call = remember(_calls, key, FusedCall.of(operands, firsts, *arguments))
    if call.plan.is_aten:
        y = _convolution(input, weight, bias, stride, padding, dilation, groups, transposed, padding_mode)
        return evaluate(call.program, y, operands, call.problem.precision == "tf32")
    outputs = [torch.empty_strided(call.shape, strides, dtype=dtype, device=input.device) for strides, dtype in call.allocations]
    run(call, call.launch, input, weight, bias, *outputs, *[given[i] for i in call.distinct])
    return outputs


def forget_plans() -> None:
    """Plan every fused call anew, after the tables have changed."""
    _calls.clear()


@dataclass(slots=True, kw_only=True)
class FusedCall(Call):
    """A `Call` with what its outputs are, and what its kernel is given.

    `shape` of the outputs, and strides and dtype of each in `allocations`. `launch` takes input, weight, bias, the outputs and
    the `distinct` operands, which are told by their places among input, weight, bias if there is one, and operands.
    """

    program: Program
    shape: tuple[int, int, int]
    allocations: list[tuple[Strides, torch.dtype]]
    launch: Launch | None = None
    distinct: list[int]

    @classmethod
    def of(cls, operands: Sequence[Tensor], firsts: Sequence[int], *arguments) -> FusedCall:
        """The call of the operator with these arguments; `firsts` says where among the tensors each operand is first given."""
        program, L_out = check_fused(*arguments)
        problem = problem_of(*arguments)
        call = cls(
            problem=problem,
            plan=plan(*arguments),
            program=program,
            shape=(problem.N, problem.C_out, L_out),
            allocations=[(output.strides(problem.C_out, L_out), output.dtype) for output in program.outputs],
            distinct=sorted({i for i in firsts if i >= 2 + problem.has_bias}),
        )
        if not call.plan.is_aten:
            call.launch = partial(_launch, *call._epilogue(operands, firsts))
        return call

    def _epilogue(self, operands: Sequence[Tensor], firsts: Sequence[int]) -> tuple[str, list[int]]:
        """The kernel's text, and where it finds a second output and its operands among the tensors of a launch."""
        from torch_conv_triton.kernels.epilogue import kernel_text, operand_kind

        outputs = len(self.allocations)
        places = {0: 0, 1: 1, 2: 2} | {i: 3 + outputs + j for j, i in enumerate(self.distinct)}
        kinds = [operand_kind(operand, self.shape) for operand in operands]
        found = [*range(4, 3 + outputs), *(places[i] for i in firsts)]
        return kernel_text(self.program, kinds, self.problem.precision == "tf32"), found


def _launch(text: str, places: list[int], plan: Plan, p: Conv1dProblem, *tensors: Tensor | None) -> None:
    from torch_conv_triton.kernels.epilogue import Fusion

    x, weight, bias, y, *_ = tensors
    fusion = Fusion(text, tuple([tensors[i] for i in places]), p.padding_mode, p.rounded)
    execute.launch_kernel(plan, p, x, weight, bias, y, fusion)


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


def _one(compute):
    def compute_one(*arguments):
        (output,) = compute(*arguments)
        return output

    return compute_one


# what the operators run
COMPUTE = {conv1d_fused: compute_conv1d_fused, torch.ops.triton_conv.conv1d_fused.one: _one(compute_conv1d_fused)}
for (_op, _compute), _fake in zip(COMPUTE.items(), (_conv1d_fused_fake, _one(_conv1d_fused_fake)), strict=True):
    _library.impl(_op, _compute, "CPU")
    _library.impl(_op, _compute, "CUDA")
    torch.library.register_fake(_op, _fake, lib=_library)
