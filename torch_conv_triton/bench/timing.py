"""How long GPU work takes: events around each call, the L2 cache flushed before it, medians over interleaved rounds."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field

import torch

MIN_REPEATS, MAX_REPEATS = 3, 500
WARM_UP_CALLS = 3


@dataclass(frozen=True, slots=True)
class Timing:
    """Device time of one call in ms (median, 10th and 90th percentile) and the host's time to issue it."""

    median_ms: float
    p10_ms: float
    p90_ms: float
    host_ms: float
    repeats: int

    @classmethod
    def from_samples(cls, samples_ms: list[float], host_ms: float) -> Timing:
        ordered = sorted(samples_ms)
        last = len(ordered) - 1
        return cls(statistics.median(ordered), ordered[round(0.1 * last)], ordered[round(0.9 * last)], host_ms, len(ordered))


@dataclass(frozen=True, slots=True)
class Contestant:
    """One way to do the work: `call` launches it once; `context` holds switches set around its calls only."""

    call: Callable[[], object]
    context: Callable[[], AbstractContextManager] = field(default=nullcontext)


class Stopwatch:
    """Times calls on the current CUDA device.

    Before each call a buffer larger than the L2 cache is written, often enough that the host has issued the call before
    the device reaches it: launch latency is hidden for every contestant alike, and reported apart as `Timing.host_ms`.
    """

    def __init__(self) -> None:
        l2_bytes = torch.cuda.get_device_properties().L2_cache_size
        self._scratch = torch.empty(max(4 * l2_bytes, 2**28), dtype=torch.int8, device="cuda")
        self._flush_ms = min(self._sample(self._scratch.zero_, 1) for _ in range(5))

    def time(self, call: Callable[[], object], budget_ms: float) -> Timing:
        """Median device time of `call`, repeated for about `budget_ms` of wall time."""
        for _ in range(WARM_UP_CALLS):
            call()
        torch.cuda.synchronize()
        host_ms = min(self._host_ms(call) for _ in range(WARM_UP_CALLS))
        flushes = math.ceil((host_ms + 0.02) / self._flush_ms)
        torch.cuda.synchronize()
        start = time.perf_counter()
        self._sample(call, flushes)
        each_ms = 1e3 * (time.perf_counter() - start)
        repeats = repeats_within(budget_ms, each_ms)
        events = [self._record(call, flushes) for _ in range(repeats)]
        torch.cuda.synchronize()
        return Timing.from_samples([start.elapsed_time(end) for start, end in events], host_ms)

    def _host_ms(self, call: Callable[[], object]) -> float:
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)

    def _record(self, call: Callable[[], object], flushes: int) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        for _ in range(flushes):
            self._scratch.zero_()
        start.record()
        call()
        end.record()
        return start, end

    def _sample(self, call: Callable[[], object], flushes: int) -> float:
        start, end = self._record(call, flushes)
        torch.cuda.synchronize()
        return start.elapsed_time(end)


def repeats_within(budget_ms: float, each_ms: float) -> int:
    """How often to repeat a call of `each_ms`: what fits the budget, at least a few times, and not without end."""
    return max(MIN_REPEATS, min(MAX_REPEATS, int(budget_ms / each_ms))) if each_ms > 0 else MAX_REPEATS


def race(
    entries: Mapping[str, Callable[[], Contestant]],
    time_call: Callable[[Callable[[], object], float], Timing],
    rounds: int,
    ms: float,
) -> dict[str, Timing | str]:
    """Time every contestant for about `ms` in all, in `rounds` turns, so that drift of the clocks meets all alike.

    `entries` builds each contestant by name. Its timing is its median turn; one that raises, built or called, gets the
    error's text instead, and the others go on. Each has a thread of its own: PyTorch keeps cuDNN's plans by thread, so
    none runs on the plan that another one found.
    """
    contestants: dict[str, Contestant] = {}
    turns: dict[str, list[Timing]] = {name: [] for name in entries}
    errors: dict[str, str] = {}

    def turn(name: str) -> Timing:
        with torch.no_grad():
            if name not in contestants:
                contestants[name] = entries[name]()
            with contestants[name].context():
                return time_call(contestants[name].call, ms / rounds)

    with ExitStack() as stack:
        threads = {name: stack.enter_context(ThreadPoolExecutor(1)) for name in entries}
        for _ in range(rounds):
            for name in [name for name in entries if name not in errors]:
                try:
                    turns[name].append(threads[name].submit(turn, name).result())
                except torch.AcceleratorError:
                    raise  # the device's context is lost: whatever ran next would fail as well
                except Exception as error:
                    errors[name] = in_words(error)
    return {name: errors.get(name) or _median_turn(turns[name]) for name in entries}


def _median_turn(turns: list[Timing]) -> Timing:
    return sorted(turns, key=lambda turn: turn.median_ms)[len(turns) // 2]


def in_words(error: Exception) -> str:
    """An error as one line: its type and the first line of its message."""
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
