"""Chains on the GPU: launched as one after the first time, with the same bits, no more memory, under CUDA graphs too."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from chain_cases import BLOCK, block, block_tensors

from torch_conv_triton import chain, explain
from torch_conv_triton.chain import compute_conv1d_chain, conv1d_chain
from torch_conv_triton.testing import assert_within_budget, float32_precision, poisoned_allocations, relative_error

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    chain.forget_plans()


def run_block(tensors):
    with poisoned_allocations():
        returned = conv1d_chain(tensors, str(BLOCK))
    for y, expected in zip(returned, block(*tensors), strict=True):
        assert_within_budget(y, expected, "tf32")
    return returned


@pytest.mark.parametrize("L", [33, 5000])
def test_later_calls_are_launched_as_one(L):
    first = [run_block(block_tensors(L=L, device="cuda", seed=seed)) for seed in range(3)]
    (call,) = chain._calls.values()
    assert call.joined is not None
    chain.forget_plans()
    # step by step, and so with the launches of each step alone
    for seed, returned in enumerate(first):
        chain.forget_plans()
        again = compute_conv1d_chain(block_tensors(L=L, device="cuda", seed=seed), str(BLOCK))
        assert all(torch.equal(a, b) for a, b in zip(again, returned, strict=True))


def test_the_same_memory_and_other_memory():
    tensors = block_tensors(L=2000, device="cuda")
    returned = [run_block(tensors)[0].clone() for _ in range(3)]
    assert all(torch.equal(y, returned[0]) for y in returned)
    # the values change where they are, and then the addresses
    tensors[1].mul_(2)
    doubled = run_block(tensors)[0]
    assert torch.equal(run_block([t.clone() for t in tensors])[0], doubled)


def test_another_alignment_or_stride_is_another_call():
    tensors = block_tensors(L=64, device="cuda")
    run_block(tensors)
    run_block(tensors)
    run_block([tensors[0][:, :, 1:], *tensors[1:]])
    channels_last = tensors[0].transpose(1, 2).contiguous().transpose(1, 2)
    run_block([channels_last, *tensors[1:]])
    assert len(chain._calls) == 3


@pytest.fixture
def frozen():
    return str(replace(BLOCK, constants=(1, 2, 3)))


def test_constant_weights_are_packed_once(frozen):
    tensors = block_tensors(L=2000, device="cuda")
    first = [y.clone() for y in conv1d_chain(tensors, frozen)]
    for _ in range(3):
        assert all(torch.equal(*pair) for pair in zip(conv1d_chain(tensors, frozen), first, strict=True))
    (call,) = chain._calls.values()
    assert call.kept and call.preparation._steps and len(call.joined._steps) < len(call.preparation._steps) + 5
    # others at other addresses, and another stream
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        others = block_tensors(L=2000, device="cuda", seed=stream.cuda_stream % 7 + 1)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            run = conv1d_chain(others, frozen)
        torch.cuda.synchronize()
        for y, expected in zip(run, block(*others), strict=True):
            assert_within_budget(y, expected, "tf32")


def test_a_capture_does_not_rely_on_what_is_kept(frozen):
    tensors = block_tensors(L=500, device="cuda")
    conv1d_chain(tensors, frozen)
    conv1d_chain(tensors, frozen)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        returned = conv1d_chain(tensors, frozen)
    (call,) = chain._calls.values()
    call.kept[0].fill_(255)
    graph.replay()
    for y, expected in zip(returned, block(*tensors), strict=True):
        assert_within_budget(y, expected, "tf32")


def test_few_sizes_keep_what_they_prepared(frozen):
    for L in range(100, 108):
        conv1d_chain(block_tensors(L=L, device="cuda"), frozen)
    assert [bool(call.kept) for call in chain._calls.values()] == 4 * [True] + 4 * [False]


def test_no_samples():
    for _ in range(2):
        returned = conv1d_chain(block_tensors(N=0, device="cuda"), str(BLOCK))
        assert [tuple(y.shape) for y in returned] == [(0, 4, 66), (0, 16, 33)]


def test_a_capture_replays_a_chain():
    tensors = block_tensors(L=500, device="cuda")
    graph = torch.cuda.CUDAGraph()
    run_block(tensors)
    with torch.cuda.graph(graph):
        returned = conv1d_chain(tensors, str(BLOCK))
    tensors[0].copy_(block_tensors(L=500, seed=1)[0])
    graph.replay()
    for y, expected in zip(returned, block(*tensors), strict=True):
        assert_within_budget(y, expected, "tf32")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_chain_runs_where_its_tensors_are():
    for _ in range(3):
        run_block(block_tensors(device="cuda:1"))


class Vocoder(torch.nn.Module):
    """A convolution, two times up, two residual blocks."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Conv1d(80, 128, 7, padding=3)
        self.up = torch.nn.ModuleList(torch.nn.ConvTranspose1d(c, c // 2, 8, 4, padding=2) for c in (128, 64))
        self.convs = torch.nn.ModuleList(torch.nn.Conv1d(c, c, 7, padding=3 * d, dilation=d) for c in (64, 32) for d in (1, 3))
        self.last = torch.nn.Conv1d(32, 1, 7, padding=3)

    def forward(self, x):
        x = self.first(x)
        for i, up in enumerate(self.up):
            x = up(F.leaky_relu(x, 0.1))
            for conv in self.convs[2 * i : 2 * i + 2]:
                x = x + conv(F.leaky_relu(x, 0.1))
        return torch.tanh(self.last(F.leaky_relu(x)))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_vocoder_is_one_chain(mode):
    torch.manual_seed(0)
    model = Vocoder().cuda()
    x = torch.randn(4, 80, 2000, device="cuda")
    with torch.no_grad():
        report = explain(model, x)
        assert all(record.folded.endswith("in a chain of 8") for record in report.records)
        expected = copy.deepcopy(model).double()(x.double())
        with float32_precision("tf32"):
            eager = relative_error(model(x).double(), expected)
            compiled = torch.compile(model, backend="triton_conv", mode=None if mode == "default" else mode)
            for _ in range(4):
                assert relative_error(compiled(x).double(), expected) < 1.2 * eager


def test_a_chain_takes_no_more_memory_than_its_steps():
    torch.manual_seed(0)
    model = Vocoder().cuda()
    x = torch.randn(16, 80, 4000, device="cuda")
    peaks = []
    for joined in (False, True):
        compiled = torch.compile(model, backend="triton_conv", options={"triton_conv.chain": joined})
        with torch.no_grad():
            for _ in range(2):
                compiled(x)
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            compiled(x)
        peaks.append(torch.cuda.max_memory_allocated() - before)
        torch._dynamo.reset()
    assert peaks[1] <= 1.02 * peaks[0]
