"""What is folded into a convolution and what is not: graphs after the pass, and every reason to leave a node where it is."""

import pytest
import torch
import torch.nn.functional as F
from compiling import Capture, Captured
from expecttest import assert_expected_inline
from torch import nn
from torch._inductor.custom_graph_pass import CustomGraphPass

from torch_conv_triton import dispatch
from torch_conv_triton.backend import triton_conv
from torch_conv_triton.dispatch import Plan, aten
from torch_conv_triton.graph.call import OperatorCall


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    torch.manual_seed(0)


def after(function, *args, dynamic=False, **options) -> str:
    captured = Captured(function, dynamic=None, **options)
    if dynamic:
        args = [argument.clone() for argument in args]
        for argument in args:
            torch._dynamo.mark_dynamic(argument, 2)
    with torch.no_grad():
        captured(*args)
    return captured.after[0]


X, W, B, SQUARE = torch.randn(2, 4, 16), torch.randn(6, 4, 3), torch.randn(6), torch.randn(6, 6, 3)


def folded(text: str) -> bool:
    return "conv1d_fused" in text


# padding and cropping


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("constant", "[2, 3], 1, 1, False, zeros"),
        ("reflect", "[2, 3], 1, 1, False, reflect"),
        ("replicate", "[2, 3], 1, 1, False, replicate"),
        ("circular", "[2, 3], 1, 1, False, circular"),
    ],
)
@pytest.mark.parametrize("dynamic", [False, True])
def test_padding_is_folded(mode, expected, dynamic):
    graph = after(lambda x: F.conv1d(F.pad(x, (2, 3), mode=mode), W), X, dynamic=dynamic)
    assert f"None, 1, {expected}, out %0 fp32 NCL, [], False)" in graph
    assert graph.count("aten.") == 0 and graph.count("prims.") == 0


@pytest.mark.parametrize("pad", [(2, 0), (0, 2)])
def test_circular_padding_of_one_side_is_folded(pad):
    assert f"{list(pad)}, 1, 1, False, circular" in after(lambda x: F.conv1d(F.pad(x, pad, mode="circular"), W), X)


def test_reflection_in_half_precision_is_folded():
    # it is computed in float32
    weight = W.bfloat16()
    graph = after(lambda x: F.conv1d(F.pad(F.relu(x), (2, 3), mode="reflect"), weight), X.bfloat16())
    assert "[2, 3], 1, 1, False, reflect" in graph and "float32" not in graph


def test_zeros_add_to_those_of_the_convolution():
    graph = after(lambda x: F.conv1d(F.pad(x, (2, 0)), W, padding=1), X)
    assert "[3, 1], 1, 1, False, zeros" in graph


def test_same_padding_of_an_even_kernel_is_folded():
    weight = torch.randn(6, 4, 4)
    graph = after(lambda x: F.conv1d(x, weight, padding="same"), X)
    assert "[1, 2], 1, 1, False, zeros" in graph and "constant_pad_nd" not in graph


NOT_PADDING = {
    "another value": lambda x: F.conv1d(F.pad(x, (2, 0), value=1.0), W),
    "over channels too": lambda x: F.conv1d(F.pad(x, (2, 0, 1, 1)), W[:, :2].repeat(1, 3, 1)),
    "another user": lambda x: F.conv1d(p := F.pad(x, (2, 0)), W).sum() + p.sum(),
    "cropping": lambda x: F.conv1d(F.pad(x, (-1, 0)), W),
    "reflection before zeros": lambda x: F.conv1d(F.pad(x, (2, 2), mode="reflect"), W, padding=1),
    "of a transposed convolution": lambda x: F.conv_transpose1d(F.pad(x, (2, 0)), W.mT.reshape(4, 6, 3)),
    "another index": lambda x: F.conv1d(x[:, :, torch.arange(16).flip(0)], W),
    "by a mode, where one output channel reads whole vectors": lambda x: F.conv1d(F.pad(x, (2, 3), mode="reflect"), W[:1]),
    "two lengths": lambda x: F.conv1d(x[:, :, torch.arange(-2, 16).abs().clamp(0, 14)], W),
}


@pytest.mark.parametrize("function", NOT_PADDING.values(), ids=NOT_PADDING)
def test_what_is_no_padding_of_the_convolution_is_left(function):
    assert not folded(after(function, X))


@pytest.mark.parametrize("dynamic", [False, True])
def test_outputs_that_are_cut_off_are_not_computed(dynamic):
    graph = after(lambda x: -F.conv1d(x, W, padding=4, dilation=2)[..., : x.shape[-1]], X, dynamic=dynamic)
    assert "[4, 0], 2, 1, False, zeros, neg %0; out %1 fp32 NCL, [], False)" in graph and "slice" not in graph


def test_cutting_counts_in_strides():
    graph = after(lambda x: -F.conv1d(x, W, padding=3, stride=3)[..., 2:-1], X)
    assert "3, [-3, 0], 1, 1, False, zeros" in graph


def test_a_transposed_convolution_is_cut_by_more_padding():
    weight = torch.randn(4, 6, 5)
    graph = after(lambda x: -F.conv_transpose1d(x, weight, stride=2, padding=1, output_padding=1)[..., 1:-3], X)
    assert "2, [2, 3], 1, 1, True, zeros" in graph


def test_a_negative_pad_cuts():
    assert "[2, 0], 1, 1, False, zeros" in after(lambda x: F.pad(F.conv1d(x, W, padding=2), (0, -2)), X)


def test_what_is_cut_and_its_activation_are_both_stored():
    graph = after(
        lambda x: (y := F.conv1d(x, W)[..., 1:]).sum(2) @ W[:, 0, :2] + F.conv1d(F.elu(y), W.repeat(1, 2, 1)[:, :6]).sum(), X
    )
    assert "[-1, 0], 1, 1, False, zeros, gt %0 0.0; expm1 %0; where %1 %0 %2; tf32 %3; out %0 fp32 NCL; out %4 fp32 NCL" in graph


NOT_CROPS = {
    "another user": lambda x: (y := F.conv1d(x, W))[..., 1:].sum() + y.sum(),
    "steps": lambda x: -F.conv1d(x, W)[..., ::2],
    "over channels": lambda x: -F.conv1d(x, W)[:, 1:],
    "returned, with the strides of a view": lambda x: F.conv1d(x, W)[..., 1:],
}


@pytest.mark.parametrize("function", NOT_CROPS.values(), ids=NOT_CROPS)
def test_what_does_not_cut_the_ends_is_left(function):
    assert not folded(after(function, X))


# epilogues


SLOPE, ALPHA = torch.rand(6), torch.rand(1, 6, 1)
SAME = torch.randn(2, 6, 14)
MASK, MASK_OF_POSITIONS = SAME > 0, torch.rand(2, 1, 14) > 0.5
ACTIVATIONS = {
    "relu": (F.relu, "max %0 0.0"),
    "leaky relu": (lambda y: F.leaky_relu(y, 0.1), "gt %0 0.0; mul %0 0.1; where %1 %0 %2"),
    "elu": (F.elu, "gt %0 0.0; expm1 %0; where %1 %0 %2"),
    "silu": (F.silu, "neg %0; exp %1; add %2 1.0; div %0 %3"),
    "gelu": (F.gelu, "mul %0 0.5; mul %0 0.7071067811865476; erf %2; add %3 1.0; mul %1 %4"),
    "gelu by tanh": (
        lambda y: F.gelu(y, approximate="tanh"),
        "mul %0 0.5; mul %0 %0; mul %2 %0; mul %3 0.044715; add %0 %4; mul %5 0.7978845608028654; tanh %6; add %7 1.0; mul %1 %8",
    ),
    "tanh": (torch.tanh, "tanh %0"),
    "sigmoid": (torch.sigmoid, "sigmoid %0"),
    "hardswish": (F.hardswish, "add %0 3.0; max %1 0.0; min %2 6.0; mul %0 %3; div %4 6.0"),
    "clamp": (lambda y: y.clamp(-1, 2), "max %0 -1.0; min %1 2.0"),
    "prelu": (lambda y: F.prelu(y, SLOPE), "gt %0 0.0; mul %0 a0; where %1 %0 %2"),
    "snake": (
        lambda y: y + (ALPHA + 1e-9).reciprocal() * torch.sin(ALPHA * y).pow(2),
        "mul %0 a0; sin %1; pow2 %2; add a0 1e-09; reciprocal %4; mul %5 %3; add %0 %6",
    ),
    "scale": (lambda y: y * 0.5, "mul %0 0.5"),
    "scale by channel": (lambda y: y * ALPHA, "mul %0 a0"),
    "residual, then relu": (lambda y: F.relu(y + SAME), "add %0 a0; max %1 0.0"),
    "relu, then residual": (lambda y: 2 * SAME - F.relu(y), "max %0 0.0; mul a0 2.0; sub %2 %1"),
    "mask": (lambda y: y * MASK.float(), "mul %0 a0"),
    "masked fill": (lambda y: y.masked_fill(MASK_OF_POSITIONS, 0.0), "where a0 0.0 %0"),
    "gate": (lambda y: y * torch.sigmoid(SAME), "sigmoid a0; mul %0 %1"),
    "softplus": (F.softplus, "gt %0 20.0; exp %0; log1p %2; where %1 %0 %3"),
}


@pytest.mark.parametrize(("function", "program"), ACTIVATIONS.values(), ids=ACTIVATIONS)
def test_what_follows_becomes_the_epilogue(function, program):
    graph = after(lambda x: function(F.conv1d(x, W, B)), X)
    last = program.count(";") + 1
    assert f"zeros, {program}; out %{last} fp32 NCL, " in graph
    # a view of PReLU's slopes is left
    assert graph.count("aten.") == graph.count("aten.reshape")


def test_half_precision_is_rounded_once_at_the_end():
    graph = after(lambda x: F.silu(F.conv1d(x, W.bfloat16())) + SAME.bfloat16(), X.bfloat16())
    assert "neg %0; exp %1; add %2 1.0; div %0 %3; add %4 a0; out %5 bf16 NCL" in graph


def test_a_narrower_dtype_is_what_the_convolution_stores():
    assert_expected_inline(
        after(lambda x: F.conv1d(x, W, B).bfloat16(), X),
        """\
v0: bfloat16[2, 6, 14] = triton_conv.conv1d_fused.one(in0, in1, in2, 1, [0, 0], 1, 1, False, zeros, out %0 bf16 NCL, [], False)
return [v0]
""",
    )
    assert_expected_inline(
        after(lambda x: F.relu(F.conv1d(x, W).half() * 2), X),
        """\
v0: float16[2, 6, 14] = triton_conv.conv1d_fused.one(in0, in1, None, 1, [0, 0], 1, 1, False, zeros, mul %0 2.0; max %1 0.0; out %2 fp16 NCL, [], False)
return [v0]
""",  # noqa: E501
    )


def test_autocast_is_folded_to_the_dtype_that_the_graph_stores():
    def function(x):
        with torch.autocast("cpu", torch.bfloat16):
            return F.conv1d(x, W).float() + SAME

    # float32 after a bfloat16 convolution would be twice as much to write
    assert not folded(after(function, X))


def test_a_residual_block_stores_the_sum_and_its_activation():
    weight, later = torch.randn(4, 4, 3), torch.randn(4, 4, 3)

    def block(x):
        x = x + F.conv1d(x, weight, padding=1)
        return x + F.conv1d(F.leaky_relu(x, 0.1), later, padding=2, dilation=2)

    assert_expected_inline(
        after(block, X),
        """\
v0 = triton_conv.conv1d_fused.default(in0, in1, None, 1, [1, 1], 1, 1, False, zeros, add %0 a0; gt %1 0.0; mul %1 0.1; where %2 %1 %3; tf32 %4; out %1 fp32 NCL; out %5 fp32 NCL, [in0], False)
v1: float32[2, 4, 16] = getitem(v0, 0)
v2: float32[2, 4, 16] = getitem(v0, 1)
v3: float32[2, 4, 16] = triton_conv.conv1d_fused.one(v2, in2, None, 1, [2, 2], 2, 1, False, zeros, add %0 a0; out %1 fp32 NCL, [v1], True)
return [v3]
""",  # noqa: E501
    )


def test_equal_activations_of_one_convolution_are_computed_once():
    weights = [torch.randn(6, 6, 3) for _ in range(3)]
    graph = after(lambda x: sum(F.conv1d(F.leaky_relu(y), w) for y in [F.conv1d(x, W)] for w in weights), X)
    assert graph.count("where") == 1


def test_the_sum_of_two_convolutions_goes_to_the_later_one():
    other = torch.randn(6, 4, 3)
    assert_expected_inline(
        after(lambda x: F.relu(F.conv1d(x, W) + F.conv1d(x, other)), X),
        """\
v0: float32[2, 6, 14] = triton_conv.conv1d.default(in0, in1, None, [1], [0], [1], 1)
v1: float32[2, 6, 14] = triton_conv.conv1d_fused.one(in0, in2, None, 1, [0, 0], 1, 1, False, zeros, add %0 a0; max %1 0.0; out %2 fp32 NCL, [v0], False)
return [v1]
""",  # noqa: E501
    )


def test_chains_end_before_a_third_value_to_store():
    def function(x):
        y = F.conv1d(x, W)
        z = y * 2
        return y, z, z + 1

    graph = after(function, X)
    assert "mul %0 2.0; out %0 fp32 NCL; out %1 fp32 NCL" in graph and "aten.add" in graph


def test_a_value_that_is_returned_stays_an_output():
    def function(x):
        y = F.conv1d(x, W)
        return y, F.relu(y)

    assert "max %0 0.0; out %0 fp32 NCL; out %1 fp32 NCL" in after(function, X)


def test_a_second_output_is_not_written_for_a_reduction():
    def function(x):
        y = F.conv1d(x, W)
        return y, F.relu(y).sum()

    assert not folded(after(function, X))


def test_an_operand_that_depends_on_the_convolution_is_not_one():
    graph = after(lambda x: (y := F.conv1d(x, W)) * y.mean(2, keepdim=True), X)
    assert not folded(graph)


def test_the_operand_may_be_computed_after_the_convolution():
    other = torch.randn(8, 14)
    graph = after(lambda x: F.conv1d(x, W) + (x.mean(2) @ other.reshape(4, 28)[:, :14])[:, None], X)
    assert "add %0 a0" in graph


# halves of the channels

CONDITION, DOUBLE = torch.randn(2, 6, 1), torch.randn(12, 6, 3)


def gate(y):
    first, second = y.chunk(2, 1)
    return torch.tanh(first) * torch.sigmoid(second)


def test_a_gated_linear_unit_is_computed_of_both_halves():
    assert_expected_inline(
        after(lambda x: F.glu(F.conv1d(x, W, B), 1), X),
        """\
v0: float32[2, 3, 14] = triton_conv.conv1d_fused.one(in0, in1, in2, 1, [0, 0], 1, 1, False, zeros, halve; sigmoid %1; mul %0 %2; out %3 fp32 NCL, [], False)
return [v0]
""",  # noqa: E501
    )


def test_a_gate_is_computed_of_what_is_added_to_the_whole():
    def wavenet(x, condition):
        return gate(F.conv1d(F.pad(x, (2, 0)), W, B) + condition)

    assert_expected_inline(
        after(wavenet, X, CONDITION),
        """\
v0: float32[2, 3, 1] = aten.slice.Tensor(in3, 1, 3, 6)
v1: float32[2, 3, 1] = aten.slice.Tensor(in3, 1, 0, 3)
v2: float32[2, 3, 16] = triton_conv.conv1d_fused.one(in0, in1, in2, 1, [2, 0], 1, 1, False, zeros, halve; add %0 a0; add %1 a1; tanh %2; sigmoid %3; mul %4 %5; out %6 fp32 NCL, [v1, v0], False)
return [v2]
""",  # noqa: E501
    )


def test_halves_may_go_different_ways():
    def residual_and_skip(x, skip):
        first, second = F.conv1d(x, DOUBLE, padding=1).split(6, 1)
        return x + first, skip + second

    assert_expected_inline(
        after(residual_and_skip, SAME, SAME.clone()),
        """\
v0 = triton_conv.conv1d_fused.default(in0, in1, None, 1, [1, 1], 1, 1, False, zeros, halve; add %0 a0; add %1 a1; out %2 fp32 NCL; out %3 fp32 NCL, [in0, in2], False)
v1: float32[2, 6, 14] = getitem(v0, 0)
v2: float32[2, 6, 14] = getitem(v0, 1)
return [v1, v2]
""",  # noqa: E501
    )


GATES = {
    "slices": (lambda y: torch.tanh(y[:, :3]) * torch.sigmoid(y[:, 3:]), "halve; tanh %0; sigmoid %1; mul %2 %3"),
    "slices from the end": (lambda y: y[:, -3:] * torch.relu(y[:, :-3]), "halve; max %0 0.0; mul %1 %2"),
    "split": (lambda y: torch.sub(*y.split([3, 3], 1)), "halve; sub %0 %1"),
    "SwiGLU": (lambda y: F.silu(y[:, :3]) * y[:, 3:], "halve; neg %0; exp %2; add %3 1.0; div %0 %4; mul %5 %1"),
    "before and after": (
        lambda y: F.relu(gate(y * 0.5) + 1),
        "halve; mul %0 0.5; mul %1 0.5; tanh %2; sigmoid %3; mul %4 %5; add %6 1.0; max %7 0.0",
    ),
    "a residual": (lambda y: SAME[:, :3] - F.glu(F.relu(y), 1), "sub a0 %5"),
    "a scale by channel": (lambda y: F.glu(y * ALPHA, 1), "halve; mul %0 a0; mul %1 a1; sigmoid %3; mul %2 %4"),
    "one half alone": (lambda y: torch.tanh(y[:, 3:]), "halve; tanh %1"),
    "another convolution": (lambda y: F.conv1d(F.glu(y, 1), W[:, :3]), "halve; sigmoid %1; mul %0 %2; tf32 %3; out %4 fp32 NCL"),
}


@pytest.mark.parametrize(("function", "program"), GATES.values(), ids=GATES)
def test_what_is_computed_of_halves_becomes_the_epilogue(function, program):
    graph = after(lambda x: function(F.conv1d(x, W, B)), X)
    assert program in graph and graph.count("conv1d.default") == 0
    # operands are cut in half, and then there are views of them
    assert graph.count("aten.") == graph.count("aten.slice")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gates_of_half_precision_are_rounded_once(dtype):
    graph = after(lambda x: gate(F.conv1d(x, W.to(dtype))), X.to(dtype))
    assert "halve; tanh %0; sigmoid %1; mul %2 %3; out %4" in graph and "float32" not in graph


def test_gates_of_lengths_that_change_are_folded():
    graph = after(lambda x: gate(F.conv1d(x, W, padding=1) + x.mean(2)[:, :1, None]), X, dynamic=True)
    assert "halve; add %0 a0; add %1 a0; tanh %2; sigmoid %3; mul %4 %5" in graph


NOT_HALVES = {
    "another user of the whole": lambda y: F.glu(y, 1).sum() + y.sum(),
    "unequal parts": lambda y: torch.tanh(y[:, :2]) * torch.sigmoid(y[:, 4:]),
    "more parts": lambda y: y.chunk(3, 1)[0] * y.chunk(3, 1)[1],
    "over the length": lambda y: F.glu(y, 2),
    "over the samples": lambda y: y[:1] * torch.sigmoid(y[1:]),
    "every other channel": lambda y: y[:, ::2] * torch.sigmoid(y[:, 1::2]),
    "three values to store": lambda y: (y[:, :3] + 1, y[:, :3] * 2, y[:, 3:] * 3),
    "only views": lambda y: torch.cumsum(y[:, :3], 2) + torch.cumsum(y[:, 3:], 2),
    "a view that is returned": lambda y: (torch.tanh(y[:, :3]), y[:, 3:]),
    "a reduction of the whole": lambda y: F.glu(F.softmax(y, 1), 1),
}


@pytest.mark.parametrize("function", NOT_HALVES.values(), ids=NOT_HALVES)
def test_what_is_not_of_two_halves_is_left(function):
    assert "halve" not in after(lambda x: function(F.conv1d(x, W)), X)


def test_gates_of_grouped_and_of_transposed_convolutions_are_left():
    weight, across = torch.randn(8, 2, 3), torch.randn(4, 6, 3)
    assert "halve" not in after(lambda x: F.glu(F.conv1d(x, weight, groups=2), 1), X)
    assert "halve" not in after(lambda x: F.glu(F.conv_transpose1d(x, across), 1), X)


def test_a_gate_of_two_channels_is_left():
    assert not folded(after(lambda x: gate(F.conv1d(x, W[:2])), X))


def test_gates_are_left_where_another_kernel_is_the_fastest_without_them(monkeypatch):
    plan = OperatorCall.plan
    persistent = Plan("dense_persistent", None, "")
    monkeypatch.setattr(OperatorCall, "plan", lambda call: plan(call) if call.program.instructions else persistent)
    graph = after(lambda x: F.glu(F.relu(F.conv1d(x, W)), 1), X)
    assert "max %0 0.0; out %1" in graph and "aten.glu" in graph


def test_what_stands_before_a_gate_is_folded_where_the_gate_cannot_be():
    weight = torch.randn(8, 2, 3)
    graph = after(lambda x: F.glu(F.relu(F.conv1d(x, weight, groups=2)), 1), X)
    assert "max %0 0.0; out %1" in graph and "aten.glu" in graph and "slice" not in graph


LEFT = {
    "integers": lambda y: y * torch.arange(14),
    "float64": lambda y: y.double() * 2,
    "another power": lambda y: y**2.5,
    "another shape": lambda y: F.relu(y.reshape(2, -1)),
    "an unknown operator": lambda y: torch.special.i0(y),
}


@pytest.mark.parametrize("function", LEFT.values(), ids=LEFT)
def test_what_no_instruction_computes_is_left(function):
    assert not folded(after(lambda x: function(F.conv1d(x, W)), X))


def test_what_inductor_computes_in_one_kernel_with_another_user_is_left():
    assert_expected_inline(
        after(lambda x: F.relu(y := F.conv1d(x, W)).sum(2) + y.amax(2), X),
        """\
v0: float32[2, 6, 14] = triton_conv.conv1d.default(in0, in1, None, [1], [0], [1], 1)
v1: float32[2, 6, 14] = aten.relu.default(v0)
v2: float32[2, 6] = aten.sum.dim_IntList(v1, [2])
v3: float32[2, 6] = aten.amax.default(v0, [2])
v4: float32[2, 6] = aten.add.Tensor(v2, v3)
return [v4]
""",
    )


def test_a_sum_of_a_wider_dtype_is_left():
    # it would be twice as much to write
    assert_expected_inline(
        after(lambda x: F.relu(F.conv1d(x, W.bfloat16()) + SAME), X.bfloat16()),
        """\
v0: bfloat16[6, 4, 3] = prims.convert_element_type.default(in0, torch.bfloat16)
v1: bfloat16[2, 6, 14] = triton_conv.conv1d.default(in1, v0, None, [1], [0], [1], 1)
v2: float32[2, 6, 14] = aten.add.Tensor(v1, in2)
v3: float32[2, 6, 14] = aten.relu.default(v2)
return [v3]
""",
    )


def test_a_sum_that_repeats_the_convolution_is_left():
    assert_expected_inline(
        after(lambda x: F.relu(F.conv1d(x[:1], W) + SAME), X),
        """\
v0: float32[1, 4, 16] = aten.slice.Tensor(in0, 0, 0, 1)
v1: float32[1, 6, 14] = triton_conv.conv1d.default(v0, in1, None, [1], [0], [1], 1)
v2: float32[2, 6, 14] = aten.add.Tensor(v1, in2)
v3: float32[2, 6, 14] = aten.relu.default(v2)
return [v3]
""",
    )


def test_complex_numbers_are_left():
    assert_expected_inline(
        after(lambda x: torch.abs(F.relu(F.conv1d(x, W)) * 1j), X),
        """\
v0: float32[2, 6, 14] = triton_conv.conv1d_fused.one(in0, in1, None, 1, [0, 0], 1, 1, False, zeros, max %0 0.0; out %1 fp32 NCL, [], False)
v1: complex64[2, 6, 14] = aten.mul.Tensor(v0, 1j)
v2: float32[2, 6, 14] = aten.abs.default(v1)
return [v2]
""",  # noqa: E501
    )


def test_a_number_of_the_graph_is_left():
    assert_expected_inline(
        after(lambda x: F.relu(F.conv1d(x, W, padding=1) * x.shape[-1]), X, dynamic=True),
        """\
v0: float32[2, 6, s53] = triton_conv.conv1d.default(in1, in2, None, [1], [1], [1], 1)
v1: float32[2, 6, s53] = aten.mul.Tensor(v0, in0)
v2: float32[2, 6, s53] = aten.relu.default(v1)
return [v2]
""",
    )


def test_lengths_that_change_are_folded():
    graph = after(lambda x, r: F.relu(F.conv1d(x, W, padding=1) + r), X, torch.randn(2, 6, 16), dynamic=True)
    assert "add %0 a0; max %1 0.0" in graph


def test_a_state_is_read_before_it_is_written():
    class Running(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("state", torch.zeros(6, 1))

        def forward(self, x):
            y = F.conv1d(x, W)
            z = y + self.state
            self.state.add_(1)
            return z

    model = Running()
    captured = Captured(model)
    with torch.no_grad():
        expected = F.conv1d(X, W) + model.state
        torch.testing.assert_close(captured(X), expected, rtol=0, atol=1e-2)
        torch.testing.assert_close(captured(X), expected + 1, rtol=0, atol=1e-2)
    assert folded(captured.after[0])


class WriteEarly(CustomGraphPass):
    """A user's pass that writes to an input as soon as the value is there. Inductor writes at the end of a graph."""

    def __call__(self, graph):
        for node in graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default):
            node.args[1].append(node)

    def uuid(self):
        """No name, so it always runs."""


def after_early_writes(function, state) -> str:
    """The graph of a function of `X` and a state that it adds 1 to, where that is written early; its values are checked."""
    seen, expected_state = Capture(), state.clone()
    passes = {"post_grad_custom_pre_pass": WriteEarly(), "post_grad_custom_post_pass": seen}
    compiled = torch.compile(function, backend=triton_conv, options=passes)
    with torch.no_grad():
        for _ in range(2):
            actual, expected = compiled(X, state), function(X, expected_state)
            torch.testing.assert_close(actual, expected, rtol=0, atol=1e-2)
            assert torch.equal(state, expected_state)
    return seen.graphs[0]


def test_nothing_is_folded_over_a_write():
    def function(x, state):
        y = F.conv1d(x, W)
        state.add_(1)
        return F.relu(y + state)

    assert_expected_inline(
        after_early_writes(function, torch.zeros(6, 1)),
        """\
v0: float32[2, 6, 14] = triton_conv.conv1d.default(in0, in1, None, [1], [0], [1], 1)
v1: float32[6, 1] = aten.add.Tensor(in2, 1)
v2: float32[6, 1] = aten.copy_.default(in2, v1)
v3: float32[2, 6, 14] = aten.add.Tensor(v0, v1)
v4: float32[2, 6, 14] = aten.relu.default(v3)
return [v4]
""",
    )


def test_nothing_is_folded_after_a_write():
    def function(x, state):
        state.add_(1)
        return F.relu(F.conv1d(F.pad(x + state, (2, 0)), W))

    assert_expected_inline(
        after_early_writes(function, torch.zeros(4, 1)),
        """\
v0: float32[4, 1] = aten.add.Tensor(in0, 1)
v1: float32[4, 1] = aten.copy_.default(in0, v0)
v2: float32[2, 4, 16] = aten.add.Tensor(in1, v0)
v3: float32[2, 4, 18] = aten.constant_pad_nd.default(v2, [2, 0], 0.0)
v4: float32[2, 6, 16] = triton_conv.conv1d.default(v3, in2, None, [1], [0], [1], 1)
v5: float32[2, 6, 16] = aten.relu.default(v4)
return [v5]
""",
    )


def test_operators_of_ours_that_the_model_calls_itself_are_left():
    def function(x):
        y = F.relu(torch.ops.triton_conv.conv1d(x, W))
        y = F.relu(F.conv1d(y, SQUARE))
        return torch.ops.triton_conv.conv1d(y, SQUARE)

    graph = after(function, X)
    assert graph.count("triton_conv.conv1d.default") == 2 and graph.count("conv1d_fused") == 1 and "tf32" not in graph


# training, options, decisions


def test_what_backward_saves_stays_an_output():
    conv = nn.Conv1d(4, 6, 3)
    captured = Captured(lambda x: F.silu(conv(x)))
    captured(X).sum().backward()
    forward = captured.after[0]
    assert "out %0 fp32 NCL; out %4 fp32 NCL" in forward


def test_nothing_is_folded_when_the_option_says_so():
    assert not folded(after(lambda x: F.relu(F.conv1d(x, W)), X, **{"triton_conv.fold": False}))


def test_nothing_is_folded_where_aten_would_compute_it(monkeypatch):
    monkeypatch.setattr(OperatorCall, "plan", lambda call: aten("it is faster"))
    assert not folded(after(lambda x: F.relu(F.conv1d(x, W)), X))


def test_what_aten_computes_alone_is_folded_where_that_saves_a_pass_over_the_output(monkeypatch):
    by_sizes = dispatch.plan
    monkeypatch.setattr(dispatch, "plan", lambda problem, device: by_sizes(problem, device) if problem.has_bias else aten(""))
    twice = after(lambda x: F.conv1d(F.relu(F.conv1d(x, W)), SQUARE, B), X)
    assert "zeros, max %0 0.0; tf32 %1; out %2 fp32 NCL" in twice
    assert "zeros, max %0 0.0; out %1 fp32 NCL" in after(lambda x: F.relu(F.conv1d(x, W)), X)
    # Inductor computes the activation together with the sum
    assert not folded(after(lambda x: F.relu(F.conv1d(x, W)).sum(2), X))


def test_padding_is_folded_where_the_epilogue_cannot_be(monkeypatch):
    with_epilogues = OperatorCall.plan
    monkeypatch.setattr(OperatorCall, "plan", lambda call: aten("") if call.program.instructions else with_epilogues(call))
    graph = after(lambda x: F.relu(F.conv1d(F.pad(x, (2, 0)), W)), X)
    assert folded(graph) and "relu" in graph and "constant_pad_nd" not in graph
