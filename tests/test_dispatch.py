"""Which plan a problem gets, and why: pure decisions, tested without a GPU."""

from dataclasses import replace

import pytest
import torch

from torch_conv_triton import dispatch
from torch_conv_triton.configs import INTERPRETER, Device
from torch_conv_triton.configs_halo import HaloShape, halo_config, halo_refusal
from torch_conv_triton.configs_thin import frames_config, thin_refusal
from torch_conv_triton.configs_transposed import transposed_tma_config
from torch_conv_triton.problem import Conv1dProblem, contiguous_strides, output_length
from torch_conv_triton.weave import Weave

# by a name that no table has: this is about the rules
H200 = Device("an H200", capability=90, sm_count=132, shared_memory=232448)
RTX4090 = Device("NVIDIA GeForce RTX 4090", capability=89, sm_count=128, shared_memory=101376)


def problem(x, C_out, K, *, dtype=torch.float32, layout="NCL", bias=True, groups=1, transposed=False, **geometry):
    """A problem on x of shape ``(N, C_in, L_in)``, contiguous in the layout named."""
    N, C_in, L_in = x
    sizes = {"stride": 1, "padding": 0, "dilation": 1, "output_padding": 0} | geometry
    lengths = sizes["stride"], sizes["padding"], sizes["dilation"], transposed, sizes["output_padding"]
    return Conv1dProblem(
        N=N,
        C_in=C_in,
        L_in=L_in,
        C_out=C_out,
        K=K,
        groups=groups,
        transposed=transposed,
        has_bias=bias,
        dtype=dtype,
        precision="tf32" if dtype == torch.float32 else "ieee",
        x_strides=contiguous_strides(C_in, L_in) if layout == "NCL" else (C_in * L_in, 1, C_in),
        w_strides=contiguous_strides(C_out // groups if transposed else C_in // groups, K),
        y_strides=contiguous_strides(C_out, output_length(L_in, K, *lengths)),
        **sizes,
    )


FP16, BF16 = torch.float16, torch.bfloat16
SEED = problem((64, 64, 224280), 128, 3, stride=3, dilation=4, bias=False)
POSITIONAL = problem((16, 768, 499), 768, 128, padding=64, groups=16, dtype=FP16, layout="NLC")
ENCODER = problem((16, 512, 31999), 512, 3, stride=2, dtype=FP16, bias=False)

CHOICES = {
    "seed": (SEED, "dense"),
    "seed in bf16, NLC": (replace(SEED, dtype=BF16, precision="ieee", x_strides=(64 * 224280, 1, 64)), "dense_persistent"),
    "positional": (POSITIONAL, "dense_runs"),
    "few channels, many taps": (problem((128, 32, 1000), 32, 39, padding=19, bias=False), "dense_runs"),
    "last layer of a vocoder": (problem((8, 32, 220160), 1, 7, padding=3), "dense_few_outputs"),
    "first layer of a codec": (problem((12, 1, 16758), 64, 7, padding=3), "dense_few_inputs"),
    "raw audio, odd rows of y": (problem((16, 1, 160000), 512, 10, stride=5, dtype=FP16), "dense_skewed"),
    "filter bank": (problem((32, 1, 321024), 513, 1024, stride=320, bias=False), "dense_frames"),
    "speech, windows of 250 samples": (problem((16, 1, 160000), 250, 250, stride=160, padding=45), "dense_frames"),
    "strided encoder": (ENCODER, "dense_tma"),
    "32 channels in bf16, NLC": (problem((16, 32, 131072), 32, 7, padding=9, dilation=3, dtype=BF16, layout="NLC"), "dense_tma"),
    "vocoder": (problem((8, 32, 153600), 32, 7, padding=9, dilation=3), "dense_halo"),
    "vocoder in bf16": (problem((16, 64, 65536), 64, 11, padding=25, dilation=5, dtype=BF16), "dense_halo"),
    "codec of 96 channels": (problem((8, 96, 131072), 96, 7, padding=27, dilation=9), "dense_halo"),
    "few taps of many channels": (problem((64, 128, 65536), 128, 3, bias=False), "dense"),
    "few channels, few positions": (problem((1, 32, 4000), 32, 7, padding=3), "dense"),
    "few channels transposed at stride 1": (problem((32, 32, 131072), 64, 5, dilation=3, transposed=True), "dense_halo"),
    "vocoder in NLC": (problem((8, 32, 153600), 32, 3, padding=1, layout="NLC"), "dense_persistent"),
    "depthwise, odd rows of y": (
        problem((8, 5120, 2048), 5120, 4, padding=3, groups=5120, dtype=BF16, layout="NLC"),
        "depthwise_skewed",
    ),
    "depthwise in NLC": (
        problem((8, 2048, 2048), 2048, 3, padding=2, groups=2048, dtype=BF16, layout="NLC"),
        "depthwise_skewed",
    ),
    "depthwise, rows of any length": (problem((8, 5120, 2051), 5120, 4, groups=5120, dtype=BF16), "depthwise_toeplitz"),
    "depthwise, few taps": (problem((8, 5120, 2048), 5120, 9, padding=4, groups=5120, dtype=BF16), "depthwise_vector"),
    "depthwise, spread taps": (problem((8, 512, 4001), 512, 3, padding=128, dilation=128, groups=512), "depthwise"),
    "depthwise, many taps in NLC": (
        problem((16, 512, 1500), 512, 31, padding=15, groups=512, dtype=BF16, layout="NLC"),
        "depthwise_toeplitz",
    ),
    "upsampled by channel": (problem((1, 192, 9010), 192, 12, stride=2, groups=192, transposed=True), "depthwise_toeplitz"),
    "upsampled": (problem((8, 64, 120000), 32, 4, stride=2, transposed=True), "transposed_interleaved"),
    "upsampled in NLC": (problem((8, 256, 2400), 128, 8, stride=4, transposed=True, layout="NLC"), "transposed_interleaved"),
    "upsampled in bf16": (problem((8, 128, 55040), 64, 4, stride=2, padding=1, dtype=BF16, transposed=True), "transposed_tma"),
    "upsampled, phases that read apart": (problem((8, 64, 9600), 64, 4, stride=2, dilation=3, transposed=True), "transposed"),
    "transposed, stride 1": (problem((64, 128, 65536), 128, 3, transposed=True, bias=False), "dense"),
    "transposed, stride 1, many channels": (problem((8, 512, 2000), 512, 3, padding=1, transposed=True), "transposed_tma"),
    "pointwise, bias": (problem((4, 128, 110080), 128, 1), "dense"),
    "pointwise": (problem((4, 128, 110080), 128, 1, bias=False), "aten"),
    "one token": (problem((64, 1024, 5), 1024, 4, groups=1024, dtype=BF16), "depthwise_short"),
    "one token, many taps": (problem((64, 1024, 33), 1024, 32, groups=1024, dtype=BF16), "aten"),
    "long depthwise filter": (problem((32, 512, 750), 512, 63, padding=31, groups=512, dtype=FP16), "depthwise_bands"),
    "long depthwise filter, dilated": (
        problem((32, 512, 750), 512, 31, padding=30, dilation=2, groups=512, dtype=FP16),
        "depthwise_toeplitz",
    ),
    "gradient of a pointwise one, odd rows": (problem((16, 512, 3999), 128, 1, bias=False, transposed=True), "dense"),
    "many channels upsampled": (problem((8, 512, 860), 256, 16, stride=8, padding=4, transposed=True), "transposed_tma"),
    "many channels upsampled, taps left over": (problem((2, 1024, 1024), 512, 16, stride=5, transposed=True), "aten"),
    "many products": (problem((4, 768, 3440), 768, 7, padding=3, bias=False), "dense_tma"),
    "few products of three taps": (problem((1, 256, 100), 256, 3, padding=1, bias=False), "dense"),
    "many products of channels that are no whole blocks": (problem((16, 250, 500), 250, 7, padding=3, bias=False), "dense_tma"),
    "many taps of channels that are no whole blocks": (problem((16, 250, 1000), 250, 48, stride=2, padding=23), "dense_tma"),
    "many products, dilated": (problem((4, 768, 3440), 768, 7, padding=27, dilation=9, bias=False), "dense_tma"),
}


@pytest.mark.parametrize(("problem", "kernel"), CHOICES.values(), ids=CHOICES)
def test_runs_the_kernel_that_was_measured_to_be_fastest(problem, kernel):
    plan = dispatch.plan(problem, H200)
    assert plan.kernel == kernel, plan
    assert plan.is_aten == (plan.config is None)
    assert plan.reason


def test_no_device_or_dtype_of_ours_means_aten_with_the_reason():
    assert dispatch.plan(SEED, None) == dispatch.aten("no kernel of ours runs on this device")
    assert dispatch.plan(replace(SEED, dtype=torch.float64), H200) == dispatch.aten("fp64 is computed by aten")
    assert dispatch.plan(replace(SEED, N=0), H200) == dispatch.aten("the input or the output is empty")


def test_a_plan_depends_on_the_device():
    in_nlc = CHOICES["seed in bf16, NLC"][0]
    assert {plan.kernel for plan in dispatch.candidates(in_nlc, RTX4090)} == {"dense"}
    assert {plan.kernel for plan in dispatch.candidates(in_nlc, H200)} == {"dense", "dense_persistent", "dense_tma"}


def test_x_is_kept_with_its_halo_only_where_its_rows_are_those_of_all_taps():
    vocoder = CHOICES["vocoder"][0]
    changes = {"stride": 2}, {"precision": "ieee"}, {"K": 1}, {"dilation": 50}, {"x_strides": (32 * 153600, 1, 32)}, {"C_in": 40}

    def kernels(problem, device):
        return {plan.kernel for plan in dispatch.candidates(problem, device)}

    assert "dense_halo" in kernels(vocoder, H200)
    for device in (RTX4090, INTERPRETER, replace(H200, capability=100)):
        assert "dense_halo" not in kernels(vocoder, device), device
    for change in changes:
        assert "dense_halo" not in kernels(replace(vocoder, **change), H200), change


@pytest.mark.parametrize("K, dilation, padding", [(3, 1, 1), (7, 3, 9), (11, 5, 25), (41, 1, 0), (4, 9, -3)])
@pytest.mark.parametrize("L_in", [4000, 4001, 4002])
@pytest.mark.parametrize("C_in, C_out", [(32, 16), (64, 64), (64, 128), (96, 96), (128, 40)])
def test_a_tile_with_its_halo_holds_what_its_outputs_read(C_in, C_out, L_in, K, dilation, padding):
    few = problem((8, C_in, L_in), C_out, K, dilation=dilation, padding=padding)
    config = halo_config(few)
    shape = HaloShape.of(few, config)
    assert halo_refusal(few, H200, config) is None
    assert L_in % shape.x_vector == (padding + shape.lead) % shape.x_vector == 0 and 0 <= shape.lead < shape.x_vector
    assert few.L_out % shape.y_vector == shape.step % shape.y_vector == 0
    last = shape.step - 1 + shape.lead + (K - 1) * dilation
    assert shape.step > 0 and last < config.BLOCK_M <= last + 17
    assert (shape.shared_memory + 1024) * config.programs_per_sm <= 228 * 1024


def test_beyond_two_to_the_31_elements_a_faster_aten_is_no_reason():
    small = problem((1, 4, 2**20), 8, 1, bias=False)
    huge = problem((1, 4, 2**29 + 4100), 8, 1, bias=False)
    assert dispatch.plan(small, H200).is_aten
    assert dispatch.plan(huge, H200).kernel == "dense"


def test_the_interpreter_runs_kernels_however_small_the_problem():
    assert dispatch.plan(problem((1, 8, 9), 8, 3), INTERPRETER).kernel == "dense"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x_strides": contiguous_strides(64, 224280)}, "x is not channels-last"),
        ({"x_strides": (64 * 224280, 1, 65)}, "rows of x are not multiples of 16 bytes"),
        ({"aligned": False}, "x or the weight does not start on 16 bytes"),
        ({"dtype": torch.float32}, "float32 is rounded in registers, where a block copy has no gain"),
        ({"C_in": 144, "groups": 2}, "the channels of a group are not a multiple of 16"),
        ({"C_in": 24}, "the channels of a group are not a multiple of 16"),
        ({"L_in": 224281, "padding": 1}, "the stride does not divide the length and the last samples are needed"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_a_tensor_descriptor_cannot_read(change, words):
    accepted = CHOICES["seed in bf16, NLC"][0]
    config = dispatch.tma_config(accepted, H200)
    assert dispatch.tma_refusal(accepted, H200, config) is None
    changed = replace(accepted, **change)
    assert dispatch.tma_refusal(changed, H200, dispatch.tma_config(changed, H200)) == words
    assert dispatch.tma_refusal(accepted, RTX4090, config) == "tensor descriptors need sm_90"


@pytest.mark.parametrize(
    ("channels", "dtype", "block"),
    [(250, torch.float32, 32), (250, BF16, 64), (201, BF16, 32), (80, BF16, 32), (100, torch.float32, 32)],
)
def test_channels_that_are_no_whole_blocks_are_padded_in_a_copy(channels, dtype, block):
    padded = problem((16, channels, 1000), 512, 7, padding=3, dtype=dtype)
    (config,) = (plan.config for plan in dispatch.candidates(padded, H200) if plan.kernel == "dense_tma")
    assert (config.BLOCK_K, config.copy_to_nlc) == (block, True)
    grouped = replace(padded, C_in=2 * channels, groups=2)
    assert dispatch.tma_refusal(grouped, H200, config) == "the channels of a group are not a multiple of 16"


def test_a_weight_that_padding_takes_beyond_two_to_the_31_elements_is_refused():
    large = problem((1, 33, 2**17), 2**10, 2**15, dtype=BF16)
    config = replace(dispatch.tma_config(large, H200), BLOCK_K=32, copy_to_nlc=True)
    assert dispatch.refusal(large) is None
    assert dispatch.tma_refusal(replace(large, C_in=32), H200, config) is None
    assert "padded" in dispatch.tma_refusal(large, H200, config)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"C_in": 2}, "a window is not one row of memory"),
        ({"dilation": 2}, "a window is not one row of memory"),
        ({"precision": "ieee"}, "full float32 is split in registers, where a block copy has no gain"),
        ({"stride": 318}, "windows, x or the weight do not start on 16 bytes"),
        ({"aligned": False}, "windows, x or the weight do not start on 16 bytes"),
        ({"K": 15}, "the taps do not fill a slice of the reduction"),
        ({"K": 65, "C_out": 2**31 // 66}, "the weight has 2^31 elements or more when its rows are padded"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_windows_are_no_rows_of_a_matrix(change, words):
    def refusal(problem, device=H200):
        return thin_refusal("dense_frames", frames_config(problem, device), problem, device)

    accepted = CHOICES["filter bank"][0]
    assert refusal(accepted) is refusal(replace(accepted, K=1021)) is None
    assert refusal(replace(accepted, **change)) == words
    assert refusal(accepted, RTX4090) == "tensor descriptors need sm_90"


@pytest.mark.parametrize("K", [8, 20, 128])
def test_a_slice_of_a_run_spans_taps(K):
    (config,) = (p.config for p in dispatch.candidates(problem((8, 32, 4000), 32, K), H200) if p.kernel == "dense_runs")
    assert config.BLOCK_K == 32


def test_a_transposed_convolution_of_stride_1_is_planned_as_the_plain_one_it_is():
    transposed = problem((2, 64, 4000), 48, 5, padding=3, dilation=2, transposed=True)
    plain = problem((2, 64, 4000), 48, 5, padding=2 * 4 - 3, dilation=2)
    configs = {plan.kernel: plan.config for plan in dispatch.candidates(transposed, H200)}
    expected = {plan.kernel: plan.config for plan in dispatch.candidates(plain, H200)}
    assert expected and expected.items() <= configs.items()
    for change in ({"padding": 9}, {"output_padding": 1}, {"stride": 2}):
        other = replace(transposed, **change)
        assert not any(plan.kernel.startswith("dense") for plan in dispatch.candidates(other, H200)), change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"precision": "ieee"}, "full float32 is split in registers, where a block copy has no gain"),
        ({"C_in": 520}, "the channels of a group are not a multiple of 16"),
        ({"L_in": 2**28}, "the copy of x has 2^31 rows or more"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_block_copies_of_a_transposed_convolution_cannot_read(change, words):
    def refusal(problem, device):
        weave = Weave.of(problem.K, problem.stride, problem.dilation)
        return dispatch.transposed_tma_refusal(problem, weave, device, transposed_tma_config(problem, weave, device))

    accepted = CHOICES["many channels upsampled"][0]
    assert refusal(accepted, H200) is None
    assert refusal(replace(accepted, **change), H200) == words
    assert refusal(accepted, RTX4090) == "tensor descriptors need sm_90"


def test_phases_that_cannot_be_computed_together():
    accepted = CHOICES["upsampled"][0]
    for stride, dilation, words in (
        (4, 6, "neither of stride and dilation divides the other, so phases read different positions"),
        (256, 2, "more phases that lie apart than a tile holds"),
    ):
        changed = replace(accepted, stride=stride, dilation=dilation)
        assert dispatch.interleaved_refusal(changed, Weave.of(changed.K, stride, dilation)) == words
        assert [plan.kernel for plan in dispatch.candidates(changed, H200)] == ["transposed"]


def test_a_repeated_problem_is_planned_once():
    dispatch.plan.cache_clear()
    for _ in range(3):
        dispatch.plan(replace(SEED), H200)
    assert dispatch.plan.cache_info().misses == 1


def rounded(x, C_out, K, **geometry):
    return replace(problem(x, C_out, K, layout="NLC", **geometry), rounded=True)


@pytest.mark.parametrize(
    "found, kernel",
    [
        (rounded((8, 64, 38400), 64, 7, padding=3), "dense_tma"),
        (rounded((8, 128, 9600), 128, 3, padding=1), "dense_tma"),
        (rounded((8, 32, 153600), 32, 3, padding=1), "dense"),
        (rounded((16, 2000, 501), 2000, 1), "dense_tma"),
        (rounded((8, 256, 2400), 128, 8, stride=4, padding=2, transposed=True), "transposed_tma"),
        (problem((8, 64, 38400), 64, 7, padding=3, layout="NLC"), "dense"),
    ],
    ids=lambda value: value.describe() if isinstance(value, Conv1dProblem) else value,
)
def test_rounded_float32_is_read_in_block_copies_without_a_copy_of_it(found, kernel):
    plan = dispatch.fused_plan(found, H200)
    assert plan.kernel == kernel
    assert not plan.config.copy_to_nlc


def test_outputs_stored_channels_last_have_their_channels_in_a_row():
    first = problem((8, 64, 38400), 64, 3, padding=1)
    last = replace(first, y_strides=(64 * 38400, 1, 64))
    assert halo_config(first).weights_left and HaloShape.of(first, halo_config(first)).staged
    assert not halo_config(last).weights_left and not HaloShape.of(last, halo_config(last)).staged
    assert "y is channels-last" in halo_refusal(last, H200, halo_config(first))


POINTWISE, SHORT, LONG = (rounded((8, 128, 9600), 128, K, padding=K // 2) for K in (1, 7, 13))
FIRST = replace(problem((8, 64, 38400), 64, 7, padding=3), rounded=True)
CODEC = [rounded((4, C, 110080), C, 7, padding=3) for C in (96, 160, 192, 320)]
HALF = [
    problem((8, 256, 2400), 256, 3, padding=1, layout="NLC", dtype=BF16),
    problem((4, 192, 110080), 192, 7, padding=3, layout="NLC", dtype=BF16),
    problem((8, 64, 38400), 64, 7, padding=3, layout="NLC", dtype=BF16),
    problem((8, 64, 38400), 64, 11, padding=5, dtype=BF16),
    problem((4, 96, 110080), 96, 7, padding=3, layout="NLC", dtype=BF16),
    problem((8, 320, 30000), 320, 3, padding=1, layout="NLC", dtype=BF16),
]


@pytest.mark.parametrize(
    "found, alone, beside",
    [
        (POINTWISE, "128x128x32 w4 s3", "32x128x64 w4 s2"),
        (rounded((4, 192, 110080), 192, 1), "128x128x32 w8 s3", "64x64x32 w4 s3"),
        (SHORT, "128x128x32 w4 s3", "64x128x32 w4 s4"),
        (LONG, "128x128x32 w4 s3", "128x128x32 w8 s4"),
        (FIRST, "256x64x64 w8 s7 weights_left prefetch", "128x64x64 w8 s7 prefetch"),
        (HALF[0], "128x256x64 w8 s3", "64x128x64 w4 s3"),
        (HALF[1], "64x128+64x64 w4 s3", "64x128+64x64 w4 s3"),
        (HALF[2], "256x64x64 w8 s3 tap_major weights_left", "128x64x64 w4 s3"),
        (HALF[3], "128x64x64 w4 s11 p2 prefetch", "128x64x64 w8 s11 prefetch"),
        (HALF[4], "256x64+32x32 w4 s3", "128x64+32x32 w4 s3"),
        (HALF[5], "128x64x64 w4 s3", "128x64x64 w4 s3"),
        (CODEC[0], "128x64+32x32 w4 s4", "128x64+32x32 w4 s4"),
        (CODEC[1], "128x128+32x32 w8 s4", "128x128+32x32 w8 s4"),
        (CODEC[2], "64x128+64x32 w4 s3", "64x128+64x32 w4 s3"),
        (CODEC[3], "128x256+64x32 w8 s3", "64x256+64x32 w8 s3"),
        (rounded((8, 768, 600), 192, 3, padding=1), "64x128+64x32 w4 s4", "64x128+64x32 w4 s4"),
        (rounded((4, 192, 110080), 96, 4, stride=2, padding=1, transposed=True), "128x128x32 w4 s3", "128x64x32 w8 s3"),
    ],
    ids=lambda value: value.describe() if isinstance(value, Conv1dProblem) else value,
)
def test_a_residual_and_a_second_output_make_tiles_smaller(found, alone, beside):
    plans = [dispatch.fused_plan(found, H200, tiles_beside) for tiles_beside in (False, True)]
    assert [str(plan.config).removesuffix(" tap_major") for plan in plans] == [alone, beside]
    assert all(dispatch.plan_refusal(plan, found, H200) is None for plan in plans)


@pytest.mark.parametrize(("channels", "tile"), [(96, (64, 64, 32)), (128, (32, 128, 0)), (192, None)])
def test_a_pointwise_convolution_that_moves_memory_copies_blocks_for_all_of_its_channels(channels, tile):
    def chosen(problem, beside=True, **how):
        plan = dispatch.fused_plan(problem, H200, beside, **how)
        return (plan.config.BLOCK_M, plan.config.BLOCK_N, plan.config.TAIL_N) if plan.kernel == "dense_tma" else None

    found = rounded((4, channels, 110080), channels, 1)
    assert chosen(found) == tile
    for other in (replace(found, L_in=256), replace(found, rounded=False), rounded((4, 512, 110080), channels, 1)):
        assert chosen(other) != tile or tile is None
    assert chosen(found, halves=True) != tile or tile is None


def test_tiles_of_two_parts_are_for_many_products_of_block_copies():
    def tail(problem, device=H200, **how):
        return dispatch.fused_plan(problem, device, **how).config.TAIL_N

    found = CODEC[2]
    assert tail(found)
    assert not tail(found, halves=True)
    assert not tail(found, RTX4090)
    assert not tail(replace(found, rounded=False))
    assert not tail(replace(found, padding_mode="reflect"))
    for few in (rounded((1, 192, 600), 192, 7), rounded((4, 192, 110080), 192, 1), rounded((4, 64, 110080), 192, 3)):
        assert not tail(few)


def test_a_fused_problem_has_the_plan_of_the_problem_alone_where_that_kernel_fuses():
    alone = problem((8, 256, 9600), 256, 7, padding=3)
    assert dispatch.fused_plan(alone, H200) == dispatch.plan(alone, H200)
    causal = problem((8, 512, 2048), 512, 4, padding=3, groups=512, dtype=torch.bfloat16)
    whole = replace(causal, padding_end=0, y_strides=contiguous_strides(512, 2048))
    assert dispatch.fused_plan(whole, H200).kernel == "depthwise_vector"
    assert dispatch.fused_plan(replace(whole, y_strides=(512 * 2048, 1, 512)), H200).kernel == "depthwise"


def test_resident_weights_leave_no_room_for_a_second_tile():
    seed = problem((64, 64, 224280), 128, 3, stride=3, dilation=4, layout="NLC", dtype=torch.bfloat16)
    assert dispatch.fused_plan(seed, H200).kernel == "dense_persistent"
    assert dispatch.fused_plan(seed, H200, beside=True).kernel != "dense_persistent"


GATES = [
    problem((8, 192, 600), 384, 5, padding=2),
    problem((8, 64, 16000), 128, 2, dilation=4),
    problem((64, 64, 224280), 128, 3, stride=3, dilation=4, layout="NLC", dtype=torch.bfloat16),
    rounded((8, 192, 6000), 384, 5, padding=2),
    problem((16, 1024, 375), 2048, 1, layout="NLC", dtype=torch.bfloat16),
]


@pytest.mark.parametrize("found", GATES, ids=Conv1dProblem.describe)
@pytest.mark.parametrize("beside", [False, True])
def test_halves_of_the_channels_meet_in_kernels_whose_tiles_hold_both(found, beside):
    plan = dispatch.fused_plan(found, H200, beside, halves=True)
    assert plan.kernel in dispatch.HALVING and dispatch.plan_refusal(plan, found, H200) is None


@pytest.mark.parametrize("changes", [{"groups": 2}, {"transposed": True}])
def test_halves_of_grouped_and_of_transposed_convolutions_are_left_to_aten(changes):
    found = dispatch.fused_plan(problem((2, 16, 100), 32, 3, **changes), INTERPRETER, halves=True)
    assert found.is_aten and "halves of the channels" in found.reason


@pytest.mark.parametrize("start, end, length", [(0, 2, 98), (3, -1, 98), (-2, 0, 94)])
def test_padding_may_differ_at_the_ends(start, end, length):
    found = replace(problem((2, 16, 100), 16, 5, padding=start), padding_end=end)
    assert found.L_out == length
    assert f"e{end}" in found.describe()
    transposed = replace(problem((2, 16, 100), 16, 5, stride=2, padding=start, transposed=True), padding_end=end)
    assert transposed.L_out == 99 * 2 + 5 - start - end
    assert (dispatch.refusal(transposed) is None) == (start >= 0)
