"""Images as observations: the convolutional encoder, the layer between it and a network, random shifts.

Source:
    Kostrikov, Yarats and Fergus 2020, arXiv:2004.13649 (DrQ): layers, normalised features, random shifts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class ImageEncoder(nn.Module):
    """Convolutions with ReLU, without padding.

    Args:
        image_shape: Height, width, channels.
        conv_filters: (channels, kernel size, stride) of every layer.
        orthogonal_init: Whether kernels start orthogonal and biases zero, else as torch's own.
    """

    def __init__(
        self, image_shape: Sequence[int], conv_filters: Sequence[Sequence[int]], *, orthogonal_init: bool
    ) -> None:
        super().__init__()
        self.image_shape = tuple(image_shape)
        self.product_dtype: torch.dtype | None = None  # None is that of the parameters.
        height, width, channels = image_shape
        layers: list[nn.Module] = []
        for num_channels, kernel, stride in conv_filters:
            height, width = (height - kernel) // stride + 1, (width - kernel) // stride + 1
            if height < 1 or width < 1:
                raise ValueError(
                    f"`conv_filters` {conv_filters!r} leave nothing of images of {tuple(image_shape)}; use fewer "
                    "layers, smaller kernels or strides."
                )
            convolution = nn.Conv2d(channels, num_channels, kernel, stride)
            if orthogonal_init:
                nn.init.orthogonal_(convolution.weight, gain=2.0**0.5)
                nn.init.zeros_(convolution.bias)  # type: ignore[arg-type]
            layers += [convolution, nn.ReLU()]
            channels = num_channels
        self.layers = nn.Sequential(*layers)
        self.size = height * width * channels

    def forward(self, images: Tensor) -> Tensor:
        """Encodes images of 0 to 255.

        Args:
            images: Shape (B, H, W, C), or flat, (B, H * W * C), any type.

        Returns:
            Shape (B, `size`), in the type of the parameters.
        """
        dtype = next(self.parameters()).dtype
        pixels = images.view(-1, *self.image_shape).permute(0, 3, 1, 2).to(dtype) / 255.0 - 0.5
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.product_dtype == torch.bfloat16):
            codes: Tensor = self.layers(pixels)
        return codes.to(dtype).flatten(1)


class Trunk(nn.Sequential):
    """From codes of an image to the input of a network: linear, normalised, within [-1, 1]."""

    def __init__(self, code_size: int, num_features: int) -> None:
        super().__init__(nn.Linear(code_size, num_features), nn.LayerNorm(num_features), nn.Tanh())


def random_shifts(images: Tensor, most: int, generator: torch.Generator | None) -> Tensor:
    """Shifts every image by -most to most pixels along each axis; what enters repeats the border.

    Args:
        images: Shape (B, H, W, C).
        most: Pixels, at least 0.
        generator: Source of the shifts.

    Returns:
        The same shape and type.
    """
    batch_size, height, width, _ = images.shape
    shifts = torch.randint(-most, most + 1, (2, batch_size, 1), generator=generator, device=images.device)
    rows = (torch.arange(height, device=images.device) + shifts[0]).clamp_(0, height - 1)
    columns = (torch.arange(width, device=images.device) + shifts[1]).clamp_(0, width - 1)
    which = torch.arange(batch_size, device=images.device)
    return images[which[:, None, None], rows[:, :, None], columns[:, None, :]]
