"""Training that must come out the same with our convolutions: the tests, the same with and without a GPU."""

import copy
import functools
import re
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from compiling import Captured
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import torch_conv_triton
from torch_conv_triton import testing
from torch_conv_triton.backend import triton_conv
from torch_conv_triton.problem import current_precision

WAYS = ("eager", "compiled")
# a compiled model is traced with aten's
CONVOLUTIONS = (
    torch.ops.aten.convolution.default,
    torch.ops.triton_conv.conv1d.default,
    torch.ops.triton_conv.conv_transpose1d.default,
)
FORWARD = re.compile(r"aten\.convolution\.default|triton_conv\.conv1d\.default|conv_transpose1d\.default|conv1d_fused")


class Net(nn.Module):
    """A vocoder in small: samples ``(N, 1, L)`` down, through dilated and depthwise blocks, and up again to ``(N, 1, L)``."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.ours = False
        self.down = nn.Conv1d(1, channels, 8, stride=4, padding=2)
        self.blocks = nn.ModuleList(nn.Conv1d(channels, channels, 3, padding=d, dilation=d) for d in (1, 3))
        self.depthwise = nn.Conv1d(channels, channels, 5, padding=2, groups=channels)
        self.up = nn.ConvTranspose1d(channels, channels // 2, 8, stride=4, padding=2)
        self.leave = nn.Conv1d(channels // 2, 1, 7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        namespace, up = torch_conv_triton if self.ours else F, self.up
        conv1d = namespace.conv1d
        x = conv1d(x, self.down.weight, self.down.bias, 4, 2)
        for block in self.blocks:
            d = block.dilation[0]
            x = x + F.silu(conv1d(x, block.weight, block.bias, 1, d, d))
        x = F.silu(conv1d(x, self.depthwise.weight, self.depthwise.bias, 1, 2, 1, x.shape[1]))
        x = F.silu(namespace.conv_transpose1d(x, up.weight, up.bias, 4, 2))
        return torch.tanh(conv1d(x, self.leave.weight, self.leave.bias, 1, 3))


def run_by(way: str, net: Net):
    """The net with our convolutions: as a function of the input, on the same parameters."""
    net.ours = way == "eager"
    return net if net.ours else torch.compile(net, backend=triton_conv)


def build(device: str, channels: int = 8, dtype: torch.dtype = torch.float32, change=lambda net: None) -> tuple[Net, Tensor]:
    """A net and an input, the same on every call; `change` is applied to the net before it is moved."""
    torch.manual_seed(0)
    net, x = Net(channels), torch.randn(2, 1, 64 if device == "cpu" else 4096)
    change(net)
    return net.to(device, dtype), x.to(device, dtype)


def gradients(call, net: Net, x: Tensor) -> dict[str, Tensor]:
    """Gradients of the parameters that require one, by name."""
    trained = {name: p for name, p in net.named_parameters() if p.requires_grad}
    return dict(zip(trained, torch.autograd.grad(call(x).square().mean(), list(trained.values())), strict=True))


def assert_gradients_are_exact(found: dict[str, Tensor], net: Net, x: Tensor, dtype: torch.dtype = torch.float32) -> None:
    """Within the budget of `dtype` for the net's layers of what PyTorch computes in float64."""
    exact = copy.deepcopy(net).double()
    exact.ours = False
    expected = gradients(exact, exact, x.double())
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        error = testing.relative_error(gradient, expected[name])
        assert error <= 8 * testing.error_budget(dtype, current_precision(dtype)), (name, error)


def assert_same_bits(found: dict[str, Tensor], others: dict[str, Tensor]) -> None:
    assert found.keys() == others.keys()
    for name, gradient in found.items():
        assert torch.equal(gradient, others[name]), name


def losses(way: str, device: str, steps: int, channels: int) -> tuple[list[float], list[Tensor]]:
    """Teach a net to remove noise from tones: the loss of every step, and the parameters at the end. `way` "pytorch" is F's."""
    net, _ = build(device, channels)
    call = net if way == "pytorch" else run_by(way, net)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2 if device == "cpu" else 1e-3)
    generator = torch.Generator().manual_seed(1)
    N, L = (2, 64) if device == "cpu" else (16, 8192)
    found = []
    for _ in range(steps):
        phase, pitch = (torch.rand(N, 1, 1, generator=generator) for _ in range(2))
        clean = 0.8 * torch.sin(torch.arange(L) * (0.05 + 0.2 * pitch) + 6.28 * phase)
        noisy = clean + 0.2 * torch.randn(clean.shape, generator=generator)
        loss = F.mse_loss(call(noisy.to(device)), clean.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found, [p.detach().clone() for p in net.parameters()]


@contextmanager
def deterministic_algorithms():
    """PyTorch refuses what differs from run to run, and fills memory that it hands out."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("way", WAYS)
class Training:
    """What training loops do with gradients, in eager and in compiled graphs. A device's tests are a subclass that names it."""

    device: str
    # of the net that is taught, and how many steps long
    channels: int
    steps: int

    @pytest.fixture(autouse=True)
    def fresh_dynamo(self):
        torch._dynamo.reset()

    def test_gradients_repeat_bit_for_bit_and_pytorch_s_deterministic_mode_changes_nothing(self, way):
        net, x = build(self.device)
        call = run_by(way, net)
        first = gradients(call, net, x)
        assert_gradients_are_exact(first, net, x)
        assert_same_bits(first, gradients(call, net, x))
        with deterministic_algorithms():
            assert_same_bits(first, gradients(call, net, x))

    def test_gradients_accumulate(self, way):
        net, x = build(self.device)
        call = run_by(way, net)
        once = gradients(call, net, x)
        for _ in range(2):
            call(x).square().mean().backward()
        assert_same_bits({name: p.grad for name, p in net.named_parameters()}, {name: g + g for name, g in once.items()})

    def test_checkpointed_layers_give_the_same_bits(self, way):
        net, x = build(self.device)
        call = run_by(way, net)
        saved = gradients(call, net, x)
        assert_same_bits(gradients(lambda x: checkpoint(call, x, use_reentrant=False), net, x), saved)

    @pytest.mark.parametrize("saved", [(), CONVOLUTIONS], ids=["nothing saved", "convolutions saved"])
    def test_a_checkpointed_region_inside(self, way, saved):
        def policy(context, op, *args, **kwargs):
            return CheckpointPolicy.MUST_SAVE if op in saved else CheckpointPolicy.PREFER_RECOMPUTE

        keywords = {"context_fn": functools.partial(create_selective_checkpoint_contexts, policy)} if saved else {}

        def model(x: Tensor) -> Tensor:
            # what is outside changes neither the loss nor its gradients
            return -checkpoint(net, x.flip(0), use_reentrant=False, **keywords)

        net, x = build(self.device)
        net.ours = way == "eager"
        call = model if net.ours else Captured(model)
        assert_gradients_are_exact(gradients(call, net, x), net, x)
        if way == "compiled":
            _, backward = call.after
            # one is the gradient of the transposed one's input
            assert (len(FORWARD.findall(backward)) > 1) == (not saved)

    @pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
    @pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm"])
    def test_parametrized_weights(self, way, kind, training):
        def change(net: Net) -> None:
            for module in (net.down, net.blocks[0], net.depthwise, net.leave):
                getattr(parametrizations, kind)(module)

        net, x = build(self.device, change=change)
        call = run_by(way, net.train(training))
        for _ in range(2):
            # a spectral norm goes on with its iteration at every forward in training
            before = copy.deepcopy(net)
            found = gradients(call, net, x)
            assert any("parametrizations" in name for name in found)
            assert_gradients_are_exact(found, before, x)
            iterated = any(not torch.equal(a, b) for a, b in zip(net.buffers(), before.buffers(), strict=True))
            assert iterated == (training and kind == "spectral_norm")

    def test_tied_weights_sum_their_gradients(self, way):
        def change(net: Net) -> None:
            net.blocks[1].weight, net.blocks[1].bias = net.blocks[0].weight, net.blocks[0].bias

        net, x = build(self.device, change=change)
        found = gradients(run_by(way, net), net, x)
        assert not any(name.startswith("blocks.1") for name in found)
        assert_gradients_are_exact(found, net, x)

    def test_frozen_layers(self, way):
        def change(net: Net) -> None:
            net.down.requires_grad_(False)
            net.blocks[1].weight.requires_grad_(False)
            net.up.bias.requires_grad_(False)

        net, x = build(self.device, change=change)
        found = gradients(run_by(way, net), net, x)
        assert "down.weight" not in found and "blocks.1.weight" not in found and "blocks.1.bias" in found
        assert_gradients_are_exact(found, net, x)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_autocast(self, way, dtype):
        net, x = build(self.device)
        call, scale = run_by(way, net), 1024.0
        with torch.autocast(self.device, dtype=dtype):
            y = call(x)
            # a mean's gradients are near the smallest numbers of fp16, so users scale it as a GradScaler does
            loss = scale * y.float().square().mean()
        scaled = torch.autograd.grad(loss, list(net.parameters()))
        found = {name: gradient / scale for (name, _), gradient in zip(net.named_parameters(), scaled, strict=True)}
        assert all(gradient.dtype == torch.float32 for gradient in found.values())
        assert_gradients_are_exact(found, net, x, dtype)

    def test_a_short_training_falls_as_pytorch_s_does_and_repeats_bit_for_bit(self, way):
        theirs, _ = losses("pytorch", self.device, self.steps, self.channels)
        (first, parameters), (second, others) = (losses(way, self.device, self.steps, self.channels) for _ in range(2))
        assert first == second and all(torch.equal(a, b) for a, b in zip(parameters, others, strict=True))
        assert first[-1] < 0.5 * first[0]
        for ours, expected in zip(first, theirs, strict=True):
            assert abs(ours - expected) <= 0.05 * expected + 0.01 * theirs[0]
