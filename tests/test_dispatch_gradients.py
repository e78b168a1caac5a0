"""Which plan a gradient gets, and why: pure decisions, tested without a GPU."""

from dataclasses import replace
from fnmatch import fnmatch

import pytest
import torch

from torch_conv_triton import dispatch, dispatch_gradients
from torch_conv_triton.configs import Device
from torch_conv_triton.configs_gradients import POSITIONS_PER_SPLIT, weight_grad_config_refusal, workspace_bytes
from torch_conv_triton.problem import contiguous_strides, output_length

H200 = Device("an H200 without tables", capability=90, sm_count=132, shared_memory=232448)
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16


def problems(x, C_out, K, dtype=FP32, *, layout="NCL", stride=1, padding=0, dilation=1, groups=1):
    """The problems of both gradients of a convolution of x of shape ``(N, C_in, L_in)``."""
    N, C_in, L_in = x

    def tensor(C, L):
        t = torch.empty((N, C, L) if layout == "NCL" else (N, L, C), dtype=dtype, device="meta")
        return t if layout == "NCL" else t.transpose(1, 2)

    grad_output = tensor(C_out, output_length(L_in, K, stride, padding, dilation))
    weight = torch.empty(C_out, C_in // groups, K, dtype=dtype, device="meta")
    geometry = stride, padding, dilation, groups
    return (
        dispatch_gradients.input_grad_problem(grad_output, weight, L_in, *geometry),
        dispatch_gradients.weight_grad_problem(grad_output, tensor(C_in, L_in), K, *geometry),
    )


SEED = problems((64, 64, 224280), 128, 3, stride=3, dilation=4)
CHOICES = {
    "seed": (SEED, "transposed", "weight_grad"),
    "seed in bf16": (problems((64, 64, 224280), 128, 3, BF16, stride=3, dilation=4), "aten", "weight_grad"),
    "vocoder": (problems((16, 32, 131072), 32, 7, padding=9, dilation=3), "dense_halo", "weight_grad"),
    "strided encoder": (problems((16, 512, 31999), 512, 3, FP16, stride=2), "transposed_tma", "aten_nhwc"),
    "many products": (problems((8, 256, 6880), 256, 11, padding=5), "dense_tma", "weight_grad_rows"),
    "many products of few positions": (problems((2, 512, 600), 512, 5, padding=2), "aten", "aten"),
    "to one channel": (problems((8, 32, 220160), 1, 7, padding=3), "dense_few_inputs", "weight_grad"),
    "positional": (problems((16, 768, 499), 768, 128, FP16, padding=64, groups=16), "dense_runs", "weight_grad"),
    "raw audio": (problems((16, 1, 160000), 512, 10, FP16, stride=5), "transposed_interleaved", "weight_grad"),
    "causal, NLC": (
        problems((8, 5120, 2048), 5120, 4, BF16, layout="NLC", padding=3, groups=5120), "depthwise*", "weight_grad_depthwise",
    ),
    "conformer": (problems((16, 512, 1500), 512, 31, BF16, padding=15, groups=512), "depthwise*", "weight_grad_banded"),
    "one token": (problems((64, 5376, 5), 5376, 4, BF16, groups=5376), "aten", "weight_grad_depthwise"),
    "pointwise": (problems((32, 128, 2048), 1024, 1), "aten", "aten"),
    "pointwise, NLC": (problems((16, 1024, 375), 2048, 1, BF16, layout="NLC"), "dense_tma", "weight_grad_pointwise"),
    "small": (problems((1, 64, 100), 64, 3, padding=1), "aten", "aten"),
}  # fmt: skip


@pytest.mark.parametrize(("pair", "for_input", "for_weight"), CHOICES.values(), ids=CHOICES)
def test_runs_the_kernel_that_was_measured_to_be_fastest(pair, for_input, for_weight):
    plans = dispatch_gradients.plan_input_grad(pair[0], H200), dispatch_gradients.plan_weight_grad(pair[1], H200)
    for plan, kernel in zip(plans, (for_input, for_weight), strict=True):
        assert fnmatch(plan.kernel, kernel), plan
        assert plan.reason and plan.is_aten == (plan.config is None)


def test_no_device_or_dtype_of_ours_means_aten_with_the_reason():
    for problem, plan in zip(SEED, (dispatch_gradients.plan_input_grad, dispatch_gradients.plan_weight_grad), strict=True):
        assert plan(problem, None) == dispatch.aten("no kernel of ours runs on this device")
        assert plan(replace(problem, dtype=torch.float64), H200) == dispatch.aten("fp64 is computed by aten")
        assert plan(replace(problem, N=0), H200) == dispatch.aten("the input or the output is empty")


def test_the_input_gradient_leaves_over_what_the_stride_did():
    for L_in in range(30, 40):
        problem, _ = problems((2, 8, L_in), 8, 4, stride=5, padding=1)
        assert problem.L_out == L_in and 0 <= problem.output_padding < 5


@pytest.mark.parametrize("padding", [0, 3, 6, 7])
def test_a_depthwise_input_gradient_is_plain_where_the_padding_lets_it(padding):
    problem, _ = problems((2, 8, 40), 8, 4, padding=padding, dilation=2, groups=8)
    assert problem.transposed == (padding > 6)
    assert (problem.L_out, problem.padding) == (40, padding if padding > 6 else 6 - padding)


def test_sums_are_split_to_fill_the_device_and_within_the_workspace():
    for pair, _, _ in CHOICES.values():
        for plan in dispatch_gradients.weight_grad_candidates(pair[1], H200):
            p, splits = pair[1], plan.config.splits
            elements = p.C_out * p.C_in_per_group * p.K
            if plan.kernel == "weight_grad_banded":
                elements = p.C_out * (p.K + plan.config.BLOCK_C - 1) * plan.config.BLOCK_C
            assert splits == 1 or splits * 4 * elements <= workspace_bytes(p)
    plan = dispatch_gradients.weight_grad_candidates(SEED[1], H200)[-1]
    assert plan.config.splits * 3 >= 2 * 132 - 3


def test_long_sums_are_split_so_that_their_error_does_not_grow():
    _, problem = problems((4, 1024, 2_500_000), 1024, 7, padding=3)
    for plan in dispatch_gradients.weight_grad_candidates(problem, H200):
        assert problem.N * problem.L_out / plan.config.splits <= 1.01 * POSITIONS_PER_SPLIT
    assert workspace_bytes(problem) <= sum(problem.extents) * 4 / 4


def test_the_gradient_of_a_bias_is_ours_where_the_sum_is_long():
    def plan(shape, dtype=FP32, device=H200):
        return dispatch_gradients.plan_bias_grad(torch.empty(shape, dtype=dtype, device="meta"), device)

    assert plan((8, 128, 4001)).kernel == "bias_grad"
    assert "small" in plan((2, 8, 100)).reason
    assert plan((0, 8, 100)).reason == "the output is empty"
    assert plan((8, 128, 4001), torch.float64).reason == "fp64 is computed by aten"
    assert plan((8, 128, 4001), device=None).is_aten


def test_the_bias_s_comes_out_of_the_weight_s_pass_where_grad_output_passes_through_registers_in_its_own_place():
    def planned(problem, device=H200):
        return dispatch_gradients.plan_weight_bias_grad(problem, device)

    weights, few_outputs, pointwise = SEED[1], problems((8, 32, 220160), 1, 7, padding=3)[1], CHOICES["pointwise"][0][1]
    shared = problems((16, 768, 499), 768, 128, FP16, layout="NLC", padding=64, groups=16)[1]
    halves = problems((16, 1, 160000), 512, 10, FP16, stride=5)[1]
    plan = dispatch_gradients.plan_weight_grad(weights, H200)
    assert planned(weights) == replace(plan, config=replace(plan.config, with_bias=True))
    for problem in (few_outputs, shared, halves, pointwise):
        assert planned(problem) == dispatch_gradients.plan_weight_grad(problem, H200)
    assert planned(few_outputs).config.exchanged and planned(pointwise).is_aten and planned(weights, None).is_aten
    for problem in (few_outputs, shared, halves):
        config = replace(planned(problem).config, with_bias=True)
        reason = weight_grad_config_refusal("weight_grad", config, problem, H200)
        assert reason == "grad_output does not pass through the registers of a few tiles, where it could be added up"


def test_what_is_rounded_is_refused_as_rows_in_full_float32():
    _, problem = problems((8, 256, 6880), 256, 11, padding=5)
    kernels = [
        {plan.kernel for plan in dispatch_gradients.weight_grad_candidates(replace(problem, **change), H200)}
        for change in ({"precision": "tf32"}, {"precision": "ieee"}, {"precision": "ieee", "dtype": BF16})
    ]
    assert ["weight_grad_rows" in found for found in kernels] == [True, False, False]
    assert dispatch_gradients.rows_refusal(problems((1, 4, 2**31 - 100), 4, 1)[1]) == "a row has 2^31 elements or more"


@pytest.mark.parametrize(
    "change",
    [
        {"K": 3},
        {"stride": 2},
        {"dtype": FP32},
        {"C_in": 36},
        {"x_strides": (5000, 1, 64)},
        {"y_strides": (0, 1, 0)},
        {"aligned": False},
    ],
    ids=str,
)
def test_only_aligned_rows_equally_far_apart_are_one_matrix(change):
    def kernels(problem):
        return {plan.kernel for plan in dispatch_gradients.weight_grad_candidates(problem, H200)}

    _, problem = problems((2, 64, 37), 32, 1, BF16, layout="NLC")
    assert "weight_grad_pointwise" in kernels(problem)
    assert "weight_grad_pointwise" not in kernels(replace(problem, **change))


def test_tiles_of_block_copies_fit_less_shared_memory():
    _, wide = problems((16, 1024, 375), 2048, 1, BF16, layout="NLC")
    small = Device("less shared memory", capability=120, sm_count=128, shared_memory=101376)
    plans = dispatch_gradients.weight_grad_candidates(wide, small)
    assert "weight_grad_pointwise" in {plan.kernel for plan in plans}
    assert not any(dispatch_gradients.plan_refusal(plan, wide, small) for plan in plans)


def test_beyond_two_to_the_31_elements_a_faster_aten_is_no_reason():
    huge = problems((1, 4, 2**29 + 4100), 4, 1)
    assert dispatch_gradients.plan_input_grad(huge[0], H200).kernel == "dense_few_outputs"
    assert dispatch_gradients.plan_weight_grad(huge[1], H200).kernel == "weight_grad"


def test_strides_of_the_gradient_are_part_of_the_plan_s_key():
    expanded = dispatch_gradients.weight_grad_problem(
        torch.empty((), device="meta").expand(2, 4, 8), torch.empty(2, 4, 8, device="meta"), 1, 1, 0, 1, 1
    )
    assert expanded.y_strides == (0, 0, 0) and expanded.x_strides == contiguous_strides(4, 8)
