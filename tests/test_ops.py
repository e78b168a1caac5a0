"""The operators' contracts with PyTorch: schemas, fake tensors, autograd, autocast, vmap, export and checkpointing."""

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import torch_conv_triton.ops  # noqa: F401 - defines the operators
from torch_conv_triton import gradients as below
from torch_conv_triton.testing import CASES, make_inputs

OPS = torch.ops.triton_conv
DIFFERENTIABLE = [
    case
    for case in CASES
    if case.name
    in (
        "odd_everything",
        "dilated_strided",
        "padding_above_K",
        "grouped_tiny",
        "channel_multiplier",
        "transposed_output_padding",
        "transposed_output_padding_above_stride",
        "transposed_gcd",
        "transposed_grouped",
    )
]


def in_double(case):
    """Small float64 leaves with the case's geometry."""
    tensors = make_inputs(case, torch.float64)
    return [None if t is None else t.detach().clone().requires_grad_() for t in tensors]


def gradients(operator, tensors):
    y = operator(*tensors)
    return torch.autograd.grad(
        y, [t for t in tensors if t is not None], torch.sin(torch.arange(y.numel())).reshape(y.shape).to(y)
    )


@pytest.mark.parametrize("requires_grad", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if case.name in ("dense", "depthwise", "grouped", "tiny_C_in")], ids=str)
def test_opcheck_conv1d(case, dtype, requires_grad):
    x, weight, bias = (None if t is None else t.requires_grad_(requires_grad) for t in make_inputs(case, dtype))
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if dtype == torch.float64:
        tests.append("test_aot_dispatch_dynamic")
    opcheck(OPS.conv1d.default, (x, weight, bias, case.stride, case.padding, case.dilation, case.groups), test_utils=tests)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if case.name in ("transposed", "transposed_gcd")], ids=str)
def test_opcheck_conv_transpose1d(case, dtype):
    x, weight, bias = make_inputs(case, dtype)
    geometry = case.stride, case.padding, case.output_padding, case.groups, case.dilation
    opcheck(OPS.conv_transpose1d.default, (x, weight, bias, *geometry), test_utils=["test_schema", "test_faketensor"])


def test_opcheck_gradients():
    x, weight, grad = torch.randn(2, 6, 17), torch.randn(4, 3, 5), torch.randn(2, 4, 8)
    opcheck(OPS.conv1d_input_grad.default, (grad.requires_grad_(), weight.requires_grad_(), 17, 2, 1, 1, 2))
    opcheck(OPS.conv1d_weight_grad.default, (grad, x.requires_grad_(), 5, 2, 1, 1, 2))
    opcheck(OPS.conv1d_weight_bias_grad.default, (grad, x, 5, 2, 1, 1, 2))


@pytest.mark.parametrize("case", DIFFERENTIABLE, ids=str)
def test_gradients_are_aten_s(case):
    tensors = in_double(case)
    for ours, aten in zip(gradients(case.operator(), tensors), gradients(case.operator(F), tensors), strict=True):
        torch.testing.assert_close(ours, aten)


def test_gradcheck_and_gradgradcheck_of_the_closed_set():
    double = functools.partial(torch.randn, dtype=torch.float64, requires_grad=True)
    x, weight, bias, grad = double(2, 4, 9), double(4, 2, 3), double(4), double(2, 4, 4)
    transposed_weight = double(4, 3, 3)
    functions = {
        "conv1d": (lambda x, w, b: OPS.conv1d(x, w, b, 2, 1, 2, 2), (x, weight, bias)),
        "conv_transpose1d": (lambda x, w: OPS.conv_transpose1d(x, w, None, 2, 1, 1), (x, transposed_weight)),
        "conv1d_input_grad": (lambda g, w: OPS.conv1d_input_grad(g, w, 9, 2, 1, 2, 2), (grad, weight)),
        "conv1d_weight_grad": (lambda g, x: OPS.conv1d_weight_grad(g, x, 3, 2, 1, 2, 2), (grad, x)),
        "conv1d_weight_bias_grad": (lambda g, x: OPS.conv1d_weight_bias_grad(g, x, 3, 2, 1, 2, 2), (grad, x)),
        "the bias's alone": (lambda g, x: OPS.conv1d_weight_bias_grad(g, x, 3, 2, 1, 2, 2)[1], (grad, x.detach())),
    }
    for function, args in functions.values():
        assert torch.autograd.gradcheck(function, args)
        assert torch.autograd.gradgradcheck(function, args)


@pytest.mark.parametrize(
    ("wanted", "planned"),
    {
        "x": ["plan_input_grad"],
        "w": ["plan_weight_grad"],
        "b": ["plan_bias_grad"],
        "wb": ["plan_weight_bias_grad"],
        "xb": ["plan_input_grad", "plan_bias_grad"],
    }.items(),
    ids=str,
)
def test_only_the_gradients_asked_for_are_computed(monkeypatch, wanted, planned):
    asked = []
    for name in ("plan_input_grad", "plan_weight_grad", "plan_bias_grad", "plan_weight_bias_grad"):
        original = getattr(below, name)
        monkeypatch.setattr(below, name, lambda *a, name=name, plan=original: asked.append(name) or plan(*a))
    # a length of this test's own, as calls are remembered
    tensors = {"x": torch.randn(2, 4, 23), "w": torch.randn(6, 4, 3), "b": torch.randn(6)}
    for name in wanted:
        tensors[name].requires_grad_()
    OPS.conv1d(*tensors.values(), groups=1, padding=len(wanted + planned[0])).sum().backward()
    assert asked == planned


def test_transforms_differentiate_the_operator():
    x, weight = torch.randn(2, 4, 9, dtype=torch.float64), torch.randn(6, 4, 3, dtype=torch.float64)

    def loss(conv, w):
        return conv(x, w).pow(3).sum()

    for transform in (torch.func.grad, torch.func.hessian, lambda f: torch.func.grad(lambda w: torch.func.grad(f)(w).sum())):
        ours, aten = (transform(functools.partial(loss, conv))(weight) for conv in (OPS.conv1d, F.conv1d))
        torch.testing.assert_close(ours, aten)
    ours, aten = (torch.func.jvp(functools.partial(loss, conv), (weight,), (weight,)) for conv in (OPS.conv1d, F.conv1d))
    torch.testing.assert_close(ours, aten)


@pytest.mark.parametrize("in_dims", [(0, None), (None, 0), (0, 0), (1, 2)], ids=str)
@pytest.mark.parametrize("groups", [1, 2])
def test_vmap(in_dims, groups):
    x, weight = torch.randn(3, 2, 4, 9, dtype=torch.float64), torch.randn(3, 6, 4 // groups, 3, dtype=torch.float64)
    args = [t[0] if d is None else t.movedim(0, d) for t, d in zip((x, weight), in_dims, strict=True)]
    ours, aten = (
        torch.vmap(lambda x, w, conv=conv: conv(x, w, None, 2, 1, 1, groups), in_dims)(*args) for conv in (OPS.conv1d, F.conv1d)
    )
    torch.testing.assert_close(ours, aten)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_uses_the_dtype_in_force(dtype):
    x, weight, bias = torch.randn(2, 16, 20), torch.randn(8, 16, 3, requires_grad=True), torch.randn(8)
    with torch.autocast("cpu", dtype=dtype):
        y = OPS.conv1d(x, weight, bias)
        assert OPS.conv1d(x.double(), weight.double()).dtype == torch.float64
    assert y.dtype == dtype
    y.float().sum().backward()
    assert weight.grad.dtype == torch.float32


def test_export_keeps_the_operator():
    class Model(torch.nn.Module):
        def forward(self, x, weight):
            return OPS.conv1d(x, weight, None, 1, 1)

    length = torch.export.Dim("length", min=4, max=1000)
    program = torch.export.export(Model(), (torch.randn(2, 4, 16), torch.randn(4, 4, 3)), dynamic_shapes=({2: length}, None))
    assert [n.target for n in program.graph.nodes if n.op == "call_function"] == [OPS.conv1d.default]


@pytest.mark.parametrize("selective", [False, True])
def test_checkpointing(selective):
    x, weight = torch.randn(2, 4, 9, requires_grad=True), torch.randn(4, 4, 3, requires_grad=True)

    def policy(context, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op == OPS.conv1d.default else CheckpointPolicy.PREFER_RECOMPUTE

    keywords = {"context_fn": functools.partial(create_selective_checkpoint_contexts, policy)} if selective else {}

    def block(x, weight):
        return OPS.conv1d(x, weight, None, 1, 1).sigmoid()

    expected = torch.autograd.grad(block(x, weight).sum(), [x, weight])
    actual = torch.autograd.grad(checkpoint(block, x, weight, use_reentrant=False, **keywords).sum(), [x, weight])
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("bad", [{"stride": 0}, {"padding": -1}, {"dilation": 0}, {"groups": 0}, {"groups": 3}], ids=str)
def test_bad_arguments_name_themselves(bad):
    ((name, value),) = bad.items()
    with pytest.raises(RuntimeError, match=f"{name}={value}"):
        OPS.conv1d(torch.randn(2, 4, 9), torch.randn(4, 4, 3), **bad)
    with pytest.raises(RuntimeError, match=f"{name}={value}"):
        OPS.conv1d(torch.randn(2, 4, 9, device="meta"), torch.randn(4, 4, 3, device="meta"), **bad)


def in_float64(*shape):
    return torch.randn(shape, dtype=torch.float64)


def every_operator(groups):
    """Sizes of the tensors of a small call of each operator, and what follows them."""
    return {
        OPS.conv1d: ([(2, 4, 9), (6, 4 // groups, 3), (6,)], (2, 1, 2, groups)),
        OPS.conv_transpose1d: ([(2, 4, 9), (4, 6 // groups, 3), (6,)], (2, 1, 1, groups, 1)),
        OPS.conv1d_input_grad: ([(2, 6, 4), (6, 4 // groups, 3)], (9, 2, 1, 2, groups)),
        OPS.conv1d_weight_grad: ([(2, 6, 4), (2, 4, 9)], (3, 2, 1, 2, groups)),
        OPS.conv1d_weight_bias_grad: ([(2, 6, 4), (2, 4, 9)], (3, 2, 1, 2, groups)),
    }


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("operator", every_operator(1), ids=str)
def test_vmap_over_any_tensors_is_a_loop(operator, groups):
    shapes, geometry = every_operator(groups)[operator]
    for mapped in itertools.product([False, True], repeat=len(shapes)):
        if any(mapped):
            tensors = [in_float64(5, *shape) if m else in_float64(*shape) for shape, m in zip(shapes, mapped, strict=True)]
            in_dims = tuple(0 if m else None for m in mapped)
            actual = torch.vmap(lambda *args: operator(*args, *geometry), in_dims)(*tensors)
            calls = ([t[i] if m else t for t, m in zip(tensors, mapped, strict=True)] for i in range(5))
            expected = [operator(*args, *geometry) for args in calls]
            if isinstance(actual, tuple):
                expected = tuple(map(torch.stack, zip(*expected, strict=True)))
            else:
                expected = torch.stack(expected)
            torch.testing.assert_close(actual, expected)
