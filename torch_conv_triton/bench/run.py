"""Runs the suite: every case in the worker, a line a case, geometric means, and the results file kept up to date."""

from __future__ import annotations

import datetime
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from torch_conv_triton.bench import tables
from torch_conv_triton.bench.errors import BenchError
from torch_conv_triton.bench.peers import QUICK_PEERS
from torch_conv_triton.bench.progress import track
from torch_conv_triton.bench.results import CaseResult, SuiteResult, save, summarize
from torch_conv_triton.bench.suite import Case
from torch_conv_triton.bench.worker import Here, Worker, WorkerError


def run_suite(
    cases: Sequence[Case],
    peers: Sequence[str] = QUICK_PEERS,
    *,
    backward: bool = False,
    rounds: int = 3,
    ms: float = 200,
    out: str | Path | None = None,
    isolate: bool = True,
    timeout_s: float = 300,
    command: str = "",
    commit: str | None = None,
    echo: Callable[[str], None] = print,
) -> SuiteResult:
    """Check and time every case, and print a line for each and the geometric means.

    Each contestant is timed for about `ms` milliseconds a case in `rounds` turns; `backward` times the gradients instead of
    the forward. With `isolate`, a child process does the GPU's work: a case that fails there, or takes more than `timeout_s`
    seconds, is recorded as failed and the others go on. `out` is rewritten as JSON after every case. Raises BenchError
    without a CUDA device.
    """
    require_gpu()
    if not cases:
        raise BenchError("there is no case to measure")
    from torch_conv_triton.bench import measure

    options = {"peers": list(peers), "backward": backward, "rounds": rounds, "ms": ms}
    with Worker(timeout_s) if isolate else Here() as worker:
        machine = worker.call(measure.describe_machine) | provenance(command, commit)
        rates = worker.call(measure.ceilings)
        echo(machine_line(machine, asdict(rates)))
        echo(tables.case_header(peers))
        found: list[CaseResult] = []
        for case in track(cases, [case.name for case in cases]):
            try:
                result = worker.call(measure.measure_case, case, peers, rates, backward=backward, rounds=rounds, ms=ms)
            except WorkerError as error:
                result = CaseResult.failure(case, str(error))
            echo(tables.case_line(result, peers))
            found.append(result)
            run = SuiteResult(machine, options, asdict(rates), tuple(found))
            if out is not None:
                save(run, out)
    show_totals(run, echo)
    return run


def show_totals(result: SuiteResult, echo: Callable[[str], None] = print) -> None:
    """Print the geometric means and what went wrong."""
    for line in ("", *tables.summary_lines(summarize(result), result.peer_names()), "", *tables.closing_lines(result)):
        echo(line)


def require_gpu() -> None:
    """Raise BenchError, in words for the person at the command line, unless there is a CUDA device."""
    if not torch.cuda.is_available():
        raise BenchError("the benchmark measures a CUDA GPU, and PyTorch sees none here")


def provenance(command: str, commit: str | None) -> dict[str, str]:
    """When this ran, by which command, and of which commit of the package ("unknown" outside a checkout)."""
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {"date": now, "command": command, "commit": commit or _checked_out_commit() or "unknown"}


def _checked_out_commit() -> str | None:
    here = Path(__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(("git", *arguments), cwd=here, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    # an installed package may lie inside the checkout of something else
    if git("ls-files", Path(__file__).name) != Path(__file__).name:
        return None
    dirty = "-dirty" if git("status", "--porcelain", "--untracked-files=no") else ""
    return f"{git('rev-parse', 'HEAD')}{dirty}"


def machine_line(machine: dict[str, str], ceilings: dict[str, float]) -> str:
    """The GPU, its measured rates and the versions, in one line."""
    return (
        f"{machine['gpu']} {machine['capability']}: copy {ceilings['bytes_per_s'] / 1e12:.2f} TB/s, "
        f"TF32 {ceilings['tf32'] / 1e12:.0f}, 16-bit {ceilings['half'] / 1e12:.0f}, fp32 {ceilings['ieee'] / 1e12:.0f} TFLOP/s; "
        f"torch {machine['torch']}, triton {machine['triton']}, cuDNN {machine['cudnn']}, commit {machine['commit'][:12]}"
    )
