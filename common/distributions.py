"""What posterior and prior say about the latent z (B, n, D), and the heads that predict it from features (B, n, d).

A distribution draws z as a function of the observation and of noise alone: holding the noise holds the choice as long
as the observation allows it. Its `size` is what z is drawn from: n tokens of D dimensions, or n slots of K codes.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from common import flow
from common.blocks.embed import sincos
from common.config import ConfigError
from common.losses import linear_path, sample_time


class Gaussian(NamedTuple):
    """Diagonal Gaussian over n latent tokens: mu, logvar (B, n, D)."""

    mu: Tensor
    logvar: Tensor

    @property
    def size(self):
        return tuple(self.mu.shape[1:])

    def sample(self, noise) -> Tensor:
        return self.mu + (0.5 * self.logvar).exp() * noise.normal(*self.mu.shape)


class Point(NamedTuple):
    """One answer: as a posterior the tokens to quantise, as a prior the mean, which collapses to one mode."""

    tokens: Tensor

    @property
    def size(self):
        return tuple(self.tokens.shape[1:])

    def sample(self, noise, codes=None) -> Tensor:
        """z (B, n, D): the tokens, or the nearest of `codes` (K, D)."""
        return self.tokens if codes is None else codes.detach()[nearest(self.tokens, codes)]

    def loss(self, z: Tensor, noise) -> Tensor:
        return (self.tokens - z).square().mean()


class LatentFlow(NamedTuple):
    """A small flow from noise to z, given features h (B, n, d)."""

    head: nn.Module
    h: Tensor

    @property
    def size(self):
        return self.head.size

    def sample(self, noise, steps=10) -> Tensor:
        x0 = noise.normal(len(self.h), *self.size)
        return flow.euler(
            lambda z, t: self.head.velocity(z, x0.new_full((len(z),), t), self.h), x0, steps
        )

    def loss(self, z: Tensor, noise) -> Tensor:
        x0, t = noise.normal(*z.shape), sample_time(noise.uniform(len(z)))
        zt, velocity = linear_path(x0, z, t)
        return (self.head.velocity(zt, t, self.h) - velocity).square().mean()


class Codes(NamedTuple):
    """Categorical over the K codes of n slots, each given those before it; features h (B, n, d)."""

    head: nn.Module
    h: Tensor

    @property
    def size(self):
        return self.h.shape[1], self.head.num_codes

    def sample(self, noise, codes: Tensor, temperature=1.0) -> Tensor:
        """z (B, n, D) of `codes` (K, D): the largest of logits plus Gumbel noise times temperature, slot by slot.

        The gradient reaches the logits as if z were the mean of the softmax (straight through: Jang et al. 2017,
        arXiv:1611.01144, section 2.2), and not the codes.
        """
        codes, uniform = (
            codes.detach(),
            noise.uniform(len(self.h), *self.size).clamp(min=1e-30),
        )  # log 0 has no product
        gumbel = -temperature * (-uniform.log()).log()
        indices = torch.zeros(self.h.shape[:2], dtype=torch.long, device=self.h.device)
        for slot in range(indices.shape[1]):
            indices[:, slot] = (self.head.logits(self.h, indices) + gumbel)[:, slot].argmax(-1)
        z = codes[indices]
        if torch.is_grad_enabled():
            mean = (self.head.logits(self.h, indices) + gumbel).softmax(-1) @ codes
            z = z + mean - mean.detach()
        return z

    def loss(self, indices: Tensor, noise, smoothing=0.0) -> Tensor:
        """Cross-entropy in nats, mean over slots."""
        logits = self.head.logits(self.h, indices).transpose(1, 2)
        return nn.functional.cross_entropy(logits, indices, label_smoothing=smoothing)


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
        self.size, self.time_dim = (tokens, latent_dim), 32
        self.hidden = nn.Sequential(
            nn.Linear(tokens * (latent_dim + dim) + self.time_dim, dim),
            nn.SiLU(),
            nn.Linear(dim, dim),
            nn.SiLU(),
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
        self.num_codes = num_codes
        self.embed = (
            nn.Parameter(0.02 * torch.randn(tokens - 1, num_codes, dim)) if tokens > 1 else None
        )
        self.out = nn.Linear(dim, num_codes)

    def forward(self, h) -> Codes:
        return Codes(self, h)

    def logits(self, h, indices) -> Tensor:
        if self.embed is not None:
            before = self.embed[
                torch.arange(len(self.embed), device=h.device), indices[:, :-1]
            ].cumsum(1)
            h = torch.cat([h[:, :1], h[:, 1:] + before], 1)
        return self.out(nn.functional.silu(h)).float()


HEADS = {"gaussian": GaussianHead, "flow": FlowHead, "point": PointHead, "codes": CodeHead}
DISTRIBUTIONS = {Gaussian: "gaussian", LatentFlow: "flow", Point: "point", Codes: "codes"}


def latent_head(head, dim, tokens, latent_dim, num_codes) -> nn.Module:
    """Features (B, n, dim) -> a distribution. head: gaussian, flow or point over z of latent_dim, or codes."""
    if head not in HEADS:
        raise ValueError(f"head: {head}; expected one of {', '.join(HEADS)}")
    size, name = (num_codes, "num_codes") if head == "codes" else (latent_dim, "latent_dim")
    if not size:
        raise ValueError(f"head {head} needs {name}, found {size}")
    return HEADS[head](dim, tokens, size)


def nearest(z: Tensor, codes: Tensor) -> Tensor:
    """Indices (B, n) of the `codes` (K, D) nearest to z (B, n, D)."""
    return torch.cdist(z.detach().float(), codes.detach()).argmin(-1)


def check(posterior, prior, codes: Tensor | None = None):
    """Raise ValueError where posterior and prior do not fit each other, or the codes (K, D) of a codebook."""
    beside = "with a codebook" if codes is not None else "without a codebook"
    fit = (
        ({Gaussian}, {Gaussian, LatentFlow, Point}) if codes is None else ({Point}, {Codes, Point})
    )
    for role, given, kinds in zip(("posterior", "prior"), (posterior, prior), fit, strict=True):
        if type(given) not in kinds:
            heads = " or ".join(DISTRIBUTIONS[kind] for kind in kinds)
            raise ConfigError(
                f"the {role}'s head is {DISTRIBUTIONS.get(type(given))}; {beside} it must be {heads}"
            )
    tokens, dims = posterior.size
    expected = (tokens, len(codes)) if isinstance(prior, Codes) else (tokens, dims)
    if prior.size != expected:
        raise ConfigError(
            f"the prior has (tokens, size) {prior.size}; posterior and codebook need {expected}"
        )
    if codes is not None and codes.shape[1] != dims:
        raise ConfigError(f"the posterior's latent_dim is {dims}, the codebook's {codes.shape[1]}")
