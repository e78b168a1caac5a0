"""The fused operator: padding of every kind, epilogues, layouts of the outputs, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F

from torch_conv_triton import fused
from torch_conv_triton.testing import assert_within_budget

LEAKY = "mul %0 0.1; gt %0 0.0; where %2 %0 %1; add %3 a0"


def call(
    x, weight, bias=None, stride=1, padding=(0, 0), dilation=1, groups=1, transposed=False, mode="zeros", epilogue="", operands=()
):
    return fused.conv1d_fused(
        x, weight, bias, stride, list(padding), dilation, groups, transposed, mode, epilogue, list(operands), False
    )


@pytest.fixture
def tensors():
    torch.manual_seed(0)
    return torch.randn(2, 8, 33), torch.randn(6, 8, 3) / 5, torch.randn(6)


@pytest.mark.parametrize("padding", [(1, 1), (2, 0), (0, 5), (3, -1), (-2, 1), (-1, -3)])
@pytest.mark.parametrize("stride, dilation", [(1, 1), (2, 3)])
def test_padding_before_and_after_may_differ_and_crop(tensors, padding, stride, dilation):
    x, weight, bias = tensors
    (y,) = call(x, weight, bias, stride, padding, dilation)
    expected = F.conv1d(F.pad(x.double(), padding), weight.double(), bias.double(), stride, 0, dilation)
    assert_within_budget(y, expected, "tf32")


@pytest.mark.parametrize("cut", [(0, 0), (1, 1), (2, 1), (0, 3), (3, -1), (0, -4)])
def test_a_transposed_convolution_is_cut_at_its_ends_or_continued(tensors, cut):
    x, _, bias = tensors
    weight = torch.randn(8, 6, 5) / 4
    (y,) = call(x, weight, bias, 3, cut, 1, 1, True)
    whole = F.conv_transpose1d(x.double(), weight.double(), None, 3)
    assert_within_budget(y, F.pad(whole, (-cut[0], -cut[1])) + bias.double()[:, None], "tf32")


@pytest.mark.parametrize("mode, padding", [("reflect", (4, 2)), ("replicate", (40, 3)), ("circular", (33, 5))])
def test_padding_modes_are_those_of_the_module(tensors, mode, padding):
    x, weight, bias = tensors
    (y,) = call(x, weight, bias, 2, padding, mode=mode)
    assert_within_budget(y, F.conv1d(F.pad(x.double(), padding, mode), weight.double(), bias.double(), 2), "tf32")


def test_a_single_output_may_come_without_a_list(tensors):
    x, weight, bias = tensors
    arguments = x, weight, bias, 2, [2, 0], 1, 1, False, "reflect", "exp %0; out %1 bf16 NLC", [], False
    y = torch.ops.triton_conv.conv1d_fused.one(*arguments)
    (expected,) = fused.conv1d_fused(*arguments)
    assert torch.equal(y, expected) and y.stride() == expected.stride()
    torch.library.opcheck(torch.ops.triton_conv.conv1d_fused.one, arguments, test_utils=("test_schema", "test_faketensor"))


def test_the_epilogue_is_computed_and_every_output_has_its_dtype_and_layout(tensors):
    x, weight, bias = tensors
    residual = torch.randn(2, 6, 33)
    first, second = call(
        x, weight, bias, padding=(1, 1), epilogue=f"{LEAKY}; out %4 fp32 NLC; out %0 bf16 NCL", operands=[residual]
    )
    plain = F.conv1d(x.double(), weight.double(), bias.double(), padding=1)
    assert_within_budget(first, F.leaky_relu(plain, 0.1) + residual, "tf32")
    assert_within_budget(second, plain)
    assert first.stride() == (198, 1, 6) and second.stride() == (198, 33, 1)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"mode": "mirror"}, "padding_mode 'mirror'"),
        ({"mode": "reflect", "transposed": True}, "of a transposed convolution"),
        ({"mode": "reflect", "padding": (33, 0)}, "does not suit the length 33"),
        ({"mode": "circular", "padding": (34, 0)}, "does not suit the length 33"),
        ({"mode": "replicate", "padding": (-1, 0)}, "does not suit the length 33"),
        ({"padding": (0, -31)}, "output length 0 is too small"),
        ({"epilogue": "add %0 a1; out %1 fp32 NCL", "operands": [torch.zeros(())]}, "reads 2 operands, but got 1"),
        ({"epilogue": "add %0 a0; out %1 fp32 NCL", "operands": [torch.zeros(6)]}, "does not broadcast"),
        ({"epilogue": "add %0 a0; out %1 fp32 NCL", "operands": [torch.zeros(1, 1, 1, 1)]}, "does not broadcast"),
        ({"epilogue": "halve; add %0 a0; out %2 fp32 NCL", "operands": [torch.zeros(6, 1)]}, "does not broadcast"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_arguments_without_meaning_are_refused(tensors, arguments, message):
    x, weight, _ = tensors
    if arguments.get("transposed"):
        weight = weight.transpose(0, 1)
    with pytest.raises((RuntimeError, ValueError), match=message):
        call(x, weight, **arguments)


def test_an_odd_number_of_channels_has_no_halves(tensors):
    x, weight, _ = tensors
    with pytest.raises(ValueError, match="5 channels have no halves"):
        call(x, weight[:5], epilogue="halve; out %0 fp32 NCL")


@pytest.mark.parametrize("groups", [1, 2])
def test_what_is_computed_of_halves_has_half_the_channels(tensors, groups):
    x, weight, bias = tensors
    operand, weight = torch.randn(3, 1), weight[:, : 8 // groups]
    text = "halve; sigmoid %1; mul %0 %2; add %3 a0; out %4 fp32 NLC"
    (y,) = call(x, weight, bias, padding=(1, 1), groups=groups, epilogue=text, operands=[operand])
    expected = F.glu(F.conv1d(x.double(), weight.double(), bias.double(), padding=1, groups=groups), 1) + operand
    assert_within_budget(y, expected, "tf32")
    assert y.stride() == (99, 1, 3)


@pytest.mark.parametrize("N", [0, 2])
@pytest.mark.parametrize(
    "text",
    [
        "mul %0 a1; add %1 a0; div %2 a2; out %3 bf16 NLC; out %0 fp32 NCL",
        "halve; mul %0 a1; add %2 a0; div %3 a2; out %4 bf16 NLC; out %1 fp32 NCL",
    ],
)
def test_the_operator_keeps_its_contract(N, text):
    C_out = 12 if "halve" in text else 6
    x, weight, bias = torch.randn(N, 8, 33), torch.randn(C_out, 8, 3), torch.randn(C_out)
    operands = [torch.randn(N, 6, 17), torch.randn(6, 1), torch.tensor(2.0)]
    arguments = x, weight, bias, 2, [1, 1], 1, 1, False, "zeros", text, operands, False
    torch.library.opcheck(
        fused.conv1d_fused, arguments, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    )


def test_symbolic_lengths_stay_symbolic():
    @torch.compile(fullgraph=True, dynamic=True, backend="aot_eager")
    def compiled(x, weight):
        return call(x, weight, padding=(x.shape[2] // 8, 0))[0]

    weight = torch.randn(6, 8, 3)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for length in (32, 47, 64):
            x = torch.randn(2, 8, length)
            torch.testing.assert_close(compiled(x, weight), F.conv1d(F.pad(x, (length // 8, 0)), weight), rtol=1e-2, atol=1e-2)
