"""FGSM and PGD: inside ball and box, leaving no trace, independent of the batch, and as strong as they should be."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dtrades_fast.attacks import FGSM, PGD, frozen, input_gradient
from dtrades_fast.attacks.objectives import DLR, KL, CrossEntropy, Margin, Targeted, TargetedDLR

EPSILON = 0.1


pytestmark = pytest.mark.usefixtures("one_thread")


def network(seed: int = 0) -> nn.Sequential:
    """Small, with what an attack must not disturb: BatchNorm and dropout."""
    torch.manual_seed(seed)
    layers = (nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(), nn.Linear(4 * 36, 3))
    model = nn.Sequential(*layers)
    model[1].running_mean.uniform_(-0.1, 0.1)
    return model


def batch(count: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(count, 1, 8, 8, generator=generator), torch.randint(3, (count,), generator=generator)


ATTACKS = {
    "fgsm": FGSM(EPSILON),
    "pgd": PGD(EPSILON, 5),
    "l2": PGD(1.0, 5, norm="l2"),
    "kl": PGD(EPSILON, 5, objective="kl", start="gaussian"),
    "kl uniform": PGD(EPSILON, 5, objective="kl"),
    "targeted": PGD(EPSILON, 5, targeted=True),
    "restarts": PGD(EPSILON, 3, restarts=3),
    "l2 restarts": PGD(1.0, 3, norm="l2", restarts=2),
    "kl restarts": PGD(EPSILON, 3, objective="kl", start="gaussian", restarts=2),
}
each_attack = pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)


@each_attack
def test_inside_ball_and_box(attack: PGD) -> None:
    images, labels = batch()
    adv = attack(network(), images, labels, key=3)
    assert adv.min() >= 0
    assert adv.max() <= 1
    delta = (adv - images).flatten(1)
    size = delta.norm(dim=1) if attack.norm == "l2" else delta.abs().amax(1)
    assert size.max() <= attack.epsilon + 1e-6
    assert size.min() > 0.5 * attack.epsilon  # and it did go somewhere


@each_attack
def test_leaves_everything_as_found(attack: PGD) -> None:
    model = network()
    model.train()
    model[1].eval()  # as with a frozen backbone
    model[0].weight.requires_grad_(False)
    model[5].weight.grad = torch.ones_like(model[5].weight)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    images, labels = batch()
    images.requires_grad_()
    random = torch.get_rng_state()

    adv = attack(model, images, labels)

    assert [module.training for module in model] == [True, False, True, True, True, True]
    assert model.training
    assert not model[0].weight.requires_grad
    assert all(p.requires_grad for p in (model[0].bias, *model[1].parameters(), *model[5].parameters()))
    assert all(p.grad is None for p in (model[0].bias, *model[1].parameters(), model[5].bias))
    assert torch.equal(model[5].weight.grad, torch.ones_like(model[5].weight))
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert images.grad is None
    assert images.requires_grad
    assert not adv.requires_grad


def test_leaves_modes_as_found_when_the_model_fails() -> None:
    model = network().train()
    images, labels = batch()
    with pytest.raises(RuntimeError):
        PGD(EPSILON)(model, images[..., :5], labels)
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())


@each_attack
def test_independent_of_the_batch_split(attack: PGD) -> None:
    model, (images, labels) = network().double(), batch()
    images = images.double()
    index = torch.arange(100, 112)
    whole = attack(model, images, labels, index=index, key=5)
    for size in (1, 5):
        parts = [
            attack(model, images[i : i + size], labels[i : i + size], index=index[i : i + size], key=5)
            for i in range(0, len(images), size)
        ]
        torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-9)


def test_key_and_index_matter_and_nothing_else() -> None:
    model, (images, labels) = network(), batch()
    attack = PGD(EPSILON, 0)
    first = attack(model, images, labels, key=1)
    torch.manual_seed(99)
    assert torch.equal(attack(model, images, labels, key=1), first)
    assert not torch.equal(attack(model, images, labels, key=2), first)
    assert not torch.equal(attack(model, images, labels, key=1, index=torch.arange(1, 13)), first)


def test_fgsm_is_one_signed_step() -> None:
    model, (images, labels) = network().eval(), batch()
    x = images.clone().requires_grad_()
    F.cross_entropy(model(x), labels, reduction="sum").backward()
    expected = (images + EPSILON * x.grad.sign()).clamp(0, 1)
    torch.testing.assert_close(FGSM(EPSILON)(model, images, labels), expected, rtol=0, atol=1e-6)
    assert torch.equal(FGSM(0.0)(model, images, labels), images)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_pgd_is_the_textbook_loop(norm: str) -> None:
    model, (images, labels) = network().double().eval(), batch()
    images = images.double()
    epsilon, step = (EPSILON, 0.03) if norm == "linf" else (1.0, 0.3)
    x = images.clone()
    for _ in range(4):
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(F.cross_entropy(model(x), labels, reduction="sum"), x)
        x = x.detach()
        if norm == "linf":
            x = torch.clamp(x + step * gradient.sign(), images - epsilon, images + epsilon)
        else:
            length = gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            delta = x + step * gradient / length - images
            size = delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
            x = images + delta * torch.clamp(epsilon / size, max=1)
        x = x.clamp(0, 1)
    adv = PGD(epsilon, 4, step, norm, start="clean")(model, images, labels)  # type: ignore[arg-type]
    torch.testing.assert_close(adv, x, rtol=0, atol=1e-9)


def test_objectives_have_their_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(6, 5, generator=generator, dtype=torch.float64)
    log_p = torch.randn(6, 5, generator=generator, dtype=torch.float64).log_softmax(-1)
    labels = torch.randint(5, (6,), generator=generator)
    for objective in (CrossEntropy(labels), Targeted(labels), KL(log_p)):
        x = z.clone().requires_grad_()
        (expected,) = torch.autograd.grad(objective.value(x).double().sum(), x)
        torch.testing.assert_close(objective.logit_grad(z), expected, rtol=1e-6, atol=1e-7)
        rows = torch.tensor([4, 1])
        torch.testing.assert_close(objective.select(rows).value(z[rows]), objective.value(z)[rows])


def test_ratios_of_logits_are_the_published_ones() -> None:
    """Value and gradient, for labels and targets of every rank, also where both are the same class."""
    z = 3 * torch.randn(36, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    order = z.argsort(1, descending=True)
    rank = torch.arange(36)
    labels, targets = (order.gather(1, ranks[:, None]).squeeze(1) for ranks in (rank // 6, rank % 6))
    x = z.clone().requires_grad_()
    first, second, third, fourth = x.sort(1, descending=True).values[:, :4].unbind(1)
    own, target = (x.gather(1, classes[:, None]).squeeze(1) for classes in (labels, targets))
    rival = torch.where(labels == order[:, 0], second, first)
    for objective, expected in (
        (Margin(labels), rival - own),
        (DLR(labels), (rival - own) / (first - third)),
        (TargetedDLR(labels, targets), (target - own) / (first - (third + fourth) / 2)),
    ):
        (gradient,) = torch.autograd.grad(expected.sum(), x, retain_graph=True)
        torch.testing.assert_close(objective.value(z), expected.detach(), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(objective.logit_grad(z), gradient, rtol=1e-9, atol=1e-9)
        rows = torch.tensor([31, 8])
        torch.testing.assert_close(objective.select(rows).logit_grad(z[rows]), gradient[rows], rtol=1e-9, atol=1e-9)


def test_input_gradient_is_per_sample() -> None:
    model, (images, labels) = network().double().eval(), batch()
    images = images.double()
    gradient = input_gradient(model, images, CrossEntropy(labels))
    for i in range(len(images)):
        x = images[i : i + 1].clone().requires_grad_()
        (alone,) = torch.autograd.grad(F.cross_entropy(model(x), labels[i : i + 1]), x)
        torch.testing.assert_close(gradient[i : i + 1], alone, rtol=1e-6, atol=1e-9)


def test_restarts_are_never_weaker() -> None:
    images, labels = batch(64)
    for seed in range(3):
        model = network(seed).eval()
        labels = model(images).argmax(1)
        one, many = (
            model(PGD(0.03, 2, restarts=restarts)(model, images, labels, key=7)).argmax(1) == labels
            for restarts in (1, 4)
        )
        assert many.any()
        assert not (many & ~one).any()


def test_restarts_keep_the_highest_objective_where_none_fools() -> None:
    model, (images, _) = network().eval(), batch(64)
    labels = model(images).argmax(1)
    values = []
    for restarts in (1, 2, 4):
        adv = PGD(0.002, 1, restarts=restarts)(model, images, labels, key=7)
        assert (model(adv).argmax(1) == labels).float().mean() > 0.9
        values.append(F.cross_entropy(model(adv), labels, reduction="none"))
    standing = model(adv).argmax(1) == labels
    assert (values[1] >= values[0] - 1e-6)[standing].all()
    assert (values[2] >= values[1] - 1e-6)[standing].all()
    assert (values[2] > values[0])[standing].any()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_targeted_reaches_its_class(norm: str) -> None:
    model, (images, _) = network().eval(), batch(32)
    target = (model(images).argmax(1) + 1) % 3
    attack = PGD(0.8 if norm == "linf" else 8.0, 30, norm=norm, targeted=True, restarts=2)  # type: ignore[arg-type]
    adv = attack(model, images, target)
    assert (model(images).argmax(1) == target).sum() == 0
    assert (model(adv).argmax(1) == target).float().mean() > 0.95


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("restarts", [1, 2])
def test_a_start_outside_of_ball_and_box_is_no_success(norm: str, restarts: int) -> None:
    """A Gaussian start may fool the model there, as here, where the labels are wrong for all that it is shown."""
    model, (images, _) = network().eval(), batch()
    images, epsilon = images.round(), 1e-4
    labels = (model(images).argmax(1) + 1) % 3
    options = {"norm": norm, "start": "gaussian", "restarts": restarts, "stop_early": True}
    for steps in (1, 3):
        adv = PGD(epsilon, steps, **options)(model, images, labels)  # type: ignore[arg-type]
        assert (model(adv).argmax(1) != labels).all()
        assert adv.min() >= 0
        assert adv.max() <= 1
        delta = (adv - images).flatten(1)
        size = delta.norm(dim=1) if norm == "l2" else delta.abs().amax(1)
        assert size.max() <= epsilon + 1e-6


def test_refusals() -> None:
    with pytest.raises(ValueError, match="zero gradient at the clean image"):
        PGD(EPSILON, objective="kl", start="clean")
    with pytest.raises(ValueError, match="targeted needs objective='ce', got 'kl'"):
        PGD(EPSILON, objective="kl", targeted=True)
    with pytest.raises(ValueError, match="norm must be one of 'linf', 'l2', got 'l1'"):
        PGD(EPSILON, norm="l1")  # type: ignore[arg-type]
    for wrong in (
        {"epsilon": -1},
        {"epsilon": 1, "steps": -1},
        {"epsilon": 1, "step_size": 0},
        {"epsilon": 1, "restarts": 0},
    ):
        with pytest.raises(ValueError, match=list(wrong)[-1]):
            PGD(**wrong)  # type: ignore[arg-type]
    images, labels = batch()
    with pytest.raises(ValueError, match=r"images must have shape \[N, C, H, W\]"):
        PGD(EPSILON)(network(), images[0], labels)
    with pytest.raises(TypeError, match=r"images must be a floating-point tensor in \[0, 1\], got torch.uint8"):
        PGD(EPSILON)(network(), images.byte(), labels)
    with pytest.raises(TypeError, match=r"labels must be an int64 tensor, got torch\.float32"):
        PGD(EPSILON)(network(), images, labels.float())
    with pytest.raises(ValueError, match=r"labels must have shape \[12\]"):
        PGD(EPSILON)(network(), images, labels[:3])


def test_frozen_takes_any_callable() -> None:
    model = network()
    with frozen(lambda images: model(images)):
        assert model.training
