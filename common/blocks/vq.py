"""The codebook of a discrete latent."""

from typing import NamedTuple

import torch
from accelerate.utils import gather
from torch import Tensor, nn

from common import optim
from common.build import block
from common.distributions import nearest
from common.losses import nsvq


class Code(NamedTuple):
    """The codes zq (B, n, D) nearest to some z_e, their indices (B, n), and z: what the decoder sees in their place."""

    zq: Tensor
    indices: Tensor
    z: Tensor


@block("vq_codebook")
class Codebook(nn.Module):
    """`num_codes` vectors of `latent_dim`, a running average of each one's share of use, and the z_e of this step.

    null_tokens: learned tokens that say nothing, `null` (n, D), for classifier-free guidance.
    """

    def __init__(self, num_codes, latent_dim, null_tokens=0):
        super().__init__()
        self.codes = nn.Parameter(torch.randn(num_codes, latent_dim))
        self.null_tokens = null_tokens
        self.null = (
            nn.Parameter(0.02 * torch.randn(null_tokens, latent_dim)) if null_tokens else None
        )
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

    def state(self) -> dict[str, Tensor]:
        """Of the running average: the effective number of codes in use, and the number of those hardly used."""
        share = self.usage / self.usage.sum()
        return {"perplexity": (-torch.xlogy(share, share).sum()).exp(), "dead": self._dead().sum()}

    def _dead(self):
        return self.usage < 0.2 / len(self.codes)

    @torch.no_grad()
    def after_step(self, noise, optimizers, average, first=False):
        """Count which codes the step used; with noise, those hardly used move to where the error is.

        Hardly: less than a fifth of an even share, averaged over about 100 steps. They move to z_e of the step, drawn
        in proportion to their squared distance from their codes, as k-means++ draws its centres (Arthur & Vassilvitskii
        2007): a code that serves two ways of doing the task gets company. After the `first` step, all codes become the
        centres of its z_e. All processes do the same.
        """
        indices = torch.cat([gather(indices.flatten()) for _, indices in self.seen])
        counts = torch.zeros_like(self.usage).index_add_(
            0, indices, torch.ones_like(indices, dtype=torch.float32)
        )
        self.usage.lerp_(counts / len(indices), 0.01)
        dead = self._dead()
        z_e = (
            torch.cat([gather(z_e.flatten(0, 1)) for z_e, _ in self.seen])
            if noise is not None
            else ()
        )
        if first and self.codes.requires_grad and len(z_e) < len(self.codes):
            print(
                f"notice: {len(self.codes)} codes start at random: a batch has only {len(z_e)} points for k-means"
            )
        elif first and self.codes.requires_grad:
            self.codes.copy_(centres(z_e, len(self.codes)))
            optim.reset_rows(optimizers, average, self.codes, slice(None))
        elif noise is not None and self.codes.requires_grad and dead.any():
            dead = dead.nonzero()[:, 0]
            error = (z_e - self.codes[indices]).square().sum(-1) + 1e-12  # all may be 0
            chosen = z_e[
                torch.multinomial(error, len(dead), replacement=True, generator=noise.generator)
            ]
            self.codes[dead] = chosen + 0.01 * noise.normal(*chosen.shape)
            self.usage[dead] = 1 / len(self.codes)
            optim.reset_rows(optimizers, average, self.codes, dead)
        self.seen.clear()


def centres(x: Tensor, k: int) -> Tensor:
    """k-means of x (N, D) -> (k, D)."""
    from scipy.cluster.vq import kmeans2  # takes half a second

    found, _ = kmeans2(x.double().cpu().numpy(), k, iter=20, minit="++", missing="warn", seed=0)
    return torch.from_numpy(found).to(x)
