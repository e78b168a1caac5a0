"""The `torch.compile` backend "triton_conv": Inductor, with our graph pass added for the one compilation.

`torch.compile(model, backend="triton_conv")` finds it through the package's entry point, so nothing has to be imported.
It imports neither Triton nor Inductor before something is compiled.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

# a graph from the cache calls our operators and runs none of our passes, so loading the backend registers them
import torch_conv_triton.chain
import torch_conv_triton.ops  # noqa: F401

if TYPE_CHECKING:
    from torch_conv_triton.graph.report import Recorder

PREFIX = "triton_conv."
HOOK = "post_grad_custom_pre_pass"


def triton_conv(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    name: str | None = None,
) -> Callable[..., Any]:
    """Compile a graph as Inductor does, its 1-D convolutions rewritten into ours.

    `mode` is one of Inductor's modes; with ``"max-autotune"`` our convolutions are tuned too. `options` holds options of
    Inductor; ``"mode"``, which `torch.compile` does not take beside options; and our own, ``"triton_conv.<name>"`` (see
    `PassOptions`). A pass of the user's in ``post_grad_custom_pre_pass`` runs before ours. Raises RuntimeError for an unknown
    option or a value of the wrong type.
    """
    options = dict(options or {})
    own = {key.removeprefix(PREFIX): options.pop(key) for key in list(options) if key.startswith(PREFIX)}
    return compile_with(gm, example_inputs, options.pop("mode", mode), options, own, name=name)


def compile_with(
    gm: torch.fx.GraphModule,
    example_inputs: Sequence[Any],
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    own: Mapping[str, Any] | None = None,
    *,
    name: str | None = None,
    recorder: Recorder | None = None,
) -> Callable[..., Any]:
    """Compile a graph with options of Inductor and our own apart, telling a `recorder` what happened."""
    # checks names and types of the options and expands the mode, as for backend="inductor"
    inductor = torch._TorchCompileInductorWrapper(mode, options, None)
    if name is not None:
        inductor.name = name
    inductor.config |= _hooked(inductor.config, own or {}, recorder)
    return inductor(gm, example_inputs)


def inductor_options(mode: str | None = None, **own: Any) -> dict[str, Any]:
    """Options that add our pass to the native backend: ``torch.compile(model, options=inductor_options("max-autotune"))``.

    `own` are our options by name, without the prefix (see `PassOptions`). Options of Inductor may be added to the result.
    """
    from torch._inductor import list_mode_options

    options = dict(list_mode_options(mode)) if mode else {}
    return options | _hooked(options, own)


def _hooked(options: Mapping[str, Any], own: Mapping[str, Any], recorder: Recorder | None = None) -> dict[str, Any]:
    """The options of Inductor with which it runs our pass, and puts back after a compilation what the pass may set."""
    from torch._inductor import config

    from torch_conv_triton.graph.manager import ConvolutionPass, PassOptions, chained
    from torch_conv_triton.graph.two_dimensions import SWITCH

    own = {"tune": bool(options.get("max_autotune", config.max_autotune)), **own}
    run = chained(options.get(HOOK, getattr(config, HOOK)), ConvolutionPass(PassOptions.of(own), recorder))
    return {HOOK: run, SWITCH: options.get(SWITCH, getattr(config, SWITCH))}


def _reset() -> None:
    # only a process that has recorded CUDA graphs has some to forget
    trees = sys.modules.get("torch._inductor.cudagraph_trees")
    if trees is not None:
        trees.reset_cudagraph_trees()


triton_conv.reset = _reset
