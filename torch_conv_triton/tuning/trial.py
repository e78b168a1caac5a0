"""Tries plans on a problem: is the output right, and how long does it take. Runs in processes of its own, which may die of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache, partial

import torch
from torch import Tensor

from torch_conv_triton import execute, gradients, reference, testing
from torch_conv_triton.bench.timing import Contestant, Timing, in_words, race
from torch_conv_triton.calls import Call
from torch_conv_triton.dispatch import Plan
from torch_conv_triton.problem import Conv1dProblem

Tensors = tuple[Tensor, Tensor, Tensor | None]

# positions enough for tiles of every size, and for tiles over several samples
POSITIONS_CHECKED = 4096
# how long a plan is timed: at first, and then in turns with the others that may be the fastest
SCREENING_MS = 8.0
FINAL_MS, FINAL_ROUNDS = 60.0, 3
# a plan this much slower than the fastest at first is out, and so is all beyond the first few
MARGIN, FINALISTS = 1.1, 6


def check(problem: Conv1dProblem, plan: Plan, device: torch.device) -> str | None:
    """What is wrong with the output of this plan, or None: compared with float64, on some of the samples, twice.

    Raises where the device's context is lost: then the process is of no more use.
    """
    try:
        return _fault(fewer_samples(problem), plan, device)
    except Exception as error:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return in_words(error)
    finally:
        _release(device)


def _fault(problem: Conv1dProblem, plan: Plan, device: torch.device) -> str | None:
    with torch.no_grad(), testing.float32_precision(problem.precision):
        tensors, expected = _inputs_and_output(problem, device)
        with testing.poisoned_allocations():
            y, again = (run(plan, problem, tensors) for _ in range(2))
    testing.assert_within_budget(y, expected, problem.precision)
    return None if torch.equal(y, again) else "the output differs from call to call"


def run(plan: Plan, problem: Conv1dProblem, tensors: Tensors) -> Tensor:
    """Run a plan on tensors such as `inputs` gives."""
    if problem.kind == "input_grad":
        return gradients.input_grad_with(plan, problem, *tensors[:2])
    if problem.kind == "weight_grad":
        return gradients.weight_grad_with(plan, problem, *tensors[:2])
    return execute.forward_with(plan, problem, *tensors)


def fewer_samples(problem: Conv1dProblem) -> Conv1dProblem:
    """The problem with as few samples as are enough to check a plan, but not with a single one unless it has no more.

    Sizes that kernels are specialised on stay what they are, so that what is compiled for the check serves the timing.
    """
    return replace(problem, N=min(problem.N, max(2, POSITIONS_CHECKED // problem.L_out)))


def inputs(problem: Conv1dProblem, device: torch.device) -> Tensors:
    """Random x, weight and bias with the strides and the alignment of the problem, beside NaN: a read before or after shows.

    For the gradient of an input: grad_output, the weight and None; for that of a weight: grad_output, x and None.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    generator = torch.Generator(device).manual_seed(0)
    weight_shape = (problem.C_out, problem.C_in_per_group, problem.K)
    if problem.transposed:
        weight_shape = (problem.C_in, problem.C_out_per_group, problem.K)

    def normal(shape: Sequence[int], strides: Sequence[int], scale: float = 1.0, shift: int = 0) -> Tensor:
        span = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
        start = testing.MARGIN + shift
        buffer = torch.full((start + span + testing.MARGIN,), torch.nan, dtype=problem.dtype, device=device)
        buffer[start : start + span].normal_(std=scale, generator=generator)
        return buffer.as_strided(shape, strides, start)

    shift = 0 if problem.aligned else 1
    x = normal((problem.N, problem.C_in, problem.L_in), problem.x_strides, shift=shift)
    if problem.kind == "weight_grad":
        return normal((problem.N, problem.C_out, problem.L_out), problem.y_strides, shift=shift), x, None
    weight = normal(weight_shape, problem.w_strides, (problem.C_in_per_group * problem.K) ** -0.5)
    return x, weight, normal((problem.C_out,), (1,)) if problem.has_bias else None


@lru_cache(maxsize=1)
def _inputs_and_output(problem: Conv1dProblem, device: torch.device) -> tuple[Tensors, Tensor]:
    tensors = inputs(problem, device)
    geometry = problem.stride, problem.padding, problem.dilation, problem.groups, problem.transposed, problem.output_padding
    if problem.kind == "weight_grad":
        return tensors, _expected_weight_grad(*tensors[:2], problem, geometry)
    if problem.kind == "input_grad" and not problem.transposed:
        x, weight, _ = tensors
        return tensors, reference.conv1d(x, weight.flip(2), None, *geometry)
    return tensors, reference.conv1d(*tensors, *geometry)


def _expected_weight_grad(grad_output: Tensor, x: Tensor, problem: Conv1dProblem, geometry: tuple) -> Tensor:
    shape = problem.C_out, problem.C_in_per_group, problem.K
    weight = torch.zeros(shape, dtype=torch.float64, device=x.device, requires_grad=True)
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(reference.conv1d(x.double(), weight, None, *geometry), weight, grad_output.double())
    return gradient


def _release(device: torch.device) -> None:
    """Leave other processes the memory that nothing here uses."""
    if device.type == "cuda":
        torch.cuda.empty_cache()


def measure(problem: Conv1dProblem, plans: Sequence[Plan], device: torch.device) -> dict[int, float]:
    """Times in ms of the plans, by their places, that come near the fastest, and of the first plan and aten's where they run.

    All are timed shortly, one after another, and the fastest again in turns. A plan that fails is left out.
    """
    from torch_conv_triton.bench.measure import stopwatch

    _inputs_and_output.cache_clear()
    _release(device)
    tensors = inputs(problem, device)
    entries = {str(i): partial(_contestant, plan, problem, tensors) for i, plan in enumerate(plans)}
    with testing.float32_precision(problem.precision):
        times = _milliseconds(race(entries, stopwatch().time, 1, SCREENING_MS))
        ahead = sorted(times, key=times.get)
        near = [name for name in ahead if times[name] <= MARGIN * times[ahead[0]]][:FINALISTS]
        asked = [str(i) for i, plan in enumerate(plans) if i == 0 or plan.is_aten]
        finalists = {name: entries[name] for name in entries if name in times and name in (*near, *asked)}
        times = _milliseconds(race(finalists, stopwatch().time, FINAL_ROUNDS, FINAL_MS))
    return {int(name): ms for name, ms in times.items()}


def _contestant(plan: Plan, problem: Conv1dProblem, tensors: Tensors) -> Contestant:
    call: Callable[[], Tensor]
    if plan.is_aten:
        call = partial(run, plan, problem, tensors)
    elif problem.kind == "forward":
        # one call, so that its launches are repeated as in a program
        call = partial(execute.run_kernels, Call(problem, plan), *tensors)
    elif problem.kind == "input_grad":
        call = partial(gradients.run_input_grad, gradients.input_grad_call(plan, problem), *tensors[:2])
    else:
        call = partial(gradients.run_weight_grad, Call(problem, plan), *tensors[:2])
    # every contestant has a thread, and every thread a current device, which the clock's events are on
    return Contestant(call, partial(torch.cuda.device_of, tensors[0]))


def _milliseconds(timings: dict[str, Timing | str]) -> dict[str, float]:
    """What a call costs a program: the device's time, or the host's where that is longer."""
    return {name: max(t.median_ms, t.host_ms) for name, t in timings.items() if isinstance(t, Timing)}
