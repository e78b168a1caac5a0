"""The floor under every time: what this very GPU copies and multiplies, and each case's share of it, as a plot."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from torch_conv_triton.bench.suite import Case
from torch_conv_triton.problem import Conv1dProblem

COPY_BYTES = 2**32
MATMUL_SIZE = 8192


@dataclass(frozen=True, slots=True)
class Ceilings:
    """Measured rates of one GPU: bytes/s of a copy (read and written), FLOP/s of large matrix products by arithmetic."""

    bytes_per_s: float
    tf32: float
    ieee: float
    half: float

    def flops_per_s(self, problem: Conv1dProblem) -> float:
        """The matrix rate for this problem's dtype and precision."""
        if problem.dtype.itemsize == 2:
            return self.half
        return self.tf32 if problem.precision == "tf32" else self.ieee

    def floor_ms(self, problem: Conv1dProblem) -> float:
        """Least time in ms of the forward convolution: its bytes or its arithmetic, whichever takes longer."""
        return problem.floor_ms(self.bytes_per_s, self.flops_per_s(problem))

    def backward_floor_ms(self, problem: Conv1dProblem, case: Case) -> float:
        """Least time in ms of the wanted gradients of x and weight: each has the forward's arithmetic and bytes."""
        return self.floor_ms(problem) * sum(case.gradients[:2])


def measure_ceilings(time_ms: Callable[[Callable[[], object]], float]) -> Ceilings:
    """Measure the current CUDA device, on random data; `time_ms` gives the median time of a call in ms."""
    size = min(COPY_BYTES, torch.cuda.mem_get_info()[0] // 4)
    source = torch.randint(256, (size,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    copy_ms = time_ms(lambda: target.copy_(source))
    return Ceilings(
        bytes_per_s=2e3 * size / copy_ms,
        tf32=_matmul_rate(torch.float32, "tf32", time_ms),
        ieee=_matmul_rate(torch.float32, "ieee", time_ms),
        half=_matmul_rate(torch.bfloat16, "ieee", time_ms),
    )


def _matmul_rate(dtype: torch.dtype, precision: str, time_ms: Callable[[Callable[[], object]], float]) -> float:
    a, b = (torch.randn(MATMUL_SIZE, MATMUL_SIZE, dtype=dtype, device="cuda") for _ in range(2))
    out = torch.empty_like(a)
    with _matmul_precision(precision):
        return 2e3 * MATMUL_SIZE**3 / time_ms(lambda: torch.mm(a, b, out=out))


@contextmanager
def _matmul_precision(precision: str):
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, precision
    try:
        yield
    finally:
        matmul.fp32_precision = before


def plot_shares(shares: Sequence[tuple[str, float | None, float | None]], path: str | Path, title: str) -> None:
    """Write a bar plot of each case's share of the floor (0 to 1): before (cuDNN) and after (ours), as ``(case, before, after)``.

    A missing time leaves its bar out. The file's suffix (.png, .svg, .pdf) decides the format. Needs matplotlib.
    """
    from matplotlib.figure import Figure

    shares = sorted(shares, key=lambda row: row[2] or 0.0)
    figure = Figure(figsize=(9, 1.5 + 0.28 * len(shares)), layout="constrained")
    axes = figure.subplots()
    positions = range(len(shares))
    for column, offset, label, color in ((1, -0.2, "before: cuDNN", "#b8b8b8"), (2, 0.2, "after: triton_conv", "#2a6fbb")):
        bars = [(y + offset, row[column]) for y, row in zip(positions, shares, strict=True) if row[column] is not None]
        axes.barh([y for y, _ in bars], [share for _, share in bars], height=0.38, label=label, color=color)
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.set_yticks(positions, [row[0] for row in shares])
    axes.set_ylim(-0.6, len(shares) - 0.4)
    axes.set_xlabel("share of the floor (1 = the speed of the memory or of the tensor cores)")
    axes.set_title(title)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=150)
