"""Image backbones: (B, 3, h, w) in [0, 1] -> features (B, C, h', w'), summary (B, S)."""

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.blocks.weights import read_tensors
from common.build import block
from common.config import UserError


@block("tiny_cnn")
class TinyCNN(nn.Module):
    """Four convolutions, stride 16: features (B, dim, h / 16, w / 16); summary: `dim` expected image positions.

    The summary is the spatial softmax of Levine et al. 2016 (arXiv:1504.00702, section 4.2) on the stride-8 map, in
    [-1, 1] from the left and top edge: (B, 2 dim).
    """

    def __init__(self, dim=64, width=24):
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

    def forward(self, image):
        x = self.stem(2 * image - 1)
        heat = self.keypoints(x)
        across = torch.linspace(-1, 1, heat.shape[-1], device=heat.device)
        down = torch.linspace(-1, 1, heat.shape[-2], device=heat.device)
        weight = heat.flatten(2).softmax(-1).view_as(heat)
        summary = torch.cat(
            [(weight.sum(-2) * across).sum(-1), (weight.sum(-1) * down).sum(-1)], -1
        )
        return F.relu(self.patches(x)), summary


@block("timm_backbone")
class TimmBackbone(nn.Module):
    """Any timm model that has forward_features and forward_head: features (B, C, h', w'), pooled summary (B, S).

    name: timm's; weights: a safetensors file in timm's layout, whose classifier is ignored; options go to
    timm.create_model (a ViT takes img_size: [h, w], or dynamic_img_size: true to keep its own position table).
    Pictures are normalised by the mean and standard deviation that the model's published weights expect.
    """

    def __init__(self, name, weights=None, **options):
        super().__init__()
        import timm  # takes two seconds

        self.name, self.weights = name, weights
        self.model = timm.create_model(name, pretrained=False, num_classes=0, **options)
        for key in ("mean", "std"):
            value = torch.tensor(self.model.pretrained_cfg[key]).view(3, 1, 1)
            self.register_buffer(f"image_{key}", value, persistent=False)

    def load_weights(self) -> Path:
        """Reads `weights`; the file. Raises UserError that lists what differs."""
        file, classifier = (
            Path(self.weights).absolute(),
            self.model.pretrained_cfg.get("classifier") or (),
        )
        heads = tuple(
            f"{name}." for name in ([classifier] if isinstance(classifier, str) else classifier)
        )
        tensors = {
            key: value for key, value in read_tensors(file).items() if not key.startswith(heads)
        }
        try:
            self.model.load_state_dict(tensors)
        except RuntimeError as e:
            raise UserError(f"{file}: not the weights of timm's '{self.name}': {e}") from e
        return file

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        x = self.model.forward_features((image - self.image_mean) / self.image_std)
        summary = self.model.forward_head(x, pre_logits=True)
        if x.ndim == 3:
            x = x[:, self.model.num_prefix_tokens :]  # without class and register tokens
            rows = round((x.shape[1] * image.shape[2] / image.shape[3]) ** 0.5)
            x = x.unflatten(1, (rows, -1)).permute(0, 3, 1, 2)
        elif getattr(self.model, "output_fmt", "NCHW") == "NHWC":
            x = x.permute(0, 3, 1, 2)
        return x, summary
