"""What happened to each convolution of a compiled model, as typed records, a text table and JSON-ready data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch.fx import Node

from torch_conv_triton.configs_gradients import partial_sums_bytes
from torch_conv_triton.dispatch import ATEN, Plan
from torch_conv_triton.problem import Conv1dProblem, dtype_name

COLUMNS = ("module", "kind", "convolution", "decision", "folded", "kernel", "config", "reason")


@dataclass(frozen=True, slots=True)
class ConvRecord:
    """One 1-D convolution, or one gradient of it, in one compiled graph.

    `module` is the path of the module that called it (empty where none did); `kind` is "forward", "input_grad" or
    "weight_grad"; `convolution` is `Conv1dProblem.describe` at the sizes seen while compiling; `decision` is "rewritten"
    (it is our operator now) or "kept" (it is what Inductor makes of it); `kernel` and `config` are what runs at those
    sizes, `kernel` being one of `dispatch.ATEN` where it is not ours, and `reason` says why. `folded` names what else of the
    graph the operator computes: padding, cropping, the instructions of its epilogue, the layout of its output.
    """

    module: str
    kind: str
    convolution: str
    dtype: str
    layout: str
    decision: str
    kernel: str
    config: str
    reason: str
    folded: str = ""

    @classmethod
    def of(cls, module: str, kind: str, problem: Conv1dProblem, *, rewritten: bool, plan: Plan) -> ConvRecord:
        return cls(
            module=module,
            kind=kind,
            convolution=problem.describe(),
            dtype=dtype_name(problem.dtype),
            layout=problem.layout,
            decision="rewritten" if rewritten else "kept",
            kernel=plan.kernel,
            config="" if plan.config is None else str(plan.config) + _workspace(kind, plan, problem),
            reason=plan.reason,
        )

    def also_folding(self, *words: str) -> ConvRecord:
        """The record that names these too, empty words left out."""
        return replace(self, folded=", ".join(filter(None, (self.folded, *words))))

    def __str__(self) -> str:
        return "  ".join(cell for cell in self.cells() if cell)

    def cells(self) -> tuple[str, ...]:
        """The text of each of `COLUMNS`."""
        return (self.module or "-", *(getattr(self, column) for column in COLUMNS[1:]))


def _workspace(kind: str, plan: Plan, problem: Conv1dProblem) -> str:
    """What a plan needs memory for beside its tensors, in words."""
    size = partial_sums_bytes(plan.kernel, plan.config, problem) if kind == "weight_grad" else 0
    return f", {size / 2**20:.2g} MiB of sums" if size else ""


@dataclass(frozen=True, slots=True)
class Report:
    """Every 1-D convolution of the graphs of one model, in the order in which they were compiled.

    `graphs` counts the graphs that Dynamo took from the model: one, and one more for each break in it.
    """

    records: tuple[ConvRecord, ...]
    graphs: int

    @property
    def graph_breaks(self) -> int:
        return max(self.graphs - 1, 0)

    @property
    def rewritten(self) -> tuple[ConvRecord, ...]:
        return tuple(record for record in self.records if record.decision == "rewritten")

    @property
    def kept(self) -> tuple[ConvRecord, ...]:
        return tuple(record for record in self.records if record.decision == "kept")

    @property
    def summary(self) -> str:
        """The totals in one line."""
        t = self.totals
        return (
            f"{t['convolutions']} 1-D convolutions and {t['gradients']} gradients: {t['rewritten']} rewritten, "
            f"{t['kept']} kept, {t['our_kernels']} run by our kernels; {t['graphs']} graphs, {t['graph_breaks']} graph breaks"
        )

    @property
    def totals(self) -> dict[str, int]:
        """Counts of records by what they are, and of graphs and graph breaks."""
        convolutions = sum(record.kind == "forward" for record in self.records)
        return {
            "convolutions": convolutions,
            "gradients": len(self.records) - convolutions,
            "rewritten": len(self.rewritten),
            "kept": len(self.kept),
            "our_kernels": sum(record.kernel not in ATEN for record in self.records),
            "graphs": self.graphs,
            "graph_breaks": self.graph_breaks,
        }

    def to_dict(self) -> dict[str, Any]:
        """Totals and records as data that `json` can write."""
        return {"totals": self.totals, "records": [asdict(record) for record in self.records]}

    def __str__(self) -> str:
        if not self.records:
            return self.summary
        rows = [COLUMNS, *(record.cells() for record in self.records)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
        return "\n".join([*lines, self.summary])

    def print(self) -> None:
        """Print the table: drawn by rich where it is installed and the output is a terminal, else plain text."""
        try:
            from rich.console import Console
            from rich.table import Table
        except ImportError:
            print(self)
            return
        console = Console()
        if not console.is_terminal:
            print(self)
            return
        table = Table(*COLUMNS, title=self.summary)
        for record in self.records:
            table.add_row(*record.cells(), style=None if record.decision == "rewritten" else "yellow")
        console.print(table, markup=False)


@dataclass(slots=True)
class Recorder:
    """Collects what a pass does. `module_names` gives the name of a module by its id, as `module_of` takes it.

    `problems` are those that a tuner may tune, see `static_problems`.
    """

    module_names: Mapping[str, str] = field(default_factory=dict)
    records: list[ConvRecord] = field(default_factory=list)
    problems: list[Conv1dProblem] = field(default_factory=list)


def module_of(node: Node, names: Mapping[str, str]) -> str:
    """Path of the innermost module that called a node, or empty. `names` gives it by ``str(id(module))`` where known."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack")
    if not stack:
        return ""
    # a module that is called more than once has "@1" and so on after its id
    key, (path, _) = list(stack.items())[-1]
    # the path starts with the variable that the outermost module was reached through
    return names.get(key.split("@")[0], path.partition(".")[2])
