"""Pre-activation ResNet-18 (He et al., 2016b) for small images, which FAAL and much of the literature use."""

from __future__ import annotations

from torch import Tensor, nn

from dtrades_fast.models.resnet18 import he_initialise

__all__ = ["PreActResNet18", "preact_stage"]


class PreActBlock(nn.Module):
    """``x + conv(relu(bn(conv(relu(bn(x))))))``; where the shape changes, the shortcut is a 1x1 convolution.

    Attributes:
        shortcut_of_input: that convolution sees the input itself, as in some published networks, not the activated one.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, kernel_size=3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, kernel_size=3, padding=1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut_of_input = False
        self.shortcut = None
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Conv2d(in_channels, channels, kernel_size=1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activated = self.relu(self.bn1(x))
        shortcut = x if self.shortcut is None else self.shortcut(x if self.shortcut_of_input else activated)
        return shortcut + self.conv2(self.relu(self.bn2(self.conv1(activated))))


class PreActResNet18(nn.Module):
    """Four stages of two :class:`PreActBlock` behind a 3x3 convolution, BatchNorm and ReLU before the global pool.

    The stages have ``width``, ``2 width``, ``4 width`` and ``8 width`` channels.

    Args:
        num_classes: number of logits.
        in_channels: channels of the images.
        image_size: any, the head pools globally.
        width: channels of the first stage.
    """

    def __init__(self, *, num_classes: int, in_channels: int, image_size: int, width: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, kernel_size=3, padding=1, bias=False)
        self.layer1 = preact_stage(width, width, blocks=2, stride=1)
        self.layer2 = preact_stage(width, 2 * width, blocks=2, stride=2)
        self.layer3 = preact_stage(2 * width, 4 * width, blocks=2, stride=2)
        self.layer4 = preact_stage(4 * width, 8 * width, blocks=2, stride=2)
        self.bn = nn.BatchNorm2d(8 * width)
        self.relu = nn.ReLU(inplace=True)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8 * width, num_classes)
        he_initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer4(self.layer3(self.layer2(self.layer1(self.conv1(x)))))
        return self.fc(self.avgpool(self.relu(self.bn(x))).flatten(1))


def preact_stage(in_channels: int, channels: int, blocks: int, stride: int) -> nn.Sequential:
    """Pre-activation blocks of which the first changes the shape."""
    rest = [PreActBlock(channels, channels, 1) for _ in range(blocks - 1)]
    return nn.Sequential(PreActBlock(in_channels, channels, stride), *rest)
