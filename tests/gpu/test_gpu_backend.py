"""The backend on a GPU: compiled models are eager's within rounding, in every mode, forward and backward."""

import pytest
import torch
import triton
from compiling import Capture, Captured
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor.async_compile import AsyncCompile
from torch.testing._internal.common_methods_invocations import op_db

from torch_conv_triton import dispatch, testing
from torch_conv_triton.backend import inductor_options, triton_conv
from torch_conv_triton.explain import explain
from torch_conv_triton.problem import current_precision

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    torch.manual_seed(0)


class Model(nn.Module):
    """Dense, strided, depthwise, grouped and transposed convolutions between smooth activations.

    A kink would turn rounding into errors of the size of the gradient itself.
    """

    depth = 6

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv1d(16, 64, 7, padding=3),
            nn.BatchNorm1d(64),
            nn.GELU(),
            nn.Conv1d(64, 128, 4, stride=2, padding=1, bias=False),
            nn.SiLU(),
            nn.Conv1d(128, 128, 31, padding="same", groups=128),
            nn.Conv1d(128, 128, 3, padding=2, dilation=2, groups=4),
            nn.Tanh(),
            nn.ConvTranspose1d(128, 64, 4, stride=2, padding=1),
            nn.Conv1d(64, 16, 1),
        )

    def forward(self, x):
        return self.layers(x) + x


def build(dtype: torch.dtype) -> tuple[nn.Module, torch.Tensor]:
    model = Model().cuda().to(dtype)
    return model, torch.randn(8, 16, 8192, device="cuda", dtype=dtype)


def in_double(model: nn.Module, x: torch.Tensor) -> tuple[nn.Module, torch.Tensor]:
    double = Model().cuda().double().train(model.training)
    double.load_state_dict(model.state_dict())
    return double, x.detach().double()


def assert_close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    # every layer rounds once more
    bound = Model.depth * testing.error_budget(dtype, current_precision(dtype))
    assert testing.relative_error(actual, expected) < bound


DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WAYS = {
    "default": {},
    "max-autotune": {"mode": "max-autotune"},
    "reduce-overhead": {"mode": "reduce-overhead"},
    "dynamic": {"dynamic": True, "fullgraph": True},
    "freezing": {"options": {"freezing": True}},
    "cpp_wrapper": {"options": {"cpp_wrapper": True}},
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arguments", WAYS.values(), ids=WAYS)
@torch.no_grad()
def test_inference(arguments, dtype):
    model, x = build(dtype)
    compiled = torch.compile(model.eval(), backend=triton_conv, **arguments)
    # a CUDA graph is recorded in the second call and replayed, with other values, from the third on
    for _ in range(3):
        x = torch.randn_like(x)
        expected = in_double(model, x)
        assert_close(compiled(x), expected[0](expected[1]), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("arguments", [{}, {"mode": "reduce-overhead"}], ids=["default", "reduce-overhead"])
def test_training(arguments, dtype):
    model, x = build(dtype)
    x.requires_grad_()
    compiled = torch.compile(model, backend=triton_conv, **arguments)
    for _ in range(3):
        torch.compiler.cudagraph_mark_step_begin()
        double, x_double = in_double(model, x)
        grad_output = torch.randn_like(x)
        expected = torch.autograd.grad(double(x_double.requires_grad_()), [x_double, *double.parameters()], grad_output.double())
        actual = torch.autograd.grad(compiled(x), [x, *model.parameters()], grad_output)
        names = ["x", *(name for name, _ in model.named_parameters())]
        for name, a, e in zip(names, actual, expected, strict=True):
            # in front of a batch norm the gradient of a bias is zero, so all of it is rounding
            if name != "layers.0.bias":
                assert_close(a, e, dtype)


@torch.no_grad()
def test_autocast():
    model, x = build(torch.float32)
    double, x_double = in_double(model.eval(), x)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        actual = torch.compile(model, backend=triton_conv)(x)
    assert_close(actual.bfloat16(), double(x_double), torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["nn.functional.conv1d", "nn.functional.conv_transpose1d"])
def test_samples_of_pytorch(name, dtype):
    op = next(op for op in op_db if op.name == name)
    samples = list(op.sample_inputs("cuda", dtype))
    assert len(samples) >= 5
    for sample in samples:
        torch._dynamo.reset()
        actual = torch.compile(op.op, backend=triton_conv, dynamic=False)(sample.input, *sample.args, **sample.kwargs)
        exact = sample.transform(lambda a: a.double() if isinstance(a, torch.Tensor) else a)
        assert_close(actual, op.op(exact.input, *exact.args, **exact.kwargs), dtype)


@torch.no_grad()
def test_native_path():
    model, x = build(torch.float16)
    double, x_double = in_double(model.eval(), x)
    actual = torch.compile(model, options=inductor_options("max-autotune"))(x)
    assert_close(actual, double(x_double), torch.float16)


def test_explain_tells_what_runs():
    model, x = build(torch.float16)
    report = explain(model, x, backward=True)
    forward = [record for record in report.records if record.kind == "forward"]
    assert [record.module for record in forward] == [f"layers.{i}" for i in (0, 3, 5, 6, 8, 9)]
    assert report.kept == ()
    kernels = [record.kernel for record in forward]
    assert kernels[2].startswith("depthwise") and kernels[4].startswith("transposed"), kernels
    assert report.totals["gradients"] == 2 * len(forward) - 1


@torch.no_grad()
def test_frozen_batch_norm_is_folded_into_our_operator():
    model, x = build(torch.float32)
    model = nn.Sequential(*model.layers[:2]).eval()
    captured = Captured(model)
    # Dynamo looks at the setting too, before options of a compilation apply
    with torch._inductor.config.patch(freezing=True):
        actual = captured(x)
    (graph,) = captured.after
    assert "triton_conv.conv1d" in graph and "aten.mul" not in graph
    assert_close(actual, model.double()(x.double()), torch.float32)


@torch.no_grad()
def test_bias_of_a_convolution_that_aten_runs_is_an_addition_of_its_own(monkeypatch):
    monkeypatch.setattr(dispatch, "plan", lambda problem, device: dispatch.aten("for this test"))
    conv, x = nn.Conv1d(16, 32, 3).cuda(), torch.randn(64, 16, 4096, device="cuda")
    captured = Captured(conv)
    actual = captured(x)
    assert "triton_conv.conv1d" in captured.after[0] and "aten.add" in captured.after[0]
    assert_close(actual, conv.double()(x.double()), torch.float32)


def test_weight_in_channels_last_is_left_to_aten():
    conv, x = nn.Conv1d(16, 32, 3).cuda(), torch.randn(64, 16, 4096, device="cuda")
    conv.weight.data = conv.weight.data.mT.contiguous().mT
    eager = conv(x)
    with torch.no_grad():
        actual = torch.compile(conv, backend=triton_conv)(x)
        report = explain(conv, x)
    assert actual.stride() == eager.stride()
    assert_close(actual, eager.double(), torch.float32)
    assert [record.decision for record in report.records] == ["kept" if eager.stride(1) == 1 else "rewritten"]


@torch.no_grad()
def test_channels_last_input_arrives_without_a_copy():
    class Transposing(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(64, 64, 3, padding=1)

        def forward(self, x):
            return self.conv(x.mT)

    model, x, seen = Transposing().cuda().half(), torch.randn(32, 4096, 64, device="cuda", dtype=torch.float16), Capture()
    report = explain(model, x)
    assert [(record.layout, record.decision) for record in report.records] == [("NLC", "rewritten")]
    assert report.records[0].kernel != "aten"
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        compiled = torch.compile(model, options=inductor_options() | {"post_grad_custom_post_pass": seen})
        compiled(x)
    kernels = [event.name for event in profile.events() if "Mem" not in event.name]
    assert "triton_conv.conv1d" in seen.graphs[0]
    assert not [name for name in kernels if name.startswith("triton_poi")], kernels


def compilations(backend, dtype: torch.dtype, training: bool) -> int:
    """How often Dynamo compiles for a row of lengths."""
    torch._dynamo.reset()
    model, counter = build(dtype)[0].layers, CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter, dynamic=True)
    for length in (512, 640, 1000, 2048):
        x = torch.randn(2, 16, length, device="cuda", dtype=dtype, requires_grad=training)
        with torch.set_grad_enabled(training):
            y = compiled(x)
        assert y.shape == x.shape
        if training:
            y.sum().backward()
            assert x.grad.shape == x.shape
    return counter.frame_count


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_new_lengths_compile_as_often_as_without_any_lowering(training, dtype):
    assert compilations(triton_conv, dtype, training) == compilations("aot_eager", dtype, training)


def test_kernels_are_compiled_before_they_are_launched(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    found = {}
    monkeypatch.setattr(
        triton.knobs.compilation, "listener", lambda *, src, cache_hit, **_: found.setdefault(src.name, []).append(cache_hit)
    )
    AsyncCompile.wait_pool_ready()
    # sizes that no other test has, so that the process knows no kernel for them
    model = nn.Sequential(nn.Conv1d(56, 72, 9), nn.GELU(), nn.Conv1d(72, 72, 4, groups=72)).cuda()
    with torch.no_grad():
        torch.compile(model, backend=triton_conv)(torch.randn(2, 56, 5000, device="cuda"))
    ours = {name: hits for name, hits in found.items() if name.startswith("conv1d")}
    assert len(ours) >= 2 and all(all(hits) for hits in ours.values()), found
