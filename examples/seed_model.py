"""A drop-in module: the parameters of `nn.Conv1d`, its state_dict too, run by our convolution.

python examples/seed_model.py
"""

import torch
from torch import Tensor, nn

import torch_conv_triton


class ModelNew(nn.Module):
    """1-D convolution without padding: x ``(N, in_channels, L)`` to ``(N, out_channels, L_out)``."""

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, dilation: int = 1, bias: bool = False
    ) -> None:
        super().__init__()
        self.conv1d = nn.Conv1d(in_channels, out_channels, kernel_size, stride=stride, dilation=dilation, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        conv = self.conv1d
        return torch_conv_triton.conv1d(x, conv.weight, conv.bias, stride=conv.stride, dilation=conv.dilation)


@torch.no_grad()
def main() -> None:
    torch.manual_seed(0)
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    model = ModelNew(64, 128, 3, stride=3, dilation=4).to(device)
    x = torch.randn(8 if on_gpu else 1, 64, 224280 if on_gpu else 300, device=device)

    y = model(x)
    expected = model.conv1d.double()(x.double())
    # float32 convolutions multiply in TF32, as PyTorch's own do by default
    torch.testing.assert_close(y.double(), expected, rtol=2e-3, atol=2e-3)
    print(f"ModelNew {tuple(x.shape)} -> {tuple(y.shape)} on {device}: equal to nn.Conv1d within TF32's rounding")


if __name__ == "__main__":
    main()
