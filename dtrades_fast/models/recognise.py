"""From a state dict that others have saved to one of the networks here: by the names and shapes of its tensors.

Known are the names of this package, of torchvision, of the CIFAR networks of Kuang Liu's pytorch-cifar, of TRADES'
WideResNet and small CNN, and what RobustBench, MAIR and ``DataParallel`` put around them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Literal

import torch
from torch import Tensor, nn

from dtrades_fast import models
from dtrades_fast.models.normalize import Classifier, Normalize
from dtrades_fast.models.preactresnet18 import PreActBlock, preact_stage

__all__ = ["Recognised", "Shortcut", "recognise"]

Shortcut = Literal["activated", "input"]

#: Entries of a state dict that no forward pass uses.
_UNUSED = re.compile(r"(^|\.)(n_classes|n_averaged|total_ops|total_params|sub_block1\..*)$")
#: Names under which a network keeps the mean of its normalisation, and those of the deviation beside it.
_NORMALISATION = {"mean": "std", "mu": "sigma"}
_LISTED = 4  #: tensors of each kind that an error names


@dataclass(frozen=True)
class _Layout:
    """Which tensors tell the size of an architecture, and what others call its tensors.

    Attributes:
        stem: the convolution that sees the image.
        width: the one whose output channels are the width.
        head: the last linear layer.
        renames: (pattern, replacement) that lead from others' names to ours.
    """

    stem: str
    width: str
    head: str
    renames: tuple[tuple[str, str], ...] = ()


_LAYOUTS = {
    "resnet18": _Layout(
        "conv1.weight",
        "conv1.weight",
        "fc.weight",
        ((r"\.shortcut\.([01])\.", r".downsample.\1."), (r"^linear\.", "fc.")),
    ),
    "preactresnet18": _Layout(
        "conv1.weight", "conv1.weight", "fc.weight", ((r"\.shortcut\.0\.", ".shortcut."), (r"^linear\.", "fc."))
    ),
    "wrn34_10": _Layout(
        "conv1.weight",
        "block1.0.conv1.weight",
        "fc.weight",
        ((r"^(block\d)\.layer\.", r"\1."), (r"\.convShortcut\.", ".shortcut.")),
    ),
    "vgg16": _Layout("features.0.weight", "features.0.weight", "classifier.weight"),
    "smallcnn": _Layout("feature_extractor.conv1.weight", "feature_extractor.conv1.weight", "classifier.fc3.weight"),
}


@dataclass(frozen=True)
class Recognised:
    """A network and how it was found.

    Attributes:
        model: images in [0, 1] to logits, in eval mode, float32, on the CPU.
        arch: its architecture; a WideResNet of another depth than 34 has a name of its own, e.g. ``wrn28_10``.
        classes: number of logits.
        channels: of the images.
        notes: what was assumed or left out, a sentence each.
    """

    model: Classifier
    arch: str
    classes: int
    channels: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class _Fit:
    """A state dict held against one architecture.

    Attributes:
        arch: its name.
        label: the name with the size that the shapes tell.
        network: of that size, on the meta device.
        state: name in the network -> tensor.
        problems: by kind, what does not fit.
    """

    arch: str
    label: str
    network: nn.Module
    state: dict[str, Tensor]
    problems: dict[str, list[str]]

    @property
    def count(self) -> int:
        return sum(map(len, self.problems.values()))

    def __str__(self) -> str:
        parts = [f"{kind} {shortened(found)}" for kind, found in self.problems.items() if found]
        return f"{self.label}; {'; '.join(parts)}"


def recognise(
    state: Mapping[str, Tensor],
    source: str,
    *,
    arch: str | None = None,
    width: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    preact_shortcut: Shortcut = "activated",
) -> Recognised:
    """The network that a state dict belongs to, with its weights.

    Every weight of the network must be in the state dict and every tensor of it in the network, but for those that no
    forward pass uses. Torch's random state is not touched.

    Args:
        state: names to tensors.
        source: where it is from, for messages.
        arch: one of :func:`dtrades_fast.models.names`, ``wrn34_10`` for a WideResNet of any depth and width; by default
            the one that fits.
        width: channels of the first stage; by default what the shapes say.
        mean: what the network wants subtracted from images in [0, 1], one number or one per channel; by default what
            the state dict holds, or else 0.
        std: what it wants them divided by then; by default likewise, or 1.
        preact_shortcut: what the 1x1 shortcuts of a pre-activation ResNet see, which no name tells: the activated input
            (He et al. 2016) or the ``"input"`` itself.

    Raises:
        ValueError: no architecture fits, or not the one given; the message lists the first tensors that do not.
    """
    if arch is not None and arch not in _LAYOUTS:
        raise ValueError(f"unknown architecture {arch!r}; known are {', '.join(models.names())}")
    if preact_shortcut not in ("activated", "input"):
        raise ValueError(f"preact_shortcut must be 'activated' or 'input', got {preact_shortcut!r}")
    unused = [name for name in state if _UNUSED.search(name)]
    used = {name: tensor for name, tensor in state.items() if name not in unused}
    normalisation, assumed = _normalisation(used, source, mean, std)
    fits = [_fit(name, used, width) for name in ((arch,) if arch else models.names())]
    best = min(fits, key=lambda fit: fit.count)
    if best.count:
        raise ValueError(_no_fit(source, best, fits))
    notes = [f"{best.label}, {'as given' if arch else 'by the names and shapes of its tensors'}", assumed]
    if unused:
        notes.append(f"left out, since no forward pass uses them: {shortened(unused)}")
    kinds = {str(tensor.dtype).removeprefix("torch.") for tensor in used.values() if tensor.is_floating_point()}
    if kinds != {"float32"}:
        notes.append(f"weights that are stored as {', '.join(sorted(kinds))} are computed with as float32")
    if best.arch == "preactresnet18":
        for block in best.network.modules():
            if isinstance(block, PreActBlock):
                block.shortcut_of_input = preact_shortcut == "input"
        if any(".shortcut.0." in name for name in used):
            seen = "activated input" if preact_shortcut == "activated" else "input itself"
            notes.append(f"its 1x1 shortcuts see the {seen}, as preact_shortcut says: no name in the file tells")
    layout = _LAYOUTS[best.arch]
    classes, channels = best.state[layout.head].shape[0], best.state[layout.stem].shape[1]
    normalize = Normalize(*(_per_channel(numbers, channels, source) for numbers in normalisation))
    model = Classifier(normalize, _filled(best)).eval()
    return Recognised(model, best.label.split()[0], classes, channels, tuple(notes))


def shortened(names: Sequence[str]) -> str:
    """The first few of them."""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


# Normalisation


def _pairs(state: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    """Names of a mean and of the deviation beside it."""
    pairs = []
    for name in state:
        parent, dot, leaf = name.rpartition(".")
        partner = f"{parent}{dot}{_NORMALISATION.get(leaf)}"
        if partner in state:
            pairs.append((name, partner))
    return pairs


def _normalisation(
    state: dict[str, Tensor], source: str, mean: Sequence[float] | None, std: Sequence[float] | None
) -> tuple[tuple[Sequence[float], Sequence[float]], str]:
    """Mean and deviation, which leave the state dict, and a sentence on where they are from."""
    held = {pair: [state.pop(name).flatten().tolist() for name in pair] for pair in _pairs(state)}
    if (mean is None) != (std is None):
        raise ValueError("mean and std belong together: give both, or neither")
    if mean is not None and std is not None:
        instead = ", instead of the file's own" if held else ""
        return (mean, std), f"normalisation: mean {_rounded(mean)}, std {_rounded(std)}, as given{instead}"
    if len(held) > 1:
        raise ValueError(
            f"{source} holds several normalisations ({', '.join(name for name, _ in held)}): give mean and std, "
            "what the network wants subtracted from images in [0, 1] and what it wants them divided by"
        )
    for (name, partner), (own_mean, own_std) in held.items():
        return (own_mean, own_std), (
            f"normalisation: mean {_rounded(own_mean)}, std {_rounded(own_std)}, from {name} and {partner}"
        )
    return ([0.0], [1.0]), (
        "normalisation: none, images in [0, 1] go in as they are: the file holds no mean and std, and none is given"
    )


def _rounded(numbers: Sequence[float]) -> str:
    return ", ".join(f"{number:.4g}" for number in numbers)


def _per_channel(numbers: Sequence[float], channels: int, source: str) -> Sequence[float]:
    if len(numbers) not in (1, channels):
        raise ValueError(
            f"mean and std need one number, or one for each of the {channels} channels of {source}, got {len(numbers)}"
        )
    return list(numbers) * (channels // len(numbers))


# Architecture


def _bare(names: Sequence[str]) -> list[str]:
    """The names without what all of them begin with, such as ``module.``, ``model.`` or ``network.``."""
    paths = [name.split(".") for name in names]
    depth = 0
    while paths and all(len(path) > depth + 1 and path[depth] == paths[0][depth] for path in paths):
        depth += 1
    return [".".join(path[depth:]) for path in paths]


def _fit(arch: str, state: Mapping[str, Tensor], width: int | None) -> _Fit:
    """The state dict in the names of one architecture, and the network of the size that its shapes tell."""
    written = {}
    for name, bare in zip(state, _bare(list(state)), strict=True):
        for pattern, replacement in _LAYOUTS[arch].renames:
            bare = re.sub(pattern, replacement, bare)
        written[name if bare in written else bare] = name
    tensors = {bare: state[name] for bare, name in written.items()}
    label, network = _network(arch, tensors, width)
    own = {name: list(tensor.shape) for name, tensor in network.state_dict().items()}
    problems = {
        "missing": [n for n in own if n not in tensors and not n.endswith("num_batches_tracked")],
        "not in the network": [written[n] for n in tensors if n not in own],
        "of another shape": [
            f"{written[n]} {list(t.shape)} instead of {own[n]}"
            for n, t in tensors.items()
            if n in own and list(t.shape) != own[n]
        ],
    }
    return _Fit(arch, label, network, tensors, problems)


def _network(arch: str, state: Mapping[str, Tensor], width: int | None) -> tuple[str, nn.Module]:
    """Name with size, and network on the meta device; what the shapes do not tell is as published."""
    layout = _LAYOUTS[arch]

    def size(name: str, dim: int) -> int | None:
        return state[name].shape[dim] if name in state and state[name].dim() > dim else None

    channels, classes = size(layout.stem, 1), size(layout.head, 0)
    channels = channels if channels in (1, 3) else 3
    classes = classes if classes is not None and classes > 1 else 10
    width = size(layout.width, 0) if width is None else width
    image_size = 32
    if arch == "smallcnn" and width is not None and (hidden := size("classifier.fc1.weight", 1)) is not None:
        image_size = max(16, 12 + 4 * isqrt(hidden // (2 * width)))  # one of four sizes with the same weights
    with torch.device("meta"):
        network = models.create(
            arch,
            num_classes=classes,
            in_channels=channels,
            image_size=image_size,
            width=width,
            mean=[0.0] * channels,
            std=[1.0] * channels,
        ).network
        name = arch
        if arch == "wrn34_10":
            name = _of_depth(network, state)
        elif arch == "preactresnet18" and "bn.weight" not in state:
            network.bn = network.relu = nn.Identity()  # as published before the BatchNorm there became usual
    return f"{name} (width {width or 'as published'}, {classes} classes, {channels} channels)", network


def _of_depth(network: nn.Module, state: Mapping[str, Tensor]) -> str:
    """Give a WideResNet the number of blocks that the names tell; its name."""
    found = {int(name.split(".")[1]) for name in state if re.match(r"block1\.\d+\.", name)}
    blocks = len(found) or 5
    if blocks == 5:
        return "wrn34_10"
    stem, width = len(network.state_dict()["conv1.weight"]), network.state_dict()["fc.weight"].shape[1] // 4
    network.block1 = preact_stage(stem, width, blocks, stride=1)
    network.block2 = preact_stage(width, 2 * width, blocks, stride=2)
    network.block3 = preact_stage(2 * width, 4 * width, blocks, stride=2)
    return f"wrn{6 * blocks + 4}_{width / 16:g}"


def _filled(fit: _Fit) -> nn.Module:
    """The network with the weights; those of half precision become float32."""
    for name in fit.network.state_dict():
        if name.endswith("num_batches_tracked") and name not in fit.state:
            fit.state[name] = torch.zeros((), dtype=torch.int64)  # files of early PyTorch lack it, and eval mode too
    weights = {n: t.to(torch.float32 if t.is_floating_point() else t.dtype, copy=True) for n, t in fit.state.items()}
    fit.network.load_state_dict(weights, assign=True)
    return fit.network


def _no_fit(source: str, best: _Fit, fits: Sequence[_Fit]) -> str:
    if len(fits) == 1:
        return f"{source} does not fit {best}. Leave the architecture and width out to try all that are known"
    return (
        f"{source} fits none of the known networks ({', '.join(fit.arch for fit in fits)}). Closest is {best}. "
        "A network with code of its own is evaluated from Python, as an nn.Module"
    )
