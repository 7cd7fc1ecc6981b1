"""Runs attacks over a data set, part by part and batch by batch, and keeps what each has found.

A search may run on a faster form of the network. Whatever it claims is checked on the network itself, in its own
precision, and against ball and box, before it counts. What is done is kept in a file after every batch, so that a
killed evaluation goes on from there to the same result.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dtrades_fast.attacks import Attack
from dtrades_fast.attacks.base import frozen
from dtrades_fast.data import ImageSet
from dtrades_fast.models.folding import fold
from dtrades_fast.training import checkpoint

__all__ = ["Cost", "Engine", "Outcome", "Progress"]

#: A point may leave its ball by this share of epsilon, which is float32 rounding, and the box by nothing.
BALL_TOLERANCE = 1e-5
#: Seconds between two times that what is done is written to the file.
SAVE_SECONDS = 10.0


class Counted(nn.Module):
    """A network that counts the images that pass through it, forward and backward.

    Attributes:
        network: it.
        forwards: images that went forward.
        backwards: images whose gradient came back.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        self.forwards = self.backwards = 0
        self.computes_in_half = getattr(network, "computes_in_half", False)

    def forward(self, images: Tensor) -> Tensor:
        self.forwards += len(images)
        logits = self.network(images)
        if logits.requires_grad:
            logits.register_hook(self._came_back)
        return logits

    def _came_back(self, gradient: Tensor) -> None:
        self.backwards += len(gradient)


@dataclass
class Cost:
    """What an attack took: seconds, and images that passed forward and backward."""

    seconds: float = 0.0
    forwards: int = 0
    backwards: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.seconds + other.seconds, self.forwards + other.forwards, self.backwards + other.backwards)


@dataclass(frozen=True)
class Outcome:
    """What an attack left.

    Attributes:
        standing: [N], bool: correctly classified before and after it.
        cost: of the attack, with that of earlier sessions of the same evaluation.
        refuted: claims that did not hold on the network itself.
        stages: standing points after each part, for attacks of several.
    """

    standing: Tensor
    cost: Cost
    refuted: int
    stages: tuple[int, ...]


class Progress:
    """What is done so far: by name, one number per point, NaN where it is still to be done.

    Args:
        path: the file, or None to keep nothing.
        fingerprint: of all that the numbers depend on; a file of another one is refused.
        resume: go on from the file if it is there.

    Raises:
        ValueError: the file belongs to another evaluation.
        RuntimeError: the file is damaged.
    """

    def __init__(self, path: Path | None, fingerprint: dict[str, Any], *, resume: bool = False):
        self.path, self.fingerprint = path, fingerprint
        self.values: dict[str, Tensor] = {}
        self.costs: dict[str, Cost] = {}
        self._saved = time.monotonic()
        if path is None or not resume or not path.is_file():
            return
        state = checkpoint.load_state(path)
        changed = [name for name in fingerprint if state["fingerprint"].get(name) != fingerprint[name]]
        if changed:
            what = "; ".join(f"{n}: {state['fingerprint'].get(n)}, now {fingerprint[n]}" for n in changed)
            raise ValueError(f"{path} belongs to another evaluation ({what}): leave --resume out to start again")
        self.values = state["values"]
        self.costs = {name: Cost(*numbers) for name, numbers in state["costs"].items()}

    def of(self, name: str, count: int) -> Tensor:
        """The numbers of that name, [count], float64."""
        return self.values.setdefault(name, torch.full((count,), torch.nan, dtype=torch.float64))

    def done(self, name: str, rows: Tensor, numbers: Tensor, cost: Cost) -> None:
        """Keep the numbers of these points."""
        self.values[name][rows] = numbers.double().cpu()
        self.costs[name] = self.costs.get(name, Cost()) + cost
        if time.monotonic() - self._saved > SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """Write the file, all or nothing."""
        if self.path is not None:
            costs = {name: [c.seconds, c.forwards, c.backwards] for name, c in self.costs.items()}
            state = {"fingerprint": self.fingerprint, "values": self.values, "costs": costs}
            checkpoint.save_state(self.path, state)
        self._saved = time.monotonic()

    def finish(self) -> None:
        """Forget the file: the result is in other hands."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


class Engine:
    """A network and the images that it is evaluated on.

    Args:
        model: maps images in [0, 1] to logits; put in eval mode.
        images: what it is evaluated on.
        key: the stream of random numbers.
        batch_size: images at a time.
        progress: what is done already, and where it is kept.
        fast: let attacks search on the network with BatchNorm folded, where that computes the same.
    """

    def __init__(
        self,
        model: nn.Module,
        images: ImageSet,
        *,
        key: int,
        batch_size: int,
        progress: Progress | None = None,
        fast: bool = True,
    ):
        self.images, self.key, self.batch_size = images, key, batch_size
        self.progress = progress or Progress(None, {})
        self.model = Counted(model.eval())
        folded = fold(model, self._batch(torch.arange(min(8, len(images))))[0]) if fast else None
        if folded is None:
            self.search, self.how = self.model, "the network itself"
        else:
            self.search = Counted(folded.to(memory_format=torch.channels_last))
            self.how = f"BatchNorm folded ({folded.folded} of {folded.folded + folded.kept}), channels last"
        self.layout = torch.contiguous_format if folded is None else torch.channels_last

    def natural(self) -> Tensor:
        """Whether each image is classified correctly, [N], bool, on the host."""
        name, every = "clean", torch.arange(len(self.images))
        for rows in self._batches(name, every):
            with self._measured() as cost, torch.no_grad():
                images, labels, _ = self._batch(rows)
                flags = self.model(images).argmax(1) == labels
            self.progress.done(name, rows, flags, cost)
        return self.progress.of(name, len(self.images)) == 1

    def attack(self, name: str, attack: Attack, standing: Tensor) -> Outcome:
        """Run the attack on the standing points.

        Args:
            name: under which the result is kept.
            attack: with ``epsilon`` and ``norm``.
            standing: [N], bool.
        """
        refuted, stages, cost = 0, [], Cost()
        for number, part in enumerate(attack.parts()):
            stage = f"{name}/{number}"
            for rows in self._batches(stage, standing.nonzero().squeeze(1)):
                with self._measured() as spent:
                    broken, claimed = self._try(part, rows)
                # 1 stands, 0 broken, 0.5 stands although the search thought otherwise
                self.progress.done(stage, rows, torch.where(broken, 0.0, torch.where(claimed, 0.5, 1.0)), spent)
            numbers = self.progress.of(stage, len(self.images))
            refuted += int((numbers == 0.5).sum())
            standing = standing & (numbers > 0)
            stages.append(int(standing.sum()))
            cost = cost + self.progress.costs.get(stage, Cost())
        return Outcome(standing, cost, refuted, tuple(stages) if len(stages) > 1 else ())

    def _try(self, attack: Attack, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Which of these points the attack has broken, and on which the search thought that it had."""
        images, labels, ids = self._batch(rows)
        images = images.contiguous(memory_format=self.layout)
        adv = attack(self.search, images, labels, index=ids, key=self.key)
        with torch.no_grad(), frozen(self.model):
            fooled = self.model(adv.contiguous()).argmax(1) != labels
            claimed = self.search(adv).argmax(1) != labels if self.search is not self.model else fooled
        return fooled & allowed(adv, images, attack), claimed

    def _batch(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        rows = rows.to(self.images.labels.device)
        return self.images.images(rows), self.images.labels[rows], self.images.ids[rows]

    def _batches(self, name: str, rows: Tensor) -> Iterator[Tensor]:
        """The batches of these points that are still to be done; the split does not depend on what is done."""
        numbers = self.progress.of(name, len(self.images))
        for part in rows.split(self.batch_size):
            if numbers[part].isnan().any():
                yield part

    @contextmanager
    def _measured(self) -> Iterator[Cost]:
        """Fills in the cost of what happens inside."""
        cost, networks = Cost(), {self.model, self.search}
        begin = time.perf_counter()
        forwards, backwards = sum(n.forwards for n in networks), sum(n.backwards for n in networks)
        yield cost
        if self.images.labels.is_cuda:
            torch.cuda.synchronize()
        cost.seconds = time.perf_counter() - begin
        cost.forwards = sum(n.forwards for n in networks) - forwards
        cost.backwards = sum(n.backwards for n in networks) - backwards


def allowed(adv: Tensor, images: Tensor, attack: Attack) -> Tensor:
    """Which images are in the attack's ball and in [0, 1], [N], bool; NaN is not."""
    epsilon, norm = attack.epsilon, attack.norm  # type: ignore[attr-defined]
    delta = (adv - images).flatten(1)
    size = delta.abs().amax(1) if norm == "linf" else torch.linalg.vector_norm(delta, dim=1)
    inside = (adv.flatten(1).amin(1) >= 0) & (adv.flatten(1).amax(1) <= 1)
    return inside & (size <= epsilon * (1 + BALL_TOLERANCE) + 1e-7)
