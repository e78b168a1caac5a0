"""Training: a small temporal convolutional network learns to remove noise, compiled and in eager, from the same weights.

python examples/training.py
"""

import copy
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STEPS = 20


class TemporalConvNet(nn.Module):
    """Dilated convolutions around skip connections: samples ``(N, 1, L)`` to ``(N, 1, L)``."""

    def __init__(self, channels: int, dilations: tuple[int, ...] = (1, 2, 4)) -> None:
        super().__init__()
        self.enter = nn.Conv1d(1, channels, 3, padding=1)
        self.layers = nn.ModuleList(nn.Conv1d(channels, channels, 3, padding=d, dilation=d) for d in dilations)
        self.leave = nn.Conv1d(channels, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for layer in self.layers:
            x = x + F.silu(layer(x))
        return self.leave(x)


def train(model: nn.Module, forward: Callable[[Tensor], Tensor], device: str, N: int, L: int) -> list[float]:
    """Train `model`, called as `forward`, on batches ``(N, 1, L)`` and return the loss of every step."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    losses = []
    for _ in range(STEPS):
        phase = 6.28 * torch.rand(N, 1, 1, generator=generator)
        clean = torch.sin(torch.arange(L) / 5 + phase)
        noisy = clean + 0.3 * torch.randn(clean.shape, generator=generator)
        loss = F.mse_loss(forward(noisy.to(device)), clean.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    torch.manual_seed(0)
    device, channels, N, L = ("cuda", 64, 8, 16384) if torch.cuda.is_available() else ("cpu", 8, 2, 64)
    eager_model = TemporalConvNet(channels).to(device)
    model = copy.deepcopy(eager_model)

    eager = train(eager_model, eager_model, device, N, L)
    ours = train(model, torch.compile(model, backend="triton_conv"), device, N, L)
    for step in range(0, STEPS, 5):
        print(f"step {step:2}: loss {ours[step]:.4f} compiled, {eager[step]:.4f} eager")
    print(f"at the end: loss {ours[-1]:.4f} compiled, {eager[-1]:.4f} eager, on {device}")
    if not ours[-1] < 0.5 * ours[0]:
        sys.exit("the loss did not fall")
    if not abs(ours[-1] - eager[-1]) < 0.05 * eager[-1]:
        sys.exit("the compiled model does not train as eager does")


if __name__ == "__main__":
    main()
