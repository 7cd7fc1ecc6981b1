"""Runs attacks over a data set, part by part and batch by batch, and keeps what each has found.

A search may run on a faster form of the network. Whatever it claims is checked on the network itself, in its own
precision, and against ball and box, before it counts; where it does not hold, the search is done again on the network
itself. What is done is kept in a file, so that a killed evaluation goes on from there to the same result. Several
processes (``torchrun``) take turns at the batches, which are the same for any number of them, and tell each other what
they found after every part.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from dtrades_fast import processes
from dtrades_fast.attacks import Attack
from dtrades_fast.attacks.base import Model, frozen
from dtrades_fast.data import ImageSet
from dtrades_fast.evaluation.suites import Norm
from dtrades_fast.models.attack_network import AttackNetwork, Precision
from dtrades_fast.models.folding import LOGIT_TOLERANCE
from dtrades_fast.training import checkpoint

__all__ = ["Cost", "Engine", "Outcome", "Progress"]

#: A point may leave its ball by this share of epsilon, which is float32 rounding, and the box by nothing.
BALL_TOLERANCE = 1e-5
#: What a search finds on a network: of images, labels and ids, gives images and a number > 0 for each point, [n].
Search = Callable[[nn.Module, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
#: The number of a point whose claim did not hold, and what is added to the name where it is searched again.
REFUTED, AGAIN = -torch.inf, "/again"
#: Seconds between two times that what is done is written to the file.
SAVE_SECONDS = 10.0


class Counted(nn.Module):
    """A network that counts the images that pass through it, forward and backward.

    Attributes:
        network: it.
        forwards: images that went forward.
        backwards: images whose gradient came back.
        itself: gives the logits of what the network is a faster form of; None if it is that itself.
    """

    def __init__(self, network: nn.Module, itself: Model | None = None):
        super().__init__()
        self.network, self.itself = network, itself
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
        refuted: points where a claim did not hold on the network itself, which was searched then.
        stages: standing points after each part, for attacks of several.
    """

    standing: Tensor
    cost: Cost
    refuted: int
    stages: tuple[int, ...]


class Progress:
    """What is done so far: by name, one number per point, NaN where it is still to be done.

    Args:
        folder: where each process keeps its file, or None to keep nothing.
        fingerprint: of all that the numbers depend on; files of another one are refused.
        resume: go on from the files that are there, of whatever number of processes.
        overwrite: forget the files that are there.

    Raises:
        ValueError: there are files and neither is asked for, or a file belongs to another evaluation.
        RuntimeError: a file is damaged.
    """

    def __init__(
        self, folder: Path | None, fingerprint: dict[str, Any], *, resume: bool = False, overwrite: bool = False
    ):
        self.folder, self.fingerprint, self._resume = folder, fingerprint, resume
        self.rank, self.processes = processes.rank(), processes.count()
        self.values: dict[str, Tensor] = {}
        self._own: dict[str, Cost] = {}  # of this process; with what earlier sessions took, in the first one
        self._all: dict[str, Cost] = {}  # of all processes, once they have shared it
        self._saved, self._begun = time.monotonic(), False
        files = sorted(folder.glob("*.pt")) if folder is not None else []
        if files and not resume and not overwrite:
            raise ValueError(
                f"{folder} holds an unfinished evaluation: --resume goes on with it, --overwrite starts again"
            )
        for path in files if resume else ():
            self._load(path)

    def _load(self, path: Path) -> None:
        state = checkpoint.load_state(path)
        if not {"fingerprint", "values", "costs"} <= set(state):
            raise RuntimeError(f"{path} is damaged or of something else: --overwrite starts again")
        then = state["fingerprint"]
        if changed := [name for name in self.fingerprint if then.get(name) != self.fingerprint[name]]:
            what = "; ".join(f"{name}: {then.get(name)}, now {self.fingerprint[name]}" for name in changed)
            raise ValueError(f"{path} belongs to another evaluation ({what}): --overwrite starts again")
        for name, numbers in state["values"].items():
            self._merge(name, numbers)
        for name, cost in state["costs"].items() if self.rank == 0 else ():
            self._own[name] = self._own.get(name, Cost()) + Cost(*cost)

    def begin(self) -> None:
        """From here on what is done is kept. Nothing is deleted before. All processes must call it."""
        if self._begun or self.folder is None:
            return
        self._begun = True
        processes.wait()  # until all have read
        if self.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            checkpoint.remove_leftovers(self.folder)
            self.save()  # with what was in the others' files
            self._remove(keep=[self._file, *(self.folder.glob("*.kept") if self._resume else ())])
        processes.wait()

    def _merge(self, name: str, numbers: Tensor) -> None:
        mine = self.of(name, len(numbers))
        mine.copy_(torch.where(mine.isnan(), numbers, mine))

    def of(self, name: str, count: int) -> Tensor:
        """The numbers of that name, [count], float64."""
        return self.values.setdefault(name, torch.full((count,), torch.nan, dtype=torch.float64))

    def done(self, name: str, rows: Tensor, numbers: Tensor, cost: Cost) -> None:
        """Keep the numbers of these points."""
        self.values[name][rows] = numbers.double().cpu()
        self._own[name] = self._own.get(name, Cost()) + cost
        if time.monotonic() - self._saved > SAVE_SECONDS:
            self.save()

    def share(self, name: str) -> None:
        """Tell the other processes what this one has found, and take over what they have. They all must call it."""
        if self.processes == 1:
            return
        everyone = processes.gathered((self.values[name], self._own.get(name, Cost())))
        for numbers, _ in everyone:
            self._merge(name, numbers)
        self._all[name] = sum((cost for _, cost in everyone), Cost())

    def cost(self, name: str) -> Cost:
        """Of all points of that name, in all processes and sessions."""
        return (self._own if self.processes == 1 else self._all).get(name, Cost())

    def once(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What the first process makes, the same in all of them, and in the sessions that go on from this one.

        Args:
            name: what it is.
            make: gives a dict of tensors, numbers and strings.
        """
        self.begin()
        made: list[Any] = [None]
        if self.rank == 0:
            file = None if self.folder is None else self.folder / f"{name}.kept"
            made = [checkpoint.load_state(file) if file is not None and file.is_file() else make()]
            if file is not None and not file.is_file():
                checkpoint.save_state(file, made[0])
        if self.processes > 1:
            dist.broadcast_object_list(made)
        return made[0]

    @property
    def _file(self) -> Path:
        assert self.folder is not None
        return self.folder / f"{self.rank}.pt"

    def save(self) -> None:
        """Write this process' file, all or nothing."""
        if self.folder is not None:
            costs = {name: [c.seconds, c.forwards, c.backwards] for name, c in self._own.items()}
            checkpoint.save_state(self._file, {"fingerprint": self.fingerprint, "values": self.values, "costs": costs})
        self._saved = time.monotonic()

    def finish(self) -> None:
        """Forget the files: the result is in other hands. All processes must call it."""
        processes.wait()
        if self.folder is not None and self.rank == 0 and self.folder.is_dir():
            self._remove()
            with suppress(OSError):  # something that is not ours is in it
                self.folder.rmdir()

    def _remove(self, keep: Sequence[Path] = ()) -> None:
        assert self.folder is not None
        for pattern in ("*.pt", "*.kept"):
            for path in self.folder.glob(pattern):
                if path not in keep:
                    path.unlink()


class Engine:
    """A network and the images that it is evaluated on.

    Args:
        model: maps images in [0, 1] to logits; put in eval mode.
        images: what it is evaluated on.
        key: the stream of random numbers.
        batch_size: images at a time.
        progress: what is done already, and where it is kept.
        fast: let attacks search on the network with BatchNorm folded, where that computes the same.
        precision: of the search, ``"fp32"``, ``"fp16"`` or ``"bf16"``; what it finds is checked in the network's own.
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
        precision: Precision = "fp32",
    ):
        self.images, self.key, self.batch_size = images, key, batch_size
        self.progress = progress or Progress(None, {})
        self.model = Counted(model.eval())
        few = self.batch(torch.arange(min(8, len(images))))[0]
        form = AttackNetwork(model, few, folded=fast, channels_last=fast, precision=precision)
        self.layout, self.how = form.layout, form.how
        self.search = self.model if form.plain else Counted(form, self._logits)

    def natural(self) -> Tensor:
        """Whether each image is classified correctly, [N], bool, on the host."""

        def right(images: Tensor, labels: Tensor, ids: Tensor) -> Tensor:
            with torch.no_grad():
                return self.model(images).argmax(1) == labels

        return self.measure("clean", right, torch.ones(len(self.images), dtype=torch.bool)) == 1

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

            def search(
                model: nn.Module, images: Tensor, labels: Tensor, ids: Tensor, part: Attack = part
            ) -> tuple[Tensor, Tensor]:
                return part(model, images, labels, index=ids, key=self.key), torch.ones_like(labels)

            numbers, denied = self.find(stage, search, standing, attack.epsilon, attack.norm)  # type: ignore[attr-defined]
            refuted += int(denied.sum())
            standing = standing & numbers.isinf()
            stages.append(int(standing.sum()))
            cost = cost + self.cost(stage)
        return Outcome(standing, cost, refuted, tuple(stages) if len(stages) > 1 else ())

    def find(
        self, name: str, search: Search, rows: Tensor, epsilon: float = torch.inf, norm: Norm = "linf"
    ) -> tuple[Tensor, Tensor]:
        """What a search finds for some points that the network itself confirms.

        A claim that does not hold on the network itself says nothing of the point, so that it is searched there again.

        Args:
            name: under which the numbers are kept.
            search: it.
            rows: [N], bool: the points.
            epsilon: radius of the ball that the images must lie in, in pixel units.
            norm: of the ball.

        Returns:
            [N], float64, on the host: the search's numbers of broken points, infinity for those that stand, NaN for
            the other points; and [N], bool, where a claim was refuted and the search done again.
        """

        def quickly(images: Tensor, labels: Tensor, ids: Tensor) -> Tensor:
            adv, numbers = search(self.search, self.laid_out(images), labels, ids)
            holds = self._fooled(adv, labels) & allowed(adv, images, epsilon, norm)
            numbers = numbers.double().where(holds, torch.inf)
            if self.search is self.model:
                return numbers
            with torch.no_grad(), frozen(self.search):
                claimed = claims(self.search(adv), labels)
            return numbers.masked_fill(claimed & ~holds, REFUTED)

        def again(images: Tensor, labels: Tensor, ids: Tensor) -> Tensor:
            adv, numbers = search(self.model, images, labels, ids)
            return numbers.double().where(self._fooled(adv, labels) & allowed(adv, images, epsilon, norm), torch.inf)

        numbers = self.measure(name, quickly, rows)
        refuted = numbers == REFUTED
        if refuted.any():
            numbers = numbers.where(~refuted, self.measure(name + AGAIN, again, refuted))
        return numbers, refuted

    def measure(self, name: str, function: Callable[[Tensor, Tensor, Tensor], Tensor], rows: Tensor) -> Tensor:
        """A number for each of some points, kept under the name.

        Args:
            name: what it is.
            function: of images, labels and ids of a batch, gives [n] numbers, none of them NaN.
            rows: [N], bool: the points.

        Returns:
            [N], float64, on the host; NaN for the other points.
        """
        self.progress.begin()
        numbers, progress = self.progress.of(name, len(self.images)), self.progress
        parts = [part for part in rows.nonzero().squeeze(1).split(self.batch_size) if numbers[part].isnan().any()]
        for part in parts[progress.rank :: progress.processes]:
            with self._measured() as cost:
                found = function(*self.batch(part))
            progress.done(name, part, found, cost)
        progress.share(name)
        return numbers.where(rows, torch.nan)

    def cost(self, name: str) -> Cost:
        """What :meth:`measure` or :meth:`find` took for all points of that name, in all processes and sessions."""
        return self.progress.cost(name) + self.progress.cost(name + AGAIN)

    def _fooled(self, adv: Tensor, labels: Tensor) -> Tensor:
        """Which images the network itself misclassifies, [n], bool."""
        return self._logits(adv).argmax(1) != labels

    def _logits(self, images: Tensor) -> Tensor:
        """The network's own."""
        with torch.no_grad(), frozen(self.model):
            return self.model(images.contiguous())

    def laid_out(self, images: Tensor) -> Tensor:
        """The images in the memory format that the search's network is fastest with."""
        return images.contiguous(memory_format=self.layout)

    def batch(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images in [0, 1], labels and ids of these points, on their device."""
        rows = rows.to(self.images.labels.device)
        return self.images.images(rows), self.images.labels[rows], self.images.ids[rows]

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


def claims(logits: Tensor, labels: Tensor) -> Tensor:
    """Where a search says that it has succeeded, [N], bool.

    It may have seen the image in another batch, so that a label's logit that is larger by mere rounding counts as
    well, and so do logits that overflow and say nothing.
    """
    label = labels[:, None]
    margin = logits.scatter(1, label, -torch.inf).amax(1) - logits.gather(1, label).squeeze(1)
    return ~(margin < -LOGIT_TOLERANCE * logits.abs().amax(1)) | ~logits.isfinite().all(1)


def allowed(adv: Tensor, images: Tensor, epsilon: float, norm: Norm) -> Tensor:
    """Which images are in the ball and in [0, 1], [N], bool; NaN is not."""
    delta = (adv - images).flatten(1)
    size = delta.abs().amax(1) if norm == "linf" else torch.linalg.vector_norm(delta, dim=1)
    inside = (adv.flatten(1).amin(1) >= 0) & (adv.flatten(1).amax(1) <= 1)
    return inside & (size <= epsilon * (1 + BALL_TOLERANCE) + 1e-7)
