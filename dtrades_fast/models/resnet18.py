"""ResNet-18 (He et al., 2016) for small images: torchvision's blocks behind the CIFAR stem."""

from __future__ import annotations

from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, conv1x1

__all__ = ["ResNet18", "he_initialise"]


class ResNet18(nn.Module):
    """torchvision's ``resnet18`` with a 3x3 first convolution of stride 1 and no max-pool.

    The stages have ``width``, ``2 width``, ``4 width`` and ``8 width`` channels. torchvision's own class has 64 written
    into it, hence this assembly of its blocks. With ``width=64`` the state dict has torchvision's keys and shapes apart
    from ``conv1`` and ``fc``.

    Args:
        num_classes: number of logits.
        in_channels: channels of the images.
        image_size: any, the head pools globally.
        width: channels of the first stage.
    """

    def __init__(self, *, num_classes: int, in_channels: int, image_size: int, width: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, kernel_size=3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.layer1 = _stage(width, width, stride=1)
        self.layer2 = _stage(width, 2 * width, stride=2)
        self.layer3 = _stage(2 * width, 4 * width, stride=2)
        self.layer4 = _stage(4 * width, 8 * width, stride=2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(8 * width, num_classes)
        he_initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))


def _stage(in_channels: int, channels: int, stride: int) -> nn.Sequential:
    """Two residual blocks; where the shape changes, the first one's shortcut is a 1x1 convolution."""
    shortcut = None
    if stride != 1:
        shortcut = nn.Sequential(conv1x1(in_channels, channels, stride), nn.BatchNorm2d(channels))
    return nn.Sequential(BasicBlock(in_channels, channels, stride, shortcut), BasicBlock(channels, channels))


def he_initialise(network: nn.Module) -> None:
    """N(0, 2 / (k^2 channels out)) for the weights of every convolution (He et al., 2015)."""
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
