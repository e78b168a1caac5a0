"""Activations before a convolution: what the operator computes, and which of a graph's it is given."""

import pytest
import torch
import torch.nn.functional as F
from compiling import Captured

from torch_conv_triton import dispatch, explain, fused
from torch_conv_triton.dispatch import Plan
from torch_conv_triton.epilogue import Value, instructions_between, keep_outputs, parse
from torch_conv_triton.graph.call import OperatorCall
from torch_conv_triton.testing import assert_within_budget, relative_error

LEAKY = "mul %0 0.1; gt %0 0.0; where %2 %0 %1"
X, W = torch.randn(2, 6, 16), torch.randn(6, 6, 3) / 3


# programs


def program(text):
    return parse(text, torch.float32)


def test_a_prologue_is_read_from_the_text():
    text = f"{LEAKY}; conv; tanh %0; out %1 fp32 NCL"
    assert str(program(text)) == text
    assert [str(i) for i in program(text).prologue] == LEAKY.split("; ")
    assert [str(i) for i in program(text).instructions] == ["tanh %0"]


@pytest.mark.parametrize(
    "text, message",
    [
        ("conv; out %0 fp32 NCL", "instructions without operands come before 'conv'"),
        ("add %0 a0; conv; out %0 fp32 NCL", "instructions without operands come before 'conv'"),
        ("exp %0; conv; out %0 fp32 NCL", "makes something else of zeros"),
        ("tanh %0; conv; tanh %1; out %1 fp32 NCL", "%1 is not computed before"),
    ],
)
def test_prologues_without_meaning_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        program(text)


TWO = "add %0 a0; mul %1 0.1; gt %1 0.0; where %3 %1 %2; tf32 %4; out %1 fp32 NCL; out %5 fp32 NCL"


def test_what_makes_one_value_of_another():
    assert [str(i) for i in instructions_between(program(TWO), Value(1), Value(5))] == LEAKY.split("; ")
    # the first is not made of the second, nor this one without an operand
    assert instructions_between(program(TWO), Value(5), Value(1)) is None
    assert instructions_between(program(TWO), Value(0), Value(5)) is None


def test_only_what_an_output_needs_is_kept():
    both = program(TWO)
    assert str(keep_outputs(both, both.outputs[:1])) == "add %0 a0; out %1 fp32 NCL"
    assert str(keep_outputs(both, both.outputs)) == TWO
    gate = program("halve; tanh %0; sigmoid %1; mul %2 %3; out %2 fp32 NCL; out %4 fp32 NCL")
    assert str(keep_outputs(gate, gate.outputs[:1])) == "halve; tanh %0; out %2 fp32 NCL"


# the operator


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_input_is_activated(dtype):
    x, weight = X.to(dtype), W.to(dtype)
    text = f"{LEAKY}; conv; max %0 0.0; out %1 fp32 NLC"
    y = torch.ops.triton_conv.conv1d_fused.one(x, weight, None, 1, [2, 1], 1, 1, False, "zeros", text, [], False)
    activated = F.leaky_relu(x.float(), 0.1).to(dtype)
    expected = F.conv1d(F.pad(activated.double(), (2, 1)), weight.double()).relu()
    assert_within_budget(y.to(dtype), expected, "tf32" if dtype == torch.float32 else "ieee")


def test_kernels_that_cannot_give_way():
    arguments = fused.Arguments(X, W, None, 1, [1, 1], 1, 1, False, "zeros", f"{LEAKY}; conv; out %0 fp32 NCL", [], False)
    assert fused.plan(arguments).reason == "no kernel of ours computes what comes before this convolution"


# graphs


@pytest.fixture
def halo(monkeypatch):
    """As if a kernel that may begin with a program computed every convolution; aten runs those that do."""
    torch._dynamo.reset()
    monkeypatch.setattr(OperatorCall, "plan", lambda call: Plan(dispatch.PREPARING[0], None, ""))


def block(x, activate=F.leaky_relu):
    y = F.conv1d(x, W, padding=1)
    return y + F.conv1d(activate(y), W, padding=1)


def graph_of(function, *args, **options):
    captured = Captured(function, **options)
    with torch.no_grad():
        for _ in range(2):
            assert relative_error(captured(*args), function(*args)) < 2e-3
    return captured.after[0]


def test_an_activation_moves_to_its_reader(halo):
    graph = graph_of(block, X)
    assert graph.count("conv; ") == 1 and graph.count("conv1d_fused.one") == 2
    with torch.no_grad():
        report = explain(block, X)
    assert [record.folded for record in report.records] == [
        "gt mul where, rounded, gt mul where by its readers",
        "add, gt mul where before",
    ]


def test_all_readers_move(halo):
    def blocks(x):
        y = F.conv1d(x, W, padding=1)
        z = F.leaky_relu(y)
        return F.conv1d(z, W) * F.conv1d(z, 2 * W) + y[..., :-2]

    graph = graph_of(blocks, X)
    assert graph.count("conv; ") == 2


STAYS = {
    "it is added elsewhere": lambda x: (z := F.relu(y := F.conv1d(x, W, padding=1))) + y + F.conv1d(z, W, padding=1),
    "others read it": lambda x: (z := F.relu(y := F.conv1d(x, W))).cumsum(2)[..., 2:] + y[..., 2:] + F.conv1d(z, W),
    "it reads another tensor": lambda x: block(x, lambda y: y * X),
    "it makes something of zeros": lambda x: block(x, torch.exp),
    "nothing else is stored": lambda x: F.conv1d(F.relu(F.conv1d(x, W)), W),
}


@pytest.mark.parametrize("function", STAYS.values(), ids=STAYS)
def test_what_stays_where_it_is_made(function, halo):
    assert "conv; " not in graph_of(function, X)


def test_a_kernel_that_reads_once_a_tap_does_not_activate():
    assert "conv; " not in graph_of(block, X)


def test_the_option_leaves_activations(halo):
    assert "conv; " not in graph_of(block, X, **{"triton_conv.fold": False})
