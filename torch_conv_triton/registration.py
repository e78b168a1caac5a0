"""Registers operators that return lists of tensors, for graphs that autograd is done with: they have no gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._ops import OpOverload

_library = torch.library.Library("triton_conv", "FRAGMENT")


def register(name: str, arguments: str, compute: Callable[..., Any], fake: Callable[..., Any]) -> dict[OpOverload, Callable]:
    """Define ``triton_conv::<name>`` with these arguments of its schema, and the overload `one` for lists of one tensor.

    `compute` runs on tensors, `fake` on fake ones. Returns what each of the two runs. `one` is there because Inductor's C++
    wrapper (torch 2.13) crashes on a list of one tensor.
    """
    for overload, results in (("", "Tensor[]"), (".one", "Tensor")):
        _library.define(
            f"{name}{overload}({arguments}) -> {results}",
            tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
        )
    packet = getattr(torch.ops.triton_conv, name)
    computed = {packet.default: compute, packet.one: _one(compute)}
    for (op, computes), fakes in zip(computed.items(), (fake, _one(fake)), strict=True):
        _library.impl(op, computes, "CPU")
        _library.impl(op, computes, "CUDA")
        torch.library.register_fake(op, fakes, lib=_library)
    return computed


def _one(compute: Callable[..., Any]) -> Callable[..., Any]:
    def compute_one(*arguments):
        (output,) = compute(*arguments)
        return output

    return compute_one
