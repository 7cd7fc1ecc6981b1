"""APGD: its checkpoints, its steps, its place among the other attacks; samples that are fooled leave."""

import pytest
import torch
from test_attacks import EPSILON, batch, network
from torch import Tensor, nn
from torch.nn import functional as F

from dtrades_fast.attacks import APGD, PGD
from dtrades_fast.attacks.apgd import Ball, _Climb, checkpoints
from dtrades_fast.attacks.objectives import CrossEntropy
from dtrades_fast.attacks.survivors import Survivors
from dtrades_fast.evaluation.engine import Counted

pytestmark = pytest.mark.usefixtures("one_thread")

ATTACKS = {
    "ce": APGD(EPSILON, 20),
    "dlr": APGD(EPSILON, 20, loss="dlr"),
    "l2": APGD(1.0, 20, norm="l2"),
    "targeted": APGD(EPSILON, 20, loss="dlr", target=2),
    "targets": APGD(EPSILON, 10, loss="dlr", targets=3),
    "restarts": APGD(EPSILON, 5, restarts=2),
    "early pgd": PGD(EPSILON, 7, stop_early=True),
    "early pgd restarts": PGD(EPSILON, 3, restarts=2, objective="margin", stop_early=True),
}
each_attack = pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)


def ten_class_network(seed: int = 0) -> nn.Module:
    model = network(seed)
    torch.manual_seed(seed)
    model[5] = nn.Linear(4 * 36, 10)
    return model.eval()


def robust_labels(model: nn.Module, images: Tensor) -> Tensor:
    return model(images).argmax(1)


class Spy(nn.Module):
    """Keeps what the model is shown."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.shown: list[Tensor] = []

    def forward(self, images: Tensor) -> Tensor:
        self.shown.append(images.detach().clone())
        return self.model(images)


@each_attack
def test_inside_ball_and_box_and_batch_independent(attack: APGD) -> None:
    model, (images, _) = ten_class_network().double(), batch(24)
    images = images.double()
    labels, index = robust_labels(model, images), torch.arange(50, 74)
    random = torch.get_rng_state()
    adv = attack(model, images, labels, index=index, key=3)
    assert torch.equal(torch.get_rng_state(), random)
    assert adv.min() >= 0
    assert adv.max() <= 1
    delta = (adv - images).flatten(1)
    size = delta.norm(dim=1) if attack.norm == "l2" else delta.abs().amax(1)
    assert size.max() <= attack.epsilon + 1e-9
    assert (model(adv).argmax(1) != labels).any()
    for step in (1, 7):
        parts = [
            attack(model, images[i : i + step], labels[i : i + step], index=index[i : i + step], key=3)
            for i in range(0, len(images), step)
        ]
        torch.testing.assert_close(torch.cat(parts), adv, rtol=0, atol=1e-9)


def test_checkpoints_are_the_published_ones() -> None:
    """p = 0, .22, then intervals that shrink by .03 down to .06 (Croce and Hein 2020, section 3)."""
    assert checkpoints(100) == {22: 22, 41: 19, 57: 16, 70: 13, 80: 10, 87: 7, 93: 6, 99: 6}
    assert checkpoints(3) == {1: 1, 2: 1, 3: 1}


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("loss", ["ce", "dlr"])
def test_is_the_published_loop(norm: str, loss: str) -> None:
    """Against a plain loop over the published update, written from the paper, on one sample that is never fooled."""
    model, (images, _) = ten_class_network().double(), batch(40)
    images, epsilon, steps = images.double(), 0.004 if norm == "linf" else 0.03, 50
    labels = robust_labels(model, images)
    attack = APGD(epsilon, steps, norm, loss)  # type: ignore[arg-type]

    row = next(
        i
        for i in range(len(images))
        if robust_labels(model, attack(model, images[i : i + 1], labels[i : i + 1]))[0] == labels[i]
    )
    x, y = images[row : row + 1], labels[row : row + 1]
    spy = Spy(model)
    attack(spy, x, y)
    shown = spy.shown
    assert len(shown) == steps + 1

    def value(point: Tensor) -> Tensor:  # [] or [1]
        z = model(point)
        if loss == "ce":
            return F.cross_entropy(z, y)
        ordered = z.sort(1).values[0]
        return -(z[0, y[0]] - ordered[-2]) / (ordered[-1] - ordered[-3] + 1e-12)

    def gradient(point: Tensor) -> Tensor:
        point = point.clone().requires_grad_()
        return torch.autograd.grad(value(point), point)[0]

    def project(point: Tensor) -> Tensor:
        delta = point - x
        delta = delta.clamp(-epsilon, epsilon) if norm == "linf" else delta * min(1, epsilon / float(delta.norm()))
        return (x + delta).clamp(0, 1)

    looks = [0, *checkpoints(steps)]
    size, points, values = 2 * epsilon, [shown[0]], [value(shown[0]).item()]
    best = [0]  # index of the best point after each step
    went_from: list[Tensor] = []
    halved_at_last = True
    here = points[0]
    for k in range(steps):
        g = gradient(here)
        direction = g.sign() if norm == "linf" else g / g.norm()
        z = project(here + size * direction)
        after = z if k == 0 else project(here + 0.75 * (z - here) + 0.25 * (here - went_from[-1]))
        points.append(after)
        values.append(value(after).item())
        best.append(k + 1 if values[-1] > values[best[-1]] else best[-1])
        went_from.append(here)
        here = after
        if k + 1 in looks:
            since = looks[looks.index(k + 1) - 1]
            rises = sum(values[j + 1] > values[j] for j in range(since, k + 1))
            stuck = not halved_at_last and values[best[k + 1]] == values[best[since]]
            halved_at_last = rises <= 0.75 * (k + 1 - since) or stuck
            if halved_at_last:
                size, here = size / 2, points[best[k + 1]]
    torch.testing.assert_close(torch.cat(shown), torch.cat(points), rtol=0, atol=1e-8)
    assert size < 2 * epsilon


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("target", [None, 1, 3, 9])
def test_is_the_official_run_step_by_step(target: int | None, norm: str) -> None:
    """From the same start, on samples that are never fooled; rounding may tell a few apart at a checkpoint."""
    official = pytest.importorskip("pyautoattack.autopgd_base")
    model, (images, _) = ten_class_network(), batch(40)
    epsilon, labels, index = 0.01 if norm == "linf" else 0.07, robust_labels(model, images), torch.arange(40)
    attack = APGD(epsilon, norm=norm, loss="dlr" if target else "ce", target=target)  # type: ignore[arg-type]
    stands = robust_labels(model, attack(model, images, labels)) == labels
    images, labels, index = images[stands], labels[stands], index[stands]
    ours, theirs = Spy(model), Spy(model)
    attack(ours, images, labels, index=index)
    shown = ours.shown[-101:]  # without the clean images, by which a target is chosen
    kind = official.APGDAttack_targeted if target else official.APGDAttack

    class FromTheStart(kind):  # type: ignore[misc, valid-type]
        """The official code has no loss of the start: it compares that of the first step with 0."""

        def check_oscillation(self, losses: Tensor, step: int, steps: int, *rest: Tensor, **options: float) -> Tensor:
            if step + 1 == steps:
                losses = torch.cat((losses[:-1], self.of_start[None]))
            return super().check_oscillation(losses, step, steps, *rest, **options)

    run = FromTheStart(theirs, norm="Linf" if norm == "linf" else "L2", eps=epsilon, device="cpu")
    run.init_hyperparam(images)
    with torch.no_grad():
        if target:
            run.y_target = model(images).argsort(1)[:, -1 - target]
            run.of_start = run.dlr_loss_targeted(model(shown[0]), labels)
        else:
            run.of_start = F.cross_entropy(model(shown[0]), labels, reduction="none")
    _, stands, _, _ = run.attack_single_run(images, labels, x_init=shown[0])
    assert stands.all()
    assert len(images) > 10
    apart = (torch.stack(shown) - torch.stack(theirs.shown)).abs().amax((2, 3, 4))
    assert apart[:21].max() < 1e-6  # before the first checkpoint
    assert (apart[-1] < 1e-5).float().mean() > 0.6


def test_a_step_is_halved_when_few_rise_or_when_the_best_stays_but_not_for_that_twice_running() -> None:
    """Five steps between checkpoints, of which four must rise: always, never, and always but below the start's loss."""
    start = torch.tensor([0.0, 0.0, 9.0])
    points = torch.zeros(3, 1, 1, 1)
    climb = _Climb(Ball(points, 0.5, "linf"), torch.zeros(3), CrossEntropy(torch.zeros(3)), points, points, start)
    sizes = []
    for step in range(1, 21):
        climb.move(points + step, points, torch.tensor([1.0, -1.0, 0.1]) * step)
        if step % 5 == 0:
            climb.adapt(5)
            sizes.append(climb.size.flatten().tolist())
            assert climb.adv.flatten().tolist() == [step, 0, step if step in (5, 15) else 0]
    assert sizes == [[1, 1 / 2, 1], [1, 1 / 4, 1 / 2], [1, 1 / 8, 1 / 2], [1, 1 / 16, 1 / 4]]


def test_beats_pgd_and_targets_beat_one() -> None:
    fooled = {}
    for seed in range(4):
        model, (images, _) = ten_class_network(seed), batch(64)
        labels = robust_labels(model, images)
        for name, attack in {
            "pgd": PGD(0.02, 10),
            "apgd": APGD(0.02, 50),
            "target": APGD(0.02, 50, loss="dlr", target=1),
            "targets": APGD(0.02, 50, loss="dlr", targets=9),
        }.items():
            broken = robust_labels(model, attack(model, images, labels)) != labels
            fooled[name] = fooled.get(name, 0) + int(broken.sum())
    assert fooled["apgd"] >= fooled["pgd"]
    assert fooled["targets"] >= fooled["target"]
    assert 0 < fooled["targets"] < 4 * 64


def test_epsilon_may_differ_by_sample() -> None:
    model, (images, _) = ten_class_network().double(), batch(6)
    images = images.double()
    labels, index = robust_labels(model, images), torch.arange(6)
    radii = torch.tensor([0.0, 0.001, 0.01, 0.05, 0.1, 0.2], dtype=torch.float64)
    for norm in ("linf", "l2"):
        attack = APGD(1.0, 12, norm)  # type: ignore[arg-type]
        together = attack.search(model, images, labels, index, 5, radii)
        for i, radius in enumerate(radii.tolist()):
            row = slice(i, i + 1)
            alone = APGD(radius, 12, norm)(model, images[row], labels[row], index=index[row], key=5)  # type: ignore[arg-type]
            torch.testing.assert_close(together[row], alone, rtol=0, atol=1e-9)


def test_projection_onto_the_ball() -> None:
    images = torch.rand(4, 1, 5, 5, dtype=torch.float64)
    for norm, order in (("linf", torch.inf), ("l2", 2.0)):
        ball = Ball(images, torch.tensor([0.1, 0.2, 0.3, 0.4]), norm)  # type: ignore[arg-type]
        far = ball.project_(images + torch.randn_like(images))
        assert (
            torch.linalg.vector_norm((far - images).flatten(1), order, dim=1) <= ball.epsilon.flatten() + 1e-9
        ).all()
        near = images + 1e-3 * torch.rand_like(images) * (0.5 - images)  # inside the box
        torch.testing.assert_close(ball.project_(near.clone()), near)


def test_fooled_samples_cost_no_passes() -> None:
    """Samples that a step of any size fools leave at the first look."""
    model, (images, _) = ten_class_network(), batch(32)
    labels = robust_labels(model, images)
    for attack in (APGD(0.5, 100), PGD(0.5, 100, stop_early=True)):
        counted = Counted(model)
        adv = attack(counted, images, labels)
        assert (robust_labels(model, adv) != labels).all()
        assert counted.forwards < 32 * 20
        assert counted.backwards <= counted.forwards


def test_early_end_is_never_weaker_and_fgsm_is_the_same() -> None:
    model, (images, _) = ten_class_network(), batch(64)
    labels = robust_labels(model, images)
    for steps, start in ((1, "clean"), (5, "uniform"), (10, "uniform")):
        last, early = (
            robust_labels(model, PGD(0.02, steps, start=start, stop_early=stop)(model, images, labels)) != labels  # type: ignore[arg-type]
            for stop in (False, True)
        )
        assert not (last & ~early).any()
        if steps == 1:
            assert torch.equal(last, early)


def test_survivors() -> None:
    images = torch.arange(4.0).view(4, 1, 1, 1)
    survivors = Survivors(images)
    assert survivors.drop() is None
    survivors.record(images + 10, torch.tensor([False, True, False, True]))
    survivors.record(images + 20, torch.tensor([False, True, True, False]))  # 1 has been fooled before
    keep = survivors.drop()
    assert keep is not None
    assert keep.tolist() == [0]
    survivors.record(torch.tensor([[[[7.0]]]]), torch.tensor([False]))
    assert survivors.result().flatten().tolist() == [0, 11, 22, 13]
    assert survivors.result(torch.tensor([[[[9.0]]]])).flatten().tolist() == [9, 11, 22, 13]


def test_refusals() -> None:
    for wrong, match in (
        ({"epsilon": -1.0}, "epsilon must be >= 0"),
        ({"epsilon": float("nan")}, "epsilon must be >= 0"),
        ({"epsilon": 0.1, "steps": 0}, "steps must be >= 1"),
        ({"epsilon": 0.1, "restarts": 0}, "restarts must be >= 1"),
        ({"epsilon": 0.1, "norm": "l1"}, "norm must be 'linf' or 'l2'"),
        ({"epsilon": 0.1, "loss": "kl"}, "loss must be 'ce' or 'dlr'"),
        ({"epsilon": 0.1, "target": 1}, "target must be at least 1 and needs loss='dlr'"),
        ({"epsilon": 0.1, "loss": "dlr", "targets": 0}, "targets must be at least 1"),
        ({"epsilon": 0.1, "loss": "dlr", "target": 1, "targets": 2}, "not both"),
    ):
        with pytest.raises(ValueError, match=match):
            APGD(**wrong)  # type: ignore[arg-type]
