"""The operators' contracts and PyTorch's own samples on the GPU, where our kernels and cuDNN compute."""

import pytest
import torch
import torch.nn.functional as F
from torch.library import opcheck
from torch.testing._internal.common_methods_invocations import op_db

import torch_conv_triton
from torch_conv_triton.problem import current_precision
from torch_conv_triton.testing import CASES, error_budget, make_inputs, relative_error

# importing PyTorch's test helpers forbids setting backend flags in the rest of the process; other tests set them
torch.backends.flags_frozen.__globals__["__allow_nonbracketed_mutation_flag"] = True

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
OPS = torch.ops.triton_conv
OPINFO = {op.name.rpartition(".")[2]: op for op in op_db if op.name in ("nn.functional.conv1d", "nn.functional.conv_transpose1d")}
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
# not the empty batch: opcheck cannot clone an empty tensor that is a slice of a larger one
CHECKED = ("dense", "grouped", "depthwise", "dilated_strided", "transposed", "transposed_depthwise")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPINFO)
def test_pytorch_s_own_samples(name, dtype):
    samples = list(OPINFO[name].sample_inputs(DEVICE, dtype))
    assert len(samples) >= 5
    for sample in (*samples, *(s.noncontiguous() for s in samples)):
        exact = [t.double() if isinstance(t, torch.Tensor) else t for t in (sample.input, *sample.args)]
        expected = getattr(F, name)(*exact, **sample.kwargs)
        actual = getattr(torch_conv_triton, name)(sample.input, *sample.args, **sample.kwargs)
        assert actual.shape == expected.shape and actual.dtype == dtype
        assert relative_error(actual, expected) <= error_budget(dtype, current_precision(dtype))


def test_pytorch_s_own_errors():
    errors = list(OPINFO["conv1d"].error_inputs(DEVICE))
    assert len(errors) >= 10
    for error in errors:
        sample = error.sample_input
        with pytest.raises(error.error_type, match=error.error_regex):
            torch_conv_triton.conv1d(sample.input, *sample.args, **sample.kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if case.name in CHECKED], ids=str)
def test_opcheck(case, dtype):
    tensors = [None if t is None else t.requires_grad_() for t in make_inputs(case, dtype, device=DEVICE)]
    # kernels of one plan are repeatable, but the compiled gradients of aten need not be those of the eager ones bit for bit
    tests = ["test_schema", "test_autograd_registration", "test_faketensor"]
    if case.transposed:
        geometry = case.stride, case.padding, case.output_padding, case.groups, case.dilation
        opcheck(OPS.conv_transpose1d.default, (*tensors, *geometry), test_utils=tests)
    else:
        geometry = case.stride, case.padding, case.dilation, case.groups
        opcheck(OPS.conv1d.default, (*tensors, *geometry), test_utils=tests)


def test_gradcheck_and_gradgradcheck_of_the_closed_set():
    def double(*shape):
        return torch.randn(shape, dtype=torch.float64, device=DEVICE, requires_grad=True)

    x, weight, bias, grad, transposed_weight = double(2, 4, 9), double(4, 2, 3), double(4), double(2, 4, 4), double(4, 3, 3)
    for function, args in (
        (lambda x, w, b: OPS.conv1d(x, w, b, 2, 1, 2, 2), (x, weight, bias)),
        (lambda x, w: OPS.conv_transpose1d(x, w, None, 2, 1, 1), (x, transposed_weight)),
        (lambda x, w: OPS.conv_transpose1d(x, w, None, 1, 1, 3, 1, 4), (x, transposed_weight)),
        (lambda g, w: OPS.conv1d_input_grad(g, w, 9, 2, 1, 2, 2), (grad, weight)),
        (lambda g, x: OPS.conv1d_weight_grad(g, x, 3, 2, 1, 2, 2), (grad, x)),
    ):
        assert torch.autograd.gradcheck(function, args, nondet_tol=1e-12)
        assert torch.autograd.gradgradcheck(function, args, nondet_tol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_uses_the_dtype_in_force(dtype):
    x, weight = torch.randn(2, 16, 20, device=DEVICE), torch.randn(8, 16, 3, device=DEVICE, requires_grad=True)
    with torch.autocast(DEVICE, dtype=dtype):
        by_operator, by_function = OPS.conv1d(x, weight), torch_conv_triton.conv1d(x, weight)
        assert OPS.conv1d(x.double(), weight.double()).dtype == torch.float64
    assert by_operator.dtype == by_function.dtype == dtype
    expected = F.conv1d(x.to(dtype).double(), weight.to(dtype).double())
    for y in (by_operator, by_function):
        assert relative_error(y, expected) <= error_budget(dtype)
        (grad,) = torch.autograd.grad(y.float().sum(), weight)
        assert grad.dtype == torch.float32


@pytest.mark.parametrize("in_dims", [(0, None), (None, 0), (0, 0)], ids=str)
@pytest.mark.parametrize("groups", [1, 2])
def test_vmap(in_dims, groups):
    x, weight = torch.randn(3, 2, 16, 40, device=DEVICE), torch.randn(3, 8, 16 // groups, 3, device=DEVICE)
    args = [t[0] if d is None else t for t, d in zip((x, weight), in_dims, strict=True)]
    actual = torch.vmap(lambda x, w: OPS.conv1d(x, w, None, 2, 1, 1, groups), in_dims)(*args)
    expected = torch.vmap(lambda x, w: F.conv1d(x, w, None, 2, 1, 1, groups), in_dims)(*(t.double() for t in args))
    assert relative_error(actual, expected) <= error_budget(torch.float32, current_precision(torch.float32))


@pytest.mark.parametrize("name", ["conv1d", "conv_transpose1d"])
def test_gradients_reach_every_operand_from_channels_last(name):
    tensors = [torch.randn(2, 40, 16, device=DEVICE).transpose(1, 2), torch.randn(16, 16, 3, device=DEVICE)]
    leaves = [t.requires_grad_() for t in (*tensors, torch.randn(16, device=DEVICE))]
    y = getattr(torch_conv_triton, name)(*leaves, stride=2, padding=1)
    grad = torch.randn_like(y)
    actual = torch.autograd.grad(y, leaves, grad)
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    expected = torch.autograd.grad(getattr(F, name)(*doubles, stride=2, padding=1), doubles, grad.double())
    for a, e in zip(actual, expected, strict=True):
        assert relative_error(a, e) <= error_budget(torch.float32, "tf32")
