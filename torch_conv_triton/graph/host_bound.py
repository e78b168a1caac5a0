"""Tells graphs that wait for the host: there an operator of ours costs more than its kernel gains, but in a chain.

Launching from Python, an operator of ours takes the host about 50 us, and aten's convolution with Inductor's kernel behind it
about 40. A GPU that has more to do than that never notices. In a chain a convolution takes the host a third of that.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from torch._inductor import config as inductor_config
from torch.fx import Graph, Node

from torch_conv_triton.configs import Device
from torch_conv_triton.graph.convolution import MATRIX_PRODUCTS, Convolution, aten, convolutions, has_two_dimensions
from torch_conv_triton.problem import Conv1dProblem

REASON = "the graph is so small that it waits for the host, and aten's launches are the shorter"
HOST_US = 50
# operators that keep a GPU busy beside the convolutions
OTHERS = (
    *MATRIX_PRODUCTS,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
    aten._scaled_dot_product_cudnn_attention.default,
)


def left_to_aten(graph: Graph, chained: Callable[[], Collection[Node]]) -> Collection[Node]:
    """The 1-D convolutions of the graph that aten is left to compute, for the host's sake.

    `chained` works out which ones would be in a chain; it is asked only where the graph waits.
    """
    found = convolutions(graph)
    if not waits_for_host(graph, found):
        return ()
    small = {conv.node for conv in found if _is_small(conv.problem(), conv.device)}
    return small.difference(chained()) if small else small


def waits_for_host(graph: Graph, found: Sequence[Convolution]) -> bool:
    """Whether the host takes longer to launch the graph's 1-D convolutions than a GPU takes to compute them.

    Not said of graphs with sizes that change, of CUDA graphs, which the host launches at once, nor where other operators are as
    many.
    """
    times = []
    for conv in found:
        device = conv.device
        if device is None or not device.compare_with_aten or not conv.is_static:
            return False
        times.append(estimated_us(conv.problem(), device))
    others = sum(node.target in OTHERS or has_two_dimensions(node) for node in graph.nodes)
    if not times or others >= len(times) or inductor_config.triton.cudagraphs:
        return False
    return sum(times) < HOST_US * len(times)


def _is_small(problem: Conv1dProblem, device: Device) -> bool:
    """Whether neither aten nor a kernel of ours takes long for a convolution.

    Groups take aten long, a channel each above all.
    """
    return problem.groups == 1 and estimated_us(problem, device) < HOST_US


def estimated_us(problem: Conv1dProblem, device: Device) -> float:
    """About what aten's convolution takes a GPU, in us: a third of an H200's rates, scaled, and what a kernel takes at least."""
    flops = 350e12 if problem.dtype.itemsize == 4 else 700e12
    return 8 + 3e3 * problem.floor_ms(4.3e12, flops) * 132 / device.sm_count
