"""What tests of fused convolutions share: activations as programs, a problem for every kernel, how the operator is called."""

from dataclasses import replace

import torch
import torch.nn.functional as F

from torch_conv_triton import dispatch, fused, reference
from torch_conv_triton.configs import Config
from torch_conv_triton.problem import dtype_name
from torch_conv_triton.testing import Case, float32_precision, in_nan_buffer, make_inputs, poisoned_allocations

# name: (text of the activation of %0, which ends in the last value; the same in torch), in float64 alike
CHAINS = {
    "leaky_relu": ("mul %0 0.1; gt %0 0.0; where %2 %0 %1", lambda y: F.leaky_relu(y, 0.1)),
    "snake": ("mul %0 1.5; sin %1; pow2 %2; div %3 1.5; add %0 %4", lambda y: y + (1.5 * y).sin() ** 2 / 1.5),
    "silu": ("sigmoid %0; mul %0 %1", F.silu),
    "gelu": ("mul %0 0.7071067811865476; erf %1; add %2 1.0; mul %0 %3; mul %4 0.5", F.gelu),
    "gelu_tanh": (
        "pow2 %0; mul %0 %1; mul %2 0.044715; add %0 %3; mul %4 0.7978845608028654; tanh %5; add %6 1.0; mul %0 %7; mul %8 0.5",
        lambda y: F.gelu(y, approximate="tanh"),
    ),
    "elu": ("expm1 %0; gt %0 0.0; where %2 %0 %1", F.elu),
    "clamp": ("max %0 -0.5; min %1 0.25", lambda y: y.clamp(-0.5, 0.25)),
    "hardswish": ("add %0 3.0; max %1 0.0; min %2 6.0; mul %0 %3; div %4 6.0", F.hardswish),
    "softplus": ("exp %0; log1p %1", F.softplus),
}


# every kernel that fuses, on a problem that it suits
FAMILIES = {
    "dense": (Case("dense", 2, 32, 71, 40, 3, padding=2, dilation=2), "NCL", None),
    "dense_weights_left": (Case("dense", 2, 32, 71, 72, 3, padding=1), "NCL", Config(64, 64, 16, weights_left=True)),
    "dense_over_samples": (Case("dense", 3, 32, 7, 40, 3, padding=1), "NCL", None),
    "dense_grouped": (Case("grouped", 2, 32, 33, 48, 3, padding=1, groups=2), "NLC", None),
    "dense_copied": (
        Case("dense", 2, 64, 41, 64, 5, stride=2, padding=2),
        "NCL",
        Config(64, 64, 32, tap_major=True, copy_to_nlc=True),
    ),
    "dense_few_outputs": (Case("few_outputs", 2, 9, 61, 3, 7, padding=3), "NCL", None),
    "dense_frames": (Case("filterbank", 2, 1, 300, 40, 40, stride=16, padding=20), "NCL", None),
    "dense_frames_beside_a_tile": (Case("filterbank", 2, 1, 304, 33, 32, stride=8), "NCL", Config(16, 32, 32, tap_major=True)),
    "dense_runs": (Case("runs", 2, 32, 61, 24, 20, padding=9, groups=2), "NCL", None),
    "dense_runs_over_samples": (
        Case("runs", 3, 16, 21, 24, 12, padding=5),
        "NLC",
        Config(32, 64, 16, tap_major=True, merge_taps=True, run=4),
    ),
    "dense_persistent": (
        Case("dense", 2, 16, 150, 16, 3, padding=1),
        "NCL",
        Config(32, 16, 16, num_stages=2, tap_major=True),
    ),
    "dense_in_halves": (Case("dense", 1, 32, 150, 136, 3, padding=1), "NLC", Config(128, 128, 32, tap_major=True)),
    "dense_in_halves_left": (Case("dense", 1, 32, 150, 136, 3), "NCL", Config(128, 128, 16, weights_left=True)),
    "dense_tma": (Case("dense", 2, 32, 70, 40, 4, stride=2, padding=1), "NLC", None),
    "dense_tma_in_two_parts": (
        Case("dense", 2, 64, 69, 104, 3, padding=2, dilation=2),
        "NLC",
        Config(64, 64, 32, tap_major=True, TAIL_N=32),
    ),
    "dense_tma_pointwise": (Case("dense", 2, 128, 69, 128, 1), "NLC", Config(32, 128, 64, num_stages=2, tap_major=True)),
    "dense_tma_pointwise_in_two_parts": (
        Case("dense", 2, 96, 69, 96, 1),
        "NLC",
        Config(64, 64, 32, num_stages=2, tap_major=True, TAIL_N=32),
    ),
    "transposed": (Case("transposed", 2, 16, 20, 24, 5, stride=3, padding=2, transposed=True, output_padding=1), "NCL", None),
    "transposed_interleaved": (Case("transposed", 2, 16, 50, 20, 4, stride=2, padding=1, transposed=True), "NCL", None),
    "transposed_interleaved_row_by_row": (Case("by_row", 2, 512, 9, 5, 8, stride=3, padding=2, transposed=True), "NCL", None),
    "transposed_tma": (Case("transposed", 3, 32, 9, 24, 4, stride=2, padding=1, transposed=True), "NCL", None),
    "depthwise": (Case("depthwise", 2, 9, 45, 18, 5, stride=2, padding=2, groups=9), "NCL", None),
    "depthwise_transposed": (Case("depthwise", 2, 9, 25, 9, 4, stride=2, padding=1, groups=9, transposed=True), "NCL", None),
    "depthwise_vector": (Case("depthwise", 2, 6, 64, 6, 5, padding=2, groups=6), "NCL", None),
    "depthwise_toeplitz": (Case("depthwise", 2, 6, 211, 6, 31, padding=15, groups=6), "NCL", None),
    "depthwise_toeplitz_aligned": (Case("depthwise", 2, 6, 96, 12, 11, padding=5, groups=6), "NCL", None),
    "depthwise_sliding": (Case("depthwise", 2, 24, 61, 24, 4, padding=3, groups=24), "NLC", None),
}
# kernels whose first output has contiguous rows
BY_ROWS = ("depthwise_vector", "depthwise_toeplitz")
# a residual before the activation, a scale by channel and a shift after it
PROGRAM = "add %0 a0; mul %1 0.1; gt %1 0.0; where %3 %1 %2; mul %4 a1; add %5 a2"


# a gate of both halves of the channels, after something was added to the first and before a residual, and the second half
GATE = "halve; add %0 a0; tanh %2; sigmoid %1; mul %3 %4; add %5 a1"
# every way in which a kernel computes it
GATED = {
    "dense": (Case("gated", 2, 32, 71, 74, 3, padding=2, dilation=2), "NCL", None),
    "dense_channels_last": (Case("gated", 2, 32, 71, 48, 5, stride=2, padding=2), "NLC", Config(32, 32, 32, tap_major=True)),
    "dense_weights_left": (
        Case("gated", 2, 32, 71, 72, 3, padding=1),
        "NCL",
        Config(64, 64, 16, tap_major=True, weights_left=True),
    ),
    "dense_over_samples": (Case("gated", 3, 32, 7, 40, 3, padding=1), "NCL", None),
    "dense_in_pieces": (Case("gated", 1, 32, 150, 138, 3, padding=1), "NLC", Config(128, 128, 32, tap_major=True)),
    "dense_in_pieces_left": (Case("gated", 1, 32, 150, 138, 1), "NCL", Config(128, 128, 16, weights_left=True)),
    "dense_tma": (Case("gated", 2, 32, 70, 42, 4, stride=2, padding=1), "NLC", None),
    "dense_tma_in_pieces": (Case("gated", 1, 32, 70, 138, 3, padding=1), "NLC", Config(128, 128, 32, tap_major=True)),
    "dense_tma_without_second_part": (
        Case("gated", 1, 32, 70, 104, 3, padding=1),
        "NLC",
        Config(64, 64, 32, tap_major=True, TAIL_N=32),
    ),
}


def gated(case, dtype, layout, first, rounded, seed=0, device="cpu"):
    """What runs `GATE` on a problem, and what it then computes of it in float64: gate and second half."""
    second = "NLC" if first == "NCL" else "NCL"
    x, weight, bias = make_inputs(case, dtype, layout, device, seed)
    if rounded:
        x = nearest_tf32(x)
    N, C_out, L = case.output_shape
    operands = [operand(*shape, layout=second, seed=seed, device=device) for shape in ((N, C_out // 2, 1), (N, C_out // 2, L))]
    text = f"{GATE}; out %6 {dtype_name(dtype)} {first}; out %1 fp32 {second}"
    a, b = float64(x, weight, bias, case).chunk(2, 1)
    condition, residual = (o.double() for o in operands)
    return (x, weight, bias, case, text, operands, rounded), ((a + condition).tanh() * b.sigmoid() + residual, b)


def kernel_of(name):
    return next(kernel for kernel in sorted(dispatch.FUSING, key=len, reverse=True) if name.startswith(kernel))


def family_plan(name, problem, device=dispatch.INTERPRETER):
    config = (FAMILIES | GATED)[name][2]
    if config is not None:
        return dispatch.Plan(kernel_of(name), config, "")
    return next(plan for plan in dispatch.candidates(problem, device) if plan.kernel == kernel_of(name))


def call(x, weight, bias, case, epilogue="", operands=(), rounded=False, mode="zeros", end=None):
    padding = [case.padding, case.padding - case.output_padding if end is None else end]
    geometry = case.stride, padding, case.dilation, case.groups, case.transposed, mode
    with poisoned_allocations():
        return fused.conv1d_fused(x, weight, bias, *geometry, epilogue, list(operands), rounded)


def float64(x, weight, bias, case, **changes):
    x, weight, bias = (None if t is None else t.double() for t in (x, weight, bias))
    return reference.conv1d(x, weight, bias, *replace(case, **changes).geometry)


def operand(*shape, layout="NCL", seed=5, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(seed)
    return in_nan_buffer(torch.randn(shape, generator=generator).to(device, dtype), layout)


def nearest_tf32(tensor):
    """The values with the last 13 of 23 mantissa bits rounded away, ties away from zero, with the strides of the tensor."""
    tensor.copy_(((tensor.contiguous().view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32))
    return tensor


def assert_sines_are_right(device):
    """Sines and cosines of arguments of any size are those of arguments within a few roundings; NaN and infinities give NaN."""
    case = Case("identity", 1, 8, 2000, 8, 1, groups=8)
    scales = torch.tensor([1.0, 3.2, 1e2, 1e4, 1e6, 1e9, 1e30, 1.0], device=device)[:, None]
    x = (2 * torch.rand(1, 8, 2000, generator=torch.Generator().manual_seed(0)) - 1).to(device) * scales
    x[0, 7, :4] = torch.tensor([0.0, torch.nan, torch.inf, -torch.inf])
    weight = torch.ones(8, 1, 1, device=device)
    with float32_precision("ieee"):
        results = call(x, weight, None, case, "sin %0; cos %0; out %1 fp32 NCL; out %2 fp32 NCL")
    for actual, function in zip(results, (torch.sin, torch.cos), strict=True):
        expected = function(x.double())
        assert torch.equal(actual.isnan(), expected.isnan())
        error = (actual - expected).abs() - x.double().abs() * 2**-22
        assert error[x.isfinite()].max() < 1.5e-7
        assert actual[x.isfinite()].abs().max() <= 1
