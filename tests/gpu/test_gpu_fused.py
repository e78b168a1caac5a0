"""Fused convolutions on the GPU: every kernel with a program, the instructions, rounded inputs, calls that are repeated."""

import pytest
import torch
import torch.nn.functional as F
from fused_cases import (
    BY_ROWS,
    CHAINS,
    FAMILIES,
    GATED,
    PROGRAM,
    assert_sines_are_right,
    call,
    family_plan,
    float64,
    gated,
    kernel_of,
    nearest_tf32,
    operand,
)

from torch_conv_triton import dispatch, fused
from torch_conv_triton.epilogue import INSTRUCTIONS
from torch_conv_triton.problem import current_precision, dtype_name
from torch_conv_triton.testing import Case, assert_within_budget, make_inputs

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LARGE = Case("large", 2, 64, 8000, 64, 7, padding=9, dilation=3)


@pytest.fixture
def fresh(monkeypatch):
    monkeypatch.setattr(fused, "_calls", {})
    return monkeypatch


def run_program(case, dtype, layout, first, rounded):
    """Three calls of one program on other values, the last two of them repeated launches."""
    second = "NLC" if first == "NCL" else "NCL"
    N, C, L = case.output_shape
    text = f"{PROGRAM}; out %6 {dtype_name(dtype)} {first}; out %1 fp32 {second}"
    for seed in range(3):
        x, weight, bias = make_inputs(case, dtype, layout, "cuda", seed)
        if rounded and dtype == torch.float32:
            x = nearest_tf32(x)
        shapes = (N, C, L), (1, C, 1), (1, 1, 1)
        operands = [operand(*shape, layout=second, seed=seed, device="cuda") for shape in shapes]
        y, before = call(x, weight, bias, case, text, operands, rounded)
        residual, scale, shift = (o.double() for o in operands)
        expected = float64(x, weight, bias, case) + residual
        assert_within_budget(before, expected, "tf32")
        assert_within_budget(y, F.leaky_relu(expected, 0.1) * scale + shift, current_precision(dtype))


@pytest.mark.parametrize(
    "first, dtype", [("NCL", torch.bfloat16), ("NLC", torch.float32), ("NLC", torch.float16), ("NCL", torch.float32)], ids=str
)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_kernel_runs_programs(name, dtype, first, fresh):
    case, layout, _ = FAMILIES[name]
    rounded = kernel_of(name) == "dense_tma"
    if kernel_of(name) in BY_ROWS:
        first = "NCL"

    fresh.setattr(dispatch, "fused_plan", lambda problem, device, *_: family_plan(name, problem, device))
    run_program(case, dtype, layout, first, rounded)


@pytest.mark.parametrize("name", FAMILIES)
def test_every_kernel_reads_masks(name, fresh):
    case, layout, _ = FAMILIES[name]
    fresh.setattr(dispatch, "fused_plan", lambda problem, device, *_: family_plan(name, problem, device))
    x, weight, bias = make_inputs(case, torch.bfloat16, layout, "cuda")
    N, _, L = case.output_shape
    masks = [operand(*shape, device="cuda") > 0 for shape in (case.output_shape, (N, 1, L))]
    (y,) = call(x, weight, bias, case, "where a0 0.5 %0; where a1 -2.0 %1; out %2 bf16 NCL", masks)
    assert_within_budget(y, float64(x, weight, bias, case).masked_fill(masks[0], 0.5).masked_fill(masks[1], -2))


@pytest.mark.parametrize(
    "first, dtype", [("NCL", torch.bfloat16), ("NLC", torch.float32), ("NLC", torch.float16), ("NCL", torch.float32)], ids=str
)
@pytest.mark.parametrize("name", GATED)
def test_gates_of_both_halves_of_the_channels(name, dtype, first, fresh):
    case, layout, _ = GATED[name]
    fresh.setattr(dispatch, "fused_plan", lambda problem, device, *_: family_plan(name, problem, device))
    rounded = name.startswith("dense_tma") and dtype == torch.float32
    for seed in range(3):
        arguments, expected = gated(case, dtype, layout, first, rounded, seed, "cuda")
        for actual, exact in zip(call(*arguments), expected, strict=True):
            assert_within_budget(actual, exact, current_precision(dtype))


@pytest.mark.parametrize("layout", ["NCL", "NLC"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("K", [1, 5])
def test_plans_of_large_gates(dtype, layout, K, fresh):
    case = Case("large", 4, 192, 3001, 390, K, padding=K // 2)
    for seed in range(2):
        arguments, expected = gated(case, dtype, layout, layout, layout == "NLC" and dtype == torch.float32, seed, "cuda")
        for actual, exact in zip(call(*arguments), expected, strict=True):
            assert_within_budget(actual, exact, current_precision(dtype))


@pytest.mark.parametrize("layout", ["NCL", "NLC"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_plans_of_large_problems_run_programs(dtype, layout, fresh):
    run_program(LARGE, dtype, layout, layout, layout == "NLC")


@pytest.mark.parametrize(
    "dtype, C", [*((torch.float32, C) for C in (96, 160, 192, 320)), (torch.bfloat16, 96), (torch.bfloat16, 192)], ids=str
)
def test_channels_that_are_a_sum_of_two_powers_of_two(dtype, C, fresh):
    plans, choose = [], dispatch.fused_plan
    fresh.setattr(dispatch, "fused_plan", lambda *args: plans.append(choose(*args)) or plans[-1])
    run_program(Case("codec", 4, C, 17001, C, 7, padding=9, dilation=3), dtype, "NLC", "NLC", rounded=True)
    assert plans and (torch.cuda.get_device_capability() != (9, 0) or all(plan.config.TAIL_N for plan in plans))


def test_every_instruction_and_activation(fresh):
    case = Case("small", 1, 16, 200, 16, 3, padding=1)
    x, weight, bias = make_inputs(case, torch.float32, device="cuda")
    y = float64(x, weight, bias, case)
    for text, activation in CHAINS.values():
        (actual,) = call(x, weight, bias, case, f"{text}; out %{text.count(';') + 1} fp32 NCL")
        assert_within_budget(actual, activation(y), "tf32")
    for name, function in INSTRUCTIONS.items():
        arguments = " ".join(("%2", "0.7", "-0.3")[: function.arity])
        (actual, plain) = call(x, weight, bias, case, f"abs %0; add %1 0.5; {name} {arguments}; out %3 fp32 NCL; out %2 fp32 NCL")
        numbers = [torch.tensor(value, device="cuda") for value in (0.7, -0.3)[: function.arity - 1]]
        torch.testing.assert_close(actual, function.compute(plain, *numbers), rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("K, dilation", [(3, 1), (7, 3), (11, 5)])
@pytest.mark.parametrize("C, C_out, L", [(32, 32, 3001), (64, 64, 2048), (64, 40, 1023)])
def test_an_activation_before_the_convolution(C, C_out, L, K, dilation, dtype, fresh):
    padding = dilation * (K - 1) // 2
    case = Case("activated", 2, C, L, C_out, K, padding=padding, dilation=dilation)
    text = f"mul %0 0.1; gt %0 0.0; where %2 %0 %1; conv; add %0 a0; out %1 {dtype_name(dtype)} NCL"
    for seed in range(2):
        x, weight, bias = make_inputs(case, dtype, "NCL", "cuda", seed)
        residual = operand(*case.output_shape, seed=seed, dtype=dtype, device="cuda")
        (y,) = call(x, weight, bias, case, text, [residual])
        activated = F.leaky_relu(x.float(), 0.1).to(dtype)
        assert_within_budget(y, float64(activated, weight, bias, case) + residual.double(), current_precision(dtype))
    assert {made.plan.kernel for made in fused._calls.values()} == {"dense_halo"}


def test_sines_of_any_argument(fresh):
    assert_sines_are_right("cuda")


def test_a_residual_that_is_the_input_is_repeated(fresh):
    case = Case("square", 2, 32, 500, 32, 3, padding=1)
    for seed in range(3):
        x, weight, bias = make_inputs(case, torch.float32, "NCL", "cuda", seed)
        other = x.clone() if seed == 2 else x
        (y,) = call(x, weight, bias, case, "add %0 a0; out %1 fp32 NCL", [other])
        assert_within_budget(y, float64(x, weight, bias, case) + x.double(), "tf32")
    assert [call.recording.repeatable for call in fused._calls.values()] == [True, True]


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("layout", ["NCL", "NLC"])
def test_padding(mode, layout, fresh):
    case = Case("padded", 2, 32, 300, 32, 7, padding=11, dilation=2)
    x, weight, bias = make_inputs(case, torch.bfloat16, layout, "cuda")
    (y,) = call(x, weight, bias, case, mode=mode, end=2)
    padded = F.pad(x.double(), (11, 2), "constant" if mode == "zeros" else mode)
    assert_within_budget(y, float64(padded, weight, bias, case, padding=0))
