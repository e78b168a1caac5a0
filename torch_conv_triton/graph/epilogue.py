"""Finds the pointwise nodes after a convolution that its epilogue can compute, and writes them as a program.

Nodes are taken in the order of the graph, each with the tensors it reads beside the convolution (operands). The call will stand
behind the last of its operands, so none of these may come after a node that needs the convolution and stays outside: that node
would otherwise run before the call, and no operand can then depend on the convolution either.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from torch_conv_triton.epilogue import Argument, Builder, Operand, Output, Program, Value
from torch_conv_triton.graph.call import CONVOLUTIONS, FUSED
from torch_conv_triton.graph.convolution import aten, has_strides, value
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


def grow_epilogue(graph: Graph, result: Node, first_write: Node | None) -> Epilogue | None:
    """The longest epilogue of the convolution that `result` holds, or None if nothing can be folded.

    Nothing from `first_write` on is taken. Nodes that compute the same of it are made one.
    """
    growth = _Growth(result)
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
    return growth.longest()


class _Growth:
    """An epilogue while nodes are added to it, in the order of the graph, and the shorter ones that it began with."""

    def __init__(self, result: Node) -> None:
        self.nodes = [result]
        self.values: dict[Node, Argument] = {result: Value(0)}
        # the first node that needs the convolution and stays outside
        self.outside: Node | None = None
        self._result = value(result)
        self._builder = Builder()
        self._operands: dict[Node, Operand] = {}
        # instructions and operands when a node had been taken
        self._lengths = [(0, 0)]

    def take(self, node: Node) -> bool:
        """Add a node, if it is one that an epilogue can compute, and what only it reads."""
        if not is_pointwise(node) or not self._has_shape_of_result(value(node)) or not _translates(node):
            return False
        leaves = list(self._leaves(node, MOST_INLINED))
        if not all(map(self._may_be_operand, leaves)) or len({*self._operands, *leaves}) > MOST_OPERANDS:
            return False
        self.values[node] = self._write(node, MOST_INLINED)
        self.nodes.append(node)
        self._lengths.append((len(self._builder.program().instructions), len(self._operands)))
        return True

    def longest(self) -> Epilogue | None:
        """The epilogue up to the last node after which one or two values are left to store."""
        for end in range(len(self.nodes), 1, -1):
            outputs = self._outputs(self.nodes[:end])
            if outputs is not None:
                instructions, operands = self._lengths[end - 1]
                stored = tuple(Output(self.values[n], value(n).dtype, self._layout(n)) for n in outputs)
                program = Program(self._builder.program().instructions[:instructions], stored)
                return Epilogue(program, tuple(self._operands)[:operands], tuple(self.nodes[1:end]), tuple(outputs))
        return None

    def _outputs(self, nodes: Sequence[Node]) -> list[Node] | None:
        inside = set(nodes)
        outputs = [node for node in nodes if not inside.issuperset(node.users)]
        if not 1 <= len(outputs) <= 2 or not all(map(self._may_be_output, outputs)):
            return None
        # a second output is one more tensor to write: only where it would be written anyway
        return outputs if len(outputs) == 1 or is_read_from_memory(outputs[1], inside) else None

    def _may_be_output(self, node: Node) -> bool:
        tensor = value(node)
        narrow = tensor.dtype in FLOATS and tensor.dtype.itemsize <= self._result.dtype.itemsize
        return narrow and isinstance(self.values[node], Value) and self._layout(node) is not None

    def _layout(self, node: Node) -> str | None:
        # a crop is the only view there is, and it becomes a tensor of its own
        return layout_of_result(value(node)) or ("NCL" if node is self.nodes[0] else None)

    def _write(self, node: Node, depth: int) -> Argument:
        def argument(tensor: Node) -> Argument:
            if tensor in self.values:
                return self.values[tensor]
            if _literal(tensor) is not None:
                return _literal(tensor)
            if self._is_inlined(tensor, node, depth):
                return self._write(tensor, depth - 1)
            return self._operands.setdefault(tensor, Operand(len(self._operands)))

        return translate(self._builder, node, argument)

    def _leaves(self, node: Node, depth: int) -> Iterator[Node]:
        """The tensors that become operands when `_write` writes a node."""
        for tensor in node.all_input_nodes:
            if self._is_inlined(tensor, node, depth):
                yield from self._leaves(tensor, depth - 1)
            elif tensor not in self.values and _literal(tensor) is None:
                yield tensor

    def _is_inlined(self, tensor: Node, reader: Node, depth: int) -> bool:
        """Whether a tensor is computed again here rather than read: then it need not be in memory, or is a small one."""
        if depth == 0 or tensor in self.values or not is_pointwise(tensor) or not _translates(tensor):
            return False
        if not _is_cheap(tensor) and set(tensor.users) != {reader}:
            return False
        # a convolution before it computes it in an epilogue of its own
        return not _follows_convolution(tensor, MOST_INLINED) and all(map(self._may_be_operand, self._leaves(tensor, depth - 1)))

    def _may_be_operand(self, node: Node) -> bool:
        tensor = node.meta.get("val")
        if not isinstance(tensor, Tensor) or tensor.dtype not in FLOATS or tensor.device != self._result.device:
            return False
        pairs = zip(reversed(tensor.shape), reversed(self._result.shape), strict=False)
        broadcasts = tensor.dim() <= 3 and all(
            statically_known_true(size == 1) or statically_known_true(size == wanted) for size, wanted in pairs
        )
        return broadcasts and (self.outside is None or node < self.outside)

    def _has_shape_of_result(self, tensor: Tensor) -> bool:
        if tensor.dim() != 3 or tensor.device != self._result.device:
            return False
        return all(statically_known_true(a == b) for a, b in zip(tensor.shape, self._result.shape, strict=True))


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
