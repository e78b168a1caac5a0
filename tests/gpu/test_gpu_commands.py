"""The demo, the doctor and the examples on a GPU."""

import json

import pytest
from commands import command, python
from test_examples import LAST_LINES

pytestmark = pytest.mark.gpu


def test_doctor():
    done = command("doctor", "--json", gpu=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert {check["name"]: check["status"] for check in json.loads(done.stdout)}["GPU"] == "ok"


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_demo_is_right_and_times_all_three(dtype):
    done = command("demo", "--dtype", dtype, "--json", gpu=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout)
    assert result["passed"]
    assert {name: type(ms) for name, ms in result["times_ms"].items()} == dict.fromkeys(
        ("eager", "torch.compile", "triton_conv"), float
    )


@pytest.mark.parametrize("example", LAST_LINES)
def test_example(example):
    if example == "transformers_model":
        pytest.importorskip("transformers", reason="the example compiles a model of transformers (the test extra has it)")
    done = python(f"examples/{example}.py", gpu=True)
    assert done.returncode == 0, done.stderr
