"""The benchmark on a GPU: that it measures, checks, and outlives faults. What the times are is not tested."""

from dataclasses import replace

import pytest
import torch

import torch_conv_triton
from torch_conv_triton.bench import run_models, run_suite
from torch_conv_triton.bench.measure import describe_machine
from torch_conv_triton.bench.peers import QUICK_PEERS
from torch_conv_triton.bench.results import load
from torch_conv_triton.bench.suite import case_from_shape
from torch_conv_triton.bench.timing import Timing
from torch_conv_triton.bench.wall import MODES, run_wall, small_cases
from torch_conv_triton.bench.worker import Worker, WorkerError

pytestmark = pytest.mark.gpu

CASES = (
    replace(case_from_shape("4x64x300", "32x64x3", padding=1, bias=True, layout="NLC", dtype="fp16"), name="dense"),
    replace(case_from_shape("4x16x300", "16x8x4", stride=2, padding=1, transposed=True), name="transposed"),
)


@pytest.mark.parametrize("backward", [False, True])
def test_every_case_is_checked_and_timed_beside_its_peers(tmp_path, backward):
    path = tmp_path / "results.json"
    result = run_suite(CASES, QUICK_PEERS, backward=backward, rounds=2, ms=5, out=path)
    assert result.passed
    assert load(path) == result
    for case in result.cases:
        assert tuple(case.peers) == QUICK_PEERS
        assert all(isinstance(found, Timing) and found.median_ms > 0 for found in (case.ours, *case.peers.values()))
        assert case.accuracy.passed
    assert min(result.ceilings.values()) > 0


def test_a_wrong_output_is_not_timed(monkeypatch):
    def wrong(*args, **kwargs):
        y = torch.nn.functional.conv1d(*args, **kwargs)
        y[-1, -1, -1] = float("nan")
        return y

    monkeypatch.setattr(torch_conv_triton, "conv1d", wrong)
    (case,) = run_suite(CASES[:1], ms=5, isolate=False).cases
    assert (case.status, case.ours, case.peers) == ("wrong", None, {})


def fault():
    torch.zeros(1, device="cuda")[torch.tensor([5], device="cuda")].cpu()


def test_a_fault_on_the_device_costs_one_call():
    with Worker(timeout_s=120) as worker:
        with pytest.raises(WorkerError):
            worker.call(fault)
        assert worker.call(describe_machine)["gpu"] == torch.cuda.get_device_name()


@pytest.mark.parametrize("train", [False, True])
def test_a_model_runs_three_ways_and_is_right(tmp_path, train):
    (result,) = run_models(["wav2vec2_base"], "fp32", size="small", train=train, rounds=1, ms=10, out=tmp_path / "models.json")
    assert (result.status, result.message) == ("ok", "")
    # the smallest are left to aten
    assert 0 < result.rewritten <= result.convolutions
    assert all(not isinstance(found, str) for found in result.ways.values())


def test_a_small_convolution_is_checked_and_timed_in_every_mode(tmp_path):
    results = run_wall(small_cases()[1:2], rounds=1, ms=1, out=tmp_path / "wall.json")
    assert [(result.layers, result.mode) for result in results] == [(layers, mode) for layers in (1, 4) for mode in MODES]
    assert [(result.status, result.message) for result in results] == [("ok", "")] * len(results)
    assert all(result.ratio > 0 and result.kernels for result in results)
