"""Pictures: their names in a batch, resizing and augmentation."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor

IMAGE = "observation.images."


DRAWS = 8  # uniform numbers that `augmented` uses per picture


def augmented(images: Tensor, augment, u: Tensor) -> Tensor:
    """images (B, ..., 3, h, w) in [0, 1], u (B, 8) uniform -> colour jitter, blur and shift, one draw per sample."""
    shape, frames = images.shape, images.flatten(1, -4).shape[1] if images.ndim > 4 else 1
    x = images.reshape(-1, *shape[-3:])
    u = u.repeat_interleave(frames, 0)
    spread = 2 * u - 1
    gray = x.new_tensor([0.299, 0.587, 0.114])
    to_gray = gray.expand(3, 3)
    eye = torch.eye(3, device=x.device)
    saturate = 1 + augment.saturation * spread[:, 2, None, None]
    # A hue shift turns colours about the gray axis (Rodrigues' formula).
    angle = 2 * torch.pi * augment.hue * spread[:, 3, None, None]
    turn = x.new_tensor([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / 3**0.5
    rotation = angle.cos() * eye + angle.sin() * turn + (1 - angle.cos()) / 3
    colour = (
        (1 + augment.brightness * spread[:, 0, None, None])
        * rotation
        @ (saturate * eye + (1 - saturate) * to_gray)
    )
    x = torch.einsum("bij,bjhw->bihw", colour, x)
    mean = (x * gray[:, None, None]).sum(1, keepdim=True).mean((-2, -1), keepdim=True)
    x = mean + (1 + augment.contrast * spread[:, 1, None, None, None]) * (x - mean)
    if augment.blur:
        sigma = 0.1 + 1.9 * u[:, 5, None, None, None]
        side = torch.where(u[:, 4, None, None, None] < augment.blur, (-0.5 / sigma**2).exp(), 0.0)
        for axis in (-2, -1):
            n = x.shape[axis]
            near = [
                x.index_select(axis, (torch.arange(n, device=x.device) + d).clamp(0, n - 1))
                for d in (-1, 1)
            ]
            x = (x + side * (near[0] + near[1])) / (1 + 2 * side)
    if augment.shift:
        dy, dx = (torch.floor((2 * augment.shift + 1) * u[:, 6:8]) - augment.shift).long().unbind(1)
        h, w = x.shape[-2:]
        ys = (torch.arange(h, device=x.device) + dy[:, None]).clamp(0, h - 1)
        xs = (torch.arange(w, device=x.device) + dx[:, None]).clamp(0, w - 1)
        sample = torch.arange(len(x), device=x.device)[:, None, None]
        x = x.movedim(1, -1)[sample, ys[:, :, None], xs[:, None, :]].movedim(-1, 1)
    return x.clamp(0, 1).reshape(shape)


def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 (h, w, 3) -> (*size, 3), antialiased; the cache and inference both use it. The aspect ratio may change."""
    if image.shape[:2] == tuple(size):
        return image
    return np.asarray(Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR))
