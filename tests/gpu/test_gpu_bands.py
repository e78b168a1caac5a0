"""The kernel that multiplies by banded matrices without a detour: rows that start anywhere, its tiles, programs, NaN and Inf."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from fused_cases import PROGRAM, call, float64, operand

from torch_conv_triton import dispatch, execute, fused
from torch_conv_triton.configs_depthwise import bands_config
from torch_conv_triton.dispatch import Plan
from torch_conv_triton.problem import current_precision, dtype_name
from torch_conv_triton.testing import Case, assert_within_budget, check_case, make_inputs

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="its products are NVIDIA's")]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CASES = (
    Case("conformer", 3, 8, 375, 8, 31, padding=15, groups=8),
    Case("even_rows", 2, 5, 750, 5, 23, padding=11, groups=5, bias=False),
    Case("whole_vectors", 2, 4, 512, 4, 9, padding=4, groups=4),
    Case("causal", 1, 3, 1001, 3, 4, padding=3, groups=3),
    Case("several_samples_a_tile", 40, 4, 37, 4, 16, padding=30, groups=4),
    Case("multiplied", 2, 4, 129, 12, 7, padding=2, groups=4),
    Case("one_output", 5, 4, 16, 4, 16, groups=4),
    Case("longer_than_a_tile", 1, 2, 4097, 2, 40, padding=20, groups=2),
)


def device():
    return dispatch.device_for(torch.device("cuda"))


def configs(problem):
    start = bands_config(problem)
    changes = [{}, {"run": 1}, {"run": 4, "steps": 3}, {"run": 2, "BLOCK_M": 32, "num_warps": 2}, {"BLOCK_M": 64, "num_warps": 4}]
    return list(dict.fromkeys(replace(start, **change) for change in changes))


def plan_of(config, problem):
    plan = Plan("depthwise_bands", config, "")
    assert dispatch.plan_refusal(plan, problem, device()) is None
    return plan


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_way_of_tiling(case, dtype):
    problem = case.problem(*make_inputs(case, dtype, device="cuda"))
    for config in configs(problem):

        def run(x, weight, bias, config=config):
            return execute.forward_with(plan_of(config, problem), problem, x, weight, bias)

        first, second = (check_case(case, run, dtype, "NCL", "cuda") for _ in range(2))
        assert torch.equal(first, second), config


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_start_anywhere(dtype):
    case = Case("part", 2, 6, 300, 6, 15, padding=7, groups=6)
    x, weight, bias = make_inputs(case, dtype, device="cuda")
    for row in (301, 302, 303, 308):
        around = torch.full((2, 8, row), torch.nan, dtype=dtype, device="cuda")
        part = around[:, :6, :300]
        part.copy_(x)
        problem = case.problem(part, weight, bias)
        y = execute.forward_with(plan_of(bands_config(problem), problem), problem, part, weight, bias)
        assert_within_budget(y, float64(x, weight, bias, case), current_precision(dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_runs_programs(case, dtype, monkeypatch):
    monkeypatch.setattr(fused, "_calls", {})
    monkeypatch.setattr(dispatch, "fused_plan", lambda problem, *_: plan_of(bands_config(problem), problem))
    N, C, L = case.output_shape
    text = f"{PROGRAM}; out %6 {dtype_name(dtype)} NCL; out %1 fp32 NLC"
    for seed in range(2):
        x, weight, bias = make_inputs(case, dtype, device="cuda", seed=seed)
        operands = [operand(*shape, layout="NLC", seed=seed, device="cuda") for shape in ((N, C, L), (1, C, 1), (1, 1, 1))]
        y, before = call(x, weight, bias, case, text, operands)
        residual, scale, shift = (o.double() for o in operands)
        expected = float64(x, weight, bias, case) + residual
        precision = current_precision(dtype)
        assert_within_budget(before, expected, "tf32")
        assert_within_budget(y, F.leaky_relu(expected, 0.1) * scale + shift, precision)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("case", CASES[:5], ids=str)
def test_non_finite_values_reach_the_outputs_whose_windows_hold_them(case, value, dtype):
    x, weight, bias = make_inputs(case, dtype, device="cuda")
    x[0, 1, 7] = value
    x[-1, 2, -1] = value
    problem = case.problem(x, weight, bias)
    expected = float64(x, weight, bias, case)
    for config in configs(problem):
        y = execute.forward_with(plan_of(config, problem), problem, x, weight, bias)
        assert_within_budget(y, expected, current_precision(dtype))
