"""Padding before a convolution and cropping after it, as graphs spell them, folded into the call."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import SymInt
from torch.fx import Graph, Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from torch_conv_triton.graph.call import OperatorCall
from torch_conv_triton.graph.convolution import aten, is_contiguous, named_arguments, value

prims = torch.ops.prims
CONVERT = prims.convert_element_type.default


@dataclass(frozen=True, slots=True)
class Padding:
    """A padded tensor: `start` samples before those of `input` ``(N, C, L)``, `end` after them; negative ones crop it."""

    input: Node
    start: int
    end: int
    mode: str

    def __str__(self) -> str:
        kind = "" if self.mode == "zeros" else f" {self.mode}"
        return f"padding {self.start}+{self.end}{kind}"


def fold_padding(graph: Graph, call: OperatorCall) -> tuple[OperatorCall, Padding | None]:
    """The call with the padding of its input folded in, and that padding; None where there is none to fold.

    That is also where the padded tensor has another user, so that the copy stays.
    """
    if call.transposed or len(call.input.users) > 1:
        return call, None
    padding = read_padding(_convert_first(graph, call.input))
    if padding is None or min(padding.start, padding.end) < 0 or (padding.mode != "zeros" and call.padding != (0, 0)):
        return call, None
    padded = call.padding[0] + padding.start, call.padding[1] + padding.end
    mode = "zeros" if padding.start == padding.end == 0 else padding.mode
    return replace(call, input=padding.input, padding=padded, padding_mode=mode), padding


def fold_crop(call: OperatorCall, result: Node) -> tuple[OperatorCall, Node, tuple[int, int] | None]:
    """The call that computes only what is kept of its result, the node of that, and how much goes at either end.

    None where the result has another user than one that crops it, or where the strides of the cropped view matter.
    """
    cropped = next(iter(result.users)) if len(result.users) == 1 else result
    crop = _read_crop(cropped)
    fixed = any(user.op == "output" or user.target is aten.as_strided.default for user in cropped.users)
    if crop is None or (fixed and not is_contiguous(value(cropped))):
        return call, result, None
    step = -1 if call.transposed else call.stride
    padding = call.padding[0] - step * crop[0], call.padding[1] - step * crop[1]
    if call.padding_mode != "zeros" and min(padding) < 0:
        return call, result, None
    return replace(call, padding=padding), cropped, crop


def _convert_first(graph: Graph, node: Node) -> Node:
    """The padded tensor that a node is, or that it converts to another dtype, which is then done before the padding.

    Padding by index is computed in float32 in 16-bit graphs.
    """
    if node.target is not CONVERT or len(node.args[0].users) > 1:
        return node
    padding = read_padding(node.args[0])
    if padding is None or node.args[0].target is not aten._unsafe_index.Tensor:
        return node
    x, dtype = padding.input, node.args[1]
    with graph.inserting_before(node):
        if x.target is CONVERT and value(x.args[0]).dtype == dtype:
            x = x.args[0]
        else:
            x = graph.call_function(CONVERT, (x, dtype))
            x.meta["val"] = value(padding.input).to(dtype)
        padded = graph.call_function(aten._unsafe_index.Tensor, (x, node.args[0].args[1]))
    padded.meta = dict(node.meta)
    node.replace_all_uses_with(padded)
    for unused in (node, node.args[0], padding.input):
        if not unused.users and unused.op == "call_function":
            graph.erase_node(unused)
    return padded


def read_padding(node: Node) -> Padding | None:
    """The padding over the last of three dimensions that a node computes, or None if it computes something else."""
    if node.op != "call_function" or not isinstance(node.meta.get("val"), torch.Tensor) or value(node).dim() != 3:
        return None
    if node.target is aten.constant_pad_nd.default:
        return _zeros(node)
    if node.target in (aten._unsafe_index.Tensor, aten.index.Tensor):
        return _indexed(node)
    if node.target is aten.slice_scatter.default:
        return _circular(node)
    return None


def constant(size: int | SymInt) -> int | None:
    """The one value of a size, None if it may have several."""
    return size if isinstance(size, int) else size.node.maybe_as_int()


def _zeros(node: Node) -> Padding | None:
    arguments = named_arguments(node)
    pad = arguments["pad"]
    if not all(isinstance(side, int) for side in pad) or any(pad[2:]) or arguments.get("value", 0) != 0:
        return None
    return Padding(arguments["self"], pad[0], pad[1], "zeros")


def _indexed(node: Node) -> Padding | None:
    """Reflected or repeated ends: x at ``m - |m - |i||`` or at ``min(max(i, 0), m)``, i from -start on, m = L - 1."""
    x, indices = node.args[:2]
    if len(indices) != 3 or indices[0] is not None or indices[1] is not None:
        return None
    L = value(x).shape[2]
    positions, mode = _reflected(indices[2], L - 1), "reflect"
    if positions is None:
        positions, mode = _clamped(indices[2], L - 1), "replicate"
    if positions is None or positions.target is not prims.iota.default:
        return None
    start, step = positions.kwargs["start"], positions.kwargs["step"]
    if not isinstance(start, int) or start > 0 or step != 1:
        return None
    end = constant(value(positions).shape[0] + start - L)
    return None if end is None or end < 0 else Padding(x, -start, end, mode)


def _reflected(index: Node, last: int | SymInt) -> Node | None:
    for _ in range(2):
        if index.target is not aten.sub.Tensor or not _is_size(index.args[0], last):
            return None
        index = index.args[1]
        if not isinstance(index, Node) or index.target is not aten.abs.default:
            return None
        index = index.args[0]
    return index


def _clamped(index: Node, last: int | SymInt) -> Node | None:
    limits: dict[str, object] = {}
    while index.target in (aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default):
        arguments = named_arguments(index)
        index = arguments.pop("self")
        limits |= {name: limit for name, limit in arguments.items() if limit is not None}
    return index if limits.get("min") == 0 and _is_size(limits.get("max"), last) else None


def _circular(node: Node) -> Padding | None:
    """Both ends copied from the other end, one after the other, into an empty tensor that x was copied into."""
    writes = []
    while node.target is aten.slice_scatter.default:
        writes.append(_Write.of(node))
        node = node.args[0]
    if node.target not in (aten.empty.memory_format, aten.new_empty.default) or None in writes or not 2 <= len(writes) <= 3:
        return None
    first, *ends = reversed(writes)
    x = first.source.args[1] if first.source.target is aten.copy.default else first.source
    L, start = value(x).shape[2], constant(first.start)
    if start is None or not _is_size(value(first.source).shape[2], L):
        return None
    end = constant(value(node).shape[2] - L - start)
    wanted = [(0, L, start)] * (start > 0) + [(start + L, start, end)] * (end is not None and end > 0)
    if end is None or len(wanted) != len(ends) or not all(w.copies(*sides) for w, sides in zip(ends, wanted, strict=True)):
        return None
    return Padding(x, start, end, "circular")


@dataclass(frozen=True, slots=True)
class _Write:
    """Samples of `source` written over those of `into` from `start` on."""

    into: Node
    source: Node
    start: int | SymInt

    @classmethod
    def of(cls, node: Node) -> _Write | None:
        arguments = named_arguments(node)
        start = _size(arguments.get("start", 0) or 0)
        if arguments.get("dim", 0) not in (2, -1) or arguments.get("step", 1) != 1 or start is None:
            return None
        return cls(arguments["self"], arguments["src"], start)

    def copies(self, start: int | SymInt, origin: int | SymInt, count: int) -> bool:
        """Whether `count` samples of the tensor itself, those from `origin` on, are written at `start`."""
        crop = _slice(self.source)
        if crop is None or self.source.args[0] is not self.into:
            return False
        pairs = ((self.start, start), (crop[0], origin), (crop[1], count))
        return all(statically_known_true(a == b) for a, b in pairs)


def _slice(node: Node) -> tuple[int | SymInt, int | SymInt] | None:
    """Where a slice of the last of three dimensions starts, and its length; None for another node."""
    if node.target is not aten.slice.Tensor or value(node).dim() != 3:
        return None
    arguments = named_arguments(node)
    start = _size(arguments.get("start", 0) or 0)
    if arguments.get("dim", 0) not in (2, -1) or arguments.get("step", 1) != 1 or start is None:
        return None
    if isinstance(start, int) and start < 0:
        start = value(arguments["self"]).shape[2] + start
    return start, value(node).shape[2]


def _read_crop(node: Node) -> tuple[int, int] | None:
    """How many samples a node removes at the start and the end of the last of three dimensions; None if it does not do that."""
    if node.op != "call_function":
        return None
    if node.target is aten.constant_pad_nd.default:
        padding = _zeros(node) if value(node).dim() == 3 else None
        return (-padding.start, -padding.end) if padding and max(padding.start, padding.end) <= 0 else None
    crop = _slice(node)
    if crop is None:
        return None
    start = constant(crop[0])
    end = None if start is None else constant(value(node.args[0]).shape[2] - start - crop[1])
    return None if end is None or end < 0 else (start, end)


def _size(argument: object) -> int | SymInt | None:
    if isinstance(argument, Node):
        argument = argument.meta.get("val")
    return argument if isinstance(argument, (int, SymInt)) else None


def _is_size(argument: object, wanted: int | SymInt) -> bool:
    size = _size(argument)
    return size is not None and statically_known_true(size == wanted)
