"""How every kernel ends: bias, the program of a fused convolution, one rounding, the stores.

A program reaches the kernels as text, see `kernel_text`. The plain convolution has one too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from torch_conv_triton.epilogue import Program
from torch_conv_triton.kernels.common import widen
from torch_conv_triton.kernels.program import (
    PLAIN,
    halves_channels,
    instructions,
    is_large,
    operands,
    outputs,
    resolve,
    run_program,
    varies,
    word,
)


def kernel_text(program: Program, kinds: Sequence[str], tf32: bool) -> str:
    """The program as kernels take it: the dimensions along which each operand varies, instructions, stored values.

    Dtypes and layouts of the outputs are those of the tensors. `tf32`: whether PyTorch's switch asks for TF32; if not, nothing is
    rounded to it.
    """
    instructions = [str(i) if tf32 else str(i).replace("tf32", "same") for i in program.instructions]
    return "; ".join([" ".join(kinds), *instructions, *(f"out {output.value}" for output in program.outputs)])


def prologue_text(program: Program) -> str:
    """What the program computes before the convolution, as kernels take it; empty for nothing."""
    return "; ".join(["", *map(str, program.prologue), f"out %{len(program.prologue)}"]) if program.prologue else ""


def operand_kind(operand: Tensor, shape: Sequence[int]) -> str:
    """The dimensions, of "ncl", along which an operand varies when it is broadcast to ``(N, C_out, L_out)``; "-" for none."""
    strides = operand.expand(shape).stride()
    return "".join(name for name, size, stride in zip("ncl", shape, strides, strict=True) if size > 1 and stride) or "-"


@dataclass(frozen=True, slots=True)
class Fusion:
    """What a fused convolution adds to the launch of a kernel.

    `epilogue`: a `kernel_text`. `tensors`: a second output if there is one, then the operands. `padding_mode`, `rounded`: as in
    `Conv1dProblem`. `prologue`: a `prologue_text`, for kernels that take one.
    """

    epilogue: str = PLAIN
    tensors: tuple[Tensor, ...] = ()
    padding_mode: str = "zeros"
    rounded: bool = False
    prologue: str = ""

    def arguments(self, y: Tensor) -> dict[str, object]:
        """The arguments that every kernel takes for `store_outputs`."""
        strides = tuple(stride for view in self.views(y) for stride in view.stride())
        return {"more": self.tensors or None, "more_strides": strides or None, "EPILOGUE": self.epilogue}

    def views(self, y: Tensor) -> list[Tensor]:
        """The tensors, broadcast to the shape of the output."""
        return [t.expand(y.shape) for t in self.tensors]


NO_FUSION = Fusion()


# reading and storing


@triton.jit
def load_operand(pointer, strides, tile, OPERAND: tl.constexpr, EPILOGUE: tl.constexpr, INT64: tl.constexpr):
    """An operand where the tile lies, in float32, with one element along dimensions in which it does not vary."""
    stride_n, stride_c, stride_l = strides
    n, at, at_mask, first, o, o_mask = tile
    rows: tl.constexpr = varies(EPILOGUE, OPERAND, "l")
    channels: tl.constexpr = varies(EPILOGUE, OPERAND, "c")
    if varies(EPILOGUE, OPERAND, "n"):
        pointer += n * stride_n
    if channels:
        pointer += first * stride_c
    if rows and channels:
        pointer += at * stride_l + widen(o, INT64) * stride_c
    elif rows:
        pointer += at * stride_l
    elif channels:
        pointer += widen(o, INT64) * stride_c
    if rows or (varies(EPILOGUE, OPERAND, "n") and n.type.is_block()):
        if channels:
            return tl.load(pointer, mask=at_mask & o_mask, other=0.0).to(tl.float32)
        else:
            return tl.load(pointer, mask=at_mask, other=0.0).to(tl.float32)
    elif channels:
        return tl.load(pointer, mask=o_mask, other=0.0).to(tl.float32)
    else:
        return tl.load(pointer).to(tl.float32)


@triton.jit
def store_outputs(
    acc,  # the sums of a tile
    n,  # sample, int64: one, or one a position, shaped like `at`
    at,  # positions in y, shaped so that they broadcast to the tile, as their mask
    at_mask,
    first,  # first channel of the group
    o,  # channels within the group, shaped so that they broadcast to the tile, as their mask
    o_mask,
    b_ptr,  # (C_out,), or unused
    y_ptr,  # first output (N, C_out, L_out), any strides
    stride_yn,
    stride_yc,
    stride_yl,
    more,  # second output if there is one, then operands; None for none
    more_strides,  # their strides, three each
    EPILOGUE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    INT64: tl.constexpr,
):
    """Add the bias in float32, run the program, round once, store."""
    if HAS_BIAS:
        acc = add_bias(acc, b_ptr + first, o, o_mask)
    tile = (n, at, at_mask, first, o, o_mask)
    store_values((acc,), tile, y_ptr, (stride_yn, stride_yc, stride_yl), more, more_strides, EPILOGUE, INT64)


@triton.jit
def add_bias(acc, b_ptr, o, o_mask):
    return acc + tl.load(b_ptr + o, mask=o_mask, other=0.0).to(tl.float32)


@triton.jit
def store_values(
    sums,  # the first values of the program: a tile, or one of each half of the channels
    tile,  # where it lies: n, at, at_mask, first, o, o_mask
    y_ptr,
    y_strides,
    more,
    more_strides,
    EPILOGUE: tl.constexpr,
    INT64: tl.constexpr,
):
    """`store_outputs` of sums that have their bias."""
    n, at, at_mask, first, o, o_mask = tile
    OUTPUTS: tl.constexpr = outputs(EPILOGUE)
    read = ()
    for i in tl.static_range(OUTPUTS - 1, OUTPUTS - 1 + operands(EPILOGUE)):
        strides = (more_strides[3 * i], more_strides[3 * i + 1], more_strides[3 * i + 2])
        read = read + (load_operand(more[i], strides, tile, i - OUTPUTS + 1, EPILOGUE, INT64),)
    known = run_program(sums, read, EPILOGUE)
    for i in tl.static_range(OUTPUTS):
        value = resolve(known, word(EPILOGUE, instructions(EPILOGUE) + i, 1), operands(EPILOGUE))
        if i == 0:
            to = y_ptr
            strides = y_strides
        else:
            to = more[0]
            strides = (more_strides[0], more_strides[1], more_strides[2])
        to += n * strides[0]
        to += first * strides[1]
        to += at * strides[2] + widen(o, INT64) * strides[1]
        tl.store(to, value.to(to.dtype.element_ty), mask=at_mask & o_mask)


@triton.jit
def halves(acc, AXIS: tl.constexpr):
    """The first and the second half of a tile along an axis."""
    if AXIS == 0:
        parts = tl.permute(tl.reshape(acc, (2, acc.shape[0] // 2, acc.shape[1])), (1, 2, 0))
    else:
        parts = tl.permute(tl.reshape(acc, (acc.shape[0], 2, acc.shape[1] // 2)), (0, 2, 1))
    return tl.split(parts)


@triton.jit
def rows_of_weight(tile_n, C_OUT, EPILOGUE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The channels within the group of a tile, [BLOCK_N]: if the program halves them, some of the first half, then as many of
    the second."""
    j = tl.arange(0, BLOCK_N)
    if halves_channels(EPILOGUE):
        HALF: tl.constexpr = BLOCK_N // 2
        return j // HALF * (C_OUT // 2) + (tile_n * HALF + j % HALF)
    else:
        return tile_n * BLOCK_N + j


@triton.jit
def sums_of_tile(acc, EPILOGUE: tl.constexpr, WEIGHTS_LEFT: tl.constexpr):
    """The tile that was computed of `rows_of_weight`, as `store_tile` takes it."""
    if halves_channels(EPILOGUE):
        return halves(acc, 0 if WEIGHTS_LEFT else 1)
    else:
        return (acc,)


@triton.jit
def store_tile(
    sums,  # a tile [BLOCK_M, BLOCK_N], with WEIGHTS_LEFT [BLOCK_N, BLOCK_M], or one of each half of the channels, in a tuple
    n,  # sample, int64: one, or one a row [BLOCK_M]
    at,  # [BLOCK_M] position in y of each row
    row_mask,  # [BLOCK_M]
    first,
    o_start,  # channel within the group, or within each half, of the first column
    C_OUT,  # per group
    b_ptr,
    y_ptr,
    stride_yn,
    stride_yc,
    stride_yl,
    more,
    more_strides,
    EPILOGUE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    WEIGHTS_LEFT: tl.constexpr,
    INT64: tl.constexpr,
):
    """`store_outputs` of tiles whose rows are positions and whose columns are channels, or the reverse."""
    ROWS: tl.constexpr = 0 if WEIGHTS_LEFT else 1
    COLUMNS: tl.constexpr = 1 - ROWS
    if n.type.is_block():
        n = tl.expand_dims(n, ROWS)
    channels = C_OUT // len(sums)
    PIECES: tl.constexpr = 2 if is_large(EPILOGUE, sums[0].shape, len(sums)) else 1
    COUNT: tl.constexpr = sums[0].shape[ROWS] // PIECES
    for i in tl.static_range(PIECES):
        o = o_start + i * COUNT + tl.arange(0, COUNT)
        o_mask = tl.expand_dims(o < channels, COLUMNS)
        o = tl.expand_dims(o, COLUMNS)
        pieces = ()
        for half in tl.static_range(len(sums)):
            piece = sums[half]
            if PIECES == 2:
                piece = halves(piece, ROWS)[i]
            if HAS_BIAS:
                piece = add_bias(piece, b_ptr + first + half * channels, o, o_mask)
            pieces = pieces + (piece,)
        tile = (n, tl.expand_dims(at, ROWS), tl.expand_dims(row_mask, ROWS), first, o, o_mask)
        store_values(pieces, tile, y_ptr, (stride_yn, stride_yc, stride_yl), more, more_strides, EPILOGUE, INT64)
