"""The tuner without a GPU: what is proposed, how a plan is checked and timed, what is chosen and kept, and the command."""

import json
import logging
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from commands import command as run_command
from commands import python
from test_dispatch import BF16, CHOICES, FP16, RTX4090, problem

from torch_conv_triton import cli, dispatch, dispatch_gradients, execute, gradients, testing
from torch_conv_triton.backend import HOOK, inductor_options
from torch_conv_triton.bench.suite import case_from_shape
from torch_conv_triton.bench.timing import Timing
from torch_conv_triton.bench.worker import WorkerError
from torch_conv_triton.configs import INTERPRETER, Config, Device
from torch_conv_triton.dispatch import ATEN, Plan
from torch_conv_triton.explain import record
from torch_conv_triton.tuning import command, compile_time, laboratory, search, tables, trial
from torch_conv_triton.tuning.tables import Entry
from torch_conv_triton.tuning.tuner import TIE, choose, tune

GPU = Device("Some GPU", capability=90, sm_count=132, shared_memory=232448)
TINY = problem((3, 16, 40), 24, 3, padding=1)
OTHER = problem((3, 16, 40), 24, 5, padding=1)
CPU = torch.device("cpu")
PROBLEMS = [chosen for chosen, _ in CHOICES.values()]


@pytest.fixture(autouse=True)
def own_tables(tmp_path, monkeypatch):
    """Empty tables."""
    monkeypatch.setenv(tables.CACHE_VARIABLE, str(tmp_path / "cache"))
    forget()
    yield
    forget()


def forget():
    tables.forget()
    execute.forget_plans()
    gradients.forget_plans()


class FakeLaboratory:
    """Finds the faults and takes the times that it is told, by plan; keeps what it was asked."""

    def __init__(self, fault=lambda plan: None, time=lambda plan: 1.0):
        self.fault, self.time = fault, time
        self.checked, self.measured = [], []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def check(self, trials):
        self.checked += trials
        return [self.fault(plan) for _, plan in trials]

    def measure(self, problem, plans):
        self.measured.append((problem, plans))
        return {i: self.time(plan) for i, plan in enumerate(plans)}


class TestSearch:
    @pytest.mark.parametrize("problem", PROBLEMS, ids=CHOICES)
    @pytest.mark.parametrize("device", [GPU, RTX4090], ids=lambda device: device.name)
    def test_proposals(self, problem, device):
        plans = search.plans(problem, device)
        assert plans[0] == dispatch.plan_by_rule(problem, device)
        assert len({(plan.kernel, plan.config) for plan in plans}) == len(plans) <= 60
        for heuristic in dispatch.candidates(problem, device):
            assert (heuristic.kernel, heuristic.config) in {(plan.kernel, plan.config) for plan in plans}
        assert [plan.kernel for plan in plans if plan.is_aten and plan is not plans[0]][-1:] == ["aten_nhwc"]
        for plan in plans:
            if plan.reason == "searched":
                assert dispatch.plan_refusal(plan, problem, device) is None, plan

    @pytest.mark.parametrize("problem", PROBLEMS, ids=CHOICES)
    def test_every_kernel_has_more_than_its_heuristic_config(self, problem):
        counts = Counter(plan.kernel for plan in search.plans(problem, GPU))
        useful = [kernel for kernel in counts if kernel.startswith("depthwise") or not problem.is_depthwise]
        assert all(counts[kernel] > 1 for kernel in useful if kernel not in ATEN), counts

    def test_beyond_two_to_the_31_elements_aten_is_no_choice(self):
        huge = problem((1, 4, 2**29 + 4100), 4, 1, bias=False)
        assert not any(plan.is_aten for plan in search.plans(huge, GPU))

    def test_a_copy_to_nlc_is_tried_where_the_rules_make_none_and_the_reverse(self):
        few, many = problem((8, 64, 4000), 128, 3), CHOICES["many products"][0]
        for tried in (few, many):
            configs = [plan.config for plan in search.plans(tried, GPU) if plan.kernel == "dense"]
            assert {config.copy_to_nlc for config in configs} == {False, True}

    def test_the_nearest_configs_come_first(self):
        start = Config(64, 64, 32, num_warps=4, num_stages=3)
        found = search.nearest(start, 5, lambda config: True, BLOCK_M=(16, 32, 64, 128), num_stages=(2, 3, 4))
        assert found[0] == start
        assert [search.distance(start, config) for config in found] == [0, 1, 1, 1, 1]
        only_long = search.nearest(start, 5, lambda config: config.BLOCK_M > 64, BLOCK_M=(16, 32, 64, 128))
        assert only_long == [replace(start, BLOCK_M=128)]


class TestTrial:
    @pytest.mark.parametrize(
        "tried",
        [
            TINY,
            problem((2, 32, 40), 24, 3, dtype=FP16, layout="NLC"),
            problem((2, 32, 40), 32, 3, groups=32, dtype=BF16, padding=2),
            problem((2, 16, 20), 24, 4, stride=2, transposed=True, bias=False),
            replace(TINY, precision="ieee", aligned=False),
        ],
        ids=lambda tried: tried.describe(),
    )
    def test_right_plans_are_found_right(self, tried):
        plans = search.plans(tried, INTERPRETER)
        for plan in plans[:3] + plans[-2:]:
            assert trial.check(tried, plan, CPU) is None, plan

    def test_a_wrong_output_is_found(self, monkeypatch):
        monkeypatch.setattr(execute, "forward_with", lambda *args, right=execute.forward_with: right(*args) * 1.01)
        assert "relative error 1.0" in trial.check(TINY, dispatch.candidates(TINY, INTERPRETER)[-1], CPU)

    def test_an_output_that_is_not_written_is_found(self, monkeypatch):
        monkeypatch.setattr(execute, "_launch", lambda *args: None)
        assert "NaN or Inf" in trial.check(TINY, dispatch.candidates(TINY, INTERPRETER)[-1], CPU)

    def test_an_output_that_changes_is_found(self, monkeypatch):
        calls = []

        def unsteady(*args, right=execute.forward_with):
            calls.append(args)
            return right(*args) * (1 + 1e-5 * len(calls))

        monkeypatch.setattr(execute, "forward_with", unsteady)
        assert "differs from call to call" in trial.check(TINY, dispatch.candidates(TINY, INTERPRETER)[-1], CPU)

    def test_a_plan_that_does_not_compile_is_told_of(self):
        fault = trial.check(TINY, Plan("dense", Config(24, 16, 16), "no power of two"), CPU)
        assert fault and "\n" not in fault

    @pytest.mark.parametrize("precision", ["tf32", "ieee"])
    def test_float32_is_computed_in_the_precision_of_the_problem_by_aten_too(self, precision, monkeypatch):
        asked = []
        monkeypatch.setattr(execute, "_aten", lambda *args: asked.append(torch.backends.cudnn.conv.fp32_precision))
        other = {"tf32": "ieee", "ieee": "tf32"}[precision]
        with testing.float32_precision(other):
            trial.check(replace(TINY, precision=precision), Plan("aten", None, ""), CPU)
            assert torch.backends.cudnn.conv.fp32_precision == other
        assert asked == [precision, precision]

    @pytest.mark.parametrize(("samples", "L", "checked"), [(64, 100_000, 2), (1, 100_000, 1), (512, 64, 64), (2, 4, 2)])
    def test_only_some_samples_are_checked(self, samples, L, checked):
        fewer = trial.fewer_samples(problem((samples, 16, L), 24, 1))
        assert fewer == replace(problem((samples, 16, L), 24, 1), N=checked)

    @pytest.mark.parametrize("aligned", [True, False])
    def test_inputs_are_what_the_problem_says(self, aligned):
        asked = replace(problem((2, 16, 40), 24, 3, layout="NLC"), aligned=aligned, x_strides=(40 * 20, 1, 20))
        x, weight, bias = trial.inputs(asked, CPU)
        with testing.float32_precision("tf32"):
            assert type(asked).from_tensors(x, weight, bias, 1, 0, 1, 1) == asked
        assert all(t.isfinite().all() for t in (x, weight, bias))
        assert x.untyped_storage().size() > 4 * (x.storage_offset() + 2 * 40 * 20)

    def test_the_fastest_are_timed_again_and_the_rule_and_aten_always(self, monkeypatch):
        plans = [Plan("dense", Config(16, 16, 16 * (i + 1)), "") for i in range(9)] + [Plan("aten", None, "")]
        times = dict(zip(plans, [9.0, 1.0, 1.05, 1.2, 1.01, 5.0, 1.02, 1.03, math.nan, 7.0], strict=True))
        timed = []

        class Clock:
            def time(self, call, ms):
                plan = next(arg.plan if hasattr(arg, "plan") else arg for arg in call.args)
                if math.isnan(times[plan]):
                    raise RuntimeError("it does not run at full size")
                timed.append(plan)
                return Timing(times[plan], times[plan], times[plan], 0.01, 5)

        from torch_conv_triton.bench import measure

        monkeypatch.setattr(measure, "stopwatch", Clock)
        found = trial.measure(TINY, plans, CPU)
        assert found == {0: 9.0, 1: 1.0, 2: 1.05, 4: 1.01, 6: 1.02, 7: 1.03, 9: 7.0}
        counts = Counter(timed)
        assert [counts[plan] for plan in plans] == [4, 4, 4, 1, 4, 1, 4, 4, 0, 4]

    def test_a_call_costs_what_the_host_takes_to_make_it_where_that_is_longer(self):
        timings = {"long": Timing(2.0, 2.0, 2.0, 0.1, 5), "short": Timing(0.01, 0.01, 0.01, 0.05, 5), "none": "RuntimeError"}
        assert trial._milliseconds(timings) == {"long": 2.0, "short": 0.05}

    def test_checks_run_in_processes_of_their_own(self):
        right = dispatch.candidates(TINY, INTERPRETER)[-1]
        with laboratory.Workers(CPU, jobs=2) as workers:
            faults = workers.check([(TINY, right), (TINY, Plan("dense", Config(24, 16, 16), "")), (TINY, right)])
            # without a GPU there is no time to take
            with pytest.raises(WorkerError):
                workers.measure(TINY, [right])
        assert (faults[0], faults[2]) == (None, None)
        assert faults[1]


class TestChoice:
    OURS = tuple(Plan("dense", Config(16 * 2**i, 64), "") for i in range(3))
    PLANS = (*OURS, Plan("aten", None, ""), Plan("aten_nhwc", None, ""))

    @pytest.mark.parametrize(
        ("times", "chosen"),
        [
            ([1.0, 2.0, 3.0, 4.0, 5.0], 0),
            ([2.0, 1.0, 3.0, 4.0, 5.0], 1),
            ([1.019, 1.0, 3.0, 4.0, 5.0], 0),
            ([1.021, 1.0, 3.0, 4.0, 5.0], 1),
            ([2.0, 1.01, 1.0, 4.0, 5.0], 1),
            ([1.0, 2.0, 3.0, 0.99, 5.0], 0),
            ([1.0, 2.0, 3.0, 0.97, 5.0], 3),
            ([1.0, 2.0, 3.0, 0.97, 0.96], 3),
            ([1.0, 2.0, 3.0, 0.97, 0.9], 4),
            ([1.0, 2.0, 3.0, 4.0, 0.9], 4),
            ([1.0, 2.0, 3.0, 0.99, 0.975], 4),
            ([1.019, 1.0, 3.0, 0.99, 5.0], 0),
            ([None, 2.0, None, 4.0, None], 1),
            ([None, None, None, 4.0, None], 3),
        ],
    )
    def test_a_tie_goes_to_the_rule_and_to_our_kernels(self, times, chosen):
        assert choose(self.PLANS, {i: ms for i, ms in enumerate(times) if ms is not None}) == chosen

    def test_a_rule_that_says_aten_ties_with_nothing(self):
        plans = (Plan("aten", None, "by rule"), *self.OURS)
        assert choose(plans, {0: 1.0, 1: TIE - 0.001}) == 1
        assert choose(plans, {0: 1.0, 1: TIE + 0.001}) == 0


class TestTuner:
    @pytest.fixture
    def path(self):
        return tables.user_path(GPU.name)

    def test_the_fastest_right_plan_is_kept_and_runs_from_then_on(self, path):
        plans = search.plans(TINY, GPU)
        wanted, broken = plans[2], plans[3]
        times = {wanted: 0.5, broken: 0.1}
        fake = FakeLaboratory(lambda plan: "it is wrong" if plan == broken else None, lambda plan: times.get(plan, 1.0))
        assert dispatch.plan(TINY, GPU) != wanted
        (outcome,) = tune([("tiny", TINY)], GPU, path, fake)
        assert outcome.status == "tuned"
        assert outcome.wrong == ((broken, "it is wrong"),)
        assert outcome.tried == len(plans)
        assert broken not in fake.measured[0][1]
        assert outcome.entry == Entry(wanted.kernel, wanted.config, 0.5, 1.0)
        assert tables.lookup(TINY, GPU) == outcome.entry
        plan = dispatch.plan(TINY, GPU)
        assert (plan.kernel, plan.config, plan.reason) == (wanted.kernel, wanted.config, "tuned: 0.5 ms, aten 1")

    def test_each_entry_is_written_at_once_so_that_an_interrupted_run_goes_on(self, path):
        fake = FakeLaboratory()
        run = tune([("tiny", TINY), ("other", OTHER)], GPU, path, fake)
        next(run)
        run.close()
        assert tables.read(path).keys() == {tables.key(TINY)}
        again = FakeLaboratory()
        outcomes = list(tune([("tiny", TINY), ("other", OTHER)], GPU, path, again))
        assert [(outcome.name, outcome.status) for outcome in outcomes] == [("tiny", "known"), ("other", "tuned")]
        assert {problem for problem, _ in again.checked} == {OTHER}
        assert tables.read(path).keys() == {tables.key(TINY), tables.key(OTHER)}

    def test_force_tunes_again(self, path):
        list(tune([("tiny", TINY)], GPU, path, FakeLaboratory(time=lambda plan: 1.0)))
        (outcome,) = tune([("tiny", TINY)], GPU, path, FakeLaboratory(time=lambda plan: 2.0), force=True)
        assert outcome.status == "tuned"
        assert tables.lookup(TINY, GPU).ms == 2.0

    def test_problems_of_one_kind_are_tuned_once(self, path):
        longer = problem((3, 16, 42), 24, 3, padding=1)
        assert tables.key(longer) == tables.key(TINY)
        outcomes = tune([("tiny", TINY), ("longer", longer)], GPU, path, FakeLaboratory())
        assert sorted((outcome.name, outcome.status) for outcome in outcomes) == [("longer", "known"), ("tiny", "tuned")]

    def test_the_kinds_of_many_problems_are_checked_a_few_at_a_time(self, path):
        many = [(f"K{K}", problem((3, 16, 40), 24, K)) for K in range(1, 12)]
        fake = FakeLaboratory()
        run = tune(many, GPU, path, fake)
        next(run)
        assert len({problem for problem, _ in fake.checked}) < len(many)
        assert len([*run]) == len(many) - 1
        assert [problem for problem, _ in fake.measured] == [problem for _, problem in many]

    def test_what_no_kernel_computes_is_left_as_it_is(self, path):
        (outcome,) = tune([("double", replace(TINY, dtype=torch.float64))], GPU, path, FakeLaboratory())
        assert (outcome.status, outcome.message) == ("kept", "fp64 is computed by aten")

    def test_a_problem_that_fails_is_told_of_and_the_others_go_on(self, path):
        class Failing(FakeLaboratory):
            def measure(self, problem, plans):
                if problem == TINY:
                    raise WorkerError("the process died with exit code -9")
                return super().measure(problem, plans)

        outcomes = list(tune([("tiny", TINY), ("other", OTHER)], GPU, path, Failing()))
        assert [(outcome.status, outcome.message) for outcome in outcomes] == [
            ("failed", "the process died with exit code -9"),
            ("tuned", ""),
        ]
        assert tables.read(path).keys() == {tables.key(OTHER)}
        (outcome,) = tune([("tiny", TINY)], GPU, path, FakeLaboratory(fault=lambda plan: "no GPU"))
        assert (outcome.status, outcome.message, outcome.entry) == ("failed", "no plan is right: no GPU", None)

    def test_an_outcome_reads_as_a_line(self, path):
        fake = FakeLaboratory(time=lambda plan: 2.0 if plan.is_aten else 1.0)
        (outcome,) = tune([("tiny", TINY)], GPU, path, fake)
        assert "tuned  1.0000 ms, aten 2.0000 (2.00x)  dense " in str(outcome)
        assert json.loads(json.dumps(outcome.to_dict()))["entry"]["ms"] == 1.0


class TestCompileTime:
    CUDA = torch.device("cuda", 0)

    @pytest.fixture(autouse=True)
    def fake_gpu(self, monkeypatch):
        """A GPU that a fake laboratory tunes for; yields the laboratories that were opened."""
        opened = []

        def workers(device, jobs):
            opened.append(FakeLaboratory())
            return opened[-1]

        monkeypatch.delenv(compile_time.OFF_VARIABLE, raising=False)
        monkeypatch.setattr(compile_time, "Workers", workers)
        monkeypatch.setattr(compile_time, "default_jobs", lambda: 1)
        monkeypatch.setattr(dispatch, "device_for", lambda device: GPU if device.type == "cuda" else INTERPRETER)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        return opened

    def test_what_no_table_knows_is_tuned_and_logged(self, fake_gpu, caplog):
        tables.store(tables.user_path(GPU.name), GPU.name, {tables.key(OTHER): Entry("aten", None, 1, 1)})
        with caplog.at_level(logging.INFO):
            compile_time.tune_while_compiling([TINY, OTHER, TINY], self.CUDA)
        assert [problem for problem, _ in fake_gpu[0].measured] == [TINY]
        assert tables.lookup(TINY, GPU)
        assert "tuning 1 kinds of convolutions in 1 processes" in caplog.text
        assert "tuned  1.0000 ms" in caplog.text

    def test_nothing_is_done_without_a_gpu_or_something_new(self, fake_gpu):
        compile_time.tune_while_compiling([TINY], CPU)
        compile_time.tune_while_compiling([replace(TINY, dtype=torch.float64)], self.CUDA)
        compile_time.tune_while_compiling([], self.CUDA)
        assert fake_gpu == []

    @pytest.mark.parametrize(("value", "tuned"), [("1", 0), ("0", 1), ("", 1)])
    def test_a_variable_turns_it_off(self, fake_gpu, monkeypatch, value, tuned):
        monkeypatch.setenv(compile_time.OFF_VARIABLE, value)
        compile_time.tune_while_compiling([TINY], self.CUDA)
        assert len(fake_gpu) == tuned

    def test_never_while_a_cuda_graph_is_captured(self, fake_gpu, monkeypatch, caplog):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        compile_time.tune_while_compiling([TINY], self.CUDA)
        assert fake_gpu == []
        assert "a CUDA graph is captured: 1 kinds of convolutions are not tuned" in caplog.text

    def test_what_cannot_be_kept_is_not_measured(self, fake_gpu, monkeypatch, tmp_path, caplog):
        (tmp_path / "file").write_text("")
        monkeypatch.setenv(tables.CACHE_VARIABLE, str(tmp_path / "file"))
        compile_time.tune_while_compiling([TINY], self.CUDA)
        assert fake_gpu == []
        assert "cannot be written, so nothing is tuned" in caplog.text

    @pytest.mark.parametrize(
        ("mode", "own", "tunes"),
        [
            (None, {}, False),
            ("reduce-overhead", {}, False),
            ("max-autotune", {}, True),
            ("max-autotune-no-cudagraphs", {}, True),
            ("max-autotune", {"tune": False}, False),
            (None, {"tune": True}, True),
        ],
    )
    def test_the_mode_asks_for_it_and_an_option_decides(self, mode, own, tunes):
        assert inductor_options(mode, **own)[HOOK].options.tune is tunes

    def test_a_graph_gives_its_convolutions_of_one_size_with_and_without_their_bias(self):
        model = torch.nn.Sequential(torch.nn.Conv1d(4, 8, 3), torch.nn.ReLU(), torch.nn.Conv1d(8, 4, 5, bias=False))
        with torch.no_grad():
            recorder = record(model, (torch.randn(2, 4, 30),), {}, backward=False).recorder
        assert [(p.K, p.has_bias) for p in recorder.problems] == [(3, True), (3, False), (5, False)]


class TestCommand:
    SHAPE = ("--shape", "3x16x40", "--weight", "24x16x3", "--padding", "1")

    @pytest.fixture
    def fake_gpu(self, monkeypatch):
        monkeypatch.setattr(command, "_gpu", lambda: CPU)
        monkeypatch.setattr(dispatch, "device_for", lambda device: GPU)
        monkeypatch.setattr(laboratory, "Workers", lambda device, jobs: FakeLaboratory())

    def test_without_a_gpu_it_says_so(self):
        done = run_command("tune", *self.SHAPE)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr == "error: tuning measures a CUDA GPU, and PyTorch sees none here\n"

    def test_a_shape_goes_to_the_users_table_and_is_known_then(self, fake_gpu, capsys):
        assert cli.main(["tune", *self.SHAPE, "--jobs", "1"]) == 0
        assert "1 of 1 tuned, 0 failed; the table is " in capsys.readouterr().out
        (key,) = tables.read(tables.user_path(GPU.name))
        assert " i16/16 o32/8 " in key
        assert cli.main(["tune", *self.SHAPE, "--jobs", "1"]) == 0
        assert "0 of 1 tuned, 0 failed" in capsys.readouterr().out
        assert cli.main(["tune", *self.SHAPE, "--jobs", "1", "--force"]) == 0
        assert "1 of 1 tuned, 0 failed" in capsys.readouterr().out

    def test_output_names_another_table_and_json_is_all_of_standard_output(self, fake_gpu, tmp_path, capsys):
        path = tmp_path / "new" / "mine.json"
        assert cli.main(["tune", "--cases", "p01,p24", "--jobs", "1", "--output", str(path), "--json"]) == 0
        out, err = capsys.readouterr()
        outcomes = json.loads(out)
        assert [outcome["name"] for outcome in outcomes] == ["p01_pointwise", "p24_decode_depthwise"]
        assert tables.read(path).keys() == {outcome["key"] for outcome in outcomes}
        assert "2 of 2 tuned" in err
        assert tables.read(tables.user_path(GPU.name)) == {}

    def test_the_convolutions_of_a_model(self, fake_gpu, monkeypatch, tmp_path, capsys):
        (tmp_path / "tuned_models.py").write_text(
            "import torch\ndef build():\n    print('built')\n"
            "    return torch.nn.Conv1d(16, 24, 3, padding=1), (torch.randn(3, 16, 40),)\n"
        )
        monkeypatch.syspath_prepend(tmp_path)
        model = cli.load_model("tuned_models:build")
        args = cli._parser().parse_args(["tune", "--jobs", "1", "--model", "tuned_models:build"])
        assert command.main(args, model) == 0
        assert len(tables.read(tables.user_path(GPU.name))) == 2
        assert "2 of 2 tuned" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--shape", "3x16x40"], "--shape needs --weight"),
            (["--cases", "nothing"], "no case starts with 'nothing'"),
            (["--suite", "nowhere.json"], "cannot read the suite"),
            (["--jobs", "0"], "--jobs must be positive, got 0"),
        ],
    )
    def test_wrong_use_is_named(self, fake_gpu, arguments, message, capsys):
        assert cli.main(["tune", "--jobs", "1", *arguments]) == 2
        assert f"error: {message}" in capsys.readouterr().err

    def test_a_table_that_cannot_be_written_is_named_before_anything_is_measured(self, fake_gpu, tmp_path, capsys):
        (tmp_path / "file").write_text("")
        assert cli.main(["tune", *self.SHAPE, "--jobs", "1", "--output", str(tmp_path / "file" / "t.json")]) == 2
        assert "t.json cannot be written" in capsys.readouterr().err

    def test_a_failure_shows_in_the_exit_status(self, fake_gpu, monkeypatch, capsys):
        monkeypatch.setattr(laboratory, "Workers", lambda device, jobs: FakeLaboratory(fault=lambda plan: "it is wrong"))
        assert cli.main(["tune", *self.SHAPE, "--jobs", "1"]) == 1
        assert "failed no plan is right: it is wrong" in capsys.readouterr().out


class TestChannelsLastViews:
    CASES = tuple(case for case in testing.CASES if case.N and max(case.weight_shape) < 50)

    @pytest.mark.parametrize("layout", testing.LAYOUTS)
    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_aten_on_them_is_right_and_contiguous(self, case, layout):
        def run(x, weight, bias):
            plan = Plan("aten_nhwc", None, "asked")
            y = execute.forward_with(plan, case.problem(x, weight, bias), x, weight, bias)
            assert y.is_contiguous()
            return y

        with testing.float32_precision("ieee"):
            testing.check_case(case, run, torch.float32, layout)


def test_importing_the_tables_imports_neither_the_tuner_nor_triton():
    script = "import sys, torch_conv_triton.dispatch; print([m for m in sys.modules if m == 'triton' or 'tuning.t' in m])"
    done = python("-c", script)
    assert done.stdout == "['torch_conv_triton.tuning.tables']\n", done.stderr


class TestGradients:
    SHAPES = (
        case_from_shape("2x16x40", "24x16x3", padding=1),
        case_from_shape("2x16x41", "24x16x4", stride=2, dtype="bf16"),
        case_from_shape("2x16x40", "16x1x5", padding=2, groups=16, dtype="fp16"),
        case_from_shape("2x16x40", "3x16x3", layout="NLC"),
    )
    PROBLEMS = tuple(problem for case in SHAPES for problem in case.gradient_problems())

    @pytest.mark.parametrize("problem", PROBLEMS, ids=lambda problem: f"{problem.kind} {problem.describe()}")
    def test_proposals_are_right_and_the_rule_comes_first(self, problem):
        plans = search.plans(problem, INTERPRETER)
        assert plans[0] == dispatch_gradients.plan_by_rule(problem, INTERPRETER)
        assert len({(plan.kernel, plan.config) for plan in plans}) == len(plans) <= 70
        kernels = {plan.kernel for plan in plans}
        assert {plan.kernel for plan in dispatch_gradients.candidates(problem, INTERPRETER)} <= kernels
        assert kernels >= {"aten", "aten_nhwc"}
        searched = [plan for plan in plans if plan.reason == "searched"]
        # aten's ways come last
        for plan in (*searched[:-2:12], *searched[-2:]):
            assert dispatch_gradients.plan_refusal(plan, problem, INTERPRETER) is None
            assert trial.check(problem, plan, CPU) is None, plan

    def test_what_was_found_runs_from_then_on_and_only_for_that_gradient(self):
        for_input, for_weight = self.PROBLEMS[:2]
        path = tables.user_path(GPU.name)
        wanted = {p: search.plans(p, GPU)[3] for p in (for_input, for_weight)}
        fake = FakeLaboratory(time=lambda plan: 0.5 if plan in wanted.values() else 1.0)
        outcomes = list(tune([("input", for_input), ("weight", for_weight)], GPU, path, fake))
        assert [outcome.status for outcome in outcomes] == ["tuned", "tuned"]
        assert [tables.key(p).partition(" ")[0] for p in (for_input, for_weight)] == ["input_grad", "weight_grad"]
        for tried, plan in wanted.items():
            planned = dispatch_gradients.plan_input_grad if tried is for_input else dispatch_gradients.plan_weight_grad
            found = planned(tried, GPU)
            assert (found.kernel, found.config, found.tuned) == (plan.kernel, plan.config, True)
            assert found.reason == "tuned: 0.5 ms, aten 1"

    def test_the_layout_of_the_gradient_counts_for_the_weight(self):
        problem = self.PROBLEMS[1]
        assert tables.key(replace(problem, y_strides=(problem.C_out * problem.L_out, 1, problem.C_out))) != tables.key(problem)

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            ({"splits": 10**6}, "workspace"),
            ({"BLOCK_C": 8}, "below 16"),
            ({"BLOCK_O": 256, "BLOCK_C": 256}, "registers"),
            ({"BLOCK_L": 2048}, "shared memory"),
        ],
    )
    def test_what_a_kernel_cannot_have_is_refused(self, change, reason):
        problem = self.PROBLEMS[1]
        (plan,) = (p for p in dispatch_gradients.candidates(problem, GPU) if p.kernel == "weight_grad")
        assert reason in dispatch_gradients.plan_refusal(replace(plan, config=replace(plan.config, **change)), problem, GPU)

    def test_the_command_tunes_both_gradients(self, monkeypatch, capsys):
        monkeypatch.setattr(command, "_gpu", lambda: CPU)
        monkeypatch.setattr(dispatch, "device_for", lambda device: GPU)
        monkeypatch.setattr(laboratory, "Workers", lambda device, jobs: FakeLaboratory())
        assert cli.main(["tune", "--backward", "--shape", "3x16x40", "--weight", "24x16x3", "--jobs", "1"]) == 0
        assert "2 of 2 tuned" in capsys.readouterr().out
        assert {key.partition(" ")[0] for key in tables.read(tables.user_path(GPU.name))} == {"input_grad", "weight_grad"}
        args = cli._parser().parse_args(["tune", "--backward", "--jobs", "1", "--model", "a:b"])
        assert command.main(args, (None, (), {})) == 2
        assert "--backward tunes the gradients of single convolutions" in capsys.readouterr().err
