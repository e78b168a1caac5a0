"""What the package is from outside: what importing it costs, its names, its entry points, its data."""

import json
import re
from importlib import metadata, resources

import pytest
from commands import ROOT, python

import torch_conv_triton

WHAT_IS_LOADED = (
    "import torch, sys; before = set(sys.modules); {import_it}; new = set(sys.modules) - before; "
    "heavy = ('triton', 'torch._inductor', 'torch._dynamo', 'matplotlib', 'rich', 'numpy', 'torch_conv_triton.kernels'); "
    "print(torch.cuda.is_initialized(), sorted({{name for name in heavy if name in new}}), 'torch_conv_triton.ops' in new)"
)


@pytest.mark.parametrize(
    "import_it",
    [
        "import torch_conv_triton",
        "import torch_conv_triton.backend",
        "import torch_conv_triton.ops",
        "import torch_conv_triton.cli",
    ],
)
def test_importing_loads_no_triton_and_touches_no_gpu(import_it):
    done = python("-c", WHAT_IS_LOADED.format(import_it=import_it))
    assert done.stdout == "False [] True\n", done.stderr


def test_importing_registers_the_operators():
    script = "import torch, torch_conv_triton; print([torch.ops.triton_conv.{0}, torch.ops.triton_conv.{1}])"
    done = python("-c", script.format("conv1d", "conv_transpose1d"))
    assert done.returncode == 0, done.stderr


def test_the_public_names():
    for name in ("conv1d", "conv_transpose1d", "explain", "inductor_options"):
        assert callable(getattr(torch_conv_triton, name))
    assert set(torch_conv_triton.__all__) >= {"conv1d", "conv_transpose1d", "explain", "inductor_options", "__version__"}


def test_explain_is_the_function_whatever_was_imported_first():
    done = python("-c", "import torch_conv_triton.explain, torch_conv_triton; print(callable(torch_conv_triton.explain))")
    assert done.stdout == "True\n", done.stderr


def test_the_version_is_the_installed_one():
    assert metadata.version("torch_conv_triton") == torch_conv_triton.__version__


def test_torch_finds_the_backend_by_its_name_and_loads_it_when_it_is_used():
    script = (
        "import sys, torch; known = 'triton_conv' in torch.compiler.list_backends(); early = 'torch_conv_triton' in sys.modules; "
        "from torch._dynamo.backends.registry import lookup_backend; function = lookup_backend('triton_conv'); "
        "print(known, early, function.__module__)"
    )
    done = python("-c", script)
    assert done.stdout == "True False torch_conv_triton.backend\n", done.stderr


def test_the_data_is_shipped():
    package = resources.files("torch_conv_triton")
    assert (package / "py.typed").is_file()
    assert json.loads((package / "bench" / "suite.json").read_text())


def test_what_run_installs_is_pinned():
    pins = dict(line.split(";")[0].split("==") for line in (ROOT / "requirements.txt").read_text().splitlines() if line[0] != "#")
    needed = [requirement for requirement in metadata.requires("torch_conv_triton") if "bench" not in requirement]
    names = {re.match(r"[\w-]+", requirement).group() for requirement in needed}
    assert {"torch", "triton", "pytest"} <= names <= pins.keys()
    assert (pins["torch"], pins["triton"]) == ("2.13.0", "3.7.1")
