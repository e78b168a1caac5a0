"""Lets the Python code that Inductor generates call our operators past the dispatcher, see `torch_conv_triton.direct`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch._inductor import ir
from torch._inductor.codegen.custom_extern_kernel_codegen import CUSTOM_EXTERN_KERNEL_CODEGEN, CustomCodegen
from torch._inductor.codegen.wrapper import ExternKernelAllocLine
from torch._inductor.utils import IndentedBuffer
from torch._inductor.virtualized import V
from torch._ops import OpOverload


def call_directly(op: OpOverload) -> None:
    """Have code that is generated from now on call ``op.direct`` if there is one."""
    if hasattr(op, "direct"):
        CUSTOM_EXTERN_KERNEL_CODEGEN[f"torch.ops.{op}"] = CustomCodegen(python=_write_call)


def _write_call(node: ir.FallbackKernel, write: Callable[[Any], None]) -> None:
    kind = ExternKernelAllocLine if V.graph.cpp_wrapper else _DirectLine
    write(kind(V.graph.wrapper_code, node))


class _DirectLine(ExternKernelAllocLine):
    """The line that calls an operator, naming what is called ``<operator>.direct``."""

    def codegen(self, code: IndentedBuffer) -> None:
        name = self.node.python_kernel_name
        self.node.python_kernel_name = f"{name}.direct"
        try:
            super().codegen(code)
        finally:
            # C++ code may be generated from the same node
            self.node.python_kernel_name = name
