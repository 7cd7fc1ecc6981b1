"""VGG-16 with BatchNorm (Simonyan and Zisserman, 2015) for small images: torchvision's features, a small head."""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.models.vgg import cfgs, make_layers

from dtrades_fast.models.pooling import MaxPool2d
from dtrades_fast.models.resnet18 import he_initialise

__all__ = ["VGG16"]


class VGG16(nn.Module):
    """The convolutions of torchvision's ``vgg16_bn``, then a global average pool and one linear layer.

    The blocks have ``width``, ``2 width``, ``4 width``, ``8 width`` and ``8 width`` channels. With ``width=64`` the
    keys and shapes under ``features`` are torchvision's (``features.0`` for 3 input channels).

    Args:
        num_classes: number of logits.
        in_channels: channels of the images.
        image_size: any from 16 on, the head pools globally.
        width: channels of the first block.
    """

    def __init__(self, *, num_classes: int, in_channels: int, image_size: int, width: int = 64) -> None:
        super().__init__()
        self.features = make_layers(
            [item if isinstance(item, str) else item * width // 64 for item in cfgs["D"]], batch_norm=True
        )
        self.features[0] = nn.Conv2d(in_channels, width, kernel_size=3, padding=1)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(8 * width, num_classes)
        he_initialise(self)
        for i, layer in enumerate(self.features):
            if isinstance(layer, nn.MaxPool2d):
                # Five halvings of 28 pixels round down to 0 but up to 1; 32 pixels are the same either way.
                self.features[i] = MaxPool2d(2, ceil_mode=True)
            elif isinstance(layer, nn.Conv2d):
                assert layer.bias is not None
                nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(x)).flatten(1))
