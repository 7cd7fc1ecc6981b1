"""The network with BatchNorm folded: same logits and gradients, follows its network, leaves it alone."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dtrades_fast import models
from dtrades_fast.models.folding import FoldedNetwork, faithful, fold

pytestmark = pytest.mark.usefixtures("one_thread")


def network(arch: str) -> nn.Module:
    torch.manual_seed(0)
    model = models.create(
        arch, num_classes=10, in_channels=3, image_size=16, width=4, mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.2)
    ).double()
    for module in model.modules():  # as after training: no statistic is what it was initialised to
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
    return model


def images() -> Tensor:
    return torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def gradient(model: nn.Module, x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    return torch.autograd.grad(model(x).square().sum(), x)[0]


@pytest.mark.parametrize(
    ("arch", "folded", "kept"),
    [("resnet18", 20, 0), ("vgg16", 13, 0), ("preactresnet18", 8, 9), ("wrn34_10", 15, 16), ("smallcnn", 0, 0)],
)
def test_same_logits_and_gradients(arch: str, folded: int, kept: int) -> None:
    model = network(arch).train()
    view = FoldedNetwork(model)
    assert (view.folded, view.kept) == (folded, kept)
    assert model.training
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(parameter.requires_grad for parameter in view.parameters())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    got, gradients = view(images()), gradient(view, images())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model.eval()
    torch.testing.assert_close(got, model(images()), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(gradients, gradient(model, images()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("arch", ["resnet18", "preactresnet18"])
def test_follows_its_network(arch: str) -> None:
    model = network(arch)
    view = FoldedNetwork(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    model.train()
    model(images()).square().sum().backward()
    optimizer.step()
    model.eval()
    assert not torch.allclose(view(images()), model(images()))
    view.refresh()
    torch.testing.assert_close(view(images()), model(images()), rtol=1e-9, atol=1e-9)


def test_layers_seen_by_others_or_used_twice_are_kept() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen, self.seen_norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
            self.twice, self.twice_norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)
            self.free, self.free_norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, track_running_stats=False)
            self.flat, self.flat_norm = nn.Linear(48, 4), nn.BatchNorm1d(4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.seen(x)
            x = y + self.seen_norm(y)
            x = self.twice_norm(self.twice(x)) + self.twice(x)
            x = self.free_norm(self.free(x))
            return self.flat_norm(self.flat(x.flatten(1)))

    model = Odd().eval()
    view = FoldedNetwork(model)
    assert (view.folded, view.kept) == (1, 3)
    x = torch.rand(6, 3, 4, 4)
    torch.testing.assert_close(view(x), model(x))


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> Tensor:
        return gradient


class Depends(nn.Module):
    """Control flow that tracing cannot follow."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) if x.sum() > 0 else -x.flatten(1)


class Noisy(nn.Module):
    """Tracing would burn one draw in."""

    def forward(self, x: Tensor) -> Tensor:
        return (x + torch.randn(3, 16, 16)).flatten(1)


class Hidden(nn.Module):
    """A gradient that is not that of the forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 10, 16)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(StraightThrough.apply(3 * x)).flatten(1)  # type: ignore[no-untyped-call]


class Purifying(nn.Module):
    """Computes a gradient itself, in a context that a trace loses."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 10, 16)

    def forward(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            z = x.detach().requires_grad_()
            (gradient,) = torch.autograd.grad(self.conv(z).sum(), z)
        return self.conv(x + 0.1 * gradient.sign()).flatten(1)


class Detached(nn.Module):
    """Has no gradient to its images."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return x.flatten(1)


class ByKeyword(nn.Module):
    """Calls its BatchNorm by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(input=self.conv(x)).flatten(1)


def normed(norm: Callable[[nn.Module], nn.Module]) -> nn.Module:
    return nn.Sequential(norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4), nn.Flatten())


@pytest.mark.parametrize("norm", [nn.utils.spectral_norm, nn.utils.weight_norm, lambda layer: layer], ids=str)
def test_weights_that_are_computed_anew_are_left_alone(norm: Callable[[nn.Module], nn.Module]) -> None:
    for model in (normed(norm).eval(), ByKeyword().eval()):
        x = images().float()
        view = fold(model, x)
        if view is not None:
            torch.testing.assert_close(view(x), model(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "model", [Depends(), Noisy(), Hidden(), Purifying(), Detached()], ids=lambda m: type(m).__name__
)
def test_no_view_that_computes_something_else(model: nn.Module) -> None:
    view = fold(model.eval(), images().float())
    if view is not None:
        torch.testing.assert_close(view(images().float()), model(images().float()))
        torch.testing.assert_close(gradient(view, images().float()), gradient(model, images().float()))
    if not isinstance(model, Hidden):
        assert view is None


def test_faithful_looks_at_logits_and_gradients() -> None:
    model, x = network("smallcnn").eval(), images()
    x = torch.nn.functional.interpolate(x, 16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.2, 0.2)
    assert faithful(model, model, x)
    assert not faithful(nn.Sequential(model, nn.ReLU()), model, x)

    class Deaf(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return model(x.detach()) + 0 * x.sum()

    assert not faithful(Deaf(), model, x)

    class Watched(nn.Module):
        """Gives other logits, of the same gradient, to those who ask for one, or to those who don't."""

        def __init__(self, asks: bool) -> None:
            super().__init__()
            self.asks = asks

        def forward(self, x: Tensor) -> Tensor:
            return model(x) + float(torch.is_grad_enabled() == self.asks)

    for asks in (True, False):
        assert not faithful(Watched(asks), model, x)


def test_tracing_leaves_nothing_behind() -> None:
    """Neither a tensor that the pass makes, nor a note that it takes."""

    class Notes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution, self.norm, self.seen = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), None

        def forward(self, images: Tensor) -> Tensor:
            self.seen = images
            return self.norm(self.convolution(images * torch.tensor(2.0))).mean((2, 3))

    model = Notes().eval()
    before = dict(vars(model))
    network = FoldedNetwork(model)
    assert vars(model) == before
    images = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(network(images), model(images))
