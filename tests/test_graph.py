"""The training attack as a recording that is replayed, by a recorder that runs without a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tiny_run
import torch
from rich.console import Console
from tiny_run import assert_same
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map_only

from dtrades_fast import data as datasets
from dtrades_fast.attacks.graph import Function, Graph
from dtrades_fast.ops import _check
from dtrades_fast.training.run_folder import RunFolder
from dtrades_fast.training.trainer import Trainer


def trace(function: Function, inputs: tuple[Tensor, ...]) -> Function:
    """What a CUDA graph does: the operations of one call, on memory of its own, whatever Python would do next time."""
    static = tuple(x.clone() for x in inputs)
    operations = make_fx(function)(*(x.clone() for x in inputs))

    def replay(*inputs: Tensor) -> Any:
        for memory, values in zip(static, inputs, strict=True):
            memory.copy_(values)
        return tree_map_only(Tensor, Tensor.clone, operations(*static))

    return replay


def test_what_comes_twice_in_a_row_is_recorded() -> None:
    graph, calls, weight = Graph(trace), [], torch.ones(())

    def double(x: Tensor) -> Tensor:
        calls.append(len(x))
        return 2 * weight * x

    def call(name: str, count: int) -> None:
        x = torch.rand(count)
        assert torch.equal(graph(name, double, x), 2 * weight * x)
        weight.add_(1)  # in place

    for count in (3, 2, 3, 2):  # never twice in a row
        call("a", count)
    assert (graph.recorded, calls) == (0, [3, 2, 3, 2])
    call("a", 2)
    assert (graph.recorded, calls) == (1, [3, 2, 3, 2, 2])  # one call, to record it
    for count in (2, 3, 2, 2):
        call("a", count)
    assert (graph.recorded, calls) == (1, [3, 2, 3, 2, 2, 3])  # only what is not recorded
    call("b", 2)
    call("a", 2)
    call("b", 2)
    assert graph.recorded == 1
    call("b", 2)
    assert graph.recorded == 2
    before = len(calls)
    call("b", 2)
    assert len(calls) == before


def test_results_outlive_the_next_replay() -> None:
    graph = Graph(trace)
    first, second, third = (graph("a", lambda x: x + 1, torch.full((2,), value)) for value in (1.0, 2.0, 3.0))
    assert [float(x[0]) for x in (first, second, third)] == [2, 3, 4]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.images(tmp_path_factory.mktemp("images"), per_class=12)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(
    "options",
    [
        ("--method", "at"),
        ("--method", "mart", "--norm", "l2", "--epsilon", "0.5"),
        ("--method", "faal"),
        ("--method", "trades", "--no-fold-batchnorm"),
        ("--method", "dtrades", "--lambda-alpha", "1", "--lambda-beta", "1"),
        ("--method", "dtrades", "--lambda-warmup", "1", "--precision", "bf16"),
        ("--method", "dtrades", "--sensitivity-at", "last_step", "--epsilon-ramp", "0.5"),
    ],
    ids=" ".join,
)
def test_training_with_recorded_attacks_is_the_same(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    """To the bit, over epochs whose last batch is smaller: 7, 7, ..., 5 images."""
    monkeypatch.setattr(_check, "labels", _check.indices)  # as on a GPU, where no value is looked at
    states = []
    for graph in (None, Graph(trace)):
        words = ("--arch", "resnet18", "--width", "2", "--batch-size", "7", "--epochs", "4", "--steps", "3")
        config = tiny_run.configuration(data, tmp_path, *words, *options).resolved("8/255")
        sets = datasets.load(config.data.dataset, "data", "cpu")
        t = Trainer(config, sets, RunFolder(config.folder), Console(quiet=True))
        t.attacked.graph = graph
        network = t.network(t.model)
        while t.step < t.total_steps:
            t.train_step(network)
        states.append(t.state())
    assert graph is not None
    assert graph.recorded == 1
    assert_same(states[0], states[1])


def test_needs_a_gpu(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--cuda-graphs needs --device cuda, got cpu"):
        tiny_run.run(data, tmp_path, "--cuda-graphs")
