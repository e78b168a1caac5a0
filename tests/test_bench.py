"""The benchmark's cases, peers and checks, without a GPU."""

import json
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from torch_conv_triton.bench import check
from torch_conv_triton.bench.errors import BenchError
from torch_conv_triton.bench.measure import gradient_plans
from torch_conv_triton.bench.peers import PEERS, QUICK_PEERS, forward_contestant, gradient_contestant, parse_peers
from torch_conv_triton.bench.results import Accuracy
from torch_conv_triton.bench.roofline import Ceilings
from torch_conv_triton.bench.suite import SUITE, case_from_shape, load_suite, select_cases
from torch_conv_triton.problem import layout_of

H200 = Ceilings(bytes_per_s=4.28e12, tf32=400e12, ieee=50e12, half=790e12)

GEOMETRIES = {
    "plain": case_from_shape("2x3x20", "4x3x3", bias=True),
    "strided_padded": case_from_shape("3x4x23", "6x4x5", stride=3, padding=2),
    "dilated_grouped": case_from_shape("2x6x30", "4x3x3", dilation=4, padding=5, groups=2, bias=True),
    "depthwise_nlc": case_from_shape("2x5x17", "5x1x4", padding=3, groups=5, layout="NLC", bias=True),
    "transposed": case_from_shape("2x4x9", "4x3x4", stride=2, padding=1, transposed=True, bias=True),
    "transposed_grouped": case_from_shape(
        "2x4x9", "4x2x3", stride=2, padding=1, output_padding=1, dilation=2, groups=2, transposed=True
    ),
    "transposed_wide_output_padding": case_from_shape("1x2x5", "2x2x2", stride=2, output_padding=2, dilation=3, transposed=True),
}


@pytest.fixture(params=GEOMETRIES.values(), ids=GEOMETRIES)
def case(request):
    return replace(request.param, name="g")


def cpu_tensors(case):
    return tuple(None if t is None else t.double() for t in case.tensors("cpu"))


def eager(case, x, weight, bias):
    return (F.conv_transpose1d if case.transposed else F.conv1d)(x, weight, bias, **case.arguments)


class TestSuite:
    def test_holds_the_public_cases_and_the_seed_family(self):
        cases = load_suite()
        assert [case.name.partition("_")[0] for case in cases[:32]] == [f"p{i:02}" for i in range(1, 33)]
        assert [case.name for case in cases[32:]] == ["s_seed_fp32", "s_seed_bf16", "s_kb67", "s_kb64", "s_kb74", "s_kb79"]
        assert {case.family for case in cases[:32]} == {"public"}
        assert {case.family for case in cases[32:]} == {"seed"}
        assert sum(case.weight for case in cases) == pytest.approx(1, abs=1e-4)

    @pytest.mark.parametrize(
        ("name", "floor_ms"),
        [("s_seed_fp32", 1.4309), ("s_seed_bf16", 0.7155), ("s_kb79", 0.3136), ("p20_depthwise_k2-4", 0.0784)],
    )
    def test_floors_are_those_of_the_sizes(self, name, floor_ms):
        (case,) = select_cases(load_suite(), name)
        assert H200.floor_ms(case.problem()) == pytest.approx(floor_ms, rel=0.02)

    def test_floor_of_compute_bound_work_follows_the_precision(self):
        case = case_from_shape("64x1024x1024", "1024x1024x9")
        problem = case.problem()
        assert H200.floor_ms(replace(problem, precision="tf32")) == pytest.approx(1e3 * problem.flops / 400e12)
        assert H200.floor_ms(replace(problem, precision="ieee")) == pytest.approx(1e3 * problem.flops / 50e12)
        assert H200.floor_ms(replace(problem, dtype=torch.bfloat16)) == pytest.approx(1e3 * problem.flops / 790e12)

    def test_backward_floor_counts_the_wanted_gradients(self):
        case = replace(GEOMETRIES["plain"], backward_mask=(False, True, True))
        assert H200.backward_floor_ms(case.problem(), case) == H200.floor_ms(case.problem())

    def test_tensors_have_the_recorded_strides(self):
        (case,) = select_cases(load_suite(), "p24")
        small = replace(case, x_shape=(2, 6, 5), x_stride=(100, 1, 12), w_shape=(6, 1, 4), groups=6)
        x, weight, bias = small.tensors("cpu")
        assert (x.shape, x.stride(), x.dtype) == ((2, 6, 5), (100, 1, 12), torch.bfloat16)
        assert weight.is_contiguous() and bias.shape == (6,)
        assert x.float().std() > 0.5

    def test_tensors_are_the_same_for_the_same_seed_only(self):
        case = GEOMETRIES["plain"]
        assert torch.equal(case.tensors("cpu", seed=3)[0], case.tensors("cpu", seed=3)[0])
        assert not torch.equal(case.tensors("cpu", seed=3)[0], case.tensors("cpu", seed=4)[0])

    def test_the_gradient_of_y_is_laid_out_as_x(self, case):
        grad_output = case.grad_output("cpu")
        assert grad_output.shape == eager(case, *case.tensors("cpu")).shape
        assert layout_of(grad_output.stride(), *grad_output.shape[1:]) == case.problem().layout
        assert case.gradient_problems()[0].x_strides == grad_output.stride()

    def test_selects_by_prefix(self):
        names = [case.name for case in select_cases(load_suite(), "p01,s_kb7")]
        assert names == ["p01_pointwise", "s_kb74", "s_kb79"]
        with pytest.raises(BenchError, match=r"no case starts with 'p99'.*p01_pointwise"):
            select_cases(load_suite(), "p01,p99")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"stride": None}, r"missing stride"),
            ({"strid": 1}, r"unknown strid"),
            ({"stride": "1"}, r"stride must be int, got '1'"),
            ({"bias": 1}, r"bias must be bool, got 1"),
            ({"x_shape": [8, 512]}, r"x_shape must be a list of 3 of int, got \[8, 512\]"),
            ({"x_shape": [8, 512, 0]}, r"x_shape must be positive"),
            ({"backward_mask": [1, 1, 1]}, r"backward_mask must be a list of 3 of bool"),
            ({"dtype": "fp8"}, r"dtype must be one of fp32, fp16, bf16, got 'fp8'"),
            ({"phase": "test"}, r"phase must be 'infer' or 'train'"),
            ({"groups": 3}, r"p01_pointwise: Given groups=3"),
            ({"padding": -1}, r"negative padding"),
        ],
    )
    def test_a_malformed_case_is_named_with_its_fault(self, tmp_path, change, message):
        record = json.loads(SUITE.read_text())[0] | change
        record = {key: value for key, value in record.items() if value is not None}
        path = tmp_path / "suite.json"
        path.write_text(json.dumps([record]))
        with pytest.raises(BenchError, match=message):
            load_suite(path)

    @pytest.mark.parametrize(
        ("text", "message"),
        [("{", "not JSON"), ("{}", "expected a list"), ("[]", "expected a list"), ("[1]", "expected an object")],
    )
    def test_a_file_that_is_no_suite_is_refused(self, tmp_path, text, message):
        path = tmp_path / "suite.json"
        path.write_text(text)
        with pytest.raises(BenchError, match=message):
            load_suite(path)

    def test_a_missing_file_and_a_repeated_name_are_refused(self, tmp_path):
        with pytest.raises(BenchError, match="cannot read the suite"):
            load_suite(tmp_path / "none.json")
        path = tmp_path / "suite.json"
        path.write_text(json.dumps(json.loads(SUITE.read_text())[:1] * 2))
        with pytest.raises(BenchError, match=r"unique.*p01_pointwise"):
            load_suite(path)


class TestShape:
    def test_becomes_a_case(self):
        case = case_from_shape("8x768x499", "768x48x128", dtype="fp16", layout="NLC", padding=64, groups=16)
        assert case.problem().describe() == "8x768x499 -> 768 K128 p64 g16 fp16 NLC"

    def test_transposed_counts_output_channels_by_group(self):
        assert GEOMETRIES["transposed_grouped"].problem().C_out == 4

    @pytest.mark.parametrize(
        ("shape", "weight", "message"),
        [
            ("8x768", "768x48x128", "shape must be three positive sizes as in 8x768x499, got '8x768'"),
            ("8x4x0", "4x4x1", "shape must be three positive sizes"),
            ("8x4x9", "4xax1", "weight must be three positive sizes"),
            ("8x4x9", "4x5x1", "expected input.*to have 5 channels, but got 4"),
            ("8x4x2", "4x4x3", "Kernel size can't be greater"),
        ],
    )
    def test_that_does_not_fit_is_refused(self, shape, weight, message):
        with pytest.raises(BenchError, match=message):
            case_from_shape(shape, weight)


class TestPeers:
    def test_sets_and_lists_are_read(self):
        assert parse_peers("all") == tuple(PEERS)
        assert parse_peers("quick") == QUICK_PEERS
        assert parse_peers("none") == ()
        assert parse_peers("cudnn,compile") == ("cudnn", "compile")
        with pytest.raises(BenchError, match="unknown peer cublas; there are cudnn, benchmark"):
            parse_peers("cudnn,cublas")

    @pytest.mark.parametrize("peer", ["ours", "cudnn", "benchmark", "conv2d", "conv2d_nhwc"])
    def test_each_computes_the_convolution(self, case, peer):
        tensors = cpu_tensors(case)
        y = forward_contestant(peer, case, tensors).call()
        torch.testing.assert_close(y.squeeze(2) if y.dim() == 4 else y, eager(case, *tensors))

    def test_conv2d_gives_the_layout_of_the_case(self):
        nlc = GEOMETRIES["depthwise_nlc"]
        assert forward_contestant("conv2d", nlc, nlc.tensors("cpu")).call().is_contiguous(memory_format=torch.channels_last)
        ncl = GEOMETRIES["plain"]
        assert forward_contestant("conv2d", ncl, ncl.tensors("cpu")).call().is_contiguous()

    @pytest.mark.parametrize("peer", ["ours", "cudnn", "conv2d", "conv2d_nhwc"])
    def test_each_computes_the_gradients(self, case, peer):
        x, weight, bias = (None if t is None else t.requires_grad_() for t in cpu_tensors(case))
        y = eager(case, x, weight, bias)
        grad_output = torch.randn_like(y)
        wanted = [t for t in (x, weight, bias) if t is not None]
        expected = torch.autograd.grad(y, wanted, grad_output)
        found = gradient_contestant(peer, case, (x, weight, bias), grad_output).call()
        for actual, true in zip(found, expected, strict=True):
            torch.testing.assert_close(actual.reshape(true.shape), true)

    def test_only_the_wanted_gradients_are_computed(self):
        case = replace(GEOMETRIES["plain"], backward_mask=(False, True, False))
        tensors = cpu_tensors(case)
        (gradient,) = gradient_contestant("cudnn", case, tensors, torch.ones(2, 4, 18, dtype=torch.float64)).call()
        assert gradient.shape == (4, 3, 3)

    def test_benchmark_switches_cudnn_around_its_calls_only(self):
        contestant = forward_contestant("benchmark", GEOMETRIES["plain"], GEOMETRIES["plain"].tensors("cpu"))
        assert not torch.backends.cudnn.benchmark
        with contestant.context():
            assert torch.backends.cudnn.benchmark
        assert not torch.backends.cudnn.benchmark


class TestCheck:
    def test_a_right_output_has_no_error(self, case):
        tensors = cpu_tensors(case)
        errors, compared = check.output_errors(case, tensors, [eager(case, *tensors)])
        assert max(errors[0].whole, errors[0].worst) < 1e-12
        assert compared == f"{case.x_shape[0]} of {case.x_shape[0]} samples"

    @pytest.mark.parametrize("wrong", [float("nan"), 1e3])
    def test_one_wrong_last_element_is_seen(self, case, wrong):
        tensors = cpu_tensors(case)
        y = eager(case, *tensors)
        y[-1, -1, -1] = wrong
        (errors,), _ = check.output_errors(case, tensors, [y])
        assert not Accuracy(errors, errors, 1e-2, "").passed

    def test_one_wrong_element_among_many_is_seen(self):
        case = case_from_shape("1x1x100000", "1x1x1")
        x, weight, _ = tensors = cpu_tensors(case)
        y = F.conv1d(x, weight)
        y[0, 0, -1] += 1
        (errors,), _ = check.output_errors(case, tensors, [y])
        assert errors.whole < 1e-2 < 0.1 < errors.worst
        assert not Accuracy(errors, errors, 1e-2, "").passed

    def test_nan_in_a_sample_that_is_not_compared_is_seen(self, monkeypatch):
        monkeypatch.setattr(check, "samples_to_compare", lambda N, elements: [0])
        case = GEOMETRIES["plain"]
        tensors = cpu_tensors(case)
        y = eager(case, *tensors)
        y[1, 0, 0] = float("nan")
        (errors,), compared = check.output_errors(case, tensors, [y])
        assert compared == "1 of 2 samples"
        assert not Accuracy(errors, errors, 1e-2, "").passed

    def test_nan_in_one_gradient_is_seen(self):
        case, grad_output = GEOMETRIES["plain"], torch.ones(2, 4, 18, dtype=torch.float64)
        tensors = cpu_tensors(case)
        gradients = check.reference_gradients(case, tensors, grad_output)
        gradients[1][0, 0, 0] = float("nan")
        (errors,) = check.gradient_errors(case, tensors, grad_output, [gradients])
        assert not Accuracy(errors, errors, 1e-2, "").passed

    def test_gradients_are_those_of_autograd(self, case):
        x, weight, bias = (None if t is None else t.requires_grad_() for t in cpu_tensors(case))
        y = eager(case, x, weight, bias)
        grad_output = torch.randn_like(y)
        wanted = [t for t in (x, weight, bias) if t is not None]
        expected = torch.autograd.grad(y, wanted, grad_output)
        with torch.no_grad():
            (errors,) = check.gradient_errors(case, (x, weight, bias), grad_output, [expected])
        assert max(errors.whole, errors.worst) < 1e-12

    def test_a_backward_run_tells_which_kernels_compute_the_gradients(self, case):
        tensors = case.tensors("cpu")
        grad_output = eager(case, *tensors)
        for_input, for_weight = (plan.kernel for plan in gradient_plans(case, tensors, grad_output))
        assert for_weight.startswith("weight_grad")
        assert not (case.transposed and for_input.startswith("transposed"))
        (frozen,) = gradient_plans(replace(case, backward_mask=(False, True, False)), tensors, grad_output)
        assert frozen.kernel == for_weight

    def test_chunks_of_the_batch_add_up(self, monkeypatch):
        monkeypatch.setattr(check, "ELEMENTS_AT_ONCE", 1)
        self.test_a_right_output_has_no_error(GEOMETRIES["strided_padded"])
        self.test_gradients_are_those_of_autograd(GEOMETRIES["strided_padded"])

    @pytest.mark.parametrize(
        ("N", "elements", "budget", "samples"),
        [(4, 10, 100, [0, 1, 2, 3]), (100, 10, 50, [0, 24, 49, 74, 99]), (9, 10**9, 100, [0, 8]), (1, 10**9, 100, [0])],
    )
    def test_samples_are_spread_over_the_batch(self, N, elements, budget, samples):
        assert check.samples_to_compare(N, elements, budget) == samples
