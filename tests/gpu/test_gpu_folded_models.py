"""Models with everything folded, on the GPU: wide enough for block copies and channels-last chains, under CUDA graphs too."""

import pytest
import torch
from compiling import Captured
from test_folded_models import MODELS, assert_close

from torch_conv_triton.testing import error_budget, float32_precision, relative_error

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    torch.manual_seed(0)


def built(name, channels, more, dtype=torch.float32):
    build, (N, C, L), _, layers = MODELS[name]
    model, x = build(channels).eval().to(dtype), torch.randn(N, C, L + more, dtype=dtype)
    with torch.no_grad():
        exact = model.double()(x.double())
    return model.to("cuda", dtype), x.to("cuda", dtype), exact.to("cuda", dtype), layers


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("channels", [8, 32, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_inference(name, channels, dtype):
    model, x, exact, layers = built(name, channels, 1000, dtype)
    captured = Captured(model)
    with torch.no_grad():
        actual, strides = captured(x), model(x).stride()
    assert_close(actual, exact, 2 * layers)
    assert actual.stride() == strides


@pytest.mark.parametrize("name", MODELS)
def test_cuda_graphs(name):
    model, x, exact, layers = built(name, 64, 2000)
    compiled = torch.compile(model, backend="triton_conv", mode="reduce-overhead", dynamic=False)
    with torch.no_grad():
        for _ in range(4):
            actual = compiled(x).clone()
    assert_close(actual, exact, 2 * layers)


@pytest.mark.parametrize("name", ["vocoder", "codec", "causal", "padded codec"])
def test_training(name):
    model, x, _, layers = built(name, 32, 500)
    # rounded to TF32, some values next to zero pass a leaky ReLU on its other side
    with float32_precision("ieee"):
        Captured(model)(x).square().sum().backward()
    actual = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    exact = model.double()
    exact(x.double()).square().sum().backward()
    for gradient, parameter in zip(actual, exact.parameters(), strict=True):
        assert relative_error(gradient, parameter.grad.float()) <= 4 * layers * error_budget(torch.float32, "ieee")
