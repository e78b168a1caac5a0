"""Is the installation sound: versions, the GPU, the backend by its name, and kernels that compile and are right."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import metadata, util

import torch

import torch_conv_triton
from torch_conv_triton import dispatch, reference, testing
from torch_conv_triton.problem import KERNEL_DTYPES, Conv1dProblem, dtype_name

NEEDED = {"torch": (2, 11), "triton": (3, 6)}


@dataclass(frozen=True, slots=True)
class Check:
    """One thing looked at. `status` is "ok", "note" (works, but with less than it could) or "failed"."""

    name: str
    status: str
    detail: str

    def __str__(self) -> str:
        return f"{self.status:7} {self.name:24} {self.detail}"

    def to_dict(self) -> dict[str, str]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class KernelCase:
    """A small convolution that one kernel family runs."""

    name: str
    x_shape: tuple[int, int, int]
    w_shape: tuple[int, int, int]
    stride: int = 1
    padding: int = 1
    groups: int = 1
    transposed: bool = False
    channels_last: bool = False


KERNEL_CASES = (
    KernelCase("dense", (2, 16, 40), (24, 16, 3)),
    KernelCase("channels-last", (2, 32, 40), (24, 32, 3), channels_last=True),
    KernelCase("depthwise", (2, 16, 40), (16, 1, 3), groups=16),
    KernelCase("transposed", (2, 16, 40), (16, 24, 4), stride=2, transposed=True),
)


def examine() -> Iterator[Check]:
    """Every check, each made when it is asked for. None raises: what goes wrong is a failed check."""
    yield Check("torch_conv_triton", "ok", f"{torch_conv_triton.__version__}, Python {sys.version.split()[0]}")
    for package, at_least in NEEDED.items():
        yield _version(package, at_least)
    yield _gpu()
    yield _compiler()
    yield _guarded("backend", _backend)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    for case in KERNEL_CASES:
        for dtype in KERNEL_DTYPES:
            yield _guarded(f"{case.name} {dtype_name(dtype)}", lambda case=case, dtype=dtype: _kernel(case, dtype, device))


def _guarded(name: str, look: Callable[[], tuple[str, str]]) -> Check:
    try:
        return Check(name, *look())
    except Exception as error:
        lines = str(error).splitlines() or [""]
        return Check(name, "failed", f"{type(error).__name__}: {lines[0]}")


def _version(package: str, at_least: tuple[int, int]) -> Check:
    wanted = ".".join(map(str, at_least))
    if util.find_spec(package) is None:
        return Check(package, "failed", f"not installed; {wanted} or newer is needed")
    version = metadata.version(package)
    recent = tuple(int(part) for part in version.split(".")[:2]) >= at_least
    return Check(package, "ok", version) if recent else Check(package, "failed", f"{version}; {wanted} or newer is needed")


def _gpu() -> Check:
    if not torch.cuda.is_available():
        return Check("GPU", "note", "none: the checks below run in Triton's interpreter, and convolutions in aten")
    device = torch.device("cuda", torch.cuda.current_device())
    found = dispatch.device_for(device)
    if found is None:
        return Check("GPU", "note", f"{torch.cuda.get_device_name(device)}: no kernel of ours runs on it, so aten does")
    return Check("GPU", "ok", f"{found.name}, sm_{found.capability}, {found.sm_count} multiprocessors, CUDA {torch.version.cuda}")


def _compiler() -> Check:
    candidates = (os.environ.get("CXX"), "g++", "clang++")
    path = next((path for name in candidates if name and (path := shutil.which(name))), None)
    if path is None:
        return Check("C++ compiler", "note", "none found: torch.compile needs one on the CPU, and Triton a C compiler on a GPU")
    return Check("C++ compiler", "ok", path)


def _backend() -> tuple[str, str]:
    from torch._dynamo.backends.registry import lookup_backend

    if "triton_conv" not in torch.compiler.list_backends():
        return "failed", 'torch.compile does not know "triton_conv": install the package (pip install .)'
    function = lookup_backend("triton_conv")
    return "ok", f'torch.compile(model, backend="triton_conv") is {function.__module__}.{function.__name__}'


def _kernel(case: KernelCase, dtype: torch.dtype, device: torch.device) -> tuple[str, str]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(case.x_shape, generator=generator).to(device, dtype)
    weight = torch.randn(case.w_shape, generator=generator).to(device, dtype)
    if case.channels_last:
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    geometry = (case.stride, case.padding, 1, case.groups, case.transposed)
    problem = Conv1dProblem.from_tensors(x, weight, None, *geometry)
    plan = dispatch.plan(problem, dispatch.device_for(device))
    convolution = torch_conv_triton.conv_transpose1d if case.transposed else torch_conv_triton.conv1d

    start = time.perf_counter()
    y = convolution(x, weight, stride=case.stride, padding=case.padding, groups=case.groups)
    if device.type == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - start

    expected = reference.conv1d(x, weight, None, *geometry)
    error = ((y.double() - expected).norm() / expected.norm()).item()
    budget = testing.error_budget(dtype, problem.precision)
    ran = f"aten ({plan.reason})" if plan.is_aten else f"kernel {plan.kernel}, {seconds:.1f} s"
    detail = f"{ran}; error {error:.1e} against float64, at most {budget:.0e} allowed"
    if not error <= budget:
        return "failed", detail
    return ("note" if plan.is_aten else "ok"), detail
