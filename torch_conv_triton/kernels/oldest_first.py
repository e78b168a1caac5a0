"""A bound on what many dictionaries hold together."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Hashable
from typing import Any


class OldestFirst:
    """Entries of many dictionaries, of which the oldest are forgotten where all together take too much."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._order: deque[tuple[dict[Hashable, Any], Hashable, int]] = deque()
        self._total = 0
        self._lock = threading.Lock()

    def add(self, entries: dict[Hashable, Any], key: Hashable, value: Any, size: int) -> None:
        """Put the value into one of the dictionaries, which counts as `size`."""
        with self._lock:
            entries[key] = value
            self._order.append((entries, key, size))
            self._total += size
            while self._total > self.limit and len(self._order) > 1:
                oldest, place, freed = self._order.popleft()
                oldest.pop(place, None)
                self._total -= freed
