"""Runs whole models: eager, torch.compile and backend="triton_conv" side by side, with the error of each."""

from __future__ import annotations

import contextlib
import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from torch_conv_triton.bench.errors import BenchError
from torch_conv_triton.bench.models import MODELS, build, with_whole_lstms
from torch_conv_triton.bench.progress import track
from torch_conv_triton.bench.results import write_json
from torch_conv_triton.bench.run import provenance, require_gpu
from torch_conv_triton.bench.suite import DTYPES
from torch_conv_triton.bench.timing import in_words, repeats_within
from torch_conv_triton.bench.worker import Here, Worker, WorkerError
from torch_conv_triton.dispatch import ATEN
from torch_conv_triton.explain import RecordingBackend

WAYS = ("eager", "torch.compile", "triton_conv")
# of a model of many layers: how much worse than PyTorch's own error ours may be
ERROR_MARGIN = 1.5


@dataclass(frozen=True, slots=True)
class WayResult:
    """One way to run a model: wall time of a call in ms, time of the first call in s, memory it takes in MiB beyond what is
    there before it (the state of the optimiser is), and its relative error (Frobenius, over all outputs, or over all gradients of
    a training step)."""

    ms: float
    first_call_s: float
    peak_mib: float
    error: float


@dataclass(frozen=True, slots=True)
class ModelResult:
    """One model: `ways` by name, an error's text for one that failed; how many of its 1-D convolutions the backend rewrote
    and how many our kernels run. `status` is "ok", "wrong" or "failed", `message` says why."""

    name: str
    dtype: str
    size: str
    train: bool
    status: str
    message: str = ""
    convolutions: int = 0
    rewritten: int = 0
    by_our_kernels: int = 0
    graph_breaks: int = 0
    ways: dict[str, WayResult | str] = field(default_factory=dict)

    def speedup(self, over: str) -> float | None:
        """Wall time of another way over ours; None unless ours is right."""
        ours, other = self.ways.get("triton_conv"), self.ways.get(over)
        if self.status == "ok" and isinstance(ours, WayResult) and isinstance(other, WayResult):
            return other.ms / ours.ms
        return None


def run_models(
    names: Sequence[str] = tuple(MODELS),
    dtype: str | None = None,
    *,
    size: str = "full",
    train: bool = False,
    ways: Sequence[str] = WAYS,
    rounds: int = 3,
    ms: float = 1000,
    out: str | Path | None = None,
    isolate: bool = True,
    timeout_s: float = 900,
    command: str = "",
    commit: str | None = None,
    echo: Callable[[str], None] = print,
) -> list[ModelResult]:
    """Run each model in `dtype` (its usual one by default) eager, compiled by Inductor and compiled by the backend.

    With `train`, a training step (see `step`) is run instead of inference. `ways`: only some of `WAYS`, ours among them. The
    error of each is against the same weights in eager float32 without TF32 (float64 for `size` "small"). `isolate`, `timeout_s`
    (a model) and `out` as in `run_suite`. Raises BenchError without a CUDA device, or for an unknown model or way.
    """
    if "triton_conv" not in ways or set(ways) - set(WAYS):
        raise BenchError(f"ways are some of {', '.join(WAYS)}, with triton_conv among them, not {', '.join(ways)}")
    require_gpu()
    if unknown := [name for name in names if name not in MODELS]:
        raise BenchError(f"unknown model {', '.join(unknown)}; there are {', '.join(MODELS)}")
    from torch_conv_triton.bench.measure import describe_machine

    found: list[ModelResult] = []
    with Worker(timeout_s) if isolate else Here() as worker:
        machine = worker.call(describe_machine) | provenance(command, commit)
        echo(f"{machine['gpu']}, torch {machine['torch']}, triton {machine['triton']}, commit {machine['commit'][:12]}")
        echo(model_header())
        for name in track(names, names):
            used = dtype or MODELS[name].dtype
            try:
                result = worker.call(measure_model, name, used, size=size, train=train, ways=ways, rounds=rounds, ms=ms)
            except WorkerError as error:
                result = ModelResult(name, used, size, train, "failed", str(error))
            echo(model_line(result))
            found.append(result)
            if out is not None:
                options = {"size": size, "train": train, "ways": list(ways), "rounds": rounds, "ms": ms}
                models = [asdict(r) | {"speedups": {way: r.speedup(way) for way in WAYS[:2]}} for r in found]
                write_json(out, {"machine": machine, "options": options, "models": models})
    return found


def model_header() -> str:
    """Heading of the lines that `model_line` gives."""
    columns = "".join(f"{way + ' ms':>18}" for way in WAYS)
    counts = f"{'convs':>6}{'rewritten':>10}{'ours':>6}"
    return f"{'model':<22}{'dtype':<6}{counts}{columns}{'vs eager':>10}{'vs compile':>11}  errors; memory MiB"


def model_line(result: ModelResult) -> str:
    """One model: times, speed-ups (of a right result only), and of each way its error and its memory."""

    def show(way: str, write: Callable[[WayResult], str]) -> str:
        found = result.ways.get(way)
        return write(found) if isinstance(found, WayResult) else "failed" if found else "-"

    line = f"{result.name:<22}{result.dtype:<6}"
    if not result.ways:
        return f"{line}{result.status.upper()}: {result.message}"
    line += f"{result.convolutions:>6}{result.rewritten:>10}{result.by_our_kernels:>6}"
    line += "".join(f"{show(way, lambda found: f'{found.ms:.2f}'):>18}" for way in WAYS)
    speedups = [f"{s:.2f}x" if (s := result.speedup(way)) else "-" for way in WAYS[:2]]
    line += f"{speedups[0]:>10}{speedups[1]:>11}  "
    line += " ".join(show(way, lambda found: f"{found.error:.1e}") for way in WAYS) + "; "
    line += " ".join(show(way, lambda found: f"{found.peak_mib:.0f}") for way in WAYS)
    return line if result.status == "ok" else f"{line}  {result.status.upper()}: {result.message}"


def measure_model(name: str, dtype: str, *, size: str, train: bool, ways: Sequence[str], rounds: int, ms: float) -> ModelResult:
    """Measure one model on the current CUDA device; runs in the worker."""
    torch._dynamo.reset()
    torch.cuda.empty_cache()
    with _compiled_afresh():
        module, args, kwargs = build(name, "cuda", dtype, size)
        if train:
            enable_training(module)
        else:
            with_whole_lstms(module)
        expected = reference_values(module, args, kwargs, torch.float64 if size == "small" else torch.float32, train)
        backend = RecordingBackend(module)
        runs = {
            "eager": module,
            "torch.compile": torch.compile(module),
            "triton_conv": torch.compile(module, backend=backend),
        }
        calls = {way: step(runs[way], module, args, kwargs, train) for way in WAYS if way in ways}
        measured = measure_ways(calls, expected, rounds, ms)
    report = backend.report()
    status, message = verdict(measured, dtype)
    return ModelResult(
        name,
        dtype,
        size,
        train,
        status,
        message,
        convolutions=len(report.records),
        rewritten=len(report.rewritten),
        by_our_kernels=sum(record.kernel not in ATEN for record in report.records),
        graph_breaks=report.graph_breaks,
        ways=measured,
    )


def measure_ways(
    calls: dict[str, Callable[[], list[Tensor]]], expected: list[Tensor], rounds: int, ms: float
) -> dict[str, WayResult | str]:
    """Measure each call for `ms` in `rounds` turns; one that raises gets the error's text instead, and the others go on."""
    first: dict[str, tuple[float, float, float]] = {}
    errors: dict[str, str] = {}
    for way, call in calls.items():
        try:
            first[way] = _first_call(call, expected)
        except torch.AcceleratorError:
            raise  # the device's context is lost
        except Exception as error:
            errors[way] = in_words(error)
    times: dict[str, list[float]] = {way: [] for way in first}
    for _ in range(rounds):
        for way in first:
            times[way].append(wall_ms(calls[way], ms / rounds))
    return {way: errors.get(way) or WayResult(statistics.median(times[way]), *first[way]) for way in calls}


def verdict(ways: dict[str, WayResult | str], dtype: str) -> tuple[str, str]:
    """Whether our output is right: within the dtype's budget, or at most 1.5 times as wrong as PyTorch's own in that dtype."""
    from torch_conv_triton import testing

    ours = ways["triton_conv"]
    if isinstance(ours, str):
        return "failed", ours
    own = [way.error for name, way in ways.items() if name != "triton_conv" and isinstance(way, WayResult)]
    budget = testing.error_budget(DTYPES[dtype], "tf32" if dtype == "fp32" else "ieee")
    bound = max([budget, *(ERROR_MARGIN * error for error in own)])
    if ours.error <= bound:
        return "ok", ""
    return "wrong", f"relative error {ours.error:.2e}, above {bound:.2e}"


def step(run: Callable[..., Any], module: nn.Module, args: tuple, kwargs: dict, train: bool) -> Callable[[], list[Tensor]]:
    """A call that gives the floating-point outputs of `run`, or with `train` the gradients of `module`'s parameters in a training
    step: forward, mean squared distances from random targets, backward, and AdamW's step, which is not compiled.

    The learning rate is zero: the work is that of any rate, and every step of every way finds the same parameters.
    """

    def outputs() -> list[Tensor]:
        return [leaf for leaf in tree_leaves(run(*args, **kwargs)) if isinstance(leaf, Tensor) and leaf.is_floating_point()]

    def infer() -> list[Tensor]:
        with torch.no_grad():
            return outputs()

    if not train:
        return infer
    parameters = list(module.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=0.0, fused=True)
    targets: list[Tensor] = []

    def learn() -> list[Tensor]:
        found = outputs()
        if not targets:
            # the mean square of what a norm gives is a constant: without targets there would be nothing to learn
            generator = torch.Generator(found[0].device).manual_seed(0)
            targets.extend(torch.randn(output.shape, device=output.device, generator=generator) for output in found)
        sum(F.mse_loss(output.float(), target) for output, target in zip(found, targets, strict=True)).backward()
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        optimizer.step()
        optimizer.zero_grad()
        return gradients

    return learn


def enable_training(module: nn.Module) -> None:
    """Let parameters require grad, but leave dropout off: every run must compute the same gradients."""
    module.requires_grad_(True)
    for child in module.modules():
        if isinstance(child, nn.RNNBase):
            # cuDNN has no backward of an RNN in eval mode
            child.train()


def reference_values(module: nn.Module, args: tuple, kwargs: dict, dtype: torch.dtype, train: bool) -> list[Tensor]:
    """What `step` gives for the same weights and inputs in eager `dtype`, float32 products not rounded to TF32."""
    exact = copy.deepcopy(module).to(dtype)

    def widen(t: Tensor) -> Tensor:
        return t.to(dtype) if t.is_floating_point() else t

    args, kwargs = tree_map_only(Tensor, widen, (args, kwargs))
    with _without_tf32():
        return step(exact, exact, args, kwargs, train)()


def relative_error(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Frobenius norm of all differences over that of all expected values."""
    difference = sum((a.double() - e.double()).square().sum() for a, e in zip(actual, expected, strict=True))
    return float((difference / sum(e.double().square().sum() for e in expected)).sqrt())


def wall_ms(call: Callable[[], object], budget_ms: float) -> float:
    """Median wall time of a call with the device idle before and after it: what a person waits."""

    def once() -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - start)

    once()
    return statistics.median(once() for _ in range(repeats_within(budget_ms, once())))


def _first_call(call: Callable[[], list[Tensor]], expected: list[Tensor]) -> tuple[float, float, float]:
    start = time.perf_counter()
    error = relative_error(call(), expected)
    first_call_s = time.perf_counter() - start
    # memory of a later call: the first one also holds what compiling takes
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    return first_call_s, (torch.cuda.max_memory_allocated() - before) / 2**20, error


@contextlib.contextmanager
def _compiled_afresh() -> Iterator[None]:
    """Take no graph from the caches of earlier runs: ours (see `RecordingBackend`) is in none, and first calls are compared."""
    import torch._functorch.config
    import torch._inductor.config

    with torch._inductor.config.patch(fx_graph_cache=False), torch._functorch.config.patch(enable_autograd_cache=False):
        yield


@contextlib.contextmanager
def _without_tf32() -> Iterator[None]:
    switches = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "ieee"
        yield
    finally:
        for switch, precision in zip(switches, before, strict=True):
            switch.fp32_precision = precision
