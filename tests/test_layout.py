"""Convolutions get the memory format in which they are fast, and the network stays the same function."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from dtrades_fast import models
from dtrades_fast.models import layout
from dtrades_fast.models.attack_network import AttackNetwork
from dtrades_fast.models.folding import fold
from dtrades_fast.models.layout import contiguous_input, lay_out

CHANNELS_LAST = torch.channels_last
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def resnet() -> models.Classifier:
    """Its last stage has 8 width channels on 4x4 pixels of 32."""
    torch.manual_seed(0)
    half = (0.5,) * 3
    return models.create("resnet18", num_classes=10, in_channels=3, image_size=32, width=4, mean=half, std=half).eval()


@pytest.fixture
def images() -> Tensor:
    return torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def small(network: nn.Module) -> list[str]:
    """Convolutions that were made contiguous."""
    return [
        name
        for name, module in network.named_modules()
        if isinstance(module, nn.Conv2d) and contiguous_input in module._forward_pre_hooks.values()
    ]


def test_few_pixels_and_many_channels_are_contiguous(
    resnet: models.Classifier, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "MANY_CHANNELS", 32)
    expected = resnet(images)
    state = copy.deepcopy(resnet.state_dict())
    lay_out(resnet, images)
    lay_out(resnet, images)  # nothing more
    names = small(resnet)
    convolutions = {n: m for n, m in resnet.named_modules() if isinstance(m, nn.Conv2d)}
    last_stage = [n for n, m in convolutions.items() if m.in_channels == m.out_channels == 32]
    assert names == last_stage != []
    seen = {}
    for name, module in convolutions.items():
        assert len(module._forward_pre_hooks) == (name in names)
        contiguous = module.weight.is_contiguous()
        if module.kernel_size != (1, 1):  # whose weight is both
            assert contiguous == (name in names), name
        module.register_forward_hook(lambda m, x, y, name=name: seen.update({name: y}))
    logits = resnet(images.contiguous(memory_format=CHANNELS_LAST))
    assert all(seen[name].is_contiguous() == (name in names) for name in seen)
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(value, state[name]) for name, value in resnet.state_dict().items())


def test_a_network_that_is_laid_out_is_folded_and_laid_out_alike(
    resnet: models.Classifier, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "MANY_CHANNELS", 32)
    folded_before = fold(resnet, images)
    lay_out(resnet, images)
    attacked = AttackNetwork(resnet, images)
    assert folded_before is not None
    assert attacked.folded is not None
    assert attacked.folded.folded == folded_before.folded
    assert len(small(attacked.folded)) == len(small(resnet))


def test_laying_out_a_form_leaves_the_model_alone(
    resnet: models.Classifier, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "MANY_CHANNELS", 32)
    attacked = AttackNetwork(resnet, images)
    assert attacked.folded is not None
    assert small(attacked.folded)
    assert not small(resnet)
    assert all(p.is_contiguous() for p in resnet.parameters())


def test_half_precision_is_channels_last_throughout(
    resnet: models.Classifier, images: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "MANY_CHANNELS", 32)
    lay_out(resnet, images, half=True)
    assert not small(resnet)
    weights = [m.weight for m in resnet.modules() if isinstance(m, nn.Conv2d)]
    assert all(weight.is_contiguous(memory_format=CHANNELS_LAST) for weight in weights)


def test_a_network_without_convolutions_is_left_alone(images: Tensor) -> None:
    lay_out(nn.Sequential(nn.Flatten(), nn.Linear(3072, 2)), images)
