"""The operator ``triton_conv::conv1d_fused``: a convolution with its padding, and with what follows it, in one go.

For graphs that autograd is done with: it has no gradient. A kernel computes it where `plan` names one; elsewhere the ordinary
convolution and torch's operators do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_conv_triton import dispatch, execute, memory
from torch_conv_triton.calls import Call, Launch, remember, run, signature
from torch_conv_triton.direct import add_direct
from torch_conv_triton.dispatch import PREPARING, Plan, aten
from torch_conv_triton.epilogue import Program, allocate, evaluate, parse, prepare
from torch_conv_triton.problem import (
    KERNEL_DTYPES,
    Conv1dProblem,
    Strides,
    check_operands,
    current_precision,
    dtype_name,
)
from torch_conv_triton.registration import register

PADDING_MODES = ("zeros", "reflect", "replicate", "circular")

_calls: dict[tuple, FusedCall] = {}


class Arguments(NamedTuple):
    """The arguments of the operator, in its order."""

    input: Tensor  # (N, C_in, L_in)
    weight: Tensor  # (C_out, C_in / groups, K); of a transposed convolution (C_in, C_out / groups, K)
    bias: Tensor | None  # (C_out,)
    stride: int
    padding: Sequence[int]  # before x and after it, cropping if negative; if transposed cut off y, extending it if negative
    dilation: int
    groups: int
    transposed: bool
    padding_mode: str  # one of PADDING_MODES
    epilogue: str  # the text of a `Program`
    operands: Sequence[Tensor]  # a0, a1, ... of the program; each broadcasts to the outputs
    rounded: bool  # input holds TF32 values

    @property
    def C_out(self) -> int:
        return self.weight.shape[1] * self.groups if self.transposed else self.weight.shape[0]


def check_fused(a: Arguments) -> tuple[Program, int]:
    """The program and the length of the output. Raises RuntimeError or ValueError for arguments that make no sense."""
    check_operands(a.input, a.weight, a.bias, a.stride, 0, a.dilation, a.groups, a.transposed)
    if a.padding_mode not in PADDING_MODES or (a.transposed and a.padding_mode != "zeros"):
        of = " of a transposed convolution" if a.transposed else ""
        raise ValueError(f"padding_mode '{a.padding_mode}' is not supported{of}")
    start, end = a.padding
    L_in = a.input.shape[2]
    if a.padding_mode != "zeros":
        most = {"reflect": L_in - 1, "circular": L_in, "replicate": None}[a.padding_mode]
        torch._check(
            all(side >= 0 and (most is None or side <= most) for side in a.padding),
            lambda: f"{a.padding_mode} padding of {list(a.padding)} does not suit the length {L_in}",
        )
    L_out = fused_length(L_in, a.weight.shape[2], a.stride, start, end, a.dilation, a.transposed)
    torch._check(
        L_out > 0, lambda: f"Calculated output length {L_out} is too small: input length {L_in}, padding={list(a.padding)}"
    )
    program = parse(a.epilogue, a.input.dtype)
    if program.operands > len(a.operands):
        raise ValueError(f"the epilogue reads {program.operands} operands, but got {len(a.operands)}: {a.epilogue}")
    if program.halves and a.C_out % 2:
        raise ValueError(f"{a.C_out} channels have no halves: {a.epilogue}")
    shape = a.input.shape[0], program.channels(a.C_out), L_out
    for i, operand in enumerate(a.operands):
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


def problem_of(a: Arguments) -> Conv1dProblem:
    """The problem that valid arguments describe; it writes the epilogue's first output."""
    start, end = a.padding
    program = parse(a.epilogue, a.input.dtype)
    plain = Conv1dProblem.from_tensors(a.input, a.weight, a.bias, a.stride, start, a.dilation, a.groups, a.transposed)
    asymmetric = replace(
        plain,
        padding_end=None if start == end else end,
        padding_mode=a.padding_mode,
        # a kernel that computes what comes before rounds that itself
        rounded=(a.rounded or bool(program.prologue)) and plain.precision == "tf32",
    )
    first = program.outputs[0]
    return replace(asymmetric, y_strides=first.strides(plain.C_out, asymmetric.L_out))


def plan(a: Arguments) -> Plan:
    """How the operator would run these arguments, and why. Tensors need no memory."""
    program = parse(a.epilogue, a.input.dtype)
    stored = [output.dtype for output in program.outputs]
    read = [operand.dtype for operand in a.operands if operand.dtype != torch.bool]
    for dtype in (*stored, *read):
        if dtype not in KERNEL_DTYPES:
            return aten(f"{dtype_name(dtype)} is computed by aten")
    beside = len(stored) > 1 or any(operand.dim() > 1 and min(operand.shape[-2:]) > 1 for operand in a.operands)
    problem, device = problem_of(a), dispatch.device_for(a.input.device)
    if program == parse("", a.input.dtype) and a.padding_mode == "zeros" and problem.padding_end is None:
        return dispatch.plan(problem, device)
    found = dispatch.fused_plan(problem, device, beside, program.halves)
    if found.is_aten and not problem.has_bias and any(instruction.name != "tf32" for instruction in program.instructions):
        # what follows costs aten a pass over the output, as a bias does, and our kernels nothing
        found = dispatch.fused_plan(replace(problem, has_bias=True), device, beside, program.halves)
    if program.prologue and not found.is_aten and found.kernel not in PREPARING:
        able = [] if program.halves else [c for c in dispatch.candidates(problem, device) if c.kernel in PREPARING]
        return able[0] if able else aten("no kernel of ours computes what comes before this convolution")
    return found


def compute_conv1d_fused(*arguments):
    call, given = find_call(*arguments)
    return call.compute(given, arguments)


def find_call(*arguments) -> tuple[FusedCall, list[Tensor]]:
    """The call that these arguments of the operator make, checked and planned once, and its tensors.

    The tensors are input, weight, bias if there is one, and operands.
    """
    input, weight, bias, stride, padding, dilation, groups, transposed, padding_mode, epilogue, operands, rounded = arguments
    # models compiled ahead of time hand over an empty list of tensors as None
    operands = operands or []
    geometry = stride, tuple(padding), dilation, groups, transposed, padding_mode
    if bias is not None:
        bias = bias.contiguous()
    given = [input, weight, *operands] if bias is None else [input, weight, bias, *operands]
    # where each operand is first given: a call that gives one tensor twice is another call than one that gives two
    addresses = [*map(id, given)]
    firsts = tuple([addresses.index(id(operand)) for operand in operands])
    decided = geometry, epilogue, rounded, current_precision(input.dtype)
    key = decided, firsts, bias is None, tuple([signature(t) for t in given])
    call = _calls.get(key)
    if call is None:
        call = FusedCall.of(Arguments(input, weight, bias, *geometry, epilogue, operands, rounded), firsts)
        remember(_calls, key, call)
    return call, given


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

    def compute(self, given: Sequence[Tensor], arguments: Sequence) -> list[Tensor]:
        """The outputs, for the tensors that `find_call` returned, and for its arguments."""
        input, weight, bias, *geometry, _, operands, _ = arguments
        if self.plan.is_aten:
            y = _convolution(prepare(self.program, input), weight, bias, *geometry)
            return evaluate(self.program, y, operands or [], self.problem.precision == "tf32")
        outputs = [memory.uninitialised(self.shape, strides, dtype, input.device) for strides, dtype in self.allocations]
        run(
            self,
            self.launch,
            input,
            weight,
            given[2] if self.problem.has_bias else None,
            *outputs,
            *[given[i] for i in self.distinct],
        )
        return outputs

    @classmethod
    def of(cls, arguments: Arguments, firsts: Sequence[int]) -> FusedCall:
        """The call of the operator with these arguments; `firsts` says where among the tensors each operand is first given."""
        program, L_out = check_fused(arguments)
        problem = problem_of(arguments)
        C = program.channels(problem.C_out)
        call = cls(
            problem=problem,
            plan=plan(arguments),
            program=program,
            shape=(problem.N, C, L_out),
            allocations=[(output.strides(C, L_out), output.dtype) for output in program.outputs],
            distinct=sorted({i for i in firsts if i >= 2 + problem.has_bias}),
        )
        if not call.plan.is_aten:
            call.launch = partial(_launch, *call._texts(arguments.operands, firsts))
        return call

    def _texts(self, operands: Sequence[Tensor], firsts: Sequence[int]) -> tuple[str, str, list[int]]:
        """What the kernel computes before and after, and where it finds a second output and operands among a launch's tensors."""
        from torch_conv_triton.kernels.epilogue import kernel_text, operand_kind, prologue_text

        outputs = len(self.allocations)
        places = {0: 0, 1: 1, 2: 2} | {i: 3 + outputs + j for j, i in enumerate(self.distinct)}
        kinds = [operand_kind(operand, self.shape) for operand in operands]
        found = [*range(4, 3 + outputs), *(places[i] for i in firsts)]
        return prologue_text(self.program), kernel_text(self.program, kinds, self.problem.precision == "tf32"), found


def _launch(before: str, after: str, places: list[int], plan: Plan, p: Conv1dProblem, *tensors: Tensor | None) -> None:
    from torch_conv_triton.kernels.epilogue import Fusion

    x, weight, bias, y, *_ = tensors
    fusion = Fusion(after, tuple([tensors[i] for i in places]), p.padding_mode, p.rounded, before)
    execute.launch_kernel(plan, p, x, weight, bias, y, fusion)


def fake(*arguments):
    """The outputs as fake tensors."""
    a = Arguments(*arguments)
    program, L_out = check_fused(a)
    return allocate(program, a.input, (a.input.shape[0], a.C_out, L_out))


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


# what the operators run
COMPUTE = register(
    "conv1d_fused",
    "Tensor input, Tensor weight, Tensor? bias, int stride, SymInt[2] padding, int dilation, int groups, "
    "bool transposed, str padding_mode, str epilogue, Tensor[] operands, bool rounded",
    compute_conv1d_fused,
    fake,
)
conv1d_fused = torch.ops.triton_conv.conv1d_fused.default
for _op, _compute in COMPUTE.items():
    add_direct(_op, _compute)
