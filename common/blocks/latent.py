"""What posterior and prior say about the latent z (B, n, D), and the heads that predict it from features (B, n, d).

A distribution draws z, or which codes, as a function of the observation and of noise alone: holding the noise holds the
choice as long as the observation allows it.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from common import flow
from common.blocks.embed import sincos
from common.losses import linear_path, sample_time


class Gaussian(NamedTuple):
    """Diagonal Gaussian over n latent tokens: mu, logvar (B, n, D)."""

    mu: Tensor
    logvar: Tensor

    def sample(self, noise) -> Tensor:
        return self.mu + (0.5 * self.logvar).exp() * noise.normal(*self.mu.shape)


class Point(NamedTuple):
    """One answer: as a posterior the tokens to quantise, as a prior the mean, which collapses to one mode."""

    tokens: Tensor

    def sample(self, noise) -> Tensor:
        return self.tokens

    def loss(self, z: Tensor, noise) -> Tensor:
        return (self.tokens - z).square().mean()


class LatentFlow(NamedTuple):
    """A small flow from noise to z, given features h (B, n, d)."""

    head: nn.Module
    h: Tensor

    def sample(self, noise, steps=10) -> Tensor:
        x0 = noise.normal(len(self.h), *self.head.shape)
        return flow.euler(lambda z, t: self.head.velocity(z, x0.new_full((len(z),), t), self.h), x0, steps)

    def loss(self, z: Tensor, noise) -> Tensor:
        x0, t = noise.normal(*z.shape), sample_time(noise.uniform(len(z)))
        zt, velocity = linear_path(x0, z, t)
        return (self.head.velocity(zt, t, self.h) - velocity).square().mean()


class Codes(NamedTuple):
    """Categorical over the codes of n slots, each given those before it; features h (B, n, d)."""

    head: nn.Module
    h: Tensor

    def sample(self, noise) -> Tensor:
        """Indices (B, n): the largest of logits plus Gumbel noise, slot by slot."""
        gumbel = -(-noise.uniform(*self.h.shape[:2], self.head.out.out_features).log()).log()
        indices = torch.zeros(self.h.shape[:2], dtype=torch.long, device=self.h.device)
        for slot in range(self.h.shape[1]):
            logits = self.head.logits(self.h, indices)[:, slot]
            indices[:, slot] = (logits + gumbel[:, slot]).argmax(-1)
        return indices

    def loss(self, indices: Tensor, noise) -> Tensor:
        """Cross-entropy in nats, mean over slots."""
        return nn.functional.cross_entropy(self.head.logits(self.h, indices).transpose(1, 2), indices)


class GaussianHead(nn.Linear):
    def __init__(self, dim, tokens, latent_dim):
        super().__init__(dim, 2 * latent_dim)

    def forward(self, h) -> Gaussian:
        mu, logvar = super().forward(h).float().chunk(2, -1)
        return Gaussian(mu, logvar.clamp(-6, 2))


class PointHead(nn.Linear):
    def __init__(self, dim, tokens, latent_dim):
        super().__init__(dim, latent_dim)

    def forward(self, h) -> Point:
        return Point(super().forward(h).float())


class FlowHead(nn.Module):
    """Velocity of all tokens together: two hidden layers."""

    def __init__(self, dim, tokens, latent_dim):
        super().__init__()
        self.shape, self.time_dim = (tokens, latent_dim), 32
        self.hidden = nn.Sequential(
            nn.Linear(tokens * (latent_dim + dim) + self.time_dim, dim), nn.SiLU(), nn.Linear(dim, dim), nn.SiLU()
        )
        self.out = nn.Linear(dim, tokens * latent_dim)

    def forward(self, h) -> LatentFlow:
        return LatentFlow(self, h)

    def velocity(self, z, t, h) -> Tensor:
        time = sincos(t, self.time_dim, longest=4.0, shortest=4e-2)
        x = self.hidden(torch.cat([z.flatten(1), h.flatten(1), time.to(h.dtype)], 1))
        return self.out(x).float().view_as(z)


class CodeHead(nn.Module):
    """Logits of each slot from its features and the codes of the slots before it."""

    def __init__(self, dim, tokens, num_codes):
        super().__init__()
        self.embed = nn.Parameter(0.02 * torch.randn(tokens, num_codes, dim))
        self.out = nn.Linear(dim, num_codes)

    def forward(self, h) -> Codes:
        return Codes(self, h)

    def logits(self, h, indices) -> Tensor:
        chosen = self.embed[torch.arange(h.shape[1], device=h.device), indices]
        return self.out(nn.functional.silu(h + chosen.cumsum(1) - chosen)).float()


def latent_head(head, dim, tokens, latent_dim, num_codes) -> nn.Module:
    """Features (B, n, dim) -> a distribution. head: gaussian, flow or point over z of latent_dim, or codes."""
    kinds = {"gaussian": GaussianHead, "flow": FlowHead, "point": PointHead, "codes": CodeHead}
    if head not in kinds:
        raise ValueError(f"head: {head}; expected one of {', '.join(kinds)}")
    size, name = (num_codes, "num_codes") if head == "codes" else (latent_dim, "latent_dim")
    if size is None:
        raise ValueError(f"head {head} needs {name}")
    return kinds[head](dim, tokens, size)
