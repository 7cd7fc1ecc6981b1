"""What the benchmarks share: fair timing, the machine they ran on, and the tables they leave.

Timing. The providers of one case take turns: in each round every provider is called once untimed, which brings its
data back into the caches, then a few times timed, each call for itself. Slow phases of the machine so fall on all
providers alike; ratios within one run mean something, absolute times of two runs need not. Reported are the median and
the 20th and 80th percentile over all rounds.

Caches. Inputs and outputs are reused from call to call, so what fits into a cache is measured in that cache, as in
training, where the network has just written the logits. Each case is therefore set beside a plain copy that moves as
many bytes with as many threads under the same conditions: reaching its GB/s is the most that an operator bound by
memory can do.
"""

from __future__ import annotations

import os
import sys

# The folder of a script comes first on the path, and there profile.py hides the standard library's ``profile``, which
# torch.compile imports. So the folder goes last, and whatever may compile imports this module before it does.
HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:] = [*(path for path in sys.path if os.path.abspath(path) != HERE), HERE]

# ruff: noqa: E402
import argparse
import contextlib
import csv
import dataclasses
import itertools
import json
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from dtrades_fast import environment
from dtrades_fast.ops import BACKEND, _library

RESULTS = Path(HERE) / "results"
#: the provider that every case is set beside
COPY = "copy"

#: Cycles that the GPU waits per call to be timed, about 0.2 ms: longer than the host needs for a call.
HEAD_START = 300_000
#: Calls to send off at a time: a stream takes about 1,000 launches, and a call in plain PyTorch may be 20.
IN_FLIGHT = 40

#: Of glibc's allocator: blocks from 64 KiB on are the system's own, and free memory is given back.
FREEING = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}

Call = Callable[[], object]


@dataclasses.dataclass(frozen=True)
class Timing:
    """Microseconds per call."""

    median_us: float
    p20_us: float
    p80_us: float

    @classmethod
    def of(cls, samples_us: Sequence[float]) -> Timing:
        p20, median, p80 = (float(p) for p in np.percentile(samples_us, (20, 50, 80)))
        return cls(median, p20, p80)


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the CSV, one column per field."""

    op: str
    mode: str
    shape: str
    dtype: str
    provider: str
    threads: int
    median_us: float
    p20_us: float
    p80_us: float
    gb_per_s: float


COLUMNS = tuple(field.name for field in dataclasses.fields(Row))


def gb_per_s(moved: int, microseconds: float) -> float:
    """Bandwidth in 10^9 bytes per second; ``moved`` are the bytes read plus the bytes written."""
    return moved / microseconds / 1e3


# ---- timing ------------------------------------------------------------------------------------------------------


def _time_on_cpu(call: Call, count: int) -> list[float]:
    samples = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        samples.append((time.perf_counter() - start) * 1e6)
    return samples


def _time_on_cuda(call: Call, count: int) -> list[float]:
    """Between events on the stream. The device is held up until the host has sent off all calls, as in training, where
    it is ahead of the device: what is measured is the device's time, not Python's."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    torch.cuda.synchronize()
    torch.cuda._sleep(HEAD_START * count)
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) * 1e3 for start, end in itertools.pairwise(events)]


@dataclasses.dataclass(frozen=True)
class Effort:
    """How long to measure each provider of a case: about ``seconds`` in ``rounds`` turns, at least one call each."""

    seconds: float = 0.25
    rounds: int = 12
    calls_per_round: int = 100


def measure(calls: Mapping[str, Call], device: torch.device, effort: Effort) -> dict[str, Timing]:
    """Time the calls in turns (see above), after warming each up."""
    timed = _time_on_cuda if device.type == "cuda" else _time_on_cpu
    most = min(effort.calls_per_round, IN_FLIGHT) if device.type == "cuda" else effort.calls_per_round
    counts: dict[str, int] = {}
    samples: dict[str, list[float]] = {}
    for name, call in calls.items():
        timed(call, 2)
        typical = min(timed(call, 3)) * 1e-6
        counts[name] = max(1, min(most, int(effort.seconds / effort.rounds / max(typical, 1e-7))))
        samples[name] = []
    for _ in range(effort.rounds):
        for name, call in calls.items():
            call()
            samples[name] += timed(call, counts[name])
    return {name: Timing.of(values) for name, values in samples.items()}


def copy_call(moved: int, device: torch.device) -> Call:
    """A copy that reads and writes ``moved`` bytes in all."""
    source = torch.ones(max(1, moved // 8), device=device)
    target = torch.ones_like(source)
    return lambda: target.copy_(source)


@contextlib.contextmanager
def pinned(threads: int) -> Iterator[None]:
    """Keep every thread of this process on the first ``threads`` CPUs that it may use (Linux; elsewhere nothing)."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    allowed = os.sched_getaffinity(0)
    _set_affinity(set(sorted(allowed)[:threads]))
    try:
        yield
    finally:
        _set_affinity(allowed)


def _set_affinity(cpus: set[int]) -> None:
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(ProcessLookupError):  # a thread that has just ended
            os.sched_setaffinity(int(task.name), cpus)


# ---- memory ------------------------------------------------------------------------------------------------------


def memory_mib(field: str, *, forget_peak: bool = False) -> float:
    """This process' memory now (VmRSS) or at its highest (VmHWM), in MiB; 0 where the system does not say."""
    status, forget = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not status.is_file():
        return 0.0
    if forget_peak:
        forget.write_text("5")
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(field)) / 1024


# ---- options -----------------------------------------------------------------------------------------------------


def some_of(what: str, known: Sequence[str]) -> Callable[[str], list[str]]:
    """Type of an option that takes a comma-separated choice of ``known``."""

    def parse(text: str) -> list[str]:
        chosen = [word.strip() for word in text.split(",") if word.strip()]
        wrong = [word for word in chosen if word not in known]
        if wrong or not chosen:
            came = f"unknown {what} {', '.join(map(repr, wrong))}" if wrong else f"no {what} given"
            raise argparse.ArgumentTypeError(f"{came}; known are {', '.join(known)}")
        return list(dict.fromkeys(chosen))

    return parse


def thread_counts(text: str) -> list[int]:
    """Type of the option ``--threads``: comma-separated counts that this machine has the CPUs for."""
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        counts = [int(word) for word in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be whole numbers, as in 1,2, got {text!r}") from None
    if not all(1 <= count <= cpus for count in counts):
        raise argparse.ArgumentTypeError(f"must lie in 1..{cpus}, the CPUs of this machine, got {text!r}")
    return list(dict.fromkeys(counts))


def device(text: str) -> torch.device:
    """Type of the option ``--device``."""
    try:
        return torch.device(environment.device(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error).removeprefix("--device ")) from None


# ---- results -----------------------------------------------------------------------------------------------------


def _cpu_caches() -> dict[str, str]:
    """Size of each cache of the first CPU, where Linux tells it."""
    found = {}
    for cache in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        with contextlib.suppress(OSError):
            level, kind, size = ((cache / name).read_text().strip() for name in ("level", "type", "size"))
            found[f"L{level} {kind.lower()}"] = size
    return found


def machine(device: torch.device) -> dict[str, Any]:
    """What the figures are measured on, and what else it is doing now: with a load average above a few tenths the
    other processes take CPU time, and calls on all CPUs wait for the slowest thread."""
    return {
        "cpu": environment.cpu_model(),
        "cpus": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "caches": _cpu_caches(),
        "simd_level": _library.simd_level(),
        "backend": BACKEND.name,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "platform": platform.platform(),
        "versions": environment.versions(),
        "commit": environment.git_commit(),
    }


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """The rows with a header line, times to a hundredth of a microsecond."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for row in rows:
            values = dataclasses.astuple(row)
            writer.writerow([f"{value:.2f}" if isinstance(value, float) else value for value in values])


def write_machine(path: Path, description: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(description, indent=2) + "\n")


Key = tuple[str, str, str, str, int]


def by_case(rows: Sequence[Row]) -> dict[Key, dict[str, Row]]:
    """Rows by (op, mode, shape, dtype, threads), then by provider."""
    cases: dict[Key, dict[str, Row]] = {}
    for row in rows:
        cases.setdefault((row.op, row.mode, row.shape, row.dtype, row.threads), {})[row.provider] = row
    return cases


def print_table(title: str, rows: Sequence[Row], ours: str, others: Sequence[str]) -> None:
    """One line per case: times, how much faster ``ours`` is than each of ``others``, share of the copy's bandwidth."""
    table = Table(title=title, header_style="bold")
    for name in ("op", "mode", "shape", "dtype", "threads"):
        table.add_column(name, no_wrap=True, justify="right" if name == "threads" else "left")
    for name in (
        *(f"{p} us" for p in (*others, ours)),
        *(f"{p}/{ours}" for p in others),
        "GB/s",
        "copy GB/s",
        "% copy",
    ):
        table.add_column(name, no_wrap=True, justify="right")
    for key, providers in by_case(rows).items():
        table.add_row(*map(str, key), *_figures(providers, ours, others))
    console = Console()
    if not console.is_terminal:  # a log file: never fold the lines
        console = Console(width=200)
    console.print(table)


def _figures(providers: Mapping[str, Row], ours: str, others: Sequence[str]) -> list[str]:
    mine, copy = providers.get(ours), providers[COPY]
    times = [f"{providers[p].median_us:.1f}" if p in providers else "" for p in (*others, ours)]
    ratios = [f"{providers[p].median_us / mine.median_us:.2f}" if mine and p in providers else "" for p in others]
    if mine is None:
        return [*times, *ratios, "", f"{copy.gb_per_s:.1f}", ""]
    share = 100 * mine.gb_per_s / copy.gb_per_s
    return [*times, *ratios, f"{mine.gb_per_s:.1f}", f"{copy.gb_per_s:.1f}", f"{share:.0f}"]
