"""Heuristic configs fit every supported GPU: compiled for it, they keep within its memory and registers and use tensor cores."""

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton
from cross_compile import LOCAL_MEMORY_GFX942, SHARED_MEMORY
from cross_compiled_workloads import H200, WORKLOADS, targets

from torch_conv_triton import dispatch
from torch_conv_triton.tuning import tables

# bytes a thread: a few registers parked outside the inner loop cost nothing; triton 3.6 parks 168 bytes of weight_grad_rows
SPILL_LIMIT = 176 if triton.__version__.startswith("3.6") else 128
ON_CUDA_CORES = (
    "dense_few_inputs",
    "dense_few_outputs",
    "depthwise",
    "depthwise_short",
    "depthwise_skewed",
    "depthwise_sliding",
    "depthwise_vector",
    "weight_grad_depthwise",
    "weight_grad_sliding",
)


PROCESSES = 2


def compiled(what: str, folder: Path) -> dict:
    """What the program of this name prints; for all workers of a test run, which share the folder, it runs once."""
    script, result = Path(__file__).with_name("cross_compiled_workloads.py"), folder / f"{what}.json"
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    with open(folder / f"{what}.lock", "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not result.exists():
            commands = [[sys.executable, script, what, str(part), str(PROCESSES)] for part in range(PROCESSES)]
            running = [subprocess.Popen(c, env=environment, stdout=subprocess.PIPE, text=True) for c in commands]
            printed = [process.communicate()[0] for process in running]
            assert not any(process.returncode for process in running)
            result.write_text(json.dumps({name: rows for part in printed for name, rows in json.loads(part).items()}))
    return json.loads(result.read_text())


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session")
def plans(folder):
    return compiled("heuristics", folder)


@pytest.fixture(scope="session")
def plans_on_amd(folder):
    return compiled("gfx942", folder)


def check_resources(rows: list[dict], shared_memory: int) -> None:
    assert rows
    for row in rows:
        for kernel in row["compiled"]:
            assert kernel["shared"] <= shared_memory, (row["plan"], kernel)
            assert kernel["spills"] <= SPILL_LIMIT, (row["plan"], kernel)
        if row["kernel"] not in ON_CUDA_CORES:
            assert row["compiled"][-1]["tensor_core_ops"] > 0, row


@pytest.mark.parametrize(("workload", "capability"), [(w, c) for w in WORKLOADS for c in targets(w)], ids=str)
def test_kernels_fit_the_gpu(plans, workload, capability):
    check_resources(plans[str(workload)][str(capability)], SHARED_MEMORY[capability])


@pytest.mark.parametrize("workload", [w for w in WORKLOADS if len(targets(w)) > 3], ids=str)
def test_kernels_compile_for_amd_too(plans_on_amd, workload):
    check_resources(plans_on_amd[str(workload)], LOCAL_MEMORY_GFX942)


def test_every_entry_of_the_shipped_table_fits_the_gpu_it_was_tuned_on(folder):
    rows = compiled("tables", folder)
    # an entry that no case of the suite has would go unchecked
    assert rows.keys() == tables.parse(tables.read(tables.shipped_path(H200.name))).keys()
    for found in rows.values():
        if found[0]["kernel"] not in dispatch.ATEN:
            check_resources(found, H200.shared_memory)


def test_tensor_descriptors_are_block_copies_from_hopper_on(plans):
    kernels = {c: [row["kernel"] for row in plans["seed_bf16_nlc"][str(c)]] for c in SHARED_MEMORY}
    assert {c for c, names in kernels.items() if "dense_tma" in names} == {90, 100, 120}
