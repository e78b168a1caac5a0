"""What a program says, which reaches the kernels as text (`epilogue.kernel_text`), and what its instructions compute.

The text is interpreted while kernels are compiled: nothing of it is left but the instructions that it stands for.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra import libdevice

from torch_conv_triton.kernels.common import interpreted, round_tf32
from torch_conv_triton.kernels.sine import sine

# the plain convolution
PLAIN = "; out %0"


# what the text says, asked while a kernel is compiled


@triton.constexpr_function
def is_plain(EPILOGUE):
    return EPILOGUE == PLAIN


@triton.constexpr_function
def halves_channels(EPILOGUE):
    """Whether the program is computed of two tiles: of the first half of the channels, and of the same ones of the second."""
    return EPILOGUE.split("; ")[1] == "halve"


@triton.constexpr_function
def instructions(EPILOGUE):
    """How many instructions there are."""
    parts = EPILOGUE.split("; ")
    return len(parts) - 1 - outputs(EPILOGUE)


@triton.constexpr_function
def outputs(EPILOGUE):
    return EPILOGUE.count("; out ")


@triton.constexpr_function
def operands(EPILOGUE):
    return len(EPILOGUE.split("; ")[0].split())


@triton.constexpr_function
def varies(EPILOGUE, operand, dimension):
    """Whether an operand varies along a dimension, one of "n", "c" and "l"."""
    return dimension in EPILOGUE.split("; ")[0].split()[operand]


@triton.constexpr_function
def is_large(EPILOGUE, SHAPE, COUNT):
    """Whether so many tiles of sums and what is read or stored beside them do not fit the registers together."""
    tiles = EPILOGUE.count("; out ") - 1 + sum("c" in kind and "l" in kind for kind in EPILOGUE.split("; ")[0].split())
    return tiles > 0 and COUNT * SHAPE[0] * SHAPE[1] >= 128 * 128


@triton.constexpr_function
def word(EPILOGUE, instruction, i):
    """Word i of an instruction, its name first; "" beyond the last. The outputs follow the instructions."""
    words = EPILOGUE.split("; ")[1 + instruction].split()
    return words[i] if i < len(words) else ""


@triton.constexpr_function
def is_number(argument):
    return argument[0] not in "%a"


@triton.constexpr_function
def number(argument):
    return float(argument)


@triton.constexpr_function
def place(argument, OPERANDS):
    """Where a value or an operand is found: the operands come first."""
    return int(argument[1:]) + (OPERANDS if argument[0] == "%" else 0)


# instructions


@triton.jit
def resolve(known, ARGUMENT: tl.constexpr, OPERANDS: tl.constexpr):
    """The tile, row, column or number that an argument stands for."""
    if is_number(ARGUMENT):
        return tl.cast(number(ARGUMENT), tl.float32)
    else:
        return known[place(ARGUMENT, OPERANDS)]


@triton.jit
def apply_to_one(NAME: tl.constexpr, a):
    if NAME == "neg":
        return -a
    elif NAME == "abs":
        return tl.abs(a)
    elif NAME == "exp":
        return tl.exp(a)
    elif NAME == "expm1":
        return tl.exp(a) - 1.0 if interpreted() else libdevice.expm1(a)
    elif NAME == "log":
        return tl.log(a)
    elif NAME == "log1p":
        return tl.log(1.0 + a) if interpreted() else libdevice.log1p(a)
    elif NAME == "sqrt":
        return tl.sqrt_rn(a)
    elif NAME == "rsqrt":
        return tl.rsqrt(a)
    elif NAME == "reciprocal":
        return 1.0 / a
    elif NAME == "pow2":
        return a * a
    elif NAME == "sin":
        return sine(a, 0.0)
    elif NAME == "cos":
        return sine(a, 0.5)
    elif NAME == "tanh":
        return 1.0 - 2.0 / (tl.exp(2.0 * a) + 1.0) if interpreted() else libdevice.tanh(a)
    elif NAME == "sigmoid":
        return tl.sigmoid(a)
    elif NAME == "erf":
        return tl.erf(a)
    elif NAME == "bf16":
        return a.to(tl.bfloat16).to(tl.float32)
    elif NAME == "fp16":
        return a.to(tl.float16).to(tl.float32)
    elif NAME == "tf32":
        return round_tf32(a)
    else:
        tl.static_assert(NAME == "same")
        return a


@triton.jit
def apply_to_two(NAME: tl.constexpr, a, b):
    if NAME == "add":
        return a + b
    elif NAME == "sub":
        return a - b
    elif NAME == "mul":
        return a * b
    elif NAME == "div":
        return a / b
    elif NAME == "min":
        return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)
    elif NAME == "max":
        return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)
    elif NAME == "gt":
        return (a > b).to(tl.float32)
    elif NAME == "lt":
        return (a < b).to(tl.float32)
    elif NAME == "ge":
        return (a >= b).to(tl.float32)
    elif NAME == "le":
        return (a <= b).to(tl.float32)
    elif NAME == "eq":
        return (a == b).to(tl.float32)
    else:
        tl.static_assert(NAME == "ne")
        return (a != b).to(tl.float32)


@triton.jit
def run_program(sums, read, EPILOGUE: tl.constexpr):
    """All values of the program after its operands `read`, the first of them `sums`; both are tuples."""
    OPERANDS: tl.constexpr = operands(EPILOGUE)
    known = read + sums
    # the first instruction is what made two sums
    for i in tl.static_range(1 if halves_channels(EPILOGUE) else 0, instructions(EPILOGUE)):
        a = resolve(known, word(EPILOGUE, i, 1), OPERANDS)
        if word(EPILOGUE, i, 2) == "":
            value = apply_to_one(word(EPILOGUE, i, 0), a)
        elif word(EPILOGUE, i, 3) == "":
            value = apply_to_two(word(EPILOGUE, i, 0), a, resolve(known, word(EPILOGUE, i, 2), OPERANDS))
        else:
            b = resolve(known, word(EPILOGUE, i, 2), OPERANDS)
            value = tl.where(a != 0.0, b, resolve(known, word(EPILOGUE, i, 3), OPERANDS))
        known = known + (value,)
    return known


@triton.jit
def prepare(x, PROLOGUE: tl.constexpr):
    """What is convolved of a tile of the input."""
    if PROLOGUE == "":
        return x
    else:
        known = run_program((x.to(tl.float32),), (), PROLOGUE)
        return resolve(known, word(PROLOGUE, instructions(PROLOGUE), 1), 0).to(x.dtype)
