"""Fused convolutions in Triton's interpreter against float64: every instruction, every kernel, padding, layouts, rounding."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from torch_conv_triton import dispatch, fused, reference
from torch_conv_triton.configs import Config
from torch_conv_triton.epilogue import INSTRUCTIONS
from torch_conv_triton.problem import dtype_name
from torch_conv_triton.testing import (
    CASES,
    Case,
    assert_within_budget,
    float32_precision,
    in_nan_buffer,
    make_inputs,
    poisoned_allocations,
)

DENSE = Case("dense", 2, 16, 37, 24, 3, padding=1)
# name: (text of the activation of %0, which ends in the last value; the same in torch), in float64 alike
CHAINS = {
    "leaky_relu": ("mul %0 0.1; gt %0 0.0; where %2 %0 %1", lambda y: F.leaky_relu(y, 0.1)),
    "snake": ("mul %0 1.5; sin %1; pow2 %2; div %3 1.5; add %0 %4", lambda y: y + (1.5 * y).sin() ** 2 / 1.5),
    "silu": ("sigmoid %0; mul %0 %1", F.silu),
    "gelu": ("mul %0 0.7071067811865476; erf %1; add %2 1.0; mul %0 %3; mul %4 0.5", F.gelu),
    "gelu_tanh": (
        "pow2 %0; mul %0 %1; mul %2 0.044715; add %0 %3; mul %4 0.7978845608028654; tanh %5; add %6 1.0; mul %0 %7; mul %8 0.5",
        lambda y: F.gelu(y, approximate="tanh"),
    ),
    "elu": ("expm1 %0; gt %0 0.0; where %2 %0 %1", F.elu),
    "clamp": ("max %0 -0.5; min %1 0.25", lambda y: y.clamp(-0.5, 0.25)),
    "hardswish": ("add %0 3.0; max %1 0.0; min %2 6.0; mul %0 %3; div %4 6.0", F.hardswish),
    "softplus": ("exp %0; log1p %1", F.softplus),
}


def call(x, weight, bias, case, epilogue="", operands=(), rounded=False, mode="zeros", end=None):
    padding = [case.padding, case.padding - case.output_padding if end is None else end]
    geometry = case.stride, padding, case.dilation, case.groups, case.transposed, mode
    with poisoned_allocations():
        return fused.conv1d_fused(x, weight, bias, *geometry, epilogue, list(operands), rounded)


def float64(x, weight, bias, case, **changes):
    x, weight, bias = (t.double() for t in (x, weight, bias))
    return reference.conv1d(x, weight, bias, *replace(case, **changes).geometry)


def operand(*shape, layout="NCL", seed=5, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return in_nan_buffer(torch.randn(shape, generator=generator).to(dtype), layout)


@pytest.fixture
def only(monkeypatch):
    """Makes one plan run every fused call."""

    def run(plan):
        monkeypatch.setattr(dispatch, "fused_plan", lambda problem, device: plan)
        monkeypatch.setattr(fused, "_calls", {})

    return run


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_every_instruction(name):
    x, weight, bias = make_inputs(DENSE, torch.float32)
    with float32_precision("ieee" if name == "tf32" else "tf32"):
        y = float64(x, weight, bias, DENSE)
        if name in ("log", "log1p", "sqrt", "rsqrt", "reciprocal", "div"):
            # away from where they grow without bound
            before, y, at = "abs %0; add %1 0.5; ", y.abs() + 0.5, 2
        else:
            before, at = "", 0
        arguments = (f"%{at}", "a0", "a1")[: INSTRUCTIONS[name].arity]
        others = operand(2, 24, 37, seed=1), operand(24, 1, seed=2)
        (actual,) = call(x, weight, bias, DENSE, f"{before}{name} {' '.join(arguments)}; out %{at + 1} fp32 NCL", others)
        exact = {"tf32": lambda y: y, "bf16": lambda y: y, "fp16": lambda y: y}.get(name, INSTRUCTIONS[name].compute)
        expected = exact(y, *(o.double() for o in others[: len(arguments) - 1]))
    if name in ("gt", "lt", "ge", "le"):
        # where the two are all but equal either answer is right
        expected = expected.where((y - others[0]).abs() > 1e-2, actual.double())
    budget = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(name)
    assert_within_budget(actual if budget is None else actual.to(budget), expected, "ieee" if budget else "tf32")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chain", CHAINS)
def test_activations(chain, dtype):
    text, activation = CHAINS[chain]
    x, weight, bias = make_inputs(DENSE, dtype)
    last = text.count(";") + 1
    (y,) = call(x, weight, bias, DENSE, f"{text}; out %{last} {dtype_name(dtype)} NCL")
    assert_within_budget(y, activation(float64(x, weight, bias, DENSE)), "tf32" if dtype == torch.float32 else "ieee")


# every kernel that fuses, on a problem that it suits
FAMILIES = {
    "dense": (Case("dense", 2, 32, 71, 40, 3, padding=2, dilation=2), "NCL", None),
    "dense_weights_left": (Case("dense", 2, 32, 71, 72, 3, padding=1), "NCL", Config(64, 64, 16, weights_left=True)),
    "dense_over_samples": (Case("dense", 3, 32, 7, 40, 3, padding=1), "NCL", None),
    "dense_grouped": (Case("grouped", 2, 32, 33, 48, 3, padding=1, groups=2), "NLC", None),
    "dense_copied": (
        Case("dense", 2, 64, 41, 64, 5, stride=2, padding=2),
        "NCL",
        Config(64, 64, 32, tap_major=True, copy_to_nlc=True),
    ),
    "dense_persistent": (Case("long", 1, 16, 6000, 16, 3, padding=1), "NCL", None),
    "dense_tma": (Case("dense", 2, 32, 70, 40, 4, stride=2, padding=1), "NLC", None),
    "transposed": (Case("transposed", 2, 16, 20, 24, 5, stride=3, padding=2, transposed=True, output_padding=1), "NCL", None),
    "transposed_interleaved": (Case("transposed", 2, 16, 50, 20, 4, stride=2, padding=1, transposed=True), "NCL", None),
    "transposed_interleaved_row_by_row": (Case("by_row", 2, 512, 9, 5, 8, stride=3, padding=2, transposed=True), "NCL", None),
    "transposed_tma": (Case("transposed", 3, 32, 9, 24, 4, stride=2, padding=1, transposed=True), "NCL", None),
    "depthwise": (Case("depthwise", 2, 9, 45, 18, 5, stride=2, padding=2, groups=9), "NCL", None),
    "depthwise_transposed": (Case("depthwise", 2, 9, 25, 9, 4, stride=2, padding=1, groups=9, transposed=True), "NCL", None),
    "depthwise_sliding": (Case("depthwise", 2, 24, 61, 24, 4, padding=3, groups=24), "NLC", None),
}
# a residual before the activation, a scale by channel and a shift after it
PROGRAM = "add %0 a0; mul %1 0.1; gt %1 0.0; where %3 %1 %2; mul %4 a1; add %5 a2"


def kernel_of(name):
    return next(kernel for kernel in sorted(dispatch.FUSING, key=len, reverse=True) if name.startswith(kernel))


def family_plan(name, problem):
    config = FAMILIES[name][2]
    if config is not None:
        return dispatch.Plan(kernel_of(name), config, "")
    return next(plan for plan in dispatch.candidates(problem, dispatch.INTERPRETER) if plan.kernel == kernel_of(name))


@pytest.mark.parametrize("first, dtype", [("NCL", torch.bfloat16), ("NLC", torch.float32)], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_kernel_runs_programs(name, dtype, first, only):
    case, layout, _ = FAMILIES[name]
    second = "NLC" if first == "NCL" else "NCL"
    x, weight, bias = make_inputs(case, dtype, layout)
    if name == "dense_tma" and dtype == torch.float32:
        x = nearest_tf32(x)
    N, C, L = case.output_shape
    operands = [operand(N, C, L, layout=second, dtype=torch.float16), operand(1, C, 1), operand(1)[0]]
    text = f"{PROGRAM}; out %6 {dtype_name(dtype)} {first}; out %1 fp32 {second}"
    arguments = x, weight, bias, case.stride, [case.padding, case.padding - case.output_padding], case.dilation, case.groups
    problem = fused.problem_of(*arguments, case.transposed, "zeros", text, operands, name == "dense_tma")
    only(family_plan(name, problem))
    y, before = call(x, weight, bias, case, text, operands, rounded=name == "dense_tma")
    residual, scale, shift = (o.double() for o in operands)
    expected = float64(x, weight, bias, case) + residual
    assert_within_budget(before, expected, "tf32" if dtype == torch.float32 else "ieee")
    assert_within_budget(y, F.leaky_relu(expected, 0.1) * scale + shift, "tf32" if dtype == torch.float32 else "ieee")
    order = {"NCL": (C * L, L, 1), "NLC": (C * L, 1, C)}
    assert y.stride() == order[first] and before.stride() == order[second]


def nearest_tf32(tensor):
    """The values with the last 13 of 23 mantissa bits rounded away, ties away from zero, with the strides of the tensor."""
    tensor.copy_(((tensor.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32))
    return tensor


def test_the_families_are_all_of_those_that_fuse():
    assert set(map(kernel_of, FAMILIES)) == set(dispatch.FUSING)


def test_only_kernels_that_gather_are_asked_to_pad_by_a_mode():
    for case, layout, _ in FAMILIES.values():
        x, weight, bias = make_inputs(case, torch.bfloat16, layout)
        if not case.transposed:
            arguments = x, weight, bias, case.stride, [3, 1], case.dilation, case.groups, False, "reflect", "", [], False
            plans = dispatch.candidates(fused.problem_of(*arguments), dispatch.INTERPRETER)
            assert plans and {plan.kernel for plan in plans} <= set(dispatch.GATHERING)


@pytest.mark.parametrize(
    "shape", [(2, 24, 37), (1, 24, 37), (24, 37), (24, 1), (2, 1, 37), (2, 24, 1), (2, 1, 1), (37,), (1,), ()]
)
@pytest.mark.parametrize("length", [37, 5])
def test_operands_of_any_shape_that_broadcasts(shape, length):
    case = replace(DENSE, N=3 if shape[:1] == (3,) else 2, L_in=length)
    shape = tuple(length if size == 37 else size for size in shape)
    x, weight, bias = make_inputs(case, torch.float32)
    other = operand(*shape) if shape else torch.tensor(0.75)
    (y,) = call(x, weight, bias, case, "add %0 a0; out %1 fp32 NCL", [other])
    assert_within_budget(y, float64(x, weight, bias, case) + other.double(), "tf32")


def test_one_tensor_may_be_given_several_times():
    case = Case("square", 2, 16, 37, 16, 3, padding=1)
    x, weight, bias = make_inputs(case, torch.float32)
    expected = 2 * float64(x, weight, bias, case) + 2 * x.double()
    for other in (x, x.clone()):
        (y,) = call(x, weight, bias, case, "add %0 a0; add %1 %0; add %2 a1; out %3 fp32 NCL", [other, x])
        assert_within_budget(y, expected, "tf32")


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_non_finite_values_spread_as_in_torch(value):
    x, weight, bias = make_inputs(DENSE, torch.float32)
    x[0, 1, 7] = value
    (y,) = call(x, weight, bias, DENSE, "max %0 0.0; min %1 6.0; out %2 fp32 NCL")
    expected = F.relu6(float64(x, weight, bias, DENSE))
    assert (expected == 6.0).any() or expected.isnan().any()
    assert_within_budget(y, expected, "tf32")


PADDED = [name for name in FAMILIES if name not in ("dense_over_samples", "transposed_interleaved_row_by_row")]


@pytest.mark.parametrize("change", [3, -3, 1])
@pytest.mark.parametrize("name", PADDED)
def test_the_ends_are_padded_each_in_its_own_way(name, change, only):
    case, layout, _ = FAMILIES[name]
    x, weight, bias = make_inputs(case, torch.bfloat16, layout)
    end = case.padding - case.output_padding + change
    arguments = x, weight, bias, case.stride, [case.padding, end], case.dilation, case.groups, case.transposed, "zeros", "", []
    problem = fused.problem_of(*arguments, False)
    only(family_plan(name, problem))
    (y,) = call(x, weight, bias, case, end=end)
    if case.transposed:
        whole = float64(x, weight, 0 * bias, case, padding=0, output_padding=0)
        expected = F.pad(whole, (-case.padding, -end)) + bias.double()[:, None]
    else:
        expected = float64(F.pad(x, (case.padding, end)), weight, bias, case, padding=0)
    assert_within_budget(y, expected)


@pytest.mark.parametrize("start", [-4, 5])
@pytest.mark.parametrize("name", [name for name in PADDED if not FAMILIES[name][0].transposed])
def test_the_start_may_be_cut_off(name, start, only):
    case, layout, _ = FAMILIES[name]
    x, weight, bias = make_inputs(case, torch.float16, layout)
    case = replace(case, padding=start)
    problem = fused.problem_of(
        x, weight, bias, case.stride, [start, 0], case.dilation, case.groups, False, "zeros", "", [], False
    )
    only(family_plan(name, problem))
    (y,) = call(x, weight, bias, case, end=0)
    assert_within_budget(y, float64(F.pad(x, (start, 0)), weight, bias, case, padding=0))


@pytest.mark.parametrize("mode, start, end", [("reflect", 6, 3), ("replicate", 9, 50), ("circular", 7, 5)])
@pytest.mark.parametrize(
    "name", [name for name in FAMILIES if kernel_of(name) in dispatch.GATHERING and "transposed" not in name]
)
def test_padding_modes(name, mode, start, end, only):
    case, layout, _ = FAMILIES[name]
    if name == "dense_over_samples":
        start, end = start % 7, end % 7
    case = replace(case, padding=start)
    x, weight, bias = make_inputs(case, torch.float32, layout)
    arguments = x, weight, bias, case.stride, [start, end], case.dilation, case.groups, False, mode, "", [], False
    assert {plan.kernel for plan in dispatch.candidates(fused.problem_of(*arguments), dispatch.INTERPRETER)} <= set(
        dispatch.GATHERING
    )
    if name == "dense_tma":
        return
    only(family_plan(name, fused.problem_of(*arguments)))
    (y,) = call(x, weight, bias, case, mode=mode, end=end)
    assert_within_budget(y, float64(F.pad(x, (start, end), mode), weight, bias, case, padding=0), "tf32")


@pytest.mark.parametrize("layout", ["NCL", "NLC"])
@pytest.mark.parametrize(
    "name", ["dense", "dense_persistent", "dense_tma", "transposed", "transposed_interleaved", "transposed_tma"]
)
def test_rounded_inputs_are_used_as_they_are(name, layout, only):
    case, *_ = FAMILIES[name]
    x, weight, bias = make_inputs(case, torch.float32, layout)
    arguments = weight, bias, case.stride, [case.padding, case.padding - case.output_padding], case.dilation, case.groups
    problem = fused.problem_of(x, *arguments, case.transposed, "zeros", "", [], True)
    kernels = {plan.kernel for plan in dispatch.candidates(problem, dispatch.INTERPRETER)}
    if not case.transposed:
        assert ("dense_tma" in kernels) == (layout == "NLC")
    if name == "dense_tma" and layout == "NCL":
        return
    x = nearest_tf32(x)
    only(family_plan(name, problem))
    (y,) = call(x, weight, bias, case, rounded=True)
    assert_within_budget(y, float64(x, nearest_tf32(weight.clone()), bias, case), "ieee")


def test_outputs_are_rounded_where_the_switch_asks_for_it():
    x, weight, bias = make_inputs(DENSE, torch.float32)
    text = "tf32 %0; out %1 fp32 NLC; out %0 fp32 NCL"
    rounded, plain = call(x, weight, bias, DENSE, text)
    assert torch.equal(rounded, nearest_tf32(plain.clone())) and not torch.equal(rounded, plain)
    with float32_precision("ieee"):
        rounded, plain = call(x, weight, bias, DENSE, text)
    assert torch.equal(rounded, plain)


def test_a_gate_over_float64_is_left_to_torch():
    x, weight, bias = (t.double() for t in make_inputs(DENSE, torch.float32))
    (y,) = call(x, weight, bias, DENSE, "sigmoid %0; mul %0 %1; out %2 fp64 NCL")
    assert_within_budget(y, F.silu(float64(x, weight, bias, DENSE)))
    plan = fused.plan(x, weight, bias, 1, [1, 1], 1, 1, False, "zeros", "", [], False)
    assert plan.is_aten and plan.reason == "fp64 is computed by aten"


@pytest.mark.parametrize("case", [case for case in CASES if case.N == 0], ids=str)
def test_an_empty_batch_has_no_outputs(case):
    x, weight, bias = make_inputs(case, torch.float32)
    (y,) = call(x, weight, bias, case, "max %0 0.0; out %1 bf16 NLC")
    assert y.shape == case.output_shape and y.dtype == torch.bfloat16
