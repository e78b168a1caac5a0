"""The functional front end is torch.nn.functional's: PyTorch's own samples and errors, padding words, fallbacks."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounter
from torch.testing._internal.common_methods_invocations import op_db

import torch_conv_triton
from torch_conv_triton import functional

# importing PyTorch's test helpers forbids setting backend flags in the rest of the process; other tests set them
torch.backends.flags_frozen.__globals__["__allow_nonbracketed_mutation_flag"] = True

OPINFO = {op.name.rpartition(".")[2]: op for op in op_db if op.name in ("nn.functional.conv1d", "nn.functional.conv_transpose1d")}
BUDGET = {torch.float32: 1e-3, torch.float64: 1e-12, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def relative_error(actual, expected):
    return ((actual.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize("dtype", BUDGET, ids=str)
@pytest.mark.parametrize("name", OPINFO)
def test_pytorch_s_own_samples(name, dtype):
    checked = 0
    for contiguous in OPINFO[name].sample_inputs("cpu", dtype):
        for sample in (contiguous, contiguous.noncontiguous()):
            arguments = [t.double() if isinstance(t, torch.Tensor) else t for t in (sample.input, *sample.args)]
            expected = getattr(F, name)(*arguments, **sample.kwargs)
            actual = getattr(functional, name)(sample.input, *sample.args, **sample.kwargs)
            assert actual.shape == expected.shape and actual.dtype == dtype
            assert relative_error(actual, expected) < BUDGET[dtype]
            checked += 1
    assert checked >= 10


@pytest.mark.parametrize("index", range(len(list(OPINFO["conv1d"].error_inputs("cpu")))))
def test_pytorch_s_own_errors(index):
    error = list(OPINFO["conv1d"].error_inputs("cpu"))[index]
    sample = error.sample_input
    with pytest.raises(error.error_type, match=error.error_regex):
        functional.conv1d(sample.input, *sample.args, **sample.kwargs)


X, W = torch.randn(2, 4, 9), torch.randn(6, 4, 3)
BAD_CALLS = {
    "input of one dimension": lambda f: f.conv1d(X[0, 0], W),
    "weight of four dimensions": lambda f: f.conv1d(X, W[..., None]),
    "channels": lambda f: f.conv1d(X, torch.randn(6, 5, 3)),
    "stride of zero": lambda f: f.conv1d(X, W, stride=0),
    "two strides": lambda f: f.conv1d(X, W, stride=[1, 1]),
    "a float stride": lambda f: f.conv1d(X, W, stride=1.5),
    "a bool stride": lambda f: f.conv1d(X, W, stride=True),
    "a list of groups": lambda f: f.conv1d(X, W, groups=[1]),
    "a float for groups": lambda f: f.conv_transpose1d(X, torch.randn(4, 6, 3), groups=1.0),
    "bias of another length": lambda f: f.conv1d(X, W, torch.randn(5)),
    "bias of another dtype": lambda f: f.conv1d(X, W, torch.randn(6).double()),
    "kernel above input": lambda f: f.conv1d(X, torch.randn(6, 4, 13)),
    "unknown padding": lambda f: f.conv1d(X, W, padding="all"),
    "same with a stride": lambda f: f.conv1d(X, W, padding="same", stride=2),
    "output padding": lambda f: f.conv_transpose1d(X, torch.randn(4, 6, 3), output_padding=1),
    "transposed channels": lambda f: f.conv_transpose1d(X, torch.randn(5, 6, 3)),
    "transposed to nothing": lambda f: f.conv_transpose1d(X, torch.randn(4, 6, 3), padding=10),
    "transposed words": lambda f: f.conv_transpose1d(X, torch.randn(4, 6, 3), padding="same"),
}


@pytest.mark.parametrize("call", BAD_CALLS.values(), ids=BAD_CALLS)
def test_bad_calls_raise_what_torch_raises(call):
    with pytest.raises(Exception) as expected:
        call(F)
    with pytest.raises(expected.type):
        call(functional)


@pytest.mark.parametrize("K", [3, 4])
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_padding_words(padding, K):
    weight = torch.randn(6, 4, K)
    expected = F.conv1d(X, weight, padding=padding, dilation=2)
    assert relative_error(torch_conv_triton.conv1d(X, weight, padding=padding, dilation=2), expected) < 1e-3


@pytest.mark.parametrize("two", [np.int64(2), torch.tensor(2), [2], torch.Size([2])], ids=repr)
def test_integers_of_any_kind(two):
    assert torch.equal(functional.conv1d(X, W, stride=two, padding=two), functional.conv1d(X, W, stride=2, padding=2))
    grouped = torch.randn(6, 2, 3)
    groups = two if not isinstance(two, (list, torch.Size)) else 2
    assert torch.equal(functional.conv1d(X, grouped, groups=groups), functional.conv1d(X, grouped, groups=2))


def test_unbatched_input():
    for name, weight in (("conv1d", W), ("conv_transpose1d", torch.randn(4, 6, 3))):
        expected = getattr(F, name)(X[0], weight)
        actual = getattr(torch_conv_triton, name)(X[0], weight)
        assert actual.shape == expected.shape and relative_error(actual, expected) < 1e-3


def test_gradients_flow():
    x, weight, bias = X.clone().requires_grad_(), W.clone().requires_grad_(), torch.randn(6, requires_grad=True)
    actual = torch.autograd.grad(torch_conv_triton.conv1d(x, weight, bias, padding=1).sum(), [x, weight, bias])
    expected = torch.autograd.grad(F.conv1d(x, weight, bias, padding=1).sum(), [x, weight, bias])
    for a, e in zip(actual, expected, strict=True):
        assert relative_error(a, e) < 1e-3


class Tagged(torch.Tensor):
    """A subclass that must come back as itself."""


FALLBACKS = {
    "subclass": lambda f: f.conv1d(X.as_subclass(Tagged), W),
    "float64": lambda f: f.conv1d(X.double(), W.double()),
    "complex": lambda f: f.conv1d(X.to(torch.complex64), W.to(torch.complex64)),
    "int64": lambda f: f.conv1d(X.long(), W.long()),
    "vmap": lambda f: torch.vmap(lambda x: f.conv1d(x, W))(X[None]),
    "grad": lambda f: torch.func.grad(lambda w: f.conv1d(X, w).sum())(W),
    "jvp": lambda f: torch.func.jvp(lambda w: f.conv1d(X, w), (W,), (W,))[1],
    "no channels": lambda f: f.conv1d(X[:, :0], torch.randn(6, 0, 3)),
}


@pytest.mark.parametrize("call", FALLBACKS.values(), ids=FALLBACKS)
def test_what_is_not_ours_is_torch_s(call):
    actual, expected = call(functional), call(F)
    assert type(actual) is type(expected)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


def test_bool_raises_as_in_torch():
    with pytest.raises(NotImplementedError):
        functional.conv1d(X.bool(), W.bool())


def test_traced_whole_into_one_operator():
    graphs = []

    def backend(gm, _):
        graphs.append(gm)
        return gm

    y = torch.compile(lambda x, w: functional.conv1d(x, w, padding="same"), backend=backend, fullgraph=True)(X, W)
    assert relative_error(y, F.conv1d(X, W, padding="same")) < 1e-3
    (graph,) = graphs
    assert torch.ops.triton_conv.conv1d.default in [node.target for node in graph.graph.nodes]


@pytest.mark.parametrize("argument", ["padding", "dilation"])
def test_a_padding_that_follows_from_a_changing_length_is_traced_too(argument):
    def convolve(f, x):
        return f.conv1d(x, W, **{argument: x.shape[2] // 4})

    counter = CompileCounter()
    compiled = torch.compile(lambda x: convolve(functional, x), backend=counter, fullgraph=True, dynamic=True)
    for length in (9, 16, 21):
        x = torch.randn(2, 4, length)
        assert relative_error(compiled(x), convolve(F, x)) < 1e-3
    assert counter.frame_count == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torch_jit_trace_keeps_the_operator():
    traced = torch.jit.trace(lambda x: functional.conv1d(x, W, stride=2), X)
    assert "triton_conv::conv1d" in str(traced.graph)
    x = torch.randn(3, 4, 12)
    assert relative_error(traced(x), F.conv1d(x, W, stride=2)) < 1e-3


def test_a_profiler_sees_the_operator():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        functional.conv1d(X, W)
    assert "triton_conv::conv1d" in {event.key for event in profile.key_averages()}


def test_a_function_mode_sees_one_call_and_not_its_inside():
    class Seen(torch.overrides.TorchFunctionMode):
        names = ()

        def __torch_function__(self, function, types, args=(), kwargs=None):
            self.names += (getattr(function, "__name__", str(function)),)
            return function(*args, **(kwargs or {}))

    with Seen() as seen:
        functional.conv1d(X, W)
    assert "data_ptr" not in seen.names
