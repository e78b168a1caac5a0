"""Is the result right: outputs and gradients against the float64 reference, within the dtype's error budget."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from torch_conv_triton import reference
from torch_conv_triton.bench.peers import Tensors
from torch_conv_triton.bench.results import Errors
from torch_conv_triton.bench.suite import Case

ELEMENTS_AT_ONCE = 2**26
ELEMENTS_COMPARED = 2**28


def samples_to_compare(N: int, elements_per_sample: int, budget: int = ELEMENTS_COMPARED) -> list[int]:
    """Which samples of the batch to compare: all if they fit the budget, else the first, the last and some evenly between."""
    count = min(N, max(2, budget // max(1, elements_per_sample)))
    return [i * (N - 1) // max(1, count - 1) for i in range(count)]


def output_errors(case: Case, tensors: Tensors, outputs: Sequence[Tensor]) -> tuple[list[Errors], str]:
    """Errors of each of these outputs ``(N, C_out, L_out)``, and how many samples they were taken over.

    NaN or infinity anywhere, in samples that are not compared too, makes the worst element's error NaN.
    """
    x, weight, bias = tensors
    samples = samples_to_compare(x.shape[0], x[0].numel() + outputs[0][0].numel())
    tallies = [_Tally(worst=0.0 if output.isfinite().all() else math.nan) for output in outputs]
    for chunk in _chunks(samples, x[0].numel() + outputs[0][0].numel()):
        expected = reference.conv1d(x[chunk], weight, bias, *_geometry(case), case.transposed, case.output_padding)
        for tally, output in zip(tallies, outputs, strict=True):
            tally.add(output[chunk], expected)
    return [tally.errors() for tally in tallies], f"{len(samples)} of {x.shape[0]} samples"


def gradient_errors(case: Case, tensors: Tensors, grad_output: Tensor, gradients: Sequence[Sequence[Tensor]]) -> list[Errors]:
    """The largest errors in each list of gradients (those of x, weight, bias that the case asks for)."""
    expected = reference_gradients(case, tensors, grad_output)
    found = []
    for computed in gradients:
        tallies = [_Tally() for _ in expected]
        for tally, actual, true in zip(tallies, computed, expected, strict=True):
            tally.add(actual, true)
        errors = [tally.errors() for tally in tallies]
        found.append(Errors(_largest(e.whole for e in errors), _largest(e.worst for e in errors)))
    return found


@dataclass(slots=True)
class _Tally:
    """Sums up the errors of an output, compared part by part."""

    difference: float = 0.0
    norm: float = 0.0
    worst: float = 0.0

    def add(self, actual: Tensor, expected: Tensor) -> None:
        difference = actual.double() - expected
        self.difference += difference.square().sum().item()
        self.norm += expected.square().sum().item()
        rms = expected.square().mean().sqrt()
        self.worst = _largest((self.worst, difference.abs().div_(rms + expected.abs()).max().item()))

    def errors(self) -> Errors:
        return Errors((self.difference / self.norm) ** 0.5, self.worst)


def _largest(values: Iterable[float]) -> float:
    """The largest value; NaN if there is one, which `max` may lose."""
    values = list(values)
    return next((value for value in values if math.isnan(value)), max(values))


def reference_gradients(case: Case, tensors: Tensors, grad_output: Tensor) -> list[Tensor]:
    """The wanted ones of the gradients of x, weight and bias in float64."""
    x, weight, _ = tensors
    wants_x, wants_weight, wants_bias = case.gradients
    stride, padding, dilation, groups = _geometry(case)
    grad_x = torch.empty(x.shape, dtype=torch.float64, device=x.device) if wants_x else None
    grad_weight = torch.zeros(weight.shape, dtype=torch.float64, device=x.device)
    for chunk in _chunks(range(x.shape[0]), x[0].numel() + grad_output[0].numel()):
        if wants_x:
            grad_x[chunk] = _input_gradient(case, x.shape[2], weight, grad_output[chunk])
        if wants_weight:
            # exchanging input and output makes the one kind of convolution the other
            inner, outer = (x, grad_output) if not case.transposed else (grad_output, x)
            grad_weight += _weight_gradient(inner[chunk], outer[chunk], weight.shape[2], stride, padding, dilation, groups)
    found = (grad_x, grad_weight, grad_output.sum((0, 2), dtype=torch.float64) if wants_bias else None)
    return [gradient for gradient, wanted in zip(found, case.gradients, strict=True) if wanted]


def _input_gradient(case: Case, L_in: int, weight: Tensor, grad_output: Tensor) -> Tensor:
    stride, padding, dilation, groups = _geometry(case)
    if case.transposed:
        # an output_padding of a stride or more makes room for positions that no input gave
        return reference.conv1d(grad_output, weight, None, stride, padding, dilation, groups)[..., :L_in]
    extent = (grad_output.shape[2] - 1) * stride - 2 * padding + dilation * (weight.shape[2] - 1) + 1
    return reference.conv1d(grad_output, weight, None, stride, padding, dilation, groups, True, L_in - extent)


def _weight_gradient(inner: Tensor, outer: Tensor, K: int, stride: int, padding: int, dilation: int, groups: int) -> Tensor:
    """Gradient of a convolution's weight: inner ``(N, C, L_in)`` is its input, outer ``(N, C', L_out)`` its output's gradient."""
    L = outer.shape[2]
    padded = F.pad(inner.double(), (padding, padding)).unflatten(1, (groups, -1))
    outer = outer.double().unflatten(1, (groups, -1))
    taps = [padded[..., k * dilation : k * dilation + (L - 1) * stride + 1 : stride] for k in range(K)]
    return torch.stack([torch.einsum("ngol,ngcl->goc", outer, tap).flatten(0, 1) for tap in taps], dim=2)


def _geometry(case: Case) -> tuple[int, int, int, int]:
    return case.stride, case.padding, case.dilation, case.groups


def _chunks(samples: Sequence[int], elements_per_sample: int) -> Iterator[list[int]]:
    size = max(1, ELEMENTS_AT_ONCE // max(1, elements_per_sample))
    for start in range(0, len(samples), size):
        yield list(samples[start : start + size])
