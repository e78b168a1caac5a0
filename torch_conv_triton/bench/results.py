"""What a run of the benchmark found: typed results, geometric means over them, and their JSON."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch_conv_triton.bench.errors import BenchError
from torch_conv_triton.bench.peers import COUNTED_PEERS
from torch_conv_triton.bench.suite import Case
from torch_conv_triton.bench.timing import Timing

FORMAT = 2
# one element may be this many times worse than the whole: a few wrong ones do not show in a norm over many
WORST_ELEMENT = 10


@dataclass(frozen=True, slots=True)
class Errors:
    """How far from float64: relative Frobenius error as a `whole`, and the `worst` element's error over (rms + its value)."""

    whole: float
    worst: float


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Errors of ours and of cuDNN against float64, the budget for ours as a whole, and how much was compared."""

    ours: Errors
    cudnn: Errors
    budget: float
    compared: str

    @property
    def passed(self) -> bool:
        # false for NaN
        return self.ours.whole <= self.budget and self.ours.worst <= WORST_ELEMENT * self.budget


@dataclass(frozen=True, slots=True)
class CaseResult:
    """One case: what ran, how right, how fast. Times are in ms; a peer that failed has the error's text for a timing.

    `memory_mib`: the most memory that a call of "ours" and of "cudnn" takes, with its result.
    `status` is "ok", "wrong" (then nothing was timed) or "failed"; `message` says why for the last two.
    """

    name: str
    family: str
    regime: str
    weight: float
    problem: str
    dtype: str
    layout: str
    status: str
    message: str = ""
    kernel: str = ""
    config: str = ""
    reason: str = ""
    floor_ms: float | None = None
    accuracy: Accuracy | None = None
    ours: Timing | None = None
    peers: dict[str, Timing | str] = field(default_factory=dict)
    memory_mib: dict[str, float] = field(default_factory=dict)

    @classmethod
    def failure(cls, case: Case, message: str) -> CaseResult:
        return cls.of(case, status="failed", message=message)

    @classmethod
    def of(cls, case: Case, **found: object) -> CaseResult:
        problem = case.problem()
        described = {"problem": problem.describe(), "dtype": case.dtype, "layout": problem.layout}
        return cls(case.name, case.family, case.regime, case.weight, **described, **found)

    @property
    def share(self) -> float | None:
        """Share of the floor that ours reaches: 1 is the speed of the memory or of the matrix units."""
        return self.floor_ms / self.ours.median_ms if self.ours and self.floor_ms else None

    def peer_ms(self, peer: str) -> float | None:
        """A peer's time; "best" is the fastest that counts."""
        if peer == "best":
            return min((ms for name in COUNTED_PEERS if (ms := self.peer_ms(name))), default=None)
        timing = self.peers.get(peer)
        return timing.median_ms if isinstance(timing, Timing) else None

    def speedup(self, peer: str) -> float | None:
        """A peer's time over ours: above 1, ours is faster."""
        ms = self.peer_ms(peer)
        return ms / self.ours.median_ms if self.ours and ms else None


@dataclass(frozen=True, slots=True)
class SuiteResult:
    """A whole run: `machine` (GPU, versions, commit, date, command), `options`, `ceilings` (rates of the GPU) and every case."""

    machine: dict[str, str]
    options: dict[str, object]
    ceilings: dict[str, float]
    cases: tuple[CaseResult, ...]

    @property
    def passed(self) -> bool:
        return bool(self.cases) and all(case.status == "ok" for case in self.cases)

    def peer_names(self) -> tuple[str, ...]:
        """The peers that any case was measured against, in the order of measurement."""
        return tuple(dict.fromkeys(name for case in self.cases for name in case.peers))


@dataclass(frozen=True, slots=True)
class Summary:
    """Geometric means over one group of cases: share of the floor, and speed-up over each peer and over the best of each case."""

    group: str
    cases: int
    share: float | None
    speedups: dict[str, float | None]
    slowest: str
    slowest_speedup: float | None


def geometric_mean(values: Iterable[float], weights: Iterable[float] | None = None) -> float | None:
    """Geometric mean of positive values; one of weight 0 does not count. None if nothing counts."""
    values = list(values)
    weights = [1.0] * len(values) if weights is None else list(weights)
    total = sum(weights)
    if not total:
        return None
    return math.exp(sum(w * math.log(v) for v, w in zip(values, weights, strict=True)) / total)


def summarize(result: SuiteResult) -> list[Summary]:
    """Geometric means over all correct cases and over each group of them: family, by weight, layout, dtype and regime."""
    done = [case for case in result.cases if case.status == "ok"]
    groups: dict[str, list[CaseResult]] = {"all": done}
    for attribute in ("family", "layout", "dtype", "regime"):
        for case in done:
            groups.setdefault(f"{attribute} {getattr(case, attribute)}", []).append(case)
    peers = (*result.peer_names(), "best")
    summaries = [_summary(group, members, peers, None) for group, members in groups.items()]
    if any(case.weight for case in done):
        summaries.insert(1, _summary("by weight", [case for case in done if case.weight], peers, lambda case: case.weight))
    return summaries


def _summary(
    group: str, cases: Sequence[CaseResult], peers: Iterable[str], weight: Callable[[CaseResult], float] | None
) -> Summary:
    def mean(value: Callable[[CaseResult], float | None]) -> float | None:
        counted = [(v, weight(case) if weight else 1.0) for case in cases if (v := value(case))]
        return geometric_mean([v for v, _ in counted], [w for _, w in counted])

    slowest = min((case for case in cases if case.speedup("best")), key=lambda case: case.speedup("best"), default=None)
    return Summary(
        group,
        len(cases),
        mean(lambda case: case.share),
        {peer: mean(lambda case, peer=peer: case.speedup(peer)) for peer in peers},
        slowest.name if slowest else "",
        slowest.speedup("best") if slowest else None,
    )


def write_json(path: str | Path, content: object) -> None:
    """Replace `path` by this content in one step, so that a run that is stopped leaves the last whole file."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    partial.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(partial, path)


def save(result: SuiteResult, path: str | Path) -> None:
    """Write a run as JSON, with each case's speed-ups and the geometric means for those who read it without this package."""
    record = asdict(result)
    for case, entry in zip(result.cases, record["cases"], strict=True):
        entry["share"] = case.share
        entry["speedups"] = {peer: case.speedup(peer) for peer in (*case.peers, "best")}
    write_json(path, {"format": FORMAT, **record, "summary": [asdict(summary) for summary in summarize(result)]})


def load(path: str | Path) -> SuiteResult:
    """Read what `save` wrote. Raises BenchError for anything else."""
    try:
        record = json.loads(Path(path).read_text())
        if "models" in record:
            raise ValueError("results of whole models, which are not merged or plotted")
        if record["format"] != FORMAT:
            raise ValueError(f"format {record['format']}, but this version reads {FORMAT}")
        cases = tuple(_case_from_record(case) for case in record["cases"])
        return SuiteResult(record["machine"], record["options"], record["ceilings"], cases)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise BenchError(f"{path} does not hold results of the benchmark: {error!r}") from error


def merge(results: Sequence[SuiteResult]) -> SuiteResult:
    """Runs of parts of a suite as one; of a case measured twice, the later counts. Raises BenchError for unlike ones."""
    first = results[0]
    for other in results[1:]:
        for key in ("gpu", "torch", "triton", "commit"):
            if other.machine.get(key) != first.machine.get(key):
                raise BenchError(f"runs with {key} {first.machine.get(key)} and {other.machine.get(key)} do not make one result")
        if other.options.get("backward") != first.options.get("backward"):
            raise BenchError("forward and backward runs do not make one result")
    cases = {case.name: case for result in results for case in result.cases}
    return SuiteResult(results[-1].machine, results[-1].options, results[-1].ceilings, tuple(cases.values()))


def _case_from_record(record: dict) -> CaseResult:
    found = {name: record[name] for name in CaseResult.__dataclass_fields__}
    if accuracy := found["accuracy"]:
        errors = {who: Errors(**accuracy[who]) for who in ("ours", "cudnn")}
        found["accuracy"] = Accuracy(**accuracy | errors)
    found["ours"] = Timing(**found["ours"]) if found["ours"] else None
    found["peers"] = {name: Timing(**t) if isinstance(t, dict) else t for name, t in found["peers"].items()}
    return CaseResult(**found)
