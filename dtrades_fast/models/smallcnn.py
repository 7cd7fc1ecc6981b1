"""The four-convolution network that TRADES (Zhang et al., 2019) trains on MNIST."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from dtrades_fast.models.pooling import MaxPool2d

__all__ = ["SmallCNN"]


class SmallCNN(nn.Module):
    """Two pairs of valid 3x3 convolutions, each followed by a 2x2 max-pool, then three linear layers.

    Keys, shapes and initialisation are those of the published ``SmallCNN``, whose checkpoints load at the defaults.
    The last layer starts at zero: the first logits are all 0, and so is their gradient to the image.

    Args:
        num_classes: number of logits.
        in_channels: channels of the images.
        image_size: height and width, at least 16.
        width: channels of the first pair; the second has ``2 width``, the hidden layers ``200 width / 32`` units.
    """

    def __init__(self, *, num_classes: int, in_channels: int, image_size: int, width: int = 32) -> None:
        super().__init__()
        self.feature_extractor = nn.Sequential(
            OrderedDict(
                conv1=nn.Conv2d(in_channels, width, 3),
                relu1=nn.ReLU(inplace=True),
                conv2=nn.Conv2d(width, width, 3),
                relu2=nn.ReLU(inplace=True),
                maxpool1=MaxPool2d(2),
                conv3=nn.Conv2d(width, 2 * width, 3),
                relu3=nn.ReLU(inplace=True),
                conv4=nn.Conv2d(2 * width, 2 * width, 3),
                relu4=nn.ReLU(inplace=True),
                maxpool2=MaxPool2d(2),
            )
        )
        size = ((image_size - 4) // 2 - 4) // 2  # each valid 3x3 convolution takes 2 pixels
        hidden = 200 * width // 32
        head = nn.Linear(hidden, num_classes)
        self.classifier = nn.Sequential(
            OrderedDict(
                fc1=nn.Linear(2 * width * size**2, hidden),
                relu1=nn.ReLU(inplace=True),
                drop=nn.Dropout(0.5),
                fc2=nn.Linear(hidden, hidden),
                relu2=nn.ReLU(inplace=True),
                fc3=head,
            )
        )
        for layer in self.feature_extractor:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight)
                assert layer.bias is not None
                nn.init.zeros_(layer.bias)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.feature_extractor(x).flatten(1))
