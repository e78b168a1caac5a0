"""Tells what `backend="triton_conv"` does to each convolution of a model, and why."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import CodeType
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from torch_conv_triton.backend import compile_with
from torch_conv_triton.graph.report import Recorder, Report


def explain(model: Callable[..., Any], /, *args: Any, backward: bool = False, **kwargs: Any) -> Report:
    """Compile and run `model(*args, **kwargs)` once, print what happened to every 1-D convolution, return it as a report.

    The sizes are those of the arguments; the graphs are compiled afresh whatever the caches hold, and nothing of it stays
    in them or in compilations of the model that exist. The grad mode is the caller's: under `torch.no_grad` the inference
    graph is explained. With `backward` the gradients of all outputs are computed too (and dropped), so that the backward
    graph is explained; it needs grad mode and something that requires grad. The model runs for real, with the side
    effects that it has.
    """
    report = record(model, args, kwargs, backward).report()
    report.print()
    return report


class RecordingBackend:
    """The backend for `torch.compile`, with our options `own`: keeps what happens to each convolution of `model`.

    Its graphs are compiled afresh whatever the caches hold, and not put there.
    """

    def __init__(self, model: Callable[..., Any], **own: Any) -> None:
        modules = model.named_modules() if isinstance(model, torch.nn.Module) else ()
        self.recorder = Recorder({str(id(module)): name for name, module in modules})
        self._own = own
        self._graphs = 0

    def __call__(self, gm: torch.fx.GraphModule, example_inputs: list[Any], *, mode: str | None = None) -> Callable[..., Any]:
        self._graphs += 1
        return compile_with(gm, example_inputs, mode, own=self._own, recorder=self.recorder)

    def report(self) -> Report:
        """What happened so far."""
        return Report(tuple(self.recorder.records), self._graphs)


def record(model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], backward: bool) -> RecordingBackend:
    """A backend that has recorded what `explain` reports."""
    model = getattr(model, "_orig_mod", model)
    backend = RecordingBackend(model, tune=False)
    with _forgotten(backend):
        outputs = torch.compile(_own_frame(model), backend=backend, dynamic=False)(*args, **kwargs)
        if backward:
            _differentiate(outputs, model, args, kwargs)
    return backend


def _own_frame(model: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        return model(*args, **kwargs)

    # Dynamo keeps what it compiled with the code object: one of our own shares it with nobody
    run.__code__ = run.__code__.replace()
    return run


def _differentiate(outputs: Any, model: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    parameters = list(model.parameters()) if isinstance(model, torch.nn.Module) else []
    leaves = [t for t in tree_leaves((args, kwargs, parameters)) if isinstance(t, torch.Tensor) and t.requires_grad]
    results = [t for t in tree_leaves(outputs) if isinstance(t, torch.Tensor) and t.requires_grad]
    if not results:
        raise RuntimeError(
            "explain(backward=True): no output requires grad; call it in grad mode on a model with parameters that do"
        )
    torch.autograd.grad(results, leaves, [torch.ones_like(t) for t in results], allow_unused=True)


@contextmanager
def _forgotten(backend: Callable[..., Any]) -> Iterator[None]:
    """Remove afterwards what `backend` left with code objects that nothing else has compiled.

    After a graph break the functions of the model are compiled on their own, and each entry kept with them counts towards
    Dynamo's limit of compilations.
    """
    from torch._dynamo.convert_frame import register_bytecode_hook
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list, reset_code

    codes: dict[int, CodeType] = {}
    hook = register_bytecode_hook(lambda code, _: codes.update({id(code): code}))
    try:
        yield
    finally:
        hook.remove()
        for code in codes.values():
            if all(getattr(entry.backend, "compiler_fn", None) is backend for entry in _debug_get_cache_entry_list(code)):
                reset_code(code)
