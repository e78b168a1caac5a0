"""The way past the dispatcher: taken by the code of compiled graphs, and only where nothing watches."""

from typing import ClassVar

import pytest
import torch
from torch import nn
from torch._inductor.utils import run_and_get_code
from torch.utils._python_dispatch import TorchDispatchMode

from torch_conv_triton.backend import inductor_options

OPS = torch.ops.triton_conv
FUSED = (1, [1, 1], 1, 1, False, "zeros", "", [], False)


def calls():
    """A call of each operator that has the direct way."""
    x, weight, bias, grad = torch.randn(2, 4, 9), torch.randn(6, 4, 3), torch.randn(6), torch.randn(2, 6, 9)
    geometry = [1], [1], [1], 1
    return {
        OPS.conv1d.default: (x, weight, bias, *geometry),
        OPS.conv_transpose1d.default: (grad, weight, None, [1], [1]),
        OPS.conv1d_input_grad.default: (grad, weight, 9, *geometry),
        OPS.conv1d_weight_grad.default: (grad, x, 3, *geometry),
        OPS.conv1d_bias_grad.default: (grad,),
        OPS.conv1d_weight_bias_grad.default: (grad, x, 3, *geometry),
        OPS.conv1d_fused.default: (x, weight, bias, *FUSED),
        OPS.conv1d_fused.one: (x, weight, bias, *FUSED),
    }


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operators = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operators.append(func)
        return func(*args, **(kwargs or {}))


class Watching(torch.Tensor):
    """Tensors that note what is called on them."""

    seen: ClassVar[list] = []

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.seen.append(func)
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("op", calls(), ids=str)
def test_same_result_and_no_pass_through_the_dispatcher(op, monkeypatch):
    arguments = calls()[op]
    expected = op(*arguments)
    monkeypatch.setattr(type(op), "__call__", lambda *_: pytest.fail("it went through the dispatcher"))
    torch.testing.assert_close(op.direct(*arguments), expected, rtol=0, atol=0)


@pytest.mark.parametrize("op", calls(), ids=str)
def test_modes_see_the_operator(op):
    arguments = calls()[op]
    with Seen() as seen:
        op.direct(*arguments)
    assert seen.operators[0] is op


def test_a_list_of_tensors_is_watched_too():
    x, weight, bias, *rest = calls()[OPS.conv1d_fused.one]
    rest[-2] = [torch.randn(6, 1).as_subclass(Watching)]
    Watching.seen.clear()
    OPS.conv1d_fused.one.direct(x, weight, bias, *rest)
    assert Watching.seen == [OPS.conv1d_fused.one]


def test_gradients_and_transforms_are_those_of_the_operator():
    x, weight, bias, *geometry = calls()[OPS.conv1d.default]
    weight.requires_grad_()
    OPS.conv1d.default.direct(x, weight, bias, *geometry).sum().backward()
    assert weight.grad is not None
    mapped = torch.vmap(lambda x: OPS.conv1d.default.direct(x, weight, bias, *geometry))(x[None])
    torch.testing.assert_close(mapped[0], OPS.conv1d.default(x, weight, bias, *geometry))


@pytest.mark.parametrize("cpp_wrapper", [False, True])
def test_python_code_of_graphs_takes_it(cpp_wrapper):
    torch._dynamo.reset()
    model, x = nn.Conv1d(2, 2, 3).requires_grad_(False), torch.randn(1, 2, 8)
    options = inductor_options() | {"cpp_wrapper": cpp_wrapper, "fx_graph_cache": False}
    y, (code,) = run_and_get_code(torch.compile(model, options=options), x)
    assert ("torch.ops.triton_conv.conv1d.default.direct(" in code) != cpp_wrapper
    torch.testing.assert_close(y, model(x), rtol=2e-3, atol=2e-3)
