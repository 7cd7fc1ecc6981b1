"""WideResNet-34-10 (Zagoruyko and Komodakis, 2016), on which TRADES and most robustness papers report."""

from __future__ import annotations

from torch import Tensor, nn

from dtrades_fast.models.preactresnet18 import preact_stage
from dtrades_fast.models.resnet18 import he_initialise

__all__ = ["WRN34x10"]

_BLOCKS = 5  # (34 - 4) / 6 in each of the three stages
_STEM = 16


class WRN34x10(nn.Module):
    """Three stages of five pre-activation blocks with ``width``, ``2 width`` and ``4 width`` channels.

    The published network has 160, ten times the 16 of its first convolution, and no dropout.

    Args:
        num_classes: number of logits.
        in_channels: channels of the images.
        image_size: any, the head pools globally.
        width: channels of the first stage; below 16 also those of the first convolution.
    """

    def __init__(self, *, num_classes: int, in_channels: int, image_size: int, width: int = 160) -> None:
        super().__init__()
        channels = min(_STEM, width)
        self.conv1 = nn.Conv2d(in_channels, channels, kernel_size=3, padding=1, bias=False)
        self.block1 = preact_stage(channels, width, _BLOCKS, stride=1)
        self.block2 = preact_stage(width, 2 * width, _BLOCKS, stride=2)
        self.block3 = preact_stage(2 * width, 4 * width, _BLOCKS, stride=2)
        self.bn1 = nn.BatchNorm2d(4 * width)
        self.relu = nn.ReLU(inplace=True)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(4 * width, num_classes)
        he_initialise(self)
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.block3(self.block2(self.block1(self.conv1(x))))
        return self.fc(self.avgpool(self.relu(self.bn1(x))).flatten(1))
