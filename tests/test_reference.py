"""The reference against sums written out by hand and against aten's own float64."""

import pytest
import torch

from torch_conv_triton import reference
from torch_conv_triton.testing import CASES, make_inputs, random_cases


def test_a_convolution_by_hand():
    x = torch.tensor([[[1.0, 2.0, 3.0, 4.0]]])
    weight = torch.tensor([[[10.0, 1.0]]])
    bias = torch.tensor([0.5])
    assert reference.conv1d(x, weight, bias, 1, 0, 1, 1).tolist() == [[[12.5, 23.5, 34.5]]]
    assert reference.conv1d(x, weight, None, 2, 1, 1, 1).tolist() == [[[1, 23, 40]]]
    assert reference.conv1d(x, weight, None, 1, 0, 3, 1).tolist() == [[[14]]]


def test_a_transposed_convolution_by_hand():
    x = torch.tensor([[[1.0, 2.0]]])
    weight = torch.tensor([[[10.0, 1.0, 5.0]]])
    assert reference.conv1d(x, weight, None, 2, 0, 1, 1, True, 1).tolist() == [[[10, 1, 25, 2, 10, 0]]]
    assert reference.conv1d(x, weight, None, 2, 1, 1, 1, True).tolist() == [[[1, 25, 2]]]


def test_groups_are_convolutions_of_their_own():
    x, weight = torch.randn(2, 6, 9), torch.randn(4, 3, 3)
    whole = reference.conv1d(x, weight, None, 1, 1, 1, 2)
    parts = [reference.conv1d(x[:, 3 * i : 3 * i + 3], weight[2 * i : 2 * i + 2], None, 1, 1, 1, 1) for i in range(2)]
    torch.testing.assert_close(whole, torch.cat(parts, dim=1))


@pytest.mark.parametrize("case", CASES + random_cases(40, seed=3), ids=str)
def test_agrees_with_aten_in_float64(case):
    x, weight, bias = make_inputs(case, torch.float64)
    y = reference.conv1d(x, weight, bias, *case.geometry)
    torch.testing.assert_close(y, case.operator(torch.nn.functional)(x, weight, bias))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int32])
def test_computes_in_float64_whatever_comes_in(dtype):
    x, weight = torch.randn(1, 3, 8).mul(8).to(dtype), torch.randn(2, 3, 3).mul(8).to(dtype)
    y = reference.conv1d(x, weight, None, 1, 1, 1, 1)
    assert y.dtype == torch.float64
    torch.testing.assert_close(y, reference.conv1d(x.double(), weight.double(), None, 1, 1, 1, 1), rtol=0, atol=0)


def test_raises_for_arguments_that_describe_no_convolution():
    with pytest.raises(RuntimeError, match="stride=0"):
        reference.conv1d(torch.zeros(1, 1, 4), torch.zeros(1, 1, 2), None, 0, 0, 1, 1)
