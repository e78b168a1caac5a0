"""The one graph pass that Inductor sees: runs our steps in order and names itself for the compilation caches."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping
from dataclasses import astuple, dataclass, fields
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch._inductor import custom_graph_pass, lowering
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch.fx import Graph

import torch_conv_triton
from torch_conv_triton import dispatch
from torch_conv_triton.graph.ahead import COMPUTE, compile_ahead
from torch_conv_triton.graph.backward import split_backward
from torch_conv_triton.graph.chain import join_chains
from torch_conv_triton.graph.convolution import static_problems
from torch_conv_triton.graph.direct import call_directly
from torch_conv_triton.graph.fold import fold
from torch_conv_triton.graph.layout import choose_layouts
from torch_conv_triton.graph.prologue import fold_prologues
from torch_conv_triton.graph.report import ConvRecord, Recorder
from torch_conv_triton.graph.rewrite import rewrite_convolutions
from torch_conv_triton.graph.two_dimensions import ChannelsLast
from torch_conv_triton.problem import current_precision
from torch_conv_triton.tuning import tables
from torch_conv_triton.tuning.compile_time import tune_while_compiling

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PassOptions:
    """Options of the pass, given to `torch.compile` as ``options={"triton_conv.<name>": value}``.

    `gradients`: also rewrite the backward; False leaves `aten.convolution_backward` to Inductor. `fold`: compute what surrounds a
    convolution (padding, pointwise operators after it) in its kernel. `layout`: let convolutions store their output the way the
    next ones read it best. `chain`: let convolutions that hand each other what they store be one call. `tune`: time ways to run
    the forward convolutions whose sizes are fixed, while compiling; by default as Inductor's ``max_autotune``.
    """

    gradients: bool = True
    fold: bool = True
    layout: bool = True
    chain: bool = True
    tune: bool = False

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> PassOptions:
        """The options by name. Raises RuntimeError for a name or a type that is none of ours."""
        known = {field.name: type(field.default) for field in fields(cls)}
        for name, value in options.items():
            if name not in known:
                raise RuntimeError(
                    f"unknown option triton_conv.{name}; known options are {', '.join(f'triton_conv.{k}' for k in known)}"
                )
            if not isinstance(value, known[name]):
                raise RuntimeError(
                    f"option triton_conv.{name} takes {known[name].__name__}, but got {type(value).__name__} {value!r}"
                )
        return cls(**options)


class ConvolutionPass(CustomGraphPass):
    """Rewrites the 1-D convolutions of a graph, forward and backward, into our operators.

    Inductor calls it once for each graph, before its own patterns. With a `recorder` it tells what it did, and then
    the graph is never taken from a cache nor put there.
    """

    def __init__(self, options: PassOptions = PassOptions(), recorder: Recorder | None = None) -> None:
        self.options = options
        self.recorder = recorder
        self._channels_last = ChannelsLast()

    def __call__(self, graph: Graph) -> None:
        if self.recorder:
            self.recorder.problems += chain.from_iterable(static_problems(graph).values())
        if self.options.tune:
            for device, problems in static_problems(graph).items():
                tune_while_compiling(problems, device)
        with self._channels_last.as_before(graph):
            for record in self._steps(graph, self.recorder.module_names if self.recorder else {}):
                log.debug("%s", record)
                if self.recorder:
                    self.recorder.records.append(record)
        compile_ahead(graph)
        _declare_operators()

    def _steps(self, graph: Graph, module_names: Mapping[str, str]) -> Iterator[ConvRecord]:
        records = rewrite_convolutions(graph, module_names)
        if self.options.fold:
            fold(graph, records)
        if self.options.layout:
            choose_layouts(graph, records)
        if self.options.fold:
            fold_prologues(graph, records)
        ordered = [node for node in graph.nodes if node in records]
        if self.options.chain:
            join_chains(graph, records)
        yield from (records[node] for node in ordered)
        if self.options.gradients:
            yield from split_backward(graph, module_names)

    def uuid(self) -> tuple[str, ...] | None:
        """What the rewritten graph depends on beside the graph itself."""
        if self.recorder:
            return None
        # The same graph compiles to something else where the CPU runs kernels, that is in the interpreter, and under autocast to
        # another dtype, which torch 2.11 forgets to ask for.
        autocast = [torch.get_autocast_dtype(kind) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
        surroundings = (dispatch.device_for(torch.device("cpu")), current_precision(torch.float32), autocast)
        known = (source_hash(), tables.fingerprint())
        return ("triton_conv", torch_conv_triton.__version__, *known, repr(astuple(self.options)), repr(surroundings))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ConvolutionPass) and (self.options, self.recorder) == (other.options, other.recorder)

    def __hash__(self) -> int:
        return hash(self.options)


class PassChain(CustomGraphPass):
    """Several passes where torch takes one."""

    def __init__(self, passes: tuple[Any, ...]) -> None:
        self.passes = passes

    def __call__(self, graph: Graph) -> None:
        for graph_pass in self.passes:
            graph_pass(graph)

    def uuid(self) -> tuple[Any, ...] | None:
        """None, which keeps the graph out of the caches, where one of the passes has no name."""
        names = tuple(p.uuid() if isinstance(p, CustomGraphPass) else None for p in self.passes)
        return None if None in names else names

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PassChain) and self.passes == other.passes

    def __hash__(self) -> int:
        return hash(self.passes)


def chained(user: Any, ours: ConvolutionPass) -> Any:
    """Value for Inductor's hook: the user's own pass or passes, written against the graph as it is, and then ours."""
    if not user:
        return ours
    passes = (*user, ours) if isinstance(user, (list, tuple)) else (user, ours)
    # torch 2.11 takes a single pass
    return passes if hasattr(custom_graph_pass, "get_custom_graph_passes") else PassChain(passes)


@cache
def source_hash() -> str:
    """Hash of the package's sources and tables: an edit of either must not be answered by an old cache entry."""
    root = Path(__file__).parent.parent
    digest = hashlib.sha256()
    for path in sorted(p for p in root.rglob("*") if p.suffix in (".py", ".json")):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()


def _declare_operators() -> None:
    """Tell Inductor that our operators are called as they are, and how its code calls them.

    One that it does not know yet torch 2.11 describes for a log that is off, all that its arguments are computed from included,
    once for every path there: of conv_tasnet's last convolutions that takes for ever.
    """
    for operator in COMPUTE:
        if operator not in lowering.lowerings:
            lowering.make_fallback(operator, warn=False)
        call_directly(operator)
