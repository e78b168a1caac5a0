"""Runs Python in a fresh process, as a person would at a prompt."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def python(*arguments: str, gpu: bool = False, **environment: str) -> subprocess.CompletedProcess:
    """Run ``python ARGUMENTS`` at the repository's root: on the CPU, as if there were no GPU, or on the GPU."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    hidden = {} if gpu else {"CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=inherited | hidden | environment, capture_output=True, text=True, timeout=600
    )


def command(*arguments: str, **options) -> subprocess.CompletedProcess:
    """Run ``torch-conv-triton ARGUMENTS``."""
    return python("-m", "torch_conv_triton", *arguments, **options)
