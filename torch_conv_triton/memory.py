"""Uninitialised tensors, allocated as Inductor's code does: `torch.empty_strided` takes the host three times as long."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._C._dynamo.guards import _empty_strided_cuda


def uninitialised(shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of this shape and these strides, in elements."""
    if device.type == "cuda" and is_current(device):
        return _empty_strided_cuda(shape, strides, dtype)
    return torch.empty_strided(shape, strides, dtype=dtype, device=device)


def is_current(device: torch.device) -> bool:
    """Whether this GPU, which a tensor lies on, is the current one."""
    # torch.cuda.current_device, which asks first whether there is CUDA at all
    return device.index == torch._C._cuda_getDevice()
