"""Compile the kernels that a launcher would launch for a GPU that need not be there, and read what the compiler made of them."""

from __future__ import annotations

import io
import re
import subprocess
import tempfile
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int16: "i16", torch.int32: "i32"}
BINARIES = Path(triton.__file__).parent / "backends/nvidia/bin"
# bytes of shared memory one block may use
SHARED_MEMORY = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448, 120: 101376}
LOCAL_MEMORY_GFX942 = 65536


@dataclass(frozen=True)
class Compiled:
    """What became of one kernel: bytes of shared memory, registers and spilled bytes a thread, tensor-core instructions.

    `ptx` is empty for gfx942.
    """

    name: str
    shared: int
    registers: int
    spills: int
    tensor_core_ops: int
    ptx: str


@contextmanager
def compile_only(capability: int | None):
    """Within the context a kernel launch compiles for sm_`capability`, or for gfx942 if it is None, instead of running.

    Yields the list of `Compiled`. gfx942 needs a process in which `torch.version.hip` was set before kernels were imported.
    """
    compiled: list[Compiled] = []
    target = GPUTarget("hip", "gfx942", 64) if capability is None else GPUTarget("cuda", capability, 32)

    def run(self, *args, grid, warmup, **kwargs):
        compiled.append(_compile(self, args, kwargs, target))

    with mock.patch.object(JITFunction, "run", run):
        yield compiled


def _compile(kernel: JITFunction, args, kwargs, target: GPUTarget) -> Compiled:
    options = {name: kwargs.pop(name) for name in ("num_warps", "num_stages") if name in kwargs}
    signature, constexprs, attrs = {}, {}, {}
    values = dict(zip((p.name for p in kernel.params), args, strict=False)) | kwargs
    for i, param in enumerate(kernel.params):
        value = values[param.name]
        if param.is_constexpr:
            signature[param.name] = "constexpr"
            constexprs[(i,)] = value
        else:
            signature[param.name] = _type(value, (i,), not param.do_not_specialize, constexprs, attrs)
    kind = GluonASTSource if kernel.is_gluon() else ASTSource
    source = kind(fn=kernel, signature=signature, constexprs=constexprs, attrs=attrs)
    with triton.knobs.nvidia.scope(), redirect_stdout(io.StringIO()) as log:
        triton.knobs.nvidia.dump_ptxas_log = True
        built = triton.compile(source, target=target, options=options)
    if target.backend == "hip":
        code = built.asm["amdgcn"]
        spills = int(re.search(r"\.vgpr_spill_count:\s*(\d+)", code)[1])
        registers = int(re.search(r"\.vgpr_count:\s*(\d+)", code)[1])
        return Compiled(kernel.__name__, built.metadata.shared, registers, 4 * spills, code.count("v_mfma"), "")
    ptx = built.asm["ptx"]
    # what was compiled before comes from a cache, without a report
    report = log.getvalue() or _assembled(ptx, target.arch)
    registers, spills = int(re.search(r"Used (\d+) registers", report)[1]), int(re.search(r"(\d+) bytes spill stores", report)[1])
    tensor_core_ops = sum(ptx.count(op) for op in ("wgmma.mma_async", "mma.sync", "tcgen05.mma"))
    return Compiled(kernel.__name__, built.metadata.shared, registers, spills, tensor_core_ops, ptx)


def _type(value, path: tuple[int, ...], specialised: bool, constexprs: dict, attrs: dict):
    """The type of a runtime argument; what a launch would specialise on is added to `constexprs` and `attrs`."""
    if isinstance(value, tuple):
        return tuple(_type(v, (*path, i), specialised, constexprs, attrs) for i, v in enumerate(value))
    if value is None or (isinstance(value, int) and value == 1 and specialised):
        constexprs[path] = value
        return "constexpr"
    if isinstance(value, TensorDescriptor):
        block = ",".join(str(b) for b in value.block_shape)
        return f"tensordesc<{TYPES[value.base.dtype]}[{block}]>"
    if isinstance(value, torch.Tensor):
        attrs[path] = [["tt.divisibility", 16]]
        return "*" + TYPES[value.dtype]
    if value % 16 == 0 and specialised:
        attrs[path] = [["tt.divisibility", 16]]
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _assembled(ptx: str, capability: int) -> str:
    """What the assembler reports of a kernel."""
    target = re.search(r"\.target\s+(sm_\w+)", ptx)[1]
    ptxas = BINARIES / ("ptxas-blackwell" if capability >= 100 else "ptxas")
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [ptxas, "-v", f"--gpu-name={target}", file.name, "-o", "/dev/null"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr
