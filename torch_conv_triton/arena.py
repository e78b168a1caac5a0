"""Places tensors of known lifetimes in one block of memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

# the bytes that every tensor of torch's allocator starts on
ALIGNMENT = 512


@dataclass(frozen=True, slots=True)
class Block:
    """Memory of some bytes that is in use from one step to another, both included."""

    size: int
    first: int
    last: int


def arrange(blocks: Sequence[Block]) -> tuple[list[int], int]:
    """Where each block starts so that no two overlap that are in use at once, and the bytes that all of them take.

    Larger ones first, each as low as it may lie ("greedy by size" of Pisarchyk and Lee, Efficient Memory Management for Deep
    Neural Net Inference, 2020).
    """
    starts = [0] * len(blocks)
    placed: list[int] = []
    for i in sorted(range(len(blocks)), key=lambda i: -blocks[i].size):
        block, start = blocks[i], 0
        for j in sorted(placed, key=starts.__getitem__):
            other = blocks[j]
            meets = other.first <= block.last and block.first <= other.last
            if meets and starts[j] < start + block.size:
                start = max(start, starts[j] + _aligned(other.size))
        starts[i] = start
        placed.append(i)
    return starts, max((start + _aligned(block.size) for start, block in zip(starts, blocks, strict=True)), default=0)


def _aligned(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT
