"""The backend: found by name, every mode and option of Inductor, caches, changing lengths, and no trace in other compilations."""

import copy

import pytest
import torch
from compiling import Capture, Captured, graph_text, run_python
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor import config, custom_graph_pass, lowering
from torch.testing._internal.common_methods_invocations import op_db

from torch_conv_triton import testing
from torch_conv_triton.backend import inductor_options, triton_conv
from torch_conv_triton.graph import ahead
from torch_conv_triton.problem import current_precision


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    torch.manual_seed(0)


class Model(nn.Module):
    """Strided, depthwise and transposed convolutions between the layers that usually surround them."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv1d(4, 8, 5, stride=2, padding=2),
            nn.BatchNorm1d(8),
            nn.GELU(),
            nn.Conv1d(8, 8, 3, padding="same", groups=8),
            nn.ConvTranspose1d(8, 4, 4, stride=2, padding=1),
        )

    def forward(self, x):
        return self.layers(x) + x


def assert_close(actual: torch.Tensor, expected: torch.Tensor, layers: int = 3) -> None:
    """Relative error within the budget of the dtype for so many layers, each of which rounds."""
    assert actual.shape == expected.shape
    bound = layers * testing.error_budget(actual.dtype, current_precision(actual.dtype))
    error = testing.relative_error(actual, expected)
    assert error <= bound, f"relative error {error:.1e}, allowed {bound:.1e}"


def test_inductor_meets_no_operator_of_ours_that_it_does_not_know(monkeypatch):
    for operator in ahead.COMPUTE:
        monkeypatch.delitem(lowering.lowerings, operator, raising=False)
    model, x = nn.Sequential(nn.Conv1d(2, 2, 3), nn.ReLU()), torch.randn(1, 2, 8)
    with config.patch(implicit_fallbacks=False, fx_graph_cache=False), torch.no_grad():
        assert_close(torch.compile(model, backend=triton_conv)(x), model(x))


# found by name


def test_backend_is_found_by_its_name_without_an_import():
    printed = run_python("""
import sys, torch
assert "triton_conv" in torch.compiler.list_backends()
model = torch.nn.Conv1d(2, 2, 3)
x = torch.randn(1, 2, 5)
assert not any(name.startswith("torch_conv_triton") for name in sys.modules)
with torch.no_grad():
    y = torch.compile(model, backend="triton_conv", options={"fx_graph_cache": False})(x)
torch.testing.assert_close(y, model(x), rtol=2e-3, atol=2e-3)
print(any(name.startswith("torch_conv_triton.kernels.dense") for name in sys.modules))
""")
    assert printed == "True\n"


def test_loading_the_backend_imports_neither_triton_nor_inductor():
    printed = run_python("""
import sys, torch
before = set(sys.modules)
import torch_conv_triton.backend
new = set(sys.modules) - before
print(sorted(name for name in new if name.split(".")[0] == "triton" or name.startswith("torch._inductor")))
""")
    assert printed == "[]\n"


# every mode and option of Inductor

WAYS = {
    "default": {},
    "max-autotune": {"mode": "max-autotune"},
    "max-autotune-no-cudagraphs": {"mode": "max-autotune-no-cudagraphs"},
    "reduce-overhead": {"mode": "reduce-overhead"},
    "fullgraph": {"fullgraph": True},
    "dynamic": {"dynamic": True},
    "mode beside options": {"options": {"mode": "max-autotune-no-cudagraphs", "epilogue_fusion": False}},
    "our options": {"options": {"triton_conv.gradients": False}},
    "freezing": {"options": {"freezing": True}},
    "cpp_wrapper": {"options": {"cpp_wrapper": True}},
}


@pytest.mark.parametrize("arguments", WAYS.values(), ids=WAYS)
def test_output_is_that_of_eager_in_every_way_to_compile(arguments):
    model, x = Model().eval(), torch.randn(2, 4, 16)
    with torch.no_grad():
        assert_close(torch.compile(model, backend=triton_conv, **arguments)(x), model(x))


def test_module_compile_in_place():
    model, x = Model().eval(), torch.randn(2, 4, 16)
    with torch.no_grad():
        expected = model(x)
        model.compile(backend=triton_conv)
        assert_close(model(x), expected)


class Settings(custom_graph_pass.CustomGraphPass):
    """Keeps the settings of Inductor under which it was run."""

    def __call__(self, graph):
        self.seen = (config.max_autotune, config.triton.cudagraphs, config.epilogue_fusion)

    def uuid(self):
        """No name, so it always runs."""


def test_mode_and_options_reach_inductor_and_nothing_stays():
    settings = Settings()
    before = (config.max_autotune, config.triton.cudagraphs, config.epilogue_fusion, config.post_grad_custom_pre_pass)
    options = {"mode": "max-autotune", "epilogue_fusion": False, "post_grad_custom_post_pass": settings}
    with torch.no_grad():
        torch.compile(nn.Conv1d(2, 2, 3), backend=triton_conv, options=options)(torch.randn(1, 2, 5))
    assert settings.seen == (True, True, False)
    after = (config.max_autotune, config.triton.cudagraphs, config.epilogue_fusion, config.post_grad_custom_pre_pass)
    assert after == before


def test_compilations_by_inductor_are_as_they_were():
    model, x, seen = nn.Conv1d(2, 2, 3), torch.randn(1, 2, 5), Capture()
    with torch.no_grad():
        torch.compile(model, backend=triton_conv)(x)
        torch._dynamo.reset()
        torch.compile(model, options={"post_grad_custom_post_pass": seen})(x)
    assert "triton_conv" not in seen.graphs[0]


ERRORS = {
    "unknown option of ours": (
        {"triton_conv.gradient": False},
        "unknown option triton_conv.gradient; known options are triton_conv.gradients, triton_conv.fold, triton_conv.layout, "
        "triton_conv.chain, triton_conv.tune",
    ),
    "option of ours of the wrong type": (
        {"triton_conv.gradients": "no"},
        "option triton_conv.gradients takes bool, but got str 'no'",
    ),
    "unknown option of Inductor": ({"max_autotunes": True}, "Unexpected optimization option max_autotunes"),
    "option of Inductor of the wrong type": ({"max_autotune": "yes"}, "Unexpected type of attr max_autotune"),
    "unknown mode": ({"mode": "fastest"}, "fastest"),
}


@pytest.mark.parametrize(("options", "message"), ERRORS.values(), ids=ERRORS)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(Exception, match=message):
        torch.compile(nn.Conv1d(2, 2, 3), backend=triton_conv, options=options)(torch.randn(1, 2, 5))


def test_native_path_with_our_pass():
    seen = Capture()
    model, x = Model().eval(), torch.randn(2, 4, 16)
    options = {**inductor_options("max-autotune-no-cudagraphs"), "post_grad_custom_post_pass": seen}
    assert options["max_autotune"] is True
    with torch.no_grad():
        assert_close(torch.compile(model, options=options)(x), model(x))
    assert seen.graphs[0].count("triton_conv.conv") == 3


def test_native_path_refuses_unknown_options_of_ours():
    with pytest.raises(RuntimeError, match=r"unknown option triton_conv\.speed"):
        inductor_options(speed="high")


def test_export_and_ahead_of_time_compilation(tmp_path):
    model = Model().eval()
    length = torch.export.Dim("length", min=8, max=64)
    with torch.no_grad():
        program = torch.export.export(model, (torch.randn(2, 4, 16),), dynamic_shapes={"x": {2: 2 * length}})
        path = torch._inductor.aoti_compile_and_package(
            program, package_path=str(tmp_path / "model.pt2"), inductor_configs=inductor_options()
        )
        loaded = torch._inductor.aoti_load_package(path)
        for L in (16, 40):
            x = torch.randn(2, 4, L)
            assert_close(loaded(x), model(x))


# a pass of the user's own

SEVERAL_PASSES = hasattr(custom_graph_pass, "get_custom_graph_passes")


def test_pass_of_the_user_runs_first_on_the_graph_as_it_was():
    captured = Captured(nn.Conv1d(2, 2, 3))
    with torch.no_grad():
        captured(torch.randn(1, 2, 5))
    assert "aten.convolution" in captured.before[0] and "triton_conv.conv1d" in captured.after[0]


def test_plain_function_as_pass_of_the_user():
    graphs = []
    options = {"post_grad_custom_pre_pass": lambda graph: graphs.append(graph_text(graph))}
    with torch.no_grad():
        torch.compile(nn.Conv1d(2, 2, 3), backend=triton_conv, options=options)(torch.randn(1, 2, 5))
    assert "aten.convolution" in graphs[0]


def test_pass_of_the_user_set_for_everything_is_chained_too():
    before, after = Capture(), Capture()
    with torch.no_grad(), config.patch(post_grad_custom_pre_pass=before, post_grad_custom_post_pass=after):
        torch.compile(nn.Conv1d(2, 2, 3), backend=triton_conv)(torch.randn(1, 2, 5))
    assert "aten.convolution" in before.graphs[0] and "triton_conv.conv1d" in after.graphs[0]


@pytest.mark.skipif(not SEVERAL_PASSES, reason="torch 2.11 takes one pass, and none that asks whether it is inference")
def test_several_passes_of_the_user_and_one_that_asks_whether_it_is_inference():
    class Asking(custom_graph_pass.CustomInferenceAwareGraphPass):
        def __call__(self, graph, is_inference):
            self.is_inference = is_inference

        def uuid(self):
            """No name, so it always runs."""

    first, asking, after = Capture(), Asking(), Capture()
    options = {"post_grad_custom_pre_pass": [first, asking], "post_grad_custom_post_pass": after}
    with torch.no_grad():
        torch.compile(nn.Conv1d(2, 2, 3), backend=triton_conv, options=options)(torch.randn(1, 2, 5))
    assert "aten.convolution" in first.graphs[0] and "triton_conv.conv1d" in after.graphs[0]
    assert asking.is_inference is True


# numerics


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_training_step_gives_the_gradients_of_eager(dtype):
    model, x = Model().to(dtype), torch.randn(2, 4, 16, dtype=dtype, requires_grad=True)
    leaves = [x, *model.parameters()]
    expected = torch.autograd.grad(model(x).square().mean(), leaves)
    actual = torch.autograd.grad(torch.compile(model, backend=triton_conv)(x).square().mean(), leaves)
    names = ["x", *(name for name, _ in model.named_parameters())]
    # the gradient of a bias in front of a batch norm is zero, all of it rounding
    for name, a, e in zip(names, actual, expected, strict=True):
        if name != "layers.0.bias":
            assert_close(a, e, layers=6)


def test_autocast():
    model, x = Model().eval(), torch.randn(2, 4, 16)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        actual, expected = torch.compile(model, backend=triton_conv)(x), model(x)
    assert actual.dtype == expected.dtype
    assert_close(actual.bfloat16(), expected)


def with_data_of(model, other):
    for parameter, new in zip(model.parameters(), other.parameters(), strict=True):
        parameter.data = new.data.clone()


UPDATES = {
    "in place": lambda model, other: torch._foreach_copy_(list(model.parameters()), list(other.parameters())),
    "load_state_dict": lambda model, other: model.load_state_dict(other.state_dict()),
    "load_state_dict, which assigns": lambda model, other: model.load_state_dict(other.state_dict(), assign=True),
    ".data": with_data_of,
}


@pytest.mark.parametrize("update", UPDATES.values(), ids=UPDATES)
def test_weights_that_change_after_the_compilation_are_read(update):
    model, other, x = Model().eval(), Model().eval(), torch.randn(2, 4, 16)
    compiled = torch.compile(model, backend=triton_conv)
    with torch.no_grad():
        assert_close(compiled(x), model(x))
        update(model, other)
        for _ in range(2):
            assert_close(compiled(x), other(x))


SAMPLES = [
    pytest.param(op, sample, id=f"{op.name}-{index}")
    for op in op_db
    if op.name in ("nn.functional.conv1d", "nn.functional.conv_transpose1d")
    for index, sample in enumerate(op.sample_inputs("cpu", torch.float32, requires_grad=False))
]


@pytest.mark.parametrize(("op", "sample"), SAMPLES)
def test_samples_of_pytorch(op, sample):
    compiled = torch.compile(op.op, backend=triton_conv, dynamic=False)
    actual = compiled(sample.input, *sample.args, **sample.kwargs)
    in_double = sample.transform(lambda a: a.double() if isinstance(a, torch.Tensor) else a)
    expected = op.op(in_double.input, *in_double.args, **in_double.kwargs)
    assert_close(actual, expected, layers=1)


ERRORS = list(next(op for op in op_db if op.name == "nn.functional.conv1d").error_inputs("cpu"))


@pytest.mark.parametrize("error", ERRORS, ids=[error.error_regex for error in ERRORS])
def test_errors_are_those_of_inductor(error):
    # not always eager's words: Dynamo asks PyTorch's own rules for fake tensors
    sample, messages = error.sample_input, []
    for backend in ("inductor", triton_conv):
        compiled = torch.compile(torch.nn.functional.conv1d, backend=backend)
        with pytest.raises(error.error_type) as raised:
            compiled(sample.input, *sample.args, **sample.kwargs)
        messages.append(str(raised.value))
        torch._dynamo.reset()
    assert messages[0] == messages[1]


# changing lengths

LENGTHS = (64, 72, 96, 34)


def compilations(backend, dynamic: bool | None, training: bool) -> int:
    """How often Dynamo compiles for a row of lengths."""
    torch._dynamo.reset()
    model = nn.Sequential(nn.Conv1d(4, 4, 5, stride=2, padding=2), nn.ReLU(), nn.ConvTranspose1d(4, 4, 4, stride=2, padding=1))
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(model, backend=counter, dynamic=dynamic)
    for length in LENGTHS:
        x = torch.randn(2, 4, length, requires_grad=training)
        with torch.set_grad_enabled(training):
            y = compiled(x)
        assert y.shape == x.shape
        if training:
            y.sum().backward()
            assert x.grad.shape == x.shape
    return counter.frame_count


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize(("dynamic", "needed"), [(True, 1), (None, 2)], ids=["dynamic", "automatic"])
def test_new_lengths_compile_no_more_often_than_with_inductor(dynamic, needed, training):
    assert compilations(triton_conv, dynamic, training) == needed <= compilations("inductor", dynamic, training)


def test_kernel_size_may_change_in_training():
    compiled = torch.compile(lambda x, weight: torch.conv1d(x, weight, padding=1).relu(), backend=triton_conv, dynamic=True)
    for K in (3, 5):
        x, weight = torch.randn(2, 4, 40, requires_grad=True), torch.randn(4, 4, K, requires_grad=True)
        actual = torch.autograd.grad(compiled(x, weight).sum(), (x, weight))
        x, weight = x.detach().double().requires_grad_(), weight.detach().double().requires_grad_()
        expected = torch.autograd.grad(torch.conv1d(x, weight, padding=1).relu().sum(), (x, weight))
        for a, e in zip(actual, expected, strict=True):
            assert_close(a, e)


def test_gradients_of_an_output_padding_of_a_whole_stride_take_any_length():
    model = nn.ConvTranspose1d(4, 6, 3, stride=2, padding=1, output_padding=2, dilation=3)
    counter = CompileCounterWithBackend(triton_conv)
    compiled = torch.compile(model, backend=counter, dynamic=True)
    in_double = copy.deepcopy(model).double()
    for length in LENGTHS:
        x = torch.randn(2, 4, length, requires_grad=True)
        y = compiled(x)
        cotangent = torch.randn_like(y)
        actual = torch.autograd.grad(y, (x, *model.parameters()), cotangent)
        x = x.detach().double().requires_grad_()
        expected = torch.autograd.grad(in_double(x), (x, *in_double.parameters()), cotangent.double())
        for a, e in zip(actual, expected, strict=True):
            assert_close(a, e)
    assert counter.frame_count == 1


def test_length_that_is_marked_dynamic_stays_so_in_training():
    model = Model()
    compiled = torch.compile(model, backend=triton_conv, fullgraph=True)
    for length in LENGTHS:
        x = torch.randn(2, 4, length, requires_grad=True)
        torch._dynamo.mark_dynamic(x, 2)
        compiled(x).sum().backward()
        assert x.grad.shape == x.shape


def test_graph_of_changing_lengths_is_rewritten():
    before, after = Capture(), Capture()
    options = {"post_grad_custom_pre_pass": before, "post_grad_custom_post_pass": after}
    x = torch.randn(2, 4, 32, requires_grad=True)
    torch.compile(Model(), backend=triton_conv, dynamic=True, options=options)(x).sum().backward()
    assert [graph.count("aten.convolution") for graph in before.graphs] == [3, 3]
    assert [graph.count("aten.convolution") for graph in after.graphs] == [0, 0]


# caches, across processes

CACHED = """
import sys, torch
from torch._dynamo.utils import counters
torch.manual_seed(0)
model, x = torch.nn.Conv1d(4, 4, 3), torch.randn(2, 4, 16)
options = {"triton_conv.gradients": sys.argv[2] == "True"} if sys.argv[1] == "triton_conv" else None
torch.compile(model, backend=sys.argv[1], options=options)(x).sum().backward()
gradient, model.weight.grad = model.weight.grad, None
model(x).sum().backward()
torch.testing.assert_close(gradient, model.weight.grad, rtol=2e-3, atol=2e-3)
print(counters["inductor"]["fxgraph_cache_hit"] > 0 or counters["aot_autograd"]["autograd_cache_hit"] > 0)
"""


def test_caches_answer_the_same_compilation_and_no_other(tmp_path):
    def hit(backend: str, gradients: bool, **environment: str | None) -> bool:
        return run_python(CACHED, backend, str(gradients), TORCHINDUCTOR_CACHE_DIR=str(tmp_path), **environment) == "True\n"

    assert not hit("triton_conv", True)
    assert hit("triton_conv", True)
    assert not hit("triton_conv", False)
    assert not hit("inductor", True)
    # without the interpreter the CPU runs no kernel of ours, so it is another graph
    assert not hit("triton_conv", True, TRITON_INTERPRET=None)
