"""What tests of chains share: a residual block as one, and what it computes."""

import torch
import torch.nn.functional as F

from torch_conv_triton.chain import Chain
from torch_conv_triton.fused import Arguments

RELU = "max %0 0.0; out %1 fp32 NCL; out %0 fp32 NCL"


def step(input, weight, bias=None, stride=1, padding=(1, 1), dilation=1, transposed=False, epilogue="", operands=()):
    geometry = stride, list(padding), dilation, 1, transposed, "zeros"
    return Arguments(input, weight, bias, *geometry, epilogue, list(operands), False)


# x, three weights and a bias are given; the second step adds what the first stored before its ReLU, the third doubles the length
BLOCK = Chain(
    tensors=5,
    steps=(
        step(0, 1, bias=4, epilogue=RELU),
        step(5, 2, epilogue="add %0 a0; out %1 fp32 NLC", operands=[6]),
        step(7, 3, stride=2, padding=(0, 0), transposed=True),
    ),
    outputs=(2, 1, 1),
    returned=(8, 7),
)


def block_tensors(N=2, L=33, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = (N, 8, L), (16, 8, 3), (16, 16, 3), (16, 4, 2), (16,)
    return [torch.randn(shape, generator=generator).to(device) / 3 for shape in shapes]


def block(x, first, second, up, bias):
    """What `BLOCK` returns, in float64."""
    x, first, second, up, bias = (t.double() for t in (x, first, second, up, bias))
    before = F.conv1d(x, first, bias, padding=1)
    after = F.conv1d(before.relu(), second, padding=1) + before
    return F.conv_transpose1d(after, up, stride=2), after
