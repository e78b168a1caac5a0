"""A call of the fused operator as the steps of the pass put it together, piece by piece, before it enters the graph."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, Node

from torch_conv_triton import fused
from torch_conv_triton.dispatch import Plan
from torch_conv_triton.epilogue import Program, parse
from torch_conv_triton.graph.convolution import hint, named_arguments, value
from torch_conv_triton.problem import Conv1dProblem

ops = torch.ops.triton_conv
CONVOLUTIONS = (ops.conv1d.default, ops.conv_transpose1d.default)
# with one output, with two
FUSED = (ops.conv1d_fused.one, ops.conv1d_fused.default)


@dataclass(frozen=True, slots=True)
class OperatorCall:
    """The arguments of `conv1d_fused`, tensors as nodes and the epilogue as a program."""

    input: Node
    weight: Node
    bias: Node | None
    stride: int
    padding: tuple[int, int]
    dilation: int
    groups: int
    transposed: bool
    padding_mode: str
    program: Program
    operands: tuple[Node, ...] = ()
    rounded: bool = False

    @classmethod
    def of(cls, node: Node) -> OperatorCall:
        """The call that computes what a node of one of `CONVOLUTIONS`, or of `FUSED`, computes."""
        arguments = named_arguments(node)
        dtype = value(arguments["input"]).dtype
        tensors = arguments["input"], arguments["weight"], arguments.get("bias")
        if node.target in FUSED:
            keep = {name: arguments[name] for name in ("stride", "dilation", "groups", "transposed", "padding_mode", "rounded")}
            return cls(
                *tensors,
                **keep,
                padding=tuple(arguments["padding"]),
                program=parse(arguments["epilogue"], dtype),
                operands=tuple(arguments["operands"]),
            )
        transposed = node.target is ops.conv_transpose1d.default
        (padding,) = arguments["padding"]
        end = padding - arguments["output_padding"][0] if transposed else padding
        return cls(
            *tensors,
            stride=arguments["stride"][0],
            padding=(padding, end),
            dilation=arguments["dilation"][0],
            groups=arguments["groups"],
            transposed=transposed,
            padding_mode="zeros",
            program=parse("", dtype),
        )

    @property
    def tensors(self) -> tuple[Node, ...]:
        """The nodes that are read."""
        return tuple(node for node in (self.input, self.weight, self.bias, *self.operands) if node is not None)

    def plan(self) -> Plan:
        """How the operator would run it, at the sizes seen while compiling."""
        return fused.plan(*self._arguments(_stand_ins(self.tensors)))

    def problem(self) -> Conv1dProblem:
        """The convolution in it, at the sizes seen while compiling."""
        return fused.problem_of(*self._arguments(_stand_ins(self.tensors)))

    def insert(self, graph: Graph, results: Sequence[Tensor]) -> tuple[Node, tuple[Node, ...]]:
        """Add the call to the graph; returns its node and one for each output. `results` are the fake tensors that these are."""
        arguments = self._arguments({node: node for node in self.tensors})
        if len(results) == 1:
            call = graph.call_function(FUSED[0], arguments)
            call.meta["val"] = results[0]
            return call, (call,)
        call = graph.call_function(FUSED[1], arguments)
        call.meta["val"] = list(results)
        outputs = []
        # each goes right behind the call, so before the one that was put there
        for i in (1, 0):
            with graph.inserting_after(call):
                outputs.append(graph.call_function(operator.getitem, (call, i)))
            outputs[-1].meta["val"] = results[i]
        return call, tuple(reversed(outputs))

    def with_program(self, program: Program, operands: Sequence[Node]) -> OperatorCall:
        return replace(self, program=program, operands=tuple(operands))

    def _arguments(self, tensor: dict[Node, object]) -> tuple[object, ...]:
        return (
            tensor[self.input],
            tensor[self.weight],
            None if self.bias is None else tensor[self.bias],
            self.stride,
            list(self.padding),
            self.dilation,
            self.groups,
            self.transposed,
            self.padding_mode,
            str(self.program),
            [tensor[node] for node in self.operands],
            self.rounded,
        )


def _stand_ins(nodes: Sequence[Node]) -> dict[Node, Tensor]:
    """Tensors without data, of the sizes seen while compiling, in place of the values of nodes."""
    with FakeTensorMode():
        return {node: _stand_in(value(node)) for node in dict.fromkeys(nodes)}


def _stand_in(tensor: Tensor) -> Tensor:
    sizes, strides = [hint(s) for s in tensor.shape], [hint(s) for s in tensor.stride()]
    offset = hint(tensor.storage_offset())
    extent = 1 + sum(max(size - 1, 0) * stride for size, stride in zip(sizes, strides, strict=True))
    return torch.empty(offset + extent, dtype=tensor.dtype, device=tensor.device).as_strided(sizes, strides, offset)
