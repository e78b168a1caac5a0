"""Fused convolutions in Triton's interpreter against float64: every instruction, every kernel, padding, layouts, rounding."""

from dataclasses import replace

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
from torch_conv_triton.problem import dtype_name
from torch_conv_triton.testing import CASES, Case, assert_within_budget, float32_precision, make_inputs

DENSE = Case("dense", 2, 16, 37, 24, 3, padding=1)


@pytest.fixture
def only(monkeypatch):
    """Makes one plan run every fused call."""

    def run(plan):
        monkeypatch.setattr(dispatch, "fused_plan", lambda *_: plan)
        monkeypatch.setattr(fused, "_calls", {})

    return run


def problem_of(*arguments):
    return fused.problem_of(fused.Arguments(*arguments))


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


def test_sines_of_any_argument():
    assert_sines_are_right("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("chain", CHAINS)
def test_activations(chain, dtype):
    text, activation = CHAINS[chain]
    x, weight, bias = make_inputs(DENSE, dtype)
    last = text.count(";") + 1
    (y,) = call(x, weight, bias, DENSE, f"{text}; out %{last} {dtype_name(dtype)} NCL")
    assert_within_budget(y, activation(float64(x, weight, bias, DENSE)), "tf32" if dtype == torch.float32 else "ieee")


@pytest.mark.parametrize("first, dtype", [("NCL", torch.bfloat16), ("NLC", torch.float32)], ids=str)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_kernel_runs_programs(name, dtype, first, only):
    case, layout, _ = FAMILIES[name]
    if kernel_of(name) in BY_ROWS:
        first = "NCL"
    second = "NLC" if first == "NCL" else "NCL"
    x, weight, bias = make_inputs(case, dtype, layout)
    rounded = kernel_of(name) in ("dense_frames", "dense_tma")
    if rounded and dtype == torch.float32:
        x = nearest_tf32(x)
    N, C, L = case.output_shape
    operands = [operand(N, C, L, layout=second, dtype=torch.float16), operand(1, C, 1), operand(1)[0]]
    text = f"{PROGRAM}; out %6 {dtype_name(dtype)} {first}; out %1 fp32 {second}"
    arguments = x, weight, bias, case.stride, [case.padding, case.padding - case.output_padding], case.dilation, case.groups
    problem = problem_of(*arguments, case.transposed, "zeros", text, operands, rounded)
    only(family_plan(name, problem))
    y, before = call(x, weight, bias, case, text, operands, rounded=rounded)
    residual, scale, shift = (o.double() for o in operands)
    expected = float64(x, weight, bias, case) + residual
    assert_within_budget(before, expected, "tf32" if dtype == torch.float32 else "ieee")
    assert_within_budget(y, F.leaky_relu(expected, 0.1) * scale + shift, "tf32" if dtype == torch.float32 else "ieee")
    order = {"NCL": (C * L, L, 1), "NLC": (C * L, 1, C)}
    assert y.stride() == order[first] and before.stride() == order[second]


@pytest.mark.parametrize(
    "first, dtype", [("NCL", torch.bfloat16), ("NLC", torch.float32), ("NLC", torch.float16), ("NCL", torch.float32)], ids=str
)
@pytest.mark.parametrize("name", GATED)
def test_gates_of_both_halves_of_the_channels(name, dtype, first, only):
    case, layout, _ = GATED[name]
    arguments, expected = gated(case, dtype, layout, first, rounded=name.startswith("dense_tma") and dtype == torch.float32)
    x, weight, bias, _, text, operands, rounded = arguments
    geometry = case.stride, [case.padding, case.padding], case.dilation, 1, False, "zeros"
    only(family_plan(name, problem_of(x, weight, bias, *geometry, text, operands, rounded)))
    precision = "tf32" if dtype == torch.float32 else "ieee"
    for actual, exact in zip(call(*arguments), expected, strict=True):
        assert_within_budget(actual, exact, precision)


def test_gates_in_full_float32_and_with_padding_by_a_mode():
    case, layout, _ = GATED["dense"]
    x, weight, bias = make_inputs(case, torch.float32, layout)
    with float32_precision("ieee"):
        (y,) = call(x, weight, bias, case, "halve; sigmoid %1; mul %0 %2; out %3 fp32 NCL", mode="reflect")
    whole = float64(F.pad(x, (case.padding, case.padding), "reflect"), weight, bias, case, padding=0)
    assert_within_budget(y, F.glu(whole, 1))


def test_gates_keep_non_finite_values_where_they_are():
    case, layout, _ = GATED["dense"]
    x, weight, bias = make_inputs(case, torch.float32, layout)
    x[0, 1, 7], x[1, 3, 30] = torch.nan, torch.inf
    (y,) = call(x, weight, bias, case, "halve; sigmoid %1; mul %0 %2; out %3 fp32 NLC")
    assert_within_budget(y, F.glu(float64(x, weight, bias, case), 1), "tf32")


def test_gates_are_computed_by_every_kernel_that_is_said_to():
    assert {*map(kernel_of, GATED)} == set(dispatch.HALVING)


def test_the_families_are_all_of_those_that_fuse():
    # the interpreter runs no Gluon: test_gpu_halo.py and test_gpu_bands.py in tests/gpu have their own
    assert {*map(kernel_of, FAMILIES), "dense_halo", "depthwise_bands"} == set(dispatch.FUSING)


def test_only_kernels_that_gather_are_asked_to_pad_by_a_mode():
    for case, layout, _ in FAMILIES.values():
        x, weight, bias = make_inputs(case, torch.bfloat16, layout)
        if not case.transposed:
            arguments = x, weight, bias, case.stride, [3, 1], case.dilation, case.groups, False, "reflect", "", [], False
            plans = dispatch.candidates(problem_of(*arguments), dispatch.INTERPRETER)
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


@pytest.mark.parametrize("shape", [(2, 24, 37), (2, 1, 37)])
def test_an_operand_may_be_a_mask(shape):
    x, weight, bias = make_inputs(DENSE, torch.float32)
    mask = operand(*shape, layout="NLC") > 0
    (y,) = call(x, weight, bias, DENSE, "where a0 0.5 %0; out %1 fp32 NLC", [mask])
    assert_within_budget(y, float64(x, weight, bias, DENSE).masked_fill(mask, 0.5), "tf32")
    plan = fused.plan(
        fused.Arguments(x, weight, bias, 1, [1, 1], 1, 1, False, "zeros", "mul %0 a0; out %1 fp32 NCL", [mask], False)
    )
    assert not plan.is_aten


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


# rows that end on 16 bytes have a test of their own
PADDED = [name for name in FAMILIES if name not in ("transposed_interleaved_row_by_row", "depthwise_vector")]


@pytest.mark.parametrize("change", [3, -3, 1])
@pytest.mark.parametrize("name", PADDED)
def test_the_ends_are_padded_each_in_its_own_way(name, change, only):
    case, layout, _ = FAMILIES[name]
    x, weight, bias = make_inputs(case, torch.bfloat16, layout)
    end = case.padding - case.output_padding + change
    arguments = x, weight, bias, case.stride, [case.padding, end], case.dilation, case.groups, case.transposed, "zeros", "", []
    problem = problem_of(*arguments, False)
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
    problem = problem_of(x, weight, bias, case.stride, [start, 0], case.dilation, case.groups, False, "zeros", "", [], False)
    only(family_plan(name, problem))
    (y,) = call(x, weight, bias, case, end=0)
    assert_within_budget(y, float64(F.pad(x, (start, 0)), weight, bias, case, padding=0))


@pytest.mark.parametrize("start, end", [(4, 0), (8, -4), (-4, 8), (-8, 4)])
def test_aligned_rows_are_padded_at_either_end(start, end, only):
    case, layout, _ = FAMILIES["depthwise_vector"]
    case = replace(case, padding=start)
    x, weight, bias = make_inputs(case, torch.bfloat16, layout)
    only(family_plan("depthwise_vector", problem_of(x, weight, bias, 1, [start, end], 1, 6, False, "zeros", "", [], False)))
    (y,) = call(x, weight, bias, case, end=end)
    assert_within_budget(y, float64(F.pad(x, (start, end)), weight, bias, case, padding=0))


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
    assert {plan.kernel for plan in dispatch.candidates(problem_of(*arguments), dispatch.INTERPRETER)} <= set(dispatch.GATHERING)
    if name == "dense_tma":
        return
    only(family_plan(name, problem_of(*arguments)))
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
    problem = problem_of(x, *arguments, case.transposed, "zeros", "", [], True)
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
    plan = fused.plan(fused.Arguments(x, weight, bias, 1, [1, 1], 1, 1, False, "zeros", "", [], False))
    assert plan.is_aten and plan.reason == "fp64 is computed by aten"


@pytest.mark.parametrize("case", [case for case in CASES if case.N == 0], ids=str)
def test_an_empty_batch_has_no_outputs(case):
    x, weight, bias = make_inputs(case, torch.float32)
    (y,) = call(x, weight, bias, case, "max %0 0.0; out %1 bf16 NLC")
    assert y.shape == case.output_shape and y.dtype == torch.bfloat16


def test_calls_are_planned_anew_after_they_were_forgotten(monkeypatch):
    x, weight, bias = make_inputs(DENSE, torch.float32)
    fused.forget_plans()
    planned = []
    original = dispatch.fused_plan
    monkeypatch.setattr(dispatch, "fused_plan", lambda *arguments: planned.append(1) or original(*arguments))
    for _ in range(2):
        call(x, weight, bias, DENSE, "tanh %0; out %1 fp32 NCL")
    assert len(planned) == 1
    fused.forget_plans()
    call(x, weight, bias, DENSE, "tanh %0; out %1 fp32 NCL")
    assert len(planned) == 2
