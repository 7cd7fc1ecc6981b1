"""Targets: runs, files of others and networks in Python become the networks that they are, or a clear refusal."""

from __future__ import annotations

import copy
import hashlib
import pickle
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import tiny_run
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtrades_fast import models
from dtrades_fast.evaluation.targets import find_run, load_run, load_target
from dtrades_fast.training import checkpoint
from dtrades_fast.training.run_folder import RunFolder

pytestmark = pytest.mark.usefixtures("one_thread")

MEAN, STD = (0.49, 0.48, 0.45), (0.25, 0.24, 0.26)


# Networks as others publish them: what is tested is that ours compute the same from their state dicts


def conv(channels: int, out: int, size: int = 3, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(channels, out, size, stride, size // 2, bias=False)


class KuangLiuBlock(nn.Module):
    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = conv(channels, out, 3, stride), nn.BatchNorm2d(out)
        self.conv2, self.bn2 = conv(out, out), nn.BatchNorm2d(out)
        changes = stride != 1 or channels != out
        self.shortcut = (
            nn.Sequential(conv(channels, out, 1, stride), nn.BatchNorm2d(out)) if changes else nn.Sequential()
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))) + self.shortcut(x))


class PreActBlock(nn.Module):
    """``input_shortcut`` as in Wong et al. 2020, otherwise as in Rice et al. 2020."""

    def __init__(self, channels: int, out: int, stride: int, input_shortcut: bool) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(channels), conv(channels, out, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(out), conv(out, out)
        self.input_shortcut = input_shortcut
        if stride != 1 or channels != out:
            self.shortcut = nn.Sequential(conv(channels, out, 1, stride))

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        side = self.shortcut(x if self.input_shortcut else active) if hasattr(self, "shortcut") else x
        return side + self.conv2(F.relu(self.bn2(self.conv1(active))))


class Stages(nn.Module):
    """Four stages of two blocks, ``linear`` at the end."""

    def __init__(self, block: Callable[[int, int, int], nn.Module], width: int, channels: int, classes: int) -> None:
        super().__init__()
        self.conv1 = conv(channels, width)
        before = width
        for i in range(4):
            out, stride = width * 2**i, 1 if i == 0 else 2
            setattr(self, f"layer{i + 1}", nn.Sequential(block(before, out, stride), block(out, out, 1)))
            before = out
        self.linear = nn.Linear(before, classes)

    def head(self, x: Tensor) -> Tensor:
        return self.linear(F.avg_pool2d(x, 4).flatten(1))

    def stages(self, x: Tensor) -> Tensor:
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


class KuangLiuResNet(Stages):
    def __init__(self, width: int = 4, channels: int = 3, classes: int = 10) -> None:
        super().__init__(KuangLiuBlock, width, channels, classes)
        self.bn1 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(F.relu(self.bn1(self.conv1(x)))))


class PreActResNet(Stages):
    def __init__(self, *, last_bn: bool, input_shortcut: bool, width: int = 4) -> None:
        super().__init__(lambda a, b, stride: PreActBlock(a, b, stride, input_shortcut), width, 3, 10)
        if last_bn:
            self.bn = nn.BatchNorm2d(8 * width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(self.conv1(x))
        return self.head(F.relu(self.bn(x)) if hasattr(self, "bn") else x)


class WideBlock(nn.Module):
    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(channels), conv(channels, out, 3, stride)
        self.bn2, self.conv2 = nn.BatchNorm2d(out), conv(out, out)
        if channels != out:
            self.convShortcut = conv(channels, out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.bn1(x))
        side = self.convShortcut(active) if hasattr(self, "convShortcut") else x
        return side + self.conv2(F.relu(self.bn2(self.conv1(active))))


class WideStage(nn.Module):
    def __init__(self, channels: int, out: int, stride: int, blocks: int) -> None:
        super().__init__()
        rest = [WideBlock(out, out, 1) for _ in range(blocks - 1)]
        self.layer = nn.Sequential(WideBlock(channels, out, stride), *rest)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class WideResNet(nn.Module):
    """TRADES' own also has a ``sub_block1`` that it never calls."""

    def __init__(self, *, blocks: int = 5, width: int = 4, stem: int = 4, sub_block: bool = True) -> None:
        super().__init__()
        self.conv1 = conv(3, stem)
        self.block1 = WideStage(stem, width, 1, blocks)
        if sub_block:
            self.sub_block1 = WideStage(stem, width, 1, blocks)
        self.block2 = WideStage(width, 2 * width, 2, blocks)
        self.block3 = WideStage(2 * width, 4 * width, 2, blocks)
        self.bn1 = nn.BatchNorm2d(4 * width)
        self.fc = nn.Linear(4 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(F.avg_pool2d(F.relu(self.bn1(x)), 8).flatten(1))


def alive(make: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """In eval mode, with BatchNorm that does something."""
    torch.manual_seed(seed)
    model = make().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            for tensor, low, high in (
                (module.running_mean, -0.2, 0.2),
                (module.running_var, 0.5, 1.5),
                (module.weight, 0.5, 1.5),
                (module.bias, -0.3, 0.3),
            ):
                nn.init.uniform_(tensor, low, high)
    return model


def pictures(channels: int = 3, size: int = 32) -> Tensor:
    return torch.rand(3, channels, size, size, generator=torch.Generator().manual_seed(5))


def normalised(x: Tensor) -> Tensor:
    return (x - torch.tensor(MEAN).view(1, 3, 1, 1)) / torch.tensor(STD).view(1, 3, 1, 1)


def prefixed(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def assert_computes(target_model: nn.Module, expected: Tensor, images: Tensor) -> None:
    assert not target_model.training
    with torch.no_grad():
        assert expected.std() > 1e-3
        torch.testing.assert_close(target_model(images), expected, rtol=1e-4, atol=1e-5)


FOREIGN: dict[str, tuple[Callable[[], nn.Module], str, dict[str, object]]] = {
    "kuangliu": (KuangLiuResNet, "resnet18", {}),
    "kuangliu grey": (lambda: KuangLiuResNet(channels=1, classes=7), "resnet18", {}),
    "preact": (lambda: PreActResNet(last_bn=True, input_shortcut=False), "preactresnet18", {}),
    "preact without bn": (lambda: PreActResNet(last_bn=False, input_shortcut=False), "preactresnet18", {}),
    "preact of Wong": (
        lambda: PreActResNet(last_bn=False, input_shortcut=True),
        "preactresnet18",
        {"preact_shortcut": "input"},
    ),
    "trades wrn": (WideResNet, "wrn34_10", {}),
    "mart wrn": (lambda: WideResNet(sub_block=False), "wrn34_10", {}),
    "rst wrn": (lambda: WideResNet(blocks=4, width=32, stem=16), "wrn28_2", {}),
    "trades small cnn": (
        lambda: trained("smallcnn", None, 1, 28).network,
        "smallcnn",
        {},
    ),
    "kuangliu vgg": (lambda: trained("vgg16", 4, 3, 32).network, "vgg16", {}),
}


def trained(arch: str, width: int | None, channels: int, size: int) -> models.Classifier:
    model = models.create(
        arch,
        num_classes=10,
        in_channels=channels,
        image_size=size,
        width=width,
        mean=(0.0,) * channels,
        std=(1.0,) * channels,
    )
    nn.init.normal_(model.head.weight)
    return model


@pytest.mark.parametrize(("make", "arch", "options"), FOREIGN.values(), ids=FOREIGN)
def test_networks_of_others_compute_the_same(
    make: Callable[[], nn.Module], arch: str, options: dict[str, object], tmp_path: Path
) -> None:
    theirs = alive(make)
    torch.save({"state_dict": prefixed(theirs.state_dict(), "module."), "epoch": 76}, tmp_path / "net.pt")
    random = torch.get_rng_state()
    target = load_target(tmp_path / "net.pt", **options)  # type: ignore[arg-type]
    assert torch.equal(torch.get_rng_state(), random)
    channels = next(theirs.parameters()).shape[1]
    images = pictures(channels, 28 if arch == "smallcnn" else 32)
    with torch.no_grad():
        assert_computes(target.model, theirs(images), images)
    assert (target.arch, target.classes, target.name) == (
        arch,
        7 if channels == 1 and arch == "resnet18" else 10,
        "net",
    )
    assert target.sha256 == hashlib.sha256((tmp_path / "net.pt").read_bytes()).hexdigest()
    assert "normalisation: none" in " ".join(target.notes)
    assert any("sub_block1" in note for note in target.notes) == any(
        "sub_block1" in name for name in theirs.state_dict()
    )
    assert any("preact_shortcut" in note for note in target.notes) == (arch == "preactresnet18")


def test_what_preact_shortcuts_see_matters(tmp_path: Path) -> None:
    theirs = alive(lambda: PreActResNet(last_bn=True, input_shortcut=True))
    torch.save(theirs.state_dict(), tmp_path / "net.pt")
    with torch.no_grad():
        wrong, right = (
            load_target(tmp_path / "net.pt", preact_shortcut=seen).model(pictures())  # type: ignore[arg-type]
            for seen in ("activated", "input")
        )
        assert (right - theirs(pictures())).abs().max() < 1e-4 < (wrong - right).abs().max()


CONTAINERS: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "raw": lambda s: s,
    "state_dict": lambda s: {"state_dict": s, "epoch": 1},
    "module": lambda s: prefixed(s, "module."),
    "module.model": lambda s: {"state_dict": prefixed(s, "module.model.")},
    "net": lambda s: {"net": prefixed(s, "module."), "acc": 93.0},
    "weight average": lambda s: {**prefixed(s, "module."), "n_averaged": torch.tensor(5)},
    "profiled": lambda s: {**s, "total_ops": torch.zeros(1), "layer1.0.total_params": torch.zeros(1)},
    "before batch counters": lambda s: {k: v for k, v in s.items() if not k.endswith("num_batches_tracked")},
}
NORMALISED: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "robustbench mu and sigma": lambda s: {**s, "mu": column(MEAN), "sigma": column(STD)},
    "robustbench wrapper": lambda s: {
        "state_dict": {"normalize.mean": column(MEAN), "normalize.std": column(STD), **prefixed(s, "model.")}
    },
    "sequential": lambda s: {"0.mean": torch.tensor(MEAN), "0.std": torch.tensor(STD), **prefixed(s, "1.")},
    "mair": lambda s: {
        "rmodel": {
            "n_classes": torch.tensor(10),
            "mean": torch.tensor(MEAN),
            "std": torch.tensor(STD),
            **prefixed(s, "model."),
        },
        "record_info": {"Epoch": 1},
    },
    "mair add_normalize": lambda s: {
        "rmodel": {
            "n_classes": torch.tensor(10),
            "model.0.mean": torch.tensor(MEAN),
            "model.0.std": torch.tensor(STD),
            **prefixed(s, "model.1."),
        }
    },
}


def column(numbers: tuple[float, ...]) -> Tensor:
    return torch.tensor(numbers).view(1, 3, 1, 1)


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    return alive(KuangLiuResNet)


@pytest.mark.parametrize("wrap", CONTAINERS.values(), ids=CONTAINERS)
def test_what_is_put_around_a_state_dict(
    wrap: Callable[[dict[str, Tensor]], object], resnet: nn.Module, tmp_path: Path
) -> None:
    torch.save(wrap(resnet.state_dict()), tmp_path / "net.pth")
    images = pictures()
    with torch.no_grad():
        assert_computes(load_target(str(tmp_path / "net.pth")).model, resnet(images), images)


@pytest.mark.parametrize("wrap", NORMALISED.values(), ids=NORMALISED)
def test_normalisation_that_a_file_holds(
    wrap: Callable[[dict[str, Tensor]], object], resnet: nn.Module, tmp_path: Path
) -> None:
    torch.save(wrap(resnet.state_dict()), tmp_path / "net.tar")
    target = load_target(tmp_path / "net.tar")
    images = pictures()
    with torch.no_grad():
        assert_computes(target.model, resnet(normalised(images)), images)
    assert any("mean 0.49, 0.48, 0.45" in note for note in target.notes)
    other = load_target(tmp_path / "net.tar", mean=[0.5], std=[0.5])
    with torch.no_grad():
        assert_computes(other.model, resnet(2 * images - 1), images)
    assert any("as given, instead of the file's own" in note for note in other.notes)


def test_normalisation_that_is_given(resnet: nn.Module, tmp_path: Path) -> None:
    torch.save(resnet.state_dict(), tmp_path / "net.pt")
    images = pictures()
    with torch.no_grad():
        assert_computes(load_target(tmp_path / "net.pt", mean=MEAN, std=STD).model, resnet(normalised(images)), images)
    for options, message in (
        ({"mean": MEAN}, "belong together"),
        ({"mean": (0.1, 0.2), "std": (1.0, 1.0)}, "one for each of the 3 channels .*, got 2"),
        ({"mean": MEAN, "std": (0.0, 1.0, 1.0)}, "every std > 0"),
    ):
        with pytest.raises(ValueError, match=message):
            load_target(tmp_path / "net.pt", **options)  # type: ignore[arg-type]
    twice = {"mu": column(MEAN), "sigma": column(STD), "0.mean": column(MEAN), "0.std": column(STD)}
    torch.save({**resnet.state_dict(), **twice}, tmp_path / "twice.pt")
    with pytest.raises(ValueError, match=r"several normalisations \(mu, 0.mean\): give mean and std"):
        load_target(tmp_path / "twice.pt")


def test_half_precision_is_computed_with_as_float32(resnet: nn.Module, tmp_path: Path) -> None:
    torch.save(copy.deepcopy(resnet).half().state_dict(), tmp_path / "net.pt")
    target = load_target(tmp_path / "net.pt")
    assert {tensor.dtype for tensor in target.model.parameters()} == {torch.float32}
    assert any("stored as float16" in note for note in target.notes)
    images = pictures()
    with torch.no_grad():
        torch.testing.assert_close(target.model(images), resnet(images), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("arch", models.names())
@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_files_of_this_package_come_back_to_the_bit(arch: str, kind: str, tmp_path: Path) -> None:
    own = alive(
        lambda: models.create(
            arch, num_classes=5, in_channels=3, image_size=32, width=16 if arch == "wrn34_10" else 8, mean=MEAN, std=STD
        )
    )
    nn.init.normal_(own.head.weight)
    file = tmp_path / f"own.{kind}"
    if kind == "pt":
        torch.save({"model": own.state_dict()}, file)
    else:
        checkpoint.save_weights(file, own.state_dict())
    target = load_target(file)
    assert (target.arch, target.classes) == (arch, 5)
    with torch.no_grad():
        assert torch.equal(target.model(pictures()), own(pictures()))
    assert not any("preact_shortcut" in note for note in target.notes)
    assert all(torch.equal(t, own.state_dict()[n]) for n, t in target.model.state_dict().items())


@pytest.mark.parametrize("size", [16, 20, 28, 32, 36])
def test_the_small_cnn_takes_the_images_that_it_was_made_for(size: int, tmp_path: Path) -> None:
    own = trained("smallcnn", 8, 1, size).eval()
    torch.save(own.state_dict(), tmp_path / "own.pt")
    images = pictures(1, size)
    with torch.no_grad():
        assert torch.equal(load_target(tmp_path / "own.pt").model(images), own(images))


def test_a_file_that_fits_nothing_is_explained(resnet: nn.Module, tmp_path: Path) -> None:
    state = dict(resnet.state_dict())
    del state["layer3.0.conv1.weight"]
    state["layer2.1.conv2.weight"] = torch.zeros(8, 8, 5, 5)
    state["layer4.2.conv1.weight"] = torch.zeros(1)
    torch.save(prefixed(state, "module."), tmp_path / "net.pt")
    with pytest.raises(ValueError) as caught:
        load_target(tmp_path / "net.pt")
    message = str(caught.value)
    assert "known networks (preactresnet18, resnet18, smallcnn, vgg16, wrn34_10)" in message
    assert "Closest is resnet18 (width 4, 10 classes, 3 channels)" in message
    assert "missing layer3.0.conv1.weight; not in the network module.layer4.2.conv1.weight" in message
    assert "module.layer2.1.conv2.weight [8, 8, 5, 5] instead of [8, 8, 3, 3]" in message
    assert "nn.Module" in message

    torch.save(resnet.state_dict(), tmp_path / "net.pt")
    with pytest.raises(ValueError, match=r"does not fit vgg16.*missing features.0.weight.*and \d+ more"):
        load_target(tmp_path / "net.pt", arch="vgg16")
    with pytest.raises(ValueError, match=r"conv1.weight \[4, 3, 3, 3\] instead of \[8, 3, 3, 3\]"):
        load_target(tmp_path / "net.pt", arch="resnet18", width=8)
    with pytest.raises(ValueError, match="unknown architecture 'resnet50'; known are preactresnet18"):
        load_target(tmp_path / "net.pt", arch="resnet50")
    with pytest.raises(ValueError, match="'activated' or 'input', got 'none'"):
        load_target(tmp_path / "net.pt", preact_shortcut="none")  # type: ignore[arg-type]


def test_every_tensor_counts(resnet: nn.Module, tmp_path: Path) -> None:
    """Whichever is missing or in addition, the file is refused."""
    state = resnet.state_dict()
    for name in ("conv1.weight", "bn1.running_var", "layer2.0.shortcut.1.bias", "linear.bias"):
        torch.save({k: v for k, v in state.items() if k != name}, tmp_path / "less.pt")
        with pytest.raises(ValueError, match="missing"):
            load_target(tmp_path / "less.pt")
    torch.save({**state, "gate.weight": torch.zeros(4)}, tmp_path / "more.pt")
    with pytest.raises(ValueError, match=r"not in the network gate.weight"):
        load_target(tmp_path / "more.pt")


class Payload:
    def __init__(self, evidence: Path) -> None:
        self.evidence = evidence

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.evidence,))


def test_files_that_are_no_weights(tmp_path: Path) -> None:
    torch.save({"state_dict": {}, "payload": Payload(tmp_path / "ran")}, tmp_path / "code.pt")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(Payload(tmp_path / "ran"), protocol=2))
    (tmp_path / "damaged.pt").write_bytes(b"PK\x03\x04 nothing")
    (tmp_path / "damaged.safetensors").write_bytes(b"nothing")
    torch.save({"epoch": 3}, tmp_path / "none.pt")
    for name, message in {
        "code.pt": "could run code",
        "plain.pth": "could run code",
        "damaged.pt": "damaged",
        "damaged.safetensors": "damaged",
        "none.pt": r"a dict with the keys \['epoch'\]; expected .* state_dict, model, model_state_dict, rmodel, net",
    }.items():
        with pytest.raises(ValueError, match=message):
            load_target(tmp_path / name)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(FileNotFoundError, match=r"no file .*gone.pt: give a file of weights, a run folder or a run's"):
        load_target(tmp_path / "gone.pt")
    with pytest.raises(FileNotFoundError, match=r"gone is no run folder .*; runs in .*: none"):
        load_target("gone", runs_dir=tmp_path)


def test_a_network_in_python(resnet: nn.Module) -> None:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = resnet

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(2 * x - 1)

    model = Wrapped().train()
    target = load_target(model, dataset="cifar10")
    assert target.model is model
    assert not any(module.training for module in model.modules())
    assert (target.name, target.arch, target.classes, target.dataset) == ("Wrapped", "Wrapped", None, "cifar10")
    again = load_target(copy.deepcopy(model), name="mine")
    assert again.name == "mine"
    assert again.sha256 == target.sha256
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.inner.linear.bias[0] += 1e-6
    assert load_target(changed).sha256 != target.sha256
    own = trained("smallcnn", 4, 1, 16)
    assert (load_target(own).classes, load_target(own).arch) == (10, "SmallCNN")
    with pytest.raises(ValueError, match="arch, mean describe a file of weights and cannot be given for a network"):
        load_target(model, arch="resnet18", mean=MEAN)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    images = tiny_run.images(tmp_path_factory.mktemp("images"))
    return tiny_run.run(images, tmp_path_factory.mktemp("runs"), "--lr", "0.05", "--method", "trades")[0]


def test_a_run(run: RunFolder) -> None:
    for epoch, file in (("best", run.best_weights), ("last", run.weights)):
        trained_run = load_run(run, epoch, None, "cpu", None)  # type: ignore[arg-type]
        images = trained_run.sets.test.images(slice(None))
        for spec in (run.path, str(run.path), run.path.name):
            target = load_target(spec, runs_dir=run.path.parent, epoch=epoch)  # type: ignore[arg-type]
            assert torch.equal(target.model(images), trained_run.model(images))
            assert target.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()
        assert (target.name, target.arch, target.classes, target.epsilon) == (run.path.name, "smallcnn", 3, "8/255")
        assert target.folder is not None
        assert target.folder.path == find_run(str(run.path), "").path
        assert target.config is not None
        assert target.dataset == target.config.data.dataset
        assert f"{epoch} epoch" in target.source
    assert torch.equal(load_target(run.last).model(images), target.model(images))  # a full state is a file of weights
    with pytest.raises(ValueError, match="width describe a file of weights and cannot be given for run"):
        load_target(run.path, width=8)


def test_a_run_without_its_data(run: RunFolder, tmp_path: Path) -> None:
    """The folder alone will do: normalisation and classes are in the weights."""
    moved = RunFolder(tmp_path / "moved")
    moved.path.mkdir()
    moved.config.write_text(re.sub(r"folder:\S+", "folder:/nowhere", run.config.read_text()))
    with pytest.raises(FileNotFoundError, match="has not finished its first epoch"):
        load_target(moved.path)
    moved.best_weights.write_bytes(b"nothing")
    with pytest.raises(RuntimeError, match="is damaged"):
        load_target(moved.path)
    moved.best_weights.write_bytes(run.best_weights.read_bytes())
    images = pictures(3, 16)
    with torch.no_grad():
        assert torch.equal(load_target(moved.path).model(images), load_target(run.path).model(images))
    moved.config.write_text(moved.config.read_text().replace("width: 2", "width: 4"))
    with pytest.raises(ValueError, match="does not fit smallcnn"):
        load_target(moved.path)
