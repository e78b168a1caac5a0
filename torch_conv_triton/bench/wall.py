"""Wall time of small convolutions, whose calls wait for the host: eager, compiled and in CUDA graphs, ours beside PyTorch's."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torch_conv_triton import dispatch
from torch_conv_triton.bench.model_run import ERROR_MARGIN, reference_values, relative_error, wall_ms
from torch_conv_triton.bench.progress import track
from torch_conv_triton.bench.results import write_json
from torch_conv_triton.bench.run import provenance, require_gpu
from torch_conv_triton.bench.suite import Case, case_from_shape, load_suite, select_cases
from torch_conv_triton.bench.worker import Here, Worker, WorkerError
from torch_conv_triton.explain import RecordingBackend

OURS, PYTORCH = "ours", "pytorch"
MODES = ("eager", "compiled", "reduce-overhead", "cuda graph")
DEEP = 4
# between two synchronisations: their own time is shared by so many calls
CALLS_IN_A_ROW = 200
# a CUDA graph of Inductor's runs as one from the third call on
WARM_UP_CALLS = 3
_GEOMETRY = ("stride", "padding", "dilation")


@dataclass(frozen=True, slots=True)
class WallResult:
    """One convolution, or `layers` of them with a ReLU behind each, called in one of `MODES`.

    `us` is the wall time of a call in us, of `CALLS_IN_A_ROW` without a wait in between, and `errors` the relative error against
    float64, both by who computes ("ours", "pytorch"). `kernels` are what ours runs. `status` is "ok", "wrong" (then nothing was
    timed) or "failed"; `message` says why for the last two.
    """

    name: str
    layers: int
    dtype: str
    mode: str
    status: str
    message: str = ""
    kernels: str = ""
    us: dict[str, float] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)

    @property
    def ratio(self) -> float | None:
        """PyTorch's time over ours: above 1, ours is faster."""
        return self.us[PYTORCH] / self.us[OURS] if self.us else None


def small_cases() -> tuple[Case, ...]:
    """Convolutions that a GPU computes about as fast as the host launches them: dense ones, and two of the suite."""
    small = replace(case_from_shape("1x256x100", "256x256x3", padding=1), name="small")
    tiny = replace(case_from_shape("1x64x256", "64x64x3", padding=1, bias=True), name="tiny")
    return small, tiny, *select_cases(load_suite(), "p12,p24")


def depths(case: Case) -> tuple[int, ...]:
    """How many layers of the case are measured: one, and a few in a row where the output is of the input's shape."""
    problem = case.problem()
    return (1, DEEP) if (problem.C_in, problem.L_in) == (problem.C_out, problem.L_out) else (1,)


def run_wall(
    cases: Sequence[Case],
    *,
    rounds: int = 3,
    ms: float = 100,
    out: str | Path | None = None,
    isolate: bool = True,
    timeout_s: float = 300,
    command: str = "",
    commit: str | None = None,
    echo: Callable[[str], None] = print,
) -> list[WallResult]:
    """Check and time every case in every mode, and print a line for each.

    Each of the two is timed for about `ms` milliseconds a line in `rounds` turns. `isolate`, `timeout_s` (a line) and `out` as in
    `run_suite`. Raises BenchError without a CUDA device.
    """
    require_gpu()
    from torch_conv_triton.bench.measure import describe_machine

    found: list[WallResult] = []
    rows = [(case, layers, mode) for case in cases for layers in depths(case) for mode in MODES]
    with Worker(timeout_s) if isolate else Here() as worker:
        machine = worker.call(describe_machine) | provenance(command, commit)
        echo(f"{machine['gpu']}, torch {machine['torch']}, triton {machine['triton']}, commit {machine['commit'][:12]}")
        echo(wall_header())
        for row in track(rows, [f"{case.name} x {layers}, {mode}" for case, layers, mode in rows]):
            case, layers, mode = row
            try:
                result = worker.call(measure_wall, *row, rounds=rounds, ms=ms)
            except WorkerError as error:
                result = WallResult(case.name, layers, case.dtype, mode, "failed", str(error))
            echo(wall_line(result))
            found.append(result)
            if out is not None:
                options = {"rounds": rounds, "ms": ms, "calls_in_a_row": CALLS_IN_A_ROW}
                write_json(out, {"machine": machine, "options": options, "wall": [asdict(r) | {"ratio": r.ratio} for r in found]})
    return found


def wall_header() -> str:
    """Heading of the lines that `wall_line` gives."""
    return f"{'case':<24} {'layers':>6} {'dtype':<6}{'mode':<16}{'ours us':>9}{'pytorch us':>11}{'ratio':>7}  errors; kernels"


def wall_line(result: WallResult) -> str:
    """One case in one mode: times, PyTorch's over ours, the error of each, and the kernels that ours runs."""
    line = f"{result.name:<24} {result.layers:>6} {result.dtype:<6}{result.mode:<16}"
    if result.ratio is None:
        return f"{line} {result.status.upper()}: {result.message}  {result.kernels}".rstrip()
    line += f"{result.us[OURS]:>9.1f}{result.us[PYTORCH]:>11.1f}{result.ratio:>6.2f}x"
    return f"{line}  {result.errors[OURS]:.1e} {result.errors[PYTORCH]:.1e}; {result.kernels}"


def measure_wall(case: Case, layers: int, mode: str, *, rounds: int, ms: float) -> WallResult:
    """Check and time one case in one mode on the current CUDA device; runs in the worker."""
    from torch_conv_triton import testing

    torch._dynamo.reset()
    model, x = build(case, layers, "cuda")
    expected = reference_values(model, (x,), {}, torch.float64, train=False)
    backend = RecordingBackend(model)
    with torch.no_grad():
        calls = calls_in(mode, model, x, backend)
        errors = {who: _settled_error(call, expected) for who, call in calls.items()}
        problem = case.problem((x, model[0].weight, model[0].bias))
        plan = dispatch.plan(problem, dispatch.device_for(x.device))
        kernels = {record.kernel for record in backend.report().records} or {plan.kernel}
        found = {"kernels": " ".join(sorted(kernels)), "errors": errors}
        bound = max(testing.error_budget(problem.dtype, problem.precision), ERROR_MARGIN * errors[PYTORCH])
        if not errors[OURS] <= bound:
            message = f"relative error {errors[OURS]:.2e}, above {bound:.2e}"
            return WallResult(case.name, layers, case.dtype, mode, "wrong", message, **found)
        return WallResult(case.name, layers, case.dtype, mode, "ok", us=call_us(calls, rounds, ms), **found)


def build(case: Case, layers: int, device: str) -> tuple[nn.Sequential, Tensor]:
    """The case as a model of as many layers, the same every time, and its input."""
    torch.manual_seed(0)
    x = case.tensors(device)[0]
    C_out, _, K = case.w_shape
    modules: list[nn.Module] = []
    for _ in range(layers):
        modules.append(nn.Conv1d(x.shape[1], C_out, K, bias=case.bias, device=device, dtype=x.dtype, **case.arguments))
        if layers > 1:
            modules.append(nn.ReLU())
    return nn.Sequential(*modules).requires_grad_(False), x


def calls_in(mode: str, model: nn.Sequential, x: Tensor, backend: RecordingBackend) -> dict[str, Callable[[], Tensor]]:
    """The call of the model in a mode, by who computes it."""
    if mode in ("compiled", "reduce-overhead"):
        option = None if mode == "compiled" else mode
        return {
            OURS: partial(torch.compile(model, backend=backend, mode=option), x),
            PYTORCH: partial(torch.compile(model, mode=option), x),
        }
    import torch_conv_triton

    eager = {OURS: eager_call(model, x, torch_conv_triton.conv1d), PYTORCH: eager_call(model, x, F.conv1d)}
    return eager if mode == "eager" else {who: _captured(call) for who, call in eager.items()}


def eager_call(model: nn.Sequential, x: Tensor, conv1d: Callable[..., Tensor]) -> Callable[[], Tensor]:
    """What the model computes, from functions: modules would add the same host time to both."""
    # one integer each, as functions are called with
    convolutions = [
        partial(conv1d, weight=m.weight, bias=m.bias, groups=m.groups, **{name: getattr(m, name)[0] for name in _GEOMETRY})
        for m in model
        if isinstance(m, nn.Conv1d)
    ]
    if len(convolutions) == 1:
        return partial(convolutions[0], x)

    def call() -> Tensor:
        y = x
        for convolution in convolutions:
            y = F.relu(convolution(y))
        return y

    return call


def _captured(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The call as a CUDA graph, which it replays."""
    beside = torch.cuda.Stream()
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(WARM_UP_CALLS):
            call()
    torch.cuda.current_stream().wait_stream(beside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call()

    def replay() -> Tensor:
        graph.replay()
        return y

    return replay


def _settled_error(call: Callable[[], Tensor], expected: list[Tensor]) -> float:
    for _ in range(WARM_UP_CALLS):
        call()
    return relative_error([call()], expected)


def call_us(calls: Mapping[str, Callable[[], Tensor]], rounds: int, ms: float) -> dict[str, float]:
    """Wall time of each call in us, from many in a row: its median turn of several, taken by turns."""

    def in_a_row(call: Callable[[], Tensor]) -> None:
        for _ in range(CALLS_IN_A_ROW):
            call()

    turns: dict[str, list[float]] = {who: [] for who in calls}
    for _ in range(rounds):
        for who, call in calls.items():
            turns[who].append(1e3 * wall_ms(partial(in_a_row, call), ms / rounds) / CALLS_IN_A_ROW)
    return {who: statistics.median(found) for who, found in turns.items()}
