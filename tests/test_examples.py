"""Every example runs: here in the interpreter, on a GPU in tests/gpu."""

import pytest
from commands import ROOT, python

LAST_LINES = {
    "by_hand": "one graph under torch.compile: as eager",
    "seed_model": "equal to nn.Conv1d within TF32's rounding",
    "training": "eager, on cpu",
    "transformers_model": "against float64",
}


def test_all_are_here():
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == LAST_LINES.keys()


@pytest.mark.parametrize("example", LAST_LINES)
def test_example(example):
    if example == "transformers_model":
        pytest.importorskip("transformers", reason="the example compiles a model of transformers (the test extra has it)")
    done = python(f"examples/{example}.py", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    assert LAST_LINES[example] in done.stdout.splitlines()[-1]


def test_the_transformers_example_says_what_is_missing(tmp_path):
    (tmp_path / "transformers.py").write_text("raise ImportError")
    done = python("examples/transformers_model.py", PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr == "this example compiles a model of transformers: pip install transformers\n"


def test_the_transformers_example_can_be_explained_from_the_command_line():
    pytest.importorskip("transformers", reason="the example compiles a model of transformers (the test extra has it)")
    done = python("-m", "torch_conv_triton", "explain", "examples.transformers_model:build", TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    assert "3 1-D convolutions and 0 gradients: 3 rewritten, 0 kept" in done.stdout
