"""Helpers of the tests that compile: graphs as text, graphs before and after our pass, fresh processes."""

import os
import subprocess
import sys

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass

from torch_conv_triton.backend import triton_conv


def graph_text(graph: torch.fx.Graph) -> str:
    """One line a node with dtype and sizes, names renumbered: the same text in every version of torch."""
    names: dict[torch.fx.Node, str] = {}
    lines = []

    def text(argument) -> str:
        if isinstance(argument, torch.fx.Node):
            return names[argument]
        if isinstance(argument, (list, tuple)):
            return "[" + ", ".join(map(text, argument)) + "]"
        return str(argument)

    for node in graph.nodes:
        if node.op == "placeholder":
            names[node] = f"in{len(names)}"
        elif node.op == "output":
            lines.append(f"return {text(node.args[0])}")
        elif node.op == "get_attr":
            names[node] = f"constant{len(names)}"
        else:
            names[node] = f"v{len(lines)}"
            value = node.meta.get("val")
            kind = f": {str(value.dtype)[6:]}{list(value.shape)}" if isinstance(value, torch.Tensor) else ""
            target = str(node.target) if isinstance(node.target, torch._ops.OpOverload) else node.target.__name__
            lines.append(f"{names[node]}{kind} = {target}({text(node.args)[1:-1]})")
    return "\n".join(lines) + "\n"


class Capture(CustomGraphPass):
    """A user's pass that keeps the text of every graph that it sees."""

    def __init__(self) -> None:
        self.graphs: list[str] = []

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.graphs.append(graph_text(graph))

    def uuid(self) -> None:
        """No name, so nothing comes from a cache and every graph is seen."""


class Captured:
    """Compiles with our backend and keeps each graph, forward and backward, `before` our pass and `after` it."""

    def __init__(self, model, dynamic=False, **options) -> None:
        before, after = Capture(), Capture()
        hooks = {"post_grad_custom_pre_pass": before, "post_grad_custom_post_pass": after}
        self.model = torch.compile(model, backend=triton_conv, dynamic=dynamic, options={**options, **hooks})
        self.before, self.after = before.graphs, after.graphs

    def __call__(self, *args):
        return self.model(*args)


def run_python(code: str, *arguments: str, **environment: str | None) -> str:
    """What `code` prints in a fresh process. A variable of the environment that is None is not set."""
    env = {key: value for key, value in {**os.environ, **environment}.items() if value is not None}
    done = subprocess.run([sys.executable, "-c", code, *arguments], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout
