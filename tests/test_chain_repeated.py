"""Chains that are called again: all launches in one go, on one block of memory, on tensors of other addresses."""

import pytest
import torch
from chain_cases import BLOCK, block, block_tensors, step
from repeating import repeat_on_a_cpu

from torch_conv_triton import chain, fused
from torch_conv_triton.chain import Chain, conv1d_chain
from torch_conv_triton.kernels import launch as launching
from torch_conv_triton.kernels.launch import rehearsal, rehearsed_together
from torch_conv_triton.testing import assert_within_budget, poisoned_allocations


@pytest.fixture
def repeated(monkeypatch):
    for part in (fused, chain):
        part.forget_plans()
    yield repeat_on_a_cpu(monkeypatch)
    for part in (fused, chain):
        part.forget_plans()


def test_later_calls_compute_what_they_are_given(repeated):
    text = str(BLOCK)
    conv1d_chain(block_tensors(), text)
    repeated.clear()
    for seed in (1, 2):
        tensors = block_tensors(seed=seed)
        with poisoned_allocations():
            returned = conv1d_chain(tensors, text)
        for y, expected in zip(returned, block(*tensors), strict=True):
            assert_within_budget(y, expected, "tf32")
    assert repeated


SQUARE = "max %0 0.0; tf32 %1; out %2 fp32 NLC"


def four_steps(last):
    """Convolutions of one shape; the weight of the last is this one of the tensors."""
    first, *others = [step(i, weight, padding=(3, 3), epilogue=SQUARE) for i, weight in ((0, 1), (5, 2), (6, 3), (7, last))]
    steps = first, *(other._replace(rounded=True) for other in others)
    return Chain(tensors=5, steps=steps, outputs=(1, 1, 1, 1), returned=(8,))


def four_tensors(seed):
    generator = torch.Generator().manual_seed(seed)
    x, *weights = [torch.randn(shape, generator=generator) for shape in ((2, 32, 29), *[(32, 32, 7)] * 4)]
    return [x, *(w / 15 for w in weights)]


def four(tensors, last):
    y = tensors[0].double()
    for weight in (1, 2, 3, last):
        y = torch.nn.functional.conv1d(y, tensors[weight].double(), padding=3).relu()
    return y


DENSE, PACK = "conv1d_dense_fwd_kernel", "pack_taps_kernel"


# float32 that is not rounded beforehand is not packed; a tensor that is given twice is packed again
@pytest.mark.parametrize(
    ("last", "launches"), [(4, [DENSE, PACK, DENSE, DENSE, DENSE]), (2, [DENSE, PACK, DENSE, DENSE, PACK, DENSE])]
)
def test_weights_of_one_shape_are_packed_by_one_launch(repeated, last, launches):
    text = str(four_steps(last))
    conv1d_chain(four_tensors(0), text)
    # steps alike share a recording from the second of them on
    repeated.clear()
    for seed in (1, 2):
        tensors = four_tensors(seed)
        with poisoned_allocations():
            (y,) = conv1d_chain(tensors, text)
        assert_within_budget(y, four(tensors, last), "tf32")
    assert repeated == 2 * launches


def test_the_launch_for_all_weights_is_rehearsed():
    with rehearsal() as launches:
        chain.compute_conv1d_chain(four_tensors(0), str(four_steps(4)))
    ((kernel, (weights, filled, *_), _),) = rehearsed_together(launches)
    assert (kernel.__name__, len(weights), len(filled)) == (PACK, 3, 3)


def test_a_large_weight_is_packed_when_it_is_needed(repeated, monkeypatch):
    monkeypatch.setattr(launching, "MAX_TOGETHER", 2 * 32 * 32 * 7 * 4)
    conv1d_chain(four_tensors(0), str(four_steps(4)))
    repeated.clear()
    conv1d_chain(four_tensors(1), str(four_steps(4)))
    assert repeated == [DENSE, PACK, DENSE, DENSE, PACK, DENSE]
