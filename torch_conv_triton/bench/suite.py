"""The benchmark's cases: what a recorded convolution is, where cases come from, and a case as tensors."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from torch_conv_triton.bench.errors import BenchError
from torch_conv_triton.dispatch_gradients import input_grad_problem, weight_grad_problem
from torch_conv_triton.problem import Conv1dProblem, check_arguments, contiguous_strides

SUITE = Path(__file__).with_name("suite.json")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


Tensors = tuple[Tensor, Tensor, Tensor | None]


@dataclass(frozen=True, slots=True)
class Case:
    """One convolution to measure.

    `x_shape` is ``(N, C_in, L_in)`` and `x_stride` its strides in elements; `w_shape` is ``(C_out, C_in / groups, K)``, or
    ``(C_in, C_out / groups, K)`` when `transposed`. `model` is where the call comes from, `phase` "infer" or "train",
    `weight` its share in real models' calls (0: not counted). `backward_mask` says which of the gradients (x, weight, bias)
    a training step asks for; without it, all that exist.
    """

    name: str
    regime: str
    model: str
    phase: str
    weight: float
    dtype: str
    x_shape: tuple[int, int, int]
    x_stride: tuple[int, int, int]
    w_shape: tuple[int, int, int]
    bias: bool
    stride: int
    padding: int
    dilation: int
    transposed: bool
    output_padding: int
    groups: int
    backward_mask: tuple[bool, bool, bool] | None = None

    @property
    def family(self) -> str:
        """The part of the suite a case belongs to: "seed" (named ``s_...``) or "public"."""
        return "seed" if self.name.startswith("s_") else "public"

    @property
    def gradients(self) -> tuple[bool, bool, bool]:
        """Which gradients (x, weight, bias) the backward benchmark computes."""
        return self.backward_mask or (True, True, self.bias)

    @property
    def arguments(self) -> dict[str, int]:
        """Keyword arguments of `F.conv1d`, or of `F.conv_transpose1d` when `transposed`."""
        arguments = {"stride": self.stride, "padding": self.padding, "dilation": self.dilation, "groups": self.groups}
        if self.transposed:
            arguments["output_padding"] = self.output_padding
        return arguments

    def tensors(self, device: str | torch.device, seed: int = 0) -> Tensors:
        """Random x with the recorded strides, contiguous weight (scaled to keep y near unit variance) and bias, or None."""
        dtype = DTYPES[self.dtype]
        generator = None if str(device) == "meta" else torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=dtype, device=device, generator=generator)

        span = 1 + sum((size - 1) * step for size, step in zip(self.x_shape, self.x_stride, strict=True))
        x = normal(span).as_strided(self.x_shape, self.x_stride)
        weight = normal(*self.w_shape).mul_((self.w_shape[1] * self.w_shape[2]) ** -0.5)
        C_out = self.w_shape[1] * self.groups if self.transposed else self.w_shape[0]
        return x, weight, normal(C_out) if self.bias else None

    def problem(self, tensors: Tensors | None = None) -> Conv1dProblem:
        """The same convolution as the package sees it, of these tensors; without them, no data is allocated."""
        x, weight, bias = tensors or self.tensors("meta")
        return Conv1dProblem.from_tensors(
            x, weight, bias, self.stride, self.padding, self.dilation, self.groups, self.transposed, self.output_padding
        )

    def grad_output(self, device: str | torch.device, seed: int = 1) -> Tensor:
        """A random gradient of y, ``(N, C_out, L_out)``: NLC where x is, else contiguous.

        What makes an x NLC is mostly a transpose, and another one behind the convolution, which gives its gradient that layout.
        """
        problem = self.problem()
        generator = None if str(device) == "meta" else torch.Generator(device).manual_seed(seed)
        N, C, L = problem.N, problem.C_out, problem.L_out
        if problem.layout == "NLC":
            return torch.randn(N, L, C, dtype=problem.dtype, device=device, generator=generator).transpose(1, 2)
        return torch.randn(N, C, L, dtype=problem.dtype, device=device, generator=generator)

    def gradient_problems(self, tensors: Tensors | None = None, grad_output: Tensor | None = None) -> list[Conv1dProblem]:
        """What the gradients of x and weight, in this order, that the case asks for are to the package, of these tensors.

        Without them, no data is allocated, and the gradient of y is laid out as `grad_output` says.
        """
        x, weight, _ = tensors or self.tensors("meta")
        if grad_output is None:
            grad_output = self.grad_output("meta")
        geometry = self.stride, self.padding, self.dilation, self.groups
        if self.transposed:
            # exchanging input and output makes the one kind of convolution the other
            for_x, pair = Conv1dProblem.from_tensors(grad_output, weight, None, *geometry), (x, grad_output)
        else:
            for_x, pair = input_grad_problem(grad_output, weight, x.shape[2], *geometry), (grad_output, x)
        for_weight = weight_grad_problem(*pair, weight.shape[2], *geometry)
        return [problem for problem, wanted in zip((for_x, for_weight), self.gradients, strict=False) if wanted]

    def check(self) -> None:
        """Raise BenchError unless this is a convolution that PyTorch would run."""
        if self.dtype not in DTYPES:
            raise BenchError(f"case {self.name}: dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.phase not in ("infer", "train"):
            raise BenchError(f"case {self.name}: phase must be 'infer' or 'train', got {self.phase!r}")
        if min(self.x_shape) < 1 or min(self.x_stride) < 0:
            raise BenchError(
                f"case {self.name}: x_shape must be positive and x_stride not negative, got {self.x_shape}, {self.x_stride}"
            )
        try:
            geometry = (self.stride, self.padding, self.dilation, self.groups, self.transposed, self.output_padding)
            check_arguments(*self.tensors("meta"), *geometry)
        except RuntimeError as error:
            raise BenchError(f"case {self.name}: {error}") from error


def load_suite(path: str | Path = SUITE) -> tuple[Case, ...]:
    """The cases of a suite file: a JSON list of objects with the fields of `Case`. Raises BenchError for a malformed one."""
    try:
        records = json.loads(Path(path).read_text())
    except OSError as error:
        raise BenchError(f"cannot read the suite: {error}") from error
    except json.JSONDecodeError as error:
        raise BenchError(f"{path}: not JSON ({error})") from error
    if not isinstance(records, list) or not records:
        raise BenchError(f"{path}: expected a list of cases, got {type(records).__name__} with nothing to measure")
    cases = tuple(case_from_record(record, f"{path}[{i}]") for i, record in enumerate(records))
    names = [case.name for case in cases]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise BenchError(f"{path}: case names must be unique, but these are not: {', '.join(twice)}")
    return cases


def case_from_record(record: object, where: str) -> Case:
    """A checked `Case` from one JSON object; `where` begins the error message of a malformed one."""
    if not isinstance(record, dict):
        raise BenchError(f"{where}: expected an object, got {record!r}")
    known = {field.name: field.type for field in fields(Case)}
    if missing := [name for name in known if name not in record and name != "backward_mask"]:
        raise BenchError(f"{where}: missing {', '.join(missing)}")
    if unknown := [name for name in record if name not in known]:
        raise BenchError(f"{where}: unknown {', '.join(unknown)}")
    case = Case(**{name: _typed(record[name], known[name], f"{where}: {name}") for name in known if name in record})
    case.check()
    return case


def _typed(value: object, annotation: str, where: str) -> object:
    if annotation.startswith("tuple"):
        kind = bool if "bool" in annotation else int
        if isinstance(value, list) and len(value) == 3 and all(type(v) is kind for v in value):
            return tuple(value)
        raise BenchError(f"{where} must be a list of 3 of {kind.__name__}, got {value!r}")
    kind = {"str": str, "float": float, "bool": bool, "int": int}[annotation]
    if type(value) is kind or (kind is float and type(value) is int):
        return value
    raise BenchError(f"{where} must be {kind.__name__}, got {value!r}")


def select_cases(cases: Iterable[Case], wanted: str | None) -> tuple[Case, ...]:
    """The cases whose names start with one of the comma-separated prefixes `wanted`, or all. Raises BenchError."""
    cases = tuple(cases)
    if wanted is None:
        return cases
    prefixes = [prefix for prefix in wanted.split(",") if prefix]
    for prefix in prefixes:
        if not any(case.name.startswith(prefix) for case in cases):
            raise BenchError(f"no case starts with {prefix!r}; there are {', '.join(case.name for case in cases)}")
    return tuple(case for case in cases if case.name.startswith(tuple(prefixes)))


def case_from_shape(
    shape: str,
    weight: str,
    *,
    dtype: str = "fp32",
    layout: str = "NCL",
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
    transposed: bool = False,
    output_padding: int = 0,
    bias: bool = False,
) -> Case:
    """A case from sizes written as ``8x768x499`` (x) and ``768x48x128`` (weight). Raises BenchError for sizes that do not fit."""
    x_shape, w_shape = _sizes(shape, "shape"), _sizes(weight, "weight")
    _, C, L = x_shape
    strides = {"NCL": contiguous_strides(C, L), "NLC": (C * L, 1, C)}
    if layout not in strides:
        raise BenchError(f"layout must be NCL or NLC, got {layout!r}")
    case = Case(
        name="shape",
        regime="shape",
        model="command line",
        phase="infer",
        weight=0.0,
        dtype=dtype,
        x_shape=x_shape,
        x_stride=strides[layout],
        w_shape=w_shape,
        bias=bias,
        stride=stride,
        padding=padding,
        dilation=dilation,
        transposed=transposed,
        output_padding=output_padding,
        groups=groups,
    )
    case.check()
    return case


def _sizes(text: str, name: str) -> tuple[int, int, int]:
    parts = text.lower().split("x")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise BenchError(f"{name} must be three positive sizes as in 8x768x499, got {text!r}")
    return int(parts[0]), int(parts[1]), int(parts[2])
