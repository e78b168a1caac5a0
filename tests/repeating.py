"""Repeated launches without a GPU: what a recording has noted runs in Triton's interpreter, on the addresses that it is given."""

import ctypes
from types import SimpleNamespace

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from torch_conv_triton import calls
from torch_conv_triton.kernels import launch as launching


class Interpreted:
    """Stands for a compiled kernel."""

    function = packed_metadata = None

    def __init__(self, kernel, args, keywords):
        self.kernel = kernel
        named = dict(zip(kernel.arg_names, args, strict=False)) | keywords
        self.kinds = [kind_of(named[name]) for name in kernel.arg_names]
        self.key = (kernel.__name__, str(self.kinds))

    def __eq__(self, other):
        return self.key == other.key

    def __hash__(self):
        return hash(self.key)

    def run(self, x, y, z, stream, function, packed_metadata, metadata, enter_hook, exit_hook, *args):
        self.kernel[(x, y, z)](*[with_memory(arg, kind) for arg, kind in zip(args, self.kinds, strict=True)])


def kind_of(value):
    if isinstance(value, tuple):
        return tuple(map(kind_of, value))
    if isinstance(value, TensorDescriptor):
        return value.base.dtype
    return value.dtype if isinstance(value, torch.Tensor) else None


def with_memory(arg, kind):
    if isinstance(kind, tuple):
        return tuple(map(with_memory, arg, kind))
    if isinstance(arg, TensorDescriptor):
        elements = 1 + sum((size - 1) * stride for size, stride in zip(arg.shape, arg.strides, strict=True))
        base = at(arg.base.address, kind, elements).as_strided(arg.shape, arg.strides)
        return TensorDescriptor(base, arg.shape, arg.strides, arg.block_shape)
    return arg if kind is None else at(arg, kind, 1)


def at(address, dtype, elements):
    size = elements * dtype.itemsize
    return torch.frombuffer((ctypes.c_char * size).from_address(address), dtype=dtype)


def repeat_on_a_cpu(monkeypatch) -> list[str]:
    """Record and repeat launches on a CPU too; the names of the kernels that were launched again are kept."""
    repeated: list[str] = []
    note = launching.Recording._note

    def noted(self, kernel, compiled, grid, args, keywords):
        note(self, kernel, Interpreted(kernel, args, keywords), grid, args, keywords)

    def run(call, launch, *tensors):
        calls._launch_or_repeat(call, launch, tensors)

    monkeypatch.setattr(launching.Recording, "_note", noted)
    monkeypatch.setattr(launching, "_make_context_current", lambda: None)
    monkeypatch.setattr(launching, "driver", SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda device: 7)))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    for module in (calls, __import__("torch_conv_triton.fused", fromlist=["run"])):
        monkeypatch.setattr(module, "run", run)
    monkeypatch.setattr(calls, "_on", lambda device, launch, *arguments: launch(*arguments))
    interpreted = Interpreted.run
    monkeypatch.setattr(Interpreted, "run", lambda self, *a: (repeated.append(self.kernel.__name__), interpreted(self, *a)))
    return repeated
