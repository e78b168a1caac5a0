"""What tuning found: for a kind of problem on a GPU, the fastest kernel with its config, and how long it took.

A table is a JSON file for one GPU: ``{"version", "gpu", "torch", "triton", "entries": {key: {"kernel", "config", "ms",
"aten_ms"}}}``, times in ms. `shipped_path` names the one that comes with the package, `user_path` the one that the user's own
tuning writes; an entry of the user's wins. Reading needs no GPU and imports no Triton, and never fails: a file that is no
table is set aside, and what is left counts.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from torch_conv_triton.configs import Config, Device
from torch_conv_triton.configs_gradients import WeightGradConfig
from torch_conv_triton.problem import Conv1dProblem, ceil_pow2, dtype_name, layout_of

log = logging.getLogger(__name__)

# to be raised when a key or a config no longer means what it did
VERSION = 1
CACHE_VARIABLE = "TORCH_CONV_TRITON_CACHE"
# with more positions a GPU is full many times over, and more do not change what is fastest
MOST_POSITIONS = 2**20
# a tile takes at most about so many positions; a shorter output leaves part of it empty
SHORT_OUTPUT = 128


@dataclass(frozen=True, slots=True)
class Entry:
    """The fastest way to run a kind of problem: `kernel` and `config` as in a plan; ms it took, and plain aten where it runs."""

    kernel: str
    config: Config | WeightGradConfig | None
    ms: float
    aten_ms: float | None

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Entry:
        """Raises KeyError, TypeError or ValueError for a record of another shape."""
        config = record["config"]
        if config is not None and not all(type(value) in (int, bool) for value in config.values()):
            raise TypeError(f"a config holds integers and flags, not {config}")
        make = WeightGradConfig if str(record["kernel"]).startswith("weight_grad") else Config
        return cls(
            str(record["kernel"]),
            None if config is None else make(**config),
            float(record["ms"]),
            None if record["aten_ms"] is None else float(record["aten_ms"]),
        )

    def to_record(self) -> dict[str, Any]:
        config = None
        if self.config is not None:
            values = ((f, getattr(self.config, f.name)) for f in fields(self.config))
            config = {f.name: value for f, value in values if value != f.default}
        aten_ms = None if self.aten_ms is None else round(self.aten_ms, 6)
        return {"kernel": self.kernel, "config": config, "ms": round(self.ms, 6), "aten_ms": aten_ms}


def key(problem: Conv1dProblem) -> str:
    """The kind of problem: problems of one key share a table's entry.

    Exact: regime, dtype, precision, layout of x, bias or none, K, stride. In buckets: channels of a group (see `_channels`),
    groups, by powers of two; dilation likewise, but exact where transposed, whose phases follow from it; N * L_out by powers of
    two, up to a limit. The length alone counts only where it is short of a tile, by powers of two. A gradient says so first, and
    that of a weight also the layout of grad_output.
    """
    p = problem
    dilation = p.dilation if p.transposed else ceil_pow2(p.dilation)
    positions = min(max(1, p.N * p.L_out), MOST_POSITIONS).bit_length() - 1
    short = f" short{ceil_pow2(p.L_out)}" if p.L_out < SHORT_OUTPUT else ""
    kind = "" if p.kind == "forward" else f"{p.kind} "
    if p.kind == "weight_grad":
        kind += f"{layout_of(p.y_strides, p.C_out, p.L_out)} "
    return (
        f"{kind}{p.regime} {dtype_name(p.dtype)} {p.precision} {p.layout} {'bias' if p.has_bias else 'nobias'} "
        f"i{_channels(p.C_in_per_group)} o{_channels(p.C_out_per_group)} g{ceil_pow2(p.groups)} "
        f"K{p.K} s{p.stride} d{dilation if p.K > 1 else 1} n{positions}{short}"
    )


def _channels(count: int) -> str:
    """Below 16 the count; else the end of its bucket, of which four lie between powers of two, and what divides the count.

    16, 32, 48, 64, 80, ... 128, 160, 192, 224, 256, 320 and so on: a tile fills such a bucket about alike. The power of two that
    divides the count, up to 64, decides which slices of the reduction are whole and which rows are aligned.
    """
    if count < 16:
        return str(count)
    step = max(16, ceil_pow2(count) // 8)
    return f"{-(-count // step) * step}/{min(count & -count, 64)}"


def lookup(problem: Conv1dProblem, device: Device) -> Entry | None:
    """What is known to be fastest for problems like this one on such a GPU, or None."""
    known = entries(device.name)
    return known.get(key(problem)) if known else None


@cache
def entries(gpu: str) -> Mapping[str, Entry]:
    """All entries for a GPU by its name, read once a process (see `forget`)."""
    return {**_parsed(shipped_path(gpu), own=False), **_parsed(user_path(gpu), own=True)}


@cache
def fingerprint() -> str:
    """Hash of the user's tables: graphs compiled by other tables may have been compiled otherwise."""
    digest = hashlib.sha256()
    with contextlib.suppress(OSError):
        for path in sorted(_user_directory().glob("*.json")):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def forget() -> None:
    """Read the tables again when they are next asked."""
    entries.cache_clear()
    fingerprint.cache_clear()


def shipped_path(gpu: str) -> Path:
    """The package's table for a GPU by its name; most have none."""
    return Path(__file__).with_name("tables") / f"{_slug(gpu)}.json"


def user_path(gpu: str) -> Path:
    """The user's table for a GPU by its name.

    It lies in ``$TORCH_CONV_TRITON_CACHE``, else in the user's cache directory. Another minor version of torch or Triton has
    another table: what was right and fast in one is not known to be in the other.
    """
    versions = "-".join(f"{name}{'.'.join(_version(name).split('.')[:2])}" for name in ("torch", "triton"))
    return _user_directory() / f"{_slug(gpu)}-{versions}.json"


def _user_directory() -> Path:
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        root = Path(chosen).expanduser()
    else:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "torch_conv_triton"
    return root / f"tables-{VERSION}"


def _slug(gpu: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")


@cache
def _version(package: str) -> str:
    if package == "torch":
        return torch.__version__
    # nightly builds of PyTorch bring Triton under another name
    for name in (package, f"pytorch-{package}"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return "none"


def read(path: Path) -> dict[str, dict[str, Any]]:
    """The records of a table by key; none where there is no file. Raises OSError, and ValueError for a file that is no table."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}
    table = json.loads(text)
    if not isinstance(table, dict) or table.get("version") != VERSION:
        found = repr(table.get("version")) if isinstance(table, dict) else type(table).__name__
        raise ValueError(f"not a table of version {VERSION}, but {found}")
    records = table.get("entries")
    if not isinstance(records, dict) or not all(isinstance(record, dict) for record in records.values()):
        raise ValueError("its entries are not an object of objects")
    return records


def parse(records: Mapping[str, Mapping[str, Any]]) -> dict[str, Entry]:
    """The entries by key, without those that are none, as of a package whose configs have other fields."""
    found = {}
    for name, record in records.items():
        with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):
            found[name] = Entry.from_record(record)
    return found


def store(path: Path, gpu: str, found: Mapping[str, Entry]) -> None:
    """Add entries to the table at `path`, in place of those of the same keys. Raises OSError where it cannot be written.

    Several processes may do so at once. A file that is there and is no table is set aside.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path):
        try:
            records = read(path)
        except ValueError as error:
            _set_aside(path, error)
            records = {}
        records |= {key: entry.to_record() for key, entry in found.items()}
        _replace(path, _text(gpu, records))


def _text(gpu: str, records: Mapping[str, Mapping[str, Any]]) -> str:
    """A table as JSON, an entry a line."""
    head = {"version": VERSION, "gpu": gpu, "torch": _version("torch"), "triton": _version("triton")}
    start = "".join(f"{json.dumps(name)}: {json.dumps(value)},\n" for name, value in head.items())
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(records[key])}" for key in sorted(records))
    return f'{{\n{start}"entries": {{\n{lines}\n}}\n}}\n'


def _replace(path: Path, text: str) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        # temporary files are private, and a table may be for everybody
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of a table among processes; the kernel frees it when its holder dies."""
    import fcntl

    with open(path.with_name(f".{path.name}.lock"), "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _set_aside(path: Path, error: Exception) -> None:
    """Rename a file that is no table, so that nothing in it is lost. The caller holds the lock."""
    aside = path.with_name(f"{path.name}.corrupt-{time.time_ns()}")
    os.replace(path, aside)
    log.warning("%s is set aside as %s: %s", path, aside.name, error)


def _parsed(path: Path, *, own: bool) -> dict[str, Entry]:
    """The entries of a file, whatever state it is in. A corrupt one is set aside if it is the user's `own`."""
    try:
        records = read(path)
    except (OSError, ValueError) as error:
        if own and isinstance(error, ValueError):
            records = _after_setting_aside(path)
        else:
            log.warning("%s is not read: %s", path, error)
            return {}
    found = parse(records)
    if len(found) < len(records):
        count = len(records) - len(found)
        log.warning("%s: entries of another version of this package are not used: %d", path, count)
    return found


def _after_setting_aside(path: Path) -> dict[str, dict[str, Any]]:
    """The records of a file that was corrupt when it was read: another process may have replaced it since."""
    try:
        with _locked(path):
            try:
                return read(path)
            except ValueError as error:
                _set_aside(path, error)
    except OSError as error:
        log.warning("%s is corrupt, and cannot be set aside: %s", path, error)
    return {}
