"""Models compiled ahead of time with AOTInductor, on the GPU: what a package computes in this process and in a fresh one."""

import subprocess
import sys

import pytest
import torch
from compiling import run_python
from test_folded_models import MODELS, assert_close

from torch_conv_triton.backend import inductor_options

pytestmark = pytest.mark.gpu

# a process that has compiled nothing: the package calls operators that importing the backend registers
RUN = """
import sys, torch, torch_conv_triton.backend
package, inputs, outputs = sys.argv[1:]
model = torch._inductor.aoti_load_package(package)
torch.save([model(x) for x in torch.load(inputs)], outputs)
"""

# the same for a package of Inductor's own, without operators of ours
PLAIN = """
import sys, torch
x = torch.randn(2, 64, device="cuda")
path = torch._inductor.aoti_compile_and_package(torch.export.export(torch.nn.ReLU(), (x,)), package_path=sys.argv[1])
assert torch.equal(torch._inductor.aoti_load_package(path)(x), x.relu())
"""


@pytest.fixture(scope="module", autouse=True)
def packages_load_here(tmp_path_factory):
    """On one machine with torch 2.11 a process that loads any package for a GPU crashes."""
    path = tmp_path_factory.mktemp("plain") / "model.pt2"
    done = subprocess.run([sys.executable, "-c", PLAIN, str(path)], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"Inductor's own packages do not load here: exit status {done.returncode}")


def packaged(model: torch.nn.Module, x: torch.Tensor, path: str) -> str:
    """The path of a package of the model for even lengths from 64 to 4096."""
    half = torch.export.Dim("half", min=32, max=2048)
    program = torch.export.export(model, (x,), dynamic_shapes={"x": {2: 2 * half}})
    return torch._inductor.aoti_compile_and_package(program, package_path=path, inductor_configs=inductor_options())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["vocoder", "codec", "conformer"])
@torch.no_grad()
def test_packages_of_models_compute_what_eager_does(name, dtype, tmp_path):
    torch.manual_seed(0)
    build, (N, C, _), _, layers = MODELS[name]
    model = build(32).eval().to("cuda", dtype)
    inputs = [torch.randn(N, C, L, device="cuda", dtype=dtype) for L in (400, 1500, 400)]
    package = packaged(model, inputs[0], str(tmp_path / "model.pt2"))
    loaded = torch._inductor.aoti_load_package(package)
    here = [loaded(x) for x in inputs]
    torch.save(inputs, tmp_path / "inputs.pt")
    run_python(RUN, package, str(tmp_path / "inputs.pt"), str(tmp_path / "outputs.pt"))
    elsewhere = torch.load(tmp_path / "outputs.pt")
    expected = [model(x).stride() for x in inputs]
    model.double()
    for x, actual, again, strides in zip(inputs, here, elsewhere, expected, strict=True):
        assert_close(actual, model(x.double()), 2 * layers)
        assert torch.equal(actual, again) and actual.stride() == strides
