"""The processes that try plans on a GPU: many that check at once, and one at a time that measures while the others wait."""

from __future__ import annotations

import os
import queue
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import torch

from torch_conv_triton.bench.worker import Worker, WorkerError
from torch_conv_triton.dispatch import Plan
from torch_conv_triton.problem import Conv1dProblem
from torch_conv_triton.tuning import trial

# for the compilation and check of a plan, or the timing of all of a problem
TIMEOUT_S = 300.0
# of the GPU's memory, for a process with its context and the tensors of a check
BYTES_PER_JOB = 3 * 2**30


class Laboratory(Protocol):
    """Where plans are tried."""

    def check(self, trials: Sequence[tuple[Conv1dProblem, Plan]]) -> list[str | None]:
        """Of each plan what is wrong with it on its problem, or None."""

    def measure(self, problem: Conv1dProblem, plans: Sequence[Plan]) -> Mapping[int, float]:
        """Times in ms of the plans, by their places, that may be the fastest. Raises WorkerError."""


def default_jobs() -> int:
    """Processes that the processor cores and the GPU's memory are enough for."""
    memory = torch.cuda.get_device_properties().total_memory
    return max(1, min(len(os.sched_getaffinity(0)), memory // BYTES_PER_JOB, 32))


class Workers:
    """A laboratory on a CUDA device, with `jobs` child processes. A plan that kills one is at fault, and the others go on."""

    def __init__(self, device: torch.device, jobs: int) -> None:
        self._device = device
        self._workers = [Worker(TIMEOUT_S) for _ in range(jobs)]
        self._idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            worker.close()

    def check(self, trials: Sequence[tuple[Conv1dProblem, Plan]]) -> list[str | None]:
        with ThreadPoolExecutor(len(self._workers)) as threads:
            return list(threads.map(self._check, trials))

    def measure(self, problem: Conv1dProblem, plans: Sequence[Plan]) -> Mapping[int, float]:
        # always the same one: it keeps what it times with
        return self._workers[0].call(trial.measure, problem, plans, self._device)

    def _check(self, one: tuple[Conv1dProblem, Plan]) -> str | None:
        worker = self._idle.get()
        try:
            return worker.call(trial.check, *one, self._device)
        except WorkerError as error:
            return str(error)
        finally:
            self._idle.put(worker)
