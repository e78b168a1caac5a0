"""The chain operator: what it returns, its text, its memory, and what it refuses."""

import weakref
from dataclasses import replace

import pytest
import torch
from chain_cases import BLOCK, block, block_tensors, step

from torch_conv_triton import chain, fused, memory
from torch_conv_triton.chain import conv1d_chain, parse
from torch_conv_triton.testing import assert_within_budget, poisoned_allocations


def test_steps_hand_each_other_what_they_store():
    tensors = block_tensors()
    with poisoned_allocations():
        returned = conv1d_chain(tensors, str(BLOCK))
    for y, expected in zip(returned, block(*tensors), strict=True):
        assert_within_budget(y, expected, "tf32")
    assert [y.stride() for y in returned] == [(4 * 66, 66, 1), (16 * 33, 1, 16)]


def test_a_chain_of_one_result_may_return_it_without_a_list():
    arguments = block_tensors(), str(replace(BLOCK, returned=(8,)))
    (expected,) = conv1d_chain(*arguments)
    assert torch.equal(torch.ops.triton_conv.conv1d_chain.one(*arguments), expected)
    torch.library.opcheck(torch.ops.triton_conv.conv1d_chain.one, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("N", [0, 2])
def test_the_operator_keeps_its_contract(N):
    arguments = block_tensors(N), str(BLOCK)
    torch.library.opcheck(conv1d_chain, arguments, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))


def test_a_chain_is_read_from_its_text():
    assert parse(str(BLOCK)) == BLOCK


def test_what_no_later_step_reads_is_freed(monkeypatch):
    made, alive = [], []
    uninitialised, find_call = memory.uninitialised, fused.find_call

    def allocate(*arguments):
        tensor = uninitialised(*arguments)
        made.append(weakref.ref(tensor))
        return tensor

    def next_step(*arguments):
        alive.append(sum(tensor() is not None for tensor in made))
        return find_call(*arguments)

    monkeypatch.setattr(memory, "uninitialised", allocate)
    monkeypatch.setattr(fused, "find_call", next_step)
    conv1d_chain(block_tensors(), str(replace(BLOCK, returned=(8,))))
    assert alive == [0, 2, 1]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"steps": (step(5, 1),), "outputs": (1,)}, "step 0 of the chain reads a tensor that is not there yet"),
        ({"steps": (step(0, 1, operands=[-1]),), "outputs": (1,)}, "step 0 of the chain reads a tensor that is not there yet"),
        ({"returned": (9,)}, r"the chain returns a tensor that is not there: \(9,\)"),
        ({"tensors": 5, "returned": (3, 8)}, "the chain takes 5 tensors, but got 4"),
    ],
)
def test_chains_without_meaning_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        conv1d_chain(block_tensors()[: 4 if "tensors" in changes else 5], str(replace(BLOCK, **changes)))


def test_a_step_is_checked_as_the_fused_operator_is():
    tensors = block_tensors()
    tensors[1] = tensors[1][:, :4]
    with pytest.raises(RuntimeError, match="expected input"):
        conv1d_chain(tensors, str(BLOCK))


def test_plans_are_forgotten_with_the_tables():
    conv1d_chain(block_tensors(), str(BLOCK))
    assert chain._calls
    chain.forget_plans()
    assert not chain._calls
