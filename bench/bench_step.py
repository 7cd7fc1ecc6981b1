"""One training step of each method, beside the published code's and beside the passes it cannot do without.

    python bench/bench_step.py
    python bench/bench_step.py --methods trades,dtrades --archs resnet18 --sizes 16x32 --rounds 9

Providers, whose steps take turns on the same synthetic images of CIFAR-10's size:

- ``textbook``: the published order of things in plain PyTorch, see textbook.py; for TRADES and D-TRADES with a second
  pass of the clean images in the loss, whose only effect is on BatchNorm's statistics. Ours makes it, forward only, if
  asked to (``--bn-mode clean_adv_clean``): then 28 passes in place of 27;
- ``ours``: the trainer as it is by default; ``ours+compile``: with ``--compile``; on a GPU also ``ours+graphs``: with
  ``--cuda-graphs``;
- ``floor``: the bare network passes of ours, without anything else: K (D-TRADES: one more) forward and backward passes
  to the images, the clean prediction, the outer passes and their backward to the weights.

Reported are the median of the turns, the ratio to the textbook, what is beyond the floor, the share of each part of a
step, and for TRADES and D-TRADES memory: the most that a process of its own holds in a step beyond what it held before
the network was made, with an allocator that gives back at once what is freed; on a GPU the most that torch allocates.
"""

from __future__ import annotations

from harness import FREEING, RESULTS, device, memory_mib, pinned, some_of  # isort: skip  # first: see harness.py

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from steps import at_least, make_trainer
from textbook import Textbook

from dtrades_fast import defenses, environment, profiling, rng
from dtrades_fast.training import schedules
from dtrades_fast.training.checkpoint import write_text
from dtrades_fast.training.trainer import Trainer

METHODS = ("trades", "dtrades", "at", "mart", "faal")
ARCHS = ("resnet18", "vgg16")
SIZES = ("16x32", "16x128", "64x32")  #: width x batch size
PROVIDERS = ("textbook", "ours", "ours+compile", "ours+graphs", "floor")
GRAPHS = "ours+graphs"
PARTS = ("data", "attack", "forward", "backward", "optimizer", "figures")
COLUMNS = ("method", "arch", "width", "batch", "provider", "seconds", "ratio", "beyond_floor", "peak_mib", *PARTS)
#: D-TRADES after its calibration.
GIVEN: dict[str, dict[str, Any]] = {"dtrades": {"lambda_alpha": 1.0, "lambda_beta": 1.0}}
FILE_WIDTH = 160
WARM_UPS = 3  #: steps on a GPU before any is timed

MEASURED = ("textbook", "ours", GRAPHS)  #: whose memory is measured

Step = Callable[[], None]


# ---- the providers -------------------------------------------------------------------------------------------------


def make_step(options: argparse.Namespace, provider: str, method: str, arch: str, size: str) -> Step:
    width, batch = map(int, size.split("x"))
    method, _, sensitivity = method.partition("/")
    made = make_trainer(
        argparse.Namespace(
            method=method,
            arch=arch,
            width=width,
            batch_size=batch,
            attack_steps=options.attack_steps,
            threads=options.threads,
            device=options.device,
            precision="fp32",
            data="synthetic",
            steps=options.rounds + WARM_UPS + 2,
            warmup=0,
            compiled=provider == "ours+compile",
            cuda_graphs=provider == GRAPHS,
        )
    )
    given = dict(GIVEN.get(method, {}), **({"sensitivity_at": sensitivity} if sensitivity else {}))
    made.defense = defenses.create(method, made.threat, **given)
    if provider == "textbook":
        return textbook(made, method)
    if provider == "floor":
        return floor(made)
    network = made.network(made.model)
    return lambda: made.train_step(network)


def textbook(made: Trainer, method: str) -> Step:
    model = made.model.to(memory_format=torch.contiguous_format)
    for module in model.modules():
        module._forward_pre_hooks.clear()  # of the layout
    optimizer = schedules.create_optimizer(made.config.optimization, model.parameters())
    step, batches = Textbook(method, model, optimizer, made.threat), made.batches
    batches.layout = torch.contiguous_format
    made.attacked = made.validated = None  # type: ignore[assignment]  # which the published code has none of

    def run() -> None:
        images, labels, ids = batches.get(0, 0)
        step.step(images, labels, ids, rng.key(0, "bench"))

    return run


def floor(made: Trainer) -> Step:
    """The passes of the method's step: through the network under attack, and through the one that is trained."""
    images, _, _ = made.batches.get(0, 0)
    method, network = made.defense, made.network(made.model)
    base = method.base() if isinstance(method, defenses.REGISTRY["faal"]) else method  # type: ignore[attr-defined]
    final = getattr(method, "sensitivity_at", None) == "final"
    outer = 1 if base.name == "at" else 2
    attacked = made.attacked

    def run() -> None:
        attacked.eval()
        if base.name in ("trades", "dtrades"):
            with torch.no_grad():
                attacked(images)
        for _ in range(made.threat.steps + final):
            adv = images.detach().requires_grad_()
            logits = attacked(adv)
            torch.autograd.grad(logits, adv, torch.ones_like(logits))
        network.train()
        logits = [network(images) for _ in range(outer)]
        torch.autograd.backward(logits, [torch.ones_like(each) for each in logits])
        made.optimizer.zero_grad(set_to_none=True)

    return run


# ---- measuring -----------------------------------------------------------------------------------------------------


class Parts:
    """Seconds of the outermost ranges of a step, by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._depth = 0

    @contextmanager
    def range(self, name: str) -> Iterator[None]:
        self._depth += 1
        if self._depth == 1:
            finish()
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                finish()
                self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begin


def time_case(options: argparse.Namespace, method: str, arch: str, size: str) -> list[dict[str, Any]]:
    """A row per provider."""
    steps = {provider: make_step(options, provider, method, arch, size) for provider in options.providers}
    warmup = {provider: timed(step) for provider, step in steps.items()}
    for step in steps.values() if options.device != "cpu" else ():
        for _ in range(WARM_UPS - 1):  # a CUDA graph is recorded in the second step
            step()
    seconds: dict[str, list[float]] = {provider: [] for provider in steps}
    for _ in range(options.rounds):
        for provider, step in steps.items():
            seconds[provider].append(timed(step))
    medians = {provider: statistics.median(values) for provider, values in seconds.items()}
    width, batch = size.split("x")
    rows = []
    for provider, step in steps.items():
        row: dict[str, Any] = {"method": method, "arch": arch, "width": width, "batch": batch, "provider": provider}
        row |= {"seconds": medians[provider], "warmup_seconds": warmup[provider]}
        if "textbook" in medians:
            row["ratio"] = medians["textbook"] / medians[provider]
        if "floor" in medians:
            row["beyond_floor"] = medians[provider] / medians["floor"] - 1
        if provider.startswith("ours"):
            row |= shares(step)
        rows.append(row)
    return rows


def timed(step: Step) -> float:
    finish()
    begin = time.perf_counter()
    step()
    finish()
    return time.perf_counter() - begin


def finish() -> None:
    """Wait for the GPU if there is one at work."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def shares(step: Step) -> dict[str, float]:
    """Part of a step -> its share of the time."""
    parts = Parts()
    profiling.enable(parts.range)
    try:
        seconds = timed(step)
    finally:
        profiling.disable()
    return {name: parts.seconds.get(name, 0.0) / seconds for name in PARTS}


def peak_mib(options: argparse.Namespace, provider: str, method: str, arch: str, size: str) -> float:
    command = [sys.executable, __file__, "--child", provider, "--methods", method, "--archs", arch, "--sizes", size]
    command += ["--threads", str(options.threads), "--attack-steps", str(min(options.attack_steps, 2))]
    command += ["--device", options.device]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **FREEING})
    return float(done.stdout.splitlines()[-1])


def child(options: argparse.Namespace) -> float:
    """Peak memory of a step after the first ones, in MiB."""
    if options.device != "cpu":
        step = make_step(options, options.child, options.methods[0], options.archs[0], options.sizes[0])
        for _ in range(WARM_UPS):
            step()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() / 2**20
    torch.ones(1).requires_grad_().sum().backward()  # what autograd loads once
    before = memory_mib("VmRSS")
    step = make_step(options, options.child, options.methods[0], options.archs[0], options.sizes[0])
    step()
    memory_mib("VmRSS", forget_peak=True)
    step()
    return memory_mib("VmHWM") - before


# ---- command line --------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, count = parser.add_argument, at_least(1)
    methods = (*METHODS, "dtrades/last_step")
    add("--methods", type=some_of("method", methods), default=list(methods), help="dtrades/last_step: its sensitivity")
    add("--archs", type=some_of("architecture", ARCHS), default=list(ARCHS))
    add("--sizes", type=some_of("size", SIZES), default=list(SIZES), help="width x batch size")
    add("--providers", type=some_of("provider", PROVIDERS), default=None, help="default: all that the device has")
    add("--device", type=device, default="cpu", help="default: cpu")
    add("--attack-steps", type=count, default=10)
    add("--rounds", type=count, default=3, help="turns, one step of each provider timed per turn (default: 3)")
    add("--threads", type=count, default=environment.physical_cores())
    add("--output", type=Path, default=RESULTS, help="folder of step.csv and step.json, or step-cuda.csv and -.json")
    add("--child", choices=PROVIDERS, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    options.device = str(options.device)
    available = [name for name in PROVIDERS if name != GRAPHS or options.device != "cpu"]
    options.providers = options.providers or available
    if missing := set(options.providers) - set(available):
        parser.error(f"{', '.join(missing)} needs --device cuda")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    if options.child:
        print(child(options))
        return 0
    console = Console()
    if not console.is_terminal:
        console.width = FILE_WIDTH
    rows: list[dict[str, Any]] = []
    with pinned(options.threads):
        for size in options.sizes:
            for arch in options.archs:
                for method in options.methods:
                    rows += time_case(options, method, arch, size)
                    for row in rows[-len(options.providers) :]:
                        if row["provider"] in MEASURED and method in ("trades", "dtrades"):
                            row["peak_mib"] = peak_mib(options, row["provider"], method, arch, size)
                    console.print(line(rows[-len(options.providers) :]), highlight=False, soft_wrap=True)
                    write(options, rows)
    console.print(table(rows))
    for row in rows:
        if row["provider"].startswith("ours") and "ratio" in row:
            console.print(
                f"{row['method']} {row['arch']} width {row['width']} batch {row['batch']} {row['provider']}: "
                f"{row['ratio']:.2f}x",
                highlight=False,
            )
    return 0


def line(rows: Sequence[dict[str, Any]]) -> str:
    case = "{method} {arch} width {width} batch {batch}".format(**rows[0])
    return f"{case}: " + ", ".join(f"{row['provider']} {row['seconds']:.3g} s" for row in rows)


def table(rows: Sequence[dict[str, Any]]) -> Table:
    view = Table(title="One training step")
    names = ("method", "arch", "width", "batch", "provider", "seconds", "ratio", "beyond floor", "peak MiB", *PARTS)
    for name in names:
        view.add_column(name, justify="left" if name in ("method", "arch", "provider") else "right")
    for row in rows:
        view.add_row(
            *(str(row[name]) for name in names[:5]),
            f"{row['seconds']:.3g}",
            shown(row, "ratio", "{:.2f}"),
            shown(row, "beyond_floor", "{:+.1%}"),
            shown(row, "peak_mib", "{:.0f}"),
            *(shown(row, part, "{:.1%}") for part in PARTS),
        )
    return view


def shown(row: dict[str, Any], name: str, form: str) -> str:
    return form.format(row[name]) if name in row else "-"


def write(options: argparse.Namespace, rows: Sequence[dict[str, Any]]) -> None:
    options.output.mkdir(parents=True, exist_ok=True)
    stem = "step" if options.device == "cpu" else "step-cuda"  # a run on a GPU leaves the CPU's figures alone
    with (options.output / f"{stem}.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, (*COLUMNS, "warmup_seconds"), restval="")
        writer.writeheader()
        for row in rows:
            writer.writerow({name: f"{v:.4g}" if isinstance(v, float) else v for name, v in row.items()})
    about = {name: getattr(options, name) for name in ("attack_steps", "rounds", "threads")}
    where = environment.cpu_model() if options.device == "cpu" else torch.cuda.get_device_name()
    about |= {"processor": where, "torch": torch.__version__, "commit": environment.git_commit()}
    write_text(options.output / f"{stem}.json", json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
