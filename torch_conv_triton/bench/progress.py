"""Progress of long work on standard error: a bar on a terminal where rich is installed, a line a step elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from importlib import util
from typing import TypeVar

T = TypeVar("T")


def track(items: Sequence[T], names: Sequence[str]) -> Iterator[T]:
    """Yield the items, showing which one, by its name, is worked on."""
    if not sys.stderr.isatty() or util.find_spec("rich") is None:
        for i, (item, name) in enumerate(zip(items, names, strict=True), 1):
            print(f"[{i}/{len(items)}] {name}", file=sys.stderr, flush=True)
            yield item
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (MofNCompleteColumn(), BarColumn(), TimeElapsedColumn(), TimeRemainingColumn(), TextColumn("{task.description}"))
    # lines printed meanwhile pass through the bar only if both go to the terminal
    with Progress(*columns, console=Console(stderr=True), redirect_stdout=sys.stdout.isatty(), transient=True) as progress:
        task = progress.add_task("", total=len(items))
        for item, name in zip(items, names, strict=True):
            progress.update(task, description=name)
            yield item
            progress.advance(task)
