"""Whole models of the benchmark, without a GPU: how they are built, and what is said of their results."""

import importlib
import sys
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from torch_conv_triton.bench import model_run
from torch_conv_triton.bench.errors import BenchError
from torch_conv_triton.bench.model_run import ModelResult, WayResult, relative_error, verdict
from torch_conv_triton.bench.models import MODELS, build, with_plain_integers, with_whole_lstms


class Count1dConvolutions(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.convolution.default and args[1].dim() == 3:
            self.count += 1
        return function(*args, **(kwargs or {}))


def way(ms=1.0, error=1e-4):
    return WayResult(ms=ms, first_call_s=1.0, peak_mib=10.0, error=error)


class TestBuild:
    @pytest.mark.parametrize("name", ["speecht5_hifigan", "dac_44khz", "wav2vec2_base", "parakeet_ctc_0_6b", "vits_mms_tts"])
    def test_has_its_convolutions(self, name):
        with torch.device("meta"):
            model, args, kwargs = build(name, "meta")
        with torch.no_grad(), Count1dConvolutions() as convolutions:
            model(*args, **kwargs)
        assert convolutions.count == MODELS[name].convolutions

    def test_is_the_same_every_time(self):
        outputs = []
        for _ in range(2):
            model, args, kwargs = build("wav2vec2_base", "cpu", "fp32", "small")
            with torch.no_grad():
                outputs.append(model(*args, **kwargs).last_hidden_state)
        assert torch.equal(*outputs) and outputs[0].isfinite().all()

    def test_comes_in_the_asked_dtype_and_keeps_integers(self):
        model, _, kwargs = build("squeezebert", "cpu", "bf16", "small")
        assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
        assert kwargs["input_ids"].dtype == torch.int64

    @pytest.mark.parametrize(("name", "missing"), [("wav2vec2_base", "transformers"), ("conv_tasnet_base", "torchaudio")])
    def test_a_missing_library_is_named(self, monkeypatch, name, missing):
        monkeypatch.setitem(sys.modules, missing, None)
        with pytest.raises(BenchError, match=rf"needs {missing}.*pip install {missing}"):
            build(name, "cpu", "fp32", "small")

    @pytest.mark.parametrize(
        ("name", "size", "message"), [("resnet", "small", "unknown model 'resnet'"), ("squeezebert", "big", "'big'")]
    )
    def test_an_unknown_name_or_size_is_refused(self, name, size, message):
        with pytest.raises(BenchError, match=message):
            build(name, "cpu", "fp32", size)

    def test_plain_integers_change_no_output(self):
        from transformers import EncodecConfig, EncodecModel

        torch.manual_seed(0)
        encoder = EncodecModel(EncodecConfig()).eval().encoder
        wave = torch.randn(1, 1, 3333)
        with torch.no_grad():
            before = encoder(wave)
            assert torch.equal(with_plain_integers(encoder)(wave), before)
        assert not any("stride" in module._buffers for module in encoder.modules())

    def test_whole_lstms_change_no_output_and_leave_one_graph(self):
        model, (wave,), _ = build("encodec_24khz", "cpu", size="small")
        with torch.no_grad():
            before = model(wave)
            with_whole_lstms(model)
            assert torch.equal(model(wave), before)
            explained = torch._dynamo.explain(model)(wave)
        assert (explained.graph_count, explained.graph_break_count) == (1, 0)

    def test_the_gate_without_a_tensor_changes_no_output(self):
        vits = importlib.reload(importlib.import_module("transformers.models.vits.modeling_vits"))
        a, b = torch.randn(2, 1, 6, 5)
        before = vits.fused_add_tanh_sigmoid_multiply(a, b, torch.tensor(3))
        with torch.device("meta"):
            build("vits_mms_tts", "meta")
        torch.testing.assert_close(vits.fused_add_tanh_sigmoid_multiply(a, b, torch.tensor(3)), before)


class TestStep:
    def test_gives_every_floating_point_output(self):
        model = nn.Identity()
        x = torch.randn(3)
        outputs = model_run.step(lambda t: OrderedDict(a=t, b=(t.long(), t + 1), c=None), model, (x,), {}, train=False)()
        assert [output.tolist() for output in outputs] == [x.tolist(), (x + 1).tolist()]

    def test_gives_every_gradient_in_training(self):
        model, x = self.trained(nn.Conv1d(2, 3, 3), nn.Dropout())
        weight_gradient, bias_gradient = model_run.step(model, model, (x,), {}, train=True)()
        target = torch.randn(1, 3, 7, generator=torch.Generator().manual_seed(0))
        nn.functional.mse_loss(model[0](x), target).backward()
        torch.testing.assert_close((weight_gradient, bias_gradient), (model[0].weight.grad, model[0].bias.grad))

    def test_every_step_is_the_optimiser_s_too_and_finds_the_same_parameters(self, monkeypatch):
        steps = []
        step = torch.optim.AdamW.step
        monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: steps.append(self.param_groups[0]["params"]) or step(self))
        model, x = self.trained(nn.Conv1d(2, 3, 3))
        before = [parameter.detach().clone() for parameter in model.parameters()]
        learn = model_run.step(model, model, (x,), {}, train=True)
        first, second = learn(), learn()
        assert steps == [list(model.parameters())] * 2
        for a, b, parameter, old in zip(first, second, model.parameters(), before, strict=True):
            assert torch.equal(a, b) and a.any() and torch.equal(parameter, old) and parameter.grad is None

    def test_what_ends_in_a_norm_has_gradients(self):
        model, x = self.trained(nn.Conv1d(2, 3, 3), nn.LayerNorm(7))
        expected = model_run.reference_values(model, (x,), {}, torch.float64, train=True)
        assert relative_error(model_run.step(model, model, (x,), {}, train=True)(), expected) < 1e-4

    def trained(self, *modules):
        model = nn.Sequential(*modules).eval()
        model_run.enable_training(model)
        return model, torch.randn(1, 2, 9)

    def test_the_reference_is_exact_and_leaves_the_model_alone(self):
        model = nn.Conv1d(64, 64, 5).bfloat16()
        x = torch.randn(2, 64, 50).bfloat16()
        (exact,) = model_run.reference_values(model, (), {"input": x}, torch.float64, train=False)
        assert exact.dtype == torch.float64 and model.weight.dtype == torch.bfloat16
        with torch.no_grad():
            assert 1e-4 < relative_error([model(x)], [exact]) < 1e-2

    def test_relative_error_is_over_all_values(self):
        expected = [torch.tensor([3.0, 0.0]), torch.tensor([4.0])]
        assert relative_error(expected, expected) == 0
        assert relative_error([torch.tensor([3.0, 0.5]), torch.tensor([4.0])], expected) == pytest.approx(0.1)
        assert not relative_error([torch.tensor([float("nan"), 0.0]), torch.tensor([4.0])], expected) <= 1


class TestWays:
    @pytest.mark.parametrize("ways", [("eager",), ("triton_conv", "jax")], ids=str)
    def test_ours_is_among_them_and_nothing_unknown(self, ways):
        with pytest.raises(BenchError, match=r"eager, torch\.compile, triton_conv"):
            model_run.run_models(["squeezebert"], ways=ways)

    def test_one_left_out_has_no_time_and_no_speedup(self):
        ways = {"torch.compile": way(3.0), "triton_conv": way(2.0)}
        result = ModelResult("m", "fp32", "full", True, "ok", convolutions=8, rewritten=8, by_our_kernels=7, ways=ways)
        assert (result.speedup("eager"), result.speedup("torch.compile")) == (None, 1.5)
        assert verdict(ways, "fp32") == ("ok", "") and "1.50x" in model_run.model_line(result)


class TestVerdict:
    def test_within_the_dtypes_budget_is_right(self):
        assert (
            verdict({"eager": way(error=1e-9), "torch.compile": way(error=1e-9), "triton_conv": way(error=5e-4)}, "fp32")[0]
            == "ok"
        )

    def test_a_deep_model_may_be_about_as_wrong_as_pytorchs(self):
        ways = {"eager": way(error=0.05), "torch.compile": "RuntimeError: no", "triton_conv": way(error=0.06)}
        assert verdict(ways, "bf16")[0] == "ok"
        assert verdict(ways | {"triton_conv": way(error=0.1)}, "bf16") == ("wrong", "relative error 1.00e-01, above 7.50e-02")

    @pytest.mark.parametrize("error", [0.5, float("nan")])
    def test_more_is_wrong(self, error):
        assert verdict({"eager": way(), "torch.compile": way(), "triton_conv": way(error=error)}, "fp32")[0] == "wrong"

    def test_ours_failing_is_a_failure(self):
        assert verdict({"eager": way(), "torch.compile": way(), "triton_conv": "RuntimeError: no"}, "fp32") == (
            "failed",
            "RuntimeError: no",
        )


class TestLine:
    def result(self, status="ok", **ways):
        ways = {"eager": way(4.0), "torch.compile": way(3.0), "triton_conv": way(2.0)} | ways
        return ModelResult("m", "fp32", "full", False, status, convolutions=8, rewritten=8, by_our_kernels=7, ways=ways)

    def test_shows_speedups_of_a_right_result(self):
        line = model_run.model_line(self.result())
        assert "2.00x" in line and "1.50x" in line
        assert len(model_run.model_header().split("errors")[0]) == len(line.split("1.0e-04")[0])

    def test_shows_none_of_a_wrong_one(self):
        assert self.result("wrong").speedup("eager") is None
        line = model_run.model_line(self.result("wrong"))
        assert "x" not in line and line.endswith("WRONG: ")

    def test_a_peer_that_failed_does_not_hide_the_rest(self):
        result = self.result(**{"torch.compile": "RuntimeError: no"})
        assert (result.speedup("eager"), result.speedup("torch.compile")) == (2.0, None)
        assert "failed" in model_run.model_line(result)
