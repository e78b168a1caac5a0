"""Recognises nodes that cut the channels of a tensor in half, and cuts them."""

from __future__ import annotations

import operator

from torch.fx import Node

from torch_conv_triton.graph.convolution import aten, named_arguments, value

SPLITS = (aten.split.Tensor, aten.split_with_sizes.default)


def cuts(node: Node) -> bool:
    """Whether a node cuts the channels of a tensor ``(N, C, L)`` in half: a split, a half got from one, a slice, a GLU."""
    return half_of(node) is not None


def half_of(node: Node) -> tuple[Node, int | None] | None:
    """Which tensor a node `cuts`, and which half it is, 0 or 1, or None if it has to do with both; None for other nodes."""
    if node.target is operator.getitem:
        split, half = node.args
        return (split.args[0], half) if split.target in SPLITS and cuts(split) else None
    if node.target in SPLITS or is_glu(node):
        whole = node.args[0]
        return (whole, None) if _channels(whole) % 2 == 0 and _is_in_two(node) else None
    return _sliced(node) if node.target is aten.slice.Tensor else None


def is_glu(node: Node) -> bool:
    """Whether a node multiplies one half of a tensor by the sigmoid of the other."""
    return node.target is aten.glu.default


def cut(node: Node, half: int, behind: Node) -> Node:
    """Half of the channels, 0 or 1, of a tensor ``([N,] C, L)`` as a new node, behind both the tensor and another node."""
    tensor = value(node)
    C = tensor.shape[-2] // 2
    arguments = tensor.dim() - 2, half * C, (half + 1) * C
    with node.graph.inserting_after(max(node, behind)):
        part = node.graph.call_function(aten.slice.Tensor, (node, *arguments))
    part.meta["val"] = aten.slice.Tensor(tensor, *arguments)
    return part


def _is_in_two(node: Node) -> bool:
    """Whether a split, or a GLU, is along the channels, into two equal parts."""
    given = named_arguments(node)
    half = _channels(node.args[0]) // 2
    if is_glu(node):
        return given.get("dim", -1) in (1, -2)
    return given.get("dim", 0) in (1, -2) and given.get("split_sizes", given.get("split_size")) in (half, [half, half])


def _sliced(node: Node) -> tuple[Node, int] | None:
    given = named_arguments(node)
    C = _channels(given["self"])
    bounds = given.get("start"), given.get("end"), given.get("step", 1)
    if C % 2 or given.get("dim", 0) not in (1, -2) or not all(isinstance(bound, int | None) for bound in bounds):
        return None
    halves = [range(C // 2), range(C // 2, C)]
    taken = range(C)[slice(*bounds)]
    return (given["self"], halves.index(taken)) if taken in halves else None


def _channels(node: Node) -> int:
    """How many channels a tensor ``(N, C, L)`` has; 1 where it is no such tensor, or where that is not known."""
    tensor = value(node)
    return tensor.shape[1] if tensor.dim() == 3 and isinstance(tensor.shape[1], int) else 1
