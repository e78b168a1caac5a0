"""What the graph pass makes of a graph: text before and after it, and every reason to keep a node."""

import operator

import pytest
import torch
from compiling import Captured, graph_text
from expecttest import assert_expected_inline
from torch import nn

from torch_conv_triton import dispatch
from torch_conv_triton.graph.manager import ConvolutionPass, PassChain, PassOptions
from torch_conv_triton.graph.report import Recorder

aten = torch.ops.aten


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    torch.manual_seed(0)


def inference_graphs(model, *args) -> tuple[str, str]:
    captured = Captured(model)
    with torch.no_grad():
        captured(*args)
    return captured.before[0], captured.after[0]


# graphs that Inductor hands over


def test_convolution_becomes_our_operator_with_its_bias():
    before, after = inference_graphs(nn.Conv1d(4, 6, 3, padding="same", dilation=2), torch.randn(2, 4, 16))
    assert_expected_inline(
        before,
        """\
v0: float32[2, 6, 16] = aten.convolution.default(in2, in0, in1, [1], [2], [2], False, [0], 1)
return [v0]
""",
    )
    assert_expected_inline(
        after,
        """\
v0: float32[2, 6, 16] = triton_conv.conv1d.default(in2, in0, in1, [1], [2], [2], 1)
return [v0]
""",
    )


def test_grouped_convolution_without_bias_and_batch():
    _, after = inference_graphs(nn.Conv1d(4, 8, 5, stride=2, groups=4, bias=False), torch.randn(4, 16))
    assert_expected_inline(
        after,
        """\
v0: float32[1, 4, 16] = aten.unsqueeze.default(in1, 0)
v1: float32[1, 8, 6] = triton_conv.conv1d.default(v0, in0, None, [2], [0], [1], 4)
v2: float32[8, 6] = aten.squeeze.dim(v1, 0)
return [v2]
""",
    )


def test_transposed_convolution_becomes_our_operator():
    model = nn.ConvTranspose1d(4, 6, 5, stride=3, padding=1, output_padding=2, groups=2)
    _, after = inference_graphs(model, torch.randn(2, 4, 7))
    assert_expected_inline(
        after,
        """\
v0: float32[2, 6, 23] = triton_conv.conv_transpose1d.default(in2, in0, in1, [3], [1], [2], 2, [1])
return [v0]
""",
    )


def test_frozen_batch_norm_is_folded_into_our_operator():
    # Dynamo looks at the setting too, before options of a compilation apply
    with torch._inductor.config.patch(freezing=True):
        _, after = inference_graphs(nn.Sequential(nn.Conv1d(4, 6, 3), nn.BatchNorm1d(6)).eval(), torch.randn(2, 4, 16))
    assert_expected_inline(
        after,
        """\
v0: float32[2, 6, 14] = triton_conv.conv1d.default(in0, constant1, constant2, [1], [0], [1], 1)
v1: float32[2, 6, 14] = prims.inductor_force_stride_order.default(v0, [84, 14, 1])
return [v1]
""",
    )


def test_convolutions_over_two_and_three_dimensions_are_untouched():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.three = nn.Conv1d(2, 2, 3), nn.Conv2d(2, 2, 3), nn.Conv3d(2, 2, 3)

        def forward(self, x, y, z):
            return self.one(x), self.two(y), self.three(z)

    _, after = inference_graphs(Mixed(), torch.randn(1, 2, 5), torch.randn(1, 2, 5, 5), torch.randn(1, 2, 5, 5, 5))
    # which of Inductor's operators they become depends on the machine
    assert [after.count("triton_conv.conv1d"), after.count("aten.convolution") + after.count("mkldnn")] == [1, 2]


def test_convolution_inside_a_branch_is_rewritten():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv1d(2, 2, 3)

        def forward(self, x):
            return torch.cond(x.sum() > 0, lambda x: self.conv(x), lambda x: self.conv(-x), (x,))

    captured = Captured(Branch())
    with torch.no_grad():
        captured(torch.randn(1, 2, 5))
    assert sum(graph.count("triton_conv.conv1d") for graph in captured.after) == 2


def training_graphs(model, x) -> tuple[str, str]:
    captured = Captured(model)
    captured(x).sum().backward()
    return captured.before[1], captured.after[1]


def test_backward_is_split_into_the_gradients():
    x = torch.randn(2, 4, 16, requires_grad=True)
    _, after = training_graphs(nn.Conv1d(4, 6, 3, stride=2, padding=1), x)
    assert_expected_inline(
        after,
        """\
v0: float32[2, 4, 16] = triton_conv.conv1d_input_grad.default(in2, in0, 16, [2], [1], [1], 1)
v1 = triton_conv.conv1d_weight_bias_grad.default(in2, in1, 3, [2], [1], [1], 1)
v2: float32[6, 4, 3] = getitem(v1, 0)
v3: float32[6] = getitem(v1, 1)
return [v2, v3, v0]
""",
    )


def test_the_bias_s_gradient_is_a_sum_where_no_kernel_computes_it_with_the_weight_s():
    x = torch.randn(2, 4, 16, requires_grad=True)
    _, after = training_graphs(nn.ConvTranspose1d(4, 6, 4, stride=2, padding=1), x)
    assert "conv1d_weight_grad.default(in1, in2" in after and "aten.sum.dim_IntList(in2, [0, 2])" in after
    _, after = training_graphs(nn.Conv1d(4, 6, 3).double(), x.double())
    assert "conv1d_weight_grad.default(in2, in1" in after and "aten.sum.dim_IntList(in2, [0, 2])" in after


def test_gradients_of_a_transposed_convolution_are_a_convolution_and_a_weight_gradient():
    x = torch.randn(2, 4, 16, requires_grad=True)
    _, after = training_graphs(nn.ConvTranspose1d(4, 6, 4, stride=2, padding=1, bias=False), x)
    assert_expected_inline(
        after,
        """\
v0: float32[2, 4, 16] = triton_conv.conv1d.default(in2, in0, None, [2], [1], [1], 1)
v1: float32[4, 6, 4] = triton_conv.conv1d_weight_grad.default(in1, in2, 4, [2], [1], [1], 1)
return [v1, v0]
""",
    )


def test_gradients_that_nothing_reads_are_not_computed():
    model = nn.Conv1d(4, 6, 3)
    model.weight.requires_grad_(False)
    model.bias.requires_grad_(False)
    _, after = training_graphs(model, torch.randn(2, 4, 16, requires_grad=True))
    assert_expected_inline(
        after,
        """\
v0: float32[2, 4, 16] = triton_conv.conv1d_input_grad.default(in2, in0, 16, [1], [0], [1], 1)
return [None, None, v0]
""",
    )


def test_backward_is_left_alone_when_the_option_says_so():
    captured = Captured(nn.Conv1d(4, 6, 3), **{"triton_conv.gradients": False})
    captured(torch.randn(2, 4, 16)).sum().backward()
    assert "triton_conv.conv1d" in captured.after[0]
    assert "aten.convolution_backward" in captured.after[1] and "triton_conv" not in captured.after[1]


# graphs built by hand: a node says its sizes, strides, dtype and device by a tensor, and nothing runs


class HandBuilt:
    """A graph of one convolution, or of its backward with the gradients of input and weight, and what the pass did to it."""

    def __init__(self, x, weight, bias=None, *, stride=1, dilation=1, transposed=False, output_padding=0, backward=False,
                 output_strides=None, input_grad_strides=None, fold=True):  # fmt: skip
        sizes = ([2 if stride == "symbolic" else stride], [1], [dilation], transposed, [output_padding], 1)
        y = aten.convolution(x.to("meta"), weight.to("meta"), None, *sizes)
        y = torch.empty_like(y, device=x.device)
        self.graph = torch.fx.Graph()
        geometry = ([self._integer(stride)], [1], [dilation], transposed, [output_padding], 1)
        inputs = [self._tensor(name, value) for name, value in (("x", x), ("weight", weight), ("bias", bias))]
        if backward:
            arguments = (self._tensor("grad_output", y), *inputs[:2], None, *geometry, [True, True, False])
            node = self.graph.call_function(aten.convolution_backward.default, arguments)
            outputs = []
            for index, gradient in enumerate((_with_strides(x, input_grad_strides), weight)):
                outputs.append(self.graph.call_function(operator.getitem, (node, index)))
                outputs[-1].meta["val"] = gradient
            self.graph.output(outputs)
        else:
            node = self.graph.call_function(aten.convolution.default, (*inputs, *geometry))
            node.meta["val"] = _with_strides(y, output_strides)
            self.graph.output([node])
        recorder = Recorder()
        ConvolutionPass(PassOptions(fold=fold), recorder)(self.graph)
        self.graph.lint()
        self.records = recorder.records

    def _tensor(self, name, value):
        if value is None:
            return None
        node = self.graph.placeholder(name)
        node.meta["val"] = value
        return node

    def _integer(self, value):
        return self._tensor("stride", 2) if value == "symbolic" else value

    @property
    def decisions(self) -> list[tuple[str, str, str]]:
        return [(record.kind, record.decision, record.reason) for record in self.records]


def _with_strides(tensor, strides):
    return tensor if strides is None else torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device)


X, WEIGHT, BIAS = torch.empty(2, 4, 10), torch.empty(4, 4, 3), torch.empty(4)
CHANNELS_LAST = (40, 1, 4)


def test_bias_is_peeled_off_where_aten_runs_on_a_gpu(monkeypatch):
    monkeypatch.setattr(dispatch, "device_for", lambda device: dispatch.INTERPRETER)
    monkeypatch.setattr(dispatch, "plan", lambda problem, device: dispatch.aten("cuDNN is faster here"))
    built = HandBuilt(*(t.to("meta") for t in (X, WEIGHT, BIAS)), stride=2)
    assert_expected_inline(
        graph_text(built.graph),
        """\
v0: float32[2, 4, 5] = triton_conv.conv1d.default(in0, in1, None, [2], [1], [1], 1)
v1: float32[4, 1] = aten.unsqueeze.default(in2, -1)
v2: float32[2, 4, 5] = aten.add.Tensor(v0, v1)
return [v2]
""",
    )
    assert built.decisions == [("forward", "rewritten", "cuDNN is faster here")]


@pytest.mark.parametrize(("tuned_without_bias", "stays"), [(False, True), (True, False)])
def test_a_kernel_that_won_with_the_bias_keeps_it_unless_aten_won_without(monkeypatch, tuned_without_bias, stays):
    kernel = dispatch.Plan("dense", None, "tuned: 1 ms, aten 2", tuned=True)
    without_bias = dispatch.Plan("aten", None, "without a bias aten runs", tuned=tuned_without_bias)
    monkeypatch.setattr(dispatch, "device_for", lambda device: dispatch.INTERPRETER)
    monkeypatch.setattr(dispatch, "plan", lambda problem, device: kernel if problem.has_bias else without_bias)
    built = HandBuilt(*(t.to("meta") for t in (X, WEIGHT, BIAS)), stride=2, fold=False)
    assert ("triton_conv.conv1d.default(in0, in1, in2," in graph_text(built.graph)) is stays
    assert built.decisions == [("forward", "rewritten", (kernel if stays else without_bias).reason)]


def test_bias_stays_where_aten_runs_on_the_cpu(monkeypatch):
    monkeypatch.setattr(dispatch, "plan", lambda problem, device: dispatch.aten("aten is faster here"))
    built = HandBuilt(X, WEIGHT, BIAS, stride=2)
    assert "triton_conv.conv1d.default(in0, in1, in2," in graph_text(built.graph)


KEPT = {
    "float64": (
        {"x": X.double(), "weight": WEIGHT.double()},
        "fp64 is computed by aten",
    ),
    "complex": (
        {"x": X.to(torch.complex64), "weight": WEIGHT.to(torch.complex64)},
        "complex64 is computed by aten",
    ),
    "empty batch": (
        {"x": X[:0], "weight": WEIGHT},
        "the input or the output is empty",
    ),
    "stride known only at run time": (
        {"x": X, "weight": WEIGHT, "stride": "symbolic"},
        "its stride, padding, dilation or groups is known only when the graph runs",
    ),
    "output in channels-last": (
        {"x": X, "weight": WEIGHT, "stride": 2, "output_strides": (20, 1, 4)},
        "the graph relies on an output with strides (20, 1, 4), ours is contiguous",
    ),
    "device without kernels": (
        {"x": X.to("meta"), "weight": WEIGHT.to("meta")},
        "no kernel of ours runs on meta",
    ),
}


@pytest.mark.parametrize(("arguments", "reason"), KEPT.values(), ids=KEPT)
def test_convolution_is_kept_with_its_reason(arguments, reason):
    built = HandBuilt(**arguments)
    assert built.decisions == [("forward", "kept", reason)]
    assert "aten.convolution.default" in graph_text(built.graph) and "triton_conv" not in graph_text(built.graph)


BACKWARD_KEPT = {
    "stride known only at run time": (
        {"stride": "symbolic"},
        "its stride, padding, dilation or groups is known only when the graph runs",
    ),
    "input gradient in channels-last": (
        {"stride": 2, "input_grad_strides": CHANNELS_LAST},
        f"the graph relies on a gradient with strides {CHANNELS_LAST}, ours is contiguous",
    ),
}


@pytest.mark.parametrize(("arguments", "reason"), BACKWARD_KEPT.values(), ids=BACKWARD_KEPT)
def test_backward_is_kept_with_its_reason(arguments, reason):
    built = HandBuilt(X, WEIGHT, backward=True, **arguments)
    assert built.decisions == [("input_grad", "kept", reason), ("weight_grad", "kept", reason)]
    assert "aten.convolution_backward.default" in graph_text(built.graph) and "triton_conv" not in graph_text(built.graph)


def test_gradients_of_an_output_padding_of_a_whole_stride_go_one_step_further_than_the_input():
    built = HandBuilt(X, WEIGHT, stride=2, transposed=True, output_padding=2, dilation=3, backward=True)
    assert_expected_inline(
        graph_text(built.graph),
        """\
v0: float32[2, 4, 11] = triton_conv.conv1d.default(in2, in1, None, [2], [1], [3], 1)
v1: float32[2, 4, 10] = aten.slice.Tensor(v0, 2, 0, 10)
v2: float32[2, 4, 10] = aten.clone.default(v1)
v3: float32[2, 4, 11] = aten.constant_pad_nd.default(in0, [0, 1])
v4: float32[4, 4, 3] = triton_conv.conv1d_weight_grad.default(v3, in2, 3, [2], [1], [3], 1)
return [v2, v4]
""",
    )


def test_strides_of_dimensions_of_size_one_do_not_count():
    built = HandBuilt(X, WEIGHT[:1], stride=2, output_strides=(5, 1, 1))
    assert [record.decision for record in built.records] == ["rewritten"]


def test_backward_of_a_dtype_without_kernels_is_split_all_the_same():
    built = HandBuilt(X.double(), WEIGHT.double(), stride=2, backward=True)
    assert_expected_inline(
        graph_text(built.graph),
        """\
v0: float64[2, 4, 10] = triton_conv.conv1d_input_grad.default(in2, in1, 10, [2], [1], [1], 1)
v1: float64[4, 4, 3] = triton_conv.conv1d_weight_grad.default(in2, in0, 3, [2], [1], [1], 1)
return [v0, v1]
""",
    )


def test_record_tells_the_problem_at_the_sizes_seen():
    record = HandBuilt(X.mT.contiguous().mT.bfloat16(), WEIGHT.bfloat16(), stride=2).records[0]
    assert (record.convolution, record.dtype, record.layout) == ("2x4x10 -> 4 K3 s2 p1 bf16 NLC", "bf16", "NLC")


# the pass as Inductor's caches see it


def test_name_for_the_caches_covers_the_options_and_where_kernels_run(monkeypatch):
    name = ConvolutionPass().uuid()
    assert name == ConvolutionPass(PassOptions(gradients=True)).uuid()
    assert name != ConvolutionPass(PassOptions(gradients=False)).uuid()
    with torch.autocast("cpu", torch.float16):
        in_half = ConvolutionPass().uuid()
    with torch.autocast("cpu", torch.bfloat16):
        assert len({name, in_half, ConvolutionPass().uuid()}) == 3
    monkeypatch.setattr(dispatch, "device_for", lambda device: None)
    assert name != ConvolutionPass().uuid()


def test_pass_that_records_is_never_cached():
    assert ConvolutionPass(recorder=Recorder()).uuid() is None


def test_passes_are_equal_when_they_do_the_same():
    assert ConvolutionPass() == ConvolutionPass() != ConvolutionPass(PassOptions(gradients=False))
    assert hash(ConvolutionPass()) == hash(ConvolutionPass())
    assert PassChain((len, ConvolutionPass())) == PassChain((len, ConvolutionPass())) != PassChain((ConvolutionPass(),))


def test_chain_runs_its_passes_in_order_and_has_a_name_if_all_have():
    seen = []
    chain = PassChain((lambda graph: seen.append("first"), lambda graph: seen.append("second")))
    chain(torch.fx.Graph())
    assert seen == ["first", "second"]
    assert chain.uuid() is None
    assert PassChain((ConvolutionPass(),)).uuid() == (ConvolutionPass().uuid(),)
