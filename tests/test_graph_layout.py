"""How convolutions store what the next ones read: graphs after the pass, and what keeps a tensor as it is."""

import pytest
import torch
import torch.nn.functional as F
from compiling import Captured
from expecttest import assert_expected_inline
from test_folded_models import Separator

from torch_conv_triton import explain
from torch_conv_triton.dispatch import aten
from torch_conv_triton.graph import layout
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


@pytest.mark.parametrize("last_reads", ["NCL", "NLC"])
def test_what_is_added_is_stored_as_what_it_is_added_to_is_read(last_reads, monkeypatch):
    one, two = torch.randn(16, 4, 3), torch.randn(16, 16, 3)

    def block(x):
        x = F.conv1d(x, one, padding=1)
        return x + F.conv1d(F.relu(F.conv1d(F.relu(x), two, padding=1)), two, padding=1)

    monkeypatch.setattr(layout, "_gain", lambda call, *_: -1 if call.operands and last_reads == "NCL" else 1)
    graph = after(block, X)
    assert f"max %0 0.0; tf32 %1; out %0 fp32 {last_reads}; out %2 fp32 NLC" in graph
    assert f"max %0 0.0; tf32 %1; out %2 fp32 {last_reads}, " in graph


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


# what Inductor computes between

# rows off 16 bytes, which pointwise convolutions read better channels-last
ODD = torch.randn(2, 16, 15)
ONE, TWO = torch.randn(16, 16, 1), torch.randn(32, 16, 1)


def test_pointwise_operators_between_are_channels_last_too():
    def block(x, scale):
        y = F.conv1d(x, ONE)
        return F.conv1d(y.atan() * scale, TWO)

    assert_expected_inline(
        after(block, ODD, torch.randn(16, 1)),
        """\
v0: float32[2, 16, 15] = triton_conv.conv1d_fused.one(in0, in1, None, 1, [0, 0], 1, 1, False, zeros, out %0 fp32 NLC, [], False)
v1: float32[2, 16, 15] = aten.atan.default(v0)
v2: float32[2, 16, 15] = aten.mul.Tensor(v1, in2)
v3: float32[2, 32, 15] = triton_conv.conv1d.default(v2, in3, None, [1], [0], [1], 1)
return [v3]
""",
    )


def test_reductions_of_whole_samples_go_over_memory_in_order():
    def block(x):
        y = F.conv1d(x, ONE)
        return F.conv1d(y * y.mean((1, 2), keepdim=True), TWO)

    assert_expected_inline(
        after(block, ODD),
        """\
v0: float32[2, 16, 15] = triton_conv.conv1d_fused.one(in0, in1, None, 1, [0, 0], 1, 1, False, zeros, out %0 fp32 NLC, [], False)
v1: float32[2, 15, 16] = aten.permute.default(v0, [0, 2, 1])
v2: float32[2, 1, 1] = aten.mean.dim(v1, [1, 2], True)
v3: float32[2, 16, 15] = aten.mul.Tensor(v0, v2)
v4: float32[2, 32, 15] = triton_conv.conv1d.default(v3, in2, None, [1], [0], [1], 1)
return [v4]
""",
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_separator_is_channels_last_from_end_to_end(dtype):
    graph = after(Separator(16).to(dtype).eval(), torch.randn(2, 4, 15, dtype=dtype))
    lines = [line for line in graph.splitlines() if "conv1d" in line]
    assert sum("NLC" in line for line in lines) == len(lines) - 1 == 7


def test_explain_says_through_what_a_layout_goes():
    with torch.no_grad():
        records = explain(Separator(16).eval(), torch.randn(2, 4, 15)).records
    assert records[1].folded == "gt mul where, to NLC through var_mean mul add (read faster so)"
    assert [record.kernel for record in records if "g32" in record.convolution] == ["depthwise_sliding"] * 2


def test_explain_says_why_a_layout_was_chosen_or_not():
    def block(x):
        y = F.conv1d(x, ONE)
        return y.cumsum(2), F.conv1d(y, TWO)

    with torch.no_grad():
        assert [record.folded for record in explain(block, ODD).records] == ["NCL (aten.cumsum.default reads it)", ""]


def test_saved_activations_keep_their_strides():
    captured = Captured(Separator(16))
    captured(torch.randn(2, 4, 15))
    assert "conv1d" in captured.after[0] and "NLC" not in captured.after[0]


def between(compute, x=ODD, one=ONE, two=TWO):
    """The graph of two convolutions with something between them."""
    return after(lambda x: F.conv1d(compute(F.conv1d(x, one)), two), x)


FOLLOWS = {
    "views": lambda y: y.unsqueeze(1).atan().squeeze(1),
    "one for a channel": lambda y: y.atan() + torch.arange(16.0)[:, None],
    "one for a position": lambda y: y.atan() + torch.arange(15.0),
    "a norm over channels": lambda y: y / y.norm(dim=1, keepdim=True),
    "groups of channels": lambda y: y.reshape(2, 4, 4, 15).atan().reshape(2, 16, 15),
    "a comparison": lambda y: torch.where(y.atan() > 0.5, y, -1.0),
}
STAYS = {
    "a reduction over the length": lambda y: y.atan() * y.amax(2, keepdim=True),
    "a norm of each channel": lambda y: F.group_norm(y, 16),
    "a norm of groups": lambda y: F.group_norm(y, 2),
    "a scan": lambda y: y.cumsum(2),
    "aten": lambda y: y.atan() @ torch.eye(15),
    "a tensor of another layout": lambda y: y.atan() + ODD,
    "another order": lambda y: y.reshape(2, 8, 30).atan().reshape(2, 16, 15),
    "samples and channels as one": lambda y: y.reshape(32, 1, 15).atan().reshape(2, 16, 15),
    "a copy that is contiguous": lambda y: (
        y.atan().clone(memory_format=torch.contiguous_format).as_strided((2, 16, 15), (240, 15, 1))
    ),
}


@pytest.mark.parametrize("compute", FOLLOWS.values(), ids=FOLLOWS)
def test_what_follows(compute):
    assert "NLC" in between(compute)


@pytest.mark.parametrize("compute", STAYS.values(), ids=STAYS)
def test_what_stays_contiguous(compute):
    assert "NLC" not in between(compute)


def test_what_is_returned_stays_contiguous_with_all_that_it_is_made_of():
    def block(x):
        y = F.conv1d(x, ONE).atan()
        return F.conv1d(y.tan(), TWO), y

    assert "NLC" not in after(block, ODD)


def test_two_convolutions_that_are_combined_are_stored_alike():
    def block(x, returned):
        one, other = F.conv1d(x, ONE), F.conv1d(x, ONE)
        y = one.atan() * other.atan2(one)
        return F.conv1d(y, TWO), other.tan() if returned else other.sum()

    assert after(block, ODD, False).count("NLC") == 0
    assert after(lambda x: F.conv1d(F.conv1d(x, ONE).atan() * F.conv1d(x, -ONE).atan(), TWO), ODD).count("NLC") == 2


def test_slices_of_channels_follow():
    graph = after(lambda x: F.conv1d((y := F.conv1d(x, TWO))[:, :16].atan() * y[:, 16:], ONE), ODD)
    assert "NLC" in graph


def test_nothing_follows_for_a_convolution_of_aten(monkeypatch):
    monkeypatch.setattr(OperatorCall, "plan_reading", lambda *_: aten("it is faster"))
    assert "NLC" not in between(torch.atan)


@pytest.mark.parametrize(
    ("dtype", "L", "chosen"), [(torch.float32, 15, True), (torch.float32, 16, False), (torch.float16, 16, True)]
)
def test_float32_gains_only_where_rows_start_off_16_bytes(dtype, L, chosen):
    graph = between(torch.atan, torch.randn(2, 16, L, dtype=dtype), ONE.to(dtype), TWO.to(dtype))
    assert ("NLC" in graph) == chosen


@pytest.mark.parametrize(("K", "chosen"), [(3, True), (11, False)])
def test_depthwise_convolutions_gain_where_they_slide(K, chosen):
    weight = torch.randn(16, 1, K)

    def block(x):
        y = F.conv1d(x, ONE).atan()
        return F.conv1d(F.conv1d(y, weight, padding=K // 2, groups=16).atan(), TWO)

    # shorter rows have a kernel that holds them whole
    graph = after(block, torch.randn(2, 16, 47))
    assert ("NLC" in graph.splitlines()[0]) == chosen


def test_a_depthwise_convolution_reads_as_it_is_to_store():
    weight = torch.randn(16, 1, 9).half()
    one, two = ONE.half(), TWO.half()

    def block(x):
        y = F.conv1d(F.conv1d(x, one).atan(), weight, padding=4, groups=16)
        return F.conv1d(y.sin(), two)

    lines = after(block, torch.randn(2, 16, 375).half()).splitlines()
    assert ["NLC" in line for line in lines if "conv1d" in line] == [True, True, False]
