"""The benchmark without a GPU: cases, peers, checks, results, tables, the worker and the command."""

import argparse
import json
import operator
import os
import threading
import time
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from expecttest import assert_expected_inline

from torch_conv_triton.bench import check, command, measure, run, tables
from torch_conv_triton.bench.errors import BenchError
from torch_conv_triton.bench.peers import PEERS, QUICK_PEERS, forward_contestant, gradient_contestant, parse_peers
from torch_conv_triton.bench.results import (
    Accuracy,
    CaseResult,
    Errors,
    SuiteResult,
    geometric_mean,
    load,
    merge,
    save,
    summarize,
)
from torch_conv_triton.bench.roofline import Ceilings, plot_shares
from torch_conv_triton.bench.suite import SUITE, Case, case_from_shape, load_suite, select_cases
from torch_conv_triton.bench.timing import Contestant, Timing, race, repeats_within
from torch_conv_triton.bench.worker import Here, Worker, WorkerError

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


def timing(ms):
    return Timing(median_ms=ms, p10_ms=ms, p90_ms=ms, host_ms=0.01, repeats=10)


def case_result(name="p01_x", ours=1.0, status="ok", peers=None, **fields):
    case = replace(GEOMETRIES["plain"], name=name, regime="dense", weight=fields.pop("weight", 0.0))
    return CaseResult.of(
        case,
        status=status,
        ours=timing(ours) if status == "ok" else None,
        peers={peer: t if isinstance(t, str) else timing(t) for peer, t in (peers or {}).items()},
        floor_ms=0.5,
        accuracy=Accuracy(Errors(3e-4, 1e-3), Errors(3e-4, 1e-3), 1e-3, "2 of 2 samples"),
        **fields,
    )


def suite_result(*cases, **machine):
    machine = {"gpu": "GPU", "capability": "sm_90", "torch": "2", "triton": "3", "cudnn": "9", "commit": "c0ffee"} | machine
    rates = {"bytes_per_s": 4.28e12, "tf32": 400e12, "ieee": 50e12, "half": 790e12}
    return SuiteResult(machine, {"backward": False}, rates, cases)


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


class TestRace:
    def test_each_has_its_turns_on_a_thread_of_its_own(self):
        ran = []

        def time_call(call, ms):
            ran.append((call(), threading.get_ident(), ms))
            return timing(float(len(ran)))

        entries = {name: lambda name=name: Contestant(lambda: name) for name in "ab"}
        found = race(entries, time_call, rounds=3, ms=30)
        assert [name for name, _, _ in ran] == ["a", "b"] * 3
        assert len({(name, thread) for name, thread, _ in ran}) == 2
        assert len({thread for _, thread, _ in ran}) == 2
        assert {ms for _, _, ms in ran} == {10}
        assert found == {"a": timing(3.0), "b": timing(4.0)}

    def test_one_that_raises_is_told_and_the_others_go_on(self):
        def refuse():
            raise RuntimeError("no such\nkernel")

        entries = {"built": refuse, "called": lambda: Contestant(refuse), "fine": lambda: Contestant(lambda: 0)}
        found = race(entries, lambda call, ms: timing(1.0 + call()), rounds=2, ms=10)
        assert found == {"built": "RuntimeError: no such", "called": "RuntimeError: no such", "fine": timing(1.0)}

    def test_a_fault_of_the_device_ends_it(self):
        def fault():
            raise torch.AcceleratorError("illegal address")

        with pytest.raises(torch.AcceleratorError):
            race({"a": lambda: Contestant(fault)}, lambda call, ms: timing(call()), rounds=1, ms=10)

    def test_repeats_fit_the_budget_within_bounds(self):
        assert repeats_within(200, 10) == 20
        assert repeats_within(200, 1e4) == 3
        assert repeats_within(200, 1e-6) == 500

    def test_median_and_percentiles(self):
        found = Timing.from_samples([float(i) for i in range(11)][::-1], host_ms=0.5)
        assert found == Timing(median_ms=5.0, p10_ms=1.0, p90_ms=9.0, host_ms=0.5, repeats=11)


class TestResults:
    def test_geometric_mean(self):
        assert geometric_mean([1, 4]) == pytest.approx(2)
        assert geometric_mean([1, 4, 100], [1, 1, 0]) == pytest.approx(2)
        assert geometric_mean([2, 16], [2, 1]) == pytest.approx(4)
        assert geometric_mean([]) is None

    def test_best_peer_leaves_out_the_bound_and_the_failed(self):
        result = case_result(ours=2.0, peers={"cudnn": 8.0, "conv2d": 6.0, "conv2d_nhwc": 1.0, "compile": "RuntimeError"})
        assert result.peer_ms("best") == 6.0
        assert (result.speedup("cudnn"), result.speedup("best"), result.speedup("compile")) == (4.0, 3.0, None)
        assert result.share == 0.25

    def test_summary_is_over_right_cases_and_by_group(self):
        result = suite_result(
            case_result("p01_a", 1.0, peers={"cudnn": 2.0}, weight=0.75),
            case_result("p02_b", 1.0, peers={"cudnn": 32.0}, weight=0.25),
            case_result("s_c", 1.0, peers={"cudnn": 0.5}),
            case_result("s_d", status="wrong", message="error"),
        )
        found = {summary.group: summary for summary in summarize(result)}
        assert found["all"].cases == 3
        assert found["all"].speedups["cudnn"] == pytest.approx(32 ** (1 / 3))
        assert found["by weight"].speedups["cudnn"] == pytest.approx(4)
        assert found["family public"].speedups["best"] == pytest.approx(8)
        assert (found["family seed"].slowest, found["family seed"].slowest_speedup) == ("s_c", 0.5)
        assert found["all"].share == pytest.approx(0.5)

    def test_survives_its_file(self, tmp_path):
        result = suite_result(
            case_result("p01_a", peers={"cudnn": 2.0, "compile": "RuntimeError: no"}, kernel="dense"),
            case_result("p02_b", status="failed", message="died"),
        )
        path = tmp_path / "deep" / "results.json"
        save(result, path)
        assert load(path) == result
        record = json.loads(path.read_text())
        assert record["cases"][0]["speedups"] == {"cudnn": 2.0, "compile": None, "best": 2.0}
        assert record["summary"][0]["group"] == "all"
        assert [p.name for p in path.parent.iterdir()] == ["results.json"]

    @pytest.mark.parametrize("text", ["", "[]", '{"format": 99}', '{"format": 1}'])
    def test_another_file_is_refused(self, tmp_path, text):
        path = tmp_path / "results.json"
        path.write_text(text)
        with pytest.raises(BenchError, match=r"results\.json does not hold results"):
            load(path)

    def test_parts_merge_and_the_later_counts(self):
        first, second = case_result("p01_a", 1.0), case_result("p01_a", 2.0)
        merged = merge([suite_result(first, case_result("p02_b")), suite_result(second)])
        assert [(case.name, case.ours.median_ms) for case in merged.cases] == [("p01_a", 2.0), ("p02_b", 1.0)]
        with pytest.raises(BenchError, match="runs with commit c0ffee and beef do not make one result"):
            merge([suite_result(first), suite_result(second, commit="beef")])

    def test_passes_only_if_every_case_is_right(self):
        assert suite_result(case_result()).passed
        assert not suite_result(case_result(), case_result(status="failed")).passed
        assert not suite_result().passed


class TestTables:
    def test_a_run_reads_as_a_table(self):
        peers = ("cudnn", "compile")
        result = suite_result(
            case_result("p01_a", 0.625, peers={"cudnn": 1.25, "compile": "RuntimeError: no"}, kernel="dense", config="64x64 w4"),
            case_result("p02_b", status="wrong", message="relative error 1.00e+00", kernel="dense", config="64x64 w4"),
        )
        lines = [tables.case_header(peers), *(tables.case_line(case, peers) for case in result.cases)]
        lines += tables.summary_lines(summarize(result)[:2], peers) + tables.closing_lines(result)
        assert_expected_inline(
            "\n".join(lines),
            """\
case                     dtype layout     floor     ours  share    error          cudnn        compile  kernel and config
p01_a                    fp32  NCL       0.5000   0.6250    80%  3.0e-04  1.2500  2.00x         failed  dense 64x64 w4
p02_b                    fp32  NCL     WRONG: relative error 1.00e+00  dense 64x64 w4
geometric means                    cases  share         cudnn       compile          best  slowest against the best peer
all                                    1    80%         2.00x             -         2.00x  p01_a 2.00x
family public                          1    80%         2.00x             -         2.00x  p01_a 2.00x
1 of 2 cases correct and measured
  p02_b: wrong: relative error 1.00e+00
  p01_a: peer compile failed: RuntimeError: no
  cudnn: F.conv1d as it is
  compile: torch.compile""",
        )

    def test_a_wrong_result_shows_no_speedup(self):
        assert "x" not in tables.case_line(case_result("p01_a", status="wrong", message="bad"), ("cudnn",)).split("WRONG")[1]


class TestWorker:
    def test_a_fault_costs_one_call(self):
        with Worker(timeout_s=60) as worker:
            child = worker.call(os.getpid)
            assert child != os.getpid()
            assert worker.call(os.getpid) == child
            with pytest.raises(WorkerError, match="ZeroDivisionError: division by zero"):
                worker.call(operator.truediv, 1, 0)
            with pytest.raises(WorkerError, match="died with exit code 7"):
                worker.call(os._exit, 7)
            assert worker.call(operator.floordiv, 7, 2) == 3
            assert worker.call(os.getpid) != child

    def test_a_call_that_hangs_is_ended(self):
        worker = Worker(timeout_s=60)
        worker.call(os.getpid)
        worker._timeout_s = 0.2
        with worker, pytest.raises(WorkerError, match="no answer in 0 s"):
            worker.call(time.sleep, 60)

    def test_without_a_child_errors_read_the_same(self):
        with Here() as worker, pytest.raises(WorkerError, match="ZeroDivisionError: division by zero"):
            worker.call(operator.truediv, 1, 0)


def arguments(*argv):
    parser = argparse.ArgumentParser()
    command.add_bench_arguments(parser)
    return parser.parse_args(argv)


@pytest.fixture
def measured(monkeypatch):
    """A GPU's answers: every case takes 1 ms and cuDNN 2 ms, but p02 is wrong and p03 dies."""

    def measure_case(case, peers, rates, **options):
        if case.name.startswith("p03"):
            raise RuntimeError("illegal memory access")
        status = "wrong" if case.name.startswith("p02") else "ok"
        return case_result(case.name, status=status, message="relative error" if status == "wrong" else "", peers={"cudnn": 2.0})

    machine = suite_result().machine
    del machine["commit"]
    monkeypatch.setattr(run, "require_gpu", lambda: None)
    monkeypatch.setattr(measure, "describe_machine", lambda: machine)
    monkeypatch.setattr(measure, "ceilings", lambda: H200)
    monkeypatch.setattr(measure, "measure_case", measure_case)


class TestCommand:
    @pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
    @pytest.mark.parametrize("argv", [(), ("--models",), ("--shape", "1x1x9", "--weight", "1x1x3")])
    def test_without_a_gpu_says_so(self, argv, capsys):
        assert command.main(arguments(*argv)) == 2
        assert "measures a CUDA GPU, and PyTorch sees none" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (("--cases", "p99"), "no case starts with 'p99'"),
            (("--peers", "x"), "unknown peer x"),
            (("--shape", "1x1x9"), "--shape needs --weight"),
            (("--from", "none.json"), "does not hold results"),
        ],
    )
    def test_wrong_use_is_told(self, argv, message, capsys):
        assert command.main(arguments(*argv)) == 2
        assert message in capsys.readouterr().err

    def test_right_cases_give_status_0_and_a_file(self, measured, tmp_path, capsys):
        path = tmp_path / "r.json"
        assert command.main(arguments("--cases", "p01,s_", "--peers", "cudnn", "--no-isolate", "--json", str(path))) == 0
        assert [case.name for case in load(path).cases][:2] == ["p01_pointwise", "s_seed_fp32"]
        assert "7 of 7 cases correct and measured" in capsys.readouterr().out

    def test_a_wrong_and_a_failed_case_lose_no_other(self, measured, tmp_path, capsys):
        path = tmp_path / "r.json"
        assert command.main(arguments("--cases", "p01,p02,p03,p04", "--no-isolate", "--json", str(path))) == 1
        found = {case.name[:3]: (case.status, case.message) for case in load(path).cases}
        failed = ("failed", "RuntimeError: illegal memory access")
        assert found == {"p01": ("ok", ""), "p02": ("wrong", "relative error"), "p03": failed, "p04": ("ok", "")}
        assert "2 of 4 cases correct and measured" in capsys.readouterr().out

    def test_a_gpu_that_cannot_be_used_is_told(self, measured, monkeypatch, capsys):
        monkeypatch.setattr(measure, "ceilings", lambda: 1 / 0)
        assert command.main(arguments("--no-isolate")) == 1
        assert "the GPU could not be used: ZeroDivisionError" in capsys.readouterr().err

    def test_results_name_when_and_what(self, measured, tmp_path):
        path = tmp_path / "r.json"
        command.main(arguments("--cases", "p01", "--no-isolate", "--json", str(path), "--commit", "abc"))
        machine = load(path).machine
        assert machine["commit"] == "abc"
        assert machine["date"].startswith("20")
        assert machine["command"].startswith("torch-conv-triton")

    def test_recorded_commands_hold_no_absolute_paths(self):
        assert command.command_line(["bench", "--json", "/some/where/r.json"]) == "torch-conv-triton bench --json r.json"

    def test_earlier_results_are_merged_shown_and_plotted(self, tmp_path, capsys):
        save(suite_result(case_result("p01_a", peers={"cudnn": 2.0})), tmp_path / "a.json")
        save(suite_result(case_result("p02_b", peers={"cudnn": 8.0})), tmp_path / "b.json")
        parts, merged, picture = [str(tmp_path / name) for name in ("a.json", "b.json")], tmp_path / "m.json", tmp_path / "m.png"
        assert command.main(arguments("--from", *parts, "--json", str(merged), "--plot", str(picture))) == 0
        assert [case.name for case in load(merged).cases] == ["p01_a", "p02_b"]
        assert "4.00x" in capsys.readouterr().out
        assert picture.read_bytes().startswith(b"\x89PNG")

    def test_dtype_overrides_the_suite(self):
        assert {case.dtype for case in command.cases_of(arguments("--dtype", "bf16"))} == {"bf16"}
        (case,) = command.cases_of(arguments("--shape", "1x4x9", "--weight", "4x4x3", "--dtype", "fp16", "--layout", "NLC"))
        assert isinstance(case, Case)
        assert (case.dtype, case.x_stride) == ("fp16", (36, 1, 4))


def test_plot_leaves_out_missing_bars(tmp_path):
    def bars(name, *shares):
        plot_shares(shares, tmp_path / name, "title")
        return (tmp_path / name).read_text().count("<path d=")

    assert bars("whole.svg", ("a", 0.3, 0.5), ("b", 0.2, 0.9)) == 1 + bars("part.svg", ("a", None, 0.5), ("b", 0.2, 0.9))
