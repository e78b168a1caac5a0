"""How convolutions store what the next ones read: graphs after the pass, and what keeps a tensor as it is."""

import pytest
import torch
import torch.nn.functional as F
from compiling import Captured
from expecttest import assert_expected_inline

from torch_conv_triton.dispatch import aten
from torch_conv_triton.graph.call import OperatorCall
from torch_conv_triton.testing import float32_precision


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    torch.manual_seed(0)


def after(function, *args, **options) -> str:
    captured = Captured(function, **options)
    with torch.no_grad():
        captured(*args)
    return captured.after[0]


X, W, SQUARE = torch.randn(2, 4, 16), torch.randn(6, 4, 3), torch.randn(6, 6, 3)


def test_what_only_convolutions_read_is_rounded_where_it_is_made():
    assert_expected_inline(
        after(lambda x: F.conv1d(F.relu(F.conv1d(x, W)), SQUARE), X),
        """\
v0: float32[2, 6, 14] = triton_conv.conv1d_fused.one(in0, in1, None, 1, [0, 0], 1, 1, False, zeros, max %0 0.0; tf32 %1; out %2 fp32 NCL, [], False)
v1: float32[2, 6, 12] = triton_conv.conv1d_fused.one(v0, in2, None, 1, [0, 0], 1, 1, False, zeros, out %0 fp32 NCL, [], True)
return [v1]
""",  # noqa: E501
    )


def test_one_of_two_outputs_is_rounded():
    def block(x):
        x = F.conv1d(x, W, padding=1)
        return x + F.conv1d(F.relu(x), SQUARE, padding=1)

    graph = after(block, X)
    assert "max %0 0.0; tf32 %1; out %0 fp32 NCL; out %2 fp32 NCL" in graph
    assert "add %0 a0; out %1 fp32 NCL, [v1], True)" in graph


def test_a_convolution_that_folds_nothing_rounds_and_is_told():
    graph = after(lambda x: F.conv1d(F.conv1d(x, W), SQUARE), X)
    assert graph.count("tf32") == 1 and graph.count("conv1d_fused") == 2 and graph.count("True)") == 1


NOT_ROUNDED = {
    "another reader": lambda x: (y := F.relu(F.conv1d(x, W))).sum() + F.conv1d(y, SQUARE),
    "returned": lambda x: (y := F.relu(F.conv1d(x, W)), F.conv1d(y, SQUARE)),
    "an operand too": lambda x: (y := F.relu(F.conv1d(x, W, padding=1))) + F.conv1d(y, SQUARE, padding=1),
    "half precision": lambda x: F.conv1d(F.relu(F.conv1d(x.half(), W.half())), SQUARE.half()),
    "a weight": lambda x: F.conv1d(x, F.relu(F.conv1d(x, W))[:, :4, :3]),
}


@pytest.mark.parametrize("function", NOT_ROUNDED.values(), ids=NOT_ROUNDED)
def test_what_others_read_is_not_rounded(function):
    assert "tf32" not in after(function, X)


def test_nothing_is_rounded_in_full_precision():
    with float32_precision("ieee"):
        assert "tf32" not in after(lambda x: F.conv1d(F.relu(F.conv1d(x, W)), SQUARE), X)


def test_nothing_is_rounded_for_a_convolution_of_aten(monkeypatch):
    monkeypatch.setattr(OperatorCall, "plan_reading", lambda *_: aten("it is faster"))
    assert "tf32" not in after(lambda x: F.conv1d(F.relu(F.conv1d(x, W)), SQUARE), X)


def test_transposed_views_become_contiguous():
    norm = torch.nn.LayerNorm(6).requires_grad_(False)
    graph = after(lambda x: norm(F.gelu(F.conv1d(x, W)).mT), X)
    assert "out %5 fp32 NLC" in graph


def test_a_view_that_is_returned_keeps_its_strides():
    captured = Captured(lambda x: F.relu(F.conv1d(x, W)).mT)
    with torch.no_grad():
        assert captured(X).stride() == (84, 1, 14)
    assert "NLC" not in captured.after[0]


def test_many_channels_are_stored_channels_last_with_what_is_added_to_them():
    one, two = torch.randn(16, 4, 3), torch.randn(16, 16, 3)

    def block(x):
        x = F.conv1d(x, one, padding=1)
        x = x + F.conv1d(F.relu(x), two, padding=1)
        return x + F.conv1d(F.relu(x), two, padding=2, dilation=2)

    assert_expected_inline(
        after(block, X),
        """\
v0 = triton_conv.conv1d_fused.default(in0, in1, None, 1, [1, 1], 1, 1, False, zeros, max %0 0.0; tf32 %1; out %0 fp32 NLC; out %2 fp32 NLC, [], False)
v1: float32[2, 16, 16] = getitem(v0, 0)
v2: float32[2, 16, 16] = getitem(v0, 1)
v3 = triton_conv.conv1d_fused.default(v2, in2, None, 1, [1, 1], 1, 1, False, zeros, add %0 a0; max %1 0.0; tf32 %2; out %1 fp32 NLC; out %3 fp32 NLC, [v1], True)
v4: float32[2, 16, 16] = getitem(v3, 0)
v5: float32[2, 16, 16] = getitem(v3, 1)
v6: float32[2, 16, 16] = triton_conv.conv1d_fused.one(v5, in2, None, 1, [2, 2], 2, 1, False, zeros, add %0 a0; out %1 fp32 NCL, [v4], True)
return [v6]
""",  # noqa: E501
    )


@pytest.mark.parametrize("channels", [12, 16])
def test_half_precision_of_whole_vectors_of_channels_is_stored_channels_last(channels):
    one, two = torch.randn(channels, 4, 3).half(), torch.randn(16, channels, 3).half()
    graph = after(lambda x: F.conv1d(F.conv1d(x, one), two), X.half())
    assert ("NLC" in graph) == (channels == 16)


def test_channels_last_is_stored_where_the_next_convolution_copies_to_it():
    wide, later = torch.randn(128, 16, 3).half(), torch.randn(256, 128, 3).half()
    x = torch.randn(1, 16, 132).half()
    graph = after(lambda x: F.conv1d(F.relu(F.conv1d(x, wide)), later), x)
    assert "out %1 fp16 NLC" in graph


def test_nothing_is_chosen_when_the_option_says_so():
    options = {"triton_conv.layout": False}
    assert "tf32" not in after(lambda x: F.conv1d(F.relu(F.conv1d(x, W)), SQUARE), X, **options)
