"""The operator ``triton_conv::conv1d_chain``: calls of `conv1d_fused` that hand each other what they store, in one go.

To the host a chain is one call: it is checked, planned and allocated for once, and then is the launches of all of its steps. Of
HiFi-GAN's 78 convolutions that is all but the launches.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from torch_conv_triton import fused, memory
from torch_conv_triton.arena import Block, arrange
from torch_conv_triton.calls import remember, repeat, signature
from torch_conv_triton.fused import Arguments, FusedCall
from torch_conv_triton.problem import Strides, current_precision
from torch_conv_triton.registration import register

if TYPE_CHECKING:
    from torch_conv_triton.kernels.launch import Recording

_calls: dict[tuple, ChainCall] = {}
# how many sizes of a chain keep what they prepared of its constants
_MAX_PREPARED = 4
_prepared: Counter[str] = Counter()


@dataclass(frozen=True, slots=True)
class Chain:
    """Calls of the fused operator, one after the other. `str` gives the text that `parse` takes.

    Tensors are numbered: first the `tensors` that the chain is given, then what the steps store, in order. A step is the
    arguments of the fused operator with numbers in place of tensors; `outputs` says how many tensors each stores, and `returned`
    which ones the chain returns. The values of those in `constants` are the same in every call.
    """

    tensors: int
    steps: tuple[Arguments, ...]
    outputs: tuple[int, ...]
    returned: tuple[int, ...]
    constants: tuple[int, ...] = ()

    def __str__(self) -> str:
        # Inductor's C++ wrapper does not escape double quotes
        parts = self.tensors, self.steps, self.outputs, self.returned, self.constants
        return json.dumps(parts, separators=(",", ":")).replace('"', "'")

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
    tensors, steps, *numbered = json.loads(text.replace("'", '"'))
    chain = Chain(tensors, tuple(Arguments(*step) for step in steps), *map(tuple, numbered))
    for i, step in enumerate(chain.steps):
        if not all(0 <= number < chain.stored(i).start for number in numbers(step)):
            raise ValueError(f"step {i} of the chain reads a tensor that is not there yet: {step}")
    if not all(0 <= number < tensors + sum(chain.outputs) for number in chain.returned):
        raise ValueError(f"the chain returns a tensor that is not there: {chain.returned}")
    return chain


def compute_conv1d_chain(tensors: Sequence[Tensor], steps: str) -> list[Tensor]:
    key = steps, current_precision(torch.float32), tuple([signature(t) for t in tensors])
    call = _calls.get(key)
    if call is None:
        chain = parse(steps)
        if len(tensors) != chain.tensors:
            raise ValueError(f"the chain takes {chain.tensors} tensors, but got {len(tensors)}")
        call = remember(_calls, key, ChainCall(chain))
    return call.compute(tensors) if call.joined is None else call.repeat(tensors)


def forget_plans() -> None:
    """Plan every chain anew, after the tables have changed."""
    _calls.clear()
    _prepared.clear()


@dataclass(slots=True)
class ChainCall:
    """A chain on tensors of certain shapes, strides, dtypes and alignment.

    The first time each step is a call of its own, and what no later one reads is freed. `joined`: after that, all launches as one
    recording, on the chain's tensors, what it returns and what is `kept`, if every step's can be repeated. `allocations`: shape,
    strides and dtype of what it returns. `kept`: workspaces that hold the same in every call, as packed weights that are
    constant; `preparation` fills them, from constants at the addresses `prepared_from`, on the stream that comes first there.
    """

    chain: Chain
    joined: Recording | None = None
    allocations: list[tuple[tuple[int, int, int], Strides, torch.dtype]] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)
    preparation: Recording | None = None
    prepared_from: tuple[int, ...] = ()

    def repeat(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """What the chain returns, by all launches in one go."""
        if self.kept and torch.cuda.is_current_stream_capturing():
            # replays may outlive what is kept
            return self.compute(tensors)
        outputs = [memory.uninitialised(*allocation, tensors[0].device) for allocation in self.allocations]
        if self.kept:
            self._prepare(tensors, outputs)
        repeat(self.joined, *tensors, *outputs, *self.kept)
        return outputs

    def _prepare(self, tensors: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        # what is filled on one stream is not yet there for another; filling it again changes nothing
        stream = torch.cuda.current_stream(tensors[0].device).cuda_stream
        source = stream, *(tensors[number].data_ptr() for number in self.chain.constants)
        if source != self.prepared_from:
            repeat(self.preparation, *tensors, *outputs, *self.kept)
            self.prepared_from = source

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
        repeatable = all(call.recording is not None for call in made) and all(bias.is_contiguous() for bias in biases)
        if repeatable and self.joined is None:
            self._join(made, tensors, returned[0].device)
        return returned

    def _compute(self, i: int, values: dict[int, Tensor]) -> FusedCall:
        """The call that a step makes, whose outputs join the values."""
        arguments = with_tensors(self.chain.steps[i], values)
        call, given = fused.find_call(*arguments)
        values.update(zip(self.chain.stored(i), call.compute(given, arguments), strict=True))
        return call

    def _join(self, calls: Sequence[FusedCall], tensors: Sequence[Tensor], device: torch.device) -> None:
        """Make one recording of those of the steps."""
        from torch_conv_triton.kernels.launch import Recording

        chain, last = self.chain, self.chain.last_reads()
        stored = {
            number: (call.shape, strides, dtype)
            for i, call in enumerate(calls)
            for number, (strides, dtype) in zip(chain.stored(i), call.allocations, strict=True)
        }
        constant = self._constants(calls)
        places: dict[object, tuple[int, int]] = {number: (number, 0) for number in range(chain.tensors)}
        places |= {number: (chain.tensors + i, 0) for i, number in enumerate(chain.returned)}
        together = self._together(calls, constant)
        needed = {(step, i): steps[0][0] for steps in together.values() for step, spaces in steps for i in spaces}
        # what only steps read, and the workspaces of their launches, share one workspace
        shared, kept = {}, {}
        for step, call in enumerate(calls):
            for number in set(chain.stored(step)).difference(chain.returned):
                shared[number] = Block(prod(stored[number][0]) * stored[number][2].itemsize, step, last[number])
            prepared = call.recording.prepared(constant[step])
            for i, size in enumerate(call.recording.workspace_bytes):
                first = needed.get((step, i), step)
                (kept if i in prepared else shared)[step, i] = Block(size, *((0, 0) if i in prepared else (first, step)))
        given = chain.tensors + len(chain.returned)
        for blocks, place in ((kept, given), (shared, given + bool(kept))):
            starts, size = arrange(list(blocks.values()))
            places |= {name: (place, start) for name, start in zip(blocks, starts, strict=True)}
            if blocks is kept and kept:
                self.kept = [memory.uninitialised((size,), (1,), torch.uint8, device)]
        before, after = [], []
        for step, call in enumerate(calls):
            mine = [key for key, steps in together.items() if any(number == step for number, _ in steps)]
            for key in mine:
                steps = together[key]
                if steps[0][0] == step:
                    after.append((self._launch_together(key, steps, calls, tensors), self._places_together(steps, places)))
            where = [places[name] for name in self._names(step, call)]
            for half, recording in zip((before, after), call.recording.without(mine).split(constant[step]), strict=True):
                half.append((recording, where))
        joined = Recording.joined(after, size, device)
        if joined.repeatable:
            self.allocations = [stored[number] for number in chain.returned]
            self.preparation = Recording.joined(before, 0, device)
            self.joined = joined
            _prepared[str(chain)] += bool(kept)

    def _together(
        self, calls: Sequence[FusedCall], constant: Sequence[set[int]]
    ) -> dict[tuple, list[tuple[int, tuple[int, ...]]]]:
        """Launches of several steps that may be made as one, such as those that pack weights of one shape.

        By what they have in common: the steps, and which of their workspaces each launch fills.
        """
        from torch_conv_triton.kernels.launch import has_room

        found: dict[tuple, list] = {}
        for step, call in enumerate(calls):
            weight = self.chain.steps[step].weight
            if weight >= self.chain.tensors or constant[step]:
                continue
            for key, spaces in call.recording.joinable(1).items():
                steps = found.setdefault(key, [])
                size = sum(call.recording.workspace_bytes[i] for i in spaces)
                # what is filled together is there together
                if has_room(steps, size) and weight not in [self.chain.steps[other].weight for other, _ in steps]:
                    steps.append((step, spaces))
        return {key: steps for key, steps in found.items() if len(steps) > 1}

    def _launch_together(self, key: tuple, steps: list, calls: Sequence[FusedCall], tensors: Sequence[Tensor]) -> Recording:
        from torch_conv_triton.kernels.launch import launch_together

        return launch_together(
            key,
            [
                (tensors[self.chain.steps[step].weight], *(calls[step].recording.new_workspace(i) for i in spaces))
                for step, spaces in steps
            ],
        )

    def _places_together(self, steps: list, places: Mapping[object, tuple[int, int]]) -> list[tuple[int, int]]:
        """Where the tensors are that `_launch_together` is given: all weights, then all workspaces."""
        names = [[self.chain.steps[step].weight, *((step, i) for i in spaces)] for step, spaces in steps]
        return [places[name] for group in zip(*names, strict=True) for name in group]

    def _constants(self, calls: Sequence[FusedCall]) -> list[set[int]]:
        """For each step which tensors of its recording are constant: its weight, unless enough sizes of the chain keep theirs."""
        full = _prepared[str(self.chain)] >= _MAX_PREPARED or torch.cuda.is_current_stream_capturing()
        return [{1} if step.weight in self.chain.constants and not full else set() for step in self.chain.steps]

    def _names(self, step: int, call: FusedCall) -> list:
        """What the tensors and workspaces of a step's recording are: numbers of the chain, (step, workspace)."""
        arguments = self.chain.steps[step]
        given = numbers(arguments)
        # where there is no bias nothing asks for its place
        bias = arguments.input if arguments.bias is None else arguments.bias
        names = [arguments.input, arguments.weight, bias, *self.chain.stored(step), *(given[i] for i in call.distinct)]
        return names + [(step, i) for i in range(len(call.recording.workspace_bytes))]


def _conv1d_chain_fake(tensors, steps):
    chain = parse(steps)
    values = list(tensors)
    for step in chain.steps:
        values += fused.fake(*with_tensors(step, values))
    return [values[number] for number in chain.returned]


# what the operators run
COMPUTE = register("conv1d_chain", "Tensor[] tensors, str steps", compute_conv1d_chain, _conv1d_chain_fake)
conv1d_chain = torch.ops.triton_conv.conv1d_chain.default
