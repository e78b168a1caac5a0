"""Every kernel in Triton's interpreter against float64: named and random geometries, layouts, dtypes, memory full of NaN."""

from dataclasses import replace

import pytest
import torch

from torch_conv_triton import dispatch, execute, reference
from torch_conv_triton.configs import Config, config_refusal
from torch_conv_triton.testing import (
    CASES,
    LAYOUTS,
    Case,
    assert_within_budget,
    check_case,
    float32_precision,
    in_turn,
    make_inputs,
    random_cases,
)

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# enough output positions that the persistent kernel walks over several tiles a program
LONG = (
    Case("long", 1, 16, 6000, 16, 3, padding=1),
    Case("long_strided", 1, 8, 12000, 12, 4, stride=2, padding=1, bias=False),
)
SHORT_OF_TILES = Case("halo_at_every_tile", 1, 32, 700, 32, 9, padding=24, dilation=6)

# phases stored row by row and line by line, tiles over several samples, phases apart, taps left over
WOVEN = (
    Case("phases_line_by_line", 2, 16, 150, 5, 6, stride=3, padding=2, transposed=True),
    Case("phases_row_by_row", 2, 512, 37, 5, 8, stride=3, padding=2, transposed=True, output_padding=1),
    Case("more_phases_than_a_tile", 1, 16, 3, 2, 300, stride=150, padding=7, transposed=True),
    Case("tiles_over_samples", 5, 32, 9, 24, 4, stride=2, padding=1, transposed=True),
    Case("tiles_over_samples_grouped", 3, 64, 21, 6, 9, stride=4, padding=9, groups=2, transposed=True, output_padding=3),
    Case("phases_apart", 2, 16, 40, 20, 5, stride=6, padding=4, dilation=3, transposed=True, output_padding=5),
    Case("one_phase_apart", 2, 16, 40, 20, 3, stride=3, padding=1, dilation=6, transposed=True),
    Case("reversed_taps", 2, 48, 70, 21, 5, padding=3, dilation=2, groups=3, transposed=True),
)


def named(*names: str) -> list[Case]:
    return [case for case in CASES if case.name in names]


def run_every_plan(case: Case, dtype: torch.dtype, layout: str) -> list[str]:
    """Check the case with every plan that may run it; the names of the kernels."""
    tensors = make_inputs(case, dtype, layout)
    problem = case.problem(*tensors)
    plans = dispatch.candidates(problem, dispatch.device_for(tensors[0].device))
    for plan in plans:
        check_case(case, lambda x, w, b, plan=plan: execute.forward_with(plan, problem, x, w, b), dtype, layout)
    return [plan.kernel for plan in plans]


@pytest.mark.parametrize(("case", "layout", "dtype"), in_turn(CASES, DTYPES), ids=str)
def test_geometries(case, layout, dtype):
    kernels = run_every_plan(case, dtype, layout)
    assert bool(kernels) == (case.N > 0)


@pytest.mark.parametrize("case", random_cases(60, seed=7), ids=str)
def test_random_geometries(case):
    # the case's number picks the combination, so that all of them come up
    index = int(case.name.rpartition("_")[2])
    assert run_every_plan(case, DTYPES[index % 3], LAYOUTS[index // 3 % 3])


@pytest.mark.parametrize("case", LONG, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_persistent_programs_walk_over_tiles(case, dtype):
    assert "dense_persistent" in run_every_plan(case, dtype, "NCL")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_tensor_descriptors_serve_channels_last(dtype, layout):
    assert ("dense_tma" in run_every_plan(SHORT_OF_TILES, dtype, layout)) == (layout == "NLC")


@pytest.mark.parametrize(("case", "layout", "dtype"), in_turn(WOVEN, [torch.float32, torch.bfloat16]), ids=str)
def test_phases_are_woven_together(case, layout, dtype):
    kernels = run_every_plan(case, dtype, layout)
    assert {"transposed", "transposed_tma", "dense" if case.stride == 1 else "transposed_interleaved"} <= set(kernels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [case for case in WOVEN if case.stride > 1], ids=str)
def test_phases_are_woven_from_a_copy_of_many_channels(case, dtype):
    tensors = make_inputs(case, dtype)
    problem = case.problem(*tensors)
    (plan,) = (p for p in dispatch.candidates(problem, dispatch.INTERPRETER) if p.kernel == "transposed_interleaved")
    plan = replace(plan, config=replace(plan.config, copy_to_nlc=True))
    check_case(case, lambda x, w, b: execute.forward_with(plan, problem, x, w, b), dtype)


VERY_LONG = Case("depthwise_very_long", 1, 3, 1700, 3, 1600, padding=800, groups=3)
LONG_ROWS = Case("depthwise_long_rows", 2, 8, 2000, 8, 6, padding=3, groups=8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_depthwise_filters_of_any_length(dtype):
    tensors = make_inputs(VERY_LONG, dtype)
    problem = VERY_LONG.problem(*tensors)
    plan = next(p for p in dispatch.candidates(problem, dispatch.INTERPRETER) if p.kernel == "depthwise_toeplitz")
    assert plan.config.run == 0
    check_case(VERY_LONG, lambda x, w, b: execute.forward_with(plan, problem, x, w, b), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("run", "steps"), [(1, 1), (1, 3), (3, 1), (2, 2)])
@pytest.mark.parametrize("case", [LONG_ROWS, *named("depthwise_middle", "channel_multiplier_strided")], ids=str)
def test_runs_of_blocks_share_samples(case, run, steps, dtype):
    problem = case.problem(*make_inputs(case, dtype))
    config = Config(16, 16, 16, num_warps=1, num_stages=1, run=run, steps=steps)
    plan = dispatch.Plan("depthwise_toeplitz", config, "")
    assert dispatch.plan_refusal(plan, problem, dispatch.INTERPRETER) is None
    check_case(case, lambda x, w, b: execute.forward_with(plan, problem, x, w, b), dtype)


@pytest.mark.parametrize("dilation", [1, 2, 5, 16, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sliding_writes_channels_last_outputs_too(dtype, dilation):
    from torch_conv_triton.kernels.depthwise_sliding import conv1d_depthwise_sliding

    case = Case("sliding", 2, 9, 70, 9, 3, padding=dilation, dilation=dilation, groups=9)
    x, weight, bias = make_inputs(case, dtype, "NLC")
    y = torch.full((case.N, *case.output_shape[:0:-1]), torch.nan, dtype=dtype).transpose(1, 2)
    conv1d_depthwise_sliding(x, weight, bias, y, dilation, dilation, Config(32, 16, run=4, steps=2))
    assert_within_budget(y, reference.conv1d(x, weight, bias, *case.geometry))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_table_reaches_every_kernel_that_its_names_promise(case):
    kernels = {plan.kernel for plan in dispatch.candidates(case.problem(*make_inputs(case, torch.float32)), dispatch.INTERPRETER)}
    if case.N == 0:
        assert kernels == set()
    else:
        assert ("transposed" if case.transposed else "dense") in kernels
        depthwise = case.groups == case.C_in > 1
        assert ("depthwise" in kernels) == depthwise
        assert ("depthwise_vector" in kernels) == (depthwise and "aligned" in case.name)
        assert ("depthwise_short" in kernels) == (depthwise and "short" in case.name)
        whole = not case.transposed or case.stride in (1, 2, 4)
        assert ("depthwise_toeplitz" in kernels) == (depthwise and whole)


@pytest.mark.parametrize(
    ("name", "kernel"),
    [
        ("tiny_C_out", "dense_few_outputs"),
        ("tiny_both", "dense_few_outputs"),
        ("tiny_both", "dense_few_inputs"),
        ("tiny_C_in_rows_off_vectors", "dense_few_inputs"),
        ("tiny_C_in_rows_off_vectors", "dense_skewed"),
        ("K_long", "dense_runs"),
        ("grouped_K_long", "dense_runs"),
        ("filterbank", "dense_frames"),
    ],
)
def test_thin_convolutions_reach_their_kernels(name, kernel):
    (case,) = named(name)
    assert kernel in {
        p.kernel for p in dispatch.candidates(case.problem(*make_inputs(case, torch.float32)), dispatch.INTERPRETER)
    }


@pytest.mark.parametrize("channels_side_by_side", [1, 4, 32])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [64, 45])
def test_sums_over_channels_in_registers(length, dtype, channels_side_by_side):
    case = Case("few_outputs", 2, 19, length, 3, 5, padding=4, dilation=2)
    plan = dispatch.Plan("dense_few_outputs", Config(32, 1, channels_side_by_side, num_stages=1), "")
    problem = case.problem(*make_inputs(case, dtype))
    assert dispatch.plan_refusal(plan, problem, dispatch.INTERPRETER) is None
    check_case(case, lambda x, w, b: execute.forward_with(plan, problem, x, w, b), dtype)


# of 33 channels one is beyond the tiles, of 60 a tile is not full; windows reach beyond x, samples or weights start off 16 bytes
FILTERS = (
    Case("one_channel_left", 3, 1, 320, 33, 32, stride=8),
    Case("a_tile_left", 2, 1, 304, 60, 64, stride=16, bias=False),
    Case("padded", 2, 1, 300, 50, 64, stride=16, padding=20),
    Case("samples_off_vectors", 2, 1, 302, 20, 32, stride=16),
    Case("a_sample_off_vectors", 1, 1, 302, 20, 32, stride=16),
    Case("a_slice_of_taps_left", 2, 1, 304, 33, 40, stride=16),
    Case("weights_off_vectors", 2, 1, 300, 50, 37, stride=8, padding=20),
)


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("case", FILTERS, ids=str)
def test_windows_are_rows_of_x_or_of_its_copy(case, dtype, copied):
    x, weight, bias = make_inputs(case, dtype)
    x = x.clone()
    problem = case.problem(x, weight, bias)
    plan = dispatch.Plan("dense_frames", Config(16, 32, 32, tap_major=True, copy_to_nlc=copied), "")
    y = execute.forward_with(plan, problem, x, weight, bias)
    assert_within_budget(y, reference.conv1d(x, weight, bias, *case.geometry), problem.precision)


@pytest.mark.parametrize("length", [61, 63, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("name", "layout", "config"),
    [
        ("dense_few_inputs", "NCL", Config(32, 16, num_stages=1)),
        ("dense_skewed", "NCL", Config(32, 64, 16, weights_left=True)),
        ("depthwise_skewed", "NLC", Config(32, 16, run=2, steps=2)),
        ("depthwise_skewed", "NLC", Config(32, 16, run=4)),
    ],
    ids=str,
)
def test_vectors_are_cut_where_rows_start(name, layout, config, dtype, length):
    depthwise = Case("rows_off_vectors", 2, 24, length, 24, 4, padding=3, groups=24)
    channels = 24 if name == "dense_few_inputs" else 72
    case = depthwise if name.startswith("depthwise") else Case("rows_off_vectors", 2, 1, length, channels, 4, padding=3)
    plan = dispatch.Plan(name, config, "")
    problem = case.problem(*make_inputs(case, dtype, layout))
    # of 64 outputs, not of 66 or 67
    aligned = case.output_shape[2] % (16 // dtype.itemsize) == 0
    assert (dispatch.plan_refusal(plan, problem, dispatch.INTERPRETER) is None) == (name != "dense_skewed" or not aligned)
    check_case(case, lambda x, w, b: execute.forward_with(plan, problem, x, w, b), dtype, layout)


@pytest.mark.parametrize("run", [2, 4, 8])
@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*named("K_long", "grouped_K_long"), Case("short", 5, 16, 23, 20, 16, padding=9)], ids=str)
def test_runs_of_outputs_are_columns(case, dtype, copied, run):
    plan = dispatch.Plan(
        "dense_runs", Config(32, 16 * max(run, 4), 16, tap_major=True, merge_taps=True, copy_to_nlc=copied, run=run), ""
    )
    problem = case.problem(*make_inputs(case, dtype))
    assert dispatch.plan_refusal(plan, problem, dispatch.INTERPRETER) is None
    check_case(case, lambda x, w, b: execute.forward_with(plan, problem, x, w, b), dtype)


@pytest.mark.parametrize("channels", [32, 40, 64, 70])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_few_channels_beyond_whole_tiles_get_a_narrow_one(dtype, channels):
    case = Case("filterbank", 2, 1, 500, channels, 32, stride=8, padding=5)
    plan = dispatch.Plan("dense_frames", Config(64, 32, 32, tap_major=True), "")
    problem = case.problem(*make_inputs(case, dtype))
    assert dispatch.plan_refusal(plan, problem, dispatch.INTERPRETER) is None
    check_case(case, lambda x, w, b: execute.forward_with(plan, problem, x, w, b), dtype)


@pytest.mark.parametrize("case", named("dense", "grouped", "transposed", "depthwise"), ids=str)
def test_full_float32_where_the_switch_asks_for_it(case):
    with float32_precision("ieee"):
        assert case.problem(*make_inputs(case, torch.float32)).precision == "ieee"
        run_every_plan(case, torch.float32, "NCL")


@pytest.mark.parametrize("case", named("dense", "grouped", "transposed", "filterbank"), ids=str)
def test_tf32_rounds_operands_to_nearest(case):
    x, weight, bias = make_inputs(case, torch.float32)
    problem = case.problem(x, weight, bias)
    assert problem.precision == "tf32"
    expected = reference.conv1d(nearest_tf32(x), nearest_tf32(weight), bias, *case.geometry)
    for plan in dispatch.candidates(problem, dispatch.INTERPRETER):
        assert_within_budget(execute.forward_with(plan, problem, x, weight, bias), expected, "ieee")


def nearest_tf32(tensor: torch.Tensor) -> torch.Tensor:
    """The values with the last 13 of 23 mantissa bits rounded away, ties away from zero."""
    return ((tensor.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)


@pytest.mark.parametrize(
    ("value", "dtype"), [(torch.nan, torch.float32), (torch.inf, torch.float16), (-torch.inf, torch.bfloat16)], ids=str
)
@pytest.mark.parametrize(
    "case",
    named("dense", "depthwise", "depthwise_aligned", "depthwise_middle", "depthwise_far_apart", "transposed_depthwise")
    + named("transposed", "transposed_output_padding", "strided", "K_long", "grouped_K_long", "tiny_C_out", "filterbank"),
    ids=str,
)
def test_non_finite_values_spread_as_in_aten(case, dtype, value):
    x, weight, bias = make_inputs(case, dtype)
    x[0, -1, 7] = value
    # aten on the CPU lets it spread to other channels in bfloat16, of a transposed depthwise convolution
    expected = case.operator(torch.nn.functional)(x.float(), weight.float(), None if bias is None else bias.float())
    problem = case.problem(x, weight, bias)
    for plan in dispatch.candidates(problem, dispatch.INTERPRETER):
        y = execute.forward_with(plan, problem, x, weight, bias)
        assert torch.equal(y.isfinite(), expected.isfinite())
        assert torch.equal(y.isposinf(), expected.isposinf()) and torch.equal(y.isnan(), expected.isnan())


@pytest.mark.parametrize("case", named("dense", "depthwise", "transposed"), ids=str)
def test_weights_of_any_strides(case):
    x, weight, bias = make_inputs(case, torch.float32)
    expected = execute.forward(x, weight, bias, *case.geometry)
    for same in (weight.transpose(0, 2).contiguous().transpose(0, 2), weight.repeat_interleave(2, dim=2)[..., ::2]):
        assert not same.is_contiguous()
        torch.testing.assert_close(execute.forward(x, same, bias, *case.geometry), expected)
    shared = weight[:1].expand(weight.shape)
    torch.testing.assert_close(
        execute.forward(x, shared, bias, *case.geometry), execute.forward(x, shared.contiguous(), bias, *case.geometry)
    )


@pytest.mark.parametrize("case", named("dense", "transposed"), ids=str)
def test_an_expanded_input_is_read_in_place(case):
    x, weight, bias = make_inputs(case, torch.float32)
    shared = x[:1].expand(x.shape)
    y = execute.forward(shared, weight, bias, *case.geometry)
    torch.testing.assert_close(y[1], y[0], rtol=0, atol=0)
    torch.testing.assert_close(y, execute.forward(shared.contiguous(), weight, bias, *case.geometry))


@pytest.mark.parametrize("case", named("dense", "transposed", "depthwise"), ids=str)
def test_bias_of_any_stride(case):
    x, weight, bias = make_inputs(case, torch.float32)
    spread = torch.stack([bias, torch.full_like(bias, torch.nan)], dim=1)[:, 0]
    assert spread.stride() == (2,)
    expected = execute.forward(x, weight, bias, *case.geometry)
    torch.testing.assert_close(execute.forward(x, weight, spread, *case.geometry), expected)


@pytest.mark.parametrize("kernel", ["dense", "dense_tma"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_x_is_copied_to_channels_last_and_rounded_on_the_way(dtype, kernel):
    case = Case("copied", 2, 64, 151, 64, 5, stride=2, padding=2)
    plan = dispatch.Plan(kernel, Config(64, 64, 32, tap_major=True, copy_to_nlc=True), "")

    def run(x, weight, bias):
        return execute.forward_with(plan, case.problem(x, weight, bias), x, weight, bias)

    check_case(case, run, dtype, "NCL")


PARTIAL_BLOCKS = (
    Case("channels_beyond_a_block", 2, 50, 61, 21, 4, padding=2, dilation=3),
    Case("channels_short_of_a_block", 1, 63, 45, 70, 5, stride=3, padding=4, bias=False),
    Case("odd_channels", 2, 33, 40, 16, 1, stride=2),
)


@pytest.mark.parametrize("block", [16, 32])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", PARTIAL_BLOCKS, ids=str)
def test_block_copies_pad_channels_with_zeros(case, dtype, block):
    problem = case.problem(*make_inputs(case, dtype))
    plan = dispatch.Plan("dense_tma", Config(32, 16, block, tap_major=True, copy_to_nlc=True), "")
    assert dispatch.tma_refusal(problem, dispatch.INTERPRETER, plan.config) is None
    check_case(case, lambda x, w, b: execute.forward_with(plan, problem, x, w, b), dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("channels", [40, 72])
def test_descriptors_pad_channels_that_are_read_in_place(channels, dtype):
    case = Case("in_place", 2, channels, 61, 21, 5, padding=2)
    assert "dense_tma" in run_every_plan(case, dtype, "NLC")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_descriptors_read_nothing_between_rows(dtype):
    case = PARTIAL_BLOCKS[0]
    rows = torch.full((2, 61, 64), torch.nan, dtype=dtype)
    x, weight, bias = make_inputs(case, dtype)
    rows[:, :, :50] = x.transpose(1, 2)
    x = rows[:, :, :50].transpose(1, 2)
    plan = dispatch.Plan("dense_tma", Config(32, 16, 32, tap_major=True), "")
    problem = case.problem(x, weight, bias)
    assert dispatch.plan_refusal(plan, problem, dispatch.INTERPRETER) is None
    y = execute.forward_with(plan, problem, x, weight, bias)
    assert_within_budget(y, reference.conv1d(x, weight, bias, *case.geometry))


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_weight_whose_rows_do_not_start_on_16_bytes_is_packed_for_block_copies(transposed, copied):
    case = Case("pointwise", 2, 32, 45, 48, 1, transposed=transposed)
    x, weight, bias = make_inputs(case, torch.bfloat16, "NLC")
    rows = torch.full((case.C_out, 44, 1), torch.nan, dtype=weight.dtype)
    rows[:, : case.C_in] = weight.transpose(0, 1) if transposed else weight
    rows = rows[:, : case.C_in]
    weight = rows.transpose(0, 1) if transposed else rows
    problem = case.problem(x, weight, bias)
    plan = dispatch.Plan("dense_tma", Config(32, 16, 32, tap_major=True, copy_to_nlc=copied), "")
    assert dispatch.plan_refusal(plan, problem, dispatch.INTERPRETER) is None
    y = execute.forward_with(plan, problem, x, weight, bias)
    assert_within_budget(y, case.operator(torch.nn.functional)(x.double(), weight.double(), bias.double()))


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_non_finite_values_do_not_reach_padded_channels(value):
    case = PARTIAL_BLOCKS[0]
    x, weight, bias = make_inputs(case, torch.float32)
    x[0, 49, 7] = weight[3, 0, 2] = value
    expected = case.operator(torch.nn.functional)(x, weight, bias)
    plan = dispatch.Plan("dense_tma", Config(32, 16, 32, tap_major=True, copy_to_nlc=True), "")
    y = execute.forward_with(plan, case.problem(x, weight, bias), x, weight, bias)
    assert torch.equal(y.isfinite(), expected.isfinite())
    assert torch.equal(y.isposinf(), expected.isposinf()) and torch.equal(y.isnan(), expected.isnan())


@pytest.mark.parametrize("weights_left", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_tiles_of_two_parts_compute_channels_that_are_no_power_of_two(dtype, weights_left):
    # of the 52 channels of a group a tile takes 32 + 16, the next one the 4 that are left
    case = Case("two_parts", 2, 64, 45, 104, 5, stride=2, padding=3, groups=2)
    config = Config(32, 32, 32, tap_major=True, weights_left=weights_left, copy_to_nlc=True, TAIL_N=16)
    problem = case.problem(*make_inputs(case, dtype))
    assert dispatch.tma_refusal(problem, dispatch.INTERPRETER, config) is None
    assert config_refusal(config, problem, dispatch.INTERPRETER) is None
    check_case(case, lambda x, w, b: execute.forward_with(dispatch.Plan("dense_tma", config, ""), problem, x, w, b), dtype)


@pytest.mark.parametrize("weights_left", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [16, 48])
def test_slices_may_run_on_into_the_next_tap(channels, dtype, weights_left):
    case = Case("merged", 2, 2 * channels, 61, 2 * channels, 5, padding=2, dilation=2, groups=2)
    plan = dispatch.Plan("dense", Config(64, 64, 32, tap_major=True, merge_taps=True, weights_left=weights_left), "")

    def run(x, weight, bias):
        return execute.forward_with(plan, case.problem(x, weight, bias), x, weight, bias)

    check_case(case, run, dtype, "NLC")
