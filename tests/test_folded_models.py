"""Small models with what surrounds convolutions in real ones, compiled with everything folded, against eager."""

import pytest
import torch
import torch.nn.functional as F
from compiling import Captured
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from torch_conv_triton import testing
from torch_conv_triton.backend import triton_conv
from torch_conv_triton.problem import current_precision


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    torch.manual_seed(0)


class Vocoder(nn.Module):
    """HiFi-GAN: up-sampling, residual blocks of dilated convolutions that are summed, leaky ReLU between."""

    def __init__(self, C=8):
        super().__init__()
        self.first = nn.Conv1d(6, 2 * C, 7, padding=3)
        self.up = nn.ConvTranspose1d(2 * C, C, 4, stride=2, padding=1)
        self.blocks = nn.ModuleList(nn.ModuleList(self._block(C, K, d) for d in (1, 3)) for K in (3, 5))
        self.last = nn.Conv1d(C, 1, 7, padding=3)

    @staticmethod
    def _block(C, K, d):
        return nn.ModuleList(nn.Conv1d(C, C, K, padding=(K - 1) // 2 * d, dilation=d) for d in (d, 1))

    def forward(self, x):
        x = self.up(F.leaky_relu(self.first(x), 0.1))
        total = 0
        for block in self.blocks:
            y = x
            for one, two in block:
                y = two(F.leaky_relu(one(F.leaky_relu(y, 0.1)), 0.1)) + y
            total = total + y
        return torch.tanh(self.last(F.leaky_relu(total / len(self.blocks))))


class Codec(nn.Module):
    """DAC's residual unit with Snake, between a strided and a transposed convolution."""

    def __init__(self, C=8):
        super().__init__()
        self.alphas = nn.ParameterList(torch.rand(1, C, 1) + 0.5 for _ in range(3))
        self.down = nn.Conv1d(1, C, 4, stride=2, padding=1)
        self.one, self.two = nn.Conv1d(C, C, 7, padding=9, dilation=3), nn.Conv1d(C, C, 1)
        self.up = nn.ConvTranspose1d(C, 1, 4, stride=2, padding=1)

    def _snake(self, i, x):
        return x + (self.alphas[i] + 1e-9).reciprocal() * torch.sin(self.alphas[i] * x).pow(2)

    def forward(self, x):
        x = self.down(x)
        x = x + self.two(self._snake(1, self.one(self._snake(0, x))))
        return torch.tanh(self.up(self._snake(2, x)))


class CausalNetwork(nn.Module):
    """A TCN that pads both sides and cuts the end, one convolution that pads the start alone, and a residual."""

    def __init__(self, C=8):
        super().__init__()
        self.one = nn.Conv1d(4, C, 3, padding=4, dilation=2)
        self.two = nn.Conv1d(C, C, 3, dilation=4)
        self.side = nn.Conv1d(4, C, 1)

    def forward(self, x):
        y = F.relu(self.one(x)[..., : x.shape[-1]])
        y = F.relu(self.two(F.pad(y, (8, 0))))
        return F.relu(y + self.side(x))


class ConformerModule(nn.Module):
    """Pointwise, GLU, depthwise, batch norm, SiLU, pointwise; channels-last outside."""

    def __init__(self, C=8):
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.one = nn.Conv1d(8, 2 * C, 1)
        self.depthwise = nn.Conv1d(C, C, 9, padding=4, groups=C)
        self.batch_norm = nn.BatchNorm1d(C)
        self.two = nn.Conv1d(C, 8, 1)

    def forward(self, x):
        y = F.glu(self.one(self.norm(x.mT).mT), dim=1)
        return x + self.two(F.silu(self.batch_norm(self.depthwise(y))))


class WaveNet(nn.Module):
    """Gates of tanh and sigmoid, conditioned by sample, residual and skip in one convolution, as in the flow of VITS."""

    def __init__(self, C=8):
        super().__init__()
        self.first, self.last = nn.Conv1d(4, C, 1), nn.Conv1d(C, 4, 1)
        self.condition = nn.Linear(4, 2 * C)
        self.gates = nn.ModuleList(nn.Conv1d(C, 2 * C, 3, padding=dilation, dilation=dilation) for dilation in (1, 2))
        self.outs = nn.ModuleList(nn.Conv1d(C, 2 * C, 1) for _ in self.gates)

    def forward(self, x):
        condition, skips = self.condition(x.mean(2))[:, :, None], 0
        x = self.first(x)
        for gate, out in zip(self.gates, self.outs, strict=True):
            left, right = (gate(x) + condition).chunk(2, 1)
            residual, skip = out(torch.tanh(left) * torch.sigmoid(right)).chunk(2, 1)
            x, skips = x + residual, skips + skip
        return self.last(F.relu(skips))


class PaddedCodec(nn.Module):
    """Encodec: padding by reflection (and by the other modes), ELU, residuals, a transposed convolution that is cut."""

    def __init__(self, C=8):
        super().__init__()
        self.first, self.second = nn.Conv1d(4, C, 7), nn.Conv1d(C, C, 3)
        self.third = nn.Conv1d(C, C, 3, padding=1, padding_mode="circular")
        self.up = nn.ConvTranspose1d(C, 4, 4, stride=2)

    def forward(self, x):
        x = self.first(F.pad(x, (6, 0), mode="reflect"))
        x = x + self.second(F.pad(F.elu(x), (1, 1), mode="replicate"))
        return self.up(self.third(F.elu(x)))[..., 2:-1]


class Separator(nn.Module):
    """Conv-TasNet's block: norms over whole samples between pointwise and dilated depthwise convolutions, and a residual."""

    def __init__(self, C=16):
        super().__init__()
        self.first, self.last = nn.Conv1d(4, C, 1), nn.Conv1d(C, C, 1)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Conv1d(C, 2 * C, 1),
                nn.PReLU(),
                nn.GroupNorm(1, 2 * C),
                nn.Conv1d(2 * C, 2 * C, 3, padding=dilation, dilation=dilation, groups=2 * C),
                nn.PReLU(),
                nn.GroupNorm(1, 2 * C),
                nn.Conv1d(2 * C, C, 1),
            )
            for dilation in (1, 2)
        )

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.last(F.relu(x))


# convolutions that are folded, and the layers that round
MODELS = {
    "vocoder": (Vocoder, (2, 6, 12), 11, 11),
    "codec": (Codec, (2, 1, 32), 4, 4),
    "causal": (CausalNetwork, (2, 4, 20), 3, 2),
    "conformer": (ConformerModule, (2, 8, 20), 3, 3),
    "wavenet": (WaveNet, (2, 4, 20), 4, 6),
    "padded codec": (PaddedCodec, (2, 4, 20), 3, 4),
    "separator": (Separator, (2, 4, 15), 6, 8),
}


def assert_close(actual, expected, layers):
    """Relative error within the budget of the dtype for so many layers, each of which rounds."""
    assert actual.shape == expected.shape
    bound = layers * testing.error_budget(actual.dtype, current_precision(actual.dtype))
    error = testing.relative_error(actual, expected)
    assert error <= bound, f"relative error {error:.1e}, allowed {bound:.1e}"


@pytest.mark.parametrize(("build", "shape", "folds", "layers"), MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inference(build, shape, folds, layers, dtype):
    model, x = build().eval().to(dtype), torch.randn(shape, dtype=dtype)
    captured = Captured(model)
    with torch.no_grad():
        actual, strides = captured(x), model(x).stride()
        assert_close(actual, model.double()(x.double()).to(dtype), 2 * layers)
    assert actual.stride() == strides
    assert captured.after[0].count("conv1d_fused") >= folds


@pytest.mark.parametrize(("build", "shape", "folds", "layers"), MODELS.values(), ids=MODELS)
def test_training(build, shape, folds, layers):
    model, x = build(), torch.randn(shape)
    # running statistics are written to after everything else
    captured = Captured(model)
    captured(x).square().sum().backward()
    actual = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    exact = build().double()
    exact.load_state_dict(model.state_dict())
    exact(x.double()).square().sum().backward()
    for gradient, parameter in zip(actual, exact.parameters(), strict=True):
        # a gradient that is zero but for rounding has no relative error
        if parameter.grad.abs().max() > 1e-3:
            assert_close(gradient, parameter.grad.float(), 4 * layers)
    assert "conv1d_fused" in captured.after[0]


@pytest.mark.parametrize(("build", "shape", "folds", "layers"), MODELS.values(), ids=MODELS)
def test_lengths_that_change(build, shape, folds, layers):
    model, captured = build().eval(), CompileCounterWithBackend(triton_conv)
    compiled = torch.compile(model, backend=captured)
    with torch.no_grad():
        for more in (0, 2, 8, 14):
            x = torch.randn(*shape[:2], shape[2] + more)
            torch._dynamo.maybe_mark_dynamic(x, 2)
            assert_close(compiled(x), model.double()(x.double()).float(), 2 * layers)
            model.float()
    assert captured.frame_count == 1


def test_frozen_weights_and_batch_norm():
    model, x = (
        nn.Sequential(nn.Conv1d(4, 8, 3, padding=1), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 4, 3)).eval(),
        torch.randn(2, 4, 20),
    )
    # Dynamo looks at the setting too, before options of a compilation apply
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        captured = Captured(model)
        assert_close(captured(x), model.double()(x.double()).float(), 4)
    assert "max %0 0.0; tf32 %1; out %2 fp32 NCL" in captured.after[0] and captured.after[0].count("conv1d_fused") == 2


@pytest.mark.parametrize("name", ["vocoder", "padded codec"])
def test_autocast(name):
    build, shape, _, layers = MODELS[name]
    model, x = build().eval(), torch.randn(shape)
    captured = Captured(model)
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            actual = captured(x)
            strides, dtype = model(x).stride(), model(x).dtype
        assert actual.dtype == dtype and actual.stride() == strides
        assert_close(actual.bfloat16(), model.double()(x.double()).bfloat16(), 2 * layers)
    assert "conv1d_fused" in captured.after[0]
