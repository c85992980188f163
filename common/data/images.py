"""Pictures: their keys in a batch, resizing, and augmentation on the device."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.schema import Augment

IMAGE = "observation.images."  # begins the key of a camera's pictures in a batch
DRAWS = 8  # uniform numbers that `augmented` uses for a picture
LUMINANCE = (0.299, 0.587, 0.114)  # of red, green, blue (ITU-R BT.601)


def augmented(images: Tensor, augment: Augment, u: Tensor) -> Tensor:
    """Colour jitter, blur and shift, one draw a sample; images (B, ..., 3, h, w) in [0, 1].

    augment: schema.Augment; u: (B, DRAWS) uniform numbers.
    """
    x = images.reshape(-1, *images.shape[-3:])
    u = u.repeat_interleave(len(x) // len(images), 0)
    x = jitter_colours(x, augment, u[:, :4])
    if augment.blur:
        x = blurred(x, augment.blur, u[:, 4:6])
    if augment.shift:
        x = shifted(x, augment.shift, u[:, 6:8])
    return x.clamp(0, 1).reshape(images.shape)


def jitter_colours(x: Tensor, augment: Augment, u: Tensor) -> Tensor:
    """Pictures (N, 3, h, w) with other brightness, saturation, hue, then contrast; u (N, 4)."""
    spread = (2 * u - 1)[:, :, None, None]
    brightness, contrast, saturation, hue = spread.unbind(1)
    eye = torch.eye(3, device=x.device)
    gray = x.new_tensor(LUMINANCE)
    # A hue shift turns colours about the gray axis (Rodrigues' formula).
    angle = 2 * torch.pi * augment.hue * hue
    cos = angle.cos()
    axis = x.new_tensor([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / 3**0.5
    turn = angle.sin() * axis
    rotation = cos * eye + turn + (1 - cos) / 3
    share = 1 + augment.saturation * saturation
    dull = (1 - share) * gray
    saturate = share * eye + dull
    brighten = 1 + augment.brightness * brightness
    matrix = brighten * rotation @ saturate
    x = torch.einsum("bij,bjhw->bihw", matrix, x)
    luminance = x * gray[:, None, None]
    luminance = luminance.sum(1, keepdim=True)
    mean = luminance.mean((-2, -1), keepdim=True)
    stretch = 1 + augment.contrast * contrast[..., None]
    return mean + stretch * (x - mean)


def blurred(x: Tensor, probability: float, u: Tensor) -> Tensor:
    """Some pictures (N, 3, h, w) blurred by a 3-pixel Gaussian of sigma 0.1 to 2; u (N, 2)."""
    chosen, sigma = u[:, :, None, None, None].unbind(1)
    sigma = 0.1 + 1.9 * sigma
    weight = (-0.5 / sigma**2).exp()
    weight = torch.where(chosen < probability, weight, 0.0)
    for axis in (-2, -1):
        before = x.index_select(axis, moved(x, axis, -1))
        after = x.index_select(axis, moved(x, axis, 1))
        x = (x + weight * (before + after)) / (1 + 2 * weight)
    return x


def shifted(x: Tensor, most: int, u: Tensor) -> Tensor:
    """Pictures (N, 3, h, w) moved by up to `most` whole pixels, the edge repeated; u (N, 2)."""
    move = torch.floor((2 * most + 1) * u) - most
    dy, dx = move.long()[:, :, None].unbind(1)
    ys = moved(x, -2, dy)[:, :, None]
    xs = moved(x, -1, dx)[:, None, :]
    sample = torch.arange(len(x), device=x.device)
    sample = sample[:, None, None]
    pixels = x.movedim(1, -1)
    return pixels[sample, ys, xs].movedim(-1, 1)


def moved(x: Tensor, axis: int, by: int | Tensor) -> Tensor:
    """Indices along an axis of x, moved by so many and kept inside."""
    size = x.shape[axis]
    index = torch.arange(size, device=x.device) + by
    return index.clamp(0, size - 1)


def resize(image: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """uint8 (h, w, 3) -> (*size, 3), antialiased. The aspect ratio may change."""
    if image.shape[:2] == tuple(size):
        return image
    height, width = size
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(resized)
