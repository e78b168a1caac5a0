"""The way past the dispatcher, which takes the host longer than all else that is done for a call but its launches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.autograd import forward_ad
from torch.nn import Parameter

_functorch_active = torch._C._are_functorch_transforms_active


def is_unwatched(*tensors: Tensor | None) -> bool:
    """Whether nothing asks to see an operator called on these tensors: no autograd, subclass, mode, tracer or profiler."""
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) is not Tensor and type(tensor) is not Parameter:
            return False
        # negative views and zeros without memory are resolved by the dispatcher
        if (tensor.requires_grad and torch.is_grad_enabled()) or tensor.is_neg() or tensor._is_zerotensor():
            return False
    C = torch._C
    return not (
        C._len_torch_dispatch_stack() > 0
        or C._len_torch_function_stack() > 0
        or C._get_tracing_state() is not None
        or C._autograd._profiler_enabled()
    )


def add_direct(op: OpOverload, compute: Callable[..., Any]) -> None:
    """Add ``op.direct``, which takes the arguments of `op` by position and calls `compute` itself where nothing watches.

    For code that Inductor generates: there autocast is off, and the arguments are what the schema says.
    """
    types = [str(argument.type) for argument in op._schema.arguments]
    # in every schema of ours the tensors come first
    given = sum(kind in ("Tensor", "Optional[Tensor]") for kind in types)
    operands = types.index("List[Tensor]") if "List[Tensor]" in types else len(types)

    def direct(*args):
        tensors = args[:given]
        if operands < len(args):
            tensors = *tensors, *args[operands]
        if is_unwatched(*tensors) and not _functorch_active() and forward_ad._current_level < 0:
            return compute(*args)
        return op(*args)

    op.direct = direct
