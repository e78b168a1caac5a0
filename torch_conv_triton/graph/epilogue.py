"""Finds the pointwise nodes after a convolution that its epilogue can compute, and writes them as a program.

Nodes are taken in the order of the graph, each with the tensors it reads beside the convolution (operands). The call will stand
behind the last of its operands, so none of these may come after a node that needs the convolution and stays outside: that node
would otherwise run before the call, and no operand can then depend on the convolution either.

Where the channels are cut in half the program can be one of both halves, and a node that has all channels is two values of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from torch_conv_triton.epilogue import Argument, Builder, Operand, Output, Program, Value
from torch_conv_triton.graph.call import CONVOLUTIONS, FUSED
from torch_conv_triton.graph.convolution import aten, has_strides, value
from torch_conv_triton.graph.halves import cut, cuts, half_of, is_glu
from torch_conv_triton.graph.pointwise import FLOATS, is_pointwise, translate
from torch_conv_triton.problem import contiguous_strides

MOST_NODES = 40
MOST_OPERANDS = 6
# how many nodes up a chain is followed that ends in the epilogue
MOST_INLINED = 4

# operators that read their inputs from memory; Inductor computes the others together with what they read
READERS = (
    *CONVOLUTIONS,
    *FUSED,
    aten.convolution.default,
    aten.convolution_backward.default,
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
)
VIEWS = (
    aten.permute.default,
    aten.reshape.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.unsqueeze.default,
    aten.expand.default,
    aten.slice.Tensor,
)


@dataclass(frozen=True, slots=True)
class Epilogue:
    """A program, the nodes that are its operands, the nodes it computes in order, and those that others read: its outputs."""

    program: Program
    operands: tuple[Node, ...]
    nodes: tuple[Node, ...]
    outputs: tuple[Node, ...]


def grow_epilogues(graph: Graph, result: Node, first_write: Node | None) -> tuple[Epilogue, ...]:
    """The longest epilogues of the convolution that `result` holds: of both halves of its channels and of it whole, if there are.

    Nothing from `first_write` on is taken. Nodes that compute the same of it are made one. Operands of halves are new nodes.
    """
    whole = _grow(graph, result, first_write, False)
    grown = [whole]
    # one channel would broadcast against two
    if whole.meets_cut and value(result).shape[1] > 2:
        grown.insert(0, _grow(graph, result, first_write, True))
    return tuple(filter(None, (growth.longest() for growth in grown)))


def _grow(graph: Graph, result: Node, first_write: Node | None, halves: bool) -> _Growth:
    growth = _Growth(result, halves)
    waiting = _users(graph, result, first_write)
    while waiting and len(growth.nodes) < MOST_NODES:
        node = heappop(waiting)
        if node in growth.values:
            continue
        if (first_write is None or node < first_write) and growth.take(node):
            for user in _users(graph, node, first_write):
                heappush(waiting, user)
        elif growth.outside is None:
            growth.outside = node
    return growth


# a tensor of the graph: all of it, or half of its channels, 0 or 1
_Source = tuple[Node, int | None]


class _Growth:
    """An epilogue while nodes are added to it, in the order of the graph, and the shorter ones that it began with.

    With `halves` its program is one of both halves of the channels: a node that has them all is two values, one of each half.
    What is said to be of a half, 0 or 1, is so for the sake of such a node; None says that it is for one value.
    """

    def __init__(self, result: Node, halves: bool) -> None:
        self.nodes = [result]
        # the first node that needs the convolution and stays outside
        self.outside: Node | None = None
        # whether a node that stays outside cuts the channels in half
        self.meets_cut = False
        self._result = value(result)
        self._halves = halves
        self._builder = Builder()
        self.values: dict[Node, tuple[Argument, ...]] = {
            result: (Value(0), self._builder.emit("halve")) if halves else (Value(0),)
        }
        self._operands: dict[_Source, Operand] = {}
        # instructions and operands when a node had been taken
        self._lengths = [(0, 0)]

    def take(self, node: Node) -> bool:
        """Add a node, if it is one that an epilogue can compute, and what only it reads."""
        if cuts(node):
            self.meets_cut = True
            values = self._cut(node)
        else:
            values = self._compute(node)
        if values is None:
            return False
        self.values[node] = values
        self.nodes.append(node)
        self._lengths.append((len(self._builder.program().instructions), len(self._operands)))
        return True

    def _cut(self, node: Node) -> tuple[Argument, ...] | None:
        """The values of a node that cuts channels in half: none of a split, which others get the halves from."""
        whole, half = half_of(node)
        if len(self.values[whole]) != 2:
            return None
        if is_glu(node):
            first, second = self.values[whole]
            return (self._builder.emit("mul", first, self._builder.emit("sigmoid", second)),)
        return () if half is None else (self.values[whole][half],)

    def _compute(self, node: Node) -> tuple[Argument, ...] | None:
        """The values of a pointwise node."""
        if not is_pointwise(node) or not _translates(node):
            return None
        halves = self._halves_of(value(node))
        sources = [source for half in halves for source in self._leaves(node, half, MOST_INLINED)]
        if not all(map(self._may_be_operand, sources)) or len({*self._operands, *sources}) > MOST_OPERANDS:
            return None
        return tuple(self._write(node, half, MOST_INLINED) for half in halves) or None

    def _halves_of(self, tensor: Tensor) -> tuple[int | None, ...]:
        """What a tensor that the program computes is to be computed for; nothing if it has another shape."""
        if tensor.dim() != 3 or tensor.device != self._result.device:
            return ()
        for halves in ((None,), (0, 1)) if self._halves else ((None,),):
            if all(statically_known_true(a == b) for a, b in zip(tensor.shape, self._shape(halves[0]), strict=True)):
                return halves
        return ()

    def _shape(self, half: int | None) -> tuple[int, int, int]:
        N, C, L = self._result.shape
        return (N, C // 2, L) if self._halves and half is None else (N, C, L)

    def longest(self) -> Epilogue | None:
        """The epilogue up to the last node after which one or two values are left to store."""
        for end in range(len(self.nodes), 1, -1):
            outputs = self._outputs(self.nodes[:end])
            instructions, operands = self._lengths[end - 1]
            # halves that are only stored are no gain
            if outputs is not None and not (self._halves and instructions == 1):
                stored = tuple(Output(self.values[n][0], value(n).dtype, self._layout(n)) for n in outputs)
                program = Program(self._builder.program().instructions[:instructions], stored)
                return Epilogue(program, self._read(operands), tuple(self.nodes[1:end]), tuple(outputs))
        return None

    def _read(self, operands: int) -> tuple[Node, ...]:
        """The nodes that are the first so many operands."""
        result = self.nodes[0]
        return tuple(n if half is None else cut(n, half, result) for n, half in list(self._operands)[:operands])

    def _outputs(self, nodes: Sequence[Node]) -> list[Node] | None:
        inside = set(nodes)
        outputs = [node for node in nodes if not inside.issuperset(node.users)]
        if not 1 <= len(outputs) <= 2 or not all(map(self._may_be_output, outputs)):
            return None
        # A second output is one more tensor to write: only where it would be written anyway. Two halves are as much as the whole.
        return outputs if len(outputs) == 1 or self._halves or is_read_from_memory(outputs[1], inside) else None

    def _may_be_output(self, node: Node) -> bool:
        values = self.values[node]
        if len(values) != 1 or not isinstance(values[0], Value):
            return False
        dtype = value(node).dtype
        return dtype in FLOATS and dtype.itemsize <= self._result.dtype.itemsize and self._layout(node) is not None

    def _layout(self, node: Node) -> str | None:
        # a view becomes a tensor of its own: a crop, or half of the channels
        is_view = node is self.nodes[0] or (cuts(node) and not is_glu(node) and not _is_returned(node))
        return layout_of_result(value(node)) or ("NCL" if is_view else None)

    def _write(self, node: Node, half: int | None, depth: int) -> Argument:
        def argument(tensor: Node) -> Argument:
            if tensor in self.values:
                return self.values[tensor][half or 0]
            if _literal(tensor) is not None:
                return _literal(tensor)
            if self._is_inlined(tensor, node, half, depth):
                return self._write(tensor, half, depth - 1)
            return self._operands.setdefault(_source(tensor, half), Operand(len(self._operands)))

        return translate(self._builder, node, argument)

    def _leaves(self, node: Node, half: int | None, depth: int) -> Iterator[_Source]:
        """What becomes operands when `_write` writes a node."""
        for tensor in node.all_input_nodes:
            if self._is_inlined(tensor, node, half, depth):
                yield from self._leaves(tensor, half, depth - 1)
            elif tensor not in self.values and _literal(tensor) is None:
                yield _source(tensor, half)

    def _is_inlined(self, tensor: Node, reader: Node, half: int | None, depth: int) -> bool:
        """Whether a tensor is computed again here rather than read: then it need not be in memory, or is a small one."""
        if depth == 0 or tensor in self.values or not is_pointwise(tensor) or not _translates(tensor):
            return False
        if not _is_cheap(tensor) and set(tensor.users) != {reader}:
            return False
        # a convolution before it computes it in an epilogue of its own
        leaves = self._leaves(tensor, half, depth - 1)
        return not _follows_convolution(tensor, MOST_INLINED) and all(map(self._may_be_operand, leaves))

    def _may_be_operand(self, source: _Source) -> bool:
        node, half = source
        tensor = node.meta.get("val")
        if not isinstance(tensor, Tensor) or tensor.device != self._result.device:
            return False
        if tensor.dtype not in (*FLOATS, torch.bool):
            return False
        pairs = zip(reversed(tensor.shape), reversed(self._shape(half)), strict=False)
        broadcasts = tensor.dim() <= 3 and all(
            statically_known_true(size == 1) or statically_known_true(size == wanted) for size, wanted in pairs
        )
        return broadcasts and (self.outside is None or node < self.outside)


def _source(node: Node, half: int | None) -> _Source:
    """What is read for a half of the channels: that half, or the whole of a tensor that has one value for all channels."""
    tensor = node.meta.get("val")
    varies = isinstance(tensor, Tensor) and tensor.dim() > 1 and not statically_known_true(tensor.shape[-2] == 1)
    return node, half if varies else None


def layout_of_result(tensor: Tensor) -> str | None:
    """The layout, as `Output` names it, that a tensor ``(N, C, L)`` certainly has; None for other strides."""
    _, C, L = tensor.shape
    if has_strides(tensor, contiguous_strides(C, L)):
        return "NCL"
    return "NLC" if has_strides(tensor, (C * L, 1, C)) else None


def _users(graph: Graph, node: Node, first_write: Node | None) -> list[Node]:
    """What reads a node, in order, pointwise nodes that compute the same made one."""
    seen: dict[object, Node] = {}
    users = []
    for user in sorted(node.users):
        if is_pointwise(user) and (first_write is None or user < first_write) and not _is_returned(user):
            first = seen.setdefault(_computation(user), user)
            if first is not user:
                user.replace_all_uses_with(first)
                graph.erase_node(user)
                continue
        users.append(user)
    return users


def _computation(node: Node) -> object:
    """Equal for pointwise nodes that compute the same; 1, 1.0 and True are not."""
    given = (*node.args, *node.kwargs.items())
    return node.target, tuple((type(argument), argument) for argument in given)


def _is_returned(node: Node) -> bool:
    return any(user.op == "output" for user in node.users)


def is_read_from_memory(node: Node, inside: set[Node]) -> bool:
    """Whether a reader of a node, beyond those `inside`, or of a view of it is no kernel that Inductor generates."""
    outside = [user for user in node.users if user not in inside]
    return any(
        user.op == "output" or user.target in READERS or (user.target in VIEWS and is_read_from_memory(user, inside))
        for user in outside
    )


def _translates(node: Node) -> bool:
    try:
        translate(Builder(), node, lambda tensor: Operand(0))
    except ValueError:
        return False
    return True


def _literal(node: Node) -> float | None:
    """The number that every element of a tensor has, where a node says so."""
    number = node.args[1] if node.target is aten.full.default else None
    return float(number) if isinstance(number, (bool, int, float)) else None


def _is_cheap(node: Node) -> bool:
    """Whether it is less to compute a pointwise node again than to read it: a parameter of channels, or a wider copy."""
    tensor = value(node)
    if tensor.dim() == 0 or statically_known_true(tensor.shape[-1] == 1):
        return True
    inputs = [value(source).dtype.itemsize for source in node.all_input_nodes]
    return len(inputs) == 1 and inputs[0] < tensor.dtype.itemsize


def _follows_convolution(node: Node, depth: int) -> bool:
    inputs = node.all_input_nodes
    return any(i.target in CONVOLUTIONS or (depth > 0 and is_pointwise(i) and _follows_convolution(i, depth - 1)) for i in inputs)
