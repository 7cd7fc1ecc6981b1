"""Where the time of a training step goes: ``python bench/profile.py --method dtrades --arch resnet18``.

Runs training steps as the trainer does them. On a GPU it is meant to be run by Nsight Systems,

    nsys profile -t cuda,nvtx -c cudaProfilerApi --capture-range-end stop -o report python bench/profile.py ...

which records the steps after the warm-up, with a range for each part of a step (domain dtrades_fast) and for each
operator. On a CPU the same steps run under torch.profiler: it prints the ranges and operators with their share of the
step and writes a trace for chrome://tracing or https://ui.perfetto.dev.
"""

from __future__ import annotations

from harness import device  # isort: skip  # first: it keeps this file from hiding the standard library's profile

import argparse
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from steps import at_least, make_trainer
from torch.autograd.profiler_util import FunctionEvent

from dtrades_fast import config, defenses, environment, models, profiling
from dtrades_fast.models.attack_network import Compiled
from dtrades_fast.training.trainer import Trainer

STEP = "step"  #: the range around a whole step
OPERATORS = "dtrades_fast::"  #: what torch calls the compiled kernels
LINE = "{:44} {:>7} {:>10} {:>7}"


# ---- the steps -----------------------------------------------------------------------------------------------------


def make_step(trainer: Trainer, backend: str | None) -> Callable[[], None]:
    """One training step, in its range; both networks compiled by that backend of torch.compile."""
    network = trainer.network(trainer.model)
    if backend is not None:
        network = Compiled(network, backend)
        trainer.attacked.network = Compiled(trainer.attacked.network, backend)

    def step() -> None:
        with profiling.span(STEP):
            trainer.train_step(network)

    return step


# ---- profiles ------------------------------------------------------------------------------------------------------


def profile_cuda(step: Callable[[], None], count: int) -> float:
    """Let the profiler that runs this process record the steps; milliseconds per step."""
    profiling.enable()
    torch.cuda.synchronize()
    with torch.cuda.profiler.profile(), torch.autograd.profiler.emit_nvtx():
        began = time.perf_counter()
        for _ in range(count):
            step()
        torch.cuda.synchronize()
        return (time.perf_counter() - began) / count * 1e3


def profile_cpu(step: Callable[[], None], count: int, trace: Path) -> list[Row]:
    """Run the steps under torch.profiler and write its trace."""
    profiling.enable(torch.profiler.record_function)
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profiler:
            for _ in range(count):
                step()
    finally:
        profiling.disable()
    trace.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(trace))
    return rows_of(profiler.events() or ())


@dataclass
class Row:
    """A range or operator in its place: the ranges around it and its own name, calls and milliseconds in all steps."""

    path: tuple[str, ...]
    count: int = 0
    total_ms: float = 0.0


def rows_of(events: Iterable[FunctionEvent]) -> list[Row]:
    """Calls of the same name in the same place as one row, in the order of their first call."""
    rows: dict[tuple[str, ...], Row] = {}
    for event in sorted(events, key=lambda event: event.time_range.start):
        path = place(event)
        if path[:1] == (STEP,) and is_shown(event):
            row = rows.setdefault(path, Row(path))
            row.count += 1
            row.total_ms += event.cpu_time_total / 1e3
    order = {path: i for i, path in enumerate(rows)}
    return sorted(rows.values(), key=lambda row: [order[row.path[: i + 1]] for i in range(len(row.path))])


def is_shown(event: FunctionEvent) -> bool:
    return bool(event.is_user_annotation) or event.name.startswith(OPERATORS)


def place(event: FunctionEvent) -> tuple[str, ...]:
    """Names from the outermost range to the event; the steps of an attack share a name."""
    names = []
    at: FunctionEvent | None = event
    while at is not None:
        if is_shown(at):
            names.append(re.sub(r" \d+$", "", at.name))
        at = at.cpu_parent
    return tuple(reversed(names))


def table(rows: Sequence[Row], steps: int) -> str:
    """Ranges indented by their nesting, each with its calls, milliseconds and share of one step."""
    whole = rows[0].total_ms
    lines = [LINE.format("range", "calls", "ms", "share")]
    for row in rows:
        name = "  " * (len(row.path) - 1) + row.path[-1]
        calls, ms, share = row.count / steps, row.total_ms / steps, row.total_ms / whole
        lines.append(LINE.format(name, f"{calls:g}", f"{ms:.2f}", f"{share:.1%}"))
    return "\n".join(lines)


# ---- command line --------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="profile.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, count = parser.add_argument, at_least(1)
    add("--method", choices=defenses.names(), default=config.DEFAULT_METHOD, help="training method (default: dtrades)")
    add("--arch", choices=models.names(), default="resnet18", help="network (default: resnet18)")
    add("--width", type=count, help="channels of its first stage (default: as published)")
    add("--batch-size", type=count, default=128, help="images per step (default: 128)")
    add("--attack-steps", type=at_least(0), default=10, help="steps of the attack (default: 10)")
    add("--steps", type=count, default=5, help="training steps to profile (default: 5)")
    add("--warmup", type=count, default=3, help="training steps before them (default: 3)")
    add("--precision", choices=get_args(environment.Precision), default="auto", help="as in training (default: auto)")
    add("--compile", nargs="?", const="inductor", metavar="BACKEND",
        help="compile the network with torch.compile (backend if not given: inductor)")  # fmt: skip
    add("--device", type=device, default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    add("--threads", type=count, help="CPU threads (default: the physical cores)")
    add("--data", default="synthetic", help="synthetic, or a data set as in training (default: synthetic)")
    add("--data-root", default="data", help="folder of the data sets (default: data)")
    add("--trace", type=Path, help="where the trace goes, without a GPU (default: runs/trace-METHOD-ARCH.json)")
    options = parser.parse_args(argv)
    options.trace = options.trace or Path("runs") / f"trace-{options.method}-{options.arch}.json"
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    if options.device.type == "cuda":
        torch.cuda.set_device(options.device)  # whose streams are waited for
    trainer = make_trainer(options)
    chosen = trainer.config
    print(
        f"{options.method}, {options.arch}, {options.batch_size} {options.data} images, {options.device}, "
        f"{chosen.optimization.precision}, operators: {environment.backend(str(options.device))}"
    )
    step = make_step(trainer, options.compile)
    for _ in range(options.warmup):
        step()
    if options.device.type == "cuda":
        print(f"{profile_cuda(step, options.steps):.2f} ms per step")
        if not profiling.listening():
            print("no profiler is listening: run this by 'nsys profile -t cuda,nvtx -c cudaProfilerApi ...'")
        return 0
    print(table(profile_cpu(step, options.steps, options.trace), options.steps))
    print(f"trace of {options.steps} steps: {options.trace}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
