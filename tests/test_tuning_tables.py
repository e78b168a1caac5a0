"""Tables of measured choices: which problems share an entry, what files may hold, and how dispatch uses them."""

import json
import logging
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch
from commands import ROOT, python
from test_dispatch import problem

from torch_conv_triton import dispatch, execute
from torch_conv_triton.configs import Config, Device
from torch_conv_triton.tuning import tables
from torch_conv_triton.tuning.tables import Entry

GPU = Device("Some GPU (80 GB)", capability=90, sm_count=132, shared_memory=232448)
DENSE = problem((8, 64, 4000), 128, 3)
ENTRY = Entry("dense", Config(64, 64, 16, num_warps=4, num_stages=2, tap_major=True), 0.5, 1.25)
ATEN = Entry("aten", None, 0.25, 0.25)
SHIPPED_PATH = tables.shipped_path


@pytest.fixture(autouse=True)
def own_tables(tmp_path, monkeypatch):
    """A directory for the user's tables, and one for the package's, both empty."""
    monkeypatch.setenv(tables.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(tables, "shipped_path", lambda gpu: tmp_path / "shipped" / f"{gpu}.json")
    tables.forget()
    execute.forget_plans()
    yield
    tables.forget()
    execute.forget_plans()


@pytest.fixture
def path():
    return tables.user_path(GPU.name)


def keep(path, *pairs):
    """Store an entry for each problem, and read the tables again."""
    tables.store(path, GPU.name, {tables.key(problem): entry for problem, entry in pairs})
    tables.forget()
    execute.forget_plans()


class TestKeys:
    @pytest.mark.parametrize(
        "change",
        [
            {"x": (8, 64, 3600)},
            {"x": (8, 64, 4001)},
            {"x": (4, 64, 7000)},
            {"padding": 1},
            {"x": (8, 64, 4000), "dilation": 1},
        ],
        ids=str,
    )
    def test_these_share_an_entry(self, change):
        arguments = {"x": (8, 64, 4000), "C_out": 128, "K": 3}
        assert tables.key(problem(**(arguments | change))) == tables.key(DENSE)

    @pytest.mark.parametrize(
        "change",
        [
            {"x": (8, 64, 2000)},
            {"x": (8, 72, 4000)},
            {"x": (8, 80, 4000)},
            {"x": (512, 64, 64)},
            {"C_out": 192},
            {"K": 4},
            {"stride": 2},
            {"dilation": 2},
            {"groups": 2},
            {"bias": False},
            {"dtype": torch.float16},
            {"layout": "NLC"},
            {"transposed": True},
        ],
        ids=str,
    )
    def test_these_do_not(self, change):
        arguments = {"x": (8, 64, 4000), "C_out": 128, "K": 3}
        assert tables.key(problem(**(arguments | change))) != tables.key(DENSE)

    def test_precision_counts(self):
        assert tables.key(replace(DENSE, precision="ieee")) != tables.key(DENSE)

    def test_few_channels_count_one_by_one(self):
        assert len({tables.key(problem((8, channels, 4000), 128, 3)) for channels in range(1, 17)}) == 16

    @pytest.mark.parametrize(("some", "others"), [((200, 200), (216, 216)), ((513, 513), (577, 577)), ((65, 65), (79, 79))])
    def test_many_channels_share_buckets(self, some, others):
        def key(channels):
            return tables.key(problem((8, channels[0], 4000), channels[1], 3))

        assert key(some) == key(others)
        # what tiles divide is a bucket of its own
        assert key((256, 256)) != key((250, 250))
        assert key((192, 192)) != key((256, 256))

    def test_a_full_gpu_is_full(self):
        assert tables.key(problem((64, 64, 224280), 128, 3)) == tables.key(problem((64, 64, 2242800), 128, 3))

    def test_the_dilation_of_a_transposed_one_counts_exactly_for_its_phases_follow_from_it(self):
        keys = {tables.key(problem((8, 64, 4000), 64, 5, stride=4, dilation=d, transposed=True)) for d in (5, 6, 7, 8)}
        assert len(keys) == 4
        assert len({tables.key(problem((8, 64, 4000), 64, 5, dilation=d)) for d in (5, 6, 7, 8)}) == 1

    def test_a_key_is_readable(self):
        assert tables.key(DENSE) == "dense fp32 tf32 NCL bias i64/64 o128/64 g1 K3 s1 d1 n14"
        depthwise = problem((64, 5376, 5), 5376, 4, groups=5376, dtype=torch.bfloat16)
        assert tables.key(depthwise) == "depthwise bf16 ieee NCL bias i1 o1 g8192 K4 s1 d1 n7 short2"


class TestFiles:
    def test_what_is_stored_is_found_for_all_problems_alike(self, path):
        assert tables.lookup(DENSE, GPU) is None
        keep(path, (DENSE, ENTRY))
        assert tables.lookup(problem((8, 64, 3600), 128, 3), GPU) == ENTRY
        assert tables.lookup(DENSE, replace(GPU, name="another")) is None

    def test_a_table_is_json_an_entry_a_line(self, path):
        keep(path, (DENSE, ENTRY), (replace(DENSE, has_bias=False), ATEN))
        table = json.loads(path.read_text())
        assert table["version"] == tables.VERSION
        assert table["gpu"] == GPU.name
        assert table["torch"] == torch.__version__
        config = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 16, "num_stages": 2, "tap_major": True}
        assert table["entries"] == {
            tables.key(DENSE): {"kernel": "dense", "config": config, "ms": 0.5, "aten_ms": 1.25},
            tables.key(replace(DENSE, has_bias=False)): {"kernel": "aten", "config": None, "ms": 0.25, "aten_ms": 0.25},
        }
        assert len(path.read_text().splitlines()) == 10

    def test_another_torch_or_triton_has_another_table(self, path, monkeypatch):
        keep(path, (DENSE, ENTRY))
        assert path.name.startswith("some-gpu-80-gb-torch")
        monkeypatch.setattr(tables, "_version", lambda package: "9.9.1+cu130")
        assert tables.user_path(GPU.name).name == "some-gpu-80-gb-torch9.9-triton9.9.json"

    def test_the_users_entry_wins_over_the_shipped_one_and_the_rest_of_the_shipped_counts(self, path):
        other = problem((8, 32, 4000), 64, 3)
        keep(tables.shipped_path(GPU.name), (DENSE, ATEN), (other, ATEN))
        keep(path, (DENSE, ENTRY))
        assert tables.lookup(DENSE, GPU) == ENTRY
        assert tables.lookup(other, GPU) == ATEN

    def test_storing_keeps_what_is_there(self, path):
        other = problem((8, 32, 4000), 64, 3)
        keep(path, (DENSE, ATEN), (other, ATEN))
        keep(path, (DENSE, ENTRY))
        assert tables.parse(tables.read(path)) == {tables.key(DENSE): ENTRY, tables.key(other): ATEN}

    def test_several_processes_may_store_at_once(self, path):
        script = (
            "import sys; from pathlib import Path; from torch_conv_triton.tuning import tables\n"
            "for i in range(40): tables.store(Path(sys.argv[1]), 'gpu', {f'{sys.argv[2]} {i}': tables.Entry('aten', None, 1, 1)})"
        )
        with ThreadPoolExecutor(2) as threads:
            done = list(threads.map(lambda name: python("-c", script, str(path), name), ("a", "b")))
        assert [process.returncode for process in done] == [0, 0], done
        assert tables.read(path).keys() == {f"{name} {i}" for name in ("a", "b") for i in range(40)}

    @pytest.mark.parametrize(
        "text",
        ["", "{", "[]", "null", '{"version": 0, "entries": {}}', '{"entries": {}}', '{"version": 1, "entries": []}', "\udcff"],
    )
    def test_a_corrupt_file_is_set_aside_by_name_and_nothing_else_is_lost(self, path, text, caplog):
        keep(tables.shipped_path(GPU.name), (DENSE, ATEN))
        path.parent.mkdir(parents=True)
        path.write_bytes(text.encode(errors="surrogateescape"))
        assert tables.lookup(DENSE, GPU) == ATEN
        (aside,) = path.parent.glob("*.corrupt-*")
        assert aside.read_bytes() == text.encode(errors="surrogateescape")
        assert f"{path} is set aside as {aside.name}" in caplog.text
        keep(path, (DENSE, ENTRY))
        assert tables.lookup(DENSE, GPU) == ENTRY

    def test_storing_over_a_corrupt_file_sets_it_aside_too(self, path, caplog):
        path.parent.mkdir(parents=True)
        path.write_text("{")
        keep(path, (DENSE, ENTRY))
        assert [aside.read_text() for aside in path.parent.glob("*.corrupt-*")] == ["{"]
        assert tables.lookup(DENSE, GPU) == ENTRY

    def test_a_corrupt_file_that_cannot_be_renamed_is_only_warned_of(self, path, monkeypatch, caplog):
        path.parent.mkdir(parents=True)
        path.write_text("{")
        monkeypatch.setattr(os, "replace", _refuse)
        assert tables.lookup(DENSE, GPU) is None
        assert f"{path} is corrupt, and cannot be set aside" in caplog.text
        assert path.read_text() == "{"

    @pytest.mark.parametrize(
        "record",
        [
            {"kernel": "dense", "config": {"BLOCK_M": 64, "BLOCK_N": 64, "colour": 1}, "ms": 1, "aten_ms": 1},
            {"kernel": "dense", "config": {"BLOCK_M": "64", "BLOCK_N": 64}, "ms": 1, "aten_ms": 1},
            {"kernel": "dense", "config": [64, 64], "ms": 1, "aten_ms": 1},
            {"kernel": "dense", "config": None},
            {"kernel": "dense", "config": None, "ms": "fast", "aten_ms": 1},
        ],
        ids=str,
    )
    def test_an_entry_of_another_version_of_the_package_is_not_used_and_not_lost(self, path, record, caplog):
        path.parent.mkdir(parents=True)
        records = {tables.key(DENSE): record, "other": ATEN.to_record()}
        path.write_text(json.dumps({"version": tables.VERSION, "entries": records}))
        assert tables.lookup(DENSE, GPU) is None
        assert tables.entries(GPU.name) == {"other": ATEN}
        assert f"{path}: entries of another version of this package are not used: 1" in caplog.text
        tables.store(path, GPU.name, {"third": ATEN})
        assert tables.read(path)[tables.key(DENSE)] == record

    def test_a_write_that_fails_leaves_the_table_as_it_was(self, path, monkeypatch):
        keep(path, (DENSE, ATEN))
        before = path.read_text()
        with monkeypatch.context() as patch, pytest.raises(PermissionError):
            patch.setattr(os, "replace", _refuse)
            tables.store(path, GPU.name, {tables.key(DENSE): ENTRY})
        assert path.read_text() == before
        assert [found.name for found in path.parent.iterdir() if found != path] == [f".{path.name}.lock"]

    def test_a_directory_that_cannot_be_made_is_an_error_for_writing_only(self, tmp_path, monkeypatch):
        (tmp_path / "file").write_text("")
        monkeypatch.setenv(tables.CACHE_VARIABLE, str(tmp_path / "file"))
        tables.forget()
        assert tables.lookup(DENSE, GPU) is None
        with pytest.raises(OSError, match="file"):
            tables.store(tables.user_path(GPU.name), GPU.name, {tables.key(DENSE): ENTRY})

    def test_the_default_directory_is_the_users_cache(self, monkeypatch, tmp_path):
        monkeypatch.delenv(tables.CACHE_VARIABLE)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert tables.user_path(GPU.name).parent == tmp_path / "torch_conv_triton" / f"tables-{tables.VERSION}"
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setenv("HOME", str(tmp_path))
        assert tables.user_path(GPU.name).parent.parent == tmp_path / ".cache" / "torch_conv_triton"

    def test_files_are_read_once(self, path, monkeypatch):
        keep(path, (DENSE, ENTRY))
        reads = []
        monkeypatch.setattr(tables, "read", lambda path, read=tables.read: reads.append(path) or read(path))
        for _ in range(3):
            assert tables.lookup(DENSE, GPU) == ENTRY
        assert reads == [tables.shipped_path(GPU.name), path]

    def test_graphs_compiled_by_other_tables_are_compiled_again(self, path):
        before = tables.fingerprint()
        keep(path, (DENSE, ENTRY))
        after = tables.fingerprint()
        keep(path, (DENSE, ATEN))
        assert len({before, after, tables.fingerprint()}) == 3


def test_every_shipped_table_is_whole():
    for path in (ROOT / "torch_conv_triton" / "tuning" / "tables").glob("*.json"):
        records, gpu = tables.read(path), json.loads(path.read_text())["gpu"]
        assert SHIPPED_PATH(gpu) == path
        assert tables.parse(records).keys() == records.keys()


def test_a_shipped_table_is_named_after_its_gpu():
    assert SHIPPED_PATH("NVIDIA H200").name == "nvidia-h200.json"
    assert SHIPPED_PATH("NVIDIA H200").parent == ROOT / "torch_conv_triton" / "tuning" / "tables"


def _refuse(*args):
    raise PermissionError("not here")


class TestDispatch:
    def test_an_entry_is_the_plan_and_says_so(self, path):
        keep(path, (DENSE, ENTRY))
        plan = dispatch.plan(DENSE, GPU)
        assert (plan.kernel, plan.config, plan.tuned) == ("dense", ENTRY.config, True)
        assert plan.reason == "tuned: 0.5 ms, aten 1.25"

    @pytest.mark.parametrize("kernel", dispatch.ATEN)
    def test_aten_may_be_the_entry(self, path, kernel):
        keep(path, (DENSE, Entry(kernel, None, 0.25, None)))
        plan = dispatch.plan(DENSE, GPU)
        assert (plan.kernel, plan.is_aten, plan.reason) == (kernel, True, "tuned: 0.25 ms")

    def test_without_an_entry_the_rules_decide(self, path):
        keep(path, (problem((8, 64, 4000), 256, 3), ENTRY))
        assert dispatch.plan(DENSE, GPU) == dispatch.plan_by_rule(DENSE, GPU)

    def test_what_the_kernels_do_not_support_goes_to_aten_whatever_the_table_says(self, path):
        double = replace(DENSE, dtype=torch.float64)
        keep(path, (double, ENTRY))
        assert dispatch.plan(double, GPU) == dispatch.aten("fp64 is computed by aten")

    NLC = problem((8, 64, 4096), 128, 3, dtype=torch.bfloat16, layout="NLC")
    TMA = Entry("dense_tma", Config(128, 128, 32, num_stages=3, tap_major=True), 0.5, 1.25)
    APART = problem((8, 64, 400), 32, 70, stride=64, dilation=2, transposed=True)

    def test_an_entry_that_fits_its_bucket_but_not_this_problem_falls_through(self, path):
        keep(path, (self.NLC, self.TMA))
        assert dispatch.plan(self.NLC, GPU).tuned
        # rows that a descriptor cannot address, of the same bucket
        shifted = replace(self.NLC, aligned=False)
        assert dispatch.plan(shifted, GPU) == dispatch.plan_by_rule(shifted, GPU)

    @pytest.mark.parametrize(
        ("problem", "entry"),
        [
            (DENSE, Entry("no_such_kernel", ENTRY.config, 0.5, 1)),
            (DENSE, Entry("depthwise", ENTRY.config, 0.5, 1)),
            (DENSE, Entry("dense", None, 0.5, 1)),
            (DENSE, Entry("dense", Config(256, 256, 256, num_stages=4, tap_major=True), 0.5, 1)),
            (DENSE, Entry("dense", Config(64, 64, 8, tap_major=True), 0.5, 1)),
            (NLC, Entry("dense_tma", Config(128, 128, 48, tap_major=True), 0.5, 1)),
            (NLC, Entry("dense", Config(64, 32, 16, weights_left=True), 0.5, 1)),
            (APART, Entry("transposed_interleaved", Config(64, 16, 16, tap_major=True), 0.5, 1)),
            (problem((1, 64, 2**25 + 2**20), 64, 1), ATEN),
        ],
        ids=lambda value: f"{value.kernel} {value.config}" if isinstance(value, Entry) else "",
    )
    def test_an_entry_that_no_kernel_runs_falls_through(self, path, problem, entry):
        keep(path, (problem, entry))
        assert tables.lookup(problem, GPU) == entry
        assert dispatch.plan(problem, GPU) == dispatch.plan_by_rule(problem, GPU)

    def test_registers_of_smaller_gpus_are_fewer(self, path):
        small = Device(GPU.name, capability=89, sm_count=128, shared_memory=101376)
        keep(path, (DENSE, Entry("dense", Config(128, 256, 16, num_warps=8, tap_major=True), 0.5, 1)))
        assert dispatch.plan(DENSE, GPU).tuned
        assert not dispatch.plan(DENSE, small).tuned

    def test_the_interpreter_asks_for_no_more(self, caplog):
        with caplog.at_level(logging.DEBUG):
            assert dispatch.plan(DENSE, dispatch.INTERPRETER).kernel.startswith("dense")
        assert caplog.text == ""
