"""The training loop. Read :meth:`Trainer.fit` first.

Every random number is a function of the seed and of what it is for (:mod:`dtrades_fast.rng`): data order, crops,
attack starts, dropout. So a checkpoint holds no generator states, and a run that was killed goes on to the same bits.

On a GPU the host only sends work off, and should never wait for a result within a step: :meth:`Trainer.train_step`
reads no tensor there. What must be read is summed up on the device and read now and then.
"""

from __future__ import annotations

import copy
import math
import os
import signal
import threading
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_map_only

from dtrades_fast import data, environment, models, processes, rng
from dtrades_fast.attacks import PGD, Graph
from dtrades_fast.config import Config
from dtrades_fast.defenses import Batch, Loss, Threat
from dtrades_fast.evaluation import metrics
from dtrades_fast.models.attack_network import AttackNetwork, Compiled
from dtrades_fast.models.layout import lay_out
from dtrades_fast.models.precision import HALF, Autocast
from dtrades_fast.models.weights import freeze_backbone, load_init_weights
from dtrades_fast.profiling import span
from dtrades_fast.training import checkpoint, schedules, tracking
from dtrades_fast.training.average import MovingAverage
from dtrades_fast.training.meter import Meter
from dtrades_fast.training.monitor import Monitor
from dtrades_fast.training.progress import Progress, duration
from dtrades_fast.training.run_folder import RunFolder

__all__ = ["Interrupted", "Trainer", "TrainingError", "train"]

SAMPLE = 8  #: images that the form of the network under attack is compared on
MEASURED_STEPS = 3  #: timed for the expectation, after one that warms up
LOOK_STEPS = 100  #: on a GPU, steps between looks for a loss that is not finite
SMALLEST_SCALE = 2.0**-14  #: of the loss in fp16, 30 steps without an update below where it begins
MASKED = "more attack steps, a larger batch or beta, a lower --lr or --on-masking noise may help"
LOST = ("peer", "Connection", "Socket", "NCCL")  #: in the messages of gloo and NCCL when a process has ended
AVERAGED = "module."  #: of what the state of the moving average names the model's
LONG_SECONDS = 30 * 60  #: above it, a run on a CPU is told how to become smaller


class TrainingError(RuntimeError):
    """Training cannot go on."""


class Interrupted(Exception):  # noqa: N818 (it is no error)
    """A signal asked training to stop; the state is saved."""

    def __init__(self, signum: int, message: str):
        super().__init__(message)
        self.signum = signum


class Batches:
    """The mini-batches of training: batch ``i`` of an epoch is a function of the seed, the epoch and ``i``.

    Of several parts of equal size, one more or less, ``part`` is one: ``(its number, how many)``.
    """

    def __init__(
        self,
        images: data.ImageSet,
        batch_size: int,
        seed: int,
        augmentation: data.Augmentation | None,
        layout: torch.memory_format = torch.contiguous_format,
        part: tuple[int, int] = (0, 1),
    ):
        self.images, self.batch_size, self.seed, self.augmentation = images, batch_size, seed, augmentation
        self.layout, (self.part, self.parts) = layout, part
        self.highest_id = int(images.ids.max())
        self.epoch = -1

    def __len__(self) -> int:
        """Batches per epoch; the last one may be smaller."""
        return math.ceil(len(self.images) / self.batch_size)

    def size(self, i: int) -> int:
        """Images in batch ``i``, in all its parts."""
        return min(self.batch_size, len(self.images) - i * self.batch_size)

    def get(self, epoch: int, i: int) -> tuple[Tensor, Tensor, Tensor]:
        """Images in [0, 1], labels and sample ids; of this part."""
        if epoch != self.epoch:
            device = self.images.labels.device
            self.order = upload(data.epoch_order(len(self.images), self.seed, epoch), device)
            if self.augmentation is not None:
                self.offsets = upload(self.augmentation.offsets(self.seed, epoch, self.highest_id + 1), device)
            self.epoch = epoch
        chosen = self.order[i * self.batch_size : (i + 1) * self.batch_size]
        chosen = chosen.tensor_split(self.parts)[self.part]
        ids, pixels = self.images.ids[chosen], self.images.images_uint8[chosen]
        if self.augmentation is not None:
            pixels = self.augmentation.apply(pixels, self.offsets[ids])
        images = data.to_float(pixels).contiguous(memory_format=self.layout)
        return images, self.images.labels[chosen], ids


def upload(host: Tensor, device: torch.device) -> Tensor:
    """A copy on the device that the host does not wait for, which takes page-locked memory."""
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


class Trainer:
    """One run: what it is made of, its state, and the loop.

    Args:
        config: with nothing left open, see :meth:`dtrades_fast.config.Config.resolved`.
        sets: the data; ``test`` is never touched.
        folder: where the run is kept.
        console: where progress is shown.
    """

    def __init__(self, config: Config, sets: data.DataSets, folder: RunFolder, console: Console):
        self.config, self.sets, self.folder, self.console = config, sets, folder, console
        options, seed = config.optimization, config.run.seed
        self.device = processes.own_device(config.run.device)
        torch.manual_seed(rng.key(seed, "init"))
        self.model = create_model(config, sets.info).to(self.device)
        if config.model.freeze_backbone:
            freeze_backbone(self.model)
        self.layout = torch.channels_last if config.speed.channels_last else torch.contiguous_format
        if config.speed.channels_last:
            lay_out(self.model, sets.train.images(slice(SAMPLE)), half=options.precision in HALF)
        augmentation = sets.info.augmentation if config.data.augmentation == "dataset" else None
        self.batches = Batches(
            sets.train, options.batch_size, seed, augmentation, self.layout, (processes.rank(), processes.count())
        )
        self.total_steps = options.epochs * len(self.batches)
        if (last := self.batches.size(len(self.batches) - 1)) < processes.count():
            raise ValueError(
                f"the last batch of an epoch has {last} of {len(sets.train)} images, fewer than {processes.count()} "
                f"processes: choose another --batch-size than {options.batch_size}"
            )
        if last // processes.count() == 1:
            self.check_single_image()
        self.threat = config.threat()
        self.defense = config.make_defense()
        if processes.count() > 1 and getattr(self.defense, "lambda_gradient", None) == "full":
            raise ValueError("--lambda-gradient full runs in one process only: it differentiates the network twice")
        if options.precision == "fp16" and getattr(self.defense, "lambda_gradient", None) == "full":
            raise ValueError(
                "--lambda-gradient full needs --precision fp32 or bf16: differentiated twice in float16, the gradients "
                "of confident samples are 0"
            )
        if processes.count() > 1 and getattr(self.defense, "lambda_shuffle", False):
            raise ValueError("--lambda-shuffle runs in one process only: it permutes the whole batch")
        kind = self.device.split(":")[0]
        if config.speed.compile and kind == "cpu":
            check_compiler()
        if config.speed.cuda_graphs and kind != "cuda":
            raise ValueError(f"--cuda-graphs needs --device cuda, got {kind}: leave it out")
        scaled = options.precision == "fp16"
        fused = scaled or kind == "cuda"
        self.optimizer = schedules.create_optimizer(options, self.model.parameters(), fused)
        self.schedule = schedules.create_schedule(options, self.optimizer, len(self.batches))
        self.scaler = torch.amp.GradScaler(kind, enabled=scaled)
        self.one = torch.ones((), device=self.device)  # shows the scale, which has no other public view on the device
        self.ema = None if options.ema is None else MovingAverage(self.model, options.ema)
        self.step = 0  # optimizer steps done
        self.begun_by = processes.count()  # processes of the run that is resumed
        self.meter = Meter()
        self.monitor = Monitor(len(sets.info.classes), config.attack.masking_noise, self.device)
        self.tracker = tracking.create(config.run.track, folder.tensorboard)
        self.reading_waits = kind == "cuda"
        self.attacked, self.validated = self.attack_networks()
        self.epoch_seconds = 0.0
        self.best: dict[str, float] | None = None  # epoch, na and ra of the best validation

    def check_single_image(self) -> None:
        """BatchNorm in training needs more than one value per channel, which VGG-16 has not of 16 x 16 pixels."""
        try:
            with torch.no_grad():
                copy.deepcopy(self.model).train()(self.sets.train.images(slice(1)))
        except ValueError as error:
            raise ValueError(
                f"the last batch of an epoch has one image per process, too few for the BatchNorm of "
                f"{self.config.model.arch} on images of this size ({error}): choose another --batch-size than "
                f"{self.config.optimization.batch_size}"
            ) from error

    # The loop

    def fit(self, stop: Sequence[int] = ()) -> None:
        """Train to the end, or until ``stop`` holds the signal that asks for it.

        Raises:
            TrainingError: the loss or a weight is not finite.
            Interrupted: training stopped by request; its state is saved.
        """
        network = self.network(self.model)
        timed: list[float] = []  # seconds of the first steps
        saved_at = time.monotonic()
        with Progress(self.console, self.total_steps, self.step) as progress:
            self.progress = progress
            while self.step < self.total_steps:
                began = time.monotonic()
                epoch, i = divmod(self.step, len(self.batches))
                ends_epoch = i + 1 == len(self.batches)
                lr = float(self.optimizer.param_groups[0]["lr"])
                self.train_step(network)
                if ends_epoch or len(timed) <= MEASURED_STEPS:
                    self.wait()
                seconds = time.monotonic() - began
                self.epoch_seconds += seconds
                progress.update(self.step, epoch + 1, self.figures)
                if self.reading_waits and self.step % LOOK_STEPS == 0:
                    self.check_sums()
                if len(timed) <= MEASURED_STEPS:
                    timed.append(seconds)
                    if len(timed) == 1 and self.config.speed.compile:
                        self.progress.print(f"  compiled   with the first step, in {duration(seconds)}")
                    if len(timed) > MEASURED_STEPS:
                        self.expect(sum(timed[1:]) / MEASURED_STEPS)
                masked = self.looks_masked()
                if ends_epoch:
                    self.end_epoch(epoch + 1, lr)
                    saved_at = time.monotonic()
                if masked and self.step < self.total_steps:
                    self.stop_masked(masked)  # behind the end of an epoch, whose metrics a saved state belongs to
                due = time.monotonic() - saved_at >= 60 * self.config.run.checkpoint_minutes
                stopping, due = processes.any_of(bool(stop), due)
                if not ends_epoch and (stopping or due):
                    self.check_state()
                    self.save(self.folder.last)
                    saved_at = time.monotonic()
                if stopping:
                    signum = stop[0] if stop else signal.SIGTERM  # another process was asked
                    raise Interrupted(signum, self.interruption(signum))

    def train_step(self, network: nn.Module) -> None:
        """The next mini-batch: craft, loss, gradients, update, figures."""
        seed = self.config.run.seed
        with span("data"):
            images, labels, ids = self.batches.get(*divmod(self.step, len(self.batches)))
        epoch = self.step / len(self.batches)
        noise = self.monitor.noise if self.config.attack.on_masking == "noise" else None
        batch = Batch(images, labels, ids, rng.key(seed, "attack", self.step), epoch, noise)
        torch.manual_seed(rng.key(seed, "dropout", self.step) + processes.rank())
        self.defense.threat = self.threat_at(self.step)
        network.train()
        with span("attack"):
            self.attacked.refresh()
            crafted = self.defense.craft(self.attacked, batch)
        if crafted.watch is not None:
            crafted.adv.requires_grad_()  # for the monitor
        with span("forward"):
            loss = self.defense.loss(network, batch, crafted)
        if not self.reading_waits:
            self.check_finite(loss)
        with span("backward"):
            self.optimizer.zero_grad(set_to_none=True)
            share = len(labels) * processes.count() / self.batches.size(self.step % len(self.batches))
            scale = self.scaler.scale(self.one) * share  # the mean over processes is that over the batch
            self.scaler.scale(loss.total * share).backward()
            self.average_statistics(share)
        with span("optimizer"):
            self.update()
        self.step += 1
        with span("figures"):
            self.measure(loss, labels)
            self.monitor.add(crafted, loss, labels, scale)

    def average_statistics(self, share: float) -> None:
        """Give all processes the mean of what BatchNorm has seen in each, so that they attack the same network."""
        norms = [module for module in self.model.modules() if isinstance(module, _BatchNorm) and module.training]
        buffers = [buffer for norm in norms for buffer in (norm.running_mean, norm.running_var) if buffer is not None]
        if processes.count() == 1 or not buffers:
            return
        mean = processes.total(torch.cat(buffers) * (share / processes.count()))
        for buffer, values in zip(buffers, mean.split([len(buffer) for buffer in buffers]), strict=True):
            buffer.copy_(values)

    def update(self) -> None:
        """Weights, loss scale, learning rate and moving average."""
        clip_norm = self.config.optimization.clip_norm
        if clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), clip_norm)
        scale = self.scaler.scale(self.one)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.is_enabled():  # the scale shrinks when gradients overflowed and so the weights stayed
            self.meter.add("skipped", (self.scaler.scale(self.one) < scale)[None])
        self.schedule.step()
        if self.ema is not None:
            self.ema.update_parameters(self.model)

    def network(self, model: nn.Module) -> nn.Module:
        """What the loss calls: the model, in mixed precision, compiled, with the gradients of all processes."""
        dtype = HALF.get(self.config.optimization.precision)
        network = model if dtype is None else Autocast(model, self.device, dtype)
        network = Compiled(network) if self.config.speed.compile else network
        if processes.count() == 1:
            return network
        with warnings.catch_warnings():  # of the name that torch 2.13 has for not sending buffers around
            warnings.simplefilter("ignore", FutureWarning)
            return nn.parallel.DistributedDataParallel(network, broadcast_buffers=False, gradient_as_bucket_view=True)

    def attack_networks(self) -> tuple[AttackNetwork, AttackNetwork]:
        """What the attacks of training and of validation call: forms of the model, up to date until it changes.

        Those of validation go on with fewer and fewer images, for each number of which PyTorch might compile anew, so
        that its form is not compiled, nor recorded in a CUDA graph.
        """
        speed, images = self.config.speed, self.sets.train.images(slice(SAMPLE))
        form = partial(
            AttackNetwork,
            images=images,
            folded=speed.fold_batchnorm,
            channels_last=speed.channels_last,
            precision=self.config.optimization.precision,  # type: ignore[arg-type]  # resolved, no longer auto
        )
        attacked = form(self.model, compiled=speed.compile, graph=Graph() if speed.cuda_graphs else None)
        if speed.compile or speed.cuda_graphs or self.ema is not None:
            return attacked, form(self.deployed())
        return attacked, attacked

    def threat_at(self, step: int) -> Threat:
        """The attack at a step: epsilon and step size grow within the ramp."""
        factor = schedules.ramp(step, self.total_steps, self.config.attack.epsilon_ramp)
        size = self.threat.step_size
        return replace(
            self.threat, epsilon=factor * self.threat.epsilon, step_size=None if size is None else factor * size
        )

    def measure(self, loss: Loss, labels: Tensor) -> None:
        """Add the batch's figures to the epoch's."""
        self.meter.add("loss", loss.total.detach().expand(len(labels)))
        for name, logits in (("na", loss.clean_logits), ("ra", loss.adv_logits)):
            if logits is not None:
                self.meter.add(name, logits.argmax(1) == labels)
        for name, values in loss.terms.items():
            self.meter.add(name, values)

    def check_finite(self, loss: Loss) -> None:
        """One test of the total; only when it fails are the terms looked at."""
        if torch.isfinite(loss.total):
            return
        bad = {name: int((~torch.isfinite(values)).sum()) for name, values in loss.terms.items()}
        size = len(next(iter(loss.terms.values()), ()))
        named = [f"{name} for {count} of {size} samples" for name, count in bad.items() if count]
        self.fail(self.step + 1, f"loss is {loss.total.item()}, not finite: {', '.join(named) or 'the total alone'}")

    def check_sums(self) -> None:
        """The figures of the epoch so far, whose sums have kept every value that was not finite."""
        if bad := not_finite(self.meter.sums):
            self.fail(self.step, f"not finite within the last {LOOK_STEPS} steps: {', '.join(bad)}")

    def check_state(self) -> None:
        """Nothing that is not finite may get into a checkpoint, so that the last one is a good one."""
        self.check_sums()
        if bad := not_finite(self.model.state_dict()):
            self.fail(self.step, f"weights are not finite: {', '.join(bad)}")
        if self.scaler.is_enabled() and self.scaler.get_scale() < SMALLEST_SCALE:
            self.fail(self.step, "gradients overflow in float16 whatever the loss is scaled by")

    def looks_masked(self) -> str:
        """Why training is to be stopped, empty if it is not; on a GPU the host looks from time to time."""
        if self.config.attack.on_masking != "stop" or (self.reading_waits and self.step % LOOK_STEPS):
            return ""
        return self.monitor.message()

    def stop_masked(self, why: str) -> NoReturn:
        """As ``--on-masking stop`` asks; the state is saved for a look at it."""
        self.check_state()
        self.save(self.folder.last)
        raise TrainingError(
            f"training stopped at step {self.step} of {self.total_steps}: {why}. The state is saved in "
            f"{self.folder.last}. Start again: {MASKED}"
        )

    def fail(self, step: int, what: str) -> NoReturn:
        at = f"step {step} of {self.total_steps} (epoch {(step - 1) // len(self.batches) + 1})"
        good = "no checkpoint had been saved yet"
        if self.folder.last.is_file():
            saved = checkpoint.load_state(self.folder.last)["step"]
            good = f"the last good checkpoint is kept: {self.folder.last}, after step {saved}"
        raise TrainingError(
            f"training stopped at {at}: {what}. {good[0].upper()}{good[1:]}. "
            "Start again with a lower --lr or with --clip-norm"
        )

    # The end of an epoch

    def end_epoch(self, epoch: int, lr: float) -> None:
        """Validate, log, and save. The order of the files is explained in :class:`RunFolder`."""
        self.check_state()
        with span("evaluation"):
            na, ra = self.validate()
        train, monitored = self.meter.of_all().summary(), self.monitor.summary()
        images_per_second = len(self.sets.train) / self.epoch_seconds
        line: dict[str, Any] = {
            "epoch": epoch,
            "step": self.step,
            "lr": lr,
            "epsilon": self.defense.threat.epsilon,
            "train": train,
            "validation": {"na": na, "ra": ra},
            "seconds": self.epoch_seconds,
            "images_per_second": images_per_second,
            "defense": self.defense.figures(),
            "monitor": monitored,
        }
        means = " ".join(f"{name} {figures['mean']:.4g}" for name, figures in train.items())
        found = "".join(f" {name} {value:.4g}" for name, value in line["defense"].items())
        self.progress.print(
            f"epoch {epoch}/{self.config.optimization.epochs}: {means} | validation na {na:.1%} ra {ra:.1%} | "
            f"lr {lr:.3g} epsilon {self.defense.threat.epsilon:.4g}{found} {images_per_second:.0f} images/s"
        )
        if alarms := line["monitor"]["alarms"]["steps"]:
            self.progress.print(f"warning: gradients looked masked for {alarms} steps of this epoch: {MASKED}")
        if processes.rank() == 0:
            self.folder.append_metrics(line)
            self.tracker.add(line)
        improved = self.best is None or (ra, na) > (self.best["ra"], self.best["na"])
        if improved:
            self.best = {"epoch": epoch, "na": na, "ra": ra}
        self.meter, self.epoch_seconds = Meter(), 0.0
        self.monitor.begin_epoch()
        weights = self.deployed().state_dict()
        if improved:
            self.save(self.folder.best)
            self.save_weights(self.folder.best_weights, weights)
        self.save_weights(self.folder.weights, weights)
        self.save(self.folder.last)

    def deployed(self) -> nn.Module:
        """The model that is validated and exported: the moving average if there is one."""
        return self.model if self.ema is None else self.ema.module

    def validate(self) -> tuple[float, float]:
        """NA and RA under PGD (cross-entropy) on the validation split.

        RA counts what evaluation counts: the images that are right without an attack and at every step of it.
        """
        images = self.sets.validation
        mine = images.subset(torch.arange(len(images), device=self.device)[processes.rank() :: processes.count()])
        self.validated.refresh()
        natural = self.standing(mine, None)
        right = mine.subset(natural.nonzero()[:, 0].to(self.device))
        standing = self.standing(right, self.config.validation_attack(stop_early=True))
        counts = torch.stack([natural.sum(), standing.sum()])
        na, ra = (processes.total(counts).double() / len(images)).tolist()
        return na, ra

    def standing(self, images: data.ImageSet, attack: PGD | None) -> Tensor:
        """Whether the deployed model is right about each image, after the attack if there is one."""
        key, size = rng.key(self.config.run.seed, "validation"), self.config.optimization.batch_size
        return metrics.correct(self.deployed(), images, attack, key, size, self.validated)

    # State

    def load_initial_weights(self, source: str) -> None:
        """Start from a file's weights as far as they fit, and say what did not."""
        report = load_init_weights(self.model, source, self.config.model.arch)
        self.say(f"{len(report.loaded)} tensors come from {source}")
        for what in ("missing", "unexpected", "mismatched"):
            if keys := getattr(report, what):
                self.say(f"  {what}: {', '.join(keys)}")

    def save(self, path: Path) -> None:
        """All processes must call it; the first one writes."""
        state = self.state()
        if processes.rank() == 0:
            checkpoint.save_state(path, state)

    def save_weights(self, path: Path, weights: dict[str, Tensor]) -> None:
        if processes.rank() == 0:
            checkpoint.save_weights(path, weights)

    def state(self) -> dict[str, Any]:
        """All that the rest of the run depends on, and the seconds spent, which nothing depends on."""
        return {
            "config": self.config.stored(),
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": None if self.ema is None else self.ema.state_dict(),
            "meter": self.meter.of_all().sums,
            "monitor": self.monitor.of_all().state_dict(),
            "defense": self.defense.state_dict(),
            "best": self.best,
            "seconds": self.epoch_seconds,
            "processes": processes.count(),
        }

    def restore(self) -> None:
        """Go back to where ``last.pt`` was saved."""
        state = checkpoint.load_state(self.folder.last)
        self.step, self.best, self.epoch_seconds = state["step"], state["best"], state["seconds"]
        self.begun_by = state.get("processes", 1)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
        if processes.rank() == 0:  # the sums are of all processes; those of the others begin anew
            self.meter = Meter(self.on_device(state["meter"]))
            self.monitor.load_state_dict(self.on_device(state["monitor"]))
        self.monitor.looks_masked = state["monitor"]["looks_masked"].to(self.device)
        self.defense.load_state_dict(self.on_device(state["defense"]))

    def restore_weights(self) -> None:
        """Write the weights of the last and of the best epoch again, from the checkpoints, if their files are gone."""
        epoch_ended = self.step % len(self.batches) == 0  # else last.pt has weights from within the next one
        for path, saved, there in (
            (self.folder.weights, self.folder.last, epoch_ended),
            (self.folder.best_weights, self.folder.best, True),
        ):
            if there and not path.is_file() and saved.is_file():
                state = checkpoint.load_state(saved)
                averaged = state["ema"] or {}
                averaged = {n.removeprefix(AVERAGED): value for n, value in averaged.items() if n.startswith(AVERAGED)}
                self.save_weights(path, averaged or state["model"])

    def on_device(self, state: Any) -> Any:
        """The same containers with their tensors on the device."""
        return tree_map_only(Tensor, lambda tensor: tensor.to(self.device), state)

    def wait(self) -> None:
        """Let the device finish what it was sent, before a clock is read."""
        if self.reading_waits:
            torch.cuda.synchronize(self.device)

    # What is said

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def figures(self) -> str:
        """The latest batch in a line."""
        shown = [name for name in ("loss", "na", "ra", "lambda") if name in self.meter.latest]
        batch = " ".join(f"{name} {self.meter.latest_mean(name):.3g}" for name in shown)
        batch_number = self.step % len(self.batches) or len(self.batches)
        done = min(batch_number * self.batches.batch_size, len(self.sets.train))
        masked = f", {message}" if (message := self.monitor.message()) else ""
        return f"{batch} {done / self.epoch_seconds:.0f} images/s{masked}"

    def plan(self) -> None:
        """What is going to happen; the expected time follows after the first steps."""
        c, info, o = self.config, self.sets.info, self.config.optimization
        method_options = ", ".join(f"{name} {value}" for name, value in c.method_options.items())
        size = f"step {c.attack.step_size}" if c.attack.step_size else "step epsilon/4"
        ramp = f", growing over the first {c.attack.epsilon_ramp:.0%} of training" if c.attack.epsilon_ramp else ""
        trained = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        count = models.parameter_count(self.model)
        partly = "" if trained == count else f", {trained:,} of them trained"
        width = f", width {c.model.width}" if c.model.width else ""
        self.say(f"run {self.folder.path}")
        self.say(f"  model      {c.model.arch}{width}: {count:,} parameters{partly}")
        self.say(
            f"  data       {info.name}: {len(self.sets.train):,} images to train on, "
            f"{len(self.sets.validation):,} to select by, {len(info.classes)} classes"
        )
        self.say(f"  method     {c.defense.method}: {method_options or 'no options'}")
        if note := self.defense.describe(o.epochs):
            self.say(f"             {note}")
        self.say(f"  attack     {c.attack.norm}, epsilon {c.attack.epsilon}, {c.attack.steps} steps, {size}{ramp}")
        self.say(
            f"  training   {o.epochs} epochs of {len(self.batches)} steps of {o.batch_size} images: "
            f"{self.total_steps:,} steps; {o.optimizer}, lr {o.lr:g}, {o.schedule}, {o.precision}"
        )
        several = f"{processes.count()} processes, " if processes.count() > 1 else ""
        backend = environment.backend(self.device)
        self.say(f"  machine    {several}{self.device}, {c.run.threads} threads, operators: {backend}")
        self.say(f"  attacked   {self.attacked.how}")
        for warning in c.warnings():
            self.say(f"warning: {warning}")
        if self.step:
            self.say(f"  resumed    after step {self.step:,}, in epoch {self.step // len(self.batches) + 1}")
        if self.begun_by != processes.count():
            self.say(
                f"             saved by {self.begun_by} processes, goes on with {processes.count()}: the result is not "
                "that of a run without the change, since BatchNorm and dropout see other parts of a batch"
            )

    def expect(self, per_step: float) -> None:
        """Say how long it will take at most: as the steps, and validation as if no image ever fell."""
        images = len(self.sets.validation)
        batch = min(self.config.optimization.batch_size, images)
        began = time.monotonic()
        self.validated.refresh()
        part = self.sets.validation.subset(torch.arange(batch, device=self.device))
        self.standing(part, self.config.validation_attack())
        self.wait()
        validation = (time.monotonic() - began) * images / batch / processes.count()
        epochs = self.config.optimization.epochs - self.step // len(self.batches)
        left = per_step * (self.total_steps - self.step) + validation * epochs
        self.progress.print(
            f"  time       {duration(per_step)} per step, at most {duration(validation)} per validation: "
            f"{duration(left)} to go"
        )
        if left > LONG_SECONDS and self.device == "cpu":
            self.progress.print(
                "             to make it smaller: --preset quick, or --width, --steps, --epochs, --limit"
            )

    def interruption(self, signum: int) -> str:
        """What to say when a signal ends training."""
        name = signal.Signals(signum).name
        if self.step == self.total_steps:
            return f"stopped by {name} after the last step: training is finished, its weights are in {self.folder.path}"
        return (
            f"stopped by {name} after step {self.step} of {self.total_steps}, saved in {self.folder.last}; "
            f"go on with: dtrades-fast train --resume --run {self.config.run_name} --runs-dir {self.folder.path.parent}"
        )


def not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors with a value that is not finite, in one read for all of them."""
    if not tensors:
        return []
    finite = torch.stack([torch.isfinite(tensor).all() for tensor in tensors.values()]).tolist()
    return [name for name, fine in zip(tensors, finite, strict=True) if not fine]


def check_compiler() -> None:
    """Raise ValueError where torch.compile would find no C++ compiler."""
    from torch._inductor.cpp_builder import get_cpp_compiler  # imported late, for it takes a while

    try:
        get_cpp_compiler()
    except Exception as error:  # of a class that is not public
        raise ValueError(
            f"--compile needs a C++ compiler on a CPU: install g++ or set CXX, or leave it out ({error})"
        ) from None


def create_model(config: Config, info: data.DataInfo) -> models.Classifier:
    """The untrained network of a configuration; its weights come from torch's global generator."""
    mean, std = info.normalization(config.model.normalization)
    return models.create(
        config.model.arch,
        num_classes=len(info.classes),
        in_channels=info.channels,
        image_size=info.image_size,
        width=config.model.width,
        mean=mean,
        std=std,
    )


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that SIGTERM and SIGINT are put into; a second one of the same kind acts as usual.

    Of several processes, torchrun passes on a signal that may have reached them already, or that another one has ended,
    and kills them 30 seconds later: there a second one is ignored, and any after an error, which is yet to be printed.
    """
    received: list[int] = []
    before: dict[int, Any] = {}

    def note(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        if processes.count() == 1:
            signal.signal(signum, before[signum])

    try:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers only there
            for name in (signal.SIGTERM, signal.SIGINT):
                before[name] = signal.signal(name, note)
        yield received
    except BaseException:
        if processes.count() > 1:
            before = dict.fromkeys(before, signal.SIG_IGN)
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def told_of_lost_processes(folder: Path) -> Iterator[None]:
    """What the libraries say when another process of the run has ended, in plain words."""
    try:
        yield
    except RuntimeError as error:
        if processes.count() == 1 or not any(word in str(error) for word in LOST):
            raise
        raise TrainingError(
            f"another process of this run has ended, what it said tells why. Go on from the last checkpoint with "
            f"--resume: {folder}"
        ) from error


def train(config: Config, console: Console | None = None) -> RunFolder:
    """Make the run that ``config`` describes, or go on with it.

    Raises:
        ValueError: a configuration, or a run folder, that is not possible.
        FileNotFoundError: the data set or initial weights are missing.
        TrainingError: the loss is not finite.
        Interrupted: SIGTERM or SIGINT came; the state is saved.
    """
    with processes.joined() as rank, told_of_lost_processes(config.folder):
        return _train(config, console or Console(quiet=rank > 0))


def _train(config: Config, console: Console) -> RunFolder:
    folder = RunFolder(config.folder)
    folder.check(config)
    wanted, device = config.data, processes.own_device(environment.device(config.run.device))
    sets = processes.in_turn(lambda: data.load(wanted.dataset, wanted.data_root, device, limit=wanted.limit))
    config = config.resolved(sets.info.epsilon)
    assert config.run.threads is not None
    torch.set_num_threads(config.run.threads)
    if config.run.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # which cuBLAS asks for
    torch.use_deterministic_algorithms(config.run.deterministic)
    trainer = Trainer(config, sets, folder, console)
    env = environment.describe(config.run.device, config.run.threads)
    env |= {"processes": processes.count(), "seed": config.run.seed}
    env |= {"data": {"name": sets.info.name, "fingerprint": sets.info.fingerprint}}
    first = processes.rank() == 0
    with folder.locked() if first else nullcontext(), stop_signals() as stop, closing(trainer.tracker):
        (resuming,) = processes.any_of(first and folder.open(config, env))
        if resuming:
            trainer.restore()
        elif config.model.init_weights is not None:
            trainer.load_initial_weights(config.model.init_weights)
        if first:
            if resuming:
                trainer.restore_weights()
            folder.cut_metrics(trainer.step // len(trainer.batches))
            trainer.tracker.start(folder.read_metrics())
        if trainer.step == trainer.total_steps:
            trainer.say(f"run {folder.path} is finished, there is nothing to resume")
        else:
            trainer.plan()
            trainer.fit(stop)
    assert trainer.best is not None
    trainer.say(
        f"best epoch {trainer.best['epoch']}: validation na {trainer.best['na']:.1%} ra {trainer.best['ra']:.1%}; "
        f"weights in {folder.best_weights.name} and, of the last epoch, {folder.weights.name}\n"
        f"next: dtrades-fast evaluate {folder.path}"
    )
    return folder
