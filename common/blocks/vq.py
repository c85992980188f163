"""The codebook of a discrete latent."""

from typing import NamedTuple

import torch
from accelerate.utils import gather
from torch import Tensor, nn

from common import optim
from common.build import block
from common.losses import Noise, nsvq


class Code(NamedTuple):
    """The nearest codes zq (B, n, D) of some z_e, their indices (B, n), and z: what the decoder sees in their place."""

    zq: Tensor
    indices: Tensor
    z: Tensor


@block("vq_codebook")
class Codebook(nn.Module):
    """`num_codes` vectors of `latent_dim`. In training z is z_e plus noise as long as the quantisation error: NSVQ."""

    def __init__(self, num_codes, latent_dim):
        super().__init__()
        self.codes = nn.Parameter(torch.randn(num_codes, latent_dim))
        self.register_buffer("usage", torch.zeros(num_codes))
        self.seen = []

    def forward(self, z_e, noise) -> Code:
        z_e = z_e.float()
        indices = self.nearest(z_e)
        zq = self.codes[indices]
        if not self.training:
            return Code(zq, indices, zq)
        self.seen.append((z_e.detach(), indices))
        return Code(zq, indices, nsvq(z_e, zq, noise.normal(*z_e.shape)))

    def nearest(self, z_e) -> Tensor:
        return torch.cdist(z_e.detach(), self.codes.detach()).argmin(-1)

    def perplexity(self) -> Tensor:
        """Effective number of codes in use, of the running average."""
        share = self.usage / self.usage.sum().clamp(min=1e-12)
        return (-torch.xlogy(share, share).sum()).exp()

    def lookup(self, choice) -> Tensor:
        """z (B, n, D) of indices (B, n), or the codes nearest to tokens (B, n, D)."""
        return self.codes.detach()[self.nearest(choice) if choice.is_floating_point() else choice]

    @torch.no_grad()
    def after_step(self, step, revive, optimizers):
        """Count which codes the step used; `revive`: those hardly used move to where the error is, moments forgotten.

        Hardly: less than a fifth of an even share, averaged over about 100 steps. They move to z_e of the step, drawn
        in proportion to their squared distance from their codes, as k-means++ draws its centres (Arthur & Vassilvitskii
        2007): a code that serves two ways of doing the task gets company. All processes do the same.
        """
        indices = torch.cat([gather(indices.flatten()) for _, indices in self.seen])
        counts = torch.bincount(indices, minlength=len(self.codes)) / len(indices)
        self.usage.lerp_(counts, 0.01)
        if revive and (dead := (self.usage < 0.2 / len(self.codes)).nonzero()[:, 0]).numel():
            z_e = torch.cat([gather(z_e.flatten(0, 1)) for z_e, _ in self.seen])
            draw = Noise("revive", step, device=z_e.device)
            self.codes[dead] = z_e[(draw.uniform(len(dead)) * len(z_e)).long()] + 0.01 * draw.normal(
                *self.codes[dead].shape
            )
            self.usage[dead] = 1 / len(self.codes)
            optim.forget(optimizers, self.codes, dead)
        self.seen.clear()
