"""Copies to NLC and packed weights: every element where it belongs, zeros beyond, for the dtypes whose bits are moved."""

import pytest
import torch

from torch_conv_triton.kernels.layout import channels_last_copy
from torch_conv_triton.kernels.weight_matrix import pack_weight
from torch_conv_triton.testing import poisoned_allocations


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channels", [6, 7, 70])
def test_copies_every_element_and_pads_with_zeros(dtype, channels):
    x = torch.randn(2, channels, 67).to(dtype)
    x[0, 1, 2], x[1, 3, 4] = float("nan"), float("-inf")
    copy = channels_last_copy(x, multiple=4)
    assert copy.stride() == (68 * channels, 1, channels)
    torch.testing.assert_close(copy[:, :, :67], x, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(copy[:, :, 67:], torch.zeros(2, channels, 1, dtype=dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("channels", [6, 7, 70])
def test_fills_up_channels_with_zeros(dtype, channels):
    x = torch.randn(2, channels, 67).to(dtype)
    with poisoned_allocations():
        copy = channels_last_copy(x, multiple=4, channels=16)
    padded = -(-channels // 16) * 16
    assert copy.shape == (2, padded, 68) and copy.stride() == (68 * padded, 1, padded)
    assert torch.equal(copy, torch.nn.functional.pad(x, (0, 1, 0, padded - channels)))


def test_reads_any_strides():
    x = torch.randn(2, 67, 2, 8).transpose(1, 3)[:, :, 1].to(torch.float16)
    assert torch.equal(channels_last_copy(x), x)


def test_rounds_to_tf32_on_the_way_where_asked():
    x = torch.randn(1, 5, 9)
    x[0, 0, :3] = torch.tensor([float("nan"), float("inf"), 1 + 2.0**-11])
    copy = channels_last_copy(x, rounded=True)
    bits = x.view(torch.int32)
    nearest = ((bits + 0x1000) & ~0x1FFF).view(torch.float32)
    nearest[0, 0, :2] = x[0, 0, :2]
    torch.testing.assert_close(copy, nearest, rtol=0, atol=0, equal_nan=True)
    assert nearest[0, 0, 2] == 1 + 2.0**-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tap_major", [True, False])
@pytest.mark.parametrize("C_out, C_in, K", [(5, 6, 1), (70, 6, 3), (5, 70, 7), (3, 65, 40)])
def test_weights_are_packed_in_the_order_of_the_reduction(C_out, C_in, K, tap_major, dtype):
    weight = torch.randn(C_out, K, C_in + 1).to(dtype).transpose(1, 2)[:, 1:]
    with poisoned_allocations():
        packed = pack_weight(weight, tap_major, False, C_in + 10 if tap_major else C_in)
    padded = torch.nn.functional.pad(weight, (0, 0, 0, 10)).transpose(1, 2) if tap_major else weight
    assert torch.equal(packed, padded.reshape(C_out, -1))


@pytest.mark.parametrize("K", [1, 9])
def test_packed_weights_are_rounded_where_asked(K):
    weight = torch.full((2, 3, K), 1 + 2.0**-11)
    assert torch.equal(pack_weight(weight, True, True, 3), torch.full((2, 3 * K), 1 + 2.0**-10))
