"""Encoders to diagonal Gaussians and decoders of the two VAEs in whose latents neighbours are looked for.

Outputs are linear: what is decoded is normalised, and as often below zero as above.
"""

from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.build import block
from common.config import ConfigError
from common.distributions import Gaussian, GaussianHead

GRID = 4  # cells on a side that a picture becomes before it is flattened


def mlp(size, dim, layers, out=None):
    """`layers` hidden layers of `dim`; then `out` numbers, where given."""
    sizes = [size, *[dim] * layers]
    hidden = [step for pair in pairwise(sizes) for step in (nn.Linear(*pair), nn.SiLU())]
    return nn.Sequential(*hidden, *([] if out is None else [nn.Linear(dim, out)]))


@block("chunk_encoder")
class ChunkEncoder(nn.Module):
    """Action chunk (B, T, A) -> Gaussian over one token z (B, 1, latent_dim)."""

    def __init__(self, dim, layers, latent_dim, action_dim, action_horizon):
        super().__init__()
        self.hidden = mlp(action_dim * action_horizon, dim, layers)
        self.head = GaussianHead(dim, 1, latent_dim)

    def forward(self, action: Tensor) -> Gaussian:
        return self.head(self.hidden(action.flatten(1))[:, None])


@block("chunk_decoder")
class ChunkDecoder(nn.Module):
    """z (B, 1, latent_dim) -> action chunk (B, T, A)."""

    def __init__(self, dim, layers, latent_dim, action_dim, action_horizon):
        super().__init__()
        self.shape = action_horizon, action_dim
        self.layers = mlp(latent_dim, dim, layers, action_horizon * action_dim)

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(z.flatten(1)).unflatten(1, self.shape)


class Residual(nn.Module):
    """The two-convolution block of He et al. 2016 (arXiv:1512.03385, figure 2) with group in place of batch norm.

    A batch's own statistics would tell each sample about the others, and what is scored must not depend on them.
    """

    def __init__(self, size, out, stride=1):
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(size, out, 3, stride, padding=1, bias=False),
            nn.GroupNorm(8, out),
            nn.ReLU(),
            nn.Conv2d(out, out, 3, padding=1, bias=False),
            nn.GroupNorm(8, out),
        )
        self.shortcut = (
            nn.Conv2d(size, out, 1, stride) if stride > 1 or size != out else nn.Identity()
        )

    def forward(self, x):
        return F.relu(self.shortcut(x) + self.convolutions(x))


def stages(width, depths):
    """Channels and number of blocks of each stage; ResNet-34: width 64, depths [3, 4, 6, 3]."""
    if width % 8:
        raise ValueError(f"width {width}: expected a multiple of 8, the number of groups of a norm")
    return [(width * 2**i, depth) for i, depth in enumerate(depths)]


@block("resnet_state_encoder")
class StateEncoder(nn.Module):
    """proprio (B, P, S), one picture (B, 3, h, w) in [0, 1] per camera -> Gaussian over one token z (B, 1, latent_dim).

    Each picture goes through one residual network, is averaged over 4 x 4 cells, and flattened; its stride is 2 to the
    power of len(depths) + 1. Without cameras there is no network.
    """

    def __init__(
        self,
        dim,
        layers,
        latent_dim,
        state_dim,
        proprio_history,
        num_cameras,
        width=64,
        depths=(3, 4, 6, 3),
    ):
        super().__init__()
        self.cameras, self.eye, size = num_cameras, None, state_dim * proprio_history
        if num_cameras:
            steps, last = (
                [nn.Conv2d(3, width, 7, 2, padding=3), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1)],
                width,
            )
            for out, depth in stages(width, depths):
                steps += [Residual(last, out, stride=1 if last == out else 2)]
                steps += [Residual(out, out) for _ in range(depth - 1)]
                last = out
            self.eye = nn.Sequential(*steps, nn.AdaptiveAvgPool2d(GRID), nn.Flatten())
            size += num_cameras * last * GRID**2
        self.hidden = mlp(size, dim, layers)
        self.head = GaussianHead(dim, 1, latent_dim)

    def forward(self, proprio: Tensor, images: list[Tensor]) -> Gaussian:
        if len(images) != self.cameras:
            raise ConfigError(f"{len(images)} pictures given, built for {self.cameras}")
        x = [proprio.flatten(1)]
        if images:
            x += self.eye(2 * torch.cat(images) - 1).chunk(self.cameras)
        return self.head(self.hidden(torch.cat(x, 1))[:, None])


@block("resnet_state_decoder")
class StateDecoder(nn.Module):
    """z (B, 1, latent_dim) -> proprio (B, P, S), pictures (B, num_cameras, 3, side, side): the encoder in reverse.

    side is 4 times the encoder's stride: 128 with four stages, 64 with three.
    """

    def __init__(
        self,
        dim,
        layers,
        latent_dim,
        state_dim,
        proprio_history,
        num_cameras,
        width=64,
        depths=(3, 4, 6, 3),
    ):
        super().__init__()
        self.shape, self.cameras, self.paint = (proprio_history, state_dim), num_cameras, None
        self.hidden = mlp(latent_dim, dim, layers)
        self.proprio = nn.Linear(dim, state_dim * proprio_history)
        if num_cameras:
            channels = [size for size, _ in stages(width, depths)]
            steps = []
            for i in reversed(range(len(depths))):
                steps += [Residual(channels[i], channels[i]) for _ in range(depths[i] - 1)]
                steps += [
                    Residual(channels[i], channels[max(i - 1, 0)]),
                    nn.Upsample(scale_factor=2),
                ]
            steps += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Upsample(scale_factor=2)]
            self.paint = nn.Sequential(*steps, nn.Conv2d(width, 3, 3, padding=1))
            self.grid = nn.Linear(dim, num_cameras * channels[-1] * GRID**2)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        x = self.hidden(z.flatten(1))
        pictures = None
        if self.cameras:
            grid = self.grid(x).view(len(x) * self.cameras, -1, GRID, GRID)
            pictures = self.paint(grid).unflatten(0, (len(x), self.cameras))
        return self.proprio(x).unflatten(1, self.shape), pictures
