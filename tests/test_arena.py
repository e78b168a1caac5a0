"""Where tensors lie in one block of memory: apart while both are in use, and in little more than is in use at once."""

import random

import pytest

from torch_conv_triton.arena import Block, arrange


@pytest.mark.parametrize("seed", range(5))
def test_what_is_in_use_at_once_does_not_overlap(seed):
    pick = random.Random(seed)
    blocks = []
    for _ in range(40):
        first = pick.randrange(20)
        blocks.append(Block(pick.choice([0, 1, 512, 700, 4096, 100_000]), first, min(19, first + pick.randrange(6))))
    starts, size = arrange(blocks)
    in_use = [sum(-(-b.size // 512) * 512 for b in blocks if b.first <= step <= b.last) for step in range(20)]
    # what is arranged without knowing the future loses some
    assert max(in_use) <= size <= 1.3 * max(in_use)
    assert all(start % 512 == 0 for start in starts)
    for i, a in enumerate(blocks):
        for j, b in enumerate(blocks[:i]):
            if a.first <= b.last and b.first <= a.last:
                assert starts[i] + a.size <= starts[j] or starts[j] + b.size <= starts[i]


def test_what_follows_each_other_shares_memory():
    assert arrange([Block(1000, 0, 1), Block(1000, 1, 2), Block(1000, 2, 3)]) == ([0, 1024, 0], 2048)
