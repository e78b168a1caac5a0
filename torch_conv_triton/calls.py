"""What is decided once for all calls that differ only in values and addresses: the problem, the plan, the launches to repeat."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torch_conv_triton.dispatch import Plan
from torch_conv_triton.memory import is_current
from torch_conv_triton.problem import Conv1dProblem

if TYPE_CHECKING:
    from torch_conv_triton.kernels.launch import Recording

_MAX_CALLS = 4096

Launch = Callable[..., None]


@dataclass(slots=True)
class Call:
    """What is decided by everything of a call but its values and addresses. `recording`: its launches, once they were made.

    The gradient of a bias has no problem.
    """

    problem: Conv1dProblem | None
    plan: Plan
    recording: Recording | None = None


def remember(calls: dict[tuple, Call], key: tuple, call: Call) -> Call:
    """Keep a call by what decides it, and return it; when there are too many, all others are forgotten."""
    if len(calls) >= _MAX_CALLS:
        calls.clear()
    calls[key] = call
    return call


def signature(tensor: Tensor) -> tuple:
    """What a plan and its launches may depend on of a tensor."""
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, tensor.data_ptr() % 16


def run(call: Call, launch: Launch, *tensors: Tensor | None) -> None:
    """``launch(call.plan, call.problem, *tensors)`` on the device of the first tensor; on a GPU repeated from a recording."""
    device = tensors[0].device
    if device.type == "cuda":
        _on(device, _launch_or_repeat, call, launch, tensors)
    else:
        launch(call.plan, call.problem, *tensors)


def repeat(recording: Recording, *tensors: Tensor) -> None:
    """The recording's launches again, on the GPU of the first tensor."""
    _on(tensors[0].device, recording.repeat, *tensors)


def _on(device: torch.device, launch: Launch, *arguments: object) -> None:
    if is_current(device):
        launch(*arguments)
    else:
        # Triton launches on the current device
        with torch.cuda.device(device):
            launch(*arguments)


def _launch_or_repeat(call: Call, launch: Launch, tensors: tuple[Tensor | None, ...]) -> None:
    recording = call.recording
    if recording is None:
        from torch_conv_triton.kernels.launch import Recording

        with Recording(*tensors) as recording:
            launch(call.plan, call.problem, *tensors)
        call.recording = recording
    elif recording.repeatable:
        recording.repeat(*tensors)
    else:
        launch(call.plan, call.problem, *tensors)
