"""Kernels are compiled before they are launched: a rehearsal finds what a graph will launch, other processes compile it."""

import threading
from concurrent.futures import Future
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from chain_cases import BLOCK, block_tensors
from compiling import run_python
from torch._inductor.async_compile import AsyncCompile
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph
from torch.utils._pytree import tree_map_only

from torch_conv_triton import dispatch, execute, gradients
from torch_conv_triton.graph import ahead
from torch_conv_triton.graph.convolution import stand_in
from torch_conv_triton.kernels import builds
from torch_conv_triton.kernels.builds import Build
from torch_conv_triton.kernels.launch import rehearsal

ops = torch.ops.triton_conv
CPU = torch.device("cpu")
X, WEIGHT, BIAS, Y = torch.empty(2, 32, 40), torch.empty(32, 32, 3), torch.empty(32), torch.empty(2, 32, 38)
CALLS = {
    "conv1d": (ops.conv1d.default, (X, WEIGHT, BIAS)),
    "depthwise": (ops.conv1d.default, (X, WEIGHT[:, :1], None, [1], [2], [1], 32)),
    "conv_transpose1d": (ops.conv_transpose1d.default, (X, WEIGHT, BIAS, [2])),
    "input_grad": (ops.conv1d_input_grad.default, (Y, WEIGHT, 40)),
    "weight_grad": (ops.conv1d_weight_grad.default, (Y, X, 3)),
    "bias_grad": (ops.conv1d_bias_grad.default, (Y,)),
    "weight_bias_grad": (ops.conv1d_weight_bias_grad.default, (Y, X, 3)),
    "conv1d_fused": (
        ops.conv1d_fused.default,
        (X, WEIGHT, BIAS, 1, [1, 1], 1, 1, False, "zeros", "add %0 a0; tanh %1; out %2 fp32 NCL; out %1 fp32 NCL", [X], False),
    ),
    "conv1d_fused.one": (
        ops.conv1d_fused.one,
        (X, WEIGHT, None, 1, [1, 1], 1, 1, False, "reflect", "tanh %0; out %1 fp32 NCL", [], False),
    ),
}
CALLS |= {
    "conv1d_chain": (ops.conv1d_chain.default, (block_tensors(), str(BLOCK))),
    "conv1d_chain.one": (ops.conv1d_chain.one, (block_tensors(), str(replace(BLOCK, returned=(8,))))),
}


def launches(call) -> list[tuple]:
    """What is launched, each tensor by its strides and dtype, whatever device it is on."""

    def plain(value):
        if isinstance(value, torch.Tensor):
            return tuple(value.shape), value.stride(), value.dtype
        if isinstance(value, dict):
            return {name: plain(field) for name, field in value.items()}
        return tuple(map(plain, value)) if isinstance(value, tuple) else value

    with rehearsal() as noted:
        call()
    return [(kernel.__name__, plain(args), plain(keywords)) for kernel, args, keywords in noted]


@pytest.fixture(autouse=True)
def forget():
    """Calls are remembered with what was planned for the stand-in of a device."""
    yield
    execute.forget_plans()
    gradients.forget_plans()
    builds._under_way.clear()


@pytest.mark.parametrize("name", CALLS)
def test_a_call_without_data_launches_what_a_call_with_data_launches(name):
    operator, arguments = CALLS[name]
    compute = ahead.COMPUTE[operator]
    real = launches(lambda: compute(*arguments))
    on_meta = tree_map_only(torch.Tensor, stand_in, arguments)
    with dispatch.meta_stands_for(CPU):
        assert launches(lambda: compute(*on_meta)) == real != []


def test_every_operator_can_be_rehearsed():
    assert {operator for operator, _ in CALLS.values()} == ahead.COMPUTE.keys()


def graph_of(*names: str, device: str = "cuda") -> Graph:
    graph = Graph()

    def placeholder(tensor):
        node = graph.placeholder("x")
        with FakeTensorMode(allow_non_fake_inputs=True):
            node.meta["val"] = torch.empty_strided(tensor.shape, tensor.stride(), device=device)
        return node

    for name in names:
        operator, arguments = CALLS[name]
        graph.call_function(operator, tree_map_only(torch.Tensor, placeholder, arguments))
    graph.output(())
    return graph


class Pool:
    """Stands for Inductor's worker processes."""

    def __init__(self):
        self.submitted = []

    def submit(self, function, *arguments):
        self.submitted.append(arguments)
        future = Future()
        future.set_result(None)
        return future


@pytest.fixture
def pool(monkeypatch):
    """An H200, and kernels that are told by their names, since those of the interpreter do not compile."""
    found = Pool()
    monkeypatch.setattr(AsyncCompile, "process_pool", staticmethod(lambda: found))
    monkeypatch.setattr(dispatch, "_properties", lambda device: dispatch.INTERPRETER)
    monkeypatch.setattr(Build, "of", lambda kernel, args, keywords, target: f"{kernel.__name__} for {target}")
    monkeypatch.setattr("triton.runtime.driver", SimpleNamespace(active=SimpleNamespace(get_current_target=lambda: "sm_90")))
    monkeypatch.setattr(ahead, "get_compile_threads", lambda: 2)
    monkeypatch.setenv("TRITON_CACHE_DIR", "cache")
    return found


def test_each_kernel_of_a_graph_is_compiled_once_where_launches_look_for_it(pool):
    ahead.compile_ahead(graph_of("conv1d", "conv1d", "bias_grad"))
    kernels = [name for name, cache in pool.submitted if cache == "cache"]
    assert len(kernels) == len(set(kernels)) == len(pool.submitted)
    assert {"conv1d_dense_fwd_kernel for sm_90", "conv1d_bias_grad_kernel for sm_90"} <= set(kernels)
    assert len(builds._under_way) == len(kernels)


def test_nothing_is_compiled_ahead_on_the_cpu_or_in_one_process(pool, monkeypatch):
    ahead.compile_ahead(graph_of("conv1d", device="cpu"))
    monkeypatch.setattr(ahead, "get_compile_threads", lambda: 1)
    ahead.compile_ahead(graph_of("conv1d"))
    assert pool.submitted == []


def test_what_goes_wrong_is_logged_and_left_to_the_launch(pool, monkeypatch, caplog):
    def fail(*_):
        raise OSError("no more processes")

    monkeypatch.setattr(pool, "submit", fail)
    with caplog.at_level("INFO", "torch_conv_triton.graph.ahead"):
        ahead.compile_ahead(graph_of("conv1d"))
    assert "kernels are not compiled ahead: OSError: no more processes" in caplog.text


def test_a_launch_waits_for_builds_and_not_for_their_success(monkeypatch):
    made, failed, cancelled, lost = (Future() for _ in range(4))
    for build in (made, failed, cancelled, lost):
        builds.expect(build)
    failed.set_exception(RuntimeError("no such architecture"))
    cancelled.cancel()
    threading.Timer(0.2, made.set_result, [None]).start()
    monkeypatch.setattr(builds, "LONGEST_WAIT_S", 1.0)
    builds.await_expected()
    assert made.done() and not lost.done() and builds._under_way == []


def test_a_launch_finds_what_inductor_s_processes_built(tmp_path):
    """In a process of its own, where kernels are not interpreted, with an H200 that is not there."""
    code = """
import torch, triton
from triton.backends.compiler import GPUTarget
from torch_conv_triton import dispatch, execute
from torch_conv_triton.configs import Device
from torch_conv_triton.graph import ahead
from torch_conv_triton.kernels.builds import Build, await_expected
from torch_conv_triton.kernels.launch import rehearsal
target, gpu = GPUTarget("cuda", 90, 32), Device("H200", 90, 132, 232448)
dispatch.device_for = lambda device: gpu
with rehearsal() as launches:
    for dtype in (torch.float32, torch.bfloat16):
        x, weight = torch.empty(2, 64, 40000, dtype=dtype, device="meta"), torch.empty(64, 64, 7, dtype=dtype, device="meta")
        execute.forward(x, weight, None, 1, 1, 1, 1)
ahead._start([Build.of(*launch, target) for launch in launches], torch.device("cuda", 0))
await_expected()
class Driver:
    get_current_device = get_current_stream = lambda *_: 0
    get_current_target = lambda self: target
triton.runtime.driver.set_active(Driver())
triton.knobs.compilation.listener = lambda *, src, cache_hit, **_: print(src.name, cache_hit)
for kernel, args, keywords in launches:
    kernel.run(*args, grid=(1,), warmup=True, **keywords)
"""
    printed = run_python(code, TRITON_INTERPRET="0", TRITON_CACHE_DIR=None, TORCHINDUCTOR_CACHE_DIR=str(tmp_path))
    found = dict(line.split() for line in printed.splitlines())
    # one is written in Gluon
    names = {"conv1d_dense_halo_fwd_kernel", "pack_weight_chunks_kernel"}
    assert found == dict.fromkeys(names, "True"), printed


def test_the_key_of_a_kernel_does_not_depend_on_what_was_compiled_before_it():
    """Triton 3.6 and 3.7 put a helper's global constants into the key of a kernel only where the helper has a key already."""
    code = """
import importlib, pkgutil
import torch_conv_triton.kernels as kernels
from triton.language import constexpr
from triton.runtime.jit import JITCallable
for module in pkgutil.iter_modules(kernels.__path__):
    for name, kernel in vars(importlib.import_module(f"{kernels.__name__}.{module.name}")).items():
        if isinstance(kernel, JITCallable):
            kernel.cache_key
            print(name, *(name for (name, _), (value, _) in kernel.used_global_vals.items() if isinstance(value, constexpr)))
"""
    lines = run_python(code, TRITON_INTERPRET="0").splitlines()
    assert len(lines) > 80 and [line for line in lines if " " in line] == []
