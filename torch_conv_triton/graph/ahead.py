"""Compiles the kernels that a graph will launch while Inductor compiles the rest of it, in Inductor's worker processes."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

import torch
from torch._inductor.async_compile import AsyncCompile, get_compile_threads
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from torch_conv_triton import chain, dispatch, fused, ops
from torch_conv_triton.graph.convolution import hint, stand_in, value

if TYPE_CHECKING:
    from torch_conv_triton.kernels.builds import Build

log = logging.getLogger(__name__)

COMPUTE = ops.COMPUTE | fused.COMPUTE | chain.COMPUTE


def compile_ahead(graph: Graph) -> None:
    """Start compiling what the calls of ours in the graph will launch at the sizes seen while compiling.

    The first launch waits until all of it is there. Nothing happens where Inductor compiles in one process; what goes wrong is
    logged, and the kernels compile when they are launched.
    """
    calls = [node for node in graph.nodes if node.target in COMPUTE and _device(node).type == "cuda"]
    if not calls or get_compile_threads() <= 1:
        return
    # much here is internal to torch and Triton; where a version differs the graph is none the worse
    try:
        _start(_builds(calls), _device(calls[0]))
    except Exception as error:
        log.info("kernels are not compiled ahead: %s: %s", type(error).__name__, error)


def _start(builds: Iterable[Build], device: torch.device) -> None:
    from torch._inductor.runtime.cache_dir_utils import triton_cache_dir
    from torch._inductor.runtime.compile_tasks import _set_triton_ptxas_path
    from triton.backends.nvidia.compiler import get_ptxas_version

    from torch_conv_triton.kernels.builds import expect

    # Triton looks for what was built under the name of the assembler too, so the one of those processes is taken here. Inductor
    # sets the same two variables, from the first kernel that it compiles here on.
    _set_triton_ptxas_path()
    get_ptxas_version.cache_clear()
    os.environ.setdefault("TRITON_CACHE_DIR", triton_cache_dir(device.index))
    pool = AsyncCompile.process_pool()
    for build in builds:
        expect(pool.submit(_make, build, os.environ["TRITON_CACHE_DIR"]))


def _make(build: Build, cache_dir: str) -> None:
    """In a worker process. Nothing is returned: what was built is in the cache."""
    from torch_conv_triton.kernels.builds import make_launcher

    os.environ["TRITON_CACHE_DIR"] = cache_dir
    compiled = build.make()
    if build.target.backend == "cuda":
        make_launcher(compiled)


def _builds(calls: list[Node]) -> Iterator[Build]:
    """What the calls will compile, each once."""
    from triton.runtime import driver

    from torch_conv_triton.kernels.builds import Build
    from torch_conv_triton.kernels.launch import rehearsal, rehearsed_together

    found = set()
    for node in calls:
        with dispatch.meta_stands_for(_device(node)), rehearsal() as launches:
            COMPUTE[node.target](*map_arg(node.args, _without_data), **map_arg(node.kwargs, _without_data))
        together = rehearsed_together(launches) if node.target in chain.COMPUTE else ()
        for kernel, args, keywords in (*launches, *together):
            build = Build.of(kernel, args, keywords, driver.active.get_current_target())
            if repr(build) not in found:
                found.add(repr(build))
                yield build


def _without_data(node: Node) -> torch.Tensor | int:
    """The value of a node at the sizes seen while compiling."""
    seen = value(node)
    return stand_in(seen) if isinstance(seen, torch.Tensor) else hint(seen)


def _device(node: Node) -> torch.device:
    return value(node.all_input_nodes[0]).device
