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

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from torch_conv_triton.kernels.builds import Build

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
    with triton.knobs.nvidia.scope(), redirect_stdout(io.StringIO()) as log:
        triton.knobs.nvidia.dump_ptxas_log = True
        built = Build.of(kernel, args, kwargs, target).make()
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


def _assembled(ptx: str, capability: int) -> str:
    """What the assembler reports of a kernel."""
    target = re.search(r"\.target\s+(sm_\w+)", ptx)[1]
    ptxas = BINARIES / ("ptxas-blackwell" if capability >= 100 else "ptxas")
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [ptxas, "-v", f"--gpu-name={target}", file.name, "-o", "/dev/null"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr
