"""The command torch-conv-triton, run as a person runs it, in a process of its own without a GPU."""

import dataclasses
import json
import math

import pytest
import torch
from commands import command, python

from torch_conv_triton import cli, demo
from torch_conv_triton.graph.report import ConvRecord, Report

MODELS = """
import torch
from torch import nn

class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv1d(4, 8, 3, padding=1)
        self.flat = nn.Linear(8, 2)

    def forward(self, x, scale=1.0):
        print("the model speaks")
        return self.flat(scale * self.convolution(x).mean(-1))

def build():
    return Words(), (torch.randn(2, 4, 16),)

def build_with_keywords():
    return Words(), (torch.randn(2, 4, 16),), {"scale": 2.0}

def build_only_a_model():
    return Words()

def build_args_that_are_not_a_tuple():
    return Words(), torch.randn(2, 4, 16)

a_number = 3
"""


@pytest.fixture
def models(tmp_path):
    (tmp_path / "some_models.py").write_text(MODELS)
    return {"PYTHONPATH": str(tmp_path)}


class TestHelp:
    @pytest.mark.parametrize("arguments", [[], ["demo"], ["explain"], ["tune"], ["bench"], ["doctor"]])
    def test_every_command_has_help(self, arguments, capsys):
        with pytest.raises(SystemExit) as stop:
            cli.main([*arguments, "--help"])
        assert stop.value.code == 0
        assert capsys.readouterr().out.startswith(" ".join(["usage: torch-conv-triton", *arguments]))

    def test_no_command_is_wrong_use(self, capsys):
        with pytest.raises(SystemExit) as stop:
            cli.main([])
        assert stop.value.code == 2
        assert "COMMAND" in capsys.readouterr().err


class TestExplain:
    def test_prints_the_report(self, models):
        done = command("explain", "some_models:build", **models)
        assert done.returncode == 0, done.stderr
        assert "convolution  forward  2x4x16 -> 8 K3 p1 fp32 NCL" in done.stdout
        assert "1 1-D convolutions" in done.stdout

    def test_json_is_all_that_is_on_standard_output(self, models):
        done = command("explain", "some_models:build_with_keywords", "--json", TRITON_INTERPRET="1", **models)
        assert done.returncode == 0, done.stderr
        report = json.loads(done.stdout)
        assert report["totals"]["convolutions"] == report["totals"]["rewritten"] == 1
        assert report["records"][0]["module"] == "convolution"
        assert "the model speaks" in done.stderr

    def test_backward_explains_the_gradients_too(self, models):
        done = command("explain", "some_models:build", "--backward", "--json", TRITON_INTERPRET="1", **models)
        assert done.returncode == 0, done.stderr
        kinds = [record["kind"] for record in json.loads(done.stdout)["records"]]
        assert kinds == ["forward", "weight_grad"]

    @pytest.mark.parametrize(
        ("model", "message"),
        [
            ("some_models", "'some_models' is not of the form MODULE:CALLABLE, as in my_package.models:build"),
            ("no_such_module:build", "cannot import 'no_such_module': No module named 'no_such_module'"),
            ("some_models:bulid", "'some_models' has no 'bulid'"),
            ("some_models:a_number", "'some_models:a_number' is not callable, but int"),
            (
                "some_models:build_only_a_model",
                "'some_models:build_only_a_model' must return (model, args) or (model, args, kwargs), but returned Words",
            ),
            (
                "some_models:build_args_that_are_not_a_tuple",
                "'some_models:build_args_that_are_not_a_tuple': args must be a tuple and kwargs a dict, "
                "but returned (Words, Tensor)",
            ),
        ],
    )
    def test_wrong_models_are_named(self, model, message, tmp_path, monkeypatch, capsys):
        (tmp_path / "some_models.py").write_text(MODELS)
        monkeypatch.syspath_prepend(tmp_path)
        assert cli.main(["explain", model, "--device", "cpu"]) == 2
        assert capsys.readouterr().err == f"torch-conv-triton explain: error: {message}\n"

    def test_a_gpu_that_is_not_there(self, monkeypatch, capsys):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        assert cli.main(["explain", "some_models:build", "--device", "cuda"]) == 2
        assert "--device cuda: this PyTorch" in capsys.readouterr().err

    def test_a_device_that_does_not_exist(self, capsys):
        with pytest.raises(SystemExit) as stop:
            cli.main(["explain", "some_models:build", "--device", "gpu"])
        assert stop.value.code == 2
        assert "argument --device" in capsys.readouterr().err


class TestDoctor:
    def test_a_sound_installation_passes_in_the_interpreter(self):
        done = command("doctor", "--json")
        assert done.returncode == 0, done.stdout + done.stderr
        status = {check["name"]: check["status"] for check in json.loads(done.stdout)}
        assert status["GPU"] == "note"
        assert status["backend"] == "ok"
        kernels = ("dense", "channels-last", "depthwise", "transposed")
        assert [status[f"{kernel} {dtype}"] for kernel in kernels for dtype in ("fp32", "fp16", "bf16")] == ["ok"] * 12

    def test_a_wrong_kernel_fails(self):
        script = (
            "import sys, torch_conv_triton as t; from torch_conv_triton import cli; right = t.conv1d; "
            "t.conv1d = lambda *args, **kwargs: 1.1 * right(*args, **kwargs); sys.exit(cli.main(['doctor']))"
        )
        done = python("-c", script)
        assert done.returncode == 1, done.stderr
        failed = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("failed")]
        assert sorted(set(failed)) == ["channels-last", "dense", "depthwise"]

    def test_what_raises_is_a_failed_check(self):
        script = (
            "import sys, torch_conv_triton as t; from torch_conv_triton import cli; "
            "t.conv1d = lambda *args, **kwargs: 1 / 0; sys.exit(cli.main(['doctor']))"
        )
        done = python("-c", script)
        assert done.returncode == 1, done.stderr
        assert "ZeroDivisionError: division by zero" in done.stdout


class TestDemo:
    def test_runs_the_kernels_in_the_interpreter_and_says_so(self):
        done = command("demo")
        assert done.returncode == 0, done.stdout + done.stderr
        assert "without a GPU: the kernels run in Triton's interpreter" in done.stdout
        assert "17 1-D convolutions and 0 gradients: 17 rewritten, 0 kept, 17 run by our kernels" in done.stdout
        assert (
            done.stdout.splitlines()[-1]
            == "Passed: 17 of 17 convolutions ran in our kernels, and the output is within the bound."
        )

    @pytest.mark.parametrize("dtype", ["bf16"])
    def test_json(self, dtype):
        done = command("demo", "--dtype", dtype, "--json")
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout)
        assert result["passed"] and result["dtype"] == dtype
        assert 0 < result["relative_error"]["triton_conv"] <= result["relative_error"]["bound"]

    def test_its_bound_is_tighter_than_one_wrong_tap_of_any_convolution(self):
        model, x = demo.build(torch.device("cpu"), torch.float32)
        bound = 1e-3 * math.sqrt(model.depth)
        with torch.no_grad():
            expected = model(x)
            for name, module in model.named_modules():
                if hasattr(module, "weight"):
                    weight = module.weight.clone()
                    module.weight[..., -1] = 0
                    assert (model(x) - expected).norm() / expected.norm() > bound, name
                    module.weight.copy_(weight)

    def test_fails_on_errors_that_are_too_large_or_nan_and_where_no_kernel_ran(self):
        record = ConvRecord("enter", "forward", "1x4x8 -> 4 K3 fp32 NCL", "fp32", "NCL", "rewritten", "dense", "", "")
        good = demo.DemoResult("here", "fp32", Report((record,), 1), 1e-4, 1e-7, 1e-3, {})
        kept = Report((dataclasses.replace(record, decision="kept", kernel="aten"),), 1)
        assert good.passed
        assert not dataclasses.replace(good, error=2e-3).passed
        assert not dataclasses.replace(good, error=math.nan).passed
        assert not dataclasses.replace(good, report=kept).passed
        assert not dataclasses.replace(good, report=Report((), 1)).passed

    def test_a_backend_that_is_not_installed(self, monkeypatch, capsys):
        monkeypatch.setattr(torch.compiler, "list_backends", lambda: ["inductor"])
        assert cli.main(["demo", "--device", "cpu"]) == 2
        assert 'finds no backend "triton_conv": install the package' in capsys.readouterr().err
