"""Attackers who do not have the network: they ask for its logits, or make their images on another one.

What another one may be (:func:`relation`): the network itself (white box), the same architecture from another run (grey
box), another architecture, several at once (Dong et al. 2018), or a twin trained on the network's answers (Papernot et
al. 2017).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtrades_fast import rng
from dtrades_fast.attacks import Attack, Square
from dtrades_fast.attacks.base import frozen
from dtrades_fast.config import Optimization
from dtrades_fast.data import Augmentation, ImageSet, to_float
from dtrades_fast.evaluation.engine import Engine, allowed
from dtrades_fast.training.schedules import create_optimizer, create_schedule
from dtrades_fast.training.trainer import Batches

__all__ = [
    "Ensemble",
    "Extraction",
    "Player",
    "QueryCurve",
    "Transfer",
    "extract",
    "query_curve",
    "relation",
    "transfer",
]


# Several networks at once, and what one network is to another


class Ensemble(nn.Module):
    """The mean of several networks' logits, [N, classes], from images in [0, 1].

    Args:
        networks: at least one.

    Source: Dong et al. 2018, Boosting adversarial attacks with momentum.
    """

    def __init__(self, networks: Sequence[nn.Module]):
        super().__init__()
        if not networks:
            raise ValueError("an ensemble needs at least one network")
        self.networks = nn.ModuleList(networks)

    def forward(self, images: Tensor) -> Tensor:
        return torch.stack([network(images) for network in self.networks]).mean(0)


@dataclass(frozen=True)
class Player:
    """A network that images are made on, or judged by.

    Attributes:
        model: maps images in [0, 1] to logits; put in eval mode.
        arch: name of the architecture.
        twin_of: the network whose answers it was trained on, see :func:`extract`.
    """

    model: nn.Module
    arch: str
    twin_of: nn.Module | None = None


def relation(source: Player, target: Player) -> str:
    """What the attacker has who makes images on ``source``, seen from ``target``."""
    members = list(source.model.networks) if isinstance(source.model, Ensemble) else []
    if source.model is target.model:
        return "white box"
    if members:
        return "ensemble with it" if target.model in members else "ensemble"
    if source.twin_of is target.model:
        return "extracted"
    return "grey box" if source.arch == target.arch else "other architecture"


# Transfer


@dataclass(frozen=True)
class Transfer:
    """What each target makes of images made on each source.

    Attributes:
        sources: names.
        targets: names.
        relations: of each source and target, see :func:`relation`.
        natural: [targets, N], bool: classified correctly without an attack.
        standing: [sources, targets, N], bool: classified correctly, and still so on the source's images.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    relations: tuple[tuple[str, ...], ...]
    natural: Tensor
    standing: Tensor

    def accuracy(self) -> Tensor:
        """Robust accuracy of each target under each source's images in %, [sources, targets], float64."""
        return 100 * self.standing.double().mean(-1)

    def success(self) -> Tensor:
        """Share of a target's correctly classified points that a source's images fool, in %, [sources, targets].

        NaN where the target classifies none correctly.
        """
        return 100 * (1 - self.standing.double().sum(-1) / self.natural.double().sum(-1))


def transfer(
    sources: Mapping[str, Player], targets: Mapping[str, Player], engine: Engine, name: str, attack: Attack
) -> Transfer:
    """Make images on each source and judge them by each target. An attack that ends early transfers worse.

    A point stands if the target classifies it correctly both without an attack and on the source's image, whatever the
    source makes of it. An image outside of the attack's ball or box fools nobody.

    Args:
        sources: by name.
        targets: by name; those that are sources too are attacked in the white box.
        engine: whose images, random numbers and progress these are; the same random numbers for every source.
        name: under which the results are kept.
        attack: e.g. :class:`dtrades_fast.attacks.MIFGSM`; with ``epsilon`` and ``norm``.

    Raises:
        ValueError: there is no source, no target or no image.
    """
    count = len(engine.images)
    if not sources or not targets or not count:
        raise ValueError(f"transfer needs sources, targets and images, got {len(sources)}, {len(targets)} and {count}")
    for player in (*sources.values(), *targets.values()):
        player.model.eval()
    every = torch.ones(count, dtype=torch.bool)

    def judged(images: Tensor, labels: Tensor, refused: Tensor | bool = False) -> Tensor:
        """A number of one bit per target, which says whether it classifies correctly."""
        bits = [(refused | right(target.model, images, labels)).double() * 2**j for j, target in enumerate(judges)]
        return torch.stack(bits).sum(0)

    def attacked(source: Player, images: Tensor, labels: Tensor, ids: Tensor) -> Tensor:
        adv = attack(source.model, images, labels, index=ids, key=engine.key)
        return judged(adv, labels, ~allowed(adv, images, attack.epsilon, attack.norm))  # type: ignore[attr-defined]

    judges = list(targets.values())
    numbers = [engine.measure(f"{name}/clean", lambda images, labels, ids: judged(images, labels), every)]
    for source in sources:
        numbers.append(engine.measure(f"{name}/{source}", functools.partial(attacked, sources[source]), every))
    places = 2 ** torch.arange(len(judges))[:, None]
    natural, *standing = ((part.long() // places % 2).bool() for part in numbers)
    relations = tuple(tuple(relation(s, t) for t in judges) for s in sources.values())
    return Transfer(tuple(sources), tuple(targets), relations, natural, natural & torch.stack(standing))


@torch.no_grad()
def right(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Whether each image is classified correctly, [N], bool."""
    return model(images).argmax(1) == labels


# Queries


@dataclass(frozen=True)
class QueryCurve:
    """When each point fell to an attack that asks for logits.

    Attributes:
        queries: [N], int64: how many it took, 0 for points that are misclassified without an attack, and all there
            were for those that stand.
        standing: [N], bool: what no query broke.
        budget: queries per point.
    """

    queries: Tensor
    standing: Tensor
    budget: int

    def accuracy(self, after: Sequence[int] | Tensor) -> Tensor:
        """Robust accuracy after so many queries in %, [len(after)], float64.

        Raises:
            ValueError: a number outside of 0 to the budget, of which nothing is known.
        """
        counts = torch.as_tensor(after)
        if len(counts) and not 0 <= int(counts.min()) <= int(counts.max()) <= self.budget:
            raise ValueError(f"a number of queries must be from 0 to {self.budget}, the budget, got {counts.tolist()}")
        stands = self.standing | (self.queries > counts[:, None])
        return 100 * stands.double().mean(1)

    def median(self) -> float | None:
        """Median number of queries of the points that the attack broke; None if it broke none."""
        broken = self.queries[~self.standing & (self.queries > 0)]
        return broken.double().quantile(0.5).item() if len(broken) else None


def query_curve(engine: Engine, name: str, attack: Square, natural: Tensor) -> tuple[QueryCurve, int]:
    """Run Square on the correctly classified points, and note when each falls.

    Args:
        engine: whose network, images and progress these are.
        name: under which the result is kept.
        attack: its budget is ``queries`` times ``restarts``.
        natural: [N], bool: the points that are classified correctly.

    Returns:
        The curve, and the number of points where a claim was refuted, see :meth:`Engine.find`.
    """

    def search(model: nn.Module, images: Tensor, labels: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        with frozen(model):
            return attack.search(model, images, labels, ids, engine.key)

    numbers, refuted = engine.find(name, search, natural, attack.epsilon, attack.norm)
    standing, budget = natural & numbers.isinf(), attack.queries * attack.restarts
    queries = torch.where(natural & ~standing, numbers, torch.where(standing, budget, 0.0)).long()
    return QueryCurve(queries, standing, budget), int(refuted.sum())


# Extraction


@dataclass(frozen=True)
class Extraction:
    """A network trained on another one's answers.

    Attributes:
        twin: it, in eval mode.
        queries: images that the target was asked about for it.
        agreement: share of the held-out images, 0 to 1, that both put into the same class.
    """

    twin: nn.Module
    queries: int
    agreement: float


def extract(
    target: nn.Module,
    images_uint8: Tensor,
    make_twin: Callable[[], nn.Module],
    *,
    held_out_uint8: Tensor,
    probabilities: bool = False,
    epochs: int = 10,
    steps: int = 300,
    batch_size: int = 128,
    lr: float = 0.05,
    augmentation: Augmentation | None = None,
    seed: int = 0,
) -> Extraction:
    """Train a twin of a network from nothing but its answers to images; true labels are not even taken.

    Each image is asked about once, as it is; the twin learns that answer for all its crops and flips, by SGD with
    momentum and a learning rate that rises over 30 % of the steps and falls again. Images that are held out, too, are
    left out of the queries, so that the twin has not seen what it will be attacked at.

    Args:
        target: maps images in [0, 1] to logits; put in eval mode.
        images_uint8: [N, C, H, W], the attacker's own images, on the target's device.
        make_twin: makes a fresh network, of whatever architecture the attacker guesses.
        held_out_uint8: [M, C, H, W], what the networks will be compared and evaluated on.
        probabilities: the target answers with probabilities; otherwise with its class alone.
        epochs: passes over the images, or more if that is less than ``steps``.
        steps: of the optimizer, at least.
        batch_size: images per step.
        lr: highest learning rate.
        augmentation: random crops and flips for the twin.
        seed: of the twin's initial weights, order, crops and dropout.

    Raises:
        TypeError: images are not uint8.
        ValueError: every image is held out, too, or none is.

    Source: Papernot et al. 2017, Practical black-box attacks against machine learning.
    """
    for name, pixels in (("images_uint8", images_uint8), ("held_out_uint8", held_out_uint8)):
        if pixels.dtype != torch.uint8 or pixels.dim() != 4:
            raise TypeError(f"{name} must be uint8 of shape [N, C, H, W], got {pixels.dtype} {list(pixels.shape)}")
    if not len(held_out_uint8):
        raise ValueError("extract needs held-out images to compare the twin with its target on, got none")
    images_uint8 = without(images_uint8, held_out_uint8)
    if not len(images_uint8):
        raise ValueError("every image of the attacker is held out, too: give others, e.g. of the training set")
    target.eval()
    answers = torch.cat([logits.softmax(1) for logits in ask(target, images_uint8, batch_size)])
    ids = torch.arange(len(answers), device=answers.device)
    asked = ImageSet(images_uint8, answers.argmax(1), ids)
    lessons = answers if probabilities else asked.labels
    with torch.random.fork_rng():
        torch.manual_seed(rng.key(seed, "twin"))
        twin = make_twin().to(answers.device)
        batches = Batches(asked, batch_size, seed, augmentation)
        learn(twin, batches, lessons, Optimization(epochs=max(epochs, math.ceil(steps / len(batches))), lr=lr))
    twin.eval()
    same = [
        mine.argmax(1) == theirs.argmax(1)
        for mine, theirs in zip(*(ask(model, held_out_uint8, batch_size) for model in (twin, target)), strict=True)
    ]
    return Extraction(twin, len(answers), torch.cat(same).double().mean().item())


def learn(twin: nn.Module, batches: Batches, lessons: Tensor, options: Optimization) -> None:
    """Train on cross-entropy to classes [N] or probabilities [N, classes], picked by the samples' ids."""
    twin.train()
    optimizer = create_optimizer(options, twin.parameters())
    schedule = create_schedule(options, optimizer, len(batches))
    for step in range(options.epochs * len(batches)):
        images, _, ids = batches.get(*divmod(step, len(batches)))
        optimizer.zero_grad(set_to_none=True)
        F.cross_entropy(twin(images), lessons[ids]).backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def ask(model: nn.Module, images_uint8: Tensor, batch_size: int) -> list[Tensor]:
    """Logits of the images, batch by batch."""
    return [model(to_float(part)) for part in images_uint8.split(batch_size)]


def without(images_uint8: Tensor, others_uint8: Tensor) -> Tensor:
    """The images that are not among the others, pixel by pixel."""
    known = {image.tobytes() for image in others_uint8.cpu().numpy()}
    fresh = [image.tobytes() not in known for image in images_uint8.cpu().numpy()]
    return images_uint8[torch.tensor(fresh, dtype=torch.bool, device=images_uint8.device)]
