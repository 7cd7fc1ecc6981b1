"""Training steps to measure, and what their scripts' options have in common."""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
from rich.console import Console

from dtrades_fast import config, data
from dtrades_fast.training.run_folder import RunFolder
from dtrades_fast.training.trainer import Trainer


def synthetic(count: int) -> data.DataSets:
    """Random images and labels of CIFAR-10's shape."""
    random = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8, generator=random)
    images = data.ImageSet(pixels, torch.randint(0, 10, (count,), generator=random), torch.arange(count))
    classes = tuple("0123456789")
    half = (0.5, 0.5, 0.5)
    info = data.DataInfo("synthetic", classes, 3, 32, half, half, "8/255", data.Augmentation(), count, "synthetic")
    return data.DataSets(images, images.subset(torch.arange(0)), images.subset(torch.arange(0)), info)


def make_trainer(options: argparse.Namespace) -> Trainer:
    """A trainer at its first step, on the data and device that the options name."""
    steps = options.warmup + options.steps
    words = ["--method", options.method, "--arch", options.arch, "--batch-size", options.batch_size, "--epochs", steps]
    words += ["--steps", options.attack_steps, "--precision", options.precision, "--device", options.device]
    words += ["--compile"] if getattr(options, "compiled", False) else []
    words += ["--cuda-graphs"] if getattr(options, "cuda_graphs", False) else []
    words += [] if options.width is None else ["--width", options.width]
    words += [] if options.threads is None else ["--threads", options.threads]
    if options.data == "synthetic":
        sets = synthetic(options.batch_size * steps)
    else:
        sets = data.load(options.data, options.data_root, "cpu")
    chosen = config.parse([str(word) for word in words], "profile.py").resolved(sets.info.epsilon)
    assert chosen.run.threads is not None
    torch.set_num_threads(chosen.run.threads)
    train = sets.train.to(options.device)
    sets = data.DataSets(train, sets.validation, sets.test, sets.info)
    return Trainer(chosen, sets, RunFolder(chosen.folder), Console())  # the folder is named, not made


def at_least(bound: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not text.isdigit() or int(text) < bound:
            raise argparse.ArgumentTypeError(f"must be a whole number of at least {bound}, got {text!r}")
        return int(text)

    return parse
