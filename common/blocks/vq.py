"""The codebook of a discrete latent."""

from typing import NamedTuple

import torch
from accelerate.utils import gather
from torch import Tensor, nn

from common import optim
from common.blocks.latent import nearest
from common.build import block
from common.losses import nsvq


class Code(NamedTuple):
    """The codes zq (B, n, D) nearest to some z_e, their indices (B, n), and z: what the decoder sees in their place."""

    zq: Tensor
    indices: Tensor
    z: Tensor


@block("vq_codebook")
class Codebook(nn.Module):
    """`num_codes` vectors of `latent_dim`, a running average of each one's share of use, and the z_e of this step."""

    def __init__(self, num_codes, latent_dim):
        super().__init__()
        self.codes = nn.Parameter(torch.randn(num_codes, latent_dim))
        self.register_buffer("usage", torch.full((num_codes,), 1 / num_codes))
        self.seen = []

    def forward(self, z_e, noise=None) -> Code:
        """z_e (B, n, D); with noise, in training, z is z_e plus noise as long as the quantisation error (NSVQ)."""
        z_e = z_e.float()
        indices = nearest(z_e, self.codes)
        zq = self.codes[indices]
        if noise is None:
            return Code(zq, indices, zq)
        self.seen.append((z_e.detach(), indices))
        return Code(zq, indices, nsvq(z_e, zq, noise.normal(*z_e.shape)))

    def perplexity(self) -> Tensor:
        """Effective number of codes in use, of the running average."""
        share = self.usage / self.usage.sum()
        return (-torch.xlogy(share, share).sum()).exp()

    @torch.no_grad()
    def after_step(self, noise, optimizers, average):
        """Count which codes the step used; with noise, those hardly used move to where the error is.

        Hardly: less than a fifth of an even share, averaged over about 100 steps. They move to z_e of the step, drawn
        in proportion to their squared distance from their codes, as k-means++ draws its centres (Arthur & Vassilvitskii
        2007): a code that serves two ways of doing the task gets company. All processes do the same.
        """
        indices = torch.cat([gather(indices.flatten()) for _, indices in self.seen])
        counts = torch.zeros_like(self.usage).index_add_(0, indices, torch.ones_like(indices, dtype=torch.float32))
        self.usage.lerp_(counts / len(indices), 0.01)
        dead = self.usage < 0.2 / len(self.codes)
        if noise is not None and self.codes.requires_grad and dead.any():
            dead = dead.nonzero()[:, 0]
            z_e = torch.cat([gather(z_e.flatten(0, 1)) for z_e, _ in self.seen])
            error = (z_e - self.codes[indices]).square().sum(-1)
            chosen = z_e[torch.multinomial(error, len(dead), replacement=True, generator=noise.generator)]
            self.codes[dead] = chosen + 0.01 * noise.normal(*chosen.shape)
            self.usage[dead] = 1 / len(self.codes)
            optim.forget(optimizers, average, self.codes, dead)
        self.seen.clear()
