"""Leaves the two-dimensional convolutions of a graph as fast as Inductor makes them without us.

Inductor stores what they read and write channels-last, but not in graphs of few convolutions for their size, and it counts the
one-dimensional ones too, which are gone when it comes to that: parakeet's depthwise 3x3 convolutions 0.28 ms and then 0.80, their
gradients 1.3 and 6.2.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch._inductor import config
from torch._inductor.graph import GraphLowering
from torch.fx import Graph

from torch_conv_triton.graph.convolution import has_two_dimensions

# where Inductor may be told what it would have decided; whoever compiles must put it back
SWITCH = "force_layout_optimization"


class ChannelsLast:
    """Tells Inductor to decide on a graph that lost convolutions as it would have on the whole one."""

    def __init__(self) -> None:
        self._told = False

    @contextmanager
    def as_before(self, graph: Graph) -> Iterator[None]:
        """Rewrite the one-dimensional convolutions of the graph within this context."""
        if getattr(config, SWITCH) and not self._told:
            # whoever compiles has decided
            yield
            return
        chosen = any(map(has_two_dimensions, graph.nodes)) and _is_chosen(graph)
        yield
        tell = chosen and not _is_chosen(graph)
        if tell or self._told:
            setattr(config, SWITCH, tell)
            self._told = tell


def _is_chosen(graph: Graph) -> bool:
    """Whether Inductor would choose channels-last for the graph's convolutions, in training as in inference."""
    if graph.owning_module is None:
        return False
    with config.patch({SWITCH: False}):
        return all(GraphLowering.decide_layout_opt(graph.owning_module, is_inference=inference) for inference in (False, True))
