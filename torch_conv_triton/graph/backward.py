"""Splits `aten.convolution_backward` over one dimension into operators of ours: one for each gradient that is used, and one for
those of weight and bias together where a kernel computes them so.

Inductor's own lowering of `aten.convolution_backward` fixes the sequence length, so every new length would compile again;
our operators take the length as it comes. That holds where aten computes the gradient, so no dtype is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from operator import getitem

import torch
from torch._ops import OpOverload
from torch.fx import Graph, Node

from torch_conv_triton import dispatch
from torch_conv_triton.dispatch import Plan
from torch_conv_triton.dispatch_gradients import (
    WeightGradProblem,
    input_grad_problem,
    plan_input_grad,
    plan_weight_bias_grad,
    plan_weight_grad,
    weight_grad_problem,
)
from torch_conv_triton.graph.convolution import (
    Convolution,
    aten,
    hint,
    is_contiguous,
    named_arguments,
    read,
    reason_to_keep,
    stand_in,
    value,
)
from torch_conv_triton.graph.report import ConvRecord, module_of
from torch_conv_triton.problem import Conv1dProblem

ops = torch.ops.triton_conv

KINDS = ("input_grad", "weight_grad")
WEIGHT, BIAS = 1, 2


@dataclass(frozen=True, slots=True)
class Backward:
    """A backward node: the convolution, the gradient ``(N, C_out, L_out)`` of its output, and the gradients asked for.

    `gradients` maps 0 (input), 1 (weight) and 2 (bias) to the nodes that read them.
    """

    conv: Convolution
    grad_output: Node
    gradients: dict[int, list[Node]]


def split_backward(graph: Graph, module_names: Mapping[str, str]) -> Iterator[ConvRecord]:
    """Split every backward of a 1-D convolution in the graph; yields what happened to each gradient of input and weight.

    `module_names` gives the name of a module by its id, as `module_of` takes it.
    """
    for node in graph.find_nodes(op="call_function", target=aten.convolution_backward.default):
        conv = read(node)
        if conv is None:
            continue
        module, problem = module_of(node, module_names), conv.problem()
        backward = Backward(conv, named_arguments(node)["grad_output"], _gradients(node))
        reason = _reason_to_keep(backward)
        plans = _split(graph, backward) if reason is None else dict.fromkeys(backward.gradients, dispatch.aten(reason))
        for index, plan in plans.items():
            if index != BIAS:
                yield ConvRecord.of(module, KINDS[index], problem, rewritten=reason is None, plan=plan)


def _gradients(node: Node) -> dict[int, list[Node]]:
    gradients: dict[int, list[Node]] = {}
    for user in node.users:
        gradients.setdefault(user.args[1], []).append(user)
    return dict(sorted(gradients.items()))


def _reason_to_keep(backward: Backward) -> str | None:
    conv = backward.conv
    reason = reason_to_keep(conv)
    if reason is not None:
        return reason
    for index, readers in backward.gradients.items():
        if index != BIAS and not is_contiguous(value(readers[0])):
            strides = tuple(value(readers[0]).stride())
            return f"the graph relies on a gradient with strides {strides}, ours is contiguous"
    return None


def _split(graph: Graph, backward: Backward) -> dict[int, Plan]:
    build: tuple[Callable[[Graph, Backward], tuple[Node, Plan]], ...] = (_input_grad, _weight_grad, _bias_grad)
    built: dict[int, tuple[Node, Plan]] = {}
    with graph.inserting_before(backward.conv.node):
        for index in backward.gradients:
            if index == WEIGHT:
                built |= _weight_and_bias_grad(graph, backward)
            if index not in built:
                built[index] = build[index](graph, backward)
    for index, readers in backward.gradients.items():
        new, _ = built[index]
        new.meta.update(readers[0].meta)
        for reader in readers:
            reader.replace_all_uses_with(new)
            graph.erase_node(reader)
    graph.erase_node(backward.conv.node)
    return {index: plan for index, (_, plan) in built.items()}


def _input_grad(graph: Graph, backward: Backward) -> tuple[Node, Plan]:
    conv, geometry = backward.conv, _geometry(backward.conv)
    if conv.transposed:
        # what a transposed convolution scatters, its gradient gathers: a plain convolution of grad_output
        problem = Conv1dProblem.from_tensors(
            stand_in(value(backward.grad_output)),
            stand_in(value(conv.weight)),
            None,
            conv.stride,
            conv.padding,
            conv.dilation,
            conv.groups,
        )
        arguments = backward.grad_output, conv.weight, None, *geometry
        if _surplus(conv):
            longer = _call(graph, ops.conv1d.default, *arguments)
            cut = _call(graph, aten.slice.Tensor, longer, 2, 0, _size(graph, conv.input, 2))
            call = graph.call_function(aten.clone.default, (cut,), {"memory_format": torch.contiguous_format})
        else:
            call = graph.call_function(ops.conv1d.default, arguments)
        return call, dispatch.plan(problem, conv.device)
    arguments = (backward.grad_output, conv.weight, _size(graph, conv.input, 2), *geometry)
    sizes = stand_in(value(backward.grad_output)), stand_in(value(conv.weight)), hint(value(conv.input).shape[2])
    plan = plan_input_grad(input_grad_problem(*sizes, conv.stride, conv.padding, conv.dilation, conv.groups), conv.device)
    return graph.call_function(ops.conv1d_input_grad.default, arguments), plan


def _weight_grad(graph: Graph, backward: Backward) -> tuple[Node, Plan]:
    if surplus := _surplus(backward.conv):
        padded = _call(graph, aten.constant_pad_nd.default, backward.conv.input, [0, surplus])
        backward = replace(backward, conv=replace(backward.conv, input=padded))
    plan = plan_weight_grad(_weight_problem(backward), backward.conv.device)
    return graph.call_function(ops.conv1d_weight_grad.default, _weight_arguments(graph, backward)), plan


def _weight_and_bias_grad(graph: Graph, backward: Backward) -> dict[int, tuple[Node, Plan]]:
    """Both, where a pass over grad_output gives both; else none."""
    if not {WEIGHT, BIAS} <= backward.gradients.keys() or backward.conv.transposed:
        return {}
    plan = plan_weight_bias_grad(_weight_problem(backward), backward.conv.device)
    if plan.is_aten or not plan.config.with_bias:
        return {}
    pair = graph.call_function(ops.conv1d_weight_bias_grad.default, _weight_arguments(graph, backward))
    pair.meta.update(backward.conv.node.meta)
    pair.meta["val"] = tuple(value(backward.gradients[index][0]) for index in (WEIGHT, BIAS))
    return {index: (graph.call_function(getitem, (pair, place)), plan) for place, index in enumerate((WEIGHT, BIAS))}


def _weight_problem(backward: Backward) -> WeightGradProblem:
    conv = backward.conv
    sizes = *(stand_in(value(node)) for node in _pair(backward)), hint(value(conv.weight).shape[2])
    return weight_grad_problem(*sizes, conv.stride, conv.padding, conv.dilation, conv.groups)


def _weight_arguments(graph: Graph, backward: Backward) -> tuple:
    return *_pair(backward), _size(graph, backward.conv.weight, 2), *_geometry(backward.conv)


def _surplus(conv: Convolution) -> int:
    """Steps past the end of the input that the convolution of the gradient of a transposed convolution's output makes."""
    return conv.output_padding // conv.stride if conv.transposed else 0


def _call(graph: Graph, op: OpOverload, *arguments: object) -> Node:
    """A call whose value is read here, and not only by the graph."""
    node = graph.call_function(op, arguments)
    node.meta["val"] = op(*(value(argument) if isinstance(argument, Node) else argument for argument in arguments))
    return node


def _pair(backward: Backward) -> tuple[Node, Node]:
    """The gradient of an output and an input, of the plain convolution that the weight's gradient is one of."""
    conv = backward.conv
    return (conv.input, backward.grad_output) if conv.transposed else (backward.grad_output, conv.input)


def _bias_grad(graph: Graph, backward: Backward) -> tuple[Node, Plan]:
    return graph.call_function(aten.sum.dim_IntList, (backward.grad_output, [0, 2])), dispatch.aten("a sum")


def _geometry(conv: Convolution) -> tuple[list[int], list[int], list[int], int]:
    return [conv.stride], [conv.padding], [conv.dilation], conv.groups


def _size(graph: Graph, tensor: Node, dim: int) -> int | Node:
    size = value(tensor).shape[dim]
    if isinstance(size, int):
        return size
    symbol = graph.call_function(aten.sym_size.int, (tensor, dim))
    symbol.meta["val"] = size
    return symbol
