"""The benchmark's results as text: a line a case while it runs, the geometric means at the end."""

from __future__ import annotations

from collections.abc import Sequence

from torch_conv_triton.bench.peers import PEERS
from torch_conv_triton.bench.results import CaseResult, SuiteResult, Summary

PEER_WIDTH = 15


def case_header(peers: Sequence[str]) -> str:
    """Heading of the lines that `case_line` gives."""
    columns = "".join(f"{peer:>{PEER_WIDTH}}" for peer in peers)
    return f"{'case':<24} {'dtype':<5} {'layout':<7}{'floor':>9}{'ours':>9}{'share':>7}{'error':>9}{columns}  kernel and config"


def case_line(result: CaseResult, peers: Sequence[str]) -> str:
    """One case: times in ms, share of the floor, error against float64, and of each peer its time and its time over ours."""
    line = f"{result.name:<24} {result.dtype:<5} {result.layout:<7}"
    if result.ours is None:
        return f"{line} {result.status.upper()}: {result.message}  {result.kernel} {result.config}".rstrip()
    line += f"{number(result.floor_ms, 4):>9}{number(result.ours.median_ms, 4):>9}{percent(result.share):>7}"
    line += f"{result.accuracy.ours.whole:>9.1e}" if result.accuracy else f"{'-':>9}"
    line += "".join(f"{_peer(result, peer):>{PEER_WIDTH}}" for peer in peers)
    return f"{line}  {result.kernel} {result.config}".rstrip()


def _peer(result: CaseResult, peer: str) -> str:
    ms, speedup = result.peer_ms(peer), result.speedup(peer)
    if ms is None or speedup is None:
        return "failed" if peer in result.peers else "-"
    return f"{ms:.4f} {speedup:5.2f}x"


def summary_lines(summaries: Sequence[Summary], peers: Sequence[str]) -> list[str]:
    """Geometric means of each group: share of the floor, speed-ups over each peer and over the best, and its worst case."""
    columns = "".join(f"{peer:>14}" for peer in (*peers, "best"))
    lines = [f"{'geometric means':<34}{'cases':>6}{'share':>7}{columns}  slowest against the best peer"]
    for summary in summaries:
        means = "".join(f"{ratio(summary.speedups.get(peer)):>14}" for peer in (*peers, "best"))
        slowest = f"{summary.slowest} {ratio(summary.slowest_speedup)}" if summary.slowest else "-"
        lines.append(f"{summary.group:<34}{summary.cases:>6}{percent(summary.share):>7}{means}  {slowest}")
    return lines


def closing_lines(result: SuiteResult) -> list[str]:
    """How many cases were right, which were not and why, and what each peer failed with."""
    right = sum(case.status == "ok" for case in result.cases)
    lines = [f"{right} of {len(result.cases)} cases correct and measured"]
    lines += [f"  {case.name}: {case.status}: {case.message}" for case in result.cases if case.status != "ok"]
    for case in result.cases:
        lines += [f"  {case.name}: peer {peer} failed: {found}" for peer, found in case.peers.items() if isinstance(found, str)]
    lines += _memory_lines(result)
    lines += [f"  {peer}: {PEERS[peer]}" for peer in result.peer_names()]
    return lines


def _memory_lines(result: SuiteResult) -> list[str]:
    measured = [(case.name, case.memory_mib["ours"], case.memory_mib["cudnn"]) for case in result.cases if case.memory_mib]
    above = [f"{name} {ours:.0f} against {cudnn:.0f}" for name, ours, cudnn in measured if ours > cudnn]
    if not measured:
        return []
    listed = f"; MiB of those above it: {', '.join(above)}" if above else ""
    return [f"  peak memory at most cuDNN's in {len(measured) - len(above)} of {len(measured)} cases{listed}"]


def number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.0f}%"


def ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"
