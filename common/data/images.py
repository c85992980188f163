"""Pictures: their keys in a batch, decoding, resizing, and augmentation on the device."""

import io
import struct
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from common.config import DataError
from common.schema import Augment

IMAGE = "observation.images."  # begins the key of a camera's pictures in a batch
DRAWS = 8  # uniform numbers that `augmented` uses for a picture
LUMINANCE = (0.299, 0.587, 0.114)  # of red, green, blue (ITU-R BT.601)
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "JPEG2000")
MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV")
MOST_PIXELS = 2**26
UNREADABLE = (  # what Pillow raises on damaged pictures
    *(OSError, SyntaxError, ValueError, TypeError, IndexError, EOFError, struct.error),
    Image.DecompressionBombError,
)


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


def decoded(picture: bytes, key: str, place: str) -> np.ndarray:
    """An encoded picture of the camera `key` as it is shown: RGB uint8 (h, w, 3).

    It is turned upright by its EXIF orientation. Transparency is ignored. Gray of 16 bits is black
    at 0 and white at 65535. Raises DataError, which begins with `place`, for what no viewer could
    show rightly: 32-bit and float values, 16-bit gray of a camera with "depth" in its name, more
    than one picture in one, more than MOST_PIXELS, and anything that is not a whole picture.
    """
    try:
        image = Image.open(io.BytesIO(picture), formats=FORMATS)
        count = getattr(image, "n_frames", 1)
        pixels = image.width * image.height
        if pixels <= MOST_PIXELS:
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
    except UNREADABLE as error:
        raise DataError(
            f"{place}: {key} is not a whole picture ({type(error).__name__}: {error})"
        ) from error
    if pixels > MOST_PIXELS:
        raise DataError(f"{place}: {key} has {pixels} pixels, more than {MOST_PIXELS}")
    if count > 1 and image.format != "MPO":  # a photograph with a preview
        raise DataError(f"{place}: {key} is an animation of {count} pictures; store one a frame")
    if image.mode.startswith("I;16") and "depth" not in key.lower():
        gray = (np.asarray(image).astype(np.uint32) * 255 + 32767) // 65535
        return np.repeat(gray.astype(np.uint8)[..., None], 3, axis=2)
    if image.mode not in MODES:
        raise DataError(
            f"{place}: {key} has values of mode {image.mode}, as depth maps have, and no black and "
            "white; store 8-bit pictures, or leave it out of data.cameras"
        )
    return np.asarray(image.convert("RGB"))


def resize(image: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """uint8 (h, w, 3) -> (*size, 3), antialiased. The aspect ratio may change."""
    if image.shape[:2] == tuple(size):
        return image
    height, width = size
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(resized)
