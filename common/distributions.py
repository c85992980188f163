"""Distributions over the latent z (B, n, D), and heads that predict them from features (B, n, d).

A distribution draws z as a function of the observation and of noise alone: with its noise held, a
choice holds as long as the observation allows it. `size` is the shape of a draw: n tokens of D
numbers, or n slots of K codes.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from common.blocks.embed import sincos
from common.config import ConfigError
from common.flow import euler, linear_path, sample_time


class Gaussian(NamedTuple):
    """Diagonal Gaussian over n latent tokens: mu, logvar (B, n, D)."""

    mu: Tensor
    logvar: Tensor

    @property
    def size(self) -> tuple[int, ...]:
        return tuple(self.mu.shape[1:])

    def sample(self, noise: Any) -> Tensor:
        return self.mu + (0.5 * self.logvar).exp() * noise.normal(*self.mu.shape)


class Point(NamedTuple):
    """A single answer: as a posterior the tokens to quantise, as a prior the mean.

    As a prior it collapses to one mode: a negative control.
    """

    tokens: Tensor

    @property
    def size(self) -> tuple[int, ...]:
        return tuple(self.tokens.shape[1:])

    def sample(self, noise: Any, codes: Tensor | None = None) -> Tensor:
        """z (B, n, D): the tokens, or the nearest of `codes` (K, D)."""
        if codes is None:
            return self.tokens
        return codes.detach()[nearest_codes(self.tokens, codes)]

    def loss(self, z: Tensor, noise: Any) -> Tensor:
        return (self.tokens - z).square().mean()


class LatentFlow(NamedTuple):
    """A small flow from noise to z, given features h (B, n, d)."""

    head: "FlowHead"
    h: Tensor

    @property
    def size(self) -> tuple[int, ...]:
        return self.head.size

    def sample(self, noise: Any, steps: int = 10) -> Tensor:
        x0 = noise.normal(len(self.h), *self.size)

        def velocity(z, t):
            return self.head.velocity(z, x0.new_full((len(z),), t), self.h)

        return euler(velocity, x0, steps)

    def loss(self, z: Tensor, noise: Any) -> Tensor:
        x0 = noise.normal(*z.shape)
        t = sample_time(noise.uniform(len(z)))
        z_t, velocity = linear_path(x0, z, t)
        return (self.head.velocity(z_t, t, self.h) - velocity).square().mean()


class Codes(NamedTuple):
    """Categorical over the K codes of n slots, each given those before it; features h (B, n, d)."""

    head: "CodeHead"
    h: Tensor

    @property
    def size(self) -> tuple[int, ...]:
        return self.h.shape[1], self.head.num_codes

    def sample(self, noise: Any, codes: Tensor, temperature: float = 1.0) -> Tensor:
        """z (B, n, D) of `codes` (K, D): the largest of logits plus Gumbel noise, slot by slot.

        The Gumbel noise is multiplied by temperature; 0 gives the most likely codes. The gradient
        reaches the logits as if z were the mean of the softmax (straight through: Jang et al. 2017,
        arXiv:1611.01144, section 2.2), and not the codes.
        """
        codes = codes.detach()
        uniform = noise.uniform(len(self.h), *self.size).clamp(min=1e-30)  # 0 log 0 is no number
        gumbel = -temperature * (-uniform.log()).log()
        indices = torch.zeros(self.h.shape[:2], dtype=torch.long, device=self.h.device)
        for slot in range(indices.shape[1]):
            logits = self.head.logits(self.h, indices) + gumbel
            indices[:, slot] = logits[:, slot].argmax(-1)
        z = codes[indices]
        if torch.is_grad_enabled():
            mean = (self.head.logits(self.h, indices) + gumbel).softmax(-1) @ codes
            z = z + mean - mean.detach()
        return z

    def loss(self, indices: Tensor, label_smoothing: float = 0.0) -> Tensor:
        """Cross-entropy in nats of codes with these indices (B, n), mean over slots."""
        logits = self.head.logits(self.h, indices).transpose(1, 2)
        return nn.functional.cross_entropy(logits, indices, label_smoothing=label_smoothing)


class GaussianHead(nn.Linear):
    """Features (B, n, dim) -> Gaussian, with a log variance from -6 to 2."""

    def __init__(self, dim: int, tokens: int, latent_dim: int):
        super().__init__(dim, 2 * latent_dim)

    def forward(self, h: Tensor) -> Gaussian:
        mu, logvar = super().forward(h).float().chunk(2, -1)
        return Gaussian(mu, logvar.clamp(-6, 2))


class PointHead(nn.Linear):
    """Features (B, n, dim) -> Point."""

    def __init__(self, dim: int, tokens: int, latent_dim: int):
        super().__init__(dim, latent_dim)

    def forward(self, h: Tensor) -> Point:
        return Point(super().forward(h).float())


class FlowHead(nn.Module):
    """Features (B, n, dim) -> LatentFlow: the velocity of all tokens, by two hidden layers."""

    def __init__(self, dim: int, tokens: int, latent_dim: int):
        super().__init__()
        self.size = (tokens, latent_dim)
        self.time_dim = 32
        self.hidden = nn.Sequential(
            nn.Linear(tokens * (latent_dim + dim) + self.time_dim, dim),
            nn.SiLU(),
            nn.Linear(dim, dim),
            nn.SiLU(),
        )
        self.out = nn.Linear(dim, tokens * latent_dim)

    def forward(self, h: Tensor) -> LatentFlow:
        return LatentFlow(self, h)

    def velocity(self, z: Tensor, t: Tensor, h: Tensor) -> Tensor:
        time = sincos(t, self.time_dim, longest=4.0, shortest=4e-2)
        x = self.hidden(torch.cat([z.flatten(1), h.flatten(1), time.to(h.dtype)], 1))
        return self.out(x).float().view_as(z)


class CodeHead(nn.Module):
    """Features (B, n, dim) -> Codes: logits of a slot from its features and the codes before it."""

    def __init__(self, dim: int, tokens: int, num_codes: int):
        super().__init__()
        self.num_codes = num_codes
        self.embed = None
        if tokens > 1:
            self.embed = nn.Parameter(0.02 * torch.randn(tokens - 1, num_codes, dim))
        self.out = nn.Linear(dim, num_codes)

    def forward(self, h: Tensor) -> Codes:
        return Codes(self, h)

    def logits(self, h: Tensor, indices: Tensor) -> Tensor:
        if self.embed is not None:
            slots = torch.arange(len(self.embed), device=h.device)
            before = self.embed[slots, indices[:, :-1]].cumsum(1)
            h = torch.cat([h[:, :1], h[:, 1:] + before], 1)
        return self.out(nn.functional.silu(h)).float()


HEADS = {"gaussian": GaussianHead, "flow": FlowHead, "point": PointHead, "codes": CodeHead}
NAMES = {Gaussian: "gaussian", LatentFlow: "flow", Point: "point", Codes: "codes"}


def latent_head(
    head: str, dim: int, tokens: int, latent_dim: int | None, num_codes: int | None
) -> nn.Module:
    """Features (B, n, dim) -> a distribution.

    head: gaussian, flow or point, over z of latent_dim numbers; or codes, over num_codes.
    """
    if head not in HEADS:
        raise ValueError(f"head: {head}; expected one of {', '.join(HEADS)}")
    name = "num_codes" if head == "codes" else "latent_dim"
    size = num_codes if head == "codes" else latent_dim
    if not size:
        raise ValueError(f"head {head} needs {name}, found {size}")
    return HEADS[head](dim, tokens, size)


def nearest_codes(z: Tensor, codes: Tensor) -> Tensor:
    """Indices (B, n) of the `codes` (K, D) nearest to z (B, n, D)."""
    return torch.cdist(z.detach().float(), codes.detach()).argmin(-1)


def check_fit(kind: str, posterior: Any, prior: Any, codes: Tensor | None = None) -> None:
    """Raise ConfigError where posterior, prior and the codes (K, D) of a codebook do not fit.

    kind: what the names of these components begin with, vae or vqvae.
    """
    if codes is None:
        allowed = {"posterior": {Gaussian}, "prior": {Gaussian, LatentFlow, Point}}
    else:
        allowed = {"posterior": {Point}, "prior": {Codes, Point}}
    for role, given in (("posterior", posterior), ("prior", prior)):
        if type(given) not in allowed[role]:
            heads = " or ".join(NAMES[kind] for kind in NAMES if kind in allowed[role])
            beside = "without a codebook" if codes is None else "with a codebook"
            raise ConfigError(
                f"{kind}_{role} has head: {NAMES.get(type(given))}; {beside} it must be {heads}"
            )
    tokens, dims = posterior.size
    expected = (tokens, dims) if codes is None or isinstance(prior, Point) else (tokens, len(codes))
    if prior.size != expected:
        unit = "codes" if isinstance(prior, Codes) else "numbers"
        raise ConfigError(
            f"{kind}_prior draws {prior.size[0]} tokens of {prior.size[1]} {unit}; "
            f"{kind}_posterior{'' if codes is None else f' and {kind}_codebook'} need "
            f"{expected[0]} of {expected[1]}"
        )
    if codes is not None and codes.shape[1] != dims:
        raise ConfigError(
            f"{kind}_posterior has latent_dim: {dims}, {kind}_codebook has latent_dim: "
            f"{codes.shape[1]}; make them equal"
        )
