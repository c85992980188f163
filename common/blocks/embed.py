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
    *axes, dim = tokens.shape[1:]
    ranges = [torch.arange(n, device=tokens.device, dtype=torch.float32) for n in axes]
    grids = torch.meshgrid(*ranges, indexing="ij")
    positions = torch.cat([sincos(grid, dim // len(axes)) for grid in grids], -1)
    return (tokens + positions.to(tokens.dtype)).flatten(1, -2)
