"""Every gradient kernel in Triton's interpreter against float64: geometries, layouts, dtypes, splits, memory full of NaN."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from torch_conv_triton import dispatch_gradients, gradients
from torch_conv_triton.calls import Call
from torch_conv_triton.configs import INTERPRETER
from torch_conv_triton.configs_gradients import WeightGradConfig
from torch_conv_triton.dispatch import Plan
from torch_conv_triton.kernels import weight_grad_rows
from torch_conv_triton.problem import current_precision
from torch_conv_triton.testing import (
    CASES,
    LAYOUTS,
    Case,
    assert_within_budget,
    expected_gradients,
    float32_precision,
    in_turn,
    make_grad_output,
    make_inputs,
    poisoned_allocations,
    random_cases,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
PLAIN = [case for case in CASES if not case.transposed]
TILE = WeightGradConfig(16, 16, 32)
EXCHANGED_TILE = replace(TILE, exchanged=True)
MANY_POSITIONS = (
    Case("dense_many_positions", 2, 20, 500, 24, 5, stride=2, padding=3),
    Case("grouped_many_positions", 2, 32, 300, 32, 3, padding=1, groups=2),
    Case("depthwise_many_positions", 2, 12, 400, 12, 7, padding=3, groups=12),
    Case("depthwise_short_and_many", 30, 4, 6, 4, 4, padding=3, groups=4),
    Case("dense_short_and_many", 50, 20, 6, 20, 3, padding=1),
)
SUMMED = [c for c in PLAIN if c.name in ("one_position", "K_above_L", "grouped_tiny", "channel_multiplier", "depthwise_middle")]
# several tiles of `TILE` along every dimension
TILES = Case("tiles", 2, 20, 75, 40, 3, padding=1)


def named(*names: str) -> list[Case]:
    return [case for case in CASES if case.name in names]


def geometry(case: Case) -> tuple[int, int, int, int]:
    return case.stride, case.padding, case.dilation, case.groups


def input_grads(case: Case, weight, grad_output):
    """(plan, gradient of the input) by every plan that may compute it."""
    problem = dispatch_gradients.input_grad_problem(grad_output, weight, case.L_in, *geometry(case))
    for plan in dispatch_gradients.input_grad_candidates(problem, INTERPRETER):
        with poisoned_allocations():
            yield plan, gradients.input_grad_with(plan, problem, grad_output, weight)


def weight_grads(case: Case, x, grad_output):
    """(plan, gradient of the weight) by every plan that may compute it."""
    problem = dispatch_gradients.weight_grad_problem(grad_output, x, case.K, *geometry(case))
    for plan in dispatch_gradients.weight_grad_candidates(problem, INTERPRETER):
        with poisoned_allocations():
            yield plan, gradients.weight_grad_with(plan, problem, grad_output, x)


def with_bias(plan: Plan, **changes) -> Plan:
    prefetch = plan.kernel == "weight_grad"
    return replace(plan, config=replace(plan.config, with_bias=True, exchanged=False, prefetch=prefetch, **changes))


def check(case: Case, dtype: torch.dtype, layout: str = "NCL", grad_layout: str = "NCL") -> set[str]:
    """Compare all plans of both gradients with float64; the names of the kernels."""
    x, weight, _ = make_inputs(case, dtype, layout)
    grad_output = make_grad_output(case, dtype, grad_layout)
    expected_x, expected_weight = expected_gradients(case, x, weight, grad_output)
    precision = case.problem(x, weight, None).precision
    kernels = set()
    for plan, grad_x in input_grads(case, weight, grad_output):
        assert grad_x.is_contiguous() and grad_x.dtype == dtype
        assert_within_budget(grad_x, expected_x, precision)
        kernels.add(plan.kernel)
    for plan, grad_weight in weight_grads(case, x, grad_output):
        assert grad_weight.is_contiguous() and grad_weight.dtype == dtype
        assert_within_budget(grad_weight, expected_weight, precision)
        kernels.add(plan.kernel)
    return kernels


@pytest.mark.parametrize(("case", "layout", "dtype"), in_turn(PLAIN, DTYPES), ids=str)
def test_geometries(case, layout, dtype):
    assert bool(check(case, dtype, layout, layout)) == (case.N > 0)


@pytest.mark.parametrize("case", [case for case in random_cases(60, seed=23) if not case.transposed], ids=str)
def test_random_geometries(case):
    # the case's number picks the combination, so that all of them come up
    index = int(case.name.rpartition("_")[2])
    assert check(case, DTYPES[index % 3], LAYOUTS[index // 3 % 3], LAYOUTS[index // 9 % 3])


@pytest.mark.parametrize("layouts", [("NCL", "NLC"), ("NLC", "NCL")], ids=str)
@pytest.mark.parametrize("case", named("dense", "grouped", "depthwise", "strided"), ids=str)
def test_the_gradient_s_layout_is_its_own(case, layouts):
    assert check(case, torch.float32, *layouts)


@pytest.mark.parametrize("case", named("dense", "strided", "depthwise", "grouped"), ids=str)
def test_full_float32_where_the_switch_asks_for_it(case):
    with float32_precision("ieee"):
        check(case, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["NCL", "NLC"])
@pytest.mark.parametrize("case", MANY_POSITIONS, ids=str)
def test_many_positions(case, layout, dtype):
    assert check(case, dtype, layout, layout)


@pytest.mark.parametrize("splits", [1, 3, 1000])
@pytest.mark.parametrize("case", MANY_POSITIONS, ids=str)
def test_any_number_of_splits_gives_the_gradient(case, splits):
    x, weight, _ = make_inputs(case, torch.float32)
    grad_output = make_grad_output(case, torch.float32)
    _, expected = expected_gradients(case, x, weight, grad_output)
    problem = dispatch_gradients.weight_grad_problem(grad_output, x, case.K, *geometry(case))
    for plan in dispatch_gradients.weight_grad_candidates(problem, INTERPRETER):
        plan = replace(plan, config=replace(plan.config, splits=splits))
        with poisoned_allocations():
            first, second = (gradients.weight_grad_with(plan, problem, grad_output, x) for _ in range(2))
        assert_within_budget(first, expected, "tf32")
        assert torch.equal(first, second)


@pytest.mark.parametrize("prefetch", [False, True])
@pytest.mark.parametrize("grad_left", [False, True])
@pytest.mark.parametrize("tap_major", [False, True])
@pytest.mark.parametrize("case", [*named("odd_everything", "grouped_tiny"), TILES], ids=str)
def test_every_order_of_the_tile_gives_the_gradient(case, tap_major, grad_left, prefetch):
    x, weight, _ = make_inputs(case, torch.float32)
    grad_output = make_grad_output(case, torch.float32)
    _, expected = expected_gradients(case, x, weight, grad_output)
    problem = dispatch_gradients.weight_grad_problem(grad_output, x, case.K, *geometry(case))
    for kernel, config in (("weight_grad", TILE), ("weight_grad", EXCHANGED_TILE), ("weight_grad_rows", TILE)):
        for BLOCK_C in (16, 64):
            config = replace(config, BLOCK_C=BLOCK_C, tap_major=tap_major, grad_left=grad_left, prefetch=prefetch)
            actual = gradients.weight_grad_with(Plan(kernel, config, "the test's"), problem, grad_output, x)
            assert_within_budget(actual, expected, problem.precision)


@pytest.mark.parametrize("case", [case for case in PLAIN if case.N and case.stride == 1], ids=str)
def test_x_and_the_gradient_take_each_other_s_place(case):
    x, grad_output = make_inputs(case, torch.float32)[0], make_grad_output(case, torch.float32, "NLC")
    expected = expected_gradients(case, x, make_inputs(case, torch.float32)[1], grad_output)[1]
    problem = dispatch_gradients.weight_grad_problem(grad_output, x, case.K, *geometry(case))
    plan = Plan("weight_grad", replace(EXCHANGED_TILE, splits=3), "the test's")
    with poisoned_allocations():
        actual = gradients.weight_grad_with(plan, problem, grad_output, x)
    assert_within_budget(actual, expected, problem.precision)


@pytest.mark.parametrize("grad_left", [False, True])
@pytest.mark.parametrize(
    ("layout", "dtype", "groups"), [("NLC", torch.bfloat16, 1), ("NLC", torch.float16, 2), ("NCL", torch.float16, 1)]
)
def test_the_weight_of_a_pointwise_convolution_gets_a_product_of_block_copies(layout, dtype, groups, grad_left):
    case = Case("pointwise", 3, 48, 37, 80, 1, groups=groups)
    x, weight, _ = (None if t is None else t.contiguous() for t in make_inputs(case, dtype))
    grad_output = make_grad_output(case, dtype).contiguous()
    if layout == "NLC":
        x, grad_output = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (x, grad_output))
    problem = dispatch_gradients.weight_grad_problem(grad_output, x, 1, *geometry(case))
    config = WeightGradConfig(32, 16, 32, splits=1 + 2 * grad_left, grad_left=grad_left, copy_to_nlc=layout == "NCL")
    plan = Plan("weight_grad_pointwise", config, "the test's")
    assert dispatch_gradients.plan_refusal(plan, problem, INTERPRETER) is None
    with poisoned_allocations():
        found = gradients.weight_grad_with(plan, problem, grad_output, x)
    assert_within_budget(found, expected_gradients(case, x, weight, grad_output)[1])


@pytest.mark.parametrize("case", [*named("odd_everything", "K_above_L", "grouped_tiny"), *MANY_POSITIONS], ids=str)
def test_each_tap_may_have_rows_of_its_own(case):
    layout = LAYOUTS[case.K % 3]
    x, weight, _ = make_inputs(case, torch.float32, layout)
    grad_output = make_grad_output(case, torch.float32, layout)
    _, expected = expected_gradients(case, x, weight, grad_output)
    problem = dispatch_gradients.weight_grad_problem(grad_output, x, case.K, *geometry(case))
    plan = with_bias(Plan("weight_grad_rows", replace(TILE, tap_rows=True), "the test's"), splits=2)
    with poisoned_allocations():
        found, bias = gradients.run_weight_bias_grad(Call(problem, plan), grad_output, x)
    assert_within_budget(found, expected, "tf32")
    assert_within_budget(bias, grad_output.double().sum((0, 2)))


@pytest.mark.parametrize(("apart", "wide"), [(2**28, True), (2**25, False)])
def test_offsets_between_the_samples_of_a_row_are_wide_where_they_pass_two_to_the_31(apart, wide, monkeypatch):
    found = []
    monkeypatch.setattr(weight_grad_rows, "launch", lambda *_, **constants: found.append(constants["INT64"]))
    # 32 samples and the next one, as a tile has 256 places
    x = torch.empty_strided((64, 4, 8), (apart, 8, 1), device="meta")
    weight_grad_rows.copy_to_rows(x, rows=3, step=1, shift=1, left=1, pitch=8, length=512)
    assert found == [wide]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("groups", [1, 16])
def test_a_non_finite_sample_stays_in_the_taps_that_see_it(groups, layout):
    case = Case("same", 2, 16, 37, 16, 3, padding=1, groups=groups)
    x, grad_output = make_inputs(case, torch.float32, layout)[0], make_grad_output(case, torch.float32, layout)
    x[:, :, -1] = torch.nan
    for plan, grad_weight in weight_grads(case, x, grad_output):
        # diagonals of a product are of several taps
        seen = grad_weight[..., 1:] if plan.kernel != "weight_grad_banded" else grad_weight
        assert seen.isnan().all() and grad_weight.isnan().sum() == seen.numel(), plan


@pytest.mark.parametrize("transposed", [False, True])
def test_block_copies_read_the_weight_of_a_pointwise_convolution_as_it_is(transposed):
    case = Case("pointwise", 3, 48, 37, 80, 1)
    weight = make_inputs(case, torch.bfloat16)[1].contiguous()
    if transposed:
        # what is stored by input channels is packed
        weight = weight.transpose(0, 1).contiguous().transpose(0, 1)
    grad_output = make_grad_output(case, torch.bfloat16).transpose(1, 2).contiguous().transpose(1, 2)
    expected = gradients.aten_input_grad(grad_output.double(), weight.double(), case.L_in, *geometry(case))
    kernels = set()
    for plan, found in input_grads(case, weight, grad_output):
        assert_within_budget(found, expected)
        kernels.add(plan.kernel)
    assert "dense_tma" in kernels


def test_few_output_channels_take_the_place_of_x():
    case = Case("few_out", 2, 40, 70, 3, 5, padding=2)
    x, grad_output = torch.randn(2, 40, 70), make_grad_output(case, torch.float32)
    found = {plan.kernel: plan.config.exchanged for plan, _ in weight_grads(case, x, grad_output)}
    assert found == {"weight_grad": True, "weight_grad_rows": False}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(3, 19, 37), (1, 1, 5), (2, 9, 2500), (300, 20, 3)], ids=str)
def test_the_gradient_of_a_bias_is_the_sum_over_samples_and_positions(shape, layout, dtype):
    N, C, L = shape
    grad_output = make_grad_output(Case("sum", N, C, L, C, 1), dtype, layout)
    with poisoned_allocations():
        first, second = (torch.ops.triton_conv.conv1d_bias_grad(grad_output) for _ in range(2))
    assert dispatch_gradients.plan_bias_grad(grad_output, INTERPRETER).kernel == "bias_grad"
    assert_within_budget(first, grad_output.double().sum((0, 2)))
    assert torch.equal(first, second)


# every case in one split and in three
IN_SPLITS = [(*each, 1 + 2 * (i % 2)) for i, each in enumerate(in_turn([*SUMMED, *MANY_POSITIONS], DTYPES))]


@pytest.mark.parametrize(("case", "layout", "dtype", "splits"), IN_SPLITS, ids=str)
def test_the_gradient_of_a_bias_out_of_the_pass_for_the_weight_s(case, layout, dtype, splits):
    x, weight, _ = make_inputs(case, dtype, layout)
    grad_output = make_grad_output(case, dtype, layout)
    _, expected = expected_gradients(case, x, weight, grad_output)
    problem = dispatch_gradients.weight_grad_problem(grad_output, x, case.K, *geometry(case))
    for plan in dispatch_gradients.weight_grad_candidates(problem, INTERPRETER):
        if plan.kernel == "weight_grad_pointwise":
            # block copies do not pass through registers
            continue
        call = Call(problem, with_bias(plan, splits=splits))
        with poisoned_allocations():
            first, second = (gradients.run_weight_bias_grad(call, grad_output, x) for _ in range(2))
        assert_within_budget(first[0], expected, problem.precision)
        assert_within_budget(first[1], grad_output.double().sum((0, 2)))
        assert all(a.is_contiguous() and torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("config", [TILE, replace(TILE, BLOCK_C=64, tap_major=True, grad_left=False)], ids=str)
def test_the_gradient_of_a_bias_out_of_any_tile(config):
    x, _, _ = make_inputs(TILES, torch.float32)
    grad_output = make_grad_output(TILES, torch.float32)
    problem = dispatch_gradients.weight_grad_problem(grad_output, x, TILES.K, *geometry(TILES))
    for kernel in ("weight_grad", "weight_grad_rows"):
        plan = with_bias(Plan(kernel, config, "the test's"))
        with poisoned_allocations():
            _, bias = gradients.run_weight_bias_grad(Call(problem, plan), grad_output, x)
        assert_within_budget(bias, grad_output.double().sum((0, 2)))


@pytest.mark.parametrize("case", named("dense", "strided", "depthwise"), ids=str)
def test_an_expanded_gradient_is_read_in_place(case):
    x, weight, _ = make_inputs(case, torch.float32)
    grad_output = torch.ones(()).expand(case.output_shape)
    assert set(grad_output.stride()) == {0}
    expected_x, expected_weight = expected_gradients(case, x, weight, grad_output)
    for _, grad_x in input_grads(case, weight, grad_output):
        assert_within_budget(grad_x, expected_x, "tf32")
    for _, grad_weight in weight_grads(case, x, grad_output):
        assert_within_budget(grad_weight, expected_weight, "tf32")


@pytest.mark.parametrize("case", named("stride_above_K", "pointwise_strided"), ids=str)
def test_what_the_stride_leaves_over_has_no_gradient(case):
    _, weight, _ = make_inputs(case, torch.float32)
    grad_output = make_grad_output(case, torch.float32)
    reached = (case.output_shape[2] - 1) * case.stride - case.padding + case.dilation * (case.K - 1) + 1
    assert reached < case.L_in
    for _, grad_x in input_grads(case, weight, grad_output):
        assert (grad_x[:, :, reached:] == 0).all() and (grad_x[:, :, :reached] != 0).any()


@pytest.mark.parametrize("case", named("dense", "depthwise", "grouped"), ids=str)
def test_a_non_finite_sample_stays_in_its_channel(case):
    x, _, _ = make_inputs(case, torch.float32)
    grad_output = make_grad_output(case, torch.float32)
    x[0, 1, 20] = torch.nan
    clean = torch.ones(case.weight_shape, dtype=torch.bool)
    if case.groups == case.C_in:
        clean[1] = False
    else:
        clean[: case.C_out // case.groups, 1] = False
    for plan, grad_weight in weight_grads(case, x, grad_output):
        assert torch.equal(grad_weight.isfinite(), clean), plan


@pytest.mark.parametrize(
    ("length", "layout", "kernels"),
    [
        (40, "NCL", {"depthwise", "depthwise_toeplitz", "depthwise_vector"}),
        (40, "NLC", {"depthwise", "depthwise_toeplitz", "depthwise_sliding", "depthwise_skewed"}),
        (6, "NCL", {"depthwise", "depthwise_toeplitz", "depthwise_short"}),
    ],
)
def test_depthwise_kernels_read_the_taps_of_a_filter_in_reverse(length, layout, kernels):
    case = Case("same", 2, 32, length, 32, 5, padding=2, groups=32)
    _, weight, _ = make_inputs(case, torch.float32)
    grad_output = make_grad_output(case, torch.float32, layout)
    expected = gradients.aten_input_grad(grad_output.double(), weight.double(), length, *geometry(case))
    with CountFlips() as flips:
        for plan, found in input_grads(case, weight, grad_output):
            assert_within_budget(found, expected, current_precision(torch.float32))
            assert flips.count == (plan.kernel == "dense")
            flips.count = 0
            kernels = kernels - {plan.kernel}
    assert not kernels


class CountFlips(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten.flip.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", PLAIN, ids=str)
def test_the_table_reaches_every_kernel(case):
    x, grad_output = make_inputs(case, torch.float32)[0], make_grad_output(case, torch.float32)
    problem = dispatch_gradients.weight_grad_problem(grad_output, x, case.K, *geometry(case))
    kernels = {plan.kernel for plan in dispatch_gradients.weight_grad_candidates(problem, INTERPRETER)}
    depthwise = case.groups == case.C_in > 1
    unit = case.stride == case.dilation == 1
    assert ("weight_grad_depthwise" in kernels) == (depthwise and case.N > 0)
    assert ("weight_grad_banded" in kernels) == (depthwise and unit and case.N > 0)
    assert ("weight_grad" in kernels) == (not depthwise and case.N > 0)


def test_operators_run_the_kernels():
    (case,) = named("odd_everything")
    leaves = [t.detach().clone().requires_grad_() for t in make_inputs(case, torch.float32)]
    y = case.operator()(*leaves)
    grad_output = make_grad_output(case, torch.float32)
    with poisoned_allocations():
        actual = torch.autograd.grad(y, leaves, grad_output)
    for a, e in zip(actual, expected_gradients(case, *leaves[:2], grad_output), strict=False):
        assert_within_budget(a, e, "tf32")
    torch.testing.assert_close(actual[2], grad_output.sum((0, 2)))


TWICE = named(
    "odd_everything",
    "dilated_strided",
    "grouped",
    "depthwise",
    "channel_multiplier",
    "transposed",
    "transposed_gcd",
    "transposed_output_padding",
    "transposed_output_padding_above_stride",
    "transposed_grouped",
    "transposed_depthwise",
)


def gradients_of_gradients(operator, tensors, grad_output):
    """Of x, weight and grad_output: how the squares of the first gradients, as in a gradient penalty, depend on them."""
    leaves = [t.detach().clone().requires_grad_() for t in (*tensors, grad_output)]
    *inputs, grad_output = leaves
    first = torch.autograd.grad(operator(*inputs), inputs, grad_output, create_graph=True)
    return torch.autograd.grad(sum(gradient.square().mean() for gradient in first), [*inputs[:2], grad_output])


@pytest.mark.parametrize("case", TWICE, ids=str)
def test_operators_run_the_kernels_when_gradients_are_differentiated(case):
    tensors, grad_output = make_inputs(case, torch.float32), make_grad_output(case, torch.float32)
    with profile(activities=[ProfilerActivity.CPU]) as seen, poisoned_allocations():
        actual = gradients_of_gradients(case.operator(), tensors, grad_output)
    assert not any(event.key.startswith("aten::") and "conv" in event.key for event in seen.key_averages())
    expected = gradients_of_gradients(case.operator(F), [t.double() for t in tensors], grad_output.double())
    for a, e in zip(actual, expected, strict=True):
        assert_within_budget(a, e, "tf32")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_channels_of_two_bytes_are_copied_to_channels_last(dtype):
    case = Case("copied", 2, 128, 45, 130, 3, stride=2, padding=1)
    x, grad_output = make_inputs(case, dtype)[0], make_grad_output(case, dtype)
    assert all(plan.config.copy_to_nlc == (dtype != torch.float32) for plan, _ in weight_grads(case, x, grad_output))
    check(case, dtype)


def test_taps_that_shift_by_whole_vectors_are_read_in_them():
    case = Case("aligned", 2, 20, 64, 80, 3, padding=16, dilation=16)
    x, grad_output = torch.randn(2, 20, 64), make_grad_output(case, torch.float32)
    (config,) = (plan.config for plan, _ in weight_grads(case, x, grad_output) if plan.kernel == "weight_grad")
    assert not config.prefetch
    check(case, torch.float32)
