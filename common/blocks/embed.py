"""Positions and times as sines."""

import math

import torch
from torch import Tensor

from common.config import ConfigError


def sincos(positions: Tensor, dim: int, longest=10_000.0, shortest=2 * math.pi) -> Tensor:
    """positions (...) -> (..., dim): sines and cosines with `dim / 2` periods, geometric from shortest to longest."""
    exponent = torch.linspace(0, 1, dim // 2, device=positions.device)
    angle = positions[..., None] * (2 * math.pi / (shortest * (longest / shortest) ** exponent))
    return torch.cat([angle.sin(), angle.cos()], -1)


def with_positions(tokens: Tensor) -> Tensor:
    """Grid (B, h, w, d) or sequence (B, N, d) -> (B, N, d) with fixed 2-D or 1-D sine positions added."""
    *axes, dim = tokens.shape[1:]
    at = [torch.arange(n, device=tokens.device, dtype=torch.float32) for n in axes]
    parts = [sincos(p, dim // len(axes)) for p in torch.meshgrid(*at, indexing="ij")]
    return (tokens + torch.cat(parts, -1).to(tokens.dtype)).flatten(1, -2)


def known_prefix(built):
    """The part of a decoder that reads which actions are given; raises where it was built without."""
    if built is None:
        raise ConfigError(
            "given the first actions of a chunk (loss.prefix), but built without `prefix: true`"
        )
    return built
