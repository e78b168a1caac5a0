"""A call of the fused operator as the steps of the pass put it together, piece by piece, before it enters the graph."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Graph, Node

from torch_conv_triton import dispatch, fused
from torch_conv_triton.dispatch import Plan
from torch_conv_triton.epilogue import Output, Program, Value, parse
from torch_conv_triton.graph.convolution import has_strides, named_arguments, stand_in, value
from torch_conv_triton.graph.report import ConvRecord
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
        return self._plan(self._stand_ins())

    def plan_reading(self, layout: str, rounded: bool) -> Plan:
        """How it would run if its input were stored so: contiguous ("NCL") or channels-last ("NLC"), rounded to TF32 or not."""
        tensors = self._stand_ins()
        x = tensors[self.input]
        strides = Output(Value(0), x.dtype, layout).strides(*x.shape[1:])
        tensors[self.input] = x.new_empty_strided(x.shape, strides)
        return replace(self, rounded=rounded)._plan(tensors)

    def problem(self) -> Conv1dProblem:
        """The convolution in it, at the sizes seen while compiling."""
        return fused.problem_of(self.arguments(self._stand_ins()))

    @staticmethod
    def outputs(node: Node) -> tuple[Node, ...]:
        """The nodes that hold what a call computes, in the order of the program's outputs."""
        if node.target is not FUSED[1]:
            return (node,)
        return tuple(sorted(node.users, key=lambda output: output.args[1]))

    def put(self, graph: Graph, node: Node, outputs: Sequence[Node]) -> tuple[Node, tuple[Node, ...]]:
        """Add the call to the graph where `node` and all that it reads are there, and let it compute `outputs` instead.

        Returns its node, and the nodes that hold what it computes.
        """
        results = [_as_stored(value(old), output) for old, output in zip(outputs, self.program.outputs, strict=True)]
        arguments = self.arguments({tensor: tensor for tensor in self.tensors})
        call = call_for(graph, max(node, *self.tensors), FUSED, arguments, results)
        call.meta = {**node.meta, **call.meta}
        return call, take_over(graph, call, outputs)

    def take_place_of(
        self, node: Node, outputs: Sequence[Node], records: dict[Node, ConvRecord], folded: Iterable[str]
    ) -> tuple[Node, ...]:
        """Put it in the place of a call of ours: for these outputs of `node`, whose others nothing reads, and for its record.

        Returns the nodes that hold what it computes. `folded`: what the record is to name, empty words left out.
        """
        unused = dict.fromkeys((*self.outputs(node), node))
        call, new = self.put(node.graph, node, outputs)
        for old in unused:
            node.graph.erase_node(old)
        record = ConvRecord.of(records.pop(node).module, "forward", self.problem(), rewritten=True, plan=self.plan())
        records[call] = record.also_folding(*folded)
        return new

    def with_program(self, program: Program, operands: Sequence[Node]) -> OperatorCall:
        return replace(self, program=program, operands=tuple(operands))

    def _stand_ins(self) -> dict[Node, Tensor]:
        return {node: stand_in(value(node)) for node in self.tensors}

    def _plan(self, tensors: dict[Node, Tensor]) -> Plan:
        with dispatch.meta_stands_for(value(self.input).device):
            return fused.plan(self.arguments(tensors))

    def arguments(self, tensor: Mapping[Node, object]) -> fused.Arguments:
        """The arguments with what `tensor` says in place of each node."""
        return fused.Arguments(
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


def call_for(
    graph: Graph, after: Node, overloads: Sequence[OpOverload], arguments: Sequence[object], results: Sequence[Tensor]
) -> Node:
    """A call with these fake results behind a node: of the first overload, which returns one, or the second, a list."""
    with graph.inserting_after(after):
        call = graph.call_function(overloads[len(results) > 1], tuple(arguments))
    call.meta["val"] = results[0] if len(results) == 1 else list(results)
    return call


def take_over(graph: Graph, call: Node, outputs: Sequence[Node]) -> tuple[Node, ...]:
    """Let a call's results, in order, stand in for the outputs of others; returns the nodes that hold them."""
    if len(outputs) == 1:
        new = [call]
    else:
        new, results = [], value(call)
        # each goes right behind the call, so before the one that was put there
        for i in reversed(range(len(outputs))):
            with graph.inserting_after(call):
                new.insert(0, graph.call_function(operator.getitem, (call, i)))
            new[0].meta["val"] = results[i]
    for old, output in zip(outputs, new, strict=True):
        output.meta = {**output.meta, **old.meta, "val": value(output)}
        old.replace_all_uses_with(output)
    return tuple(new)


def _as_stored(tensor: Tensor, output: Output) -> Tensor:
    """A fake tensor like one of the graph, with the strides of an output."""
    strides = output.strides(*tensor.shape[1:])
    return tensor if has_strides(tensor, strides) else tensor.new_empty_strided(tensor.shape, strides)
