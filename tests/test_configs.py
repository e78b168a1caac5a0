"""Heuristic configs fit every supported GPU: compiled for it, they keep within its memory and registers and use tensor cores."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from cross_compile import SHARED_MEMORY
from cross_compiled_workloads import WORKLOADS

# bytes a thread: a few registers parked outside the inner loop cost nothing
SPILL_LIMIT = 128
ON_CUDA_CORES = ("depthwise", "depthwise_sliding", "depthwise_vector", "weight_grad_depthwise")


@pytest.fixture(scope="module")
def plans():
    script = Path(__file__).with_name("cross_compiled_workloads.py")
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    result = subprocess.run([sys.executable, script], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(result.stdout)


@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("workload", WORKLOADS, ids=str)
def test_kernels_fit_the_gpu(plans, workload, capability):
    rows = plans[str(workload)][str(capability)]
    assert rows
    for row in rows:
        for kernel in row["compiled"]:
            assert kernel["shared"] <= SHARED_MEMORY[capability], (row["plan"], kernel)
            assert kernel["spills"] <= SPILL_LIMIT, (row["plan"], kernel)
        if row["kernel"] not in ON_CUDA_CORES:
            assert row["compiled"][-1]["tensor_core_ops"] > 0, row


def test_tensor_descriptors_are_block_copies_from_hopper_on(plans):
    kernels = {c: [row["kernel"] for row in plans["seed_bf16_nlc"][str(c)]] for c in SHARED_MEMORY}
    assert {c for c, names in kernels.items() if "dense_tma" in names} == {90, 100, 120}
