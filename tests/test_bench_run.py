"""The benchmark's timing, results, tables, worker and command, without a GPU."""

import argparse
import json
import operator
import os
import threading
import time
from dataclasses import replace

import pytest
import torch
from commands import ROOT, python
from expecttest import assert_expected_inline

from torch_conv_triton.bench import command, measure, run, tables
from torch_conv_triton.bench.errors import BenchError
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
from torch_conv_triton.bench.suite import Case, case_from_shape
from torch_conv_triton.bench.timing import Contestant, Timing, race, repeats_within
from torch_conv_triton.bench.worker import Here, Worker, WorkerError

H200 = Ceilings(bytes_per_s=4.28e12, tf32=400e12, ieee=50e12, half=790e12)


def timing(ms):
    return Timing(median_ms=ms, p10_ms=ms, p90_ms=ms, host_ms=0.01, repeats=10)


def case_result(name="p01_x", ours=1.0, status="ok", peers=None, **fields):
    case = replace(case_from_shape("2x3x20", "4x3x3", bias=True), name=name, regime="dense", weight=fields.pop("weight", 0.0))
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

    @pytest.mark.parametrize("text", ["", "[]", '{"format": 99}', '{"format": 2}', '{"models": []}'])
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
            case_result(
                "p01_a",
                0.625,
                peers={"cudnn": 1.25, "compile": "RuntimeError: no"},
                kernel="dense",
                config="64x64 w4",
                memory_mib={"ours": 8.0, "cudnn": 4.0},
            ),
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
  peak memory at most cuDNN's in 0 of 1 cases; MiB of those above it: p01_a 8 against 4
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

    def test_the_programs_main_module_runs_once_without_a_guard(self, tmp_path):
        script = tmp_path / "script.py"
        script.write_text(
            "import math\nfrom torch_conv_triton.bench.worker import Worker\nprint('main')\n"
            "with Worker(timeout_s=60) as worker:\n    print(worker.call(math.factorial, 5))\n"
        )
        done = python(str(script), PYTHONPATH=str(ROOT))
        assert done.stdout == "main\n120\n", done.stderr

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

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (("--rounds", "0"), "argument --rounds: must be above zero, got 0"),
            (("--ms", "0"), "argument --ms: must be above zero, got 0"),
            (("--timeout", "nan"), "argument --timeout: must be above zero, got nan"),
            (("--rounds", "2.5"), "argument --rounds: invalid int value: '2.5'"),
        ],
    )
    def test_numbers_that_measure_nothing_are_refused(self, argv, message, capsys):
        with pytest.raises(SystemExit):
            arguments(*argv)
        assert message in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (("--stride", "2"), "--stride has a meaning with --shape only"),
            (("--output-padding", "1"), "--output-padding has a meaning with --shape only"),
            (("--train",), "--train has a meaning with --models only"),
            (("--shape", "1x2x9", "--weight", "2x2x3", "--size", "small"), "--size has a meaning with --models only"),
            (("--models", "--backward"), "a training step of a model is --models --train"),
        ],
    )
    def test_options_that_would_be_ignored_are_refused(self, argv, message, capsys):
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
