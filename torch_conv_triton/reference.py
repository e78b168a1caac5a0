"""The slow, honest convolution: one matrix product a tap, in float64. What tests and benchmarks compare against."""

from __future__ import annotations

import torch
from torch import Tensor

from torch_conv_triton.problem import check_arguments, output_length


def conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: int,
    padding: int,
    dilation: int,
    groups: int,
    transposed: bool = False,
    output_padding: int = 0,
) -> Tensor:
    """The (transposed) convolution of x ``(N, C_in, L_in)`` as ``(N, C_out, L_out)`` in float64, on x's device.

    Weight ``(C_out, C_in / groups, K)``, or ``(C_in, C_out / groups, K)`` when `transposed`; any real dtype. Taps that fall
    into the padding add nothing, so a non-finite weight does not spread from there. Raises RuntimeError as the operators do.
    """
    check_arguments(x, weight, bias, stride, padding, dilation, groups, transposed, output_padding)
    N, _, L_in = x.shape
    K = weight.shape[2]
    C_out = weight.shape[1] * groups if transposed else weight.shape[0]
    L_out = output_length(L_in, K, stride, padding, dilation, transposed, output_padding)
    y = torch.zeros((N, C_out, L_out), dtype=torch.float64, device=x.device)
    if bias is not None:
        y += bias.double()[:, None]
    # rows of the matrix of a tap are output channels
    matrices = weight.double().unflatten(0, (groups, weight.shape[0] // groups))
    if transposed:
        matrices = matrices.transpose(1, 2)
    for k in range(K):
        shift = k * dilation - padding
        # the strided side of a tap is x, or y when transposed: strided position = stride * i + shift for the other's position i
        count, extent = (L_in, L_out) if transposed else (L_out, L_in)
        start = max(0, -(shift // stride))
        stop = min(count, (extent - 1 - shift) // stride + 1)
        if start >= stop:
            continue
        plain = slice(start, stop)
        strided = slice(start * stride + shift, (stop - 1) * stride + shift + 1, stride)
        source, target = (plain, strided) if transposed else (strided, plain)
        taken = x[:, :, source].double().unflatten(1, (groups, x.shape[1] // groups))
        y[:, :, target] += (matrices[..., k] @ taken).flatten(1, 2)
    return y
