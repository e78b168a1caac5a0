"""The test helpers themselves: what they must let through and what they must catch."""

import pytest
import torch

from torch_conv_triton import reference
from torch_conv_triton.problem import layout_of
from torch_conv_triton.testing import (
    CASES,
    LAYOUTS,
    Case,
    assert_within_budget,
    error_budget,
    float32_precision,
    in_nan_buffer,
    make_inputs,
    poisoned_allocations,
    random_cases,
    relative_error,
)

CASE = Case("small", 2, 16, 40, 8, 3, padding=1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_inputs_lie_in_a_buffer_of_nan_in_the_layout_asked_for(layout):
    x, weight, bias = make_inputs(CASE, torch.bfloat16, layout)
    assert layout_of(x.stride(), CASE.C_in, CASE.L_in) == layout
    for tensor in (x, weight, bias):
        buffer = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage())
        assert buffer.isfinite().sum() == tensor.numel() and tensor.isfinite().all()


def test_the_same_seed_gives_the_same_inputs_in_every_layout():
    plain, other = make_inputs(CASE, torch.float32)[0], make_inputs(CASE, torch.float32, "NLC")[0]
    assert torch.equal(plain, other)
    assert not torch.equal(plain, make_inputs(CASE, torch.float32, seed=1)[0])


def test_case_names_are_unique_and_random_cases_repeat():
    assert len({case.name for case in CASES}) == len(CASES)
    assert random_cases(5, seed=1) == random_cases(5, seed=1) != random_cases(5, seed=2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rounding_the_exact_result_is_within_budget(dtype):
    exact = reference.conv1d(*make_inputs(CASE, dtype), *CASE.geometry)
    assert_within_budget(exact.to(dtype), exact)


def test_errors_beyond_the_budget_fail_as_a_whole_and_by_element():
    exact = torch.randn(4, 64, 100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with pytest.raises(AssertionError, match="relative error"):
        assert_within_budget((exact * (1 + 2 * error_budget(torch.float32))).float(), exact)
    one_off = exact.float()
    one_off[0, 0, 0] += 1e-3
    assert relative_error(one_off, exact) < error_budget(torch.float32)
    with pytest.raises(AssertionError, match="an element is off"):
        assert_within_budget(one_off, exact)
    assert_within_budget(one_off, exact, "tf32")


@pytest.mark.parametrize(
    ("actual", "expected"), [(torch.nan, 1.0), (1.0, torch.nan), (torch.inf, -torch.inf), (torch.nan, torch.inf)]
)
def test_non_finite_values_must_be_the_expected_ones(actual, expected):
    exact = torch.ones(3, dtype=torch.float64)
    exact[1] = expected
    computed = torch.ones(3)
    computed[1] = actual
    with pytest.raises(AssertionError, match="NaN or Inf"):
        assert_within_budget(computed, exact)


def test_shapes_must_agree():
    with pytest.raises(AssertionError, match="shape"):
        assert_within_budget(torch.zeros(1, 3), torch.zeros(3, dtype=torch.float64))


def test_poisoned_memory_is_nan_and_only_within_the_context():
    like = torch.zeros(3)
    with poisoned_allocations():
        assert torch.empty(3).isnan().all() and torch.empty_like(like).isnan().all()
        assert like.new_empty(3).isnan().all() and torch.empty_strided((3,), (2,)).isnan().all()
        assert torch.empty(3, dtype=torch.int32).shape == (3,)
    assert torch.empty is not None and "allocate_poisoned" not in torch.empty.__name__


def test_a_read_beside_the_tensor_shows():
    x = in_nan_buffer(torch.ones(2, 3, 4))
    assert x.as_strided(x.shape, x.stride(), x.storage_offset() + 1).isnan().any()


def test_the_precision_switch_is_set_back():
    before = torch.backends.cudnn.conv.fp32_precision
    with float32_precision("ieee"):
        assert torch.backends.cudnn.conv.fp32_precision == "ieee"
    assert torch.backends.cudnn.conv.fp32_precision == before
