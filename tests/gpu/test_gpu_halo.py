"""The kernel that keeps x with its halo in shared memory: its tiles, its ways of moving weights and outputs, programs."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from fused_cases import PROGRAM, call, float64, operand

from torch_conv_triton import dispatch, execute, fused
from torch_conv_triton.configs_halo import RING_SLOTS, halo_config, halo_refusal
from torch_conv_triton.dispatch import Plan
from torch_conv_triton.problem import current_precision, dtype_name
from torch_conv_triton.testing import Case, assert_within_budget, check_case, make_inputs

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="its products need sm_90"
    ),
]

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CASES = (
    Case("even", 2, 32, 3000, 32, 7, padding=9, dilation=3),
    Case("odd", 3, 32, 1013, 24, 5, padding=7, dilation=3),
    Case("shorter_than_a_tile", 5, 64, 90, 64, 3, padding=1, bias=False),
    Case("more_padding_than_signal", 2, 32, 20, 16, 41, padding=40),
    Case("channels_beyond_a_tile", 2, 64, 777, 200, 4, dilation=2),
    Case("three_slices", 2, 96, 530, 33, 7, padding=27, dilation=9),
    Case("four_slices", 2, 128, 1030, 128, 3, padding=2),
    Case("wide_halo", 2, 64, 2000, 64, 11, padding=60, dilation=12),
    Case("transposed", 2, 64, 1001, 32, 5, padding=3, dilation=3, transposed=True),
)


def configs(problem):
    """The heuristic config, and those that differ from it in one way, as far as they run."""
    device = dispatch.device_for(torch.device("cuda"))
    start = halo_config(problem)
    tiles_w = problem.K * (problem.C_in // start.BLOCK_K)
    changes = [
        {},
        {"BLOCK_M": 128, "num_warps": 8},
        {"BLOCK_M": 256},
        {"BLOCK_M": 512, "num_warps": 8},
        {"weights_left": not start.weights_left},
        {"prefetch": not start.prefetch},
        {"num_stages": RING_SLOTS},
        {"num_stages": tiles_w, "BLOCK_M": 128},
        {"BLOCK_N": 128, "weights_left": True, "num_warps": 8},
    ]
    tried = dict.fromkeys(replace(start, **change) for change in changes)
    return [config for config in tried if not halo_refusal(problem, device, config)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_way_of_tiling(case, dtype):
    problem = case.problem(*make_inputs(case, dtype, device="cuda"))
    plain = dispatch.as_plain(problem) if case.transposed else problem
    tried = configs(plain)
    assert len(tried) >= 3
    for config in tried:

        def run(x, weight, bias, config=config):
            return execute.forward_with(Plan("dense_halo", config, ""), problem, x, weight, bias)

        first, second = (check_case(case, run, dtype, "NCL", "cuda") for _ in range(2))
        assert torch.equal(first, second), config


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_x_that_is_part_of_a_larger_tensor(dtype):
    case = Case("part", 2, 32, 1000, 32, 7, padding=3)
    x, weight, bias = make_inputs(case, dtype, device="cuda")
    for first, length in ((1, 1000), (0, 1003), (5, 1008)):
        around = torch.full((2, 40, length + 8), torch.nan, dtype=dtype, device="cuda")
        part = around[:, 3:35, first : first + 1000]
        part.copy_(x)
        problem = case.problem(part, weight, bias)
        y = execute.forward_with(Plan("dense_halo", halo_config(problem), ""), problem, part, weight, bias)
        assert_within_budget(y, float64(x, weight, bias, case), current_precision(dtype))


@pytest.mark.parametrize("first", ["NCL", "NLC"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES[:5], ids=str)
def test_it_runs_programs(case, dtype, first, monkeypatch):
    monkeypatch.setattr(fused, "_calls", {})
    monkeypatch.setattr(dispatch, "fused_plan", lambda problem, *_: Plan("dense_halo", halo_config(problem), ""))
    second = "NLC" if first == "NCL" else "NCL"
    N, C, L = case.output_shape
    text = f"{PROGRAM}; out %6 {dtype_name(dtype)} {first}; out %1 fp32 {second}"
    for seed in range(3):
        x, weight, bias = make_inputs(case, dtype, device="cuda", seed=seed)
        operands = [operand(*shape, layout=second, seed=seed, device="cuda") for shape in ((N, C, L), (1, C, 1), (1, 1, 1))]
        y, before = call(x, weight, bias, case, text, operands)
        residual, scale, shift = (o.double() for o in operands)
        expected = float64(x, weight, bias, case) + residual
        assert_within_budget(before, expected, "tf32")
        assert_within_budget(y, F.leaky_relu(expected, 0.1) * scale + shift, current_precision(dtype))


def test_it_reads_masks(monkeypatch):
    monkeypatch.setattr(fused, "_calls", {})
    monkeypatch.setattr(dispatch, "fused_plan", lambda problem, *_: Plan("dense_halo", halo_config(problem), ""))
    case = CASES[0]
    x, weight, bias = make_inputs(case, torch.bfloat16, device="cuda")
    N, _, L = case.output_shape
    masks = [operand(*shape, device="cuda") > 0 for shape in (case.output_shape, (N, 1, L))]
    (y,) = call(x, weight, bias, case, "where a0 0.5 %0; where a1 -2.0 %1; out %2 bf16 NCL", masks)
    assert_within_budget(y, float64(x, weight, bias, case).masked_fill(masks[0], 0.5).masked_fill(masks[1], -2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_non_finite_values_spread_as_in_aten(dtype, value):
    case = CASES[0]
    x, weight, bias = make_inputs(case, dtype, device="cuda")
    x[0, 1, 7] = value
    x[1, 3, 1500] = value
    problem = case.problem(x, weight, bias)
    expected = case.operator(F)(x, weight, bias)
    for config in configs(problem):
        y = execute.forward_with(Plan("dense_halo", config, ""), problem, x, weight, bias)
        assert torch.equal(y.isfinite(), expected.isfinite()), config
