"""What the monitor and D-TRADES' sensitivity cost, as ratios: ``python bench/bench_sensitivity.py --width 16``.

Steps of several trainers take turns (see harness.py), each on the same synthetic images of CIFAR-10's size:

- the monitor: a step of TRADES with it and without, where nobody looks at the attack's gradients or at the figures;
- D-TRADES' sensitivity at the final images and at the attack's last step.

With ``--run RUN`` it also says how far the two sensitivities agree on the validation images of a trained run, as the
rank correlation (Spearman).
"""

from __future__ import annotations

from harness import Effort, device, measure, pinned  # isort: skip  # first: it makes room for the standard library

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from steps import at_least, make_trainer
from torch import Tensor

from dtrades_fast import defenses, models, rng
from dtrades_fast.attacks import PGD, Model
from dtrades_fast.defenses import Batch, Crafted, Defense
from dtrades_fast.evaluation.evaluate import TrainedRun, load_run
from dtrades_fast.training.run_folder import RunFolder
from dtrades_fast.training.trainer import Trainer


def trainer(options: argparse.Namespace, method: str, **given: object) -> Trainer:
    made = make_trainer(argparse.Namespace(**{**vars(options), "method": method}))
    made.defense = defenses.create(method, made.threat, **given)
    return made


def unwatched(made: Trainer) -> Trainer:
    """The same trainer of TRADES without a monitor."""
    threat = made.threat
    attack = PGD(threat.epsilon, threat.steps, threat.step_size, threat.norm, objective="kl", start="gaussian")

    def craft(model: Model, batch: Batch) -> Crafted:
        return Crafted(attack(model, batch.images, batch.labels, index=batch.index, key=batch.key))

    made.defense.craft = craft  # type: ignore[method-assign]
    made.monitor.add = lambda *_: None  # type: ignore[method-assign,assignment]
    return made


def step_of(made: Trainer) -> Callable[[], None]:
    network = made.network(made.model)

    def step() -> None:
        made.step = 0  # the same batch again
        made.train_step(network)

    return step


def trainers(options: argparse.Namespace) -> dict[str, Trainer]:
    given = {"lambda_alpha": 1.0, "lambda_beta": 1.0}
    return {
        "trades without monitor": unwatched(trainer(options, "trades")),
        "trades": trainer(options, "trades"),
        "dtrades, sensitivity at last_step": trainer(options, "dtrades", sensitivity_at="last_step", **given),
        "dtrades, sensitivity at final": trainer(options, "dtrades", **given),
    }


# ---- the two sensitivities -----------------------------------------------------------------------------------------


def sensitivities(run: TrainedRun, where: str) -> Tensor:
    """``||grad KL||`` of each validation image, taken where training would take it, [N]."""
    images = run.sets.validation
    defense: Defense = defenses.create("dtrades", run.config.threat(), sensitivity_at=where)
    key, parts = rng.key(run.config.run.seed, "bench"), []
    for first in range(0, len(images), 100):
        part = slice(first, first + 100)
        batch = Batch(images.images(part), images.labels[part], images.ids[part], key)
        watch = defense.craft(run.model, batch).watch
        assert watch is not None
        assert watch.stats is not None
        parts.append(watch.stats.l2)
    return torch.cat(parts)


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's, for values without ties."""
    ranks = torch.stack((a.argsort().argsort(), b.argsort().argsort())).double()
    return torch.corrcoef(ranks)[0, 1].item()


# ---- command line --------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add, count = parser.add_argument, at_least(1)
    add("--arch", choices=models.names(), default="resnet18", help="network (default: resnet18)")
    add("--width", type=count, help="channels of its first stage (default: as published)")
    add("--batch-size", type=count, default=128, help="images per step (default: 128)")
    add("--attack-steps", type=count, default=10, help="steps of the attack (default: 10)")
    add("--rounds", type=count, default=10, help="turns, one step of each trainer timed per turn (default: 10)")
    add("--device", type=device, default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    add("--threads", type=count, default=1, help="CPU threads (default: 1)")
    add("--run", type=Path, help="folder of a trained run whose sensitivities are compared")
    options = parser.parse_args(argv)
    made_up = {"precision": "auto", "data": "synthetic", "data_root": "data", "steps": 20, "warmup": 0}
    return argparse.Namespace(**vars(options), **made_up)


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    with pinned(options.threads):
        steps = {name: step_of(made) for name, made in trainers(options).items()}
        effort = Effort(rounds=options.rounds, calls_per_round=1)
        timings = measure(steps, options.device, effort)
    plain = timings["trades without monitor"].median_us
    print(f"{options.arch}, {options.batch_size} images, {options.attack_steps} attack steps, {options.device}")
    for name, timing in timings.items():
        low, high = timing.p20_us / plain, timing.p80_us / plain
        print(f"{name:36} {timing.median_us / plain:.3f}  (20th to 80th percentile {low:.3f} to {high:.3f})")
    if options.run is not None:
        run = load_run(RunFolder(options.run), "best", None, str(options.device), None)
        a, b = (sensitivities(run, where) for where in ("final", "last_step"))
        print(f"rank correlation of the sensitivity at final and last_step: {rank_correlation(a, b):.3f}")
        print(f"their means: {a.mean():.4g} and {b.mean():.4g}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
