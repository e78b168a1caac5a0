"""Who takes part: our call, and every other way that PyTorch offers to compute the same convolution."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_conv_triton.bench.errors import BenchError
from torch_conv_triton.bench.suite import Case, Tensors
from torch_conv_triton.bench.timing import Contestant

OURS = "ours"
PEERS = {
    "cudnn": "F.conv1d as it is",
    "benchmark": "F.conv1d with torch.backends.cudnn.benchmark",
    "conv2d": "F.conv2d on channels-last tensors, converted from and to the case's layout on every call",
    "conv2d_nhwc": "F.conv2d on channels-last tensors made beforehand, y left so: a bound, not counted as a peer",
    "compile": "torch.compile",
    "max-autotune": "torch.compile, mode max-autotune (without CUDA graphs: they would copy the inputs on every call)",
}
QUICK_PEERS = ("cudnn", "benchmark", "conv2d", "conv2d_nhwc")
COUNTED_PEERS = tuple(name for name in PEERS if name != "conv2d_nhwc")

Convolution = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def parse_peers(text: str) -> tuple[str, ...]:
    """Peers named by ``all``, ``quick`` (none that compiles), ``none`` or a comma-separated list. Raises BenchError."""
    sets = {"all": tuple(PEERS), "quick": QUICK_PEERS, "none": ()}
    if text in sets:
        return sets[text]
    names = tuple(name for name in text.split(",") if name)
    if unknown := [name for name in names if name not in PEERS]:
        raise BenchError(f"unknown peer {', '.join(unknown)}; there are {', '.join(PEERS)}, and the sets {', '.join(sets)}")
    return names


def convolution(name: str, case: Case) -> Convolution:
    """The convolution of `case` as `name` computes it: a function of x ``(N, C_in, L_in)``, weight and bias."""
    if name.startswith("conv2d"):
        return _conv2d(case)
    if name == OURS:
        import torch_conv_triton as functional
    else:
        functional = F
    function, arguments = functional.conv_transpose1d if case.transposed else functional.conv1d, case.arguments

    def conv(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return function(x, weight, bias, **arguments)

    if name == "compile":
        return torch.compile(conv, dynamic=False)
    if name == "max-autotune":
        return torch.compile(conv, dynamic=False, mode="max-autotune-no-cudagraphs")
    return conv


def forward_contestant(name: str, case: Case, tensors: Tensors) -> Contestant:
    """The forward call of `name`, ready to be timed.

    Weights are constants in inference, so "conv2d" has its own converted beforehand; x and y it converts on every call, except
    where x is NLC: such an x is channels-last already, and y may stay so.
    """
    conv, (x, weight, bias) = convolution(name, case), tensors
    if name == "conv2d":
        weight = channels_last(weight)
        if case.problem().layout == "NLC":
            return Contestant(lambda: conv(channels_last(x), weight, bias))
        return Contestant(lambda: conv(channels_last(x), weight, bias).squeeze(2).contiguous())
    if name == "conv2d_nhwc":
        x, weight = channels_last(x), channels_last(weight)
    return Contestant(lambda: conv(x, weight, bias), switches(name))


def gradient_contestant(name: str, case: Case, tensors: Tensors, grad_output: Tensor) -> Contestant:
    """The backward pass of `name` through autograd, for the gradients that the case asks for, in the thread that calls.

    All get the same grad_output (see `Case.grad_output`). The conv2d peers have x and weight channels-last beforehand, as the
    forward left them. "conv2d" converts the gradient of y on every call and that of x back, except where x is NLC: there the
    gradient of y is channels-last already, and that of x may stay so, while ours is NCL.
    """
    conv, (x, weight, bias) = convolution(name, case), tensors
    converts = name == "conv2d" and case.problem().layout != "NLC"
    if name.startswith("conv2d"):
        x, weight = channels_last(x), channels_last(weight)
        if not converts:
            grad_output = channels_last(grad_output)
    leaves = [
        None if t is None else t.detach().requires_grad_(wanted)
        for t, wanted in zip((x, weight, bias), case.gradients, strict=True)
    ]
    inputs = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    with torch.enable_grad():
        y = conv(*leaves)

    def backward() -> tuple[Tensor, ...]:
        # the engine's own threads would share cuDNN's plans between contestants
        with torch.autograd.set_multithreading_enabled(False):
            if not converts:
                return torch.autograd.grad(y, inputs, grad_output, retain_graph=True)
            found = torch.autograd.grad(y, inputs, channels_last(grad_output), retain_graph=True)
            return tuple(gradient.squeeze(2).contiguous() if gradient.dim() == 4 else gradient for gradient in found)

    return Contestant(backward, switches(name))


def channels_last(t: Tensor) -> Tensor:
    """``(A, B, C)`` as a channels-last ``(A, B, 1, C)``: a view where t already is NLC, else a copy."""
    return t.unsqueeze(2).contiguous(memory_format=torch.channels_last)


def switches(name: str) -> Callable[[], AbstractContextManager]:
    """What to set around the calls of `name`."""
    return _cudnn_benchmark if name == "benchmark" else nullcontext


def _conv2d(case: Case) -> Convolution:
    along_width = {"stride": (1, case.stride), "padding": (0, case.padding), "dilation": (1, case.dilation)}
    if not case.transposed:
        return lambda x, weight, bias: F.conv2d(x, weight, bias, groups=case.groups, **along_width)
    along_width["output_padding"] = (0, case.output_padding)
    return lambda x, weight, bias: F.conv_transpose2d(x, weight, bias, groups=case.groups, **along_width)


@contextmanager
def _cudnn_benchmark():
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
