"""Minimum-norm attacks and APN: right where the minimum is known, and no claim that does not hold."""

import pytest
import torch
from matplotlib.figure import Figure
from test_apgd import Spy, ten_class_network
from test_attacks import batch, network
from torch import Tensor, nn

from dtrades_fast.attacks import APGD, FAB, FMN, Attack, Bisection
from dtrades_fast.attacks.fab import Difference, reach, to_hyperplane
from dtrades_fast.attacks.nearest import Nearest, size
from dtrades_fast.evaluation.engine import Counted
from dtrades_fast.evaluation.minimum_norm import MinimumNorms, minimum_norm, robust_accuracy, standard
from dtrades_fast.plot.robustness import robust_accuracy_curve

pytestmark = pytest.mark.usefixtures("one_thread")

NORMS = ("linf", "l2")
CAP = {"linf": 0.3, "l2": 2.0}
each_norm = pytest.mark.parametrize("norm", NORMS)

ATTACKS: dict[str, Attack] = {
    f"{name} {norm}": attack
    for norm in NORMS
    for name, attack in {
        "fab": FAB(norm, 12, targets=3),
        "fab target": FAB(norm, 12, target=2),
        "fab epsilon": FAB(norm, 12, targets=3, epsilon=0.2 * CAP[norm]),
        "fmn": FMN(norm, 20),
        "bisection": Bisection(CAP[norm], norm, 4, 10),
    }.items()
}
each_attack = pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)


# Projection


def by_bisection(x: Tensor, w: Tensor, missing: Tensor, norm: str) -> Tensor:
    """The nearest point of hyperplane and box for one sample: the multiplier, by halving, in float64."""
    direction = (w.sign() if norm == "linf" else w) * missing.sign()

    def move(s: float) -> Tensor:
        return (x + s * direction).clamp(0, 1) - x

    low, high = 0.0, 1.0
    while (w * move(high)).sum().abs() < missing.abs() and high < 1e30:
        low, high = high, 2 * high
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if (w * move(middle)).sum().abs() < missing.abs() else (low, middle)
    return move(high)


def hyperplanes(kind: str) -> tuple[Tensor, Tensor, Tensor]:
    """Points [2, 6, 60], normals [6, 60] and what is missing [2, 6], from near to out of reach."""
    generator = torch.Generator().manual_seed(2)
    points = torch.rand(2, 6, 60, generator=generator, dtype=torch.float64)
    normal = torch.randn(6, 60, generator=generator, dtype=torch.float64)
    if kind == "heavy tails":
        normal *= torch.exp(3 * torch.randn(6, 60, generator=generator, dtype=torch.float64))
    if kind == "at the box":
        points = (2 * points - 0.5).clamp(0, 1)
    if kind == "sparse":
        normal *= torch.rand(6, 60, generator=generator) < 0.1
    if kind == "tiny":
        normal *= 1e-25
    share = torch.tensor([1e-6, 0.01, 0.3, 0.9, 0.999, 1.3], dtype=torch.float64)
    sign = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    room = torch.where(sign[..., None] * normal > 0, 1 - points, points)
    return points, normal, sign * share * (normal.abs() * room).sum(2)


@each_norm
@pytest.mark.parametrize("kind", ["plain", "heavy tails", "at the box", "sparse", "tiny"])
def test_projection_is_the_nearest_point_of_hyperplane_and_box(kind: str, norm: str) -> None:
    points, normal, missing = hyperplanes(kind)
    exact = torch.stack(
        [
            torch.stack(
                [
                    by_bisection(
                        points[k, i], normal[i] / normal[i].abs().max(), missing[k, i] / normal[i].abs().max(), norm
                    )
                    for i in range(6)
                ]
            )
            for k in range(2)
        ]
    )
    moves = to_hyperplane(points, normal, missing, norm)  # type: ignore[arg-type]
    torch.testing.assert_close(moves, exact, rtol=0, atol=1e-9)
    gained = (normal * moves).sum(2)
    torch.testing.assert_close(gained[:, :5] / missing[:, :5], torch.ones(2, 5, dtype=torch.float64), rtol=0, atol=1e-9)
    assert (gained[:, 5].abs() < missing[:, 5].abs()).all()  # out of reach: the corner of the box
    beyond = points + moves
    assert beyond.min() >= -1e-12
    assert beyond.max() <= 1 + 1e-12
    single = to_hyperplane(points.float(), normal.float(), missing.float(), norm)  # type: ignore[arg-type]
    torch.testing.assert_close(single.double(), exact, rtol=0, atol=2e-3 if norm == "l2" else 2e-4)


def by_sorting(weights: Tensor, limits: Tensor, amount: Tensor) -> Tensor:
    """The ``s`` with ``sum_i u_i min(s, t_i) = a`` of each row, by the first limit at which that is enough."""
    limits, order = limits.sort(1)
    weights = weights.gather(1, order)
    slope = weights.flip(1).cumsum(1).flip(1)  # of those that no limit has stopped
    before = (weights * limits).cumsum(1) - weights * limits
    first = (before + slope * limits < amount[:, None]).sum(1, keepdim=True)
    return (amount - before.gather(1, first).squeeze(1)) / slope.gather(1, first).squeeze(1)


@pytest.mark.parametrize("short", [0.5, 1e-2, 1e-5])
def test_projection_reaches_into_the_corner_of_the_box(short: float) -> None:
    """Of 3,072 coordinates of very different weights all but a few have to go as far as they can."""
    generator = torch.Generator().manual_seed(2)
    normal, tails = torch.randn(2, 8, 3072, generator=generator, dtype=torch.float64)
    normal, room = normal.abs() * torch.exp(3 * tails), torch.rand(8, 3072, generator=generator, dtype=torch.float64)
    for weights, limits in ((normal, room), (normal.square(), room / normal)):
        amount = (1 - short) * (weights * limits).sum(1)
        exact = by_sorting(weights, limits, amount)
        torch.testing.assert_close(reach(weights, limits[None], amount[None])[0], exact, rtol=1e-7, atol=0)


@each_norm
def test_projection_without_direction_or_need_moves_nothing(norm: str) -> None:
    points, normal, missing = (tensor.float() for tensor in hyperplanes("plain"))
    assert not to_hyperplane(points, 0 * normal, missing, norm).any()  # type: ignore[arg-type]
    assert not to_hyperplane(points, normal, 0 * missing, norm).any()  # type: ignore[arg-type]


# The attacks


def linear_classifier(classes: int = 4, pixels: int = 64) -> nn.Module:
    torch.manual_seed(4)
    return nn.Sequential(nn.Flatten(), nn.Linear(pixels, classes)).double()


def exact_norms(model: nn.Module, images: Tensor, labels: Tensor, norm: str) -> Tensor:
    """Smallest norms of perturbations in the box that bring another class level with the label."""
    weight, logits, x = model[1].weight, model(images), images.flatten(1)  # type: ignore[index]
    norms = torch.full(logits.shape, torch.inf, dtype=torch.float64)
    for i, y in enumerate(labels.tolist()):
        for t in set(range(logits.shape[1])) - {y}:
            normal, missing = weight[t] - weight[y], logits[i, y] - logits[i, t]
            move = by_bisection(x[i], normal, missing, norm)
            if (normal * move).sum() > missing * (1 - 1e-9):  # within reach
                norms[i, t] = move.abs().max() if norm == "linf" else move.norm()
    return norms.amin(1)


@each_norm
def test_exact_minimum_of_linear_classifiers(norm: str) -> None:
    model, (images, _) = linear_classifier(), batch(16)
    images = (1.6 * images.double() - 0.3).clamp(0, 1)  # many pixels cannot move in one direction
    with torch.no_grad():
        labels = model(images).argmax(1)
        exact = exact_norms(model, images, labels, norm)
    assert exact.isfinite().all()
    cap = 2 * exact.max().item()
    ratios = {}
    for name, attack in {
        "fab": FAB(norm, targets=3),  # type: ignore[arg-type]
        "fmn": FMN(norm),  # type: ignore[arg-type]
        "dlr": Bisection(cap, norm),  # type: ignore[arg-type]
        "ce": Bisection(cap, norm, loss="ce"),  # type: ignore[arg-type]
    }.items():
        adv = attack(model, images, labels)
        ratios[name] = size(adv - images, norm) / exact  # type: ignore[arg-type]
        assert (model(adv).argmax(1) != labels).all()
        assert ratios[name].min() > 1 - 1e-9
    assert ratios["fab"].max() < 1.01
    assert ratios["fmn"].max() < 1.005
    assert ratios["dlr"].quantile(0.75) < 1.02  # on the others it went for a class that is not the nearest
    assert ratios["dlr"].mean() < ratios["ce"].mean()


@each_attack
def test_in_the_box_batch_independent_and_leaving_no_trace(attack: Attack) -> None:
    model, (images, labels) = ten_class_network().double(), batch(18)
    images = images.double()
    labels = model(images).argmax(1).where(torch.arange(18) > 2, labels)  # the first are wrong from the start
    index, random = torch.arange(40, 58), torch.get_rng_state()
    adv = attack(model, images, labels, index=index, key=3)
    assert torch.equal(torch.get_rng_state(), random)
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert adv.min() >= 0
    assert adv.max() <= 1
    moved = (adv != images).flatten(1).any(1)
    wrong = model(images).argmax(1) != labels
    assert wrong.any()
    assert not moved[wrong].any()
    assert moved.sum() > 3
    assert (model(adv).argmax(1) != labels)[moved].all()  # no claim that does not hold
    for step in (1, 5):
        parts = [
            attack(model, images[i : i + step], labels[i : i + step], index=index[i : i + step], key=3)
            for i in range(0, len(images), step)
        ]
        torch.testing.assert_close(torch.cat(parts), adv, rtol=0, atol=1e-9)


@each_norm
@pytest.mark.parametrize(("steps", "near"), [(5, 1e-3), (40, 0.02)])  # rounding grows from step to step
def test_fab_finds_what_the_official_one_finds(steps: int, near: float, norm: str) -> None:
    official = pytest.importorskip("pyautoattack.fab_pt")
    model, (images, _) = ten_class_network(), batch(48)
    labels = model(images).argmax(1)
    theirs = official.FABAttack_PT(model, norm="Linf" if norm == "linf" else "L2", n_iter=steps, device="cpu")
    for rank in (1, 2, 7):
        theirs.target_class = rank + 1  # it counts the label as 1
        expected = theirs.attack_single_run(images, labels, is_targeted=True)
        adv = FAB(norm, steps, target=rank)(model, images, labels)  # type: ignore[arg-type]
        assert torch.equal(model(adv).argmax(1) != labels, model(expected).argmax(1) != labels)
        ratio = size(adv - images, norm) / size(expected - images, norm)  # type: ignore[arg-type]
        ratio = ratio[ratio.isfinite()]
        assert len(ratio) > 24
        assert (ratio.median() - 1).abs() < near / 10
        assert ((ratio - 1).abs() < near).float().mean() > 0.9


def test_fab_step_is_the_published_one() -> None:
    """By hand: the boundary x_1 = 0.5 from x = (0.4, 0.5), seen from 0.1 to 0.4 away, far from the box."""
    images = torch.tensor([0.4, 0.5]).expand(3, 2).reshape(3, 1, 1, 2).double()
    adv = torch.tensor([[0.49, 0.6], [0.45, 0.6], [0.1, 0.6]]).view(3, 1, 1, 2).double()
    gradient = torch.tensor([2.0, 0.0]).expand(3, 2).reshape(3, 1, 1, 2).double()
    after = FAB("l2", eta=1.5, alpha_max=0.2)._towards_boundary(adv, images, gradient, 2 * adv[..., 0].flatten() - 1)
    for i, alpha in enumerate((0.01 / 0.11, 0.2, 0.2)):  # at most alpha_max
        first = adv[i, 0, 0, 0] + 1.5 * (0.5 - adv[i, 0, 0, 0])
        expected = torch.stack(((1 - alpha) * first + alpha * 0.55, torch.tensor((1 - alpha) * 0.6 + alpha * 0.5)))
        torch.testing.assert_close(after[i].flatten(), expected, rtol=0, atol=1e-7)


@each_norm
def test_fab_with_epsilon_breaks_what_its_smallest_norms_say(norm: str) -> None:
    model, (images, _) = ten_class_network().double(), batch(24)
    images = images.double()
    labels = model(images).argmax(1)
    smallest = size(FAB(norm, 15, targets=4)(model, images, labels) - images, norm)  # type: ignore[arg-type]
    for epsilon in smallest.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist():
        attack = FAB(norm, 15, targets=4, epsilon=epsilon)  # type: ignore[arg-type]
        delta = attack(model, images, labels) - images
        assert torch.equal(delta.flatten(1).any(1), smallest <= epsilon)
        assert size(delta, norm).max() <= epsilon  # type: ignore[arg-type]


def test_fab_parts() -> None:
    assert FAB(targets=3, epsilon=0.1).parts() == [FAB(target=rank, targets=3, epsilon=0.1) for rank in (1, 2, 3)]
    assert FAB(targets=3).parts() == (FAB(targets=3),)  # the smallest of all is none of the parts'


def test_fooled_samples_leave_fab() -> None:
    model, (images, _) = ten_class_network(), batch(16)
    labels = model(images).argmax(1)
    counted = Counted(model)
    adv = FAB(steps=100, target=1, epsilon=0.5)(counted, images, labels)
    assert (model(adv).argmax(1) != labels).all()
    assert counted.forwards < 16 * 25
    assert counted.backwards < 16 * 12


@each_norm
def test_fmn_is_the_published_loop(norm: str) -> None:
    """Algorithm 1 of the paper for one sample, with its cosine schedules."""
    model, (images, _) = ten_class_network().double(), batch(6)
    images, steps = images.double(), 25
    labels = model(images).argmax(1)
    order, dual = (torch.inf, 1) if norm == "linf" else (2, 2)
    for i in range(6):
        x, y = images[i : i + 1], labels[i]
        delta, epsilon, best, nearest = torch.zeros_like(x), 0.0, torch.inf, x
        for k in range(steps):
            point = (x + delta).requires_grad_()
            z = model(point)[0]
            loss = z[y] - torch.cat((z[:y], z[y + 1 :])).max()
            (g,) = torch.autograd.grad(loss, point)
            falls = (1 + torch.cos(torch.tensor(torch.pi * k / steps, dtype=torch.float64))) / 2
            gamma, alpha = 0.001 + (0.05 - 0.001) * falls, 0.01 + (1 - 0.01) * falls
            length = delta.flatten().norm(p=order)
            if loss < 0:
                if length < best:
                    best, nearest = length, x + delta
                epsilon = min(epsilon * (1 - gamma), best)
            elif best == torch.inf:
                # the paper has length + loss / norm alone
                epsilon = max(epsilon, length + loss / g.flatten().norm(p=dual)) * (1 + gamma)
            else:
                epsilon = epsilon * (1 + gamma)
            delta = (delta - alpha * g / g.norm()).detach()
            delta = delta.clamp(-epsilon, epsilon) if norm == "linf" else delta * min(1, epsilon / delta.norm())
            delta = (x + delta).clamp(0, 1) - x
        adv = FMN(norm, steps)(model, x, labels[i : i + 1])  # type: ignore[arg-type]
        assert best < torch.inf
        torch.testing.assert_close(adv, nearest, rtol=0, atol=1e-8)


@each_norm
def test_fmn_takes_no_ball_larger_than_the_box(norm: str) -> None:
    """One pixel from a boundary that looks 100 times farther away than the box reaches."""

    def cliff(x: Tensor) -> Tensor:
        margin = x.flatten(1) - 0.97
        return torch.cat((torch.zeros_like(margin), margin - 100 * (margin < 0)), 1)

    spy, images = Spy(cliff), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    adv = FMN(norm)(spy, images, torch.tensor([0]))  # type: ignore[arg-type]
    # after the corner the ball is smaller than the box at once, by gamma
    assert torch.cat(spy.shown[:3]).flatten().tolist() == pytest.approx([0, 1, 0.95], abs=1e-4)
    assert adv.item() == pytest.approx(0.97, abs=1e-3)


def test_bisection_brackets() -> None:
    """On a model with one boundary, where APGD breaks every ball that can be broken."""
    model, (images, _) = linear_classifier(2), batch(12)
    images = images.double()
    with torch.no_grad():
        labels = model(images).argmax(1)
        exact = exact_norms(model, images, labels, "linf")
    cap = exact.mean().item()
    adv = Bisection(cap, "linf", 8, 20, "ce")(model, images, labels)
    found = (adv != images).flatten(1).any(1)
    assert torch.equal(found, exact < cap)
    excess = (size(adv - images, "linf") - exact)[found]
    assert excess.min() >= 0
    assert excess.max() <= cap / 2**8


def test_bisection_gives_each_sample_its_own_radius(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (images, _) = ten_class_network().double(), batch(8)
    images = images.double()
    labels = model(images).argmax(1)
    radii: list[Tensor] = []
    search = APGD.search

    def spy(self: APGD, *args: object) -> Tensor:
        radii.append(args[-1].clone())  # type: ignore[attr-defined]
        return search(self, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(APGD, "search", spy)
    adv = Bisection(0.2, "linf", 5, 10)(model, images, labels)
    assert len(radii) == 6
    assert (radii[0] == 0.2).all()
    assert all((later < 0.2).all() for later in radii[1:])
    assert len(radii[-1].unique()) > 3
    assert size(adv - images, "linf").unique().numel() > 3


def test_nearest() -> None:
    nearest = Nearest(torch.zeros(3, 1, 1, 2), "l2")
    points = torch.tensor([[0.3, 0.4], [0.6, 0.8], [0.0, 0.1]]).view(3, 1, 1, 2)
    nearest.record(points, torch.tensor([True, True, False]))
    torch.testing.assert_close(nearest.size, torch.tensor([0.5, 1.0, torch.inf]))
    nearest.record(points.flip(0), torch.tensor([True, False, True]))  # nearer; not fooled; first
    torch.testing.assert_close(nearest.size, torch.tensor([0.1, 1.0, 0.5]))
    torch.testing.assert_close(nearest.adv.view(3, 2), torch.tensor([[0.0, 0.1], [0.6, 0.8], [0.3, 0.4]]))
    assert nearest.select(torch.tensor([2])).size.item() == 0.5


def test_difference_has_its_gradient() -> None:
    logits = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    objective = Difference(torch.tensor([0, 1, 2, 3]), torch.tensor([1, 4, 0, 2]))
    (expected,) = torch.autograd.grad(objective.value(logits).sum(), logits)
    assert torch.equal(objective.logit_grad(logits.detach()), expected)


def test_refusals() -> None:
    wrongs: tuple[tuple[type[Attack], dict[str, object], str], ...] = (
        (FAB, {"norm": "l1"}, "norm must be 'linf' or 'l2', got 'l1'"),
        (FAB, {"steps": 0}, "steps must be >= 1"),
        (FAB, {"target": 0}, "target must be >= 1"),
        (FAB, {"targets": 0}, "targets must be >= 1"),
        (FAB, {"epsilon": -0.1}, "epsilon must be >= 0"),
        (FAB, {"alpha_max": 1.5}, r"alpha_max must lie in \[0, 1\]"),
        (FAB, {"beta": -1.0}, r"beta must lie in \[0, 1\]"),
        (FAB, {"eta": 0.5}, "eta must be >= 1"),
        (FMN, {"norm": "l0"}, "norm must be 'linf' or 'l2'"),
        (FMN, {"steps": 0}, "steps must be >= 1"),
        (FMN, {"step_size": 0.0}, "step_size must be > 0"),
        (FMN, {"gamma": 1.0}, r"gamma must lie in \(0, 1\)"),
        (Bisection, {"cap": 0.0}, "cap must be > 0"),
        (Bisection, {"cap": float("inf")}, "cap must be > 0 in pixel units and finite"),
        (Bisection, {"cap": 1.0, "halvings": -1}, "halvings must be >= 0"),
        (Bisection, {"cap": 1.0, "steps": 0}, "steps must be >= 1"),
        (Bisection, {"cap": 1.0, "norm": "l1"}, "norm must be 'linf' or 'l2'"),
    )
    for kind, wrong, match in wrongs:
        with pytest.raises(ValueError, match=match):
            kind(**wrong)
    images, labels = batch(2)
    with pytest.raises(ValueError, match="rank 3 needs 4 classes, the model has 3: use targets=2"):
        FAB(target=3)(network(), images, labels)
    with pytest.raises(ValueError, match="loss='dlr' needs 3 classes, the model has 2: use loss='ce'"):
        Bisection(1.0)(linear_classifier(2), images.double(), labels)


# The evaluation


def evaluate(model: nn.Module, images: Tensor, labels: Tensor, norm: str = "linf", **given: object) -> MinimumNorms:
    settings = {"cap": CAP[norm], "key": 1, "batch_size": 7, "index": torch.arange(len(images)), "norm": norm, **given}
    return minimum_norm(model, images, labels, **settings)  # type: ignore[arg-type]


def quick(norm: str = "linf") -> dict[str, Attack]:
    return {name: attack for name, attack in ATTACKS.items() if name in (f"fab {norm}", f"fmn {norm}")}


@each_norm
def test_norms_are_those_of_images_that_fool_the_model(norm: str) -> None:
    model, (images, labels) = ten_class_network(), batch(16)
    labels = model(images).argmax(1).where(torch.arange(16) > 3, labels)
    attacks = {**quick(norm), f"bisection {norm}": ATTACKS[f"bisection {norm}"]}
    model.train()
    found = evaluate(model, images, labels, norm, attacks=attacks)
    assert model.training
    assert list(found.norms) == list(attacks)
    model.eval()
    wrong = model(images).argmax(1) != labels
    for name, attack in attacks.items():
        adv = attack(model, images[~wrong], labels[~wrong], index=torch.arange(16)[~wrong], key=1)
        expected = torch.zeros(16, dtype=torch.float64)
        expected[~wrong] = size((adv.double() - images[~wrong].double()), norm)  # type: ignore[arg-type]
        expected[(expected == 0) & ~wrong] = torch.inf
        torch.testing.assert_close(found.norms[name], expected, rtol=1e-3, atol=1e-6)
    assert torch.equal(found.smallest == 0, wrong)
    assert torch.equal(
        found.smallest,
        torch.minimum(
            *(
                torch.minimum(found.norms[f"fmn {norm}"], n)
                for n in (found.norms[f"fab {norm}"], found.norms[f"bisection {norm}"])
            )
        ),
    )


def test_the_batch_size_does_not_matter() -> None:
    model, (images, _) = ten_class_network().double(), batch(9)
    images = images.double()
    labels = model(images).argmax(1)
    one, all_of_them = (evaluate(model, images, labels, attacks=quick(), batch_size=n) for n in (2, 9))
    for name in quick():
        torch.testing.assert_close(one.norms[name], all_of_them.norms[name], rtol=0, atol=1e-9)


def test_nothing_is_claimed_that_the_model_itself_denies() -> None:
    model, (images, _) = ten_class_network(), batch(8)

    class Outside(Attack):
        def perturb(self, model: object, images: Tensor, labels: Tensor, index: Tensor, key: int) -> Tensor:
            return images + 5

    outside = evaluate(model, images, (model(images).argmax(1) + 1) % 10, attacks={"outside": Outside()})
    assert (outside.norms["outside"] == 0).all()  # wrong from the start, so not attacked
    outside = evaluate(
        lambda x: model(x * 0) + 9 * (x.mean((1, 2, 3)) > 2).float()[:, None] * torch.eye(10)[3],  # type: ignore[arg-type]
        images,
        model(images * 0).argmax(1),
        attacks={"outside": Outside()},
    )
    assert outside.norms["outside"].isinf().all()


def test_standard_attacks_fit_the_model() -> None:
    assert standard("l2", 2.0, 10) == {"fmn": FMN("l2"), "fab-t": FAB("l2"), "bisection": Bisection(2.0, "l2")}
    assert standard("linf", 0.3, 3)["fab-t"] == FAB(targets=2)
    assert standard("linf", 0.3, 2)["bisection"] == Bisection(0.3, loss="ce")
    model, (images, _) = network().eval(), batch(3)
    found = evaluate(model, images, model(images).argmax(1))
    assert list(found.norms) == ["fmn", "fab-t", "bisection"]
    norms = torch.stack(list(found.norms.values()))
    assert (norms > 0).all()
    assert (norms < 2 * found.smallest).all()  # they agree roughly


def test_figures() -> None:
    inf = torch.inf
    norms = {
        "a": torch.tensor([0.0, 0.1, 0.25, inf, inf, 0.9], dtype=torch.float64),
        "b": torch.tensor([0.0, 0.2, 0.15, 0.3, inf, 0.8], dtype=torch.float64),
    }
    found = MinimumNorms("linf", 0.5, norms)
    assert found.smallest.tolist() == [0, 0.1, 0.15, 0.3, inf, 0.8]
    figures = found.figures()
    assert figures.mean == pytest.approx((0.1 + 0.15 + 0.3 + 0.5 + 0.5) / 6)  # 0.8 is beyond the cap
    assert figures.median == pytest.approx((0.15 + 0.3) / 2)
    assert figures.success_rate == pytest.approx(4 / 6)
    assert (figures.censored, figures.points) == (2, 6)
    assert found.figures("a").mean == pytest.approx((0.1 + 0.25 + 3 * 0.5) / 6)
    assert found.figures("a").censored == 3


def test_share_of_small_norms_is_what_robust_accuracy_lacks() -> None:
    """By the attacks at each radius, not by the same norms: FAB stops at epsilon, and flags are counted."""
    model, (images, labels) = ten_class_network().double(), batch(20)
    images = images.double()
    labels = model(images).argmax(1).where(torch.arange(20) > 2, labels)
    norms = evaluate(model, images, labels, attacks={"fab": FAB(steps=12, targets=3)}).smallest
    epsilons = [0.0, *norms[norms.isfinite()].quantile(torch.tensor([0.3, 0.6, 0.9]).double()).tolist(), 1.0]
    curve = robust_accuracy(norms, epsilons)
    for epsilon, accuracy in zip(epsilons, curve.tolist(), strict=True):
        adv = FAB(steps=12, targets=3, epsilon=epsilon)(model, images, labels)
        flags = model(adv).argmax(1) == labels
        assert accuracy == pytest.approx(flags.double().mean().item())
        assert (norms <= epsilon).double().mean().item() == pytest.approx(1 - accuracy)
    assert curve[0] == (model(images).argmax(1) == labels).double().mean()
    assert (curve.diff() <= 0).all()


def test_evaluation_refuses() -> None:
    model, (images, labels) = ten_class_network(), batch(2)
    for wrong, match in (
        ({"cap": 0.0}, "cap must be > 0"),
        ({"batch_size": 0}, "batch_size must be >= 1"),
        ({"norm": "l1", "cap": 1.0}, "norm must be 'linf' or 'l2', got 'l1'"),
    ):
        with pytest.raises(ValueError, match=match):
            minimum_norm(
                model,
                images,
                labels,
                torch.arange(2),
                **{"norm": "linf", "cap": 1.0, "key": 1, "batch_size": 4, **wrong},
            )  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one image"):
        evaluate(model, images[:0], labels[:0])


# The picture


def test_curve_shows_robust_accuracy() -> None:
    norms = torch.tensor([0.0, 0.1, 0.2, 0.2, torch.inf], dtype=torch.float64)
    figure = robust_accuracy_curve({"one": norms, "two": norms / 2}, norm="linf", cap=0.4, epsilon=0.15)
    assert isinstance(figure, Figure)
    (ax,) = figure.axes
    assert ax.get_xlabel() == "radius of the attack ε (Linf, pixel units)"
    assert ax.get_ylabel() == "robust accuracy RA (%)"
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["one", "two"]
    steps = [line for line in ax.lines if line.get_drawstyle() == "steps-post"]
    assert steps[0].get_xdata().tolist() == [0, 0.1, 0.2, 0.2, 0.4]
    assert steps[0].get_ydata().tolist() == pytest.approx([80, 60, 20, 20, 20])
    assert steps[0].get_linestyle() != steps[1].get_linestyle()
    figure.canvas.draw()
