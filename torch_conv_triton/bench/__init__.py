"""The benchmark: a suite of real convolutions and whole models, beside what else PyTorch offers. Needs the `bench` extra."""

from torch_conv_triton.bench.model_run import run_models
from torch_conv_triton.bench.run import run_suite
from torch_conv_triton.bench.suite import Case, load_suite
from torch_conv_triton.bench.wall import run_wall

__all__ = ["Case", "load_suite", "run_models", "run_suite", "run_wall"]
