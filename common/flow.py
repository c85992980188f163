"""Flow matching: noisy chunks to learn from, and the velocity from noise to an action chunk.

Time runs from t = 0 (noise x0) to t = 1 (data x1).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from accelerate.utils.operations import recursively_apply
from torch import Tensor

from common.noise import Noise


def sample_time(u: Tensor) -> Tensor:
    """Uniform u -> t ~ Beta(1, 1.5), at most 0.999: the density is proportional to (1 - t)^0.5.

    More weight near the noise. The mirror image of pi0's schedule (Black et al. 2024,
    arXiv:2410.24164, appendix B), which runs from data to noise.
    """
    return (1 - u.pow(2 / 3)).clamp(max=0.999)


def linear_path(x0: Tensor, x1: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """x0, x1 (..., T, A), t (...) -> x_t and its velocity (..., T, A).

    Lipman et al. 2023 (arXiv:2210.02747) eq. 22, with sigma_min = 0.
    """
    t = t[..., None, None]
    return (1 - t) * x0 + t * x1, x1 - x0


def random_prefix(u: Tensor, horizon: int, longest: int) -> Tensor:
    """Uniform u (B, R) -> mask (B, R, T), true for the first d actions; d uniform in 0 .. longest.

    Training on given prefixes lets a chunk continue the running one (Black et al. 2025,
    arXiv:2512.05964: training-time real-time chunking).
    """
    length = (u * (longest + 1)).floor()
    return torch.arange(horizon, device=u.device) < length[..., None]


class NoisyChunks(NamedTuple):
    """R noisy versions of each chunk: x0, x1, x_t and the decoder's target (B, R, T, A), t (B, R).

    ignored (B, R, T) marks actions without loss: padding, and the given prefix. prefix_mask
    (B, R, T) marks the actions of x_t that are given and clean; None where none ever are.
    """

    x0: Tensor
    x1: Tensor
    x_t: Tensor
    t: Tensor
    target: Tensor
    ignored: Tensor
    prefix_mask: Tensor | None


def noisy_chunks(
    x1: Tensor,
    is_pad: Tensor,
    noise: Noise,
    draws: int = 1,
    target: str = "velocity",
    longest_prefix: int = 0,
) -> NoisyChunks:
    """Normalised chunks x1 (B, T, A), is_pad (B, T) -> `draws` noisy versions of each, and targets.

    target: `velocity`, or `x1` to predict the data.
    """
    x1 = x1[:, None].expand(-1, draws, -1, -1)
    x0 = noise.normal(*x1.shape)
    t = sample_time(noise.uniform(*x1.shape[:2]))
    x_t, velocity = linear_path(x0, x1, t)
    ignored = is_pad[:, None].expand(x1.shape[:3])
    prefix_mask = None
    if longest_prefix:
        prefix_mask = random_prefix(noise.uniform(*t.shape), x1.shape[2], longest_prefix)
        x_t = torch.where(prefix_mask[..., None], x1, x_t)
        ignored = ignored | prefix_mask
    return NoisyChunks(x0, x1, x_t, t, x1 if target == "x1" else velocity, ignored, prefix_mask)


def decoder_velocity(
    decoder: Callable[..., Tensor],
    context: Any,
    x: Tensor,
    t: float,
    target: str,
    prefix_mask: Tensor | None = None,
) -> Tensor:
    """Velocity (B, T, A) of noisy chunks x (B, T, A) at time t, whatever the decoder predicts.

    target: what the decoder was trained to predict. From x1 the velocity is (x1 - x) / (1 - t).
    Actions marked by prefix_mask (T,) are given: they do not move.
    """
    mask = None if prefix_mask is None else prefix_mask.expand(len(x), 1, -1)
    times = x.new_full((len(x), 1), t)
    predicted = decoder(x_t=x[:, None], t=times, context=context, prefix_mask=mask)[:, 0]
    velocity = (predicted - x) / (1 - t) if target == "x1" else predicted
    return velocity if prefix_mask is None else velocity.masked_fill(prefix_mask[:, None], 0)


def one_step(decoder: Callable[..., Tensor], context: Any, x0: Tensor, target: str) -> Tensor:
    """Noise x0 (B, R, T, A) -> chunks (B, R, T, A) by a single Euler step, with gradient."""
    times = x0.new_zeros(x0.shape[:2])
    predicted = decoder(x_t=x0, t=times, context=context, prefix_mask=None)
    return predicted if target == "x1" else x0 + predicted


def guided(velocity: Callable[..., Tensor], w: float) -> Callable[..., Tensor]:
    """velocity of twice the chunks, conditional before null ones -> null + w (conditional - null).

    Ho & Salimans 2022 (arXiv:2207.12598) eq. 6, whose w is ours less one. Both halves are one call.
    """

    def both(x, t, prefix_mask=None):
        conditional, null = velocity(torch.cat([x, x]), t, prefix_mask=prefix_mask).chunk(2)
        return null + w * (conditional - null)

    return both


def euler(velocity: Callable[..., Tensor], x0: Tensor, steps: int) -> Tensor:
    """Integrate dx/dt = velocity(x, t) from t = 0 to 1 in equal steps, one evaluation each."""
    x = x0
    for k in range(steps):
        x = x + velocity(x, k / steps) / steps
    return x


def detached(context: Any) -> Any:
    """The same context without gradient to any of its tensors."""
    return recursively_apply(torch.detach, context)
