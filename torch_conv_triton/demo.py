"""The main job on a small vocoder: compile it with the backend, account for every convolution, check the output, time it."""

from __future__ import annotations

import copy
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_conv_triton import testing
from torch_conv_triton.explain import explain
from torch_conv_triton.graph.report import Report
from torch_conv_triton.problem import current_precision, dtype_name


class ResidualBlock(nn.Module):
    """Dilated convolutions, each around a skip connection: ``(N, C, L)`` to ``(N, C, L)``."""

    def __init__(self, channels: int, kernel_size: int, dilations: tuple[int, ...]) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(
            nn.Conv1d(channels, channels, kernel_size, padding=dilation * (kernel_size // 2), dilation=dilation)
            for dilation in dilations
        )

    def forward(self, x: Tensor) -> Tensor:
        for convolution in self.convolutions:
            x = x + convolution(F.leaky_relu(x, 0.1))
        return x


class MiniVocoder(nn.Module):
    """Plain `torch.nn`, of the shape of today's vocoders: mel bands ``(N, mels, frames)`` to samples ``(N, 1, L)``.

    L is frames times the product of `rates`, which are even; each rate halves the channels.
    """

    def __init__(
        self,
        mels: int,
        channels: int,
        rates: tuple[int, ...],
        kernel_sizes: tuple[int, ...] = (3, 7),
        dilations: tuple[int, ...] = (1, 3, 5),
    ) -> None:
        super().__init__()
        self.smooth = nn.Conv1d(mels, mels, 5, padding=2, groups=mels)
        self.enter = nn.Conv1d(mels, channels, 7, padding=3)
        self.upsample = nn.ModuleList()
        self.blocks = nn.ModuleList()
        for rate in rates:
            self.upsample.append(nn.ConvTranspose1d(channels, channels // 2, 2 * rate, stride=rate, padding=rate // 2))
            channels //= 2
            self.blocks.append(nn.ModuleList(ResidualBlock(channels, size, dilations) for size in kernel_sizes))
        self.leave = nn.Conv1d(channels, 1, 7, padding=3)
        # how many convolutions a value passes through at most
        self.depth = 3 + len(rates) * (1 + len(dilations))

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(self.smooth(x))
        for upsample, blocks in zip(self.upsample, self.blocks, strict=True):
            x = upsample(F.leaky_relu(x, 0.1))
            x = sum(block(x) for block in blocks) / len(blocks)
        return torch.tanh(self.leave(F.leaky_relu(x)))


@dataclass(frozen=True, slots=True)
class DemoResult:
    """What the demo found.

    Errors are relative (Frobenius), against eager in float64. Times are medians in ms, or the text of an error.
    """

    where: str
    dtype: str
    report: Report
    error: float
    eager_error: float
    bound: float
    times_ms: dict[str, float | str]

    @property
    def passed(self) -> bool:
        """Our kernels ran, and the output is within the bound (which NaN is not)."""
        return self.ours > 0 and self.error <= self.bound

    @property
    def ours(self) -> int:
        """How many convolutions our kernels ran."""
        return self.report.totals["our_kernels"]

    def to_dict(self) -> dict[str, Any]:
        return {
            "where": self.where,
            "torch": torch.__version__,
            "dtype": self.dtype,
            "passed": self.passed,
            "relative_error": {"triton_conv": self.error, "eager": self.eager_error, "bound": self.bound},
            "times_ms": self.times_ms,
            **self.report.to_dict(),
        }


def build(device: torch.device, dtype: torch.dtype) -> tuple[MiniVocoder, Tensor]:
    """The demo's model with random weights, and an input for it: of a real vocoder's size on a GPU, tiny elsewhere."""
    torch.manual_seed(0)
    if device.type == "cuda":
        model, shape = MiniVocoder(mels=80, channels=512, rates=(8, 8, 2, 2)), (16, 80, 256)
    else:
        model, shape = MiniVocoder(mels=16, channels=32, rates=(4, 2)), (1, 16, 12)
    return model.to(device, dtype).eval(), torch.randn(shape).to(device, dtype)


@torch.no_grad()
def run_demo(device: torch.device, dtype: torch.dtype) -> DemoResult:
    """Run the demo and print what it does. On the CPU it wants TRITON_INTERPRET=1, set before Triton is imported."""
    where = _where(device)
    model, x = build(device, dtype)
    precision = current_precision(dtype)
    products = " (products in TF32, as PyTorch's switch says)" if precision == "tf32" else ""
    print(f"A mini vocoder (plain torch.nn), {dtype_name(dtype)}{products}, x {tuple(x.shape)}, on {where}.\n", flush=True)

    with _step('compile it with backend="triton_conv" and run it, noting every convolution'):
        report = explain(model, x)
    with _step("compile it once more, as a user would, and check the output against eager in float64"):
        compiled = torch.compile(model, backend="triton_conv")
        expected = copy.deepcopy(model).double()(x.double())
        error, eager_error = _relative_error(compiled(x), expected), _relative_error(model(x), expected)
    # errors of rounding are independent from one convolution to the next, so they add up as their squares do
    bound = testing.error_budget(dtype, precision) * math.sqrt(model.depth)
    times_ms: dict[str, float | str] = {}
    if device.type == "cuda":
        with _step("time eager, torch.compile and triton_conv"):
            times_ms = _times_ms(model, compiled, x)
    result = DemoResult(where, dtype_name(dtype), report, error, eager_error, bound, times_ms)
    _print_result(result)
    return result


def _where(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if os.environ.get("TRITON_INTERPRET") == "1":
        return "the CPU, without a GPU: the kernels run in Triton's interpreter, so the input is small and nothing is timed"
    return f"{device.type}, where no kernel of ours runs: aten computes the convolutions"


@contextmanager
def _step(what: str) -> Iterator[None]:
    print(f"... {what}", file=sys.stderr, flush=True)
    start = time.perf_counter()
    yield
    print(f"    done in {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


def _times_ms(model: nn.Module, compiled: Any, x: Tensor) -> dict[str, float | str]:
    from torch_conv_triton.bench.timing import Contestant, Stopwatch, race

    calls = {"eager": model, "torch.compile": torch.compile(model), "triton_conv": compiled}
    entries = {name: lambda call=call: Contestant(lambda: call(x)) for name, call in calls.items()}
    timings = race(entries, Stopwatch().time, rounds=3, ms=1000)
    return {name: timing if isinstance(timing, str) else timing.median_ms for name, timing in timings.items()}


def _print_result(result: DemoResult) -> None:
    print(
        f"\nRelative error against eager in float64: triton_conv {result.error:.1e}, eager itself {result.eager_error:.1e}, "
        f"bound {result.bound:.1e}."
    )
    eager_ms = result.times_ms.get("eager")
    for name, ms in result.times_ms.items():
        if isinstance(ms, str):
            print(f"  {name:14} failed: {ms}")
        else:
            print(f"  {name:14} {ms:9.3f} ms" + (f"  {eager_ms / ms:5.2f}x eager" if isinstance(eager_ms, float) else ""))
    count = f"{result.ours} of {len(result.report.records)} convolutions ran in our kernels"
    if result.passed:
        print(f"Passed: {count}, and the output is within the bound.")
    else:
        print(f"FAILED: {count}, and the output is {'within' if result.error <= result.bound else 'not within'} the bound.")
