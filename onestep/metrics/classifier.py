"""The small convolutional classifier whose penultimate features the embedded Fréchet distance is measured in."""

import torch
from torch import Tensor, nn


def _block(channels_in: int, channels_out: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(inplace=True),
    )


class Classifier(nn.Module):
    """Grey 32x32 images in [-1, 1], shape (B, 1, 32, 32), to class logits (B, classes).

    `features` returns the 128 penultimate activations (after ReLU) that `onestep.metrics` takes its Fréchet statistics of.
    """

    def __init__(self, classes: int = 10, width: int = 24, dimensions: int = 128):
        super().__init__()
        self.body = nn.Sequential(
            _block(1, width, 1),
            _block(width, 2 * width, 2),
            _block(2 * width, 2 * width, 1),
            _block(2 * width, 4 * width, 2),
            _block(4 * width, 4 * width, 1),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Dropout(0.3),
            nn.Linear(4 * width * 16, dimensions),
            nn.ReLU(),
        )
        self.head = nn.Linear(dimensions, classes)

    def features(self, images: Tensor) -> Tensor:
        return self.body(images)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(torch.dropout(self.features(images), 0.3, self.training))
