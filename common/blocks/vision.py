"""Image backbones: (B, 3, h, w) in [0, 1] -> features (B, C, h', w'), summary (B, S)."""

import timm
import torch
from torch import nn
from torch.nn import functional as F

from common.build import block


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
        summary = torch.cat([(weight.sum(-2) * across).sum(-1), (weight.sum(-1) * down).sum(-1)], -1)
        return F.relu(self.patches(x)), summary
