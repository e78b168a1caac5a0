"""Every gradient kernel on the GPU against float64, and what only a GPU shows: determinism, long sums, streams, training."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import torch_conv_triton
from torch_conv_triton import dispatch, dispatch_gradients, gradients
from torch_conv_triton.calls import Call
from torch_conv_triton.configs_gradients import WeightGradConfig
from torch_conv_triton.dispatch import Plan
from torch_conv_triton.testing import (
    CASES,
    LAYOUTS,
    Case,
    assert_within_budget,
    error_budget,
    expected_gradients,
    float32_precision,
    make_grad_output,
    make_inputs,
    poisoned_allocations,
    random_cases,
    relative_error,
)

pytestmark = pytest.mark.gpu

OPS = torch.ops.triton_conv
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# large enough for the tiles of many channels and for sums that are split
LARGE = (
    Case("wide", 2, 256, 700, 256, 5, padding=2),
    Case("wide_strided", 2, 128, 1001, 512, 3, stride=2, padding=1),
    Case("vocoder", 2, 32, 80000, 32, 7, padding=9, dilation=3),
    Case("seed", 2, 64, 60000, 128, 3, stride=3, dilation=4),
    Case("raw_audio", 2, 1, 160000, 512, 10, stride=5),
    Case("many_channels_grouped", 2, 768, 499, 768, 16, padding=8, groups=16),
    Case("short", 256, 512, 8, 512, 5, padding=2),
    Case("causal", 2, 1024, 2048, 1024, 4, padding=3, groups=1024),
    Case("long_depthwise", 4, 256, 1500, 256, 31, padding=15, groups=256),
    Case("one_token", 64, 1024, 5, 1024, 4, groups=1024),
)
# in runs of 4 and of 8 positions
DEPTHWISE = tuple(Case(f"depthwise_{K}", 3, 520, 1001, 520, K, padding=K // 2, groups=520) for K in (3, 9))
POINTWISE = (
    Case("pointwise_wide", 5, 256, 1001, 520, 1),
    Case("pointwise_grouped", 3, 192, 777, 320, 1, groups=4),
    Case("pointwise_few_rows", 1, 128, 5, 128, 1),
)
PLAIN = [case for case in (*CASES, *LARGE, *random_cases(20, seed=29)) if not case.transposed]


def layout_of(case: Case) -> str:
    """The layouts in turn, so that all of them come up; the interpreter's tests take each case in every one."""
    return LAYOUTS[PLAIN.index(case) % 3]


def check_every_plan(case: Case, dtype: torch.dtype, layout: str) -> None:
    """Each plan is within the budget of its dtype, on poisoned memory, and the same bit for bit in a second run."""
    x, weight, _ = make_inputs(case, dtype, layout, "cuda")
    grad_output = make_grad_output(case, dtype, layout, "cuda")
    geometry = case.stride, case.padding, case.dilation, case.groups
    device = dispatch.device_for(x.device)
    for_x = dispatch_gradients.input_grad_problem(grad_output, weight, case.L_in, *geometry)
    for_weight = dispatch_gradients.weight_grad_problem(grad_output, x, case.K, *geometry)
    runs = [
        (plan, lambda plan=plan: gradients.input_grad_with(plan, for_x, grad_output, weight), 0)
        for plan in dispatch_gradients.input_grad_candidates(for_x, device)
    ]
    runs += [
        (plan, lambda plan=plan: gradients.weight_grad_with(plan, for_weight, grad_output, x), 1)
        for plan in dispatch_gradients.weight_grad_candidates(for_weight, device)
    ]
    expected = expected_gradients(case, x, weight, grad_output)
    for plan, run, which in runs:
        with poisoned_allocations():
            first, second = run(), run()
        assert_within_budget(first, expected[which], for_x.precision)
        assert torch.equal(first, second), plan


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_geometries_in_16_bits(case, dtype):
    check_every_plan(case, dtype, layout_of(case))


@pytest.mark.parametrize("precision", ["tf32", "ieee"])
@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_geometries_in_float32(case, precision):
    with float32_precision(precision):
        check_every_plan(case, torch.float32, layout_of(case))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case", [case for case in CASES if case.N and case.name in ("dense", "transposed", "depthwise", "grouped")], ids=str
)
def test_operators_give_aten_s_gradients(case, dtype):
    leaves = [t.detach().clone().requires_grad_() for t in make_inputs(case, dtype, device="cuda") if t is not None]
    y = case.operator(torch_conv_triton)(*leaves)
    # an expanded gradient, as that of a sum
    actual = torch.autograd.grad(y.sum(), leaves)
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    expected = torch.autograd.grad(case.operator(F)(*doubles).sum(), doubles)
    for a, e in zip(actual, expected, strict=True):
        assert_within_budget(a, e, "tf32" if dtype == torch.float32 else "ieee")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["NCL", "NLC"])
@pytest.mark.parametrize("case", [*LARGE, *DEPTHWISE], ids=str)
def test_the_gradient_of_a_bias_out_of_the_pass_for_the_weight_s(case, layout, dtype):
    x, weight, _ = make_inputs(case, dtype, layout, "cuda")
    grad_output = make_grad_output(case, dtype, layout, "cuda")
    geometry = case.stride, case.padding, case.dilation, case.groups
    problem = dispatch_gradients.weight_grad_problem(grad_output, x, case.K, *geometry)
    _, expected = expected_gradients(case, x, weight, grad_output)
    for plan in dispatch_gradients.weight_grad_candidates(problem, dispatch.device_for(x.device)):
        tile = replace(plan.config, with_bias=True, exchanged=False)
        if plan.kernel == "weight_grad" and not tile.prefetch:
            tile = replace(tile, prefetch=True, num_stages=1, BLOCK_C=min(tile.BLOCK_C, 64), BLOCK_L=32)
        call = Call(problem, replace(plan, config=tile))
        with poisoned_allocations():
            first, second = (gradients.run_weight_bias_grad(call, grad_output, x) for _ in range(2))
        assert_within_budget(first[0], expected, problem.precision)
        assert_within_budget(first[1], grad_output.double().sum((0, 2)))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), plan


@pytest.mark.parametrize("case", [case for case in LARGE if case.name in ("short", "wide_strided")], ids=str)
def test_each_tap_may_have_rows_of_its_own(case):
    with float32_precision("tf32"):
        x, weight, _ = make_inputs(case, torch.float32, device="cuda")
        grad_output = make_grad_output(case, torch.float32, device="cuda")
        geometry = case.stride, case.padding, case.dilation, case.groups
        problem = dispatch_gradients.weight_grad_problem(grad_output, x, case.K, *geometry)
        config = WeightGradConfig(128, 128, 32, splits=3, num_warps=8, tap_rows=True)
        plan = Plan("weight_grad_rows", config, "the test's")
        if dispatch_gradients.plan_refusal(plan, problem, dispatch.device_for(x.device)):
            pytest.skip("block copies need sm_90")
        with poisoned_allocations():
            found = gradients.weight_grad_with(plan, problem, grad_output, x)
        assert_within_budget(found, expected_gradients(case, x, weight, grad_output)[1], "tf32")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", POINTWISE, ids=str)
def test_pointwise_convolutions_that_block_copies_read_in_place(case, dtype):
    # channels-last, without the margins that keep copies from it
    x, grad_output = (
        torch.randn(N, L, C, device="cuda", dtype=dtype).transpose(1, 2)
        for N, C, L in ((case.N, case.C_in, case.L_in), case.output_shape)
    )
    weight = torch.randn(case.weight_shape, device="cuda", dtype=dtype)
    expected = expected_gradients(case, x, weight, grad_output)
    geometry = case.stride, case.padding, case.dilation, case.groups
    device = dispatch.device_for(x.device)
    problem = dispatch_gradients.weight_grad_problem(grad_output, x, 1, *geometry)
    for plan in dispatch_gradients.weight_grad_candidates(problem, device):
        for splits in (plan.config.splits, 3):
            plan = replace(plan, config=replace(plan.config, splits=splits))
            with poisoned_allocations():
                first, second = (gradients.weight_grad_with(plan, problem, grad_output, x) for _ in range(2))
            assert_within_budget(first, expected[1])
            assert torch.equal(first, second), plan
    # contiguous along either of the channels, and in rows that do not start on 16 bytes
    rows = torch.randn(case.C_out, weight.shape[1] + 3, 1, device="cuda", dtype=dtype)[:, : weight.shape[1]].copy_(weight)
    for stored in (weight, weight.transpose(0, 1).contiguous().transpose(0, 1), rows):
        problem = dispatch_gradients.input_grad_problem(grad_output, stored, case.L_in, *geometry)
        for plan in dispatch_gradients.input_grad_candidates(problem, device):
            with poisoned_allocations():
                found = gradients.input_grad_with(plan, problem, grad_output, stored)
            assert_within_budget(found, expected[0])


@pytest.mark.parametrize("tap_rows", [False, True])
def test_samples_that_lie_far_apart(tap_rows):
    # a row has all of them, the last one 2^31 elements behind the first
    case, apart = Case("far_apart", 9, 64, 8, 64, 3, padding=1), 2**28
    x = torch.empty(8 * apart + 64 * 8, device="cuda").as_strided((9, 64, 8), (apart, 8, 1))
    x.copy_(torch.randn(x.shape))
    weight, grad_output = (torch.randn(shape, device="cuda") for shape in (case.weight_shape, case.output_shape))
    with float32_precision("tf32"):
        problem = dispatch_gradients.weight_grad_problem(grad_output, x, 3, 1, 1, 1, 1)
        plan = Plan("weight_grad_rows", WeightGradConfig(64, 64, 32, num_warps=4, tap_rows=tap_rows), "the test's")
        if dispatch_gradients.plan_refusal(plan, problem, dispatch.device_for(x.device)):
            pytest.skip("block copies need sm_90")
        found = gradients.weight_grad_with(plan, problem, grad_output, x)
    assert_within_budget(found, expected_gradients(case, x, weight, grad_output)[1], "tf32")


LONG_SUMS = (
    Case("long_sum", 4, 16, 2_500_000, 16, 3, padding=1),
    Case("long_sum_of_many", 4, 48, 2_500_000, 40, 5, padding=2),
    Case("long_depthwise_sum", 4, 16, 2_500_000, 16, 4, padding=3, groups=16),
)


def errors_of_weight_grads(case: Case, dtype: torch.dtype) -> tuple[float, dict[str, float]]:
    """The error of cuDNN's gradient of the weight against float64, and those of all plans of ours."""
    # without the margins of NaN, which these lengths make large
    x = torch.randn(case.N, case.C_in, case.L_in, device="cuda", dtype=dtype)
    weight = torch.randn(case.weight_shape, device="cuda", dtype=dtype)
    grad_output = torch.randn(case.output_shape, device="cuda", dtype=dtype)
    arguments = grad_output, x, case.K, case.stride, case.padding, case.dilation, case.groups
    _, expected = expected_gradients(case, x, weight, grad_output)
    problem = dispatch_gradients.weight_grad_problem(*arguments)
    ours = {
        str(plan): relative_error(gradients.weight_grad_with(plan, problem, grad_output, x), expected)
        for plan in dispatch_gradients.weight_grad_candidates(problem, dispatch.device_for(x.device))
    }
    return relative_error(gradients.aten_weight_grad(*arguments), expected), ours


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LONG_SUMS, ids=str)
def test_sums_over_ten_million_positions_are_no_worse_than_cudnn_s(case, dtype):
    # cuDNN may compute in full float32 where it is allowed to round, so it is told to
    with float32_precision("ieee"):
        theirs, ours = errors_of_weight_grads(case, dtype)
    for plan, error in ours.items():
        assert error <= 1.1 * theirs, plan


# depthwise sums are not rounded
@pytest.mark.parametrize("case", LONG_SUMS[:2], ids=str)
def test_the_error_of_rounded_sums_does_not_grow_with_their_length(case):
    short = replace(case, L_in=case.L_in // 100)
    (_, before), (_, after) = (errors_of_weight_grads(case, torch.float32) for case in (short, case))
    # rounding to TF32 is what there is
    for error in (*before.values(), *after.values()):
        assert error <= 0.5 * error_budget(torch.float32, "tf32")
    assert max(after.values()) <= 1.2 * max(before.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(16, 512, 375), (8, 5, 240_001), (256, 512, 8), (1, 1, 1_000_000)], ids=str)
def test_the_gradient_of_a_bias_is_the_sum_over_samples_and_positions(shape, layout, dtype):
    N, C, L = shape
    grad_output = make_grad_output(Case("sum", N, C, L, C, 1), dtype, layout, "cuda")
    with poisoned_allocations():
        first, second = (OPS.conv1d_bias_grad(grad_output) for _ in range(2))
    assert_within_budget(first, grad_output.double().sum((0, 2)))
    assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", ["NCL", "NLC"])
@pytest.mark.parametrize("case", LARGE[:2], ids=str)
def test_gradients_on_channels_last_views(case, layout, dtype):
    x, weight, _ = make_inputs(case, dtype, layout, "cuda")
    grad_output = make_grad_output(case, dtype, device="cuda")
    geometry = case.stride, case.padding, case.dilation, case.groups
    for_x = dispatch_gradients.input_grad_problem(grad_output, weight, case.L_in, *geometry)
    for_weight = dispatch_gradients.weight_grad_problem(grad_output, x, case.K, *geometry)
    plan = Plan("aten_nhwc", None, "asked")
    found = (
        gradients.input_grad_with(plan, for_x, grad_output, weight),
        gradients.weight_grad_with(plan, for_weight, grad_output, x),
    )
    for actual, expected in zip(found, expected_gradients(case, x, weight, grad_output), strict=True):
        assert actual.is_contiguous()
        assert_within_budget(actual, expected, for_weight.precision)


def test_gradients_run_on_the_current_stream_and_in_a_cuda_graph():
    case = LARGE[0]
    x, weight, _ = make_inputs(case, torch.float16, device="cuda")
    grad_output = make_grad_output(case, torch.float16, device="cuda")

    def both():
        geometry = case.stride, case.padding, case.dilation, case.groups
        return (
            OPS.conv1d_input_grad(grad_output, weight, case.L_in, *geometry),
            OPS.conv1d_weight_grad(grad_output, x, case.K, *geometry),
        )

    both()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = both()
    grad_output.copy_(torch.randn_like(grad_output))
    graph.replay()
    for a, e in zip(captured, both(), strict=True):
        assert torch.equal(a, e)
