"""Architectures, the normalisation inside them, starting weights and the frozen backbone."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from urllib.error import URLError

import pytest
import safetensors.torch
import torch
import torchvision
from torch import nn

from dtrades_fast import models
from dtrades_fast.models.folding import fold
from dtrades_fast.models.pooling import MaxPool2d, max_pool2d
from dtrades_fast.models.weights import freeze_backbone, load_init_weights

NO_NORMALIZATION = {1: ((0.0,), (1.0,)), 3: ((0.0,) * 3, (1.0,) * 3)}


def make(arch: str = "resnet18", channels: int = 3, size: int = 32, width: int | None = 8, classes: int = 10):
    torch.manual_seed(0)
    mean, std = NO_NORMALIZATION[channels]
    return models.create(
        arch, num_classes=classes, in_channels=channels, image_size=size, width=width, mean=mean, std=std
    )


def shapes(state) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in state.items()}


@pytest.fixture(scope="module")
def imagenet_like():
    """torchvision's ResNet-18 with random weights: the file that ImageNet weights would be."""
    torch.manual_seed(1)
    return torchvision.models.resnet18(weights=None).state_dict()


@pytest.mark.parametrize("width", [8, 12])
@pytest.mark.parametrize("size", [16, 28, 32, 48])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("arch", models.names())
def test_logits_and_gradients_at_every_shape(arch, channels, size, width):
    model = make(arch, channels, size, width, classes=7)
    logits = model(torch.rand(2, channels, size, size))
    assert logits.shape == (2, 7)
    nn.functional.cross_entropy(logits, torch.tensor([0, 6])).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert not any("model." in key or "module." in key for key in model.state_dict())


@pytest.mark.parametrize("arch", models.names())
def test_width_scales_every_layer_and_none_is_the_published_width(arch):
    published = {"resnet18": 64, "preactresnet18": 64, "vgg16": 64, "smallcnn": 32, "wrn34_10": 160}[arch]
    assert shapes(make(arch, width=None).state_dict()) == shapes(make(arch, width=published).state_dict())
    first = [next(p for p in make(arch, width=width).parameters()).shape[0] for width in (8, 16)]
    assert first == [8, 16]
    ratio = models.parameter_count(make(arch, width=32)) / models.parameter_count(make(arch, width=16))
    assert 3.5 < ratio < 4.1  # quadratic in the width


def test_wide_networks_have_the_published_parameter_counts():
    assert models.parameter_count(make("preactresnet18", width=None)) == 11_172_170  # 11,171,146 and the last BatchNorm
    assert models.parameter_count(make("wrn34_10", width=None)) == 46_160_474  # Zagoruyko and Komodakis: 46.2 M


def test_resnet18_is_torchvisions_but_for_stem_and_head():
    ours = shapes(make("resnet18", width=None).network.state_dict())
    theirs = shapes(torchvision.models.resnet18(weights=None).state_dict())
    assert list(ours) == list(theirs)
    assert {key for key in ours if ours[key] != theirs[key]} == {"conv1.weight", "fc.weight", "fc.bias"}
    assert ours["conv1.weight"] == (64, 3, 3, 3)


def test_resnet18_computes_what_torchvisions_does_behind_the_stem():
    ours = make("resnet18", width=None).network.eval()
    theirs = torchvision.models.resnet18(weights=None, num_classes=10).eval()
    theirs.conv1, theirs.maxpool = ours.conv1, nn.Identity()
    theirs.load_state_dict(ours.state_dict())
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(ours(images), theirs(images))


def test_vgg16_features_are_torchvisions():
    ours = make("vgg16", width=None).network
    theirs = torchvision.models.vgg16_bn(weights=None, init_weights=False).features
    assert shapes(ours.features.state_dict()) == shapes(theirs.state_dict())
    theirs.load_state_dict(ours.features.state_dict())
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(ours.eval().features(images), theirs.eval()(images))


def test_vgg16_at_28_pixels_uses_the_whole_image():
    model = make("vgg16", 1, 28).eval()
    images = torch.rand(1, 1, 28, 28, requires_grad=True)
    assert model.network.features(images).shape[2:] == (1, 1)
    model(images)[0, 0].backward()
    reached = images.grad[0, 0] != 0
    assert reached[0].any()
    assert reached[-1].any()
    assert reached[:, 0].any()
    assert reached[:, -1].any()


def test_smallcnn_is_the_published_one():
    model = make("smallcnn", 1, 28, None)
    assert models.parameter_count(model) == 312_202
    state = model.network.state_dict()
    assert tuple(state["feature_extractor.conv4.weight"].shape) == (64, 64, 3, 3)
    assert tuple(state["classifier.fc1.weight"].shape) == (200, 64 * 4 * 4)
    for name in ("classifier.fc3.weight", "classifier.fc3.bias", "feature_extractor.conv2.bias"):
        assert not state[name].any()
    kaiming_normal = (2 / (32 * 9)) ** 0.5
    assert state["feature_extractor.conv2.weight"].std().item() == pytest.approx(kaiming_normal, rel=0.05)
    dropouts = [layer.p for layer in model.modules() if isinstance(layer, nn.Dropout)]
    assert dropouts == [0.5]


def test_normalisation_is_inside():
    mean, std = (0.1, 0.2, 0.3), (0.5, 0.6, 0.7)
    model = models.create("resnet18", num_classes=10, in_channels=3, image_size=32, width=8, mean=mean, std=std).eval()
    images = torch.rand(4, 3, 32, 32)
    by_hand = torchvision.transforms.functional.normalize(images, mean, std)
    assert torch.equal(model(images), model.network(by_hand))
    assert {"normalize.mean", "normalize.std"} <= set(model.state_dict())


def test_no_normalisation_leaves_every_bit():
    images = torch.rand(4, 3, 32, 32)
    assert torch.equal(make().normalize(images), images)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"arch": "resnet19"},
            "unknown architecture 'resnet19'; known are preactresnet18, resnet18, smallcnn, vgg16, wrn34_10",
        ),
        ({"num_classes": 1}, "num_classes must be at least 2, got 1"),
        ({"in_channels": 2}, "in_channels must be 1 .* or 3 .*, got 2"),
        ({"image_size": 8}, "image_size must be at least 16 pixels, got 8"),
        ({"width": 0}, "width must be at least 1"),
        ({"mean": (0.5,)}, "one number for each of the 3 channels"),
        ({"std": (1.0, 1.0)}, "one number per channel each"),
        ({"std": (1.0, 0.0, 1.0)}, "every std > 0"),
    ],
)
def test_wrong_arguments_are_explained(change, message):
    arguments = {
        "arch": "resnet18",
        "num_classes": 10,
        "in_channels": 3,
        "image_size": 32,
        "width": 8,
        "mean": (0.0,) * 3,
        "std": (1.0,) * 3,
    } | change
    with pytest.raises(ValueError, match=message):
        models.create(arguments.pop("arch"), **arguments)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("prefix", ["", "module.", "model.", "module.model."])
def test_imagenet_like_weights_load_what_fits(tmp_path, imagenet_like, suffix, prefix):
    file = tmp_path / f"weights{suffix}"
    state = {prefix + key: tensor for key, tensor in imagenet_like.items()} | {f"{prefix}extra": torch.zeros(2)}
    safetensors.torch.save_file(state, file) if suffix == ".safetensors" else torch.save(state, file)
    model = make(width=None)
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    report = load_init_weights(model, file, "resnet18")

    assert [text.split(":")[0].removeprefix("network.") for text in sorted(report.mismatched)] == [
        "conv1.weight",
        "fc.bias",
        "fc.weight",
    ]
    assert "network.fc.weight: file [1000, 512], model [10, 512]" in report.mismatched
    assert report.unexpected == (f"{prefix}extra",)
    assert set(report.missing) == {"normalize.mean", "normalize.std"}
    assert set(report.loaded) == {f"network.{key}" for key in imagenet_like} - {
        "network.conv1.weight",
        "network.fc.weight",
        "network.fc.bias",
    }
    for key, tensor in model.state_dict().items():
        expected = imagenet_like[key.removeprefix("network.")] if key in report.loaded else before[key]
        assert torch.equal(tensor, expected), key


@pytest.mark.parametrize("container", ["state_dict", "model", "model_state_dict"])
def test_own_checkpoint_loads_completely_with_its_normalisation(tmp_path, container):
    trained = models.create("smallcnn", num_classes=10, in_channels=1, image_size=28, width=8, mean=(0.13,), std=(0.3,))
    torch.save({container: trained.state_dict(), "epoch": 3}, tmp_path / "last.pt")
    model = make("smallcnn", 1, 28)
    report = load_init_weights(model, tmp_path / "last.pt", "smallcnn")
    assert not (report.missing)
    assert not (report.unexpected)
    assert not report.mismatched
    assert all(
        torch.equal(a, b) for a, b in zip(model.state_dict().values(), trained.state_dict().values(), strict=True)
    )


def test_a_middle_part_of_a_key_is_not_stripped(tmp_path):
    state = {"backbone.module.conv1.weight": torch.zeros(8, 3, 3, 3), **make().network.state_dict()}
    torch.save(state, tmp_path / "weights.pt")
    assert load_init_weights(make(), tmp_path / "weights.pt", "resnet18").unexpected == (
        "backbone.module.conv1.weight",
    )


def test_a_key_given_twice_is_refused(tmp_path):
    state = make().network.state_dict()
    torch.save({**state, "module.fc.weight": state["fc.weight"]}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=r"'network.fc.weight' twice, once as 'module.fc.weight'"):
        load_init_weights(make(), tmp_path / "weights.pt", "resnet18")


def test_nothing_fits_is_an_error_that_leaves_the_model_alone(tmp_path):
    """At another width, biases of the head and BatchNorm counters still fit: they must not count as a success."""
    torch.save(make(width=16).state_dict(), tmp_path / "wide.pt")
    model = make(width=8)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"network.conv1.weight: file \[16, 3, 3, 3\], model \[8, 3, 3, 3\]"):
        load_init_weights(model, tmp_path / "wide.pt", "resnet18")
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


class _Payload:
    def __init__(self, evidence: Path) -> None:
        self.evidence = evidence

    def __reduce__(self):
        return (Path.touch, (self.evidence,))


def test_a_pickle_payload_never_runs(tmp_path):
    evidence = tmp_path / "ran"
    torch.save({"state_dict": make().state_dict(), "payload": _Payload(evidence)}, tmp_path / "zip.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(_Payload(evidence), protocol=2))
    for name in ("zip.pt", "plain.pt"):
        with pytest.raises(ValueError, match="could run code"):
            load_init_weights(make(), tmp_path / name, "resnet18")
    assert not evidence.exists()
    pickle.loads((tmp_path / "plain.pt").read_bytes())
    assert evidence.exists()  # it would have, had anything unpickled it


def test_files_that_are_no_weights_are_explained(tmp_path):
    torch.save({"net": make().state_dict(), "acc": 0.9}, tmp_path / "other.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    whole = tmp_path / "whole.pt"
    torch.save(make().state_dict(), whole)
    (tmp_path / "cut.pt").write_bytes(whole.read_bytes()[:5000])
    (tmp_path / "empty.pt").touch()
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    for name, message in {
        "other.pt": r"keys \['net', 'acc'\].*state_dict, model, model_state_dict",
        "list.pt": "holds list",
        "cut.pt": "damaged",
        "empty.pt": "damaged",
        "cut.safetensors": "damaged",
    }.items():
        with pytest.raises(ValueError, match=message):
            load_init_weights(make(), tmp_path / name, "resnet18")
    with pytest.raises(FileNotFoundError, match=r"no weights at .*absent.pt"):
        load_init_weights(make(), tmp_path / "absent.pt", "resnet18")


def test_imagenet_offline_names_the_file(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no network") as caught:
        load_init_weights(make(), "imagenet", "resnet18")
    url = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url
    assert str(tmp_path / "hub" / "checkpoints" / url.rsplit("/", 1)[1]) in str(caught.value)
    assert url in str(caught.value)
    with pytest.raises(ValueError, match="no ImageNet weights exist for 'smallcnn', only for resnet18, vgg16"):
        load_init_weights(make("smallcnn"), "imagenet", "smallcnn")


def test_imagenet_weights_load_from_the_hub_folder(tmp_path, monkeypatch, imagenet_like):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    url = torchvision.models.ResNet18_Weights.IMAGENET1K_V1.url
    file = tmp_path / "hub" / "checkpoints" / url.rsplit("/", 1)[1]
    file.parent.mkdir(parents=True)
    torch.save(imagenet_like, file)
    model = make(width=None)
    assert len(load_init_weights(model, "imagenet", "resnet18").mismatched) == 3
    assert torch.equal(model.network.layer4[1].conv2.weight, imagenet_like["layer4.1.conv2.weight"])
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(FileNotFoundError, match="damaged at"):
        load_init_weights(model, "imagenet", "resnet18")


@pytest.mark.parametrize("arch", models.names())
def test_frozen_backbone_trains_the_head_alone(arch):
    model = make(arch)
    freeze_backbone(model)
    assert [p for p in model.parameters() if p.requires_grad] == [model.head.weight, model.head.bias]
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)
    model.eval()
    model.train()
    assert model.training
    assert model.head.training
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(torch.rand(4, 3, 32, 32)), torch.arange(4)).backward()
        optimizer.step()
    changed = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
    head = {id(model.head.weight), id(model.head.bias)}
    assert changed == {name for name, p in model.named_parameters() if id(p) in head}


def test_without_freezing_batchnorm_does_move():
    model = make().train()
    before = model.network.bn1.running_mean.clone()
    model(torch.rand(4, 3, 32, 32))
    assert not torch.equal(model.network.bn1.running_mean, before)


# ---- pooling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("pixels", "ceil_mode"), [(8, False), (7, False), (7, True), (1, True)])
def test_compiled_pooling_is_pytorchs(memory_format: torch.memory_format, pixels: int, ceil_mode: bool) -> None:
    """Values and gradient, ties included; the compiler sees one opaque operator."""
    torch._dynamo.reset()
    pool = MaxPool2d(2, ceil_mode=ceil_mode)
    images = torch.randn(3, 4, pixels, pixels, dtype=torch.float64).relu().contiguous(memory_format=memory_format)
    images.requires_grad_()
    torch.library.opcheck(max_pool2d, (images, 2, ceil_mode))
    graphs: list[torch.fx.GraphModule] = []

    def note(graph: torch.fx.GraphModule, _: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    expected = torch.nn.functional.max_pool2d(images, 2, ceil_mode=ceil_mode)
    for backend in (note, "inductor"):
        got = torch.compile(pool, fullgraph=True, backend=backend)(images)
        assert torch.equal(got, expected)
        (gradient,) = torch.autograd.grad(got.square().sum(), images)
        (wanted,) = torch.autograd.grad(expected.square().sum(), images, retain_graph=True)
        assert torch.equal(gradient, wanted)
    assert any(node.target is torch.ops.dtrades_fast.max_pool2d.default for node in graphs[0].graph.nodes)
    assert torch.equal(pool(images), expected)


@pytest.mark.parametrize(("arch", "count"), [("vgg16", 5), ("smallcnn", 2)])
def test_folding_keeps_the_pooling(arch: str, count: int) -> None:
    folded = fold(make(arch).eval(), torch.rand(2, 3, 32, 32))
    assert folded is not None
    assert sum(isinstance(layer, MaxPool2d) for layer in folded.modules()) == count
    assert not any("max_pool2d" in str(node.target) for node in folded.network.graph.nodes)
