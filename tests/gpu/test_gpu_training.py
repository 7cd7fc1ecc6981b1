"""Training and attacks on the GPU: no host synchronisation, CUDA graphs, precisions, exact resume."""

from __future__ import annotations

from pathlib import Path

import gpu
import pytest
import tiny_run
import torch
from rich.console import Console
from test_resume import interrupt_at
from tiny_run import assert_same, result
from torch import Tensor

from dtrades_fast import data as datasets
from dtrades_fast import defenses, models
from dtrades_fast.attacks import PGD
from dtrades_fast.training.run_folder import RunFolder
from dtrades_fast.training.trainer import Interrupted, Trainer

gpu.require()

PRECISIONS = ("fp32", "bf16", "fp16")
ATTACKS = {
    "linf": PGD(0.1, 4),
    "l2": PGD(0.5, 4, norm="l2"),
    "trades": PGD(0.1, 4, objective="kl", start="gaussian"),
    "targeted": PGD(0.1, 4, targeted=True),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_run.images(tmp_path_factory.mktemp("images"))


def trainer(data: Path, runs: Path, *options: str) -> Trainer:
    config = tiny_run.configuration(data, runs, "--device", gpu.DEVICE, *options).resolved("8/255")
    sets = datasets.load(config.data.dataset, "data", gpu.DEVICE)
    return Trainer(config, sets, RunFolder(config.folder), Console(quiet=True))


def batch(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    images = torch.rand(16, 3, 16, 16, generator=random)
    labels = torch.randint(0, 3, (16,), generator=random)
    return images.cuda(), labels.cuda(), torch.randperm(100, generator=random)[:16].cuda()


@gpu.cuda_only
@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_a_cuda_graph_of_the_attack_equals_eager(attack: PGD) -> None:
    """Replayed on images, labels and sample indices that it has not seen."""
    torch.manual_seed(0)
    model = models.create(
        "resnet18", num_classes=3, in_channels=3, image_size=16, width=8, mean=(0.5,) * 3, std=(0.5,) * 3
    )
    model = model.cuda().eval()
    images, labels, index = batch(0)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.backends.cudnn.flags(enabled=True, deterministic=True), torch.cuda.stream(side):
        for _ in range(3):  # cuDNN and cuBLAS choose and allocate
            attack(model, images, labels, index=index, key=7)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            adv = attack(model, images, labels, index=index, key=7)
        for seed in (1, 2):
            fresh = batch(seed)
            for static, new in zip((images, labels, index), fresh, strict=True):
                static.copy_(new)
            graph.replay()
            assert torch.equal(adv, attack(model, *fresh[:2], index=fresh[2], key=7))


@gpu.cuda_only
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("method", [name for name in defenses.names() if name != "standard"])
def test_training_by_cuda_graphs_is_the_same(data: Path, tmp_path: Path, method: str, precision: str) -> None:
    """To the bit, with an epoch's smaller last batch, and the host waits for nothing once the attack is recorded."""
    states = []
    try:
        for extra in ((), ("--cuda-graphs",)):
            words = ("--arch", "resnet18", "--width", "8", "--batch-size", "7", "--epochs", "3", "--deterministic")
            t = trainer(data, tmp_path, *words, "--method", method, "--precision", precision, *extra)
            torch.use_deterministic_algorithms(True)
            network = t.network(t.model)
            while t.step < t.total_steps:
                within = 0 < t.step - len(t.batches) < len(t.batches)  # the second epoch, but its first step
                torch.cuda.set_sync_debug_mode("error" if within else "default")
                t.train_step(network)
            states.append(t.state())
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.use_deterministic_algorithms(False)
    assert t.attacked.graph is not None
    assert t.attacked.graph.recorded == 1
    assert_same(states[0], states[1])


@gpu.cuda_only
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("method", defenses.names())
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_training_step_waits_for_nothing(
    data: Path, tmp_path: Path, method: str, precision: str, optimizer: str
) -> None:
    options = ("--method", method, "--precision", precision, "--optimizer", optimizer, "--ema", "0.9")
    t = trainer(data, tmp_path, *options, "--clip-norm", "1")
    network = t.network(t.model)
    t.train_step(network)
    torch.cuda.set_sync_debug_mode("error")
    try:
        t.train_step(network)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    t.check_state()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_training_goes_on_to_the_same_bits(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    options = ("--device", gpu.DEVICE, "--arch", "resnet18", "--precision", precision, "--deterministic")
    try:
        whole, _ = tiny_run.run(data, tmp_path, *options, "--run", "whole")
        interrupt_at(monkeypatch, {4})
        with pytest.raises(Interrupted, match="after step 5 of 9"):
            tiny_run.run(data, tmp_path, *options, "--run", "parts")
        parts, _ = tiny_run.run(data, tmp_path, *options, "--run", "parts", "--resume")
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same(result(whole), result(parts))


@pytest.mark.parametrize("method", defenses.names())
def test_a_run_of_each_method(data: Path, tmp_path: Path, method: str) -> None:
    """The first epoch's figures are those of the CPU, as far as another order of sums lets them."""
    options = ("--epochs", "1", "--method", method, "--precision", "fp32")
    there, _ = tiny_run.run(data, tmp_path, "--device", gpu.DEVICE, *options, "--run", "there")
    here, _ = tiny_run.run(data, tmp_path, *options, "--run", "here")
    losses = [result(folder)["metrics"][0]["train"]["loss"]["mean"] for folder in (there, here)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
