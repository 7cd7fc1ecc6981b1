"""Attacks side by side with other libraries: robust accuracy, agreement point by point, time and memory.

    python bench/bench_attacks.py RUN [RUN ...] --points 500 --attacks pgd20,autoattack

Every attack of every provider runs in a process of its own, one after the other, on the same correctly classified test
points, with the same threads. A robust accuracy counts only images that the network itself misclassifies and that lie
in the ball. PGD is short and runs in several turns, of which the median counts. What is done is kept in
``--state`` and not done again, so that a long comparison may be killed and started once more.

``pgdK`` starts at random, and ours also counts what it finds on its way. ``pgdK-clean`` starts at the image and counts
the last step alone, so that all libraries should do the same.

Memory is the most that a process holds beyond the loaded network and images. It is measured in a process more, on one
batch, AutoAttack's in its first part, when all points still stand, and with every larger tensor given back to the
system as soon as it is freed; otherwise it is the allocator's fragments that are measured, which differ by a factor of
two from run to run.

Providers: ``ours``, ``ours-seed1`` (another seed), ``ours-bf16`` (searched in bfloat16), ``official`` and
``official-seed1`` (pyautoattack), ``torchattacks``, ``foolbox``; those that are not installed, or do not have the
attack, are left out.
"""

from __future__ import annotations

from harness import FREEING, RESULTS, memory_mib, some_of  # isort: skip  # first: see harness.py

import argparse
import csv
import hashlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from dtrades_fast import rng
from dtrades_fast.attacks import PGD, Attack
from dtrades_fast.data import ImageSet
from dtrades_fast.environment import cpu_model, git_commit
from dtrades_fast.evaluation import suites
from dtrades_fast.evaluation.engine import BALL_TOLERANCE, Engine
from dtrades_fast.evaluation.evaluate import FILE_WIDTH, find_run, load_run
from dtrades_fast.pixels import pixels
from dtrades_fast.training.checkpoint import write_text

PACKAGES = {"official": "pyautoattack", "torchattacks": "torchattacks", "foolbox": "foolbox"}
PROVIDERS = ("ours", "ours-seed1", "ours-bf16", "official", "official-seed1", "torchattacks", "foolbox")
BASELINE = {"pgd20": "torchattacks", "fgsm": "torchattacks"}  # the others' is official
FIRST_PART = {"autoattack": "apgd-ce"}
COLUMNS = (
    "run",
    "width",
    "attack",
    "provider",
    "points",
    "standing",
    "ra",
    "seconds",
    "peak_mib",
    "forwards",
    "backwards",
)

Craft = Callable[[nn.Module, Tensor, Tensor], Tensor]


# ---- one attack of one provider, in a process of its own -----------------------------------------------------------


def child(options: argparse.Namespace) -> dict[str, Any]:
    """What :func:`cases` keeps of one case."""
    torch.set_num_threads(options.threads)
    folder = find_run(options.runs[0], options.runs_dir)
    run = load_run(folder, options.checkpoint, options.data_root, "cpu", options.points)
    before = memory_mib("VmRSS", forget_peak=True)
    epsilon, images = pixels(run.config.stored()["epsilon"]), run.sets.test
    clean = Engine(run.model, images, key=0, batch_size=options.batch_size, fast=False)
    natural = clean.natural()
    points = images.subset(natural.nonzero().squeeze(1))
    provider, _, seed = options.child.partition("-seed")
    begin = time.perf_counter()
    if provider.startswith(("ours", "official")):
        figures = engine_run(run.model, points, options, epsilon, provider, int(seed or 0))
    else:
        torch.manual_seed(int(seed or 0))
        figures = library_run(
            run.model, points, options.batch_size, epsilon, LIBRARIES[provider](options.attacks[0], epsilon)
        )
    seconds = time.perf_counter() - begin
    peak = memory_mib("VmHWM") - before
    standing = dict(zip(points.ids.tolist(), figures.pop("standing").tolist(), strict=True))
    flags = "".join("1" if standing.get(i, False) else "0" for i in images.ids.tolist())
    return {
        "width": run.config.model.width,
        "points": len(images),
        "standing": sum(standing.values()),
        "ra": sum(standing.values()) / len(images),
        "seconds": seconds,
        "peak_mib": peak,
        "flags": flags,
        "ids": images.ids.tolist(),
        **figures,
    }


def engine_run(
    model: nn.Module, points: ImageSet, options: argparse.Namespace, epsilon: float, provider: str, seed: int
) -> dict[str, Any]:
    """Through the evaluation's engine, as ``dtrades-fast evaluate --engine`` and ``--precision`` do."""
    key, official = rng.key(seed, "evaluation"), provider == "official"
    precision: Literal["bf16", "fp32"] = "bf16" if provider == "ours-bf16" else "fp32"
    engine = Engine(model, points, key=key, batch_size=options.batch_size, fast=not official, precision=precision)
    name = options.attacks[0]
    if name.endswith("-clean"):
        attack: Attack = PGD(epsilon, steps_of(name), start="clean")
    else:
        attack = suites.make_attack(name, epsilon, official=official)
    every = torch.ones(len(points), dtype=torch.bool)
    outcome = engine.attack(name, attack, every)
    return {
        "standing": outcome.standing,
        "stages": outcome.stages,
        "forwards": outcome.cost.forwards,
        "backwards": outcome.cost.backwards,
        "refuted": outcome.refuted,
    }


def library_run(model: nn.Module, points: ImageSet, batch_size: int, epsilon: float, craft: Craft) -> dict[str, Any]:
    """Through another library, batch by batch."""
    standing = []
    for rows in torch.arange(len(points)).split(batch_size):
        x, y = points.images(rows), points.labels[rows]
        adv = craft(model, x, y).detach()
        with torch.no_grad():
            fooled = model(adv).argmax(1) != y
        inside = (adv - x).flatten(1).abs().amax(1) <= epsilon * (1 + BALL_TOLERANCE) + 1e-7
        standing.append(~(fooled & inside & (adv.flatten(1).amin(1) >= 0) & (adv.flatten(1).amax(1) <= 1)))
    return {"standing": torch.cat(standing)}


def steps_of(attack: str) -> int:
    """Of ``pgdK`` and ``pgdK-clean``."""
    return int(attack.removeprefix("pgd").removesuffix("-clean"))


def with_torchattacks(attack: str, epsilon: float) -> Craft:
    import torchattacks

    def craft(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        if attack == "fgsm":
            return torchattacks.FGSM(model, eps=epsilon)(images, labels)
        pgd = torchattacks.PGD(
            model, eps=epsilon, alpha=epsilon / 4, steps=steps_of(attack), random_start=not attack.endswith("-clean")
        )
        return pgd(images, labels)

    return craft


def with_foolbox(attack: str, epsilon: float) -> Craft:
    import foolbox

    def craft(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=images.device)
        kind = (
            foolbox.attacks.LinfFastGradientAttack(random_start=False)
            if attack == "fgsm"
            else foolbox.attacks.LinfPGD(
                abs_stepsize=epsilon / 4, steps=steps_of(attack), random_start=not attack.endswith("-clean")
            )
        )
        return kind(wrapped, images, labels, epsilons=epsilon)[1]

    return craft


LIBRARIES = {"torchattacks": with_torchattacks, "foolbox": with_foolbox}


# ---- all of them ---------------------------------------------------------------------------------------------------


def cases(options: argparse.Namespace) -> Iterator[tuple[str, str, str, int]]:
    """Run, attack, provider and turn; the providers of an attack take turns."""
    for run in options.runs:
        for attack in options.attacks:
            short = attack.startswith(("pgd", "fgsm"))
            for turn in range(options.turns if short else 1):
                for provider in options.providers:
                    package = PACKAGES.get(provider.partition("-")[0])
                    if package and importlib.util.find_spec(package) is None:
                        continue
                    if (provider.startswith("official") and short) or (provider in LIBRARIES and not short):
                        continue
                    if turn and "-seed" in provider:
                        continue
                    yield run, attack, provider, turn


def measure(
    options: argparse.Namespace, run: str, attack: str, provider: str, *, for_memory: bool = False
) -> dict[str, Any]:
    """One case; for its memory on one batch, and with an allocator that gives back at once what is freed."""
    attack = FIRST_PART.get(attack, attack) if for_memory else attack
    command = [sys.executable, __file__, run, "--child", provider, "--attacks", attack]
    for name in ("checkpoint", "batch_size", "threads", "runs_dir"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    command += ["--points", str(min(options.points, options.batch_size) if for_memory else options.points)]
    if options.data_root:
        command += ["--data-root", options.data_root]
    environment = {**os.environ, **FREEING} if for_memory else None
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def summary(results: dict[str, dict[str, Any]], options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row per run, attack and provider, in the order asked for, with the median time of its turns."""
    rows: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for name, figures in results.items():
        run, attack, provider, _ = name.split("|")
        rows.setdefault((run, attack, provider), []).append(figures)
    return [
        {
            "run": Path(run).name,
            "attack": attack,
            "provider": provider,
            **turns[0],
            "seconds": statistics.median(turn["seconds"] for turn in turns),
        }
        for run in options.runs
        for attack in options.attacks
        for provider in options.providers
        if (turns := rows.get((run, attack, provider)))
    ]


def baseline(row: dict[str, Any], rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The row that this one is set beside."""
    wanted = BASELINE.get(row["attack"], "torchattacks" if row["attack"].startswith("pgd") else "official")
    same = [r for r in rows if (r["run"], r["attack"], r["provider"]) == (row["run"], row["attack"], wanted)]
    return same[0] if same else None


def disagreements(a: dict[str, Any], b: dict[str, Any]) -> tuple[list[int], list[int]]:
    """Ids of the points that only the one has broken, and only the other."""
    pairs = list(zip(a["ids"], a["flags"], b["flags"], strict=True))
    return [i for i, x, y in pairs if x < y], [i for i, x, y in pairs if x > y]


def table(rows: list[dict[str, Any]]) -> Table:
    view = Table(title="Robust accuracy, time and memory beside the baseline of each attack, in one run")
    for column in (
        "run",
        "attack",
        "provider",
        "RA %",
        "only this",
        "only base",
        "seconds",
        "times faster",
        "peak MiB",
    ):
        view.add_column(column, justify="left" if column in ("run", "attack", "provider") else "right")
    for row in rows:
        base = baseline(row, rows)
        mine, theirs = disagreements(row, base) if base else ([], [])
        faster = f"{base['seconds'] / row['seconds']:.2f}" if base else "-"
        view.add_row(
            *(row["run"], row["attack"], row["provider"], f"{100 * row['ra']:.1f}"),
            *(str(len(mine)), str(len(theirs)), f"{row['seconds']:.1f}", faster, f"{row['peak_mib']:.0f}"),
        )
    return view


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="trained runs: folders, or names in --runs-dir")
    parser.add_argument("--points", type=int, default=500, help="test images, the same share of each class")
    parser.add_argument(
        "--attacks", type=lambda text: text.split(","), default=["fgsm", "pgd20", "pgd20-clean", "autoattack"]
    )
    parser.add_argument("--providers", type=some_of("provider", PROVIDERS), default=list(PROVIDERS))
    parser.add_argument("--turns", type=int, default=3, help="of the short attacks")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--checkpoint", choices=("best", "last"), default="best", help="whose weights")
    parser.add_argument("--runs-dir", default="runs")
    parser.add_argument("--data-root", default=None)
    parser.add_argument("--state", type=Path, default=Path("bench-attacks.json"), help="what is done, kept as it goes")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of attacks.csv and attacks.json")
    parser.add_argument("--child", choices=PROVIDERS, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    if options.child:
        print(json.dumps(child(options)))
        return 0
    console = Console()
    if not console.is_terminal:
        console.width = FILE_WIDTH
    how = conditions(options)
    state = json.loads(options.state.read_text()) if options.state.is_file() else {"how": how, "results": {}}
    check_state(options.state, state["how"], how)
    results = state["results"]
    for run, attack, provider, turn in cases(options):
        name = f"{run}|{attack}|{provider}|{turn}"
        if name not in results:
            results[name] = measure(options, run, attack, provider)
            if turn == 0:
                results[name]["peak_mib"] = measure(options, run, attack, provider, for_memory=True)["peak_mib"]
            write_text(options.state, json.dumps(state))
            console.print(f"{name}: RA {100 * results[name]['ra']:.1f} %, {results[name]['seconds']:.1f} s")
    rows = summary(results, options)
    write(options.output, rows, how)
    console.print(table(rows))
    for row in rows:
        if base := baseline(row, rows):
            mine, theirs = disagreements(row, base)
            if row is not base and (mine or theirs):
                console.print(
                    f"{row['run']} {row['attack']} {row['provider']}: broken here alone {mine}, there alone {theirs}"
                )
    for row in rows:
        if row["provider"] == "ours" and (base := baseline(row, rows)):
            ratio = base["seconds"] / row["seconds"]
            console.print(
                f"{row['attack']} width {row['width']} ({row['run']}): {ratio:.2f}x faster than {base['provider']}"
            )
    return 0


def conditions(options: argparse.Namespace) -> dict[str, Any]:
    """All that the figures depend on."""
    weights = {run: find_run(run, options.runs_dir).weights_of(options.checkpoint) for run in options.runs}
    return {
        **{name: getattr(options, name) for name in ("checkpoint", "points", "batch_size", "threads")},
        "processor": cpu_model(),
        "torch": torch.__version__,
        "commit": git_commit(),
        "weights": {run: hashlib.sha256(file.read_bytes()).hexdigest() for run, file in weights.items()},
    }


def check_state(path: Path, then: dict[str, Any], now: dict[str, Any]) -> None:
    """What is done must have been done like this; other runs may be added to it."""
    then, now = dict(then), dict(now)
    for run, weights in now.pop("weights").items():
        if then.get("weights", {}).get(run, weights) != weights:
            raise SystemExit(f"{path} has figures of other weights of {run}: name another --state")
    then.pop("weights", None)
    for name, value in now.items():
        if then.get(name) != value:
            raise SystemExit(f"{path} was made with {name} {then.get(name)}, not {value}: name another --state")


def write(folder: Path, rows: list[dict[str, Any]], how: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "attacks.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, extrasaction="ignore", restval="")
        writer.writeheader()
        for row in rows:
            shown = {name: f"{v:.4g}" if isinstance(v, float) else v for name, v in row.items()}
            writer.writerow(shown)
    apart = [
        {"run": r["run"], "attack": r["attack"], "provider": r["provider"], "alone": mine, "baseline_alone": theirs}
        for r in rows
        if (base := baseline(r, rows)) and r is not base
        for mine, theirs in [disagreements(r, base)]
    ]
    weights = {Path(run).name: digest for run, digest in how["weights"].items()}
    about = {**how, "weights": weights, "disagreements": apart}
    write_text(folder / "attacks.json", json.dumps(about, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
