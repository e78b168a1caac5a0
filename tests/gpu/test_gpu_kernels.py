"""Every kernel on the GPU against float64: the geometries of the interpreter's tests, and what only a GPU shows."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

import torch_conv_triton
from torch_conv_triton import dispatch, execute, reference
from torch_conv_triton.problem import current_precision
from torch_conv_triton.testing import (
    CASES,
    LAYOUTS,
    Case,
    assert_within_budget,
    check_case,
    float32_precision,
    make_inputs,
    poisoned_allocations,
    random_cases,
)

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# large enough for every kernel of the plan table, and for the tiles of many channels
LARGE = (
    Case("wide_copied", 2, 256, 1400, 256, 5, padding=2),
    Case("wide_strided", 2, 128, 1001, 512, 3, stride=2, padding=1),
    Case("padded_channels", 3, 250, 500, 250, 7, padding=3),
    Case("padded_channels_strided", 3, 201, 1001, 250, 24, stride=3, padding=11, dilation=2),
    Case("vocoder", 2, 32, 80000, 32, 7, padding=9, dilation=3),
    Case("seed", 2, 64, 60000, 128, 3, stride=3, dilation=4),
    Case("three_tiles", 1, 192, 20000, 192, 7, padding=3),
    Case("many_channels_grouped", 2, 768, 499, 768, 16, padding=8, groups=16),
    Case("upsampled", 2, 256, 2400, 128, 8, stride=4, padding=2, transposed=True),
    Case("upsampled_short", 64, 256, 40, 256, 8, stride=4, padding=2, transposed=True),
    Case("upsampled_taps_left_over", 2, 512, 300, 128, 11, stride=5, padding=3, transposed=True),
    Case("transposed_stride_1", 2, 256, 1500, 256, 5, padding=1, dilation=2, transposed=True),
    Case("short", 256, 512, 8, 512, 5, padding=2),
    Case("last_layer", 2, 32, 30002, 1, 7, padding=3),
    Case("first_layer", 3, 1, 9001, 48, 7, padding=3),
    Case("raw_audio_odd_rows", 2, 1, 20001, 512, 10, stride=5),
    Case("filterbank_one_channel_over", 2, 1, 40000, 129, 256, stride=80, padding=128),
    Case("filterbank_of_odd_windows", 1, 1, 40001, 129, 250, stride=80),
    Case("many_taps", 4, 64, 700, 64, 40, padding=20, groups=2),
    Case("depthwise_odd_rows", 2, 264, 1000, 264, 4, padding=3, groups=264),
)


@pytest.fixture(params=["tf32", "ieee"])
def precision(request):
    with float32_precision(request.param):
        yield request.param


def check_every_plan(case: Case, dtype: torch.dtype, layout: str) -> None:
    """Each plan is within the budget of its dtype, on poisoned memory, and the same bit for bit in a second run."""
    tensors = make_inputs(case, dtype, layout, "cuda")
    problem = case.problem(*tensors)
    for plan in dispatch.candidates(problem, dispatch.device_for(tensors[0].device)):

        def run(x, weight, bias, plan=plan):
            return execute.forward_with(plan, problem, x, weight, bias)

        first, second = (check_case(case, run, dtype, layout, "cuda") for _ in range(2))
        assert torch.equal(first, second), plan


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [*CASES, *LARGE, *random_cases(40, seed=11)], ids=str)
def test_geometries_in_16_bits(case, dtype, layout):
    check_every_plan(case, dtype, layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", [*CASES, *LARGE, *random_cases(40, seed=13)], ids=str)
def test_geometries_in_float32(case, layout, precision):
    check_every_plan(case, torch.float32, layout)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [case for case in CASES if case.name in ("dense", "depthwise", "transposed")], ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_non_finite_values_spread_as_in_aten(case, dtype, value):
    x, weight, bias = make_inputs(case, dtype, device="cuda")
    x[0, 1, 7] = value
    expected = case.operator(F)(x, weight, bias)
    problem = case.problem(x, weight, bias)
    for plan in dispatch.candidates(problem, dispatch.device_for(x.device)):
        assert torch.equal(execute.forward_with(plan, problem, x, weight, bias).isfinite(), expected.isfinite()), plan


@pytest.mark.parametrize("dim", [0, 2])
def test_an_expanded_input_is_read_in_place(dim):
    # block copies too step over samples, or positions, by nothing
    case = Case("expanded", 3, 64, 300, 64, 3, padding=1)
    x = torch.randn(case.N, case.L_in, case.C_in, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    x = x.narrow(dim, 0, 1).expand(x.shape)
    _, weight, bias = make_inputs(case, torch.bfloat16, device="cuda")
    problem, expected = case.problem(x, weight, bias), reference.conv1d(x, weight, bias, *case.geometry)
    for plan in dispatch.candidates(problem, dispatch.device_for(x.device)):
        assert_within_budget(execute.forward_with(plan, problem, x, weight, bias), expected)


@pytest.mark.parametrize("groups", [1, 4])
def test_beyond_two_to_the_31_elements(groups):
    x = torch.randn(1, 4, 2**29 + 4099, device="cuda", dtype=torch.float16)
    weight = torch.randn(4, 4 // groups, 3, device="cuda", dtype=torch.float16)
    y = torch_conv_triton.conv1d(x, weight, padding=1, groups=groups)
    for part in (slice(None, 64), slice(-64, None)):
        inner = slice(None, 63) if part.start is None else slice(1, None)
        expected = reference.conv1d(x[:, :, part], weight, None, 1, 1, 1, groups)
        torch.testing.assert_close(y[:, :, part][:, :, inner].double(), expected[:, :, inner], rtol=2e-3, atol=2e-2)


@pytest.mark.parametrize("case", [case for case in LARGE if case.name in ("wide_copied", "vocoder", "upsampled")], ids=str)
def test_runs_on_the_current_stream_and_in_a_cuda_graph(case):
    x, weight, bias = make_inputs(case, torch.float16, "NLC", "cuda")
    conv = case.operator(torch_conv_triton)
    conv(x, weight, bias)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = conv(x, weight, bias)
    x.copy_(torch.randn_like(x))
    graph.replay()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        late = x.clone()
        beside = conv(late, weight, bias)
    stream.synchronize()
    assert torch.equal(beside, y)


@pytest.mark.parametrize("layout", ["NCL", "NLC"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [*CASES, *LARGE], ids=str)
def test_a_repeated_call_computes_what_it_is_given(case, dtype, layout, monkeypatch):
    monkeypatch.setattr(dispatch, "faster_in_aten", lambda problem: None)
    monkeypatch.setattr(execute, "_calls", {})
    dispatch.plan.cache_clear()
    conv = case.operator(torch_conv_triton)
    for seed in range(3):
        x, weight, bias = make_inputs(case, dtype, layout, "cuda", seed=seed)
        with poisoned_allocations():
            y = conv(x, weight, bias)
        assert_within_budget(y, reference.conv1d(x, weight, bias, *case.geometry), current_precision(dtype))
    dispatch.plan.cache_clear()


def test_a_thread_of_its_own_can_launch_every_kernel():
    with ThreadPoolExecutor(1) as pool:
        for case in LARGE:
            pool.submit(check_every_plan, case, torch.float16, "NLC").result()


def test_no_call_waits_for_the_device():
    x, weight, bias = make_inputs(LARGE[0], torch.float16, device="cuda")
    conv = LARGE[0].operator(torch_conv_triton)
    conv(x, weight, bias)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        conv(x, weight, bias)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients(dtype):
    case = LARGE[1]
    leaves = [t.detach().clone().requires_grad_() for t in make_inputs(case, dtype, device="cuda")]
    y = case.operator(torch_conv_triton)(*leaves)
    grad = torch.randn_like(y)
    actual = torch.autograd.grad(y, leaves, grad)
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    expected = torch.autograd.grad(case.operator(F)(*doubles), doubles, grad.double())
    for a, e in zip(actual, expected, strict=True):
        assert ((a.double() - e).norm() / e.norm()).item() < {torch.float32: 1e-3, torch.float16: 2e-3, torch.bfloat16: 1e-2}[
            dtype
        ]
