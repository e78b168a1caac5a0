"""The operator ``triton_conv::conv1d_chain``: calls of `conv1d_fused` that hand each other what they store, in one go.

To the host a chain is one call: it is checked, planned and allocated for once, and then is the launches of all of its steps. Of
HiFi-GAN's 78 convolutions that is all but the launches.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torch_conv_triton import fused, memory
from torch_conv_triton.calls import remember, repeat, signature
from torch_conv_triton.fused import Arguments, FusedCall
from torch_conv_triton.problem import Strides, current_precision

if TYPE_CHECKING:
    from torch_conv_triton.kernels.launch import Recording

_library = torch.library.Library("triton_conv", "FRAGMENT")
# `one` is for chains that return one tensor, see `fused`
for _name, _results in (("conv1d_chain", "Tensor[]"), ("conv1d_chain.one", "Tensor")):
    _library.define(
        f"{_name}(Tensor[] tensors, str steps) -> {_results}",
        tags=(torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order),
    )
conv1d_chain = torch.ops.triton_conv.conv1d_chain.default

# the bytes that every tensor of torch's allocator starts on
_ALIGNMENT = 512

_calls: dict[tuple, ChainCall] = {}


@dataclass(frozen=True, slots=True)
class Chain:
    """Calls of the fused operator, one after the other. `str` gives the text that `parse` takes.

    Tensors are numbered: first the `tensors` that the chain is given, then what the steps store, in order. A step is the
    arguments of the fused operator with numbers in place of tensors; `outputs` says how many tensors each stores, and `returned`
    which ones the chain returns.
    """

    tensors: int
    steps: tuple[Arguments, ...]
    outputs: tuple[int, ...]
    returned: tuple[int, ...]

    def __str__(self) -> str:
        # Inductor's C++ wrapper does not escape double quotes
        return json.dumps([self.tensors, self.steps, self.outputs, self.returned], separators=(",", ":")).replace('"', "'")

    def stored(self, step: int) -> range:
        """The numbers of the tensors that a step stores."""
        start = self.tensors + sum(self.outputs[:step])
        return range(start, start + self.outputs[step])

    def last_reads(self) -> dict[int, int]:
        """The last step that reads each tensor which some step stores; the one that stores it where none does."""
        last = {number: step for step in range(len(self.steps)) for number in self.stored(step)}
        for step, arguments in enumerate(self.steps):
            last.update((number, step) for number in numbers(arguments) if number in last)
        return last


def numbers(step: Arguments) -> list[int]:
    """The numbers of the tensors that a step reads: input, weight, bias if there is one, operands."""
    return [number for number in (step.input, step.weight, step.bias, *step.operands) if number is not None]


def with_tensors(step: Arguments, tensors: Mapping[int, Tensor] | Sequence[Tensor]) -> Arguments:
    """The step with tensors in place of their numbers."""
    bias = None if step.bias is None else tensors[step.bias]
    operands = [tensors[number] for number in step.operands]
    return step._replace(input=tensors[step.input], weight=tensors[step.weight], bias=bias, operands=operands)


@lru_cache(maxsize=1024)
def parse(text: str) -> Chain:
    """The chain that a text says. Raises ValueError for a step that reads what is not there yet."""
    tensors, steps, outputs, returned = json.loads(text.replace("'", '"'))
    chain = Chain(tensors, tuple(Arguments(*step) for step in steps), tuple(outputs), tuple(returned))
    for i, step in enumerate(chain.steps):
        if not all(0 <= number < chain.stored(i).start for number in numbers(step)):
            raise ValueError(f"step {i} of the chain reads a tensor that is not there yet: {step}")
    if not all(0 <= number < tensors + sum(outputs) for number in returned):
        raise ValueError(f"the chain returns a tensor that is not there: {returned}")
    return chain


def compute_conv1d_chain(tensors: Sequence[Tensor], steps: str) -> list[Tensor]:
    key = steps, current_precision(torch.float32), tuple([signature(t) for t in tensors])
    call = _calls.get(key)
    if call is None:
        chain = parse(steps)
        if len(tensors) != chain.tensors:
            raise ValueError(f"the chain takes {chain.tensors} tensors, but got {len(tensors)}")
        call = remember(_calls, key, ChainCall(chain))
    if call.joined is None:
        return call.compute(tensors)
    device = tensors[0].device
    outputs = [memory.uninitialised(*allocation, device) for allocation in call.allocations]
    repeat(call.joined, *tensors, *outputs)
    return outputs


def forget_plans() -> None:
    """Plan every chain anew, after the tables have changed."""
    _calls.clear()


@dataclass(slots=True)
class ChainCall:
    """A chain on tensors of certain shapes, strides, dtypes and alignment.

    The first time each step is a call of its own, and what no later one reads is freed. `joined`: after that, all launches as one
    recording, on the chain's tensors and what it returns, if every step's can be repeated. `allocations`: shape, strides and
    dtype of what it returns.
    """

    chain: Chain
    joined: Recording | None = None
    allocations: list[tuple[tuple[int, int, int], Strides, torch.dtype]] = field(default_factory=list)

    def compute(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """What the chain returns, step by step."""
        chain, last = self.chain, self.chain.last_reads()
        values = dict(enumerate(tensors))
        made = []
        for i, step in enumerate(chain.steps):
            made.append(self._compute(i, values))
            for number in {*numbers(step), *chain.stored(i)}:
                if last.get(number) == i and number not in chain.returned:
                    del values[number]
        returned = [values[number] for number in chain.returned]
        # a bias that is not contiguous is copied at each call
        biases = (tensors[step.bias] for step in chain.steps if step.bias is not None)
        if all(call.recording is not None for call in made) and all(bias.is_contiguous() for bias in biases):
            self._join(made, returned[0].device)
        return returned

    def _compute(self, i: int, values: dict[int, Tensor]) -> FusedCall:
        """The call that a step makes, whose outputs join the values."""
        arguments = with_tensors(self.chain.steps[i], values)
        call, given = fused.find_call(*arguments)
        values.update(zip(self.chain.stored(i), call.compute(given, arguments), strict=True))
        return call

    def _join(self, calls: Sequence[FusedCall], device: torch.device) -> None:
        """Make one recording of those of the steps."""
        from torch_conv_triton.kernels.launch import Recording

        chain, last = self.chain, self.chain.last_reads()
        stored = {
            number: (call.shape, strides, dtype)
            for i, call in enumerate(calls)
            for number, (strides, dtype) in zip(chain.stored(i), call.allocations, strict=True)
        }
        places = {number: (number, 0) for number in range(chain.tensors)}
        places |= {number: (chain.tensors + i, 0) for i, number in enumerate(chain.returned)}
        # what only steps read, and the workspaces of their launches, share one workspace
        space = chain.tensors + len(chain.returned)
        blocks = {
            number: Block(prod(stored[number][0]) * stored[number][2].itemsize, step, last[number])
            for step in range(len(calls))
            for number in chain.stored(step)
            if number not in places
        }
        blocks |= {
            (step, i): Block(size, step, step)
            for step, call in enumerate(calls)
            for i, size in enumerate(call.recording.workspace_bytes)
        }
        starts, size = arrange(list(blocks.values()))
        places |= {name: (space, start) for name, start in zip(blocks, starts, strict=True)}
        parts = []
        for step, (arguments, call) in enumerate(zip(chain.steps, calls, strict=True)):
            given = numbers(arguments)
            bias = [] if arguments.bias is None else [arguments.bias]
            # where there is no bias nothing asks for its place
            names = [arguments.input, arguments.weight, *(bias or [arguments.input]), *chain.stored(step)]
            names += [given[i] for i in call.distinct]
            names += [(step, i) for i in range(len(call.recording.workspace_bytes))]
            parts.append((call.recording, [places[name] for name in names]))
        joined = Recording.joined(parts, size, device)
        if joined.repeatable:
            self.allocations = [stored[number] for number in chain.returned]
            self.joined = joined


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
    return -(-size // _ALIGNMENT) * _ALIGNMENT


def _conv1d_chain_fake(tensors, steps):
    chain = parse(steps)
    values = list(tensors)
    for step in chain.steps:
        values += fused.fake(*with_tensors(step, values))
    return [values[number] for number in chain.returned]


def _one(compute):
    def compute_one(tensors, steps):
        (output,) = compute(tensors, steps)
        return output

    return compute_one


# what the operators run
COMPUTE = {conv1d_chain: compute_conv1d_chain, torch.ops.triton_conv.conv1d_chain.one: _one(compute_conv1d_chain)}
for (_op, _compute), _fake in zip(COMPUTE.items(), (_conv1d_chain_fake, _one(_conv1d_chain_fake)), strict=True):
    _library.impl(_op, _compute, "CPU")
    _library.impl(_op, _compute, "CUDA")
    torch.library.register_fake(_op, _fake, lib=_library)
