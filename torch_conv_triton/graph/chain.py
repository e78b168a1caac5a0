"""Joins convolutions of ours that hand each other what they store into calls of the chain operator."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from itertools import accumulate

from torch._inductor import config as inductor_config
from torch._inductor.virtualized import V
from torch.fx import Graph, Node

from torch_conv_triton.chain import Chain
from torch_conv_triton.graph.call import CONVOLUTIONS, FUSED, OperatorCall, call_for, ops, take_over
from torch_conv_triton.graph.convolution import before_writes, value
from torch_conv_triton.graph.report import ConvRecord

# with one returned tensor, with several
CHAINS = (ops.conv1d_chain.one, ops.conv1d_chain.default)
# where the host launches kernels; the interpreter runs them as it goes
DEVICE_TYPES = ("cuda",)


def join_chains(graph: Graph, records: dict[Node, ConvRecord]) -> None:
    """Join convolutions of ours that read what others of them store, or read the same, with nothing else between them.

    Their records, whose nodes are gone then, tell.
    """
    ours = (node for node in before_writes(graph) if node in records and node.target in (*CONVOLUTIONS, *FUSED))
    calls = {node: OperatorCall.of(node) for node in ours}
    for chain in _chains(graph, {node: call for node, call in calls.items() if _is_joinable(call)}):
        # what one reads another chain may have taken over
        _join(graph, {node: OperatorCall.of(node) for node in chain})
        for node in chain:
            words = [f"in a chain of {len(chain)}"] if len(chain) > 1 else []
            words += ["weight prepared once"] if _is_constant(calls[node].weight) else []
            records[node] = records[node].also_folding(*words)


def _is_joinable(call: OperatorCall) -> bool:
    on_device = value(call.input).device.type in DEVICE_TYPES
    return on_device and all(isinstance(side, int) for side in call.padding) and not call.plan().is_aten


def _chains(graph: Graph, calls: dict[Node, OperatorCall]) -> Iterator[list[Node]]:
    """The calls that may become one, in order: two or more each, or one whose weight is constant."""
    # how many times the way to a node leaves our calls and comes back to them: no way leads from a call to another of the same
    # number through anything else
    returns: dict[Node, int] = {}
    for node in graph.nodes:
        if node in calls:
            returns[node] = max((returns[n] + (_place(n)[0] not in calls) for n in node.all_input_nodes), default=0)
        else:
            returns[node] = max((returns[n] for n in node.all_input_nodes), default=-1)
    chain_of: dict[Node, list[Node]] = {}
    # the chain that last stored or read a tensor, by the number of returns
    met: dict[tuple[Node, int], Node] = {}
    for node, call in calls.items():
        chain_of[node] = [node]
        for tensor in (call.input, *call.operands, *OperatorCall.outputs(node)):
            other = met.setdefault((tensor, returns[node]), node)
            if chain_of[other] is not chain_of[node]:
                joined = chain_of[other] + chain_of[node]
                chain_of.update(dict.fromkeys(joined, joined))
    for chain in {id(chain): chain for chain in chain_of.values()}.values():
        if len(chain) > 1 or _is_constant(calls[chain[0]].weight):
            yield sorted(chain)


def _join(graph: Graph, calls: dict[Node, OperatorCall]) -> None:
    nodes = list(calls)
    made = {output: _place(output) for node in nodes for output in OperatorCall.outputs(node)}
    given = list(dict.fromkeys(n for call in calls.values() for n in call.tensors if n not in made))
    outputs = [len(call.program.outputs) for call in calls.values()]
    starts = dict(zip(nodes, accumulate(outputs, initial=len(given)), strict=False))
    number = {n: i for i, n in enumerate(given)} | {n: starts[call] + i for n, (call, i) in made.items()}
    returned = [n for n in made if any(user not in calls for user in n.users)]
    chain = Chain(
        tensors=len(given),
        steps=tuple(call.arguments(number) for call in calls.values()),
        outputs=tuple(outputs),
        returned=tuple(number[n] for n in returned),
        constants=tuple(number[n] for n in given if _is_constant(n)),
    )
    _put_behind(nodes, {*nodes, *made})
    call = call_for(graph, nodes[-1], CHAINS, (given, str(chain)), [value(n) for n in returned])
    take_over(graph, call, returned)
    for node in reversed(nodes):
        for unused in dict.fromkeys((*OperatorCall.outputs(node), node)):
            graph.erase_node(unused)


def _is_constant(node: Node) -> bool:
    """Whether Inductor froze a tensor, so that its values never change; what is compiled ahead of time may be given others."""
    return node.op == "get_attr" and inductor_config.freezing and not V.aot_compilation


def _place(node: Node) -> tuple[Node, int]:
    """The call that computes what a node is, and which of its results that is."""
    return node.args if node.target is operator.getitem else (node, 0)


def _put_behind(nodes: Sequence[Node], computed: set[Node]) -> None:
    """Move what lies between the nodes and reads, directly or not, what they compute behind the last of them."""
    node, last = nodes[0], nodes[-1]
    while node is not nodes[-1]:
        following = node.next
        if node not in computed and any(n in computed for n in node.all_input_nodes):
            computed.add(node)
            last.append(node)
            last = node
        node = following
