"""What a convolution node of a graph says: its arguments, and its problem at the sizes seen while compiling."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import torch
from torch import SymInt, Tensor
from torch.fx import Graph, Node
from torch.fx.experimental import symbolic_shapes
from torch.fx.experimental.symbolic_shapes import statically_known_true

from torch_conv_triton import dispatch
from torch_conv_triton.dispatch import Device, Plan
from torch_conv_triton.problem import Conv1dProblem, contiguous_strides

aten = torch.ops.aten

# torch 2.11 knows it by its older name; neither adds a guard
size_hint = getattr(symbolic_shapes, "optimization_hint", None) or symbolic_shapes.size_hint

# stands in for a size that nothing is known about until the graph runs
UNKNOWN_SIZE = 1024


@dataclass(frozen=True, slots=True)
class Convolution:
    """The arguments of an `aten.convolution` or `aten.convolution_backward` node over one spatial dimension.

    Shapes: input ``(N, C_in, L_in)``, weight as in `Conv1dProblem`. `bias` is None for a backward node. An argument of
    the geometry that the graph computes while it runs is a node.
    """

    node: Node
    input: Node
    weight: Node
    bias: Node | None
    stride: int | Node
    padding: int | Node
    dilation: int | Node
    groups: int | Node
    transposed: bool
    output_padding: int | Node

    @property
    def device(self) -> Device | None:
        return dispatch.device_for(value(self.input).device)

    @property
    def geometry(self) -> tuple[int | Node, ...]:
        return self.stride, self.padding, self.dilation, self.groups, self.output_padding

    @property
    def is_static(self) -> bool:
        """Whether the graph has this one size of input and weight."""
        return all(isinstance(size, int) for node in (self.input, self.weight) for size in value(node).shape)

    def problem(self) -> Conv1dProblem:
        """The problem at the sizes seen while compiling; sizes that change are hints, and no guard is added."""
        return Conv1dProblem.from_tensors(
            stand_in(value(self.input)),
            stand_in(value(self.weight)),
            None if self.bias is None else stand_in(value(self.bias)),
            hint(self.stride),
            hint(self.padding),
            hint(self.dilation),
            hint(self.groups),
            self.transposed,
            hint(self.output_padding),
        )

    def plan(self) -> Plan:
        """How the operator would run it at those sizes."""
        return dispatch.plan(self.problem(), self.device)


def static_problems(graph: Graph) -> dict[torch.device, list[Conv1dProblem]]:
    """The problems of the graph's forward convolutions that have one size and that kernels of ours compute, by device.

    One with a bias comes without it too, as which it may run, see `rewrite_convolutions`.
    """
    found: dict[torch.device, list[Conv1dProblem]] = {}
    for conv in convolutions(graph):
        if reason_to_keep(conv) or not conv.is_static or dispatch.refusal(conv.problem()):
            continue
        problem = conv.problem()
        with_and_without = [problem, replace(problem, has_bias=False)] if problem.has_bias else [problem]
        found.setdefault(value(conv.input).device, []).extend(with_and_without)
    return found


def convolutions(graph: Graph) -> list[Convolution]:
    """The 1-D convolutions of a graph, without their backwards."""
    nodes = graph.find_nodes(op="call_function", target=aten.convolution.default)
    return [conv for conv in map(read, nodes) if conv is not None]


def read(node: Node) -> Convolution | None:
    """The 1-D convolution or backward of one that `node` computes; None for every other node."""
    if node.target not in (aten.convolution.default, aten.convolution_backward.default):
        return None
    arguments = named_arguments(node)
    if value(arguments["weight"]).dim() != 3:
        return None
    return Convolution(
        node=node,
        input=arguments["input"],
        weight=arguments["weight"],
        bias=arguments.get("bias"),
        stride=arguments["stride"][0],
        padding=arguments["padding"][0],
        dilation=arguments["dilation"][0],
        groups=arguments["groups"],
        transposed=arguments["transposed"],
        output_padding=arguments["output_padding"][0],
    )


def has_two_dimensions(node: Node) -> bool:
    """Whether a node is a convolution along more than one dimension, which is none of ours."""
    return node.target is aten.convolution.default and len(node.args[3]) > 1


def named_arguments(node: Node) -> dict[str, Any]:
    """Arguments of a node that calls an operator, by their names in its schema."""
    names = (argument.name for argument in node.target._schema.arguments)
    return dict(zip(names, node.args, strict=False)) | node.kwargs


def value(node: Node) -> Any:
    """The fake tensor or symbolic number that a node computes."""
    return node.meta["val"]


def hint(size: int | SymInt | Node) -> int:
    """A likely value of a size, to choose by and never to rely on."""
    if isinstance(size, Node):
        size = value(size)
    return size if isinstance(size, int) else size_hint(size, fallback=UNKNOWN_SIZE)


def stand_in(tensor: Tensor) -> Tensor:
    """A tensor without data that has plain integers where `tensor` may have symbolic sizes, strides and offset."""
    sizes, strides = [hint(s) for s in tensor.shape], [hint(s) for s in tensor.stride()]
    offset = hint(tensor.storage_offset())
    extent = 1 + sum(max(size - 1, 0) * stride for size, stride in zip(sizes, strides, strict=True))
    storage = torch.empty(offset + extent, dtype=tensor.dtype, device="meta")
    return storage.as_strided(sizes, strides, offset)


def is_contiguous(tensor: Tensor) -> bool:
    """Whether a 3-D tensor is certainly contiguous, without a guard. Strides of dimensions of size 1 do not count."""
    return has_strides(tensor, contiguous_strides(tensor.shape[1], tensor.shape[2]))


def has_strides(tensor: Tensor, strides: Sequence[int | SymInt]) -> bool:
    """Whether a tensor certainly has these strides, without a guard. Those of dimensions of size 1 do not count."""
    return all(
        statically_known_true(size == 1) or statically_known_true(stride == wanted)
        for size, stride, wanted in zip(tensor.shape, tensor.stride(), strides, strict=True)
    )


def reason_to_keep(conv: Convolution) -> str | None:
    """Why our operators cannot stand in for this node whatever its dtype and sizes, or None."""
    if conv.device is None:
        return f"no kernel of ours runs on {value(conv.input).device.type}"
    if any(isinstance(argument, Node) for argument in conv.geometry):
        return "its stride, padding, dilation or groups is known only when the graph runs"
    if not isinstance(value(conv.weight).shape[2], int):
        # Inductor's own lowering fixes it; torch 2.13 raises over strides that hold the difference of two sizes
        return "the kernel size is known only when the graph runs"
    return None


def before_writes(graph: Graph) -> Iterator[Node]:
    """The nodes before the first that may write to a tensor: what is read after a write may not be read before it."""
    return takewhile(lambda node: not writes(node), graph.nodes)


def writes(node: Node) -> bool:
    """Whether a node may write to a tensor that it is given."""
    if node.op != "call_function":
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return node.target._schema.is_mutable
    return isinstance(node.target, torch._ops.HigherOrderOperator) and "mutation" in node.target.name()
