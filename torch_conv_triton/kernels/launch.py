"""Launching kernels, and recording what was launched, so that a call like an earlier one costs the host only the launches.

Between two calls with the same sizes, strides, alignment and plan only the addresses differ. A `Recording` keeps the compiled
kernels with their other arguments and launches them again on new addresses, without the arithmetic of the launchers and
without Triton's binding of arguments.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, replace
from inspect import getclosurevars
from itertools import accumulate, chain
from math import prod
from operator import mul

import torch
from torch import Tensor
from triton import knobs
from triton.backends.nvidia.driver import CudaLauncher, wrap_handle_tensordesc
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

from torch_conv_triton import memory
from torch_conv_triton.kernels.builds import await_expected
from torch_conv_triton.kernels.oldest_first import OldestFirst

_thread = threading.local()


def launch(kernel, grid: tuple[int, ...], *args, **keywords) -> None:
    """``kernel[grid](*args, **keywords)``, noted by the thread's recording if there is one; in a rehearsal only noted."""
    rehearsed = getattr(_thread, "rehearsed", None)
    if rehearsed is not None:
        rehearsed.append((kernel, args, keywords))
        return
    await_expected()
    compiled = kernel[grid](*args, **keywords)
    recording = getattr(_thread, "recording", None)
    if recording is not None:
        recording._note(kernel, compiled, grid, args, keywords)


@contextmanager
def rehearsal() -> Iterator[list[tuple]]:
    """Within the context launches of this thread are noted instead of made: yields the list of (kernel, args, keywords)."""
    _thread.rehearsed = launches = []
    try:
        yield launches
    finally:
        _thread.rehearsed = None


def workspace(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised tensor that lives as long as the launches that use it; a recording allocates it anew each time."""
    strides = tuple(accumulate(reversed((*shape[1:], 1)), mul))[::-1]
    tensor = memory.uninitialised(shape, strides, dtype, device)
    recording = getattr(_thread, "recording", None)
    if recording is not None:
        recording._workspaces.append((shape, strides, dtype, device))
        recording._tensors.append(tensor)
    return tensor


def descriptor(tensor: Tensor, shape: list[int], strides: list[int], block_shape: list[int]) -> TensorDescriptor:
    """A descriptor through which a kernel copies blocks of a tensor."""
    if tensor.is_cuda:
        _make_context_current()
    return TensorDescriptor(tensor, shape, strides, block_shape)


def _make_context_current() -> None:
    # The driver encodes descriptors in the thread's current context, which a thread that has made no runtime call does not have
    # yet; this call makes one, and is allowed during capture.
    torch.cuda.is_current_stream_capturing()


@dataclass(frozen=True, slots=True)
class _Address:
    """What a launch asks of a tensor."""

    address: int

    def data_ptr(self) -> int:
        return self.address


@dataclass(frozen=True, slots=True)
class _Place:
    """Where an address comes from: which tensor of the call, the bytes past its start."""

    tensor: int
    offset: int

    def value(self, addresses: list[int]) -> int:
        return addresses[self.tensor] + self.offset

    def moved(self, places: Sequence[tuple[int, int]]) -> _Place:
        """The same place where the tensors of a call are at these places of another."""
        tensor, offset = places[self.tensor]
        return replace(self, tensor=tensor, offset=self.offset + offset)


@dataclass(frozen=True, slots=True)
class _Described(_Place):
    """What a descriptor describes. `fields`: all of the descriptor's but its base."""

    fields: dict

    def value(self, addresses: list[int]) -> TensorDescriptor:
        # the fields were checked when the first one was made
        again = TensorDescriptor.__new__(TensorDescriptor)
        again.__dict__.update(self.fields, base=_Address(addresses[self.tensor] + self.offset))
        return again


@dataclass(frozen=True, slots=True)
class _Places:
    """An argument that is a tuple of addresses."""

    places: tuple[_Place, ...]

    def value(self, addresses: list[int]) -> tuple:
        return tuple([addresses[place.tensor] + place.offset for place in self.places])

    def moved(self, places: Sequence[tuple[int, int]]) -> _Places:
        return _Places(tuple(place.moved(places) for place in self.places))


@dataclass(frozen=True, slots=True)
class _Step:
    """One launch of a compiled kernel: all of its arguments, of which those at some positions hold addresses, and its options."""

    kernel: object
    compiled: CompiledKernel
    grid: tuple[int, int, int]
    args: tuple
    places: tuple[tuple[int, _Place | _Places], ...]
    options: tuple[tuple[str, object], ...]

    @property
    def alike(self) -> tuple:
        """What launches have in common that differ in nothing but addresses."""
        return self.kernel, self.compiled, self.grid, self.args, self.options

    def on(self, addresses: list[int], stream: int) -> _Launch:
        """The launch on these addresses."""
        args = list(self.args)
        for position, place in self.places:
            args[position] = place.value(addresses)
        return _Launch(self.compiled, self.grid, stream, args)

    def moved(self, places: Sequence[tuple[int, int]]) -> _Step:
        return replace(self, places=tuple((position, place.moved(places)) for position, place in self.places))

    @property
    def tensors(self) -> set[int]:
        """Which tensors of the call, or workspaces behind them, it is given."""
        inner = (place.places if isinstance(place, _Places) else (place,) for _, place in self.places)
        return {place.tensor for places in inner for place in places}


@dataclass(frozen=True, slots=True)
class _Launch:
    """A launch of a compiled kernel on certain addresses and a stream, with all of its arguments."""

    compiled: CompiledKernel
    grid: tuple[int, int, int]
    stream: int
    args: list

    def call(self) -> _Call:
        """Its call of Triton's launcher; a subscript of the kernel would ask the hooks, and what they are to be told."""
        compiled = self.compiled
        return compiled.run, [*self.grid, self.stream, compiled.function, compiled.packed_metadata, None, None, None, *self.args]

    def inner_call(self) -> _Call:
        """The call that the launcher makes in the end, if that is the same every time.

        Descriptors are encoded in it, which takes Python as long as the rest of a launch.
        """
        run, arguments = self.call()
        if not isinstance(run, CudaLauncher) or run.global_scratch_size or run.profile_scratch_size:
            return run, arguments
        found: list[list] = []
        signature, inner = self.compiled.src.signature, run.launch
        probe = copy(run)
        probe.launch = wrap_handle_tensordesc(
            lambda *args: found.append(list(args)), signature, getattr(self.compiled.metadata, "tensordesc_meta", None)
        )
        probe(*arguments)
        if any(str(kind).startswith("tensordesc") for kind in signature.values()):
            inner = getclosurevars(inner).nonlocals["launcher"]
        return inner, found[0]


# a function and its arguments
_Call = tuple[Callable[..., object], list]


@dataclass(slots=True)
class _Known:
    """The launches of a recording on a stream and on addresses that it has met, and the calls that make them.

    torch's allocator hands out the same memory to the same calls, so these come `again`.
    """

    launches: list[_Launch]
    calls: list[_Call]
    again: bool = False


# Layers alike share a recording, each with weights of its own, and there is a recording for every length that was met. Counted in
# launches, of about 2.5 kB each.
_kept = OldestFirst(limit=2**15)


def _launches_are_hooked() -> bool:
    """Whether a profiler of Triton's listens to launches."""
    enter, exit = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(exit, "calls", exit))


class Recording:
    """The launches made on this thread within ``with recording:``, on the given tensors (None where there is none)."""

    def __init__(self, *tensors: Tensor | None) -> None:
        self._tensors: list[Tensor | None] = list(tensors)
        self._given = len(tensors)
        self._workspaces: list[tuple] = []
        self._steps: list[_Step] = []
        self._describes = False
        self._known: dict[tuple[int, ...], _Known] = {}
        # one tensor given twice need not be one in the next call
        given = [id(t) for t in tensors if t is not None]
        self.repeatable = len(set(given)) == len(given)

    def __enter__(self) -> Recording:
        _thread.recording = self
        return self

    def __exit__(self, *exception) -> None:
        _thread.recording = None
        self._tensors.clear()

    def repeat(self, *tensors: Tensor | None) -> None:
        """Launch again on tensors that have the shapes, strides, dtypes and alignment of the recorded ones."""
        spaces = [memory.uninitialised(*space) for space in self._workspaces]
        addresses = [0 if t is None else t.data_ptr() for t in (*tensors, *spaces)]
        where = driver.active.get_current_stream(tensors[0].get_device()), *addresses
        if self._describes:
            _make_context_current()
        known = self._known.get(where)
        if known is None:
            launches = [step.on(addresses, where[0]) for step in self._steps]
            known = _Known(launches, [launch.call() for launch in launches])
            _kept.add(self._known, where, known, size=1 + len(launches))
        elif not known.again:
            known.again, known.calls = True, [launch.inner_call() for launch in known.launches]
        if _launches_are_hooked():
            for launch in known.launches:
                launch.compiled[launch.grid](*launch.args, stream=launch.stream)
            return
        for call, args in known.calls:
            call(*args)

    @property
    def workspace_bytes(self) -> list[int]:
        """The sizes of what is allocated for the launches beside the tensors of the call."""
        return [prod(shape) * dtype.itemsize for shape, _, dtype, _ in self._workspaces]

    def new_workspace(self, i: int) -> Tensor:
        """A tensor like one of those workspaces."""
        return memory.uninitialised(*self._workspaces[i])

    def prepared(self, constants: Collection[int]) -> set[int]:
        """The workspaces, by their numbers, that hold the same in every call if these of the tensors do."""
        same, changing = set(), set()
        for step in self._steps:
            spaces = {i for i in step.tensors if i >= self._given}
            if step.tensors - spaces <= set(constants) and not spaces & changing:
                same |= spaces
            else:
                changing |= spaces - same
        return {i - self._given for i in same}

    def joinable(self, given: int) -> dict[tuple, tuple[int, ...]]:
        """Launches that read only this one of the tensors and fill workspaces, and may be made together with others like them.

        Those take their tensors in tuples (see `launch_together`). By what they have to have in common: the numbers of the
        workspaces that each fills.
        """
        found = {}
        for step in self._steps:
            alone = all(isinstance(place, _Places) and len(place.places) == 1 for _, place in step.places)
            read, *filled = [place.places[0] for _, place in step.places] if alone else [None]
            # an argument that is None by itself could not be told from a tensor's place
            alone &= step.args.count(None) == len(step.places)
            if alone and filled and read == _Place(given, 0) and all(p.tensor >= self._given and not p.offset for p in filled):
                found[step.alike] = tuple(place.tensor - self._given for place in filled)
        return found

    def without(self, alike: Collection[tuple]) -> Recording:
        """The other launches, where these are `joinable` ones."""
        return self._of([step for step in self._steps if step.alike not in alike])

    def split(self, constants: Collection[int]) -> tuple[Recording, Recording]:
        """The launches that fill what is `prepared` from these tensors, and the others."""
        known = {*constants, *(self._given + i for i in self.prepared(constants))}
        before = [step for step in self._steps if step.tensors <= known]
        return self._of(before), self._of([step for step in self._steps if not step.tensors <= known])

    def _of(self, steps: list[_Step]) -> Recording:
        """The same with only these of its launches."""
        other = copy(self)
        other._steps, other._known = steps, {}
        return other

    @classmethod
    def joined(cls, parts: Iterable[tuple[Recording, Sequence[tuple[int, int]]]], space: int, device: torch.device) -> Recording:
        """The launches of several recordings as one, which allocates its own workspace of `space` bytes.

        With each comes where its tensors and workspaces are among the tensors of the whole, the workspace being the last: which
        one, and how many bytes past its start.
        """
        whole = cls()
        whole._workspaces = [((space,), (1,), torch.uint8, device)]
        for recording, places in parts:
            whole._steps += [step.moved(places) for step in recording._steps]
            whole._describes |= recording._describes
            whole.repeatable &= recording.repeatable
        return whole

    def _note(self, kernel, compiled, grid, args, keywords) -> None:
        named = dict(zip(kernel.arg_names, args, strict=False)) | keywords
        # the interpreter compiles nothing
        if compiled is None:
            self.repeatable = False
        if not self.repeatable:
            return
        values = [named[name] for name in kernel.arg_names]
        places = []
        for position, value in enumerate(values):
            if isinstance(value, (Tensor, TensorDescriptor)):
                place = self._place(value)
            elif isinstance(value, tuple) and value and isinstance(value[0], Tensor):
                inner = tuple(map(self._place, value))
                place = None if None in inner else _Places(inner)
            else:
                continue
            if place is None:
                self.repeatable = False
                return
            self._describes |= isinstance(value, TensorDescriptor)
            places.append((position, place))
            values[position] = None
        options = tuple((name, value) for name, value in keywords.items() if name not in kernel.arg_names)
        self._steps.append(_Step(kernel, compiled, (*grid, 1, 1)[:3], tuple(values), tuple(places), options))

    def _place(self, value: Tensor | TensorDescriptor) -> _Place | None:
        """Which tensor of the call an argument is, describes, or is a view of; None if it is none, or a view of several."""
        fields = None
        if isinstance(value, TensorDescriptor):
            fields = {name: field for name, field in vars(value).items() if name != "base"}
            value = value.base
        same = [i for i, tensor in enumerate(self._tensors) if tensor is value]
        if not same:
            storage = value.untyped_storage().data_ptr()
            same = [i for i, t in enumerate(self._tensors) if t is not None and t.untyped_storage().data_ptr() == storage]
        if len(same) != 1:
            return None
        offset = value.data_ptr() - self._tensors[same[0]].data_ptr()
        return _Place(same[0], offset) if fields is None else _Described(same[0], offset, fields)


# bytes that launches made as one may fill: all of it is there until the last of it has been read
MAX_TOGETHER = 32 * 2**20


def has_room(together: Sized, size: int) -> bool:
    """Whether one more launch may be made with these as one, each of which fills `size` bytes."""
    return (len(together) + 1) * size <= MAX_TOGETHER


def launch_together(alike: tuple, tensors: Sequence[Sequence[Tensor]]) -> Recording:
    """Make `Recording.joinable` launches as one, and record it: each on tensors of its own.

    The kernel takes a tuple for each tensor, and which of it a program works on is its place in the second dimension of the grid.
    """
    kernel, _, grid, args, options = alike
    groups = list(zip(*tensors, strict=True))
    given = iter(groups)
    arguments = [next(given) if value is None else value for value in args]
    with Recording(*chain.from_iterable(groups)) as recording:
        launch(kernel, (grid[0], len(tensors)), **dict(zip(kernel.arg_names, arguments, strict=True)), **dict(options))
    return recording


def rehearsed_together(launches: Iterable[tuple]) -> Iterator[tuple]:
    """The launches that `launch_together` will make of rehearsed ones, each on a weight and a workspace of its own."""
    found: dict[tuple, list[tuple]] = {}
    for kernel, args, keywords in launches:
        sizes = [arg[0].nbytes for arg in args if isinstance(arg, tuple)]
        if sizes and not any(isinstance(arg, (Tensor, TensorDescriptor)) for arg in (*args, *keywords.values())):
            key = kernel, tuple(None if isinstance(arg, tuple) else arg for arg in args), tuple(keywords.items())
            alike = found.setdefault(key, [])
            if has_room(alike, sizes[-1]):
                alike.append(args)
    for (kernel, _, keywords), alike in found.items():
        if len(alike) > 1:
            merged = [sum(each, ()) if isinstance(each[0], tuple) else each[0] for each in zip(*alike, strict=True)]
            yield kernel, tuple(merged), dict(keywords)
