"""One case on the GPU: checked against float64, then timed beside its peers. Runs in the worker process."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from functools import cache, partial

import torch
import triton
from torch import Tensor

from torch_conv_triton import dispatch, dispatch_gradients, testing
from torch_conv_triton.bench import check
from torch_conv_triton.bench.peers import OURS, Tensors, convolution, forward_contestant, gradient_contestant
from torch_conv_triton.bench.results import Accuracy, CaseResult
from torch_conv_triton.bench.roofline import Ceilings, measure_ceilings
from torch_conv_triton.bench.suite import Case
from torch_conv_triton.bench.timing import Contestant, Stopwatch, Timing, race
from torch_conv_triton.dispatch import Plan


@cache
def stopwatch() -> Stopwatch:
    return Stopwatch()


def describe_machine() -> dict[str, str]:
    """The GPU and the versions that times depend on."""
    properties = torch.cuda.get_device_properties()
    return {
        "gpu": properties.name,
        "capability": f"sm_{properties.major}{properties.minor}",
        "multiprocessors": str(properties.multi_processor_count),
        "memory": f"{properties.total_memory / 2**30:.0f} GiB",
        "l2_cache": f"{properties.L2_cache_size / 2**20:.0f} MiB",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
        "python": platform.python_version(),
    }


def ceilings(ms: float = 300) -> Ceilings:
    """The rates of this GPU."""
    return measure_ceilings(lambda call: stopwatch().time(call, ms).median_ms)


def measure_case(
    case: Case, peers: Sequence[str], rates: Ceilings, *, backward: bool = False, rounds: int = 3, ms: float = 200
) -> CaseResult:
    """Check `case`, then time ours and each peer for `ms` in `rounds` turns. A wrong result is reported and not timed."""
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    tensors = case.tensors("cuda")
    problem = case.problem(tensors)
    if backward:
        grad_output = case.grad_output("cuda")
        plans = gradient_plans(case, tensors, grad_output)
        accuracy = gradient_accuracy(case, tensors, grad_output)
        floor_ms = rates.backward_floor_ms(problem, case)
    else:
        plans = [dispatch.plan(problem, dispatch.device_for(tensors[0].device))]
        accuracy = output_accuracy(case, tensors)
        floor_ms = rates.floor_ms(problem)
    found = {
        "kernel": " + ".join(plan.kernel for plan in plans),
        "config": " + ".join("" if plan.config is None else str(plan.config) for plan in plans),
        "reason": " + ".join(plan.reason for plan in plans),
        "accuracy": accuracy,
        "floor_ms": floor_ms,
    }
    if not accuracy.passed:
        message = (
            f"relative error against float64 {accuracy.ours.whole:.2e}, of the worst element {accuracy.ours.worst:.2e} "
            f"(allowed {accuracy.budget:.0e}; cuDNN {accuracy.cudnn.whole:.2e} and {accuracy.cudnn.worst:.2e})"
        )
        return CaseResult.of(case, status="wrong", message=message, **found)

    def enter(name: str) -> Contestant:
        if backward:
            return gradient_contestant(name, case, tensors, grad_output)
        return forward_contestant(name, case, tensors)

    timings = race({name: partial(enter, name) for name in (OURS, *peers)}, stopwatch().time, rounds, ms)
    ours = timings.pop(OURS)
    if not isinstance(ours, Timing):
        return CaseResult.of(case, status="failed", message=ours, **found)
    memory = {name: peak_mib(enter(name)) for name in (OURS, "cudnn")}
    return CaseResult.of(case, status="ok", ours=ours, peers=timings, memory_mib=memory, **found)


def peak_mib(contestant: Contestant) -> float:
    """The most memory that a call takes, in MiB: its result, and what it works in. Not the first call, which may compile."""
    with contestant.context():
        contestant.call()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        contestant.call()
        return (torch.cuda.max_memory_allocated() - before) / 2**20


def gradient_plans(case: Case, tensors: Tensors, grad_output: Tensor) -> list[Plan]:
    """The plans of the gradients of x and weight, in this order, that the case asks for; that of a bias may be the weight's."""
    device = dispatch.device_for(tensors[0].device)
    with_bias = all(case.gradients[1:]) and not case.transposed
    planned = {
        "forward": dispatch.plan,
        "input_grad": dispatch_gradients.plan_input_grad,
        "weight_grad": dispatch_gradients.plan_weight_bias_grad if with_bias else dispatch_gradients.plan_weight_grad,
    }
    return [planned[problem.kind](problem, device) for problem in case.gradient_problems(tensors, grad_output)]


def output_accuracy(case: Case, tensors: Tensors) -> Accuracy:
    """Errors of our output, written over NaN, and of cuDNN's."""
    with torch.no_grad():
        with testing.poisoned_allocations():
            ours = convolution(OURS, case)(*tensors)
        errors, compared = check.output_errors(case, tensors, (ours, convolution("cudnn", case)(*tensors)))
    return Accuracy(*errors, budget=budget(case), compared=compared)


def gradient_accuracy(case: Case, tensors: Tensors, grad_output: Tensor) -> Accuracy:
    """The largest errors of our gradients, written over NaN, and of cuDNN's."""
    with testing.poisoned_allocations():
        ours = gradient_contestant(OURS, case, tensors, grad_output).call()
    cudnn = gradient_contestant("cudnn", case, tensors, grad_output).call()
    errors = check.gradient_errors(case, tensors, grad_output, (ours, cudnn))
    return Accuracy(*errors, budget=budget(case), compared="all samples")


def budget(case: Case) -> float:
    problem = case.problem()
    return testing.error_budget(problem.dtype, problem.precision)
