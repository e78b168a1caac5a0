"""``torch-conv-triton tune``: its arguments, and what it runs."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from torch_conv_triton import dispatch
from torch_conv_triton.bench.command import add_geometry_arguments, cases_of
from torch_conv_triton.bench.errors import BenchError
from torch_conv_triton.bench.suite import DTYPES, SUITE
from torch_conv_triton.problem import Conv1dProblem
from torch_conv_triton.tuning import tables

Model = tuple[Any, tuple[Any, ...], dict[str, Any]]


def add_tune_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that `main` reads."""
    parser.description = (
        "Find the fastest way to run convolutions on this GPU and remember it: the suite's by default, one with --shape, those "
        "of a model with --model. Candidates are checked against float64 in parallel processes, then timed alone, so nothing "
        "else should run on the GPU. What the table has already is skipped, so an interrupted run goes on where it was. The "
        "exit status is 1 if a convolution could not be tuned."
    )
    what = parser.add_argument_group("what to tune")
    kind = what.add_mutually_exclusive_group()
    kind.add_argument("--suite", default=str(SUITE), metavar="PATH", help="cases, as JSON (default: the package's suite.json)")
    kind.add_argument("--shape", metavar="NxCxL", help="one convolution: sizes of x, as in 8x768x499")
    kind.add_argument(
        "--model",
        metavar="MODULE:CALLABLE",
        help="the convolutions of a model with fixed sizes, each with and without its bias; as for the command explain",
    )
    what.add_argument("--cases", metavar="P,Q", help="only cases whose names start with one of these, as in p01,p28,s_")
    what.add_argument("--dtype", choices=tuple(DTYPES), help="this dtype instead of each case's own (--shape: fp32)")
    what.add_argument("--backward", action="store_true", help="tune the gradients instead of the forward; not with --model")
    add_geometry_arguments(parser)

    how = parser.add_argument_group("how")
    how.add_argument("--output", type=Path, metavar="PATH", help="the table to write (default: the user's, see below)")
    how.add_argument("--force", action="store_true", help="tune what the table has already too")
    how.add_argument("--jobs", type=int, metavar="INT", help="processes that compile and check (default: by cores and memory)")
    how.add_argument(
        "--json", action="store_true", help="write the outcomes as JSON to standard output, the rest to standard error"
    )
    parser.epilog = (
        f"The user's table lies in ${tables.CACHE_VARIABLE}, else in ~/.cache/torch_conv_triton. Programs that start afterwards "
        "use it without being told."
    )


def main(args: argparse.Namespace, model: Model | None = None) -> int:
    """Tune what the arguments ask for, or the convolutions of `model`. Exit status: 0, 1 if one failed, 2 for wrong use."""
    try:
        if args.jobs is not None and args.jobs < 1:
            raise BenchError(f"--jobs must be positive, got {args.jobs}")
        if args.backward and args.model:
            raise BenchError("--backward tunes the gradients of single convolutions, as of --suite and --shape")
        device = _gpu()
        problems = _problems_of_cases(args) if model is None else _problems_of(model)
        return _tune(args, problems, device)
    except BenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _gpu() -> torch.device:
    if not torch.cuda.is_available():
        raise BenchError("tuning measures a CUDA GPU, and PyTorch sees none here")
    device = torch.device("cuda", torch.cuda.current_device())
    if dispatch.device_for(device) is None:
        raise BenchError(f"no kernel of ours runs on {torch.cuda.get_device_name(device)}; sm_80 or newer is needed")
    return device


def _problems_of_cases(args: argparse.Namespace) -> Sequence[tuple[str, Conv1dProblem]]:
    if not args.backward:
        return [(case.name, case.problem()) for case in cases_of(args)]
    return [(f"{case.name} {problem.kind}", problem) for case in cases_of(args) for problem in case.gradient_problems()]


def _problems_of(model: Model) -> Sequence[tuple[str, Conv1dProblem]]:
    from torch_conv_triton.explain import record

    function, args, kwargs = model
    # what the model prints is no outcome
    with torch.no_grad(), contextlib.redirect_stdout(sys.stderr):
        recorder = record(function, args, kwargs, backward=False).recorder
    found = {tables.key(problem): problem for problem in recorder.problems}
    if not found:
        raise BenchError("the model has no convolution of fixed size that kernels of ours compute")
    return [(problem.regime, problem) for problem in found.values()]


def _tune(args: argparse.Namespace, problems: Sequence[tuple[str, Conv1dProblem]], device: torch.device) -> int:
    from torch_conv_triton.tuning.laboratory import Workers, default_jobs
    from torch_conv_triton.tuning.tuner import tune

    gpu = dispatch.device_for(device)
    path = args.output or tables.user_path(gpu.name)
    text = sys.stderr if args.json else sys.stdout
    outcomes = []
    try:
        # what cannot be kept is not worth measuring
        tables.store(path, gpu.name, {})
        with Workers(device, args.jobs or default_jobs()) as laboratory:
            for outcome in tune(problems, gpu, path, laboratory, force=args.force):
                outcomes.append(outcome)
                print(outcome, file=text, flush=True)
    except OSError as error:
        raise BenchError(
            f"the table {path} cannot be written: {error}; --output or ${tables.CACHE_VARIABLE} names another"
        ) from error
    tuned = sum(outcome.status == "tuned" for outcome in outcomes)
    failed = sum(outcome.status == "failed" for outcome in outcomes)
    print(f"{tuned} of {len(outcomes)} tuned, {failed} failed; the table is {path}", file=text)
    if args.json:
        print(json.dumps([outcome.to_dict() for outcome in outcomes], indent=2))
    return 1 if failed else 0
