"""Where aten computes a gradient faster than our kernels: rules read off measurements on an H200."""

from __future__ import annotations

from torch_conv_triton.problem import Conv1dProblem


def input_grad_faster_in_aten(problem: Conv1dProblem) -> str | None:
    """Why aten is the faster for an input gradient, or None; the problem is the convolution that computes it."""
    return "aten's gradient is the choice until ours is measured to be faster"


def weight_grad_faster_in_aten(problem: Conv1dProblem) -> str | None:
    """Why aten is the faster for a weight gradient, or None; the problem is the forward's, with grad_output's strides for y's."""
    return "aten's gradient is the choice until ours is measured to be faster"
