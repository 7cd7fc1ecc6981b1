"""Runs small enough for tests: 16 x 16 pixels, three classes, a network of a few hundred weights."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console

from dtrades_fast.config import Config, parse
from dtrades_fast.training.run_folder import RunFolder
from dtrades_fast.training.trainer import train

OPTIONS = ["--arch", "smallcnn", "--width", "2", "--batch-size", "8", "--epochs", "3", "--lr", "0.01"]
OPTIONS += ["--steps", "2", "--validation-steps", "2", "--threads", "1", "--device", "cpu"]


def images(path: Path, per_class: int = 7) -> Path:
    """A folder of images, each class with a bright band at its own height; 19 train, 2 validate, 9 test."""
    noise = np.random.default_rng(0)
    for split, count in (("train", per_class), ("test", 3)):
        for label in range(3):
            folder = path / split / f"band{label}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = noise.integers(0, 60, (16, 16, 3), dtype=np.uint8)
                pixels[5 * label : 5 * label + 6] += 180
                Image.fromarray(pixels).save(folder / f"{i}.png")
    return path


def arguments(data: Path, runs: Path, *options: str) -> list[str]:
    """Later options win, so ``options`` may repeat one of the defaults."""
    given = dict(zip(OPTIONS[::2], OPTIONS[1::2], strict=True))
    rest = list(options)
    while len(rest) > 1 and rest[0] in given:
        given[rest[0]] = rest[1]
        rest = rest[2:]
    words = [word for pair in given.items() for word in pair]
    return ["--dataset", f"folder:{data}", "--runs-dir", str(runs), *words, *rest]


def configuration(data: Path, runs: Path, *options: str) -> Config:
    return parse(arguments(data, runs, *options))


def run(data: Path, runs: Path, *options: str) -> tuple[RunFolder, str]:
    """Train, and what was printed."""
    output = io.StringIO()
    folder = train(configuration(data, runs, *options), Console(file=output, width=200))
    return folder, output.getvalue()


def result(folder: RunFolder) -> dict[str, Any]:
    """All that a run computes, without times: states, weights and metrics."""
    lines = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    return {
        "last": _timeless(torch.load(folder.last, weights_only=True)),
        "best": _timeless(torch.load(folder.best, weights_only=True)),
        "weights": folder.weights.read_bytes(),
        "best weights": folder.best_weights.read_bytes(),
        "metrics": [_timeless(line) for line in lines],
    }


def _timeless(values: dict[str, Any]) -> dict[str, Any]:
    # checkpoint_minutes is the one option of these tests that differs and changes nothing
    config = {k: v for k, v in values.get("config", {}).items() if k != "checkpoint_minutes"}
    return {k: v for k, v in values.items() if k not in ("seconds", "images_per_second", "config")} | {"config": config}


def assert_same(a: Any, b: Any, where: str = "result") -> None:
    """Equal to the bit, and says where not."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert sorted(map(str, a)) == sorted(map(str, b)), where
        for name in a:
            assert_same(a[name], b[name], f"{where}[{name!r}]")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (left, right) in enumerate(zip(a, b, strict=True)):
            assert_same(left, right, f"{where}[{i}]")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, where
        assert a.shape == b.shape, where
        assert a.numpy().tobytes() == b.numpy().tobytes(), where
    else:
        assert a == b, where
