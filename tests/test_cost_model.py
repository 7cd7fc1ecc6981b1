"""The cost model: what it counts, what follows from that, and that docs/performance.md is what it writes."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", autouse=True)
def model() -> Iterator[Any]:
    sys.path.append(str(ROOT / "bench"))
    import cost_model

    yield cost_model
    sys.path.remove(str(ROOT / "bench"))


PASSES = {  # forward alone, to the images, to the weights
    "standard": ("0", "0", "1"),
    "at": ("0", "K", "1"),
    "trades": ("1", "K", "2"),
    "dtrades": ("1", "K + 1", "2"),
    "dtrades/last_step": ("1", "K", "2"),
    "mart": ("0", "K", "2"),
    "faal": ("1", "K", "2"),
}


@pytest.mark.parametrize("method", PASSES)
def test_passes_of_a_step(model: Any, method: str) -> None:
    """As the methods need them, and no more; counted in a step of the trainer."""
    kinds, work = model._passes(model.formulas(method))
    assert tuple(map(str, kinds)) == PASSES[method]
    forward, images, weights = (kind(10) for kind in kinds)
    assert work(10) == forward + 2 * images + 3 * weights


def test_passes_of_the_published_code(model: Any) -> None:
    """It predicts the clean images in each attack step, and three times in the loss of TRADES."""
    kinds, work = model._passes(model.formulas("trades", published=True))
    assert list(map(str, kinds)) == ["K", "K", "3"]
    assert work(10) == 39


def test_operations_are_those_of_the_layers(model: Any) -> None:
    """The first convolution of ResNet-18 at full width: 2 x 27 x 64 x 32 x 32; the whole, as published, 0.56 G MACs."""
    sizes = model.network("resnet18")
    assert sizes.weights == 11_173_962
    assert sizes.flops["forward"] / 2e9 == pytest.approx(0.5562, abs=1e-3)
    first = 2 * 27 * 64 * 32 * 32
    assert sizes.flops["both"] == pytest.approx(3 * sizes.flops["forward"])
    assert sizes.flops["weights"] == pytest.approx(3 * sizes.flops["forward"] - first)
    assert sizes.flops["images"] == pytest.approx(2 * sizes.flops["forward"])


def test_a_bound_is_the_larger_of_operations_and_bytes(model: Any) -> None:
    sizes = model.network("resnet18")
    t4 = model.GPUS[0]
    bound = t4.bound(sizes, "trades", "fp16", 128)
    assert bound.arithmetic == pytest.approx(128 * model.step_flops(sizes, "trades", 10) / 65e12)
    ways = 1 + 2 * 10 + 2 * 2
    assert bound.bytes == pytest.approx(ways * 2 * (2 * 128 * sizes.products + sizes.weights) / 320e9)
    assert bound.seconds == max(bound.arithmetic, bound.bytes)


def test_the_hours_of_a_study(model: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "two.yaml"
    file.write_text("runs: [{method: trades, dataset: cifar10, epochs: 100, steps: 10, seed: [0, 1]}]")
    assert model.main(["--study", str(file)]) == 0
    flops = 2 * 100 * 49_000 * model.step_flops(model.network("resnet18"), "trades", 10)
    assert f"T4: at least {flops / 65e12 / 3600:.1f} GPU hours" in capsys.readouterr().out
    file.write_text("runs: [{method: trades, dataset: mnist5k}]")
    with pytest.raises(ValueError, match="not of mnist5k"):
        model.main(["--study", str(file)])


def test_the_document_is_what_the_command_writes(model: Any) -> None:
    """From the measurements that are kept with it."""
    kept = json.loads(model.MEASUREMENTS.read_text())
    assert model.DOCUMENT.read_text() == model.document(kept)


def test_the_hours_of_the_thesis_are_what_its_file_says(model: Any) -> None:
    from dtrades_fast.study.grid import read

    file = ROOT / "studies" / "thesis.yaml"
    t4, a100, h100 = model.study_hours(read(file)).values()
    said = f"at least {t4:.1f} GPU hours of a T4 in fp16, {a100:.1f} of an A100 or {h100:.1f} of an H100 in bf16"
    assert said in file.read_text()
