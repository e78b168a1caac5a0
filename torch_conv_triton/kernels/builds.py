"""Builds of kernels, told apart from the launches that need them, so that other processes can make them beforehand.

Triton compiles a kernel when it is first launched, one at a time. What a launch would compile is a `Build`; made in any process
it lies in Triton's cache on disk, where the launch finds it.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from functools import cache
from typing import Any

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import driver
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import JITFunction, create_function_from_signature

LONGEST_WAIT_S = 120.0

_under_way: list[Future] = []


@dataclass(frozen=True)
class Build:
    """A kernel, told by where it is defined, with all that it is specialised on. Can be sent to another process."""

    module: str
    name: str
    signature: dict[str, Any]
    constexprs: dict[tuple[int, ...], Any]
    attrs: dict[tuple[int, ...], Any]
    options: dict[str, Any]
    target: GPUTarget

    @classmethod
    def of(cls, kernel: JITFunction, args: Sequence[Any], keywords: dict[str, Any], target: GPUTarget) -> Build:
        """What a launch of the kernel with these arguments compiles for a GPU, which need not be there."""
        backend = make_backend(target)
        # as Triton's own launch adds them
        keywords = keywords | {
            "debug": keywords.get("debug", kernel.debug) or knobs.runtime.debug,
            "instrumentation_mode": knobs.compilation.instrumentation_mode,
        }
        bound, specialization, options = _binder(kernel, target)(*args, **keywords)
        options, signature, constexprs, attrs = kernel._pack_args(backend, keywords, bound, specialization, options)
        return cls(kernel.__module__, kernel.__name__, signature, constexprs, attrs, dict(options.__dict__), target)

    def make(self) -> Any:
        """Compile it, or take it from Triton's cache."""
        kernel = getattr(importlib.import_module(self.module), self.name)
        kind = GluonASTSource if kernel.is_gluon() else ASTSource
        source = kind(kernel, self.signature, self.constexprs, self.attrs)
        return triton.compile(source, target=self.target, options=self.options)


def make_launcher(compiled: Any) -> None:
    """Compile the C function that hands a kernel its arguments, or take it from Triton's cache: in 3.6, later one serves all."""
    if hasattr(driver, "make_launcher"):
        driver.CudaLauncher(compiled.src, compiled.metadata)


@cache
def _binder(kernel: JITFunction, target: GPUTarget):
    return create_function_from_signature(kernel.signature, kernel.params, make_backend(target))


def expect(build: Future) -> None:
    """From now on a launch that may have to compile waits until this build has been made, or has failed."""
    _under_way.append(build)


def await_expected() -> None:
    """Wait for all builds that were announced. What goes wrong in one shows when the launch that needs it compiles."""
    if _under_way:
        # a process that was killed never answers
        wait(list(_under_way), timeout=LONGEST_WAIT_S)
        _under_way.clear()
