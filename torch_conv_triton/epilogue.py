"""What follows a convolution in the fused operator: a program of pointwise instructions, written as text.

``mul %0 0.1; gt %0 0.0; where %2 %0 %1; add %3 a0; out %4 fp32 NCL`` is a leaky ReLU and a residual. Values are float32 and
numbered: %0 is the convolution with its bias, instruction i makes %(i + 1). An argument is a value, an operand (a0, a1, ...: a
tensor that broadcasts against the output ``(N, C_out, L_out)``) or a number. Comparisons make 1 or 0. The outputs come last, one
or two, each rounded once.

``halve; tanh %0; sigmoid %1; mul %2 %3; out %4 fp32 NCL`` is a gate over split channels. `halve` may come first, and cuts the
convolution in two: %0 is then the first half of its channels and %1 the second. Operands and outputs have C_out / 2 channels.

``mul %0 0.1; gt %0 0.0; where %2 %0 %1; conv; out %0 fp32 NCL`` computes a leaky ReLU of the input before the convolution. What
stands before `conv` has values of its own, %0 being the input, and no operands; its last value is convolved, in the input's
dtype. It makes zeros of zeros, so that padding stays what it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from torch_conv_triton.problem import Strides, contiguous_strides, dtype_name

DTYPES = {dtype_name(dtype): dtype for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64)}
LAYOUTS = ("NCL", "NLC")


@dataclass(frozen=True, slots=True)
class Value:
    """A value of the program: 0 is the convolution, or the first half of it."""

    index: int

    def __str__(self) -> str:
        return f"%{self.index}"


@dataclass(frozen=True, slots=True)
class Operand:
    """A tensor that the operator is given beside the convolution's own."""

    index: int

    def __str__(self) -> str:
        return f"a{self.index}"


Argument = Value | Operand | float


@dataclass(frozen=True, slots=True)
class Instruction:
    """One of `INSTRUCTIONS`, applied element by element; or `HALVE`."""

    name: str
    arguments: tuple[Argument, ...]

    def __str__(self) -> str:
        return " ".join([self.name, *map(str, self.arguments)])


HALVE = Instruction("halve", ())


@dataclass(frozen=True, slots=True)
class Output:
    """A value that is stored: rounded to `dtype`, with contiguous ("NCL") or channels-last ("NLC") strides."""

    value: Value
    dtype: torch.dtype
    layout: str

    def __str__(self) -> str:
        return f"out {self.value} {dtype_name(self.dtype)} {self.layout}"

    def strides(self, C: int, L: int) -> Strides:
        return contiguous_strides(C, L) if self.layout == "NCL" else (C * L, 1, C)


@dataclass(frozen=True, slots=True)
class Program:
    """Instructions, then the values that are stored; `prologue`: those before the convolution. `str` gives what `parse` takes."""

    instructions: tuple[Instruction, ...]
    outputs: tuple[Output, ...]
    prologue: tuple[Instruction, ...] = ()

    def __str__(self) -> str:
        before = (*self.prologue, "conv") if self.prologue else ()
        return "; ".join(map(str, (*before, *self.instructions, *self.outputs)))

    @property
    def operands(self) -> int:
        """How many operands the program reads: one more than the last of them."""
        found = [a.index for i in self.instructions for a in i.arguments if isinstance(a, Operand)]
        return max(found, default=-1) + 1

    @property
    def halves(self) -> bool:
        """Whether it is computed of the two halves of the convolution's channels."""
        return self.instructions[:1] == (HALVE,)

    def channels(self, C_out: int) -> int:
        """Channels of the outputs, for a convolution of C_out."""
        return C_out // 2 if self.halves else C_out


@dataclass
class Builder:
    """Writes a program instruction by instruction; what was computed before is not computed again."""

    _instructions: list[Instruction] = field(default_factory=list)
    _values: dict[str, Value] = field(default_factory=dict)
    _outputs: list[Output] = field(default_factory=list)

    def emit(self, name: str, *arguments: Argument) -> Value:
        """The value that an instruction makes of its arguments. Raises ValueError as `parse` does."""
        instruction = Instruction(name, tuple(a if isinstance(a, (Value, Operand)) else float(a) for a in arguments))
        _check(instruction, len(self._instructions) + 1)
        # as text 0.0 and -0.0 differ
        text = str(instruction)
        if text not in self._values:
            self._instructions.append(instruction)
            self._values[text] = Value(len(self._instructions))
        return self._values[text]

    def out(self, value: Value, dtype: torch.dtype, layout: str = "NCL") -> None:
        """Store a value."""
        self._outputs.append(Output(value, dtype, layout))

    def program(self) -> Program:
        return Program(tuple(self._instructions), tuple(self._outputs))


@lru_cache(maxsize=4096)
def parse(text: str, dtype: torch.dtype) -> Program:
    """The program that a text says; an empty one stores the convolution in `dtype`, contiguous.

    Raises ValueError for what is no instruction, has another number of arguments or names a value that is not there yet.
    """
    instructions: list[Instruction] = []
    prologue: tuple[Instruction, ...] = ()
    outputs: list[Output] = []
    for line in filter(None, (part.strip() for part in text.split(";"))):
        name, *words = line.split()
        if name == "out":
            outputs.append(_parse_output(line, words, len(instructions)))
        elif outputs:
            raise ValueError(f"an instruction follows the outputs: {line}")
        elif name == "conv":
            prologue, instructions = tuple(instructions), []
            _check_prologue(prologue, text)
        else:
            instruction = Instruction(name, tuple(map(_parse_argument, words)))
            _check(instruction, len(instructions) + 1)
            instructions.append(instruction)
    if not text.strip():
        outputs.append(Output(Value(0), dtype, "NCL"))
    if not 1 <= len(outputs) <= 2:
        raise ValueError(f"a program has one or two outputs, but got {len(outputs)}: {text}")
    return Program(tuple(instructions), tuple(outputs), prologue)


def _check_prologue(prologue: tuple[Instruction, ...], text: str) -> None:
    if not prologue or HALVE in prologue or any(isinstance(a, Operand) for i in prologue for a in i.arguments):
        raise ValueError(f"instructions without operands come before 'conv': {text}")
    if not keeps_zero(prologue):
        raise ValueError(f"what comes before 'conv' makes something else of zeros: {text}")


def _parse_output(line: str, words: list[str], values: int) -> Output:
    if len(words) != 3 or words[1] not in DTYPES or words[2] not in LAYOUTS:
        raise ValueError(f"expected 'out <value> <{'|'.join(DTYPES)}> <{'|'.join(LAYOUTS)}>', but got '{line}'")
    value = _parse_argument(words[0])
    if not isinstance(value, Value) or value.index > values:
        raise ValueError(f"there is no value {words[0]} to store: {line}")
    return Output(value, DTYPES[words[1]], words[2])


def _parse_argument(word: str) -> Argument:
    try:
        if word[0] in "%a":
            return (Value if word[0] == "%" else Operand)(int(word[1:]))
        return float(word)
    except ValueError:
        raise ValueError(f"expected a value (%0), an operand (a0) or a number, but got '{word}'") from None


def _check(instruction: Instruction, values: int) -> None:
    if instruction.name == HALVE.name:
        if instruction != HALVE or values > 1:
            raise ValueError(f"{HALVE.name} comes first and has no arguments, but got '{instruction}' as instruction {values}")
        return
    function = INSTRUCTIONS.get(instruction.name)
    if function is None:
        raise ValueError(f"there is no instruction '{instruction.name}'")
    if len(instruction.arguments) != function.arity:
        raise ValueError(f"{instruction.name} takes {function.arity} arguments, but got '{instruction}'")
    for argument in instruction.arguments:
        if isinstance(argument, Value) and not 0 <= argument.index < values:
            raise ValueError(f"{argument} is not computed before '{instruction}'")


@dataclass(frozen=True, slots=True)
class _Function:
    arity: int
    compute: Callable[..., Tensor]


def _comparison(compare: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda a, b: compare(a, b).to(a.dtype)


def _through(dtype: torch.dtype) -> Callable[..., Tensor]:
    return lambda a: a.to(dtype).to(a.dtype)


def round_tf32(a: Tensor) -> Tensor:
    """Float32 rounded to the nearest TF32 value, ties away from zero."""
    bits = a.view(torch.int32)
    return torch.where(a.isfinite(), ((bits + 0x1000) & -0x2000).view(torch.float32), a)


# what each instruction computes, in torch operators; kernels/epilogue.py computes the same in Triton
INSTRUCTIONS = {
    **{
        name: _Function(1, compute)
        for name, compute in {
            "neg": torch.neg,
            "abs": torch.abs,
            "exp": torch.exp,
            "expm1": torch.expm1,
            "log": torch.log,
            "log1p": torch.log1p,
            "sqrt": torch.sqrt,
            "rsqrt": torch.rsqrt,
            "reciprocal": torch.reciprocal,
            "pow2": torch.square,
            "sin": torch.sin,
            "cos": torch.cos,
            "tanh": torch.tanh,
            "sigmoid": torch.sigmoid,
            "erf": torch.erf,
            "bf16": _through(torch.bfloat16),
            "fp16": _through(torch.float16),
            "tf32": round_tf32,
        }.items()
    },
    **{
        name: _Function(2, compute)
        for name, compute in {
            "add": torch.add,
            "sub": torch.sub,
            "mul": torch.mul,
            "div": torch.div,
            "min": torch.minimum,
            "max": torch.maximum,
            "gt": _comparison(torch.gt),
            "lt": _comparison(torch.lt),
            "ge": _comparison(torch.ge),
            "le": _comparison(torch.le),
            "eq": _comparison(torch.eq),
            "ne": _comparison(torch.ne),
        }.items()
    },
    "where": _Function(3, lambda condition, a, b: torch.where(condition != 0, a, b)),
}


def prepare(program: Program, x: Tensor) -> Tensor:
    """The input that is convolved, in torch operators: the prologue's last value, rounded to the dtype of x."""
    return _apply(program.prologue, x).to(x.dtype) if program.prologue else x


def keeps_zero(instructions: Sequence[Instruction]) -> bool:
    """Whether the last value of instructions without operands is zero where %0 is."""
    return not _apply(instructions, torch.zeros(())).item()


def _apply(instructions: Sequence[Instruction], x: Tensor) -> Tensor:
    return _values(instructions, [x.to(torch.promote_types(x.dtype, torch.float32))], (), True)[-1].expand_as(x)


def _values(instructions: Sequence[Instruction], first: Sequence[Tensor], operands: Sequence[Tensor], tf32: bool) -> list[Tensor]:
    """The `first` values of a program and what instructions make of them, in their dtype; `tf32` as in `evaluate`."""
    values, like = list(first), first[0]

    def tensor(argument: Argument) -> Tensor:
        if isinstance(argument, Value):
            return values[argument.index]
        if isinstance(argument, Operand):
            return operands[argument.index].to(like.dtype)
        return torch.full((), argument, dtype=like.dtype, device=like.device)

    for instruction in instructions:
        arguments = map(tensor, instruction.arguments)
        if instruction.name == "tf32" and not tf32:
            values.append(*arguments)
        else:
            values.append(INSTRUCTIONS[instruction.name].compute(*arguments))
    return values


def keep_outputs(program: Program, outputs: Sequence[Output]) -> Program:
    """The program with these of its outputs alone, and the instructions that they need."""
    halving = program.instructions[: program.halves]
    given = {i: i for i in range(len(halving) + 1)}
    made, numbers = _renumbered(program, [output.value.index for output in outputs], given)
    kept = tuple(Output(Value(numbers[output.value.index]), output.dtype, output.layout) for output in outputs)
    return Program((*halving, *made), kept, program.prologue)


def instructions_between(program: Program, start: Value, end: Value) -> tuple[Instruction, ...] | None:
    """What makes the value `end` of `start` alone, which is their %0; None if anything else is needed. TF32 is left out."""
    while end.index and program.instructions[end.index - 1].name == "tf32":
        (end,) = program.instructions[end.index - 1].arguments
    try:
        made, _ = _renumbered(program, [end.index], {start.index: 0})
    except KeyError:
        return None
    return None if any(isinstance(a, Operand) for instruction in made for a in instruction.arguments) else tuple(made)


def _renumbered(program: Program, values: Sequence[int], given: Mapping[int, int]) -> tuple[list[Instruction], dict[int, int]]:
    """The instructions that make these values of those that are `given` with their new numbers, and the numbers of all.

    Raises KeyError if they need more of the convolution than is given.
    """
    needed, waiting = set(), list(values)
    while waiting:
        value = waiting.pop()
        if value in given or value in needed:
            continue
        if value <= program.halves:
            raise KeyError(value)
        needed.add(value)
        waiting += [a.index for a in program.instructions[value - 1].arguments if isinstance(a, Value)]
    made, numbers = [], dict(given)
    for value in sorted(needed):
        instruction = program.instructions[value - 1]
        arguments = (Value(numbers[a.index]) if isinstance(a, Value) else a for a in instruction.arguments)
        made.append(Instruction(instruction.name, tuple(arguments)))
        numbers[value] = max(given.values()) + len(made)
    return made, numbers


def evaluate(program: Program, y: Tensor, operands: Sequence[Tensor], tf32: bool) -> list[Tensor]:
    """The program's outputs for the convolution y ``(N, C_out, L_out)``, in torch operators.

    In float32, or float64 for a y in float64. `tf32`: whether PyTorch's switch asks for TF32; if not, the instruction `tf32` does
    nothing.
    """
    y = y.to(torch.promote_types(y.dtype, torch.float32))
    values = _values(program.instructions[program.halves :], y.chunk(2, 1) if program.halves else [y], operands, tf32)
    outputs = allocate(program, y, y.shape)
    for output, stored in zip(program.outputs, outputs, strict=True):
        stored.copy_(values[output.value.index])
    return outputs


def allocate(program: Program, like: Tensor, shape: Sequence[int]) -> list[Tensor]:
    """Uninitialised outputs for a convolution of shape ``(N, C_out, L_out)``, on the device of `like`."""
    N, C_out, L = shape
    C = program.channels(C_out)
    return [like.new_empty_strided((N, C, L), output.strides(C, L), dtype=output.dtype) for output in program.outputs]
