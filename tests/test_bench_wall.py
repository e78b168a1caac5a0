"""Wall times of small convolutions, without a GPU: what is called, what is said of it, and the command."""

import json

import pytest
import torch
from test_bench_run import arguments, suite_result
from torch import nn

import torch_conv_triton
from torch_conv_triton.bench import command, measure, wall
from torch_conv_triton.bench.wall import OURS, PYTORCH, WallResult, build, depths, eager_call, small_cases, wall_header, wall_line


def result(status="ok", ours=10.0, **fields):
    us = {OURS: ours, PYTORCH: 20.0} if status == "ok" else {}
    return WallResult("small", 1, "fp32", "eager", status, us=us, errors={OURS: 3e-4, PYTORCH: 2e-4}, kernels="dense", **fields)


class TestModels:
    def test_layers_follow_each_other_where_shapes_allow(self):
        assert {case.name[:5]: depths(case) for case in small_cases()} == {
            "small": (1, 4),
            "tiny": (1, 4),
            "p12_t": (1,),
            "p24_d": (1,),
        }

    @pytest.mark.parametrize("layers", [1, 4])
    def test_functions_compute_what_the_model_does(self, layers):
        tiny = small_cases()[1]
        model, x = build(tiny, layers, "cpu")
        again, same = build(tiny, layers, "cpu")
        assert torch.equal(x, same) and torch.equal(model(x), again(x))
        assert [type(m) for m in model] == ([nn.Conv1d] if layers == 1 else [nn.Conv1d, nn.ReLU] * layers)
        assert torch.equal(eager_call(model, x, nn.functional.conv1d)(), model(x))

    def test_the_input_has_the_cases_strides_and_the_model_its_geometry(self):
        token = small_cases()[3]
        model, x = build(token, 1, "cpu")
        assert (x.stride(), x.dtype) == (token.x_stride, torch.bfloat16)
        assert model(x).shape == (64, 5376, 2)


class TestMeasuring:
    def test_a_call_s_time_is_a_part_of_many_in_a_row(self, monkeypatch):
        counts = {OURS: 0, PYTORCH: 0}

        def wall_ms(call, ms):
            assert ms == 10
            before = sum(counts.values())
            call()
            return 0.1 * (sum(counts.values()) - before)

        def count(who):
            counts[who] += 1

        monkeypatch.setattr(wall, "wall_ms", wall_ms)
        found = wall.call_us({who: lambda who=who: count(who) for who in counts}, rounds=3, ms=30)
        assert counts == {OURS: 3 * wall.CALLS_IN_A_ROW, PYTORCH: 3 * wall.CALLS_IN_A_ROW}
        assert found == {OURS: pytest.approx(100), PYTORCH: pytest.approx(100)}

    @pytest.mark.parametrize(("added", "status"), [(0.0, "ok"), (0.1, "wrong"), (float("nan"), "wrong")])
    def test_only_what_is_right_is_timed(self, monkeypatch, added, status):
        monkeypatch.setattr(wall, "build", lambda case, layers, device: build(case, layers, "cpu"))
        monkeypatch.setattr(wall, "wall_ms", lambda call, ms: 1.0)
        monkeypatch.setattr(torch_conv_triton, "conv1d", lambda *args, **kwargs: nn.functional.conv1d(*args, **kwargs) + added)
        found = wall.measure_wall(small_cases()[1], 1, "eager", rounds=1, ms=1)
        assert (found.status, found.kernels, bool(found.us)) == (status, "dense", status == "ok")
        assert found.errors[PYTORCH] < 1e-6 and ("relative error" in found.message) == (status == "wrong")

    def test_a_line_stands_under_its_heading_and_shows_the_ratio(self):
        line = wall_line(result())
        assert "10.0" in line and "20.0" in line and "2.00x" in line
        assert len(wall_header().split("  errors")[0]) == len(line.split("  3.0e-04")[0])

    def test_a_wrong_result_has_no_ratio(self):
        wrong = result("wrong", message="relative error 1.00e+00")
        assert wrong.ratio is None
        assert wall_line(wrong).endswith("WRONG: relative error 1.00e+00  dense")


@pytest.fixture
def measured(monkeypatch):
    """A GPU's answers: p24 cannot be captured, and the tiny ones are wrong in eager mode."""

    def measure_wall(case, layers, mode, **options):
        if case.name.startswith("p24") and mode == "cuda graph":
            raise RuntimeError("capture failed")
        status = "wrong" if case.name == "tiny" and mode == "eager" else "ok"
        us = {OURS: 10.0, PYTORCH: 20.0} if status == "ok" else {}
        return WallResult(case.name, layers, case.dtype, mode, status, us=us, errors={OURS: 0.0, PYTORCH: 0.0})

    machine = {name: text for name, text in suite_result().machine.items() if name != "commit"}
    monkeypatch.setattr(wall, "require_gpu", lambda: None)
    monkeypatch.setattr(measure, "describe_machine", lambda: machine)
    monkeypatch.setattr(wall, "measure_wall", measure_wall)


class TestCommand:
    @pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
    def test_without_a_gpu_says_so(self, capsys):
        assert command.main(arguments("--wall")) == 2
        assert "measures a CUDA GPU, and PyTorch sees none" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            (("--backward",), "--backward has no meaning with --wall"),
            (("--plot", "p.png"), "--plot has no meaning with --wall"),
            (("--train",), "--train has a meaning with --models only"),
            (("--cases", "p99"), "there are small, tiny, p12_tinyCin, p24_decode_depthwise"),
        ],
    )
    def test_wrong_use_is_told(self, argv, message, capsys):
        assert command.main(arguments("--wall", *argv)) == 2
        assert message in capsys.readouterr().err

    def test_every_mode_of_every_depth_is_measured_and_written(self, measured, tmp_path, capsys):
        path = tmp_path / "wall.json"
        assert command.main(arguments("--wall", "--cases", "small,p12", "--no-isolate", "--json", str(path))) == 0
        record = json.loads(path.read_text())
        found = [(row["name"], row["layers"], row["mode"], row["ratio"]) for row in record["wall"]]
        models = [("small", 1), ("small", 4), ("p12_tinyCin", 1)]
        assert found == [(*model, mode, 2.0) for model in models for mode in wall.MODES]
        assert record["machine"]["gpu"] == "GPU" and record["options"]["calls_in_a_row"] == wall.CALLS_IN_A_ROW
        assert capsys.readouterr().out.count("2.00x") == len(found)

    def test_a_wrong_and_a_failed_one_lose_no_other(self, measured, tmp_path):
        path = tmp_path / "wall.json"
        argv = ("--wall", "--cases", "tiny,p24", "--dtype", "fp16", "--no-isolate", "--json", str(path))
        assert command.main(arguments(*argv)) == 1
        rows = json.loads(path.read_text())["wall"]
        assert {row["dtype"] for row in rows} == {"fp16"}
        odd = {(row["name"], row["mode"]): (row["status"], row["message"], row["ratio"]) for row in rows if row["status"] != "ok"}
        assert odd == {
            ("tiny", "eager"): ("wrong", "", None),
            ("p24_decode_depthwise", "cuda graph"): ("failed", "RuntimeError: capture failed", None),
        }
        assert len(rows) == 12
