"""Which graphs wait for the host, and what of them is left to aten."""

import pytest
import torch
from torch import SymInt
from torch._inductor import config as inductor_config
from torch._subclasses import FakeTensorMode
from torch.fx import Graph
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from torch_conv_triton import dispatch
from torch_conv_triton.configs import INTERPRETER, Device
from torch_conv_triton.graph import chain
from torch_conv_triton.graph.host_bound import REASON, waits_for_host
from torch_conv_triton.graph.manager import ConvolutionPass
from torch_conv_triton.graph.report import Recorder

aten = torch.ops.aten
H200 = Device("an H200", capability=90, sm_count=132, shared_memory=232448)
SHORT, LONG = (1, 64, 400), (16, 64, 400_000)


@pytest.fixture(autouse=True)
def an_h200(monkeypatch):
    monkeypatch.setattr(dispatch, "device_for", lambda device: H200)


def decisions(*shapes, groups=1, products=0) -> list[tuple[str, bool]]:
    """What happens to convolutions of inputs of these shapes in one graph, and whether it is for the host's sake."""
    graph = Graph()
    for shape in shapes:
        x, weight = graph.placeholder("x"), graph.placeholder("weight")
        x.meta["val"] = shape if isinstance(shape, torch.Tensor) else torch.empty(shape, device="meta")
        channels = x.meta["val"].shape[1]
        weight.meta["val"] = torch.empty(channels, channels // groups, 3, device="meta")
        arguments = [1], [1], [1], False, [0], groups
        conv = graph.call_function(aten.convolution.default, (x, weight, None, *arguments))
        conv.meta["val"] = torch.empty_like(x.meta["val"])
    for _ in range(products):
        graph.call_function(aten.mm.default, (x, x)).meta["val"] = torch.empty(2, 2, device="meta")
    graph.output([conv])
    recorder = Recorder()
    ConvolutionPass(recorder=recorder)(graph)
    return [(record.decision, record.reason == REASON) for record in recorder.records]


def test_short_convolutions_are_left_to_aten():
    assert decisions(SHORT, SHORT) == 2 * [("kept", True)]


def test_long_convolutions_keep_the_gpu_busy_for_the_short_ones_beside_them():
    assert decisions(SHORT, SHORT, LONG) == 3 * [("rewritten", False)]
    # of more short ones the GPU is done before the host
    assert decisions(*300 * [SHORT], LONG)[-2:] == [("kept", True), ("rewritten", False)]


def test_groups_take_aten_longer_than_the_host():
    assert decisions(SHORT, SHORT, groups=64) == 2 * [("rewritten", False)]


def test_products_of_matrices_keep_the_gpu_busy_too():
    assert decisions(SHORT, SHORT, products=1) == 2 * [("kept", True)]
    assert decisions(SHORT, SHORT, products=2) == 2 * [("rewritten", False)]


def test_a_chain_takes_the_host_no_longer_than_aten(monkeypatch):
    monkeypatch.setattr(chain, "DEVICE_TYPES", ("meta",))
    graph = Graph()
    x, weight = graph.placeholder("x"), graph.placeholder("weight")
    x.meta["val"], weight.meta["val"] = torch.empty(SHORT, device="meta"), torch.empty(64, 64, 3, device="meta")
    node = x
    for _ in range(2):
        node = graph.call_function(aten.convolution.default, (node, weight, None, [1], [1], [1], False, [0], 1))
        node.meta["val"] = torch.empty(SHORT, device="meta")
    other = graph.call_function(aten.cumsum.default, (node, 2))
    alone = graph.call_function(aten.convolution.default, (other, weight, None, [1], [1], [1], False, [0], 1))
    other.meta["val"] = alone.meta["val"] = torch.empty(SHORT, device="meta")
    graph.output([alone])
    recorder = Recorder()
    ConvolutionPass(recorder=recorder)(graph)
    assert [record.decision for record in recorder.records] == ["rewritten", "rewritten", "kept"]
    assert recorder.records[2].reason == REASON
    assert sum(node.target is torch.ops.triton_conv.conv1d_chain.one for node in graph.nodes) == 1


def test_a_cuda_graph_does_not_wait():
    with inductor_config.patch("triton.cudagraphs", True):
        assert decisions(SHORT) == [("rewritten", False)]


def test_lengths_that_change_are_decided_when_the_operator_runs():
    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.STATIC, DimDynamic.STATIC, DimDynamic.DYNAMIC])
    x = FakeTensorMode(shape_env=ShapeEnv()).from_tensor(torch.empty(SHORT, device="meta"), symbolic_context=context)
    assert isinstance(x.shape[2], SymInt)
    assert decisions(x) == [("rewritten", False)]


def test_nothing_waits_where_nothing_is_compared_with_aten(monkeypatch):
    monkeypatch.setattr(dispatch, "device_for", lambda device: INTERPRETER)
    assert decisions(SHORT) == [("rewritten", False)]


def test_a_graph_without_convolutions_waits_for_nothing():
    assert not waits_for_host(Graph(), [])
