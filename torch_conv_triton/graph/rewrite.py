"""Rewrites `aten.convolution` over one dimension into `triton_conv::conv1d` or `conv_transpose1d`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch.fx import Graph, Node

from torch_conv_triton import dispatch
from torch_conv_triton.graph.convolution import Convolution, aten, convolutions, is_contiguous, read, reason_to_keep, value
from torch_conv_triton.graph.report import ConvRecord, module_of
from torch_conv_triton.versus_aten import launch_bound


def rewrite_convolutions(graph: Graph, module_names: Mapping[str, str]) -> dict[Node, ConvRecord]:
    """Rewrite every 1-D convolution of the graph that our operators can stand in for.

    Returns what happened to each, by the node that it is now. `module_names` gives the name of a module by its id, as `module_of`
    takes it.
    """
    records = {}
    for node in [conv.node for conv in convolutions(graph)]:
        # what it reads may have been rewritten by now
        conv = read(node)
        problem, plan, call = conv.problem(), conv.plan(), node
        reason = _reason_to_keep(conv)
        if reason is None:
            # where aten is the faster without a bias, a separate addition fuses into the pointwise operators that follow, as
            # it does in Inductor; our kernels add a bias for nothing
            without_bias = dispatch.plan(replace(problem, has_bias=False), conv.device)
            # a kernel of ours that won a measurement is not given up for a rule
            measured = plan.tuned and not plan.is_aten and not without_bias.tuned
            peel_bias = without_bias.is_aten and not measured and value(conv.input).device.type != "cpu"
            plan = without_bias if peel_bias else plan
            call = _rewrite(graph, conv, peel_bias)
        else:
            plan = dispatch.aten(reason)
        module = module_of(node, module_names)
        records[call] = ConvRecord.of(module, "forward", problem, rewritten=reason is None, plan=plan)
    return records


def _reason_to_keep(conv: Convolution) -> str | None:
    problem = conv.problem()
    reason = reason_to_keep(conv) or dispatch.refusal(problem)
    if reason is None and conv.device.compare_with_aten and conv.is_static and launch_bound(problem):
        # with sizes that change the operator decides at each call; here it would decide for aten each time, and only add to it
        plan = conv.plan()
        reason = plan.reason if plan.kernel == "aten" else None
    if reason is None and not is_contiguous(value(conv.node)):
        reason = f"the graph relies on an output with strides {tuple(value(conv.node).stride())}, ours is contiguous"
    return reason


def _rewrite(graph: Graph, conv: Convolution, peel_bias: bool) -> Node:
    peeled = conv.bias if peel_bias else None
    with graph.inserting_before(conv.node):
        call = new = call_convolution(graph, conv, None if peel_bias else conv.bias)
        new.meta.update(conv.node.meta)
        if peeled is not None:
            column = graph.call_function(aten.unsqueeze.default, (peeled, -1))
            column.meta["val"] = value(peeled).unsqueeze(-1)
            new = graph.call_function(aten.add.Tensor, (new, column))
            new.meta.update(conv.node.meta)
    conv.node.replace_all_uses_with(new)
    graph.erase_node(conv.node)
    return call


def call_convolution(graph: Graph, conv: Convolution, bias: Node | None) -> Node:
    """A call of our operator for the forward of `conv`."""
    if conv.transposed:
        return graph.call_function(
            torch.ops.triton_conv.conv_transpose1d.default,
            (
                conv.input,
                conv.weight,
                bias,
                [conv.stride],
                [conv.padding],
                [conv.output_padding],
                conv.groups,
                [conv.dilation],
            ),
        )
    return graph.call_function(
        torch.ops.triton_conv.conv1d.default,
        (conv.input, conv.weight, bias, [conv.stride], [conv.padding], [conv.dilation], conv.groups),
    )
