"""The description of a convolution: sizes, layouts, work, words, precision, and the errors of arguments that describe none."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from torch_conv_triton.problem import (
    Conv1dProblem,
    ceil_pow2,
    check_arguments,
    layout_of,
    output_length,
    single,
)
from torch_conv_triton.testing import CASES


def problem(x=(2, 8, 20), weight=(6, 8, 3), bias=None, dtype=torch.float32, **geometry):
    """A problem whose tensors hold no memory."""
    arguments = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1} | geometry
    tensors = [None if shape is None else torch.empty(shape, dtype=dtype, device="meta") for shape in (x, weight, bias)]
    return Conv1dProblem.from_tensors(*tensors, **arguments)


def test_sizes_and_strides_of_a_convolution():
    p = problem(x=(2, 8, 20), weight=(6, 4, 3), bias=(6,), stride=2, padding=1, dilation=3, groups=2)
    assert (p.N, p.C_in, p.L_in, p.C_out, p.K, p.L_out) == (2, 8, 20, 6, 3, 8)
    assert (p.C_in_per_group, p.C_out_per_group, p.has_bias) == (4, 3, True)
    assert (p.x_strides, p.w_strides, p.y_strides) == ((160, 20, 1), (12, 3, 1), (48, 8, 1))


def test_sizes_of_a_transposed_convolution():
    p = problem(x=(2, 8, 20), weight=(8, 3, 4), stride=2, padding=1, groups=2, transposed=True, output_padding=1)
    assert (p.C_in, p.C_out, p.K, p.L_out, p.has_bias) == (8, 6, 4, 41, False)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_length_is_that_of_aten(case):
    x, weight = torch.empty(1, case.C_in, case.L_in, device="meta"), torch.empty(case.weight_shape, device="meta")
    expected = case.operator(torch.nn.functional)(x, weight, None).shape[2]
    lengths = case.L_in, case.K, case.stride, case.padding, case.dilation, case.transposed, case.output_padding
    assert output_length(*lengths) == expected


@pytest.mark.parametrize(
    ("strides", "C", "L", "layout"),
    [
        ((160, 20, 1), 8, 20, "NCL"),
        ((999, 50, 1), 8, 20, "NCL"),
        ((160, 1, 8), 8, 20, "NLC"),
        ((20, 20, 1), 1, 20, "NCL"),
        ((20, 1, 8), 1, 20, "NLC"),
        ((8, 1, 8), 8, 1, "NCL"),
        ((320, 40, 2), 8, 20, "strided"),
        ((0, 0, 0), 8, 20, "strided"),
    ],
)
def test_layout_follows_the_strides(strides, C, L, layout):
    assert layout_of(strides, C, L) == layout


@pytest.mark.parametrize(
    ("sizes", "regime"),
    [
        ({"x": (1, 16, 20), "weight": (16, 16, 3)}, "dense"),
        ({"x": (1, 16, 20), "weight": (16, 16, 3), "dilation": 2}, "dilated"),
        ({"x": (1, 16, 20), "weight": (16, 16, 3), "stride": 2, "dilation": 2}, "strided"),
        ({"x": (1, 16, 20), "weight": (16, 16, 1)}, "pointwise"),
        ({"x": (1, 16, 20), "weight": (16, 16, 1), "stride": 2}, "strided"),
        ({"x": (1, 8, 20), "weight": (16, 8, 3)}, "tiny_C_in"),
        ({"x": (1, 16, 20), "weight": (8, 16, 3)}, "tiny_C_out"),
        ({"x": (1, 16, 20), "weight": (16, 8, 3), "groups": 2}, "grouped"),
        ({"x": (1, 16, 20), "weight": (16, 1, 3), "groups": 16}, "depthwise"),
        ({"x": (1, 16, 20), "weight": (32, 1, 3), "groups": 16}, "depthwise"),
        ({"x": (1, 16, 20), "weight": (16, 16, 3), "transposed": True}, "transposed_dense"),
        ({"x": (1, 16, 20), "weight": (16, 1, 3), "groups": 16, "transposed": True}, "transposed_depthwise"),
        ({"x": (1, 1, 20), "weight": (1, 1, 3)}, "tiny_C_in"),
    ],
)
def test_regime_is_the_family_of_the_workload(sizes, regime):
    assert problem(**sizes).regime == regime


def test_work_is_counted_in_flops_and_in_bytes_moved_once():
    p = problem(x=(2, 8, 20), weight=(6, 4, 3), bias=(6,), dtype=torch.bfloat16, groups=2)
    assert p.flops == 2 * (2 * 6 * 18) * (4 * 3)
    assert p.bytes == 2 * (2 * 8 * 20 + 6 * 4 * 3 + 6 + 2 * 6 * 18)
    transposed = problem(x=(2, 8, 20), weight=(8, 3, 4), stride=2, transposed=True)
    assert transposed.flops == 2 * (2 * 8 * 20) * (3 * 4)


def test_floor_is_the_slower_of_memory_and_arithmetic_and_memory_alone_for_depthwise():
    p = problem(x=(1, 16, 20), weight=(16, 16, 3))
    assert p.floor_ms(1e3 * p.bytes, 1e12) == pytest.approx(1)
    assert p.floor_ms(1e18, 1e3 * p.flops) == pytest.approx(1)
    depthwise = problem(x=(1, 16, 20), weight=(16, 1, 3), groups=16)
    assert depthwise.floor_ms(1e3 * depthwise.bytes, 1) == pytest.approx(1)


def test_description_is_one_line_in_the_fields_terms():
    p = problem(x=(8, 768, 499), weight=(768, 48, 128), dtype=torch.bfloat16, padding=64, groups=16)
    assert p.describe() == "8x768x499 -> 768 K128 p64 g16 bf16 NCL"
    p = replace(p, x_strides=(768 * 499, 1, 768), stride=2, dilation=3, transposed=True, output_padding=1)
    assert p.describe() == "8x768x499 -> 768 K128 s2 p64 d3 op1 g16 transposed bf16 NLC"


def test_ceil_pow2():
    assert [ceil_pow2(n) for n in (0, 1, 2, 3, 4, 5, 1024, 1025)] == [0, 1, 2, 4, 4, 8, 1024, 2048]


def test_tensors_that_start_off_16_bytes_are_not_aligned():
    buffer = torch.empty(2 * 8 * 20 + 1, device="meta")
    x, weight = buffer[:-1].view(2, 8, 20), torch.empty(6, 8, 3, device="meta")
    assert Conv1dProblem.from_tensors(x, weight, None, 1, 0, 1, 1).aligned
    assert not Conv1dProblem.from_tensors(buffer[1:].view(2, 8, 20), weight, None, 1, 0, 1, 1).aligned
    # memory that another library handed over may start anywhere, whatever its offset says
    handed_over = torch.from_dlpack(torch.empty(2 * 8 * 20 + 1)[1:].view(2, 8, 20).numpy())
    assert handed_over.storage_offset() == 0
    assert not Conv1dProblem.from_tensors(handed_over, torch.empty(6, 8, 3), None, 1, 0, 1, 1).aligned


@pytest.mark.parametrize(
    ("statement", "precision"),
    [
        ("", "tf32"),
        ("torch.backends.cudnn.conv.fp32_precision = 'ieee'", "ieee"),
        ("torch.backends.cudnn.conv.fp32_precision = 'none'", "ieee"),
        ("torch.backends.cudnn.allow_tf32 = False", "ieee"),
        ("torch.backends.cuda.matmul.fp32_precision = 'ieee'", "tf32"),
        ("torch.backends.cuda.matmul.allow_tf32 = False", "tf32"),
    ],
)
def test_float32_precision_follows_cudnns_convolution_switch(statement, precision):
    # a switch that was ever set no longer follows the one above it, so each is set in a process of its own
    script = f"""
import torch
from torch_conv_triton.problem import current_precision
{statement}
print(current_precision(torch.float32), current_precision(torch.bfloat16))
"""
    printed = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert printed.split() == [precision, "ieee"]


def test_single_takes_an_integer_or_a_list_of_one():
    assert (single(3, "stride"), single([3], "stride"), single((3,), "stride")) == (3, 3, 3)
    with pytest.raises(RuntimeError, match=r"stride=\[1, 2\]"):
        single([1, 2], "stride")


VALID = {"x": (2, 8, 20), "weight": (6, 4, 3), "bias": (6,), "stride": 1, "padding": 0, "dilation": 1, "groups": 2}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (8,)}, r"2D \(unbatched\) or 3D \(batched\) input to conv1d, but got input of size: \[8\]"),
        ({"x": (2, 8, 20, 1)}, r"input of size: \[2, 8, 20, 1\]"),
        ({"weight": (6, 4)}, r"weight of size \[6, 4\]"),
        ({"weight": (6, 4, 3, 1)}, r"3-dimensional weight, but got weight of size \[6, 4, 3, 1\]"),
        ({"weight": (6, 4, 0)}, r"Kernel size can't be zero, but got weight of size \[6, 4, 0\]"),
        ({"weight": (6, 5, 3)}, r"to have 10 channels, but got 8 channels instead"),
        ({"weight": (5, 4, 3), "bias": None}, r"groups=2, expected weight to be divisible by 2 at dimension 0"),
        ({"weight": (1, 4, 3), "bias": None}, r"groups=2, expected weight to be at least 2 at dimension 0"),
        ({"bias": (5,)}, r"expected bias to be 1-dimensional with 6 elements, but got bias of size \[5\]"),
        ({"bias": (6, 1)}, r"bias of size \[6, 1\]"),
        ({"stride": 0}, "stride=0"),
        ({"stride": -1}, "stride=-1"),
        ({"padding": -1}, "padding=-1"),
        ({"dilation": 0}, "dilation=0"),
        ({"groups": 0}, "groups=0"),
        ({"groups": -2}, "groups=-2"),
        ({"x": (2, 8, 2)}, r"padded input size per channel: \(2\). Kernel size: \(3\)"),
        ({"dilation": 10}, r"Kernel size: \(21\)"),
    ],
)
def test_errors_are_those_of_torch_and_name_argument_and_value(change, message):
    arguments = VALID | change
    tensors = [None if arguments[n] is None else torch.zeros(arguments[n]) for n in ("x", "weight", "bias")]
    geometry = [arguments[n] for n in ("stride", "padding", "dilation", "groups")]
    with pytest.raises(RuntimeError, match=message):
        check_arguments(*tensors, *geometry)
    with pytest.raises(RuntimeError):
        torch.nn.functional.conv1d(*tensors, *geometry)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (8,)}, r"input to conv_transpose1d, but got input of size: \[8\]"),
        ({"weight": (6, 3, 3)}, r"to have 6 channels, but got 8 channels instead"),
        ({"weight": (7, 3, 3)}, "expected weight to be divisible by 2 at dimension 0"),
        ({"bias": (5,)}, r"expected bias to be 1-dimensional with 6 elements"),
        ({"output_padding": 2}, "output_padding=2, stride=2, dilation=1"),
        ({"output_padding": -1}, "output_padding=-1"),
        ({"padding": 30}, "calculated output length -19 is too small"),
    ],
)
def test_errors_of_the_transposed_convolution(change, message):
    arguments = {
        "x": (2, 8, 20),
        "weight": (8, 3, 3),
        "bias": (6,),
        "stride": 2,
        "padding": 0,
        "dilation": 1,
        "groups": 2,
        "output_padding": 0,
    }
    arguments |= change
    tensors = [torch.zeros(arguments.pop(n)) for n in ("x", "weight", "bias")]
    with pytest.raises(RuntimeError, match=message):
        check_arguments(*tensors, **arguments, transposed=True)
    with pytest.raises(RuntimeError):
        torch.nn.functional.conv_transpose1d(*tensors, **arguments)


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize(("change", "message"), [({"dtype": torch.float16}, "type"), ({"device": "meta"}, "device")])
def test_tensors_must_share_dtype_and_device(name, change, message):
    tensors = {"x": torch.zeros(2, 8, 20), "weight": torch.zeros(6, 8, 3), "bias": torch.zeros(6)}
    tensors[name] = tensors[name].to(**change)
    with pytest.raises(RuntimeError, match=f"{message}.*{name} {message}"):
        check_arguments(**tensors, stride=1, padding=0, dilation=1, groups=1)
