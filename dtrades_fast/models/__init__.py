"""The networks, by name. A new one is a module with a class of the same constructor and a line in ``_NETWORKS``."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from dtrades_fast.models.normalize import Classifier, Normalize
from dtrades_fast.models.preactresnet18 import PreActResNet18
from dtrades_fast.models.resnet18 import ResNet18
from dtrades_fast.models.smallcnn import SmallCNN
from dtrades_fast.models.vgg16 import VGG16
from dtrades_fast.models.wrn34_10 import WRN34x10

__all__ = ["Classifier", "Normalize", "create", "names", "parameter_count"]

_NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "preactresnet18": PreActResNet18,
    "resnet18": ResNet18,
    "smallcnn": SmallCNN,
    "vgg16": VGG16,
    "wrn34_10": WRN34x10,
}
_MIN_IMAGE_SIZE = 16  # below it the small CNN has no pixel left after its convolutions


def names() -> tuple[str, ...]:
    """The known architectures."""
    return tuple(sorted(_NETWORKS))


def create(
    arch: str,
    *,
    num_classes: int,
    in_channels: int,
    image_size: int,
    width: int | None = None,
    mean: Sequence[float],
    std: Sequence[float],
) -> Classifier:
    """A freshly initialised classifier from pixels in [0, 1], ``[N, in_channels, size, size]``, to logits.

    The initial weights come from torch's global generator: call ``torch.manual_seed`` before.

    Args:
        arch: one of :func:`names`.
        num_classes: number of logits, at least 2.
        in_channels: 1 or 3.
        image_size: height and width in pixels, at least 16.
        width: channels of the first stage; ``None`` is the published width (64, for ``smallcnn``
            32, for ``wrn34_10`` 160).
        mean: subtracted per channel inside the model; all 0 for no normalisation.
        std: divided by per channel inside the model; all 1 for no normalisation.

    Raises:
        ValueError: unknown architecture or a size that it cannot have.
    """
    if arch not in _NETWORKS:
        raise ValueError(f"unknown architecture {arch!r}; known are {', '.join(names())}")
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}")
    if in_channels not in (1, 3):
        raise ValueError(f"in_channels must be 1 (grey) or 3 (RGB), got {in_channels}")
    if image_size < _MIN_IMAGE_SIZE:
        raise ValueError(f"image_size must be at least {_MIN_IMAGE_SIZE} pixels, got {image_size}: enlarge the images")
    if width is not None and width < 1:
        raise ValueError(f"width must be at least 1, or None for the published width, got {width}")
    if len(mean) != in_channels:
        raise ValueError(f"mean and std need one number for each of the {in_channels} channels, got mean={tuple(mean)}")
    normalize = Normalize(mean, std)
    scaling = {} if width is None else {"width": width}
    network = _NETWORKS[arch](num_classes=num_classes, in_channels=in_channels, image_size=image_size, **scaling)
    return Classifier(normalize, network)


def parameter_count(model: nn.Module) -> int:
    """Number of parameters, frozen ones included, buffers not."""
    return sum(parameter.numel() for parameter in model.parameters())
