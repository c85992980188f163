"""Image backbones: pictures (B, 3, h, w) -> features (B, C, h', w') and a summary (B, S)."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.blocks.weights import read_tensors
from common.build import block
from common.config import ConfigError, UserError, nearest


@block("tiny_cnn")
class TinyCNN(nn.Module):
    """Four convolutions: features (B, dim, h / 16, w / 16) and image positions (B, 2 dim).

    Pictures are floats in [0, 1], of 16 x 16 at least. The summary is the spatial softmax
    of Levine et al. 2016 (arXiv:1504.00702, section 4.2) on the map of stride 8: `dim` expected
    positions, in [-1, 1] from the left and from the top edge.

    Args:
        dim: channels of the features, and number of positions.
        width: channels of the first convolution.
    """

    def __init__(self, dim: int = 64, width: int = 24):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 4, stride=4),
            nn.ReLU(),
            nn.Conv2d(width, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, padding=1),
            nn.ReLU(),
        )
        self.patches = nn.Conv2d(32, dim, 2, stride=2)
        self.keypoints = nn.Conv2d(32, dim, 1)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        height, width = image.shape[2:]
        if min(height, width) < 16:
            raise ConfigError(f"pictures of {height} x {width} are too small, it needs 16 x 16")
        x = self.stem(2 * image - 1)
        logits = self.keypoints(x)
        weights = logits.flatten(2).softmax(-1).view_as(logits)
        across = torch.linspace(-1, 1, logits.shape[-1], device=x.device)
        down = torch.linspace(-1, 1, logits.shape[-2], device=x.device)
        from_left = (weights.sum(-2) * across).sum(-1)
        from_top = (weights.sum(-1) * down).sum(-1)
        return F.relu(self.patches(x)), torch.cat([from_left, from_top], -1)


# Arguments of timm.create_model that fetch weights or read pickles.
FILES_OF_TIMM = ("checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")


@block("timm_backbone")
class TimmBackbone(nn.Module):
    """A model of timm: its last features (B, C, h', w') and their pooled summary (B, S).

    Pictures are floats in [0, 1]; the mean and standard deviation that the model's published
    weights expect are applied here. The model needs forward_features and forward_head.

    Args:
        name: the model's name in timm.
        weights: a safetensors file in timm's layout, whose classifier is ignored; null: random.
        options: further arguments of timm.create_model. A ViT takes img_size: [h, w], or
            dynamic_img_size: true to keep its own position table.
    """

    def __init__(self, name: str, weights: str | None = None, **options):
        super().__init__()
        import timm  # takes two seconds

        if not timm.is_model(name):  # timm would look for hf-hub:org/name in the Hub
            raise ConfigError(f"timm has no model '{name}'{nearest(name, timm.list_models())}")
        for option in FILES_OF_TIMM:
            if option in options:
                raise ConfigError(f"{option}: weights come from a file of `weights` or `init` only")
        self.name = name
        self.weights = weights or ""
        self.model = timm.create_model(name, pretrained=False, num_classes=0, **options)
        for key in ("mean", "std"):
            value = torch.tensor(self.model.pretrained_cfg[key]).view(3, 1, 1)
            self.register_buffer(f"image_{key}", value, persistent=False)

    def load_weights(self) -> Path:
        """Reads `weights` and returns the file. Raises UserError that lists what differs."""
        file = Path(self.weights).absolute()
        classifiers = self.model.pretrained_cfg.get("classifier") or ()
        if isinstance(classifiers, str):
            classifiers = [classifiers]
        heads = tuple(f"{name}." for name in classifiers)
        tensors = read_tensors(file)
        tensors = {name: x for name, x in tensors.items() if not name.startswith(heads)}
        try:
            self.model.load_state_dict(tensors)
        except RuntimeError as error:
            raise UserError(f"{file}: not the weights of timm's '{self.name}': {error}") from error
        return file

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        try:
            x = self.model.forward_features((image - self.image_mean) / self.image_std)
        except AssertionError as error:  # of the size that the model was built for
            raise ConfigError(f"timm's '{self.name}' refuses the pictures: {error}") from error
        summary = self.model.forward_head(x, pre_logits=True)
        if x.ndim == 3:
            x = x[:, self.model.num_prefix_tokens :]  # without class and register tokens
            rows = round((x.shape[1] * image.shape[2] / image.shape[3]) ** 0.5)
            x = x.unflatten(1, (rows, -1)).permute(0, 3, 1, 2)
        elif getattr(self.model, "output_fmt", "NCHW") == "NHWC":
            x = x.permute(0, 3, 1, 2)
        return x, summary


class PatchBackbone(nn.Module):
    """Base of vision transformers that resize pictures to whole patches, with one notice."""

    _resize_noticed = False

    def resized(self, image: Tensor, grid: Sequence[int], patch: int) -> Tensor:
        """(B, 3, h, w), uint8 or float in [0, 1] -> float32 in [0, 1] of grid x patch pixels.

        Raises ValueError for another shape or type.
        """
        is_uint8 = image.dtype == torch.uint8
        is_picture = image.ndim == 4 and image.shape[1] == 3
        name = type(self).__name__
        if not is_picture or not (is_uint8 or image.is_floating_point()):
            raise ValueError(
                f"{name}: expected pictures (B, 3, h, w), uint8 or float in [0, 1];"
                f" found {tuple(image.shape)} {image.dtype}"
            )
        image = image.float()
        if is_uint8:
            image = image / 255
        old = tuple(image.shape[2:])
        new = tuple(count * patch for count in grid)
        if new == old:
            return image
        if not self._resize_noticed and not torch.compiler.is_compiling():
            self._resize_noticed = True
            print(
                f"notice: {name} resizes pictures of {old} to {new},"
                f" the nearest multiples of {patch}"
            )
        return F.interpolate(image, new, mode="bilinear", align_corners=False)
