"""Attacks by way of other networks and by queries: what is counted, what an extraction gets to see, what is drawn."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from test_attacks import network as small_network
from torch import Tensor, nn
from torch.nn import functional as F

from dtrades_fast.attacks import MIFGSM, PGD, Square
from dtrades_fast.data import Augmentation, ImageSet
from dtrades_fast.evaluation import metrics
from dtrades_fast.evaluation.blackbox import (
    Ensemble,
    Player,
    QueryCurve,
    Transfer,
    extract,
    query_curve,
    relation,
    transfer,
)
from dtrades_fast.evaluation.engine import Engine
from dtrades_fast.plot.transfer import query_curves, transfer_matrix

pytestmark = pytest.mark.usefixtures("one_thread")

CLASSES = 3


def pictures(count: int, seed: int) -> ImageSet:
    """Grey pictures of 8 x 8 pixels with one bright column of three, and ids that are no positions."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    pixels = 60 + 60 * torch.rand(count, 1, 8, 8, generator=generator)
    pixels[torch.arange(count), 0, :, 2 * labels + 1] += 50
    return ImageSet(pixels.to(torch.uint8), labels, torch.arange(count) + 1000 * seed)


def make(width: int = 4, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    stages = (nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten())
    return nn.Sequential(*stages, nn.Linear(36 * width, CLASSES))


def trained(width: int = 4, seed: int = 0) -> nn.Sequential:
    model, images = make(width, seed), pictures(192, 1)
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(25):
        optimizer.zero_grad()
        F.cross_entropy(model(images.images(slice(None))), images.labels).backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def evaluated() -> ImageSet:
    return pictures(60, 2)


@pytest.fixture(scope="module")
def players() -> dict[str, Player]:
    return {
        "a": Player(trained(4, 0), "narrow"),
        "b": Player(trained(4, 1), "narrow"),
        "wide": Player(trained(8, 0), "wide"),
    }


# MI-FGSM


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("decay", [0.0, 1.0, 0.5])
def test_mifgsm_is_the_textbook_loop(norm: str, decay: float) -> None:
    model = small_network().double().eval()
    images = torch.rand(6, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    epsilon = 0.1 if norm == "linf" else 1.0
    x, momentum = images.clone(), torch.zeros_like(images)
    for _ in range(5):
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), labels, reduction="sum"), x)
        x = x.detach()
        momentum = decay * momentum + gradient / gradient.abs().sum((1, 2, 3), keepdim=True)
        if norm == "linf":
            x = torch.clamp(x + epsilon / 5 * momentum.sign(), images - epsilon, images + epsilon)
        else:
            delta = x + epsilon / 5 * momentum / momentum.flatten(1).norm(dim=1).view(-1, 1, 1, 1) - images
            x = images + delta * torch.clamp(epsilon / delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1), max=1)
        x = x.clamp(0, 1)
    attack = MIFGSM(epsilon, 5, decay=decay, norm=norm)  # type: ignore[arg-type]
    adv = attack(model, images, labels)
    torch.testing.assert_close(adv, x, rtol=0, atol=1e-9)
    alone = torch.cat([attack(model, images[i : i + 1], labels[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(alone, adv, rtol=0, atol=1e-9)


def test_mifgsm_stays_where_there_is_no_gradient() -> None:
    images, labels = torch.rand(2, 1, 8, 8), torch.tensor([0, 1])
    assert MIFGSM(0.1)(lambda x: 0 * x.flatten(1)[:, :3], images, labels).equal(images)


def test_mifgsm_refusals() -> None:
    for wrong in (
        {"epsilon": -1.0},
        {"epsilon": 0.1, "steps": 0},
        {"epsilon": 0.1, "step_size": 0.0},
        {"epsilon": 0.1, "decay": -0.1},
        {"epsilon": 0.1, "norm": "l1"},
    ):
        with pytest.raises(ValueError, match=list(wrong)[-1]):
            MIFGSM(**wrong)  # type: ignore[arg-type]


# Ensembles and transfer


def test_ensemble_is_the_mean_of_the_logits() -> None:
    models = [trained(4, seed) for seed in range(3)]
    images = pictures(5, 3).images(slice(None))
    expected = sum(model(images) for model in models) / 3
    torch.testing.assert_close(Ensemble(models)(images), expected)
    assert Ensemble(models).train().networks[2].training
    with pytest.raises(ValueError, match="at least one network"):
        Ensemble([])


def engine(images: ImageSet, batch_size: int = 60, model: nn.Module | None = None) -> Engine:
    """Of some network, where that does not matter."""
    return Engine(model or make().eval(), images, key=5, batch_size=batch_size, fast=False)


def test_relations(players: dict[str, Player]) -> None:
    a, b, wide = players.values()
    both, twin = Player(Ensemble([a.model, b.model]), "ensemble"), Player(make(), "narrow", twin_of=wide.model)
    assert relation(a, a) == "white box"
    assert relation(both, both) == "white box"
    assert relation(a, b) == "grey box"
    assert relation(a, wide) == "other architecture"
    assert relation(both, wide) == "ensemble"
    assert relation(both, a) == "ensemble with it"
    assert relation(twin, wide) == "extracted"
    assert relation(twin, a) == "grey box"


@pytest.mark.parametrize("attack", [MIFGSM(0.06), PGD(0.06, 10), PGD(0.4, 5, norm="l2")], ids=["mi", "pgd", "l2"])
def test_the_diagonal_is_the_white_box(players: dict[str, Player], evaluated: ImageSet, attack: PGD) -> None:
    found = transfer(players, players, engine(evaluated, 25), "any", attack)
    for i, player in enumerate(players.values()):
        natural = metrics.correct(player.model, evaluated, None, 5, 60)
        robust = metrics.correct(player.model, evaluated, attack, 5, 60)
        assert found.natural[i].equal(natural)
        assert found.standing[i, i].equal(natural & robust)
        assert found.relations[i][i] == "white box"
    accuracy, success = found.accuracy(), found.success()
    assert accuracy[0, 1].item() == pytest.approx(100 * int(found.standing[0, 1].sum()) / 60)
    for i in range(3):
        assert (accuracy[:, i] > accuracy[i, i]).sum() == 2  # a network is fooled best by its own images
        share = found.standing[:, i].sum(1) / found.natural[i].sum()
        torch.testing.assert_close(success[:, i], 100 * (1 - share.double()), rtol=1e-6, atol=1e-4)
    assert (accuracy < 100 * found.natural.double().mean(1)).all()  # and all of them by each other's


def test_the_target_alone_decides(players: dict[str, Player], evaluated: ImageSet) -> None:
    """Crafted on the source, judged by the target, point by point; the source may be right or wrong."""
    attack, a, wide = MIFGSM(0.12), players["a"], players["wide"]
    found = transfer({"a": a}, {"wide": wide}, engine(evaluated), "any", attack)
    x, labels = evaluated.images(slice(None)), evaluated.labels
    adv = attack(a.model, x, labels)
    expected = (wide.model(x).argmax(1) == labels) & (wide.model(adv).argmax(1) == labels)
    assert found.standing[0, 0].equal(expected)


def test_images_outside_of_the_ball_fool_nobody(players: dict[str, Player], evaluated: ImageSet) -> None:
    class Cheat(MIFGSM):
        def perturb(self, model: object, images: Tensor, labels: Tensor, index: Tensor, key: int) -> Tensor:
            return 1 - images

    found = transfer(players, players, engine(evaluated), "any", Cheat(0.1))
    assert found.standing.equal(found.natural.expand(3, 3, 60))


def test_transfer_needs_somebody(players: dict[str, Player], evaluated: ImageSet) -> None:
    with pytest.raises(ValueError, match="got 0, 3 and 60"):
        transfer({}, players, engine(evaluated), "any", MIFGSM(0.1))


# Query curves


def test_query_curve_is_the_attack_at_every_budget(players: dict[str, Player], evaluated: ImageSet) -> None:
    model, budget = players["a"].model, 60
    run = engine(evaluated, 17, model)
    curve, refuted = query_curve(run, "square", Square(0.12, budget), run.natural())
    assert refuted == 0
    natural = metrics.correct(model, evaluated, None, 5, 60)
    assert curve.accuracy([0]).item() == pytest.approx(100 * natural.double().mean().item())
    for queries in (1, 7, 30, budget):
        robust = natural & metrics.correct(model, evaluated, Square(0.12, queries), 5, 60)
        assert curve.accuracy([queries]).item() == pytest.approx(100 * robust.double().mean().item())
    assert curve.accuracy([budget]) < curve.accuracy([7]) < curve.accuracy([0])
    with pytest.raises(ValueError, match="from 0 to 60"):
        curve.accuracy([61])


def test_query_curve_tells_what_stands_from_what_fell_last() -> None:
    curve = QueryCurve(torch.tensor([0, 3, 10, 10]), torch.tensor([False, False, False, True]), 10)
    assert curve.accuracy([0, 2, 3, 9, 10]).tolist() == [75, 75, 50, 50, 25]
    assert curve.median() == 6.5
    assert QueryCurve(torch.tensor([0, 10]), torch.tensor([False, True]), 10).median() is None


def test_query_curve_without_a_correct_point(players: dict[str, Player], evaluated: ImageSet) -> None:
    model = players["a"].model
    with torch.no_grad():
        wrong = (model(evaluated.images(slice(None))).argmax(1) + 1) % CLASSES
    images = ImageSet(evaluated.images_uint8, wrong, evaluated.ids)
    run = engine(images, 60, model)
    curve, _ = query_curve(run, "square", Square(0.1, 5), run.natural())
    assert curve.accuracy([0, 5]).tolist() == [0, 0]


# Extraction


class Oracle(nn.Module):
    """Answers, and remembers what it was asked in which mode."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.asked = model, []
        self.modes: set[bool] = set()

    def forward(self, images: Tensor) -> Tensor:
        self.modes.add(self.training)
        assert not torch.is_grad_enabled()
        self.asked += [image.tobytes() for image in (255 * images).round().to(torch.uint8).numpy()]
        return self.model(images)


@pytest.mark.parametrize("probabilities", [False, True])
def test_extraction_makes_a_twin_from_answers_alone(probabilities: bool) -> None:
    target = Oracle(trained(4, 0))
    shown, held_out = pictures(200, 7), pictures(60, 8)
    mixed = torch.cat((shown.images_uint8, held_out.images_uint8[:20]))
    random = torch.get_rng_state()
    found = extract(
        target,
        mixed,
        lambda: make(8, 5),
        held_out_uint8=held_out.images_uint8,
        probabilities=probabilities,
        epochs=6,
        batch_size=50,
    )
    assert torch.equal(torch.get_rng_state(), random)
    assert found.queries == 200  # without those that are held out
    assert target.modes == {False}
    assert set(target.asked[:200]) == {image.tobytes() for image in shown.images_uint8.numpy()}
    assert len(target.asked) == 200 + 60  # each once, and once more to compare on the held-out ones
    assert not found.twin.training
    x = held_out.images(slice(None))
    with torch.no_grad():
        theirs, untrained = target.model(x).argmax(1), make(8, 5).eval()(x).argmax(1)
        assert found.agreement == pytest.approx((found.twin(x).argmax(1) == theirs).double().mean().item())
    assert found.agreement > 0.8 > (untrained == theirs).double().mean() + 0.2


def test_a_twin_learns_the_target_and_not_the_truth() -> None:
    """From a target that calls every class by the name of the next one."""
    model = trained(4, 0)
    target = nn.Sequential(model, Permuted())
    held_out = pictures(60, 8)
    found = extract(target, pictures(200, 7).images_uint8, make, held_out_uint8=held_out.images_uint8, epochs=6)
    assert found.agreement > 0.8
    with torch.no_grad():
        assert (found.twin(held_out.images(slice(None))).argmax(1) == held_out.labels).double().mean() < 0.2


class Permuted(nn.Module):
    def forward(self, logits: Tensor) -> Tensor:
        return logits.roll(1, 1)


def test_few_answers_are_learned_in_more_epochs() -> None:
    target, held_out = trained(4, 0), pictures(60, 8).images_uint8
    few = pictures(30, 7).images_uint8
    hasty, patient = (
        extract(target, few, lambda: make(8, 5), held_out_uint8=held_out, epochs=1, steps=steps).agreement
        for steps in (1, 150)
    )
    assert patient > hasty + 0.2


def test_extraction_is_reproducible_and_augments() -> None:
    target, images = trained(4, 0), pictures(40, 7).images_uint8
    held_out = pictures(20, 8).images_uint8

    def weights(seed: int, augmentation: Augmentation | None) -> Tensor:
        twin = extract(
            target,
            images,
            lambda: make(4, int(torch.randint(100, ()))),
            held_out_uint8=held_out,
            epochs=1,
            seed=seed,
            augmentation=augmentation,
        ).twin
        return torch.cat([parameter.flatten() for parameter in twin.parameters()])

    first = weights(0, None)
    assert first.equal(weights(0, None))
    assert not first.equal(weights(1, None))
    assert not first.equal(weights(0, Augmentation(1)))


def test_a_twin_attacks_better_than_a_stranger(evaluated: ImageSet) -> None:
    target = Player(trained(4, 0), "narrow")
    twin = extract(
        target.model, pictures(300, 7).images_uint8, make, held_out_uint8=evaluated.images_uint8, epochs=8
    ).twin
    sources = {"twin": Player(twin, "narrow", target.model), "stranger": Player(make(4, 9).eval(), "narrow")}
    found = transfer(sources, {"target": target}, engine(evaluated), "any", MIFGSM(0.12))
    assert found.relations == (("extracted",), ("grey box",))
    assert found.accuracy()[0, 0] < found.accuracy()[1, 0] - 20


def test_extraction_refusals() -> None:
    images = pictures(5, 7).images_uint8

    def try_with(given: Tensor, held_out: Tensor) -> Callable[[], object]:
        return lambda: extract(make(), given, make, held_out_uint8=held_out)

    with pytest.raises(TypeError, match=r"images_uint8 must be uint8 of shape \[N, C, H, W\], got torch.float32"):
        try_with(images.float(), images)()
    with pytest.raises(ValueError, match="every image of the attacker is held out"):
        try_with(images, images)()
    with pytest.raises(ValueError, match="needs held-out images"):
        try_with(images, images[:0])()


# Pictures


def drawn_transfer() -> Transfer:
    natural = torch.ones(2, 10, dtype=torch.bool)
    natural[1, 0] = False
    standing = torch.zeros(3, 2, 10, dtype=torch.bool)
    standing[0, 0, :1] = standing[0, 1, :9] = standing[1, 0, :6] = standing[2, 0, :10] = True
    relations = (("white box", "grey box"), ("grey box", "white box"), ("ensemble", "extracted"))
    return Transfer(("first", "second", "third"), ("first", "second"), relations, natural, standing)


def luminance(colour: object) -> float:
    return float(np.dot(to_rgb(colour), (0.299, 0.587, 0.114)))  # type: ignore[arg-type]


def test_the_matrix_shows_every_figure_in_its_place() -> None:
    found = drawn_transfer()
    figure = transfer_matrix(found, "MI-FGSM, epsilon 8/255")
    FigureCanvasAgg(figure).draw()  # gives the cells their shades
    ax, bar = figure.axes
    texts = {(round(t.xy[0] - 0.5), int(t.xy[1]), t.get_text()) for t in ax.texts}  # type: ignore[attr-defined]
    for i in range(3):
        for j in range(2):
            assert (j, i, f"{found.accuracy()[i, j]:.1f}") in texts
            assert (j, i, found.relations[i][j]) in texts
    (mesh,) = ax.collections
    shades = [luminance(colour) for colour in mesh.get_facecolor()]  # type: ignore[attr-defined]
    for cell, (i, j) in enumerate((i, j) for i in range(3) for j in range(2)):
        (text,) = [t for t in ax.texts if t.xy == (j + 0.5, i + 0.36)]  # type: ignore[attr-defined]
        assert abs(luminance(text.get_color()) - shades[cell]) > 0.4  # readable on its shade
    assert sorted((p.get_x(), p.get_y()) for p in ax.patches if isinstance(p, Rectangle)) == [
        (0.04, 0.06),
        (1.04, 1.06),
    ]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["first\nNA 100.0 %", "second\nNA 90.0 %"]
    assert ax.yaxis_inverted()
    assert "RA (%)" in bar.get_ylabel()
    assert "10 points" in ax.get_title()


def test_the_query_curve_holds_the_accuracies(tmp_path: Path) -> None:
    curve = QueryCurve(torch.tensor([0, 3, 10, 10, 3]), torch.tensor([False, False, False, True, False]), 10)
    other = QueryCurve(torch.tensor([1, 1, 1, 1, 1]), torch.zeros(5, dtype=torch.bool), 20)
    figure: Figure = query_curves({"one": curve, "two": other}, "Square, epsilon 8/255")
    (ax,) = figure.axes
    one, two = ax.lines
    np.testing.assert_array_equal(one.get_xdata(), [0, 3, 10])
    np.testing.assert_allclose(one.get_ydata(), [80, 40, 20])
    np.testing.assert_array_equal(two.get_xdata(), [0, 1, 20])
    assert one.get_linestyle() != two.get_linestyle()
    assert one.get_marker() != two.get_marker()
    assert ax.get_xlim() == (0, 20)
    assert "queries" in ax.get_xlabel()
    assert "(%)" in ax.get_ylabel()
    figure.savefig(tmp_path / "curve.pdf")
    assert (tmp_path / "curve.pdf").stat().st_size > 1000
