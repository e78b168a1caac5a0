"""What tests and benchmarks share: named cases, inputs out of NaN-filled buffers, error budgets, NaN-poisoned allocations."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor

from torch_conv_triton import memory, reference
from torch_conv_triton.problem import Conv1dProblem, output_length

LAYOUTS = ("NCL", "NLC", "strided")
# elements of NaN on each side of a tensor along each of its dimensions; keeps rows 16-byte aligned where sizes are
MARGIN = 16

_BUDGETS = {
    (torch.float32, "ieee"): 1e-5,
    (torch.float32, "tf32"): 1e-3,
    (torch.float16, "ieee"): 2e-3,
    (torch.bfloat16, "ieee"): 1e-2,
    (torch.float64, "ieee"): 1e-12,
}
# a single element may be this many times worse than the tensor as a whole
_ELEMENTWISE = 10


@dataclass(frozen=True)
class Case:
    """One geometry, with the name by which tests call it. Sizes as in `Conv1dProblem`."""

    name: str
    N: int
    C_in: int
    L_in: int
    C_out: int
    K: int
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1
    transposed: bool = False
    output_padding: int = 0
    bias: bool = True

    def __str__(self) -> str:
        return self.name

    @property
    def geometry(self) -> tuple[int, int, int, int, bool, int]:
        """What follows x, weight and bias in `execute.forward` and `reference.conv1d`."""
        return self.stride, self.padding, self.dilation, self.groups, self.transposed, self.output_padding

    @property
    def weight_shape(self) -> tuple[int, int, int]:
        if self.transposed:
            return self.C_in, self.C_out // self.groups, self.K
        return self.C_out, self.C_in // self.groups, self.K

    @property
    def output_shape(self) -> tuple[int, int, int]:
        lengths = self.L_in, self.K, self.stride, self.padding, self.dilation, self.transposed, self.output_padding
        return self.N, self.C_out, output_length(*lengths)

    def problem(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Conv1dProblem:
        return Conv1dProblem.from_tensors(x, weight, bias, *self.geometry)

    def operator(self, namespace=None):
        """A function of (x, weight, bias) that calls the operator, or the function of that name in `namespace`."""
        namespace = namespace or torch.ops.triton_conv
        if not self.transposed:
            return lambda x, w, b: namespace.conv1d(x, w, b, self.stride, self.padding, self.dilation, self.groups)
        geometry = self.stride, self.padding, self.output_padding, self.groups, self.dilation
        return lambda x, w, b: namespace.conv_transpose1d(x, w, b, *geometry)


CASES = (
    Case("empty_batch", 0, 4, 9, 6, 3),
    Case("dense", 2, 16, 40, 32, 3, padding=1),
    Case("dense_no_bias", 2, 16, 40, 32, 3, padding=1, bias=False),
    Case("odd_everything", 3, 19, 37, 23, 5, padding=2),
    Case("single_sample", 1, 16, 65, 16, 3, padding=1),
    Case("several_tiles", 2, 40, 300, 70, 3, padding=1),
    Case("pointwise", 2, 24, 33, 40, 1),
    Case("pointwise_strided", 2, 16, 33, 16, 1, stride=3),
    Case("one_position", 2, 16, 1, 16, 1),
    Case("one_output", 2, 16, 5, 16, 5),
    Case("one_sample_all_padding", 2, 8, 1, 8, 3, padding=1),
    Case("padding_above_K", 2, 8, 12, 8, 3, padding=7),
    Case("K_above_L", 2, 8, 4, 8, 9, padding=4),
    Case("K_long", 1, 8, 64, 8, 41, padding=20),
    Case("strided", 2, 16, 41, 16, 4, stride=2, padding=1),
    Case("stride_above_K", 2, 8, 41, 8, 2, stride=5),
    Case("stride_divides_L", 2, 32, 40, 32, 4, stride=2),
    Case("dilated", 2, 16, 50, 16, 3, padding=9, dilation=9),
    Case("dilated_strided", 2, 16, 50, 16, 3, stride=3, padding=2, dilation=4),
    Case("gcd_stride_dilation", 2, 8, 50, 8, 3, stride=4, padding=5, dilation=6),
    Case("tiny_C_in", 2, 1, 70, 24, 10, stride=5, bias=False),
    Case("tiny_C_in_rows_off_vectors", 2, 2, 45, 48, 4, padding=2),
    Case("filterbank", 2, 1, 300, 40, 64, stride=16, padding=20, bias=False),
    Case("tiny_C_out", 2, 24, 40, 1, 7, padding=3),
    Case("tiny_both", 2, 2, 40, 3, 7, padding=3),
    Case("grouped", 2, 32, 33, 48, 3, padding=1, groups=2),
    Case("grouped_tiny", 2, 12, 33, 18, 3, padding=1, groups=6),
    Case("grouped_K_long", 1, 32, 49, 32, 16, padding=8, groups=2),
    Case("depthwise", 2, 24, 45, 24, 7, padding=3, groups=24),
    Case("depthwise_causal", 2, 16, 45, 16, 4, padding=3, groups=16, bias=False),
    Case("depthwise_strided", 2, 9, 45, 9, 5, stride=2, padding=2, groups=9),
    Case("depthwise_dilated", 1, 17, 45, 17, 3, padding=4, dilation=4, groups=17),
    Case("depthwise_aligned", 2, 6, 64, 6, 5, padding=2, groups=6),
    Case("depthwise_aligned_dilated", 1, 5, 72, 5, 3, padding=4, dilation=4, groups=5, bias=False),
    Case("depthwise_short", 5, 20, 5, 20, 4, groups=20),
    Case("depthwise_short_strided", 2, 9, 16, 18, 3, stride=2, padding=4, dilation=3, groups=9, bias=False),
    Case("depthwise_middle", 3, 7, 211, 7, 31, padding=15, groups=7),
    Case("depthwise_long", 2, 5, 150, 5, 70, padding=33, groups=5, bias=False),
    Case("depthwise_far_apart", 1, 6, 300, 6, 3, padding=100, dilation=100, groups=6),
    Case("channel_multiplier", 2, 6, 45, 18, 5, padding=2, groups=6),
    Case("channel_multiplier_strided", 2, 4, 130, 8, 6, stride=3, padding=5, dilation=2, groups=4),
    Case("single_channel", 2, 1, 45, 1, 5, padding=2),
    Case("transposed", 2, 16, 20, 24, 4, stride=2, padding=1, transposed=True),
    Case("transposed_unit_stride", 2, 16, 20, 16, 3, transposed=True),
    Case("transposed_no_bias", 2, 16, 20, 16, 8, stride=4, padding=2, transposed=True, bias=False),
    Case("transposed_output_padding", 2, 16, 20, 16, 5, stride=3, padding=2, transposed=True, output_padding=2),
    Case("transposed_stride_above_K", 2, 16, 11, 16, 2, stride=5, transposed=True, output_padding=3),
    Case("transposed_dilated", 2, 16, 20, 16, 3, stride=2, padding=1, dilation=3, transposed=True),
    Case("transposed_gcd", 2, 16, 20, 16, 3, stride=4, padding=3, dilation=6, transposed=True, output_padding=1),
    Case("transposed_gcd_equal", 1, 8, 20, 8, 4, stride=3, dilation=3, transposed=True),
    Case("transposed_output_padding_above_stride", 2, 8, 15, 8, 3, dilation=4, transposed=True, output_padding=3),
    Case("transposed_padding_above_K", 2, 8, 20, 8, 3, stride=2, padding=7, transposed=True),
    Case("transposed_one_position", 2, 16, 1, 16, 4, stride=2, transposed=True),
    Case("transposed_grouped", 2, 32, 20, 48, 4, stride=2, padding=1, groups=2, transposed=True),
    Case("transposed_depthwise", 2, 18, 20, 18, 4, stride=2, padding=1, groups=18, transposed=True),
    Case("transposed_depthwise_long", 2, 6, 90, 6, 12, stride=4, padding=3, groups=6, transposed=True, output_padding=1),
    Case("transposed_channel_multiplier", 2, 6, 20, 12, 5, stride=3, groups=6, transposed=True, output_padding=1),
    Case("transposed_tiny_C_out", 2, 24, 20, 1, 8, stride=4, padding=2, transposed=True),
    Case("transposed_empty_batch", 0, 4, 9, 6, 3, stride=2, transposed=True),
)


def in_turn(cases: Sequence[Case], dtypes: Sequence[torch.dtype]) -> list[tuple[Case, str, torch.dtype]]:
    """Every case in every layout, the dtypes in turn: for tests in the interpreter, where those on a GPU run all of them."""
    return [(case, layout, dtypes[(i + j) % len(dtypes)]) for i, case in enumerate(cases) for j, layout in enumerate(LAYOUTS)]


def random_cases(count: int, seed: int) -> tuple[Case, ...]:
    """Valid geometries drawn at random, the same ones for the same seed."""
    draw = random.Random(seed)
    cases = []
    while len(cases) < count:
        groups = draw.choice([1, 1, 1, 2, 3, 8])
        stride, dilation, transposed = draw.choice([1, 1, 2, 3, 4, 6]), draw.choice([1, 1, 2, 3, 4, 6]), draw.random() < 0.4
        case = Case(
            f"random_{seed}_{len(cases)}",
            N=draw.randint(1, 3),
            C_in=groups * draw.choice([1, 1, 3, 8, 16, 17]),
            L_in=draw.randint(1, 70),
            C_out=groups * draw.choice([1, 2, 5, 16, 20]),
            K=draw.randint(1, 9),
            stride=stride,
            padding=draw.randint(0, 9),
            dilation=dilation,
            groups=groups,
            transposed=transposed,
            output_padding=draw.randrange(max(stride, dilation)) if transposed else 0,
            bias=draw.random() < 0.5,
        )
        fits = case.transposed or case.L_in + 2 * case.padding >= case.dilation * (case.K - 1) + 1
        if fits and case.output_shape[2] > 0:
            cases.append(case)
    return tuple(cases)


def make_inputs(
    case: Case, dtype: torch.dtype, layout: str = "NCL", device: torch.device | str = "cpu", seed: int = 0
) -> tuple[Tensor, Tensor, Tensor | None]:
    """(x, weight, bias) of a case, each sliced out of a larger buffer of NaN: a read beside them shows in the output.

    Normal values; the weight is scaled so that outputs are of order 1. `layout` is x's: "NCL", "NLC" or "strided".
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return (torch.randn(shape, generator=generator) * scale).to(device=device, dtype=dtype)

    fan_in = case.C_in // case.groups * case.K
    x = in_nan_buffer(normal(case.N, case.C_in, case.L_in), layout)
    weight = in_nan_buffer(normal(*case.weight_shape, scale=max(1, fan_in) ** -0.5))
    bias = in_nan_buffer(normal(case.C_out)) if case.bias else None
    return x, weight, bias


def make_grad_output(
    case: Case, dtype: torch.dtype, layout: str = "NCL", device: torch.device | str = "cpu", seed: int = 1
) -> Tensor:
    """A random gradient of a case's output, ``(N, C_out, L_out)``, sliced out of a larger buffer of NaN in this layout."""
    generator = torch.Generator().manual_seed(seed)
    return in_nan_buffer(torch.randn(case.output_shape, generator=generator).to(device=device, dtype=dtype), layout)


def in_nan_buffer(tensor: Tensor, layout: str = "NCL") -> Tensor:
    """The same values as a slice of a larger buffer of NaN, in a layout: "NCL", "NLC" (three dimensions) or "strided"."""
    order = (0, 2, 1) if layout == "NLC" else range(tensor.dim())
    step = 2 if layout == "strided" else 1
    sizes = [tensor.shape[d] for d in order]
    buffer = tensor.new_full([size * step + 2 * MARGIN for size in sizes], torch.nan)
    inner = buffer[tuple(slice(MARGIN, MARGIN + size * step, step) for size in sizes)].permute(*order)
    return inner.copy_(tensor)


def error_budget(dtype: torch.dtype, precision: str = "ieee") -> float:
    """Allowed relative Frobenius error against float64; `precision` is that of the problem, "tf32" or "ieee"."""
    return _BUDGETS[dtype, precision]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of `expected`; 0 for empty tensors."""
    norm = expected.double().norm()
    difference = (actual.double() - expected.double()).norm()
    return (difference / norm).item() if norm else difference.item()


def assert_within_budget(actual: Tensor, expected: Tensor, precision: str = "ieee") -> None:
    """Assert that `actual` has the shape of `expected` (float64) and its values, within the budget of actual's dtype.

    Both as a whole (relative Frobenius error) and element by element; NaN and Inf must be at the same places.
    """
    budget = error_budget(actual.dtype, precision)
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    finite = expected.isfinite()
    torch.testing.assert_close(
        actual.double().where(~finite, 0), expected.where(~finite, 0), rtol=0, atol=0, equal_nan=True, msg=_non_finite
    )
    actual, expected = actual.double().where(finite, 0), expected.where(finite, 0)
    assert actual.isfinite().all(), f"{(~actual.isfinite()).sum().item()} elements are NaN or Inf that should be finite"
    error = relative_error(actual, expected)
    assert error <= budget, f"relative error {error:.2e}, allowed {budget:.0e}"
    rms = expected.square().sum().div(max(1, finite.sum().item())).sqrt()
    worst = ((actual - expected).abs() / (rms + expected.abs())).nan_to_num(0).max().item() if actual.numel() else 0.0
    assert worst <= _ELEMENTWISE * budget, f"an element is off by {worst:.2e}, allowed {_ELEMENTWISE * budget:.0e}"


def _non_finite(message: str) -> str:
    return f"NaN or Inf at other places than expected: {message}"


def check_case(case: Case, run, dtype: torch.dtype, layout: str = "NCL", device: torch.device | str = "cpu") -> Tensor:
    """Run ``run(x, weight, bias)`` on poisoned memory and compare with the reference; returns the output."""
    x, weight, bias = make_inputs(case, dtype, layout, device)
    with poisoned_allocations():
        y = run(x, weight, bias)
    assert y.dtype == dtype
    expected = reference.conv1d(x, weight, bias, *case.geometry)
    assert_within_budget(y, expected, case.problem(x, weight, bias).precision)
    return y


def expected_gradients(case: Case, x: Tensor, weight: Tensor, grad_output: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight in float64, by differentiating the reference."""
    leaves = [t.detach().double().requires_grad_() for t in (x, weight)]
    y = reference.conv1d(*leaves, None, *case.geometry)
    return torch.autograd.grad(y, leaves, grad_output.double())


@contextmanager
def float32_precision(precision: str) -> Iterator[None]:
    """Within the context, PyTorch's switch for convolutions asks for float32 products in "tf32" or "ieee"."""
    switch = torch.backends.cudnn.conv
    before = switch.fp32_precision
    switch.fp32_precision = precision
    try:
        yield
    finally:
        switch.fp32_precision = before


@contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Within the context, memory that PyTorch hands out uninitialised to Python code is full of NaN."""

    def poisoned(allocate):
        def allocate_poisoned(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            if tensor.dtype == torch.uint8:
                # bytes that hold other dtypes: NaN in all of them
                return tensor.fill_(255)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

        return allocate_poisoned

    with (
        mock.patch.multiple(
            torch,
            empty=poisoned(torch.empty),
            empty_like=poisoned(torch.empty_like),
            empty_strided=poisoned(torch.empty_strided),
        ),
        mock.patch.multiple(
            Tensor,
            new_empty=poisoned(Tensor.new_empty),
            new_empty_strided=poisoned(Tensor.new_empty_strided),
        ),
        mock.patch.object(memory, "uninitialised", poisoned(memory.uninitialised)),
    ):
        yield
