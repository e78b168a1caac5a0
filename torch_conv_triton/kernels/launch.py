"""Launching kernels, and recording what was launched, so that a call like an earlier one costs the host only the launches.

Between two calls with the same sizes, strides, alignment and plan only the addresses differ. A `Recording` keeps the compiled
kernels with their other arguments and launches them again on new addresses, without the arithmetic of the launchers and
without Triton's binding of arguments.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

_thread = threading.local()


def launch(kernel, grid: tuple[int, ...], *args, **keywords) -> None:
    """``kernel[grid](*args, **keywords)``, noted by the thread's recording if there is one."""
    compiled = kernel[grid](*args, **keywords)
    recording = getattr(_thread, "recording", None)
    if recording is not None:
        recording._note(kernel, compiled, grid, args, keywords)


def workspace(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor that lives as long as the launches that use it; a recording allocates it anew each time."""
    tensor = torch.empty(shape, dtype=dtype, device=device)
    recording = getattr(_thread, "recording", None)
    if recording is not None:
        recording._workspaces.append((shape, dtype, device))
        recording._tensors.append(tensor)
    return tensor


@dataclass(frozen=True, slots=True)
class _Step:
    """One launch: `run` takes all of the kernel's arguments; `places` are (argument, tensor, bytes past its start)."""

    run: Callable[..., None]
    args: tuple
    places: tuple[tuple[int, int, int], ...]


class Recording:
    """The launches made on this thread within ``with recording:``, on the given tensors (None where there is none)."""

    def __init__(self, *tensors: Tensor | None) -> None:
        self._tensors: list[Tensor | None] = list(tensors)
        self._workspaces: list[tuple] = []
        self._steps: list[_Step] = []
        storages = [t.untyped_storage().data_ptr() for t in tensors if t is not None]
        # tensors that share memory now need not share it in the next call
        self.repeatable = len(set(storages)) == len(storages)

    def __enter__(self) -> Recording:
        _thread.recording = self
        return self

    def __exit__(self, *exception) -> None:
        _thread.recording = None
        self._tensors.clear()

    def repeat(self, *tensors: Tensor | None) -> None:
        """Launch again on tensors that have the shapes, strides, dtypes and alignment of the recorded ones."""
        spaces = [torch.empty(shape, dtype=dtype, device=device) for shape, dtype, device in self._workspaces]
        addresses = [0 if t is None else t.data_ptr() for t in (*tensors, *spaces)]
        stream = driver.active.get_current_stream(tensors[0].get_device())
        for step in self._steps:
            args = list(step.args)
            for position, tensor, offset in step.places:
                args[position] = addresses[tensor] + offset
            step.run(*args, stream=stream)

    def _note(self, kernel, compiled, grid, args, keywords) -> None:
        named = dict(zip(kernel.arg_names, args, strict=False)) | keywords
        # the interpreter compiles nothing; a descriptor holds an address of its own
        if compiled is None or any(isinstance(value, TensorDescriptor) for value in named.values()):
            self.repeatable = False
        if not self.repeatable:
            return
        values = [named[name] for name in kernel.arg_names]
        places = []
        for position, value in enumerate(values):
            if isinstance(value, Tensor):
                place = self._place(value)
                if place is None:
                    self.repeatable = False
                    return
                places.append((position, *place))
                values[position] = 0
        self._steps.append(_Step(compiled[(*grid, 1, 1)[:3]], tuple(values), tuple(places)))

    def _place(self, argument: Tensor) -> tuple[int, int] | None:
        """Which tensor of the call the argument is, or is a view of, and the bytes between their starts."""
        storage = argument.untyped_storage().data_ptr()
        for i, tensor in enumerate(self._tensors):
            if tensor is not None and tensor.untyped_storage().data_ptr() == storage:
                return i, argument.data_ptr() - tensor.data_ptr()
        return None
