"""Where the kernels run: in Triton's interpreter on the CPU, or on the GPU where ``pytest -m gpu`` asks for it."""

import os
import tempfile

import pytest
import torch


def _on_gpu(config: pytest.Config) -> bool:
    return config.option.markexpr == "gpu" and torch.cuda.is_available()


def pytest_configure(config: pytest.Config) -> None:
    # what the person who runs the tests has tuned is not what they are about, and neither is tuning while models compile
    os.environ["TORCH_CONV_TRITON_CACHE"] = os.path.join(tempfile.gettempdir(), f"torch_conv_triton-tests-{os.getpid()}")
    os.environ["TORCH_CONV_TRITON_NO_TUNE"] = "1"
    # Triton decides when a kernel is loaded, so it is one or the other for the whole run
    if not _on_gpu(config):
        os.environ["TRITON_INTERPRET"] = "1"
        from interpreter import make_faster

        make_faster()
        # tests run side by side, on tensors that are not worth sharing
        torch.set_num_threads(1)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not _on_gpu(config):
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU and -m gpu"))
