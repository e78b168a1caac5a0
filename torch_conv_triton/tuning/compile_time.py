"""Tuning while a model is compiled, for ``mode="max-autotune"``: the convolutions of a graph that no table knows."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

import torch

from torch_conv_triton import dispatch
from torch_conv_triton.problem import Conv1dProblem
from torch_conv_triton.tuning import tables
from torch_conv_triton.tuning.laboratory import Workers, default_jobs
from torch_conv_triton.tuning.tuner import tune

log = logging.getLogger(__name__)

OFF_VARIABLE = "TORCH_CONV_TRITON_NO_TUNE"


def tune_while_compiling(problems: Sequence[Conv1dProblem], device: torch.device) -> None:
    """Tune the problems that no table knows, into the user's table. What goes wrong is logged, and the rules decide.

    Nothing happens without a GPU of ours, while a CUDA graph is captured, or where ``TORCH_CONV_TRITON_NO_TUNE`` is set.
    """
    gpu = dispatch.device_for(device)
    if device.type != "cuda" or gpu is None or os.environ.get(OFF_VARIABLE, "0") not in ("", "0"):
        return
    unknown = {
        tables.key(problem): problem
        for problem in problems
        if not dispatch.refusal(problem) and tables.lookup(problem, gpu) is None
    }
    if not unknown:
        return
    if torch.cuda.is_current_stream_capturing():
        log.warning("a CUDA graph is captured: %d kinds of convolutions are not tuned", len(unknown))
        return
    path, jobs = tables.user_path(gpu.name), default_jobs()
    log.info("tuning %d kinds of convolutions in %d processes, into %s", len(unknown), jobs, path)
    try:
        # so that nothing is measured that cannot be kept
        tables.store(path, gpu.name, {})
        with Workers(device, jobs) as laboratory:
            for outcome in tune([(problem.regime, problem) for problem in unknown.values()], gpu, path, laboratory):
                log.log(logging.WARNING if outcome.status == "failed" else logging.INFO, "%s", outcome)
    except OSError as error:
        log.warning("the table %s cannot be written, so nothing is tuned: %s", path, error)
