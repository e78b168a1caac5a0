"""Finds the fastest right plan of each problem and writes it to a table: search, check in parallel, time, choose, store."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch_conv_triton import chain, dispatch, execute, fused, gradients
from torch_conv_triton.bench.progress import track
from torch_conv_triton.bench.worker import WorkerError
from torch_conv_triton.configs import Device
from torch_conv_triton.dispatch import Plan
from torch_conv_triton.problem import Conv1dProblem
from torch_conv_triton.tuning import search, tables
from torch_conv_triton.tuning.laboratory import Laboratory
from torch_conv_triton.tuning.tables import Entry

# less is noise
TIE = 1.02
# problems whose plans are checked together: enough to keep all processes busy, and little to lose when interrupted
BATCH = 8

Named = tuple[str, Conv1dProblem]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What tuning one problem came to.

    `status` is "tuned", "known" (the table has an entry for problems like it), "kept" (no kernel of ours computes it) or
    "failed"; `message` says why where there is no entry. `tried` counts the plans, `wrong` has those that are not right, and why.
    """

    name: str
    problem: Conv1dProblem
    status: str
    entry: Entry | None = None
    message: str = ""
    tried: int = 0
    wrong: tuple[tuple[Plan, str], ...] = ()

    def __str__(self) -> str:
        line = f"{self.name:<24} {self.problem.describe():<44} {self.status:<6} "
        if self.entry is None:
            return line + self.message
        ratio = f" ({self.entry.aten_ms / self.entry.ms:.2f}x)" if self.entry.aten_ms else ""
        aten = f", aten {self.entry.aten_ms:.4f}{ratio}" if self.entry.aten_ms else ""
        counts = f"; {self.tried} plans" + (f", {len(self.wrong)} wrong" if self.wrong else "") if self.tried else ""
        config = f" {self.entry.config}" if self.entry.config else ""
        return f"{line}{self.entry.ms:.4f} ms{aten}  {self.entry.kernel}{config}{counts}"

    def to_dict(self) -> dict[str, Any]:
        """The outcome as data that `json` can write."""
        return {
            "name": self.name,
            "convolution": self.problem.describe(),
            "key": tables.key(self.problem),
            "status": self.status,
            "entry": None if self.entry is None else self.entry.to_record(),
            "message": self.message,
            "tried": self.tried,
            "wrong": [f"{plan.kernel} {plan.config}: {why}" for plan, why in self.wrong],
        }


def tune(
    problems: Sequence[Named], device: Device, path: Path, laboratory: Laboratory, *, force: bool = False
) -> Iterator[Outcome]:
    """Tune each problem that the table at `path` has no entry for, or all with `force`; yields the outcome of each in order.

    An entry is written as soon as it is found, so that a run that was interrupted goes on where it was. Raises OSError where the
    table cannot be written, and ValueError where the file is no table.
    """
    known: dict[str, Entry | None] = {} if force else dict(tables.parse(tables.read(path)))
    todo: list[Named] = []
    for name, problem in problems:
        key = tables.key(problem)
        refusal = dispatch.refusal(problem)
        if refusal:
            yield Outcome(name, problem, "kept", message=refusal)
        elif key in known:
            yield Outcome(name, problem, "known", known[key], message="" if known[key] else "like one before it")
        else:
            known[key] = None
            todo.append((name, problem))
    checked = _checked(todo, device, laboratory)
    for name, problem in track(todo, [f"tuning {name}" for name, _ in todo]):
        plans, wrong = next(checked)
        outcome = _timed(name, problem, plans, wrong, laboratory)
        if outcome.entry is not None:
            tables.store(path, device.name, {tables.key(problem): outcome.entry})
            tables.forget()
            execute.forget_plans()
            gradients.forget_plans()
            fused.forget_plans()
            chain.forget_plans()
        yield outcome


def _checked(
    problems: Sequence[Named], device: Device, laboratory: Laboratory
) -> Iterator[tuple[tuple[Plan, ...], tuple[tuple[Plan, str], ...]]]:
    """Of each problem the plans that are right, and the others with what is wrong."""
    for start in range(0, len(problems), BATCH):
        batch = [(problem, search.plans(problem, device)) for _, problem in problems[start : start + BATCH]]
        faults = iter(laboratory.check([(problem, plan) for problem, plans in batch for plan in plans]))
        for _, plans in batch:
            found = [(plan, next(faults)) for plan in plans]
            right = tuple(plan for plan, fault in found if fault is None)
            yield right, tuple((plan, fault) for plan, fault in found if fault is not None)


def _timed(
    name: str, problem: Conv1dProblem, plans: tuple[Plan, ...], wrong: tuple[tuple[Plan, str], ...], laboratory: Laboratory
) -> Outcome:
    tried = len(plans) + len(wrong)
    if not plans:
        return Outcome(name, problem, "failed", message=f"no plan is right: {wrong[0][1]}", tried=tried, wrong=wrong)
    try:
        times = laboratory.measure(problem, plans)
    except WorkerError as error:
        return Outcome(name, problem, "failed", message=str(error), tried=tried, wrong=wrong)
    if not times:
        return Outcome(name, problem, "failed", message="no plan runs at full size", tried=tried, wrong=wrong)
    place = choose(plans, times)
    aten = next((times[i] for i, plan in enumerate(plans) if plan.kernel == "aten" and i in times), None)
    entry = Entry(plans[place].kernel, plans[place].config, times[place], aten)
    return Outcome(name, problem, "tuned", entry, tried=tried, wrong=wrong)


def choose(plans: Sequence[Plan], times: Mapping[int, float]) -> int:
    """The place of the plan to run, of those with a time in ms; of plans that tie, the first.

    The plan by rule comes first among `plans`, so it is left only for a gain that is no noise; likewise our kernels for aten,
    and plain aten for its other way.
    """
    groups = (
        [i for i in sorted(times) if not plans[i].is_aten],
        [i for i in sorted(times) if plans[i].kernel == "aten"],
        [i for i in sorted(times) if plans[i].is_aten and plans[i].kernel != "aten"],
    )
    chosen, best = -1, math.inf
    for group in filter(None, groups):
        fastest = min(times[i] for i in group)
        if fastest * TIE < best:
            chosen, best = next(i for i in group if times[i] <= fastest * TIE), fastest
    return chosen
