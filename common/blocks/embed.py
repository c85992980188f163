"""Positions and times as sines."""

import math

import torch
from torch import Tensor


def sincos(
    positions: Tensor, dim: int, longest: float = 10_000.0, shortest: float = 2 * math.pi
) -> Tensor:
    """positions (...) -> (..., dim): sines and cosines of `dim / 2` periods.

    The periods are geometric, from shortest to longest.
    """
    exponent = torch.linspace(0, 1, dim // 2, device=positions.device)
    period = shortest * (longest / shortest) ** exponent
    angle = positions[..., None] * (2 * math.pi / period)
    return torch.cat([angle.sin(), angle.cos()], -1)


def with_positions(tokens: Tensor) -> Tensor:
    """Grid (B, h, w, d) or sequence (B, N, d) -> (B, N, d) plus fixed 2-D or 1-D sine positions."""
    *sides, dim = tokens.shape[1:]
    axes = [torch.arange(side, device=tokens.device).float() for side in sides]
    grids = torch.meshgrid(*axes, indexing="ij")
    share = dim // len(sides)
    positions = torch.cat([sincos(grid, share) for grid in grids], -1)
    placed = tokens + positions.to(tokens.dtype)
    return placed.flatten(1, -2)
