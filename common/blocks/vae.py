"""Encoders and decoders of the two VAEs in whose latents train_mi.py finds neighbours.

An encoder gives a diagonal Gaussian. Outputs of decoders are linear: their targets are normalised.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.build import Count, block
from common.config import ConfigError
from common.distributions import Gaussian, GaussianHead

GRID = 4  # cells on a side to which a picture is averaged
RESNET34 = (3, 4, 6, 3)  # blocks per stage, at width 64


def mlp(size: int, dim: int, layers: int) -> nn.Sequential:
    """`layers` hidden layers of `dim` on `size` numbers."""
    sizes = [size, *[dim] * layers]
    return nn.Sequential(
        *(step for pair in pairwise(sizes) for step in (nn.Linear(*pair), nn.SiLU()))
    )


@block("chunk_encoder")
class ChunkEncoder(nn.Module):
    """Action chunk (B, T, A) -> Gaussian over one token z (B, 1, latent_dim).

    Args:
        dim: width of the hidden layers.
        layers: number of hidden layers.
        latent_dim: numbers in z.
        action_dim: numbers A in an action; null: the dataset's.
        action_horizon: actions T in a chunk; null: the dataset's.
    """

    def __init__(
        self, dim: int, layers: int, latent_dim: int, action_dim: int, action_horizon: int
    ):
        super().__init__()
        self.hidden = mlp(action_dim * action_horizon, dim, layers)
        self.head = GaussianHead(dim, 1, latent_dim)

    def forward(self, action: Tensor) -> Gaussian:
        return self.head(self.hidden(action.flatten(1))[:, None])


@block("chunk_decoder")
class ChunkDecoder(nn.Module):
    """z (B, 1, latent_dim) -> action chunk (B, T, A).

    Args:
        dim: width of the hidden layers.
        layers: number of hidden layers.
        latent_dim: numbers in z.
        action_dim: numbers A in an action; null: the dataset's.
        action_horizon: actions T in a chunk; null: the dataset's.
    """

    def __init__(
        self, dim: int, layers: int, latent_dim: int, action_dim: int, action_horizon: int
    ):
        super().__init__()
        self.shape = (action_horizon, action_dim)
        self.layers = mlp(latent_dim, dim, layers)
        self.layers.append(nn.Linear(dim, action_horizon * action_dim))

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(z.flatten(1)).unflatten(1, self.shape)


class Residual(nn.Module):
    """Block of two convolutions of He et al. 2016 (arXiv:1512.03385, figure 2), with group norm.

    Batch norm would make the score of a sample depend on the other samples of its batch.
    """

    def __init__(self, size: int, out: int, stride: int = 1):
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(size, out, 3, stride, padding=1, bias=False),
            nn.GroupNorm(8, out),
            nn.ReLU(),
            nn.Conv2d(out, out, 3, padding=1, bias=False),
            nn.GroupNorm(8, out),
        )
        self.shortcut = nn.Identity()
        if stride > 1 or size != out:
            self.shortcut = nn.Conv2d(size, out, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.shortcut(x) + self.convolutions(x))


def stage_widths(width: int, stages: int) -> list[int]:
    """Channels of each stage, doubled from one to the next."""
    if width % 8:
        raise ValueError(f"width {width}: expected a multiple of 8, the number of groups of a norm")
    return [width * 2**i for i in range(stages)]


@block("resnet_state_encoder")
class StateEncoder(nn.Module):
    """proprio (B, P, S), pictures (B, 3, h, w) per camera -> Gaussian over z (B, 1, latent_dim).

    Pictures are floats in [0, 1]. They go through one residual network, of stride 2 to the power of
    len(depths) + 1, are averaged over 4 x 4 cells, and flattened. Without cameras there is none.

    Args:
        dim: width of the hidden layers.
        layers: number of hidden layers.
        latent_dim: numbers in z.
        state_dim: numbers S in a proprioceptive state; null: the dataset's.
        proprio_history: states P in an observation; null: the dataset's.
        num_cameras: number of pictures; null: the dataset's.
        width: channels of the first stage, a multiple of 8; each stage doubles them.
        depths: number of residual blocks of each stage; the default is ResNet-34's.
    """

    def __init__(
        self,
        dim: int,
        layers: int,
        latent_dim: int,
        state_dim: int,
        proprio_history: int,
        num_cameras: Count,
        width: int = 64,
        depths: Sequence[int] = RESNET34,
    ):
        super().__init__()
        self.cameras = num_cameras
        self.camera_sizes: list[int] = []  # numbers of each camera's features
        size = state_dim * proprio_history
        if num_cameras:
            steps = [nn.Conv2d(3, width, 7, 2, padding=3), nn.ReLU(), nn.MaxPool2d(3, 2, padding=1)]
            last = width
            for out, depth in zip(stage_widths(width, len(depths)), depths, strict=True):
                steps.append(Residual(last, out, stride=1 if last == out else 2))
                steps += [Residual(out, out) for _ in range(depth - 1)]
                last = out
            self.eye = nn.Sequential(*steps, nn.AdaptiveAvgPool2d(GRID), nn.Flatten())
            self.camera_sizes = [last * GRID**2] * num_cameras
            size += sum(self.camera_sizes)
        self.hidden = mlp(size, dim, layers)
        self.head = GaussianHead(dim, 1, latent_dim)

    @torch.no_grad()
    def reorder_inputs(self, visual: Sequence[int], cameras: Sequence[int]) -> None:
        """Give camera i the weights of camera cameras[i]."""
        weight = self.hidden[0].weight
        proprio = weight.shape[1] - sum(self.camera_sizes)
        proprio, *pictures = weight.split([proprio, *self.camera_sizes], 1)
        weight.copy_(torch.cat([proprio, *(pictures[i] for i in cameras)], 1))

    def forward(self, proprio: Tensor, images: list[Tensor]) -> Gaussian:
        if len(images) != self.cameras:
            raise ConfigError(f"{len(images)} pictures given, built for {self.cameras}")
        inputs = [proprio.flatten(1)]
        if images:
            inputs += self.eye(2 * torch.cat(images) - 1).chunk(self.cameras)
        return self.head(self.hidden(torch.cat(inputs, 1))[:, None])


@block("resnet_state_decoder")
class StateDecoder(nn.Module):
    """z (B, 1, latent_dim) -> proprio (B, P, S), pictures (B, num_cameras, 3, side, side).

    The layers are those of the encoder in reverse. side is 4 times the encoder's stride: 128 with
    four stages, 64 with three. Without cameras the pictures are None.

    Args:
        dim: width of the hidden layers.
        layers: number of hidden layers.
        latent_dim: numbers in z.
        state_dim: numbers S in a proprioceptive state; null: the dataset's.
        proprio_history: states P in an observation; null: the dataset's.
        num_cameras: number of pictures; null: the dataset's.
        width: channels of the last stage, a multiple of 8; each stage halves them.
        depths: number of residual blocks of each stage of the encoder.
    """

    def __init__(
        self,
        dim: int,
        layers: int,
        latent_dim: int,
        state_dim: int,
        proprio_history: int,
        num_cameras: Count,
        width: int = 64,
        depths: Sequence[int] = RESNET34,
    ):
        super().__init__()
        self.shape = (proprio_history, state_dim)
        self.cameras = num_cameras
        self.hidden = mlp(latent_dim, dim, layers)
        self.proprio = nn.Linear(dim, state_dim * proprio_history)
        if num_cameras:
            widths = stage_widths(width, len(depths))
            outs = [width, *widths[:-1]]
            steps = []
            for i in reversed(range(len(depths))):
                steps += [Residual(widths[i], widths[i]) for _ in range(depths[i] - 1)]
                steps += [Residual(widths[i], outs[i]), nn.Upsample(scale_factor=2)]
            steps += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), nn.Upsample(scale_factor=2)]
            self.paint = nn.Sequential(*steps, nn.Conv2d(width, 3, 3, padding=1))
            self.grid = nn.Linear(dim, num_cameras * widths[-1] * GRID**2)

    @torch.no_grad()
    def reorder_inputs(self, visual: Sequence[int], cameras: Sequence[int]) -> None:
        """Give camera i the weights of camera cameras[i]."""
        for p in (self.grid.weight, self.grid.bias):
            p.copy_(p.unflatten(0, (self.cameras, -1))[list(cameras)].flatten(0, 1))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor | None]:
        x = self.hidden(z.flatten(1))
        proprio = self.proprio(x).unflatten(1, self.shape)
        if not self.cameras:
            return proprio, None
        grid = self.grid(x).view(len(x) * self.cameras, -1, GRID, GRID)
        return proprio, self.paint(grid).unflatten(0, (len(x), self.cameras))
