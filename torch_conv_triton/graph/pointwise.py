"""What pointwise nodes of a graph are as instructions of an epilogue."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.fx import Node

from torch_conv_triton.epilogue import Argument, Builder, Operand, Value
from torch_conv_triton.graph.convolution import aten, named_arguments

Emit = Callable[..., Argument]
FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def is_pointwise(node: Node) -> bool:
    """Whether a node computes a float or bool tensor by an operator that has instructions."""
    if node.op != "call_function" or node.target not in TRANSLATIONS:
        return False
    return all(_is_float_or_bool(tensor) for tensor in (node, *node.all_input_nodes))


def _is_float_or_bool(node: Node) -> bool:
    # a pass of the user's may have left a node that does not say what it computes
    result = node.meta.get("val")
    return isinstance(result, torch.Tensor) and (result.dtype in FLOATS or result.dtype == torch.bool)


def translate(builder: Builder, node: Node, resolve: Callable[[Node], Argument]) -> Argument:
    """Write what a pointwise node computes; `resolve` gives the argument that stands for a tensor it reads.

    Raises ValueError where the arguments are none that the instructions know. Values stay in float32 between the nodes, as in the
    kernels that Inductor makes of 16-bit graphs.
    """
    arguments = {name: resolve(given) if isinstance(given, Node) else given for name, given in named_arguments(node).items()}
    return TRANSLATIONS[node.target](builder.emit, **arguments)


def _unary(name: str) -> Callable[..., Argument]:
    return lambda emit, self: emit(name, self)


def _binary(name: str) -> Callable[..., Argument]:
    return lambda emit, self, other: emit(name, self, other)


def _either_way(name: str) -> Callable[..., Argument]:
    """Of two arguments in any order, values come first, then operands: fewer programs, so fewer kernels to compile."""

    def translate(emit: Emit, self: Argument, other: Argument) -> Argument:
        return emit(name, *sorted((self, other), key=lambda argument: (Value, Operand, int, float).index(type(argument))))

    return translate


def _scale(translate: Callable[..., Argument]) -> Callable[..., Argument]:
    # activations with a scale have one of 1 by default
    return lambda emit, self, other: self if other == 1 else translate(emit, self, other)


def _sum(of_two: Callable[..., Argument]) -> Callable[..., Argument]:
    def translate(emit: Emit, self: Argument, other: Argument, alpha: float = 1) -> Argument:
        return of_two(emit, self, other if alpha == 1 else emit("mul", other, alpha))

    return translate


def _clamp(emit: Emit, self: Argument, min: Argument | None = None, max: Argument | None = None) -> Argument:
    if min is not None:
        self = emit("max", self, min)
    return self if max is None else emit("min", self, max)


def _power(emit: Emit, self: Argument, exponent: float) -> Argument:
    names = {2: "pow2", 0.5: "sqrt", -0.5: "rsqrt", -1: "reciprocal"}
    if exponent not in names:
        raise ValueError(f"there is no instruction for a power of {exponent}")
    return emit(names[exponent], self)


def _convert(emit: Emit, a: Argument, dtype: torch.dtype) -> Argument:
    if dtype == torch.bool:
        return emit("ne", a, 0)
    if dtype not in FLOATS:
        raise ValueError(f"there is no instruction that converts to {dtype}")
    return a


def _where(emit: Emit, condition: Argument, self: Argument, other: Argument) -> Argument:
    return emit("where", condition, self, other)


UNARY = ("neg", "abs", "exp", "expm1", "log", "log1p", "sqrt", "rsqrt", "reciprocal", "sin", "cos", "tanh", "sigmoid", "erf")
COMPARISONS = ("gt", "ge", "lt", "le", "eq", "ne")

TRANSLATIONS: dict[object, Callable[..., Argument]] = {
    **{getattr(aten, name).default: _unary(name) for name in UNARY},
    **{getattr(getattr(aten, name), kind): _binary(name) for name in COMPARISONS for kind in ("Scalar", "Tensor")},
    aten.add.Tensor: _sum(_either_way("add")),
    aten.sub.Tensor: _sum(_binary("sub")),
    aten.mul.Tensor: _scale(_either_way("mul")),
    aten.div.Tensor: _scale(_binary("div")),
    aten.maximum.default: _either_way("max"),
    aten.minimum.default: _either_way("min"),
    aten.relu.default: lambda emit, self: emit("max", self, 0),
    aten.clamp.default: _clamp,
    aten.clamp_min.default: _clamp,
    aten.clamp_max.default: _clamp,
    aten.pow.Tensor_Scalar: _power,
    aten.where.self: _where,
    torch.ops.prims.convert_element_type.default: _convert,
}
