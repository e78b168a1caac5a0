"""Finds the tensors of a graph that are stored alike: what convolutions of ours write, and what Inductor makes of it on its way.

A kernel that Inductor generates reads and writes rows in one order, so what pointwise operators and views connect is stored
contiguous or channels-last together. Convolutions of ours take any order, and end a region.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.fx.node import map_arg

from torch_conv_triton.graph.call import OperatorCall
from torch_conv_triton.graph.convolution import aten, named_arguments, value

# views that may keep the length where it is: the last dimension
VIEWS = (
    aten.reshape.default,
    aten.view.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.slice.Tensor,
)
REDUCTIONS = (
    aten.var_mean.correction,
    aten.var.correction,
    aten.mean.dim,
    aten.sum.dim_IntList,
    aten.amax.default,
    aten.amin.default,
)


@dataclass(eq=False, slots=True)
class Region:
    """Tensors, with the length last, that are either all contiguous or all channels-last.

    `outputs` ``(N, C, L)`` are stored by `writers`, convolutions of ours, and Inductor computes the nodes `between`. `inputs` are
    convolutions of ours that read one of them as their input, and `operands` of them in their epilogues; `gains`: how many other
    readers are better channels-last; `samples`: reductions over channels and length. `refusal`: why it has to be contiguous, if
    it has.
    """

    outputs: list[Node]
    writers: list[Node]
    between: list[Node] = field(default_factory=list)
    inputs: list[Node] = field(default_factory=list)
    samples: list[Node] = field(default_factory=list)
    operands: list[Node] = field(default_factory=list)
    gains: int = 0
    refusal: str | None = None

    @property
    def is_read_by_convolutions_alone(self) -> bool:
        """Whether each of its tensors is only the input of convolutions of ours."""
        return bool(self.inputs) and not (self.operands or self.between or self.samples or self.gains or self.refusal)

    @property
    def through(self) -> tuple[str, ...]:
        """The names of what is computed between and in reductions, views left out."""
        nodes = sorted(node for node in (*self.between, *self.samples) if node.target not in VIEWS)
        return tuple(dict.fromkeys(str(node.target).split(".")[1] for node in nodes))

    def channels_last(self) -> dict[Node, Tensor] | None:
        """What its nodes compute when it is stored channels-last; None where something does not come out so."""
        values = {node: _channels_last(value(node)) for node in self.outputs}
        for node in sorted(self.between):
            given = map_arg((node.args, node.kwargs), lambda source: values.get(source, source.meta.get("val")))
            result = node.target(*given[0], **given[1])
            is_copy = node.target in VIEWS and not _share_memory(result, values[node.all_input_nodes[0]])
            if is_copy or not _is_channels_last(result):
                return None
            values[node] = result
        return values

    def store(self, values: dict[Node, Tensor]) -> None:
        """Let the nodes between say that they compute `values`, and reductions go over memory in order.

        Inductor splits a long reduction along its last dimension first, whatever the strides.
        """
        for node in self.between:
            node.meta["val"] = values[node]
        for node in self.samples:
            (source,) = node.all_input_nodes
            result = values[source]
            first, last = _dims(node, result)[0], result.dim() - 1
            order = [*range(first), last, *range(first, last)]
            with node.graph.inserting_before(node):
                swapped = node.graph.call_function(aten.permute.default, (source, order))
            swapped.meta["val"] = result.permute(order)
            node.replace_input_with(source, swapped)


def find_regions(graph: Graph, calls: Mapping[Node, OperatorCall]) -> dict[Node, Region]:
    """The region of each output of the `calls`, convolutions of ours by their nodes, and of each node between."""
    regions: dict[Node, Region] = {}
    writers = {output: node for node in calls for output in OperatorCall.outputs(node)}
    for node in graph.nodes:
        if node in calls:
            _read(node, calls[node], regions)
        elif node not in writers:
            _flow(node, regions)
        if node in writers:
            regions[node] = Region([node], [writers[node]])
    return regions


def _read(node: Node, call: OperatorCall, regions: dict[Node, Region]) -> None:
    """A convolution of ours reads tensors."""
    if call.input in regions:
        regions[call.input].inputs.append(node)
    for operand in call.operands:
        if operand in regions:
            regions[operand].operands.append(node)
    for parameter in (call.weight, call.bias):
        if parameter in regions:
            regions[parameter].refusal = "it is a weight"


def _flow(node: Node, regions: dict[Node, Region]) -> None:
    """Another node reads tensors."""
    sources = [source for source in node.all_input_nodes if source in regions]
    if not sources:
        return
    merged = {id(regions[source]): regions[source] for source in sources}
    if len(sources) == 1 and _is_transposition(node):
        regions[sources[0]].gains += 1
    elif len(sources) == 1 and node.target in REDUCTIONS and (kind := _reduced(node, value(sources[0]))):
        if kind == "samples":
            regions[sources[0]].samples.append(node)
        else:
            regions[sources[0]].gains += 1
    elif _is_pointwise(node, regions) or _is_view(node, sources[0]):
        regions[node] = _merge(list(merged.values()), regions)
        regions[node].between.append(node)
    else:
        for region in merged.values():
            region.refusal = region.refusal or f"{_name(node)} reads it"


def _merge(parts: list[Region], regions: dict[Node, Region]) -> Region:
    first, *others = parts
    for other in others:
        for name in ("outputs", "writers", "between", "inputs", "operands", "samples"):
            getattr(first, name).extend(getattr(other, name))
        first.gains += other.gains
        first.refusal = first.refusal or other.refusal
        regions.update(dict.fromkeys((*other.outputs, *other.between), first))
    return first


def _is_pointwise(node: Node, regions: dict[Node, Region]) -> bool:
    """Whether a node computes one tensor element by element of tensors of regions, and of smaller ones."""
    if not isinstance(node.target, torch._ops.OpOverload) or torch.Tag.pointwise not in node.target.tags:
        return False
    result = node.meta.get("val")
    if not isinstance(result, Tensor) or node.target._schema.is_mutable:
        return False
    return all(source in regions or _is_narrow(source.meta.get("val"), result.dim()) for source in node.all_input_nodes)


def _is_narrow(tensor: object, rank: int) -> bool:
    """Whether what a pointwise operator reads is a number, or has one value for all channels or for the whole length."""
    if not isinstance(tensor, Tensor):
        return isinstance(tensor, (int, float, torch.SymInt, torch.SymFloat))
    sizes = [1] * (rank - tensor.dim()) + list(tensor.shape)
    return not sizes or _is_one(sizes[-1]) or all(map(_is_one, sizes[1:-1]))


def _is_view(node: Node, source: Node) -> bool:
    """Whether a node may be a view that keeps the length last; `Region.channels_last` tells whether it is one."""
    if node.target not in VIEWS:
        return False
    size, L = value(node).shape, value(source).shape[-1]
    return len(size) >= 3 and (node.target is aten.slice.Tensor or statically_known_true(size[-1] == L))


def _reduced(node: Node, tensor: Tensor) -> str | None:
    """What a reduction goes over, where contiguous is no better: "samples", in any order then, or "channels"."""
    dims, rank = _dims(node, tensor), tensor.dim()
    kept = [dim for dim in range(1, rank - 1) if dim not in dims and not _is_one(tensor.shape[dim])]
    if kept or 0 in dims:
        return None
    if rank - 1 not in dims:
        return "channels"
    return "samples" if dims == list(range(dims[0], rank)) else None


def _dims(node: Node, tensor: Tensor) -> list[int]:
    """The dimensions that a reduction goes over, in order."""
    dims = named_arguments(node).get("dim")
    dims = [dims] if isinstance(dims, int) else dims or range(tensor.dim())
    return sorted(dim % tensor.dim() for dim in dims)


def _is_transposition(node: Node) -> bool:
    """Whether a node is a view ``(N, L, C)`` whose strides nothing relies on."""
    fixed = any(user.op == "output" or user.target is aten.as_strided.default for user in node.users)
    return node.target is aten.permute.default and list(node.args[1]) == [0, 2, 1] and not fixed


def _channels_last(tensor: Tensor) -> Tensor:
    _, C, L = tensor.shape
    return tensor.new_empty_strided(tensor.shape, (C * L, 1, C))


def _share_memory(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage()._cdata == other.untyped_storage()._cdata


def _is_channels_last(tensor: Tensor) -> bool:
    """Whether a step along the last dimension is certainly longer than one in any other, but for the first dimension."""
    *_, last = tensor.stride()
    steps = list(zip(tensor.shape, tensor.stride(), strict=True))[1:-1]
    return all(_is_one(size) or statically_known_true(stride < last) for size, stride in steps)


def _is_one(size: int | torch.SymInt) -> bool:
    return statically_known_true(size == 1)


def _name(node: Node) -> str:
    return "the caller" if node.op == "output" else str(node.target)
