"""The command ``torch-conv-triton``: demo, explain, tune, bench, doctor."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map

import torch_conv_triton
from torch_conv_triton.bench.command import add_bench_arguments
from torch_conv_triton.bench.command import main as bench
from torch_conv_triton.problem import KERNEL_DTYPES, dtype_name
from torch_conv_triton.tuning.command import add_tune_arguments
from torch_conv_triton.tuning.command import main as tune

DTYPES = {dtype_name(dtype): dtype for dtype in KERNEL_DTYPES}


class CommandError(Exception):
    """What was asked for cannot be done; the message is for the person who asked."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line (without the program's name); the exit status is 0 for done, 1 for a failed check, 2 for wrong use."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except CommandError as error:
        print(f"{parser.prog} {args.command}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="torch-conv-triton", description="Fast 1-D convolutions for PyTorch, in Triton.")
    parser.add_argument("--version", action="version", version=f"torch_conv_triton {torch_conv_triton.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    demo = _command(
        commands, "demo", _demo, "compile a small audio model, tell what happened to every convolution, check and time it"
    )
    demo.add_argument("--dtype", choices=DTYPES, default="fp32", help="dtype of weights and input (default: fp32)")
    _add_device(demo)
    _add_json(demo)

    explain = _command(commands, "explain", _explain, "tell what the backend does to every 1-D convolution of a model")
    explain.add_argument(
        "model",
        metavar="MODULE:CALLABLE",
        help="a callable without parameters that returns (model, args) or (model, args, kwargs); "
        "the module is also looked for in the current directory",
    )
    explain.add_argument("--backward", action="store_true", help="explain training: the forward and its gradients")
    _add_device(explain)
    _add_json(explain)

    add_tune_arguments(_command(commands, "tune", _tune, "find the fastest way to run convolutions on this GPU and remember it"))

    add_bench_arguments(
        _command(commands, "bench", bench, "time convolutions and models beside cuDNN and torch.compile, on a GPU")
    )

    doctor = _command(commands, "doctor", _doctor, "check the installation: GPU, versions, the backend, the kernels")
    _add_json(doctor)
    return parser


def _command(commands: Any, name: str, run: Any, summary: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=summary, description=summary[0].upper() + summary[1:] + ".")
    parser.set_defaults(run=run)
    return parser


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", type=_torch_device, help="where it runs (default: cuda where there is one, else cpu)")


def _torch_device(text: str) -> torch.device:
    try:
        return torch.device(text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="write JSON to standard output, and the rest to standard error")


def _device(args: argparse.Namespace) -> torch.device:
    device = args.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise CommandError(f"--device {device}: this PyTorch ({torch.__version__}) finds no GPU")
    return device


def _demo(args: argparse.Namespace) -> int:
    device = _device(args)
    if device.type == "cpu":
        interpret_kernels()
    require_backend()
    from torch_conv_triton.demo import run_demo

    with _standard_output_for_json(args.json):
        result = run_demo(device, DTYPES[args.dtype])
    if args.json:
        print(json.dumps(result.to_dict(), indent=2))
    return 0 if result.passed else 1


def _explain(args: argparse.Namespace) -> int:
    device = _device(args)
    model, model_args, model_kwargs = load_model(args.model)
    model, model_args, model_kwargs = tree_map(lambda leaf: _to(leaf, device), (model, model_args, model_kwargs))
    with _standard_output_for_json(args.json), torch.set_grad_enabled(args.backward):
        report = torch_conv_triton.explain(model, *model_args, backward=args.backward, **model_kwargs)
    if args.json:
        print(json.dumps(report.to_dict(), indent=2))
    return 0


def _tune(args: argparse.Namespace) -> int:
    if args.model is None or not torch.cuda.is_available():
        return tune(args)
    with _standard_output_for_json(args.json):
        model = load_model(args.model)
    return tune(args, tree_map(lambda leaf: _to(leaf, torch.device("cuda")), model))


def _doctor(args: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        interpret_kernels()
    from torch_conv_triton.doctor import examine

    checks = []
    for check in examine():
        checks.append(check)
        if not args.json:
            print(check, flush=True)
    if args.json:
        print(json.dumps([check.to_dict() for check in checks], indent=2))
    return 1 if any(check.status == "failed" for check in checks) else 0


def load_model(reference: str) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """The model that ``module:callable`` builds, with positional and keyword arguments to call it with. Raises CommandError."""
    module_name, _, path = reference.partition(":")
    if not module_name or not path:
        raise CommandError(f"{reference!r} is not of the form MODULE:CALLABLE, as in my_package.models:build")
    # a console script has its own directory there instead
    sys.path.insert(0, os.getcwd())
    try:
        build: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise CommandError(f"cannot import {module_name!r}: {error}") from error
    for name in path.split("."):
        if not hasattr(build, name):
            raise CommandError(f"{module_name!r} has no {path!r}")
        build = getattr(build, name)
    if not callable(build):
        raise CommandError(f"{reference!r} is not callable, but {type(build).__name__}")
    built = build()
    if not isinstance(built, tuple) or len(built) not in (2, 3) or not callable(built[0]):
        raise CommandError(f"{reference!r} must return (model, args) or (model, args, kwargs), but returned {_shape_of(built)}")
    model, args, kwargs = built if len(built) == 3 else (*built, {})
    if not isinstance(args, (tuple, list)) or not isinstance(kwargs, dict):
        raise CommandError(f"{reference!r}: args must be a tuple and kwargs a dict, but returned {_shape_of(built)}")
    return model, tuple(args), kwargs


def _shape_of(value: Any) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(type(part).__name__ for part in value)})"
    return type(value).__name__


def _to(leaf: Any, device: torch.device) -> Any:
    return leaf.to(device) if isinstance(leaf, (torch.Tensor, torch.nn.Module)) else leaf


def require_backend() -> None:
    """Raise CommandError where `torch.compile` does not know the backend by its name."""
    if "triton_conv" not in torch.compiler.list_backends():
        raise CommandError(
            'torch.compile finds no backend "triton_conv": install the package (pip install .), its sources are not enough'
        )


def interpret_kernels() -> None:
    """Let the kernels run on CPU tensors, in Triton's interpreter. Triton reads this when it is imported, so call it before."""
    os.environ.setdefault("TRITON_INTERPRET", "1")


def _standard_output_for_json(as_json: bool) -> contextlib.AbstractContextManager[Any]:
    """Keep what else is printed, by a model too, out of the JSON."""
    return contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()
