"""Two-dimensional convolutions beside ours: Inductor stores channels-last what it would have stored so without us."""

import pytest
import torch
from torch import nn
from torch._inductor import config
from torch._inductor.graph import GraphLowering

from torch_conv_triton.backend import inductor_options, triton_conv


class Model(nn.Module):
    """A two-dimensional convolution, a few of one dimension, and pointwise operators: few convolutions for its size or not."""

    def __init__(self, operators: int, groups: int = 1):
        super().__init__()
        self.image = nn.Conv2d(1, 80, 3, padding=1)
        self.layers = nn.ModuleList(nn.Conv1d(80, 80, 3, padding=1, groups=groups) for _ in range(3))
        self.operators = operators

    def forward(self, x):
        x = self.image(x).mean(2)
        for layer in self.layers:
            x = layer(x)
        for _ in range(self.operators):
            x = x.sin()
        return x


@pytest.fixture
def decisions(monkeypatch):
    """What Inductor decides of each graph that it compiles, by its rules for GPUs."""
    torch._dynamo.reset()
    found = []
    decide = GraphLowering.decide_layout_opt

    def noted(gm, *, is_inference):
        with torch.backends.mkldnn.flags(enabled=False):
            chosen = decide(gm, is_inference=is_inference)
        found.append(chosen)
        return chosen

    monkeypatch.setattr(GraphLowering, "decide_layout_opt", staticmethod(noted))
    return found


def run(model, training, **compile_arguments):
    # small graphs of ours are compiled by nobody else
    x = torch.randn(1, 1, 4, 6)
    with config.patch(fx_graph_cache=False), torch.set_grad_enabled(training):
        y = torch.compile(model, **compile_arguments)(x)
        torch.testing.assert_close(y, model(x), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("operators", "groups", "training", "chosen"),
    [(350, 1, False, True), (350, 1, True, True), (5, 1, False, True), (350, 8, False, False)],
    ids=["few without ours", "few in training", "enough", "not with groups of many channels"],
)
def test_the_decision_is_that_on_the_whole_graph(decisions, operators, groups, training, chosen):
    model = Model(operators, groups)
    run(model, training)
    (without,) = decisions
    decisions.clear()
    torch._dynamo.reset()
    run(model, training, backend=triton_conv)
    assert decisions[-1] is without is chosen


def test_the_native_backend_with_our_pass_decides_alike(decisions):
    run(Model(350), False, options=inductor_options())
    assert decisions[-1] is True
    assert config.force_layout_optimization is False


def test_what_is_forced_stays_forced_in_the_backward(decisions):
    forced = {"force_layout_optimization": True}
    with config.patch(fx_graph_cache=False):
        y = torch.compile(Model(350), backend=triton_conv, options=forced)(torch.randn(1, 1, 4, 6))
        decisions.clear()
        y.sum().backward()
    assert set(decisions) == {True}
