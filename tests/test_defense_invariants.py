"""What holds for every defense and attack whatever the data: BatchNorm shares, ball and box, batch splits, modes."""

from __future__ import annotations

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dtrades_fast import defenses
from dtrades_fast.attacks import FGSM, PGD, Attack
from dtrades_fast.data import ImageSet
from dtrades_fast.defenses import Batch, Crafted, Threat
from dtrades_fast.evaluation import metrics

WEIGHTED = {"lambda_alpha": 1.0, "lambda_beta": 1.0}
#: Every method, and the options with which its loss takes another path.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "at": ("at", {}),
    "trades": ("trades", {}),
    "dtrades": ("dtrades", {}),
    "dtrades, given weights": ("dtrades", WEIGHTED),
    "dtrades, entropy gradient": ("dtrades", {**WEIGHTED, "lambda_gradient": "entropy"}),
    "dtrades, full gradient": ("dtrades", {**WEIGHTED, "lambda_gradient": "full"}),
    "mart": ("mart", {}),
    "mart, published": ("mart", {"clamps": "published"}),
    "faal of at": ("faal", {"base_loss": "at"}),
    "faal of trades": ("faal", {"base_loss": "trades"}),
    "faal of mart": ("faal", {"base_loss": "mart", "absent_class": "official"}),
}
each_method = pytest.mark.parametrize("name", METHODS)


pytestmark = pytest.mark.usefixtures("one_thread")


def make(name: str, threat: Threat, **options: Any) -> defenses.Defense:
    method, own = METHODS[name]
    return defenses.create(method, threat, **own, **options)


def network() -> nn.Sequential:
    """With what must not disturb: BatchNorm whose statistics are not those of a batch, and dropout."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(), nn.Linear(4 * 36, 5))
    model = nn.Sequential(*layers)
    model[1].running_mean.uniform_(-0.1, 0.1)
    return model


def batch(count: int = 9, classes: int = 5, dtype: torch.dtype = torch.float32) -> Batch:
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(count, 1, 8, 8, generator=generator).to(dtype)
    return Batch(images, torch.randint(classes, (count,), generator=generator), torch.arange(count), key=11)


# ---- BatchNorm -------------------------------------------------------------------------------------------------------

PAIRS = [("clean_adv", 10 / 19), ("adv_clean", 9 / 19), ("clean_adv_clean", 90 / 271), ("concat", 1 / 2)]
SHARES = [("at", None, 1.0), ("faal of at", None, 1.0)]
SHARES += [(name, mode, share) for name in METHODS if not name.endswith("at") for mode, share in PAIRS]


@pytest.mark.parametrize(("name", "bn_mode", "share"), SHARES)
def test_adversarial_share_of_the_running_statistics(name: str, bn_mode: str | None, share: float) -> None:
    """Clean batches are 0, adversarial ones 1; a pass with momentum 0.1 keeps 0.9 of what was there."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Linear(4, 5))
    data = Batch(torch.zeros(4, 1, 2, 2), torch.arange(4), torch.arange(4), key=0)
    defense = make(name, Threat(1.0), **({} if bn_mode is None else {"bn_mode": bn_mode}))
    crafted = dataclasses.replace(defense.craft(model, data), adv=torch.ones(4, 1, 2, 2))
    for _ in range(200):
        defense.loss(model, data, crafted)
    assert model[0].running_mean.item() == pytest.approx(share, abs=1e-4)
    assert round(share, 3) in (1.0, 0.526, 0.474, 0.332, 0.5)


def test_concat_has_the_statistics_and_logits_of_both_halves_together() -> None:
    joint, model, data = network(), network(), batch()
    joint[4].p = model[4].p = 0.0
    adv = data.images.flip(0).sqrt()
    together = torch.cat((data.images, adv))
    expected = joint.train()(together)
    mean, var = joint[0](together).mean((0, 2, 3)), joint[0](together).var((0, 2, 3))
    before = copy.deepcopy(model[1])

    loss = make("trades", Threat(0.1), bn_mode="concat").loss(model.train(), data, Crafted(adv))

    assert loss.clean_logits is not None
    assert loss.adv_logits is not None
    assert torch.equal(torch.cat((loss.clean_logits, loss.adv_logits)), expected)
    torch.testing.assert_close(model[1].running_mean, 0.9 * before.running_mean + 0.1 * mean)
    torch.testing.assert_close(model[1].running_var, 0.9 * before.running_var + 0.1 * var)


# ---- Ball and box ----------------------------------------------------------------------------------------------------


class Float32(nn.Module):
    """A float32 network for images of any type, as autocast makes of one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor) -> Tensor:
        return self.inner(images.float())


def at_the_border(dtype: torch.dtype) -> Batch:
    """Black, white, and anything between, down to the smallest numbers; one image is all black, one all white."""
    data = batch(dtype=dtype)
    pixels = data.images.flatten(1)
    pixels[:, ::3], pixels[:, 1::3] = 0, 1
    pixels[0], pixels[1] = 0, 1
    pixels[2, 5] = torch.finfo(dtype).tiny
    return data


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("name", ["at", "trades", "dtrades", "mart", "faal of at", "faal of trades", "faal of mart"])
def test_adversarial_images_stay_in_ball_and_box(name: str, norm: Any, dtype: torch.dtype) -> None:
    """What rounding to the images' type may add: one spacing of numbers near 1 per pixel."""
    data, model = at_the_border(dtype), Float32(network())
    spacing = torch.finfo(dtype).eps
    for epsilon in (0.0, 1e-3, 8 / 255, 0.3, 2.0):
        adv = make(name, Threat(epsilon, steps=3, norm=norm)).craft(model, data).adv
        assert adv.dtype == dtype
        assert adv.min() >= 0
        assert adv.max() <= 1
        delta = (adv.double() - data.images.double()).flatten(1)
        size = delta.abs().amax(1) if norm == "linf" else delta.norm(dim=1)
        slack = spacing if norm == "linf" else spacing * math.sqrt(delta.shape[1])
        assert size.max() <= epsilon + slack
        if epsilon == 0:
            assert torch.equal(adv, data.images)
        elif epsilon >= 0.3:
            assert size.min() > 0  # every image went somewhere


@pytest.mark.parametrize(("name", "leaves"), [("trades", True), ("dtrades", True), ("mart", True), ("at", False)])
def test_only_the_gaussian_start_leaves_the_box_and_only_before_the_first_step(name: str, leaves: bool) -> None:
    data = at_the_border(torch.float32)
    started = make(name, Threat(0.3, steps=0)).craft(network(), data).adv
    stepped = make(name, Threat(0.3, steps=1)).craft(network(), data).adv
    assert bool(((started < 0) | (started > 1)).any()) == leaves
    assert ((stepped >= 0) & (stepped <= 1)).all()


# ---- Batch splits ----------------------------------------------------------------------------------------------------


class RowByRow(nn.Module):
    """A smooth network whose sums run within a sample, so that its bits do not depend on the batch size.

    Those of a matrix product or convolution may: the library picks its kernel by the number of rows.
    """

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = torch.randn(16, 64, generator=generator) / 8
        self.second = torch.randn(5, 16, generator=generator)

    def forward(self, images: Tensor) -> Tensor:
        hidden = (images.flatten(1)[:, None] * self.first).sum(-1).tanh()
        return (hidden[:, None] * self.second).sum(-1)


EVALUATION: dict[str, Attack | None] = {
    "clean": None,
    "fgsm": FGSM(0.03),
    "pgd restarts": PGD(0.03, 4, restarts=3),
    "l2 restarts": PGD(0.2, 4, norm="l2", restarts=3),
    "kl": PGD(0.1, 4, objective="kl", start="gaussian"),
}


def evaluation_set(model: nn.Module) -> ImageSet:
    """Three quarters of the labels are the model's own predictions, so that there is something to lose."""
    pixels = torch.randint(256, (29, 1, 8, 8), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    ids = torch.arange(1000, 1029)
    labels = model.eval()(pixels / 255).argmax(1)
    labels[::4] = (labels[::4] + 1) % 5
    return ImageSet(pixels, labels, ids)


@pytest.mark.parametrize("attack", EVALUATION.values(), ids=EVALUATION)
def test_evaluation_does_not_depend_on_the_split_to_the_bit(attack: Attack | None) -> None:
    model = RowByRow()
    images = evaluation_set(model)
    flags = {size: metrics.correct(model, images, attack, 7, size) for size in (1, 7, 29)}
    assert torch.equal(flags[1], flags[29])
    assert torch.equal(flags[7], flags[29])
    assert 0 < metrics.accuracy(flags[29]) < 1
    if attack is None:
        return
    adv = {}
    for size in (1, 7, 29):
        parts = [slice(i, i + size) for i in range(0, 29, size)]
        adv[size] = torch.cat(
            [attack(model, images.images(p), images.labels[p], index=images.ids[p], key=7) for p in parts]
        )
    assert torch.equal(adv[1], adv[29])
    assert torch.equal(adv[7], adv[29])
    assert not torch.equal(adv[29], images.images(slice(None)))


@pytest.mark.parametrize("attack", EVALUATION.values(), ids=EVALUATION)
def test_correctness_under_convolutions_does_not_depend_on_the_split(attack: Attack | None) -> None:
    """Rounding may differ with the batch size here, but no sample is close enough to a border for it to matter."""
    model = network()
    images = evaluation_set(model)
    flags = [metrics.correct(model, images, attack, 7, size) for size in (1, 7, 29)]
    assert torch.equal(flags[0], flags[2])
    assert torch.equal(flags[1], flags[2])
    assert 0 < metrics.accuracy(flags[2]) < 1


# ---- Modes, small batches, large logits ------------------------------------------------------------------------------


@each_method
def test_crafting_in_train_mode_is_crafting_in_eval_mode(name: str) -> None:
    """And every module keeps its mode, every buffer its bits, every parameter its place in the training."""
    data, defense = batch(), make(name, Threat(0.1, steps=3))
    expected = defense.craft(network().eval(), data).adv
    model = network().train()
    model[1].eval()  # as with a frozen backbone
    model[0].requires_grad_(False)
    before = copy.deepcopy(model)
    torch.manual_seed(5)
    random = torch.get_rng_state()

    crafted = defense.craft(model, data)

    assert torch.equal(crafted.adv, expected)
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    assert [p.requires_grad for p in model.parameters()] == [p.requires_grad for p in before.parameters()]
    assert all(p.grad is None for p in model.parameters())
    for mine, kept in zip(model.state_dict().values(), before.state_dict().values(), strict=True):
        assert torch.equal(mine, kept)
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize(("count", "classes"), [(1, 5), (1, 1), (2, 1), (9, 2)])
@each_method
def test_small_batches_and_missing_classes(name: str, count: int, classes: int) -> None:
    model, data = network().train(), batch(count, classes)
    defense = make(name, Threat(0.1, steps=2))
    loss = defense.loss(model, data, defense.craft(model, data))
    loss.total.backward()
    assert loss.per_sample.shape == (count,)
    assert all(values.shape == (count,) for values in loss.terms.values())
    assert loss.per_sample.isfinite().all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert any(p.grad.any() for p in model.parameters() if p.grad is not None)


class Outputs(nn.Module):
    """The logits ``table[i]`` for an image whose pixel is ``i``, so that loss and gradient take any logits."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table)

    def forward(self, images: Tensor) -> Tensor:
        return self.table[images.detach().flatten().long()] + 0 * images.sum()


@pytest.mark.parametrize("bn_mode", ["clean_adv", "concat"])
@each_method
def test_no_nan_at_logits_200_apart(name: str, bn_mode: str) -> None:
    """Softmax is exactly 0 there in float32. Right and wrong, clean and adversarial: each against each."""
    sure = 200 * torch.eye(4)
    table = torch.cat((sure, -sure, sure - sure.flip(0), torch.zeros(1, 4)))
    pairs = torch.cartesian_prod(torch.arange(13), torch.arange(13))
    labels = torch.arange(169) % 4
    clean, adv = (column.float().view(-1, 1, 1, 1) for column in pairs.unbind(1))
    options = {} if name.endswith("at") else {"bn_mode": bn_mode}
    defense, model = make(name, Threat(1.0), **options), Outputs(table)
    data = Batch(clean, labels, torch.arange(169), key=0)

    loss = defense.loss(model, data, dataclasses.replace(defense.craft(model, data), adv=adv))
    loss.total.backward()

    assert loss.total.dtype == torch.float32
    assert loss.per_sample.isfinite().all()
    assert loss.per_sample.max() > 100  # the sure mistakes are seen
    assert all(values.isfinite().all() for values in loss.terms.values())
    assert model.table.grad is not None
    assert model.table.grad.isfinite().all()
    assert model.table.grad.any()
