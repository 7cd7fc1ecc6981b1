"""AutoAttack: its stages, and agreement with the official code, point by point."""

import logging

import pytest
import small_nets
import torch
from torch import Tensor

from dtrades_fast.attacks.autoattack import AutoAttack
from dtrades_fast.evaluation.engine import Engine
from dtrades_fast.evaluation.official import STAGES, OfficialAutoAttack, OfficialStage

pytestmark = pytest.mark.usefixtures("one_thread")

POINTS = 64


def run(
    kind: str,
    *,
    official: bool,
    seed: int = 0,
    norm: str = "linf",
    epsilon: float = small_nets.EPSILON,
    points: int = POINTS,
    alone: bool = False,
) -> dict[str, Tensor]:
    """Standing points after each stage, as an evaluation runs them, or after each one ``alone``."""
    _, test = small_nets.digits()
    engine = Engine(
        small_nets.network(kind),  # type: ignore[arg-type]
        test.subset(torch.arange(points)),
        key=seed,
        batch_size=points,
        fast=not official,
    )
    standing = engine.natural()
    attack = (OfficialAutoAttack if official else AutoAttack)(epsilon, norm)  # type: ignore[arg-type]
    after = {}
    for name, stage in attack.stages().items():
        outcome = engine.attack(name, stage, standing)
        after[name] = outcome.standing
        if not alone:
            standing = outcome.standing
        assert outcome.refuted <= 1  # by the rounding of the folded network
    return after


def test_agrees_with_the_official_code() -> None:
    pytest.importorskip("pyautoattack")
    ours, official = run("robust", official=False), run("robust", official=True)
    again = run("robust", official=True, seed=1)
    apart = (ours["square"] != official["square"]).sum()
    assert apart <= max(int((again["square"] != official["square"]).sum()), 0.02 * POINTS)
    assert ours["square"].sum() <= official["square"].sum() + 1
    assert 0.1 * POINTS < ours["square"].sum() < 0.6 * POINTS
    for stage in STAGES:
        assert abs(int(ours[stage].sum()) - int(official[stage].sum())) <= 3


def test_each_stage_agrees_with_the_official_code_for_l2() -> None:
    pytest.importorskip("pyautoattack")
    ours, official = (
        run("robust", official=which, norm="l2", epsilon=0.7, points=32, alone=True) for which in (False, True)
    )
    for stage in STAGES:
        assert (ours[stage] != official[stage]).sum() <= (3 if stage == "square" else 1)
        assert 8 < ours[stage].sum() < 24


@pytest.mark.parametrize("kind", ["standard", "masked"])
def test_breaks_what_the_official_code_breaks(kind: str) -> None:
    pytest.importorskip("pyautoattack")
    ours, official = run(kind, official=False), run(kind, official=True)
    assert ours["square"].sum() <= official["square"].sum()


def test_official_stage_keeps_the_random_state() -> None:
    pytest.importorskip("pyautoattack")
    model = small_nets.network("robust")
    images, labels, index = small_nets.batch(16)
    before, level = torch.get_rng_state(), logging.getLogger("auto-attack").level
    first, second = (OfficialStage("apgd-ce", 0.3)(model, images, labels, index=index, key=3) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)
    assert logging.getLogger("auto-attack").level == level
    assert not torch.equal(first, OfficialStage("apgd-ce", 0.3)(model, images, labels, index=index, key=4))


def test_stages_and_parts() -> None:
    attack = AutoAttack(0.1)
    assert list(attack.stages()) == list(STAGES)
    assert len(attack.parts()) == 1 + 9 + 9 + 1
    assert len(AutoAttack(0.1, classes=5).parts()) == 1 + 4 + 4 + 1
    with pytest.raises(ValueError, match="at least 4 classes, got 3"):
        AutoAttack(0.1, classes=3)
    with pytest.raises(ValueError, match="goes for 9 wrong classes and the model has 5"):
        OfficialAutoAttack(0.1, classes=5)


def test_as_one_attack() -> None:
    """Called like any attack, on a network small enough: what falls is what the stages break."""
    model = small_nets.network("standard")
    images, labels, index = small_nets.batch(8)
    adv = AutoAttack(small_nets.EPSILON)(model, images, labels, index=index)
    assert (model(adv).argmax(1) != labels).all()
    assert ((adv - images).abs().amax((1, 2, 3)) <= small_nets.EPSILON + 1e-6).all()
