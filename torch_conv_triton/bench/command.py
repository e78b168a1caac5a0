"""``torch-conv-triton bench``: its arguments, and what it runs."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from torch_conv_triton.bench.errors import BenchError
from torch_conv_triton.bench.models import MODELS
from torch_conv_triton.bench.peers import PEERS, parse_peers
from torch_conv_triton.bench.results import SuiteResult, load, merge, save
from torch_conv_triton.bench.roofline import plot_shares
from torch_conv_triton.bench.suite import DTYPES, SUITE, Case, case_from_shape, load_suite, select_cases
from torch_conv_triton.bench.tables import case_header, case_line
from torch_conv_triton.bench.worker import WorkerError

DEFAULT_MS = {"suite": 200.0, "models": 1000.0, "wall": 100.0}
DEFAULT_TIMEOUT_S = {"suite": 300.0, "models": 900.0, "wall": 300.0}

_GEOMETRY = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1, "output_padding": 0}
# options that belong to one kind of measurement, with the values that say nothing
_ONLY_WITH = {
    "shape": {"weight": None, **_GEOMETRY, "layout": "NCL", "transposed": False, "bias": False},
    "models": {"train": False, "size": "full", "ways": None},
}


def add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that `main` reads."""
    parser.description = (
        "Time the convolution against its peers on this GPU: the whole suite by default, one shape with --shape, whole models "
        "with --models, calls that wait for the host with --wall. Every case is checked against float64 first; the exit status "
        "is 1 if one is wrong or fails."
    )
    what = parser.add_argument_group("what to measure")
    kind = what.add_mutually_exclusive_group()
    kind.add_argument(
        "--suite", default=str(SUITE), metavar="PATH", help="cases to measure, as JSON (default: the package's suite.json)"
    )
    kind.add_argument("--shape", metavar="NxCxL", help="measure one convolution: sizes of x, as in 8x768x499")
    kind.add_argument("--models", nargs="*", metavar="NAME", help=f"measure whole models, all or some of: {', '.join(MODELS)}")
    kind.add_argument(
        "--wall",
        action="store_true",
        help="measure wall times of small convolutions: eager, compiled and in CUDA graphs, beside PyTorch's",
    )
    kind.add_argument(
        "--from", nargs="+", dest="sources", metavar="PATH", help="measure nothing: merge and show results of earlier --json"
    )
    what.add_argument("--cases", metavar="P,Q", help="only cases whose names start with one of these, as in p01,p28,s_")
    what.add_argument(
        "--dtype", choices=tuple(DTYPES), help="use this dtype instead of each case's or model's own (--shape: fp32)"
    )
    what.add_argument("--backward", action="store_true", help="time the gradients, through autograd, instead of the forward")

    add_geometry_arguments(parser)

    models = parser.add_argument_group("with --models")
    models.add_argument("--train", action="store_true", help="run a training step, with the optimiser's, instead of inference")
    models.add_argument(
        "--ways",
        nargs="+",
        metavar="WAY",
        help="only some of eager, torch.compile and triton_conv, the last among them (default all)",
    )
    models.add_argument("--size", choices=("full", "small"), default="full", help="size of the inputs (default full)")

    how = parser.add_argument_group("how")
    how.add_argument(
        "--peers",
        default="quick",
        metavar="P,Q",
        help=f"all, quick (default: none that compiles), none, or some of {', '.join(PEERS)}",
    )
    how.add_argument("--rounds", type=_positive(int), default=3, metavar="INT", help="turns that each contestant has (default 3)")
    how.add_argument(
        "--ms",
        type=_positive(float),
        metavar="MS",
        help="time for each contestant of a case in all (default 200; --models: 1000; --wall: 100)",
    )
    how.add_argument(
        "--timeout", type=_positive(float), metavar="S", help="seconds that a case may take (default 300; --models: 900)"
    )
    how.add_argument(
        "--isolate",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="run in a child process, so that a fault costs one case",
    )

    output = parser.add_argument_group("output")
    output.add_argument("--json", metavar="PATH", help="write the results here, after every case")
    output.add_argument("--plot", metavar="PATH", help="write a plot of each case's share of the floor here (.png, .svg, .pdf)")
    output.add_argument("--commit", metavar="ID", help="commit to record, where the package is not a git checkout")


def _positive(number: Callable[[str], float]) -> Callable[[str], float]:
    def read(text: str) -> float:
        value = number(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"must be above zero, got {text}")
        return value

    # argparse names it where the text is no number
    read.__name__ = number.__name__
    return read


def add_geometry_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that belong to --shape, as `cases_of` reads them."""
    shape = parser.add_argument_group("with --shape")
    shape.add_argument("--weight", metavar="OxIxK", help="sizes of the weight, as in 768x48x128")
    for name, default in _GEOMETRY.items():
        shape.add_argument(f"--{name.replace('_', '-')}", type=int, default=default, metavar="INT", help=f"default {default}")
    shape.add_argument("--layout", choices=("NCL", "NLC"), default="NCL", help="memory layout of x (default NCL)")
    shape.add_argument("--transposed", action="store_true", help="conv_transpose1d")
    shape.add_argument("--bias", action="store_true", help="with a bias")


def refuse_unused(args: argparse.Namespace) -> None:
    """Raises BenchError for an option that what is measured would ignore."""
    for kind, options in _ONLY_WITH.items():
        if getattr(args, kind) is None:
            for name, silent in options.items():
                if getattr(args, name) != silent:
                    raise BenchError(f"--{name.replace('_', '-')} has a meaning with --{kind} only")
    if args.models is not None and args.backward:
        raise BenchError("--backward times single convolutions; a training step of a model is --models --train")
    if args.wall and (args.backward or args.plot):
        raise BenchError(f"--{'backward' if args.backward else 'plot'} has no meaning with --wall")


def main(args: argparse.Namespace) -> int:
    """Run what the arguments ask for. Exit status: 0 if all was right, 1 if a case was not, 2 if it cannot be done."""
    try:
        refuse_unused(args)
        if args.models is not None:
            return _models(args)
        if args.wall:
            return _wall(args)
        result = _measured_earlier(args) if args.sources else _suite(args)
    except BenchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except WorkerError as error:
        print(f"error: the GPU could not be used: {error}", file=sys.stderr)
        return 1
    if args.plot:
        plot(result, args.plot)
    return 0 if result.passed else 1


def cases_of(args: argparse.Namespace) -> tuple[Case, ...]:
    """The cases that the arguments name. Raises BenchError for ones that are none."""
    if args.shape is None:
        return _selected(load_suite(args.suite), args)
    if args.weight is None:
        raise BenchError("--shape needs --weight, as in --shape 8x768x499 --weight 768x48x128 --groups 16")
    geometry = {name: getattr(args, name) for name in _GEOMETRY}
    others = {"layout": args.layout, "transposed": args.transposed, "bias": args.bias, "dtype": args.dtype or "fp32"}
    return (case_from_shape(args.shape, args.weight, **geometry, **others),)


def _selected(cases: Sequence[Case], args: argparse.Namespace) -> tuple[Case, ...]:
    cases = select_cases(cases, args.cases)
    return tuple(replace(case, dtype=args.dtype) for case in cases) if args.dtype else cases


def plot(result: SuiteResult, path: str) -> None:
    """Plot the share of the floor of every measured case, cuDNN's beside ours."""
    rows = [
        (case.name, case.floor_ms / cudnn if (cudnn := case.peer_ms("cudnn")) else None, case.share)
        for case in result.cases
        if case.status == "ok"
    ]
    direction = "backward" if result.options.get("backward") else "forward"
    plot_shares(rows, path, f"1-D convolution, {direction}, on {result.machine['gpu']}")


def _suite(args: argparse.Namespace) -> SuiteResult:
    from torch_conv_triton.bench.run import run_suite

    return run_suite(
        cases_of(args),
        parse_peers(args.peers),
        backward=args.backward,
        out=args.json,
        **_how(args, "suite"),
    )


def _models(args: argparse.Namespace) -> int:
    from torch_conv_triton.bench.model_run import WAYS, run_models

    results = run_models(
        args.models or tuple(MODELS),
        args.dtype,
        size=args.size,
        train=args.train,
        ways=args.ways or WAYS,
        out=args.json,
        **_how(args, "models"),
    )
    return 0 if all(result.status == "ok" for result in results) else 1


def _wall(args: argparse.Namespace) -> int:
    from torch_conv_triton.bench.wall import run_wall, small_cases

    results = run_wall(_selected(small_cases(), args), out=args.json, **_how(args, "wall"))
    return 0 if all(result.status == "ok" for result in results) else 1


def _measured_earlier(args: argparse.Namespace) -> SuiteResult:
    from torch_conv_triton.bench.run import machine_line, show_totals

    result = merge([load(path) for path in args.sources])
    print(machine_line(result.machine, result.ceilings))
    print(case_header(result.peer_names()))
    for case in result.cases:
        print(case_line(case, result.peer_names()))
    show_totals(result)
    if args.json:
        save(result, args.json)
    return result


def _how(args: argparse.Namespace, what: str) -> dict[str, object]:
    return {
        "rounds": args.rounds,
        "ms": args.ms or DEFAULT_MS[what],
        "timeout_s": args.timeout or DEFAULT_TIMEOUT_S[what],
        "isolate": args.isolate,
        "commit": args.commit,
        "command": command_line(sys.argv[1:]),
    }


def command_line(arguments: Sequence[str]) -> str:
    """The command as results record it: absolute paths shortened to their last part, which alone means something elsewhere."""
    return shlex.join(["torch-conv-triton", *(Path(a).name if a.startswith("/") else a for a in arguments)])
