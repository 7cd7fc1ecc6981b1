"""What a training step costs and how that grows: measures on a CPU, and writes docs/performance.md.

    python bench/cost_model.py            measures (about 5 minutes) and prints the document
    python bench/cost_model.py --write    writes it, too, and the measurements into bench/results/cost.json
    python bench/cost_model.py --kept     measures nothing and takes what cost.json has
    python bench/cost_model.py --study studies/thesis.yaml      a lower bound on the GPU hours of a study's trainings

The document holds three kinds of figures and says of each which it is:

- **counted** in a run: the passes of a step, by watching a real step of the trainer and of textbook.py; floating-point
  operations and sizes, by a pass through each network without data;
- **measured**: seconds per step, one axis at a time around a base case, all cases taking turns;
- **computed**: lower bounds for GPUs, from what was counted and the peaks of NVIDIA's data sheets.
"""

from __future__ import annotations

from harness import RESULTS, machine, pinned  # isort: skip  # first: see harness.py

import argparse
import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_step import textbook, timed
from rich.console import Console
from steps import at_least, synthetic
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from dtrades_fast import config, data, models
from dtrades_fast.study.grid import Study, read
from dtrades_fast.training.checkpoint import write_text
from dtrades_fast.training.progress import duration
from dtrades_fast.training.run_folder import RunFolder
from dtrades_fast.training.trainer import Trainer

DOCUMENT = RESULTS.parent.parent / "docs" / "performance.md"
MEASUREMENTS = RESULTS / "cost.json"
METHODS = ("standard", "at", "trades", "dtrades", "dtrades/last_step", "mart", "faal")
#: Of an epoch of CIFAR-10, and of training as it is published.
IMAGES, BATCH, STEPS, EPOCHS = 50_000, 128, 10, 100


# ---- a step ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A training step of ResNet-18 on 32x32 images; the defaults are the base of all comparisons."""

    attack_steps: int = 5
    batch: int = 16
    width: int = 16
    classes: int = 10
    precision: str = "fp32"
    compiled: bool = False
    method: str = "trades"  #: or ``method/sensitivity``

    def trainer(self, updates: int) -> Trainer:
        """At its first step, with images for that many."""
        method, _, sensitivity = self.method.partition("/")
        words = ["--method", method, "--arch", "resnet18", "--width", self.width, "--batch-size", self.batch]
        words += ["--steps", self.attack_steps, "--epochs", 1, "--precision", self.precision, "--device", "cpu"]
        words += ["--compile"] if self.compiled else []
        words += ["--sensitivity-at", sensitivity] if sensitivity else []
        sets = images(self.batch * updates, self.classes)
        chosen = config.parse([str(word) for word in words], "cost_model.py").resolved(sets.info.epsilon)
        return Trainer(chosen, sets, RunFolder(chosen.folder), Console(quiet=True))  # the folder is named, not made

    def step(self, updates: int) -> Callable[[], None]:
        """Makes the next step of a training, as often as there are updates."""
        made = self.trainer(updates)
        network = made.network(made.model)
        return lambda: made.train_step(network)


def images(count: int, classes: int) -> data.DataSets:
    """Random images of CIFAR-10's shape with random labels."""
    sets = synthetic(count)
    labels = torch.randint(0, classes, (count,), generator=torch.Generator().manual_seed(0))
    info = dataclasses.replace(sets.info, classes=tuple(map(str, range(classes))))
    return dataclasses.replace(sets, train=dataclasses.replace(sets.train, labels=labels), info=info)


# ---- counted: passes -------------------------------------------------------------------------------------------------

#: What a pass of the batch through the network gives beside logits: nothing, the gradient to the images, to the
#: weights, to both. With it, the work in forward passes.
WORK = {"forward": 1, "images": 2, "weights": 3, "both": 3}
GIVEN_BACK = {(True, False): "images", (False, True): "weights", (True, True): "both"}


class Passes(TorchDispatchMode):
    """Counts the passes that start within it, by kind, at the network's first convolution: the one of the images."""

    def __init__(self, batch: Sequence[int]):
        super().__init__()
        self.batch, self.counted = batch, Counter[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        forward = func is torch.ops.aten.convolution.default
        backward = func is torch.ops.aten.convolution_backward.default
        if (forward or backward) and args[backward].shape[1:] == self.batch[1:]:
            share = len(args[backward]) / self.batch[0]
            kind = GIVEN_BACK[tuple(args[-1][:2])] if backward else "forward"
            self.counted[kind] += share
            if backward:
                self.counted["forward"] -= share  # it is no longer a pass without a backward
        return func(*args, **(kwargs or {}))


def passes(step: Callable[[], object], batch: Sequence[int]) -> dict[str, int]:
    """Kind -> passes of a step."""
    with Passes(batch) as found:
        step()
    assert all(count == int(count) for count in found.counted.values()), "a part of a batch passed"
    return {kind: int(found.counted[kind]) for kind in WORK}


def passes_of(method: str, attack_steps: int, *, published: bool = False) -> dict[str, int]:
    """Passes of a step of the trainer or of the published code, on a network of width 2."""
    case = Case(attack_steps, batch=2, width=2, method=method)
    step = textbook(case.trainer(1), method.partition("/")[0]) if published else case.step(1)
    return passes(step, (case.batch, 3, 32, 32))


@dataclass(frozen=True)
class Formula:
    """``slope K + constant``."""

    slope: int
    constant: int

    def __call__(self, attack_steps: int) -> int:
        return self.slope * attack_steps + self.constant

    def __str__(self) -> str:
        slope = {0: "", 1: "K"}.get(self.slope, f"{self.slope}K")
        return " + ".join(part for part in (slope, str(self.constant) if self.constant else "") if part) or "0"


@cache
def formulas(method: str, published: bool = False) -> dict[str, Formula]:
    """Kind -> passes as a function of the attack steps, from counts at one and at three."""
    one, three = (passes_of(method, steps, published=published) for steps in (1, 3))
    slopes = {kind: (three[kind] - one[kind]) // 2 for kind in WORK}
    return {kind: Formula(slope, one[kind] - slope) for kind, slope in slopes.items()}


def summed(found: Mapping[str, Formula], kinds: Mapping[str, int]) -> Formula:
    """The sum of some kinds, each with a weight."""
    return Formula(
        sum(weight * found[kind].slope for kind, weight in kinds.items()),
        sum(weight * found[kind].constant for kind, weight in kinds.items()),
    )


# ---- counted: operations and bytes -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Network:
    """Sizes of a network, per image where it says so.

    Attributes:
        weights: parameters.
        flops: kind of pass -> floating-point operations of an image, a multiplication and an addition being two.
        products: numbers that convolutions and linear layers give for an image.
        outputs: numbers that all layers give for an image.
    """

    weights: int
    flops: dict[str, float]
    products: int
    outputs: int


@cache
def network(arch: str, width: int | None = None, classes: int = 10) -> Network:
    """Of 32x32 images in three channels; nothing is computed."""
    with torch.device("meta"):
        half = (0.5,) * 3
        model = models.create(
            arch, num_classes=classes, in_channels=3, image_size=32, width=width, mean=half, std=half
        ).eval()
        batch = torch.empty(2, 3, 32, 32)
    sizes: list[tuple[nn.Module, int]] = []

    def note(layer: nn.Module, given: object, result: Tensor) -> None:
        sizes.append((layer, result[0].numel()))

    hooks = [layer.register_forward_hook(note) for layer in model.modules() if not list(layer.children())]
    model(batch)
    for hook in hooks:
        hook.remove()
    products = sum(size for layer, size in sizes if isinstance(layer, nn.Conv2d | nn.Linear))
    flops = {kind: flops_of(model, batch, kind) / len(batch) for kind in WORK}
    return Network(models.parameter_count(model), flops, products, sum(size for _, size in sizes))


def flops_of(model: nn.Module, batch: Tensor, kind: str) -> int:
    model.requires_grad_(kind in ("weights", "both"))
    given = batch.detach().clone().requires_grad_(kind in ("images", "both"))
    with FlopCounterMode(display=False) as counter:
        logits = model(given)
        if kind != "forward":
            logits.sum().backward()
    return counter.get_total_flops()


def step_flops(sizes: Network, method: str, attack_steps: int) -> float:
    """Of an image, in a training step."""
    return sum(formula(attack_steps) * sizes.flops[kind] for kind, formula in formulas(method).items())


def step_bytes(sizes: Network, method: str, attack_steps: int, batch: int, size: int) -> float:
    """That a training step moves at least, with numbers of ``size`` bytes: see the document."""
    ways = sum(formula(attack_steps) * (1 if kind == "forward" else 2) for kind, formula in formulas(method).items())
    return ways * size * (2 * batch * sizes.products + sizes.weights)


# ---- measured --------------------------------------------------------------------------------------------------------

BASE = Case()
#: Axis -> the cases along it; each differs from the base in one thing.
AXES: dict[str, tuple[Case, ...]] = {
    "attack_steps": tuple(Case(attack_steps=value) for value in (1, 2, 5, 10, 20)),
    "batch": tuple(Case(batch=value) for value in (8, 16, 32, 64)),
    "width": tuple(Case(width=value) for value in (8, 16, 32, 64)),
    "classes": tuple(Case(classes=value) for value in (10, 100)),
    "precision": tuple(Case(precision=value) for value in ("fp32", "bf16")),
    "compiled": tuple(Case(compiled=value) for value in (False, True)),
}


def measure(cases: Sequence[Case], rounds: int) -> list[dict[str, Any]]:
    """Each case with its seconds per step: median, 20th and 80th percentile of the turns, and the first step's."""
    steps = {case: case.step(rounds + 2) for case in cases}
    first = {case: timed(step) for case, step in steps.items()}
    seconds: dict[Case, list[float]] = {case: [] for case in cases}
    for turn in range(rounds + 1):
        for case, step in steps.items():
            taken = timed(step)
            if turn > 0:  # the second step of a case may still allocate or compile
                seconds[case].append(taken)
    rows = []
    for case, values in seconds.items():
        p20, median, p80 = (float(f"{p:.4g}") for p in np.percentile(values, (20, 50, 80)))
        row = dataclasses.asdict(case) | {"seconds": median, "p20": p20, "p80": p80}
        rows.append(row | {"first_seconds": float(f"{first[case]:.4g}")})
    return rows


def measured(rounds: int, threads: int) -> dict[str, Any]:
    """All axes, and the machine."""
    cases = list(dict.fromkeys(case for along in AXES.values() for case in along))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with pinned(threads), torch.compiler.config.patch(force_disable_caches=True):
            rows = measure(cases, rounds)
    finally:
        torch.set_num_threads(before)
    about = {"threads": threads, "rounds": rounds, **machine(torch.device("cpu"))}
    return about | {"cases": rows}


class Times:
    """Measured seconds by case."""

    def __init__(self, kept: Mapping[str, Any]):
        names = [field.name for field in dataclasses.fields(Case)]
        self.rows = {Case(**{name: row[name] for name in names}): row for row in kept["cases"]}

    def seconds(self, case: Case) -> float:
        return float(self.rows[case]["seconds"])

    def ratio(self, case: Case, to: Case = BASE) -> float:
        return self.seconds(case) / self.seconds(to)


# ---- computed: GPUs --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GPU:
    """Peaks of a data sheet: FLOP/s by precision, dense, and bytes/s. The first precision is what ``auto`` takes."""

    name: str
    peaks: dict[str, float]
    bandwidth: float

    @property
    def auto(self) -> str:
        return next(iter(self.peaks))

    def bound(self, sizes: Network, method: str, precision: str, batch: int = BATCH) -> Bound:
        flops = batch * step_flops(sizes, method, STEPS)
        moved = step_bytes(sizes, method, STEPS, batch, SIZE[precision])
        return Bound(flops / self.peaks[precision], moved / self.bandwidth)


@dataclass(frozen=True)
class Bound:
    """Seconds of a step: by its arithmetic, and by the bytes that it moves."""

    arithmetic: float
    bytes: float

    @property
    def seconds(self) -> float:
        return max(self.arithmetic, self.bytes)

    def __str__(self) -> str:
        return f"≥ {digits(1e3 * self.seconds)} ms" + ("*" if self.bytes > self.arithmetic else "")

    def training(self) -> str:
        """An epoch, and a hundred."""
        epoch = self.seconds * IMAGES / BATCH
        return f"≥ {duration(epoch)}, ≥ {duration(EPOCHS * epoch)}"


#: Without those that are kept for validation.
TRAINING_IMAGES = {"cifar10": 49_000, "cifar100": 49_000, "mnist": 59_000}
SIZE = {"fp16": 2, "bf16": 2, "fp32 (TF32)": 4, "fp32": 4}  #: bytes of a number
GPUS = (
    GPU("T4", {"fp16": 65e12, "fp32": 8.1e12}, 320e9),
    GPU("A100 80 GB SXM", {"bf16": 312e12, "fp32 (TF32)": 156e12, "fp32": 19.5e12}, 2039e9),
    GPU("H100 SXM", {"bf16": 989e12, "fp32 (TF32)": 494e12, "fp32": 67e12}, 3350e9),
)


def study_hours(study: Study) -> dict[str, float]:
    """GPU -> hours that the trainings of a study take at least, without validation and evaluation, at ``auto``.

    Raises:
        ValueError: the number of training images of a data set is not known here.
    """
    hours = dict.fromkeys((gpu.name for gpu in GPUS), 0.0)
    for cell in study.cells:
        made = cell.config(Path("runs"))
        if cell.dataset not in TRAINING_IMAGES:
            raise ValueError(f"the number of images is known of {', '.join(TRAINING_IMAGES)}, not of {cell.dataset}")
        sizes = network(cell.arch, made.model.width)
        last = made.method_options.get("sensitivity_at") == "last_step"
        flops = step_flops(sizes, f"{cell.method}/last_step" if last else cell.method, made.attack.steps)
        images = made.optimization.epochs * min(TRAINING_IMAGES[cell.dataset], made.data.limit or IMAGES**2)
        for gpu in GPUS:
            hours[gpu.name] += images * flops / gpu.peaks[gpu.auto] / 3600
    return hours


# ---- the document ----------------------------------------------------------------------------------------------------

INTRODUCTION = """\
# What training costs

This file is written by `python bench/cost_model.py --write`. It holds three kinds of figures, and each table says which
it has:

- **Counted**: passes, operations and sizes, found by running the code. The same on every machine.
- **Measured**: seconds per step on one CPU.
- **Computed**: lower bounds for GPUs, marked with ≥. No GPU took part.
"""

FLOOR = """\
## 1. Counted: the passes of a step

K is the number of attack steps (`--steps`). A batch passes through the network forward alone, with a backward to the
images (attack, sensitivity), or with a backward to the weights (the loss). As work, in forward passes: 1, 2 and 3. The
backward through a convolution or linear layer is a product of the forward's size to its input and another to its
weights; that the first layer needs one fewer is left out here and counted in section 3. Ours is the trainer with its
defaults, the textbook the published order of things (`bench/textbook.py`, which says whose). Ours is also what
`bench/bench_step.py` calls the floor: everything else in a step (loss, steps of the attack, figures, optimizer) comes
on top.
"""

SAVED = """\
What is saved: the clean prediction of the attack is computed once, not in each step, and the clean images pass once
through the loss, not twice. `dtrades/last_step` takes the sensitivity from the attack's last gradient. Standard
training has no attack.
"""

GROWTH = """\
## 2. Measured: how a step grows

ResNet-18 trained by TRADES on 32x32 images, {threads} thread{s}; base case width {width}, batch {batch}, K = {steps},
10 classes, fp32. One thing differs at a time; all cases take turns, {rounds} steps each. Processor {cpu}, PyTorch
{torch}, load average {load} at the end, commit `{commit}`. Between the 20th and the 80th percentile lie the times in
brackets. "FLOPs alone" is the ratio that section 3's way of counting predicts.
"""

SIZES = """\
## 3. Counted: operations and sizes

Full width, 10 classes, 32x32 images in three channels. A multiplication with its addition is two operations;
convolutions and linear layers are counted, as direct products. Numbers per image are in fp32; half of that in fp16 and
bf16. "Products" are the outputs of convolutions and linear layers, "all layers" those of normalisation, activation and
pooling, too.
"""

BOUNDS = """\
## 4. Computed: lower bounds for GPUs

**Nothing here was measured.** A step takes at least the larger of two times: its operations at the peak rate of the
precision, and its bytes at the peak bandwidth. As bytes count, forward, each output of a convolution or linear layer,
written once and read once, and the weights, read once; backward, the gradients of these outputs likewise, and the
weights again. Normalisation, activations and additions count as fused into their neighbours, and the update, the images
and the operators of this package as nothing. Where an asterisk stands, bytes are what counts.

No run reaches these times: kernels do not keep the peak rate, and what counts as fused or nothing takes time. Two
things could only lower them: an algorithm with fewer multiplications than the direct product (Winograd's, for 3x3
convolutions), and, at an asterisk, a cache that holds outputs until they are read.

Peaks, without sparsity: NVIDIA T4 Tensor Core GPU data sheet, NVIDIA A100 80GB data sheet (SXM), NVIDIA H100 Tensor
Core GPU data sheet (SXM; its figures for tensor cores are with sparsity, twice these).
"""

TF32 = """\
PyTorch computes float32 convolutions in TF32 on A100 and H100 unless `torch.backends.cudnn.allow_tf32` is off; the
rows of plain fp32 are for that.
"""


def document(kept: Mapping[str, Any]) -> str:
    """docs/performance.md, from the measurements of :func:`measured`."""
    parts = [INTRODUCTION, *_floor(), *_growth(kept), *_sizes(), *_bounds(), *_advice(kept)]
    return "\n".join(parts)


def table(header: str, rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; all columns but the first to the right."""
    columns = header.split(" | ")
    marks = ["---", *["---:"] * (len(columns) - 1)]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in (columns, marks, *rows)) + "\n"


def digits(value: float) -> str:
    """Three significant ones."""
    return f"{value:,.0f}" if value >= 100 else f"{value:#.3g}".rstrip(".")


def _floor() -> Iterator[str]:
    yield FLOOR
    rows = []
    for method in METHODS:
        ours, work = _passes(formulas(method))
        row = [f"`{method}`", *ours, work]
        if method == "standard":
            rows.append([*row, "", "", "", "", ""])
            continue
        theirs, published = _passes(formulas(method, published=True))
        ratio = f"{published(STEPS)} / {work(STEPS)} = {published(STEPS) / work(STEPS):.2f}"
        rows.append([*row, *theirs, published, ratio])
    names = ("forward", "to images", "to weights", "work")
    header = " | ".join(["method", *names, *(f"textbook: {name}" for name in names), f"textbook / ours, K = {STEPS}"])
    yield table(header, rows)
    yield SAVED


def _passes(found: Mapping[str, Formula]) -> tuple[list[Formula], Formula]:
    """Forward alone, to the images, to the weights; and the work of all."""
    kinds = ({"forward": 1}, {"images": 1}, {"weights": 1, "both": 1})
    return [summed(found, each) for each in kinds], summed(found, WORK)


def _growth(kept: Mapping[str, Any]) -> Iterator[str]:
    times = Times(kept)
    yield GROWTH.format(
        threads=kept["threads"],
        s="" if kept["threads"] == 1 else "s",
        width=BASE.width,
        batch=BASE.batch,
        steps=BASE.attack_steps,
        rounds=kept["rounds"],
        cpu=kept["cpu"],
        torch=kept["versions"]["torch"],
        load=kept["load_average"],
        commit=kept["commit"],
    )
    rows = []
    for axis, along in AXES.items():
        for case in along:
            row, flops = times.rows[case], case_flops(case) / case_flops(BASE)
            spread = f"{digits(1e3 * row['seconds'])} ms ({digits(1e3 * row['p20'])} to {digits(1e3 * row['p80'])})"
            per_image = f"{digits(1e3 * row['seconds'] / case.batch)} ms"
            time = times.ratio(case)
            rows.append([_label(axis, case), spread, per_image, f"{time:.2f}", f"{flops:.2f}", f"{time / flops:.2f}"])
    yield table("case | measured per step | per image | time to base | FLOPs alone | time / FLOPs", rows)


def _label(axis: str, case: Case) -> str:
    if axis == "compiled":
        return "with `--compile`" if case.compiled else "without `--compile`"
    name = {"attack_steps": "K"}.get(axis, axis)
    label = f"{name} {getattr(case, axis)}"
    return f"**{label}** (base)" if case == BASE else label


def case_flops(case: Case) -> float:
    """Of a step."""
    sizes = network("resnet18", case.width, case.classes)
    return case.batch * step_flops(sizes, case.method, case.attack_steps)


def _sizes() -> Iterator[str]:
    yield SIZES
    rows = []
    for arch in models.names():
        sizes = network(arch)
        megabytes = f"{digits(4 * sizes.weights / 1e6)} MB"
        per_image = (f"{digits(4 * size / 1e6)} MB" for size in (sizes.products, sizes.outputs))
        rows.append([arch, f"{sizes.weights:,}", megabytes, digits(sizes.flops["forward"] / 1e9), *per_image])
    yield table(
        "architecture | weights | in fp32 | GFLOP of a forward pass of an image | products, an image "
        "| all layers, an image",
        rows,
    )
    yield f"GFLOP of an image in a whole step, K = {STEPS}:\n"
    rows = [
        [f"`{method}`", *(digits(step_flops(network(arch), method, STEPS) / 1e9) for arch in models.names())]
        for method in METHODS
    ]
    yield table(" | ".join(["method", *models.names()]), rows)


def _bounds() -> Iterator[str]:
    yield BOUNDS
    rows = []
    for gpu in GPUS:
        peaks = ", ".join(f"{precision} {peak / 1e12:g}" for precision, peak in gpu.peaks.items())
        rows.append([gpu.name, peaks, f"{gpu.bandwidth / 1e9:,.0f}"])
    yield table("GPU | TFLOP/s | GB/s", rows)
    header = [f"{gpu.name}, {gpu.auto}" for gpu in GPUS]
    yield f"A step of ResNet-18 at full width, batch {BATCH}, K = {STEPS}, at the precision that `auto` chooses:\n"
    full = network("resnet18")
    rows = [[f"`{method}`", *(gpu.bound(full, method, gpu.auto) for gpu in GPUS)] for method in METHODS]
    yield table(" | ".join(["method", *header]), rows)
    yield f"The same, an epoch of {IMAGES:,} images and {EPOCHS} epochs, without validation:\n"
    rows = [[f"`{method}`", *(gpu.bound(full, method, gpu.auto).training() for gpu in GPUS)] for method in METHODS]
    yield table(" | ".join(["method", *header]), rows)
    yield "The same of D-TRADES, by architecture:\n"
    rows = []
    for arch in models.names():
        bounds = [gpu.bound(network(arch), "dtrades", gpu.auto) for gpu in GPUS]
        rows.append([arch, *(f"{bound}; {bound.training()}" for bound in bounds)])
    yield table(" | ".join(["architecture", *header]), rows)
    yield "A step of D-TRADES, ResNet-18, by precision, with both times:\n"
    rows = []
    for gpu in GPUS:
        for precision in gpu.peaks:
            bound = gpu.bound(full, "dtrades", precision)
            both = (f"≥ {digits(1e3 * seconds)} ms" for seconds in (bound.arithmetic, bound.bytes))
            rows.append([gpu.name, precision, *both, bound])
    yield table("GPU | precision | by operations | by bytes | bound", rows)
    yield TF32


def _advice(kept: Mapping[str, Any]) -> Iterator[str]:
    times = Times(kept)
    fewer, more = Case(attack_steps=5), Case(attack_steps=10)
    narrow, wide = Case(width=16), Case(width=32)
    small, large = Case(batch=8), Case(batch=64)
    half, compiled = Case(precision="bf16"), Case(compiled=True)
    per_image = times.ratio(large, small) * small.batch / large.batch
    flops = case_flops(fewer) / case_flops(more)
    dtrades, last = (summed(formulas(method), WORK)(STEPS) for method in ("dtrades", "dtrades/last_step"))
    first = times.rows[compiled]["first_seconds"]
    t4 = GPUS[0]
    precisions = [t4.bound(network("resnet18"), "dtrades", precision).seconds for precision in ("fp32", t4.auto)]
    yield f"""\
## 5. When a run is too slow

In this order. What changes nothing of the result but rounding comes first; ratios of time are measured, those of
section 2, unless they are said to be counted or computed.

1. **More threads** (`--threads`, by default all cores) and, on a GPU, **more processes**. Not measured here.
2. **`--compile`**: a step takes {times.ratio(compiled):.2f} of one without. The first step took
   {digits(first)} s, so it is for long runs.
3. **Precision**: on this processor bf16 takes {times.ratio(half):.2f} of fp32 (`--precision bf16`); where a processor
   has no bf16 arithmetic it may take longer. On a GPU `auto` is right: the computed bound on a {t4.name} is
   {precisions[0] / precisions[1]:.1f} times lower in {t4.auto} than in fp32.
4. **Batch** (`--batch-size`): an image takes {per_image:.2f} of the time in a batch of {large.batch} that it takes in
   one of {small.batch}. It changes training: the learning rate has to follow.
5. **Width** (`--width`): half of it, {wide.width} to {narrow.width}, takes {times.ratio(narrow, wide):.2f} of the time
   (counted: {case_flops(narrow) / case_flops(wide):.2f} of the operations). A smaller network is less accurate and less
   robust: for trying things out.
6. **Attack steps** (`--steps`): {more.attack_steps} to {fewer.attack_steps} takes {times.ratio(fewer, more):.2f} of the
   time (counted: {flops:.2f}). It weakens the attack that the network learns to resist; with very few, gradients may
   be masked ([masking.md](masking.md)).
7. **Sensitivity** of D-TRADES (`--sensitivity-at last_step`): {last} instead of {dtrades} forward passes' worth of work
   at K = {STEPS} (counted), {last / dtrades:.2f}.

The number of classes is no matter: 100 instead of 10 take {times.ratio(Case(classes=100)):.2f} of the time. Time is
proportional to images and epochs (`--limit`, `--epochs`).
"""


# ---- command line ----------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, count = parser.add_argument, at_least(1)
    add("--write", action="store_true", help="write docs/performance.md, and bench/results/cost.json after measuring")
    add("--kept", action="store_true", help="take the measurements of bench/results/cost.json")
    add("--study", type=Path, help="print a lower bound on the GPU hours of a study, and nothing else")
    add("--rounds", type=count, default=25, help="turns, one step of each case timed per turn (default: 25)")
    add("--threads", type=count, default=1, help="default: 1")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    if options.study is not None:
        for name, hours in study_hours(read(options.study)).items():
            print(f"{name}: at least {hours:.1f} GPU hours")
        return 0
    kept = json.loads(MEASUREMENTS.read_text()) if options.kept else measured(options.rounds, options.threads)
    text = document(kept)
    if options.write:
        if not options.kept:
            write_text(MEASUREMENTS, json.dumps(kept, indent=1) + "\n")
        write_text(DOCUMENT, text)
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
