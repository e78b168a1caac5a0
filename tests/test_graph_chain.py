"""Which convolutions of a graph become one chain: graphs after the pass, what stays apart, and that results stay the same."""

import copy

import pytest
import torch
import torch.nn.functional as F
from compiling import Captured
from expecttest import assert_expected_inline
from test_folded_models import MODELS, assert_close
from torch.utils._pytree import tree_leaves

from torch_conv_triton import explain
from torch_conv_triton.dispatch import aten
from torch_conv_triton.graph import chain
from torch_conv_triton.graph.call import OperatorCall
from torch_conv_triton.testing import relative_error


@pytest.fixture(autouse=True)
def chains_on_the_cpu(monkeypatch):
    torch._dynamo.reset()
    torch.manual_seed(0)
    monkeypatch.setattr(chain, "DEVICE_TYPES", ("cpu",))


X, W, SQUARE, BIAS = torch.randn(2, 4, 16), torch.randn(6, 4, 3) / 3, torch.randn(6, 6, 3) / 3, torch.randn(6)


def captured(function, *args, **options) -> str:
    """The graph after the pass; its results are those of eager."""
    compiled = Captured(function, **options)
    with torch.no_grad():
        for actual, expected in zip(tree_leaves(compiled(*args)), tree_leaves(function(*args)), strict=True):
            assert relative_error(actual, expected) < 5e-3
    return compiled.after[0]


def chains(graph: str) -> int:
    return graph.count("conv1d_chain")


def test_what_one_hands_the_next_is_a_chain():
    def block(x):
        x = F.conv1d(x, W, BIAS, padding=1)
        return x + F.conv1d(F.relu(x), SQUARE, padding=1)

    assert_expected_inline(
        captured(block, X),
        """\
v0: float32[2, 6, 16] = triton_conv.conv1d_chain.one([in0, in1, in2, in3], [4,[[0,1,2,1,[1,1],1,1,false,'zeros','max %0 0.0; tf32 %1; out %0 fp32 NCL; out %2 fp32 NCL',[],false],[5,3,null,1,[1,1],1,1,false,'zeros','add %0 a0; out %1 fp32 NCL',[4],true]],[2,1],[6],[]])
return [v0]
""",  # noqa: E501
    )


def test_a_bare_convolution_joins():
    assert_expected_inline(
        captured(lambda x: F.conv1d(F.conv1d(x, W), SQUARE), X, **{"triton_conv.layout": False}),
        """\
v0: float32[2, 6, 12] = triton_conv.conv1d_chain.one([in0, in1, in2], [3,[[0,1,null,1,[0,0],1,1,false,'zeros','out %0 fp32 NCL',[],false],[3,2,null,1,[0,0],1,1,false,'zeros','out %0 fp32 NCL',[],false]],[1,1],[4],[]])
return [v0]
""",  # noqa: E501
    )


def test_what_is_read_elsewhere_is_returned():
    def two(x):
        y = F.conv1d(x, W)
        return y, F.conv1d(y, SQUARE), y.sum()

    graph = captured(two, X)
    assert chains(graph) == 1 and "conv1d_chain.default" in graph and "conv1d_fused" not in graph


def test_those_that_read_the_same_are_a_chain():
    graph = captured(lambda x: (F.conv1d(x, W).cumsum(2), F.conv1d(x, W * 2).cumsum(2)), X)
    assert chains(graph) == 1


def test_what_lies_between_comes_after():
    def model(x):
        y = F.conv1d(x, W)
        return y.cumsum(2).exp(), F.conv1d(y, SQUARE)

    graph = captured(model, X)
    assert chains(graph) == 1 and graph.index("conv1d_chain") < graph.index("cumsum") < graph.index("exp")


def test_a_way_around_through_others_ends_a_chain():
    def model(x):
        y = F.conv1d(x, W, padding=1)
        z = F.conv1d(y, SQUARE, padding=1)
        # this one waits for what others compute of the first
        return F.conv1d(z, SQUARE, padding=1).cumsum(2), F.conv1d(y.cumsum(2), SQUARE)

    graph = captured(model, X)
    assert chains(graph) == 1 and graph.index("conv1d_chain") < graph.index("cumsum") < graph.index("conv1d.default")


def test_one_chain_reads_what_another_returns():
    def model(x):
        y = F.conv1d(F.conv1d(x, W, padding=1), SQUARE, padding=1)
        return F.conv1d(F.conv1d(y.cumsum(2), SQUARE, padding=1), SQUARE, padding=1) + y

    assert chains(captured(model, X)) == 2


def test_convolutions_apart_stay_apart():
    graph = captured(lambda x, y: (F.conv1d(x, W).cumsum(2), F.conv1d(y, W).cumsum(2)), X, X + 1)
    assert chains(graph) == 0


def test_aten_ends_a_chain(monkeypatch):
    monkeypatch.setattr(OperatorCall, "plan", lambda call: aten("slower"))
    assert chains(captured(lambda x: F.conv1d(F.conv1d(x, W), SQUARE), X)) == 0


@pytest.mark.parametrize("padding, joined", [(lambda x: 2, True), (lambda x: x.shape[2] // 8, False)])
def test_lengths_may_change_but_not_padding(padding, joined):
    first, second = torch.nn.Conv1d(4, 6, 3), torch.nn.Conv1d(6, 6, 3)

    def model(x):
        return second(F.pad(first(x), (padding(x), 0)))

    compiled = Captured(model, dynamic=True)
    with torch.no_grad():
        for length in (16, 24, 33):
            x = torch.randn(2, 4, length)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-2, atol=1e-2)
    assert chains(compiled.after[0]) == joined and len(compiled.after) == 1


def test_nothing_is_read_before_it_is_written():
    def model(x, state):
        y = F.conv1d(x, W)
        state.copy_(x * 2)
        return F.conv1d(y, SQUARE), F.conv1d(state, W)

    state = torch.zeros_like(X)
    compiled = Captured(model)
    with torch.no_grad():
        _, after = compiled(X, state)
    torch.testing.assert_close(after, F.conv1d(2 * X, W), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(state, 2 * X)


def test_training_graphs_have_chains_too():
    def model(x, w):
        return F.conv1d(F.relu(F.conv1d(x, w, padding=1)), SQUARE, padding=1)

    compiled = Captured(model)
    gradients = []
    for function in (compiled, model):
        w = W.clone().requires_grad_()
        function(X, w).square().sum().backward()
        gradients.append(w.grad)
    assert_close(*gradients, 4)
    assert chains(compiled.after[0]) == 1


@pytest.mark.parametrize("name, count", [("separator", 3), ("conformer", 1), ("codec", 1)])
def test_models(name, count):
    build, shape, _, layers = MODELS[name]
    model, x = build(8).eval(), torch.randn(*shape)
    compiled = Captured(model)
    with torch.no_grad():
        assert_close(compiled(x), copy.deepcopy(model).double()(x.double()), layers)
    assert chains(compiled.after[0]) == count


def test_the_option_leaves_every_call_alone():
    assert chains(captured(lambda x: F.conv1d(F.conv1d(x, W), SQUARE), X, **{"triton_conv.chain": False})) == 0


@pytest.mark.parametrize("convolutions", [1, 2])
def test_frozen_weights_are_constants(convolutions):
    model = torch.nn.Sequential(*[torch.nn.Conv1d(4, 4, 3) for _ in range(convolutions)]).eval()
    with torch._inductor.config.patch(freezing=True):
        graph = captured(model, X)
    constants = [[1, 2], [1, 2, 3, 4]][convolutions - 1]
    assert chains(graph) == 1 and f",{constants}])".replace(" ", "") in graph


def test_weights_that_are_given_are_no_constants():
    model = torch.nn.Sequential(torch.nn.Conv1d(4, 4, 3), torch.nn.Conv1d(4, 4, 3))
    assert ",[]])" in captured(model, X)


def test_explain_says_so(capsys):
    with torch.no_grad():
        report = explain(lambda x: F.conv1d(F.relu(F.conv1d(x, W)), SQUARE), X)
    assert [record.folded for record in report.records] == [
        "max, rounded, in a chain of 2",
        "reads rounded, in a chain of 2",
    ]
