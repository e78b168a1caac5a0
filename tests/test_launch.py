"""Recorded launches: what a repeated call launches, on which addresses, and when a call cannot be repeated."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import triton
from triton.backends.nvidia.driver import CudaLauncher, wrap_handle_tensordesc
from triton.tools.tensor_descriptor import TensorDescriptor

import torch_conv_triton
from torch_conv_triton import memory
from torch_conv_triton.kernels import launch as launching
from torch_conv_triton.kernels.launch import Recording, _Launch, descriptor, launch, workspace
from torch_conv_triton.kernels.oldest_first import OldestFirst


class Kernel:
    """Stands for a Triton kernel: keeps what it was launched with, first bound, then compiled."""

    arg_names = ("x_ptr", "w_ptr", "n", "y_ptr", "BLOCK")

    def __init__(self):
        self.bound, self.compiled, self.hooked = [], [], []

    def __getitem__(self, grid):
        def run(*args, **keywords):
            self.bound.append((grid, args, keywords))
            return Compiled(self)

        return run


class Compiled:
    function, packed_metadata = "function", "metadata"

    def __init__(self, kernel):
        self.kernel = kernel

    def run(self, x, y, z, stream, function, packed_metadata, metadata, enter_hook, exit_hook, *args):
        assert (function, packed_metadata, metadata, enter_hook, exit_hook) == ("function", "metadata", None, None, None)
        self.kernel.compiled.append(((x, y, z), args, stream))

    def __getitem__(self, grid):
        return lambda *args, stream: self.kernel.hooked.append((grid, args, stream))


@pytest.fixture(autouse=True)
def stream_7(monkeypatch):
    monkeypatch.setattr(launching, "_make_context_current", lambda: None)
    monkeypatch.setattr(launching, "driver", SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda device: 7)))


def record(kernel, x, w, y, *, n=5):
    with Recording(x, w, y) as recording:
        launch(kernel, (3,), x, w[1:], n, y, BLOCK=64, num_warps=4)
    return recording


def test_a_launch_is_made_once_while_it_is_recorded():
    kernel = Kernel()
    x, w, y = torch.empty(8), torch.empty(8), torch.empty(8)
    recording = record(kernel, x, w, y)
    assert recording.repeatable and not kernel.compiled
    (((grid, args, keywords)),) = kernel.bound
    assert (grid, args[2], keywords) == ((3,), 5, {"BLOCK": 64, "num_warps": 4})


def test_a_repeated_call_runs_on_the_new_addresses():
    kernel = Kernel()
    recording = record(kernel, torch.empty(8), torch.empty(8), torch.empty(8))
    x, w, y = torch.empty(8), torch.empty(8), torch.empty(8)
    recording.repeat(x, w, y)
    # the weight was passed from its second element on; num_warps is no argument of the kernel
    assert kernel.compiled == [((3, 1, 1), (x.data_ptr(), w.data_ptr() + 4, 5, y.data_ptr(), 64), 7)]
    # once more on the same, and on others
    recording.repeat(x, w, y)
    recording.repeat(x, y, w)
    assert kernel.compiled[1] == kernel.compiled[0]
    assert kernel.compiled[2][1] == (x.data_ptr(), y.data_ptr() + 4, 5, w.data_ptr(), 64)
    recording.repeat(x, w, y)
    recording.repeat(x, y, w)
    assert kernel.compiled[3:] == kernel.compiled[1:3]
    assert len(kernel.bound) == 1


def test_what_recordings_know_of_addresses_is_bounded_for_all_together(monkeypatch):
    monkeypatch.setattr(launching, "_kept", OldestFirst(limit=6))
    kernel = Kernel()
    x, w, *outputs = (torch.empty(8) for _ in range(6))
    first, second = (record(kernel, x, w, outputs[0]) for _ in range(2))
    for y in outputs:
        first.repeat(x, w, y)
    assert [key[-1] for key in first._known] == [y.data_ptr() for y in outputs[1:]]
    second.repeat(x, w, outputs[0])
    assert (len(first._known), len(second._known)) == (2, 1)
    # forgotten, and known again
    for _ in range(3):
        first.repeat(x, w, outputs[0])
    assert kernel.compiled[-1] == kernel.compiled[0]
    assert (len(first._known), len(second._known)) == (2, 1)


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
@pytest.mark.parametrize("chained", [False, True])
def test_a_profiler_hears_of_repeated_launches(hook, chained, monkeypatch):
    kernel = Kernel()
    recording = record(kernel, torch.empty(8), torch.empty(8), torch.empty(8))
    chain = triton.knobs.HookChain()
    monkeypatch.setattr(triton.knobs.runtime, hook, chain if chained else print)
    chain.add(print)
    recording.repeat(torch.empty(8), torch.empty(8), torch.empty(8))
    assert len(kernel.hooked) == 1 and not kernel.compiled


def test_a_workspace_is_allocated_anew(monkeypatch):
    kernel = Kernel()
    x, y = torch.empty(8), torch.empty(8)
    with Recording(x, y) as recording:
        space = workspace((16,), torch.float32, x.device)
        launch(kernel, (1, 2), x, space.view(4, 4), 5, y, BLOCK=64)
    fresh = torch.empty(16)
    monkeypatch.setattr(memory, "uninitialised", lambda shape, strides, dtype, device: fresh)
    recording.repeat(x, y)
    assert kernel.compiled == [((1, 2, 1), (x.data_ptr(), fresh.data_ptr(), 5, y.data_ptr(), 64), 7)]


def test_a_descriptor_is_made_again_on_the_new_address():
    kernel = Kernel()
    x, w, y = torch.empty(8, 16), torch.empty(8), torch.empty(8)
    with Recording(x, w, y) as recording:
        launch(kernel, (3,), descriptor(x[2:], [6, 16], [16, 1], [4, 16]), w, 5, y, BLOCK=64)
    x = torch.empty(8, 16)
    recording.repeat(x, w, y)
    ((_, (again, *_), _),) = kernel.compiled
    assert (again.shape, again.strides, again.block_shape, again.padding) == ([6, 16], [16, 1], [4, 16], "zero")
    assert again.base.data_ptr() == x[2:].data_ptr()


def test_recordings_are_joined():
    kernel = Kernel()
    first = record(kernel, torch.empty(8), torch.empty(8), torch.empty(8), n=5)
    x, y = torch.empty(8), torch.empty(8)
    with Recording(x, None, y) as second:
        launch(kernel, (3,), x, workspace((16,), torch.float32, x.device), 6, y, BLOCK=64)
    assert (first.workspace_bytes, second.workspace_bytes) == ([], [64])
    # of the whole x, the weight and y are given; what the first stores and the second reads is in its workspace, and so is the
    # workspace of the second
    whole = Recording.joined([(first, [(0, 0), (1, 0), (3, 0)]), (second, [(3, 0), (3, 0), (2, 0), (3, 512)])], 1024, x.device)
    x, w, y = torch.empty(8), torch.empty(8), torch.empty(8)
    with pytest.MonkeyPatch.context() as patched:
        space = torch.empty(1024, dtype=torch.uint8)
        patched.setattr(memory, "uninitialised", lambda shape, strides, dtype, device: space if shape == (1024,) else None)
        whole.repeat(x, w, y)
    between, own = space.data_ptr(), space.data_ptr() + 512
    assert [args for _, args, _ in kernel.compiled] == [
        (x.data_ptr(), w.data_ptr() + 4, 5, between, 64),
        (between, own, 6, y.data_ptr(), 64),
    ]


def test_what_constants_alone_fill_is_told_apart():
    kernel = Kernel()
    x, w, y = torch.empty(8), torch.empty(8), torch.empty(8)
    with Recording(x, w, y) as recording:
        packed, copied = workspace((16,), torch.float32, x.device), workspace((8,), torch.float32, x.device)
        launch(kernel, (1,), w, packed, 5, packed[8:], BLOCK=64)
        launch(kernel, (2,), x, copied, 5, copied, BLOCK=64)
        launch(kernel, (3,), copied, packed, 5, y, BLOCK=64)
    assert (recording.prepared({1}), recording.prepared({}), recording.prepared({0, 1})) == ({0}, set(), {0, 1})
    before, after = recording.split({1})
    before.repeat(x, w, y)
    assert [grid[0] for grid, _, _ in kernel.compiled] == [1]
    after.repeat(x, w, y)
    assert [grid[0] for grid, _, _ in kernel.compiled] == [1, 2, 3]


def test_what_cannot_be_repeated_cannot_be_joined():
    kernel = Kernel()
    x, y = torch.empty(8), torch.empty(8)
    with Recording(x, None, y) as recording:
        launch(kernel, (3,), x, torch.empty(8), 5, y, BLOCK=64)
    assert not Recording.joined([(recording, [(0, 0), (0, 0), (1, 0)])], 0, x.device).repeatable


def test_nothing_is_noted_outside_a_recording():
    kernel = Kernel()
    recording = record(kernel, torch.empty(8), torch.empty(8), torch.empty(8))
    launch(kernel, (9,), torch.empty(8), torch.empty(8), 5, torch.empty(8), BLOCK=64)
    recording.repeat(torch.empty(8), torch.empty(8), torch.empty(8))
    assert [grid for grid, _, _ in kernel.compiled] == [(3, 1, 1)]


def test_a_tuple_of_tensors_is_repeated():
    kernel = Kernel()
    x, a, b, y = (torch.empty(8) for _ in range(4))
    with Recording(x, a, b, y) as recording:
        launch(kernel, (3,), x, (a, b), (5, 6), y, BLOCK=64)
    x, a, b, y = (torch.empty(8) for _ in range(4))
    recording.repeat(x, a, b, y)
    ((_, args, _),) = kernel.compiled
    assert args == (x.data_ptr(), (a.data_ptr(), b.data_ptr()), (5, 6), y.data_ptr(), 64)


def test_tensors_that_share_memory_now_need_not_share_it_later():
    kernel = Kernel()
    both, y = torch.empty(16), torch.empty(8)
    x, w = both[:8], both[8:]
    with Recording(x, w, y) as recording:
        launch(kernel, (3,), x, w, 5, y, BLOCK=64)
    x, w = torch.empty(8), torch.empty(8)
    recording.repeat(x, w, y)
    assert kernel.compiled[0][1][:2] == (x.data_ptr(), w.data_ptr())


@pytest.mark.parametrize("what", ["an argument from elsewhere", "one tensor twice", "a view of memory that is shared"])
def test_a_call_that_cannot_be_repeated_says_so(what):
    kernel = Kernel()
    x, y = torch.empty(8), torch.empty(8)
    w = torch.empty(8) if what == "an argument from elsewhere" else x[1:]
    with Recording(
        x, x if what == "one tensor twice" else None if what == "an argument from elsewhere" else x[2:], y
    ) as recording:
        launch(kernel, (3,), x, w, 5, y, BLOCK=64)
    assert not recording.repeatable
    assert len(kernel.bound) == 1


def test_every_kernel_is_launched_where_a_recording_sees_it():
    sources = [path.read_text() for path in (Path(torch_conv_triton.__file__).parent / "kernels").glob("*.py")]
    assert sum(len(re.findall(r"\blaunch\($", source, re.MULTILINE)) for source in sources) >= 7
    for source in sources:
        assert not re.search(r"_kernel\[", source)


def test_the_inner_call_of_a_launch_is_what_triton_s_launcher_calls():
    calls = []

    def c_launcher(*args):
        calls.append(args)

    signature = {"x": "*fp32", "y": "tensordesc<fp32[8,16]>", "n": "i32"}
    launcher = CudaLauncher.__new__(CudaLauncher)
    sizes = dict.fromkeys(("num_ctas", "global_scratch_size", "profile_scratch_size"), 0)
    facts = dict.fromkeys(("global_scratch_align", "profile_scratch_align", "launch_pdl", "arg_annotations", "kernel_signature"))
    launch = wrap_handle_tensordesc(c_launcher, signature, None)
    vars(launcher).update(sizes, **facts, launch_cooperative_grid=False, launch=launch)
    source, metadata = SimpleNamespace(signature=signature), SimpleNamespace(tensordesc_meta=None)
    compiled = SimpleNamespace(run=launcher, function=3, packed_metadata=(), src=source, metadata=metadata)
    described = TensorDescriptor(torch.empty(8, 16), [8, 16], [16, 1], [8, 16])
    whole = _Launch(compiled, (4, 1, 1), 7, [1 << 20, described, 5])
    call, args = whole.call()
    call(*args)
    inner, args = whole.inner_call()
    assert inner is c_launcher and len(calls) == 1
    inner(*args)
    assert calls[0] == calls[1]


def test_a_launch_that_takes_scratch_memory_goes_through_triton_s_launcher():
    launcher = CudaLauncher.__new__(CudaLauncher)
    launcher.global_scratch_size = 128
    compiled = SimpleNamespace(run=launcher, function=3, packed_metadata=())
    assert _Launch(compiled, (4, 1, 1), 7, []).inner_call()[0] is launcher
