"""Tuning on a GPU: it measures a problem once, dispatch uses what it found, and faults cost one plan. Times are not tested."""

import logging
from dataclasses import replace

import pytest
import torch
from torch import nn

from torch_conv_triton import dispatch, dispatch_gradients, execute, gradients, reference, testing
from torch_conv_triton.bench.suite import case_from_shape
from torch_conv_triton.cli import main
from torch_conv_triton.configs import Config
from torch_conv_triton.dispatch import Plan
from torch_conv_triton.tuning import compile_time, search, tables
from torch_conv_triton.tuning.laboratory import Workers
from torch_conv_triton.tuning.tables import Entry
from torch_conv_triton.tuning.tuner import tune

pytestmark = pytest.mark.gpu

CASE = case_from_shape("4x64x300", "32x64x3", padding=1, bias=True, dtype="fp16")


@pytest.fixture(autouse=True)
def own_tables(tmp_path, monkeypatch):
    """Tables in a directory of their own."""
    monkeypatch.setenv(tables.CACHE_VARIABLE, str(tmp_path))
    forget()
    yield
    forget()


def forget():
    tables.forget()
    execute.forget_plans()
    gradients.forget_plans()


@pytest.fixture
def few_plans(monkeypatch):
    """The first and the last plans of a search, which are aten's."""
    every = search.plans
    monkeypatch.setattr(search, "plans", lambda *args: every(*args)[:3] + every(*args)[-2:])


@pytest.fixture
def device():
    return torch.device("cuda", torch.cuda.current_device())


def test_a_problem_is_tuned_once_and_then_runs_by_the_table(device, few_plans):
    gpu = dispatch.device_for(device)
    path, problem = tables.user_path(gpu.name), CASE.problem()
    with Workers(device, jobs=2) as laboratory:
        (outcome,) = tune([("case", problem)], gpu, path, laboratory)
        (again,) = tune([("case", problem)], gpu, path, laboratory)
    assert (outcome.status, outcome.wrong, outcome.tried) == ("tuned", (), 5)
    assert (again.status, again.tried) == ("known", 0)
    assert outcome.entry.ms > 0 and outcome.entry.aten_ms > 0
    plan = dispatch.plan(problem, gpu)
    assert (plan.kernel, plan.config, plan.tuned) == (outcome.entry.kernel, outcome.entry.config, True)


def test_the_gradients_of_a_case_are_tuned_apart(device, few_plans):
    gpu = dispatch.device_for(device)
    problems = [(problem.kind, problem) for problem in CASE.gradient_problems()]
    with Workers(device, jobs=2) as laboratory:
        outcomes = list(tune(problems, gpu, tables.user_path(gpu.name), laboratory))
    assert [(outcome.name, outcome.status, outcome.wrong) for outcome in outcomes] == [
        ("input_grad", "tuned", ()),
        ("weight_grad", "tuned", ()),
    ]
    plans = dispatch_gradients.plan_input_grad(problems[0][1], gpu), dispatch_gradients.plan_weight_grad(problems[1][1], gpu)
    for plan, outcome in zip(plans, outcomes, strict=True):
        assert (plan.kernel, plan.config, plan.tuned) == (outcome.entry.kernel, outcome.entry.config, True)


def test_a_plan_that_cannot_run_costs_itself(device):
    problem = CASE.problem()
    gpu = dispatch.device_for(device)
    right = dispatch.candidates(problem, gpu)[-1]
    # more shared memory than a block has
    wrong = Plan("dense", Config(128, 128, 128, 8, 8, tap_major=True), "wrong")
    with Workers(device, jobs=1) as laboratory:
        faults = laboratory.check([(problem, wrong), (problem, right), (problem, replace(wrong, kernel="aten"))])
    assert faults[0] is not None
    assert faults[1:] == [None, None]


@pytest.mark.parametrize("layout", ["NCL", "NLC"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "case",
    [case for case in testing.CASES if case.N and case.name in ("dense", "odd_everything", "transposed", "tiny_both")],
    ids=str,
)
def test_aten_on_channels_last_views_is_right_and_contiguous(case, dtype, layout, device):
    def run(x, weight, bias):
        y = execute.forward_with(Plan("aten_nhwc", None, "asked"), case.problem(x, weight, bias), x, weight, bias)
        assert y.is_contiguous()
        return y

    testing.check_case(case, run, dtype, layout, device)


def test_max_autotune_tunes_while_it_compiles(device, few_plans, monkeypatch, caplog):
    torch._dynamo.reset()
    monkeypatch.delenv(compile_time.OFF_VARIABLE)
    monkeypatch.setattr(compile_time, "default_jobs", lambda: 2)
    model = nn.Conv1d(64, 32, 3, padding=1, device=device, dtype=torch.float16)
    x = torch.randn(4, 64, 300, device=device, dtype=torch.float16)
    gpu = dispatch.device_for(device)
    options = {"triton_conv.tune": True, "fx_graph_cache": False}
    with torch.no_grad(), caplog.at_level(logging.INFO, logger="torch_conv_triton"):
        y = torch.compile(model, backend="triton_conv", options=options)(x)
    assert len(tables.read(tables.user_path(gpu.name))) == 2  # with the bias and without it
    assert "tuning 2 kinds of convolutions" in caplog.text
    testing.assert_within_budget(y, reference.conv1d(x, model.weight, model.bias, 1, 1, 1, 1))


def test_nothing_is_tuned_while_a_graph_is_captured(device, monkeypatch, caplog):
    monkeypatch.delenv(compile_time.OFF_VARIABLE)
    graph = torch.cuda.CUDAGraph()
    x = torch.zeros(1, device=device)
    with torch.cuda.graph(graph):
        x += 1
        compile_time.tune_while_compiling([CASE.problem()], device)
    assert "a CUDA graph is captured: 1 kinds of convolutions are not tuned" in caplog.text
    assert tables.read(tables.user_path(dispatch.device_for(device).name)) == {}


def test_the_command_writes_the_table_that_it_is_told_to(tmp_path, few_plans, capsys):
    path = tmp_path / "mine.json"
    shape = ["--shape", "4x64x300", "--weight", "32x64x3", "--padding", "1", "--dtype", "fp16"]
    assert main(["tune", *shape, "--output", str(path), "--jobs", "2"]) == 0
    assert "1 of 1 tuned, 0 failed" in capsys.readouterr().out
    (record,) = tables.read(path).values()
    assert Entry.from_record(record).ms > 0
