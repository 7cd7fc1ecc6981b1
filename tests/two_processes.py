"""What the tests of several processes run in each of them: ``python two_processes.py WHAT OUTPUT WORDS...``."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from torch import nn

from dtrades_fast import data, processes
from dtrades_fast.config import parse
from dtrades_fast.training import monitor
from dtrades_fast.training import trainer as training
from dtrades_fast.training.run_folder import RunFolder


def plain_network(config: object, info: data.DataInfo) -> nn.Module:
    """Without BatchNorm and dropout, whose results depend on how a batch is split."""
    return nn.Sequential(
        nn.Conv2d(info.channels, 4, 3, stride=2), nn.Tanh(), nn.Flatten(), nn.Linear(4 * 7 * 7, len(info.classes))
    )


def gradients(output: Path, words: list[str]) -> None:
    """The gradients of one step per batch of an epoch, by name; in float64, where no rounding turns a sign."""
    in_single = data.to_float
    data.to_float = lambda pixels: in_single(pixels).double()
    training.create_model = plain_network  # type: ignore[assignment]
    config = parse(words)
    sets = data.load(config.data.dataset, "data", "cpu")
    config = config.resolved(sets.info.epsilon)
    with processes.joined() as rank:
        made = training.Trainer(config, sets, RunFolder(config.folder), Console(quiet=True))
        made.model.double()
        made.attacked, made.validated = made.attack_networks()
        network, found = made.network(made.model), []
        for _ in range(len(made.batches)):
            made.train_step(network)
            found.append({name: parameter.grad.clone() for name, parameter in made.model.named_parameters()})
        summary = made.meter.of_all().summary()
        if rank == 0:
            torch.save({"gradients": found, "loss": summary["loss"]["mean"]}, output)


def dies(output: Path, words: list[str]) -> None:
    """Train; the second process is killed in the second epoch, and torchrun ends the first, as late as can be."""
    real, leave = training.Trainer.train_step, dist.destroy_process_group

    def step(self: training.Trainer, network: nn.Module) -> None:
        if self.step == 4 and processes.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        real(self, network)

    def left() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        leave()

    dist.destroy_process_group = left
    training.Trainer.train_step = step  # type: ignore[method-assign]
    training.train(parse(words))


def alarmed(output: Path, words: list[str]) -> None:
    """Train with the alarm always on."""
    monitor.ALARM = -1.0
    training.train(parse(words))


if __name__ == "__main__":
    torch.set_num_threads(1)
    {"gradients": gradients, "dies": dies, "alarmed": alarmed}[sys.argv[1]](Path(sys.argv[2]), sys.argv[3:])
