"""The report and `explain`: text, JSON, what is recorded, and that explaining leaves no trace."""

import json

import pytest
import torch
import torch.nn.functional as F
from compiling import run_python
from expecttest import assert_expected_inline
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from torch_conv_triton.backend import triton_conv
from torch_conv_triton.configs_gradients import WeightGradConfig
from torch_conv_triton.dispatch import Plan
from torch_conv_triton.explain import explain
from torch_conv_triton.graph.report import ConvRecord, Report
from torch_conv_triton.problem import Conv1dProblem


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    torch.manual_seed(0)


def record(**changes) -> ConvRecord:
    fields = {
        "module": "encoder.0",
        "kind": "forward",
        "convolution": "2x4x16 -> 6 K3 p1 bf16 NLC",
        "dtype": "bf16",
        "layout": "NLC",
        "decision": "rewritten",
        "kernel": "dense",
        "config": "64x16x16 w4 s3",
        "reason": "implicit GEMM",
    }
    return ConvRecord(**{**fields, **changes})


REPORT = Report(
    records=(
        record(),
        record(module="", kernel="aten", config="", decision="kept", reason="fp64 is computed by aten"),
        record(kind="weight_grad", kernel="aten", config="", reason="computed by aten"),
    ),
    graphs=2,
)


@pytest.mark.parametrize(
    ("kernel", "splits", "words"),
    [("weight_grad", 1, ""), ("weight_grad", 100, ", 4.7 MiB of sums"), ("weight_grad_banded", 1, ", 1 MiB of sums")],
)
def test_a_gradient_s_plan_states_the_memory_of_its_partial_sums(kernel, splits, words):
    sizes = (2, 64, 100), (64, 64, 3)
    problem = Conv1dProblem.from_tensors(*(torch.empty(size, device="meta") for size in sizes), None, 1, 1, 1, 1, False)
    plan = Plan(kernel, WeightGradConfig(64, 64, 32, splits=splits), "by rule")
    assert ConvRecord.of("", "weight_grad", problem, rewritten=True, plan=plan).config == f"{plan.config}{words}"


def test_table_has_a_line_for_each_convolution_and_the_totals():
    assert_expected_inline(
        str(REPORT),
        """\
module     kind         convolution                 decision   folded  kernel  config          reason
encoder.0  forward      2x4x16 -> 6 K3 p1 bf16 NLC  rewritten          dense   64x16x16 w4 s3  implicit GEMM
-          forward      2x4x16 -> 6 K3 p1 bf16 NLC  kept               aten                    fp64 is computed by aten
encoder.0  weight_grad  2x4x16 -> 6 K3 p1 bf16 NLC  rewritten          aten                    computed by aten
2 1-D convolutions and 1 gradients: 2 rewritten, 1 kept, 1 run by our kernels; 2 graphs, 1 graph breaks""",
    )


def test_report_without_convolutions_is_its_totals():
    assert_expected_inline(
        str(Report((), graphs=1)),
        """0 1-D convolutions and 0 gradients: 0 rewritten, 0 kept, 0 run by our kernels; 1 graphs, 0 graph breaks""",
    )


def test_report_as_json():
    data = json.loads(json.dumps(REPORT.to_dict()))
    assert data["totals"] == {
        "convolutions": 2,
        "gradients": 1,
        "rewritten": 2,
        "kept": 1,
        "our_kernels": 1,
        "graphs": 2,
        "graph_breaks": 1,
    }
    assert ConvRecord(**data["records"][0]) == REPORT.records[0]


def test_text_is_printed_where_the_output_is_no_terminal(capsys):
    REPORT.print()
    assert capsys.readouterr().out == f"{REPORT}\n"


def test_rich_draws_the_table_in_a_terminal(capsys, monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "200")
    REPORT.print()
    drawn = capsys.readouterr().out
    assert drawn != f"{REPORT}\n"
    assert all(text in drawn for text in ("encoder.0", "2x4x16 -> 6 K3 p1 bf16 NLC", "fp64 is computed by aten", "2 rewritten"))


class Model(nn.Module):
    """Convolutions in modules, one called by hand, one of two dimensions, one over a channels-last input."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Conv1d(4, 6, 3, padding=1), nn.ReLU())])
        self.up = nn.ConvTranspose1d(6, 4, 4, stride=2, padding=1)
        self.image = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x):
        y = self.up(self.blocks[0](x))
        y = F.conv1d(y, self.up.weight.mean(2, keepdim=True))
        return self.image(y[:, None])


FORWARD = [
    ("blocks.0.0", "forward", "2x4x8 -> 6 K3 p1 fp32 NCL", "rewritten"),
    ("up", "forward", "2x6x8 -> 4 K4 s2 p1 transposed fp32 NCL", "rewritten"),
    ("", "forward", "2x4x16 -> 6 K1 fp32 NCL", "rewritten"),
]


def seen(report: Report) -> list[tuple[str, str, str, str]]:
    return [(r.module, r.kind, r.convolution, r.decision) for r in report.records]


def test_explain_prints_and_returns_what_happened_to_each_convolution(capsys):
    with torch.no_grad():
        report = explain(Model(), torch.randn(2, 4, 8))
    assert capsys.readouterr().out == f"{report}\n"
    assert seen(report) == FORWARD
    assert [r.kernel for r in report.records] == ["dense", "transposed", "dense"]
    assert (report.graphs, report.graph_breaks) == (1, 0)


def test_explain_backward_names_the_module_of_each_gradient():
    model = Model()
    report = explain(model, torch.randn(2, 4, 8), backward=True)
    gradients = [(r.module, r.kind) for r in report.records[len(FORWARD) :]]
    assert seen(report)[: len(FORWARD)] == FORWARD
    assert gradients == [
        ("", "input_grad"),
        ("", "weight_grad"),
        ("up", "input_grad"),
        ("up", "weight_grad"),
        ("blocks.0.0", "weight_grad"),
    ]
    kernels = [r.kernel for r in report.records[len(FORWARD) :]]
    assert kernels == ["dense_few_outputs", "weight_grad", "dense", "weight_grad", "weight_grad"]
    assert all(parameter.grad is None for parameter in model.parameters())


def test_explain_backward_without_anything_to_differentiate():
    with torch.no_grad(), pytest.raises(RuntimeError, match="no output requires grad"):
        explain(Model(), torch.randn(2, 4, 8), backward=True)


def test_explain_a_function():
    report = explain(lambda x, *, weight: F.conv1d(x, weight, padding="same"), torch.randn(1, 2, 5), weight=torch.randn(2, 2, 3))
    assert seen(report) == [("", "forward", "1x2x5 -> 2 K3 p1 fp32 NCL", "rewritten")]


def test_explain_passes_every_keyword_on():
    report = explain(lambda *, model: F.conv1d(model, torch.ones(2, 2, 3)), model=torch.randn(1, 2, 5))
    assert seen(report) == [("", "forward", "1x2x5 -> 2 K3 fp32 NCL", "rewritten")]


def test_explain_tells_why_a_convolution_is_kept():
    with torch.no_grad():
        report = explain(nn.Conv1d(2, 2, 3).double(), torch.randn(1, 2, 5).double())
    assert [(r.decision, r.kernel, r.reason) for r in report.kept] == [("kept", "aten", "fp64 is computed by aten")]


def test_explain_of_a_model_that_is_compiled_already():
    model, x = Model(), torch.randn(2, 4, 8)
    with torch.no_grad():
        assert seen(explain(torch.compile(model, backend=triton_conv), x)) == FORWARD
        model.compile(backend=triton_conv)
        assert seen(explain(model, x)) == FORWARD


class Broken(nn.Module):
    """A graph break between two convolutions."""

    def __init__(self):
        super().__init__()
        self.inner = nn.ModuleDict({"first": nn.Conv1d(2, 2, 3), "second": nn.Conv1d(2, 2, 3)})

    def forward(self, x):
        x = self.inner["first"](x)
        torch._dynamo.graph_break()
        return self.inner["second"](x)


BROKEN = [
    ("inner.first", "forward", "1x2x9 -> 2 K3 fp32 NCL", "rewritten"),
    ("inner.second", "forward", "1x2x7 -> 2 K3 fp32 NCL", "rewritten"),
]


def test_explain_across_graph_breaks():
    with torch.no_grad():
        report = explain(Broken(), torch.randn(1, 2, 9))
    assert seen(report) == BROKEN
    assert (report.graphs, report.graph_breaks) == (2, 1)


@pytest.mark.parametrize("model", [Model, Broken])
@torch.no_grad()
def test_explain_leaves_nothing_in_the_way_of_compilations(model):
    model = model()
    x = torch.randn(2, 4, 8) if isinstance(model, Model) else torch.randn(1, 2, 9)
    expected = FORWARD if isinstance(model, Model) else BROKEN
    # one more than the compilations of one function that Dynamo allows
    for _ in range(torch._dynamo.config.recompile_limit + 1):
        assert seen(explain(model, x)) == expected
    counter = CompileCounterWithBackend(triton_conv)
    compiled = torch.compile(model, backend=counter)
    compiled(x)
    graphs = counter.frame_count
    assert graphs == (1 if isinstance(model, Model) else 2)
    explain(model, x)
    compiled(x)
    assert counter.frame_count == graphs
    assert torch._inductor.config.post_grad_custom_pre_pass is None


EXPLAIN_WITH_WARM_CACHES = """
import torch
from torch_conv_triton.backend import triton_conv
from torch_conv_triton.configs_gradients import WeightGradConfig
from torch_conv_triton.dispatch import Plan
from torch_conv_triton.explain import explain
from torch._dynamo.utils import counters

model, x = torch.nn.Conv1d(2, 2, 3), torch.randn(1, 2, 5)
with torch.no_grad():
    torch.compile(model, backend=triton_conv)(x)
    print(counters["inductor"]["fxgraph_cache_hit"], len(explain(model, x).records))
"""


def test_explain_whatever_the_caches_hold(tmp_path):
    printed = [run_python(EXPLAIN_WITH_WARM_CACHES, TORCHINDUCTOR_CACHE_DIR=str(tmp_path)).splitlines()[-1] for _ in range(2)]
    assert printed == ["0 1", "1 1"]
