"""One network under all attacks of a suite: :func:`evaluate_model`, and the record that ``eval.json`` keeps of it.

The fields of a record are documented in ``docs/evaluation.md``.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dtrades_fast import rng
from dtrades_fast.attacks import MIFGSM, PGD, Attack, Square
from dtrades_fast.data import ImageSet
from dtrades_fast.evaluation import blackbox, guards, metrics, minimum_norm, suites, verdict
from dtrades_fast.evaluation.engine import Cost, Engine, Progress
from dtrades_fast.pixels import pixels

__all__ = ["SCHEMA", "Settings", "evaluate_model", "flags", "stored"]

SCHEMA = 2  #: version of what a record holds
#: Correctly classified points that the verdict's probes look at, and images that the guard rails look at.
PROBED, GUARDED = 64, 64
#: Findings of the guard rails that are no reason to stop here: the verdict is about them.
JUDGED = ("random", "zero_gradient")
#: Numbers of queries and radii, as shares of the budget and of the cap, that curves are recorded at.
QUERIES = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)
RADII = 50
#: Steps of PGD and MI-FGSM on a surrogate.
TRANSFER_STEPS = 20
#: Names among the networks of transfer attacks.
TARGET, ENSEMBLE = "target", "ensemble"


@dataclass(frozen=True)
class Settings:
    """How a network is evaluated; all of it is in the record.

    Attributes:
        epsilon: radius of the ball in pixel units, as written, e.g. ``"8/255"``.
        norm: of the ball.
        attacks: names, see :data:`dtrades_fast.evaluation.suites.ATTACKS`.
        step_size: of PGD in pixel units; ``epsilon / 4`` if None.
        official: the official code of AutoAttack and its parts instead of ours, on the network itself.
        minimum_norms: norms in which the smallest perturbation of each point is looked for.
        seed: of all random numbers.
        batch_size: images at a time.
        precision: of the searches; what they find is checked in the network's own. ``official`` is not searched so.
    """

    epsilon: str
    norm: suites.Norm = "linf"
    attacks: tuple[str, ...] = suites.SUITES["quick"]
    step_size: float | None = None
    official: bool = False
    minimum_norms: tuple[suites.Norm, ...] = ()
    seed: int = 0
    batch_size: int = 256
    precision: Literal["fp32", "fp16", "bf16"] = "fp32"


def evaluate_model(
    model: nn.Module,
    images: ImageSet,
    classes: Sequence[str],
    settings: Settings,
    *,
    surrogates: Mapping[str, blackbox.Player] | Callable[[], Mapping[str, blackbox.Player]] | None = None,
    player: blackbox.Player | None = None,
    progress: Progress | None = None,
    ignore: Sequence[str] = (),
    report: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """The record of a network: accuracies, per-point results, costs and the verdict.

    Args:
        model: maps images in [0, 1], [N, C, H, W], to logits [N, classes].
        images: what it is evaluated on.
        classes: names of the classes, one per logit.
        settings: how.
        surrogates: networks that transfer attacks make their images on, by name; or what gives them, which is called
            when the guard rails are passed.
        player: the model as one of them, for its relation to the surrogates.
        progress: what is done already, and where it is kept.
        ignore: findings of the guard rails that are no reason to stop.
        report: is told what has been found, line by line.

    Raises:
        GuardError: the network or the images are not what they should be; the message says what and what to do.
        ValueError: a setting that is not possible, or a surrogate's name that means something else.
    """
    epsilon = pixels(settings.epsilon, "epsilon")
    attacks = {name: _make(name, epsilon, len(classes), settings) for name in settings.attacks}
    few = torch.linspace(0, len(images) - 1, min(len(images), GUARDED)).long().to(images.labels.device)
    found = guards.check(
        model,
        images.images(few),
        images.labels[few],
        epsilon,
        norm=settings.norm,
        ignore=(*ignore, *JUDGED),
        classes=len(classes),
    )
    for finding in found.findings:
        report(f"{finding.severity}: {finding.message}")
    key = rng.key(settings.seed, "evaluation")
    engine = Engine(
        model,
        images,
        key=key,
        batch_size=settings.batch_size,
        progress=progress,
        fast=not settings.official,
        precision="fp32" if settings.official else settings.precision,
    )
    if found.has("random"):
        attacks = {name: _make(name, epsilon, len(classes), settings, random=True) for name in attacks}
    engine.progress.begin()
    others = surrogates() if callable(surrogates) else surrogates or {}
    if taken := {TARGET, ENSEMBLE} & set(others):
        raise ValueError(f"no surrogate can be called {taken.pop()!r}, which stands for something else in a record")
    labels, natural = images.labels.cpu(), engine.natural()
    report(f"clean: {100 * metrics.accuracy(natural):.1f} %")
    judge = _Judge(natural, labels, classes, report)
    results = {name: _attack(engine, name, attack, judge) for name, attack in attacks.items()}
    transfers = (
        _transfers(player or blackbox.Player(model, ""), others, engine, epsilon, settings, judge) if others else {}
    )
    worst = natural
    for entry in results.values():
        worst = worst & flags(entry["correct"])
    outcome = _verdict(engine, settings, epsilon, judge, found, results, transfers)
    report(f"verdict: {outcome.verdict}" + "".join(f"\n  {reason}" for reason in outcome.reasons))
    record = {
        **dataclasses.asdict(settings),
        "minimum_norms": list(settings.minimum_norms),
        "schema": SCHEMA,
        "engine": "official" if settings.official else "fast",
        "search": engine.how,
        "points": len(images),
        "na": metrics.accuracy(natural),
        "per_class": metrics.per_class(natural, labels, classes),
        "correct": flag_string(natural),
        "ids": images.ids.tolist(),
        "labels": labels.tolist(),
        "attacks": results,
        "ra_worst": metrics.accuracy(worst),
        "minimum_norm": {
            norm: _minimum_norm(engine, norm, len(classes), natural, report) for norm in settings.minimum_norms
        },
        "transfer": transfers,
        "guards": [dataclasses.asdict(finding) for finding in found.findings],
        "ignored": list(ignore),
        "verdict": outcome.record(),
        "threads": torch.get_num_threads(),
        "device": str(images.labels.device),
    }
    engine.progress.save()
    return record


@dataclass(frozen=True)
class _Judge:
    """What the entries of all attacks are made from."""

    natural: Tensor
    labels: Tensor
    classes: Sequence[str]
    report: Callable[[str], None]

    def entry(self, attack: Attack, standing: Tensor, cost: Cost, refuted: int) -> dict[str, Any]:
        return {
            "settings": {"attack": type(attack).__name__, **vars(attack)},
            **dataclasses.asdict(metrics.robustness(self.natural, standing, self.labels, self.classes)),
            "correct": flag_string(standing),
            **dataclasses.asdict(cost),
            "refuted": refuted,
        }

    def say(self, what: str, standing: Tensor) -> None:
        self.report(f"{what}: {100 * metrics.accuracy(standing):.1f} %")


def _make(name: str, epsilon: float, classes: int, settings: Settings, random: bool = False) -> Attack:
    """The attack; on a random forward pass the first image that fools may be a lucky one, which the next ones deny."""
    return suites.make_attack(
        name,
        epsilon,
        settings.step_size,
        norm=settings.norm,
        classes=classes,
        official=settings.official,
        stop_early=not random,
    )


def _attack(engine: Engine, name: str, attack: Attack, judge: _Judge) -> dict[str, Any]:
    """One attack's entry; AutoAttack's with its stages, Square's with its queries."""
    if isinstance(attack, Square):
        return _square(engine, name, attack, judge)
    stages: Mapping[str, Attack] = attack.stages() if hasattr(attack, "stages") else {name: attack}
    standing, cost, refuted, entries = judge.natural, Cost(), 0, {}
    for stage, part in stages.items():
        where = name if stage == name else f"{name}/{stage}"
        outcome = engine.attack(where, part, standing)
        standing, refuted, cost = outcome.standing, refuted + outcome.refuted, cost + outcome.cost
        entries[stage] = {"ra": metrics.accuracy(standing), **dataclasses.asdict(outcome.cost)}
        judge.say(where, standing)
    entry = judge.entry(attack, standing, cost, refuted)
    return {**entry, "stages": entries} if len(entries) > 1 else entry


def _square(engine: Engine, name: str, attack: Square, judge: _Judge) -> dict[str, Any]:
    """Square's entry with its curve: robust accuracy after so many queries."""
    curve, refuted = blackbox.query_curve(engine, name, attack, judge.natural)
    judge.say(name, curve.standing)
    counts = [count for count in QUERIES if count <= attack.queries]
    return {
        **judge.entry(attack, curve.standing, engine.cost(name), refuted),
        "queries": {
            "median": curve.median(),
            "after": counts,
            "ra": [accuracy / 100 for accuracy in curve.accuracy(counts).tolist()],
            "per_point": curve.queries.tolist(),
        },
    }


def _minimum_norm(
    engine: Engine, norm: suites.Norm, classes: int, natural: Tensor, report: Callable[[str], None]
) -> dict[str, Any]:
    """APN and all that belongs to it; the cap is the radius of a ball that holds every image."""
    size = engine.images.images_uint8[0].numel()
    cap = 1.0 if norm == "linf" else size**0.5
    norms = {}
    for name, attack in minimum_norm.standard(norm, cap, classes).items():

        def smallest(
            model: nn.Module, images: Tensor, labels: Tensor, ids: Tensor, attack: Attack = attack
        ) -> tuple[Tensor, Tensor]:
            adv = attack(model, images, labels, index=ids, key=engine.key)
            return adv, minimum_norm.size(adv.double() - images.double(), norm)

        stage = f"minimum-norm/{norm}/{name}"
        norms[name] = engine.find(stage, smallest, natural)[0].where(natural, 0)
        report(f"{stage}: mean {norms[name].clamp(max=cap).mean():.4f}")
    found = minimum_norm.MinimumNorms(norm, cap, norms)
    smallest_norms = found.smallest
    broken = smallest_norms[smallest_norms.isfinite()]
    radii = torch.linspace(0, float(broken.max()) if len(broken) else cap, RADII, dtype=torch.float64)
    return {
        "cap": cap,
        "apn": dataclasses.asdict(found.figures()),
        "by_attack": {name: dataclasses.asdict(found.figures(name)) for name in norms},
        "curve": {"epsilon": radii.tolist(), "ra": minimum_norm.robust_accuracy(smallest_norms, radii).tolist()},
        "per_point": [None if value == float("inf") else value for value in smallest_norms.tolist()],
        "costs": {name: dataclasses.asdict(engine.cost(f"minimum-norm/{norm}/{name}")) for name in norms},
    }


def _transfers(
    player: blackbox.Player,
    surrogates: Mapping[str, blackbox.Player],
    engine: Engine,
    epsilon: float,
    settings: Settings,
    judge: _Judge,
) -> dict[str, Any]:
    """Every surrogate and their ensemble against the network, and each against each other."""
    networks = {TARGET: player, **surrogates}
    sources = dict(networks)
    if len(surrogates) > 1:
        members = [surrogate.model for surrogate in surrogates.values()]
        sources[ENSEMBLE] = blackbox.Player(blackbox.Ensemble(members), "ensemble")
    entries = {}
    for name, attack in {
        "mifgsm": MIFGSM(epsilon, TRANSFER_STEPS, norm=settings.norm),
        f"pgd{TRANSFER_STEPS}": PGD(epsilon, TRANSFER_STEPS, norm=settings.norm),
    }.items():
        found = blackbox.transfer(sources, networks, engine, f"transfer/{name}", attack)
        entries[name] = {
            "sources": list(found.sources),
            "targets": list(found.targets),
            "relations": [list(row) for row in found.relations],
            "ra": (found.accuracy() / 100).tolist(),
            "natural": [flag_string(row) for row in found.natural],
            "standing": [[flag_string(column) for column in row] for row in found.standing],
        }
        for i, source in enumerate(found.sources):
            judge.say(f"{name} made on {source}", found.standing[i, 0])
    return entries


def _verdict(
    engine: Engine,
    settings: Settings,
    epsilon: float,
    judge: _Judge,
    found: guards.Report,
    results: Mapping[str, Mapping[str, Any]],
    transfers: Mapping[str, Mapping[str, Any]],
) -> verdict.Verdict:
    """From probes of a few points, and from what black boxes have broken that white ones left, on all of them."""
    rows = judge.natural.nonzero().squeeze(1)
    rows = rows[torch.linspace(0, len(rows) - 1, min(PROBED, len(rows))).long()].to(engine.images.labels.device)
    images, labels, ids = engine.images.images(rows), engine.images.labels[rows], engine.images.ids[rows]
    network = engine.model.network
    figures, points = verdict.probe(network, images, labels, ids, epsilon=epsilon, norm=settings.norm, key=engine.key)
    right, of = max(int(judge.natural.sum()), 1), {}
    stages = results.get("autoattack", {}).get("stages")
    if stages and figures:
        lost = round((stages["fab-t"]["ra"] - stages["square"]["ra"]) * len(judge.natural))
        if lost / right > figures["score_only"]:
            figures["score_only"], of["score_only"] = lost / right, right
    if transfers:
        figures["transfer_only"] = _transferred(judge.natural, results, transfers) / right
        of["transfer_only"] = right
    return verdict.judge(figures, points, of=of, random=found.has("random"))


def _transferred(
    natural: Tensor, results: Mapping[str, Mapping[str, Any]], transfers: Mapping[str, Mapping[str, Any]]
) -> int:
    """How many points fall to images made on other networks, and to no attack that uses the network's own gradients."""
    white, black = natural.clone(), natural.clone()
    for name, entry in results.items():
        if not name.startswith("square"):
            white &= flags(entry["correct"])
    for entry in transfers.values():
        for source, by_target in zip(entry["sources"], entry["standing"], strict=True):
            side = white if source == TARGET else black
            side &= flags(by_target[0])
    return int((white & ~black).sum())


def stored(file: Path) -> list[dict[str, Any]]:
    """The records of an ``eval.json`` that this version understands; none if there is no such file."""
    if not file.is_file():
        return []
    return [record for record in json.loads(file.read_text())["evaluations"] if record.get("schema") == SCHEMA]


def flag_string(standing: Tensor) -> str:
    """One character per sample, 1 for correct."""
    return "".join("1" if flag else "0" for flag in standing.tolist())


def flags(text: str) -> Tensor:
    """What :func:`flag_string` was made from."""
    return torch.tensor([character == "1" for character in text], dtype=torch.bool)
