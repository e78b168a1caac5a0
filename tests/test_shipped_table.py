"""Every entry of the shipped table that is a kernel of ours computes: in Triton's interpreter, against float64.

Each is run with its own config on a small problem of its key. Those of Gluon kernels are not, for the interpreter does not run
them: tests/gpu/test_gpu_halo.py and tests/gpu/test_gpu_bands.py check these kernels, not each entry.
"""

import importlib
import re
from dataclasses import replace
from math import lcm

import pytest
import torch
from cross_compiled_workloads import H200, tuned

from torch_conv_triton import dispatch, dispatch_gradients, reference
from torch_conv_triton.dispatch import Plan
from torch_conv_triton.problem import Conv1dProblem, contiguous_strides, layout_of
from torch_conv_triton.testing import assert_within_budget, poisoned_allocations
from torch_conv_triton.tuning import tables
from torch_conv_triton.tuning.trial import inputs, run

ENTRIES = tables.parse(tables.read(tables.shipped_path(H200.name)))
GLUON = ("dense_halo", "depthwise_bands")
COMPUTED = [key for key, entry in ENTRIES.items() if entry.kernel not in (*dispatch.ATEN, *GLUON)]

# input and output channels of a group: of outputs more than a tile of 128 or one of 256, of inputs several slices,
# times the taps; the last are those from which a strided x is worth a copy
ENOUGH_CHANNELS = (128, 192), (128, 256), (256, 256)
# two samples of more would double the time of the slowest entries
SMALL_SAMPLE_FLOPS = 5e7


@pytest.fixture(scope="module")
def plans():
    return tuned()


def small(whole: Conv1dProblem, plan: Plan) -> Conv1dProblem:
    """A problem of the same key but for the numbers of channels, groups and positions (a tile and a half of these).

    What divides the channels and the length is what it was. With all of the channels a third of the entries take eight minutes.
    """
    tile = plan.config.BLOCK_O if whole.kind == "weight_grad" else plan.config.BLOCK_N
    tries = [shrunk(whole, plan, most) for most in ENOUGH_CHANNELS if tile <= most[1] and (whole.K > 1 or most[0] > 128)]
    return next((problem for problem in tries if runs(plan, problem, whole)), tries[-1])


def shrunk(p: Conv1dProblem, plan: Plan, most_channels: tuple[int, int]) -> Conv1dProblem:
    """The small problem with at most so many input and output channels in a group, or a few more where they are odd."""
    config, weight_grad = plan.config, p.kind == "weight_grad"
    counts = p.C_in_per_group, p.C_out_per_group
    channels = [min(count, most + count % 64) for count, most in zip(counts, most_channels, strict=True)]
    groups = min(p.groups, 2)
    banded = plan.kernel == "depthwise_toeplitz"
    if p.is_depthwise:
        # rows of channels in whole vectors
        groups = 16 * -(-3 * (1 if banded else config.BLOCK_O if weight_grad else config.BLOCK_N) // 32)
    C_in, C_out = (groups * c for c in channels)
    if weight_grad:
        tile = config.BLOCK_L * min(config.splits, 6)
    else:
        tile = config.BLOCK_M * config.steps * (config.BLOCK_N * config.run if banded else 1)
    positions = max(tables.SHORT_OUTPUT, tile * 3 // 2)
    step = lcm(16, p.stride)
    # what is short of that keeps its length
    for L in range(p.L_in % step or step, p.L_in + 1, step):
        found = replace(p, N=1, C_in=C_in, C_out=C_out, groups=groups, L_in=L)
        if min(L, found.L_out) >= positions:
            break
    return replace(
        found,
        N=min(p.N, max(1 + (found.flops < SMALL_SAMPLE_FLOPS), positions // found.L_out)),
        x_strides=_strides(p.layout, C_in, L),
        y_strides=_strides(layout_of(p.y_strides, p.C_out, p.L_out), C_out, found.L_out),
        w_strides=contiguous_strides(channels[p.transposed], p.K),
    )


def runs(plan: Plan, problem: Conv1dProblem, whole: Conv1dProblem) -> bool:
    """Whether the plan is one of the small problem, or of as many of its samples as are the work of the whole one.

    Copies of the input are refused where there is too little to compute for them to pay.
    """
    many = replace(problem, N=problem.N * -(-whole.flops // problem.flops))
    return any(dispatch_gradients.plan_refusal(plan, each, H200) is None for each in (problem, many))


def _strides(layout: str, C: int, L: int) -> tuple[int, int, int]:
    return contiguous_strides(C, L) if layout == "NCL" else (C * L, 1, C)


def without_numbers(key: str) -> str:
    """A key but for how many channels, groups and positions there are: what divides the channels stays."""
    return re.sub(r"(?<= [iogn])\d+", "", key)


def expected(p: Conv1dProblem, first: torch.Tensor, second: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """What a plan computes of these `inputs`, in float64."""
    geometry = p.stride, p.padding, p.dilation, p.groups, p.transposed, p.output_padding
    if p.kind == "weight_grad":
        weight = torch.zeros((p.C_out, p.C_in_per_group, p.K), dtype=torch.float64, requires_grad=True)
        return torch.autograd.grad(reference.conv1d(second.double(), weight, None, *geometry), weight, first.double())[0]
    # the gradient of an input that is no transposed convolution is one with the taps reversed
    weight = second.flip(2) if p.kind == "input_grad" and not p.transposed else second
    return reference.conv1d(first, weight, bias, *geometry)


@pytest.mark.parametrize("key", COMPUTED)
def test_an_entry_computes(plans, key):
    whole, plan = plans[key]
    assert (plan.kernel, plan.config) == (ENTRIES[key].kernel, ENTRIES[key].config)
    problem = small(whole, plan)
    assert without_numbers(tables.key(problem)) == without_numbers(key)
    assert runs(plan, problem, whole)
    tensors = inputs(problem, torch.device("cpu"))
    with poisoned_allocations():
        y = run(plan, problem, tensors)
    assert y.dtype == problem.dtype
    assert_within_budget(y, expected(problem, *tensors), problem.precision)


def test_only_gluon_kernels_are_not_computed_here():
    kernels = {entry.kernel for entry in ENTRIES.values()}
    modules = {name: importlib.import_module(f"torch_conv_triton.kernels.{name}") for name in kernels.difference(dispatch.ATEN)}
    assert {name for name, module in modules.items() if hasattr(module, "gluon")} == set(GLUON)
