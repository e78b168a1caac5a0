"""The operators by hand: called like `F.conv1d`, differentiable, traceable by any `torch.compile` backend.

python examples/by_hand.py
"""

import torch
import torch.nn.functional as F
from torch import Tensor

import torch_conv_triton  # noqa: F401  registers torch.ops.triton_conv


def gated(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A dilated convolution whose output gates itself: ``(N, C, L)`` to ``(N, C, L)``."""
    y = torch.ops.triton_conv.conv1d(x, weight, bias, padding=4, dilation=4)
    return torch.tanh(y) * torch.sigmoid(y)


def main() -> None:
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tolerance = {"rtol": 2e-3, "atol": 2e-3}  # TF32 rounds its factors to 11 bits
    x = torch.randn(2, 16, 64, device=device, requires_grad=True)
    weight = (torch.randn(16, 16, 3, device=device) / 7).requires_grad_()
    bias = torch.randn(16, device=device, requires_grad=True)

    y = torch.ops.triton_conv.conv1d(x, weight, bias, padding=4, dilation=4)
    expected = F.conv1d(x, weight, bias, padding=4, dilation=4)
    torch.testing.assert_close(y, expected, **tolerance)
    print(f"conv1d {tuple(x.shape)} -> {tuple(y.shape)} on {device}: as F.conv1d")

    grads = torch.autograd.grad(y.square().sum(), (x, weight, bias))
    expected_grads = torch.autograd.grad(expected.square().sum(), (x, weight, bias))
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        scale = expected_grad.abs().max()
        torch.testing.assert_close(grad / scale, expected_grad / scale, **tolerance)
    print("gradients of x, weight and bias: as autograd's")

    up = torch.ops.triton_conv.conv_transpose1d(x, weight, stride=2, output_padding=1)
    torch.testing.assert_close(up, F.conv_transpose1d(x, weight, stride=2, output_padding=1), **tolerance)
    print(f"conv_transpose1d {tuple(x.shape)} -> {tuple(up.shape)}: as F.conv_transpose1d")

    compiled = torch.compile(gated, fullgraph=True)
    torch.testing.assert_close(compiled(x, weight, bias), gated(x, weight, bias), **tolerance)
    print("one graph under torch.compile: as eager")


if __name__ == "__main__":
    main()
